package replica

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/domain"
)

// writes proposes tokens, at whoever leads, until stopped; then every token that was
// acknowledged is told.
type writes struct {
	stop    func() []string
	written atomic.Int64
}

func startLoad(t *testing.T, member *node, writers int) *writes {
	l := &writes{}
	done := make(chan struct{})
	var tasks sync.WaitGroup
	var mu sync.Mutex
	var acknowledged []string
	for w := range writers {
		tasks.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-done:
					return
				default:
				}
				id := fmt.Sprintf("w%dn%d", w, i)
				if proposeAnywhere(t, member, token(id)) {
					mu.Lock()
					acknowledged = append(acknowledged, id)
					mu.Unlock()
					l.written.Add(1)
				} else {
					time.Sleep(5 * time.Millisecond)
				}
			}
		})
	}
	l.stop = sync.OnceValue(func() []string {
		close(done)
		tasks.Wait()
		return acknowledged
	})
	t.Cleanup(func() { l.stop() })
	return l
}

// group is changed by the test's goroutine only while writers read a copy of it.
var groups sync.Mutex

func members(member *node) []*node {
	groups.Lock()
	defer groups.Unlock()
	return append([]*node(nil), *member.group...)
}

func proposeAnywhere(t *testing.T, member *node, command *statev1.Command) bool {
	for _, n := range members(member) {
		if !n.IsLeader() {
			continue
		}
		outcome, err := n.Propose(testContext(t), command)
		return err == nil && outcome.Refused == nil
	}
	return false
}

// steady writes 5,000 entries a second, a hundred to a command, and keeps how long each
// command took.
func steady(t *testing.T, member *node, stop <-chan struct{}) []time.Duration {
	var mu sync.Mutex
	var took []time.Duration
	var writers sync.WaitGroup
	beat := time.NewTicker(20 * time.Millisecond)
	defer beat.Stop()
	for n := 0; ; n++ {
		select {
		case <-beat.C:
		case <-stop:
			writers.Wait()
			return took
		}
		writers.Go(func() {
			var changes []*statev1.EntryChange
			for i := range 100 {
				changes = append(changes, updateEntry(fmt.Sprintf("old%d", (n*100+i)%1000), fmt.Sprint(n), 0))
			}
			from := time.Now()
			// A busy machine may have an election meanwhile: what a writer waits then counts.
			for !proposeAnywhere(t, member, entryCommand(changes...)) {
				if time.Since(from) > 30*time.Second {
					t.Error("a write failed for half a minute")
					return
				}
				time.Sleep(10 * time.Millisecond)
			}
			mu.Lock()
			defer mu.Unlock()
			took = append(took, time.Since(from))
		})
	}
}

func percentile99(took []time.Duration) time.Duration {
	slices.Sort(took)
	return took[len(took)*99/100]
}

// A wiped follower gets a snapshot of many entries while 5,000 more are written each
// second: it catches up within a minute, reads and writes go on, and writes take no three
// times as long. ENTENTE_SOAK has a million entries.
func TestSnapshotInstallUnderLoad(t *testing.T) {
	const each = 250
	records, watched := 20_000, 2*time.Second
	switch {
	case soak() > 0:
		records, watched = 1_000_000, 10*time.Second
	case testing.Short():
		records = 2_000
	}
	nodes := clusterOf(t, func(t testing.TB, name string) *node {
		n := newNode(t, name)
		n.beat = Timing{}.heartbeat() // as nodes have it, which are not three in one process
		return n
	}, "one", "two", "three")
	var writers sync.WaitGroup
	for w := range 8 {
		writers.Go(func() {
			for from := w * each; from < records; from += 8 * each {
				var changes []*statev1.EntryChange
				for i := from; i < from+each; i++ {
					changes = append(changes, createEntry(fmt.Sprintf("old%d", i), ""))
				}
				for !proposeAnywhere(t, nodes[0], entryCommand(changes...)) {
					time.Sleep(time.Millisecond)
				}
			}
		})
	}
	writers.Wait()
	victim := other(nodes, leaderOf(t, nodes[0]))
	rest := without(nodes, victim)
	victim.kill()
	groups.Lock()
	*nodes[0].group = rest
	groups.Unlock()
	leader := awaitLeader(t, rest...)
	for _, n := range rest {
		reload := n.raft.ReloadableConfig()
		reload.TrailingLogs = 1
		if err := n.raft.ReloadConfig(reload); err != nil {
			t.Fatal(err)
		}
		takeSnapshot(t, n)
		reload.TrailingLogs = trailingEntries // what comes now stays, as it would
		if err := n.raft.ReloadConfig(reload); err != nil {
			t.Fatal(err)
		}
	}
	measure := func(until func()) []time.Duration {
		stop := make(chan struct{})
		result := make(chan []time.Duration, 1)
		go func() { result <- steady(t, rest[0], stop) }()
		until()
		close(stop)
		return <-result
	}
	before := measure(func() { time.Sleep(watched) })

	// Its disk was replaced: it knows only who the others are.
	var cluster *statev1.Cluster
	var list []*statev1.Member
	leader.Read(func(s *domain.State) { cluster, list = s.Cluster(), s.Members() })
	if err := errors.Join(os.RemoveAll(victim.dir), os.MkdirAll(victim.dir, 0o700), PrepareJoin(victim.config(), cluster, list)); err != nil {
		t.Fatal(err)
	}
	begin, term := time.Now(), leader.raft.CurrentTerm()
	reads, unread := 0, 0
	var caught time.Duration
	during := measure(func() {
		victim.start()
		for caught == 0 {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			if err := leader.Barrier(ctx); err != nil {
				if unread++; unread > 10+reads {
					t.Errorf("%d reads, and %d failed: %v", reads, unread, err)
				}
				leader = awaitLeader(t, rest...)
			}
			cancel()
			reads++
			whole := false
			victim.Read(func(s *domain.State) { whole = s.EntryCount() == records })
			if whole && victim.Applied()+256 > leader.Applied() {
				caught = time.Since(begin)
			}
			if time.Since(begin) > 2*time.Minute {
				t.Fatal("the follower does not catch up")
			}
			time.Sleep(5 * time.Millisecond)
		}
		time.Sleep(max(0, watched-caught))
	})
	if victim.restored.Load() == 0 {
		t.Error("no snapshot was installed: the test sees nothing")
	}
	was, is := percentile99(before), percentile99(during)
	t.Logf("%d entries: caught up after %v; %d writes of 100 and %d reads meanwhile, %d of which failed, %d elections; p99 of writes %v, before %v",
		records, caught, len(during), reads, unread, leader.raft.CurrentTerm()-term, is, was)
	if caught > time.Minute {
		t.Error("that is more than a minute")
	}
	// Below 50 ms it is the machine's other work that is measured.
	if soak() > 0 && is > max(3*was, 50*time.Millisecond) {
		t.Error("writes took three times as long")
	}
	alike(t, rest[0], rest[1], victim)
}
