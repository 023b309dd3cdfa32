package dataplaneapi

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/roles"
	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/internal/admission"
	"github.com/entente-mesh/entente/internal/dataplane"
	"github.com/entente-mesh/entente/internal/peer"
	"github.com/entente-mesh/entente/internal/peer/peertest"
)

var banking = spiffeid.RequireTrustDomainFromString("banking.example")

// pipes is a listener without a kernel, for virtual time.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { p.once.Do(func() { close(p.done) }); return nil }
func (p *pipes) Addr() net.Addr { return &net.TCPAddr{} }

func (p *pipes) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	near, far := net.Pipe()
	select {
	case p.conns <- far:
		return near, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// wary distrusts one SPIFFE path.
type wary struct {
	x509bundle.Source
	path atomic.Pointer[string]
}

func (w *wary) Distrusted(chain []*x509.Certificate) error {
	if p := w.path.Load(); p != nil && chain[0].URIs[0].Path == *p {
		return errors.New("its agent is banned")
	}
	return nil
}

// gateway is an engine with an east-west door, its administration, and what it is told.
type gateway struct {
	*dataplane.Engine
	t         *testing.T
	ln        *pipes
	authority *peertest.Authority
	bundles   *wary
	remote    *Remote
	bindings  atomic.Pointer[[]*statev1.RoleBinding]
	log       lockedLog
}

type lockedLog struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lockedLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *lockedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (g *gateway) Roles(path string) roles.Roles {
	return roles.Of(path, slices.Values(*g.bindings.Load()))
}

func (g *gateway) Stands() []string { return []string{"/entente/gateway/gw-1"} }

func (g *gateway) Status(asked *ententev1.DataPlaneStatusRequest) *ententev1.DataPlaneStatusResponse {
	s := &ententev1.DataPlaneStatusResponse{Kind: "gateway", Name: "gw-1", Drained: Drained(g.Drained()), Bundles: []*ententev1.HeldBundle{{TrustDomain: "banking.example"}}}
	Engine(s, g.Seen(catalog.Gateway), asked)
	return s
}

// bind gives roles, written "role subject prefix...".
func (g *gateway) bind(list ...string) {
	var bindings []*statev1.RoleBinding
	for i, text := range list {
		f := strings.Fields(text)
		bindings = append(bindings, &statev1.RoleBinding{Name: fmt.Sprint("b", i), Role: catalog.Roles()[f[0]], Subjects: f[1:2], Prefixes: f[2:]})
	}
	g.bindings.Store(&bindings)
	g.Recheck()
}

var everybody = []string{"trust-admin /people/tom", "service-owner /people/olaf", "service-owner /people/pia /team/pay", "viewer /people/eva", "viewer /people/vic /team/pay"}

func newGateway(t *testing.T, peers admission.Limits) *gateway {
	g := &gateway{t: t, ln: &pipes{conns: make(chan net.Conn), done: make(chan struct{})}, authority: peertest.NewAuthority(banking)}
	g.bundles = &wary{Source: g.authority.Bundle()}
	log := slog.New(slog.NewTextHandler(&g.log, nil))
	g.remote = NewRemote(New(g, log, log), g)
	var err error
	g.Engine, err = dataplane.New(dataplane.Config{TrustDomain: banking, Datacenter: "dc1", Process: "gw-1", Bundles: g.bundles, Administration: g.remote, Peers: peers})
	if err != nil {
		t.Fatal(err)
	}
	g.bind(everybody...)
	service := func(name, path string) *statev1.Object {
		return &statev1.Object{Revision: 1, Kind: &statev1.Object_Service{Service: &statev1.Service{Name: name, Path: path, Hosts: []string{"h1"}, Selectors: []string{"unix:uid:1000"}, Port: 8080}}}
	}
	tables, err := catalog.Compile(banking, []*statev1.Object{service("accounts", "/team/pay/accounts"), service("ledger", "/ledger")})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	all.Go(func() { _ = g.Run(ctx) })
	all.Go(func() {
		svid := g.authority.Issue("/entente/gateway/gw-1")
		_ = g.ServeGateway(ctx, g.ln, dataplane.Identity{ID: svid.ID, SVID: svid})
	})
	all.Go(func() { _ = g.remote.Serve(ctx) })
	g.SetView(dataplane.View{Tables: tables})
	t.Cleanup(func() {
		cancel()
		all.Wait()
	})
	return g
}

func (g *gateway) dialAs(svid *x509svid.SVID) (ententev1.DataPlaneClient, error) {
	conn, err := Administrator{SVID: svid, Bundles: g.authority.Bundle(), Domain: banking, Connect: g.ln.dial}.Dial(g.t.Context(), "gw-1:7600")
	if err != nil {
		return nil, err
	}
	g.t.Cleanup(func() { conn.Close() })
	return ententev1.NewDataPlaneClient(conn), nil
}

func (g *gateway) as(path string) ententev1.DataPlaneClient {
	g.t.Helper()
	client, err := g.dialAs(g.authority.Issue(path))
	if err != nil {
		g.t.Fatalf("%s: %v", path, err)
	}
	return client
}

func statusOf(client ententev1.DataPlaneClient) (*ententev1.DataPlaneStatusResponse, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return client.Status(ctx, &ententev1.DataPlaneStatusRequest{})
}

func drain(client ententev1.DataPlaneClient) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	_, err := client.Drain(ctx, &ententev1.DrainRequest{Reason: "a test"})
	return err
}

// asCaller shakes hands as traffic of a workload does, or by other protocols.
func (g *gateway) asCaller(protocols ...string) (*tls.Conn, error) {
	raw, err := g.ln.dial(g.t.Context(), "", "")
	if err != nil {
		return nil, err
	}
	conn := tls.Client(raw, peer.ClientTLS(g.authority.Issue("/people/tom"), g.authority.Bundle(), peer.AnyVerified(), protocols...))
	ctx, cancel := context.WithTimeout(g.t.Context(), 10*time.Second)
	defer cancel()
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, err
	}
	g.t.Cleanup(func() { raw.Close() })
	return conn, nil
}

func (g *gateway) client(protocol string) *http.Client {
	protocols := new(http.Protocols)
	protocols.SetHTTP2(true)
	transport := &http.Transport{Protocols: protocols, DialTLSContext: func(context.Context, string, string) (net.Conn, error) {
		conn, err := g.asCaller(protocol)
		if err != nil {
			return nil, err
		}
		return conn, nil
	}}
	g.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 10 * time.Second}
}

// What a role lets its holder do from elsewhere; without one nothing, and he is told why.
func TestRolesDecideAtTheDoor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t, admission.Limits{})
		for path, want := range map[string]struct {
			services, refused string
			drains            bool
		}{
			"/people/tom":    {services: "accounts.banking.example ledger.banking.example", drains: true},
			"/people/olaf":   {services: "accounts.banking.example ledger.banking.example", drains: true},
			"/people/eva":    {services: "accounts.banking.example ledger.banking.example"},
			"/people/pia":    {services: "accounts.banking.example"},
			"/people/vic":    {services: "accounts.banking.example"},
			"/people/nobody": {refused: "no role is bound to it"},
			"/ledger":        {refused: "no role is bound to it"},
		} {
			time.Sleep(time.Minute) // no rate
			client := g.as(path)
			s, err := statusOf(client)
			if want.refused != "" {
				if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "spiffe://banking.example"+path+" may not call") || !strings.Contains(err.Error(), want.refused) {
					t.Errorf("%s: %v", path, err)
				}
				if err := drain(client); status.Code(err) != codes.PermissionDenied || g.Drained() != nil {
					t.Errorf("%s drains: %v", path, err)
				}
				continue
			}
			var services []string
			for _, service := range s.GetServices() {
				services = append(services, service.GetName())
			}
			whole := len(strings.Fields(want.services)) > 1
			if err != nil || strings.Join(services, " ") != want.services || (len(s.GetBundles()) > 0) != whole || (len(s.GetListeners()) > 0) != whole {
				t.Errorf("%s sees %v, %v", path, s, err)
			}
			switch err := drain(client); {
			case want.drains && (err != nil || g.Drained() == nil || g.Drained().Who != "spiffe://banking.example"+path):
				t.Errorf("%s: %v, %v", path, err, g.Drained())
			case !want.drains && (status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "service-owner for /entente/gateway/gw-1") || g.Drained() != nil):
				t.Errorf("%s drains: %v", path, err)
			}
			if want.drains { // a drained gateway is put back the same way
				if _, err := g.asCaller("h2"); err == nil {
					t.Error("a drained gateway takes connections")
				}
				if _, err := g.as(path).Undrain(t.Context(), &ententev1.UndrainRequest{}); err != nil || g.Drained() != nil {
					t.Errorf("%s: %v", path, err)
				}
			}
		}
		for _, line := range []string{`administrator=spiffe://banking.example/people/olaf outcome=OK reason="a test"`, `"administrative call refused" method=/entente.v1.DataPlane/Status administrator=spiffe://banking.example/people/nobody`} {
			if !strings.Contains(g.log.String(), line) {
				t.Errorf("the log lacks %s:\n%s", line, g.log.String())
			}
		}
	})
}

// Who is not of the domain does not shake hands, whatever roles his path has.
func TestStrangersDoNotAdminister(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t, admission.Limits{})
		other := peertest.NewAuthority(spiffeid.RequireTrustDomainFromString("trading.example"))
		forger := peertest.NewAuthority(banking)
		g.bundles.Source = x509bundle.NewSet(g.authority.Bundle(), other.Bundle()) // as a gateway with a peer has them
		for name, svid := range map[string]*x509svid.SVID{"another domain": other.Issue("/people/tom"), "another authority": forger.Issue("/people/tom"), "expired": g.authority.Issue("/people/tom", peertest.TTL(-time.Hour))} {
			client, err := g.dialAs(svid)
			if err == nil { // the client is done before the server has looked at its certificate
				_, err = statusOf(client)
			}
			if err == nil || status.Code(err) == codes.PermissionDenied {
				t.Errorf("%s: %v", name, err)
			}
		}
		if _, err := statusOf(g.as("/people/tom")); err != nil {
			t.Errorf("control: %v", err)
		}
	})
}

// Neither protocol leads where the other does.
func TestProtocolsAreApart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t, admission.Limits{})
		for _, offer := range [][]string{{dataplane.AdminALPN}, {"h2", dataplane.AdminALPN}, {dataplane.AdminALPN, "http/1.1"}} {
			if conn, err := g.asCaller(offer...); err != nil || conn.ConnectionState().NegotiatedProtocol != dataplane.AdminALPN {
				t.Errorf("offered %v: %v", offer, err)
			}
		}
		ask := func(protocol, method, path string) (int, http.Header, error) {
			r, _ := http.NewRequest(method, "https://ledger.banking.example"+path, strings.NewReader("\x00\x00\x00\x00\x00"))
			r.Header.Set("Content-Type", "application/grpc")
			r.Header.Set("TE", "trailers")
			res, err := g.client(protocol).Do(r)
			if err != nil {
				return 0, nil, err
			}
			defer res.Body.Close()
			_, _ = io.Copy(io.Discard, res.Body)
			if len(res.Trailer) > 0 {
				return res.StatusCode, res.Trailer, nil
			}
			return res.StatusCode, res.Header, nil
		}
		// By the traffic's protocol administration is a request to a service like any other.
		if code, head, err := ask("h2", "POST", ententev1.DataPlane_Status_FullMethodName); err != nil || head.Get("Grpc-Status") == "0" || head.Get("Entente-Refused") == "" {
			t.Errorf("administration by the traffic's protocol: %d %v, %v", code, head, err)
		}
		// By the administrators' protocol a request to a service reaches none.
		conn, err := Administrator{SVID: g.authority.Issue("/people/tom"), Bundles: g.authority.Bundle(), Domain: banking, Connect: g.ln.dial}.
			Dial(t.Context(), "gw-1", grpc.WithAuthority("ledger.banking.example"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		var header metadata.MD
		err = conn.Invoke(t.Context(), "/ledger.v1.Ledger/Read", &ententev1.DrainRequest{}, &ententev1.DrainResponse{}, grpc.Header(&header))
		if status.Code(err) != codes.Unimplemented || len(header.Get("entente-refused")) > 0 {
			t.Errorf("traffic by the administrators' protocol: %v, %v", header, err)
		}
		if _, err := statusOf(ententev1.NewDataPlaneClient(conn)); err != nil {
			t.Errorf("control: %v", err)
		}
	})
}

// A role that is withdrawn, or an SVID that is revoked, ends what rests on it while it is open.
func TestOpenSessionsEndWithTheirRights(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t, admission.Limits{})
		tom, eva := g.as("/people/tom"), g.as("/people/eva")
		for _, c := range []ententev1.DataPlaneClient{tom, eva} {
			if _, err := statusOf(c); err != nil {
				t.Fatalf("control: %v", err)
			}
		}
		g.bind("viewer /people/tom", "viewer /people/eva")
		if err := drain(tom); status.Code(err) != codes.PermissionDenied {
			t.Errorf("who is a viewer now drains: %v", err)
		}
		if _, err := statusOf(tom); err != nil {
			t.Errorf("control: a viewer: %v", err)
		}
		open := g.remote.seats.Len()
		g.bind("viewer /people/eva")
		synctest.Wait()
		if now := g.remote.seats.Len(); now != open-1 || open != 2 {
			t.Errorf("%d of %d sessions stay when a role is withdrawn", now, open)
		}
		if _, err := statusOf(tom); status.Code(err) != codes.PermissionDenied {
			t.Errorf("who has no role any more: %v", err)
		}
		banned := "/people/eva"
		g.bundles.path.Store(&banned)
		g.Recheck()
		synctest.Wait()
		if now := g.remote.seats.Len(); now != 0 {
			t.Errorf("%d sessions of a revoked SVID stay", now)
		}
		if s, err := statusOf(eva); err == nil || status.Code(err) == codes.PermissionDenied {
			t.Errorf("a revoked SVID is served: %v, %v", s, err)
		}
		g.bundles.path.Store(nil)
		if _, err := statusOf(g.as("/people/eva")); err != nil {
			t.Errorf("control: %v", err)
		}
	})
}

// Nobody keeps another administrator out, nor traffic.
func TestAdministratorsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t, admission.Limits{})
		served := func(who string) {
			t.Helper()
			r, _ := http.NewRequest("GET", "https://ledger.banking.example/", nil)
			if res, err := g.client("h2").Do(r); err != nil || res.Header.Get("Entente-Refused") == "" {
				t.Errorf("%s: traffic is not served: %v", who, err)
			}
		}
		// Handshakes have a rate, before anything is computed for them.
		refused := 0
		for range 100 {
			if _, err := g.asCaller(dataplane.AdminALPN); err != nil {
				refused++
			}
		}
		if refused < 70 {
			t.Errorf("%d of 100 handshakes at once are refused", refused)
		}
		served("handshakes")
		if held := g.remote.seats.Len(); held != remoteConnsOfOne {
			t.Errorf("one administrator holds %d connections", held)
		}
		time.Sleep(10 * time.Second)
		if _, err := statusOf(g.as("/people/eva")); err != nil {
			t.Errorf("another is kept out: %v", err)
		}
		// Who has no role soon has no connection.
		for i := range roleless + 3 {
			time.Sleep(2 * time.Second)
			if c, err := g.dialAs(g.authority.Issue(fmt.Sprint("/nobody/", i))); err == nil {
				_, _ = statusOf(c)
			}
		}
		if n := g.remote.others.Len(); n == 0 || n > roleless {
			t.Errorf("%d connections without a role", n)
		}
		time.Sleep(rolelessLimit + time.Second)
		if n := g.remote.others.Len(); n != 0 {
			t.Errorf("%d connections without a role stay", n)
		}
		served("no roles")
		// Calls have a rate for each.
		eva, slow := g.as("/people/eva"), 0
		for range remoteBurst + 20 {
			if _, err := statusOf(eva); status.Code(err) == codes.ResourceExhausted {
				slow++
			}
		}
		if slow < 15 || slow > 20 {
			t.Errorf("%d calls beyond the rate are refused", slow)
		}
		if _, err := statusOf(g.as("/people/vic")); err != nil {
			t.Errorf("another is refused for them: %v", err)
		}
		time.Sleep(time.Minute)
		// A message has a size.
		long := strings.Repeat("x", maxMessage)
		if _, err := eva.Status(t.Context(), &ententev1.DataPlaneStatusRequest{Service: long}); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("a message of over %d bytes: %v", maxMessage, err)
		}
		if _, err := eva.Status(metadata.AppendToOutgoingContext(t.Context(), "x", long), &ententev1.DataPlaneStatusRequest{}); err == nil {
			t.Error("a head of over 16 KiB is taken")
		}
		if _, err := statusOf(eva); err != nil {
			t.Errorf("control: %v", err)
		}
	})
}

// Who says nothing, or does not come to an end, does not stay.
func TestSlowAdministratorsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t, admission.Limits{})
		ends := func(conn *tls.Conn) time.Duration {
			began := time.Now()
			conn.SetReadDeadline(time.Now().Add(10 * time.Minute))
			_, _ = io.Copy(io.Discard, conn)
			return time.Since(began)
		}
		silent, err := g.asCaller(dataplane.AdminALPN)
		if err != nil {
			t.Fatal(err)
		}
		if took := ends(silent); took > 2*handshakeLimit {
			t.Errorf("who says nothing stays for %s", took)
		}
		half, err := g.asCaller(dataplane.AdminALPN)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = half.Write([]byte("PRI * HTTP/2.0\r\n"))
		if took := ends(half); took > 2*handshakeLimit {
			t.Errorf("half a preface stays for %s", took)
		}
		// Streams whose message never comes hold calls of their caller alone, and not for long.
		eva := g.as("/people/eva")
		if _, err := statusOf(eva); err != nil {
			t.Fatal(err)
		}
		conn, err := Administrator{SVID: g.authority.Issue("/people/tom"), Bundles: g.authority.Bundle(), Domain: banking, Connect: g.ln.dial}.Dial(t.Context(), "gw-1")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		for range maxStreams {
			stream, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true}, ententev1.DataPlane_Status_FullMethodName)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = stream.CloseSend() }()
		}
		time.Sleep(time.Second)
		if n := g.remote.calls.Len(); n != remoteCallsOfOne {
			t.Errorf("one administrator holds %d calls", n)
		}
		if _, err := statusOf(eva); err != nil {
			t.Errorf("another is kept out: %v", err)
		}
		time.Sleep(callLimit)
		if n := g.remote.calls.Len(); n != 0 {
			t.Errorf("%d calls without a message stay", n)
		}
	})
}

// Under load administrators are the first who are not let in.
func TestAdministratorsAreShedFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t, admission.Limits{Most: 8, PerSource: 8, Patience: admission.Never})
		if _, err := g.asCaller(dataplane.AdminALPN); err != nil {
			t.Fatalf("control: %v", err)
		}
		for i := range 8 {
			if _, err := g.asCaller("h2"); err != nil {
				t.Fatalf("connection %d of traffic: %v", i, err)
			}
			synctest.Wait()
			_, err := g.asCaller(dataplane.AdminALPN)
			if busy := i >= 4; (err != nil) != busy {
				t.Errorf("with %d of 8 connections open an administrator is told %v", i+1, err)
			}
			time.Sleep(time.Second)
		}
	})
}

// A sidecar's door serves administrators as the agent, whatever services it has.
func TestAdministratorsOfASidecar(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGateway(t, admission.Limits{})
		own := g.authority.Issue("/entente/agent/h1")
		engine, err := dataplane.New(dataplane.Config{TrustDomain: banking, Datacenter: "dc1", Process: "h1", Bundles: g.bundles,
			Administration: g.remote, AdminIdentity: dataplane.Identity{SVID: own}})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		door := &pipes{conns: make(chan net.Conn), done: make(chan struct{})}
		var all sync.WaitGroup
		all.Go(func() { _ = engine.Run(ctx) })
		all.Go(func() {
			_ = engine.ServeInbound(ctx, door, func(string) (dataplane.Backend, bool) { return dataplane.Backend{}, false })
		})
		t.Cleanup(func() { cancel(); all.Wait() })
		synctest.Wait() // for the gateway to listen at its own
		g.ln = door
		if _, err := statusOf(g.as("/people/eva")); err != nil {
			t.Errorf("a viewer: %v", err)
		}
		if _, err := statusOf(g.as("/ledger")); status.Code(err) != codes.PermissionDenied {
			t.Errorf("who has no role: %v", err)
		}
		if _, err := g.asCaller("h2"); err == nil {
			t.Error("control: traffic for a service that is not here is taken")
		}
	})
}
