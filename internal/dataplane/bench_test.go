package dataplane

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/url"
	"testing"

	"github.com/entente-mesh/entente/internal/dataplane/header"
	"github.com/entente-mesh/entente/internal/peer"
)

// quiet answers at once.
var quiet = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
	w.Header()["Content-Type"] = nil
	_, _ = io.WriteString(w, "ok")
})

// memoryless is a ResponseWriter that keeps nothing.
type memoryless struct{ h http.Header }

func (m *memoryless) Header() http.Header         { return m.h }
func (m *memoryless) Write(p []byte) (int, error) { return len(p), nil }
func (m *memoryless) WriteHeader(int)             {}
func (m *memoryless) Flush()                      {}

// One gateway hop: mTLS HTTP/2 in, mTLS HTTP/2 out. The figure has both ends of the
// test in it: the client's half and the next sidecar with its application.
func BenchmarkGatewayHop(b *testing.B) {
	w := newWorld(b)
	w.banking.apps[0].handler.Store(&quiet)
	c := direct(w.svid(w.trading, "/entente/gateway/gw-dc1"), w.banking.both, "banking.example")
	defer c.CloseIdleConnections()
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			r, _ := http.NewRequest("GET", "https://"+w.banking.gateways[0].addr+"/v1/balance", nil)
			r.Host = "accounts.banking.example"
			r.Header[header.Caller] = []string{"spiffe://trading.example/portfolio"}
			res, err := c.Do(r)
			if err != nil || res.StatusCode != 200 {
				b.Error(err, res)
				return
			}
			_, _ = io.Copy(io.Discard, res.Body)
			_ = res.Body.Close()
		}
	})
}

// The outbound half alone: from a parsed request to the answer of a bare mTLS server.
func BenchmarkOutboundHalf(b *testing.B) {
	w := newWorld(b)
	// In the place of market's sidecar, a server that does nothing.
	old := w.trading.sidecars[0]
	old.kill()
	ln, err := net.Listen("tcp", old.addr)
	if err != nil {
		b.Fatal(err)
	}
	identity := w.identity(w.trading, "/market")
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	bare, err := New(w.trading.sidecars[0].config)
	if err != nil {
		b.Fatal(err)
	}
	go func() { _ = bare.Run(ctx) }()
	authz := peer.MemberOf(trading)
	go func() {
		_ = bare.serveTLS(ctx, &listener{ln: ln}, peer.ServerTLS(identity.SVID, w.trading.own, authz, alpn...), authz, quiet)
	}()

	door := w.trading.out[0].Outbound(w.identity(w.trading, "/portfolio"))
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			r, _ := http.NewRequest("GET", "/quote", nil)
			door.Forward(&memoryless{http.Header{}}, r, "market.trading.example")
		}
	})
	if a := get(b, w.trading.outURL[0], "market.trading.example", "/quote"); a.StatusCode != 200 {
		b.Fatal(a)
	}
}

// What every request pays before anything is sent.
func BenchmarkDecideAndRoute(b *testing.B) {
	w := newWorld(b)
	e := w.trading.out[0].Engine
	identity := w.identity(w.trading, "/portfolio")
	door := e.Outbound(identity)
	b.ReportAllocs()
	for b.Loop() {
		r := &http.Request{Method: "GET", Header: http.Header{"Accept": {"*/*"}}}
		r.URL = &url.URL{Path: "/quote"}
		x := e.begin("outbound", nil, r, "market.trading.example")
		x.caller(identity.ID)
		header.RemoveProtected(r.Header)
		if !x.resolve() || !x.decide() {
			b.Fatal("refused")
		}
		if hop, _ := e.route(x.view, identity, door.place, x.target).choose(nil, "", 0, x.start); hop == nil {
			b.Fatal("no hop")
		}
	}
}
