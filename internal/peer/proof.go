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
	path atomic.Pointer[[]*x509.Certificate] // how the SVID verified last
}

// Verify gives what [Verify] gives.
func (p *Proof) Verify(chain []*x509.Certificate, bundles x509bundle.Source, now time.Time) (spiffeid.ID, error) {
	if path := p.path.Load(); path != nil && len(chain) > 0 && (*path)[0] == chain[0] && anchored(*path, bundles, now) {
		id, err := leafID(chain[0])
		if err != nil {
			return id, err
		}
		if err := distrusted(bundles, *path); err != nil {
			return id, fmt.Errorf("certificate of %s is distrusted: %w", id, err)
		}
		return id, nil
	}
	id, path, err := verify(chain, bundles, now)
	if err != nil {
		return id, err
	}
	p.path.Store(&path)
	return id, nil
}

// anchored reports whether a path that once verified still does.
func anchored(path []*x509.Certificate, bundles x509bundle.Source, now time.Time) bool {
	for _, cert := range path {
		if now.Before(cert.NotBefore) || now.After(cert.NotAfter) {
			return false
		}
	}
	id, err := leafID(path[0])
	if err != nil {
		return false
	}
	bundle, err := bundles.GetX509BundleForTrustDomain(id.TrustDomain())
	return err == nil && bundle != nil && bundle.TrustDomain() == id.TrustDomain() && bundle.HasX509Authority(path[len(path)-1])
}
