package killpoint

import "syscall"

const renameat2 = 316

// withoutDirectory are the older calls, whose argument arg is a path.
var withoutDirectory = map[int]struct {
	name string
	arg  int
}{
	syscall.SYS_RENAME: {"rename", 1},
	syscall.SYS_MKDIR:  {"mkdir", 0},
	syscall.SYS_RMDIR:  {"rmdir", 0},
	syscall.SYS_UNLINK: {"unlink", 0},
	syscall.SYS_LINK:   {"link", 1},
}
