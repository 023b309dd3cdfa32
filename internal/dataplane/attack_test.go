package dataplane

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/entente-mesh/entente/internal/dataplane/header"
	"github.com/entente-mesh/entente/internal/peer"
	"github.com/entente-mesh/entente/internal/peer/peertest"
)

// direct is a client that speaks mTLS to a door without any sidecar of ours.
func direct(svid x509svid.Source, bundles x509bundle.Source, serverName string, alpn ...string) *http.Client {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	if len(alpn) == 0 {
		alpn = []string{"h2"}
	}
	return &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		Protocols: protocols,
		DialTLSContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			config := peer.ClientTLS(svid, bundles, peer.AnyVerified(), alpn...)
			config.ServerName = serverName
			raw, err := (&net.Dialer{}).DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			c := tls.Client(raw, config)
			return c, c.HandshakeContext(ctx)
		},
	}}
}

// Nobody but a gateway speaks for somebody else (DESIGN section 5; trust.md "a gateway is never a caller").
// Requirements: 21.
func TestCallerCannotBeInvented(t *testing.T) {
	w := newWorld(t)
	const portfolio, rogue = "spiffe://trading.example/portfolio", "spiffe://trading.example/rogue"
	all := w.banking.both
	market, accounts := "market.trading.example", "accounts.banking.example"

	tests := []struct {
		name   string
		svid   x509svid.Source
		door   *process
		host   string
		header http.Header
		status int
		reason string
		caller string // as seen by the door
	}{
		// At a sidecar.
		{"own gateway speaks for a caller", w.svid(w.trading, "/entente/gateway/gw-dc1"), w.trading.sidecars[0], market,
			http.Header{header.Caller: {portfolio}}, 200, "", portfolio},
		{"own gateway without a caller", w.svid(w.trading, "/entente/gateway/gw-dc1"), w.trading.sidecars[0], market,
			nil, 0, "caller-unknown", ""},
		{"own gateway with two callers", w.svid(w.trading, "/entente/gateway/gw-dc1"), w.trading.sidecars[0], market,
			http.Header{header.Caller: {portfolio, rogue}}, 0, "caller-unknown", ""},
		{"own gateway for a gateway", w.svid(w.trading, "/entente/gateway/gw-dc1"), w.trading.sidecars[0], market,
			http.Header{header.Caller: {"spiffe://trading.example/entente/gateway/gw-dc2"}}, 0, "caller-unknown", ""},
		{"own gateway for nonsense", w.svid(w.trading, "/entente/gateway/gw-dc1"), w.trading.sidecars[0], market,
			http.Header{header.Caller: {"https://trading.example/portfolio"}}, 0, "caller-unknown", ""},
		{"nominated by Connection", w.svid(w.trading, "/entente/gateway/gw-dc1"), w.trading.sidecars[0], market,
			http.Header{header.Caller: {portfolio}, "Connection": {"Entente-Caller"}}, 0, "caller-unknown", ""},
		{"workload names another", w.svid(w.trading, "/rogue"), w.trading.sidecars[0], market,
			http.Header{header.Caller: {portfolio}}, 200, "", rogue},
		{"workload names another with underscores", w.svid(w.trading, "/rogue"), w.trading.sidecars[0], market,
			http.Header{"entente_caller": {portfolio}, "X_Forwarded_Client_Cert": {"URI=" + portfolio}}, 200, "", rogue},
		{"agent is no caller", w.svid(w.trading, "/entente/agent/agent-dc1"), w.trading.sidecars[0], market,
			nil, 0, "caller-unknown", "spiffe://trading.example/entente/agent/agent-dc1"},
		{"an undeclared gateway is no gateway", w.svid(w.trading, "/entente/gateway/unknown"), w.trading.sidecars[0], market,
			http.Header{header.Caller: {portfolio}}, 0, "caller-unknown", "spiffe://trading.example/entente/gateway/unknown"},
		{"Host is not SNI", w.svid(w.trading, "/portfolio"), w.trading.sidecars[0], accounts, nil, 421, "unknown-service", portfolio},

		// At a gateway.
		{"peer gateway speaks for its domain's caller", w.svid(w.trading, "/entente/gateway/gw-dc1"), w.banking.gateways[0], accounts,
			http.Header{header.Caller: {portfolio}}, 200, "", portfolio},
		{"peer gateway speaks for a caller of ours", w.svid(w.trading, "/entente/gateway/gw-dc1"), w.banking.gateways[0], accounts,
			http.Header{header.Caller: {"spiffe://banking.example/ledger"}}, 0, "caller-unknown", ""},
		{"peer gateway speaks for a caller nobody agreed on", w.svid(w.trading, "/entente/gateway/gw-dc1"), w.banking.gateways[0], accounts,
			http.Header{header.Caller: {rogue}}, 403, "agreement-caller", rogue},
		{"peer gateway without a caller", w.svid(w.trading, "/entente/gateway/gw-dc1"), w.banking.gateways[0], accounts,
			nil, 0, "caller-unknown", ""},
		{"peer gateway asks for what is not exported", w.svid(w.trading, "/entente/gateway/gw-dc1"), w.banking.gateways[0], "secret.banking.example",
			http.Header{header.Caller: {portfolio}}, 421, "unknown-service", portfolio},
		{"workload at a gateway names another", w.svid(w.trading, "/rogue"), w.trading.gateways[0], accounts,
			http.Header{header.Caller: {portfolio}}, 403, "agreement-caller", rogue},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			sni := market
			if strings.HasPrefix(test.door.name, "gw") {
				sni = test.door.config.TrustDomain.Name()
			}
			alpn := "h2"
			if test.header["Connection"] != nil {
				alpn = "http/1.1"
			}
			c := direct(test.svid, all, sni, alpn)
			defer c.CloseIdleConnections()
			a := do(t, c, "GET", "https://"+test.door.addr+"/v1/balance", test.host, test.header, nil)
			if test.status != 0 && a.StatusCode != test.status || a.Header.Get(header.Refused) != test.reason {
				t.Fatalf("want %d %q, got %s", test.status, test.reason, a)
			}
			record := test.door.access.of(a.id())
			if record["caller"] != test.caller {
				t.Errorf("the door took %q for the caller, not %q", record["caller"], test.caller)
			}
			if test.reason == "" && test.door == w.trading.sidecars[0] {
				seen := w.trading.apps[0].last()
				cert, err := header.ParseClientCert(seen.Header.Get(header.ClientCert))
				if err != nil || cert.URI.String() != test.caller {
					t.Errorf("the application was told %+v, %v", cert, err)
				}
				for name := range seen.Header {
					if header.Protected(name) && name != header.ClientCert {
						t.Errorf("the application got %s", name)
					}
				}
			}
		})
	}
}

// Who may not complete a connection at all.
func TestRefusedByTLS(t *testing.T) {
	w := newWorld(t)
	rogueCA := peertest.NewAuthority(banking)
	pooled := x509bundle.NewSet(w.banking.authority.Bundle(), w.trading.authority.Bundle())
	tests := []struct {
		name string
		svid x509svid.Source
		door *process
		sni  string
		ok   bool
	}{
		{"control: own workload at a sidecar", w.svid(w.banking, "/ledger"), w.banking.sidecars[0], "accounts.banking.example", true},
		{"another domain's workload at a sidecar (I6)", w.svid(w.trading, "/portfolio"), w.banking.sidecars[0], "accounts.banking.example", false},
		{"another domain's gateway at a sidecar (I6)", w.svid(w.trading, "/entente/gateway/gw-dc1"), w.banking.sidecars[0], "accounts.banking.example", false},
		{"a rogue authority in our name", rogueCA.Issue("/ledger"), w.banking.sidecars[0], "accounts.banking.example", false},
		{"the other domain's authority in our name (I2)", w.trading.authority.IssueFor(peertest.NewKey(), banking, "/ledger"), w.banking.gateways[0], "banking.example", false},
		{"SNI of no service", w.svid(w.banking, "/ledger"), w.banking.sidecars[0], "ledger.banking.example", false},
		{"control: peer gateway at a gateway", w.svid(w.trading, "/entente/gateway/gw-dc1"), w.banking.gateways[0], "banking.example", true},
		{"peer's workload at a gateway", w.svid(w.trading, "/portfolio"), w.banking.gateways[0], "banking.example", false},
		{"peer's gateway that no agreement names", w.svid(w.trading, "/entente/gateway/gw-dc9"), w.banking.gateways[0], "banking.example", false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			config := peer.ClientTLS(test.svid, pooled, peer.AnyVerified(), "h2")
			config.ServerName = test.sni
			c, err := tls.Dial("tcp", test.door.addr, config)
			if err == nil {
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(2 * time.Second))
				// TLS 1.3: the server's refusal comes after our Finished. A server that
				// accepts us begins with SETTINGS.
				_, err = io.ReadFull(c, make([]byte, 9))
			}
			if ok := err == nil; ok != test.ok {
				t.Errorf("completed: %v (%v), want %v", ok, err, test.ok)
			}
		})
	}
}

// What an application, or whoever reaches its listener, writes in our names dies there.
func TestApplicationCannotSpeakMesh(t *testing.T) {
	w := newWorld(t)
	h := http.Header{
		"Entente-Caller":          {"spiffe://trading.example/rogue"},
		"entente_via":             {"a/b/c, a/b/d, a/b/e, a/b/f"},
		"Entente-Timeout-Ms":      {"1"},
		"X-Forwarded-Client-Cert": {"URI=spiffe://trading.example/admin"},
		"x_forwarded-client_cert": {"URI=spiffe://trading.example/admin"},
		"X-Request-Id":            {"<script>"},
		"Connection":              {"X-Mine"},
		"X-Mine":                  {"hop"},
		"X-Kept":                  {"kept"},
	}
	r, _ := http.NewRequest("POST", w.trading.outURL[0]+"/v1/x", io.MultiReader(strings.NewReader("body")))
	r.Host = "market.trading.example"
	r.Header = h
	r.Trailer = http.Header{"Entente-Caller": {"spiffe://trading.example/rogue"}, "X_forwarded_client_cert": {"x"}, "X-Sum": {"abc"}}
	res, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	if res.StatusCode != 200 {
		t.Fatal(res.Status)
	}
	seen := w.trading.apps[0].last()
	cert, err := header.ParseClientCert(seen.Header.Get(header.ClientCert))
	if err != nil || len(seen.Header[header.ClientCert]) != 1 || cert.URI.String() != "spiffe://trading.example/portfolio" {
		t.Errorf("%s: %v, %v", header.ClientCert, err, seen.Header)
	}
	for name := range seen.Header {
		if header.Protected(name) && name != header.ClientCert {
			t.Errorf("%s reached the application", name)
		}
	}
	for name := range seen.Trailer {
		if header.Protected(name) {
			t.Errorf("trailer %s reached the application", name)
		}
	}
	if seen.Trailer.Get("X-Sum") != "abc" {
		t.Errorf("the harmless trailer is lost: %v", seen.Trailer)
	}
	if seen.Header.Get("X-Kept") != "kept" || seen.Header.Get("X-Mine") != "" {
		t.Errorf("%v", seen.Header)
	}
	if !header.ValidRequestID(seen.Header.Get(header.RequestID)) {
		t.Errorf("request id %q", seen.Header.Get(header.RequestID))
	}
}

// The same at the first hop: nothing of it leaves the caller's own sidecar.
func TestOutboundDoorSpeaksForItself(t *testing.T) {
	w := newWorld(t)
	old := w.trading.gateways[0] // a gateway believes more than a sidecar does
	old.kill()
	ln, err := net.Listen("tcp", old.addr)
	if err != nil {
		t.Fatal(err)
	}
	seen := make(chan http.Header, 1)
	server := &http.Server{
		TLSConfig: peer.ServerTLS(w.svid(w.trading, "/entente/gateway/gw-dc1"), w.trading.own, peer.MemberOf(trading), "h2"),
		Handler:   http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { seen <- r.Header }),
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.ServeTLS(ln, "", "")
	}()
	defer func() { _ = server.Close(); <-done }()
	a := do(t, client, "GET", w.trading.outURL[0]+"/v1/x", "accounts.banking.example", http.Header{
		"Entente-Caller": {"spiffe://trading.example/rogue"}, "Entente-Tried": {"dc1"}, "Entente-Via": {"a/b/c"}, "entente_via": {"a/b/c"},
		"Entente-New": {"x"}, "Entente-Timeout-Ms": {"1"}, "Entente-Attempt": {"3"}, "X-Forwarded-Client-Cert": {"x"}, "X-Kept": {"kept"},
	}, nil)
	if a.StatusCode != 200 {
		t.Fatal(a)
	}
	h := <-seen
	for name := range h {
		if header.Protected(name) && name != header.TimeoutMS && name != header.Attempt {
			t.Errorf("%s left the sidecar", name)
		}
	}
	if h.Get(header.Attempt) != "1" || len(h.Get(header.TimeoutMS)) < 4 || h.Get("X-Kept") != "kept" {
		t.Errorf("%v", h)
	}
}

// An application's answer cannot look like the mesh's: it would cause retries.
func TestApplicationCannotAnswerForTheMesh(t *testing.T) {
	w := newWorld(t)
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Entente-Refused", "no-endpoint")
		w.Header().Set("Entente_Outcome", "not-sent")
		w.Header().Set("Entente-Outcome", "not-sent")
		w.Header().Set(http.TrailerPrefix+"Entente-Refused", "no-endpoint")
		w.WriteHeader(503)
	})
	w.trading.apps[0].handler.Store(&h)
	a := do(t, client, "POST", w.trading.outURL[0]+"/", "market.trading.example", nil, strings.NewReader("x"))
	if a.StatusCode != 503 || a.Header.Get(header.Refused) != "" || a.Header.Get(header.Outcome) != "" || len(a.Trailer) != 0 {
		t.Error(a, a.Trailer)
	}
	if n := w.trading.apps[0].served.Load(); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

// I4: what is no longer agreed is cut within a second, on connections that are open.
// Requirements: 145.
func TestUnagreementCutsOpenConnections(t *testing.T) {
	w := newWorld(t)
	streaming := make(chan struct{}, 2)
	h := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(rw, "first\n")
		_ = http.NewResponseController(rw).Flush()
		streaming <- struct{}{}
		<-r.Context().Done()
	})
	w.banking.apps[0].handler.Store(&h)
	w.trading.apps[0].handler.Store(&h)
	open := func(host string) chan error {
		r, _ := http.NewRequest("GET", w.trading.outURL[0]+"/v1/balance", nil)
		r.Host = host
		res, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() {
			_, err := io.Copy(io.Discard, res.Body)
			_ = res.Body.Close()
			ended <- err
		}()
		<-streaming
		return ended
	}
	foreign, own := open("accounts.banking.example"), open("market.trading.example")

	w.banking.drop("Agreement/reads") // by the callee's domain alone
	started := time.Now()
	w.banking.push(t)
	select {
	case err := <-foreign:
		if err == nil {
			t.Error("the cut stream looks complete")
		}
		t.Logf("cut after %v", time.Since(started))
	case <-time.After(time.Second):
		t.Error("still open after a second")
	}
	select {
	case <-own:
		t.Error("control: a connection nobody un-agreed was cut")
	case <-time.After(100 * time.Millisecond):
	}
	if a := get(t, w.trading.outURL[0], "accounts.banking.example", "/v1/balance"); a.StatusCode < 400 {
		t.Error("a new request passes: ", a)
	}
	client.CloseIdleConnections()
	w.trading.out[0].ln.kill() // ends the control stream
	<-own
}

// I4, finer: the peers stay, but a rule goes; the stream it permitted goes with it, at once.
func TestNarrowingCutsStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, inMemory)
		h := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			_, _ = io.WriteString(rw, "first\n")
			_ = http.NewResponseController(rw).Flush()
			<-r.Context().Done()
		})
		w.banking.apps[0].handler.Store(&h)
		c := w.client()
		open := func(path string) (id string, ended chan error) {
			r, _ := http.NewRequest("GET", w.trading.outURL[0]+path, nil)
			r.Host = "accounts.banking.example"
			res, err := c.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = res.Body.Read(make([]byte, 6))
			ended = make(chan error, 1)
			go func() {
				_, err := io.Copy(io.Discard, res.Body)
				_ = res.Body.Close()
				ended <- err
			}()
			return res.Header.Get("X-Request-Id"), ended
		}
		id, gone := open("/v1/live")
		_, stays := open("/v1/balance")
		w.banking.push(t) // control: the same view again cuts nothing
		for _, o := range w.banking.objects {
			if a := o.GetAgreement(); a != nil {
				a.Allow[0].Http[0].Path = "/v1/balance"
			}
		}
		started := time.Now()
		w.banking.push(t)
		synctest.Wait()
		select {
		case err := <-gone:
			if err == nil || time.Since(started) > 0 {
				t.Errorf("cut after %v: %v", time.Since(started), err)
			}
		default:
			t.Error("still open")
		}
		if record := w.banking.gateways[0].access.of(id); record["outcome"] != "cut" && record["outcome"] != "client-gone" && record["outcome"] != "truncated" {
			t.Errorf("%v", record)
		}
		select {
		case <-stays:
			t.Error("control: a stream that is still allowed was cut")
		default:
		}
		w.trading.out[0].ln.kill()
		<-stays
	})
}

// The same when only the bundle goes.
// Requirements: 46, 145.
func TestBundleRemovedCutsOpenConnections(t *testing.T) {
	w := newWorld(t)
	if a := get(t, w.trading.outURL[0], "accounts.banking.example", "/v1/balance"); a.StatusCode != 200 {
		t.Fatal(a)
	}
	gateway := w.banking.gateways[0]
	before := gateway.registry.Len()
	gateway.Recheck()
	if gateway.registry.Len() != before {
		t.Fatal("control: a recheck without a change closed something")
	}
	w.banking.both.Remove(trading)
	gateway.Recheck()
	if after := gateway.registry.Len(); after != before-1 {
		t.Errorf("%d connections before, %d after: the peer gateway's should be gone", before, after)
	}
}

func TestLoops(t *testing.T) {
	w := newWorld(t)
	tests := []struct {
		name, via string
		status    int
	}{
		{"control", "trading.example/dc1/gw-dc1", 200},
		{"control: none", "", 200},
		{"was here", "banking.example/dc1/gw-dc1", 508},
		{"was in this datacenter", "trading.example/dc1/gw-dc1, banking.example/dc1/gw-other", 508},
		{"too long", "a.example/dc1/x, b.example/dc1/x, c.example/dc1/x, d.example/dc1/x", 508},
		{"unreadable", "trading.example;dc1", 400},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			c := direct(w.svid(w.trading, "/entente/gateway/gw-dc1"), w.banking.both, "banking.example")
			h := http.Header{header.Caller: {"spiffe://trading.example/portfolio"}}
			if test.via != "" {
				h[header.Via] = []string{test.via}
			}
			a := do(t, c, "GET", "https://"+w.banking.gateways[0].addr+"/v1/balance", "accounts.banking.example", h, nil)
			if a.StatusCode != test.status {
				t.Error(a)
			}
		})
	}
}

// The loopback door closes unread what is not attested.
func TestLoopbackDoorAttests(t *testing.T) {
	w := newWorld(t)
	var accept atomic.Bool
	asked := make(chan struct{}, 10)
	identity := w.identity(w.trading, "/portfolio")
	p := w.process(w.trading, "attesting", "dc1", w.trading.own, func(ctx context.Context, e *Engine, ln net.Listener) error {
		return e.Outbound(identity).Serve(ctx, ln, func(net.Conn) (func() error, error) {
			asked <- struct{}{}
			if accept.Load() {
				return nil, nil
			}
			return nil, io.ErrUnexpectedEOF
		})
	})
	p.SetView(w.trading.view(t))
	c, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	<-asked
	defer c.Close()
	_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: market.trading.example\r\n\r\n")
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("not closed: read %d, %v", n, err)
	}
	accept.Store(true)
	if a := get(t, "http://"+p.addr, "market.trading.example", "/"); a.StatusCode != 200 {
		t.Error("control: ", a)
	}
}
