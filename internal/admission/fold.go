package admission

import (
	"sync"
	"time"
)

// maxFolded is how many kinds of lines a Fold tells apart.
const maxFolded = 4096

// Fold bounds how often the log says what outsiders can have said as often as they like:
// of each kind some lines at once, and one more each time that a while has passed. The rest
// is counted. Methods may be called concurrently.
type Fold struct {
	every    time.Duration
	burst    int
	overflow bool

	mu    sync.Mutex
	kinds map[string]*folded
	swept time.Time
}

// folded is one kind.
type folded struct {
	spent  int       // of the burst, at the time since
	since  time.Time // counts up by whole periods, so that no part of one is lost
	unsaid int       // since the last line
}

// NewFold allows burst lines of a kind at once and then one every so often. Of kinds beyond
// those that can be told apart nothing is said.
func NewFold(every time.Duration, burst int) *Fold {
	return &Fold{every: every, burst: burst, kinds: make(map[string]*folded)}
}

// NewOpenFold is NewFold for lines that must not be missing: of kinds beyond those that can
// be told apart each is said.
func NewOpenFold(every time.Duration, burst int) *Fold {
	f := NewFold(every, burst)
	f.overflow = true
	return f
}

// Say tells whether a line of that kind is written now, and how many were not since the
// last one.
func (f *Fold) Say(kind string, now time.Time) (unsaid int, say bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	k := f.kinds[kind]
	if k == nil {
		if len(f.kinds) >= maxFolded && now.Sub(f.swept) >= sweepEvery {
			f.swept = now
			for name, other := range f.kinds {
				if other.settle(f.every, now); other.spent == 0 {
					delete(f.kinds, name)
				}
			}
		}
		if len(f.kinds) >= maxFolded {
			return 0, f.overflow
		}
		k = &folded{since: now}
		f.kinds[kind] = k
	}
	k.settle(f.every, now)
	if k.spent >= f.burst {
		k.unsaid++
		return 0, false
	}
	k.spent++
	unsaid, k.unsaid = k.unsaid, 0
	return unsaid, true
}

// Owe says that n more lines of a kind were not written.
func (f *Fold) Owe(kind string, n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if k := f.kinds[kind]; k != nil {
		k.unsaid += n
	}
}

// settle gives back what the time since has earned.
func (k *folded) settle(every time.Duration, now time.Time) {
	switch earned := int(now.Sub(k.since) / every); {
	case earned >= k.spent:
		k.spent, k.since = 0, now
	case earned > 0:
		k.spent -= earned
		k.since = k.since.Add(time.Duration(earned) * every)
	}
}
