package node

import (
	"sync"
	"time"

	"github.com/entente-mesh/entente/ca/signer"
)

// clock knows when the agreed time last moved on, by this process's monotonic clock.
type clock struct {
	mu     sync.Mutex
	agreed time.Time
	at     time.Time // zero: not since the start
}

// applied takes the agreed time after a log entry.
func (c *clock) applied(agreed time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if agreed.After(c.agreed) {
		c.agreed, c.at = agreed, time.Now()
	}
}

// restored takes the agreed time of a state that may be of any age.
func (c *clock) restored(agreed time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.agreed, c.at = agreed, time.Time{}
}

func (c *clock) read() signer.Clock {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.at.IsZero() {
		return signer.Clock{Agreed: c.agreed, Age: signer.NotSinceStart}
	}
	return signer.Clock{Agreed: c.agreed, Age: time.Since(c.at)}
}

// last is when the agreed time last moved on; zero: not since the start.
func (c *clock) last() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

// offset is by how much this node's clock was ahead of the agreed time when that last
// moved on.
func (c *clock) offset() (offset time.Duration, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at.Round(0).Sub(c.agreed), !c.at.IsZero()
}
