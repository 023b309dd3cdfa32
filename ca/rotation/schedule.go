package rotation

import (
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/domain"
)

// Own is what the state says of one node's authorities of one use.
type Own struct {
	Member   *statev1.Member
	Active   *statev1.Authority
	Prepared *statev1.Authority
	Known    map[string]*statev1.Authority // of any phase, by id
	Phase    time.Duration
	Agreed   time.Time
}

// OwnOf reads the state.
func OwnOf(st *domain.State, memberID string, use statev1.KeyUse) Own {
	own := Own{Phase: st.Lifetimes().Phase, Agreed: st.Now(), Known: map[string]*statev1.Authority{}}
	own.Member, _ = st.Member(memberID)
	for _, a := range st.Authorities() {
		if a.GetMemberId() != memberID || a.GetUse() != use {
			continue
		}
		own.Known[a.GetId()] = a
		switch a.GetPhase() {
		case statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE:
			own.Active = a
		case statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED:
			own.Prepared = a
		}
	}
	return own
}

// Due tells whether the PREPARED authority is to be taken into use at the time now: the
// first at once; each next one when it has been PREPARED for a phase, or when the one in
// use ends too soon for what it signs. longest is the life of that. Whether it is ready
// is the gate's business.
func (o Own) Due(now time.Time, longest time.Duration) bool {
	switch {
	case o.Prepared == nil || now.Unix() >= o.Prepared.GetNotAfter():
		return false
	case o.Active == nil || time.Unix(o.Active.GetNotAfter(), 0).Sub(now) <= longest:
		return true
	}
	return o.Prepared.GetSince() != 0 && now.Sub(time.Unix(o.Prepared.GetSince(), 0)) >= o.Phase
}

// Signing is the authority that a node signs with: the ACTIVE one, or, if the node took
// the PREPARED one into use without quorum, that, as long as the state has not come to
// say otherwise. offline is the id of that one, empty if there is none.
func Signing(st *domain.State, memberID string, use statev1.KeyUse, offline string) (_ *statev1.Authority, isOffline bool) {
	if a, ok := st.Authority(offline); ok && MayTakeOffline(a, memberID) && a.GetUse() == use {
		return a, true
	}
	active, _ := st.Active(memberID, use)
	return active, false
}

// MayTakeOffline tells whether a node may take an authority into use without quorum: it
// was marked ready, so everybody holds it. There is one such authority of each use at
// most, and no other can become one without quorum.
func MayTakeOffline(a *statev1.Authority, memberID string) bool {
	return a.GetMemberId() == memberID && a.GetReady() && a.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED
}
