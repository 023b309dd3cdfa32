package node

import (
	"sync"
	"time"

	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/signer"
)

// clock knows when the agreed time last moved on, by this process's monotonic clock.
type clock struct {
	mu     sync.Mutex
	agreed time.Time
	at     time.Time // zero: not since the start
	heard  time.Time // when anything was last agreed, as far as this node heard; zero: not since the start
}

// applied takes the agreed time after a log entry. A step of domain.MaxTickStep was cut
// short: the time is not the present one yet.
func (c *clock) applied(agreed time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.heard = time.Now()
	switch step := agreed.Sub(c.agreed); {
	case !c.agreed.IsZero() && step >= domain.MaxTickStep:
		c.agreed = agreed
	case step > 0:
		c.agreed, c.at = agreed, c.heard
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

// last is when anything was last agreed here; zero: not since the start.
func (c *clock) last() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.heard
}

// offset is by how much this node's clock was ahead of the agreed time when that last
// moved on.
func (c *clock) offset() (offset time.Duration, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at.Round(0).Sub(c.agreed), !c.at.IsZero()
}
