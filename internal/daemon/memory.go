package daemon

import (
	"fmt"

	"golang.org/x/sys/unix"
)

func noCore() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("keep keys out of core dumps: setrlimit(RLIMIT_CORE): %w", err)
	}
	return nil
}
