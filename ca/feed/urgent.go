package feed

import (
	"cmp"
	"maps"
	"slices"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
)

const (
	// reissueRate is the default of Feed.ReissueRate: half of what one core signs, so that
	// what else has to be signed is signed.
	reissueRate = 4000
	maxReissue  = 10 * time.Minute
)

// reissue is over how long a domain's subscribers spread the renewals after a taint.
// With few entries there is nothing to spread.
func (f *Feed) reissue(st *domain.State) time.Duration {
	rate := cmp.Or(f.ReissueRate, reissueRate)
	n := float64(st.EntryCount() + st.AgentCount())
	if n < rate/10 {
		return 0
	}
	return min(time.Duration(n/rate*float64(time.Second)), maxReissue)
}

// Urgent is what does not wait for its turn in the policy lane.
type Urgent struct {
	Distrust []*statev1.Distrust // in addition to what is known
	Tainted  []string            // all authority ids
	Reissue  time.Duration
	Foreign  []*statev1.ForeignBundle // newer than the agreed ones
}

// Urgent returns what is to be sent ahead of the policy lane, which repeats it; false if
// nothing. It moves neither the resume point nor what counts as sent. Read under the
// lock of the state's owner.
func (s *Session) Urgent(st *domain.State) (Urgent, bool) {
	f := s.feed
	f.mu.Lock()
	defer f.mu.Unlock()
	if !s.pending {
		s.ahead = f.next
	}
	if !s.live || s.ahead >= f.next && s.alone == f.isolation && s.early == f.unagreedNews {
		return Urgent{}, false
	}
	var u Urgent
	if s.alone != f.isolation {
		u.Distrust = slices.Collect(maps.Values(*f.isolated.Load()))
		s.alone = f.isolation
	}
	if s.early != f.unagreedNews {
		u.Foreign = s.foreignAhead(st)
		s.early = f.unagreedNews
	}
	if s.full || f.next-s.ahead > uint64(len(f.ring)) {
		u.Distrust = f.distrust(st)
	} else {
		seen := map[string]bool{}
		for n := s.ahead; n < f.next; n++ {
			change := f.ring[n%uint64(len(f.ring))].change
			if change.Kind != domain.ChangeDistrust || seen[change.Key] {
				continue
			}
			seen[change.Key] = true
			if d, ok := f.distrustItem(st, change.Key); ok {
				u.Distrust = append(u.Distrust, d)
			}
		}
	}
	u.Distrust = s.distrustForLevel(u.Distrust)
	s.ahead = f.next
	u.Tainted = st.Tainted()
	if len(u.Distrust)+len(u.Foreign) == 0 && slices.Equal(u.Tainted, s.tainted) {
		return Urgent{}, false
	}
	u.Reissue = f.reissue(st)
	return u, true
}

// Holds takes the subscriber's word on the SVIDs that it and its workloads have: the
// authority key ids of those they are signed under.
func (s *Session) Holds(authorityKeyIDs []string) {
	f := s.feed
	f.mu.Lock()
	defer f.mu.Unlock()
	if !s.live {
		return
	}
	s.under = make(map[string]struct{}, len(authorityKeyIDs))
	for _, id := range authorityKeyIDs {
		s.under[id] = struct{}{}
	}
	f.progress()
}

// Held is who of this replica's subscribers has SVIDs under one of the authorities: by
// authority id, names, sorted, at most 10. Who did not say counts. A subscriber
// whose stream was lost counts as in Status.
func (f *Feed) Held(authorities []string) map[string][]string {
	f.mu.Lock()
	defer f.mu.Unlock()
	held := map[string][]string{}
	for _, id := range authorities {
		var by []string
		for _, s := range f.sessions {
			if _, holds := s.under[ca.AuthorityKeyID(id)]; holds || s.under == nil {
				by = append(by, s.who.String())
			}
		}
		if len(by) > 0 {
			slices.Sort(by)
			held[id] = by[:min(len(by), 10)]
		}
	}
	return held
}

// Live tells whether an agent has a stream at this replica.
func (f *Feed) Live(agent string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.sessions[agent]
	return s != nil && s.live
}
