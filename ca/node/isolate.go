package node

import (
	"cmp"
	"context"
	"slices"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/server"
)

// isolate shuts an agent out at this node while nothing can be agreed: on disk first,
// then at its own doors and streams, and for its own subscribers. Repeated, it gives the
// same answer. It can only take away (I5): what lifts it is an agreement.
func (n *Node) isolate(name, reason, who string) (server.Isolation, error) {
	var agent *statev1.Agent
	var line ban
	n.Read(func(st *domain.State) {
		if a, ok := st.Agent(name); ok {
			agent, line = a, banOf(isolated, st, a)
		}
	})
	switch {
	case agent == nil:
		return server.Isolation{}, server.ErrNoAgent
	case agent.GetBanned():
		return server.Isolation{}, server.ErrBanned
	case n.noQuorumSince(time.Now()).IsZero():
		return server.Isolation{}, server.ErrQuorum
	}
	own := n.isolations()
	if i := slices.IndexFunc(own, func(i server.Isolation) bool { return i.Agent.GetName() == name }); i >= 0 {
		return own[i], nil
	}
	line.Who, line.Reason = who, reason
	err := n.bans.add(line)
	n.cfg.reach("journalled")
	if err != nil {
		n.log.Error("an isolation is in force and not on disk: a restart of this node would lose it", "agent", name, "error", err)
	}
	n.enforceIsolations()
	n.cfg.reach("applied")
	n.log.Warn("an agent is isolated by this node alone", "agent", name, "administrator", who, "reason", reason)
	return isolationOf(line, err), nil
}

func isolationOf(line ban, unwritten error) server.Isolation {
	i := server.Isolation{Agent: line.agent(), Who: line.Who, Reason: line.Reason, At: line.Time}
	if unwritten != nil {
		i.NotWritten = unwritten.Error()
	}
	return i
}

// isolations are those that are in force and not agreed yet.
func (n *Node) isolations() (list []server.Isolation) {
	lines, unwritten := n.bans.all()
	n.Read(func(st *domain.State) {
		for _, line := range lines {
			if line.Kind == isolated && line.Cluster == clusterOf(st) && !knows(st, line) {
				list = append(list, isolationOf(line, unwritten[line.Agent]))
			}
		}
	})
	return list
}

func (n *Node) enforceIsolations() {
	var agents []*statev1.Agent
	for _, i := range n.isolations() {
		agents = append(agents, i.Agent)
	}
	n.feed.Isolate(agents)
	signal(n.recheck)
}

// knows tells whether the state says of an agent what was remembered, or something
// later. (A state that was restored from a backup says something earlier.)
func knows(st *domain.State, line ban) bool {
	agent, ok := st.Agent(line.Agent)
	item, named := st.DistrustItem(ca.DistrustID(&statev1.Distrust{Agent: line.Agent}))
	switch {
	case ok && agent.GetGeneration() > line.Generation:
		return true // attested anew
	case !ok:
		return named && item.GetAgentGeneration() >= line.Generation // evicted
	case line.Kind == lifted:
		return false
	}
	return agent.GetBanned()
}

const (
	mergeEvery   = time.Second
	mergeAtOnce  = 100
	mergeTimeout = 5 * time.Second
)

// runBans keeps the memory of bans and the state in step: what is agreed goes into the
// memory; what is remembered and the state does not know is proposed, as soon as
// something can be agreed. Each node does it for itself.
func (n *Node) runBans(ctx context.Context) error {
	retry := time.NewTicker(mergeEvery)
	defer retry.Stop()
	for {
		n.bans.rewrite()
		n.mergeBans(ctx)
		select {
		case <-n.agentsChanged:
		case <-retry.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (n *Node) mergeBans(ctx context.Context) {
	news, pending := n.compareBans()
	for _, line := range news {
		if err := n.bans.add(line); err != nil {
			n.log.Warn("a ban is agreed and not in this node's own memory; trying on", "agent", line.Agent, "error", err)
			return
		}
	}
	n.enforceIsolations()
	if len(pending) == 0 || !n.noQuorumSince(time.Now()).IsZero() {
		return
	}
	for chunk := range slices.Chunk(pending, mergeAtOnce) {
		command := n.byItself(&statev1.Command{Body: &statev1.Command_MergeBans{MergeBans: &statev1.MergeBans{Bans: chunk}}})
		callCtx, cancel := context.WithTimeout(ctx, mergeTimeout)
		outcome, err := n.Propose(callCtx, command)
		cancel()
		if err != nil {
			n.log.Debug("remembered bans could not be agreed yet", "error", err)
			return
		}
		if outcome.Refused != nil {
			if text := outcome.Refused.Error(); text != n.bansRefused {
				n.bansRefused = text // once, not every second
				n.audit.Command(command, outcome, nil)
				n.log.Error("bans that this node remembers were refused: ban these agents by hand", "agents", len(chunk), "reason", text)
			}
			return
		}
		n.audit.Command(command, outcome, nil)
		n.log.Info("bans that this node remembered are agreed", "agents", len(chunk), "revision", ca.Revision(outcome.Revision).String())
	}
	n.cfg.reach("merged")
	signal(n.agentsChanged) // the memory takes down that they are
}

// compareBans says what the memory lacks, and what the state lacks.
func (n *Node) compareBans() (news []ban, pending []*statev1.RememberedBan) {
	lines, _ := n.bans.all()
	n.Read(func(st *domain.State) {
		if st.Cluster() == nil {
			return
		}
		known := make(map[string]ban, len(lines))
		for _, line := range lines {
			if line.Cluster == clusterOf(st) {
				known[line.Agent] = line
			}
		}
		for a := range st.Agents() {
			if !a.GetBanned() {
				continue
			}
			if have, ok := known[a.GetName()]; !ok || have.Kind != banned || have.Generation < a.GetGeneration() || older(st, have) {
				line := banOf(banned, st, a)
				line.Who, line.Reason = have.Who, have.Reason
				news = append(news, line)
			}
			delete(known, a.GetName())
		}
		for _, line := range known { // not banned in this state
			switch {
			case line.Kind == isolated && !knows(st, line), older(st, line) && !knows(st, line):
				pending = append(pending, &statev1.RememberedBan{Agent: line.agent(), Lifted: line.Kind == lifted})
			case line.Kind == lifted && !older(st, line), st.Revision() < line.Revision:
				// Known, or this replica has yet to catch up with what it knew.
			default:
				line.Kind, line.Revision = lifted, st.Revision()
				news = append(news, line)
			}
		}
	})
	slices.SortFunc(pending, func(a, b *statev1.RememberedBan) int {
		return cmp.Compare(a.GetAgent().GetName(), b.GetAgent().GetName())
	})
	return news, pending
}

// older tells whether a line is of an epoch before the state's: what was agreed to at
// the end of that may be lost.
func older(st *domain.State, line ban) bool {
	return ca.Revision(line.Revision).Epoch() < ca.Revision(st.Revision()).Epoch()
}

// reach tells a test of this package where the procedure is.
func (c *Config) reach(step string) {
	if c.step != nil {
		c.step(step)
	}
}
