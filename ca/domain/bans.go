package domain

import (
	"errors"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

// maxMerged bounds one MergeBans.
const maxMerged = 100

// mergeBans takes over what a node remembers of agents that were shut out. It only takes
// away, and only from the agent that is named: the same host, attested anew by a later
// decision, is another generation. Repeated, it changes nothing.
func (a *application) mergeBans(c *statev1.MergeBans) *Refusal {
	if n := len(c.GetBans()); n == 0 || n > maxMerged {
		return refuse(CodeInvalid, "%d bans to merge, not 1 to %d", n, maxMerged)
	}
	if refusal := a.roomForDistrust(len(c.GetBans())); refusal != nil {
		return refusal
	}
	for _, b := range c.GetBans() {
		who := b.GetAgent()
		if err := checkRemembered(who); err != nil {
			return refuse(CodeInvalid, "%v", err)
		}
		if who.GetGeneration() == 0 || who.GetGeneration() >= a.rev {
			return refuse(CodeInvalid, "agent %s: no agent was attested at revision %s", who.GetName(), ca.Revision(who.GetGeneration()))
		}
	}
	for _, b := range c.GetBans() {
		a.mergeBan(b.GetAgent(), b.GetLifted())
	}
	return nil
}

func checkRemembered(who *statev1.Agent) error {
	return errors.Join(ca.CheckLabel(who.GetName()), ca.CheckLabel(who.GetDatacenter()), ca.CheckKeyID(who.GetKeyId()))
}

func (a *application) mergeBan(who *statev1.Agent, lifted bool) {
	have, known := a.agents.get(who.GetName())
	item, named := a.distrust.get(ca.DistrustID(&statev1.Distrust{Agent: who.GetName()}))
	named = named && item.GetAgentGeneration() >= who.GetGeneration()
	switch {
	case known && have.GetGeneration() > who.GetGeneration():
		// Attested anew since; what was issued before is void by its generation.
	case known && lifted:
		drop(a, &a.agents, have.GetName())
		delete(a.agentByKey, have.GetKeyId())
		a.changed(ChangeAgent, have.GetName())
	case known && have.GetBanned():
	case known:
		agent := proto.CloneOf(have)
		agent.Banned = true
		put(a, &a.agents, agent.GetName(), agent)
		a.changed(ChangeAgent, agent.GetName())
	case !lifted && !named:
		// The state never knew it: it was attested, and banned, after the backup. It is
		// remembered, so that no token admits it. (If what was issued to it is distrusted
		// already, it was evicted.)
		if _, taken := a.AgentByKey(who.GetKeyId()); !taken {
			put(a, &a.agents, who.GetName(), &statev1.Agent{
				Name: who.GetName(), KeyId: who.GetKeyId(), Datacenter: who.GetDatacenter(), Generation: who.GetGeneration(), Banned: true,
			})
			a.agentByKey[who.GetKeyId()] = who.GetName()
			a.changed(ChangeAgent, who.GetName())
		}
	}
	if !named {
		a.distrusted(&statev1.Distrust{Agent: who.GetName(), AgentGeneration: who.GetGeneration()}, a.longestLife())
	}
}
