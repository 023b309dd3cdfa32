package dataplane

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/entente-mesh/entente/internal/dataplane/header"
)

// halfClosed is how long a TCP connection goes on of which one end sends no more.
const halfClosed = time.Hour

// Carry connects conn with a TCP service in the name of the door's identity, and returns
// when that connection has ended or could not be made. It goes the way of a request
// that asks for an Upgrade, so all that holds for these holds for it. When ctx is done it may go
// on for as long as a request in flight. attest is that of Serve. Carry owns conn.
func (o *Outbound) Carry(ctx context.Context, raw net.Conn, service string, attest Attest) error {
	conn, err := o.engine.attested(raw, attest)
	if err != nil {
		return err
	}
	defer conn.Close()
	own, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, func() {
		select {
		case <-time.After(o.engine.cfg.Timing.Drain):
			cancel()
		case <-own.Done():
		}
	})()
	w := &plainConn{conn: conn, head: http.Header{}}
	r := &http.Request{
		Method: http.MethodGet,
		URL:    &url.URL{Path: "/"},
		Proto:  "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{"Connection": {"Upgrade"}, "Upgrade": {header.TCP}},
		Host:   service,
	}
	x := o.engine.begin(o.hop, w, r.WithContext(own), service)
	x.caller(o.identity.ID)
	if x.resolve() && x.decide() {
		x.forward(o.identity, o.place, nil)
	}
	x.broken = false // there is no answer that could look clean
	x.end()
	if !w.joined {
		reset(conn)
		o.engine.log.Info("TCP connection closed: it was not carried to the service",
			slog.String("request_id", x.record.requestID), slog.String("caller", x.record.caller), slog.String("service", x.record.service),
			slog.String("reason", string(x.record.reason)), slog.String("detail", x.record.reason.Title()))
	}
	return nil
}

// plainConn takes the answer to a request that nobody sent: of it only the connection
// counts, if it is given.
type plainConn struct {
	conn   net.Conn
	head   http.Header
	joined bool
}

func (p *plainConn) Header() http.Header         { return p.head }
func (p *plainConn) WriteHeader(int)             {}
func (p *plainConn) Write(b []byte) (int, error) { return len(b), nil }

func (p *plainConn) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	p.joined = true
	return p.conn, bufio.NewReadWriter(bufio.NewReader(p.conn), bufio.NewWriter(io.Discard)), nil
}

// toStream connects the caller with the host's own TCP service.
func (x *exchange) toStream(b Backend) {
	s := newSender(x)
	defer s.close()
	x.record.attempts, x.record.upstream = 1, "application"
	x.record.upstreamAddress, x.record.upstreamDatacenter = b.Address, x.engine.cfg.Datacenter
	var status int
	var failure error
	defer s.give(b, &status, &failure)()
	conn, err := x.engine.apps.dial(context.WithValue(s.ctx, backendKey{}, &b), "tcp", b.Address)
	if err != nil {
		if s.err = err; s.ctx.Err() == nil {
			failure = err
		}
		s.giveUp()
		return
	}
	status = http.StatusSwitchingProtocols
	s.reset = func() { reset(conn) }
	s.copy(&http.Response{
		StatusCode: http.StatusSwitchingProtocols,
		Header:     http.Header{"Connection": {"Upgrade"}, "Upgrade": {header.TCP}},
		Body:       conn,
	}, "")
}

// reset closes a connection so that its other end does not take it for finished: TLS
// says no good-bye, and TCP resets.
func reset(conn net.Conn) {
	if t, ok := conn.(*tls.Conn); ok {
		conn = t.NetConn()
	}
	if t, ok := conn.(interface{ SetLinger(int) error }); ok { // TCP, or what counts it
		_ = t.SetLinger(0)
	}
	_ = conn.Close()
}

// closeWrite says that no more will be sent.
func closeWrite(to io.Writer) error {
	if half, ok := to.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}
