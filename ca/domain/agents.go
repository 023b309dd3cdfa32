package domain

import (
	"slices"
	"strings"

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

// RefusesAdmission says why Apply would refuse a command that admits a host or a CA node,
// in this state; nil if it would not. It changes nothing: who proposes such a command for
// a stranger asks first, so that strangers do not write to the log.
func (s *State) RefusesAdmission(cmd *statev1.Command) *Refusal {
	if s.Cluster() == nil {
		return refuse(CodeNotInit, "no cluster was initialised yet")
	}
	if refusal := s.Admits(cmd); refusal != nil {
		return refusal
	}
	d, _ := describe(cmd)
	if d.admits == nil {
		return refuse(CodeInvalid, "command %T admits nobody", cmd.GetBody())
	}
	return d.admits(s, cmd)
}

func (a *application) attestAgent(c *statev1.AttestAgent) *Refusal {
	next, t, refusal := a.attesting(c)
	if refusal != nil || next == nil {
		return refusal
	}
	a.admit(next)
	a.spend(t, c.GetKeyId())
	return nil
}

// attesting is the agent that a token makes, nil if it did before.
func (s *State) attesting(c *statev1.AttestAgent) (next *statev1.Agent, t *statev1.Token, refusal *Refusal) {
	keyID := c.GetKeyId()
	t, repeat, refusal := s.redeem(c.GetTokenId(), ca.RoleAgent, keyID, c.GetStatement(), c.GetSignature())
	if refusal != nil {
		return nil, nil, refusal
	}
	grant := t.GetAgent()
	if grant == nil {
		return nil, nil, refuse(CodeTokenInvalid, "the token does not admit agents")
	}
	have, known := s.agents.get(grant.GetName())
	switch {
	case known && have.GetBanned():
		return nil, nil, refuse(CodeAgentBanned, "agent %s is banned", have.GetName())
	case repeat && known && have.GetKeyId() == keyID:
		return nil, nil, nil
	case repeat:
		return nil, nil, refuse(CodeTokenSpent, "the host was attested with another key since: ask for a new token")
	}
	if other, ok := s.AgentByKey(keyID); ok && other.GetName() != grant.GetName() {
		return nil, nil, refuse(CodeExists, "the key belongs to agent %[1]s already: keep that name, or evict it first (entente agent evict %[1]s)", other.GetName())
	}
	return &statev1.Agent{
		Name: grant.GetName(), KeyId: keyID, Datacenter: grant.GetDatacenter(), Addresses: slices.Clone(grant.GetAddresses()),
		Selectors: set(grant.GetSelectors()), PathPrefixes: set(grant.GetPathPrefixes()),
	}, t, nil
}

func (a *application) admitAgent(c *statev1.AdmitAgent) *Refusal {
	next, refusal := a.admitting(c)
	if refusal != nil || next == nil {
		return refusal
	}
	a.admit(next)
	return nil
}

// admitting is the agent that a certificate makes, nil if it did before. It takes the
// door's word that the host holds the key of a certificate that verifies. A certificate
// admits one key, as a token does: another one is refused until the agent is evicted, for
// who copied the host's key would come with another.
func (s *State) admitting(c *statev1.AdmitAgent) (*statev1.Agent, *Refusal) {
	next := proto.CloneOf(c.GetAgent())
	if err := ca.CheckAgent(next); err != nil {
		return nil, invalid(err)
	}
	next.Selectors, next.PathPrefixes = set(next.GetSelectors()), set(next.GetPathPrefixes())
	for _, other := range s.agents.rows {
		if other.GetName() != next.GetName() && other.GetCertificate() == next.GetCertificate() {
			return nil, refuse(CodeExists, "the certificate admitted agent %s: evict that one first", other.GetName())
		}
	}
	if other, ok := s.AgentByKey(next.GetKeyId()); ok && other.GetName() != next.GetName() {
		return nil, refuse(CodeExists, "the key belongs to agent %[1]s already: keep that name, or evict it first (entente agent evict %[1]s)", other.GetName())
	}
	if have, known := s.agents.get(next.GetName()); known {
		switch {
		case have.GetBanned():
			return nil, refuse(CodeAgentBanned, "agent %s is banned", have.GetName())
		case have.GetKeyId() != next.GetKeyId():
			return nil, refuse(CodeExists, "agent %s was admitted with another key: if the host was set up anew, evict the agent first", have.GetName())
		}
		if next.Generation = have.GetGeneration(); proto.Equal(have, next) {
			return nil, nil
		}
	}
	return next, nil
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

// MaySync tells whether workloads of an entry follow Sync by themselves: gateways and
// edges. The others are told what they need by the agent of their host.
//
// Below feature level 5 a Service could not say edge: true. One that listens nowhere,
// neither for callers nor for its own workload, and has not changed since may be an edge,
// and goes on.
func (s *State) MaySync(e *statev1.Entry) bool {
	switch e.GetRole() {
	case statev1.Role_ROLE_GATEWAY, statev1.Role_ROLE_EDGE:
		return true
	}
	return s.UndeclaredEdge(e)
}

// UndeclaredEdge tells whether an entry follows from a Service that may be an edge's and
// does not say so.
func (s *State) UndeclaredEdge(e *statev1.Entry) bool {
	name, ok := strings.CutPrefix(e.GetId(), ca.ServiceEntry(""))
	if !ok || e.GetRole() != statev1.Role_ROLE_UNSPECIFIED {
		return false
	}
	o, ok := s.Object("Service/" + name)
	return ok && o.GetService().GetPort() == 0 && o.GetService().GetOutboundPort() == 0 &&
		(!s.hardened() || o.GetRevision() < s.Cluster().GetHardenedAt())
}
