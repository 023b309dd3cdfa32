// Package local is what one CA node holds beyond the agreement: authorities of its own that
// it took into use without quorum, bundles of other domains that it accepted meanwhile, and
// what it remembers of agents that were shut out. A View is a value; with the agreed state
// it answers what counts at that node. What the state says later wins (I5).
package local

import (
	"maps"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/rotation"
)

// View is what a node holds. It is never changed: the With methods return another one. The
// zero value holds nothing.
type View struct {
	// Bans is what is remembered, one for each agent.
	Bans []Ban

	taken   map[statev1.KeyUse]*statev1.Authority // as ACTIVE
	foreign map[string]*statev1.ForeignBundle     // as fetched, by trust domain
}

// WithAuthority takes an authority into use without quorum: of each use the one that was
// marked ready before, and so is held by everybody. It is not kept over a restart: the node
// comes to the same decision again, for there is only the one.
func (v View) WithAuthority(a *statev1.Authority) View {
	active := proto.CloneOf(a)
	active.Phase = statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE
	v.taken = with(v.taken, a.GetUse(), active)
	return v
}

// WithoutAuthority gives up what was taken into use for one purpose.
func (v View) WithoutAuthority(use statev1.KeyUse) View {
	v.taken = maps.Clone(v.taken)
	delete(v.taken, use)
	return v
}

// Taken is the id of the authority that was taken into use without quorum; empty: none.
func (v View) Taken(use statev1.KeyUse) string { return v.taken[use].GetId() }

// Took tells whether an authority was taken into use without quorum.
func (v View) Took(id string) bool {
	for _, a := range v.taken {
		if a.GetId() == id {
			return true
		}
	}
	return false
}

// Offline is how many authorities were.
func (v View) Offline() int { return len(v.taken) }

// Signing is the authority that the node signs with for one use: the ACTIVE one, or the one
// that it took into use; nil: none.
func (v View) Signing(st *domain.State, nodeID string, use statev1.KeyUse) *statev1.Authority {
	active, offline := rotation.Signing(st, nodeID, use, v.Taken(use))
	if offline {
		return v.taken[use]
	}
	return active
}

// WithForeign takes another domain's bundle into use, as fetched. The caller has seen to it
// that it is newer than all before (I8).
func (v View) WithForeign(record *statev1.ForeignBundle) View {
	v.foreign = with(v.foreign, record.GetTrustDomain(), record)
	return v
}

// Settled are the domains whose bundles are agreed by now, or concern nobody any more.
func (v View) Settled(st *domain.State) (list []string) {
	for td, b := range v.foreign {
		agreed, ok := st.FetchedBundle(td)
		if _, related := st.Object("Relationship/" + td); !related || ok && b.GetSequence() <= agreed.GetSequence() {
			list = append(list, td)
		}
	}
	return list
}

// WithoutForeign gives bundles up.
func (v View) WithoutForeign(domains []string) View {
	v.foreign = maps.Clone(v.foreign)
	for _, td := range domains {
		delete(v.foreign, td)
	}
	return v
}

// Newest is the last bundle of a domain that this node has accepted, as fetched; nil: none.
func (v View) Newest(st *domain.State, td string) *statev1.ForeignBundle {
	agreed, _ := st.FetchedBundle(td)
	if own := v.foreign[td]; own != nil && own.GetSequence() > agreed.GetSequence() {
		return own
	}
	return agreed
}

// Foreign are the bundles that are in use at this node and not agreed, by trust domain, as
// fetched.
func (v View) Foreign() map[string]*statev1.ForeignBundle { return v.foreign }

func with[K comparable, V any](m map[K]V, key K, value V) map[K]V {
	if m = maps.Clone(m); m == nil {
		m = make(map[K]V)
	}
	m[key] = value
	return m
}
