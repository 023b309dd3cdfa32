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
	"net"
	"net/netip"
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
)

// Config says where the sidecar stands.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Datacenter  string
	Agent       string // name of the agent, for access records
	Inbound     string // host:port of the mTLS door; empty: nothing is served here
	AppAddress  string // loopback IP of the outbound doors; empty: 127.0.0.1
	PortOffset  int    // added to the catalogue's ports of outbound doors, 0 to 40000

	Names *Names // nil: services are called through outbound ports only

	Log       *slog.Logger
	AccessLog *slog.Logger          // nil: none
	Metrics   prometheus.Registerer // nil: none
	Timing    dataplane.Timing
}

// Agent is what the sidecar needs of its agent. Its methods are called concurrently.
type Agent interface {
	SVIDs(entryID string) x509svid.Source                     // always the newest
	Bundles() x509bundle.Source                               // the own domain's only (I6)
	AttestTCP(conn net.Conn, entryID string) error            // the owner of a loopback connection satisfies the entry
	AttestListener(addr netip.AddrPort, entryID string) error // so does who listens there
}

// World is what the agent has been told by the CA. The sidecar does not change it.
type World struct {
	Revision  uint64            // of Objects and Entries
	Dev       bool              // the cluster's dev flag
	Objects   []*statev1.Object // the domain's catalogue
	Entries   []*statev1.Entry  // of this host
	Endpoints []catalog.Endpoint
	Local     map[string]Local // services of this host that listen, by label
}

// Local is a service as it runs on this host.
type Local struct {
	Address netip.AddrPort    // loopback, where the application listens
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

	mu       sync.Mutex
	revision uint64
	tables   *catalog.Tables
	wanted   map[string]outbound // by entry id
	callers  map[string]spiffeid.ID
	doors    map[netip.AddrPort]nameDoor
	changed  chan struct{} // capacity 1: wanted has changed
}

// outbound is one loopback door as it should be.
type outbound struct {
	id   spiffeid.ID
	port int
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
		Metrics:     cfg.Metrics,
		Timing:      cfg.Timing,
	})
	if err != nil {
		return nil, fmt.Errorf("sidecar: %w", err)
	}
	s := &Sidecar{cfg: cfg, agent: agent, log: cfg.Log, app: app, engine: engine, changed: make(chan struct{}, 1)}
	s.backends.Store(&map[string]dataplane.Backend{})
	return s, nil
}

// Ready says why the sidecar cannot serve yet; nil if it can.
func (s *Sidecar) Ready() error { return s.engine.Ready() }

// Update makes w the world. It returns when connections that w no longer admits are
// closed and new requests are decided by it; doors follow at once. It is also to be called
// when only bundles have changed. The error says which objects cannot be used and are left
// out; the rest of w is in force.
func (s *Sidecar) Update(w World) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var left error
	if s.tables == nil || w.Revision != s.revision {
		s.tables, left = catalog.Usable(s.cfg.TrustDomain, w.Objects, catalog.AllowLoopback(w.Dev))
		s.revision = w.Revision
	}
	backends := map[string]dataplane.Backend{}
	wanted := map[string]outbound{}
	callers := map[string]spiffeid.ID{}
	local := map[uint16]bool{}
	for _, entry := range w.Entries {
		id, err := spiffeid.FromPath(s.cfg.TrustDomain, entry.GetPath())
		if err != nil {
			continue // a CA derives no such entry
		}
		service, ok := s.tables.ServiceByID(id)
		if !ok || entry.GetRole() != statev1.Role_ROLE_UNSPECIFIED {
			continue // a gateway's
		}
		callers[entry.GetId()] = id
		if l, ok := w.Local[service.Label]; ok {
			local[l.Address.Port()] = true
			backends[service.Name] = dataplane.Backend{
				Identity: dataplane.Identity{ID: id, SVID: s.agent.SVIDs(entry.GetId())},
				Address:  l.Address.String(),
				Attest:   func() error { return s.agent.AttestListener(l.Address, entry.GetId()) },
				Monitor:  l.Monitor,
				Open:     l.Open,
			}
		}
		if service.OutboundPort != 0 {
			wanted[entry.GetId()] = outbound{id, int(service.OutboundPort) + s.cfg.PortOffset}
		}
	}
	s.backends.Store(&backends)
	s.wanted, s.callers = wanted, callers
	if s.cfg.Names != nil {
		s.doors = nameDoors(s.cfg.Names, s.tables, local)
	}
	s.engine.SetView(dataplane.View{Tables: s.tables, Endpoints: w.Endpoints})
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

	type door struct {
		outbound
		stop context.CancelFunc
	}
	open := map[string]door{}
	named := &crowd{sidecar: s, tasks: &doors, open: map[netip.AddrPort]openName{}, callers: map[string]*inbox{}}
	for {
		select {
		case <-ctx.Done():
			for _, d := range open {
				d.stop()
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
		if s.cfg.Names != nil {
			named.follow(ctx, names, callers)
		}
		for entry, d := range open {
			if w, ok := wanted[entry]; !ok || w != d.outbound {
				d.stop() // drains by itself; others are not touched
				delete(open, entry)
			}
		}
		for entry, w := range wanted {
			if _, ok := open[entry]; ok {
				continue
			}
			own, stop := context.WithCancel(ctx)
			open[entry] = door{w, stop}
			doors.Go(func() { s.serveOutbound(own, entry, w) })
		}
	}
}

// serveOutbound keeps one loopback door open. A port that is taken costs this workload
// its way out and nobody else's; it is tried again.
func (s *Sidecar) serveOutbound(ctx context.Context, entry string, w outbound) {
	address := net.JoinHostPort(s.app.String(), strconv.Itoa(w.port))
	door := s.engine.Outbound(dataplane.Identity{ID: w.id, SVID: s.agent.SVIDs(entry)})
	said := false
	for {
		ln, err := daemon.Listen(address)
		if err == nil {
			s.log.Info("outbound door open", "address", address, "caller", w.id.String())
			err = door.Serve(ctx, ln, func(c net.Conn) error { return s.agent.AttestTCP(c, entry) })
			said = false
		}
		if ctx.Err() != nil {
			return
		}
		if !said {
			s.log.Error("outbound door closed: this workload cannot call others; trying again", "address", address, "caller", w.id.String(), "error", err)
			said = true
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(200 * time.Millisecond):
		}
	}
}
