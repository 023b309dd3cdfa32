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

// isolation is what this node remembers of agents that were shut out, by itself or by
// agreement, and keeps in step with the state.
type isolation struct {
	*proposals
	bans    *bans
	changed chan struct{} // an agent's record has
	recheck func()        // has open connections looked at
	refused string        // of run alone: what the log said last
}

// Isolate shuts an agent out at this node while nothing can be agreed: on disk first,
// then at its own doors and streams, and for its own subscribers. Repeated, it gives the
// same answer. It can only take away (I5): what lifts it is an agreement.
func (i *isolation) Isolate(name, reason, who string) (server.Isolation, error) {
	var agent *statev1.Agent
	var line ban
	i.Read(func(st *domain.State) {
		if a, ok := st.Agent(name); ok {
			agent, line = a, banOf(isolated, st, a)
		}
	})
	switch {
	case agent == nil:
		return server.Isolation{}, server.ErrNoAgent
	case agent.GetBanned():
		return server.Isolation{}, server.ErrBanned
	case i.noQuorumSince(time.Now()).IsZero():
		return server.Isolation{}, server.ErrQuorum
	}
	own := i.Isolated()
	if at := slices.IndexFunc(own, func(is server.Isolation) bool { return is.Agent.GetName() == name }); at >= 0 {
		return own[at], nil
	}
	line.Who, line.Reason = who, reason
	err := i.bans.add(line)
	i.cfg.reach("journalled")
	if err != nil {
		i.log.Error("an isolation is in force and not on disk: a restart of this node would lose it", "agent", name, "error", err)
	}
	i.enforce()
	i.cfg.reach("applied")
	i.log.Warn("an agent is isolated by this node alone", "agent", name, "administrator", who, "reason", reason)
	return isolationOf(line, err), nil
}

func isolationOf(line ban, unwritten error) server.Isolation {
	is := server.Isolation{Agent: line.agent(), Who: line.Who, Reason: line.Reason, At: line.Time}
	if unwritten != nil {
		is.NotWritten = unwritten.Error()
	}
	return is
}

// Isolated are those that are in force and not agreed yet.
func (i *isolation) Isolated() (list []server.Isolation) {
	lines, unwritten := i.bans.all()
	i.Read(func(st *domain.State) {
		for _, line := range lines {
			if line.Kind == isolated && line.Cluster == clusterOf(st) && !knows(st, line) {
				list = append(list, isolationOf(line, unwritten[line.Agent]))
			}
		}
	})
	return list
}

func (i *isolation) enforce() {
	var agents []*statev1.Agent
	for _, is := range i.Isolated() {
		agents = append(agents, is.Agent)
	}
	i.feed.Isolate(agents)
	i.recheck()
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

// run keeps the memory of bans and the state in step: what is agreed goes into the
// memory; what is remembered and the state does not know is proposed, as soon as
// something can be agreed. Each node does it for itself.
func (i *isolation) run(ctx context.Context) error {
	retry := time.NewTicker(mergeEvery)
	defer retry.Stop()
	for {
		i.bans.rewrite()
		i.mergeBans(ctx)
		select {
		case <-i.changed:
		case <-retry.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (i *isolation) mergeBans(ctx context.Context) {
	news, pending := i.compareBans()
	for _, line := range news {
		if err := i.bans.add(line); err != nil {
			i.log.Warn("a ban is agreed and not in this node's own memory; trying on", "agent", line.Agent, "error", err)
			return
		}
	}
	i.enforce()
	if len(pending) == 0 || !i.noQuorumSince(time.Now()).IsZero() {
		return
	}
	for chunk := range slices.Chunk(pending, mergeAtOnce) {
		command := i.byItself(&statev1.Command{Body: &statev1.Command_MergeBans{MergeBans: &statev1.MergeBans{Bans: chunk}}})
		callCtx, cancel := context.WithTimeout(ctx, mergeTimeout)
		outcome, err := i.Propose(callCtx, command)
		cancel()
		if err != nil {
			i.log.Debug("remembered bans could not be agreed yet", "error", err)
			return
		}
		if outcome.Refused != nil {
			if text := outcome.Refused.Error(); text != i.refused {
				i.refused = text // once, not every second
				i.audit.Command(command, outcome, nil)
				i.log.Error("bans that this node remembers were refused: ban these agents by hand", "agents", len(chunk), "reason", text)
			}
			return
		}
		i.audit.Command(command, outcome, nil)
		i.log.Info("bans that this node remembered are agreed", "agents", len(chunk), "revision", ca.Revision(outcome.Revision).String())
	}
	i.cfg.reach("merged")
	signal(i.changed) // the memory takes down that they are
}

// compareBans says what the memory lacks, and what the state lacks.
func (i *isolation) compareBans() (news []ban, pending []*statev1.RememberedBan) {
	lines, _ := i.bans.all()
	i.Read(func(st *domain.State) {
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
