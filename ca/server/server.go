// Package server holds the doors of a CA node: Join, Attest, Sync, Sign, Peer and, for
// administrators, Admin on its API address; Admin on a unix socket for operators.
//
// Each call is authenticated from the TLS connection it came over and authorised by
// one table (methods.go), which denies what it does not list. Doors parse and check
// what comes from outside, then propose what was extracted, or read. They map
// refusals to gRPC codes with a word on what to do next. The client half of what CA
// nodes say to each other stands here too, beside its other half (peers.go).
package server

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/feed"
	"github.com/entente-mesh/entente/ca/nodeattest"
	"github.com/entente-mesh/entente/ca/signer"
	"github.com/entente-mesh/entente/internal/admission"
	"github.com/entente-mesh/entente/internal/localpeer"
	"github.com/entente-mesh/entente/internal/peer"
)

// State is the agreed state of this replica.
type State interface {
	Read(func(*domain.State))
}

// Proposer has commands agreed. A refusal by the rules stands in the outcome; an
// error says that nothing is known to be agreed. When Propose returns an outcome,
// this replica's state holds it.
type Proposer interface {
	Propose(context.Context, *statev1.Command) (domain.Outcome, error)
}

// ErrNotLeader is what Config.Leader returns where it cannot decide: another node
// must be asked.
var ErrNotLeader = errors.New("this CA node does not lead its cluster now")

// Report is what a member tells the leader of itself, each second and on change.
type Report struct {
	BootID       string
	Applied      uint64 // revision
	Acknowledged uint64 // minimum over its subscribers, a revision
	WaitingFor   []feed.Behind
	Clock        time.Time
	Settled      bool // false: it started a moment ago, its subscribers are still coming back
	// Held is who of its subscribers, and whether it itself, has SVIDs under TAINTED
	// authorities: names by authority id.
	Held map[string][]string
	// Rejects is the id of the leader whose time the member rejects; empty: none.
	Rejects string
}

// Gate is who stands between an authority and its next phase, as the leader knows it.
type Gate struct {
	WaitingFor []string // PREPARED: who does not hold it; TAINTED: who has SVIDs under it
	Assumed    []string // who cannot say, and is not waited for
	Overdue    bool     // PREPARED: the one before should have been replaced by now
}

// Info is what Status shows beside the agreed state.
type Info struct {
	LeaderID  string // empty: none known
	RaftState string
	Age       time.Duration // of the agreed state; negative: unknown
	Voters    map[string]bool
	Foreign   map[string]Fetched // by trust domain

	NoQuorumSince time.Time // zero: agreement goes on, as far as this node knows
	NotAgreeing   string    // without quorum: since when, what still works, what to do
	Disk          string    // what is wrong with the log's disk; empty: nothing
	ClockOffset   time.Duration
	ClockKnown    bool
	ClockProblem  string    // why this node rejects the leader's time; empty: it does not
	Applied       uint64    // log index
	Last          uint64    // of the log
	LogBytes      uint64    // since the last snapshot
	Upstream      *Upstream // nil: this node's authorities sign themselves
	Audit         AuditLog
	Files         []File // that this node follows and cannot use as they are now
}

// File is a file, or some that belong together, whose newest content is not used.
type File struct {
	What  string // as the configuration names it
	Paths []string
	Why   string
	Since time.Time
	None  bool // nothing was ever read of it
}

// AuditLog is where the audit log is and how it goes.
type AuditLog struct {
	File       string // or "stderr", "off"
	Bytes      int64  // of the file and those that were rotated
	Bound      int64  // of Bytes; 0: none
	SharesRaft bool   // it is on the file system of the replicated log
	Problem    string // why lines are counted or missing; empty: they are not
}

// Upstream is the root that certifies this node's X.509 authorities.
type Upstream struct {
	KeyID    string    // empty: it cannot be read
	NotAfter time.Time // its end
	Problem  string    // why it certifies nothing, or soon will not; empty: it does
}

// Fetched is how this node's last look at a foreign bundle went.
type Fetched struct {
	At  time.Time // last success; zero: never
	Err string
}

// Cluster is this node's part in the agreement. Its methods may be called concurrently.
type Cluster interface {
	Proposer        // forwards to the leader
	Here() Proposer // this node alone; ErrNotLeader elsewhere
	Info() Info
	// Knows tells whether this node leads and its state holds everything that was agreed
	// before: what it does not find there does not exist.
	Knows() bool
	// Nodes is the leader's view; with ask, the leader is asked if it is another node.
	Nodes(ctx context.Context, ask bool) (Nodes, error)
	// Supersede stops this node if the statement says that its epoch is over.
	Supersede(statement, signature []byte) error
}

// Gatekeeper knows who has acknowledged what. Its methods may be called concurrently.
type Gatekeeper interface {
	Reported(memberID string, r Report)
	Subscribers() feed.Status // how far this node's are
	// Gate is by authority id, asked of the leader wherever it is; LocalGate is what
	// this node knows, ErrNotLeader if it does not lead.
	Gate(context.Context) (map[string]Gate, error)
	LocalGate() (map[string]Gate, error)
	// MarkReady marks a PREPARED authority as ready without the word of the CA nodes named,
	// if they do not report and nobody else is waited for; ErrNotLeader if this node does
	// not lead. Exclude has the leader do that, wherever it is.
	MarkReady(ctx context.Context, id string, exclude []string, who string) (revision uint64, err error)
	Exclude(ctx context.Context, id string, exclude []string, who string) error
}

// Own is what this node does with its own keys and by itself. Its methods may be called
// concurrently.
type Own interface {
	Certificate() (*tls.Certificate, error) // shown on the API address
	// SignStatement signs with the node key, in the form that Apply verifies.
	SignStatement(sum [sha256.Size]byte) (nodeKey, signature []byte, err error)
	// Prepare makes a new authority of this node and has it agreed. It returns the id.
	Prepare(context.Context, statev1.KeyUse) (string, error)
	// ActivateOffline takes an authority of this node into use without quorum; IsOffline
	// tells whether that was done.
	ActivateOffline(id, who string) error
	IsOffline(id string) bool
	// Isolate shuts an agent out at this node alone. Errors: ErrNoAgent, ErrBanned,
	// ErrQuorum.
	Isolate(name, reason, who string) (Isolation, error)
	Isolated() []Isolation // not agreed yet
}

// Follower follows the bundles of other domains.
type Follower interface {
	// Followed is how that goes, by trust domain, at the node that does it: this one, or with
	// ask the leader; ErrNotLeader without. With refresh, the bundle of td is fetched first,
	// or all are if it is empty.
	Followed(ctx context.Context, refresh bool, td string, ask bool) (map[string]Fetched, error)
}

// Config is what the doors need. All but Attestors, Between, Audit, Log and Registerer are
// required.
type Config struct {
	NodeID      string
	TrustDomain spiffeid.TrustDomain
	State       State
	Cluster
	Gatekeeper
	Own
	Follower
	Feed       *feed.Feed
	Signer     *signer.Signer
	Bundles    *Bundles
	Statements Statements           // what subscribers compare
	Attestors  nodeattest.Attestors // admit hosts that have no join token

	// Between, where set, stands between the doors of the API address and those who may
	// call them: tests have a node say there what a compromised one might. See scenarios/evil.
	Between Between

	Limits Limits
	// Audit gets a line for each administrative act and each SVID; nil: none.
	Audit      *Audit
	Log        *slog.Logger
	Registerer prometheus.Registerer
}

// Between is two interceptors; nil: none.
type Between struct {
	Unary  grpc.UnaryServerInterceptor
	Stream grpc.StreamServerInterceptor
}

// Server is the doors of one node. Methods may be called concurrently.
type Server struct {
	Config
	registry peer.Registry
	metrics  *metrics
	attests  chan struct{} // slots
	knocks   *admission.Rate
	refusals *admission.Fold
	repeats  *admission.Fold // of admissions: one that is new is always recorded

	handshakes, strangers *admission.Places
	guests                guests
	syncs                 syncs
	pulse                 *pulse

	reports    *admission.Rate // of instances
	x509Rates  *rates
	tokenRates *rates
	entryRates *rates // of tokens, by host and entry
	perNode    *rates // nil: no limit
	stopping   chan struct{}
	stop       sync.Once
}

const (
	maxAdminMessage = 16 << 20
	drainTime       = 3 * time.Second
)

// New returns the doors, closed.
func New(config Config) *Server {
	if config.Log == nil {
		config.Log = slog.New(slog.DiscardHandler)
	}
	limits := config.Limits
	s := &Server{
		Config:     config,
		registry:   peer.Registry{Log: config.Log},
		attests:    make(chan struct{}, cmp.Or(limits.Attests, defaultAttests)),
		refusals:   admission.NewFold(foldEvery, 1),
		repeats:    admission.NewOpenFold(foldEvery, 1),
		knocks:     newKnocks(cmp.Or(limits.AttestsPerSource, defaultKnocks)),
		reports:    admission.NewRate(reportRate, reportBurst, 0),
		x509Rates:  newRates(cmp.Or(limits.X509PerAgent, defaultX509Rate), x509BurstSeconds, "X.509-SVIDs"),
		tokenRates: newRates(cmp.Or(limits.TokensPerAgent, defaultTokenRate), 1, "tokens"),
		entryRates: newRates(cmp.Or(limits.TokensPerEntry, defaultEntryRate), entryBurstSeconds, "tokens"),
		handshakes: admission.NewPlaces(admission.Limits{Most: maxHandshakes, Patience: undisturbed}),
		strangers:  admission.NewPlaces(admission.Limits{Most: maxStrangers, Patience: handshakeLimit}),
		stopping:   make(chan struct{}),
	}
	s.pulse = &pulse{server: s}
	s.metrics = newMetrics(config.Registerer, s)
	if limits.PerNode > 0 {
		s.perNode = newRates(limits.PerNode, 1, "SVIDs")
	}
	return s
}

// ServeAPI serves Join, Attest, Sync, Sign, Peer and Admin on the listener, which it closes,
// until ctx ends and calls under way had three seconds to finish.
func (s *Server) ServeAPI(ctx context.Context, listener net.Listener) error {
	options := []grpc.ServerOption{
		grpc.Creds(&tracking{TransportCredentials: credentials.NewTLS(s.tlsConfig()), server: s}),
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
		grpc.MaxRecvMsgSize(maxAPIMessage),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.ReadBufferSize(0), // TLS has a buffer of its own, and 10,000 hosts hold a stream open
		grpc.ConnectionTimeout(handshakeLimit),
		grpc.InitialWindowSize(streamWindow),
		grpc.InitialConnWindowSize(connWindow),
		grpc.InTapHandle(s.tap),
		grpc.StatsHandler(messages{s}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 2 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			MaxConnectionIdle: time.Minute, // strangers do not stay
			Time:              pingEvery,
			Timeout:           pingWait,
		}),
	}
	if between := s.Between.Unary; between != nil {
		options = append(options, grpc.ChainUnaryInterceptor(between))
	}
	if between := s.Between.Stream; between != nil {
		options = append(options, grpc.ChainStreamInterceptor(between))
	}
	server := grpc.NewServer(options...)
	ententev1.RegisterJoinServer(server, joinDoor{server: s})
	ententev1.RegisterAttestServer(server, attestDoor{server: s})
	ententev1.RegisterSyncServer(server, syncDoor{server: s})
	ententev1.RegisterSignServer(server, signDoor{server: s})
	ententev1.RegisterPeerServer(server, peerDoor{server: s})
	ententev1.RegisterCompareServer(server, compareDoor{server: s})
	ententev1.RegisterAdminServer(server, adminDoor{server: s})
	return s.serve(ctx, server, entrance{listener, s})
}

// ServeAdmin serves Admin on a unix socket. Its mode, 0600, is the listener's owner's
// business; only those who can open it are operators.
func (s *Server) ServeAdmin(ctx context.Context, listener net.Listener) error {
	server := grpc.NewServer(
		grpc.Creds(localpeer.Credentials{}),
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
		grpc.MaxRecvMsgSize(maxAdminMessage),
		grpc.MaxConcurrentStreams(maxStreams),
	)
	ententev1.RegisterAdminServer(server, adminDoor{server: s})
	return s.serve(ctx, server, listener)
}

// serve ends streams first, for they would never end by themselves, then lets calls
// finish.
func (s *Server) serve(ctx context.Context, server *grpc.Server, listener net.Listener) error {
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	select {
	case err := <-failed:
		server.Stop() // its connections do not end with the listener
		return err
	case <-ctx.Done():
	}
	s.stop.Do(func() { close(s.stopping) })
	timer := time.AfterFunc(drainTime, server.Stop)
	defer timer.Stop()
	server.GracefulStop()
	<-failed
	return nil
}

// Run ends connections when the certificate they rest on ends, and has streams beat, until
// ctx ends.
func (s *Server) Run(ctx context.Context) error {
	var pulse sync.WaitGroup
	defer pulse.Wait()
	pulse.Go(func() { s.pulse.run(ctx) })
	return s.registry.Run(ctx)
}

// Recheck looks at all open connections again: after a member was removed or an authority
// revoked.
func (s *Server) Recheck() { s.countCut(s.registry.Recheck()) }

// RecheckOf looks again at those of certain agents and entries, by name and id: after one was
// banned or deleted.
func (s *Server) RecheckOf(changed map[string]struct{}) { s.countCut(s.registry.RecheckOf(changed)) }

func (s *Server) countCut(n int) {
	if n > 0 {
		s.Log.Info("connections were cut, their peers are no longer admitted", "connections", n)
	}
}

type metrics struct {
	calls  *prometheus.CounterVec
	svids  *prometheus.CounterVec
	tokens *prometheus.CounterVec

	limited *prometheus.CounterVec
	leftOut prometheus.Counter

	strangers *prometheus.CounterVec

	underWay prometheus.Gauge
	cut      *prometheus.CounterVec
}

func newMetrics(registerer prometheus.Registerer, s *Server) *metrics {
	m := &metrics{
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "entente_ca_calls_total", Help: "Calls at the doors of this CA node, by method and gRPC code.",
		}, []string{"method", "code"}),
		svids: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "entente_ca_x509_svids_total", Help: "X.509-SVIDs that were asked of this CA node, by result.",
		}, []string{"result"}),
		tokens: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "entente_ca_tokens_total", Help: "JWT- and WIT-SVIDs that were asked of this CA node, by kind and result.",
		}, []string{"kind", "result"}),
		strangers: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "entente_ca_strangers_refused_total", Help: "Calls that were refused to clients without an identity, by method.",
		}, []string{"method"}),
		underWay: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "entente_ca_calls_under_way", Help: "Calls and streams at the API address that have not ended.",
		}),
		cut: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "entente_ca_connections_cut_total", Help: "Connections to the API address that were cut because there are too many of their kind: handshake, stranger (without an identity), peer (of one).",
		}, []string{"kind"}),
		limited: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "entente_ca_limited_total", Help: "Calls that were sent away for a limit, by whose it was: agent, entry (of an agent), node, source (of addresses that hosts attest from), attest and queue (signatures), calls and streams (of one peer), message (too large), report (of too much).",
		}, []string{"limit"}),
		leftOut: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "entente_ca_reported_instances_left_out_total", Help: "Instances that hosts reported and that were left out: more than one may report, or not theirs to serve.",
		}),
	}
	if registerer == nil {
		return m
	}
	for _, method := range []string{ententev1.Join_Join_FullMethodName, ententev1.Attest_Attest_FullMethodName} {
		m.strangers.WithLabelValues(method) // a rate needs a zero to begin with
	}
	registerer.MustRegister(m.calls, m.svids, m.tokens, m.limited, m.leftOut, m.strangers, m.underWay, m.cut)
	for kind, count := range map[string]func() int{"handshake": s.handshakes.Len, "stranger": s.strangers.Len, "peer": s.guests.len} {
		registerer.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "entente_ca_connections", Help: "Open connections to the API address.", ConstLabels: prometheus.Labels{"kind": kind},
		}, func() float64 { return float64(count()) }))
	}
	registerer.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "entente_ca_attestations_under_way", Help: "Attestations that this CA node is at work on.",
	}, func() float64 { return float64(len(s.attests)) }))
	return m
}
