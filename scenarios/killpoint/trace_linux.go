//go:build amd64 || arm64

package killpoint

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"unsafe"
)

const (
	getSyscallInfo = 0x420e // PTRACE_GET_SYSCALL_INFO, Linux 5.3
	atEntry        = 1      // PTRACE_SYSCALL_INFO_ENTRY
	exitKill       = 0x100000
	wallThreads    = 0x40000000 // __WALL
	syscallStop    = syscall.SIGTRAP | 0x80
)

// callInfo is struct ptrace_syscall_info at a system call's entry.
type callInfo struct {
	op   uint8
	_    [3]uint8
	arch uint32
	ip   uint64
	sp   uint64
	nr   uint64
	args [6]uint64
}

func run(c Command, at int) (Result, error) {
	type outcome struct {
		result Result
		err    error
	}
	done := make(chan outcome)
	go func() {
		runtime.LockOSThread() // only the thread that started it may trace it; the thread ends with this
		r, err := trace(c, at)
		done <- outcome{r, err}
	}()
	o := <-done
	return o.result, o.err
}

func trace(c Command, at int) (Result, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return Result{}, err
	}
	defer r.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return Result{}, err
	}
	defer null.Close()
	pid, err := syscall.ForkExec(c.Path, append([]string{c.Path}, c.Args...), &syscall.ProcAttr{
		Env: c.Env, Files: []uintptr{null.Fd(), w.Fd(), w.Fd()},
		Sys: &syscall.SysProcAttr{Ptrace: true, Setpgid: true},
	})
	w.Close()
	if err != nil {
		return Result{}, fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	if c.Started != nil {
		c.Started(pid)
	}
	output := make(chan string, 1)
	go func() {
		var b bytes.Buffer
		io.Copy(&b, r)
		output <- b.String()
	}()
	t := tracing{Command: c, pid: pid, at: at}
	err = t.loop()
	if err != nil {
		syscall.Kill(pid, syscall.SIGKILL)
		t.reap()
	}
	t.result.Output = <-output
	return t.result, err
}

type tracing struct {
	Command
	pid    int
	at     int
	result Result
}

// wait waits for any thread of the program and of nobody else: it has a process group
// of its own.
func (t *tracing) wait() (thread int, status syscall.WaitStatus, err error) {
	for {
		thread, err = syscall.Wait4(-t.pid, &status, wallThreads, nil)
		if err != syscall.EINTR {
			return thread, status, err
		}
	}
}

func (t *tracing) reap() {
	for {
		if _, _, err := t.wait(); err != nil {
			return
		}
	}
}

func (t *tracing) loop() error {
	if _, _, err := t.wait(); err != nil { // it has stopped at its exec
		return err
	}
	const options = syscall.PTRACE_O_TRACESYSGOOD | syscall.PTRACE_O_TRACECLONE | exitKill
	if err := syscall.PtraceSetOptions(t.pid, options); err != nil {
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	thread, deliver := t.pid, syscall.Signal(0)
	for {
		if err := syscall.PtraceSyscall(thread, int(deliver)); err != nil && err != syscall.ESRCH {
			return err
		}
		var status syscall.WaitStatus
		var err error
		if thread, status, err = t.wait(); err != nil {
			return err
		}
		deliver = 0
		switch {
		case status.Exited(), status.Signaled():
			if thread == t.pid {
				t.result.ExitCode = status.ExitStatus()
				t.reap()
				return nil
			}
			// The next call of wait must not go on with a thread that is gone.
			if thread, status, err = t.next(); err != nil {
				return err
			} else if thread == 0 {
				return nil
			}
			fallthrough
		case status.Stopped():
			switch signal := status.StopSignal(); signal {
			case syscallStop:
				kill, err := t.call(thread)
				if err != nil {
					return err
				}
				if kill {
					t.result.Killed = true
					syscall.Kill(t.pid, syscall.SIGKILL)
					t.reap()
					return nil
				}
			case syscall.SIGTRAP, syscall.SIGSTOP: // a thread begins
			default:
				deliver = signal
			}
		}
	}
}

// next is the next stop after threads that ended; 0: the program ended.
func (t *tracing) next() (int, syscall.WaitStatus, error) {
	for {
		thread, status, err := t.wait()
		if err != nil {
			return 0, 0, err
		}
		if status.Stopped() {
			return thread, status, nil
		}
		if thread == t.pid {
			t.result.ExitCode = status.ExitStatus()
			t.reap()
			return 0, 0, nil
		}
	}
}

// call numbers a system call that is about to change a file, and says whether it is the
// one to kill at.
func (t *tracing) call(thread int) (kill bool, err error) {
	var info callInfo
	_, _, errno := syscall.RawSyscall6(syscall.SYS_PTRACE, getSyscallInfo, uintptr(thread), unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)), 0, 0)
	if errno == syscall.ESRCH {
		return false, nil // killed by somebody else
	}
	if errno != 0 {
		return false, fmt.Errorf("%w: %w", ErrUnsupported, errno)
	}
	if info.op != atEntry {
		return false, nil
	}
	name, path, err := t.change(thread, int(info.nr), info.args)
	if err != nil {
		return false, err
	}
	file, below := strings.CutPrefix(path, t.Dir+"/")
	if name == "" || !below || t.Counts != nil && !t.Counts(file) {
		return false, nil
	}
	t.result.Points = append(t.result.Points, name+" "+file)
	return len(t.result.Points) == t.at+1, nil
}

// change tells a system call that changes files, and the file.
func (t *tracing) change(thread, call int, args [6]uint64) (name, path string, err error) {
	held := func(name string) (string, string, error) {
		path, err := link("/proc/%d/fd/%d", thread, int32(args[0]))
		return name, path, err
	}
	at := func(name string, dir, arg uint64) (string, string, error) {
		path, err := t.text(arg)
		if err == nil && !filepath.IsAbs(path) {
			var base string
			if int32(dir) >= 0 {
				base, err = link("/proc/%d/fd/%d", thread, int32(dir))
			} else {
				base, err = link("/proc/%d/cwd", thread)
			}
			path = filepath.Join(base, path)
		}
		return name, path, err
	}
	switch call {
	case syscall.SYS_WRITE:
		return held("write")
	case syscall.SYS_PWRITE64:
		return held("pwrite64")
	case syscall.SYS_FTRUNCATE:
		return held("ftruncate")
	case syscall.SYS_FALLOCATE:
		return held("fallocate")
	case syscall.SYS_FSYNC:
		return held("fsync")
	case syscall.SYS_FDATASYNC:
		return held("fdatasync")
	case syscall.SYS_OPENAT:
		if args[2]&(syscall.O_CREAT|syscall.O_TRUNC) != 0 {
			return at("openat", args[0], args[1])
		}
	case syscall.SYS_MKDIRAT:
		return at("mkdirat", args[0], args[1])
	case syscall.SYS_UNLINKAT:
		return at("unlinkat", args[0], args[1])
	case syscall.SYS_LINKAT:
		return at("linkat", args[2], args[3])
	case syscall.SYS_RENAMEAT, renameat2:
		return at("renameat", args[2], args[3])
	}
	if old, ok := withoutDirectory[call]; ok {
		const here = ^uint64(99) // AT_FDCWD
		return at(old.name, here, args[old.arg])
	}
	return "", "", nil
}

// hidden is the error of a look into a program that does not allow it. Other errors are
// the program's own, which names a file that is not open or memory that is not there: its
// call will fail and change nothing.
func hidden(err error) error {
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("the program hides its files and memory from its own user, so that changes would be missed; start it debuggable: %w", err)
	}
	return nil
}

func link(format string, args ...any) (string, error) {
	path, err := os.Readlink(fmt.Sprintf(format, args...))
	return path, hidden(err)
}

// text reads a string of the program's memory.
func (t *tracing) text(address uint64) (string, error) {
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", t.pid))
	if err != nil {
		return "", hidden(err)
	}
	defer memory.Close()
	b := make([]byte, 4096)
	n, _ := memory.ReadAt(b, int64(address)) // less, where its memory ends
	text, _, _ := bytes.Cut(b[:n], []byte{0})
	return string(text), nil
}
