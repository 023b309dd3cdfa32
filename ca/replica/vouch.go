package replica

import (
	"context"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

const (
	vouchLife    = 10 * time.Minute // after that the state has caught up, or it is asked again
	vouchEvery   = time.Second      // how often is asked about one node, at most
	vouchTimeout = 3 * time.Second
	vouchMemory  = 64 // nodes: anybody may knock
)

// vouched is what this node's peers say of members that it does not know yet. A voter
// that was away while another one joined would refuse the newcomer for ever, should that
// one come to lead. So it asks the voters that it does know, over connections pinned to
// their keys; a majority of all voters known here must say that the node is a member
// that votes. One that lies, or that was removed meanwhile, admits nobody.
type vouched struct {
	self   string
	ask    func(ctx context.Context, by, about string) (*statev1.Member, error)
	voters func() []string // ids of all voters that this node knows, itself included
	log    func(m *statev1.Member, by int)

	ctx   context.Context // ends with the replica
	tasks sync.WaitGroup

	mu    sync.Mutex
	nodes map[string]*vouching
}

type vouching struct {
	member *statev1.Member // nil: not vouched for
	until  time.Time
	asked  time.Time
}

func (v *vouched) member(id string) *statev1.Member {
	if v == nil {
		return nil
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if n := v.nodes[id]; n != nil && time.Now().Before(n.until) {
		return n.member
	}
	return nil
}

// knocked begins to ask about a node that was refused just now; it does not wait. The
// node tries again by itself.
func (v *vouched) knocked(id string) {
	if v == nil || id == v.self {
		return
	}
	now := time.Now()
	v.mu.Lock()
	defer v.mu.Unlock()
	n := v.nodes[id]
	if n == nil {
		if len(v.nodes) >= vouchMemory {
			for other, old := range v.nodes {
				if now.Sub(old.asked) > vouchTimeout && now.After(old.until) {
					delete(v.nodes, other)
				}
			}
			if len(v.nodes) >= vouchMemory {
				return
			}
		}
		n = &vouching{}
		v.nodes[id] = n
	}
	if now.Sub(n.asked) < vouchEvery || now.Before(n.until) || v.ctx.Err() != nil {
		return
	}
	n.asked = now
	v.tasks.Go(func() { v.count(id) })
}

// count asks everybody at once.
func (v *vouched) count(id string) {
	ctx, cancel := context.WithTimeout(v.ctx, vouchTimeout)
	defer cancel()
	voters := v.voters()
	answers := make(chan *statev1.Member, len(voters))
	asked := 0
	for _, by := range voters {
		if by == v.self || by == id {
			continue
		}
		asked++
		go func() {
			m, err := v.ask(ctx, by, id)
			if err != nil || m.GetId() != id || !m.GetVoter() {
				m = nil
			}
			answers <- m
		}()
	}
	needed := len(voters)/2 + 1
	yes := 0
	for range asked {
		m := <-answers
		if m == nil {
			continue
		}
		if yes++; yes == needed {
			v.mu.Lock()
			v.nodes[id].member, v.nodes[id].until = m, time.Now().Add(vouchLife)
			v.mu.Unlock()
			v.log(m, yes)
		}
	}
}

// knownVoters are the voters of Raft's newest membership here.
func (r *Replica) knownVoters() (ids []string) {
	started := r.running.Load()
	if started == nil {
		return nil
	}
	for _, s := range started.GetConfiguration().Configuration().Servers {
		if s.Suffrage == raft.Voter {
			ids = append(ids, string(s.ID))
		}
	}
	return ids
}
