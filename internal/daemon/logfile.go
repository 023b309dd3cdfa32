package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// segments is how many files of equal size a bound is divided into.
	segments = 8
	// recount is how often files that somebody else made, moved or deleted are noticed.
	recount = 5 * time.Second
	// closePatience is how long Close waits for a write.
	closePatience = 2 * time.Second
	// rotatedAt is what is put behind the name of a file that was rotated.
	rotatedAt = "20060102T150405.000000000Z"
)

// LogFile is a file that is only appended to, and that may be rotated from outside: after it was moved away, SIGHUP makes
// the process write to a new one of the old name. Methods may be called concurrently.
//
// With a bound, it is also rotated by the process: a file that has an eighth of the bound is renamed to NAME.TIME, and
// never compressed or written again. The file set is NAME, NAME.* and NAME-* in its directory, so that what a rotation
// from outside leaves there counts too. Nothing is deleted: Room says what is left of the bound, for the caller to heed.
//
// With a number of files to keep, the bound is divided by that number and holds by itself: the oldest files NAME.TIME
// are deleted, and what is left by a rotation from outside neither counts nor goes. A file that cannot be rotated is
// written until it has the whole bound; what is written then is refused.
type LogFile struct {
	path   string
	mode   os.FileMode
	bound  int64                   // of the file set, bytes; 0: none
	keep   int                     // files; 0: all, and the bound is the caller's to heed
	free   func() (uint64, uint64) // nil: the file system's other users do not matter
	reload *Reload

	set atomic.Int64 // bytes in the file set; changed under mu

	mu      sync.Mutex
	f       *os.File  // nil: closed, or could not be opened again
	size    int64     // of f
	full    int64     // size at which f is rotated
	left    int64     // bytes that the file system has to give
	counted time.Time // when size, set and left were looked up
}

// LogBound bounds a log file. The zero value is no bound.
type LogBound struct {
	Bytes int64 // of the file set
	Keep  int   // files that are kept, the one that is written included; 0: all
	// Free tells how many bytes the file's file system has to give and how many of them others need, if the file has to
	// leave room for them; nil: it has not.
	Free func() (free, others uint64)
}

// OpenLogFile opens or makes the file. From then on SIGHUP no longer ends the process: Run answers it.
func OpenLogFile(path string, mode os.FileMode, bound LogBound) (*LogFile, error) {
	l := &LogFile{path: path, mode: mode, bound: bound.Bytes, keep: bound.Keep, free: bound.Free}
	l.reload = OnHangup("log file "+path, l.Reopen)
	if err := l.Reopen(); err != nil {
		l.reload.Close()
		return nil, err
	}
	return l, nil
}

// Reopen closes the file and opens the one that has its name now. When that fails, the old one stays in use.
func (l *LogFile) Reopen() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.reopen()
}

func (l *LogFile) reopen() error {
	f, err := os.OpenFile(l.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, l.mode)
	if err != nil {
		return explain(l.path, err)
	}
	if l.f != nil {
		l.f.Close()
	}
	l.f, l.full = f, l.segment()
	l.count(time.Now())
	return nil
}

// segment is the size of one file of the set.
func (l *LogFile) segment() int64 {
	if l.keep > 0 {
		return l.bound / int64(l.keep)
	}
	return l.bound / segments
}

// count looks up the sizes.
func (l *LogFile) count(now time.Time) {
	set := int64(0)
	defer func() { l.set.Store(set) }()
	l.counted, l.size = now, 0
	if l.bound == 0 {
		return
	}
	if info, err := l.f.Stat(); err == nil && info.Mode().IsRegular() {
		l.size, set = info.Size(), info.Size()
	}
	if l.keep > 0 {
		return
	}
	base := filepath.Base(l.path)
	entries, _ := os.ReadDir(filepath.Dir(l.path)) // what cannot be read is not counted
	for _, e := range entries {
		if rest, ours := strings.CutPrefix(e.Name(), base); ours && rest != "" && strings.ContainsRune(".-", rune(rest[0])) {
			if info, err := e.Info(); err == nil && info.Mode().IsRegular() {
				set += info.Size()
			}
		}
	}
	if l.free != nil {
		free, others := l.free()
		l.left = int64(min(free, 1<<62)) - int64(min(others, 1<<62))
	}
}

// Room is how many bytes may still be written, of how many; 0 of 0: there is no bound. left may be negative.
func (l *LogFile) Room() (left, bound int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.bound == 0 || l.f == nil {
		return 0, l.bound
	}
	if now := time.Now(); now.Sub(l.counted) >= recount {
		l.count(now)
	}
	left = l.bound - l.set.Load()
	if l.free != nil {
		left = min(left, l.left)
	}
	return left, l.bound
}

// Size is the size of the file set in bytes; it is known of a file with a bound. It waits for no disk.
func (l *LogFile) Size() int64 { return l.set.Load() }

// Write appends b in one write.
func (l *LogFile) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f == nil {
		return 0, fmt.Errorf("cannot write %s: %w", l.path, os.ErrClosed)
	}
	if more := int64(len(b)); l.bound > 0 && l.size > 0 && l.size+more > l.full {
		if l.rotate(time.Now()); l.keep > 0 && l.size+more > l.bound {
			if l.count(time.Now()); l.size+more > l.bound { // somebody may have cut it to nothing; a device has no size
				return 0, fmt.Errorf("%s has %d bytes, as many as it may, and cannot be rotated", l.path, l.size)
			}
		}
	}
	n, err := l.f.Write(b)
	l.set.Add(int64(n))
	l.size, l.left = l.size+int64(n), l.left-int64(n)
	if err != nil {
		return n, explain(l.path, err)
	}
	return n, nil
}

// rotate renames a full file and opens a new one. If that fails, the file goes on to grow within the bound, which is what
// matters, and the next try is a segment further on.
func (l *LogFile) rotate(now time.Time) {
	l.full = l.size + l.segment()
	open, err := l.f.Stat()
	if err != nil || !open.Mode().IsRegular() { // nobody renames /dev/null
		return
	}
	switch there, err := os.Lstat(l.path); {
	case err == nil && os.SameFile(open, there):
		name := l.path + "." + now.UTC().Format(rotatedAt)
		if _, err := os.Lstat(name); !errors.Is(err, fs.ErrNotExist) || os.Rename(l.path, name) != nil {
			return
		}
	case err == nil && !there.Mode().IsRegular():
		return // a link or a device is not ours to rename
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return
	}
	if l.reopen() == nil && l.keep > 0 { // also where it was moved away and no SIGHUP came
		l.prune()
	}
}

// prune deletes the oldest files that were rotated here, until another whole one fits.
func (l *LogFile) prune() {
	matches, _ := filepath.Glob(globQuote.Replace(l.path) + ".*") // in the order of their names, which is that of time
	slices.Reverse(matches)
	kept, left := 1, l.bound-l.segment()
	for _, name := range matches {
		if _, err := time.Parse(rotatedAt, strings.TrimPrefix(name, l.path+".")); err != nil {
			continue
		}
		if info, err := os.Lstat(name); err == nil {
			if kept, left = kept+1, left-info.Size(); kept > l.keep || left < 0 {
				os.Remove(name)
			}
		}
	}
}

// globQuote quotes what filepath.Glob would not take as it stands.
var globQuote = strings.NewReplacer(`\`, `\\`, "*", `\*`, "?", `\?`, "[", `\[`)

// Close closes the file. One of which a write hangs is left open, so that the process can end.
func (l *LogFile) Close() error {
	l.reload.Close()
	for until := time.Now().Add(closePatience); !l.mu.TryLock(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(until) {
			return fmt.Errorf("%s is not closed: its disk does not answer", l.path)
		}
	}
	defer l.mu.Unlock()
	if l.f == nil {
		return nil
	}
	err := l.f.Close()
	l.f = nil
	return err
}

// Run opens the file again at each SIGHUP, until ctx is done.
func (l *LogFile) Run(ctx context.Context, log *slog.Logger) error { return l.reload.Run(ctx, log) }

var _ io.WriteCloser = (*LogFile)(nil)
