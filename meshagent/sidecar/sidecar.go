// Package sidecar is the data plane of an agent: the mTLS door in front of the
// host's services, and one loopback door for each workload that calls others.
//
// It is made of internal/dataplane and told by the agent what there is. It serves
// on with what it knows when nobody tells it anything new (I12).
package sidecar

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/internal/dataplane"
	"github.com/entente-mesh/entente/internal/safepath"
)

// Config says where the sidecar stands.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Datacenter  string
	Agent       string // name of the agent, for access records
	Inbound     string // host:port of the mTLS door; empty: nothing is served here
	AppAddress  string // loopback IP of the outbound doors; empty: 127.0.0.1
	PortOffset  int    // added to the catalogue's ports of outbound doors, 0 to 40000
	Sockets     string // directory of the outbound sockets, one for each service of this host: NAME.sock; empty: none

	Names *Names // nil: services are called through outbound ports only

	Administration dataplane.Administration // at the mTLS door; nil: none
	Own            x509svid.Source          // the agent's SVID, which administrators are shown

	Log       *slog.Logger
	AccessLog *slog.Logger          // nil: none
	Metrics   prometheus.Registerer // nil: none
	Timing    dataplane.Timing
}

// Agent is what the sidecar needs of its agent. Its methods are called concurrently.
type Agent interface {
	SVIDs(entryID string) x509svid.Source                  // always the newest
	Bundles() x509bundle.Source                            // the own domain's only (I6)
	AttestCaller(conn net.Conn, entryID string) error      // who opened a local connection satisfies the entry
	AttestApplication(conn net.Conn, entryID string) error // so does who is at the end of one that the sidecar opened
}

// World is what the agent has been told by the CA. The sidecar does not change it.
type World struct {
	Revision  uint64            // of Objects, Entries and bundles
	Urgent    uint64            // another one: bundles or distrust differ under the same Revision
	Dev       bool              // the cluster's dev flag
	Objects   []*statev1.Object // the domain's catalogue
	Entries   []*statev1.Entry  // of this host
	Endpoints []catalog.Endpoint
	Local     map[string]Local // services of this host that listen, by label
}

// Local is a service as it runs on this host. Locals can be compared.
type Local struct {
	Address string            // where the application listens: loopback host:port, or unix: and a path
	Monitor dataplane.Monitor // of its requests; nil: none
	Open    context.Context   // done: it takes no more requests; nil: it always does
}

// Sidecar runs the doors of one host.
type Sidecar struct {
	cfg    Config
	agent  Agent
	log    *slog.Logger
	app    netip.Addr
	engine *dataplane.Engine

	backends atomic.Pointer[map[string]dataplane.Backend] // by service name

	entries atomic.Pointer[map[string]entry] // callers and services, by entry id

	bindings atomic.Pointer[[]*statev1.RoleBinding] // nil: the domain is not known yet

	mu       sync.Mutex
	revision uint64
	urgent   uint64
	local    map[string]Local
	tables   *catalog.Tables
	wanted   map[outbound]struct{}
	callers  map[string]spiffeid.ID
	doors    map[netip.AddrPort]nameDoor
	changed  chan struct{} // capacity 1: wanted has changed

	closed *closedListeners
}

// closedListeners are the listeners that cannot be opened.
type closedListeners struct {
	mu  sync.Mutex
	why map[string]error // by address
}

// set notes why a listener is closed; nil: it is open, or nobody wants it any more.
func (c *closedListeners) set(address string, why error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if why == nil {
		delete(c.why, address)
	} else {
		c.why[address] = why
	}
}

// first is an error about the first of them, nil if there is none.
func (c *closedListeners) first() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, address := range slices.Sorted(maps.Keys(c.why)) {
		return fmt.Errorf("the listener at %s is closed (%d are): whoever holds the address gets what workloads send there: %w", address, len(c.why), c.why[address])
	}
	return nil
}

// entry is what tells whether a connection must be attested again.
type entry struct {
	id       spiffeid.ID
	revision uint64
}

// outbound is one local door as it should be.
type outbound struct {
	entry   string
	id      spiffeid.ID
	address string // host:port, or the absolute path of a socket
}

// New makes a sidecar; nothing is opened before Run.
func New(cfg Config, agent Agent) (*Sidecar, error) {
	if cfg.AppAddress == "" {
		cfg.AppAddress = "127.0.0.1"
	}
	app, err := netip.ParseAddr(cfg.AppAddress)
	if err != nil || !app.IsLoopback() {
		return nil, fmt.Errorf("sidecar: appAddress %q is not a loopback address: applications speak plaintext there; use 127.0.0.1", cfg.AppAddress)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	engine, err := dataplane.New(dataplane.Config{
		TrustDomain: cfg.TrustDomain,
		Datacenter:  cfg.Datacenter,
		Process:     cfg.Agent,
		Bundles:     agent.Bundles(),
		Log:         cfg.Log,
		AccessLog:   cfg.AccessLog,
		Kind:        "agent",
		Metrics:     cfg.Metrics,
		Timing:      cfg.Timing,

		Administration: cfg.Administration,
		AdminIdentity:  dataplane.Identity{SVID: cfg.Own},
	})
	if err != nil {
		return nil, fmt.Errorf("sidecar: %w", err)
	}
	s := &Sidecar{cfg: cfg, agent: agent, log: cfg.Log, app: app, engine: engine, changed: make(chan struct{}, 1), closed: &closedListeners{why: map[string]error{}}}
	s.backends.Store(&map[string]dataplane.Backend{})
	s.entries.Store(&map[string]entry{})
	return s, nil
}

// Seen is what the data plane does and knows, for people.
func (s *Sidecar) Seen() dataplane.Seen { return s.engine.Seen(catalog.Sidecar) }

// RoleBindings are the domain's, as they are in force here.
func (s *Sidecar) RoleBindings() []*statev1.RoleBinding {
	if bindings := s.bindings.Load(); bindings != nil {
		return *bindings
	}
	return nil
}

// Ready says why the sidecar does not serve: it does not know its domain yet, or another
// process holds the address of one of its listeners. Nil if it serves.
func (s *Sidecar) Ready() error {
	if err := s.engine.Ready(); err != nil {
		return err
	}
	return s.closed.first()
}

// attest attests local connections of an entry: by look when they are made, and again
// when the entry is another one. One whose entry is gone, or has another identity, ends.
func (s *Sidecar) attest(entryID string, id spiffeid.ID, look func(net.Conn, string) error) dataplane.Attest {
	return func(conn net.Conn) (func() error, error) {
		seen := (*s.entries.Load())[entryID] // before the look
		if err := look(conn, entryID); err != nil {
			return nil, err
		}
		return func() error {
			switch now, there := (*s.entries.Load())[entryID]; {
			case !there || now.id != id:
				return fmt.Errorf("this host no longer has %s under entry %s", id, entryID)
			case now != seen:
				if err := look(conn, entryID); err != nil {
					return err
				}
				seen = now
			}
			return nil
		}, nil
	}
}

// Update makes w the world. It returns when connections that w no longer admits are
// closed and new requests are decided by it; doors follow at once. It is also to be called
// when only bundles have changed. If only endpoints are others, nothing else is looked at.
// The error says which objects cannot be used and are left out; the rest of w is in force.
func (s *Sidecar) Update(w World) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tables != nil && w.Revision == s.revision && w.Urgent == s.urgent && maps.Equal(w.Local, s.local) {
		s.engine.SetEndpoints(w.Endpoints)
		return nil
	}
	var left error
	if s.tables == nil || w.Revision != s.revision {
		s.tables, left = catalog.Usable(s.cfg.TrustDomain, w.Objects, catalog.AllowLoopback(w.Dev))
		s.revision = w.Revision
	}
	backends := map[string]dataplane.Backend{}
	wanted := map[outbound]struct{}{}
	entries := map[string]entry{}
	callers := map[string]spiffeid.ID{}
	local := map[uint16]bool{}
	for _, e := range w.Entries {
		id, err := spiffeid.FromPath(s.cfg.TrustDomain, e.GetPath())
		if err != nil {
			continue // a CA derives no such entry
		}
		service, ok := s.tables.ServiceByID(id)
		if !ok || e.GetRole() != statev1.Role_ROLE_UNSPECIFIED {
			continue // a gateway's
		}
		callers[e.GetId()], entries[e.GetId()] = id, entry{id, e.GetRevision()}
		if l, ok := w.Local[service.Label]; ok {
			if at, err := netip.ParseAddrPort(l.Address); err == nil {
				local[at.Port()] = true
			}
			backends[service.Name] = dataplane.Backend{
				Identity: dataplane.Identity{ID: id, SVID: s.agent.SVIDs(e.GetId())},
				Address:  l.Address,
				Attest:   s.attest(e.GetId(), id, s.agent.AttestApplication),
				Monitor:  l.Monitor,
				Open:     l.Open,
			}
		}
		if service.OutboundPort != 0 {
			wanted[outbound{e.GetId(), id, net.JoinHostPort(s.app.String(), strconv.Itoa(int(service.OutboundPort)+s.cfg.PortOffset))}] = struct{}{}
		}
		if s.cfg.Sockets != "" {
			wanted[outbound{e.GetId(), id, filepath.Join(s.cfg.Sockets, service.Label+".sock")}] = struct{}{}
		}
	}
	s.backends.Store(&backends)
	s.entries.Store(&entries)
	s.wanted, s.callers, s.urgent, s.local = wanted, callers, w.Urgent, w.Local
	if s.cfg.Names != nil {
		s.doors = nameDoors(s.cfg.Names, s.tables, local)
	}
	bindings := s.tables.RoleBindings()
	s.bindings.Store(&bindings) // SetView looks at administrators' connections, too
	s.engine.SetView(dataplane.View{Tables: s.tables, Endpoints: w.Endpoints})
	s.engine.Reattest()
	select {
	case s.changed <- struct{}{}:
	default:
	}
	if left != nil {
		return fmt.Errorf("sidecar: the catalogue of revision %d: %w", w.Revision, left)
	}
	return nil
}

func (s *Sidecar) backend(service string) (dataplane.Backend, bool) {
	b, ok := (*s.backends.Load())[service]
	return b, ok
}

// Run opens the doors and keeps them as the world wants them until ctx is done; then
// it lets requests in flight finish for a bounded time.
func (s *Sidecar) Run(ctx context.Context) error {
	engine, stop := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = s.engine.Run(engine)
	}()
	defer func() { stop(); <-ended }() // after the doors have drained

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var doors sync.WaitGroup
	defer doors.Wait()
	if s.cfg.Inbound != "" {
		ln, err := daemon.Listen(s.cfg.Inbound)
		if err != nil {
			cancel(nil)
			return fmt.Errorf("sidecar: opening its mTLS door (sidecar.inbound): %w", err)
		}
		doors.Go(func() {
			if err := s.engine.ServeInbound(ctx, ln, s.backend); err != nil {
				cancel(fmt.Errorf("sidecar: %w", err))
			}
		})
	}

	open := map[outbound]context.CancelFunc{}
	var named *crowd // nil: no names
	if s.cfg.Names != nil {
		named = newCrowd(s.cfg.Names.Identify, s.outbound, s.closed, s.app, s.log, &doors)
	}
	for {
		select {
		case <-ctx.Done():
			for _, stop := range open {
				stop()
			}
			if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
				return err
			}
			return ctx.Err()
		case <-s.changed:
		}
		s.mu.Lock()
		wanted, callers, names := s.wanted, s.callers, s.doors
		s.mu.Unlock()
		if named != nil {
			named.follow(ctx, names, callers)
		}
		for door, stop := range open {
			if _, ok := wanted[door]; !ok {
				stop() // drains by itself; others are not touched
				delete(open, door)
			}
		}
		for door := range wanted {
			if _, ok := open[door]; ok {
				continue
			}
			own, stop := context.WithCancel(ctx)
			open[door] = stop
			doors.Go(func() { s.serveOutbound(own, door) })
		}
	}
}

// outbound is an entry's way into the mesh, and how its callers are attested.
func (s *Sidecar) outbound(entryID string, id spiffeid.ID) (*dataplane.Outbound, dataplane.Attest) {
	door := s.engine.Outbound(dataplane.Identity{ID: id, SVID: s.agent.SVIDs(entryID)})
	return door, s.attest(entryID, id, s.agent.AttestCaller)
}

// serveOutbound keeps one local door open. An address that is taken costs this workload
// its way out, and the agent is not ready; it is tried again.
func (s *Sidecar) serveOutbound(ctx context.Context, w outbound) {
	door, attest := s.outbound(w.entry, w.id)
	defer s.closed.set(w.address, nil)
	said := false
	for {
		ln, err := s.listenOutbound(w.address)
		if err == nil {
			s.closed.set(w.address, nil)
			s.log.Info("outbound listener open", "address", w.address, "caller", w.id.String())
			err = door.Serve(ctx, ln, attest)
			said = false
		}
		if ctx.Err() != nil {
			return
		}
		if !errors.Is(err, safepath.ErrUnsafe) { // then there is no such listener
			s.closed.set(w.address, err)
		}
		if !said {
			s.log.Error("outbound listener closed: this workload cannot call others; retrying", "address", w.address, "caller", w.id.String(), "error", err)
			said = true
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// listenOutbound listens on a loopback port or a socket. Everybody may connect to a socket:
// the process that does is attested. Nobody but root and the agent's user can put another
// one in its place.
func (s *Sidecar) listenOutbound(address string) (net.Listener, error) {
	if !filepath.IsAbs(address) {
		return daemon.Listen(address)
	}
	if err := daemon.MakeOpenDir(filepath.Dir(address)); err != nil {
		return nil, err
	}
	dir, err := safepath.OpenDir(filepath.Dir(address))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return daemon.ListenUnix(address, 0o777)
}
