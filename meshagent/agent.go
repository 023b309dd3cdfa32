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
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/ca/selector"
	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/meshagent/nodeattest"
	"github.com/entente-mesh/entente/meshagent/services"
	"github.com/entente-mesh/entente/meshagent/workloadattest"
)

// Agent is the running agent. Its methods may be called concurrently.
type Agent struct {
	cfg      *Config
	log      *slog.Logger
	registry *daemon.Metrics
	metrics  *metrics

	now      func() time.Time // time.Now, but in tests
	id       spiffeid.ID
	key      crypto.Signer
	token    *ca.Token // nil: none was given
	attestor *workloadattest.Attestor
	client   *client.Client
	clientAs client.Config // without an SVID, to attest
	signer   signer        // client, but in tests
	jwts     *jwts

	deliveries deliveries
	doors      atomic.Pointer[[]Door] // set by Run

	mu        sync.Mutex // orders changes of state; readers need none
	state     atomic.Pointer[State]
	complaint string // the last ones that were logged, so that they are logged once

	diskMu sync.Mutex
	known  *known
	cache  *cache // nil: none

	reportMu sync.Mutex
	leaving  bool // the instances are withdrawn for good

	registered *services.Registry
	instances  map[string]*services.Instance // by service name; mu
	prober     *services.Prober
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
	id, err := ca.ID(cfg.Domain(), ca.AgentPath(cfg.Name))
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the data directory: %w", err)
	}
	a := &Agent{cfg: cfg, log: log, registry: daemon.NewMetrics("agent"), now: time.Now, id: id, attestor: workloadattest.New(cfg.WorkloadAttestation.options()...), jwts: newJWTs(), instances: map[string]*services.Instance{}, prober: services.NewProber()}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	if gap := a.attestor.Gap(); gap != "" {
		a.log.Warn("workload attestation is limited by the kernel", "reason", gap)
	}
	if a.known, err = load(cfg.DataDir); err != nil {
		return nil, err
	}
	if a.key, err = nodeattest.LoadKey(keyPath(cfg.DataDir)); err != nil {
		return nil, err
	}
	if a.token, err = nodeattest.ReadToken(cfg.CA.Token.Reveal(), cfg.CA.TokenFile); err != nil {
		if a.known.cluster == nil { // an agent that was admitted needs none
			return nil, err
		}
		a.log.Warn("the join token cannot be read; the agent attests by its key", "error", err)
	}
	if a.known.cluster == nil && a.token == nil && cfg.Attest.X509PoP.Certificate == "" {
		return nil, errors.New("this host has not attested yet and has no join token: make one with `entente token create` at the CA, and set ca.token or ca.tokenFile; or set attest.x509pop")
	}
	if td := cfg.Domain(); a.token != nil && a.token.TrustDomain != td {
		return nil, fmt.Errorf("the join token is for trust domain %s, the agent's is %s", a.token.TrustDomain.Name(), td.Name())
	}

	a.registered = services.Open(cfg.Services, cfg.ServicesDir, cfg.DataDir, a.log, func() {
		a.change(func(s *State) *State { next := *s; return &next })
	})
	state := &State{View: &client.View{}, changed: make(chan struct{}), reissued: make(chan struct{})}
	a.state.Store(state)
	if err := a.trust(); err != nil {
		return nil, err
	}
	a.recall()
	a.clientAs = client.Config{
		TrustDomain: cfg.Domain(),
		Addresses:   cfg.CA.Addresses,
		Members:     a.known.members,
		Confirmed:   a.confirmed(),
		Cluster:     a.cluster(),
		RecoveryKey: a.recoveryKey(),
		Bundles:     a.Bundles(),
		Datacenter:  cfg.Datacenter,
		Log:         a.log,
	}
	if a.token != nil {
		a.clientAs.Addresses = append(a.clientAs.Addresses[:len(a.clientAs.Addresses):len(a.clientAs.Addresses)], a.token.Addresses...)
		a.clientAs.Pins = a.token.Pinned
	}
	withSVID := a.clientAs
	withSVID.SVID = ownSVID{a}
	withSVID.AcknowledgeLater = true
	if a.client, err = client.New(withSVID); err != nil {
		return nil, err
	}
	a.deliveries.settle, a.deliveries.acknowledge, a.deliveries.hold = cfg.Settle, a.client.Acknowledge, a.client.Hold
	a.signer = a.client
	a.metrics = newMetrics(a)
	if a.cache, err = openCache(cfg); err != nil {
		return nil, err
	}
	if a.cache != nil && a.known.cluster != nil {
		if err := a.recallCache(); err != nil {
			a.log.Warn("cannot take up what the agent held before; it serves when a CA node has answered", "error", err)
		}
	}
	return a, nil
}

// cluster is the one that this host belongs to: as it is known, else as the join token
// says, else nil.
func (a *Agent) cluster() *statev1.Cluster {
	if a.known.cluster == nil && a.token != nil {
		return &statev1.Cluster{TrustDomain: a.token.TrustDomain.Name(), Id: a.token.ClusterID, Epoch: a.token.Epoch, RecoveryKey: a.token.RecoveryKey}
	}
	return a.known.cluster
}

// confirmed is the last member table that two CA nodes agreed on. The first one is the join
// token's: with each address stands the key of the node there.
func (a *Agent) confirmed() (members []*statev1.Member) {
	if len(a.known.confirmed) > 0 || a.known.cluster != nil || a.token == nil || len(a.token.Addresses) != len(a.token.Pins) {
		return a.known.confirmed
	}
	for i, address := range a.token.Addresses {
		members = append(members, &statev1.Member{Id: a.token.Pins[i], ApiAddress: address})
	}
	return members
}

// recoveryKey is the cluster's, as far as it is known before the CA is asked: what was
// pinned before, else the configuration's, else the join token's.
func (a *Agent) recoveryKey() []byte {
	switch {
	case len(a.known.RecoveryKey) > 0 && a.cfg.CA.RecoveryKey == "":
		return a.known.RecoveryKey
	case a.cfg.CA.RecoveryKey != "": // the operator's word
		key, _ := ca.ParseRecoveryPublic(a.cfg.CA.RecoveryKey) // ReadConfig has read it
		return key
	case a.known.cluster == nil && a.token != nil:
		return a.token.RecoveryKey
	}
	return nil
}

// trust reads the bundle by which the CA is known before the first attestation.
func (a *Agent) trust() error {
	file := a.cfg.CA.BundleFile
	if file == "" || a.known.cluster != nil {
		return nil
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("cannot read the bundle of %s: %w", a.cfg.TrustDomain, err)
	}
	bundle, err := readBundle(a.cfg.Domain(), data)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	a.change(func(s *State) *State {
		next := *s
		next.Bundle = bundle
		return &next
	})
	return nil
}

// recall takes up the SVID and bundle of the last run, if they are still good.
func (a *Agent) recall() {
	if a.known.cluster == nil {
		return
	}
	own, err := readBundle(a.cfg.Domain(), a.known.Bundle)
	if err != nil {
		a.log.Warn("cannot take up what the agent last knew", "error", err)
		return
	}
	svid, err := verifySVID(a.id, a.known.Certificates, a.key, own, time.Now())
	if err != nil {
		a.log.Info("the agent's last SVID is of no more use; it attests again by its key", "error", err)
	}
	a.change(func(s *State) *State {
		next := *s
		next.Bundle, next.own = own, svid
		return &next
	})
}

// change replaces the state by the one that f makes of it; nil leaves it.
func (a *Agent) change(f func(*State) *State) {
	a.mu.Lock()
	defer a.mu.Unlock()
	old := a.state.Load()
	next := f(old)
	if next == nil {
		return
	}
	next.changed = make(chan struct{})
	again := next.reissued == nil
	if again {
		next.reissued = make(chan struct{})
	}
	if again {
		next.content = old.content + 1
	}
	if registered := a.registered.Snapshot(); next.registered != registered || next.Ready != old.Ready || next.View.Changed != old.View.Changed {
		next.registered, next.Services = registered, a.place(next, registered)
	}
	next.underIDs = next.under()
	a.state.Store(next)
	a.deliveries.applied(next, 0)
	close(old.changed)
	if again {
		close(old.reissued)
	}
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
		admin, err := daemon.NewAdmin(a.cfg.Admin.Listen, a.Ready, a.registry)
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

// work is the agent's own part: identity, Sync, the entries' SVIDs, health.
func (a *Agent) work(ctx context.Context) error {
	group := daemon.NewGroup(ctx)
	identified := make(chan struct{})
	group.Go("own SVID", func(ctx context.Context) error { return a.keepOwn(ctx, identified) })
	group.Go("sync", func(ctx context.Context) error {
		select {
		case <-identified:
			return a.client.Sync(ctx, a.apply)
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	group.Go("SVIDs", a.keepEntries)
	group.Go("expiry", a.dropEnded)
	group.Go("JWT-SVIDs", a.keepJWTs)
	if a.cache != nil {
		group.Go("cache", a.keepCache)
	}
	if a.cfg.WorkloadAPI.WIT {
		group.Go("WIT-SVIDs", a.keepWITs)
	}
	if a.cfg.Sidecar.Inbound != "" {
		group.Go("health", a.watchHealth)
		group.Go("registrations", a.registered.Run)
	}
	return group.Wait()
}

// apply takes in a picture of the CA.
func (a *Agent) apply(view *client.View) error {
	var complaints []error
	var refused error
	a.change(func(s *State) *State {
		var next *State
		next, complaints, refused = s.withView(view, a.cfg.Domain(), a.cfg.Name)
		return next
	})
	if all := errors.Join(complaints...); all == nil {
		a.complaint = ""
	} else if text := all.Error(); text != a.complaint {
		a.complaint = text
		a.log.Error("the CA sent what this agent does not take", "revision", view.Revision, "error", all)
	}
	if refused == nil {
		a.deliveries.applied(a.State(), view.Revision)
	}
	a.keep(func(k *known) {
		if refused == nil {
			k.Bundle = view.Bundles[a.cfg.Domain().Name()]
		}
		if view.Cluster != nil {
			k.cluster = view.Cluster
		}
		k.RecoveryKey = a.client.RecoveryKey()
		k.members, k.confirmed = view.Members, a.client.Confirmed()
	})
	return refused
}

// keep changes what stands on the disk, when it changes. A full disk stops
// nothing: the state in memory is what counts.
func (a *Agent) keep(change func(*known)) {
	a.diskMu.Lock()
	defer a.diskMu.Unlock()
	next := *a.known
	change(&next)
	if next.equal(a.known) {
		return
	}
	a.known = &next
	if err := next.save(a.cfg.DataDir); err != nil {
		a.log.Error("a restart would not know what the agent knows now", "error", err)
	}
}

// report tells the CA what this host serves, until it is leaving.
func (a *Agent) report(instances []client.Instance) {
	a.reportMu.Lock()
	defer a.reportMu.Unlock()
	if !a.leaving {
		a.client.Report(instances)
	}
}

// withdraw takes this host's instances back and leaves the CA the time to tell.
func (a *Agent) withdraw() {
	a.reportMu.Lock()
	a.leaving = true
	a.client.Report([]client.Instance{})
	a.reportMu.Unlock()
	if a.State().Ready && a.cfg.Sidecar.Inbound != "" {
		time.Sleep(withdrawTime)
	}
}

// withdrawTime is how long the doors stay open after the host's instances were
// withdrawn: longer than a push takes to reach the callers.
const withdrawTime = 200 * time.Millisecond

// Ready says what the agent still lacks to serve, nil if nothing.
func (a *Agent) Ready() error {
	s := a.State()
	if s.own == nil {
		return errors.New("the agent has no SVID yet: it has not attested to a CA node")
	}
	if !s.Ready {
		return errors.New("the CA has not told yet which entries this host has")
	}
	for _, identity := range s.Identities {
		if identity.SVID == nil {
			return fmt.Errorf("there is no SVID yet for %s", identity.ID)
		}
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

// State is the newest state. It is never nil.
func (a *Agent) State() *State { return a.state.Load() }

// Comparison is what comparing the CA nodes came to.
func (a *Agent) Comparison() client.Comparison { return a.client.Comparison() }

// Metrics is the registry of this process.
func (a *Agent) Metrics() *daemon.Metrics { return a.registry }

// Config is what the agent was made with. Do not change it.
func (a *Agent) Config() *Config { return a.cfg }

// SVIDs is the source of one entry's X.509-SVID: always the newest one. It fails
// while the entry is not there or not signed yet.
func (a *Agent) SVIDs(entryID string) x509svid.Source { return entrySVID{a, entryID} }

type entrySVID struct {
	agent   *Agent
	entryID string
}

func (e entrySVID) GetX509SVID() (*x509svid.SVID, error) {
	identity, ok := e.agent.State().Identity(e.entryID)
	if !ok {
		return nil, fmt.Errorf("this host has no entry %q", e.entryID)
	}
	if identity.SVID == nil {
		return nil, fmt.Errorf("there is no SVID for %s: the CA has not signed one yet, or none since the last one ended", identity.ID)
	}
	return identity.SVID.Parsed()
}

// ownSVID is the source of the agent's own SVID.
type ownSVID struct{ agent *Agent }

func (o ownSVID) GetX509SVID() (*x509svid.SVID, error) {
	svid := o.agent.State().own
	if svid == nil {
		return nil, errors.New("the agent has not attested yet")
	}
	if end := svid.Certificates[0].NotAfter; !time.Now().Before(end) {
		return nil, fmt.Errorf("the agent's SVID has ended at %s", end.Format(time.RFC3339))
	}
	return svid, nil
}

// Bundles is the source of the own trust domain's X.509 bundle, and of no other:
// a foreign root never reaches a sidecar (I6).
func (a *Agent) Bundles() x509bundle.Source { return ownBundle{a} }

type ownBundle struct{ agent *Agent }

func (o ownBundle) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if own := o.agent.State().Bundle; own != nil && own.TrustDomain() == td {
		return own, nil
	}
	return nil, fmt.Errorf("no bundle of trust domain %s is held here", td.Name())
}

// Distrusted makes it a peer.Distruster: the SVIDs of agents that were banned, of
// entries that are gone and of authorities that were revoked count for nothing.
func (o ownBundle) Distrusted(path []*x509.Certificate) error {
	return o.agent.State().View.Distrust.Check(path)
}

// Announced makes it a peer.Announcer.
func (o ownBundle) Announced() func([]*x509.Certificate) error {
	view := o.agent.State().View
	if view.Announced == view.Distrust {
		return nil
	}
	return view.Announced.Check
}

// AttestCaller attests the process that opened a local connection which was accepted on
// this host: nil when it satisfies the selectors of the entry. On an error the connection
// must be closed unread.
func (a *Agent) AttestCaller(conn net.Conn, entryID string) error {
	process, err := a.caller(conn)
	if err != nil {
		return err
	}
	return a.entitled(process, entryID)
}

func (a *Agent) caller(conn net.Conn) (process *workloadattest.Process, err error) {
	if unixConn, ok := conn.(*net.UnixConn); ok {
		process, err = a.attestor.Unix(unixConn)
	} else {
		process, err = a.attestor.TCP(conn)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot attest the caller: %w", err)
	}
	return process, nil
}

// acceptTime is how long an application whose listener is another process's may take to
// accept a connection: a service manager that listens for it is not the application.
const acceptTime = 200 * time.Millisecond

// AttestApplication does the same for the process at the far end of a local connection that
// the agent opened: it has to be asked before anything is sent.
func (a *Agent) AttestApplication(conn net.Conn, entryID string) error {
	until := time.Now().Add(acceptTime)
	for pause := time.Millisecond; ; pause *= 2 {
		process, accepted, err := a.attestor.Acceptor(conn)
		if err != nil {
			return fmt.Errorf("cannot attest the application: %w", err)
		}
		err = a.entitled(process, entryID)
		if err == nil || accepted || time.Now().Add(pause).After(until) {
			return err
		}
		time.Sleep(pause)
	}
}

// attestListener attests the process that listens on a loopback address, to which no
// connection is made.
func (a *Agent) attestListener(addr netip.AddrPort, entryID string) error {
	process, err := a.attestor.Listener(addr)
	if err != nil {
		return fmt.Errorf("cannot attest the application: %w", err)
	}
	return a.entitled(process, entryID)
}

// IdentifyTCP attests the process at the far end of an accepted loopback connection
// and returns the ids of the entries it satisfies, in order.
func (a *Agent) IdentifyTCP(conn net.Conn) ([]string, error) {
	process, err := a.caller(conn)
	if err != nil {
		return nil, err
	}
	defer process.Close()
	var entries []string
	for _, identity := range a.State().IdentitiesOf(process) {
		entries = append(entries, identity.Entry.GetId())
	}
	return entries, nil
}

// entitled closes the process.
func (a *Agent) entitled(process *workloadattest.Process, entryID string) error {
	defer process.Close()
	identity, ok := a.State().Identity(entryID)
	if !ok {
		return fmt.Errorf("this host has no entry %q", entryID)
	}
	if err := process.Satisfies(identity.Demands); err != nil {
		return fmt.Errorf("the process (pid %d, uid %d) is not %s: %w", process.PID(), process.UID, identity.ID, err)
	}
	return nil
}

// AttestationGap says what the host's kernel leaves uncertain about workloads; empty: nothing.
func (a *Agent) AttestationGap() string { return a.attestor.Gap() }

// AttestUnix attests the process that connected a unix socket. The caller closes
// what it returns.
func (a *Agent) AttestUnix(conn *net.UnixConn) (*workloadattest.Process, error) {
	return a.attestor.Unix(conn)
}

// AttestPID attests a process by its number, for people who ask what the agent sees.
// The caller closes what it returns.
func (a *Agent) AttestPID(pid int) (*workloadattest.Process, error) { return a.attestor.PID(pid) }

// RegisterRun makes a process and all that it starts satisfy the selector
// run:id:ID until release is called, which must be before the process is closed.
func (a *Agent) RegisterRun(id string, process *workloadattest.Process) (release func(), err error) {
	if _, err := selector.Parse(selector.Run + ":" + id); err != nil {
		return nil, err
	}
	return a.attestor.Register(id, process)
}
