package replica

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// transport is Raft's network transport with three additions. It dials a member by node
// id, so that the stream layer knows whose key to expect. It takes a message only from
// the member that its header names. And it watches the answers: the library tells nobody
// how far its followers are, and without that nobody can say who has caught up.
type transport struct {
	*raft.NetworkTransport // what this node says to others
	streams                *streams
	roster                 *roster
	log                    *slog.Logger
	holdBack               func(member string) bool
	leaders                *leaderCheck

	heard     chan raft.RPC
	heartbeat atomic.Pointer[func(raft.RPC)]
	tasks     sync.WaitGroup // accept, and hear for each peer; end with the streams

	mu      sync.Mutex
	closed  bool               // no task is added any more
	callers map[string]*caller // by node id
	peers   map[raft.ServerID]peerProgress

	installing map[raft.ServerID]int // snapshots on their way
}

var errHeldBack = errors.New("held back by a test")

type peerProgress struct {
	term    uint64 // of the leadership that learned match
	match   uint64
	contact time.Time
}

func newTransport(s *streams, cfg *Config, leaders *leaderCheck) *transport {
	t := &transport{
		NetworkTransport: newNetwork(dialling{s}, cfg.Log),
		streams:          s,
		roster:           s.roster,
		holdBack:         cfg.HoldBack,
		leaders:          leaders,
		log:              cfg.Log,
		heard:            make(chan raft.RPC),
		callers:          map[string]*caller{},
		peers:            map[raft.ServerID]peerProgress{},
		installing:       map[raft.ServerID]int{},
	}
	t.tasks.Go(t.accept)
	return t
}

func newNetwork(layer raft.StreamLayer, log *slog.Logger) *raft.NetworkTransport {
	return raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream:  layer,
		Logger:  newLogger(log),
		Timeout: rpcTimeout,
		// Replication, heartbeats and votes of one peer at a time; idle ones are kept.
		MaxPool: 4,
		// 1 switches pipelining off. With the default of 2, a follower whose disk gave
		// errors for 300 ms was never replicated to again.
		MaxRPCsInFlight:         1,
		MsgpackUseNewTimeFormat: true,
	})
}

// dialling is the stream layer of what this node says: nobody is heard there.
type dialling struct{ *streams }

func (d dialling) Accept() (net.Conn, error) {
	<-d.closed
	return nil, errKilled
}

// caller is the stream layer of what one peer says. The library does not tell which
// connection a message came by, so each peer has a transport of its own.
type caller struct {
	streams *streams
	peer    string // node id
	conns   chan net.Conn
	network *raft.NetworkTransport
}

func (c *caller) Addr() net.Addr { return c.streams.Addr() }
func (c *caller) Close() error   { return nil } // the connections are the streams'

func (c *caller) Dial(raft.ServerAddress, time.Duration) (net.Conn, error) { return nil, errKilled }

func (c *caller) Accept() (net.Conn, error) {
	select {
	case conn := <-c.conns:
		return conn, nil
	case <-c.streams.closed:
		return nil, errKilled
	}
}

// accept hands each connection to its peer's transport, until the streams are closed.
func (t *transport) accept() {
	for {
		conn, err := t.streams.Accept()
		if err != nil {
			return
		}
		c := t.caller(conn.(*stream).peer)
		if c == nil {
			conn.Close()
			return
		}
		select {
		case c.conns <- conn:
		case <-t.streams.closed:
			conn.Close()
		}
	}
}

// caller is made with a peer's first connection and stays: there are as few as voters.
func (t *transport) caller(peer string) *caller {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	c := t.callers[peer]
	if c == nil {
		c = &caller{streams: t.streams, peer: peer, conns: make(chan net.Conn)}
		c.network = newNetwork(c, t.log)
		c.network.SetHeartbeatHandler(func(rpc raft.RPC) {
			switch handle := t.heartbeat.Load(); {
			case !t.genuine(peer, rpc), !t.pass(peer, &rpc):
			case handle == nil:
				rpc.Respond(nil, errors.New("this node is just starting"))
			default:
				(*handle)(rpc)
			}
		})
		t.callers[peer] = c
		t.tasks.Go(func() { t.hear(c) })
	}
	return c
}

// hear passes on what a peer says in its own name.
func (t *transport) hear(c *caller) {
	for {
		select {
		case rpc := <-c.network.Consumer():
			if !t.genuine(c.peer, rpc) || !t.pass(c.peer, &rpc) {
				continue
			}
			select {
			case t.heard <- rpc:
			case <-t.streams.closed:
				return
			}
		case <-t.streams.closed:
			return
		}
	}
}

// genuine answers a message itself, and cuts the peer off, if it names another sender
// than the one whose key opened the connection. Raft counts votes and follows leaders by
// what stands in the header; the address there is replaced by the node id, so that
// nothing in it is the sender's own word, and votes are remembered by key.
func (t *transport) genuine(peer string, rpc raft.RPC) bool {
	header := rpcHeader(rpc.Command)
	if header != nil && string(header.ID) == peer {
		header.Addr = []byte(peer)
		return true
	}
	claimed := "nobody"
	if header != nil {
		claimed = fmt.Sprintf("%.64s", header.ID)
	}
	t.log.Error("a member spoke Raft in another's name; it is cut off: look for who holds its key", "member", peer, "claimed", claimed)
	rpc.Respond(nil, fmt.Errorf("the header names %s, the connection was opened by %s", claimed, peer))
	for _, st := range t.streams.open() {
		if st.inbound && st.peer == peer {
			st.Close()
		}
	}
	return false
}

// pass tells whether a message may reach Raft. It has answered one that may not, and one
// whose entries Raft had to take in parts.
func (t *transport) pass(peer string, rpc *raft.RPC) bool {
	n, err := t.leaders.allows(peer, rpc)
	if err == nil {
		if request, ok := rpc.Command.(*raft.AppendEntriesRequest); ok && n < len(request.Entries) {
			t.passInParts(peer, rpc, request, n)
			return false
		}
		return true
	}
	if rpc.Reader != nil {
		io.Copy(io.Discard, rpc.Reader) // what follows on the connection is the next message
	}
	rpc.Respond(nil, err)
	return false
}

// passInParts has Raft take the first n entries of a request, waits until its state bears
// out the next ones, and so on, and answers for all of them. Were it to answer for the
// first part, a leader that has compacted its log before it would send a snapshot.
func (t *transport) passInParts(peer string, rpc *raft.RPC, request *raft.AppendEntriesRequest, n int) {
	deadline := time.Now().Add(configurationPatience)
	part := *request
	for {
		rest := part.Entries[n:]
		part.Entries = part.Entries[:n]
		inner := make(chan raft.RPCResponse, 1)
		answer := raft.RPCResponse{Error: errKilled}
		select {
		case t.heard <- raft.RPC{Command: &part, RespChan: inner}:
			select {
			case answer = <-inner:
			case <-t.streams.closed:
			}
		case <-t.streams.closed:
		}
		resp, ok := answer.Response.(*raft.AppendEntriesResponse)
		if !ok || !resp.Success || len(rest) == 0 {
			rpc.RespChan <- answer
			return
		}
		next := part
		if n > 0 {
			next.PrevLogEntry, next.PrevLogTerm = part.Entries[n-1].Index, part.Entries[n-1].Term
		}
		next.Entries = rest
		for {
			var err error
			if n, err = t.leaders.fits(peer, rest); err != nil || n == 0 && time.Now().After(deadline) {
				failed := *resp
				failed.Success = false
				rpc.Respond(&failed, err)
				return
			}
			if n > 0 {
				break
			}
			select {
			case <-time.After(5 * time.Millisecond):
			case <-t.streams.closed:
				rpc.Respond(nil, errKilled)
				return
			}
		}
		part = next
	}
}

func rpcHeader(command any) *raft.RPCHeader {
	switch c := command.(type) {
	case *raft.AppendEntriesRequest:
		return &c.RPCHeader
	case *raft.RequestVoteRequest:
		return &c.RPCHeader
	case *raft.RequestPreVoteRequest:
		return &c.RPCHeader
	case *raft.InstallSnapshotRequest:
		return &c.RPCHeader
	case *raft.TimeoutNowRequest:
		return &c.RPCHeader
	}
	return nil
}

// Consumer is where Raft hears the others.
func (t *transport) Consumer() <-chan raft.RPC { return t.heard }

// SetHeartbeatHandler takes heartbeats past the queue, so that a slow disk does not hold
// them up.
func (t *transport) SetHeartbeatHandler(f func(raft.RPC)) { t.heartbeat.Store(&f) }

// Close ends all connections and returns when nothing of them is passed on any more.
func (t *transport) Close() error {
	err := t.NetworkTransport.Close() // and with it the streams
	t.mu.Lock()
	t.closed = true
	for _, c := range t.callers {
		c.network.Close()
	}
	t.mu.Unlock()
	t.tasks.Wait()
	return err
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
