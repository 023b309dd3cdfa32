//go:build !linux

package daemon

// SealMemory has no core of this process written. Debuggers of the same user can still
// read its memory here.
func SealMemory() error { return noCore() }
