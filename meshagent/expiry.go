package meshagent

import (
	"context"
	"slices"
	"time"
)

// lookEnded is how often the clock is looked at: it may have been set, or the host may have
// slept.
const lookEnded = 5 * time.Second

// dropEnded takes what has ended or was revoked out of the state, so that no door hands it
// out: its workload is as one whose SVID is not signed yet, and has to wait for the next
// one. What was revoked is renewed before that, where the CA announced it.
func (r *renewer) dropEnded(ctx context.Context) error {
	said := false
	for {
		var ended, revoked int
		r.store.change(func(s *State) (next *State) {
			next, ended, revoked = s.withoutEnded(r.now())
			return next
		})
		if ended+revoked == 0 {
			state, pause := r.store.State(), lookEnded
			if first := state.firstEnd(); !first.IsZero() {
				pause = min(pause, first.Sub(r.now()))
			}
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
		if revoked > 0 {
			r.log.Warn("SVIDs of this host were revoked: their workloads get none until the CA has signed new ones", "svids", revoked)
		}
		r.metrics.ended.Add(float64(ended))
		if ended > 0 && !said {
			r.log.Error("SVIDs have ended before the CA signed new ones: their workloads get none until it does, and files keep what stands in them", "svids", ended)
		}
		said = r.store.State().lacking() != nil
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

// withoutEnded makes the state that follows when time has passed, or SVIDs were revoked;
// nil: the same.
func (s *State) withoutEnded(now time.Time) (_ *State, ended, revoked int) {
	drop := func(end time.Time, distrusted error) bool {
		switch {
		case !now.Before(end):
			ended++
		case distrusted != nil:
			revoked++
		default:
			return false
		}
		return true
	}
	next, cloned := *s, false
	next.reissued = nil
	for i, identity := range s.Identities {
		without := *identity
		if svid := identity.SVID; svid != nil && drop(svid.NotAfter, svid.revoked(s.View.Distrust)) {
			without.SVID = nil
		}
		if wit := identity.WIT; wit != nil && drop(wit.Expires, wit.revoked(s.View.Distrust)) {
			without.WIT = nil
		}
		if without.SVID == identity.SVID && without.WIT == identity.WIT {
			continue
		}
		if !cloned {
			next.Identities, cloned = slices.Clone(s.Identities), true
		}
		without.demand()
		next.Identities[i] = &without
	}
	if ended+revoked == 0 {
		return nil, 0, 0
	}
	return &next, ended, revoked
}
