package peer

import (
	"crypto/x509"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Proof remembers how the peer of one connection verified, for whoever asks again at each call and each [Registry.Recheck].
// Once the chain to an authority is found, only the authority's place in the bundle, the dates and what is distrusted are
// looked at again: signatures do not change. The zero value is ready to use, concurrently.
type Proof struct {
	last atomic.Pointer[proven]
}

// proven is how an SVID verified.
type proven struct {
	id   spiffeid.ID
	path []*x509.Certificate
}

// Verify gives what [Verify] gives.
func (p *Proof) Verify(chain []*x509.Certificate, bundles x509bundle.Source, now time.Time) (spiffeid.ID, error) {
	if last := p.last.Load(); last != nil && len(chain) > 0 && last.path[0] == chain[0] && last.anchored(bundles, now) {
		if err := distrusted(bundles, last.path); err != nil {
			return last.id, fmt.Errorf("certificate of %s is distrusted: %w", last.id, err)
		}
		return last.id, nil
	}
	id, path, err := verify(chain, bundles, now)
	if err != nil {
		return id, err
	}
	p.last.Store(&proven{id, path})
	return id, nil
}

// anchored reports whether a path that once verified still does.
func (p *proven) anchored(bundles x509bundle.Source, now time.Time) bool {
	for _, cert := range p.path {
		if now.Before(cert.NotBefore) || now.After(cert.NotAfter) {
			return false
		}
	}
	bundle, err := bundles.GetX509BundleForTrustDomain(p.id.TrustDomain())
	return err == nil && bundle != nil && bundle.TrustDomain() == p.id.TrustDomain() && bundle.HasX509Authority(p.path[len(p.path)-1])
}
