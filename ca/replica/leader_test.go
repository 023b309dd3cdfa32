package replica

import (
	"bytes"
	"context"
	"errors"
	"math"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/domain"
)

func agreedTime(n *node) (now time.Time) {
	n.Read(func(st *domain.State) { now = st.Now() })
	return now
}

// A leader that moves the agreed time far ahead is rejected: the time stays, and another
// node leads. The control is a time within the limit.
func TestLeaderCannotMoveTimeFarAhead(t *testing.T) {
	t.Parallel()
	nodes := cluster(t, "ca1", "ca2", "ca3")
	carryOut(t, nodes[0], tickCommand(time.Now().Add(time.Minute)))
	await(t, "control: a time within the limit", func() bool {
		return !slices.ContainsFunc(nodes, func(n *node) bool { return time.Until(agreedTime(n)) < 50*time.Second })
	})

	liar := awaitLeader(t, nodes...)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if outcome, err := liar.Propose(ctx, tickCommand(time.Now().Add(24*time.Hour))); err == nil {
		t.Errorf("a time one day ahead was agreed: %v", outcome)
	}
	honest := slices.DeleteFunc(slices.Clone(nodes), func(n *node) bool { return n == liar })
	next := awaitLeader(t, honest...)
	if _, reason := next.Rejected(); reason == "" {
		t.Error("the node that leads now does not say that it rejected the leader before")
	}
	carryOut(t, next, token("later"))
	for _, n := range nodes {
		await(t, "the write under the new leader", func() bool { return n.has("later") })
		if ahead := time.Until(agreedTime(n)); ahead > MaxTimeAhead {
			t.Errorf("%s: the agreed time is %v ahead", n.name, ahead)
		}
	}
	alike(t, nodes...)
	// Nor is it elected again, although its log is as good as theirs.
	vote := func(from string) error {
		_, err := next.trans.leaders.allows(from, &raft.RPC{Command: &raft.RequestVoteRequest{Term: 1 << 40}})
		return err
	}
	if vote(liar.id) == nil {
		t.Error("the rejected leader would get a vote")
	}
	if err := vote(other(honest, next).id); err != nil {
		t.Errorf("control: an honest node would get no vote: %v", err)
	}
}

// A node whose own clock is wrong rejects everybody, says so, and follows again once the
// clock is set.
func TestNodeWithAWrongClockFollowsAgain(t *testing.T) {
	t.Parallel()
	nodes := cluster(t, "ca1", "ca2")
	var behind atomic.Int64
	behind.Store(int64(time.Hour))
	wrong := newNode(t, "ca3")
	join(t, nodes[0], wrong, func(cfg *Config) {
		cfg.Wall = func() time.Time { return time.Now().Add(-time.Duration(behind.Load())) }
	})
	carryOut(t, nodes[0], tickCommand(time.Now()))
	carryOut(t, nodes[0], token("meanwhile"))
	await(t, "the node says that it rejects the leader", func() bool { id, _ := wrong.Rejected(); return id != "" })
	if wrong.has("meanwhile") || !agreedTime(wrong).IsZero() {
		t.Error("it took the leader's time all the same")
	}
	behind.Store(0)
	await(t, "the node follows again", func() bool { id, _ := wrong.Rejected(); return id == "" && wrong.has("meanwhile") })
	alike(t, wrong, leaderOf(t, nodes[0]))
}

// A snapshot brings the agreed time as well.
func TestSnapshotCannotMoveTimeFarAhead(t *testing.T) {
	t.Parallel()
	leader := cluster(t, "ca1")[0]
	carryOut(t, leader, tickCommand(time.Now().Add(24*time.Hour))) // nobody else has a say
	reload := leader.raft.ReloadableConfig()
	reload.TrailingLogs = 1
	if err := leader.raft.ReloadConfig(reload); err != nil {
		t.Fatal(err)
	}
	takeSnapshot(t, leader)
	n := newNode(t, "ca2")
	var ahead atomic.Int64
	admit(t, leader, n)
	n.start(func(cfg *Config) {
		cfg.Wall = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	})
	byLeader(t, leader, func(l *node) error { return l.AddNonvoter(testContext(t), n.id, n.address) })
	await(t, "the snapshot is rejected", func() bool { id, _ := n.Rejected(); return id == leader.id })
	if n.restored.Load() != 0 || !agreedTime(n).IsZero() {
		t.Error("the snapshot was taken all the same")
	}
	ahead.Store(int64(24 * time.Hour))
	await(t, "control: the snapshot fits the clock", func() bool { return n.restored.Load() > 0 })
}

// What a node has applied stays: a leader that replaces it stops the node, and changes
// nothing in its state. The control is an entry that was never agreed, which is cut.
func TestLeaderCannotRewriteWhatWasApplied(t *testing.T) {
	t.Parallel()
	nodes := cluster(t, "ca1", "ca2", "ca3")
	leader := awaitLeader(t, nodes...)
	for _, id := range []string{"a", "b", "c"} {
		carryOut(t, leader, token(id))
	}
	others := slices.DeleteFunc(slices.Clone(nodes), func(n *node) bool { return n == leader })
	victim, liar := others[0], others[1]
	await(t, "the victim holds it", func() bool { return victim.has("c") })
	leader.kill()
	send := liarsVoice(t, victim, liar, leader)
	last, term := victim.raft.LastIndex(), victim.raft.CurrentTerm()
	append := func(index, prevTerm, term uint64) error {
		return send(term, index-1, prevTerm, &raft.Log{Index: index, Term: term, Type: raft.LogNoop}).err
	}
	lastTerm := entryTerm(t, victim, last)
	if err := errors.Join(append(last+1, lastTerm, term+10), append(last+1, lastTerm, term+20)); err != nil {
		t.Fatalf("control: an entry that nobody agreed to cannot be replaced: %v", err)
	}
	if got := entryTerm(t, victim, last+1); got != term+20 || victim.Err() != nil {
		t.Fatalf("control: the entry is of term %d, not %d; %v", got, term+20, victim.Err())
	}
	before := victim.Applied()
	append(before, entryTerm(t, victim, before-1), term+30)
	select {
	case <-victim.Down():
	case <-time.After(10 * time.Second):
		t.Fatal("the node goes on")
	}
	if err := victim.stop(); !errors.Is(err, ErrRewrites) {
		t.Errorf("Run ended with %v", err)
	}
	if victim.Applied() != before || !victim.has("c") {
		t.Error("the state changed")
	}
}

type answered struct {
	success bool
	err     error
}

// liarsVoice ends the liar's replica and speaks to the victim with its key, as a leader.
func liarsVoice(t *testing.T, victim, liar *node, others ...*node) func(term, prev, prevTerm uint64, entries ...*raft.Log) answered {
	t.Helper()
	liar.kill()
	var members []*statev1.Member
	for _, n := range append(others, victim) {
		members = append(members, n.member())
	}
	thief := newDoor(t, &node{t: t, name: "thief", id: liar.id, cert: liar.cert, dir: tempDir(t), address: liar.address},
		membersState(t, others[0], members[1:]...))
	return func(term, prev, prevTerm uint64, entries ...*raft.Log) (a answered) {
		a.err = speak(t, thief, victim, func(n raft.Transport, to raft.ServerID, at raft.ServerAddress) error {
			resp := &raft.AppendEntriesResponse{}
			defer func() { a.success = resp.Success }()
			return n.AppendEntries(to, at, &raft.AppendEntriesRequest{
				RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(liar.id), Addr: []byte(liar.address)},
				Term:      term, PrevLogEntry: prev, PrevLogTerm: prevTerm, Entries: entries,
			}, resp)
		})
		return a
	}
}

// A leader adds no voters of its own, takes none away, and does not end a follower by
// members that cannot be read. The control is the membership that was agreed.
func TestLeaderCannotChangeTheVoters(t *testing.T) {
	t.Parallel()
	nodes := cluster(t, "ca1", "ca2", "ca3")
	leader := awaitLeader(t, nodes...)
	others := slices.DeleteFunc(slices.Clone(nodes), func(n *node) bool { return n == leader })
	victim, liar := others[0], others[1]
	carryOut(t, leader, token("a"))
	await(t, "the victim holds it", func() bool { return victim.has("a") })
	agreed := victim.configuration()
	leader.kill()
	send := liarsVoice(t, victim, liar, leader)

	last := victim.raft.LastIndex()
	prevTerm, term := entryTerm(t, victim, last), victim.raft.CurrentTerm()+10
	entry := func(index uint64, data []byte) *raft.Log {
		return &raft.Log{Index: index, Term: term, Type: raft.LogConfiguration, Data: data}
	}
	with := func(change func([]raft.Server) []raft.Server) []byte {
		return raft.EncodeConfiguration(raft.Configuration{Servers: change(slices.Clone(agreed))})
	}
	noop := &raft.Log{Index: last + 1, Term: term, Type: raft.LogNoop}
	// The entries before it are taken, it is not.
	if a := send(term, last, prevTerm, noop, entry(last+2, with(func(s []raft.Server) []raft.Server {
		return append(s, raft.Server{ID: "0000", Address: "127.0.0.1:1", Suffrage: raft.Voter})
	}))); a.success || victim.raft.LastIndex() != last+1 {
		t.Fatalf("%+v, the log ends at %d", a, victim.raft.LastIndex())
	}
	for name, data := range map[string][]byte{
		"a voter that nobody agreed to": with(func(s []raft.Server) []raft.Server {
			return append(s, raft.Server{ID: "0000", Address: "127.0.0.1:1", Suffrage: raft.Nonvoter})
		}),
		"a voter less":        with(func(s []raft.Server) []raft.Server { return s[:2] }),
		"a vote less":         with(func(s []raft.Server) []raft.Server { s[0].Suffrage = raft.Nonvoter; return s }),
		"nobody":              with(func(s []raft.Server) []raft.Server { return nil }),
		"what cannot be read": []byte("\xc1 none"),
	} {
		if a := send(term, last+1, term, entry(last+2, data)); a.success || victim.raft.LastIndex() != last+1 {
			t.Errorf("%s: %+v, the log ends at %d", name, a, victim.raft.LastIndex())
		}
	}
	if a := send(term, last+1, term, &raft.Log{Index: last + 2, Term: term, Type: raft.LogRemovePeerDeprecated, Data: []byte("x")}); a.success {
		t.Error("an entry of a kind of former times was taken")
	}
	if got := victim.configuration(); !slices.Equal(got, agreed) || victim.Err() != nil {
		t.Fatalf("the voters are %v, were %v; %v", got, agreed, victim.Err())
	}
	if a := send(term, last+1, term, entry(last+2, with(func(s []raft.Server) []raft.Server { return s }))); a.err != nil || !a.success {
		t.Fatalf("control: the agreed members: %+v", a)
	}
	// Who goes on with it is rejected as a leader.
	await(t, "the leader is rejected", func() bool {
		send(term, last+2, term, entry(last+3, with(func(s []raft.Server) []raft.Server { return s[:1] })))
		id, _ := victim.Rejected()
		return id == liar.id
	})
	if a := send(term, last+2, term); a.err == nil {
		t.Error("its heartbeat is heard")
	}
}

func entryTerm(t *testing.T, n *node, index uint64) uint64 {
	t.Helper()
	var log raft.Log
	if err := n.disk.GetLog(index, &log); err != nil {
		t.Fatal(err)
	}
	return log.Term
}

// FuzzLatestTick: the walk over the encoding finds the Tick that decoding finds.
func FuzzLatestTick(f *testing.F) {
	add := func(commands ...*statev1.Command) {
		batch := &statev1.Batch{}
		for _, c := range commands {
			encoded, err := proto.Marshal(c)
			if err != nil {
				f.Fatal(err)
			}
			batch.Commands = append(batch.Commands, encoded)
		}
		data, err := proto.Marshal(batch)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	add()
	add(token("a"))
	add(token("a"), tickCommand(time.Unix(1, 0)), token("b"))
	add(tickCommand(time.Unix(2, 0)), tickCommand(time.Unix(1, 0)))
	f.Fuzz(func(t *testing.T, data []byte) {
		got := latestTick(data)
		commands, err := decodeBatch(data)
		if err != nil {
			return // the node stops at it
		}
		want := int64(math.MinInt64)
		for _, c := range commands {
			if tick, ok := c.GetBody().(*statev1.Command_Tick); ok {
				want = max(want, domain.TickTime(tick.Tick))
			}
		}
		// Where an encoding holds a Tick in parts, decoding merges them, and the median of all
		// is at most the larger of the parts'.
		if got < want {
			t.Fatalf("found %d, decoding finds %d", got, want)
		}
	})
}

func TestSnapshotTimeIsReadAhead(t *testing.T) {
	t.Parallel()
	n := cluster(t, "ca1")[0]
	at := time.Now().Add(time.Minute).Truncate(0)
	carryOut(t, n, tickCommand(at))
	var file bytes.Buffer
	n.Read(func(st *domain.State) { st.Snapshot().WriteTo(&file) })
	head := file.Bytes()[:domain.SnapshotHead]
	if got, ok := domain.SnapshotTime(head); !ok || !got.Equal(agreedTime(n)) {
		t.Errorf("read %v, %v; the state has %v", got, ok, agreedTime(n))
	}
	for cut := range head {
		domain.SnapshotTime(head[:cut]) // must not panic
	}
}
