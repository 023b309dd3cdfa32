package local

import (
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
)

// What a ban is. One that is isolated has to be agreed yet.
const (
	Isolated = "isolated" // by this node alone
	Banned   = "banned"   // as of Revision
	Lifted   = "lifted"   // as of Revision: evicted, or attested anew
)

// Ban is what a node remembers of an agent that was shut out: a line of its journal.
type Ban struct {
	Kind       string    `json:"kind"`
	Cluster    string    `json:"cluster"` // hex
	Agent      string    `json:"agent"`
	Datacenter string    `json:"datacenter"`
	KeyID      string    `json:"keyId"`
	Generation uint64    `json:"generation"`
	Revision   uint64    `json:"revision"` // of the state that it was taken from
	Time       time.Time `json:"time"`
	Who        string    `json:"who,omitempty"`
	Reason     string    `json:"reason,omitempty"`
}

// NewBan remembers an agent of a state.
func NewBan(kind string, st *domain.State, a *statev1.Agent, now time.Time) Ban {
	return Ban{
		Kind: kind, Cluster: clusterOf(st), Revision: st.Revision(), Agent: a.GetName(), Datacenter: a.GetDatacenter(), KeyID: a.GetKeyId(), Generation: a.GetGeneration(),
		Time: now.UTC().Truncate(time.Second),
	}
}

func clusterOf(st *domain.State) string { return hex.EncodeToString(st.Cluster().GetId()) }

// Record is the agent's of before, as far as a ban needs it.
func (b Ban) Record() *statev1.Agent {
	return &statev1.Agent{Name: b.Agent, Datacenter: b.Datacenter, KeyId: b.KeyID, Generation: b.Generation}
}

// Check says what is wrong with a ban that was read.
func (b Ban) Check() error {
	switch b.Kind {
	case Isolated, Banned, Lifted:
		return errors.Join(ca.CheckLabel(b.Agent), ca.CheckLabel(b.Datacenter), ca.CheckKeyID(b.KeyID))
	}
	return fmt.Errorf("%.20q is no kind of ban", b.Kind)
}

// Isolated are the bans of this node alone that are in force and not agreed yet.
func (v View) Isolated(st *domain.State) (list []Ban) {
	for _, b := range v.Bans {
		if b.Kind == Isolated && b.Cluster == clusterOf(st) && !b.knownTo(st) {
			list = append(list, b)
		}
	}
	return list
}

// Compare says what the memory lacks that the state has, and what the state lacks that the
// memory has.
func (v View) Compare(st *domain.State, now time.Time) (news []Ban, pending []*statev1.RememberedBan) {
	if st.Cluster() == nil {
		return nil, nil
	}
	known := make(map[string]Ban, len(v.Bans))
	for _, b := range v.Bans {
		if b.Cluster == clusterOf(st) {
			known[b.Agent] = b
		}
	}
	for a := range st.Agents() {
		if !a.GetBanned() {
			continue
		}
		if have, ok := known[a.GetName()]; !ok || have.Kind != Banned || have.Generation < a.GetGeneration() || have.olderThan(st) {
			b := NewBan(Banned, st, a, now)
			b.Who, b.Reason = have.Who, have.Reason
			news = append(news, b)
		}
		delete(known, a.GetName())
	}
	for _, b := range known { // not banned in this state
		switch {
		case b.Kind == Isolated && !b.knownTo(st), b.olderThan(st) && !b.knownTo(st):
			pending = append(pending, &statev1.RememberedBan{Agent: b.Record(), Lifted: b.Kind == Lifted})
		case b.Kind == Lifted && !b.olderThan(st), st.Revision() < b.Revision:
			// Known, or this replica has yet to catch up with what it knew.
		default:
			b.Kind, b.Revision = Lifted, st.Revision()
			news = append(news, b)
		}
	}
	slices.SortFunc(news, func(a, b Ban) int { return cmp.Compare(a.Agent, b.Agent) })
	slices.SortFunc(pending, func(a, b *statev1.RememberedBan) int {
		return cmp.Compare(a.GetAgent().GetName(), b.GetAgent().GetName())
	})
	return news, pending
}

// knownTo tells whether the state says of an agent what was remembered, or something
// later. (A state that was restored from a backup says something earlier.)
func (b Ban) knownTo(st *domain.State) bool {
	agent, ok := st.Agent(b.Agent)
	item, named := st.DistrustItem(ca.DistrustID(&statev1.Distrust{Agent: b.Agent}))
	switch {
	case ok && agent.GetGeneration() > b.Generation:
		return true // attested anew
	case !ok:
		return named && item.GetAgentGeneration() >= b.Generation // evicted
	case b.Kind == Lifted:
		return false
	}
	return agent.GetBanned()
}

// olderThan tells whether a ban is of an epoch before the state's: what was agreed to at
// the end of that may be lost.
func (b Ban) olderThan(st *domain.State) bool {
	return ca.Revision(b.Revision).Epoch() < ca.Revision(st.Revision()).Epoch()
}
