// Package dataplane is the engine that sidecar and gateway are made of.
//
// A door (a loopback listener, a TLS listener) establishes who is calling; from
// there on every request takes the same way: hygiene of its headers, the route by
// its Host, the decision of the catalogue, a plan of places to try, and the
// forwarding with its retries. DESIGN.md tells the whole.
package dataplane

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/internal/admission"
	"github.com/entente-mesh/entente/internal/dataplane/resilience"
	"github.com/entente-mesh/entente/internal/peer"
)

// Config is what all doors of a process share.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Datacenter  string
	Process     string            // name of this gateway or agent: in Entente-Via and in access records
	Bundles     x509bundle.Source // the own domain's; a gateway's also those of its peers (I6)

	Log            *slog.Logger          // refusals and changes of upstream health; nil: silent
	AccessLog      *slog.Logger          // one record per request, message "request"; nil: none
	Kind           string                // of the process: its metrics begin with entente_KIND_
	Metrics        prometheus.Registerer // nil: none
	Timing         Timing
	Administration Administration // at mTLS doors; nil: none
	AdminIdentity  Identity       // what a sidecar's door shows to administrators; a gateway's shows its own

	// Strangers bounds the connections at each mTLS door that have not shaken hands yet,
	// Peers those that have; zero: 4096 and 16384, of which one address has a quarter.
	Strangers, Peers admission.Limits

	// Dial opens connections, within Timing.Connect; nil: a net.Dialer. For networks in memory.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Timing holds the engine's limits of time; zero means the default.
type Timing struct {
	Deadline  time.Duration // of a request until the answer begins, if the hop before names no earlier one; 15 s
	Connect   time.Duration // TCP connect of an attempt; 300 ms
	Handshake time.Duration // TLS handshake of an attempt, and of a client at our doors five times that; 1 s
	Attempt   time.Duration // of silence after which the place is looked at; is it dead, the attempt is repeated elsewhere; 500 ms
	Hold      time.Duration // how long a failed place must be good again before it is used; 2 s
	Drain     time.Duration // bound for requests in flight when a door closes; 10 s
}

func (t Timing) withDefaults() Timing {
	for field, value := range map[*time.Duration]time.Duration{
		&t.Deadline:  15 * time.Second,
		&t.Connect:   300 * time.Millisecond,
		&t.Handshake: time.Second,
		&t.Attempt:   500 * time.Millisecond,
		&t.Hold:      2 * time.Second,
		&t.Drain:     10 * time.Second,
	} {
		if *field == 0 {
			*field = value
		}
	}
	return t
}

// Identity is a SPIFFE ID that a process holds, and where its newest SVID is found.
type Identity struct {
	ID   spiffeid.ID
	SVID x509svid.Source
}

// View is what is known of the domain at one moment. It is immutable.
type View struct {
	Tables    *catalog.Tables
	Endpoints []catalog.Endpoint // instances of own services, all datacenters
}

// view is the current View with the routes already made of it.
type view struct {
	View
	planner *catalog.Planner
	routes  sync.Map // routeKey -> *route
}

// Engine is shared by the doors of one process. Its methods may be called concurrently.
type Engine struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics

	current atomic.Pointer[view] // nil until the first SetView

	registry  *peer.Registry // of connections with verified peers
	local     *peer.Registry // of loopback connections with attested processes
	budget    *resilience.Budget
	failbacks failbacks
	inflight  inflight
	upstream  upstreams
	apps      applications
	shifts    shifts

	ctx       context.Context // ends with Run: of dials, probes and tunnels
	cancel    context.CancelFunc
	mu        sync.Mutex // guards ended and listeners, and orders tasks.Go before tasks.Wait
	ended     bool
	listeners []*listener
	tasks     sync.WaitGroup
}

// spawn runs a task of the engine; false: the engine has ended.
func (e *Engine) spawn(task func()) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.ended {
		return false
	}
	e.tasks.Go(task)
	return true
}

// New makes an engine. Nothing is served before SetView; Run must be running while doors are open.
func New(cfg Config) (*Engine, error) {
	switch {
	case cfg.TrustDomain.IsZero():
		return nil, errors.New("data plane: no trust domain given")
	case cfg.Bundles == nil:
		return nil, errors.New("data plane: no source of bundles given")
	case cfg.Datacenter == "" || cfg.Process == "":
		return nil, errors.New("data plane: datacenter and process name must be given")
	}
	cfg.Timing = cfg.Timing.withDefaults()
	if cfg.Strangers == (admission.Limits{}) {
		cfg.Strangers = admission.Share(4096, time.Second)
	}
	if cfg.Peers == (admission.Limits{}) {
		cfg.Peers = admission.Share(16384, admission.Never) // requests are under way on it
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	e := &Engine{
		cfg:      cfg,
		log:      cfg.Log,
		registry: &peer.Registry{Log: cfg.Log},
		local:    &peer.Registry{Log: cfg.Log},
		budget:   resilience.NewBudget(0.2, 10, time.Now()),
	}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	e.upstream.init(e)
	e.apps.init(e)
	var err error
	if e.metrics, err = newMetrics(cfg.Kind, cfg.Metrics, e.registry.Len); err != nil {
		e.cancel()
		return nil, err
	}
	return e, nil
}

// SetView makes v current for the next request, closes open connections whose peer v
// no longer admits, and cuts requests under way that v refuses (I4). It returns when
// that is done.
func (e *Engine) SetView(v View) {
	e.current.Store(&view{View: v, planner: v.Tables.NewPlanner(v.Endpoints)})
	e.Recheck()
	e.reconsider(time.Now())
}

// SetEndpoints makes other endpoints current under the same tables. Who may call whom does
// not depend on them: no connection is looked at again, and only routes to services whose
// endpoints differ are made again.
func (e *Engine) SetEndpoints(endpoints []catalog.Endpoint) {
	old := e.current.Load()
	if old == nil || slices.Equal(old.Endpoints, endpoints) {
		return
	}
	planner, stays := old.planner.With(endpoints)
	next := &view{View: View{Tables: old.Tables, Endpoints: endpoints}, planner: planner}
	old.routes.Range(func(key, value any) bool {
		r := value.(*route)
		if target, ok := old.Tables.Resolve(r.service); ok && stays(target) {
			r.want(next)
			next.routes.Store(key, r)
		}
		return true
	})
	e.current.Store(next)
}

// Reattest asks about the process at the other end of every loopback connection again, and
// closes the connections of those that no longer pass. To be called when entries have
// changed. It returns when that is done.
func (e *Engine) Reattest() {
	if n := e.local.Recheck(); n > 0 {
		e.metrics.cut(n)
		e.log.Info("loopback connections closed: their processes no longer match their entries", "connections", n)
	}
}

// Recheck looks at every open connection again. To be called when bundles have changed.
func (e *Engine) Recheck() {
	if n := e.registry.Recheck(); n > 0 {
		e.metrics.cut(n)
		e.log.Info("connections closed: their peers are no longer admitted", "connections", n)
	}
}

// Ready says why the engine cannot serve yet; nil if it can.
func (e *Engine) Ready() error {
	if e.current.Load() == nil {
		return errors.New("no view of the trust domain yet: waiting for the first answer of a CA node")
	}
	return nil
}

// Run looks after the connections of the engine until ctx is done; then it closes
// those that are left. Doors should have ended by then.
func (e *Engine) Run(ctx context.Context) error {
	defer func() {
		e.mu.Lock()
		e.ended = true
		e.mu.Unlock()
		e.cancel()
		e.tasks.Wait()
		e.upstream.closeAll()
		e.apps.close()
	}()
	done := make(chan struct{})
	watch, stop := context.WithCancel(ctx)
	go func() {
		defer close(done)
		_ = e.registry.Run(watch)
	}()
	defer func() { stop(); <-done }()

	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case now := <-tick.C:
			e.upstream.probeDue(now)
			e.upstream.replace(now)
			if i%10 == 0 {
				e.upstream.sweep(now)
				e.reconsider(now) // agreements expire by themselves
			}
		}
	}
}

var errNoView = errors.New("this process does not know its domain yet")

// admits says whether a peer may stand at the other end of a hop of this kind.
func (e *Engine) admits(kind catalog.HopKind, id spiffeid.ID) error {
	v := e.current.Load()
	if v == nil {
		return errNoView
	}
	switch {
	case kind == catalog.ToOwnGateway && v.Tables.IsOwnGateway(id),
		kind == catalog.ToPeerGateway && v.Tables.IsPeerGateway(id):
		return nil
	case kind == catalog.ToInstance:
		if _, ok := v.Tables.ServiceByID(id); ok {
			return nil
		}
	}
	return errors.New(id.String() + " is not one of those that may answer here")
}

// dial opens one TCP connection. foreign: to a gateway of another domain.
func (e *Engine) dial(ctx context.Context, address string, foreign bool) (net.Conn, error) {
	if e.cfg.Dial != nil {
		ctx, cancel := context.WithTimeout(ctx, e.cfg.Timing.Connect)
		defer cancel()
		return e.cfg.Dial(ctx, "tcp", address)
	}
	dialer := net.Dialer{Timeout: e.cfg.Timing.Connect, KeepAliveConfig: net.KeepAliveConfig{Enable: true}}
	if foreign {
		dialer.ControlContext = e.checkForeign
	}
	return dialer.DialContext(ctx, "tcp", address)
}

// unixPrefix begins the address of an application that listens on a unix socket.
const unixPrefix = "unix:"

func (e *Engine) dialApplication(ctx context.Context, address string) (net.Conn, error) {
	if path, ok := strings.CutPrefix(address, unixPrefix); ok {
		dialer := net.Dialer{Timeout: e.cfg.Timing.Connect}
		return dialer.DialContext(ctx, "unix", path)
	}
	return e.dial(ctx, address, false)
}

// applications is the way to the host's own services: plain HTTP or TCP on loopback.
// Callers of different trust domains share no connection, so that whatever an
// application confuses on one stays within a domain.
type applications struct {
	dial func(ctx context.Context, network, address string) (net.Conn, error) // asks Backend.Attest

	mu      sync.RWMutex
	domains map[spiffeid.TrustDomain]appTransports // those that were allowed a request since the start
}

type appTransports struct{ http1, h2c *http.Transport }

// of returns the connections for callers of a domain.
func (a *applications) of(td spiffeid.TrustDomain) appTransports {
	a.mu.RLock()
	t, ok := a.domains[td]
	a.mu.RUnlock()
	if ok {
		return t
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if t, ok = a.domains[td]; !ok {
		t = a.transports()
		a.domains[td] = t
	}
	return t
}

// backendKey carries the Backend to the dial of a connection.
type backendKey struct{}

func (a *applications) init(e *Engine) {
	a.dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
		b := ctx.Value(backendKey{}).(*Backend)
		conn, err := e.dialApplication(ctx, b.Address)
		if err != nil {
			return nil, err
		}
		// Before the first byte: whoever listened a moment ago need not be who accepts now.
		return e.attested(conn, b.Attest)
	}
	a.domains = map[spiffeid.TrustDomain]appTransports{}
}

func (a *applications) transports() (t appTransports) {
	one, two := new(http.Protocols), new(http.Protocols)
	one.SetHTTP1(true)
	two.SetUnencryptedHTTP2(true)
	t.http1 = &http.Transport{
		DialContext:            a.dial,
		Protocols:              one,
		DisableCompression:     true,
		MaxIdleConnsPerHost:    256,
		IdleConnTimeout:        30 * time.Second,
		MaxResponseHeaderBytes: maxHeaderBytes,
	}
	t.h2c = &http.Transport{
		DialContext:            a.dial,
		Protocols:              two,
		DisableCompression:     true,
		IdleConnTimeout:        30 * time.Second,
		MaxResponseHeaderBytes: maxHeaderBytes,
	}
	return t
}

func (a *applications) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, t := range a.domains {
		t.http1.CloseIdleConnections()
		t.h2c.CloseIdleConnections()
	}
}
