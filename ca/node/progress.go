package node

import (
	"context"
	"slices"
	"time"

	"github.com/entente-mesh/entente/ca/server"
)

// stuckAfter is how long a member that is in contact may stand still before something is
// done about it. What is seen here was seen in the library: a follower that hears its
// leader's heartbeats and is never replicated to again.
const (
	stuckAfter = 5 * time.Second
	stuckPause = time.Minute // between two measures: a cluster must not be shaken for ever
)

// standstill notices who does not move although there is something to move to.
type standstill struct {
	match map[string]uint64
	since map[string]time.Time
}

// stuck tells whether a member in contact has stood at match for stuckAfter while the
// log was longer.
func (s *standstill) stuck(id string, match, last uint64, contact, now time.Time) bool {
	if s.match == nil {
		s.match, s.since = map[string]uint64{}, map[string]time.Time{}
	}
	if s.match[id] != match || match >= last || now.Sub(contact) > time.Second || s.since[id].IsZero() {
		s.match[id], s.since[id] = match, now
		return false
	}
	return now.Sub(s.since[id]) >= stuckAfter
}

// watchdog looks whether agreements reach everybody.
type watchdog struct{ *core }

// run is the watchdog of agreement. A leader with a follower that stands still
// hands leadership over: another leader's replication begins afresh. A follower that
// hears its leader but got no Tick, and of which the leader says that it lags, leaves
// the agreement and enters it again.
func (w *watchdog) run(ctx context.Context) error {
	var stands standstill
	var acted time.Time
	lagging := 0
	for {
		if err := sleep(ctx, time.Second); err != nil {
			return err
		}
		now := time.Now()
		r := w.replica.Load()
		if r.Err() != nil || now.Sub(acted) < stuckPause {
			stands, lagging = standstill{}, 0
			continue
		}
		if r.IsLeader() {
			lagging = 0
			if id := w.stuckFollower(&stands, now); id != "" {
				acted = now
				w.log.Error("a follower hears this leader and does not move: another one leads", "member_id", id)
				callCtx, cancel := context.WithTimeout(ctx, 5*time.Second)
				if err := r.TransferLeadership(callCtx); err != nil {
					w.log.Error("leadership could not be handed over", "error", err)
				}
				cancel()
			}
			continue
		}
		stands = standstill{}
		if !w.hearsOnly(ctx, now) {
			lagging = 0
			continue
		}
		if lagging++; lagging >= int(stuckAfter/time.Second) {
			acted, lagging = now, 0
			w.log.Error("this node hears its leader and gets nothing from it: it enters the agreement anew")
			r.Reenter()
		}
	}
}

func (w *watchdog) stuckFollower(stands *standstill, now time.Time) string {
	r := w.replica.Load()
	last := r.Stats().LastIndex
	for _, s := range r.Servers() {
		if s.Voter && !s.Self && !s.Installing && stands.stuck(s.ID, s.Match, last, s.Contact, now) {
			return s.ID
		}
	}
	return ""
}

// hearsOnly: the leader's heartbeats come, no Tick does, and the leader says that this
// node lacks entries.
func (w *watchdog) hearsOnly(ctx context.Context, now time.Time) bool {
	last := w.clock.last()
	if last.IsZero() {
		last = w.started
	}
	r := w.replica.Load()
	if now.Sub(last) < stuckAfter || now.Sub(r.LastContact()) > time.Second || r.Installing() {
		return false
	}
	nodes, err := w.Nodes(ctx, true)
	if err != nil {
		return false
	}
	i := slices.IndexFunc(nodes.Progress, func(p server.Progress) bool { return p.ID == w.own.id })
	return i >= 0 && nodes.Progress[i].Match < nodes.Last && r.Applied() < nodes.Last
}
