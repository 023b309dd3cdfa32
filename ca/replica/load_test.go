package replica

import (
	"fmt"
	"os"
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

// A wiped follower gets a snapshot of many records while writes go on, and they go on.
func TestSnapshotInstallUnderLoad(t *testing.T) {
	records := 20_000
	if testing.Short() {
		records = 2_000
	}
	nodes := cluster(t, "one", "two", "three")
	leaderOf(t, nodes[0])
	var writers sync.WaitGroup
	for w := range 64 {
		writers.Go(func() {
			for i := w; i < records; i += 64 {
				for !proposeAnywhere(t, nodes[0], token(fmt.Sprintf("old%d", i))) {
					time.Sleep(time.Millisecond)
				}
			}
		})
	}
	writers.Wait()
	victim := nodes[2]
	if leaderOf(t, nodes[0]) == victim {
		victim = nodes[1]
	}
	victim.kill()
	groups.Lock()
	rest := []*node{}
	for _, n := range nodes {
		if n != victim {
			rest = append(rest, n)
		}
	}
	*nodes[0].group = rest
	groups.Unlock()
	leader := awaitLeader(t, rest...)
	for _, n := range rest {
		reload := n.raft.ReloadableConfig()
		reload.TrailingLogs = 1
		if err := n.raft.ReloadConfig(reload); err != nil {
			t.Fatal(err)
		}
		n.group = &rest
		takeSnapshot(t, n)
	}
	leader.group = &rest

	// Its disk was replaced: it knows only who the others are.
	var cluster *statev1.Cluster
	var list []*statev1.Member
	leader.Read(func(s *domain.State) { cluster, list = s.Cluster(), s.Members() })
	if err := os.RemoveAll(victim.dir); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(victim.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := PrepareJoin(victim.config(), cluster, list); err != nil {
		t.Fatal(err)
	}
	l := startLoad(t, rest[0], 16)
	begin := time.Now()
	victim.start()
	await(t, "the snapshot is installed", func() bool { return victim.restored.Load() > 0 })
	await(t, "the follower has caught up", func() bool {
		return victim.has(fmt.Sprintf("old%d", records-1)) && victim.Applied()+256 > leader.Applied()
	})
	t.Logf("caught up after %v; %d writes meanwhile", time.Since(begin), l.written.Load())
	if l.written.Load() == 0 {
		t.Error("nothing was written meanwhile")
	}
	l.stop()
	alike(t, rest[0], rest[1], victim)
}
