package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/feed"
	"github.com/entente-mesh/entente/ca/replica"
	"github.com/entente-mesh/entente/ca/server"
)

// proposals has commands agreed: at the leader, wherever it is.
type proposals struct {
	*core
	feed *feed.Feed
}

// Here proposes at this node alone.
func (p *proposals) Here() server.Proposer { return leaderProposer{p} }

// leaderProposer has commands agreed at this node alone.
type leaderProposer struct{ *proposals }

func (l leaderProposer) Propose(ctx context.Context, command *statev1.Command) (domain.Outcome, error) {
	remove := command.GetRemoveMember()
	if approved := command.GetApproveChange(); approved != nil {
		remove = domain.MembershipChange(approved.GetChange()).GetRemoveMember()
	}
	if remove != nil && l.IsLeader() {
		refusal, err := l.mayRemove(ctx, remove.GetId())
		if refusal != nil || err != nil {
			return domain.Outcome{Refused: refusal}, err
		}
	}
	// A member that does not know the command would stop at it. What admits a stranger is
	// not written down to be refused, also if another node's door let it pass.
	var refusal *domain.Refusal
	knows := l.Knows()
	l.Read(func(st *domain.State) {
		if refusal = st.Admits(command); refusal == nil && knows && domain.AdmitsSomebody(command) {
			refusal = st.RefusesAdmission(command)
		}
	})
	if refusal != nil {
		return domain.Outcome{Refused: refusal}, nil
	}
	outcome, err := l.replica.Load().Propose(ctx, command)
	if notProposed(err) {
		return outcome, server.ErrNotLeader
	}
	return outcome, err
}

// contactFresh is how long a voter's last answer counts as one.
const contactFresh = 2 * time.Second

// mayRemove keeps the cluster from losing its quorum by a removal: most of the voters
// that are left must answer now. One that is slow is waited for a moment. A leader hands
// over before it goes.
func (p *proposals) mayRemove(ctx context.Context, id string) (*domain.Refusal, error) {
	deadline := time.Now().Add(contactFresh)
	left, answering, votes := p.without(id)
	for votes && answering < left/2+1 && time.Now().Before(deadline) {
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return nil, err
		}
		left, answering, votes = p.without(id)
	}
	switch {
	case !votes || left == 0: // the state refuses to lose its last voter
		return nil, nil
	case answering < left/2+1:
		return &domain.Refusal{Code: domain.CodeLastVoter, Detail: fmt.Sprintf(
			"of the %d voters that would be left %d answer now: nothing could be agreed any more; bring one back first, or admit another", left, answering)}, nil
	case id == p.own.id:
		if err := p.replica.Load().TransferLeadership(ctx); err != nil {
			return nil, fmt.Errorf("this CA node leads and cannot hand over before it is removed: %w", err)
		}
		return nil, server.ErrNotLeader // the next one decides
	}
	return nil, nil
}

// without counts the voters beside one, and those of them that answer the leader.
func (p *proposals) without(id string) (left, answering int, votes bool) {
	for _, s := range p.replica.Load().Servers() {
		switch {
		case s.ID == id:
			votes = s.Voter
		case s.Voter:
			left++
			if s.Self || time.Since(s.Contact) < contactFresh {
				answering++
			}
		}
	}
	return left, answering, votes
}

func notProposed(err error) bool {
	return errors.Is(err, replica.ErrNoQuorum) || errors.As(err, new(replica.ErrNotLeader))
}

// Propose has a command agreed, wherever the leader is, and waits for an election if
// there is none, until ctx ends. When it returns an outcome, this node's state holds it.
func (p *proposals) Propose(ctx context.Context, command *statev1.Command) (domain.Outcome, error) {
	inDoubt := false // it was on its way at least once, and nobody answered
	for {
		outcome, err := p.proposeOnce(ctx, command)
		switch {
		case err == nil:
			return outcome, p.reach(ctx, outcome.Revision)
		case errors.Is(err, replica.ErrTooLarge):
			return outcome, err
		case errors.Is(err, server.ErrNotLeader):
		case !repeatable(command):
			return outcome, fmt.Errorf("%w (%w)", server.ErrInDoubt, err)
		default:
			inDoubt = true
		}
		select {
		case <-ctx.Done():
			err = fmt.Errorf("%w: %w", err, ctx.Err())
			if inDoubt {
				err = fmt.Errorf("%w (%w)", server.ErrInDoubt, err)
			}
			return outcome, err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// repeatable: proposed once more, a command that may have been agreed already does no harm.
// A guarded one would be refused as out of date although it was done, and an update or a
// delete of an entry could undo what somebody else has done since.
func repeatable(command *statev1.Command) bool {
	for _, change := range command.GetChangeEntries().GetChanges() {
		if change.GetCreate() == nil {
			return false
		}
	}
	return command.GetIfRevision() == 0
}

func (p *proposals) proposeOnce(ctx context.Context, command *statev1.Command) (domain.Outcome, error) {
	r := p.replica.Load()
	if r.IsLeader() {
		return leaderProposer{p}.Propose(ctx, command)
	}
	leader := p.leader()
	if leader == nil {
		return domain.Outcome{}, server.ErrNotLeader
	}
	return p.peers.Propose(ctx, leader, command)
}

// reach waits until this node's state is at revision.
func (p *proposals) reach(ctx context.Context, revision uint64) error {
	for {
		changed := p.applied.wait()
		if p.feed.Revision() >= revision {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("it was agreed, but this CA node has not caught up: %w", ctx.Err())
		}
	}
}

// agreeSelf has something agreed that this node decided by itself, and records it.
func (p *proposals) agreeSelf(ctx context.Context, command *statev1.Command) error {
	outcome, err := p.Propose(ctx, p.byItself(command))
	if err != nil {
		return err // nothing is known to have happened; it will be tried again
	}
	p.audit.Command(command, outcome, nil)
	if outcome.Refused != nil {
		return outcome.Refused
	}
	return nil
}
