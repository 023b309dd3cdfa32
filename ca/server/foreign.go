package server

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"slices"

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

// WithoutSharedKeys takes out of a foreign bundle every authority whose key stands in
// the own domain's bundle or in another peer's already: a key speaks for one domain
// only, and the newcomer loses it (I2). It returns the ids of the keys that were
// dropped; without any, the record itself.
func WithoutSharedKeys(st *domain.State, record *statev1.ForeignBundle) (*statev1.ForeignBundle, []string, error) {
	td, err := ca.ParseTrustDomain(record.GetTrustDomain())
	if err != nil {
		return nil, nil, err
	}
	b, _, err := bundle.Parse(td, record.GetJwks())
	if err != nil {
		return nil, nil, fmt.Errorf("bundle of %s: %w", td.Name(), err)
	}
	if o, ok := st.Object("Relationship/" + td.Name()); !ok || !o.GetRelationship().GetWit() {
		if len(b.WIT) > 0 { // not asked for
			b.WIT = nil
			if record, err = foreignRecord(b); err != nil {
				return nil, nil, err
			}
		}
	}
	taken := make(map[string]bool)
	for _, authority := range st.Authorities() {
		taken[authority.GetId()] = true
		if len(authority.GetUpstream()) == 0 {
			continue
		}
		root, err := x509.ParseCertificate(authority.GetUpstream())
		if err != nil {
			return nil, nil, fmt.Errorf("upstream of authority %.12s: %w", authority.GetId(), err)
		}
		taken[ca.KeyID(root.RawSubjectPublicKeyInfo)] = true
	}
	for _, other := range st.ForeignBundles() {
		otherTD, err := ca.ParseTrustDomain(other.GetTrustDomain())
		if err != nil || otherTD == td {
			continue
		}
		o, _, err := bundle.Parse(otherTD, other.GetJwks())
		if err != nil {
			return nil, nil, fmt.Errorf("bundle of %s: %w", otherTD.Name(), err)
		}
		for _, cert := range o.X509 {
			taken[ca.KeyID(cert.RawSubjectPublicKeyInfo)] = true
		}
		for _, key := range slices.Concat(o.JWT, o.WIT) {
			if id, err := tokenKeyID(key); err == nil {
				taken[id] = true
			}
		}
	}
	var dropped []string
	withoutTaken := func(keys []bundle.Key) []bundle.Key {
		return slices.DeleteFunc(keys, func(key bundle.Key) bool {
			id, err := tokenKeyID(key)
			if err == nil && !taken[id] {
				return false
			}
			dropped = append(dropped, id)
			return true
		})
	}
	b.JWT, b.WIT = withoutTaken(b.JWT), withoutTaken(b.WIT)
	var kept []*x509.Certificate
	for _, cert := range b.X509 {
		if id := ca.KeyID(cert.RawSubjectPublicKeyInfo); taken[id] {
			dropped = append(dropped, id)
		} else {
			kept = append(kept, cert)
		}
	}
	if len(dropped) == 0 {
		return record, nil, nil
	}
	b.X509 = kept
	clean, err := foreignRecord(b)
	return clean, dropped, err
}

// CheckUpstream refuses a root, DER, whose key stands in another domain's bundle: it would
// let each domain sign names of the other (I2). No root: nothing to refuse.
func CheckUpstream(st *domain.State, upstream []byte) error {
	if len(upstream) == 0 {
		return nil
	}
	root, err := x509.ParseCertificate(upstream)
	if err != nil {
		return fmt.Errorf("upstream certificate: %w", err)
	}
	for _, held := range st.ForeignBundles() {
		td, err := ca.ParseTrustDomain(held.GetTrustDomain())
		if err != nil {
			continue
		}
		b, _, err := bundle.Parse(td, held.GetJwks())
		if err != nil {
			return fmt.Errorf("bundle of %s: %w", td.Name(), err)
		}
		for _, cert := range b.X509 {
			if bytes.Equal(cert.RawSubjectPublicKeyInfo, root.RawSubjectPublicKeyInfo) {
				return fmt.Errorf("the upstream's key stands in the bundle of %s: a root belongs to one trust domain alone; make one for this domain", td.Name())
			}
		}
	}
	return nil
}

func tokenKeyID(key bundle.Key) (string, error) {
	public, err := key.Public()
	if err != nil {
		return "", err
	}
	spki, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return "", err
	}
	return ca.KeyID(spki), nil
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
