package files

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// kill signals a process of one of these users. A pidfd holds it, so that the process that
// is signalled is the one whose user was looked at. Before Linux 5.3 there is none, and
// the process could end between the two.
func kill(pid int, s syscall.Signal, of []int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil && !errors.Is(err, unix.ENOSYS) {
		return err
	}
	if err == nil {
		defer unix.Close(fd)
	}
	real, effective, userErr := userOf(pid)
	if err == nil {
		// What was read is of the process that the pidfd holds if that one still runs.
		if err := unix.PidfdSendSignal(fd, 0, nil, 0); errors.Is(err, unix.ESRCH) {
			return err
		}
	}
	if userErr != nil {
		return userErr
	}
	if err := checkUser(real, effective, of); err != nil {
		return err
	}
	if err != nil {
		return unix.Kill(pid, s)
	}
	return unix.PidfdSendSignal(fd, s, nil, 0)
}

// userOf reads proc_pid_status(5). The owner of /proc/PID is root's for a process that
// cannot be dumped.
func userOf(pid int) (real, effective int, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if errors.Is(err, os.ErrNotExist) {
		return 0, 0, unix.ESRCH
	}
	if err != nil {
		return 0, 0, err
	}
	_, rest, ok := bytes.Cut(text, []byte("\nUid:"))
	if _, err := fmt.Sscan(string(rest), &real, &effective); !ok || err != nil {
		return 0, 0, errors.New("its user cannot be read")
	}
	return real, effective, nil
}
