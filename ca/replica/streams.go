package replica

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/entente-mesh/entente/internal/admission"
)

// handshakes is how many inbound handshakes run at once. The addresses that they come from
// share them, so that whoever opens connections and says nothing keeps no member out;
// connections that stand are not touched by it.
const handshakes = 512

// undisturbed is how long a handshake is left in peace by others of its address.
const undisturbed = time.Second

var errNoPlace = errors.New("too many connections of this address have not shown yet who they are")

var errKilled = fmt.Errorf("%w: its connections are cut", ErrStopped)

// streams is Raft's stream layer: TLS 1.3 between pinned node keys. A peer is who its
// key is; names, validity and signatures of its certificate mean nothing, so that a
// cluster that was down for a year starts again. The application protocol carries
// cluster and epoch: a member of another cluster, or of this one before a recovery,
// does not get as far as Raft.
//
// It knows all its connections: Raft's transport does not close those in its pool, and
// a node whose disk failed must fall silent at once.
type streams struct {
	listener  net.Listener
	advertise string
	dial      func(ctx context.Context, address string) (net.Conn, error)
	log       *slog.Logger
	roster    *roster
	server    *tls.Config
	client    *tls.Config

	handshakes *admission.Places

	accepted chan net.Conn
	ctx      context.Context // ends with kill
	cancel   context.CancelFunc
	closed   chan struct{}
	closing  sync.Once
	tasks    sync.WaitGroup

	mu    sync.Mutex
	conns map[*stream]struct{} // nil: killed
}

// stream is a verified connection that its layer keeps count of.
type stream struct {
	*tls.Conn
	layer   *streams
	peer    string // node id
	inbound bool
}

// protocol is the application protocol of one epoch of one cluster. Two recoveries to
// the same epoch have different ids.
func protocol(cluster []byte, epoch uint32, recovery []byte) string {
	name := fmt.Sprintf("entente-raft/1/%s/%d", hex.EncodeToString(cluster), epoch)
	if len(recovery) > 0 {
		name += "/" + hex.EncodeToString(recovery)
	}
	return name
}

func newStreams(cfg *Config, roster *roster, alpn string) *streams {
	ctx, cancel := context.WithCancel(context.Background())
	s := &streams{
		listener:   cfg.Listener,
		advertise:  cfg.Advertise,
		dial:       cfg.Dial,
		log:        cfg.Log,
		roster:     roster,
		handshakes: admission.NewPlaces(admission.Share(handshakes, undisturbed)),
		accepted:   make(chan net.Conn),
		closed:     make(chan struct{}),
		ctx:        ctx,
		cancel:     cancel,
		conns:      map[*stream]struct{}{},
	}
	if s.dial == nil {
		s.dial = func(ctx context.Context, address string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", address)
		}
	}
	base := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		Certificates:           []tls.Certificate{cfg.Certificate},
		NextProtos:             []string{alpn},
		SessionTicketsDisabled: true, // every connection proves its key
	}
	s.server = base.Clone()
	s.server.ClientAuth = tls.RequireAnyClientCert
	s.server.VerifyConnection = func(state tls.ConnectionState) error {
		id, err := peerID(state, alpn)
		if err != nil {
			return err
		}
		if !roster.voter(id) {
			roster.vouched.knocked(id)
			return fmt.Errorf("node %s is no voter of this cluster", id)
		}
		return nil
	}
	s.client = base.Clone()
	s.client.InsecureSkipVerify = true // names and chains mean nothing; connect verifies the key
	s.tasks.Add(1)
	go s.acceptAll()
	return s
}

// peerID is the node id of the peer's key, which TLS 1.3 has just proved.
func peerID(state tls.ConnectionState, alpn string) (string, error) {
	if state.NegotiatedProtocol != alpn {
		return "", fmt.Errorf("the peer speaks %q, not %q: it belongs to another cluster or epoch", state.NegotiatedProtocol, alpn)
	}
	if len(state.PeerCertificates) == 0 {
		return "", errors.New("the peer shows no certificate")
	}
	return keyID(state.PeerCertificates[0]), nil
}

// Addr is what the others dial; Raft takes it for this node's address.
func (s *streams) Addr() net.Addr { return address(s.advertise) }

type address string

func (address) Network() string  { return "tcp" }
func (a address) String() string { return string(a) }

// acceptAll takes connections and lets each shake hands on its own: one that does not
// speak must not keep the others waiting.
func (s *streams) acceptAll() {
	defer s.tasks.Done()
	for {
		conn, err := s.listener.Accept()
		if err != nil {
			if s.ctx.Err() != nil {
				return
			}
			s.log.Warn("cannot accept a raft connection", "error", err)
			select { // too many open files, most likely
			case <-time.After(100 * time.Millisecond):
			case <-s.ctx.Done():
				return
			}
			continue
		}
		place := s.handshakes.Take(admission.Source(conn.RemoteAddr()), time.Now(), func() { conn.Close() })
		if place == nil {
			s.refused(conn, errNoPlace)
			continue
		}
		s.tasks.Go(func() { s.admit(conn, place) })
	}
}

func (s *streams) admit(conn net.Conn, place *admission.Place) {
	ctx, cancel := context.WithTimeout(s.ctx, dialTimeout)
	defer cancel()
	secure := tls.Server(conn, s.server)
	err := secure.HandshakeContext(ctx)
	place.Leave()
	if err != nil {
		s.refused(conn, err)
		return
	}
	st, err := s.track(secure, keyID(secure.ConnectionState().PeerCertificates[0]), true)
	if err != nil {
		return
	}
	select {
	case s.accepted <- st:
	case <-s.ctx.Done():
		st.Close()
	}
}

func (s *streams) refused(conn net.Conn, why error) {
	conn.Close()
	if s.ctx.Err() == nil {
		s.log.Warn("refused a raft connection", "peer_address", conn.RemoteAddr().String(), "reason", why)
	}
}

// Accept gives Raft's transport the next verified connection. After kill there is none,
// but only Close is an error: the transport would go on asking.
func (s *streams) Accept() (net.Conn, error) {
	select {
	case conn := <-s.accepted:
		return conn, nil
	case <-s.closed:
		return nil, errKilled
	}
}

// Dial connects to target, which is nodeID@host:port as the transport makes it, and
// accepts nobody else there.
func (s *streams) Dial(target raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	id, hostport, found := strings.Cut(string(target), "@")
	if !found {
		return nil, fmt.Errorf("cannot dial %s: no node id in it", target)
	}
	ctx, cancel := context.WithTimeout(s.ctx, min(timeout, dialTimeout))
	defer cancel()
	conn, err := s.connect(ctx, id, hostport)
	if err != nil {
		return nil, fmt.Errorf("cannot connect to member %s at %s: %w", id, hostport, err)
	}
	return conn, nil
}

func (s *streams) connect(ctx context.Context, id, hostport string) (net.Conn, error) {
	if s.ctx.Err() != nil {
		return nil, errKilled
	}
	if known, _, _ := s.roster.find(id); !known {
		return nil, errors.New("it is no member of this cluster")
	}
	conn, err := s.dial(ctx, hostport)
	if err != nil {
		return nil, err
	}
	config := s.client.Clone()
	config.VerifyConnection = func(state tls.ConnectionState) error {
		got, err := peerID(state, config.NextProtos[0])
		if err != nil {
			return err
		}
		if got != id {
			return fmt.Errorf("node %s answers there", got)
		}
		return nil
	}
	secure := tls.Client(conn, config)
	if err := secure.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, err
	}
	return s.track(secure, id, false)
}

// track enters a connection, unless the layer was killed or the peer removed meanwhile.
func (s *streams) track(conn *tls.Conn, id string, inbound bool) (*stream, error) {
	st := &stream{Conn: conn, layer: s, peer: id, inbound: inbound}
	s.mu.Lock()
	killed := s.conns == nil
	if !killed {
		s.conns[st] = struct{}{}
	}
	s.mu.Unlock()
	if killed {
		conn.NetConn().Close()
		return nil, errKilled
	}
	if !st.allowed() {
		st.Close()
		return nil, fmt.Errorf("node %s was removed", id)
	}
	return st, nil
}

func (st *stream) allowed() bool {
	known, voter, _ := st.layer.roster.find(st.peer)
	return known && (voter || !st.inbound)
}

// Close closes without TLS's farewell, which could block for seconds on a dead peer.
func (st *stream) Close() error {
	st.layer.mu.Lock()
	delete(st.layer.conns, st)
	st.layer.mu.Unlock()
	return st.NetConn().Close()
}

// recheck closes the connections of those who are no longer members.
func (s *streams) recheck() {
	for _, st := range s.open() {
		if !st.allowed() {
			s.log.Info("closing the connection of a removed member", "member", st.peer)
			st.Close()
		}
	}
}

func (s *streams) open() []*stream {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]*stream, 0, len(s.conns))
	for st := range s.conns {
		list = append(list, st)
	}
	return list
}

func (s *streams) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// kill cuts everything: no connection stays, none is accepted or dialled again.
// It does not block.
func (s *streams) kill() {
	s.cancel()
	s.listener.Close()
	s.mu.Lock()
	conns := s.conns
	s.conns = nil
	s.mu.Unlock()
	for st := range conns {
		st.NetConn().Close()
	}
}

// Close is called by Raft's transport.
func (s *streams) Close() error {
	s.closing.Do(func() { close(s.closed) })
	s.kill()
	s.tasks.Wait()
	return nil
}

var _ raft.StreamLayer = (*streams)(nil)
