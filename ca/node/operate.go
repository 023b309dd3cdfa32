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

// noQuorumSince is when this node last saw an agreement, if that is so long ago that
// there is no quorum; zero if there is. A leader ticks twice a second, so silence means
// something; Raft's own idea of a leader is only a heartbeat's.
func (n *Node) noQuorumSince(now time.Time) time.Time {
	patience := max(3*time.Second, 4*n.cfg.Timing.Heartbeat)
	last := n.clock.last()
	if last.IsZero() {
		last = n.started
	}
	if now.Sub(last) <= patience {
		return time.Time{}
	}
	return last
}

// notAgreeing is what everybody is told whose wish needs an agreement.
func (n *Node) notAgreeing(now time.Time) string {
	since := n.noQuorumSince(now)
	if since.IsZero() {
		return ""
	}
	why := "a majority of the CA nodes that vote must be up and reach each other: start or reconnect them; if it is gone for good: docs/operations.md, \"Lost quorum\""
	if err := n.replica.Load().Err(); err != nil {
		why = fmt.Sprintf("this node takes no part (%v): ask another CA node, and mend this one", err)
	}
	return fmt.Sprintf("no quorum since %s (%v). Signing, renewal, new instances of known entries, bundles, traffic and failover go on. "+
		"New entries, agreements, tokens, members and hosts have to wait: nothing was changed. To do: %s",
		since.UTC().Format(time.RFC3339), now.Sub(since).Round(time.Second), why)
}

// autonomy is how long this node signs with the authorities that it may use without
// another agreement: the ACTIVE one, and the next if that is marked ready.
func (n *Node) autonomy(now time.Time) time.Duration {
	own := n.ownAuthorities(uses[0]) // X.509: without it nothing else is reached
	var end int64
	if own.Active != nil {
		end = own.Active.GetNotAfter()
	}
	if own.Prepared.GetReady() {
		end = max(end, own.Prepared.GetNotAfter())
	}
	return max(time.Unix(end, 0).Sub(now), 0)
}

// disk says what is wrong with the disk under the log.
func (n *Node) disk() string {
	if err := n.replica.Load().Err(); errors.Is(err, replica.ErrDisk) {
		return err.Error()
	}
	return ""
}

// nodes is how far everybody is: as this node knows if it leads, else as the leader
// says when it is asked.
func (n *Node) nodes(ctx context.Context, ask bool) (server.Nodes, error) {
	r := n.replica.Load()
	if r.IsLeader() {
		nodes := server.Nodes{LeaderID: n.own.id, Last: r.Stats().LastIndex}
		for _, s := range r.Servers() {
			nodes.Progress = append(nodes.Progress, server.Progress{ID: s.ID, Voter: s.Voter, Match: s.Match, Contact: s.Contact})
		}
		return nodes, nil
	}
	if !ask {
		return server.Nodes{}, server.ErrNotLeader
	}
	leader := n.leader()
	if leader == nil {
		return server.Nodes{}, replica.ErrNoQuorum
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	return n.peers.Nodes(ctx, leader)
}

// vouch asks one member for another that this node does not know.
func (n *Node) vouch(ctx context.Context, by, about string) (*statev1.Member, error) {
	var m *statev1.Member
	n.Read(func(st *domain.State) { m, _ = st.Member(by) })
	if m == nil {
		return nil, fmt.Errorf("member %.12s is not known", by)
	}
	return n.peers.Vouch(ctx, m, about)
}

// keepWitness hands leadership to a node that signs, if this one does not: a witness has
// a small machine.
func (n *Node) keepWitness(ctx context.Context) {
	for {
		n.stepWitness(ctx)
		if sleep(ctx, time.Second) != nil {
			return
		}
	}
}

func (n *Node) stepWitness(ctx context.Context) {
	signing := make(map[string]string) // address by id
	own := true
	n.Read(func(st *domain.State) {
		for _, m := range st.Members() {
			if m.GetId() == n.own.id {
				own = m.GetSigning()
			} else if m.GetSigning() {
				signing[m.GetId()] = m.GetRaftAddress()
			}
		}
	})
	if own {
		return
	}
	r := n.replica.Load()
	var best *replica.Server
	for _, s := range r.Servers() {
		if signing[s.ID] == "" || !s.Voter || time.Since(s.Contact) > time.Second {
			continue
		}
		if best == nil || s.Match > best.Match {
			best = &s
		}
	}
	if best == nil {
		return // it leads rather than nobody
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := r.TransferLeadershipTo(ctx, best.ID, best.Address); err != nil {
		n.log.Info("this witness leads and could not hand over yet", "member_id", best.ID, "error", err)
	}
}
