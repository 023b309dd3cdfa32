package server

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/internal/peer"
)

const (
	maxCommand = 64 << 10
	maxActor   = 256
)

// peerDoor is spoken between CA nodes.
type peerDoor struct {
	ententev1.UnimplementedPeerServer
	server *Server
}

func (d peerDoor) Propose(ctx context.Context, req *ententev1.ProposeRequest) (*ententev1.ProposeResponse, error) {
	s, c := d.server, callerFrom(ctx)
	command := &statev1.Command{}
	if len(req.GetCommand()) > maxCommand || proto.Unmarshal(req.GetCommand(), command) != nil {
		return nil, status.Errorf(codes.InvalidArgument, "the command does not decode, or has over %d bytes", maxCommand)
	}
	who, via := command.GetActor(), fmt.Sprintf("CA node %s (%s)", c.member.GetName(), c.keyID)
	if err := s.mayPropose(c, command); err != nil {
		s.Log.Warn("a command of a CA node was refused", "member", c.member.GetName(), "error", err)
		s.Audit.Forwarded(who, via, command, domain.Outcome{}, err)
		return nil, status.Error(codes.PermissionDenied, err.Error())
	}
	// Whoever asked that member is its word; that it was this member is ours.
	command.Actor = who + ", by way of " + via
	outcome, err := s.Cluster.Here().Propose(ctx, command)
	if errors.Is(err, ErrNotLeader) {
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	s.Audit.Forwarded(who, via, command, outcome, err)
	if err != nil {
		return nil, s.proposeError(err)
	}
	resp := &ententev1.ProposeResponse{Revision: outcome.Revision}
	if r := outcome.Refused; r != nil {
		resp.Refusal, resp.Detail = r.Code, r.Detail
	}
	return resp, nil
}

// mayPropose says what a member may propose for others, and what for itself only. The
// rest is the leader's own.
func (s *Server) mayPropose(c caller, command *statev1.Command) error {
	if n := len(command.GetActor()); n == 0 || n > maxActor {
		return fmt.Errorf("CA node %s does not say who asks, or at length", c.member.GetName())
	}
	from, about := domain.ForwardingOf(command)
	switch {
	case from == domain.Proven:
		return nil
	case from == domain.Asked && (askedFor(command) || s.itsOwn(c, command)):
		return nil
	case from == domain.OfItself && about == c.keyID:
		if p := command.GetPrepareAuthority(); p != nil {
			return s.checkAuthority(c, p.GetAuthority())
		}
		return nil
	}
	return fmt.Errorf("CA node %s may not propose this %T", c.member.GetName(), command.GetBody())
}

// checkAuthority says why a member's new authority is none that it may have.
func (s *Server) checkAuthority(c caller, authority *statev1.Authority) error {
	var phase time.Duration
	s.State.Read(func(st *domain.State) { phase = st.Lifetimes().Phase })
	if authority.GetUse() != statev1.KeyUse_KEY_USE_X509 {
		return ca.SameTokenAuthority(s.TrustDomain.Name(), c.keyID, authority, phase, time.Now())
	}
	parsed, err := ca.NewAuthority(s.TrustDomain, c.keyID, authority.GetCertificate(), authority.GetUpstream(), phase, time.Now())
	if err != nil {
		return err
	}
	s.State.Read(func(st *domain.State) { err = CheckUpstream(st, authority.GetUpstream()) })
	if err != nil {
		return err
	}
	if !proto.Equal(parsed, authority) {
		return errors.New("the authority's record does not say what its certificate says")
	}
	return nil
}

// askedFor tells whether a CA node says that a person asked it. One of a release before
// kinds says that it acts by itself in the name.
func askedFor(command *statev1.Command) bool {
	switch command.GetActorKind() {
	case statev1.ActorKind_ACTOR_KIND_OPERATOR, statev1.ActorKind_ACTOR_KIND_ADMINISTRATOR:
		return true
	case statev1.ActorKind_ACTOR_KIND_UNSPECIFIED:
		return !strings.HasPrefix(command.GetActor(), "CA node ")
	}
	return false
}

// itsOwn: a node uses its own authority when it is ready.
func (s *Server) itsOwn(c caller, command *statev1.Command) (own bool) {
	s.State.Read(func(st *domain.State) {
		a, ok := st.Authority(command.GetActivateAuthority().GetId())
		own = ok && a.GetMemberId() == c.keyID
	})
	return own
}

func (d peerDoor) Report(ctx context.Context, req *ententev1.ReportRequest) (*ententev1.ReportResponse, error) {
	c := callerFrom(ctx)
	d.server.Reported(c.member.GetId(), reportFromWire(req))
	return &ententev1.ReportResponse{}, nil
}

func (d peerDoor) Gate(context.Context, *ententev1.GateRequest) (*ententev1.GateResponse, error) {
	gates, err := d.server.LocalGate()
	if err != nil {
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	resp := &ententev1.GateResponse{}
	for _, id := range slices.Sorted(maps.Keys(gates)) {
		resp.Authorities = append(resp.Authorities, &ententev1.AuthorityGate{Id: id, WaitingFor: gates[id].WaitingFor, Assumed: gates[id].Assumed, Overdue: gates[id].Overdue})
	}
	return resp, nil
}

// MarkReady names the member that asks beside whoever asked it.
func (d peerDoor) MarkReady(ctx context.Context, req *ententev1.MarkReadyRequest) (*ententev1.MarkReadyResponse, error) {
	who := fmt.Sprintf("%.200s, at CA node %s", req.GetWho(), callerFrom(ctx).member.GetName())
	revision, err := d.server.Config.MarkReady(ctx, req.GetId(), req.GetExclude(), who)
	if err != nil {
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	return &ententev1.MarkReadyResponse{Revision: revision}, nil
}

func (d peerDoor) Presence(_ *ententev1.PresenceRequest, stream ententev1.Peer_PresenceServer) error {
	s := d.server
	watcher := s.Feed.Watch()
	defer watcher.Close()
	for {
		select {
		case <-watcher.Wake:
			news, has := watcher.Next()
			if !has {
				continue
			}
			for _, chunk := range presenceToWire(news) {
				if err := stream.Send(chunk); err != nil {
					return err
				}
			}
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		case <-s.stopping:
			return status.Error(codes.Unavailable, "this CA node shuts down")
		}
	}
}

// Peers is the client half: connections to the other members, each accepted by its
// node key alone. Methods may be called concurrently.
type Peers struct {
	certificate func() (*tls.Certificate, error)
	isMember    func(id string) bool

	mu     sync.Mutex
	conns  map[string]*peerConn // by member id
	closed bool
}

type peerConn struct {
	address string
	conn    *grpc.ClientConn
}

// A member that comes back is heard again within a second.
var connectParams = grpc.ConnectParams{
	Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.3, MaxDelay: time.Second},
	MinConnectTimeout: 3 * time.Second,
}

// NewPeers returns no connections yet; certificate is what this node shows. Who is no
// member is not spoken to, whatever its address was.
func NewPeers(certificate func() (*tls.Certificate, error), isMember func(id string) bool) *Peers {
	return &Peers{certificate: certificate, isMember: isMember, conns: make(map[string]*peerConn)}
}

// Close closes all connections.
func (p *Peers) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	var errs []error
	for id, c := range p.conns {
		errs = append(errs, c.conn.Close())
		delete(p.conns, id)
	}
	return errors.Join(errs...)
}

// Forget closes the connection to a member that is none any more.
func (p *Peers) Forget(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.conns[id]; c != nil {
		c.conn.Close()
		delete(p.conns, id)
	}
}

func (p *Peers) to(m *statev1.Member) (*grpc.ClientConn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, errors.New("this CA node shuts down")
	}
	if !p.isMember(m.GetId()) {
		return nil, fmt.Errorf("CA node %s is no member any more", m.GetName())
	}
	if c := p.conns[m.GetId()]; c != nil {
		if c.address == m.GetApiAddress() {
			return c.conn, nil
		}
		c.conn.Close()
		delete(p.conns, m.GetId())
	}
	id := m.GetId()
	config := peer.PinnedClientTLS(p.certificate, func(keyID string) error {
		if !p.isMember(id) {
			return fmt.Errorf("CA node %s is no member any more", m.GetName())
		}
		if keyID != id {
			return fmt.Errorf("the node that answers has the key %.12s, CA node %s has %.12s", keyID, m.GetName(), id)
		}
		return nil
	}, "h2")
	conn, err := grpc.NewClient("passthrough:///"+m.GetApiAddress(),
		grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithConnectParams(connectParams),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 3 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAdminMessage)),
		grpc.WithDisableServiceConfig(),
		grpc.WithNoProxy(),
	)
	if err != nil {
		return nil, err
	}
	p.conns[id] = &peerConn{m.GetApiAddress(), conn}
	return conn, nil
}

// Propose hands a command to the leader. After ErrNotLeader it was not proposed; after
// another error it may have been.
func (p *Peers) Propose(ctx context.Context, leader *statev1.Member, command *statev1.Command) (domain.Outcome, error) {
	conn, err := p.to(leader)
	if err != nil {
		return domain.Outcome{}, err
	}
	data, err := proto.Marshal(command)
	if err != nil {
		return domain.Outcome{}, err
	}
	var reached grpcpeer.Peer
	resp, err := ententev1.NewPeerClient(conn).Propose(ctx, &ententev1.ProposeRequest{Command: data}, grpc.Peer(&reached))
	switch code := status.Code(err); {
	case code == codes.OK:
	case code == codes.FailedPrecondition, reached.Addr == nil: // there was no connection: it was not sent
		return domain.Outcome{}, ErrNotLeader
	default:
		return domain.Outcome{}, fmt.Errorf("CA node %s: %w", leader.GetName(), plain(err))
	}
	outcome := domain.Outcome{Revision: resp.GetRevision()}
	if resp.GetRefusal() != "" {
		outcome.Refused = &domain.Refusal{Code: resp.GetRefusal(), Detail: resp.GetDetail()}
	}
	return outcome, nil
}

// Report tells the leader how far this node is.
func (p *Peers) Report(ctx context.Context, leader *statev1.Member, r Report) error {
	conn, err := p.to(leader)
	if err != nil {
		return err
	}
	if _, err := ententev1.NewPeerClient(conn).Report(ctx, reportToWire(r)); err != nil {
		return fmt.Errorf("report to CA node %s: %w", leader.GetName(), plain(err))
	}
	return nil
}

// Gate asks the leader who stands between the authorities and their next phase.
func (p *Peers) Gate(ctx context.Context, leader *statev1.Member) (map[string]Gate, error) {
	conn, err := p.to(leader)
	if err != nil {
		return nil, err
	}
	resp, err := ententev1.NewPeerClient(conn).Gate(ctx, &ententev1.GateRequest{})
	if err != nil {
		return nil, fmt.Errorf("CA node %s: %w", leader.GetName(), plain(err))
	}
	gates := make(map[string]Gate, len(resp.GetAuthorities()))
	for _, g := range resp.GetAuthorities() {
		gates[g.GetId()] = Gate{WaitingFor: g.GetWaitingFor(), Assumed: g.GetAssumed(), Overdue: g.GetOverdue()}
	}
	return gates, nil
}

// MarkReady asks the leader to go without the word of the CA nodes named.
func (p *Peers) MarkReady(ctx context.Context, leader *statev1.Member, id string, exclude []string, who string) (revision uint64, err error) {
	conn, err := p.to(leader)
	if err != nil {
		return 0, err
	}
	resp, err := ententev1.NewPeerClient(conn).MarkReady(ctx, &ententev1.MarkReadyRequest{Id: id, Exclude: exclude, Who: who})
	if err != nil {
		return 0, errors.New(status.Convert(err).Message())
	}
	return resp.GetRevision(), nil
}

// Presence hears what another member says of its sessions, until the stream ends or it
// says too much. Its full set has a limited time; heard is called when it is there, and
// then for each change.
func (p *Peers) Presence(ctx context.Context, m *statev1.Member, hearsay *Hearsay, heard func()) error {
	conn, err := p.to(m)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	late := time.AfterFunc(completeTimeout, cancel)
	defer late.Stop()
	stream, err := ententev1.NewPeerClient(conn).Presence(ctx, &ententev1.PresenceRequest{})
	if err != nil {
		return fmt.Errorf("presence of CA node %s: %w", m.GetName(), plain(err))
	}
	for {
		chunk, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return fmt.Errorf("presence of CA node %s ended", m.GetName())
		}
		if err != nil {
			return fmt.Errorf("presence of CA node %s: %w", m.GetName(), plain(err))
		}
		complete, err := hearsay.take(time.Now(), chunk)
		if err != nil {
			return fmt.Errorf("presence of CA node %s: %w", m.GetName(), err)
		}
		if complete {
			late.Stop()
			heard()
		}
	}
}

// JoinRequest is what a node shows to become a member.
type JoinRequest struct {
	Token       *ca.Token
	Certificate tls.Certificate // of the node key
	RaftAddress string
	APIAddress  string
	Level       uint32 // domain.FeatureLevel of this node
}

// JoinResult is the answer.
type JoinResult struct {
	Member  *statev1.Member
	Members []*statev1.Member
	Cluster *statev1.Cluster
}

// Join asks one of the token's CA nodes after the other to admit this node. Its key
// may repeat and gets the same answer (I9).
func Join(ctx context.Context, req JoinRequest) (*JoinResult, error) {
	var failures []error
	for _, address := range req.Token.Addresses {
		result, err := joinAt(ctx, address, req)
		if err == nil {
			return result, nil
		}
		failures = append(failures, fmt.Errorf("CA node at %s: %w", address, plain(err)))
		if ctx.Err() != nil {
			break
		}
	}
	return nil, errors.Join(failures...)
}

func joinAt(ctx context.Context, address string, req JoinRequest) (*JoinResult, error) {
	ctx, cancel := context.WithTimeout(ctx, agreeTimeout+2*time.Second)
	defer cancel()
	raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	config := peer.PinnedClientTLS(func() (*tls.Certificate, error) { return &req.Certificate, nil }, func(keyID string) error {
		if !req.Token.Pinned(keyID) {
			return errors.New("its key is none of those that the token names")
		}
		return nil
	}, "h2")
	// TLS first, by hand: the statement is bound to this very connection.
	conn := tls.Client(raw, config)
	defer conn.Close()
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	state := conn.ConnectionState()
	exporter, err := state.ExportKeyingMaterial(ca.ExporterLabel, nil, ca.ExporterSize)
	if err != nil {
		return nil, err
	}
	leaf := req.Certificate.Leaf
	if leaf == nil {
		if leaf, err = x509.ParseCertificate(req.Certificate.Certificate[0]); err != nil {
			return nil, err
		}
	}
	statement, signature, err := req.Token.Sign(peer.KeyID(leaf), exporter)
	if err != nil {
		return nil, err
	}
	once := make(chan net.Conn, 1)
	once <- conn
	rpc, err := grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(insecure.NewCredentials()), // over TLS that is there already
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			select {
			case c := <-once:
				return c, nil
			default:
				return nil, errors.New("the connection ended")
			}
		}),
		grpc.WithDisableServiceConfig(),
	)
	if err != nil {
		return nil, err
	}
	defer rpc.Close()
	resp, err := ententev1.NewJoinClient(rpc).Join(ctx, &ententev1.JoinRequest{
		TokenId:     req.Token.ID,
		Statement:   statement,
		Signature:   signature,
		RaftAddress: req.RaftAddress,
		ApiAddress:  req.APIAddress,

		FeatureLevel: req.Level,
	})
	if err != nil {
		return nil, err
	}
	return &JoinResult{Member: resp.GetMember(), Members: resp.GetMembers(), Cluster: resp.GetCluster()}, nil
}

// plain takes gRPC's frame off an error that people will read.
func plain(err error) error {
	if st, ok := status.FromError(err); ok && st.Code() != codes.OK {
		return fmt.Errorf("%s (%s)", st.Message(), st.Code())
	}
	return err
}
