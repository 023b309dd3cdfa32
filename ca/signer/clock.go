package signer

import (
	"errors"
	"fmt"
	"time"
)

// ErrClock: the node's clock disagrees with the agreed time, and what it would
// sign could be valid at the wrong time.
var ErrClock = errors.New("this CA node's clock is wrong")

// Clock is what a node knows of the agreed time (the median of the voters' clocks).
type Clock struct {
	Agreed time.Time     // as last agreed; zero: never
	Age    time.Duration // monotonic time since it last moved on; NotSinceStart if it has not
}

// NotSinceStart as the age of the agreed time: this process has seen no tick.
const NotSinceStart time.Duration = -1

const (
	maxOffset = 30 * time.Second
	// Clocks that run freely part by this much at most.
	maxDrift = 200e-6
)

// Check says why the clock that reads now is not to be trusted. While the agreed
// time moves on, the two may be 30 s apart; without quorum, what free-running
// clocks part by is added. After a lone restart only a clock that stands before
// the agreed time is known to be wrong.
func (c Clock) Check(now time.Time) error {
	if c.Agreed.IsZero() {
		return nil
	}
	// Readings of the clock are compared as such: its monotonic part would hide that it was set.
	now = now.Round(0)
	if c.Age < 0 {
		if now.Before(c.Agreed) {
			return fmt.Errorf("%w: it reads %s, the cluster had agreed on %s before this node started; set the clock", ErrClock,
				now.UTC().Format(time.RFC3339), c.Agreed.UTC().Format(time.RFC3339))
		}
		return nil
	}
	offset := now.Sub(c.Agreed.Add(c.Age))
	allowed := maxOffset + time.Duration(maxDrift*float64(c.Age))
	if offset.Abs() > allowed {
		return fmt.Errorf("%w: it is %v off the cluster's, %v is allowed; set the clock", ErrClock, offset.Round(time.Millisecond), allowed.Round(time.Millisecond))
	}
	return nil
}
