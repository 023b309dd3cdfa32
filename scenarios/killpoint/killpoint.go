// Package killpoint runs a program and kills it, whole, with SIGKILL, just before one
// chosen change that it makes to its files: it stops the program at each system call
// (ptrace), numbers those that change something below a directory, and kills at the
// number that is asked for. Nothing in the program knows of it, and no point is missed.
// A program that hides its memory from its own user (PR_SET_DUMPABLE 0) is an error,
// unless root runs it: its points cannot be told.
// A process that is killed before each change, one run after another, has been killed
// after each as well.
//
// What a power cut leaves is less than that, since writes may be lost or torn: that is
// for tests of the files themselves.
package killpoint

import (
	"errors"
)

// ErrUnsupported: this system cannot trace, or does not allow it.
var ErrUnsupported = errors.New("programs cannot be traced here")

// Command is a program and what of it counts.
type Command struct {
	Path string
	Args []string // without the program's name
	Env  []string // all of it

	// Dir is where changes count.
	Dir string

	// Counts says whether a change to a file, by its path below Dir, is numbered now.
	// Nil: all are.
	Counts func(file string) bool

	// Started, if set, is told the process id, for signals.
	Started func(pid int)
}

// Result is how a run ended.
type Result struct {
	Points   []string // the changes in order, "pwrite64 raft/log.db"; the last one was not made if Killed
	Killed   bool
	ExitCode int // if not killed
	Output   string
}

// Run runs the command and kills it before change number at, counted from 0. A negative
// number, or one that is not reached, kills nothing.
func Run(c Command, at int) (Result, error) { return run(c, at) }
