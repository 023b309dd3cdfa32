package node

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/local"
	"github.com/entente-mesh/entente/ca/replica"
	"github.com/entente-mesh/entente/ca/server"
	"github.com/entente-mesh/entente/ca/signer"
	"github.com/entente-mesh/entente/internal/daemon"
)

// core is what every part of a node stands on: who the node is, its state, its clock, and
// the other members. It runs nothing; its methods may be called concurrently.
type core struct {
	cfg     *Config
	td      spiffeid.TrustDomain
	log     *slog.Logger
	own     *identity
	bootID  string
	started time.Time
	files   *daemon.Files

	replica atomic.Pointer[replica.Replica] // another one after its disk failed and came back
	peers   *server.Peers
	audit   *server.Audit // nil: off
	clock   clock
	ahead   func() time.Duration // of a test: by how much this node's clock is wrong; nil: it is not
	local   held
	applied broadcast     // the state has changed
	ledTerm atomic.Uint64 // term of which this node, as its leader, has applied all before
}

// held is what this node holds beyond the agreement. It is looked at under the state's lock;
// so change must not read the state.
type held struct {
	mu   sync.Mutex
	last local.View
}

func (h *held) view() local.View {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.last
}

func (h *held) change(next func(local.View) local.View) local.View {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.last = next(h.last)
	return h.last
}

// Read calls f with the agreed state, under its read lock.
func (c *core) Read(f func(*domain.State)) { c.replica.Load().Read(f) }

// IsLeader says whether this node leads as far as it knows.
func (c *core) IsLeader() bool { return c.replica.Load().IsLeader() }

// witness: this member votes and does not sign.
func (c *core) witness() (is bool) {
	c.Read(func(st *domain.State) {
		m, ok := st.Member(c.own.id)
		is = ok && !m.GetSigning()
	})
	return is
}

// byItself makes a command this node's own.
func (c *core) byItself(command *statev1.Command) *statev1.Command {
	command.Actor, command.ActorKind = "CA node "+c.cfg.Name, statev1.ActorKind_ACTOR_KIND_MEMBER
	return command
}

// leader is the member that leads, nil if none is known or this node does.
func (c *core) leader() (leader *statev1.Member) {
	id := c.replica.Load().Leader()
	if id == "" || id == c.own.id {
		return nil
	}
	c.Read(func(st *domain.State) { leader, _ = st.Member(id) })
	return leader
}

// Knows tells whether this node leads and has applied what was agreed before it did: its
// state holds every change that anybody was told of.
func (c *core) Knows() bool {
	r := c.replica.Load()
	return r.IsLeader() && r.Term() == c.ledTerm.Load()
}

// noQuorumSince is when this node last saw an agreement, if that is so long ago that
// there is no quorum; zero if there is. A leader ticks twice a second, so silence means
// something; Raft's own idea of a leader is only a heartbeat's.
func (c *core) noQuorumSince(now time.Time) time.Time {
	patience := max(3*time.Second, 4*c.cfg.Timing.Heartbeat)
	last := c.clock.last()
	if last.IsZero() {
		last = c.started
	}
	if now.Sub(last) <= patience {
		return time.Time{}
	}
	return last
}

// notAgreeing is what everybody is told whose wish needs an agreement.
func (c *core) notAgreeing(now time.Time) string {
	since := c.noQuorumSince(now)
	if since.IsZero() {
		return ""
	}
	why := "a majority of the CA nodes that vote must be up and reach each other: start or reconnect them; if it is gone for good: docs/operations.md, \"Lost quorum\""
	if err := c.replica.Load().Err(); err != nil {
		why = fmt.Sprintf("this node takes no part (%v): ask another CA node, and mend this one", err)
	}
	return fmt.Sprintf("no quorum since %s (%v). Signing, renewal, new instances of known entries, bundles, traffic and failover go on. "+
		"New entries, agreements, tokens, members and hosts have to wait: nothing was changed. To do: %s",
		since.UTC().Format(time.RFC3339), now.Sub(since).Round(time.Second), why)
}

// disk says what is wrong with the disk under the log.
func (c *core) disk() string {
	if err := c.replica.Load().Err(); errors.Is(err, replica.ErrDisk) {
		return err.Error()
	}
	return ""
}

// Nodes is how far everybody is: as this node knows if it leads, else as the leader
// says when it is asked.
func (c *core) Nodes(ctx context.Context, ask bool) (server.Nodes, error) {
	r := c.replica.Load()
	if r.IsLeader() {
		nodes := server.Nodes{LeaderID: c.own.id, Last: r.Stats().LastIndex}
		for _, s := range r.Servers() {
			nodes.Progress = append(nodes.Progress, server.Progress{ID: s.ID, Voter: s.Voter, Match: s.Match, Contact: s.Contact})
		}
		return nodes, nil
	}
	if !ask {
		return server.Nodes{}, server.ErrNotLeader
	}
	leader := c.leader()
	if leader == nil {
		return server.Nodes{}, replica.ErrNoQuorum
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	return c.peers.Nodes(ctx, leader)
}

// vouch asks one member for another that this node does not know.
func (c *core) vouch(ctx context.Context, by, about string) (*statev1.Member, error) {
	var m *statev1.Member
	c.Read(func(st *domain.State) { m, _ = st.Member(by) })
	if m == nil {
		return nil, fmt.Errorf("member %.12s is not known", by)
	}
	return c.peers.Vouch(ctx, m, about)
}

// wall is what this node's clock reads. Certificates and time-outs go by time.Now: only
// what is agreed about time, and whether to sign, depend on it.
func (c *core) wall() time.Time { return time.Now().Add(c.clockError()) }

func (c *core) clockError() time.Duration {
	if c.ahead == nil {
		return 0
	}
	return c.ahead()
}

// signerClock is what the signer compares this node's clock with.
func (c *core) signerClock() signer.Clock {
	clock := c.clock.read()
	if !clock.Agreed.IsZero() {
		clock.Agreed = clock.Agreed.Add(-c.clockError())
	}
	return clock
}

// clockProblem says why this node rejects a leader's time; empty if it does not.
func (c *core) clockProblem() string {
	leader, reason := c.replica.Load().Rejected()
	if leader == "" {
		return ""
	}
	name := leader
	c.Read(func(st *domain.State) {
		if m, ok := st.Member(leader); ok {
			name = m.GetName()
		}
	})
	return "leader " + name + " " + reason
}

func (c *core) isMember(id string) (is bool) {
	if c.replica.Load() == nil {
		return false
	}
	c.Read(func(st *domain.State) { _, is = st.Member(id) })
	return is
}

// Supersede is called when somebody shows that this node's epoch is over.
func (c *core) Supersede(statement, signature []byte) error {
	return c.replica.Load().Supersede(statement, signature)
}

// SignStatement signs with the node key, in the form that Apply verifies.
func (c *core) SignStatement(sum [sha256.Size]byte) (spki, signature []byte, err error) {
	if spki, err = x509.MarshalPKIXPublicKey(c.own.key.Public()); err != nil {
		return nil, nil, err
	}
	if signature, err = c.own.key.Sign(rand.Reader, sum[:], crypto.SHA256); err != nil {
		return nil, nil, err
	}
	signature, err = ca.FixedSignature(signature)
	return spki, signature, err
}
