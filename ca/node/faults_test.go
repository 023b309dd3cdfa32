package node_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/node"
	"github.com/entente-mesh/entente/ca/replica"
)

// brokenDisk is what stands before each write to a node's log.
type brokenDisk struct {
	full atomic.Bool
	hang atomic.Pointer[chan struct{}]
}

func (d *brokenDisk) write() error {
	if c := d.hang.Load(); c != nil {
		<-*c
	}
	if d.full.Load() {
		return syscall.ENOSPC
	}
	return nil
}

func leads(nodes [3]*catest.CA) (leader *catest.CA, followers []*catest.CA) {
	for _, c := range nodes {
		if c.Node().IsLeader() {
			leader = c
		} else {
			followers = append(followers, c)
		}
	}
	return leader, followers
}

func services(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "---\napiVersion: entente/v1\nkind: Service\nmetadata: {name: s%d}\nspec: {run: {uid: %d, hosts: [h1]}, port: %d}\n", i, 2000+i, 10000+i)
	}
	return accounts + b.String()
}

// The disk of the leader, or of a follower, stalls or says that it is full: the cluster
// goes on, the node signs from memory and says what is wrong, and when the disk works
// again it takes part again by itself, with nothing lost.
func TestDiskFailsAndReturns(t *testing.T) {
	for _, fault := range []string{"stalls", "is full"} {
		for _, whose := range []string{"leader", "follower"} {
			t.Run(whose+"'s disk "+fault, func(t *testing.T) {
				t.Parallel()
				nodes := cluster(t)
				var disk brokenDisk
				// The node is chosen by its role after a restart with the hook in place.
				target := nodes[0]
				target.Stop()
				target.Config().BeforeWrite(disk.write)
				target.Restart()
				target.WaitReady()
				eventually(t, "the role is taken", 20*time.Second, func() error {
					leader, _ := leads(nodes)
					switch {
					case leader == nil:
					case whose == "leader" && leader != target:
						leader.Stop()
						leader.Restart()
						leader.WaitReady()
					case whose == "follower" && leader == target:
						target.Stop()
						target.Restart()
						target.WaitReady()
					default:
						return nil
					}
					return errors.New("another role")
				})
				other := nodes[1]
				eventually(t, "agreement", 10*time.Second, func() error {
					_, err := other.TryApply(accounts)
					return err
				})
				h := attest(t, other, "h1")
				caughtUp(t, nodes[0], nodes[1], nodes[2])

				hang := make(chan struct{})
				if fault == "stalls" {
					disk.hang.Store(&hang)
				} else {
					disk.full.Store(true)
				}
				took := eventually(t, "agreement without that disk", 20*time.Second, func() error {
					_, err := other.TryApply(services(2))
					return err
				})
				t.Logf("agreed again after %v", took)
				eventually(t, "the node says what is wrong", 10*time.Second, func() error {
					if target.Status().GetDisk() == "" {
						return errors.New("it does not")
					}
					return nil
				})
				if _, err := sign(t.Context(), h.at(t, target), h.csr); err != nil {
					t.Errorf("signing with a broken disk: %v", err)
				}
				before := target.Status().GetRevision()
				eventually(t, "what it misses is agreed", 20*time.Second, func() error {
					_, err := other.TryApply(services(3))
					return err
				})

				disk.full.Store(false)
				disk.hang.Store(nil)
				close(hang)
				took = eventually(t, "the node takes part again", 40*time.Second, func() error {
					s := target.Status()
					if s.GetRevision() < before {
						t.Fatalf("its revision went back from %d to %d", before, s.GetRevision())
					}
					if s.GetDisk() != "" || s.GetEntries() != 4 || !s.GetQuorum() {
						return fmt.Errorf("disk %q, %d entries, quorum %v", s.GetDisk(), s.GetEntries(), s.GetQuorum())
					}
					return nil
				})
				t.Logf("it took part again after %v", took)
				caughtUp(t, nodes[0], nodes[1], nodes[2])
				// It counts again: with one of the others gone there is still quorum.
				nodes[2].Kill()
				eventually(t, "agreement with its vote", 20*time.Second, func() error {
					_, err := target.TryApply(services(4))
					return err
				})
			})
		}
	}
}

// A real file system that is full: a node on 24 MiB.
func TestFileSystemFull(t *testing.T) {
	t.Parallel()
	c := catest.Prepare(t, catest.Options{Name: "ca-2", Datacenter: "dc2"})
	dir := c.Config().DataDir
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := mountSmall(dir, 24<<20); err != nil {
		t.Skipf("no file system can be mounted here: %v", err)
	}
	t.Cleanup(func() {
		c.Stop()
		unmount(dir)
	})
	one := catest.Start(t, catest.Options{})
	three := one.Join("ca-3", "dc3")
	if err := node.Join(t.Context(), c.Config(), one.NodeToken("ca-2", "dc2")); err != nil {
		t.Fatal(err)
	}
	c.Restart()
	c.WaitReady()
	caughtUp(t, one, three, c)

	filler, err := os.Create(filepath.Join(dir, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	for written, chunk := 0, make([]byte, 64<<10); written < 64<<20; written += len(chunk) {
		if _, err := filler.Write(chunk); err != nil {
			break
		}
	}
	filler.Close()
	writer := one
	written := 0
	eventually(t, "the full disk is noticed", 60*time.Second, func() error {
		if disk := c.Status().GetDisk(); disk != "" {
			if !strings.Contains(disk, "no space") {
				t.Errorf("it says %q", disk)
			}
			return nil
		}
		written++
		writer.TryApply(services(10 + written%40)) // the cluster goes on meanwhile
		return errors.New("not yet")
	})
	if err := os.Remove(filler.Name()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the node is back", 40*time.Second, func() error {
		if s := c.Status(); s.GetDisk() != "" || !s.GetQuorum() {
			return errors.New(s.GetDisk())
		}
		return nil
	})
	one.Apply(services(5))
	caughtUp(t, one, three, c)
}

// A follower hears its leader and is not replicated to: the leader hands over, and when
// that does not help the follower leaves the agreement and enters it anew, by themselves.
func TestWatchdogsAct(t *testing.T) {
	if testing.Short() {
		t.Skip("it waits for watchdogs of real time")
	}
	t.Parallel()
	nodes := cluster(t)
	target := nodes[0]
	var held atomic.Bool
	id := target.Node().ID()
	for _, c := range nodes {
		c.Stop()
		c.Config().HoldBack(func(member string) bool { return held.Load() && member == id })
	}
	for _, c := range nodes {
		c.Restart()
	}
	var led *catest.CA
	eventually(t, "the target follows", 30*time.Second, func() error {
		if led, _ = leads(nodes); led == nil || led == target {
			if led == target {
				target.Stop()
				target.Restart()
			}
			return errors.New("not yet")
		}
		return nil
	})
	target.WaitReady()
	caughtUp(t, nodes[0], nodes[1], nodes[2])
	held.Store(true)
	took := eventually(t, "another node leads", 40*time.Second, func() error {
		if now, _ := leads(nodes); now == nil || now == led {
			return errors.New("not yet")
		}
		return nil
	})
	t.Logf("the leader handed over after %v", took)
	took = eventually(t, "the follower leaves the agreement", 60*time.Second, func() error {
		if why := target.Status().GetNotAgreeing(); !strings.Contains(why, "replicated to") {
			return fmt.Errorf("it says %q", why)
		}
		return nil
	})
	t.Logf("the follower left after %v more", took)
	eventually(t, "the others go on", 20*time.Second, func() error {
		_, err := nodes[1].TryApply(services(3))
		return err
	})
	held.Store(false)
	took = eventually(t, "it is back", 40*time.Second, func() error {
		if s := target.Status(); !s.GetQuorum() || s.GetEntries() != 4 {
			return fmt.Errorf("quorum %v, %d entries", s.GetQuorum(), s.GetEntries())
		}
		return nil
	})
	t.Logf("it was back after %v", took)
	caughtUp(t, nodes[0], nodes[1], nodes[2])
}

// damage removes an entry from the memory of nodes, all at the same log index, and from
// no other's.
func damage(t *testing.T, nodes ...*catest.CA) {
	t.Helper()
	eventually(t, "the nodes stand at the same log entry", 20*time.Second, func() error {
		var states []*domain.State
		var reach func(rest []*catest.CA) error
		reach = func(rest []*catest.CA) (err error) {
			if len(rest) > 0 {
				rest[0].Node().Damage(func(st *domain.State) {
					states = append(states, st)
					err = reach(rest[1:])
				})
				return err
			}
			for _, st := range states {
				if st.Applied() != states[0].Applied() {
					return errors.New("not now")
				}
			}
			for _, st := range states {
				outcome := st.Apply(st.Applied(), &statev1.Command{Body: &statev1.Command_ApplyObjects{ApplyObjects: &statev1.ApplyObjects{
					Deletes: []*statev1.ObjectKey{{Kind: "Service", Name: "accounts"}},
				}}})
				if outcome.Refused != nil {
					t.Error(outcome.Refused)
				}
			}
			return nil
		}
		return reach(nodes)
	})
}

func stopped(c *catest.CA) bool {
	_, err := os.Stat(filepath.Join(c.Config().DataDir, "raft", "diverged"))
	return err == nil
}

// A node whose state is not what the others hold is stopped by the next comparison, no
// more than 4096 log entries later, and only it, whether it follows or leads; its own log
// cannot bring it back.
func TestDivergedNodeStops(t *testing.T) {
	for _, whose := range []string{"follower", "leader"} {
		t.Run(whose, func(t *testing.T) {
			t.Parallel()
			nodes := cluster(t)
			nodes[0].Apply(accounts)
			every := uint64(4096)
			if whose == "leader" || testing.Short() { // writing so many once is enough
				every = 256
				for _, c := range nodes {
					c.Stop()
					c.Config().CompareEvery(every)
				}
				for _, c := range nodes {
					c.Restart()
				}
				for _, c := range nodes {
					c.WaitReady()
				}
			}
			caughtUp(t, nodes[0], nodes[1], nodes[2])
			var leader *catest.CA
			var followers []*catest.CA
			eventually(t, "somebody leads", 20*time.Second, func() error {
				if leader, followers = leads(nodes); leader == nil || len(followers) != 2 {
					return errors.New("nobody does")
				}
				return nil
			})
			odd, sound := followers[0], []*catest.CA{leader, followers[1]}
			if whose == "leader" {
				odd, sound = leader, followers
			}
			before := applied(odd)
			damage(t, odd)
			var writers sync.WaitGroup
			writing, done := context.WithCancel(t.Context())
			defer done()
			for range 8 { // entries, not commands, count: few callers share one
				writers.Go(func() {
					for {
						select {
						case <-writing.Done():
							return
						default:
							// The odd leader answers with a revision that nobody else reaches.
							ctx, cancel := context.WithTimeout(writing, 100*time.Millisecond)
							sound[0].Node().Propose(ctx, &statev1.Command{Actor: "a test", Body: &statev1.Command_RevokeToken{RevokeToken: &statev1.RevokeToken{Id: "none"}}})
							cancel()
						}
					}
				})
			}
			eventually(t, "the odd node stops", 120*time.Second, func() error {
				if !stopped(odd) {
					return errors.New("not yet")
				}
				return nil
			})
			done()
			writers.Wait()
			if entries := applied(odd) - before; entries > every+1024 { // those that were under way
				t.Errorf("it stopped after %d entries", entries)
			} else {
				t.Logf("it stopped after %d entries", entries)
			}
			odd.Kill()
			if _, err := node.New(odd.Config(), nil, node.Listeners{}); !errors.Is(err, replica.ErrDiverged) {
				t.Errorf("the odd node starts again: %v", err)
			}
			eventually(t, "the others agree", 20*time.Second, func() error {
				_, err := sound[0].TryApply(cards)
				return err
			})
			caughtUp(t, sound...)
			for _, c := range sound {
				if stopped(c) {
					t.Errorf("%s stopped, too", c.Config().Name)
				}
			}
		})
	}
}

// Of four voters two hold one state and two another: nobody knows who is wrong, so
// nobody stops, and all say so.
func TestDivergedHalvesStay(t *testing.T) {
	t.Parallel()
	three := cluster(t)
	nodes := append(three[:], three[0].Join("ca-4", "dc1"))
	nodes[0].Apply(accounts)
	caughtUp(t, nodes...)
	damage(t, nodes[0], nodes[1])
	nodes[2].AgentToken("h9", "dc1") // nothing whose rules look at what differs
	caughtUp(t, nodes...)
	var index uint64
	sums := map[string]int{}
	eventually(t, "an index that all remember", 20*time.Second, func() error {
		index = applied(nodes[0])
		clear(sums)
		for _, c := range nodes {
			c.Node().Read(func(st *domain.State) {
				if sum, ok := st.ChecksumAt(index); ok {
					sums[string(sum)]++
				}
			})
		}
		if len(sums) != 2 {
			return fmt.Errorf("%d states", len(sums))
		}
		for _, n := range sums {
			if n != 2 {
				return errors.New("not two and two")
			}
		}
		return nil
	})
	for _, c := range nodes {
		c.Node().CompareAt(t.Context(), index)
	}
	for _, c := range nodes {
		if stopped(c) {
			t.Errorf("%s stopped", c.Config().Name)
		}
	}
	// The control: once three are of one mind, the fourth stops.
	c := nodes[1]
	c.Stop()
	c.Restart() // from its log, which is sound
	c.WaitReady()
	caughtUp(t, nodes[1:]...) // nodes[0] may have been compared, and have stopped, already
	eventually(t, "the odd one stops", 30*time.Second, func() error {
		if stopped(nodes[0]) {
			return nil
		}
		nodes[0].Node().CompareAt(t.Context(), applied(nodes[2]))
		return errors.New("not yet")
	})
	for _, c := range nodes[1:] {
		if stopped(c) {
			t.Errorf("%s stopped, too", c.Config().Name)
		}
	}
	nodes[0].Kill()
}

func applied(c *catest.CA) (index uint64) {
	c.Node().Read(func(st *domain.State) { index = st.Applied() })
	return index
}

// A witness votes and does not sign, and leads only while nobody else can.
func TestWitness(t *testing.T) {
	t.Parallel()
	one := catest.Start(t, catest.Options{})
	two := one.Join("ca-2", "dc2")
	w := catest.Prepare(t, catest.Options{Name: "witness", Datacenter: "dc3"})
	token := one.GrantToken(&statev1.NodeGrant{Name: "witness", Datacenter: "dc3", Voter: true})
	if err := node.Join(t.Context(), w.Config(), token); err != nil {
		t.Fatal(err)
	}
	w.Restart()
	w.WaitReady()
	eventually(t, "the witness votes", 10*time.Second, func() error {
		for _, m := range one.Status().GetMembers() {
			if m.GetMember().GetName() == "witness" && m.GetVoterNow() {
				return nil
			}
		}
		return errors.New("not yet")
	})
	if err := w.Node().Ready(); err != nil {
		t.Errorf("a witness that votes is not ready: %v", err)
	}
	one.Apply(accounts)
	caughtUp(t, one, two, w)
	for _, a := range one.Status().GetAuthorities() {
		if a.GetMemberId() == w.Node().ID() {
			t.Error("the witness has an authority")
		}
	}
	// With one signer gone, and then back, the witness never stays in the lead.
	one.Kill()
	eventually(t, "a signer leads", 20*time.Second, func() error {
		if !two.Node().IsLeader() {
			return errors.New("not yet")
		}
		return nil
	})
	eventually(t, "agreement", 10*time.Second, func() error {
		_, err := two.TryApply(cards)
		return err
	})
	one.Restart()
	one.WaitReady()
	caughtUp(t, one, two, w)
}

// A non-voter holds everything and signs, and votes when it is promoted.
func TestNonvoter(t *testing.T) {
	t.Parallel()
	one := catest.Start(t, catest.Options{})
	one.Apply(accounts)
	h := attest(t, one, "h1")
	c := catest.Prepare(t, catest.Options{Name: "ca-2", Datacenter: "dc2"})
	if err := node.Join(t.Context(), c.Config(), one.GrantToken(&statev1.NodeGrant{Name: "ca-2", Datacenter: "dc2", Signing: true})); err != nil {
		t.Fatal(err)
	}
	c.Restart()
	c.WaitReady()
	votes := func() bool {
		for _, m := range one.Status().GetMembers() {
			if m.GetMember().GetName() == "ca-2" {
				return m.GetVoterNow()
			}
		}
		return false
	}
	if votes() {
		t.Fatal("a non-voter votes")
	}
	if _, err := sign(t.Context(), h.at(t, c), h.csr); err != nil {
		t.Errorf("a non-voter does not sign: %v", err)
	}
	c.Stop() // nobody waits for it
	one.Apply(cards)
	c.Restart()
	c.WaitReady()
	c.Promote("ca-2")
	eventually(t, "it votes", 10*time.Second, func() error {
		if !votes() {
			return errors.New("not yet")
		}
		return nil
	})
}

// One node's clock jumps by ten minutes, forth and back: it stops signing, does not lead
// for long, and moves nobody else's time; set right, it signs again.
func TestClockJumps(t *testing.T) {
	t.Parallel()
	nodes := cluster(t)
	var ahead atomic.Int64
	target := nodes[0]
	target.Stop()
	target.Config().ClockError(func() time.Duration { return time.Duration(ahead.Load()) })
	target.Restart()
	target.WaitReady()
	other := nodes[1]
	eventually(t, "agreement", 10*time.Second, func() error {
		_, err := other.TryApply(accounts)
		return err
	})
	h := attest(t, other, "h1")
	caughtUp(t, nodes[0], nodes[1], nodes[2])
	agreed := func() (now time.Time) {
		other.Node().Read(func(st *domain.State) { now = st.Now() })
		return now
	}
	for _, jump := range []time.Duration{10 * time.Minute, -10 * time.Minute} {
		if !target.Node().IsLeader() { // it has to lead when its clock jumps
			for range 3 {
				if leader, _ := leads(nodes); leader != nil && leader != target {
					leader.Stop()
					leader.Restart()
					leader.WaitReady()
				}
			}
		}
		led := target.Node().IsLeader()
		ahead.Store(int64(jump))
		eventually(t, "the node does not sign", 10*time.Second, func() error {
			if _, err := sign(t.Context(), h.at(t, target), h.csr); err == nil {
				return errors.New("it signs")
			}
			return nil
		})
		if wrong := target.Status().GetClockOffsetSeconds() - jump.Seconds(); wrong < -5 || wrong > 5 {
			t.Errorf("the status says that the clock is %.0f s off, not %v", wrong+jump.Seconds(), jump)
		}
		eventually(t, "another node leads", 60*time.Second, func() error {
			if leader, _ := leads(nodes); leader == nil || leader == target {
				return errors.New("not yet")
			}
			return nil
		})
		t.Logf("jump by %v; it led before: %v", jump, led)
		for _, c := range nodes[1:] {
			eventually(t, "the others sign", 10*time.Second, func() error {
				_, err := sign(t.Context(), h.at(t, c), h.csr)
				return err
			})
		}
		before := agreed()
		eventually(t, "the agreed time goes on", 10*time.Second, func() error {
			if !agreed().After(before) {
				return errors.New("it stands")
			}
			return nil
		})
		if off := time.Since(agreed()).Abs(); off > 10*time.Second {
			t.Errorf("the agreed time is %v off", off)
		}
		ahead.Store(0)
		eventually(t, "the node signs again", 10*time.Second, func() error {
			_, err := sign(t.Context(), h.at(t, target), h.csr)
			return err
		})
	}
}
