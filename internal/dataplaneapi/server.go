// Package dataplaneapi serves DataPlane, the administrative API of a gateway or an agent,
// and puts together what its status says.
//
// Each call is authenticated from the connection it came over and authorised by one table
// (methods.go), which denies what it does not list. Who can open the unix socket, whose mode
// is 0600, may do everything; who comes to an mTLS door with a SVID of the own domain (remote.go),
// what its roles allow.
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
	"github.com/entente-mesh/entente/ca/roles"
	"github.com/entente-mesh/entente/internal/admission"
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
	records *slog.Logger    // access log
	said    *admission.Fold // refusals in the log
	domain  Domain          // nil: nobody comes from elsewhere
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
	return &Server{process: process, log: log, records: records, said: admission.NewFold(time.Second, 50)}
}

// ServeLocal serves the operators of the host on a unix socket until ctx ends and calls
// under way had three seconds to finish. It closes the listener, whose mode is its owner's
// business.
func (s *Server) ServeLocal(ctx context.Context, listener net.Listener) error {
	calls := make(chan struct{}, maxCalls) // slots
	tap := func(context.Context) (leave func(), err error) {
		select {
		case calls <- struct{}{}:
			return func() { <-calls }, nil
		default:
			return nil, tooMany("%d administrative calls are under way at this process; try again when they have ended", maxCalls)
		}
	}
	return s.serve(ctx, listener, "the admin socket", tap, grpc.Creds(localpeer.Credentials{}))
}

// serve serves until ctx ends. take bounds each call before anything of it is read: in
// number, as it says, and in time, so that a message that is never sent to its end does
// not stay.
func (s *Server) serve(ctx context.Context, listener net.Listener, what string, take func(context.Context) (leave func(), err error), options ...grpc.ServerOption) error {
	tapped := func(ctx context.Context, _ *tap.Info) (context.Context, error) {
		leave, err := take(ctx)
		if err != nil {
			return nil, err
		}
		limited, cancel := context.WithTimeout(ctx, callLimit)
		context.AfterFunc(ctx, func() {
			cancel()
			leave()
		})
		return limited, nil
	}
	server := grpc.NewServer(append(options,
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
		grpc.InTapHandle(tapped),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(handshakeLimit),
	)...)
	ententev1.RegisterDataPlaneServer(server, door{server: s})
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	select {
	case err := <-failed:
		server.Stop() // its connections do not end with the listener
		return fmt.Errorf("%s: serving has ended: %w", what, err)
	case <-ctx.Done():
	}
	timer := time.AfterFunc(drainTime, server.Stop)
	defer timer.Stop()
	server.GracefulStop()
	<-failed
	return ctx.Err()
}

func tooMany(format string, args ...any) error {
	return status.Errorf(codes.ResourceExhausted, format, args...)
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	c, err := s.authorise(ctx, info.FullMethod)
	if err != nil {
		if unsaid, say := s.said.Say(info.FullMethod+" by "+c.who, time.Now()); say {
			s.log.Warn("administrative call refused", "method", info.FullMethod, "administrator", c.who, "reason", status.Convert(err).Message(), "more_since_last_line", unsaid)
		}
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
	roles    roles.Roles
}

// caller asks about roles at each call: they may have changed since the last one.
func (s *Server) caller(ctx context.Context) (caller, error) {
	if operator, ok := ctx.Value(operatorKey{}).(localpeer.Info); ok {
		return caller{who: operator.User, operator: true}, nil
	}
	remote, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return caller{who: "unknown"}, status.Error(codes.Unauthenticated, "no connection to authenticate")
	}
	switch info := remote.AuthInfo.(type) {
	case localpeer.Info:
		return caller{who: info.User, operator: true}, nil
	case remoteInfo:
		if s.domain != nil {
			return caller{who: info.id.String(), roles: s.domain.Roles(info.id.Path())}, nil
		}
	}
	return caller{who: "unknown"}, status.Error(codes.Unauthenticated, "unknown kind of connection")
}

func (s *Server) authorise(ctx context.Context, name string) (caller, error) {
	c, err := s.caller(ctx)
	if err != nil {
		return c, err
	}
	m, listed := methods[name]
	why := "nobody may"
	switch {
	case !listed:
	case c.operator && m.operators:
		return c, nil
	case !c.operator && m.right != 0:
		if why = c.roles.Lacks(m.right, s.domain.Stands()...); why == "" {
			return c, nil
		}
	}
	return c, status.Errorf(codes.PermissionDenied, "%s may not call %s: %s", c.who, name, why)
}

// stream refuses: no method streams yet.
func (s *Server) stream(_ any, stream grpc.ServerStream, info *grpc.StreamServerInfo, _ grpc.StreamHandler) error {
	return status.Errorf(codes.PermissionDenied, "nobody may call %s", info.FullMethod)
}

type door struct {
	ententev1.UnimplementedDataPlaneServer
	server *Server
}

func (d door) Status(ctx context.Context, r *ententev1.DataPlaneStatusRequest) (*ententev1.DataPlaneStatusResponse, error) {
	s := d.server.process.Status(r)
	if c, _ := ctx.Value(callerKey{}).(caller); !c.operator && c.roles.Lacks(roles.SeeAll) != "" {
		narrow(s, &c.roles)
	}
	return s, nil
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
