package domain

import (
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

const (
	// maxDistrust is how many items every subscriber is to hold. Items live as long as an
	// SVID may. Above it items are coalesced, and never is a removal refused: what fills the
	// table is bounded where it begins, by the share of each owner (shares.go).
	maxDistrust = 50_000
	// Above it the items are looked at again each time that so many have come.
	coalesceEach = 256
	maxAssumed   = 64

	// renewGrace is how long the workload that remains entitled to a narrowed entry has to
	// change to a new SVID. What was issued before is rejected within a second (I4).
	renewGrace = 500 * time.Millisecond
)

// Ending trust (I4): each of these leaves an item behind that names what was issued
// under it, until nothing of that can be valid any more.

// distrusted stores an item. until is when the last SVID that it names has ended. What
// this very entry of the log made was never seen, so no SVID is of that generation, and
// what the entry makes after this may be of it.
func (a *application) distrusted(item *statev1.Distrust, until time.Time) {
	for _, generation := range []*uint64{&item.AgentGeneration, &item.EntryGeneration} {
		if *generation == a.rev {
			*generation--
		}
	}
	item.Id, item.Revision = ca.DistrustID(item), a.rev
	item.NotAfter = until.Add(ca.DistrustGrace).Unix()
	a.setDistrust(item.GetId(), item)
}

// setDistrust stores an item, nil to remove it.
func (a *application) setDistrust(id string, item *statev1.Distrust) {
	if have, ok := a.distrust.get(id); ok {
		a.share(have.GetPath(), -1)
	}
	if item != nil {
		put(a, &a.distrust, id, item)
		a.share(item.GetPath(), 1)
	} else {
		drop(a, &a.distrust, id)
	}
	if !slices.ContainsFunc(a.changes, func(c Change) bool { return c.Kind == ChangeDistrust && c.Key == id }) {
		a.changed(ChangeDistrust, id)
	}
}

// coalesceDistrust puts, in place of the items that name one entry at several agents, one
// that names it at all of them. That denies more, for a moment: the entry's generation is
// a later one since, for which the other agents have new SVIDs signed.
func (a *application) coalesceDistrust(before int) {
	if n := len(a.distrust.rows); !a.hardened() || n <= maxDistrust || n <= before || n/coalesceEach == before/coalesceEach {
		return
	}
	pairs := map[string][]*statev1.Distrust{}
	for _, item := range a.distrust.rows {
		if item.GetAgent() != "" && item.GetEntry() != "" {
			pairs[item.GetEntry()] = append(pairs[item.GetEntry()], item)
		}
	}
	for _, entry := range slices.Sorted(maps.Keys(pairs)) {
		if len(pairs[entry]) < 2 {
			continue
		}
		whole := &statev1.Distrust{Entry: entry, Revision: a.rev}
		whole.Id = ca.DistrustID(whole)
		if have, ok := a.distrust.get(whole.GetId()); ok {
			whole.EntryGeneration, whole.NotAfter = have.GetEntryGeneration(), have.GetNotAfter()
		}
		for _, item := range pairs[entry] {
			whole.EntryGeneration = max(whole.GetEntryGeneration(), item.GetEntryGeneration())
			whole.NotAfter = max(whole.GetNotAfter(), item.GetNotAfter())
			whole.Path = item.GetPath()
			a.setDistrust(item.GetId(), nil)
		}
		a.setDistrust(whole.GetId(), whole)
	}
}

// longestLife is when the last SVID that was signed until now has ended. Before the
// first Tick nobody can tell; then the items stay.
func (a *application) longestLife() time.Time {
	if a.now == 0 {
		return time.Unix(1<<36, 0)
	}
	return a.Now().Add(a.lifetimes.Phase) // no SVID may live longer
}

// forgetDistrust drops what has no meaning any more.
func (a *application) forgetDistrust() {
	now := a.Now().Unix()
	for _, item := range slices.Clone(a.distrust.rows) {
		if item.GetNotAfter() < now {
			a.setDistrust(item.GetId(), nil)
		}
	}
}

// voided names the SVIDs that are no longer to be accepted when an entry becomes another
// one, or nil. Agents that were never attested hold none.
func (a *application) voided(have, next *statev1.Entry) []*statev1.Distrust {
	held := slices.DeleteFunc(slices.Clone(have.GetHosts()), func(host string) bool {
		_, attested := a.agents.get(host)
		return !attested
	})
	switch {
	case len(held) == 0:
		return nil
	case next == nil || next.GetPath() != have.GetPath():
		return []*statev1.Distrust{{Entry: have.GetId(), EntryGeneration: have.GetRevision()}}
	}
	var items []*statev1.Distrust
	for _, host := range held {
		if !slices.Contains(next.GetHosts(), host) || a.hardened() && a.loses(host, have, next) {
			items = append(items, &statev1.Distrust{Agent: host, Entry: have.GetId(), EntryGeneration: have.GetRevision()})
		}
	}
	if a.hardened() && narrowed(have.GetSelectors(), next.GetSelectors()) {
		items = append(items, &statev1.Distrust{Entry: have.GetId(), EntryGeneration: have.GetRevision(), GraceMs: uint32(renewGrace.Milliseconds())})
	}
	return items
}

// loses tells whether a host may hold an entry, and not what becomes of it.
func (a *application) loses(host string, have, next *statev1.Entry) bool {
	agent, _ := a.agents.get(host)
	return ca.Entitled(agent, have) && !ca.Entitled(agent, next)
}

// narrowed tells whether a process that matches the first set of selectors may not match
// the second: that demands something which the first does not.
func narrowed(have, next []string) bool {
	return slices.ContainsFunc(next, func(selector string) bool { return !slices.Contains(have, selector) })
}

// roomForDistrust is how it was below the hardened level: changes of entries were refused
// that would leave more items behind than every subscriber can be asked to hold.
func (a *application) roomForDistrust(items int) *Refusal {
	if a.hardened() {
		return nil
	}
	if n := len(a.distrust.rows) + items; n > maxDistrust {
		return refuse(CodeLimit, "%d items would name SVIDs that are not to be accepted any more, over %d: wait until SVIDs have ended, or ban the agents instead", n, maxDistrust)
	}
	return nil
}

func assumed(names []string) []string {
	return slices.Clone(names[:min(len(names), maxAssumed)])
}

// ---------------------------------------------------------------- authorities

func (a *application) taintAuthority(c *statev1.TaintAuthority) *Refusal {
	have, ok := a.authorities.get(c.GetId())
	switch {
	case !ok:
		return refuse(CodeNotFound, "no authority has the id %.64s", c.GetId())
	case have.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED:
		return nil
	case !ca.MayMove(have.GetPhase(), statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED):
		return refuse(CodePhase, "authority is %s: nothing accepts it any more", ca.PhaseName(have.GetPhase()))
	}
	a.move(have, statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED)
	return nil
}

func (a *application) authorityDrained(c *statev1.AuthorityDrained) *Refusal {
	have, ok := a.authorities.get(c.GetId())
	switch {
	case !ok:
		return refuse(CodeNotFound, "no authority has the id %.64s", c.GetId())
	case have.GetPhase() != statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED:
		return refuse(CodePhase, "authority is %s, not TAINTED", ca.PhaseName(have.GetPhase()))
	case have.GetDrained():
		return nil
	}
	a.change(have, func(authority *statev1.Authority) {
		authority.Drained, authority.AssumedDrained = true, assumed(c.GetAssumed())
	})
	return nil
}

func (a *application) revokeAuthority(c *statev1.RevokeAuthority) *Refusal {
	have, ok := a.authorities.get(c.GetId())
	switch {
	case !ok:
		return refuse(CodeNotFound, "no authority has the id %.64s", c.GetId())
	case have.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_REVOKED:
		return nil
	}
	if err := ca.MayRevoke(have, c.GetNow()); err != nil {
		if have.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED {
			return refuse(CodeInUse, "%v", err)
		}
		return refuse(CodePhase, "%v", err)
	}
	a.move(have, statev1.AuthorityPhase_AUTHORITY_PHASE_REVOKED)
	return nil
}

// ---------------------------------------------------------------- agents, tokens

func (a *application) banAgent(c *statev1.BanAgent) *Refusal {
	have, ok := a.agents.get(c.GetName())
	switch {
	case !ok:
		return refuse(CodeNotFound, "no agent is named %.64s", c.GetName())
	case have.GetBanned():
		return nil
	}
	agent := proto.CloneOf(have)
	agent.Banned = true
	put(a, &a.agents, agent.GetName(), agent)
	a.changed(ChangeAgent, agent.GetName())
	a.distrusted(&statev1.Distrust{Agent: have.GetName(), AgentGeneration: have.GetGeneration()}, a.longestLife())
	return nil
}

func (a *application) evictAgent(c *statev1.EvictAgent) *Refusal {
	have, ok := a.agents.get(c.GetName())
	if !ok {
		return refuse(CodeNotFound, "no agent is named %.64s", c.GetName())
	}
	drop(a, &a.agents, have.GetName())
	delete(a.agentByKey, have.GetKeyId())
	a.changed(ChangeAgent, have.GetName())
	a.distrusted(&statev1.Distrust{Agent: have.GetName(), AgentGeneration: have.GetGeneration()}, a.longestLife())
	return nil
}

func (a *application) revokeToken(c *statev1.RevokeToken) *Refusal {
	have, ok := a.tokens.get(c.GetId())
	switch {
	case !ok:
		return refuse(CodeNotFound, "there is no token %.64s", c.GetId())
	case have.GetUsedBy() != "" && have.GetNode() != nil:
		return refuse(CodeTokenSpent, "the token admitted CA node %s: remove that", have.GetNode().GetName())
	case have.GetUsedBy() != "":
		return refuse(CodeTokenSpent, "the token admitted agent %s: ban or evict that", have.GetAgent().GetName())
	}
	drop(a, &a.tokens, have.GetId())
	return nil
}
