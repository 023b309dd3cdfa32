package dataplane

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/internal/dataplane/resilience"
	"github.com/entente-mesh/entente/internal/peer"
)

// upstreams are the places this process sends to, by address.
type upstreams struct {
	engine    *Engine
	transport *http.Transport // makes HTTP of connections that we dialled and verified

	mu     sync.RWMutex
	places map[string]*place
}

// place is one address: a sidecar's or a gateway's. Whether it can be reached does
// not depend on who asks, so its health is shared; connections are not.
type place struct {
	address  string
	health   resilience.Health
	inflight atomic.Int64
	used     atomic.Int64 // Unix nanoseconds of the last choice
	answered atomic.Int64 // and of the last answer or good probe
	last     atomic.Pointer[dialSpec]
	wanted   atomic.Pointer[view] // the newest view with a route to it

	mu        sync.Mutex
	penalties map[string]*resilience.Penalty // by service: this place lives, but cannot serve that
	pools     map[poolKey]*pool
	looking   *probe // under way
}

// probe is one look whether a place lives. alive is set before done is closed.
type probe struct {
	done  chan struct{}
	alive bool
}

type poolKey struct{ identity, serverName string }

// dialSpec says as whom to dial, and who may answer.
type dialSpec struct {
	identity   Identity
	serverName string
	kind       catalog.HopKind
	ids        []spiffeid.ID
}

// pool holds the HTTP/2 connections of one identity to one place.
type pool struct {
	place *place

	mu      sync.Mutex
	conns   []*upstreamConn
	dialing *dial
}

type dial struct {
	done chan struct{}
	err  error
}

// upstreamConn is one verified connection. Fields below the line are guarded by
// its pool's mu, or belong to one request if pool is nil.
type upstreamConn struct {
	http     *http.ClientConn
	peer     spiffeid.ID
	born     time.Time
	chains   [2][]*x509.Certificate // ours and the peer's, leaf first
	retireAt time.Time              // no new request from then on: an SVID of either end is about to end
	untrack  func()
	reset    func() // closes it without a word
	pool     *pool
	// ---
	inflight int
	idle     time.Time
	retired  bool
}

var errEnded = errors.New("this process is stopping")

const idleTimeout = 90 * time.Second

// dialedConn carries a connection of ours through http.Transport.
type dialedConn struct{}

func (u *upstreams) init(e *Engine) {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true) // Upgrade needs it
	protocols.SetHTTP2(true)
	u.engine = e
	u.places = map[string]*place{}
	u.transport = &http.Transport{
		DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return ctx.Value(dialedConn{}).(*tls.Conn), nil
		},
		Protocols: protocols,
		HTTP2: &http.HTTP2Config{
			SendPingTimeout: 2 * time.Second, // finds a connection that swallows everything
			PingTimeout:     3 * time.Second,
		},
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxHeaderBytes,
	}
}

// at returns the place with this address.
func (u *upstreams) at(address string) *place {
	u.mu.RLock()
	p := u.places[address]
	u.mu.RUnlock()
	if p != nil {
		return p
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if p = u.places[address]; p == nil {
		p = &place{address: address, pools: map[poolKey]*pool{}, penalties: map[string]*resilience.Penalty{}}
		p.used.Store(time.Now().UnixNano())
		u.places[address] = p
	}
	return p
}

func (u *upstreams) all() []*place {
	u.mu.RLock()
	defer u.mu.RUnlock()
	places := make([]*place, 0, len(u.places))
	for _, p := range u.places {
		places = append(places, p)
	}
	return places
}

// penalty returns the penalty of a place for one service, nil if it never had one
// and make is false.
func (p *place) penalty(service string, make bool) *resilience.Penalty {
	p.mu.Lock()
	defer p.mu.Unlock()
	pen := p.penalties[service]
	if pen == nil && make {
		pen = new(resilience.Penalty)
		p.penalties[service] = pen
	}
	return pen
}

// available reports whether requests for a service may be sent here.
func (p *place) available(service string, now time.Time, hold time.Duration) bool {
	if !p.health.Available(now, hold) {
		return false
	}
	pen := p.penalty(service, false)
	return pen == nil || pen.Available(now)
}

func (p *place) pool(key poolKey) *pool {
	p.mu.Lock()
	defer p.mu.Unlock()
	pl := p.pools[key]
	if pl == nil {
		pl = &pool{place: p}
		p.pools[key] = pl
	}
	return pl
}

// connect returns a connection with room for one more request, reserved, whose peer
// is one of the spec's.
func (u *upstreams) connect(ctx context.Context, p *place, spec *dialSpec) (*upstreamConn, error) {
	p.last.Store(spec)
	pl := p.pool(poolKey{spec.identity.ID.String(), spec.serverName})
	for {
		pl.mu.Lock()
		if c := pl.reserve(spec, time.Now()); c != nil {
			pl.mu.Unlock()
			return c, nil
		}
		d := pl.dialing
		if d == nil {
			d = &dial{done: make(chan struct{})}
			if !u.engine.spawn(func() { u.fill(pl, d, spec) }) {
				pl.mu.Unlock()
				return nil, errEnded
			}
			pl.dialing = d
		}
		pl.mu.Unlock()
		select {
		case <-d.done:
			if d.err != nil {
				return nil, d.err
			}
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// reserve takes a usable connection of the pool and drops those that are none. pl.mu is held.
func (pl *pool) reserve(spec *dialSpec, now time.Time) *upstreamConn {
	var found *upstreamConn
	keep := pl.conns[:0]
	for _, c := range pl.conns {
		switch {
		case c.http.Err() != nil:
			c.untrack()
			continue
		case !now.Before(c.retireAt):
			c.retired = true
			if c.inflight == 0 {
				c.close()
			}
			continue // its last request closes it
		case found == nil && slices.Contains(spec.ids, c.peer) && c.http.Reserve() == nil:
			found = c
		}
		keep = append(keep, c)
	}
	clear(pl.conns[len(keep):])
	pl.conns = keep
	if found != nil {
		found.inflight++
	}
	return found
}

// release gives back what connect reserved.
func (c *upstreamConn) release() {
	if c.pool == nil {
		c.close()
		return
	}
	c.pool.mu.Lock()
	defer c.pool.mu.Unlock()
	c.inflight--
	c.idle = time.Now()
	if c.inflight == 0 && c.retired {
		c.close()
	}
}

func (c *upstreamConn) close() {
	_ = c.http.Close()
	c.untrack()
}

// fill dials one connection for the pool and tells those who wait.
func (u *upstreams) fill(pl *pool, d *dial, spec *dialSpec) {
	c, err := u.dial(u.engine.ctx, pl.place, spec, "h2")
	pl.mu.Lock()
	if err == nil {
		c.pool = pl
		c.idle = time.Now()
		pl.conns = append(pl.conns, c)
	}
	d.err = err
	pl.dialing = nil
	pl.mu.Unlock()
	close(d.done)
}

// dial opens and verifies one connection, and keeps book on the health of the place.
func (u *upstreams) dial(ctx context.Context, p *place, spec *dialSpec, alpn string) (*upstreamConn, error) {
	own, err := spec.identity.SVID.GetX509SVID()
	if err != nil {
		return nil, err
	}
	conn, err := u.handshake(ctx, p.address, spec, own, alpn)
	if err != nil {
		if ctx.Err() == nil {
			u.failed(p, err)
		}
		return nil, err
	}
	p.health.OK(time.Now())

	state := conn.ConnectionState()
	id, err := peer.IDFromState(state)
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	c := &upstreamConn{peer: id, born: time.Now(), chains: [2][]*x509.Certificate{own.Certificates, state.PeerCertificates},
		retireAt: retireAt(time.Now(), state, own), reset: func() { reset(conn) }}
	recheck := peer.Recheck(state, u.engine.cfg.Bundles, func(id spiffeid.ID) error { return u.engine.admits(spec.kind, id) })
	c.untrack = u.engine.registry.Track(conn, state, recheck)
	c.http, err = u.transport.NewClientConn(context.WithValue(ctx, dialedConn{}, conn), "https", p.address)
	if err != nil {
		c.untrack()
		_ = conn.Close()
		return nil, fmt.Errorf("starting HTTP with %s: %w", id, err)
	}
	return c, nil
}

func (u *upstreams) handshake(ctx context.Context, address string, spec *dialSpec, own *x509svid.SVID, alpn string) (*tls.Conn, error) {
	timing := u.engine.cfg.Timing
	started := time.Now()
	raw, err := u.engine.dial(ctx, address, spec.kind == catalog.ToPeerGateway)
	if err != nil {
		u.engine.metrics.handshake("upstream", "unreachable", started)
		return nil, err
	}
	config := peer.ClientTLS(own, u.engine.cfg.Bundles, peer.AnyOf(spec.ids...), alpn)
	config.ServerName = spec.serverName
	conn := tls.Client(raw, config)
	ctx, cancel := context.WithTimeout(ctx, timing.Handshake)
	defer cancel()
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		u.engine.metrics.handshake("upstream", "failed", started)
		return nil, fmt.Errorf("TLS with %s: %w", address, err)
	}
	if got := conn.ConnectionState().NegotiatedProtocol; got != alpn {
		_ = conn.Close()
		u.engine.metrics.handshake("upstream", "failed", started)
		return nil, fmt.Errorf("TLS with %s: it does not speak %s", address, alpn)
	}
	u.engine.metrics.handshake("upstream", "ok", started)
	return conn, nil
}

// retireAt leaves the last part of the shorter SVID's life to the requests that are
// still under way: the other end cuts the connection when our SVID ends, we when its does.
func retireAt(now time.Time, state tls.ConnectionState, own *x509svid.SVID) time.Time {
	end := state.PeerCertificates[0].NotAfter
	if ours := own.Certificates[0].NotAfter; ours.Before(end) {
		end = ours
	}
	left := end.Sub(now)
	margin := min(left*2/5, 2*time.Minute)
	// Spread, so that the connections of many callers are not renewed all at once.
	return end.Add(-margin - time.Duration(rand.Float64()*float64(margin)/4))
}

// failed leaves a place out because it could not be reached.
func (u *upstreams) failed(p *place, err error) {
	if p.health.Fail(time.Now(), rand.Float64()) {
		u.engine.metrics.ejection("unreachable")
		u.engine.log.Warn("upstream left out: it cannot be reached", "upstream_address", p.address, slog.Any("error", err))
	}
}

// patience is how long a request waits for the look at a silent place. A look that takes
// longer goes on, and may still eject the place.
const patience = 400 * time.Millisecond

// alive says whether a place that leaves a request unanswered should be waited for. A slow
// application behind it is no reason to ask elsewhere, which would only add to
// the load; a dead process is. What it answered lately is evidence enough, else
// one handshake decides for all who ask at the same time.
func (u *upstreams) alive(p *place) bool {
	if time.Since(time.Unix(0, p.answered.Load())) < u.engine.cfg.Timing.Attempt {
		return true
	}
	look := u.look(p)
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-look.done:
		return look.alive
	case <-timer.C:
		return false
	}
}

// look makes a handshake with a place in the background, unless one is under way, and
// keeps book on its outcome.
func (u *upstreams) look(p *place) *probe {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.looking != nil {
		return p.looking
	}
	look := &probe{done: make(chan struct{})}
	task := func() {
		look.alive = u.probe(p)
		p.mu.Lock()
		p.looking = nil
		p.mu.Unlock()
		close(look.done)
	}
	if !u.engine.spawn(task) {
		close(look.done)
		return look
	}
	p.looking = look
	return look
}

// probeDue probes the places that are left out, each by its own back-off.
func (u *upstreams) probeDue(now time.Time) {
	for _, p := range u.all() {
		if p.health.ProbeDue(now, rand.Float64()) {
			u.look(p)
		}
	}
}

func (u *upstreams) probe(p *place) (alive bool) {
	spec := p.last.Load()
	if spec == nil {
		return true
	}
	own, err := spec.identity.SVID.GetX509SVID()
	if err != nil {
		return true // nothing is known of the place
	}
	conn, err := u.handshake(u.engine.ctx, p.address, spec, own, "h2")
	switch {
	case err == nil:
		_ = conn.Close()
		p.health.OK(time.Now())
		p.answered.Store(time.Now().UnixNano())
	case errors.Is(u.engine.ctx.Err(), context.Canceled):
	default:
		u.failed(p, err)
		return false
	}
	return true
}

// sweep closes what is idle or about to end, and forgets places nobody asks for.
func (u *upstreams) sweep(now time.Time) {
	for _, p := range u.all() {
		empty := true
		p.mu.Lock()
		for key, pl := range p.pools {
			pl.mu.Lock()
			keep := pl.conns[:0]
			for _, c := range pl.conns {
				ending := !now.Before(c.retireAt)
				switch {
				case c.http.Err() != nil:
					c.untrack()
				case c.inflight == 0 && (ending || now.Sub(c.idle) > idleTimeout):
					c.close()
				case ending:
					c.retired = true
				default:
					keep = append(keep, c)
				}
			}
			clear(pl.conns[len(keep):])
			pl.conns = keep
			if len(keep) == 0 && pl.dialing == nil && now.Sub(time.Unix(0, p.used.Load())) > idleTimeout {
				delete(p.pools, key)
			}
			pl.mu.Unlock()
		}
		empty = len(p.pools) == 0
		p.mu.Unlock()
		if empty && p.wanted.Load() != u.engine.current.Load() && p.inflight.Load() == 0 && now.Sub(time.Unix(0, p.used.Load())) > 3*idleTimeout {
			u.mu.Lock()
			delete(u.places, p.address)
			u.mu.Unlock()
		}
	}
}

// replaceAfter is how old a connection is before it is replaced, so that a renewal that
// is late does not make each request dial.
const replaceAfter = 150 * time.Millisecond

// replace takes connections out of use that rest on an SVID which is about to be
// distrusted: the next request dials a new one, and requests under way end on the old one.
func (u *upstreams) replace(now time.Time) {
	announced := peer.Announced(u.engine.cfg.Bundles)
	if announced == nil {
		return
	}
	for _, p := range u.all() {
		p.mu.Lock()
		for _, pl := range p.pools {
			pl.mu.Lock()
			pl.conns = slices.DeleteFunc(pl.conns, func(c *upstreamConn) bool {
				if now.Sub(c.born) < replaceAfter || announced(c.chains[0]) == nil && announced(c.chains[1]) == nil {
					return false
				}
				if c.retired = true; c.inflight == 0 {
					c.close()
				}
				return true
			})
			pl.mu.Unlock()
		}
		p.mu.Unlock()
	}
}

func (u *upstreams) closeAll() {
	for _, p := range u.all() {
		p.mu.Lock()
		for _, pl := range p.pools {
			pl.mu.Lock()
			for _, c := range pl.conns {
				c.close()
			}
			pl.conns = nil
			pl.mu.Unlock()
		}
		p.mu.Unlock()
	}
}
