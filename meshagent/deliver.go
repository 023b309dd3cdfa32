package meshagent

import (
	"maps"
	"slices"
	"sync"
	"time"
)

// Delivery is one consumer of the agent's state outside of its process: a stream of the
// Workload API or of SDS, or files. It says what that consumer was given, since the
// agent acknowledges to the CA what its workloads hold, and not what it has itself. Its
// methods may be called concurrently.
type Delivery struct {
	all  *deliveries
	name string
	got  *State // guarded by all.mu; nil: nothing yet
}

func (d *deliveries) begin(name string) *Delivery {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.open++
	return &Delivery{all: d, name: name}
}

// Got says that the consumer has taken everything in the state that is for it.
func (d *Delivery) Got(state *State) {
	d.all.mu.Lock()
	defer d.all.mu.Unlock()
	if d.got != nil && d.got.content >= state.content {
		return
	}
	d.all.give(d, state)
	d.all.look()
}

// Close ends the delivery.
func (d *Delivery) Close() {
	d.all.mu.Lock()
	defer d.all.mu.Unlock()
	d.all.open--
	d.all.give(d, nil)
	d.all.look()
}

// deliveries turn what consumers were given into acknowledgements. Who was given
// something uses it a little later: that is waited for, the settle time.
type deliveries struct {
	settle time.Duration
	// acknowledge gets the revision up to which everybody on this host holds everything,
	// and who does not hold what came since; hold the authority key ids of all SVIDs that
	// are in use here.
	acknowledge func(revision uint64, waiting []string)
	hold        func(authorityKeyIDs []string)

	mu        sync.Mutex
	open      int                               // consumers
	given     map[*State]map[*Delivery]struct{} // those who were given something, by what it was
	behind    []*Delivery                       // some of those who lack what is to be acknowledged
	state     *State                            // the newest
	pending   []pending
	acked     uint64               // revision
	settled   uint64               // content that the last acknowledgement was for
	lingering map[string]time.Time // authority key id -> until when a workload may still use an SVID under it
	timer     *time.Timer
}

// pending is a revision that is to be acknowledged.
type pending struct {
	revision, content uint64
	due               time.Time // zero: somebody lacks it
}

// maxBehind is how many of those who hold something up the CA is told of.
const maxBehind = 10

// maxPendingAcks bounds what a consumer that hangs makes the agent remember; beyond, the
// newest ones are taken together.
const maxPendingAcks = 64

// applied says that the agent's state is this one now, and holds all up to revision; 0:
// no newer one than before.
func (d *deliveries) applied(state *State, revision uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.state = state
	if last := len(d.pending) - 1; revision != 0 && (revision < d.acked || last >= 0 && revision < d.pending[last].revision) {
		d.acked, d.pending = 0, nil // the CA node that told of those was left: they were never agreed
	}
	if revision != 0 {
		if last := len(d.pending) - 1; last >= 0 && (d.pending[last].content == state.content || last+1 == maxPendingAcks) {
			if d.pending[last].content != state.content {
				d.pending[last].due = time.Time{}
			}
			d.pending[last].revision, d.pending[last].content = revision, state.content
		} else {
			d.pending = append(d.pending, pending{revision: revision, content: state.content})
		}
	}
	d.look()
}

// linger remembers that a workload may use what it had for a settle time.
func (d *deliveries) linger(before *State) {
	if d.lingering == nil {
		d.lingering = map[string]time.Time{}
	}
	until := time.Now().Add(d.settle)
	for _, id := range before.underIDs {
		d.lingering[id] = until
	}
}

// give moves a consumer to those who were given a state; nil: it holds nothing any more.
func (d *deliveries) give(c *Delivery, state *State) {
	if before := c.got; before != nil {
		d.linger(before)
		delete(d.given[before], c)
		if len(d.given[before]) == 0 {
			delete(d.given, before)
		}
	}
	c.got = state
	if state == nil {
		return
	}
	if d.given == nil {
		d.given = map[*State]map[*Delivery]struct{}{}
	}
	if d.given[state] == nil {
		d.given[state] = map[*Delivery]struct{}{}
	}
	d.given[state][c] = struct{}{}
}

// lacking are some of the consumers that have less than content: the same ones as long
// as they do. Who was given nothing yet holds nothing that is out of date.
func (d *deliveries) lacking(content uint64) (names []string) {
	d.behind = slices.DeleteFunc(d.behind, func(c *Delivery) bool { return c.got == nil || c.got.content >= content })
	for state, consumers := range d.given {
		if state.content >= content {
			continue
		}
		for c := range consumers {
			if len(d.behind) == maxBehind {
				break
			}
			if !slices.Contains(d.behind, c) {
				d.behind = append(d.behind, c)
			}
		}
	}
	for _, c := range d.behind {
		names = append(names, c.name)
	}
	slices.Sort(names)
	return names
}

// look acknowledges what may be, and comes back when there is more. Called with mu held.
func (d *deliveries) look() {
	if d.state == nil {
		return
	}
	now := time.Now()
	next := now.Add(time.Hour)
	later := func(at time.Time) {
		if at.Before(next) {
			next = at
		}
	}
	var waiting []string
	for i := range d.pending { // each settles for itself: in a burst of changes they do so together
		p := &d.pending[i]
		if p.due.IsZero() {
			if waiting = d.lacking(p.content); len(waiting) > 0 {
				break
			}
			p.due = now
			if d.open > 0 && p.content != d.settled {
				p.due = now.Add(d.settle)
			}
		}
	}
	for len(d.pending) > 0 && !d.pending[0].due.IsZero() {
		p := d.pending[0]
		if p.due.After(now) {
			later(p.due)
			break
		}
		d.acked, d.settled = p.revision, p.content
		d.pending = d.pending[1:]
	}
	if d.acked != 0 && d.acknowledge != nil {
		d.acknowledge(d.acked, waiting)
	}

	maps.DeleteFunc(d.lingering, func(_ string, until time.Time) bool { return !until.After(now) })
	held := map[string]struct{}{}
	for id, until := range d.lingering {
		held[id] = struct{}{}
		later(until)
	}
	for _, id := range d.state.underIDs {
		held[id] = struct{}{}
	}
	for state := range d.given {
		for _, id := range state.underIDs {
			held[id] = struct{}{}
		}
	}
	if d.hold != nil {
		d.hold(slices.Sorted(maps.Keys(held)))
	}
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	if len(d.pending) > 0 || len(d.lingering) > 0 {
		d.timer = time.AfterFunc(next.Sub(now), func() {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.look()
		})
	}
}

// stop ends what would come back by itself.
func (d *deliveries) stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.state = nil
	if d.timer != nil {
		d.timer.Stop()
	}
}
