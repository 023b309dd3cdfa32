package replica

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/hashicorp/raft"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/scenarios/killpoint"
)

// program runs what of this package in a process of its own, this test again, and kills
// it before its change number at to the files below dir.
func program(t *testing.T, what, dir string, at int) killpoint.Result {
	t.Helper()
	r, err := killpoint.Run(killpoint.Command{
		Path: os.Args[0], Args: []string{"-test.run=^TestProgram$"},
		Env: append(os.Environ(), "ENTENTE_TEST_PROGRAM="+what, "ENTENTE_TEST_DIR="+dir),
		Dir: dir,
	}, at)
	if errors.Is(err, killpoint.ErrUnsupported) {
		t.Skipf("NOT RUN: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// atEachPoint calls f for every change that a program makes to its files, some at once.
// With -short it is every seventh.
func atEachPoint(t *testing.T, points int, f func(at int)) {
	t.Helper()
	each := 1
	if testing.Short() {
		each = 7
	}
	var tasks sync.WaitGroup
	free := make(chan struct{}, 4)
	for at := 0; at < points && !t.Failed(); at += each {
		free <- struct{}{}
		tasks.Go(func() {
			defer func() { <-free }()
			f(at)
		})
	}
	tasks.Wait()
}

// TestProgram is what other tests run and kill.
func TestProgram(t *testing.T) {
	dir := os.Getenv("ENTENTE_TEST_DIR")
	if dir == "" {
		t.Skip("run by other tests")
	}
	var err error
	switch what := os.Getenv("ENTENTE_TEST_PROGRAM"); what {
	case "log":
		useLog(t, filepath.Join(dir, logFile), func(step int) { fmt.Printf("done %d.\n", step) })
	case "init":
		n := storedNode(t, dir)
		err = Bootstrap(n.config(), initCommand(n))
	case "join":
		n := storedNode(t, dir)
		err = PrepareJoin(n.config(), initCommand(n).GetInit().GetCluster(), []*statev1.Member{n.member()})
	case "restore":
		n := storedNode(t, dir)
		state := domain.New()
		if outcome := state.Apply(2, initCommand(n)); outcome.Refused != nil {
			t.Fatal(outcome.Refused)
		}
		recovery, member, _ := n.alone(recoveryKey(), 1)(Survey{Cluster: state.Cluster()})
		err = Restore(n.config(), state, member, recovery)
	case "recover":
		n := storedNode(t, dir)
		_, err = Recover(n.config(), n.alone(recoveryKey(), 1))
	case "serve":
		n := storedNode(t, dir)
		n.start()
		awaitLeader(t, n)
		for i := range 30 {
			id := fmt.Sprintf("t%d", i)
			carryOut(t, n, token(id))
			fmt.Printf("done %s.\n", id)
			if i%10 == 9 {
				takeSnapshot(t, n)
			}
		}
		err = n.stop()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// useLog does everything that a store can do, and says after which step it is. On the
// memory store the steps are the model.
func useLog(t testing.TB, path string, done func(step int)) {
	var applied atomic.Uint64
	s, err := openBolt(path, applied.Load)
	if err != nil {
		t.Fatal(err)
	}
	for i, step := range logSteps {
		if err := step(s, &applied); err != nil {
			t.Fatal(err)
		}
		done(i)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

var logSteps = []func(s store, applied *atomic.Uint64) error{
	func(s store, _ *atomic.Uint64) error { return s.SetUint64([]byte("CurrentTerm"), 1) },
	func(s store, _ *atomic.Uint64) error { return s.StoreLogs(entries(1, 5, 1)) },
	func(s store, _ *atomic.Uint64) error { return s.Set([]byte("LastVoteCand"), []byte("somebody")) },
	func(s store, applied *atomic.Uint64) error {
		applied.Store(4)
		return s.StoreLogs(entries(6, 20, 1))
	},
	func(s store, _ *atomic.Uint64) error { return s.DeleteRange(15, 20) },
	func(s store, _ *atomic.Uint64) error { return s.StoreLogs(entries(15, 17, 2)) },
	func(s store, _ *atomic.Uint64) error { return s.DeleteRange(1, 3) },
	func(s store, applied *atomic.Uint64) error {
		applied.Store(17)
		return s.StoreLogs(small(18, 18+deleteChunk))
	},
	func(s store, _ *atomic.Uint64) error { return s.DeleteRange(4, 10) },
	func(s store, _ *atomic.Uint64) error { return s.Mark(18) },
	func(s store, _ *atomic.Uint64) error { return s.DeleteRange(11, 17+deleteChunk) }, // in two transactions
	func(s store, _ *atomic.Uint64) error { return s.DeleteRange(1, 1<<40) },
	func(s store, _ *atomic.Uint64) error { return s.StoreLogs(entries(9000, 9001, 3)) },
}

func small(from, to uint64) (logs []*raft.Log) {
	for i := from; i <= to; i++ {
		logs = append(logs, &raft.Log{Index: i, Term: 2, Type: raft.LogNoop})
	}
	return logs
}

// contents is all that a store holds.
func contents(t testing.TB, s store) (c memoryContent) {
	t.Helper()
	first, last := limits(s)
	for i := first; i <= last && last > 0; i++ {
		var log raft.Log
		if err := s.GetLog(i, &log); err != nil {
			t.Fatal(err)
		}
		c.logs = append(c.logs, log)
	}
	c.stable = map[string][]byte{}
	for _, key := range []string{"CurrentTerm", "LastVoteCand"} {
		if v, err := s.Get([]byte(key)); err == nil {
			c.stable[key] = v
		}
	}
	c.committed, _ = s.Committed()
	return c
}

// The log store's process is killed before each change that it makes to its file: what
// is there afterwards is what it was before the step, or after it, and never less than
// what was confirmed. A compaction may have come half the way.
func TestKillLogStore(t *testing.T) {
	t.Parallel()
	oneGoroutine(t)
	var model []memoryContent // before each step, and after the last
	var applied atomic.Uint64
	shelf := &memoryShelf{}
	m := shelf.open(applied.Load)
	model = append(model, contents(t, m))
	for _, step := range logSteps {
		if err := step(m, &applied); err != nil {
			t.Fatal(err)
		}
		model = append(model, contents(t, m))
	}
	whole := program(t, "log", tempDir(t), -1)
	if whole.ExitCode != 0 || len(whole.Points) < 50 {
		t.Fatalf("%+v", whole)
	}
	met := map[string]int{}
	for _, p := range whole.Points {
		met[p]++
	}
	t.Logf("%d points: %v", len(whole.Points), met)
	atEachPoint(t, len(whole.Points), func(at int) {
		dir := tempDir(t)
		r := program(t, "log", dir, at)
		if !r.Killed {
			t.Errorf("point %d was not reached", at)
			return
		}
		confirmed := strings.Count(r.Output, "done ")
		s, err := openBolt(filepath.Join(dir, logFile), func() uint64 { return 0 })
		if err != nil {
			t.Errorf("killed before %d, %s: %v", at, r.Points[at], err)
			return
		}
		defer s.Close()
		got := contents(t, s)
		if got.equal(model[confirmed]) || got.equal(model[min(confirmed+1, len(model)-1)]) {
			return
		}
		if half := model[confirmed]; confirmed == 10 { // the compaction in two transactions
			half.logs = half.logs[deleteChunk:]
			if got.equal(half) {
				return
			}
		}
		t.Errorf("killed before %d, %s, after step %d: %d entries, committed %d", at, r.Points[at], confirmed, len(got.logs), got.committed)
	})
}

// A whole node that takes writes and snapshots is killed before each change to its files
// (with -short: some): started again, it holds every write that it confirmed.
func TestKillNode(t *testing.T) {
	t.Parallel()
	prepare := func() (dir string) {
		dir = filepath.Join(tempDir(t), "node")
		n := storedNode(t, dir)
		if err := Bootstrap(n.config(), initCommand(n)); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	whole := program(t, "serve", prepare(), -1)
	if whole.ExitCode != 0 {
		t.Fatalf("%+v", whole)
	}
	t.Logf("%d points", len(whole.Points))
	snapshots := 0
	for _, p := range whole.Points {
		if strings.Contains(p, "snapshots/") {
			snapshots++
		}
	}
	if snapshots < 10 {
		t.Errorf("only %d points are in snapshots", snapshots)
	}
	atEachPoint(t, len(whole.Points), func(at int) {
		// One append is like another: those into the log are looked at now and then.
		if p := whole.Points[at]; strings.HasSuffix(p, logFile) && at%11 != 0 {
			return
		}
		dir := prepare()
		r := program(t, "serve", dir, at)
		if !r.Killed {
			return // it ticks by the clock, so one run has fewer points than another
		}
		n := storedNode(t, dir)
		n.start()
		defer n.stop()
		awaitLeader(t, n) // what is in the log alone counts from then on
		for i := range 30 {
			if id := fmt.Sprintf("t%d", i); strings.Contains(r.Output, "done "+id+".") && !n.has(id) {
				t.Errorf("killed before %d, %s: %s is lost", at, r.Points[len(r.Points)-1], id)
			}
		}
		carryOut(t, n, token("after"))
	})
}

// The procedures that make a data directory, killed before each change that they make to
// files, can be repeated, and then the node runs.
func TestKillProcedures(t *testing.T) {
	for _, what := range []string{"init", "join", "restore", "recover"} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			prepare := func() (dir string) {
				dir = filepath.Join(tempDir(t), "node")
				n := storedNode(t, dir)
				if what == "recover" {
					if err := Bootstrap(n.config(), initCommand(n)); err != nil {
						t.Fatal(err)
					}
				}
				return dir
			}
			whole := program(t, what, prepare(), -1)
			if whole.ExitCode != 0 || len(whole.Points) < 5 {
				t.Fatalf("%+v", whole)
			}
			t.Logf("%d points", len(whole.Points))
			atEachPoint(t, len(whole.Points), func(at int) {
				dir := prepare()
				if r := program(t, what, dir, at); !r.Killed {
					t.Errorf("point %d was not reached", at)
					return
				}
				if err := finish(t, what, dir); err != nil {
					t.Errorf("killed before %d, %s: %v", at, whole.Points[at], err)
				}
			})
		})
	}
}

// finish repeats an interrupted procedure if it is not complete, and runs the node.
func finish(t *testing.T, what, dir string) error {
	n := storedNode(t, dir)
	complete := Exists(dir)
	if what == "recover" { // once its state is complete, repeating it would begin one more epoch
		survey, err := Look(n.config())
		if err != nil {
			return err
		}
		complete = survey.Cluster.GetEpoch() == 1
	}
	if !complete {
		if r := program(t, what, dir, -1); r.ExitCode != 0 {
			return fmt.Errorf("it cannot be repeated: %s", r.Output)
		}
	}
	n.start()
	defer n.stop()
	if what == "join" { // nobody to join here: it waits for its peers
		return nil
	}
	awaitLeader(t, n)
	epoch := uint32(1)
	if what == "init" {
		epoch = 0
	}
	var err error
	n.Read(func(s *domain.State) {
		if s.Cluster().GetEpoch() != epoch || len(s.Members()) != 1 {
			err = fmt.Errorf("cluster %v, members %v", s.Cluster(), s.Members())
		}
	})
	carryOut(t, n, token("after"))
	if _, stat := os.Stat(filepath.Join(dir, stateNext)); !errors.Is(stat, fs.ErrNotExist) {
		err = fmt.Errorf("%s is left", stateNext)
	}
	return err
}

// storedNode is a node whose key is in its directory, so that another process is it too.
func storedNode(t *testing.T, dir string) *node {
	n := newNode(t, "one")
	n.dir = dir
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	keys := dir + ".keys" // not below dir: making it is no part of what is tested
	if err := os.Mkdir(keys, 0o700); errors.Is(err, fs.ErrExist) {
		address, err := os.ReadFile(filepath.Join(keys, "address"))
		if err != nil {
			t.Fatal(err)
		}
		n.cert, n.id = storedCert(t, keys)
		n.address = string(address)
		return n
	} else if err != nil {
		t.Fatal(err)
	}
	storeCert(t, keys, n)
	if err := os.WriteFile(filepath.Join(keys, "address"), []byte(n.address), 0o600); err != nil {
		t.Fatal(err)
	}
	return n
}

func storeCert(t *testing.T, dir string, n *node) {
	key, err := x509.MarshalPKCS8PrivateKey(n.cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"cert.der": n.cert.Certificate[0], "key.der": key} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func storedCert(t *testing.T, dir string) (tls.Certificate, string) {
	cert, err1 := os.ReadFile(filepath.Join(dir, "cert.der"))
	der, err2 := os.ReadFile(filepath.Join(dir, "key.der"))
	key, err3 := x509.ParsePKCS8PrivateKey(der)
	leaf, err4 := x509.ParseCertificate(cert)
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{cert}, PrivateKey: key}, keyID(leaf)
}
