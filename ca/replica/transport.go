package replica

import (
	"errors"
	"io"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// transport is Raft's network transport with two additions. It dials a member by node
// id, so that the stream layer knows whose key to expect. And it watches the answers:
// the library tells nobody how far its followers are, and without that nobody can say
// who has caught up.
type transport struct {
	*raft.NetworkTransport
	roster   *roster
	holdBack func(member string) bool

	mu    sync.Mutex
	peers map[raft.ServerID]peerProgress

	installing map[raft.ServerID]int // snapshots on their way
}

var errHeldBack = errors.New("held back by a test")

type peerProgress struct {
	term    uint64 // of the leadership that learned match
	match   uint64
	contact time.Time
}

func newTransport(s *streams, cfg *Config) *transport {
	return &transport{
		roster:   s.roster,
		holdBack: cfg.HoldBack,
		NetworkTransport: raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
			Stream:  s,
			Logger:  newLogger(cfg.Log),
			Timeout: rpcTimeout,
			// Replication, heartbeats and votes of one peer at a time; idle ones are kept.
			MaxPool: 4,
			// 1 switches pipelining off. With the default of 2, a follower whose disk gave
			// errors for 300 ms was never replicated to again.
			MaxRPCsInFlight:         1,
			MsgpackUseNewTimeFormat: true,
		}),
		peers:      map[raft.ServerID]peerProgress{},
		installing: map[raft.ServerID]int{},
	}
}

// target says whom to expect at an address: the stream layer pins the key. The state's
// address wins over Raft's: a member may have moved since it joined.
func (t *transport) target(id raft.ServerID, hostport raft.ServerAddress) raft.ServerAddress {
	if _, _, now := t.roster.find(string(id)); now != "" {
		hostport = raft.ServerAddress(now)
	}
	return raft.ServerAddress(id) + "@" + hostport
}

func (t *transport) AppendEntries(id raft.ServerID, at raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	if t.holdBack != nil && len(args.Entries) > 0 && t.holdBack(string(id)) {
		return errHeldBack
	}
	err := t.NetworkTransport.AppendEntries(id, t.target(id, at), args, resp)
	if err == nil && resp.Term <= args.Term {
		match := uint64(0)
		if resp.Success {
			match = args.PrevLogEntry + uint64(len(args.Entries)) // 0 for a heartbeat
		}
		t.note(id, args.Term, match)
	}
	return err
}

func (t *transport) InstallSnapshot(id raft.ServerID, at raft.ServerAddress, args *raft.InstallSnapshotRequest, resp *raft.InstallSnapshotResponse, data io.Reader) error {
	t.install(id, 1)
	defer t.install(id, -1)
	err := t.NetworkTransport.InstallSnapshot(id, t.target(id, at), args, resp, data)
	if err == nil && resp.Success {
		t.note(id, args.Term, args.LastLogIndex)
	}
	return err
}

func (t *transport) RequestVote(id raft.ServerID, at raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	return t.NetworkTransport.RequestVote(id, t.target(id, at), args, resp)
}

func (t *transport) RequestPreVote(id raft.ServerID, at raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	return t.NetworkTransport.RequestPreVote(id, t.target(id, at), args, resp)
}

func (t *transport) TimeoutNow(id raft.ServerID, at raft.ServerAddress, args *raft.TimeoutNowRequest, resp *raft.TimeoutNowResponse) error {
	return t.NetworkTransport.TimeoutNow(id, t.target(id, at), args, resp)
}

// note records an answer. Under one leader a follower's match only grows; an earlier
// leader's knowledge may be of entries that were overwritten.
func (t *transport) note(id raft.ServerID, term, match uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.peers[id]
	if p.term != term {
		p = peerProgress{term: term}
	}
	p.match = max(p.match, match)
	p.contact = time.Now()
	t.peers[id] = p
}

func (t *transport) install(id raft.ServerID, n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.installing[id] += n
}

func (t *transport) isInstalling(id raft.ServerID) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.installing[id] > 0
}

func (t *transport) progress(id raft.ServerID, term uint64) (match uint64, contact time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.peers[id]; p.term == term {
		return p.match, p.contact
	}
	return 0, time.Time{}
}

var (
	_ raft.Transport   = (*transport)(nil)
	_ raft.WithPreVote = (*transport)(nil)
	_ raft.WithClose   = (*transport)(nil)
)
