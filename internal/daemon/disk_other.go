//go:build !linux && !darwin

package daemon

import "errors"

// DiskSpace is not known here.
func DiskSpace(string) (free, size uint64, err error) { return 0, 0, errors.ErrUnsupported }

// SameDisk is not known here.
func SameDisk(_, _ string) bool { return false }
