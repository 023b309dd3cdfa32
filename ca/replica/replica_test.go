package replica

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/domain"
)

func TestBootstrap(t *testing.T) {
	t.Parallel()
	n := newNode(t, "ca1")
	if _, err := Open(listening(t, n.config())); !errors.Is(err, ErrNoState) {
		t.Errorf("open of an empty directory: %v, want ErrNoState", err)
	}
	other := newNode(t, "ca2")
	if err := Bootstrap(n.config(), initCommand(other)); err == nil {
		t.Error("a cluster of another node's key was initialised")
	}
	bad := initCommand(n)
	bad.GetInit().GetCluster().TrustDomain = "no domain"
	if err := Bootstrap(n.config(), bad); err == nil {
		t.Error("a refused Init was written")
	}
	if Exists(n.dir) {
		t.Error("a failed init left state behind")
	}

	// A former attempt was interrupted before it was complete.
	if err := os.MkdirAll(filepath.Join(n.dir, stateNew, "snapshots"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := Bootstrap(n.config(), initCommand(n)); err != nil {
		t.Fatal(err)
	}
	if err := Bootstrap(n.config(), initCommand(n)); !errors.Is(err, ErrStateExists) {
		t.Errorf("second init: %v, want ErrStateExists", err)
	}
	if err := PrepareJoin(n.config(), &statev1.Cluster{Id: clusterID}, nil); !errors.Is(err, ErrStateExists) {
		t.Errorf("join over an existing cluster: %v, want ErrStateExists", err)
	}

	n.start()
	// Init is agreed before any election.
	n.Read(func(s *domain.State) {
		if s.Cluster() == nil {
			t.Error("the state is empty after init and open")
		}
	})
	awaitLeader(t, n)
	carryOut(t, n, token("first"))
}

// The key file of another node must not run this node's state under a false id.
func TestOpenChecksTheKey(t *testing.T) {
	t.Parallel()
	n := newNode(t, "ca1")
	cfg := n.config()
	cfg.NodeID = newNode(t, "ca2").id
	if err := Bootstrap(cfg, initCommand(n)); err == nil {
		t.Error("node id and key differ, and nobody noticed")
	}
	cfg.NodeID = n.id
	if err := Bootstrap(cfg, initCommand(n)); err != nil {
		t.Error(err)
	}
}

func TestSecondProcessIsTold(t *testing.T) {
	t.Parallel()
	n := newNode(t, "ca1")
	if err := Bootstrap(n.config(), initCommand(n)); err != nil {
		t.Fatal(err)
	}
	n.start()
	if r, err := Open(listening(t, n.config())); err == nil {
		r.Close()
		t.Error("the same directory was opened twice")
	}
}

func TestThreeNodesAgree(t *testing.T) {
	t.Parallel()
	nodes := cluster(t, "ca1", "ca2", "ca3")
	leader := awaitLeader(t, nodes...)
	for i := range 20 {
		carryOut(t, leader, token(fmt.Sprintf("t%d", i)))
	}
	index := leader.Applied()
	for _, n := range nodes {
		await(t, n.name+" applies", func() bool { return n.Applied() >= index })
		if n != leader {
			_, err := n.Propose(testContext(t), token("x"))
			var elsewhere ErrNotLeader
			if !errors.As(err, &elsewhere) || elsewhere.LeaderID != leader.id {
				t.Errorf("%s: proposing to a follower gives %v, want the leader's id", n.name, err)
			}
			if err := n.Barrier(testContext(t)); !errors.As(err, &elsewhere) {
				t.Errorf("%s: barrier at a follower gives %v", n.name, err)
			}
		}
	}
	alike(t, nodes...)
	for _, s := range leader.Servers() {
		if !s.Voter {
			t.Errorf("%s does not vote", s.ID)
		}
		await(t, "match of "+s.ID, func() bool {
			for _, now := range leader.Servers() {
				if now.ID == s.ID {
					return now.Match >= index
				}
			}
			return false
		})
	}
}

// Acknowledged writes survive the leader (I10).
func TestLeaderDies(t *testing.T) {
	t.Parallel()
	nodes := cluster(t, "ca1", "ca2", "ca3")
	leader := awaitLeader(t, nodes...)
	acked := hammer(t, leader, 200)
	leader.kill()
	began := time.Now()
	var rest []*node
	for _, n := range nodes {
		if n != leader {
			rest = append(rest, n)
		}
	}
	successor := awaitLeader(t, rest...)
	t.Logf("new leader after %v", time.Since(began))
	carryOut(t, successor, token("after"))
	for _, id := range acked {
		if !successor.has(id) {
			t.Fatalf("acknowledged write %s is lost", id)
		}
	}

	// The dead one comes back and catches up.
	leader.start()
	await(t, "catching up", func() bool { return leader.has("after") })
	alike(t, leader, successor)
}

// hammer proposes n writes from 16 callers and returns those that were acknowledged.
func hammer(t *testing.T, leader *node, n int) []string {
	var mu sync.Mutex
	var acked []string
	var callers sync.WaitGroup
	for c := range 16 {
		callers.Go(func() {
			for i := range n / 16 {
				id := fmt.Sprintf("h%dx%d", c, i)
				if outcome, err := leader.Propose(testContext(t), token(id)); err == nil && outcome.Refused == nil {
					mu.Lock()
					acked = append(acked, id)
					mu.Unlock()
				}
			}
		})
	}
	callers.Wait()
	if len(acked) == 0 {
		t.Fatal("no write was acknowledged")
	}
	return acked
}

// The restart rule: a node that comes up alone, without quorum, holds what it had agreed to.
func TestRestartWithoutQuorum(t *testing.T) {
	t.Parallel()
	for _, snapshot := range []bool{false, true} {
		t.Run(fmt.Sprintf("snapshot=%v", snapshot), func(t *testing.T) {
			nodes := cluster(t, "ca1", "ca2", "ca3")
			leader := awaitLeader(t, nodes...)
			acked := hammer(t, leader, 64)
			if snapshot {
				takeSnapshot(t, leader)
			}
			for i := range 10 {
				carryOut(t, leader, token(fmt.Sprintf("tail%d", i)))
			}
			carryOut(t, leader, tickCommand(time.Now()))
			index, sum := leader.Applied(), leader.checksum()
			for _, n := range nodes {
				await(t, "applied", func() bool { return n.Applied() >= index })
			}
			for _, n := range nodes {
				n.kill()
			}

			leader.start()
			if leader.Applied() < index || leader.checksum() != sum {
				t.Fatalf("alone it holds entry %d, had applied %d", leader.Applied(), index)
			}
			for _, id := range acked {
				if !leader.has(id) {
					t.Fatalf("agreed write %s is not there", id)
				}
			}
			if age := leader.Age(); age != infinite {
				t.Errorf("without a Tick since boot the age is %v, want infinite", age)
			}
			if _, err := leader.Propose(testContext(t), token("alone")); !errors.Is(err, ErrNoQuorum) {
				t.Errorf("a lone node of three took a write: %v", err)
			}

			// With one more there is a majority; Raft delivers again what load applied.
			second := nodes[0]
			if second == leader {
				second = nodes[1]
			}
			second.start()
			now := awaitLeader(t, leader, second)
			carryOut(t, now, token("together"))
			await(t, "both", func() bool { return leader.has("together") && second.has("together") })
			alike(t, leader, second)
			carryOut(t, now, tickCommand(time.Now()))
			await(t, "a young state", func() bool { return leader.Age() < time.Second })
		})
	}
}

func TestBarrierSeesWhatWasAgreed(t *testing.T) {
	t.Parallel()
	nodes := cluster(t, "ca1")
	leader := nodes[0]
	var callers sync.WaitGroup
	for c := range 32 {
		callers.Go(func() {
			id := fmt.Sprintf("b%d", c)
			carryOut(t, leader, token(id))
			if err := leader.Barrier(testContext(t)); err != nil {
				t.Error(err)
			}
			if !leader.has(id) {
				t.Errorf("%s is not seen after a barrier", id)
			}
		})
	}
	callers.Wait()
}

// Each proposer gets its own outcome, whatever shared the entry.
func TestOutcomesFindTheirProposers(t *testing.T) {
	t.Parallel()
	nodes := cluster(t, "ca1")
	leader := nodes[0]
	var revision uint64
	leader.Read(func(s *domain.State) { revision = s.CatalogueRevision() })

	const n = 120
	var callers sync.WaitGroup
	var refused, done [n]bool
	for i := range n {
		callers.Go(func() {
			command := token(fmt.Sprintf("cas%d", i))
			if i%3 == 0 {
				command.IfRevision = revision + 1 // stale by construction
			}
			outcome, err := leader.Propose(testContext(t), command)
			if err != nil {
				t.Error(err)
				return
			}
			refused[i] = outcome.Refused != nil && outcome.Refused.Code == domain.CodeCAS
			done[i] = outcome.Refused == nil
		})
	}
	callers.Wait()
	for i := range n {
		if stale := i%3 == 0; refused[i] != stale || done[i] == stale {
			t.Errorf("command %d: refused %v, done %v", i, refused[i], done[i])
		}
		if leader.has(fmt.Sprintf("cas%d", i)) != (i%3 != 0) {
			t.Errorf("command %d: the state disagrees with the answer", i)
		}
	}
	leader.mu.Lock()
	defer leader.mu.Unlock()
	last, changes := uint64(0), 0
	for _, o := range leader.applied {
		if o.Revision < last {
			t.Fatalf("OnApply went back from revision %d to %d", last, o.Revision)
		}
		last = o.Revision
		changes += len(o.Changes)
	}
	if len(leader.applied) >= n {
		t.Errorf("%d log entries for %d concurrent commands: they do not share", len(leader.applied), n)
	}
}

func TestProposeGivesUp(t *testing.T) {
	t.Parallel()
	nodes := cluster(t, "ca1")
	leader := nodes[0]
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := leader.Propose(ctx, token("late")); !errors.Is(err, context.Canceled) {
		t.Errorf("propose with an ended context: %v", err)
	}
	if _, err := leader.Propose(testContext(t), &statev1.Command{}); err == nil {
		t.Error("an empty command was proposed: it would stop every node")
	}
	large := token("large")
	large.Actor = string(make([]byte, maxEntry))
	if _, err := leader.Propose(testContext(t), large); !errors.Is(err, ErrTooLarge) {
		t.Errorf("a command over the bound: %v", err)
	}
	// Many that only fit one by one.
	var callers sync.WaitGroup
	for i := range 8 {
		callers.Go(func() {
			command := token(fmt.Sprintf("big%d", i))
			command.Actor = string(make([]byte, maxEntry/2))
			if _, err := leader.Propose(testContext(t), command); err != nil {
				t.Error(err)
			}
		})
	}
	callers.Wait()
	leader.kill()
	if _, err := leader.Propose(testContext(t), token("dead")); !errors.Is(err, ErrStopped) {
		t.Errorf("propose to a closed replica: %v", err)
	}
	if !leader.has("big3") {
		t.Error("a closed replica cannot be read")
	}
}

// What a release does not know must stop it, not be skipped.
func TestUnknownCommandStopsTheNode(t *testing.T) {
	t.Parallel()
	n := newNode(t, "ca1")
	if err := Bootstrap(n.config(), initCommand(n)); err != nil {
		t.Fatal(err)
	}
	n.start()
	awaitLeader(t, n)
	unknown := []byte{0xfa, 0x06, 0}                 // field 111, empty message
	ignorable := append([]byte{0x10, 1}, unknown...) // field 2: ignorable
	if _, err := n.propose(testContext(t), ignorable); err != nil {
		t.Errorf("an unknown command that may be ignored: %v", err)
	}
	carryOut(t, n, token("before"))
	if _, err := n.propose(testContext(t), unknown); err == nil {
		t.Error("an unknown command was acknowledged")
	}
	select {
	case <-n.Down():
	case <-time.After(5 * time.Second):
		t.Fatal("the node goes on")
	}
	if err := n.stop(); err == nil {
		t.Error("Run ended without saying why")
	}
	if !n.has("before") {
		t.Error("the state is gone")
	}
	// The entry is in the log and will be met again.
	cfg := listening(t, n.config())
	r, err := Open(cfg)
	if err == nil {
		defer r.Close()
		select {
		case <-r.Down():
		case <-time.After(5 * time.Second):
			t.Error("restarted, it ran over the unknown command")
		}
	}
}

func TestHandOverOnStop(t *testing.T) {
	t.Parallel()
	nodes := cluster(t, "ca1", "ca2", "ca3")
	leader := awaitLeader(t, nodes...)
	if err := leader.stop(); err != nil {
		t.Fatal(err)
	}
	stopped := time.Now()
	await(t, "another leader", func() bool {
		for _, n := range nodes {
			if n != leader && n.Leader() != "" && n.Leader() != leader.id {
				return true
			}
		}
		return false
	})
	if took := time.Since(stopped); took > beat { // an election begins after one to two of them
		t.Errorf("the others had to elect: %v", took)
	}
}

func TestMembershipOverTime(t *testing.T) {
	t.Parallel()
	nodes := cluster(t, "ca1", "ca2", "ca3")
	leader := awaitLeader(t, nodes...)
	gone := nodes[2]
	if gone == leader {
		gone = nodes[1]
	}
	carryOut(t, leader, removeCommand(gone.id))
	byLeader(t, leader, func(leader *node) error { return leader.RemoveServer(testContext(t), gone.id) })
	select {
	case <-gone.Down():
		if !errors.Is(gone.Err(), ErrRemoved) {
			t.Errorf("the removed node stopped for %v", gone.Err())
		}
	case <-time.After(5 * time.Second):
		t.Error("the removed node never learned of it")
	}
	if err := gone.stop(); !errors.Is(err, ErrRemoved) {
		t.Errorf("Run of a removed node gives %v", err)
	}
	if got := len(leaderOf(t, leader).Servers()); got != 2 {
		t.Errorf("%d servers left", got)
	}

	// A new one takes its place and gets the log, or a snapshot, whatever there is.
	takeSnapshot(t, leaderOf(t, leader))
	fresh := newNode(t, "ca4")
	join(t, leader, fresh)
	carryOut(t, leader, token("four"))
	await(t, "the newcomer", func() bool { return fresh.has("four") })

	// A join that is complete needs its list no more.
	fresh.kill()
	fresh.start()
	if _, err := os.Stat(filepath.Join(fresh.dir, stateDir, joinFile)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the join list is still there: %v", err)
	}
	await(t, "the newcomer again", func() bool { return fresh.Leader() != "" })
}

// A member that gets a snapshot instead of entries ends with the same state, and its
// readers are told.
func TestSnapshotInstall(t *testing.T) {
	t.Parallel()
	nodes := cluster(t, "ca1")
	leader := nodes[0]
	for i := range 50 {
		carryOut(t, leader, token(fmt.Sprintf("old%d", i)))
	}
	reload := leader.raft.ReloadableConfig()
	reload.TrailingLogs = 1
	if err := leader.raft.ReloadConfig(reload); err != nil {
		t.Fatal(err)
	}
	takeSnapshot(t, leader)
	if first, _ := leader.disk.FirstIndex(); first < 20 {
		t.Fatalf("the log still begins at %d", first)
	}
	n := newNode(t, "ca2")
	join(t, leader, n)
	if n.restored.Load() == 0 {
		t.Error("OnRestore was not called")
	}
	carryOut(t, leader, token("new"))
	await(t, "the newcomer", func() bool { return n.has("new") && n.has("old7") })
	alike(t, n, leader)
	n.kill()
	n.start()
	if !n.has("old7") {
		t.Error("after a restart the installed snapshot is not there")
	}
}

// A node that lags must not be what an election hangs on: a newcomer votes only when
// every voter knows it.
func TestLaggingVoterDelaysPromotion(t *testing.T) {
	t.Parallel()
	nodes := cluster(t, "ca1", "ca2", "ca3")
	leader := awaitLeader(t, nodes...)
	lagging := nodes[1]
	if lagging == leader {
		lagging = nodes[2]
	}
	lagging.kill()
	fresh := newNode(t, "ca4")
	admit(t, leader, fresh)
	fresh.start()
	byLeader(t, leader, func(leader *node) error { return leader.AddNonvoter(testContext(t), fresh.id, fresh.address) })
	carryOut(t, leader, token("seen"))
	await(t, "the newcomer catches up", func() bool { return fresh.has("seen") })
	await(t, "a refused promotion", func() bool {
		err := leaderOf(t, leader).AddVoter(testContext(t), fresh.id, fresh.address)
		if err == nil {
			t.Fatal("promoted while a voter lags")
		}
		return errors.Is(err, ErrBehind) && strings.Contains(err.Error(), lagging.id)
	})
	lagging.start()
	promote(t, leader, fresh)

	// Now any of the others may lead.
	leaderOf(t, leader).kill()
	leaderOf(t, leader)
}

func other(nodes []*node, not ...*node) *node {
	for _, n := range nodes {
		wanted := true
		for _, m := range not {
			wanted = wanted && n != m
		}
		if wanted {
			return n
		}
	}
	return nil
}

// A damaged snapshot is never taken on trust.
func TestDamagedSnapshot(t *testing.T) {
	t.Parallel()
	damage := func(t *testing.T, n *node) {
		t.Helper()
		files, err := filepath.Glob(filepath.Join(n.dir, stateDir, "snapshots", "*", "state.bin"))
		if err != nil || len(files) == 0 {
			t.Fatalf("no snapshot: %v", err)
		}
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			data[len(data)/2] ^= 1
			if err := os.WriteFile(file, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Run("the log reaches back", func(t *testing.T) {
		n := cluster(t, "ca1")[0]
		carryOut(t, n, token("a"))
		takeSnapshot(t, n)
		carryOut(t, n, token("b"))
		n.kill()
		damage(t, n)
		n.start()
		if !n.has("a") || !n.has("b") {
			t.Error("the log was not replayed from its beginning")
		}
		awaitLeader(t, n)
		carryOut(t, n, token("c"))
		if aside, _ := os.ReadDir(filepath.Join(n.dir, stateDir, damagedDir)); len(aside) != 1 {
			t.Errorf("%d snapshots were put aside", len(aside))
		}
	})
	t.Run("the log does not", func(t *testing.T) {
		n := cluster(t, "ca1")[0]
		for i := range 20 {
			carryOut(t, n, token(fmt.Sprintf("a%d", i)))
		}
		reload := n.raft.ReloadableConfig()
		reload.TrailingLogs = 1
		if err := n.raft.ReloadConfig(reload); err != nil {
			t.Fatal(err)
		}
		takeSnapshot(t, n)
		n.kill()
		damage(t, n)
		if r, err := Open(listening(t, n.config())); err == nil {
			r.Close()
			t.Error("a node without its state was started")
		}
	})
}

// Raft must not panic over what cannot be read; the node refuses to start.
func TestDamagedLog(t *testing.T) {
	t.Parallel()
	n := cluster(t, "ca1")[0]
	for i := range 5 {
		carryOut(t, n, token(fmt.Sprintf("a%d", i)))
	}
	n.kill()
	flipEntry(t, filepath.Join(n.dir, stateDir, logFile), 4)
	if r, err := Open(listening(t, n.config())); err == nil {
		r.Close()
		t.Error("a damaged entry was replayed")
	}
}

// The state's address wins over the one that Raft was told when the member joined.
func TestAddressMoves(t *testing.T) {
	t.Parallel()
	nodes := cluster(t, "ca1", "ca2", "ca3")
	leader := awaitLeader(t, nodes...)
	moved := other(nodes, leader)
	moved.kill()
	moved.address = newNode(t, "elsewhere").address
	carryOut(t, leader, &statev1.Command{Body: &statev1.Command_UpdateMember{UpdateMember: &statev1.UpdateMember{
		Id: moved.id, RaftAddress: moved.address, ApiAddress: apiAddress(moved.name),
	}}})
	moved.start()
	carryOut(t, leader, token("moved"))
	await(t, "the moved node", func() bool { return moved.has("moved") })
}

// listening gives cfg a listener for an Open that is expected to fail, or to be closed.
func listening(t *testing.T, cfg Config) Config {
	t.Helper()
	cfg.Listener = loopback(t)
	return cfg
}

// A log that grows by bytes is compacted, and keeps entries by bytes as well.
func TestCompactionByBytes(t *testing.T) {
	t.Parallel()
	n := cluster(t, "ca1")[0]
	for i := range 40 {
		large := token(fmt.Sprintf("big%d", i))
		large.Actor = strings.Repeat("x", maxEntry-1024)
		carryOut(t, n, large)
	}
	if got := n.Stats().LogBytes; got < 30*maxEntry {
		t.Fatalf("%d bytes were counted", got)
	}
	n.fsm.onFull() // what count does at the bound
	await(t, "a snapshot", func() bool {
		files, _ := filepath.Glob(filepath.Join(n.dir, stateDir, "snapshots", "*", "state.bin"))
		return len(files) == 1
	})
	if kept := n.raft.ReloadableConfig().TrailingLogs; kept < trailingLeast || kept > trailingBytes/(30<<10) {
		t.Errorf("%d entries of 60 KiB would stay", kept)
	}
	if n.Stats().LogBytes != 0 {
		t.Error("the count goes on over the snapshot")
	}
	n.kill()
	n.start()
	if !n.has("big39") {
		t.Error("the state is gone after compaction and restart")
	}
}
