package dataplane

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/internal/admission"
	"github.com/entente-mesh/entente/internal/peer"
)

const maxHeaderBytes = 64 << 10

// downstream is the verified peer of a connection at one of our TLS doors.
type downstream struct {
	id         spiffeid.ID
	cert       *x509.Certificate
	serverName string
	untrack    func()
}

type downstreamKey struct{}

var errNoPlace = errors.New("too many connections are open, or come from this address")

// serveTLS serves a TLS door until ctx is done, then drains it. It owns the listener.
func (e *Engine) serveTLS(ctx context.Context, l *listener, config *tls.Config, authz peer.Authorize, handler http.HandlerFunc) error {
	var open sync.Map // *tls.Conn -> *downstream
	defer e.opened(l)()
	admitted := admission.ListenTwice(l.ln, e.cfg.Strangers, e.cfg.Peers, e.metrics.noPlace)
	config = e.doorTLS(config, l, admitted.Busy)
	g := newGate(admitted, func(raw net.Conn) (net.Conn, error) {
		started := time.Now()
		conn := tls.Server(raw, config)
		limit, cancel := context.WithTimeout(e.ctx, 5*e.cfg.Timing.Handshake)
		defer cancel()
		if err := conn.HandshakeContext(limit); err != nil {
			_ = raw.Close()
			e.metrics.handshake("door", "refused", started)
			e.log.Debug("connection refused", "peer_address", raw.RemoteAddr().String(), "error", err)
			return nil, err
		}
		state := conn.ConnectionState()
		id, err := peer.IDFromState(state)
		if err != nil {
			_ = raw.Close()
			return nil, err
		}
		if state.NegotiatedProtocol == AdminALPN {
			return nil, e.administer(l, conn, raw, id)
		}
		if !raw.(*admission.Conn).Seat() {
			_ = raw.Close()
			e.log.Debug("connection refused: too many are open", "peer_address", raw.RemoteAddr().String(), "peer", id.String())
			return nil, errNoPlace
		}
		e.metrics.handshake("door", "ok", started)
		d := &downstream{id: id, cert: state.PeerCertificates[0], serverName: state.ServerName}
		untrack := e.registry.Track(conn, state, peer.Recheck(state, e.cfg.Bundles, authz))
		l.connections.Add(1)
		d.untrack = sync.OnceFunc(func() {
			untrack()
			l.connections.Add(-1)
		})
		open.Store(conn, d)
		return conn, nil
	})
	return e.serve(ctx, g, l.shifts, func() *http.Server {
		return &http.Server{
			Handler: handler,
			ConnContext: func(ctx context.Context, c net.Conn) context.Context {
				d, _ := open.Load(c)
				return context.WithValue(ctx, downstreamKey{}, d)
			},
			ConnState: func(c net.Conn, s http.ConnState) {
				// A hijacked connection stays tracked until the tunnel closes it.
				if s == http.StateClosed {
					if d, ok := open.LoadAndDelete(c); ok {
						d.(*downstream).untrack()
					}
				}
				if s == http.StateHijacked {
					open.Delete(c)
				}
			},
		}
	})
}

// localConn is a local connection whose process is attested, and is again on Reattest.
type localConn struct {
	net.Conn
	untrack func()
}

// attested attests the process at the other end of conn, which it closes on an error.
func (e *Engine) attested(conn net.Conn, attest Attest) (net.Conn, error) {
	if attest == nil {
		return conn, nil
	}
	again, err := attest(conn)
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return &localConn{conn, e.local.Track(conn, tls.ConnectionState{}, again)}, nil
}

func (c *localConn) Close() error {
	c.untrack()
	return c.Conn.Close()
}

// NetConn is what lies below.
func (c *localConn) NetConn() net.Conn { return c.Conn }

func (c *localConn) CloseWrite() error { return closeWrite(c.Conn) }

func (c *localConn) SetLinger(seconds int) error {
	if t, ok := c.Conn.(interface{ SetLinger(int) error }); ok {
		return t.SetLinger(seconds)
	}
	return errors.ErrUnsupported
}

// servePlain serves a loopback door. Each connection is attested before its first byte is read.
func (e *Engine) servePlain(ctx context.Context, ln net.Listener, attest Attest, handler http.HandlerFunc) error {
	g := newGate(ln, func(raw net.Conn) (net.Conn, error) {
		conn, err := e.attested(raw, attest)
		if err != nil {
			e.log.Info("connection closed unread: the process that opened it is not this listener's workload",
				"address", ln.Addr().String(), "error", err)
			return nil, err
		}
		return conn, nil
	})
	return e.serve(ctx, g, false, func() *http.Server { return &http.Server{Handler: handler} })
}

// serve serves what comes through a gate until ctx is done, then drains it: in shifts, if
// Drain is to end them, each by a server of its own, or all in one.
func (e *Engine) serve(ctx context.Context, g *gate, inShifts bool, server func() *http.Server) error {
	var err error
	if inShifts {
		err = e.inShifts(ctx, func(shift context.Context) error { return e.serveShift(shift, ctx, g, e.bounded(server())) })
	} else {
		err = e.serveShift(ctx, ctx, g, e.bounded(server()))
	}
	_ = g.Close()
	g.tasks.Wait()
	if err != nil && ctx.Err() == nil && !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("serving on %s: %w", g.Addr(), err)
	}
	return nil
}

// bounded sets what clients may have of a server.
func (e *Engine) bounded(server *http.Server) *http.Server {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true) // gRPC applications at the loopback door; a TLS connection never uses it
	server.Protocols = protocols
	server.HTTP2 = &http.HTTP2Config{
		MaxConcurrentStreams:          1000,
		MaxReceiveBufferPerConnection: 8 << 20,
		MaxReceiveBufferPerStream:     1 << 20,
	}
	server.ReadHeaderTimeout = 10 * time.Second
	server.IdleTimeout = 2 * time.Minute
	server.MaxHeaderBytes = maxHeaderBytes
	server.ErrorLog = log.New(discard{}, "", 0) // its lines are of clients' making; ours are structured
	return server
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }
