package dataplane

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/internal/admission"
	"github.com/entente-mesh/entente/internal/peer/peertest"
)

var (
	banking = spiffeid.RequireTrustDomainFromString("banking.example")
	trading = spiffeid.RequireTrustDomainFromString("trading.example")
)

// rotating is an SVID source that a test can change.
type rotating struct{ svid atomic.Pointer[x509svid.SVID] }

func (r *rotating) GetX509SVID() (*x509svid.SVID, error) { return r.svid.Load(), nil }

// killable is a listener whose process can die: everything is reset at once.
type killable struct {
	net.Listener
	mu    sync.Mutex
	conns map[net.Conn]bool
	dead  bool
}

func (k *killable) Accept() (net.Conn, error) {
	c, err := k.Listener.Accept()
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.dead {
		_ = c.Close()
		return nil, net.ErrClosed
	}
	k.conns[c] = true
	return c, nil
}

func (k *killable) kill() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.dead = true
	_ = k.Listener.Close()
	for c := range k.conns {
		if tcp, ok := c.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
		_ = c.Close()
	}
}

// process is one engine with its door.
type process struct {
	*Engine
	t                  testing.TB
	name               string
	ln                 *killable
	addr               string
	cancel, cancelDoor context.CancelFunc
	wg                 sync.WaitGroup
	access             *accessLog
	serve              func(ctx context.Context, e *Engine, ln net.Listener) error
	config             Config
	memory             *memory
}

func (p *process) start(ln net.Listener) {
	p.ln = &killable{Listener: ln, conns: map[net.Conn]bool{}}
	e, err := New(p.config)
	if err != nil {
		p.t.Fatal(err)
	}
	p.Engine = e
	ctx, cancel := context.WithCancel(context.Background())
	door, cancelDoor := context.WithCancel(ctx)
	p.cancel, p.cancelDoor = cancel, cancelDoor
	p.wg.Go(func() { _ = e.Run(ctx) })
	p.wg.Go(func() { _ = p.serve(door, e, p.ln) })
}

// kill is SIGKILL.
func (p *process) kill() {
	p.ln.kill()
	p.cancel()
	p.wg.Wait()
}

// restart brings a killed process back at the same address.
func (p *process) restart(v View) {
	if p.memory != nil {
		p.start(p.memory.listen(p.addr))
		p.SetView(v)
		return
	}
	var ln net.Listener
	var err error
	for range 100 {
		if ln, err = net.Listen("tcp", p.addr); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		p.t.Fatal(err)
	}
	p.start(ln)
	p.SetView(v)
}

// memory is a network without a kernel, for virtual time.
type memory struct {
	mu        sync.Mutex
	listeners map[string]*memoryListener
}

type memoryListener struct {
	addr    string
	conns   chan net.Conn
	done    chan struct{}
	once    sync.Once
	dropped atomic.Bool // packets to it vanish
	frozen  atomic.Bool // the kernel accepts, the process does not
}

func (m *memory) listen(addr string) *memoryListener {
	m.mu.Lock()
	defer m.mu.Unlock()
	if addr == "" {
		addr = fmt.Sprintf("127.0.0.1:%d", 1000+len(m.listeners))
	}
	l := &memoryListener{addr: addr, conns: make(chan net.Conn), done: make(chan struct{})}
	m.listeners[addr] = l
	return l
}

func (m *memory) dial(ctx context.Context, _, address string) (net.Conn, error) {
	m.mu.Lock()
	l := m.listeners[address]
	m.mu.Unlock()
	if l == nil {
		return nil, errors.New("connection refused")
	}
	if l.dropped.Load() {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	near, far := net.Pipe()
	if l.frozen.Load() {
		return near, nil
	}
	select {
	case l.conns <- far:
		return near, nil
	case <-l.done:
		return nil, errors.New("connection refused")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *memoryListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *memoryListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *memoryListener) Addr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(l.addr))
}

// listen opens a listener of the world's network.
func (w *world) listen() net.Listener {
	if w.memory != nil {
		return w.memory.listen("")
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	return ln
}

// accessLog keeps the records of one process.
type accessLog struct {
	mu    sync.Mutex
	lines []map[string]any
}

func (a *accessLog) Write(line []byte) (int, error) {
	var m map[string]any
	if err := json.Unmarshal(bytes.Clone(line), &m); err != nil {
		return 0, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.lines = append(a.lines, m)
	return len(line), nil
}

func (a *accessLog) of(requestID string) map[string]any {
	for range 200 { // a record is written after the answer
		a.mu.Lock()
		for _, l := range a.lines {
			if l["request_id"] == requestID {
				a.mu.Unlock()
				return l
			}
		}
		a.mu.Unlock()
		time.Sleep(5 * time.Millisecond)
	}
	return nil
}

// app is an application behind a sidecar.
type app struct {
	server  *http.Server
	ln      net.Listener
	mu      sync.Mutex
	seen    []*http.Request
	bodies  []string
	handler atomic.Pointer[http.HandlerFunc]
	served  atomic.Int64
}

func (a *app) addr() string { return a.ln.Addr().String() }

func newApp(t testing.TB, ln net.Listener) *app {
	a := &app{ln: ln}
	a.server = &http.Server{ErrorLog: log.New(io.Discard, "", 0), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.served.Add(1)
		if h := a.handler.Load(); h != nil {
			(*h)(w, r)
			return
		}
		body, err := io.ReadAll(r.Body)
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		a.mu.Lock()
		if len(a.seen) < 100 {
			a.seen = append(a.seen, &http.Request{Method: r.Method, Host: r.Host, URL: r.URL, Header: r.Header.Clone(), Trailer: r.Trailer.Clone()})
			a.bodies = append(a.bodies, string(body))
		}
		a.mu.Unlock()
		_, _ = w.Write(body)
		_, _ = io.WriteString(w, "ok")
	})}
	a.server.Protocols = new(http.Protocols)
	a.server.Protocols.SetHTTP1(true)
	a.server.Protocols.SetUnencryptedHTTP2(true)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = a.server.Serve(ln)
	}()
	t.Cleanup(func() {
		_ = a.server.Close()
		<-done
	})
	return a
}

func (a *app) last() *http.Request {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.seen) == 0 {
		return nil
	}
	return a.seen[len(a.seen)-1]
}

// domain is a trust domain of the test world.
type domain struct {
	td        spiffeid.TrustDomain
	authority *peertest.Authority
	own       *x509bundle.Set // sidecars'
	both      *x509bundle.Set // gateways'
	sidecars  [2]*process     // dc1, dc2
	gateways  [2]*process
	apps      [2]*app
	stores    [2]*store   // speak TCP
	monitors  [2]*monitor // of the apps
	drain     [2]func()   // closes the apps' instances
	out       [2]*process // callers' sidecars: outbound doors only
	outURL    [2]string
	caller    string // path of the calling workload
	objects   []*statev1.Object
	endpoints []catalog.Endpoint
}

// world is banking and trading in two datacenters: trading/portfolio calls banking/accounts.
type world struct {
	t       testing.TB
	banking *domain
	trading *domain
	timing  Timing
	svids   map[string]*rotating // by ID
	ttl     time.Duration
	memory  *memory                                   // nil: the loopback network
	revoked atomic.Pointer[error]                     // why the token of an edge's user is no longer good
	trust   func(x509bundle.Source) x509bundle.Source // what processes verify with; nil: the bundles alone

	strangers, peers admission.Limits // zero: the defaults
}

func (w *world) svid(d *domain, path string) *rotating {
	id := d.td.IDString() + path
	if w.svids[id] == nil {
		w.svids[id] = &rotating{}
		w.svids[id].svid.Store(d.authority.Issue(path, peertest.TTL(w.ttl)))
	}
	return w.svids[id]
}

func (w *world) rotate() {
	for id, r := range w.svids {
		d := w.banking
		if strings.Contains(id, "trading.example") {
			d = w.trading
		}
		r.svid.Store(d.authority.Issue(spiffeid.RequireFromString(id).Path(), peertest.TTL(w.ttl)))
	}
}

func (w *world) identity(d *domain, path string) Identity {
	return Identity{spiffeid.RequireFromPath(d.td, path), w.svid(d, path)}
}

type option func(*world)

func withTTL(ttl time.Duration) option { return func(w *world) { w.ttl = ttl } }

func newWorld(t testing.TB, options ...option) *world {
	// Patient, as the machine may be busy; those who measure time do so in virtual time.
	w := &world{t: t, svids: map[string]*rotating{}, ttl: time.Hour, timing: Timing{
		Connect: 2 * time.Second, Handshake: 5 * time.Second, Attempt: 5 * time.Second, Hold: 200 * time.Millisecond, Drain: time.Second,
	}}
	for _, o := range options {
		o(w)
	}
	w.banking = &domain{td: banking, caller: "/ledger"}
	w.trading = &domain{td: trading, caller: "/portfolio"}
	for _, d := range []*domain{w.banking, w.trading} {
		d.authority = peertest.NewAuthority(d.td)
	}
	for _, d := range []*domain{w.banking, w.trading} {
		d.own = x509bundle.NewSet(d.authority.Bundle())
		d.both = x509bundle.NewSet(w.banking.authority.Bundle(), w.trading.authority.Bundle())
		w.build(d)
	}
	w.declare()
	w.push()
	return w
}

func (w *world) process(d *domain, name, dc string, bundles x509bundle.Source, serve func(context.Context, *Engine, net.Listener) error) *process {
	if w.trust != nil {
		bundles = w.trust(bundles)
	}
	ln := w.listen()
	p := &process{t: w.t, name: name, addr: ln.Addr().String(), access: &accessLog{}, serve: serve}
	p.config = Config{
		TrustDomain: d.td, Datacenter: dc, Process: name, Bundles: bundles, Timing: w.timing, Strangers: w.strangers, Peers: w.peers,
		AccessLog: slog.New(slog.NewJSONHandler(p.access, nil)),
	}
	if w.memory != nil {
		p.config.Dial, p.memory = w.memory.dial, w.memory
	}
	p.start(ln)
	w.t.Cleanup(p.kill)
	return p
}

func (w *world) build(d *domain) {
	service := map[*domain]string{w.banking: "accounts", w.trading: "market"}[d]
	for i, dc := range []string{"dc1", "dc2"} {
		a := newApp(w.t, w.listen())
		d.apps[i] = a
		d.stores[i] = newStore(w.t, w.listen())
		open, drain := context.WithCancel(context.Background())
		d.monitors[i], d.drain[i] = &monitor{}, drain
		backends := map[string]Backend{
			service + "." + d.td.Name(): {Identity: w.identity(d, "/"+service), Address: a.addr(), Monitor: d.monitors[i], Open: open},
			"store." + d.td.Name():      {Identity: w.identity(d, "/store"), Address: d.stores[i].Addr().String(), Open: open},
		}
		d.sidecars[i] = w.process(d, "agent-"+dc, dc, d.own, func(ctx context.Context, e *Engine, ln net.Listener) error {
			return e.ServeInbound(ctx, ln, func(name string) (Backend, bool) {
				b, ok := backends[name]
				return b, ok
			})
		})
		gateway := w.identity(d, "/entente/gateway/gw-"+dc)
		d.gateways[i] = w.process(d, "gw-"+dc, dc, d.both, func(ctx context.Context, e *Engine, ln net.Listener) error {
			return e.ServeGateway(ctx, ln, gateway)
		})
		caller := w.identity(d, d.caller)
		d.out[i] = w.process(d, "caller-"+dc, dc, d.own, func(ctx context.Context, e *Engine, ln net.Listener) error {
			return e.Outbound(caller).Serve(ctx, ln, nil)
		})
		d.outURL[i] = "http://" + d.out[i].addr
		d.endpoints = append(d.endpoints, catalog.Endpoint{Service: service, Agent: "agent-" + dc, Datacenter: dc, Address: d.sidecars[i].addr, Healthy: true})
	}
}

// declare writes both catalogues.
func (w *world) declare() {
	bundleOf := func(d *domain) []byte {
		b, err := spiffebundle.FromX509Bundle(d.authority.Bundle()).Marshal()
		if err != nil {
			w.t.Fatal(err)
		}
		return b
	}
	for d, o := range map[*domain]*domain{w.banking: w.trading, w.trading: w.banking} {
		d.objects = nil
		add := func(o *statev1.Object) { d.objects = append(d.objects, o) }
		hosts := []string{"agent-dc1", "agent-dc2"}
		service := func(name string, port uint32, export ...string) *statev1.Service {
			s := &statev1.Service{Name: name, Path: "/" + name, Hosts: hosts, Selectors: []string{"unix:uid:1000"}, Port: port, ExportTo: export,
				Failover: &statev1.Failover{HoldSeconds: 1}}
			add(&statev1.Object{Kind: &statev1.Object_Service{Service: s}, Revision: 1, Source: "test:1"})
			return s
		}
		var peers []*statev1.PeerGateway
		for i, dc := range []string{"dc1", "dc2"} {
			add(&statev1.Object{Kind: &statev1.Object_Gateway{Gateway: &statev1.Gateway{
				Name: "gw-" + dc, Datacenter: dc, Address: d.gateways[i].addr, Hosts: hosts, Selectors: []string{"unix:uid:1000"}}}, Revision: 1})
			peers = append(peers, &statev1.PeerGateway{Path: "/entente/gateway/gw-" + dc, Datacenter: dc, Address: o.gateways[i].addr})
		}
		add(&statev1.Object{Kind: &statev1.Object_Relationship{Relationship: &statev1.Relationship{
			TrustDomain: o.td.Name(), EndpointUrls: []string{"https://127.0.0.1:9999/bundle"}, EndpointId: o.td.IDString() + "/entente/bundle-endpoint", BootstrapBundle: bundleOf(o)}}, Revision: 1})
		allow := &statev1.Allow{Callers: []string{"portfolio"}, Http: []*statev1.HTTPMatch{
			{Methods: []string{"GET", "POST"}, Path: "/v1"}}}
		if d == w.banking {
			service("accounts", 8080, "trading.example")
			service("ledger", 0)
			service("secret", 8081)
			allow.Service = "accounts"
		} else {
			service("portfolio", 0)
			service("market", 8080)
			service("cart", 0).Calls = []string{"market.trading.example"}
			service("rogue", 0)
			add(&statev1.Object{Kind: &statev1.Object_Import{Import: &statev1.Import{Service: "accounts.banking.example"}}, Revision: 1})
			allow.Service = "accounts.banking.example"
		}
		add(&statev1.Object{Kind: &statev1.Object_Agreement{Agreement: &statev1.Agreement{
			Name: "reads", Peer: o.td.Name(), Expires: time.Now().Add(24 * time.Hour).Unix(), Gateways: peers, Allow: []*statev1.Allow{allow}}}, Revision: 7, Source: "agreement.yaml:21"})
	}
}

func (d *domain) view(t testing.TB) View {
	tables, err := catalog.Compile(d.td, d.objects, catalog.AllowLoopback(true))
	if err != nil {
		t.Fatal(err)
	}
	return View{Tables: tables, Endpoints: slices.Clone(d.endpoints)}
}

func (d *domain) processes() []*process {
	return slices.Concat(d.sidecars[:], d.gateways[:], d.out[:])
}

// push gives everybody the current view.
func (w *world) push() {
	for _, d := range []*domain{w.banking, w.trading} {
		d.push(w.t)
	}
}

func (d *domain) push(t testing.TB) {
	t.Helper()
	v := d.view(t)
	for _, p := range d.processes() {
		p.SetView(v)
	}
}

// drop removes an object from a domain's catalogue.
func (d *domain) drop(key string) {
	d.objects = slices.DeleteFunc(d.objects, func(o *statev1.Object) bool { return catalog.Key(o) == key })
}

type answer struct {
	*http.Response
	body string
}

func (a answer) id() string { return a.Header.Get("X-Request-Id") }

func (a answer) problem() (p struct{ Type, Title, Detail, Next string }) {
	_ = json.Unmarshal([]byte(a.body), &p)
	return p
}

// inMemory puts the world into virtual time, with the timing that users have.
func inMemory(w *world) {
	w.memory = &memory{listeners: map[string]*memoryListener{}}
	w.timing = Timing{}
}

// client returns a client of the world's own network.
func (w *world) client() *http.Client {
	t := &http.Transport{MaxIdleConnsPerHost: 500}
	if w.memory != nil {
		t.DialContext = w.memory.dial
	}
	w.t.Cleanup(t.CloseIdleConnections)
	return &http.Client{Transport: t}
}

var client = &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 100}}

func do(t testing.TB, c *http.Client, method, url, host string, header http.Header, body io.Reader) answer {
	t.Helper()
	r, err := http.NewRequest(method, url, body)
	if err != nil {
		t.Fatal(err)
	}
	r.Host = host
	for k, v := range header {
		r.Header[k] = v
	}
	res, err := c.Do(r)
	if err != nil {
		t.Fatalf("%s %s: %v", method, url, err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatalf("%s %s: body: %v", method, url, err)
	}
	return answer{res, string(b)}
}

func get(t testing.TB, base, host, path string) answer {
	t.Helper()
	return do(t, client, "GET", base+path, host, nil, nil)
}

func (a answer) String() string { return fmt.Sprintf("%d %s: %s", a.StatusCode, a.Header, a.body) }
