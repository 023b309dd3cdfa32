package server

import (
	"fmt"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/feed"
	"github.com/entente-mesh/entente/federation/bundle"
)

// ForeignRecord reads a bundle that was given by hand into the record of the state,
// written anew by our strict writer.
func ForeignRecord(td spiffeid.TrustDomain, jwks []byte) (*statev1.ForeignBundle, error) {
	b, _, err := bundle.Parse(td, jwks)
	if err != nil {
		return nil, fmt.Errorf("bundle of %s: %w", td.Name(), err)
	}
	return foreignRecord(b)
}

func foreignRecord(b *bundle.Bundle) (*statev1.ForeignBundle, error) {
	b.RefreshHint = 0
	jwks, err := b.Marshal()
	if err != nil {
		return nil, fmt.Errorf("bundle of %s: %w", b.TrustDomain.Name(), err)
	}
	return &statev1.ForeignBundle{TrustDomain: b.TrustDomain.Name(), Jwks: jwks, Sequence: b.Sequence}, nil
}

// CheckUpstream refuses a root, DER, that another domain has: it would let each domain sign
// names of the other (I2). No root: nothing to refuse. Another domain that only lists the
// root cannot stop one that this domain uses already, or that names this domain: it loses
// the key instead (domain.State.DroppedKeys).
func CheckUpstream(st *domain.State, upstream []byte) error {
	id := ca.CertificateKeyID(upstream)
	other, proven := st.ForeignOwner(id)
	if other == "" {
		return nil
	}
	if !proven && (st.OwnKey(id) || ca.CertificateOwner(upstream) == st.TrustDomain().Name()) {
		return nil
	}
	return fmt.Errorf("the upstream's key stands in the bundle of %s: a root belongs to one trust domain alone; make one for this domain", other)
}

// ForeignBundles is the source of the accepted bundles of other domains, for verifying
// bundle endpoints.
type ForeignBundles struct {
	State State
	Feed  *feed.Feed
}

// GetX509BundleForTrustDomain returns the last accepted bundle of that domain.
func (f ForeignBundles) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	var held *statev1.ForeignBundle
	f.State.Read(func(st *domain.State) { held, _ = f.Feed.ForeignBundle(st, td.Name()) })
	if held == nil {
		return nil, fmt.Errorf("no bundle of %s is held", td.Name())
	}
	b, _, err := bundle.Parse(td, held.GetJwks())
	if err != nil {
		return nil, fmt.Errorf("bundle of %s: %w", td.Name(), err)
	}
	return b.X509Bundle(), nil
}
