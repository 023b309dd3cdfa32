// Package workloadapi serves the SPIFFE Workload API to the workloads of one
// host on a unix socket: X.509-SVIDs, JWT-SVIDs, their bundles and, where they are
// switched on, WIT-SVIDs.
//
// Who calls is not asked but seen: the process that connected the socket is
// attested, and gets what the entries give whose selectors it satisfies. That is
// looked at again whenever something changes, so an entitlement that ends also
// ends an open stream.
package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/meshagent"
	"github.com/entente-mesh/entente/meshagent/workloadattest"
)

const (
	maxRequest = 64 << 10 // bytes; a token has 16 KiB at most
	// Goroutines that stand ready for calls: a fresh one has to grow its stack first.
	// While lasting streams have taken all of them, every call gets a fresh one.
	streamWorkers = 64
	startTime     = 5 * time.Second // a caller waits so long for an agent or entry that has no SVID yet
	drainTime     = time.Second     // for streams to end on shutdown
)

// Listen opens the Workload API's socket: everybody may connect (0777), the
// process that does is attested. The directory is made with mode 0755, whatever the
// umask, when it is missing.
func Listen(path string) (net.Listener, error) {
	if err := daemon.MakeOpenDir(filepath.Dir(path)); err != nil {
		return nil, fmt.Errorf("cannot make the directory of the Workload API's socket: %w", err)
	}
	listener, err := daemon.ListenUnix(path, 0o777)
	if err != nil {
		return nil, fmt.Errorf("cannot open the Workload API: %w", err)
	}
	return listener, nil
}

// Server is one Workload API endpoint.
type Server struct {
	workload.UnimplementedSpiffeWorkloadAPIServer

	agent    *meshagent.Agent
	listener net.Listener
	log      *slog.Logger
	patience time.Duration // startTime, but in tests
	stopping chan struct{} // closed when streams must end

	beside  []func(grpc.ServiceRegistrar)
	lasting context.Context // ends with stopping, for the services beside
	halt    context.CancelFunc

	taken  sync.WaitGroup // connections that were accepted and have not begun their handshake
	limits *limits
}

// New returns a server for a listener whose connections are *net.UnixConn. log
// may be nil.
func New(agent *meshagent.Agent, listener net.Listener, log *slog.Logger) *Server {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s := &Server{agent: agent, listener: listener, log: log, patience: startTime, stopping: make(chan struct{}), limits: newLimits()}
	s.lasting, s.halt = context.WithCancel(context.Background())
	return s
}

// Beside adds another service to the socket, before Run. Its calls are attested
// (Caller) and counted like those of the Workload API, need no security header,
// and have their context cancelled with Unavailable as cause when the server stops.
func (s *Server) Beside(register func(grpc.ServiceRegistrar)) { s.beside = append(s.beside, register) }

// Run serves until ctx ends, which it calls once. It closes the listener. What it has
// accepted by then gets its answer; open streams end with Unavailable, whereupon a
// client comes back.
func (s *Server) Run(ctx context.Context) error {
	server := grpc.NewServer(
		grpc.Creds(transport{s}),
		grpc.StreamInterceptor(s.guardStream),
		grpc.UnaryInterceptor(s.guardUnary),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.ReadBufferSize(2<<10), // requests are short, and many clients connect for one
		// So small a window does for them, and its size need not be felt for with pings.
		grpc.StaticStreamWindowSize(maxRequest),
		grpc.StaticConnWindowSize(maxRequest),
		grpc.NumStreamWorkers(streamWorkers),
		grpc.ConnectionTimeout(5*time.Second),
	)
	workload.RegisterSpiffeWorkloadAPIServer(server, s)
	healthv1.RegisterHealthServer(server, health{agent: s.agent})
	for _, register := range s.beside {
		register(server)
	}
	reflection.Register(server)

	served := make(chan error, 1)
	go func() { served <- server.Serve(counted{s.listener, &s.taken}) }()
	select {
	case err := <-served:
		return fmt.Errorf("the Workload API has ended: %w", err)
	case <-ctx.Done():
	}
	// GracefulStop waits for handshakes that have begun, and cuts what was accepted just
	// before: so nothing more is accepted, and each has to begin, which takes no time.
	s.listener.Close()
	<-served
	s.taken.Wait()
	close(s.stopping)
	s.halt()
	hard := time.AfterFunc(drainTime, server.Stop)
	server.GracefulStop()
	hard.Stop()
	return nil
}

// counted is a listener whose connections are counted until their handshake begins.
type counted struct {
	net.Listener
	taken *sync.WaitGroup
}

func (l counted) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err == nil {
		l.taken.Add(1)
	}
	return conn, err
}

// transport attests who connects. There is no TLS: the socket is local, and the
// specification forbids to ask the workload for anything (Workload Endpoint 3.1, 5).
type transport struct{ server *Server }

// caller is what a connection's handshake found out.
type caller struct {
	process *workloadattest.Process
	refused error // what it is told; process is then nil
}

func (*caller) AuthType() string { return "workload attestation" }

func (t transport) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	t.server.taken.Done()
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, nil, fmt.Errorf("%T is not a unix socket: its peer cannot be attested", conn)
	}
	attested, err := t.server.agent.AttestUnix(unixConn)
	if err != nil {
		t.server.log.Warn("a Workload API client cannot be attested", "error", err)
		return t.refuse(conn, status.Error(codes.PermissionDenied, "the calling process cannot be attested"))
	}
	release, err := t.server.take(attested, usage{connections: 1}, 2)
	if err != nil {
		attested.Close()
		return t.refuse(conn, err)
	}
	return &heldConn{Conn: conn, release: sync.OnceFunc(func() { release(); attested.Close() })}, &caller{process: attested}, nil
}

// refuse lets a caller ask once, so that it hears why; then it is cut off.
func (t transport) refuse(conn net.Conn, why error) (net.Conn, credentials.AuthInfo, error) {
	release, ok := t.server.limits.tell()
	if !ok {
		return nil, nil, why
	}
	cut := time.AfterFunc(refusedTime, func() { conn.Close() })
	return &heldConn{Conn: conn, release: sync.OnceFunc(func() { cut.Stop(); release() })}, &caller{refused: why}, nil
}

// take counts what a process opens, or says why it may not.
func (s *Server) take(p *workloadattest.Process, more usage, cost float64) (release func(), err error) {
	release, loud, err := s.limits.take(process{p.PID(), p.UID}, more, cost)
	if loud {
		s.log.Warn("a Workload API client is held back", "pid", p.PID(), "uid", p.UID, "reason", status.Convert(err).Message())
	}
	return release, err
}

func (transport) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these are a server's credentials")
}

func (transport) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "local"}
}

func (t transport) Clone() credentials.TransportCredentials { return t }
func (transport) OverrideServerName(string) error           { return nil }

// heldConn lets go of the attested process with the connection.
type heldConn struct {
	net.Conn
	release func()
}

func (c *heldConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}

// checkHeader refuses a call of the Workload API without its security header: a
// browser or a proxy that was talked into connecting cannot set it (Workload
// Endpoint 3, 6). Other services on the socket (SDS, health, reflection) need none.
func checkHeader(ctx context.Context, method string) error {
	if !spiffeCall(method) {
		return nil
	}
	if values := metadata.ValueFromIncomingContext(ctx, "workload.spiffe.io"); len(values) != 1 || values[0] != "true" {
		return status.Error(codes.InvalidArgument, "security header missing from request: workload.spiffe.io must be true")
	}
	return nil
}

func spiffeCall(method string) bool {
	return strings.HasPrefix(method, "/"+workload.SpiffeWorkloadAPI_ServiceDesc.ServiceName+"/")
}

func (s *Server) guardUnary(ctx context.Context, request any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	if err := checkHeader(ctx, info.FullMethod); err != nil {
		return nil, err
	}
	process, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	release, err := s.take(process, usage{streams: 1}, 1)
	if err != nil {
		return nil, err
	}
	defer release()
	return handle(ctx, request)
}

func (s *Server) guardStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	if err := checkHeader(stream.Context(), info.FullMethod); err != nil {
		return err
	}
	process, err := callerOf(stream.Context())
	if err != nil {
		return err
	}
	release, err := s.take(process, usage{streams: 1}, 2)
	if err != nil {
		return err
	}
	defer release()
	if spiffeCall(info.FullMethod) {
		return handle(srv, stream) // it looks at stopping itself
	}
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	defer context.AfterFunc(s.lasting, func() { cancel(errStopping) })()
	return handle(srv, endingStream{stream, ctx})
}

var errStopping = status.Error(codes.Unavailable, "the agent is stopping")

// endingStream is a stream whose context also ends when the server stops.
type endingStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s endingStream) Context() context.Context { return s.ctx }

// Caller is the attested process at the other end of a call, for services beside
// the Workload API.
func Caller(ctx context.Context) (*workloadattest.Process, error) { return callerOf(ctx) }

func callerOf(ctx context.Context) (*workloadattest.Process, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, status.Error(codes.Internal, "the connection has no peer")
	}
	c, ok := p.AuthInfo.(*caller)
	switch {
	case !ok:
		return nil, status.Error(codes.Internal, "the connection's peer was not attested")
	case c.refused != nil:
		return nil, c.refused
	}
	return c.process, nil
}
