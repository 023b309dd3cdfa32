package presence

import (
	"maps"
	"math"
	"time"
)

// Damping: what an agent says of an instance is shown at once when it is worse than what
// is shown (unhealthy, stale, gone). What is not worse costs a credit: the first few are
// free, then each has to wait longer, and until then the last state stays. So an instance
// that flaps is told of rarely, and counts as worse meanwhile; one that stays good counts
// as good after half a minute at most. Whose word it is does not matter, an agent's own or
// another replica's.
//
// Ids are the agent's to choose. So an instance that was not there also costs a part of a
// credit of its service at that agent, such that all the instances that a service may have
// cost one: whoever names them anew each time is damped as one that flaps.
const (
	freeChanges = 5                // of one instance, before the first one waits
	firstWait   = time.Second      // doubles with each further change
	longestWait = 30 * time.Second // for a change
	forgetHalf  = 2 * time.Minute  // in which half of the changes is forgotten
)

// damper is the account of one instance, or of the arrivals of one service.
type damper struct {
	changes float64 // that were not worse, less those that are forgotten
	at      time.Time
}

// left is how many changes count now.
func (d *damper) left(now time.Time) float64 {
	return d.changes * math.Exp2(-max(now.Sub(d.at), 0).Seconds()/forgetHalf.Seconds())
}

// due is when the next change that is not worse may be shown.
func (d *damper) due() time.Time {
	over := d.changes - freeChanges
	if over < 0 {
		return d.at
	}
	wait := firstWait.Seconds() * math.Exp2(min(over, 16))
	return d.at.Add(min(time.Duration(wait*float64(time.Second)), longestWait))
}

// count books a change, or a part of one.
func (d *damper) count(now time.Time, n float64) { d.changes, d.at = d.left(now)+n, now }

// worse tells whether it can only keep requests away.
func worse(before, next Instance) bool {
	return before.Healthy && !next.Healthy || !before.Stale && next.Stale
}

// admits tells whether a new state of an instance may be shown now, and books it. shown is
// what is shown; nil: nothing.
func (t *Table) admits(now time.Time, name string, a *agent, shown *Instance, next Instance) bool {
	if shown != nil {
		if worse(*shown, next) {
			return true
		}
		same := *shown
		if same.Version = next.Version; same == next {
			return true // of another session: that is no news to anybody
		}
	}
	var arrivals *damper // nil: it was there, or is the only one
	if shown == nil && next.ID != "" {
		if arrivals = a.arrivals[next.Service]; arrivals == nil {
			arrivals = &damper{}
			a.arrivals[next.Service] = arrivals
		}
		if due := arrivals.due(); now.Before(due) {
			a.waits(due)
			t.waiting[name] = a
			return false
		}
	}
	d := a.dampers[next.place()]
	if d == nil {
		if len(a.dampers) >= 2*MaxInstancesPerAgent { // of names that it has left behind, for the most part
			maps.DeleteFunc(a.dampers, func(place Place, _ *damper) bool {
				_, shown := a.shown[place]
				return !shown
			})
		}
		d = &damper{}
		a.dampers[next.place()] = d
	}
	if due := d.due(); now.Before(due) {
		a.waits(due)
		t.waiting[name] = a
		return false
	}
	d.count(now, 1)
	if arrivals != nil {
		arrivals.count(now, 1./MaxInstancesOfService)
	}
	return true
}

func (a *agent) waits(until time.Time) {
	if a.until.IsZero() || until.Before(a.until) {
		a.until = until
	}
}

// Due is when Release has something to do; false: never, unless more is said.
func (t *Table) Due() (at time.Time, ok bool) {
	for _, a := range t.waiting {
		if !ok || a.until.Before(at) {
			at, ok = a.until, true
		}
	}
	return at, ok
}

// Release shows what has waited long enough.
func (t *Table) Release(now time.Time) []Change {
	var changes []Change
	for name, a := range t.waiting {
		if !now.Before(a.until) {
			changes = append(changes, t.show(now, name, a)...)
		}
	}
	return sorted(changes)
}

// forgive forgets accounts that make nothing wait any more.
func (a *agent) forgive(now time.Time) {
	for place, d := range a.dampers {
		if d.left(now) < 0.5 {
			delete(a.dampers, place)
		}
	}
	for service, d := range a.arrivals {
		if d.left(now) < 0.5 {
			delete(a.arrivals, service)
		}
	}
}
