// Package node is the running CA node: it opens the keys and the replica, serves the
// doors and the bundle endpoint, drives its own authorities, and, while it leads, does
// what one node must do for all: tick, decide the ready gate, take in members, follow
// other domains' bundles.
package node

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/feed"
	"github.com/entente-mesh/entente/ca/nodeattest"
	"github.com/entente-mesh/entente/ca/replica"
	"github.com/entente-mesh/entente/ca/server"
	"github.com/entente-mesh/entente/ca/signer"
	"github.com/entente-mesh/entente/federation/exchange"
	"github.com/entente-mesh/entente/internal/daemon"
)

// Listeners are opened by the caller, or by New where they are nil.
type Listeners struct {
	Raft, API, Bundle, Admin, OIDC net.Listener

	// Between is for tests that have a node lie at its API address.
	Between server.Between
}

// Node is one CA node: its parts, each with what it owns (see DESIGN.md). Run may be called
// once.
type Node struct {
	*proposals
	registry  *daemon.Metrics
	listeners Listeners
	socket    net.Listener
	admin     *daemon.Admin

	auditing    auditing
	authorities *authorities
	svids       *svids
	statements  *statements
	gate        *gate
	isolation   *isolation
	following   *following
	hearing     *hearing
	leadership  *leadership
	watchdog    *watchdog
	comparisons *comparisons
	returning   *returning
	rechecks    *rechecks
	web         *web
	server      *server.Server
}

// New opens the node's keys, its replica and its listeners. The state that was agreed
// before is there on return. Run must be called, or Close.
func New(cfg *Config, log *slog.Logger, listeners Listeners) (_ *Node, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("start CA node %s: %w", cfg.Name, err)
		}
	}()
	if err := cfg.Complete(); err != nil {
		return nil, err
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	own, err := openIdentity(cfg, false)
	if err != nil {
		return nil, err
	}
	bans, err := openBans(cfg.DataDir, cfg.beforeWrite)
	if err != nil {
		return nil, err
	}
	n := newNode(cfg, log, listeners, own, bans)
	defer func() {
		if err != nil {
			n.Close()
		}
	}()
	if err := n.auditing.open(n.registry); err != nil {
		return nil, err
	}
	if err := n.authorities.load(); err != nil {
		return nil, err
	}
	attestors, err := cfg.Sections.Open(n.files)
	if err != nil {
		return nil, err
	}
	n.openDoors(attestors)
	if err := n.listen(); err != nil {
		return nil, err
	}
	if err := n.openReplica(); err != nil {
		return nil, err
	}
	n.registerMetrics()
	debug.FreeOSMemory() // of reading the state: it is not needed again soon
	return n, nil
}

// newNode puts the parts of a node together, in the order in which they need each other.
func newNode(cfg *Config, log *slog.Logger, listeners Listeners, own *identity, bans *bans) *Node {
	c := &core{cfg: cfg, td: cfg.trustDomain(), log: log.With("node", cfg.Name), own: own, bootID: newBootID(), started: time.Now(), ahead: cfg.clockError}
	news := feed.New(own.id, 0, 0)
	news.ReissueRate = cfg.ReissueRate.PerSecond
	registry := daemon.NewMetrics("ca")
	c.files = daemon.NewFiles(registry, c.log)
	n := &Node{proposals: &proposals{c, news}, registry: registry, listeners: listeners}
	n.auditing = auditing{core: c}
	n.authorities = &authorities{proposals: n.proposals, upstream: cfg.openUpstream()}
	if n.authorities.upstream != nil {
		n.authorities.upstreamFiles = cfg.followUpstream(c.files)
	}
	n.authorities.signer = signer.New(signer.Config{
		TrustDomain: c.td, Active: n.authorities.activeFor, Coming: n.authorities.coming, Clock: c.signerClock, Issuer: cfg.OIDC.Issuer, Waiting: cfg.Limits.Waiting,
		Signed: func(i signer.Issued) { c.audit.Issued(i, news.Revision()) },
	})
	n.svids = &svids{authorities: n.authorities}
	c.peers = server.NewPeers(n.certificate, c.isMember)
	n.statements = &statements{core: c}
	n.gate = &gate{proposals: n.proposals, svids: n.svids}
	n.gate.recall()
	n.following = &following{core: c, feed: news}
	n.comparisons = &comparisons{core: c, odd: make(chan uint64, 1)}
	n.returning = &returning{core: c, config: n.replicaConfig, restored: n.onRestore}
	n.leadership = &leadership{core: c, gate: n.gate, following: n.following, comparisons: n.comparisons, swapped: &n.returning.swapped}
	n.watchdog = &watchdog{c}
	n.rechecks = &rechecks{core: c, feed: news, due: make(chan struct{}, 1), changed: map[string]struct{}{}}
	n.isolation = &isolation{proposals: n.proposals, bans: bans, changed: make(chan struct{}, 1), recheck: n.rechecks.ask}
	n.web = &web{core: c, bundles: server.NewBundles(c.td)}
	return n
}

// ownActs is what the doors have this node do by itself.
type ownActs struct {
	*authorities
	isolation   *isolation
	certificate func() (*tls.Certificate, error)
}

func (o ownActs) Certificate() (*tls.Certificate, error) { return o.certificate() }
func (o ownActs) Isolated() []server.Isolation           { return o.isolation.Isolated() }
func (o ownActs) Isolate(name, reason, who string) (server.Isolation, error) {
	return o.isolation.Isolate(name, reason, who)
}

// openDoors makes the doors, closed.
func (n *Node) openDoors(attestors nodeattest.Attestors) {
	cfg := n.cfg
	n.server = server.New(server.Config{
		NodeID:      n.own.id,
		TrustDomain: n.td,
		State:       n,
		Cluster:     n,
		Gatekeeper:  n.gate,
		Follower:    n.following,
		Own:         ownActs{n.authorities, n.isolation, n.certificate},
		Feed:        n.feed,
		Signer:      n.authorities.signer,
		Bundles:     n.web.bundles,
		Audit:       n.audit,
		Statements:  n.statements,
		Between:     n.listeners.Between,
		Attestors:   attestors,
		Limits: server.Limits{
			X509PerAgent: cfg.Limits.X509PerAgent.PerSecond, TokensPerAgent: cfg.Limits.TokensPerAgent.PerSecond, TokensPerEntry: cfg.Limits.TokensPerEntry.PerSecond,
			PerNode: cfg.Limits.PerNode.PerSecond, Attests: cfg.Limits.Attests, AttestsPerSource: cfg.Limits.AttestsPerSource.PerSecond,
		},
		Log:        n.log,
		Registerer: n.registry,
	})
	n.rechecks.server = n.server
	n.hearing = &hearing{core: n.core, feed: n.feed, gate: n.gate, server: n.server}
}

// openReplica opens the replica and derives everything from its state.
func (n *Node) openReplica() error {
	rcfg := n.replicaConfig()
	rcfg.Listener = n.listeners.Raft
	r, err := replica.Open(rcfg)
	if err != nil {
		return err
	}
	n.listeners.Raft = nil // the replica's now
	n.replica.Store(r)
	n.onRestore()
	n.isolation.enforce()
	r.Read(func(st *domain.State) {
		if cluster := st.Cluster(); cluster != nil && cluster.GetTrustDomain() != n.td.Name() {
			err = fmt.Errorf("%s holds a CA node of %s, the configuration says %s", n.cfg.DataDir, cluster.GetTrustDomain(), n.cfg.TrustDomain)
		}
		if level := st.FeatureLevel(); level > domain.FeatureLevel {
			err = fmt.Errorf("the cluster is at feature level %d, this release knows %d: install the release of the other CA nodes", level, domain.FeatureLevel)
		}
		n.gate.hadAgents = st.AgentCount() > 0
	})
	return err
}

// listen opens what the caller did not give.
func (n *Node) listen() (err error) {
	open := func(listener *net.Listener, address string) {
		if err == nil && *listener == nil && address != "" {
			*listener, err = daemon.Listen(address)
		}
	}
	open(&n.listeners.Raft, n.cfg.Listen.Raft)
	open(&n.listeners.API, n.cfg.Listen.API)
	open(&n.listeners.Bundle, n.cfg.Listen.Bundle)
	open(&n.listeners.OIDC, n.cfg.OIDC.Listen)
	if err != nil {
		return err
	}
	if n.cfg.Listen.Admin != "" {
		if n.admin, err = daemon.NewAdmin(n.cfg.Listen.Admin, n.Ready, n.registry); err != nil {
			return err
		}
		n.admin.Warn(n.files.Warnings)
	}
	n.socket, err = daemon.ListenUnix(n.cfg.Socket, 0o600)
	return err
}

// Close gives up a node that was not run.
func (n *Node) Close() error {
	var errs []error
	for _, c := range []io.Closer{n.listeners.Raft, n.listeners.API, n.listeners.Bundle, n.listeners.OIDC, n.socket, n.peers} {
		if c != nil {
			errs = append(errs, c.Close())
		}
	}
	if n.auditing.file != nil {
		errs = append(errs, n.auditing.file.Close())
	}
	errs = append(errs, n.isolation.bans.Close())
	if r := n.replica.Load(); r != nil {
		errs = append(errs, r.Close())
	}
	return errors.Join(errs...)
}

// Run serves until ctx ends, then stops in this order: what this node does as leader
// and for itself; the doors, whose streams are sent elsewhere first; the connections to
// other members; and last the replica, which hands leadership over. It returns nil
// then, else why the node cannot go on.
func (n *Node) Run(ctx context.Context) error {
	core, stopCore := context.WithCancel(context.WithoutCancel(ctx))
	defer stopCore()
	ended := make(chan error, 1)
	go func() { ended <- n.returning.run(core) }()

	group := daemon.NewGroup(ctx)
	group.Go("api", func(ctx context.Context) error { return n.server.ServeAPI(ctx, n.listeners.API) })
	group.Go("connections", n.server.Run)
	group.Go("admin socket", func(ctx context.Context) error { return n.server.ServeAdmin(ctx, n.socket) })
	if n.admin != nil {
		group.Go("admin", n.admin.Run)
	}
	if n.listeners.Bundle != nil {
		group.Go("bundle endpoint", func(ctx context.Context) error {
			return exchange.Serve(ctx, n.listeners.Bundle, n.svids, n.web.bundleHandler())
		})
	}
	if n.listeners.OIDC != nil {
		group.Go("OIDC", func(ctx context.Context) error { return n.web.serveOIDC(ctx, n.listeners.OIDC) })
	}
	group.Go("own SVIDs", n.svids.run)
	group.Go("authorities", n.authorities.run)
	group.Go("leadership", n.leadership.run)
	group.Go("presence", n.hearing.run)
	group.Go("reports", n.gate.runReports)
	group.Go("subscribers", n.gate.runRoll)
	group.Go("rechecks", n.rechecks.run)
	group.Go("bans", n.isolation.run)
	group.Go("other domains' bundles", n.following.run)
	group.Go("other domains' dropped keys", n.following.watchDropped)
	group.Go("files", n.files.Run)
	if n.authorities.upstream != nil {
		group.Go("upstream", n.authorities.watchUpstream)
	}
	if n.auditing.file != nil {
		group.Go("audit log", func(ctx context.Context) error { return n.auditing.file.Run(ctx, n.log) })
	}
	if n.audit != nil {
		group.Go("audit counts", n.audit.Run)
	}
	group.Go("comparisons", n.comparisons.run)
	group.Go("statements", n.statements.run)
	group.Go("progress", n.watchdog.run)
	group.Go("replica", func(ctx context.Context) error {
		select {
		case err := <-ended:
			if ended <- err; err == nil {
				err = errors.New("the replica ended")
			}
			return err
		case <-ctx.Done():
			return nil
		}
	})
	n.log.Info("CA node runs", "trust_domain", n.td.Name(), "node_id", n.own.id, "address", n.listeners.API.Addr().String(), "dev", n.cfg.Keys.InsecureDev)
	if n.cfg.Keys.InsecureDev {
		n.log.Warn("this CA is for development only: its keys lie unsealed in the data directory (keys.insecureDev)")
	}
	err := group.Wait()
	closeErr := n.peers.Close()
	stopCore()
	if coreErr := <-ended; coreErr != nil && err == nil {
		err = coreErr
	}
	if err == nil {
		err = closeErr
	}
	n.audit.Flush()
	if n.auditing.file != nil {
		n.auditing.file.Close()
	}
	n.isolation.bans.Close()
	n.log.Info("CA node stopped")
	return err
}

// Metrics is the registry of this process.
func (n *Node) Metrics() *daemon.Metrics { return n.registry }

// Ready is nil when agents can be served: this node signs.
func (n *Node) Ready() error {
	if n.replica.Load() == nil {
		return errors.New("the replica is not open yet")
	}
	if n.witness() {
		// It serves nobody but the agreement.
		if err := n.replica.Load().Err(); err != nil {
			return err
		}
		if since := n.noQuorumSince(time.Now()); !since.IsZero() {
			return fmt.Errorf("no quorum since %s", since.UTC().Format(time.RFC3339))
		}
		return nil
	}
	if err := n.authorities.signer.Ready(statev1.KeyUse_KEY_USE_X509); err != nil {
		return err
	}
	if _, err := n.svids.GetX509SVID(); err != nil {
		return err
	}
	return nil
}

// ID is the node id: the hex SHA-256 of the node key's SPKI.
func (n *Node) ID() string { return n.own.id }

// AdminAddr is the address of /healthz, /readyz and /metrics; empty if not served.
func (n *Node) AdminAddr() string {
	if n.admin == nil {
		return ""
	}
	return n.admin.Addr()
}

// onApply is called by the replica for each log entry, in order.
func (n *Node) onApply(outcome domain.Outcome) {
	n.feed.Publish(outcome)
	r := n.replica.Load()
	if r == nil {
		return // New calls onRestore when the replica is there
	}
	r.Read(func(st *domain.State) { n.clock.applied(st.Now()) })
	if outcome.Checked != 0 {
		n.comparisons.compared.Store(outcome.Checked)
	}
	if outcome.Diverged {
		select {
		case n.comparisons.odd <- outcome.Checked:
		default: // one is being looked into
		}
	}
	recheck, of := false, []string(nil)
	for _, change := range outcome.Changes {
		switch change.Kind {
		case domain.ChangeOwnBundle:
			n.updateBundle(r)
			recheck = true
		case domain.ChangeAgent:
			signal(n.isolation.changed)
			of = append(of, change.Key)
		case domain.ChangeEntry:
			of = append(of, change.Key)
		case domain.ChangeMembers, domain.ChangeDistrust: // an item may be about several, or stand for several others
			recheck = true
		case domain.ChangeObject:
			if strings.HasPrefix(change.Key, "Relationship/") {
				r.Read(n.web.readWIT)
			}
		}
	}
	switch {
	case recheck:
		n.rechecks.ask()
	case len(of) > 0:
		n.rechecks.askOf(of)
	}
	n.applied.tell()
}

// onRestore derives everything from the state anew.
func (n *Node) onRestore() {
	r := n.replica.Load()
	if r == nil {
		return
	}
	r.Read(func(st *domain.State) {
		n.feed.Reset(st.Revision())
		n.clock.restored(st.Now())
		n.web.readWIT(st)
	})
	n.updateBundle(r)
	n.rechecks.ask()
	signal(n.isolation.changed)
	n.applied.tell()
}

func (n *Node) updateBundle(r *replica.Replica) {
	var own *server.OwnKeys
	r.Read(func(st *domain.State) {
		if st.Cluster() != nil {
			own = server.ReadOwnKeys(st)
		}
	})
	if own == nil {
		return
	}
	if err := n.web.bundles.Update(own); err != nil {
		n.log.Error("the own bundle cannot be written: other processes keep the one before", "error", err)
	}
}

// certificate is what this node shows to everybody: its SVID, whose key is the node
// key, so that whoever pins the key or verifies the name accepts it; before there is
// one, the bare node certificate.
func (n *Node) certificate() (*tls.Certificate, error) {
	if cert := n.svids.node(); cert != nil {
		return cert, nil
	}
	return &n.own.cert, nil
}

// Info is what the status shows beside the agreed state.
func (n *Node) Info() server.Info {
	r := n.replica.Load()
	now, stats := time.Now(), r.Stats()
	info := server.Info{
		NoQuorumSince: n.noQuorumSince(now),
		NotAgreeing:   n.notAgreeing(now),
		Disk:          n.disk(),
		ClockProblem:  n.clockProblem(),
		Applied:       stats.Applied,
		Last:          stats.LastIndex,
		LogBytes:      stats.LogBytes,

		LeaderID:  r.Leader(),
		RaftState: r.State(),
		Age:       r.Age(),
		Voters:    make(map[string]bool),
		Foreign:   n.following.status.all(),
		Upstream:  n.authorities.upstreamStatus(now),
		Audit:     n.auditing.status(),
	}
	for _, p := range n.files.Problems() {
		info.Files = append(info.Files, server.File{What: p.What, Paths: p.Files, Why: p.Why, Since: p.Since, None: p.None})
	}
	for _, member := range r.Servers() {
		info.Voters[member.ID] = member.Voter
	}
	info.ClockOffset, info.ClockKnown = n.clock.offset()
	info.ClockOffset += n.clockError()
	return info
}

func (n *Node) registerMetrics() {
	gauge := func(name, help string, value func() float64) {
		n.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value))
	}
	gauge("entente_ca_leader", "1 while this node leads its cluster.", func() float64 {
		if n.IsLeader() {
			return 1
		}
		return 0
	})
	gauge("entente_ca_compared_index", "Log entry at which this node's state was last compared with the leader's.", func() float64 {
		return float64(n.comparisons.compared.Load())
	})
	gauge("entente_ca_signing", "1 while this node can sign.", func() float64 {
		if n.authorities.signer.Ready(statev1.KeyUse_KEY_USE_X509) == nil {
			return 1
		}
		return 0
	})
	gauge("entente_ca_state_age_seconds", "How old this node's state may be; -1: unknown.", func() float64 {
		age := n.replica.Load().Age()
		if age > 1000*time.Hour {
			return -1
		}
		return age.Seconds()
	})
	gauge("entente_ca_quorum", "1 while something was agreed a moment ago, as far as this node knows.", func() float64 {
		if n.noQuorumSince(time.Now()).IsZero() {
			return 1
		}
		return 0
	})
	gauge("entente_ca_disk_ok", "1 while the disk under the log works.", func() float64 {
		if n.disk() == "" {
			return 1
		}
		return 0
	})
	gauge("entente_ca_clock_offset_seconds", "This node's clock minus the agreed time when that last moved on.", func() float64 {
		offset, _ := n.clock.offset()
		return offset.Seconds()
	})
	gauge("entente_ca_signs_without_quorum_seconds", "How long this node goes on signing if nothing can be agreed any more.", func() float64 {
		return n.authorities.autonomy(time.Now()).Seconds()
	})
	gauge("entente_ca_proposals_waiting", "Changes that wait at this node, the leader, to be agreed; 4096 at most.", func() float64 {
		return float64(n.replica.Load().Stats().Waiting)
	})
	gauge("entente_ca_raft_connections", "Open connections to and from other CA nodes for the agreement.", func() float64 {
		return float64(n.replica.Load().Stats().Connections)
	})
	gauge("entente_ca_isolated_agents", "Agents that this node alone shuts out, until that can be agreed.", func() float64 {
		return float64(len(n.isolation.Isolated()))
	})
	gauge("entente_ca_rotations_overdue", "At the leader: authorities that should be in use by now and are not held by everybody.", func() float64 {
		if !n.IsLeader() {
			return 0
		}
		return float64(n.gate.overdue.Load())
	})
	gauge("entente_ca_authorities_offline", "Authorities that this node took into use without quorum.", func() float64 {
		return float64(n.local.view().Offline())
	})
	if n.authorities.upstream != nil {
		gauge("entente_ca_upstream_certifies_seconds", "How long the upstream goes on certifying authorities; 0: not any more, or it cannot be used.", func() float64 {
			return n.authorities.upstreamCertifies(time.Now()).Seconds()
		})
	}
	gauge("entente_ca_subscribers", "Sync streams at this node.", func() float64 {
		return float64(n.gate.Subscribers().Subscribers)
	})
	n.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "entente_ca_subscribers_overtaken_total", Help: "Subscribers that were so slow that they were sent everything anew in the place of what they missed.",
	}, func() float64 { return float64(n.feed.Overtaken()) }))
	gauge("entente_ca_applied_revision", "Revision of this node's state.", func() float64 {
		var revision uint64
		n.Read(func(st *domain.State) { revision = st.Revision() })
		return float64(revision)
	})
}

// broadcast wakes everybody who waits. The zero value is ready to use.
type broadcast struct {
	mu sync.Mutex
	ch chan struct{}
}

// wait returns a channel that is closed at the next tell.
func (b *broadcast) wait() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch == nil {
		b.ch = make(chan struct{})
	}
	return b.ch
}

func (b *broadcast) tell() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch != nil {
		close(b.ch)
		b.ch = nil
	}
}

func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// replicaConfig is all but the listener.
func (n *Node) replicaConfig() replica.Config {
	cfg := n.cfg.replica(n.own)
	cfg.Log = n.log
	cfg.OnApply = n.onApply
	cfg.OnRestore = n.onRestore
	cfg.Vouch = n.vouch
	cfg.Wall = n.wall
	cfg.BeforeWrite = n.cfg.beforeWrite
	cfg.HoldBack = n.cfg.holdBack
	return cfg
}
