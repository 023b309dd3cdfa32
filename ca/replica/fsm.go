package replica

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/domain"
)

// fsm carries log entries to the state. Raft calls Apply, Snapshot and Restore from
// one goroutine; before Raft starts, load calls apply and adopt from another.
type fsm struct {
	self      string // node id
	onApply   func(domain.Outcome)
	onRestore func()
	onMembers func()      // a member was removed, or the whole state replaced
	onEnd     func(error) // the node cannot go on
	onFull    func()      // enough bytes since the last snapshot

	mu    sync.RWMutex
	state *domain.State
	tick  tick

	// applied is the index up to which the state holds the log: at least the state's
	// own, since not every entry is a command.
	applied atomic.Uint64

	// adopted is the index of the last snapshot that the leader sent and this node took.
	adopted atomic.Uint64

	// live is the log's last index when the node started: what was agreed later proves
	// that the node is connected.
	live uint64

	installing    atomic.Bool   // a snapshot is being read
	sinceSnapshot atomic.Uint64 // bytes of entries
	entries       atomic.Uint64 // their number
	snapshotSize  atomic.Uint64 // of the last one here, in bytes

	ended error // once set, nothing is applied any more; Raft's goroutine only
}

// tick is the last Tick that was agreed after the node started.
type tick struct {
	seen time.Time // when it was applied, with the monotonic reading; zero: none yet
}

// clockAllowance is by how much an honest own clock may be ahead of a Tick.
const clockAllowance = 30 * time.Second

func (f *fsm) read(g func(*domain.State)) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	g(f.state)
}

func (f *fsm) age(now time.Time) time.Duration {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.tick.seen.IsZero() {
		return infinite
	}
	return max(now.Sub(f.tick.seen), now.Sub(f.state.Now())-clockAllowance, 0)
}

// Apply answers with []domain.Outcome, one for each command of the entry, or an error.
func (f *fsm) Apply(log *raft.Log) any {
	outcomes, err := f.apply(log.Index, log.Data, f.onApply)
	if err != nil {
		return err
	}
	return outcomes
}

// apply carries out one log entry, all of it under one lock: who reads sees the whole
// entry or nothing of it, so a revision is complete once it is visible. An entry that
// the state already holds is skipped.
func (f *fsm) apply(index uint64, data []byte, notify func(domain.Outcome)) ([]domain.Outcome, error) {
	if f.ended != nil {
		return nil, f.ended
	}
	if index <= f.applied.Load() {
		return nil, nil
	}
	commands, err := decodeBatch(data)
	if err != nil {
		return nil, f.end(fmt.Errorf("log entry %d cannot be read by this release: %w: upgrade this node", index, err))
	}

	outcomes := make([]domain.Outcome, len(commands))
	whole := domain.Outcome{}
	ticked, left, removed := false, false, false
	f.mu.Lock()
	for i, command := range commands {
		outcome := f.state.Apply(index, command)
		if outcome.Fatal != nil {
			f.mu.Unlock()
			return nil, f.end(fmt.Errorf("log entry %d: %w", index, outcome.Fatal))
		}
		outcomes[i] = outcome
		whole.Revision = outcome.Revision
		whole.Changes = append(whole.Changes, outcome.Changes...)
		whole.Diverged = whole.Diverged || outcome.Diverged
		whole.Checked = max(whole.Checked, outcome.Checked)
		if outcome.Refused != nil {
			continue
		}
		ticked = ticked || command.GetTick() != nil
		for _, c := range outcome.Changes {
			if c.Kind != domain.ChangeMembers {
				continue
			}
			if _, ok := f.state.Member(c.Key); !ok {
				removed = true
				left = left || c.Key == f.self
			}
		}
	}
	if ticked && index > f.live {
		f.tick.seen = time.Now()
	}
	f.mu.Unlock()

	f.applied.Store(index)
	f.count(len(data))
	if notify != nil {
		notify(whole)
	}
	if removed && f.onMembers != nil {
		f.onMembers()
	}
	if left {
		return outcomes, f.end(fmt.Errorf("%w (log entry %d)", ErrRemoved, index))
	}
	return outcomes, nil
}

// end stops all applying: the state must not skip an entry.
func (f *fsm) end(err error) error {
	f.ended = err
	if f.onEnd != nil {
		f.onEnd(err)
	}
	return err
}

func (f *fsm) count(size int) {
	f.entries.Add(1)
	due := min(max(f.snapshotSize.Load()/2, snapshotBytes), snapshotMost)
	if f.sinceSnapshot.Add(uint64(size)) >= due && f.onFull != nil {
		f.onFull()
	}
}

// Snapshot is quick: the state's records are immutable.
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	if f.ended != nil {
		return nil, f.ended
	}
	f.sinceSnapshot.Store(0)
	f.entries.Store(0)
	f.mu.RLock()
	defer f.mu.RUnlock()
	return snapshot{f.state.Snapshot(), &f.snapshotSize}, nil
}

// Restore takes a snapshot from the leader. The old state is read until the new one
// is complete.
func (f *fsm) Restore(r io.ReadCloser) error {
	if f.ended != nil {
		return f.ended
	}
	f.installing.Store(true)
	defer f.installing.Store(false)
	state, err := domain.Restore(r)
	if err != nil {
		return fmt.Errorf("cannot restore the leader's snapshot: %w", err)
	}
	if !f.adopt(state, state.Applied()) {
		return nil
	}
	f.adopted.Store(state.Applied())
	if f.onMembers != nil {
		f.onMembers()
	}
	if f.onRestore != nil {
		f.onRestore()
	}
	return nil
}

// adopt puts a restored state in place, unless it is older than the present one: both
// come of the same log, and Apply then skips what the present one holds.
func (f *fsm) adopt(state *domain.State, index uint64) bool {
	if index < f.applied.Load() {
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.state = state
	f.applied.Store(index)
	return true
}

// snapshot is a state at one index on its way to disk.
type snapshot struct {
	*domain.Snapshot
	size *atomic.Uint64 // set to what was written
}

func (s snapshot) Persist(sink raft.SnapshotSink) error {
	size, err := s.WriteTo(sink)
	if err != nil {
		return errors.Join(err, sink.Cancel())
	}
	s.size.Store(uint64(size))
	return sink.Close()
}

func (s snapshot) Release() {}

// decodeBatch reads the commands of a log entry.
func decodeBatch(data []byte) ([]*statev1.Command, error) {
	var batch statev1.Batch
	if err := proto.Unmarshal(data, &batch); err != nil {
		return nil, err
	}
	commands := make([]*statev1.Command, len(batch.GetCommands()))
	for i, encoded := range batch.GetCommands() {
		commands[i] = new(statev1.Command)
		if err := proto.Unmarshal(encoded, commands[i]); err != nil {
			return nil, err
		}
	}
	return commands, nil
}
