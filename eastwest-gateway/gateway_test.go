package gateway

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
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/internal/daemon/daemontest"
	"github.com/entente-mesh/entente/internal/dataplane"
	"github.com/entente-mesh/entente/internal/dataplaneapi"
	"github.com/entente-mesh/entente/internal/peer"
	"github.com/entente-mesh/entente/internal/peer/peertest"
)

var td = spiffeid.RequireTrustDomainFromString("trading.example")

// workloadAPI serves fixed SVIDs and bundles.
type workloadAPI struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	svids []*x509svid.SVID
	own   *x509.Certificate
}

func (w *workloadAPI) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	res := &workload.X509SVIDResponse{}
	for _, s := range w.svids {
		chain, key, err := s.MarshalRaw()
		if err != nil {
			return err
		}
		res.Svids = append(res.Svids, &workload.X509SVID{SpiffeId: s.ID.String(), X509Svid: chain, X509SvidKey: key, Bundle: w.own.Raw})
	}
	if err := stream.Send(res); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

// ca serves one policy and one set of instances.
type ca struct {
	ententev1.UnimplementedSyncServer
	policy    *ententev1.Policy
	instances []*ententev1.Instance
}

func (c *ca) Sync(stream grpc.BidiStreamingServer[ententev1.SyncRequest, ententev1.SyncResponse]) error {
	if _, err := stream.Recv(); err != nil {
		return err
	}
	if err := stream.Send(&ententev1.SyncResponse{Message: &ententev1.SyncResponse_Policy{Policy: c.policy}}); err != nil {
		return err
	}
	if err := stream.Send(&ententev1.SyncResponse{Message: &ententev1.SyncResponse_Presence{Presence: &ententev1.Presence{Instances: c.instances, Complete: true}}}); err != nil {
		return err
	}
	for {
		if _, err := stream.Recv(); err != nil {
			return nil
		}
	}
}

// serve runs a gRPC server until stop is called.
func serve(t *testing.T, ln net.Listener, register func(*grpc.Server), options ...grpc.ServerOption) (stop func()) {
	server := grpc.NewServer(options...)
	register(server)
	var done sync.WaitGroup
	done.Go(func() { _ = server.Serve(ln) })
	stop = sync.OnceFunc(func() {
		server.Stop()
		done.Wait()
	})
	t.Cleanup(stop)
	return stop
}

// listen opens a loopback listener.
func listen(t *testing.T) net.Listener {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

func TestGateway(t *testing.T) {
	authority := peertest.NewAuthority(td)
	bundles := authority.Bundle()
	jwks, err := spiffebundle.FromX509Bundle(bundles).Marshal()
	if err != nil {
		t.Fatal(err)
	}

	dir := t.TempDir()
	socket := filepath.Join(dir, "workload.sock")
	uds, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	api := &workloadAPI{own: authority.Cert, svids: []*x509svid.SVID{authority.Issue("/edge"), authority.Issue("/entente/gateway/gw-1")}}
	stopAPI := serve(t, uds, func(s *grpc.Server) { workload.RegisterSpiffeWorkloadAPIServer(s, api) })

	// market's place: a bare mTLS server under its SVID.
	marketLn := listen(t)
	marketSVID := authority.Issue("/market")
	market := &http.Server{
		TLSConfig: peer.ServerTLS(marketSVID, bundles, peer.MemberOf(td), "h2"),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.WriteString(w, "market for "+r.Header.Get("Entente-Caller"))
		}),
	}
	go func() { _ = market.ServeTLS(marketLn, "", "") }()
	t.Cleanup(func() { _ = market.Close() })

	doorAddr, adminAddr := daemontest.FreeAddress(t), daemontest.FreeAddress(t)
	service := func(name string, port uint32) *statev1.Object {
		return &statev1.Object{Revision: 1, Kind: &statev1.Object_Service{Service: &statev1.Service{
			Name: name, Path: "/" + name, Hosts: []string{"a1"}, Selectors: []string{"unix:uid:1000"}, Port: port}}}
	}
	caLn := listen(t)
	caSVID := authority.Issue("/entente/ca/ca-1")
	cluster := &statev1.Cluster{TrustDomain: td.Name(), Id: make([]byte, 16), Dev: true}
	stopCA := serve(t, caLn, func(s *grpc.Server) {
		ententev1.RegisterSyncServer(s, &ca{
			policy: &ententev1.Policy{Full: true, Last: true, Revision: 5, Cluster: cluster,
				Bundles: []*ententev1.Bundle{{TrustDomain: td.Name(), Jwks: jwks}},
				Objects: []*statev1.Object{service("market", 8080), service("portfolio", 0), service("edge", 0),
					{Revision: 1, Kind: &statev1.Object_RoleBinding{RoleBinding: &statev1.RoleBinding{Name: "olaf", Role: statev1.AdminRole_ADMIN_ROLE_SERVICE_OWNER, Subjects: []string{"/people/olaf"}}}},
					{Revision: 1, Kind: &statev1.Object_Gateway{Gateway: &statev1.Gateway{Name: "gw-1", Datacenter: "dc1", Address: doorAddr, Hosts: []string{"a1"}, Selectors: []string{"unix:uid:1000"}}}}}},
			instances: []*ententev1.Instance{{Service: "market", Agent: "a1", Datacenter: "dc1", Address: marketLn.Addr().String(), Health: ententev1.Health_HEALTH_HEALTHY}},
		})
	}, grpc.Creds(credentials.NewTLS(peer.ServerTLS(caSVID, bundles, peer.MemberOf(td), "h2"))))

	file := fmt.Sprintf("trustDomain: trading.example\nname: gw-1\ndatacenter: dc1\nworkloadAPI: {socket: %s}\nca: {addresses: [%q]}\neastWest: {listen: %q}\nadmin: {listen: %q, socket: %s}\naccessLog: {file: %s}\nedge: {listen: x}\n",
		socket, caLn.Addr().String(), doorAddr, adminAddr, filepath.Join(dir, "a.sock"), filepath.Join(dir, "access.log"))
	cfg, err := ReadConfig("gateway.yaml", strings.NewReader(file))
	if err != nil {
		t.Fatal(err)
	}
	mesh := make(chan *dataplane.Outbound, 1)
	g, err := New(cfg, slog.New(slog.DiscardHandler), Role{Name: "edge", Identity: "/edge", Run: func(ctx context.Context, m *Mesh) error {
		mesh <- m.Outbound
		<-ctx.Done()
		return ctx.Err()
	}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	edge := <-mesh

	ready := func() int {
		res, err := http.Get("http://" + adminAddr + "/readyz")
		if err != nil {
			return 0
		}
		_ = res.Body.Close()
		return res.StatusCode
	}
	if ready() != 200 {
		t.Error("not ready")
	}
	// The east-west door, asked by a workload.
	config := peer.ClientTLS(authority.Issue("/portfolio"), bundles, peer.AnyOf(spiffeid.RequireFromPath(td, "/entente/gateway/gw-1")), "h2")
	config.ServerName = td.Name()
	c := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}}
	defer c.CloseIdleConnections()
	ask := func() string {
		var err error
		for range 100 {
			r, _ := http.NewRequest("GET", "https://"+doorAddr+"/", nil)
			r.Host = "market.trading.example"
			var res *http.Response
			if res, err = c.Do(r); err == nil {
				body, _ := io.ReadAll(res.Body)
				_ = res.Body.Close()
				return string(body)
			}
			time.Sleep(20 * time.Millisecond) // the door opens in its own time
		}
		return err.Error()
	}
	if got := ask(); got != "market for spiffe://trading.example/portfolio" {
		t.Errorf("%q", got)
	}
	checkStatus(t, filepath.Join(dir, "a.sock"), doorAddr, marketLn.Addr().String())
	checkAdministrators(t, authority, doorAddr)
	// The edge is a caller like any other.
	w := &recorder{header: http.Header{}}
	r, _ := http.NewRequest("GET", "/", nil)
	edge.Forward(w, r, "market.trading.example")
	if w.status != 200 {
		t.Errorf("%d %s", w.status, w.body.String())
	}

	// I12: without Workload API and CA traffic goes on.
	stopAPI()
	stopCA()
	if got := ask(); got != "market for spiffe://trading.example/portfolio" || ready() != 200 {
		t.Errorf("without API and CA: %q", got)
	}
	// A request is counted when all of it is over, which may be after its caller has the answer.
	const counted = `entente_gateway_requests_total{hop="gateway",outcome="answered",reason=""} 2`
	var text []byte
	for range 500 {
		metrics, err := http.Get("http://" + adminAddr + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		text, _ = io.ReadAll(metrics.Body)
		_ = metrics.Body.Close()
		if strings.Contains(string(text), counted) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if !strings.Contains(string(text), counted) {
		t.Errorf("metrics:\n%s", text)
	}

	checkDrain(t, filepath.Join(dir, "a.sock"), adminAddr, func() error {
		conn, err := tls.Dial("tcp", doorAddr, config)
		if err == nil {
			conn.Close()
		}
		return err
	})
	if got := ask(); got != "market for spiffe://trading.example/portfolio" {
		t.Errorf("undrained: %q", got)
	}

	cancel()
	select {
	case err := <-done:
		if err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("it does not stop")
	}
	log, err := os.ReadFile(filepath.Join(dir, "access.log"))
	for _, method := range []string{"Drain", "Undrain"} {
		if !regexp.MustCompile(`"msg":"administrative call","method":"/entente.v1.DataPlane/` + method + `","administrator":"local user [^"]+","outcome":"OK"`).Match(log) {
			t.Errorf("the access log does not say who called %s:\n%s", method, log)
		}
	}
	if err != nil || strings.Count(string(log), `"hop":"gateway"`) != 3 || strings.Count(string(log), `"hop":"edge"`) != 1 {
		t.Errorf("%v\n%s", err, log)
	}
}

// checkStatus asks the gateway at its admin socket, which nobody else can open.
func checkStatus(t *testing.T, socket, door, market string) {
	t.Helper()
	if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s, err := ententev1.NewDataPlaneClient(conn).Status(t.Context(), &ententev1.DataPlaneStatusRequest{Service: "market.trading.example"})
	if err != nil {
		t.Fatal(err)
	}
	const id = "spiffe://trading.example/entente/gateway/gw-1"
	listeners := map[string]*ententev1.Listener{}
	for _, l := range s.GetListeners() {
		listeners[l.GetName()] = l
	}
	switch {
	case !s.GetReady() || s.GetName() != "gw-1" || len(s.GetSvids()) != 2 || s.GetSvids()[0].GetSpiffeId() != id || s.GetSvids()[0].GetNotAfter() == nil,
		s.GetCa().GetNode() == "" || s.GetCa().GetRevision() != 5,
		len(s.GetBundles()) != 1 || s.GetBundles()[0].GetX509Authorities() != 1 || time.Since(s.GetBundles()[0].GetSince().AsTime()) > time.Minute,
		listeners["eastWest"].GetAddress() != door || listeners["eastWest"].GetConnections() != 1 || listeners["eastWest"].GetSpiffeId() != id || listeners["edge"] == nil || len(listeners) != 4,
		s.GetConnections() != 2, // portfolio's, and that to market
		len(s.GetServices()) != 1 || len(s.GetServices()[0].GetEndpoints()) != 1:
		t.Errorf("status: %v", s)
	}
	if e := s.GetServices()[0].GetEndpoints()[0]; e.GetAddress() != market || e.GetName() != "a1" || !e.GetHealthy() || e.GetEjected() {
		t.Errorf("market: %v", e)
	}
}

// checkAdministrators asks the gateway at its door: roles are those that the CA has told it.
func checkAdministrators(t *testing.T, authority *peertest.Authority, door string) {
	t.Helper()
	ask := func(path string) (*ententev1.DataPlaneStatusResponse, error) {
		conn, err := dataplaneapi.Administrator{SVID: authority.Issue(path), Bundles: authority.Bundle(), Domain: td}.Dial(t.Context(), door)
		if err != nil {
			return nil, err
		}
		defer conn.Close()
		return ententev1.NewDataPlaneClient(conn).Status(t.Context(), &ententev1.DataPlaneStatusRequest{})
	}
	if s, err := ask("/people/olaf"); err != nil || s.GetName() != "gw-1" {
		t.Errorf("an administrator: %v, %v", s, err)
	}
	if _, err := ask("/portfolio"); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "no role is bound to it") {
		t.Errorf("who has no role: %v", err)
	}
}

// checkDrain drains the gateway and puts it back. dial makes a connection at its door.
func checkDrain(t *testing.T, socket, admin string, dial func() error) {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := ententev1.NewDataPlaneClient(conn)
	page := func(path string) string {
		res, err := http.Get("http://" + admin + path)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		text, _ := io.ReadAll(res.Body)
		return fmt.Sprint(res.StatusCode, " ", string(text))
	}
	if err := dial(); err != nil || !strings.Contains(page("/metrics"), "entente_gateway_drained 0") {
		t.Fatalf("control: %v", err)
	}
	d, err := client.Drain(t.Context(), &ententev1.DrainRequest{Reason: "kernel update"})
	if err != nil || !strings.HasPrefix(d.GetDrained().GetWho(), "local user") {
		t.Fatalf("%v, %v", d, err)
	}
	if got := page("/readyz"); !strings.HasPrefix(got, "503 ") || !strings.Contains(got, "kernel update") {
		t.Errorf("drained, and /readyz says %s", got)
	}
	if !strings.Contains(page("/metrics"), "entente_gateway_drained 1") {
		t.Error("drained, and the metrics do not say so")
	}
	if err := dial(); err == nil {
		t.Error("a drained gateway takes a connection")
	}
	// The last connection ends with the last request that was made over it.
	var s *ententev1.DataPlaneStatusResponse
	for range 500 {
		if s, err = client.Status(t.Context(), &ententev1.DataPlaneStatusRequest{WithoutServices: true}); err != nil || s.GetDrained() == nil || s.GetReady() || len(s.GetServices()) > 0 {
			t.Fatalf("%v, %v", s, err)
		}
		if slices.IndexFunc(s.GetListeners(), func(l *ententev1.Listener) bool { return l.GetConnections() > 0 }) < 0 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if n := slices.IndexFunc(s.GetListeners(), func(l *ententev1.Listener) bool { return l.GetConnections() > 0 }); n >= 0 {
		t.Errorf("drained, and connections stay: %v", s.GetListeners())
	}
	if _, err := client.Undrain(t.Context(), &ententev1.UndrainRequest{}); err != nil {
		t.Error(err)
	}
	if err := dial(); err != nil || !strings.HasPrefix(page("/readyz"), "200 ") {
		t.Errorf("undrained: %v", err)
	}
}

type recorder struct {
	header http.Header
	status int
	body   strings.Builder
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(status int)      { r.status = status }
func (r *recorder) Write(p []byte) (int, error) { return r.body.Write(p) }
func (r *recorder) Flush()                      {}

func TestConfig(t *testing.T) {
	const good = "trustDomain: trading.example\nname: gw-1\ndatacenter: dc1\nworkloadAPI: {socket: /run/x.sock}\nca: {addresses: ['127.0.0.1:1']}\neastWest: {listen: '127.0.0.1:2'}\n"
	if _, err := ReadConfig("g.yaml", strings.NewReader(good)); err != nil {
		t.Fatal(err)
	}
	for extra, socket := range map[string]string{
		"":                                      "", // without dataDir there is no place for it
		"dataDir: /d\n":                         "/d/admin.sock",
		"dataDir: /d\nadmin: {socket: /r/gw}\n": "/r/gw",
		"admin: {listen: '127.0.0.1:3'}\n":      "",
	} {
		if c, err := ReadConfig("g.yaml", strings.NewReader(good+extra)); err != nil || c.Admin.Socket != socket {
			t.Errorf("%q: %v, the admin socket is %q", extra, err, c.Admin.Socket)
		}
	}
	for name, test := range map[string]struct{ from, to, want string }{
		"unknown key":     {"name: gw-1", "name: gw-1\ndatacentre: dc1", `g.yaml:3:1: unknown key "datacentre"`},
		"nothing to do":   {"eastWest: {listen: '127.0.0.1:2'}\n", "", "nothing to do"},
		"no port":         {"127.0.0.1:2", "127.0.0.1", "host:port"},
		"no CA":           {"['127.0.0.1:1']", "[]", "ca.addresses"},
		"trust domain":    {"trading.example", "Trading_Example!", "trustDomain"},
		"name no segment": {"gw-1", "gw/1", "name"},
	} {
		_, err := ReadConfig("g.yaml", strings.NewReader(strings.Replace(good, test.from, test.to, 1)))
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v; want %q", name, err, test.want)
		}
	}
}

// An SVID that was not there in the beginning, one that goes away, bundles.
// Requirements: 169, 178.
func TestIdentities(t *testing.T) {
	authority := peertest.NewAuthority(td)
	changes := 0
	i := newIdentities(slog.New(slog.DiscardHandler), func() { changes++ })
	id := spiffeid.RequireFromPath(td, "/edge")
	if _, err := i.of(id).GetX509SVID(); err == nil || !strings.Contains(err.Error(), id.String()) {
		t.Error(err)
	}
	waiting := make(chan error, 1)
	go func() { waiting <- i.wait(context.Background(), id) }()
	set := x509bundle.NewSet(authority.Bundle())
	first, second := authority.Issue("/edge"), authority.Issue("/edge")
	i.OnX509ContextUpdate(contextOf(set, authority.Issue("/other")))
	i.OnX509ContextUpdate(contextOf(set, first, second))
	if err := <-waiting; err != nil {
		t.Error(err)
	}
	if got, err := i.of(id).GetX509SVID(); got != first || err != nil {
		t.Error("the first of an ID is the default")
	}
	i.OnX509ContextWatchError(errors.New("gone"))
	if got, _ := i.of(id).GetX509SVID(); got != first || changes != 2 {
		t.Error("an error changes nothing")
	}
	i.OnX509ContextWatchError(status.Error(codes.Unavailable, "the agent is stopping"))
	if got, _ := i.of(id).GetX509SVID(); got != first || changes != 2 {
		t.Error("an agent that goes away changes nothing")
	}
	// What a message leaves out is gone, and all of it when the entitlement ends.
	i.OnX509ContextUpdate(contextOf(x509bundle.NewSet(), authority.Issue("/other")))
	if _, err := i.of(id).GetX509SVID(); err == nil {
		t.Error("an SVID that is not in the message is still used")
	}
	if _, err := i.GetX509BundleForTrustDomain(td); err == nil {
		t.Error("a bundle that is not in the message is still used")
	}
	i.OnX509ContextUpdate(contextOf(set, first))
	for range 2 {
		i.OnX509ContextWatchError(status.Error(codes.PermissionDenied, "no identity issued"))
	}
	if _, err := i.of(id).GetX509SVID(); err == nil || changes != 5 {
		t.Errorf("the SVID is used without entitlement: %v, %d changes", err, changes)
	}
	if _, err := i.GetX509BundleForTrustDomain(td); err == nil {
		t.Error("the bundles are used without entitlement")
	}
	i.OnX509ContextUpdate(contextOf(set, first))
	if got, _ := i.of(id).GetX509SVID(); got != first {
		t.Error("entitled again, and it has no SVID")
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if i.wait(ctx, spiffeid.RequireFromPath(td, "/never")) == nil {
		t.Error("waited for nothing")
	}
}

func contextOf(bundles *x509bundle.Set, svids ...*x509svid.SVID) *workloadapi.X509Context {
	return &workloadapi.X509Context{SVIDs: svids, Bundles: bundles}
}

// A gateway that gets no SVID says so, once, and not while the SVID is merely slow.
func TestWaitIsSaid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		i := newIdentities(slog.New(slog.NewTextHandler(&log, nil)), func() {})
		ctx, cancel := context.WithTimeout(t.Context(), waitSilently/2)
		defer cancel()
		if err := i.wait(ctx, spiffeid.RequireFromString("spiffe://banking.example/gw")); err == nil || log.Len() > 0 {
			t.Errorf("%v\n%s", err, log.String())
		}
		ctx, cancel = context.WithTimeout(t.Context(), 10*waitSilently)
		defer cancel()
		if err := i.wait(ctx, spiffeid.RequireFromString("spiffe://banking.example/gw")); err == nil || strings.Count(log.String(), "spiffe_id=spiffe://banking.example/gw") != 1 {
			t.Errorf("%v\n%s", err, log.String())
		}
	})
}

// A role that cannot run does not take the gateway's other doors with it; the gateway says that
// it is not ready, and the role is tried again.
func TestRoleThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &Gateway{log: slog.New(slog.DiscardHandler)}
		ctx, stop := context.WithCancel(t.Context())
		var runs atomic.Int32
		role := Role{Name: "edge", Run: func(ctx context.Context, _ *Mesh) error {
			if runs.Add(1) < 3 {
				return errors.New("the address is taken")
			}
			<-ctx.Done()
			return nil
		}}
		ended := make(chan error, 1)
		go func() { ended <- g.serveRole(ctx, role, nil) }()
		synctest.Wait()
		if down := g.down.Load(); down == nil || !strings.Contains((*down).Error(), "edge does not run: the address is taken") {
			t.Errorf("%v", down)
		}
		time.Sleep(2*roleRetry + time.Second)
		if down := g.down.Load(); down != nil || runs.Load() != 3 {
			t.Errorf("after %d runs: %v", runs.Load(), down)
		}
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}
