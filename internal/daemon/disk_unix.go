//go:build linux || darwin

package daemon

import (
	"golang.org/x/sys/unix"
)

// DiskSpace returns what the file system of a path has to give to this process, and its size, in bytes.
func DiskSpace(path string) (free, size uint64, err error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return 0, 0, explain(path, err)
	}
	return uint64(fs.Bavail) * uint64(fs.Bsize), uint64(fs.Blocks) * uint64(fs.Bsize), nil
}

// SameDisk tells whether two paths that exist are on one file system.
func SameDisk(a, b string) bool {
	var one, other unix.Stat_t
	return unix.Stat(a, &one) == nil && unix.Stat(b, &other) == nil && one.Dev == other.Dev
}
