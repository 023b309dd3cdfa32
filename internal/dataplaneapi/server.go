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

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/internal/localpeer"
)

// Process is what is administered. Its methods may be called concurrently.
type Process interface {
	// Status says how the process is; service, if it is not empty, is the only one to show.
	Status(service string) *ententev1.DataPlaneStatusResponse
}

// Bounds of what callers can have held for them.
const (
	maxMessage     = 64 << 10
	maxHeaders     = 16 << 10
	maxStreams     = 8 // of one connection
	maxCalls       = 8 // of all connections together
	handshakeLimit = 5 * time.Second
	callLimit      = 15 * time.Second
	drainTime      = 3 * time.Second
)

// Server is the API of one process. Its methods may be called concurrently.
type Server struct {
	process Process
	log     *slog.Logger
	calls   chan struct{} // slots
}

// New returns the API, not served yet; log may be nil.
func New(process Process, log *slog.Logger) *Server {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Server{process, log, make(chan struct{}, maxCalls)}
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
	return handler(ctx, req)
}

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
	return d.server.process.Status(r.GetService()), nil
}
