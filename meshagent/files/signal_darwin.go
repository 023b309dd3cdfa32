package files

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// kill signals a process of one of these users. macOS has no handle of a process: it could
// end between the two.
func kill(pid int, s syscall.Signal, of []int) error {
	info, err := unix.SysctlKinfoProc("kern.proc.pid", pid)
	if err != nil || int(info.Proc.P_pid) != pid {
		return unix.ESRCH
	}
	if err := checkUser(int(info.Eproc.Pcred.P_ruid), int(info.Eproc.Ucred.Uid), of); err != nil {
		return err
	}
	return unix.Kill(pid, s)
}
