package node

import (
	"context"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/local"
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

	enforcing sync.Mutex
	enforced  []*statev1.Agent // guarded by enforcing: whom doors and feed were told of last
}

// Isolate shuts an agent out at this node while nothing can be agreed: on disk first,
// then at its own doors and streams, and for its own subscribers. Repeated, it gives the
// same answer. It can only take away (I5): what lifts it is an agreement.
func (i *isolation) Isolate(name, reason, who string) (server.Isolation, error) {
	var agent *statev1.Agent
	var line local.Ban
	i.Read(func(st *domain.State) {
		if a, ok := st.Agent(name); ok {
			agent, line = a, local.NewBan(local.Isolated, st, a, time.Now())
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

func isolationOf(line local.Ban, unwritten error) server.Isolation {
	is := server.Isolation{Agent: line.Record(), Who: line.Who, Reason: line.Reason, At: line.Time}
	if unwritten != nil {
		is.NotWritten = unwritten.Error()
	}
	return is
}

// Isolated are those that are in force and not agreed yet.
func (i *isolation) Isolated() (list []server.Isolation) {
	bans, unwritten := i.bans.all()
	i.Read(func(st *domain.State) {
		for _, b := range (local.View{Bans: bans}).Isolated(st) {
			list = append(list, isolationOf(b, unwritten[b.Agent]))
		}
	})
	return list
}

// enforce tells doors and feed whom this node shuts out by itself, if these are others than
// it told last: it is asked each second, and a look at all connections costs a tenth of a
// core where there are 10,000.
func (i *isolation) enforce() {
	i.enforcing.Lock()
	defer i.enforcing.Unlock()
	var agents []*statev1.Agent
	for _, is := range i.Isolated() {
		agents = append(agents, is.Agent)
	}
	if slices.EqualFunc(agents, i.enforced, func(x, y *statev1.Agent) bool { return proto.Equal(x, y) }) {
		return
	}
	i.enforced = agents
	i.feed.Isolate(agents)
	i.recheck()
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
	var news []local.Ban
	var pending []*statev1.RememberedBan
	bans, _ := i.bans.all()
	i.Read(func(st *domain.State) { news, pending = local.View{Bans: bans}.Compare(st, time.Now()) })
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

// reach tells a test of this package where the procedure is.
func (c *Config) reach(step string) {
	if c.step != nil {
		c.step(step)
	}
}
