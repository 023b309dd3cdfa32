package meshagent

import (
	"context"
	"slices"
	"time"
)

// lookEnded is how often the clock is looked at: it may have been set, or the host may have
// slept.
const lookEnded = 5 * time.Second

// dropEnded takes what has ended out of the state, so that no door hands it out: its
// workload is as one whose SVID is not signed yet, and has to wait for the next one.
func (a *Agent) dropEnded(ctx context.Context) error {
	said := false
	for {
		state, now := a.State(), a.now()
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
	for _, identity := range s.Identities {
		if identity.SVID != nil {
			consider(identity.SVID.NotAfter)
		}
		if identity.WIT != nil {
			consider(identity.WIT.Expires)
		}
	}
	return first
}

// withoutEnded makes the state that follows when time has passed; nil: the same.
func (s *State) withoutEnded(now time.Time) (_ *State, ended int) {
	next := *s
	next.reissued = nil
	next.Identities = slices.Clone(s.Identities)
	for i, identity := range s.Identities {
		without := *identity
		if svid := identity.SVID; svid != nil && !now.Before(svid.NotAfter) {
			without.SVID = nil
			ended++
		}
		if wit := identity.WIT; wit != nil && !now.Before(wit.Expires) {
			without.WIT = nil
			ended++
		}
		if without.SVID != identity.SVID || without.WIT != identity.WIT {
			without.demand()
			next.Identities[i] = &without
		}
	}
	if ended == 0 {
		return nil, 0
	}
	return &next, ended
}
