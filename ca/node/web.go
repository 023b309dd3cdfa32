package node

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/server"
	"github.com/entente-mesh/entente/federation/exchange"
	"github.com/entente-mesh/entente/internal/admission"
	"github.com/entente-mesh/entente/internal/daemon"
)

// witPath is the bundle endpoint's variant with WIT keys. It has a URL of its own since
// there are SPIFFE implementations that refuse a whole bundle for a use they do not
// know; and it is there only while a relationship asks for it.
const witPath = "/wit"

// web is what the world is shown over HTTP: this domain's keys.
type web struct {
	*core
	bundles *server.Bundles
	wit     atomic.Bool // a relationship asks for WIT keys
}

const (
	maxWebConnections = 1024
	webDrainTime      = 3 * time.Second
	// webUndisturbed is how long a connection is left in peace by others of its address,
	// which together have a quarter of all.
	webUndisturbed = 5 * time.Second
)

func (w *web) readWIT(st *domain.State) {
	asked := false
	for _, td := range st.Peers() {
		if o, ok := st.Object("Relationship/" + td); ok && o.GetRelationship().GetWit() {
			asked = true
		}
	}
	w.wit.Store(asked)
}

func (w *web) bundleHandler() http.Handler {
	public := exchange.Handler("/", w.bundles.Source)
	variant := exchange.Handler(witPath, w.bundles.SourceWIT)
	return http.HandlerFunc(func(out http.ResponseWriter, r *http.Request) {
		if r.URL.Path == witPath && w.wit.Load() {
			variant.ServeHTTP(out, r)
			return
		}
		public.ServeHTTP(out, r)
	})
}

// serveOIDC serves the discovery document and the keys to the public, with a
// certificate that the public knows, until ctx ends. TLS 1.3 only.
func (w *web) serveOIDC(ctx context.Context, listener net.Listener) error {
	handler, err := server.OIDCHandler(w.cfg.OIDC.Issuer, w.bundles)
	if err != nil {
		listener.Close()
		return err
	}
	pair, err := daemon.FollowKeyPair(w.files, "oidc.certFile and oidc.keyFile", w.cfg.OIDC.CertFile, w.cfg.OIDC.KeyFile)
	if err != nil {
		w.log.Error("nobody is shown the discovery document until this is mended", "error", err)
	}
	site := &http.Server{
		Handler:           handler,
		ReadTimeout:       5 * time.Second,
		ReadHeaderTimeout: 5 * time.Second,
		WriteTimeout:      10 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          log.New(io.Discard, "", 0), // strangers' handshakes
		TLSConfig: &tls.Config{
			MinVersion:             tls.VersionTLS13,
			GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return pair.Get() },
			SessionTicketsDisabled: true,
		},
	}
	served := make(chan error, 1)
	go func() {
		served <- site.ServeTLS(admission.Listen(listener, admission.Share(maxWebConnections, webUndisturbed), nil), "", "")
	}()
	select {
	case err := <-served:
		return fmt.Errorf("the OIDC listener has ended: %w", err)
	case <-ctx.Done():
	}
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), webDrainTime)
	defer cancel()
	if err := site.Shutdown(drain); err != nil {
		site.Close()
	}
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
