//go:build !linux

package daemon

import (
	"io/fs"

	"golang.org/x/sys/unix"
)

// chmodSocket sets the mode of a socket and follows no link in its place.
func chmodSocket(path string, mode fs.FileMode) error {
	if err := unix.Fchmodat(unix.AT_FDCWD, path, uint32(mode.Perm()), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &fs.PathError{Op: "chmod", Path: path, Err: err}
	}
	return nil
}
