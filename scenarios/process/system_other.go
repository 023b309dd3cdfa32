//go:build !linux

package process

import (
	"errors"
	"syscall"
	"time"
)

func attributes() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }

// Memory is what a process holds of the machine's memory, in bytes.
type Memory struct {
	RSS int64 // resident; pages shared with others count in full
	PSS int64 // resident; a page shared by n counts 1/n
}

// MemoryOf is only possible on Linux.
func MemoryOf(int) (Memory, error) { return Memory{}, errors.ErrUnsupported }

// CPUOf is only possible on Linux.
func CPUOf(int) (time.Duration, error) { return 0, errors.ErrUnsupported }
