package server

import (
	"crypto/x509"
	"fmt"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
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
	revoked  map[string]bool // ids of authorities
	rendered
	changed chan struct{} // closed when rendered changes
}

// rendered are the forms in which the own bundle is handed out.
type rendered struct {
	members []byte // for this domain's own processes: all keys
	public  []byte // without WIT keys: there are readers that refuse a bundle with a use they do not know
	wit     []byte // for peers that asked for them: all keys, at a sequence of its own
	oidc    []byte // the JWT keys as a plain JWK Set
}

// NewBundles returns the own bundle of the domain, empty until the first Update.
func NewBundles(td spiffeid.TrustDomain) *Bundles {
	return &Bundles{trustDomain: td, x509: x509bundle.New(td), changed: make(chan struct{})}
}

// OwnKeys is what the own bundle is made of, as one state has it.
type OwnKeys struct {
	bundle  feed.OwnBundle
	hint    time.Duration
	revoked map[string]bool
}

// ReadOwnKeys reads it, under the lock of the state's owner: nothing is parsed.
func ReadOwnKeys(st *domain.State) *OwnKeys {
	revoked := make(map[string]bool)
	for _, a := range st.Authorities() {
		if a.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_REVOKED {
			revoked[a.GetId()] = true
		}
	}
	return &OwnKeys{feed.OwnBundleOf(st), st.Lifetimes().RefreshHint, revoked}
}

// Update takes the own bundle of a state. To be called whenever it changed, in order.
func (b *Bundles) Update(own *OwnKeys) error {
	b.mu.Lock()
	b.revoked = own.revoked
	b.mu.Unlock()
	_, err := b.render(&own.bundle, own.hint)
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

// Distrusted refuses what a REVOKED authority signed: where an upstream certified it, the
// bundle alone would still verify that. Agents and entries are looked up at each call.
func (b *Bundles) Distrusted(path []*x509.Certificate) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, signer := range path[1:] {
		if id := ca.KeyID(signer.RawSubjectPublicKeyInfo); b.revoked[id] {
			return fmt.Errorf("authority %.12s was revoked", id)
		}
	}
	return nil
}

// JWKS is the own bundle as it is handed to this domain's own processes, and its
// sequence.
func (b *Bundles) JWKS() (jwks []byte, sequence uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.members, b.sequence
}

// none tells whether the domain has not had an authority yet. Then there is no bundle to
// give away: one without keys would say that all of them were revoked. Called with mu held.
func (b *Bundles) none() bool {
	return len(b.x509.X509Authorities()) == 0 && len(b.revoked) == 0
}

// Public is the own bundle for another domain: with WIT keys only for one that takes
// them. Empty: there is none yet.
func (b *Bundles) Public(wit bool) []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.none() {
		return nil
	}
	if wit {
		return b.wit
	}
	return b.public
}

// Source is the public bundle with a channel that is closed when it changes, as the
// bundle endpoint needs it.
func (b *Bundles) Source() (jwks []byte, sequence uint64, changed <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.none() {
		return nil, 0, b.changed
	}
	return b.public, b.sequence, b.changed
}

// SourceWIT is Source for the variant with WIT keys.
func (b *Bundles) SourceWIT() (jwks []byte, sequence uint64, changed <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.none() {
		return nil, 0, b.changed
	}
	return b.wit, b.sequence + 1, b.changed
}

// OIDC is the JWT keys as a JWK Set for verifiers that know OpenID Connect and not
// SPIFFE.
func (b *Bundles) OIDC() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.oidc
}

// render returns the members' document for a bundle that was read from the state.
func (b *Bundles) render(own *feed.OwnBundle, hint time.Duration) ([]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.members != nil && own.Sequence == b.sequence && hint == b.hint {
		return b.members, nil
	}
	doc := bundle.Bundle{TrustDomain: b.trustDomain, Sequence: own.Sequence, RefreshHint: hint}
	for _, der := range own.X509 {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("own bundle: %w", err)
		}
		doc.X509 = append(doc.X509, cert)
	}
	var err error
	if doc.JWT, err = b.tokenKeys(own.JWT); err != nil {
		return nil, err
	}
	if doc.WIT, err = b.tokenKeys(own.WIT); err != nil {
		return nil, err
	}
	forms, err := renderForms(doc)
	if err != nil {
		return nil, fmt.Errorf("own bundle: %w", err)
	}
	if own.Sequence >= b.sequence {
		b.sequence, b.hint, b.rendered, b.x509 = own.Sequence, hint, forms, doc.X509Bundle()
		close(b.changed)
		b.changed = make(chan struct{})
	}
	return forms.members, nil
}

func (b *Bundles) tokenKeys(authorities []*statev1.Authority) ([]bundle.Key, error) {
	var keys []bundle.Key
	for _, a := range authorities {
		key, err := bundle.NewKey(a.GetId(), a.GetPublicKey())
		if err != nil {
			return nil, fmt.Errorf("own bundle: %w", err)
		}
		key.Proof = ca.KeyProofOf(b.trustDomain.Name(), a)
		keys = append(keys, key)
	}
	return keys, nil
}

func renderForms(doc bundle.Bundle) (forms rendered, err error) {
	if forms.members, err = doc.Marshal(); err != nil {
		return forms, err
	}
	// A reader may go from one variant to the other at any time and must not see one
	// sequence with two contents. Sequences are revisions, so the next one is free or
	// the next bundle's, whose own variant is one further.
	wit := doc
	wit.Sequence++
	if forms.wit, err = wit.Marshal(); err != nil {
		return forms, err
	}
	public := doc
	public.WIT = nil
	if forms.public, err = public.Marshal(); err != nil {
		return forms, err
	}
	forms.oidc, err = oidcKeys(doc.JWT)
	return forms, err
}
