package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/replica"
	"github.com/entente-mesh/entente/ca/server"
)

// leaderProposer has commands agreed at this node alone.
type leaderProposer struct{ n *Node }

func (l leaderProposer) Propose(ctx context.Context, command *statev1.Command) (domain.Outcome, error) {
	if refused := l.n.mayRemove(ctx, command); refused != nil {
		return domain.Outcome{Refused: refused}, nil
	}
	outcome, err := l.n.replica.Load().Propose(ctx, command)
	if notProposed(err) {
		return outcome, server.ErrNotLeader
	}
	return outcome, err
}

// mayRemove refuses a removal after which the voters that answer would be no majority: the
// rules do not know who answers, the leader does.
func (n *Node) mayRemove(ctx context.Context, command *statev1.Command) *domain.Refusal {
	removal := command.GetRemoveMember()
	if removal == nil {
		return nil
	}
	nodes, err := n.nodes(ctx, false)
	if err != nil {
		return nil // not the leader: nothing will be proposed here
	}
	if err := nodes.Alone(removal.GetId(), time.Now()); err != nil {
		return &domain.Refusal{Code: domain.CodeLastVoter, Detail: err.Error()}
	}
	return nil
}

func notProposed(err error) bool {
	return errors.Is(err, replica.ErrNoQuorum) || errors.As(err, new(replica.ErrNotLeader))
}

// Propose has a command agreed, wherever the leader is, and waits for an election if
// there is none, until ctx ends. When it returns an outcome, this node's state holds it.
func (n *Node) Propose(ctx context.Context, command *statev1.Command) (domain.Outcome, error) {
	for {
		outcome, err := n.proposeOnce(ctx, command)
		switch {
		case err == nil:
			return outcome, n.reach(ctx, outcome.Revision)
		case errors.Is(err, replica.ErrTooLarge):
			return outcome, err
		case errors.Is(err, server.ErrNotLeader):
		case command.GetIfRevision() != 0:
			// It may have been agreed; repeated, it would be refused as out of date.
			return outcome, err
		}
		select {
		case <-ctx.Done():
			return outcome, fmt.Errorf("%w: %w", err, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (n *Node) proposeOnce(ctx context.Context, command *statev1.Command) (domain.Outcome, error) {
	r := n.replica.Load()
	if r.IsLeader() {
		return leaderProposer{n}.Propose(ctx, command)
	}
	leader := n.leader()
	if leader == nil {
		return domain.Outcome{}, server.ErrNotLeader
	}
	return n.peers.Propose(ctx, leader, command)
}

// leader is the member that leads, nil if none is known or this node does.
func (n *Node) leader() (leader *statev1.Member) {
	id := n.replica.Load().Leader()
	if id == "" || id == n.own.id {
		return nil
	}
	n.Read(func(st *domain.State) { leader, _ = st.Member(id) })
	return leader
}

// reach waits until this node's state is at revision.
func (n *Node) reach(ctx context.Context, revision uint64) error {
	for {
		changed := n.applied.wait()
		if n.feed.Revision() >= revision {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("it was agreed, but this CA node has not caught up: %w", ctx.Err())
		}
	}
}
