package domain

import (
	"slices"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

// HeldBy are the entries that an attested host may hold, by id (ca.Entitled). Its cost
// is that of the entries that name the host.
func (s *State) HeldBy(agent string) []*statev1.Entry {
	host, _ := s.Agent(agent)
	return slices.DeleteFunc(s.EntriesOnHost(agent), func(e *statev1.Entry) bool { return !ca.Entitled(host, e) })
}

// Distrusts tells whether SVIDs of that origin are not to be accepted any more, although
// they may be valid.
func (s *State) Distrusts(o ca.Origin) bool {
	if item, ok := s.distrust.get(ca.DistrustID(&statev1.Distrust{Agent: o.Agent})); ok && o.AgentGeneration <= item.GetAgentGeneration() {
		return true
	}
	for _, named := range []*statev1.Distrust{{Entry: o.Entry}, {Agent: o.Agent, Entry: o.Entry}} {
		if item, ok := s.distrust.get(ca.DistrustID(named)); ok && o.Entry != "" && o.EntryGeneration <= item.GetEntryGeneration() {
			return true
		}
	}
	return false
}

func (a *application) attestAgent(c *statev1.AttestAgent) *Refusal {
	keyID := c.GetKeyId()
	t, repeat, refusal := a.redeem(c.GetTokenId(), ca.RoleAgent, keyID, c.GetStatement(), c.GetSignature())
	if refusal != nil {
		return refusal
	}
	grant := t.GetAgent()
	if grant == nil {
		return refuse(CodeTokenInvalid, "the token does not admit agents")
	}
	have, known := a.agents.get(grant.GetName())
	switch {
	case known && have.GetBanned():
		return refuse(CodeAgentBanned, "agent %s is banned", have.GetName())
	case repeat && known && have.GetKeyId() == keyID:
		return nil
	case repeat:
		return refuse(CodeTokenSpent, "the host was attested with another key since: ask for a new token")
	}
	if other, ok := a.AgentByKey(keyID); ok && other.GetName() != grant.GetName() {
		return refuse(CodeExists, "the key belongs to agent %s already", other.GetName())
	}
	a.admit(&statev1.Agent{
		Name: grant.GetName(), KeyId: keyID, Datacenter: grant.GetDatacenter(), Addresses: slices.Clone(grant.GetAddresses()),
		Selectors: set(grant.GetSelectors()), PathPrefixes: set(grant.GetPathPrefixes()),
	})
	a.spend(t, keyID)
	return nil
}

// admitAgent takes the door's word that the host holds the key of a certificate that
// verifies. A certificate admits one key, as a token does: another one is refused until
// the agent is evicted, for who copied the host's key would come with another.
func (a *application) admitAgent(c *statev1.AdmitAgent) *Refusal {
	next := proto.CloneOf(c.GetAgent())
	if err := ca.CheckAgent(next); err != nil {
		return invalid(err)
	}
	next.Selectors, next.PathPrefixes = set(next.GetSelectors()), set(next.GetPathPrefixes())
	for _, other := range a.agents.rows {
		if other.GetName() != next.GetName() && other.GetCertificate() == next.GetCertificate() {
			return refuse(CodeExists, "the certificate admitted agent %s: evict that one first", other.GetName())
		}
	}
	if other, ok := a.AgentByKey(next.GetKeyId()); ok && other.GetName() != next.GetName() {
		return refuse(CodeExists, "the key belongs to agent %s already", other.GetName())
	}
	if have, known := a.agents.get(next.GetName()); known {
		switch {
		case have.GetBanned():
			return refuse(CodeAgentBanned, "agent %s is banned", have.GetName())
		case have.GetKeyId() != next.GetKeyId():
			return refuse(CodeExists, "agent %s was admitted with another key: if the host was set up anew, evict the agent first", have.GetName())
		}
		if next.Generation = have.GetGeneration(); proto.Equal(have, next) {
			return nil
		}
	}
	a.admit(next)
	return nil
}

// admit puts an agent in the place of the one that had its name.
func (a *application) admit(next *statev1.Agent) {
	if have, known := a.agents.get(next.GetName()); known {
		delete(a.agentByKey, have.GetKeyId())
	}
	next.Generation = a.rev
	put(a, &a.agents, next.GetName(), next)
	a.agentByKey[next.GetKeyId()] = next.GetName()
	a.changed(ChangeAgent, next.GetName())
}

func set(list []string) []string {
	if len(list) == 0 {
		return nil
	}
	return slices.Compact(sorted(list))
}
