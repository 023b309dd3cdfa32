package replica

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/domain"
)

const (
	batchCommands = 256 // of one entry
	batchRoom     = 16  // bytes that an entry needs for one command's framing, at most
	batchesFlying = 4   // full entries on their way at once: a WAN's round trip is not idle time
	queued        = 4096

	// enqueueTimeout bounds waiting for Raft's main loop to take an entry.
	enqueueTimeout = 2 * time.Second
)

// proposal is one command on its way. Its claim decides who has the last word:
// the proposer that takes it into a batch, or the caller that gives up before.
type proposal struct {
	command []byte
	claim   atomic.Bool
	answer  chan answer // holds one
}

type answer struct {
	outcome domain.Outcome
	err     error
}

// Propose has a command agreed and applied, and returns what it did here. Only the
// leader can: elsewhere ErrNotLeader names it, or ErrNoQuorum says that none is known.
// A refusal by the rules is no error: see Outcome.Refused. When ctx ends first, the
// error wraps ctx's, and ErrOutcomeUnknown if the command was already on its way.
//
// Commands that arrive while others are being written share a log entry, so many
// callers cost little more than one.
func (r *Replica) Propose(ctx context.Context, command *statev1.Command) (domain.Outcome, error) {
	if command.GetBody() == nil && !command.GetIgnorable() {
		// Every replica would stop at it.
		return domain.Outcome{}, errors.New("cannot propose an empty command")
	}
	encoded, err := proto.MarshalOptions{Deterministic: true}.Marshal(command)
	if err != nil {
		return domain.Outcome{}, fmt.Errorf("cannot encode the command: %w", err)
	}
	return r.propose(ctx, encoded)
}

func (r *Replica) propose(ctx context.Context, encoded []byte) (domain.Outcome, error) {
	if len(encoded)+batchRoom > maxEntry {
		return domain.Outcome{}, fmt.Errorf("%w (it has %d)", ErrTooLarge, len(encoded))
	}
	if err := r.leading(); err != nil {
		return domain.Outcome{}, err
	}
	p := &proposal{command: encoded, answer: make(chan answer, 1)}
	select {
	case r.proposals <- p:
	case <-ctx.Done():
		return domain.Outcome{}, fmt.Errorf("the command was not proposed: %w", context.Cause(ctx))
	case <-r.down:
		return domain.Outcome{}, r.stopped()
	}
	select {
	case a := <-p.answer:
		return a.outcome, a.err
	case <-ctx.Done():
		if p.claim.CompareAndSwap(false, true) {
			return domain.Outcome{}, fmt.Errorf("the command was not proposed: %w", context.Cause(ctx))
		}
		return domain.Outcome{}, fmt.Errorf("%w: %w", ErrOutcomeUnknown, context.Cause(ctx))
	case <-r.down:
		if p.claim.CompareAndSwap(false, true) {
			return domain.Outcome{}, r.stopped()
		}
		// The answer may have come together with the end.
		select {
		case a := <-p.answer:
			return a.outcome, a.err
		default:
			return domain.Outcome{}, fmt.Errorf("%w: %w", ErrOutcomeUnknown, r.stopped())
		}
	}
}

// leading is nil if this node may propose.
func (r *Replica) leading() error {
	switch {
	case r.Err() != nil:
		return r.stopped()
	case r.IsLeader():
		return nil
	}
	return r.notLeader()
}

func (r *Replica) notLeader() error {
	if id := r.Leader(); id != "" && id != r.cfg.NodeID {
		return ErrNotLeader{LeaderID: id}
	}
	return ErrNoQuorum
}

func (r *Replica) stopped() error {
	err := r.Err()
	if errors.Is(err, ErrStopped) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrStopped, err)
}

// batch cuts proposals into log entries: what queued while an entry was on its way
// goes together; only full entries fly beside another. It ends with ctx.
func (r *Replica) batch(ctx context.Context) {
	var queue []*proposal
	size := 0 // bytes of queue as one entry
	flying := 0
	landed := make(chan struct{}, batchesFlying)
	for {
		for len(queue) > 0 && (flying == 0 || flying < batchesFlying && (len(queue) >= batchCommands || size >= maxEntry)) {
			n, bytes := fill(queue)
			flying++
			go func(entry []*proposal) {
				r.submit(entry)
				landed <- struct{}{}
			}(queue[:n:n])
			queue, size = queue[n:], size-bytes
		}
		more := r.proposals
		if len(queue) >= queued {
			more = nil // callers wait outside
		}
		select {
		case p := <-more:
			queue, size = append(queue, p), size+len(p.command)+batchRoom
		case <-landed:
			flying--
		case <-ctx.Done():
			return // the callers see down
		}
	}
}

// fill says how many proposals from the front make one entry, and their size.
func fill(queue []*proposal) (n, bytes int) {
	for n < len(queue) && n < batchCommands {
		size := len(queue[n].command) + batchRoom
		if n > 0 && bytes+size > maxEntry {
			break
		}
		bytes += size
		n++
	}
	return n, bytes
}

// submit has one entry agreed and gives each proposer its own outcome.
func (r *Replica) submit(entry []*proposal) {
	batch := &statev1.Batch{}
	taken := entry[:0:0]
	for _, p := range entry {
		if p.claim.CompareAndSwap(false, true) {
			batch.Commands = append(batch.Commands, p.command)
			taken = append(taken, p)
		}
	}
	if len(taken) == 0 {
		return
	}
	outcomes, err := r.agree(batch)
	for i, p := range taken {
		if err != nil {
			p.answer <- answer{err: err}
		} else {
			p.answer <- answer{outcome: outcomes[i]}
		}
	}
}

func (r *Replica) agree(batch *statev1.Batch) ([]domain.Outcome, error) {
	data, err := proto.Marshal(batch)
	if err != nil {
		return nil, fmt.Errorf("cannot encode a log entry: %w", err)
	}
	future := r.raft.Apply(data, enqueueTimeout)
	if err := r.answer(future); err != nil {
		return nil, r.explain(err)
	}
	switch response := future.Response().(type) {
	case []domain.Outcome:
		if len(response) != len(batch.GetCommands()) {
			return nil, fmt.Errorf("log entry %d gave %d outcomes for %d commands", future.Index(), len(response), len(batch.GetCommands()))
		}
		return response, nil
	case error:
		return nil, fmt.Errorf("%w: %w", ErrOutcomeUnknown, response)
	default:
		return nil, fmt.Errorf("%w: log entry %d was applied before", ErrOutcomeUnknown, future.Index())
	}
}

// answer waits for one of Raft's futures. A few of them are never answered once Raft has
// shut down; the goroutine that stays with such a one holds nothing of the replica.
func (r *Replica) answer(f raft.Future) error {
	done := make(chan error, 1)
	go func() { done <- f.Error() }()
	select {
	case err := <-done:
		return err
	case <-r.halted:
	}
	select {
	case err := <-done:
		return err
	default:
		return raft.ErrRaftShutdown
	}
}

// explain turns Raft's errors into this package's.
func (r *Replica) explain(err error) error {
	switch {
	case errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrLeadershipTransferInProgress):
		return r.notLeader()
	case errors.Is(err, raft.ErrEnqueueTimeout):
		return fmt.Errorf("%w (this node leads, but is too busy)", ErrNoQuorum)
	case errors.Is(err, raft.ErrRaftShutdown) && r.Err() != nil:
		return fmt.Errorf("%w: %w", ErrOutcomeUnknown, r.stopped())
	}
	return fmt.Errorf("%w: %w", ErrOutcomeUnknown, err)
}

// barrier lets all readers who wait at one moment share one entry.
type barrier struct {
	mu      sync.Mutex
	running bool
	next    *barrierWait
}

type barrierWait struct {
	done chan struct{}
	err  error // written before done is closed
}

// Barrier returns once this node's state holds everything that was agreed anywhere
// before the call: Read after it is linearizable. Only at the leader; errors as those
// of Propose.
func (r *Replica) Barrier(ctx context.Context) error {
	if err := r.leading(); err != nil {
		return err
	}
	b := &r.barrier
	b.mu.Lock()
	if b.next == nil {
		b.next = &barrierWait{done: make(chan struct{})}
	}
	wait := b.next
	if !b.running {
		b.running = true
		go r.runBarriers()
	}
	b.mu.Unlock()
	select {
	case <-wait.done:
		return wait.err
	case <-ctx.Done():
		return fmt.Errorf("the state was not confirmed in time: %w", context.Cause(ctx))
	case <-r.down:
		return r.stopped()
	}
}

// runBarriers ends when nobody waits. A waiter is served by a barrier that was begun
// after it came, never by one on its way.
func (r *Replica) runBarriers() {
	b := &r.barrier
	for {
		b.mu.Lock()
		wait := b.next
		b.next = nil
		if wait == nil {
			b.running = false
			b.mu.Unlock()
			return
		}
		b.mu.Unlock()
		if err := r.answer(r.raft.Barrier(enqueueTimeout)); err != nil {
			wait.err = r.explain(err)
		}
		close(wait.done)
	}
}
