package dataplaneapi

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/roles"
	"github.com/entente-mesh/entente/internal/admission"
	"github.com/entente-mesh/entente/internal/dataplane"
	"github.com/entente-mesh/entente/internal/peer"
)

// Domain is what a process knows of those who administer it from elsewhere.
type Domain interface {
	// Roles are those of the holder of a SPIFFE path of the own domain.
	Roles(path string) roles.Roles
	// Stands are the SPIFFE paths that the process stands for: who owns all of them may operate it.
	Stands() []string
}

// Bounds of administrators from elsewhere.
const (
	remoteConns       = 32 // with a role
	remoteConnsOfOne  = 4
	roleless          = 4 // connections without: each ends with its first answer, or soon
	rolelessLimit     = 5 * time.Second
	remoteCalls       = 16 // under way
	remoteCallsOfOne  = 4
	remoteRate        = 10 // calls of one a second
	remoteBurst       = 40
	handshakeRate     = 5 // of one address a second
	handshakeBurst    = 20
	allHandshakesRate = 50
	remoteIdle        = 2 * time.Minute
)

// Remote serves administrators who come to an mTLS door with a SVID of the own domain. It is
// a dataplane.Administration.
type Remote struct {
	api *Server

	seats, others   *admission.Places
	handshakes, all *admission.Rate
	rate            *admission.Rate
	calls           *admission.Places
	incoming        chan net.Conn
	closing         sync.Once
	closed          chan struct{}
}

// NewRemote returns a Remote that serves api once ServeRemote runs.
func NewRemote(api *Server, domain Domain) *Remote {
	api.domain = domain
	return &Remote{
		api:        api,
		seats:      admission.NewPlaces(admission.Limits{Most: remoteConns, PerSource: remoteConnsOfOne, Patience: admission.Never}),
		others:     admission.NewPlaces(admission.Limits{Most: roleless, PerSource: 1, Patience: time.Second}),
		handshakes: admission.NewRate(handshakeRate, handshakeBurst, admission.MaxSources),
		all:        admission.NewRate(allHandshakesRate, allHandshakesRate, 1),
		rate:       admission.NewRate(remoteRate, remoteBurst, remoteConns),
		calls:      admission.NewPlaces(admission.Limits{Most: remoteCalls, PerSource: remoteCallsOfOne, Patience: admission.Never}),
		incoming:   make(chan net.Conn),
		closed:     make(chan struct{}),
	}
}

var errTooOften = errors.New("administrators come too often")

// Hello is part of dataplane.Administration.
func (r *Remote) Hello(source string) error {
	now := time.Now()
	if r.handshakes.Take(source, 1, now) > 0 || r.all.Take("", 1, now) > 0 {
		return errTooOften
	}
	return nil
}

// Seat gives who has a role a place as long as he has it. Who has none is let in only to
// be told so: his place is anybody's after a moment.
func (r *Remote) Seat(id spiffeid.ID) (*admission.Places, peer.Authorize) {
	if why := r.lacks(id); why != "" {
		return r.others, func(spiffeid.ID) error { return nil }
	}
	return r.seats, func(id spiffeid.ID) error {
		if why := r.lacks(id); why != "" {
			return errors.New(why)
		}
		return nil
	}
}

func (r *Remote) lacks(id spiffeid.ID) string {
	held := r.api.domain.Roles(id.Path())
	return held.Lacks(roles.See)
}

// Take is part of dataplane.Administration.
func (r *Remote) Take(conn *dataplane.AdminConn) bool {
	if r.lacks(conn.ID) != "" {
		time.AfterFunc(rolelessLimit, func() { conn.Close() })
	}
	select {
	case r.incoming <- conn:
		return true
	case <-r.closed:
		return false
	}
}

// Accept is part of net.Listener, as are Close and Addr.
func (r *Remote) Accept() (net.Conn, error) {
	select {
	case conn := <-r.incoming:
		return conn, nil
	case <-r.closed:
		return nil, net.ErrClosed
	}
}

// Close has no more connections taken.
func (r *Remote) Close() error {
	r.closing.Do(func() { close(r.closed) })
	return nil
}

// Addr is nobody's.
func (r *Remote) Addr() net.Addr { return &net.TCPAddr{} }

// Serve serves what doors hand over until ctx ends and calls under way had three seconds
// to finish.
func (r *Remote) Serve(ctx context.Context) error {
	defer r.Close()
	return r.api.serve(ctx, r, "administrators' connections", r.tap,
		grpc.Creds(handed{}),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: remoteIdle, Time: 20 * time.Second, Timeout: 10 * time.Second}),
	)
}

// tap bounds a caller's calls before anything of them is read.
func (r *Remote) tap(ctx context.Context) (leave func(), err error) {
	c, err := r.api.caller(ctx)
	if err != nil {
		return nil, err
	}
	if wait := r.rate.Take(c.who, 1, time.Now()); wait > 0 {
		return nil, tooMany("%s calls too often: try again in %s", c.who, wait.Round(time.Millisecond))
	}
	place := r.calls.Take(c.who, time.Now(), func() {})
	if place == nil {
		return nil, tooMany("too many calls of administrators are under way, or of %s: try again when they have ended", c.who)
	}
	return place.Leave, nil
}

// handed are the credentials of connections that have shaken hands already.
type handed struct{}

// remoteInfo is the AuthInfo of such a connection.
type remoteInfo struct {
	credentials.CommonAuthInfo
	id spiffeid.ID
}

// AuthType is part of credentials.AuthInfo.
func (remoteInfo) AuthType() string { return "tls" }

// ServerHandshake is part of credentials.TransportCredentials, as are those below.
func (handed) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	own, ok := conn.(*dataplane.AdminConn)
	if !ok {
		return nil, nil, errors.New("the connection was not handed over by an mTLS door")
	}
	return conn, remoteInfo{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, own.ID}, nil
}

func (handed) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("not a client")
}

func (handed) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

func (h handed) Clone() credentials.TransportCredentials { return h }

func (handed) OverrideServerName(string) error { return nil }

// narrow takes out of a status what only roles for the whole domain show: all but how the
// process is, and the services that the caller's prefixes cover.
func narrow(s *ententev1.DataPlaneStatusResponse, held *roles.Roles) {
	s.Ca, s.Bundles, s.Listeners, s.Svids, s.ServicesLeftOut = nil, nil, nil, nil, 0
	var shown []*ententev1.ServiceView
	for _, service := range s.GetServices() {
		if id, err := spiffeid.FromString(service.GetSpiffeId()); err == nil && held.Sees(id.Path()) {
			shown = append(shown, service)
		}
	}
	s.Services = shown
}

// dialTime is how long a process may take to shake hands with an administrator.
const dialTime = 10 * time.Second

// Administrator is who asks a gateway or an agent of his own domain, at its mTLS address.
type Administrator struct {
	SVID    x509svid.Source
	Bundles x509bundle.Source
	Domain  spiffeid.TrustDomain

	Connect func(ctx context.Context, network, address string) (net.Conn, error) // nil: a net.Dialer
}

// Dial connects the administrator, and returns when the first handshake is done. That he
// has a role shows at the first call.
func (a Administrator) Dial(ctx context.Context, address string, options ...grpc.DialOption) (*grpc.ClientConn, error) {
	td, connect := a.Domain, a.Connect
	if connect == nil {
		connect = new(net.Dialer).DialContext
	}
	config := peer.ClientTLS(a.SVID, a.Bundles, func(id spiffeid.ID) error {
		if !id.MemberOf(td) || !strings.HasPrefix(id.Path(), ca.GatewayPath("")) && !strings.HasPrefix(id.Path(), ca.AgentPath("")) {
			return fmt.Errorf("%s is no gateway or agent of %s", id, td)
		}
		return nil
	}, dataplane.AdminALPN)
	config.ServerName = td.Name()
	dial := func(ctx context.Context) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, dialTime)
		defer cancel()
		raw, err := connect(ctx, "tcp", address)
		if err != nil {
			return nil, err
		}
		conn := tls.Client(raw, config)
		if err := conn.HandshakeContext(ctx); err != nil {
			raw.Close()
			return nil, fmt.Errorf("TLS with %s: %w", address, err)
		}
		return conn, nil
	}
	// Dialled once to say what is wrong: gRPC would name its transport and no remedy.
	first, err := dial(ctx)
	if err != nil {
		return nil, err
	}
	ready := make(chan net.Conn, 1)
	ready <- first
	options = append(options, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			select {
			case conn := <-ready:
				return conn, nil
			default:
				return dial(ctx)
			}
		}))
	return grpc.NewClient("passthrough:///"+address, options...)
}
