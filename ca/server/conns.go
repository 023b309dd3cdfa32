package server

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/internal/admission"
)

// What the API address may be made to hold, by those who mean harm as well: see
// DESIGN.md. Everything beyond is refused or takes the place of something older.
const (
	maxAPIMessage  = 256 << 10 // 100 requests with keys of any kind
	maxHeaders     = 16 << 10
	streamWindow   = 64 << 10 // what is read ahead of one call
	connWindow     = 256 << 10
	maxStreams     = 128 // of one connection
	maxCalls       = 256 // of one peer, over all its connections
	strangersCalls = 2   // of a connection without an identity
	maxSyncs       = 4   // streams of one subscriber: one that ends while the next begins, and a reserve
	handshakeLimit = 5 * time.Second
	callLimit      = 15 * time.Second // but for streams, which last

	// A stream beats every 5 s: a peer that acknowledges none of it is gone. The ping is for
	// one whose kernel lives on; more often, it would cost as much as the beats.
	unacknowledged = 10 * time.Second
	pingEvery      = 30 * time.Second
	pingWait       = 5 * time.Second

	maxHandshakes = 1024 // under way at once
	maxStrangers  = 256  // connections without an identity: of hosts and nodes that are about to get one
	maxPeerConns  = 16   // of one agent, of one identity of a host's workloads, of one CA node

	// undisturbed is how long a connection is left in peace by others of its source that
	// want its place.
	undisturbed = time.Second
)

// entrance is the listener of the API address. It takes no more connections than there
// are places for handshakes, and closes the others at once: nobody waits behind those of an
// address that holds what there is.
type entrance struct {
	net.Listener
	server *Server
}

// arriving is a connection whose handshake is not over.
type arriving struct {
	net.Conn
	place *admission.Place
}

func (a *arriving) Close() error {
	a.place.Leave()
	return a.Conn.Close()
}

func (e entrance) Accept() (net.Conn, error) {
	for {
		conn, err := e.Listener.Accept()
		if err != nil {
			return nil, err
		}
		loseAfter(conn, unacknowledged)
		cut := func() {
			e.server.metrics.cut.WithLabelValues("handshake").Inc()
			conn.Close()
		}
		if taken := e.server.handshakes.Take(admission.Source(conn.RemoteAddr()), time.Now(), cut); taken != nil {
			return &arriving{conn, taken}, nil
		}
		cut()
	}
}

// calls counts what is under way, over all connections of a peer.
type calls struct {
	most int
	mu   sync.Mutex
	now  int
}

// guests counts the connections of each peer.
type guests struct {
	mu    sync.Mutex
	peers map[string]*peerConns
}

type peerConns struct {
	conns *admission.Places
	calls calls
}

// take counts one more connection of a peer, in the place of its oldest if there are too
// many: the newest is the one that its owner knows of, the others may be left over from
// before a crash.
func (g *guests) take(name string, close func()) (*calls, func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.peers == nil {
		g.peers = make(map[string]*peerConns)
	}
	p := g.peers[name]
	if p == nil {
		p = &peerConns{conns: admission.NewPlaces(admission.Limits{Most: maxPeerConns}), calls: calls{most: maxCalls}}
		g.peers[name] = p
	}
	taken := p.conns.Take(name, time.Now(), close)
	return &p.calls, func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		taken.Leave()
		if p.conns.Len() == 0 && g.peers[name] == p {
			delete(g.peers, name)
		}
	}
}

func (g *guests) len() (n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, p := range g.peers {
		n += p.conns.Len()
	}
	return n
}

// guestName is under which name a caller's connections are counted; empty for who has no
// identity yet.
func guestName(c caller) string {
	switch c.class {
	case member:
		return "CA node " + c.member.GetId()
	case agent:
		return "agent " + c.agent.GetName()
	case workload:
		return "workload " + c.id.Path() + " on " + c.agent.GetName()
	}
	return ""
}

// seat counts a connection whose handshake is over. The returned function is to be
// called when it ends.
func (s *Server) seat(c caller, raw net.Conn) (*calls, func(), error) {
	name := guestName(c)
	if name == "" {
		taken := s.strangers.Take(admission.Source(raw.RemoteAddr()), time.Now(), func() {
			s.metrics.cut.WithLabelValues("stranger").Inc()
			raw.Close()
		})
		if taken == nil {
			s.metrics.cut.WithLabelValues("stranger").Inc()
			return nil, nil, fmt.Errorf("%d connections without an identity are open at this CA node", maxStrangers)
		}
		return &calls{most: strangersCalls}, taken.Leave, nil
	}
	calls, leave := s.guests.take(name, func() {
		s.metrics.cut.WithLabelValues("peer").Inc()
		s.Log.Warn("a peer has too many connections; its oldest is cut", "peer", name, "limit", maxPeerConns)
		raw.Close()
	})
	return calls, leave, nil
}

// messages counts calls that no door hears of, since a message of theirs is too large.
type messages struct{ server *Server }

type heardKey struct{}

// TagRPC gives each call a mark for the interceptors to set.
func (messages) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context {
	return context.WithValue(ctx, heardKey{}, new(atomic.Bool))
}

// heard says that a door counts the call.
func heard(ctx context.Context) {
	if mark, ok := ctx.Value(heardKey{}).(*atomic.Bool); ok {
		mark.Store(true)
	}
}

func (m messages) HandleRPC(ctx context.Context, what stats.RPCStats) {
	end, ok := what.(*stats.End)
	if !ok || status.Code(end.Error) != codes.ResourceExhausted {
		return
	}
	if mark, ok := ctx.Value(heardKey{}).(*atomic.Bool); ok && !mark.Load() {
		m.server.metrics.limited.WithLabelValues("message").Inc()
	}
}

func (messages) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (messages) HandleConn(context.Context, stats.ConnStats)                       {}

// lasts are the calls that stay open.
var lasts = map[string]bool{ententev1.Sync_Sync_FullMethodName: true, ententev1.Peer_Presence_FullMethodName: true}

// tap bounds each call before anything of it is read: in number, and, unless it is one
// that lasts, in time, so that a message that is never sent to its end does not stay.
func (s *Server) tap(ctx context.Context, info *tap.Info) (context.Context, error) {
	remote, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return nil, status.Error(codes.Unauthenticated, "no connection to authenticate")
	}
	from, ok := remote.AuthInfo.(*remoteInfo)
	if !ok {
		return nil, status.Error(codes.Unauthenticated, "unknown kind of connection")
	}
	c := from.calls
	c.mu.Lock()
	full := c.now >= c.most
	if !full {
		c.now++
	}
	c.mu.Unlock()
	if full {
		s.metrics.calls.WithLabelValues("any", codes.ResourceExhausted.String()).Inc()
		s.metrics.limited.WithLabelValues("calls").Inc()
		return nil, status.Errorf(codes.ResourceExhausted, "%d calls of yours are under way at this CA node; wait for their answers", c.most)
	}
	s.metrics.underWay.Inc()
	ended := func() {
		s.metrics.underWay.Dec()
		c.mu.Lock()
		defer c.mu.Unlock()
		c.now--
	}
	if lasts[info.FullMethodName] {
		context.AfterFunc(ctx, ended)
		return ctx, nil
	}
	limited, cancel := context.WithTimeout(ctx, callLimit)
	context.AfterFunc(ctx, func() {
		cancel()
		ended()
	})
	return limited, nil
}

// syncs counts the streams of each subscriber.
type syncs struct {
	mu  sync.Mutex
	now map[string]int
}

// begin counts one more; the returned function ends it.
func (y *syncs) begin(who string) (end func(), err error) {
	y.mu.Lock()
	defer y.mu.Unlock()
	if y.now == nil {
		y.now = make(map[string]int)
	}
	if y.now[who] >= maxSyncs {
		return nil, status.Errorf(codes.ResourceExhausted, "%d streams of %s are open at this CA node: a subscriber needs one", maxSyncs, who)
	}
	y.now[who]++
	return func() {
		y.mu.Lock()
		defer y.mu.Unlock()
		if y.now[who]--; y.now[who] == 0 {
			delete(y.now, who)
		}
	}, nil
}
