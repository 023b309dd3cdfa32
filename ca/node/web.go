package node

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
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

func (n *Node) readWIT(st *domain.State) {
	asked := false
	for _, td := range st.Peers() {
		if o, ok := st.Object("Relationship/" + td); ok && o.GetRelationship().GetWit() {
			asked = true
		}
	}
	n.wit.Store(asked)
}

func (n *Node) bundleHandler() http.Handler {
	public := exchange.Handler("/", n.bundles.Source)
	variant := exchange.Handler(witPath, n.bundles.SourceWIT)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == witPath && n.wit.Load() {
			variant.ServeHTTP(w, r)
			return
		}
		public.ServeHTTP(w, r)
	})
}

const (
	maxWebConnections = 1024
	webDrainTime      = 3 * time.Second
	// webUndisturbed is how long a connection is left in peace by others of its address,
	// which together have a quarter of all.
	webUndisturbed = 5 * time.Second
)

// serveOIDC serves the discovery document and the keys to the public, with a
// certificate that the public knows, until ctx ends. TLS 1.3 only.
func (n *Node) serveOIDC(ctx context.Context) error {
	handler, err := server.OIDCHandler(n.cfg.OIDC.Issuer, n.bundles)
	if err != nil {
		n.listeners.OIDC.Close()
		return err
	}
	pair := daemon.FollowKeyPair(n.cfg.OIDC.CertFile, n.cfg.OIDC.KeyFile)
	if _, err := pair.Get(); err != nil {
		n.listeners.OIDC.Close()
		return fmt.Errorf("oidc.certFile and oidc.keyFile cannot be used: %w", err)
	}
	web := &http.Server{
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
		served <- web.ServeTLS(admission.Listen(n.listeners.OIDC, admission.Share(maxWebConnections, webUndisturbed), nil), "", "")
	}()
	select {
	case err := <-served:
		return fmt.Errorf("the OIDC listener has ended: %w", err)
	case <-ctx.Done():
	}
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), webDrainTime)
	defer cancel()
	if err := web.Shutdown(drain); err != nil {
		web.Close()
	}
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
