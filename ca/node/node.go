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
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/feed"
	"github.com/entente-mesh/entente/ca/replica"
	"github.com/entente-mesh/entente/ca/rotation"
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

// Node is one CA node. Run may be called once.
type Node struct {
	cfg    *Config
	td     spiffeid.TrustDomain
	log    *slog.Logger
	own    *identity
	bootID string

	listeners Listeners
	socket    net.Listener
	admin     *daemon.Admin

	upstream upstream // nil: authorities sign themselves
	replica  atomic.Pointer[replica.Replica]
	feed     *feed.Feed
	signer   *signer.Signer
	bundles  *server.Bundles
	server   *server.Server
	peers    *server.Peers

	statements *statements
	clock      clock
	svids      *svids
	gate       gate
	ledTerm    atomic.Uint64 // term of which this node, as its leader, has applied all before
	offline    offline
	overdue    atomic.Int64 // authorities that the leader waits for longer than a phase
	foreign    foreignStatus
	wit        atomic.Bool // a relationship asks for WIT keys
	registry   *daemon.Metrics
	bans       *bans
	audit      *server.Audit
	auditLog   *daemon.LogFile // nil: not to a file
	// auditShares: it is on the file system of the replicated log.
	auditShares bool

	started   time.Time
	hadAgents bool // the state knew agents when this process started
	applied   broadcast
	recheck   chan struct{}

	agentsChanged chan struct{}
	bansRefused   string // of runBans alone

	preparing sync.Mutex  // one authority at a time
	swapped   broadcast   // another replica took the place of a failed one
	odd       chan uint64 // indexes at which this node's state was not the leader's
	compared  atomic.Uint64
}

// settleTime is how long the subscribers of a node that restarted are given to come
// back before its word counts for the ready gate. They reconnect within a second.
const settleTime = 5 * time.Second

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
	n := &Node{
		cfg:       cfg,
		td:        cfg.trustDomain(),
		log:       log.With("node", cfg.Name),
		own:       own,
		bootID:    newBootID(),
		upstream:  cfg.openUpstream(),
		listeners: listeners,
		feed:      feed.New(own.id, 0, 0),
		registry:  daemon.NewMetrics("ca"),
		started:   time.Now(),
		recheck:   make(chan struct{}, 1),

		agentsChanged: make(chan struct{}, 1),

		odd: make(chan uint64, 1),
	}
	if n.bans, err = openBans(cfg.DataDir, cfg.beforeWrite); err != nil {
		return nil, err
	}
	n.feed.ReissueRate = cfg.ReissueRate.PerSecond
	n.recallSubscribers()
	n.bundles = server.NewBundles(n.td)
	if err := n.openAudit(); err != nil {
		return nil, err
	}
	n.signer = signer.New(signer.Config{TrustDomain: n.td, Active: n.activeFor, Coming: n.coming, Clock: n.signerClock, Issuer: cfg.OIDC.Issuer, Waiting: cfg.Limits.Waiting, Signed: func(i signer.Issued) {
		n.audit.Issued(i, n.feed.Revision())
	}})
	if err := n.loadAuthorityKeys(); err != nil {
		return nil, err
	}
	x509pop, err := cfg.X509PoP.open()
	if err != nil {
		return nil, err
	}
	n.svids, n.statements = newSVIDs(n), &statements{node: n}
	n.peers = server.NewPeers(n.certificate, n.isMember)
	n.server = server.New(server.Config{
		NodeID:      own.id,
		TrustDomain: n.td,
		State:       n,
		Cluster:     n,
		Leader:      leaderProposer{n},
		Feed:        n.feed,
		Signer:      n.signer,
		Bundles:     n.bundles,
		Certificate: n.certificate,
		Info:        n.info,
		Knows:       n.knows,
		Reported:    n.gate.reported,
		Gate:        n.askGate,
		LocalGate:   n.localGate,
		MarkReady:   n.markExcluding,
		Exclude:     n.askMarkExcluding,

		SignStatement: n.signStatement,
		Offline:       n.activateOffline,
		IsOffline:     n.offline.has,
		Prepare:       n.prepareNow,
		Audit:         n.audit,
		Nodes:         n.nodes,
		Supersede:     n.supersede,
		Isolate:       n.isolate,
		Isolated:      n.isolations,
		Subscribers:   n.status,
		Statements:    n.statements,
		Between:       listeners.Between,
		X509PoP:       x509pop,
		Limits: server.Limits{
			X509PerAgent: cfg.Limits.X509PerAgent.PerSecond, TokensPerAgent: cfg.Limits.TokensPerAgent.PerSecond, TokensPerEntry: cfg.Limits.TokensPerEntry.PerSecond,
			PerNode: cfg.Limits.PerNode.PerSecond, Attests: cfg.Limits.Attests, AttestsPerSource: cfg.Limits.AttestsPerSource.PerSecond,
		},
		Log:        n.log,
		Registerer: n.registry,
	})
	defer func() {
		if err != nil {
			n.Close()
		}
	}()
	if err := n.listen(); err != nil {
		return nil, err
	}
	rcfg := n.replicaConfig()
	rcfg.Listener = n.listeners.Raft
	r, err := replica.Open(rcfg)
	if err != nil {
		return nil, err
	}
	n.listeners.Raft = nil // the replica's now
	n.replica.Store(r)
	n.onRestore()
	n.enforceIsolations()
	r.Read(func(st *domain.State) {
		if cluster := st.Cluster(); cluster != nil && cluster.GetTrustDomain() != n.td.Name() {
			err = fmt.Errorf("%s holds a CA node of %s, the configuration says %s", cfg.DataDir, cluster.GetTrustDomain(), cfg.TrustDomain)
		}
		if level := st.FeatureLevel(); level > domain.FeatureLevel {
			err = fmt.Errorf("the cluster is at feature level %d, this release knows %d: install the release of the other CA nodes", level, domain.FeatureLevel)
		}
		n.hadAgents = st.AgentCount() > 0
	})
	if err != nil {
		return nil, err
	}
	n.registerMetrics()
	debug.FreeOSMemory() // of reading the state: it is not needed again soon
	return n, nil
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
	if n.auditLog != nil {
		errs = append(errs, n.auditLog.Close())
	}
	errs = append(errs, n.bans.Close())
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
	go func() { ended <- n.runReplica(core) }()

	group := daemon.NewGroup(ctx)
	group.Go("api", func(ctx context.Context) error { return n.server.ServeAPI(ctx, n.listeners.API) })
	group.Go("connections", n.server.Run)
	group.Go("admin socket", func(ctx context.Context) error { return n.server.ServeAdmin(ctx, n.socket) })
	if n.admin != nil {
		group.Go("admin", n.admin.Run)
	}
	if n.listeners.Bundle != nil {
		group.Go("bundle endpoint", func(ctx context.Context) error {
			return exchange.Serve(ctx, n.listeners.Bundle, n.svids, n.bundleHandler())
		})
	}
	if n.listeners.OIDC != nil {
		group.Go("OIDC", n.serveOIDC)
	}
	group.Go("own SVIDs", n.svids.run)
	group.Go("authorities", n.runAuthorities)
	group.Go("leadership", n.runLeadership)
	group.Go("presence", n.runPresence)
	group.Go("reports", n.runReports)
	group.Go("subscribers", n.runSubscribers)
	group.Go("rechecks", n.runRechecks)
	group.Go("bans", n.runBans)
	group.Go("other domains' bundles", n.runForeign)
	group.Go("other domains' dropped keys", n.watchDropped)
	if n.upstream != nil {
		group.Go("upstream", n.watchUpstream)
	}
	if n.auditLog != nil {
		group.Go("audit log", func(ctx context.Context) error { return n.auditLog.Run(ctx, n.log) })
	}
	if n.audit != nil {
		group.Go("audit counts", n.audit.Run)
	}
	group.Go("comparisons", n.runComparisons)
	group.Go("statements", n.statements.run)
	group.Go("progress", n.runProgress)
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
	if n.auditLog != nil {
		n.auditLog.Close()
	}
	n.bans.Close()
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
	if err := n.signer.Ready(statev1.KeyUse_KEY_USE_X509); err != nil {
		return err
	}
	if _, err := n.svids.GetX509SVID(); err != nil {
		return err
	}
	return nil
}

// witness: this member votes and does not sign.
func (n *Node) witness() (is bool) {
	n.Read(func(st *domain.State) {
		m, ok := st.Member(n.own.id)
		is = ok && !m.GetSigning()
	})
	return is
}

// ID is the node id: the hex SHA-256 of the node key's SPKI.
func (n *Node) ID() string { return n.own.id }

// IsLeader says whether this node leads as far as it knows.
func (n *Node) IsLeader() bool { return n.replica.Load().IsLeader() }

// AdminAddr is the address of /healthz, /readyz and /metrics; empty if not served.
func (n *Node) AdminAddr() string {
	if n.admin == nil {
		return ""
	}
	return n.admin.Addr()
}

// Read calls f with the agreed state, under its read lock.
func (n *Node) Read(f func(*domain.State)) { n.replica.Load().Read(f) }

// onApply is called by the replica for each log entry, in order.
func (n *Node) onApply(outcome domain.Outcome) {
	n.feed.Publish(outcome)
	r := n.replica.Load()
	if r == nil {
		return // New calls onRestore when the replica is there
	}
	r.Read(func(st *domain.State) { n.clock.applied(st.Now()) })
	if outcome.Checked != 0 {
		n.compared.Store(outcome.Checked)
	}
	if outcome.Diverged {
		select {
		case n.odd <- outcome.Checked:
		default: // one is being looked into
		}
	}
	recheck := false
	for _, change := range outcome.Changes {
		switch change.Kind {
		case domain.ChangeOwnBundle:
			n.updateBundle(r)
			recheck = true
		case domain.ChangeAgent:
			signal(n.agentsChanged)
			recheck = true
		case domain.ChangeMembers, domain.ChangeEntry:
			recheck = true
		case domain.ChangeObject:
			if strings.HasPrefix(change.Key, "Relationship/") {
				r.Read(n.readWIT)
			}
		}
	}
	if recheck {
		signal(n.recheck)
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
		n.readWIT(st)
	})
	n.updateBundle(r)
	signal(n.recheck)
	signal(n.agentsChanged)
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
	if err := n.bundles.Update(own); err != nil {
		n.log.Error("the own bundle cannot be written: other processes keep the one before", "error", err)
	}
}

// beforeCut is how long a change is given to reach those whose connections it ends.
const beforeCut = 100 * time.Millisecond

func (n *Node) runRechecks(ctx context.Context) error {
	expire := time.NewTicker(5 * time.Second)
	defer expire.Stop()
	damped := time.NewTicker(250 * time.Millisecond)
	defer damped.Stop()
	for {
		select {
		case <-n.recheck:
			// What is cut here learns first why, if it reads: it comes back with a new SVID,
			// and need not find out that the old one is void.
			if err := sleep(ctx, beforeCut); err != nil {
				return err
			}
			n.server.Recheck()
			// Changes in a row are looked at together; I4 allows a second.
			if err := sleep(ctx, 50*time.Millisecond); err != nil {
				return err
			}
		case <-expire.C:
			n.Read(func(st *domain.State) { n.feed.Expire(time.Now(), st) })
		case now := <-damped.C:
			if due, waits := n.feed.Due(); waits && !now.Before(due) {
				n.feed.Release(now)
			}
		case <-ctx.Done():
			return ctx.Err()
		}
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

func (n *Node) info() server.Info {
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
		Foreign:   n.foreign.all(),
		Upstream:  n.upstreamStatus(now),
		Audit:     n.auditStatus(),
	}
	for _, member := range r.Servers() {
		info.Voters[member.ID] = member.Voter
	}
	info.ClockOffset, info.ClockKnown = n.clock.offset()
	info.ClockOffset += n.clockError()
	return info
}

// activeAuthority is this node's ACTIVE X.509 authority.
func (n *Node) activeAuthority() *statev1.Authority { return n.activeFor(statev1.KeyUse_KEY_USE_X509) }

// activeFor is the authority that this node signs with for one use: the ACTIVE one, or
// the one that it took into use without quorum.
func (n *Node) activeFor(use statev1.KeyUse) (active *statev1.Authority) {
	r := n.replica.Load()
	if r == nil {
		return nil
	}
	taken := n.offline.record(use)
	r.Read(func(st *domain.State) {
		var offline bool
		if active, offline = rotation.Signing(st, n.own.id, use, taken.GetId()); offline {
			active = taken
		}
	})
	return active
}

// status is how far this replica's subscribers are.
func (n *Node) status() feed.Status {
	var longest time.Duration
	n.Read(func(st *domain.State) { longest = st.LongestLeaf() })
	return n.feed.Status(time.Now(), longest)
}

// settled: what this node says of its subscribers is the whole truth.
func (n *Node) settled() bool {
	return !n.hadAgents || time.Since(n.started) >= settleTime
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
		return float64(n.compared.Load())
	})
	gauge("entente_ca_signing", "1 while this node can sign.", func() float64 {
		if n.signer.Ready(statev1.KeyUse_KEY_USE_X509) == nil {
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
		return n.autonomy(time.Now()).Seconds()
	})
	gauge("entente_ca_proposals_waiting", "Changes that wait at this node, the leader, to be agreed; 4096 at most.", func() float64 {
		return float64(n.replica.Load().Stats().Waiting)
	})
	gauge("entente_ca_raft_connections", "Open connections to and from other CA nodes for the agreement.", func() float64 {
		return float64(n.replica.Load().Stats().Connections)
	})
	gauge("entente_ca_isolated_agents", "Agents that this node alone shuts out, until that can be agreed.", func() float64 {
		return float64(len(n.isolations()))
	})
	gauge("entente_ca_rotations_overdue", "At the leader: authorities that should be in use by now and are not held by everybody.", func() float64 {
		if !n.IsLeader() {
			return 0
		}
		return float64(n.overdue.Load())
	})
	gauge("entente_ca_authorities_offline", "Authorities that this node took into use without quorum.", func() float64 {
		return float64(n.offline.count())
	})
	if n.upstream != nil {
		gauge("entente_ca_upstream_certifies_seconds", "How long the upstream goes on certifying authorities; 0: not any more, or it cannot be used.", func() float64 {
			return n.upstreamCertifies(time.Now()).Seconds()
		})
	}
	gauge("entente_ca_subscribers", "Sync streams at this node.", func() float64 {
		return float64(n.status().Subscribers)
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
