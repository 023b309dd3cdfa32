package replica

import "syscall"

// dropPages takes a file's mapped pages out of this process. That it fails costs memory
// only.
func dropPages(start, size uintptr) {
	_, _, _ = syscall.Syscall(syscall.SYS_MADVISE, start, size, syscall.MADV_DONTNEED)
}
