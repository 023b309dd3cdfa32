package daemon

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// SealMemory keeps the keys in this process's memory out of core dumps and away from
// debuggers of the same user: no core is written, not to a file and not to a handler that
// core_pattern names, and /proc/PID/mem, ptrace and gcore are refused to all but
// CAP_SYS_PTRACE. To be called before the first key is read. Processes that are started
// by this one write no core either, but may be debugged.
func SealMemory() error {
	// A handler that core_pattern pipes to gets a core whatever the limit says.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("keep keys out of core dumps: prctl(PR_SET_DUMPABLE): %w", err)
	}
	// A service manager that filters the call (SystemCallFilter=~@resources) sets the limit
	// itself, and not being dumpable is enough for this process.
	if err := noCore(); err != nil && !errors.Is(err, unix.EPERM) {
		return err
	}
	return nil
}
