package server

import (
	"crypto/x509"
	"fmt"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/feed"
	"github.com/entente-mesh/entente/federation/bundle"
)

// Bundles renders the domain's own bundle from the agreed state: for verifiers in this
// process (it is an x509bundle.Source), and as the SPIFFE bundle that is handed out.
// What was rendered last is kept. Methods may be called concurrently, with or without
// the lock of the state's owner.
type Bundles struct {
	trustDomain spiffeid.TrustDomain

	mu       sync.Mutex
	sequence uint64
	hint     time.Duration
	x509     *x509bundle.Bundle
	jwks     []byte
	changed  chan struct{} // closed when jwks changes
}

// NewBundles returns the own bundle of the domain, empty until the first Update.
func NewBundles(td spiffeid.TrustDomain) *Bundles {
	return &Bundles{trustDomain: td, x509: x509bundle.New(td), changed: make(chan struct{})}
}

// Update takes the own bundle from the state. To be called whenever it changed, in
// order.
func (b *Bundles) Update(st *domain.State) error {
	der, sequence := st.OwnBundle()
	own := &feed.OwnBundle{X509: der, Sequence: sequence}
	_, err := b.render(own, st.Lifetimes().RefreshHint)
	return err
}

// GetX509BundleForTrustDomain returns the own bundle; no other is known here (I2).
func (b *Bundles) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if td != b.trustDomain {
		return nil, fmt.Errorf("a CA node verifies SVIDs of %s only, not of %s", b.trustDomain.Name(), td.Name())
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.x509, nil
}

// JWKS is the own bundle as it is handed out, and its sequence.
func (b *Bundles) JWKS() (jwks []byte, sequence uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.jwks, b.sequence
}

// Source is JWKS with a channel that is closed when the bundle changes, as the bundle
// endpoint needs it.
func (b *Bundles) Source() (jwks []byte, sequence uint64, changed <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.jwks, b.sequence, b.changed
}

// render returns the document for a bundle that was read from the state.
func (b *Bundles) render(own *feed.OwnBundle, hint time.Duration) ([]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.jwks != nil && own.Sequence == b.sequence && hint == b.hint {
		return b.jwks, nil
	}
	doc := bundle.Bundle{TrustDomain: b.trustDomain, Sequence: own.Sequence, RefreshHint: hint}
	for _, der := range own.X509 {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("own bundle: %w", err)
		}
		doc.X509 = append(doc.X509, cert)
	}
	jwks, err := doc.Marshal()
	if err != nil {
		return nil, fmt.Errorf("own bundle: %w", err)
	}
	if own.Sequence >= b.sequence {
		b.sequence, b.hint, b.jwks, b.x509 = own.Sequence, hint, jwks, doc.X509Bundle()
		close(b.changed)
		b.changed = make(chan struct{})
	}
	return jwks, nil
}
