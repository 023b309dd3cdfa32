package replica

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/internal/simnet"
)

// vouchers answers for the nodes as their states would, over no network.
type vouchers struct {
	mu    sync.Mutex
	nodes map[string]*node
	lies  map[string]*statev1.Member // by whom
}

func (v *vouchers) ask(_ context.Context, by, about string) (m *statev1.Member, err error) {
	v.mu.Lock()
	n, lie := v.nodes[by], v.lies[by]
	v.mu.Unlock()
	if lie.GetId() == about {
		return lie, nil
	}
	if n == nil {
		return nil, errors.New("unreachable")
	}
	n.Read(func(s *domain.State) { m, _ = s.Member(about) })
	return m, nil
}

// A voter is away while another joins and the old leader goes: the newcomer, which has
// the log, comes to lead, and the one that was away takes it in because a majority of
// the voters that it knows vouch for it. A stranger that only one of them vouches for
// stays out.
func TestVouching(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		network := simnet.New(millisecond)
		newNode := inMemory(network, 1, new(atomic.Pointer[node]))
		nodes := clusterOf(t, newNode, "one", "two", "three", "four", "away")
		v := &vouchers{nodes: map[string]*node{}, lies: map[string]*statev1.Member{}}
		away := nodes[4]
		withVouch := func(c *Config) { c.Vouch = v.ask }
		for _, n := range nodes[:4] {
			v.nodes[n.id] = n
		}
		for _, n := range nodes {
			n.kill()
		}
		for _, n := range nodes[:4] {
			// Whoever leads, only the newcomer can reach the one that is away.
			network.Cut(n.name, away.name)
			n.start(withVouch)
		}
		awaitLeader(t, nodes[:4]...)
		newcomer := newNode(t, "newcomer")
		join(t, nodes[0], newcomer, withVouch) // although "away" does not know it
		v.mu.Lock()
		v.nodes[newcomer.id] = newcomer
		v.mu.Unlock()

		newcomerLeads := func() {
			byLeader(t, nodes[0], func(leader *node) error {
				if leader == newcomer {
					return nil
				}
				leader.TransferLeadershipTo(testContext(t), newcomer.id, newcomer.address)
				return ErrNoQuorum
			})
		}
		newcomerLeads()
		carryOut(t, newcomer, token("bythenewcomer"))

		// The control: who asks nobody, refuses the leader.
		away.start()
		time.Sleep(6 * beat)
		if away.has("bythenewcomer") || away.net.roster.voter(newcomer.id) {
			t.Fatal("the newcomer was taken in without anybody's word: the test sees nothing")
		}
		away.kill()

		stranger := placeNode(t, "stranger")
		stranger.address = "stranger:7000"
		v.mu.Lock()
		v.lies[nodes[0].id] = stranger.member() // two of the voters are malicious, three are needed
		v.lies[nodes[1].id] = stranger.member()
		v.mu.Unlock()
		away.start(withVouch)
		away.vouched.knocked(stranger.id)
		await(t, "the one that was away has what the newcomer agreed", func() bool {
			if !newcomer.IsLeader() {
				newcomerLeads()
			}
			return away.has("bythenewcomer")
		})
		away.vouched.tasks.Wait()
		if away.net.roster.voter(stranger.id) {
			t.Error("a stranger is admitted by the word of a minority")
		}
	})
}
