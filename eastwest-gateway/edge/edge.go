package edge

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/entente-mesh/entente/internal/admission"
	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/internal/problem"
	"github.com/entente-mesh/entente/internal/refusal"
)

// Mesh is what the edge calls services through: an ordinary caller's way into the mesh.
// ForwardUser and Refuse answer the request and write its access record. Safe for concurrent use.
type Mesh interface {
	// ForwardUser sends r to a service by name, with the path that stands in r.URL, without
	// the user's credentials but those that pass names, and cuts its streams at a time, or
	// earlier when still gives an error.
	ForwardUser(w http.ResponseWriter, r *http.Request, service string, pass []string, until time.Time, still func() error)
	// Revoked says why a token whose signature was verified is not to be accepted although
	// it is valid; nil if it is.
	Revoked(subject, keyID string, claims map[string]any) error
	// Refuse answers with a problem; detail is for our own log only.
	Refuse(w http.ResponseWriter, r *http.Request, service string, p problem.Problem, detail string)
	// Drained tells whether each connection is to end with its next answer.
	Drained() bool
}

const (
	headerTimeout = 10 * time.Second
	idleTimeout   = 2 * time.Minute
	drainTimeout  = 10 * time.Second
	maxHeaders    = 64 << 10
	maxStreams    = 250 // of one HTTP/2 connection
	// undisturbed is how long a connection without a good token is left in peace by others
	// of its address.
	undisturbed = 5 * time.Second
)

// Edge is one listener for clients without SVIDs.
type Edge struct {
	config   Config
	tokens   *tokens
	tiers    *tiers
	routes   routes
	mesh     Mesh
	log      *slog.Logger
	listener net.Listener
}

// New checks the configuration, reads the key files and takes over the listener. Files that
// cannot be used yet are problems of files: until they are mended no client is served.
func New(config Config, listener net.Listener, mesh Mesh, files *daemon.Files, log *slog.Logger) (*Edge, error) {
	if err := config.check(); err != nil {
		return nil, err
	}
	claim := config.TierClaim
	if claim == "" {
		claim = "tier"
	}
	tokens, err := newTokens(config.JWT, claim, mesh.Revoked, files, log)
	if err != nil {
		return nil, err
	}
	certificate, _ := daemon.FollowKeyPair(files, "edge.tls", config.TLS.CertFile, config.TLS.KeyFile)
	e := &Edge{config: config, tokens: tokens, tiers: newTiers(config.Tiers), routes: newRoutes(config.Routes), mesh: mesh, log: log}
	strangers, known := config.Connections.limits()
	e.listener = tls.NewListener(admission.ListenTwice(listener, strangers, known, nil), &tls.Config{
		MinVersion:     tls.VersionTLS12, // clients are not ours: phones and partners
		NextProtos:     []string{"h2", "http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return certificate.Get() },
	})
	return e, nil
}

// Run serves until ctx ends, then lets requests in flight finish for a bounded time.
func (e *Edge) Run(ctx context.Context) error {
	server := &http.Server{
		Handler:           e,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaders,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: maxStreams},
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if secure, ok := c.(*tls.Conn); ok {
				ctx = context.WithValue(ctx, connKey{}, secure.NetConn())
			}
			return ctx
		},
		ErrorLog: slog.NewLogLogger(e.log.Handler(), slog.LevelDebug),
	}
	drained := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(drained)
		bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
		defer cancel()
		if server.Shutdown(bounded) != nil {
			server.Close()
		}
	})
	err := server.Serve(e.listener)
	if !stop() {
		<-drained
		return nil
	}
	return fmt.Errorf("edge: %w", err)
}

type connKey struct{}

// seat gives the connection of a user who has shown a good token a place of its own.
func seat(r *http.Request) bool {
	conn, ok := r.Context().Value(connKey{}).(*admission.Conn)
	return !ok || conn.Seat()
}

// ServeHTTP takes one request of a client through token, tier and route to its service.
func (e *Edge) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	now := time.Now()
	if e.mesh.Drained() {
		w.Header().Set("Connection", "close") // over HTTP/2 it is a GOAWAY
	}
	// Our own word for who asks; a client's is worth nothing.
	user, refused := e.tokens.verify(r, now)
	if refused == nil && !seat(r) {
		w.Header().Set("Connection", "close")
		refused = &problem.Problem{Reason: refusal.NotReady, Detail: "too many connections are open, or come from this address"}
	}
	if refused == nil {
		refused = e.tiers.take(user, now)
	}
	if refused != nil {
		e.mesh.Refuse(w, r, "", *refused, "user "+user.Subject)
		return
	}
	route, path, ok := e.routes.match(r.URL.EscapedPath())
	if !ok {
		e.mesh.Refuse(w, r, "", problem.Problem{Reason: refusal.NoRoute, Detail: "no route for this path"}, "user "+user.Subject)
		return
	}
	if route.StripPrefix {
		if err := setPath(r.URL, path); err != nil {
			e.mesh.Refuse(w, r, route.Service, problem.Problem{Reason: refusal.BadRequest, Detail: "the path does not parse"}, err.Error())
			return
		}
	}
	e.mesh.ForwardUser(w, r, route.Service, route.Pass, user.Expires, user.still)
}

func setPath(u *url.URL, escaped string) error {
	path, err := url.PathUnescape(escaped)
	if err != nil {
		return err
	}
	if strings.HasPrefix(path, "//") {
		return errors.New("the path begins with two slashes")
	}
	u.Path, u.RawPath = path, escaped
	return nil
}
