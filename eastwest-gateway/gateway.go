// Package gateway is the east-west gateway: it ends mTLS of its own domain's
// sidecars and of other domains' gateways, decides, and begins mTLS again.
//
// It is an ordinary workload: its SVIDs and bundles come from a Workload API socket,
// what it knows of the domain from the CA's Sync stream. It serves on when either is
// gone (I12).
package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/internal/dataplane"
	"github.com/entente-mesh/entente/internal/dataplaneapi"
)

// Role is a listener that the gateway process carries besides its east-west door.
type Role struct {
	Name     string // "edge"
	Identity string // SPIFFE path it calls the mesh with
	Listen   string // where it listens, for people
	// Run serves until its ctx ends, then drains. It is called when there is an SVID for
	// Identity and the domain is known. mesh is an ordinary caller's way into the mesh.
	Run func(ctx context.Context, mesh *Mesh) error
}

// Mesh is a role's way into the mesh.
type Mesh struct {
	*dataplane.Outbound
	Files      *daemon.Files // of the process
	identities *identities
}

// Revoked says why a token whose signature was verified is not to be accepted although it
// is valid: a JWT-SVID of this domain whose agent was banned or evicted, whose entry is
// gone, or whose authority was revoked. Of other tokens the domain knows nothing.
func (m *Mesh) Revoked(subject, keyID string, claims map[string]any) error {
	check := m.identities.tokens.Load()
	id, err := spiffeid.FromString(subject)
	if err != nil || check == nil {
		return nil
	}
	return (*check)(id, keyID, claims)
}

// Gateway is one gateway process.
type Gateway struct {
	cfg        Config
	td         spiffeid.TrustDomain
	log        *slog.Logger
	roles      []Role
	identities *identities
	engine     *dataplane.Engine
	api        *dataplaneapi.Server
	remote     *dataplaneapi.Remote
	metrics    *daemon.Metrics
	files      *daemon.Files
	admin      *daemon.Admin   // nil: none
	records    *daemon.Records // nil: none
	socket     net.Listener    // of DataPlane; nil: none
	started    time.Time

	ca       atomic.Pointer[client.Client]          // nil until Run
	bindings atomic.Pointer[[]*statev1.RoleBinding] // nil: the domain is not known yet
	known    chan struct{}                          // closed with the first view
	draining atomic.Bool
	down     atomic.Pointer[error] // why a role does not run; nil: it does
}

// New prepares a gateway: its admin listener and access log are open, nothing else is.
func New(cfg Config, log *slog.Logger, roles ...Role) (*Gateway, error) {
	if err := cfg.check(); err != nil {
		return nil, fmt.Errorf("gateway: %w", err)
	}
	td, err := spiffeid.TrustDomainFromString(cfg.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("gateway: %w", err)
	}
	g := &Gateway{
		cfg:     cfg,
		td:      td,
		log:     log,
		roles:   roles,
		metrics: daemon.NewMetrics("gateway"),
		known:   make(chan struct{}),
		started: time.Now(),
	}
	g.files = daemon.NewFiles(g.metrics, log)
	g.identities = newIdentities(log, func() { g.engine.Recheck() })
	var access *slog.Logger
	if cfg.AccessLog.File != "" {
		if g.records, err = cfg.AccessLog.Open(g.metrics); err != nil {
			return nil, fmt.Errorf("gateway: %w", err)
		}
		access = g.records.Logger
	}
	g.api = dataplaneapi.New(g, log, access)
	g.remote = dataplaneapi.NewRemote(g.api, g)
	g.engine, err = dataplane.New(dataplane.Config{
		TrustDomain: td,
		Datacenter:  cfg.Datacenter,
		Process:     cfg.Name,
		Bundles:     g.identities,
		Log:         log,
		AccessLog:   access,
		Kind:        "gateway",
		Metrics:     g.metrics,

		Administration: g.remote,
	})
	if err != nil {
		return nil, fmt.Errorf("gateway: %w", err)
	}
	g.register()
	if cfg.Admin.Listen != "" {
		if g.admin, err = daemon.NewAdmin(cfg.Admin.Listen, g.Ready, g.metrics); err != nil {
			return nil, fmt.Errorf("gateway: opening admin.listen: %w", err)
		}
		g.admin.Warn(g.files.Warnings)
	}
	return g, g.openSocket()
}

// Metrics is the registry of this process.
func (g *Gateway) Metrics() *daemon.Metrics { return g.metrics }

// Ready says why the gateway cannot serve; nil if it can.
func (g *Gateway) Ready() error {
	if g.draining.Load() {
		return errors.New("draining: the process was asked to stop")
	}
	if drained := g.engine.Drained(); drained != nil {
		return fmt.Errorf("drained by an administrator (entente gateway undrain ends it): %s", cmp.Or(drained.Reason, "no reason given"))
	}
	for _, id := range g.needed() {
		if _, err := g.identities.of(id).GetX509SVID(); err != nil {
			return err
		}
	}
	for _, p := range g.files.Problems() {
		if p.None {
			return errors.New(p.String())
		}
	}
	if down := g.down.Load(); down != nil {
		return *down
	}
	return g.engine.Ready()
}

func (g *Gateway) own() (spiffeid.ID, error) {
	return spiffeid.FromSegments(g.td, "entente", "gateway", g.cfg.Name)
}

// needed are the identities without which the gateway does not serve.
func (g *Gateway) needed() []spiffeid.ID {
	var ids []spiffeid.ID
	if id, err := g.own(); err == nil && g.cfg.EastWest != nil {
		ids = append(ids, id)
	}
	for _, r := range g.roles {
		if id, err := spiffeid.FromPath(g.td, r.Identity); err == nil {
			ids = append(ids, id)
		}
	}
	return ids
}

// Run serves until ctx is done, then drains: doors close first, then what they need.
func (g *Gateway) Run(ctx context.Context) error {
	if g.records != nil {
		defer g.records.Close()
	}
	ids := g.needed()
	if len(ids) == 0 {
		return errors.New("gateway: nothing to serve: neither eastWest nor a role")
	}
	// The doors' ctx ends when we are asked to stop, or when a foundation fails.
	ctx, stopDoors := context.WithCancel(ctx)
	defer stopDoors()
	below, stopBelow := context.WithCancel(context.WithoutCancel(ctx))
	defer stopBelow()
	foundations := daemon.NewGroup(below)
	foundation := func(name string, task func(context.Context) error) {
		foundations.Go(name, func(ctx context.Context) error {
			defer stopDoors()
			return task(ctx)
		})
	}
	foundation("data plane", g.engine.Run)
	foundation("files", g.files.Run)
	foundation("workload API", func(ctx context.Context) error { return g.identities.run(ctx, g.cfg.WorkloadAPI.Socket) })
	foundation("sync", func(ctx context.Context) error { return g.sync(ctx, ids[0]) })
	if g.records != nil {
		foundation("access log", func(ctx context.Context) error { return g.records.Run(ctx, g.log) })
	}
	if g.admin != nil {
		foundation("admin", g.admin.Run)
	}
	if g.socket != nil {
		foundation("admin socket", func(ctx context.Context) error { return g.api.ServeLocal(ctx, g.socket) })
	}
	foundation("administrators", g.remote.Serve)

	doors := daemon.NewGroup(ctx)
	if id, err := g.own(); err == nil && g.cfg.EastWest != nil {
		doors.Go("east-west", func(ctx context.Context) error {
			if g.await(ctx, id) != nil {
				return ctx.Err()
			}
			ln, err := daemon.Listen(g.cfg.EastWest.Listen)
			if err != nil {
				return fmt.Errorf("opening eastWest.listen: %w", err)
			}
			g.log.Info("east-west door open", "address", ln.Addr().String(), "spiffe_id", id.String())
			return g.engine.ServeGateway(ctx, ln, dataplane.Identity{ID: id, SVID: g.identities.of(id)})
		})
	}
	for _, r := range g.roles {
		doors.Go(r.Name, func(ctx context.Context) error {
			id, err := spiffeid.FromPath(g.td, r.Identity)
			if err != nil {
				return fmt.Errorf("identity %q: %w", r.Identity, err)
			}
			if g.await(ctx, id) != nil {
				return ctx.Err()
			}
			return g.serveRole(ctx, r, &Mesh{g.engine.Edge(dataplane.Identity{ID: id, SVID: g.identities.of(id)}), g.files, g.identities})
		})
	}
	defer context.AfterFunc(ctx, func() { g.draining.Store(true) })()
	err := doors.Wait()
	stopBelow()
	return errors.Join(err, foundations.Wait())
}

// roleRetry is how long a role that could not start, or failed, waits before it tries again.
const roleRetry = 5 * time.Second

// serveRole runs a role until ctx ends. One that cannot run does not take the gateway with it:
// the other doors go on, and the gateway says that it is not ready.
func (g *Gateway) serveRole(ctx context.Context, r Role, mesh *Mesh) error {
	said := ""
	for {
		err := r.Run(ctx, mesh)
		if err == nil || ctx.Err() != nil {
			return err
		}
		if err = fmt.Errorf("%s does not run: %w", r.Name, err); err.Error() != said {
			said = err.Error()
			g.log.Error("a role of this gateway does not run; trying again, its other doors go on", "what", r.Name, "error", err)
		}
		g.down.Store(&err)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(roleRetry):
		}
		g.down.Store(nil)
	}
}

// await returns when id has an SVID and the domain is known.
func (g *Gateway) await(ctx context.Context, id spiffeid.ID) error {
	if err := g.identities.wait(ctx, id); err != nil {
		return err
	}
	select {
	case <-g.known:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// sync keeps the engine's view as the CA has it.
func (g *Gateway) sync(ctx context.Context, as spiffeid.ID) error {
	if err := g.identities.wait(ctx, as); err != nil {
		return err
	}
	kept, known, err := openAnchor(g.cfg.DataDir)
	if err != nil {
		return fmt.Errorf("gateway: %w", err)
	}
	recoveryKey := known.RecoveryKey
	if text := g.cfg.CA.RecoveryKey; text != "" {
		if recoveryKey, err = client.ParseRecoveryKey(text); err != nil {
			return fmt.Errorf("gateway: ca.recoveryKey: %w", err)
		}
	} else if g.cfg.DataDir == "" {
		g.log.Warn("neither ca.recoveryKey nor dataDir is set: after each restart this gateway believes the recovery key of the first CA node that answers")
	}
	ca, err := client.New(client.Config{
		TrustDomain: g.td,
		Cluster:     known.Cluster,
		Members:     known.Members,
		Confirmed:   known.Confirmed,
		RecoveryKey: recoveryKey,
		Addresses:   g.cfg.CA.Addresses,
		SVID:        g.identities.of(as),
		Bundles:     g.identities,
		Datacenter:  g.cfg.Datacenter,
		Log:         g.log,
	})
	if err != nil {
		return err
	}
	g.ca.Store(ca)
	follow := g.follow()
	return ca.Sync(ctx, func(v *client.View) error {
		if err := kept.keep(ca.Anchor()); err != nil {
			g.log.Warn("cannot keep whom this gateway believes as its CA", "error", err)
		}
		return follow(v)
	})
}

// follow makes the engine's view of what the CA says. Distrust is in force before anything
// is compiled, and an object that cannot be used costs only itself.
func (g *Gateway) follow() func(*client.View) error {
	var (
		tables  *catalog.Tables
		changed uint64 // when what they were compiled of last changed
		said    string // of what is left out
		urgent  uint64 // as of the last view
	)
	return func(v *client.View) error {
		if tables != nil && v.Changed == changed && v.Urgent == urgent {
			g.engine.SetEndpoints(v.Instances)
			return nil
		}
		urgent = v.Urgent
		distrusted, announced, tokens := v.Distrust.Check, v.Announced.Check, v.Distrust.CheckToken
		g.identities.tokens.Store(&tokens)
		g.identities.distrust.Store(&distrusted) // SetView looks at every connection again
		if g.identities.announced.Store(&announced); v.Announced == v.Distrust {
			g.identities.announced.Store(nil)
		}
		if tables == nil || v.Changed != changed {
			var err error
			tables, err = catalog.Usable(g.td, v.Objects, catalog.AllowLoopback(v.Cluster.GetDev()))
			changed = v.Changed
			if err == nil {
				said = ""
			} else if text := err.Error(); text != said {
				said = text
				g.log.Error("objects of the catalogue cannot be used and are left out; upgrade this gateway if it is older than the CA", "revision", v.Revision, "error", text)
			}
		}
		bindings := tables.RoleBindings()
		g.bindings.Store(&bindings) // SetView looks at administrators' connections, too
		g.engine.SetView(dataplane.View{Tables: tables, Endpoints: v.Instances})
		select {
		case <-g.known:
		default:
			close(g.known)
		}
		return nil
	}
}
