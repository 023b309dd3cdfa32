package killpoint

const renameat2 = 276

// withoutDirectory is empty: this architecture has no older calls.
var withoutDirectory map[int]struct {
	name string
	arg  int
}
