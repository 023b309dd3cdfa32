// Package dataplaneapi serves DataPlane, the administrative API of a gateway or an agent,
// and puts together what its status says.
//
// Each call is authenticated from the connection it came over and authorised by one table
// (methods.go), which denies what it does not list. Who can open the unix socket, whose mode
// is 0600, may do everything.
package dataplaneapi

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/internal/dataplane"
	"github.com/entente-mesh/entente/internal/localpeer"
)

// Process is what is administered. Its methods may be called concurrently.
type Process interface {
	// Status says how the process is; which services it shows, the request says.
	Status(*ententev1.DataPlaneStatusRequest) *ententev1.DataPlaneStatusResponse
}

// Drainer is a Process that can be drained.
type Drainer interface {
	// Drain has it take no new connections, and returns what is in force.
	Drain(dataplane.Drained) dataplane.Drained
	// Undrain has it take them again; false: it does.
	Undrain() bool
}

// Bounds of what callers can have held for them.
const (
	maxMessage     = 64 << 10
	maxHeaders     = 16 << 10
	maxReason      = 200 // characters
	maxStreams     = 8   // of one connection
	maxCalls       = 8   // of all connections together
	handshakeLimit = 5 * time.Second
	callLimit      = 15 * time.Second
	drainTime      = 3 * time.Second
)

// Server is the API of one process. Its methods may be called concurrently.
type Server struct {
	process Process
	log     *slog.Logger
	records *slog.Logger  // access log
	calls   chan struct{} // slots
}

// New returns the API, not served yet. What changes something is recorded in log and in
// records, the access log; both may be nil.
func New(process Process, log, records *slog.Logger) *Server {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if records == nil {
		records = slog.New(slog.DiscardHandler)
	}
	return &Server{process, log, records, make(chan struct{}, maxCalls)}
}

// ServeLocal serves the operators of the host on a unix socket until ctx ends and calls
// under way had three seconds to finish. It closes the listener, whose mode is its owner's
// business.
func (s *Server) ServeLocal(ctx context.Context, listener net.Listener) error {
	server := grpc.NewServer(
		grpc.Creds(localpeer.Credentials{}),
		grpc.UnaryInterceptor(s.unary),
		grpc.InTapHandle(s.tap),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(handshakeLimit),
	)
	ententev1.RegisterDataPlaneServer(server, door{server: s})
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	select {
	case err := <-failed:
		server.Stop() // its connections do not end with the listener
		return fmt.Errorf("the admin socket has ended: %w", err)
	case <-ctx.Done():
	}
	timer := time.AfterFunc(drainTime, server.Stop)
	defer timer.Stop()
	server.GracefulStop()
	<-failed
	return ctx.Err()
}

// tap bounds each call before anything of it is read: in number, and in time, so that a
// message that is never sent to its end does not stay.
func (s *Server) tap(ctx context.Context, _ *tap.Info) (context.Context, error) {
	select {
	case s.calls <- struct{}{}:
	default:
		return nil, status.Errorf(codes.ResourceExhausted, "%d administrative calls are under way at this process; try again when they have ended", maxCalls)
	}
	limited, cancel := context.WithTimeout(ctx, callLimit)
	context.AfterFunc(ctx, func() {
		cancel()
		<-s.calls
	})
	return limited, nil
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	c, err := s.authorise(ctx, info.FullMethod)
	if err != nil {
		s.log.Warn("administrative call refused", "method", info.FullMethod, "administrator", c.who, "reason", status.Convert(err).Message())
		return nil, err
	}
	resp, err := handler(context.WithValue(ctx, callerKey{}, c), req)
	if methods[info.FullMethod].acts {
		s.record(c, info.FullMethod, req, err)
	}
	return resp, err
}

// record says who changed what, where requests are recorded as well.
func (s *Server) record(c caller, method string, req any, err error) {
	reason := ""
	if r, ok := req.(interface{ GetReason() string }); ok {
		reason = fmt.Sprintf("%.*s", maxReason, r.GetReason())
	}
	for _, log := range []*slog.Logger{s.log, s.records} {
		log.Info("administrative call", "method", method, "administrator", c.who, "outcome", status.Code(err).String(), "reason", reason)
	}
}

type callerKey struct{}

// caller is who calls, as the connection proves it.
type caller struct {
	who      string // for logs
	operator bool   // of the host: he may do everything that the table lists
}

func (s *Server) authorise(ctx context.Context, name string) (caller, error) {
	c := caller{who: "unknown"}
	remote, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return c, status.Error(codes.Unauthenticated, "no connection to authenticate")
	}
	info, ok := remote.AuthInfo.(localpeer.Info)
	if !ok {
		return c, status.Error(codes.Unauthenticated, "unknown kind of connection")
	}
	c = caller{info.User, true}
	if m, listed := methods[name]; !listed || !m.admits(c) {
		return c, status.Errorf(codes.PermissionDenied, "%s may not call %s", c.who, name)
	}
	return c, nil
}

type door struct {
	ententev1.UnimplementedDataPlaneServer
	server *Server
}

func (d door) Status(_ context.Context, r *ententev1.DataPlaneStatusRequest) (*ententev1.DataPlaneStatusResponse, error) {
	return d.server.process.Status(r), nil
}

func (d door) Drain(ctx context.Context, r *ententev1.DrainRequest) (*ententev1.DrainResponse, error) {
	p, err := d.drainer()
	if err != nil {
		return nil, err
	}
	if n := utf8.RuneCountInString(r.GetReason()); n > maxReason {
		return nil, status.Errorf(codes.InvalidArgument, "the reason has %d characters, at most %d are kept", n, maxReason)
	}
	c, _ := ctx.Value(callerKey{}).(caller)
	drained := p.Drain(dataplane.Drained{Who: c.who, Reason: r.GetReason(), Since: time.Now()})
	return &ententev1.DrainResponse{Drained: Drained(&drained)}, nil
}

func (d door) Undrain(context.Context, *ententev1.UndrainRequest) (*ententev1.UndrainResponse, error) {
	p, err := d.drainer()
	if err != nil {
		return nil, err
	}
	if !p.Undrain() {
		return nil, status.Error(codes.FailedPrecondition, "it is not drained: it takes connections")
	}
	return &ententev1.UndrainResponse{}, nil
}

func (d door) drainer() (Drainer, error) {
	if p, ok := d.server.process.(Drainer); ok {
		return p, nil
	}
	return nil, status.Error(codes.Unimplemented, "this process cannot be drained: gateways can; for instances of an agent there is entente service drain")
}
