// Package replica keeps one copy of a trust domain's agreed state: it is the only
// room that knows hashicorp/raft and bbolt.
//
// What the state is and what a command means is package domain's business; here a
// command is bytes that must reach a majority of disks before Apply sees it. The
// rules are those of the design's CA page, sections "Membership" and "Log, snapshot,
// restart"; DESIGN.md beside this file says what was left out and why.
package replica

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/domain"
)

// Config is what a replica needs. Dir, Certificate, Listener and Advertise are required.
type Config struct {
	// Dir is the node's data directory; the replica keeps its files in Dir/raft.
	Dir string

	// NodeID is the lower-case hex SHA-256 of the node key's SPKI; empty: taken from
	// Certificate. Given, it must match.
	NodeID string

	// Certificate is the node certificate with its key. Peers look at its key only:
	// no name, no validity, no signature.
	Certificate tls.Certificate

	// Listener accepts Raft connections. The replica owns and closes it.
	Listener net.Listener

	// Advertise is host:port at which the other members dial Listener.
	Advertise string

	// Dial opens a plain connection to a member; nil: TCP.
	Dial func(ctx context.Context, address string) (net.Conn, error)

	Log *slog.Logger // nil: nothing is logged

	// OnApply is called once per applied log entry, in order, after the state holds all
	// of it: its Changes are those of all commands of the entry, its Refused is nil.
	// It must be short; it may Read, but not Propose. It is not called for what Open
	// loads from disk, and may be called before Open returns.
	OnApply func(domain.Outcome)

	// OnRestore is called in the same order when a snapshot from the leader replaced the
	// whole state: whatever was derived from it must be derived anew.
	OnRestore func()

	// Vouch asks the member by what it knows of the node about, which wants to connect
	// and is not known here; nil without an error: nothing. Nil func: nobody is asked.
	Vouch func(ctx context.Context, by, about string) (*statev1.Member, error)

	// Agreed is a log index up to which the caller knows the log to be agreed, from an
	// earlier life of this replica in the same process; 0: what the disk says.
	Agreed uint64

	// Durable is a log index up to which an earlier life of this replica in the same
	// process knows the log to have reached the disk: Open refuses a log that ends before,
	// since the others count on what was confirmed. 0: not known.
	Durable uint64

	// BeforeWrite, if set, is called before each write to the log; an error is the disk's.
	// For tests that fail or stall the disk of a whole node.
	BeforeWrite func() error

	// Wall is this node's clock, against which the leader's is held; nil: time.Now.
	Wall func() time.Time

	// HoldBack, if set, says that entries do not reach a member now although heartbeats do.
	// For tests of what a whole node does about that.
	HoldBack func(member string) bool

	Timing Timing

	// Tests of this package fail and stall the disk, and give removed members more time.
	wrapStore func(store) store
	farewell  time.Duration
}

// Timing sets Raft's pace. A killed leader is replaced after about twice Heartbeat.
type Timing struct {
	// Heartbeat is how long a follower waits for its leader before it asks for votes:
	// zero: 500 ms. Not below 10 round trips between voters; 500 ms is calm on a LAN,
	// 1 s on a WAN. No SVID depends on the leader, so calm is right.
	Heartbeat time.Duration

	// DiskStall is how long one write may take before the node gives up its Raft part;
	// zero: 2 s.
	DiskStall time.Duration
}

func (t Timing) heartbeat() time.Duration {
	if t.Heartbeat <= 0 {
		return 500 * time.Millisecond
	}
	return t.Heartbeat
}

func (t Timing) diskStall() time.Duration {
	if t.DiskStall <= 0 {
		return 2 * time.Second
	}
	return t.DiskStall
}

// Replica is one running member. All methods may be called concurrently.
type Replica struct {
	cfg   Config
	log   *slog.Logger
	disk  *disk
	fsm   *fsm
	net   *streams
	trans *transport
	raft  *raft.Raft

	// running is raft, for those who may look before Open has returned.
	running atomic.Pointer[raft.Raft]
	halted  chan struct{} // closed when all of Raft's goroutines have ended
	halting sync.Once

	vouched *vouched // nil without Config.Vouch

	proposals chan *proposal
	leaderCh  chan bool // holds one; relay alone sends
	barrier   barrier

	// down is closed, once, when this replica leaves Raft for whatever reason; cause
	// is written before. ended is closed when Run has to return by itself.
	down     chan struct{}
	downOnce sync.Once
	cause    error
	ended    chan struct{}

	stop      context.CancelFunc // ends the goroutines below
	tasks     sync.WaitGroup     // proposer, compactor, relay and the watch on Raft's end
	closeOnce sync.Once
	released  chan struct{} // closed when the files are
}

// Run blocks until ctx ends, then hands leadership over, leaves Raft and closes the
// files; it returns nil. Before that it returns only when the node cannot go on:
// ErrRemoved, or a log entry that this release does not understand. A failed disk does
// not end it (see Down): the node may go on signing from what it agreed to.
func (r *Replica) Run(ctx context.Context) error {
	select {
	case <-ctx.Done():
		r.handOver()
	case <-r.ended:
	}
	err := r.Close()
	select {
	case <-r.ended:
		return errors.Join(r.cause, err)
	default:
		return err
	}
}

// handOver transfers leadership to another voter, if there is one: a few milliseconds
// instead of an election.
func (r *Replica) handOver() {
	if !r.IsLeader() || r.voters() < 2 {
		return
	}
	done := make(chan error, 1)
	go func() { done <- r.raft.LeadershipTransfer().Error() }()
	select {
	case err := <-done:
		if err != nil {
			r.log.Warn("leadership could not be handed over; the others will elect", "error", err)
		}
	case <-time.After(4 * r.cfg.Timing.heartbeat()):
		r.log.Warn("nobody took over leadership in time; the others will elect")
	case <-r.down:
	}
}

// Close leaves Raft at once, without handing over. For the way out before Run; Run
// calls it. Safe to call again.
func (r *Replica) Close() error {
	var err error
	r.closeOnce.Do(func() {
		r.leave(ErrStopped, false)
		r.stop()
		r.tasks.Wait()
		if r.vouched != nil {
			r.vouched.tasks.Wait()
		}
		closed := make(chan error, 1)
		go func() {
			// On a stalled disk this never ends: a goroutine sits in the write.
			<-r.halted
			closed <- r.disk.close(r.fsm.applied.Load())
			close(r.released)
		}()
		select {
		case err = <-closed:
		case <-time.After(r.cfg.Timing.diskStall()):
			err = fmt.Errorf("%w: the log could not be closed", ErrDisk)
		}
	})
	if err != nil {
		return fmt.Errorf("cannot close the replica: %w", err)
	}
	return nil
}

// leave takes the node out of Raft: every connection is closed, dials are refused,
// waiting proposals fail. It never waits for the disk. With fatal, Run returns.
func (r *Replica) leave(cause error, fatal bool) {
	r.downOnce.Do(func() {
		r.cause = cause
		if fatal {
			close(r.ended)
		}
		r.net.kill() // first: who sees Down may rely on the silence
		close(r.down)
		if started := r.running.Load(); started != nil {
			r.halt(started)
		}
		if !errors.Is(cause, ErrStopped) {
			r.log.Error("this node leaves Raft; what was agreed stays readable", "error", cause)
		}
	})
}

// halt stops Raft without waiting for it.
func (r *Replica) halt(started *raft.Raft) {
	r.halting.Do(func() {
		future := started.Shutdown()
		go func() {
			r.trans.Close()
			future.Error() // waits for Raft's goroutines
			close(r.halted)
		}()
	})
}

// Released is closed when, after Close, the files are closed too: on a stalled disk that
// may be much later, or never. Only then can the directory be opened again.
func (r *Replica) Released() <-chan struct{} { return r.released }

// Durable is a log index up to which the log has reached this node's disk.
func (r *Replica) Durable() uint64 { return r.disk.durable.Load() }

// Down is closed when the replica no longer takes part in Raft. Err says why.
func (r *Replica) Down() <-chan struct{} { return r.down }

// Err is why the replica left Raft (wrapping ErrDisk, ErrRemoved or ErrStopped), or nil.
func (r *Replica) Err() error {
	select {
	case <-r.down:
		return r.cause
	default:
		return nil
	}
}

// Read calls f with the state, under the read lock: it must be short, must not keep
// the state and must not write to what it gets. It works without quorum and after Down.
func (r *Replica) Read(f func(*domain.State)) { r.fsm.read(f) }

// Applied is the index of the last applied log entry. Readers who wait for their write
// compare with it; Raft's own index runs ahead of the state.
func (r *Replica) Applied() uint64 { return r.fsm.applied.Load() }

// Age says how old the state may be: the time since this node applied a Tick that was
// agreed after it started, or what the Tick itself says about it beyond 30 s of clock
// difference, whichever is more. Before such a Tick: math.MaxInt64. Nothing else in
// Raft proves that a state is current.
func (r *Replica) Age() time.Duration { return r.fsm.age(time.Now()) }

// IsLeader says whether this node leads as far as it knows; another may already have
// been elected. Only what Propose or Barrier confirm is certain.
func (r *Replica) IsLeader() bool {
	return r.Err() == nil && r.raft.State() == raft.Leader
}

// Term is the Raft term as far as this node knows.
func (r *Replica) Term() uint64 { return r.raft.CurrentTerm() }

// Leader is the node id of the leader as far as known, or empty.
func (r *Replica) Leader() string {
	if r.Err() != nil {
		return ""
	}
	_, id := r.raft.LeaderWithID()
	return string(id)
}

// LastContact is when the leader was last heard. It says nothing about the log, only that
// somebody leads.
func (r *Replica) LastContact() time.Time { return r.raft.LastContact() }

// Installing says whether a snapshot from the leader is being read.
func (r *Replica) Installing() bool { return r.fsm.installing.Load() }

// Reenter leaves the agreement with ErrStuck, so that the owner may open the replica again.
func (r *Replica) Reenter() { r.leave(ErrStuck, false) }

// LeaderCh tells when this node gains (true) and loses (false) leadership; Down is a
// loss. It has one reader and holds only the latest word: true after true means lost
// and regained. A new leader's state may lag its log: Barrier first.
func (r *Replica) LeaderCh() <-chan bool { return r.leaderCh }

// relay passes on what Raft says about leadership. After a disk failure Raft's main
// goroutine may say nothing any more.
func (r *Replica) relay() {
	for {
		lead := false
		down := false
		select {
		case lead = <-r.raft.LeaderCh():
		case <-r.down:
			down = true
		}
		select {
		case <-r.leaderCh: // nobody took the word before
		default:
		}
		r.leaderCh <- lead
		if down {
			return
		}
	}
}

// State is Leader, Follower, Candidate, or Stopped.
func (r *Replica) State() string {
	if r.Err() != nil {
		return "Stopped"
	}
	return r.raft.State().String()
}

// Stats are the figures of a status page.
type Stats struct {
	State       string
	Leader      string
	Term        uint64
	LastIndex   uint64 // of the log
	CommitIndex uint64
	Applied     uint64
	FirstIndex  uint64 // oldest entry still in the log; 0: the log is empty
	LogBytes    uint64 // appended since the last snapshot
	CachedBytes int    // log cache
	Connections int    // open Raft connections
	Waiting     int    // proposals that are not on their way yet
	Age         time.Duration
	Err         error // why it left Raft; nil while it takes part
}

// Stats collects the figures. They are not of one instant.
func (r *Replica) Stats() Stats {
	first, _ := r.disk.store.FirstIndex()
	return Stats{
		State:       r.State(),
		Leader:      r.Leader(),
		Term:        r.raft.CurrentTerm(),
		LastIndex:   r.raft.LastIndex(),
		CommitIndex: r.raft.CommitIndex(),
		Applied:     r.Applied(),
		FirstIndex:  first,
		LogBytes:    r.fsm.sinceSnapshot.Load(),
		CachedBytes: r.disk.cache.size(),
		Connections: r.net.count(),
		Waiting:     len(r.proposals),
		Age:         r.Age(),
		Err:         r.Err(),
	}
}

// keyID is the node id that a certificate's key stands for.
func keyID(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

// complete checks what was given and fills in what was not.
func (c *Config) complete() error {
	if c.Dir == "" {
		return errors.New("no data directory given")
	}
	if c.farewell == 0 {
		c.farewell = farewell
	}
	if c.Wall == nil {
		c.Wall = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if len(c.Certificate.Certificate) == 0 {
		return errors.New("no node certificate given")
	}
	leaf, err := x509.ParseCertificate(c.Certificate.Certificate[0])
	if err != nil {
		return fmt.Errorf("cannot read the node certificate: %w", err)
	}
	id := keyID(leaf)
	if c.NodeID == "" {
		c.NodeID = id
	}
	if c.NodeID != id {
		return fmt.Errorf("the node certificate's key is %s, but this node's id is %s: the key file is another node's", id, c.NodeID)
	}
	if _, _, err := net.SplitHostPort(c.Advertise); err != nil {
		return fmt.Errorf("cannot advertise %q to the other members: %w", c.Advertise, err)
	}
	return nil
}

const infinite = time.Duration(math.MaxInt64)
