package replica

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/internal/simnet"
)

// Members are added and removed, the oldest each time, so that in the end nobody is left
// of those who began, while others write, leadership moves and nodes are cut off: nothing
// that was acknowledged is lost, and there are never fewer voters than at the start.
func TestMembershipChurn(t *testing.T) {
	rounds := 5
	if n := soak(); n > 0 {
		rounds = 30 * n
	}
	for seed := range uint64(2) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { churn(t, seed, rounds) })
		})
	}
}

func churn(t *testing.T, seed uint64, rounds int) {
	random := rand.New(rand.NewPCG(seed, 9))
	network := simnet.New(millisecond)
	newNode := inMemory(network, seed, new(atomic.Pointer[node]))
	present := clusterOf(t, newNode, "one", "two", "three")
	voters := len(present)
	l := startLoad(t, present[0], 6)
	ctx, stop := context.WithCancel(t.Context())
	var tasks sync.WaitGroup
	defer tasks.Wait()
	defer stop()
	pause := func(d time.Duration) bool {
		select {
		case <-time.After(d):
			return true
		case <-ctx.Done():
			return false
		}
	}
	fewest, one := voters, present[0] // its group is everybody's, also when it is gone
	tasks.Go(func() {
		for pause(5 * time.Millisecond) {
			for _, n := range members(one) {
				if n.Replica != nil && n.IsLeader() {
					fewest = min(fewest, n.voters())
				}
			}
		}
	})
	tasks.Go(func() { // the nemesis
		for pause(time.Duration(200+random.IntN(1500)) * time.Millisecond) {
			all := members(one)
			victim := all[random.IntN(len(all))]
			if random.IntN(3) == 0 && victim.Replica != nil {
				limit, cancel := context.WithTimeout(ctx, time.Second)
				victim.TransferLeadership(limit)
				cancel()
				continue
			}
			for _, n := range all {
				network.Cut(victim.name, n.name)
				if random.IntN(2) == 0 {
					network.Cut(n.name, victim.name)
				}
			}
			pause(time.Duration(100+random.IntN(1200)) * time.Millisecond)
			network.MendAll()
		}
		network.MendAll()
	})

	eventually := func(what string, do func(leader *node) error) {
		t.Helper()
		for begin := time.Now(); ; time.Sleep(5 * time.Millisecond) {
			err := error(ErrNoQuorum)
			for _, n := range members(one) {
				if n.IsLeader() {
					err = do(n)
					break
				}
			}
			if err == nil {
				return
			}
			if !passes(err) || time.Since(begin) > 2*time.Minute {
				t.Fatalf("%s: %v", what, err)
			}
		}
	}
	agree := func(command *statev1.Command) {
		t.Helper()
		eventually("agreement", func(leader *node) error {
			limit, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			outcome, err := leader.Propose(limit, command)
			if refused := outcome.Refused; err == nil && refused != nil && refused.Code != domain.CodeNotFound {
				return refused
			}
			return err
		})
	}
	change := func(what string, do func(leader *node, limit context.Context) error) {
		t.Helper()
		eventually(what, func(leader *node) error {
			limit, cancel := context.WithTimeout(ctx, 2*time.Second)
			defer cancel()
			return do(leader, limit)
		})
	}
	for round := range rounds {
		gone, fresh := present[0], newNode(t, fmt.Sprintf("fresh%d", round))
		for _, command := range admitting(t, 0, fresh.member()) {
			agree(command)
		}
		var cluster *statev1.Cluster
		var list []*statev1.Member
		change("a look", func(leader *node, limit context.Context) error {
			err := leader.Barrier(limit)
			leader.Read(func(s *domain.State) { cluster, list = s.Cluster(), s.Members() })
			return err
		})
		if err := PrepareJoin(fresh.config(), cluster, list); err != nil {
			t.Fatal(err)
		}
		fresh.group = gone.group
		fresh.start()
		groups.Lock()
		*gone.group = append(*gone.group, fresh) // others look at it from now on
		groups.Unlock()
		change("replication", func(leader *node, limit context.Context) error {
			return leader.AddNonvoter(limit, fresh.id, fresh.address)
		})
		change("the vote", func(leader *node, limit context.Context) error {
			return leader.AddVoter(limit, fresh.id, fresh.address)
		})
		// A leader hands over before it goes.
		change("the removal", func(leader *node, limit context.Context) error {
			if leader == gone {
				leader.TransferLeadership(limit)
				return ErrNoQuorum
			}
			outcome, err := leader.Propose(limit, removeCommand(gone.id))
			if refused := outcome.Refused; err == nil && refused != nil && refused.Code != domain.CodeNotFound {
				return refused
			}
			return err
		})
		change("the removal from Raft", func(leader *node, limit context.Context) error {
			if leader == gone {
				return ErrNoQuorum
			}
			return leader.RemoveServer(limit, gone.id)
		})
		gone.stop()
		groups.Lock()
		*gone.group = without(*gone.group, gone)
		groups.Unlock()
		present = append(without(present, gone), fresh)
	}
	stop()
	tasks.Wait()
	acknowledged := l.stop()
	carryOut(t, present[0], token("end"))
	alike(t, present...)
	for _, n := range present {
		for _, id := range acknowledged {
			if !n.has(id) {
				t.Fatalf("%s lost %s", n.name, id)
			}
		}
	}
	if fewest < voters {
		t.Errorf("there were only %d voters at a time", fewest)
	}
	t.Logf("%d members replaced, %d writes acknowledged", rounds, len(acknowledged))
	if len(acknowledged) < 100 {
		t.Error("hardly anything was written: the test sees nothing")
	}
}

// A disk that stalls costs the node its part in Raft after the watchdog's time, and the
// cluster at most that and two heartbeats and a little more; a disk of a follower costs
// nobody anything.
func TestFailoverTimeOfStalledDisk(t *testing.T) {
	t.Parallel()
	for _, who := range []string{"leader", "follower"} {
		t.Run(who, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				const stall = 500 * time.Millisecond
				network := simnet.New(millisecond)
				var frozen atomic.Pointer[node]
				nodes := clusterOf(t, inMemory(network, 3, &frozen), "one", "two", "three")
				for _, n := range nodes {
					n.kill()
				}
				for _, n := range nodes {
					n.start(func(c *Config) { c.Timing.DiskStall = stall })
				}
				leader := awaitLeader(t, nodes...)
				victim := leader
				if who == "follower" {
					victim = without(nodes, leader)[0]
				}
				carryOut(t, leader, token("before"))
				alike(t, nodes...)
				frozen.Store(victim)
				began := time.Now()
				var longest time.Duration
				for i := range 30 {
					from := time.Now()
					for { // writers try wherever one leads
						done := false
						for _, n := range without(nodes, victim) {
							ctx, cancel := context.WithTimeout(t.Context(), time.Second)
							_, err := n.Propose(ctx, token(fmt.Sprintf("w%d", i)))
							cancel()
							done = done || err == nil
						}
						if victim.IsLeader() {
							go func() {
								ctx, cancel := context.WithTimeout(t.Context(), time.Second)
								defer cancel()
								victim.Propose(ctx, tickCommand(time.Now()))
							}()
						}
						if done {
							break
						}
						time.Sleep(5 * time.Millisecond)
					}
					longest = max(longest, time.Since(from))
					time.Sleep(20 * time.Millisecond)
				}
				most := stall + 4*beat // election time-outs are random, up to twice the heartbeat, and may be split once
				if who == "follower" {
					most = 50 * time.Millisecond
				}
				t.Logf("longest gap %v", longest)
				if longest > most {
					t.Errorf("nothing was agreed for %v, which is more than %v", longest, most)
				}
				select {
				case <-victim.Down():
				case <-time.After(time.Minute):
					t.Fatal("the victim still takes part")
				}
				if after := time.Since(began); !errors.Is(victim.Err(), ErrDisk) || !victim.has("before") {
					t.Errorf("after %v: %v", after, victim.Err())
				}
				frozen.Store(nil)
				time.Sleep(10 * time.Second) // its last write ends
			})
		})
	}
}
