package meshagent

import (
	"context"
	"maps"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// lookEnded is how often the clock is looked at: it may have been set, or the host may have
// slept.
const lookEnded = 5 * time.Second

// dropEnded takes what has ended out of the state, so that no door hands it out: its
// workload is as one whose SVID is not signed yet, and has to wait for the next one.
func (a *Agent) dropEnded(ctx context.Context) error {
	said := false
	for {
		state, now := a.State(), time.Now()
		pause := lookEnded
		if first := state.firstEnd(); !first.IsZero() {
			pause = min(pause, first.Sub(now))
		}
		if pause > 0 {
			timer := time.NewTimer(pause)
			select {
			case <-timer.C:
			case <-state.Reissued():
				timer.Stop()
			case <-ctx.Done():
				timer.Stop()
				return ctx.Err()
			}
			continue
		}
		ended := 0
		a.change(func(s *State) (next *State) {
			next, ended = s.withoutEnded(now)
			return next
		})
		a.metrics.ended.Add(float64(ended))
		if ended > 0 && !said {
			a.log.Error("SVIDs have ended before the CA signed new ones: their workloads get none until it does, and files keep what stands in them", "svids", ended)
		}
		said = a.Ready() != nil
	}
}

// firstEnd is when the first of the entries' SVIDs ends; zero: there is none.
func (s *State) firstEnd() (first time.Time) {
	consider := func(end time.Time) {
		if first.IsZero() || end.Before(first) {
			first = end
		}
	}
	for _, svid := range s.svids {
		consider(svid.Certificates[0].NotAfter)
	}
	for _, wit := range s.wits {
		consider(wit.Expires)
	}
	return first
}

// withoutEnded makes the state that follows when time has passed; nil: the same.
func (s *State) withoutEnded(now time.Time) (_ *State, ended int) {
	next := *s
	next.reissued = nil
	next.svids, next.wits = maps.Clone(s.svids), maps.Clone(s.wits)
	maps.DeleteFunc(next.svids, func(_ string, svid *x509svid.SVID) bool { return !now.Before(svid.Certificates[0].NotAfter) })
	maps.DeleteFunc(next.wits, func(_ string, wit *WITSVID) bool { return !now.Before(wit.Expires) })
	if ended = len(s.svids) - len(next.svids) + len(s.wits) - len(next.wits); ended == 0 {
		return nil, 0
	}
	next.Identities = make([]*Identity, len(s.Identities))
	for i, identity := range s.Identities {
		id := identity.Entry.GetId()
		if next.svids[id] != identity.SVID || next.wits[id] != identity.WIT {
			without := *identity
			without.SVID, without.WIT = next.svids[id], next.wits[id]
			identity = &without
		}
		next.Identities[i] = identity
	}
	return &next, ended
}
