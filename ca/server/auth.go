package server

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/internal/localpeer"
	"github.com/entente-mesh/entente/internal/peer"
)

// class is what a caller is to the doors.
type class uint8

const (
	anonymous     class = iota + 1 // shows no certificate
	stranger                       // holds a key that means nothing yet, and claims no name
	member                         // holds the node key of a member
	agent                          // shows the SVID of an attested agent, with the agent's key
	workload                       // shows the SVID of an entry: a gateway, or another that listens
	local                          // came over the unix socket
	administrator                  // a workload whose roles let it make this call
	subscriber                     // a workload that follows Sync by itself: a gateway, an edge
)

func (c class) String() string {
	return [...]string{"nobody", "a client without certificate", "a holder of an unknown key", "a CA node", "an agent", "a workload", "the operator of this host", "an administrator", "a gateway or edge"}[c]
}

// caller is who calls, as the connection proves it.
type caller struct {
	class  class
	keyID  string // of the key the peer holds; empty without one
	id     spiffeid.ID
	member *statev1.Member
	agent  *statev1.Agent // of an agent: itself; of a workload: its host's
	entry  *statev1.Entry // of a workload
	state  tls.ConnectionState
	user   string // local: which one
}

// restsOn names the agent and the entry that identify looks at; none: it looks at more. An
// entry's id has a slash, an agent's name has none.
func (c caller) restsOn() []string {
	switch c.class {
	case agent:
		return []string{c.agent.GetName()}
	case workload:
		return []string{c.agent.GetName(), c.entry.GetId()}
	}
	return nil
}

// who is the caller in the audit log.
func (c caller) who() string {
	switch c.class {
	case local:
		return c.user
	case anonymous, stranger:
		if c.keyID != "" {
			return "holder of key " + c.keyID
		}
	}
	return c.String()
}

func (c caller) String() string {
	switch c.class {
	case member:
		return "CA node " + c.member.GetName()
	case agent, workload, administrator, subscriber:
		return c.id.String()
	}
	return c.class.String()
}

// errNotOurs: the certificate claims a name that it does not prove.
var errNotOurs = errors.New("the certificate is no SVID of this trust domain that is valid now, and its key is no member's")

// identify says who holds the other end of a TLS connection. It decides anew each
// time: what was true when the connection began may have ended (I4). shown is the
// connection's.
func (s *Server) identify(state tls.ConnectionState, shown *shown) (caller, error) {
	c := caller{state: state}
	if len(state.PeerCertificates) == 0 {
		c.class = anonymous
		return c, nil
	}
	leaf := state.PeerCertificates[0]
	shown.read(leaf)
	c.keyID = shown.keyID
	s.State.Read(func(st *domain.State) {
		if m, ok := st.Member(c.keyID); ok {
			c.class, c.member = member, m
		}
	})
	if c.class == member {
		return c, nil
	}
	if !claimsName(leaf) {
		c.class = stranger
		return c, nil
	}
	id, err := shown.proof.Verify(state.PeerCertificates, s.Bundles, time.Now())
	if err != nil || !id.MemberOf(s.TrustDomain) {
		return c, errNotOurs
	}
	c.id = id
	s.State.Read(func(st *domain.State) { err = c.fromState(st, shown) })
	if err == nil {
		err = s.banned(c.agent)
	}
	return c, err
}

// shown is what a connection's certificate says, which stays, and how it verified last.
type shown struct {
	proof peer.Proof

	once      sync.Once
	keyID     string
	origin    ca.Origin
	hasOrigin bool
}

func (s *shown) read(leaf *x509.Certificate) {
	s.once.Do(func() {
		s.keyID = peer.KeyID(leaf)
		s.origin, s.hasOrigin, _ = ca.OriginOf(leaf)
	})
}

// claimsName tells an SVID or a server certificate from a bare node key.
func claimsName(leaf *x509.Certificate) bool {
	return len(leaf.URIs)+len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) > 0
}

// fromState finds what the agreed state knows of a verified SVID's holder.
func (c *caller) fromState(st *domain.State, shown *shown) error {
	if !shown.hasOrigin {
		return errors.New("the SVID does not say by which agent and entry it was issued")
	}
	origin := shown.origin
	host, ok := st.Agent(origin.Agent)
	switch {
	case !ok || host.GetGeneration() != origin.AgentGeneration:
		return fmt.Errorf("agent %s was removed or attested anew since this SVID was issued", origin.Agent)
	case host.GetBanned():
		return fmt.Errorf("agent %s is banned", origin.Agent)
	}
	if c.id.Path() == ca.AgentPath(host.GetName()) {
		if c.keyID != host.GetKeyId() {
			return fmt.Errorf("agent %s holds another key now", host.GetName())
		}
		c.class, c.agent = agent, host
		return nil
	}
	entry, ok := st.Entry(origin.Entry)
	if !ok || entry.GetPath() != c.id.Path() || !ca.Entitled(host, entry) || st.Distrusts(origin) {
		return fmt.Errorf("%s is no longer an identity that host %s may hold", c.id, host.GetName())
	}
	c.class, c.agent, c.entry = workload, host, entry
	return nil
}

// tlsConfig asks for a client certificate. One that claims a name must prove it; a
// bare key may only knock at Join.
func (s *Server) tlsConfig() *tls.Config {
	return peer.AllowClient(s.Certificate, func(state tls.ConnectionState) error {
		_, err := s.identify(state, new(shown))
		return err
	}, "h2")
}

// tracking keeps API connections in the registry, so that they end with what they
// rest on.
type tracking struct {
	credentials.TransportCredentials
	server *Server
}

func (t *tracking) Clone() credentials.TransportCredentials {
	return &tracking{t.TransportCredentials.Clone(), t.server}
}

func (t *tracking) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := t.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	remote := &remoteInfo{TLSInfo: info.(credentials.TLSInfo)}
	state := remote.State
	first, err := t.server.identify(state, &remote.shown)
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	var leave func()
	if remote.calls, leave, err = t.server.seat(first, raw); err != nil {
		conn.Close()
		return nil, nil, err
	}
	if a, ok := raw.(*arriving); ok {
		a.place.Leave()
	}
	untrack := func() {}
	if first.class != anonymous {
		untrack = t.server.registry.Track(raw, expiring(first, state), func() error {
			now, err := t.server.identify(state, &remote.shown)
			if err == nil && first.class != now.class && first.class != stranger {
				err = errNotOurs
			}
			return err
		}, first.restsOn()...)
	}
	return &tracked{conn, untrack, leave}, remote, nil
}

// remoteInfo is a connection over TLS.
type remoteInfo struct {
	credentials.TLSInfo
	shown shown
	calls *calls
}

// expiring hides the certificate of a peer that is known by its key: dates in it mean
// nothing.
func expiring(c caller, state tls.ConnectionState) tls.ConnectionState {
	if c.class == member || c.class == stranger {
		return tls.ConnectionState{}
	}
	return state
}

type tracked struct {
	net.Conn
	untrack, leave func()
}

func (t *tracked) Close() error {
	t.untrack()
	t.leave()
	return t.Conn.Close()
}

type (
	callerKey struct{}
	methodKey struct{}
)

// methodFrom is the full name of the method that is called.
func methodFrom(ctx context.Context) string {
	name, _ := ctx.Value(methodKey{}).(string)
	return name
}

// callerFrom is the caller that the interceptors found.
func callerFrom(ctx context.Context) caller {
	c, _ := ctx.Value(callerKey{}).(caller)
	return c
}

// authorise authenticates a call and looks it up in the table. It returns the context of
// the call also when it is refused, as far as its caller is known.
func (s *Server) authorise(ctx context.Context, method string) (context.Context, error) {
	remote, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return ctx, status.Error(codes.Unauthenticated, "no connection to authenticate")
	}
	var c caller
	switch info := remote.AuthInfo.(type) {
	case localpeer.Info:
		c.class, c.user = local, info.User
	case *remoteInfo:
		var err error
		if c, err = s.identify(info.State, &info.shown); err != nil {
			return ctx, status.Error(codes.Unauthenticated, err.Error())
		}
	default:
		return ctx, status.Error(codes.Unauthenticated, "unknown kind of connection")
	}
	err := s.promote(&c, method)
	if err == nil && !methods[method].admits(c.class) {
		err = status.Errorf(codes.PermissionDenied, "%s may not call %s", c.class, method)
	}
	if err != nil && c.known() {
		if unsaid, say := s.refusals.Say(method+" by "+c.String(), time.Now()); say {
			s.Log.Warn("a call was refused: its caller may not make it", "method", method, "caller", c.String(), "peer_address", remote.Addr.String(), "reason", status.Convert(err).Message(), "more_since_last_line", unsaid)
		}
	}
	ctx = context.WithValue(ctx, callerKey{}, c)
	return context.WithValue(ctx, methodKey{}, method), err
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	heard(ctx)
	defer func() { s.metrics.calls.WithLabelValues(info.FullMethod, status.Code(err).String()).Inc() }()
	if ctx, err = s.authorise(ctx, info.FullMethod); err == nil {
		resp, err = handler(ctx, req)
	}
	s.record(ctx, req, resp, err)
	return resp, err
}

// record writes into the audit log what belongs there.
func (s *Server) record(ctx context.Context, req, resp any, err error) {
	c, method := callerFrom(ctx), methodFrom(ctx)
	// Who asks to be admitted is a stranger in that, whatever else he is.
	admits := method == ententev1.Attest_Attest_FullMethodName || method == ententev1.Join_Join_FullMethodName
	switch {
	case err == nil && admits:
		if _, say := s.repeats.Say(admittedIn(resp), time.Now()); !say {
			return // the same answer as before, as often as it is asked for
		}
	case err != nil && (admits || !c.known()):
		where := "unknown"
		if remote, ok := grpcpeer.FromContext(ctx); ok {
			where = remote.Addr.String()
		}
		if !s.refused(method, where, err) {
			return
		}
	}
	s.audit(ctx, req, resp, err)
}

type callerStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (c callerStream) Context() context.Context { return c.ctx }

func (s *Server) stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	heard(stream.Context())
	defer func() { s.metrics.calls.WithLabelValues(info.FullMethod, status.Code(err).String()).Inc() }()
	ctx, err := s.authorise(stream.Context(), info.FullMethod)
	if err == nil {
		err = handler(srv, callerStream{stream, ctx})
	}
	s.record(ctx, nil, nil, err)
	return err
}
