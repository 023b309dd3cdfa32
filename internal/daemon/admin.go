package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/entente-mesh/entente/internal/admission"
)

// maxAdminConnections is how many connections there may be at a time; from one address a
// quarter of them.
const maxAdminConnections = 256

// Admin is the TCP admin listener: /healthz, /readyz and /metrics, to be read by anybody, and nothing else.
type Admin struct {
	listener net.Listener
	handler  http.Handler
	warnings func() []string
}

// Warn has /readyz say what is wrong although the process serves, a line each. It is to be
// called before Run.
func (a *Admin) Warn(warnings func() []string) { a.warnings = warnings }

// NewAdmin listens on addr. ready says why the process cannot serve yet, nil if it can; it is called concurrently, once per
// request to /readyz, and must be quick. A nil ready is always ready; a nil gatherer has no /metrics.
func NewAdmin(addr string, ready func() error, gatherer prometheus.Gatherer) (*Admin, error) {
	listener, err := Listen(addr)
	if err != nil {
		return nil, fmt.Errorf("admin listener: %w", err)
	}
	mux := http.NewServeMux()
	a := &Admin{listener: listener, handler: mux, warnings: func() []string { return nil }}
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusOK, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if ready != nil {
			if err := ready(); err != nil {
				answer(w, http.StatusServiceUnavailable, "not ready: "+err.Error())
				return
			}
		}
		text := "ready"
		for _, warning := range a.warnings() {
			text += "\nwarning: " + warning
		}
		answer(w, http.StatusOK, text)
	})
	if gatherer != nil {
		mux.Handle("GET /metrics", promhttp.HandlerFor(gatherer, promhttp.HandlerOpts{}))
	}
	return a, nil
}

func answer(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	io.WriteString(w, text+"\n")
}

// Addr returns the address it listens on, with the real port if 0 was asked for.
func (a *Admin) Addr() string { return a.listener.Addr().String() }

// Run serves until ctx is done, then closes the listener and returns nil.
func (a *Admin) Run(ctx context.Context) error {
	server := &http.Server{
		Handler:           a.handler,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          stdlog.New(io.Discard, "", 0), // a scraper that hangs up is no news
	}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	err := server.Serve(admission.Listen(a.listener, admission.Share(maxAdminConnections, time.Second), nil))
	if ctx.Err() != nil && errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("admin listener %s: %w", a.Addr(), err)
}
