// Package meshagent is the agent of one host: it attests to its trust domain's
// CA, keeps its own SVID and one SVID for every entry of its host renewed, holds
// the bundles, watches the health of the host's services, and tells who is at the
// other end of a local connection.
//
// It opens no door to workloads itself. Doors (workloadapi, sidecar) read its
// State and are handed to Run, which starts and stops them. When no CA node can
// be reached the last state stays in use and renewal is tried again (I12).
package meshagent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/meshagent/services"
	"github.com/entente-mesh/entente/meshagent/workloadattest"
)

// Agent is the running agent: its parts, which own what they keep, and what other packages
// use of them. Its methods may be called concurrently.
type Agent struct {
	*store        // the state, and who was given it
	*workloads    // who is at the other end of a local connection
	*hostServices // the services of this host
	*jwts         // tokens for workloads

	cfg     *Config
	metrics *daemon.Metrics
	client  *client.Client

	own      *ownIdentity // the agent's SVID
	entries  *renewer     // those of the host's entries
	follower *follower
	cache    *cache // nil: none

	doors atomic.Pointer[[]Door] // set by Run
}

// signer has SVIDs signed: one result for each request, in their order.
type signer interface {
	SignX509(ctx context.Context, requests []client.SignRequest) []client.SignResult
	SignJWT(ctx context.Context, requests []client.JWTRequest) []client.TokenResult
	SignWIT(ctx context.Context, requests []client.WITRequest) []client.TokenResult
}

// New opens the data directory, makes the agent's key when there is none, and
// takes up what the agent knew when it last ran. Nothing is dialled yet. log may be nil.
func New(cfg *Config, log *slog.Logger) (*Agent, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	attestor := workloadattest.New(cfg.WorkloadAttestation.options()...)
	if gap := attestor.Gap(); gap != "" {
		log.Warn("workload attestation is limited by the kernel", "reason", gap)
	}
	credentials, err := openCredentials(cfg, log)
	if err != nil {
		return nil, err
	}
	initial, err := credentials.initial(log)
	if err != nil {
		return nil, err
	}
	var store *store // there before the registry's Run and methods, which tell of changes
	registry := services.Open(cfg.Services, cfg.ServicesDir, cfg.DataDir, log, func() { store.touch() })
	store = newStore(initial, newPlaces(cfg, registry), cfg.Settle)

	withSVID := credentials.clientConfig(store.Bundles(), log)
	withSVID.SVID = ownSVID{store}
	withSVID.AcknowledgeLater = true
	ca, err := client.New(withSVID)
	if err != nil {
		return nil, err
	}
	store.deliveries.acknowledge, store.deliveries.hold = ca.Acknowledge, ca.Hold

	a := &Agent{store: store, cfg: cfg, metrics: daemon.NewMetrics("agent"), client: ca}
	counters := newMetrics(a.metrics, store, ca, registry)
	a.workloads = &workloads{store: store, attestor: attestor}
	a.hostServices = newHostServices(cfg, log, store, registry, a.workloads, ca.Report)
	a.jwts = newJWTs(log, store, ca, counters)
	a.own = &ownIdentity{credentials: credentials, log: log, now: time.Now, store: store, client: ca, signer: ca, failures: counters.failures}
	a.entries = &renewer{log: log, now: time.Now, store: store, signer: ca, metrics: counters}
	a.follower = &follower{domain: cfg.Domain(), name: cfg.Name, log: log, store: store, client: ca, memory: credentials.memory}
	if a.cache, err = openCache(cfg, log, store, ca); err != nil {
		return nil, err
	}
	if a.cache != nil && credentials.admitted() {
		if err := a.cache.recall(a.follower.apply); err != nil {
			log.Warn("cannot take up what the agent held before; it serves when a CA node has answered", "error", err)
		}
	}
	return a, nil
}

// Door is something that serves from the agent's state until its ctx ends.
type Door struct {
	Name  string
	Run   func(ctx context.Context) error
	Ready func() error // says why it does not serve, nil if it does; nil: it always does
}

// Run serves until ctx ends, which is no failure, or until something fails. The
// doors are started first and in order: State tells them whether the agent is
// ready.
//
// On the way out the host's instances are withdrawn first, so that nobody sends
// new requests here; then the doors are stopped, the last one first, each when
// the one before has ended; then the stream to the CA; the admin listener last.
func (a *Agent) Run(ctx context.Context, doors ...Door) error {
	ctx, fail := context.WithCancel(ctx)
	defer fail()
	a.doors.Store(&doors)

	var running []*task
	start := func(name string, run func(context.Context) error) {
		running = append(running, startTask(context.WithoutCancel(ctx), name, run, fail))
	}
	if a.cfg.Admin.Listen != "" {
		admin, err := daemon.NewAdmin(a.cfg.Admin.Listen, a.Ready, a.metrics)
		if err != nil {
			return err
		}
		start("admin listener", admin.Run)
	}
	start("agent", a.work)
	for _, door := range doors {
		start(door.Name, door.Run)
	}

	<-ctx.Done()
	a.withdraw()
	defer a.deliveries.stop()
	var errs []error
	for _, t := range slices.Backward(running) {
		errs = append(errs, t.stop())
	}
	return errors.Join(errs...)
}

// task is a running part of the agent.
type task struct {
	cancel context.CancelFunc
	done   chan struct{}
	err    error // set before done is closed
}

// startTask calls failed when the task ends without having been asked to.
func startTask(ctx context.Context, name string, run func(context.Context) error, failed func()) *task {
	ctx, cancel := context.WithCancel(ctx)
	t := &task{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(t.done)
		err := run(ctx)
		if ctx.Err() != nil && (err == nil || errors.Is(err, context.Canceled)) {
			return // it was asked to end
		}
		if err == nil {
			err = errors.New("it ended on its own")
		}
		t.err = fmt.Errorf("%s: %w", name, err)
		failed()
	}()
	return t
}

func (t *task) stop() error {
	t.cancel()
	<-t.done
	return t.err
}

// work is the agent's own part: each of its owners, until one fails.
func (a *Agent) work(ctx context.Context) error {
	group := daemon.NewGroup(ctx)
	identified := make(chan struct{})
	group.Go("own SVID", func(ctx context.Context) error { return a.own.run(ctx, identified) })
	group.Go("sync", func(ctx context.Context) error {
		select {
		case <-identified:
			return a.follower.run(ctx)
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	group.Go("SVIDs", func(ctx context.Context) error { return a.entries.run(ctx, a.cfg.WorkloadAPI.WIT) })
	group.Go("JWT-SVIDs", a.jwts.run)
	if a.cache != nil {
		group.Go("cache", a.cache.run)
	}
	if a.cfg.Sidecar.Inbound != "" {
		group.Go("services", a.hostServices.run)
	}
	return group.Wait()
}

// Ready says what the agent still lacks to serve, nil if nothing.
func (a *Agent) Ready() error {
	if err := a.State().lacking(); err != nil {
		return err
	}
	if doors := a.doors.Load(); doors != nil {
		for _, door := range *doors {
			if door.Ready == nil {
				continue
			}
			if err := door.Ready(); err != nil {
				return fmt.Errorf("%s: %w", door.Name, err)
			}
		}
	}
	return nil
}

// Comparison is what comparing the CA nodes came to.
func (a *Agent) Comparison() client.Comparison { return a.client.Comparison() }

// Follows is the CA node of the present session; empty: there is none.
func (a *Agent) Follows() (node, address string) { return a.client.Follows() }

// Metrics is the registry of this process.
func (a *Agent) Metrics() *daemon.Metrics { return a.metrics }

// Config is what the agent was made with. Do not change it.
func (a *Agent) Config() *Config { return a.cfg }
