package feed

import (
	"bytes"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/domain"
)

// HoldForeign says what this replica uses of the bundles of other domains, by trust domain,
// that it has accepted beyond those that are agreed: of all of them, in place of those of
// before. Its subscribers are told, now and with each full state.
func (f *Feed) HoldForeign(bundles map[string]*statev1.ForeignBundle) {
	f.mu.Lock()
	defer f.mu.Unlock()
	before := *f.unagreed.Load()
	f.unagreed.Store(&bundles)
	for td, b := range bundles {
		if before[td] != nil && before[td].GetSequence() >= b.GetSequence() && bytes.Equal(before[td].GetJwks(), b.GetJwks()) {
			continue
		}
		f.unagreedNews++
		for _, s := range f.sessions {
			s.wake()
		}
		return
	}
}

// ForeignBundle is what is used of the newest bundle of another domain that this replica has
// accepted: of the agreed one, or of its own while that is newer and the relationship still
// stands.
func (f *Feed) ForeignBundle(st *domain.State, td string) (*statev1.ForeignBundle, bool) {
	agreed, ok := st.ForeignBundle(td)
	own := (*f.unagreed.Load())[td]
	if own == nil || ok && own.GetSequence() <= agreed.GetSequence() {
		return agreed, ok
	}
	if _, related := st.Object("Relationship/" + td); !related {
		return agreed, ok
	}
	return own, true
}

// foreignAhead are the bundles of this replica's own that are for the subscriber.
func (s *Session) foreignAhead(st *domain.State) (ahead []*statev1.ForeignBundle) {
	for td := range federates(s.entries(st)) {
		agreed, _ := st.ForeignBundle(td)
		if b, ok := s.feed.ForeignBundle(st, td); ok && b != agreed {
			ahead = append(ahead, b)
			s.foreign[td] = struct{}{}
		}
	}
	return ahead
}
