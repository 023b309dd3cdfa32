package client

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/internal/peer"
)

const (
	// A lost session is opened again at once, and then after 50 ms, 100 ms, ...
	// with jitter, so that a node's clients do not all come back in one moment.
	backoffFirst = 50 * time.Millisecond
	backoffMost  = time.Second

	// stateLimit ends a session whose node has not sent a state that can be used: what the
	// picture is made of came from another node, or there is none. Doubled each time, for a
	// state can be large and a link slow.
	stateLimit = 20 * time.Second
	// catchUp is for a node that has sent a state, of a revision before the picture's.
	catchUp = 2 * time.Second

	// silenceLimit ends a session whose node has sent heartbeats and then nothing
	// for so long: its host is gone, or the network between.
	silenceLimit = 10 * time.Second

	// reportPause is between two reports of instances: what changes meanwhile is told
	// together.
	reportPause = 100 * time.Millisecond

	// disownAfter is how long instances count as fresh without a session: longer
	// than it takes to reach another node.
	disownAfter = 5 * time.Second

	// leaveTime is how long a node has to take in a goodbye.
	leaveTime = 250 * time.Millisecond

	// overlap keeps the session before open while the node takes in the one that
	// replaces it, so that no instance is withdrawn in between.
	overlap = time.Second
)

// session is one Sync stream. Its reader puts what arrives into received, and
// one error, after which it ends.
type session struct {
	conn     *conn
	stream   grpc.BidiStreamingClient[ententev1.SyncRequest, ententev1.SyncResponse]
	cancel   context.CancelFunc
	received chan received
	useful   bool     // something has arrived
	beats    bool     // heartbeats have arrived: silence means something
	said     []string // what the last Ack said of SVIDs
	connect  uint64
	proved   bool // or that cannot be
	older    bool // its state is of a revision before the picture's
}

type received struct {
	message *ententev1.SyncResponse
	err     error
}

func (s *session) close() {
	if s != nil {
		s.cancel()
		s.conn.close()
	}
}

// leave ends the stream in good order, so that the CA need not wait for this
// subscriber to come back.
func (s *session) leave() {
	if s == nil || s.stream.CloseSend() != nil {
		return
	}
	patience := time.NewTimer(leaveTime)
	defer patience.Stop()
	for {
		select {
		case r := <-s.received:
			if r.err != nil {
				return
			}
		case <-patience.C:
			return
		}
	}
}

// Sync keeps one stream to a CA node until ctx ends, and returns ctx's error.
//
// handle is called with the first complete picture and then with each newer one
// (a slow handler misses those between), never concurrently with itself. When it
// returns nil the revision is acknowledged to the CA: what it hands on must be in
// use by then. When it returns an error, that is logged, nothing is acknowledged,
// and the next picture is handed over as usual.
//
// The client's SVID may be renewed at any time: the stream moves to a connection
// that shows the new one before the old one ends.
func (c *Client) Sync(ctx context.Context, handle func(*View) error) error {
	ctx, cancel := context.WithCancel(ctx)
	var owned sync.WaitGroup
	defer owned.Wait()
	defer cancel()
	owned.Go(func() { c.deliver(ctx, handle) })
	owned.Go(func() { c.compare.run(ctx) })
	return (&syncer{Client: c, owned: &owned, opened: make(chan opened), full: c.whole, begin: time.NewTimer(0)}).run(ctx)
}

// deliver hands pictures to the handler until ctx ends.
func (c *Client) deliver(ctx context.Context, handle func(*View) error) {
	var failed string
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.store.changed:
		}
		view := c.store.Snapshot()
		if view.Revision == 0 {
			continue
		}
		if err := handle(view); err != nil {
			if text := err.Error(); text != failed { // once, not with every picture
				failed = text
				c.log.Error("cannot apply all of what the CA sent; it is not acknowledged", "revision", view.Revision, "error", err)
			}
			continue
		}
		failed = ""
		if !c.cfg.AcknowledgeLater && c.holds(view.Revision) && c.acked.Swap(view.Revision) != view.Revision {
			signal(c.newAck)
		}
	}
}

// syncer is the one goroutine that opens sessions, sends on them and applies
// what they bring.
type syncer struct {
	*Client
	owned *sync.WaitGroup // readers and openers

	now     *session // nil: none
	before  *session // still open for overlap after now took its place; nil: none
	opening bool
	opened  chan opened

	attempts  int         // fruitless ones since the last useful session
	slow      int         // sessions in a row that brought no state in time
	elsewhere []string    // addresses where the next session is not tried
	begin     *time.Timer // ends a session that brings no state
	full      bool        // ask for the full state
	said      bool        // the log says that there is no session
	otherKey  bool        // the log says that the CA names another recovery key

	tooOld []string // as the log said last
}

type opened struct {
	session *session
	err     error
}

func (s *syncer) run(ctx context.Context) error {
	retry := time.NewTimer(0)   // open a session when there is none
	renew := time.NewTimer(0)   // look whether there is a newer SVID to show
	drop := time.NewTimer(0)    // close the session before
	silence := time.NewTimer(0) // end a session that has gone quiet
	spaced := time.NewTimer(0)  // tell of instances again
	disown := time.NewTimer(disownAfter)
	reports := s.newHosts // nil: it was told of them just now
	for _, t := range []*time.Timer{renew, drop, silence, s.begin, spaced} {
		t.Stop()
	}
	defer func() {
		s.setCurrent(nil)
		s.now.leave()
		s.now.close()
		s.before.close()
	}()

	lose := func(err error) {
		s.note(s.now, err)
		s.setCurrent(nil)
		s.now.close()
		s.now = nil
		silence.Stop()
		renew.Stop()
		disown.Reset(disownAfter)
		retry.Reset(s.backoff())
	}
	for {
		var arriving <-chan received
		if s.now != nil {
			arriving = s.now.received
		}
		select {
		case <-ctx.Done():
			return ctx.Err()

		case <-retry.C:
			if s.now == nil {
				s.open(ctx)
			}

		case o := <-s.opened:
			s.opening = false
			if !s.begun(o) {
				if s.now == nil {
					retry.Reset(s.backoff())
				} // else: the running session stays; renew comes round again
				continue
			}
			s.use(o.session)
			silence.Reset(silenceLimit) // the first message is due without delay
			drop.Reset(overlap)
			s.scheduleRenewal(renew)

		case r := <-arriving:
			if r.err != nil {
				lose(r.err)
				continue
			}
			heartbeat, err := s.take(r.message)
			if err != nil {
				s.full = s.full || errors.Is(err, errResync)
				lose(err)
				continue
			}
			if !s.now.useful {
				s.now.useful = true
				s.settled()
			}
			disown.Stop()
			s.now.beats = s.now.beats || heartbeat
			silence.Stop()
			if s.now.beats {
				silence.Reset(silenceLimit)
			}

		case <-s.compare.move:
			s.full = true
			if s.now != nil {
				lose(errContradicted)
			}

		case <-silence.C:
			lose(fmt.Errorf("nothing heard for %v", silenceLimit))

		case <-s.begin.C:
			if err := s.lacksState(); err != nil {
				lose(err)
			}

		case <-spaced.C:
			reports = s.newHosts

		case <-reports:
			reports = nil
			spaced.Reset(reportPause)
			s.mu.Lock()
			report := s.report
			s.mu.Unlock()
			if s.now != nil {
				if err := s.sendReport(s.now, report); err != nil {
					lose(err)
				}
			}

		case <-s.newAck:
			if s.now != nil {
				if err := s.sendAck(s.now); err != nil {
					lose(err)
				}
			}

		case <-s.newSVID:
			if s.now != nil && s.svidIsNewer() {
				s.open(ctx)
				s.scheduleRenewal(renew)
			} else if s.now == nil {
				retry.Reset(0)
			}

		case <-renew.C:
			if s.now != nil && s.svidIsNewer() {
				s.open(ctx)
			}
			s.scheduleRenewal(renew)

		case <-drop.C:
			s.before.close()
			s.before = nil

		case <-disown.C:
			s.store.disown()
		}
	}
}

// open connects in the background; the result comes to opened.
func (s *syncer) open(ctx context.Context) {
	if s.opening {
		return
	}
	s.opening = true
	except := s.elsewhere
	s.elsewhere = nil
	s.owned.Go(func() {
		session, err := s.dialSession(ctx, except)
		select {
		case s.opened <- opened{session, err}:
		case <-ctx.Done():
			session.close()
		}
	})
}

func (s *syncer) dialSession(ctx context.Context, except []string) (*session, error) {
	conn, err := s.connect(ctx, except...)
	if err != nil {
		return nil, err
	}
	// The stream outlives ctx by a goodbye.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stream, err := ententev1.NewSyncClient(conn.rpc).Sync(ctx)
	if err != nil {
		cancel()
		conn.close()
		s.outcome(conn.address, false)
		return nil, fmt.Errorf("%w: CA node at %s: %w", ErrUnreachable, conn.address, plain(err))
	}
	session := &session{conn: conn, stream: stream, cancel: cancel, received: make(chan received)}
	s.owned.Go(func() {
		for {
			message, err := stream.Recv()
			select {
			case session.received <- received{message, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	})
	return session, nil
}

// begun tells whether a session that was opened may be used, and says why not.
func (s *syncer) begun(o opened) bool {
	if o.err != nil {
		if s.now == nil {
			s.say(o.err)
		}
		return false
	}
	if err := s.greet(o.session); err != nil {
		s.note(o.session, err)
		o.session.close()
		return false
	}
	return true
}

// greet sends what a session begins with.
func (s *syncer) greet(session *session) error {
	s.mu.Lock()
	s.connects++
	connect, report := s.connects, s.report
	s.mu.Unlock()

	resume := s.store.attach(nodeID(session.conn.state))
	if s.full {
		resume = 0
	}
	session.connect = connect
	hello := &ententev1.Hello{ResumeRevision: resume, BootId: s.cfg.BootID, Connect: connect, Level: ca.SyncLevel, Proof: s.prove(session)}
	if err := session.stream.Send(&ententev1.SyncRequest{Message: &ententev1.SyncRequest_Hello{Hello: hello}}); err != nil {
		return err
	}
	if report != nil {
		if err := s.sendReport(session, report); err != nil {
			return err
		}
	}
	if s.acked.Load() > 0 {
		return s.sendAck(session)
	}
	return nil
}

// checkRecoveryKey says once that the cluster names another recovery key than the pinned
// one. The pinned one stays: a CA node that lies could otherwise begin a new epoch later.
func (s *syncer) checkRecoveryKey() {
	named, pinned := s.View().Cluster.GetRecoveryKey(), s.RecoveryKey()
	differs := len(named) > 0 && !bytes.Equal(named, pinned)
	if differs && !s.otherKey {
		s.log.Error("the CA names another recovery key than the pinned one; the pinned one stays: if operators replaced it, set ca.recoveryKey to the new one",
			"address", s.now.conn.address, "named", ca.RecoveryKeyText(named), "pinned", ca.RecoveryKeyText(pinned))
	}
	s.otherKey = differs
}

// prove signs the session with the key of the SVID that it shows, once; nil if it has been
// done, and while the cluster is not known, as before a gateway's first picture.
func (s *syncer) prove(session *session) *ententev1.SessionProof {
	cluster := s.store.Snapshot().Cluster
	if session.proved || cluster == nil || session.conn.key == nil {
		return nil
	}
	origin, _, err := ca.OriginOf(session.conn.own)
	if err != nil {
		return nil
	}
	session.proved = true
	publicKey, signature, err := ca.Session{
		Cluster: cluster.GetId(), Subscriber: origin.Subscriber(), BootID: s.cfg.BootID, Connect: session.connect,
		NodeID: peer.KeyID(session.conn.state.PeerCertificates[0]),
	}.Sign(rand.Reader, session.conn.key)
	if err != nil {
		s.log.Warn("cannot prove this session to the CA: its other nodes will not know at once where this client is", "error", err)
		return nil
	}
	return &ententev1.SessionProof{PublicKey: publicKey, Signature: signature}
}

// stillNode says why the other end of a session is no CA node of this domain any more:
// what a node that was removed says must not be heard.
func (s *syncer) stillNode(session *session) error {
	return s.acceptsNode(session.conn.state)
}

// use makes a session the present one.
func (s *syncer) use(session *session) {
	s.before.close()
	s.before, s.now = s.now, session
	s.setCurrent(session.conn)
	s.begin.Reset(stateLimit << min(s.slow, 4))
}

// lacksState says why a session is to end that has brought no state in time.
func (s *syncer) lacksState() error {
	if s.now == nil || s.isSource(s.now) {
		return nil
	}
	s.slow++
	s.elsewhere = []string{s.now.conn.address}
	return errors.New("it sends no state that can be used")
}

// isSource tells whether the picture is made of what the session's node said.
func (s *syncer) isSource(session *session) bool {
	return s.store.origin() == nodeID(session.conn.state)
}

func (s *syncer) sendReport(session *session, instances []Instance) error {
	report := &ententev1.InstanceReport{}
	for _, i := range instances {
		report.Instances = append(report.Instances, instanceToWire(i))
	}
	return session.stream.Send(&ententev1.SyncRequest{Message: &ententev1.SyncRequest_Report{Report: report}})
}

func (s *syncer) sendAck(session *session) error {
	under, known := s.held()
	s.mu.Lock()
	waiting := s.waiting
	s.mu.Unlock()
	view := s.store.Snapshot()
	acked := s.acked.Load()
	if !s.isSource(session) {
		acked = 0 // what another node meant by it may not be what this one does
	}
	ack := &ententev1.Ack{Proof: s.prove(session), Skipped: view.Skipped, Contradicted: s.compare.contradicted(), Revision: acked, Authorities: under, AuthoritiesKnown: known, WaitingFor: waiting}
	session.said = under
	return session.stream.Send(&ententev1.SyncRequest{Message: &ententev1.SyncRequest_Ack{Ack: ack}})
}

// take applies one message.
func (s *syncer) take(message *ententev1.SyncResponse) (heartbeat bool, err error) {
	if news := s.store.note(message); len(news) > 0 {
		s.log.Info("the CA sent what this release does not know; it is skipped", "skipped", news)
		signal(s.newAck)
	}
	if _, err := s.compare.refuses(nodeID(s.now.conn.state)); err != nil {
		return false, err // its words must not be the ones that replace what it said
	}
	switch m := message.GetMessage().(type) {
	case *ententev1.SyncResponse_Policy:
		was := s.isSource(s.now)
		err = s.store.policy(m.Policy)
		s.warnTooOld()
		if err == nil && m.Policy.GetLast() {
			switch {
			case !s.isSource(s.now):
				if !s.now.older {
					s.now.older = true
					s.begin.Reset(catchUp << min(s.slow, 4))
				}
			case !was:
				s.full, s.slow = false, 0
				if s.acked.Load() > 0 {
					signal(s.newAck)
				}
			default:
				s.full = false
			}
			if s.store.hasYielded() {
				s.compare.arrived()
			}
			s.checkRecoveryKey()
			err = s.stillNode(s.now)
		}
	case *ententev1.SyncResponse_Urgent:
		s.store.urgent(m.Urgent)
		s.warnTooOld()
	case *ententev1.SyncResponse_Presence:
		s.store.presence(m.Presence)
	case *ententev1.SyncResponse_Heartbeat:
		heartbeat = true
		s.compare.relay(m.Heartbeat.GetStatements())
		if under, _ := s.held(); s.acked.Load() > 0 && !slices.Equal(under, s.now.said) {
			err = s.sendAck(s.now)
		}
	}
	return heartbeat, err
}

// warnTooOld says, when it is news, what this process cannot enforce.
func (s *syncer) warnTooOld() {
	if list := s.store.Snapshot().TooOld; !slices.Equal(list, s.tooOld) {
		s.tooOld = list
		if len(list) > 0 {
			s.log.Error("this process is too old to enforce what the CA demands: upgrade it", "not_enforced", list)
		}
	}
}

// settled is called with the first message of a session.
func (s *syncer) settled() {
	s.attempts = 0
	s.refused.Store(false)
	s.outcome(s.now.conn.address, true)
	if s.said || s.connects == 1 {
		s.log.Info("connected to the CA", "address", s.now.conn.address)
	}
	s.said = false
}

// note counts the end of a session, and says it when it is news.
func (s *syncer) note(session *session, err error) {
	if !session.useful {
		s.outcome(session.conn.address, false)
	}
	s.say(fmt.Errorf("CA node at %s: %w", session.conn.address, plain(err)))
}

// say logs that there is no session, once.
func (s *syncer) say(err error) {
	s.refused.Store(isRefusal(err))
	if s.said {
		s.log.Debug("no connection to the CA", "error", err)
		return
	}
	s.said = true
	s.log.Warn("no connection to the CA: everything keeps its last state until there is one", slog.Any("error", err))
}

// isRefusal tells a node that answered and would not have this client from one that
// could not be reached. In TLS 1.3 a client learns only after its handshake that its
// certificate was refused, as an alert.
func isRefusal(err error) bool {
	switch status.Code(err) {
	case codes.PermissionDenied, codes.Unauthenticated:
		return true
	}
	return strings.Contains(err.Error(), "remote error: tls:")
}

func (s *syncer) backoff() time.Duration {
	s.attempts++
	if s.attempts == 1 {
		return 0
	}
	wait := min(backoffFirst<<min(s.attempts-2, 10), backoffMost)
	return wait/2 + mathrand.N(wait/2)
}

func (s *syncer) setCurrent(conn *conn) {
	s.compare.at(conn)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.current = conn
}

// svidIsNewer reports whether the client has a newer SVID than the one that the
// running session showed.
func (s *syncer) svidIsNewer() bool {
	if s.cfg.SVID == nil {
		return false
	}
	svid, err := s.cfg.SVID.GetX509SVID()
	return err == nil && (s.now.conn.own == nil || !svid.Certificates[0].Equal(s.now.conn.own))
}

// scheduleRenewal comes back a few times in the rest of the life of the leaf
// that the session showed: a renewal at half-life is noticed well before the end.
func (s *syncer) scheduleRenewal(renew *time.Timer) {
	if s.now == nil || s.now.conn.own == nil {
		return
	}
	renew.Reset(max(time.Until(s.now.conn.own.NotAfter)/6, 500*time.Millisecond))
}
