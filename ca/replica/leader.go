package replica

import (
	"bufio"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/domain"
)

const (
	// MaxTimeAhead is by how much a leader may move the agreed time past this node's clock.
	// What ends by the agreed time (distrust items, tokens, agreements) can end that much
	// too early. Clocks that NTP keeps differ by far less.
	MaxTimeAhead = 5 * time.Minute

	// noVoteFor is how long a member that was rejected as leader gets no vote.
	noVoteFor = 10 * time.Minute
)

// leaderCheck rejects a leader that would move the agreed time far past this node's
// clock, or have others count as members than the agreed ones. It sees messages before
// Raft does: nothing of a rejected one is stored, and its heartbeats do not count either,
// so the others elect another leader. When what it sends fits again, because somebody set
// a clock, entries are accepted again.
//
// Its methods may be called concurrently.
type leaderCheck struct {
	wall    func() time.Time
	applied func() uint64 // entries up to this index were accepted already
	log     *slog.Logger

	read          func(func(*domain.State))
	configuration func() []raft.Server // of Raft, the latest

	mu       sync.Mutex
	rejected map[string]rejection // by node id; as many as there are voters
	misfits  map[string]misfit    // likewise
}

type rejection struct {
	term uint64
	why  error
	at   time.Time // monotonic
}

func (r rejection) err() error { return fmt.Errorf("rejected: %w", r.why) }

// checkTime says why a leader's time is not taken.
func checkTime(ahead time.Duration) error {
	if ahead <= MaxTimeAhead {
		return nil
	}
	return fmt.Errorf("it moves the agreed time %v past this node's clock, over %v; check both clocks", ahead.Round(time.Second), MaxTimeAhead)
}

// allows says why a message of a member must not reach Raft; nil if it may. Of a request's
// entries only the first so many may yet.
func (l *leaderCheck) allows(peer string, rpc *raft.RPC) (entries int, err error) {
	switch c := rpc.Command.(type) {
	case *raft.AppendEntriesRequest:
		if len(c.Entries) == 0 {
			return 0, l.standing(peer, c.Term)
		}
		n, err := l.fits(peer, c.Entries)
		if err == nil {
			err = checkTime(l.ahead(c.Entries))
		}
		return n, l.judge(peer, c.Term, err)
	case *raft.InstallSnapshotRequest:
		// Raft reads the snapshot behind what is peeked at here.
		r := bufio.NewReader(rpc.Reader)
		rpc.Reader = r
		head, err := r.Peek(int(min(c.Size, domain.SnapshotHead)))
		if err != nil {
			return 0, fmt.Errorf("cannot read the snapshot: %w", err)
		}
		ahead := time.Duration(0)
		if agreed, ok := domain.SnapshotTime(head); ok {
			ahead = agreed.Sub(l.wall())
		}
		return 0, l.judge(peer, c.Term, checkTime(ahead))
	case *raft.RequestVoteRequest, *raft.RequestPreVoteRequest:
		l.mu.Lock()
		defer l.mu.Unlock()
		if r, ok := l.rejected[peer]; ok && time.Since(r.at) < noVoteFor {
			return 0, r.err()
		}
	}
	return 0, nil
}

// standing answers for a message without content.
func (l *leaderCheck) standing(peer string, term uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if r, ok := l.rejected[peer]; ok && term <= r.term {
		return r.err()
	}
	return nil
}

func (l *leaderCheck) judge(peer string, term uint64, why error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	before, was := l.rejected[peer]
	if why == nil {
		delete(l.rejected, peer)
		if was {
			l.log.Info("leader accepted again: what it sends fits this node's clock and members", "leader", peer)
		}
		return nil
	}
	if !was || before.term < term {
		l.log.Error("leader rejected: another one is elected; if this node's clock is right, remove the rejected one as compromised", "leader", peer, "error", why)
	}
	r := rejection{term, why, time.Now()}
	if l.rejected == nil {
		l.rejected = map[string]rejection{}
	}
	l.rejected[peer] = r
	return r.err()
}

// ahead is by how much the latest Tick among entries is past this node's clock.
func (l *leaderCheck) ahead(entries []*raft.Log) time.Duration {
	applied, most := l.applied(), int64(math.MinInt64)
	for _, e := range entries {
		if e.Type == raft.LogCommand && e.Index > applied {
			most = max(most, latestTick(e.Data))
		}
	}
	if most == math.MinInt64 {
		return 0
	}
	return time.Unix(0, most).Sub(l.wall())
}

// current is the rejection that counts now, of the leader with the latest term.
func (l *leaderCheck) current() (leader string, r rejection, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for id, at := range l.rejected {
		if time.Since(at.at) < noVoteFor && (!ok || at.term > r.term) {
			leader, r, ok = id, at, true
		}
	}
	return leader, r, ok
}

// latestTick is the latest time that a Tick in a log entry moves the agreed time to,
// math.MinInt64 if there is none. It walks the encoding: decoding every command twice
// would cost a follower a third of its throughput. What does not parse here stops the
// node when it is applied.
func latestTick(batch []byte) int64 {
	most := int64(math.MinInt64)
	fields(batch, commandsField, func(command []byte) {
		fields(command, tickField, func(encoded []byte) {
			tick := &statev1.Tick{}
			if proto.Unmarshal(encoded, tick) == nil {
				most = max(most, domain.TickTime(tick))
			}
		})
	})
	return most
}

var (
	commandsField = fieldNumber(&statev1.Batch{}, "commands")
	tickField     = fieldNumber(&statev1.Command{}, "tick")
)

func fieldNumber(m proto.Message, name string) protowire.Number {
	return m.ProtoReflect().Descriptor().Fields().ByTextName(name).Number()
}

// fields calls f with each length-delimited field of that number.
func fields(b []byte, number protowire.Number, f func([]byte)) {
	for len(b) > 0 {
		n, kind, size := protowire.ConsumeTag(b)
		if size < 0 {
			return
		}
		b = b[size:]
		if n == number && kind == protowire.BytesType {
			value, size := protowire.ConsumeBytes(b)
			if size < 0 {
				return
			}
			f(value)
			b = b[size:]
			continue
		}
		if size = protowire.ConsumeFieldValue(n, kind, b); size < 0 {
			return
		}
		b = b[size:]
	}
}

// Rejected says which leader this node rejects, and why; empty if none.
func (r *Replica) Rejected() (leader, reason string) {
	id, rejection, ok := r.trans.leaders.current()
	if !ok {
		return "", ""
	}
	return id, rejection.err().Error()
}

// mayCut says why the log must not be cut from index on; nil if it may. What is
// committed never changes, and hashicorp/raft 1.8.0 obeys a leader that cuts it all the
// same. The one exception is a snapshot that was just installed in its place.
func (r *Replica) mayCut(minIndex uint64) error {
	agreed := r.fsm.applied.Load()
	if started := r.running.Load(); started != nil {
		agreed = max(agreed, started.CommitIndex())
	}
	if minIndex > agreed || r.fsm.adopted.Load() >= agreed {
		return nil
	}
	return fmt.Errorf("%w: from log entry %d on, and entries up to %d were agreed", ErrRewrites, minIndex, agreed)
}

// configuration is Raft's latest membership; nil before Raft runs.
func (r *Replica) configuration() []raft.Server {
	started := r.running.Load()
	if started == nil {
		return nil
	}
	return started.GetConfiguration().Configuration().Servers
}
