package replica

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/domain"
)

func batchOf(t testing.TB, commands ...*statev1.Command) []byte {
	t.Helper()
	b := &statev1.Batch{}
	for _, c := range commands {
		encoded, err := proto.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		b.Commands = append(b.Commands, encoded)
	}
	data, err := proto.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func newFSM(t testing.TB) *fsm {
	t.Helper()
	f := &fsm{self: "me", state: domain.New()}
	if _, err := f.apply(2, batchOf(t, initCommand(newNode(t, "ca1"))), nil); err != nil {
		t.Fatal(err)
	}
	return f
}

func tokens(f *fsm, ids ...string) int {
	n := 0
	f.read(func(s *domain.State) {
		for _, id := range ids {
			if _, ok := s.Token(id); ok {
				n++
			}
		}
	})
	return n
}

func TestApplySkipsWhatItHolds(t *testing.T) {
	f := newFSM(t)
	calls := 0
	f.onApply = func(domain.Outcome) { calls++ }
	answer := f.Apply(&raft.Log{Index: 5, Data: batchOf(t, token("a"), token("b"), tickCommand(time.Unix(9, 0)))})
	if outcomes, ok := answer.([]domain.Outcome); !ok || len(outcomes) != 3 || calls != 1 {
		t.Fatalf("%v, %d calls", answer, calls)
	}
	for _, index := range []uint64{5, 4, 1} {
		if answer := f.Apply(&raft.Log{Index: index, Data: batchOf(t, token("c"))}); answer.([]domain.Outcome) != nil {
			t.Errorf("entry %d was applied again: %v", index, answer)
		}
	}
	if tokens(f, "a", "b", "c") != 2 || calls != 1 {
		t.Error("an entry was applied twice")
	}
}

func TestUnreadableEntryEndsApplying(t *testing.T) {
	for name, data := range map[string][]byte{
		"no batch":        {0xff, 0xff},
		"no command":      {0x0a, 0x02, 0xff, 0xff},
		"unknown command": batchOf(t, token("with"), &statev1.Command{Actor: "from the future"}),
	} {
		t.Run(name, func(t *testing.T) {
			f := newFSM(t)
			var cause error
			f.onEnd = func(err error) { cause = err }
			if err, ok := f.Apply(&raft.Log{Index: 3, Data: data}).(error); !ok || cause == nil {
				t.Fatalf("%v, %v", err, cause)
			}
			if _, ok := f.Apply(&raft.Log{Index: 4, Data: batchOf(t, token("later"))}).(error); !ok || tokens(f, "later") != 0 {
				t.Error("an entry was skipped")
			}
			if _, err := f.Snapshot(); err == nil {
				t.Error("a state that skipped an entry was put into a snapshot")
			}
			if f.applied.Load() != 2 {
				t.Errorf("applied is %d", f.applied.Load())
			}
		})
	}
}

// sink is a snapshot in memory.
type sink struct {
	bytes.Buffer
	cancelled bool
}

func (s *sink) ID() string    { return "x" }
func (s *sink) Close() error  { return nil }
func (s *sink) Cancel() error { s.cancelled = true; return nil }

func TestRestoreNeverGoesBack(t *testing.T) {
	f := newFSM(t)
	f.Apply(&raft.Log{Index: 10, Data: batchOf(t, token("old"))})
	captured, err := f.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	// What comes later is not in it, though it is written later.
	f.Apply(&raft.Log{Index: 11, Data: batchOf(t, token("new"))})
	var s sink
	if err := captured.Persist(&s); err != nil || s.cancelled {
		t.Fatal(err)
	}
	restored := 0
	f.onRestore = func() { restored++ }
	if err := f.Restore(io.NopCloser(bytes.NewReader(s.Bytes()))); err != nil {
		t.Fatal(err)
	}
	if tokens(f, "old", "new") != 2 || restored != 0 {
		t.Error("an older snapshot replaced the state")
	}

	g := &fsm{state: domain.New(), onRestore: func() { restored++ }}
	if err := g.Restore(io.NopCloser(bytes.NewReader(s.Bytes()))); err != nil {
		t.Fatal(err)
	}
	if tokens(g, "old", "new") != 1 || restored != 1 || g.applied.Load() != 10 {
		t.Errorf("restored %d times, applied %d", restored, g.applied.Load())
	}
	damaged := bytes.Clone(s.Bytes())
	damaged[len(damaged)/2] ^= 1
	if err := g.Restore(io.NopCloser(bytes.NewReader(damaged))); err == nil || tokens(g, "old") != 1 {
		t.Errorf("a damaged snapshot: %v", err)
	}
}

func TestRemovalEndsOnlyTheRemoved(t *testing.T) {
	a, b := newNode(t, "ca1"), newNode(t, "ca2")
	for _, self := range []string{a.id, b.id} {
		state := membersState(t, a, b.member())
		f := &fsm{self: self, state: state}
		f.applied.Store(state.Applied())
		told := 0
		f.onMembers = func() { told++ }
		_, err := f.apply(20, batchOf(t, removeCommand(b.id)), nil)
		if errors.Is(err, ErrRemoved) != (self == b.id) || told != 1 {
			t.Errorf("%v, told %d times", err, told)
		}
	}
}

func TestAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFSM(t)
		f.live = 10
		want := func(age time.Duration) {
			t.Helper()
			if got := f.age(time.Now()); got != age {
				t.Errorf("age is %v, want %v", got, age)
			}
		}
		tick := func(index uint64, at time.Time) {
			t.Helper()
			if _, err := f.apply(index, batchOf(t, tickCommand(at)), nil); err != nil {
				t.Fatal(err)
			}
		}
		want(infinite)
		tick(10, time.Now()) // was in the log at boot: proves nothing
		want(infinite)
		if _, err := f.apply(11, batchOf(t, token("a")), nil); err != nil {
			t.Fatal(err)
		}
		want(infinite)
		tick(12, time.Now())
		want(0)
		time.Sleep(7 * time.Second)
		want(7 * time.Second)
		tick(13, time.Now())
		want(0)
		// A node that works through a backlog applies Ticks of an hour ago just now.
		time.Sleep(time.Hour)
		tick(14, time.Now().Add(-10*time.Minute))
		want(10*time.Minute - clockAllowance)
		// The leader's clock may be ahead of ours.
		tick(15, time.Now().Add(20*time.Second))
		want(0)
	})
}
