package scenarios

import (
	"crypto/x509"
	"encoding/pem"
	"net/url"
	"time"

	"github.com/entente-mesh/entente/internal/daemon"
)

// upstreamLife is longer than a CA node wants of its upstream before it warns.
const upstreamLife = 365 * 24 * time.Hour

func (p *plan) upstream(td *TrustDomain) *upstreamConfig {
	if !td.Upstream {
		return nil
	}
	return &upstreamConfig{p.file(td.Name + "-root.crt"), p.file(td.Name + "-root.key")}
}

// newUpstream makes the root of a domain, as its CA nodes' configuration names it.
func newUpstream(p *plan, td *TrustDomain) error {
	root, err := newRootCA(&url.URL{Scheme: "spiffe", Host: td.Name}, "root of "+td.Name, upstreamLife)
	if err != nil {
		return err
	}
	key, err := x509.MarshalPKCS8PrivateKey(root.key)
	if err != nil {
		return err
	}
	at := p.upstream(td)
	if err := daemon.WriteFileAtomic(at.Certificate, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.certificate.Raw}), 0o600); err != nil {
		return err
	}
	return daemon.WriteFileAtomic(at.Key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), 0o600)
}
