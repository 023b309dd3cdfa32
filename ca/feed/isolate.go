package feed

import (
	"maps"
	"slices"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
)

// Isolate says which agents, at which generation, this replica shuts out by itself,
// beside those that the state bans: all of them, in place of those of before. Their
// streams end, and every other subscriber of this replica is told, now and with each
// full state. Whoever is left out later is in the state by then: nobody is told anything.
func (f *Feed) Isolate(agents []*statev1.Agent) {
	f.mu.Lock()
	defer f.mu.Unlock()
	before := *f.isolated.Load()
	isolated := make(map[string]*statev1.Distrust, len(agents)) // by id
	news := false
	for _, a := range agents {
		item := &statev1.Distrust{Agent: a.GetName(), AgentGeneration: a.GetGeneration(), NotAfter: 1 << 36}
		item.Id = ca.DistrustID(item)
		isolated[item.GetId()] = item
		news = news || before[item.GetId()].GetAgentGeneration() != item.GetAgentGeneration()
	}
	f.isolated.Store(&isolated)
	if !news {
		return
	}
	f.isolation++
	for _, s := range f.sessions {
		s.wake()
	}
}

// Banned tells whether an agent is shut out, by agreement or by this replica alone.
func (f *Feed) Banned(agent *statev1.Agent) bool {
	isolated := *f.isolated.Load()
	if agent.GetBanned() || len(isolated) == 0 {
		return agent.GetBanned()
	}
	item, ok := isolated[ca.DistrustID(&statev1.Distrust{Agent: agent.GetName()})]
	return ok && agent.GetGeneration() <= item.GetAgentGeneration()
}

// distrustItem is what subscribers are told of an item: of two of the same agent, the
// one that names more.
func (f *Feed) distrustItem(st *domain.State, id string) (*statev1.Distrust, bool) {
	agreed, ok := st.DistrustItem(id)
	if own := (*f.isolated.Load())[id]; own != nil && (!ok || own.GetAgentGeneration() > agreed.GetAgentGeneration()) {
		return own, true
	}
	return agreed, ok
}

// distrust is all items.
func (f *Feed) distrust(st *domain.State) []*statev1.Distrust {
	agreed := st.Distrust()
	isolated := *f.isolated.Load()
	if len(isolated) == 0 {
		return agreed
	}
	ids := make(map[string]struct{}, len(agreed)+len(isolated))
	for _, d := range agreed {
		ids[d.GetId()] = struct{}{}
	}
	for id := range isolated {
		ids[id] = struct{}{}
	}
	items := make([]*statev1.Distrust, 0, len(ids))
	for _, id := range slices.Sorted(maps.Keys(ids)) {
		d, _ := f.distrustItem(st, id)
		items = append(items, d)
	}
	return items
}
