// Package bundle reads and writes SPIFFE bundles (SPIFFE Trust Domain and Bundle 4, X509-SVID 6, JWT-SVID 6, WIT-SVID 6).
//
// The reader is tolerant as the specification demands: an entry that it does not understand is skipped and reported, and
// the others count. The document around the entries gets no tolerance: what could be read in two ways is refused. The writer
// is strict and gives the same bytes for the same bundle.
package bundle

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// The values of a key's "use" that SPIFFE defines.
const (
	useX509 = "x509-svid"
	useJWT  = "jwt-svid"
	useWIT  = "wit-svid"
)

// Bundle is what one trust domain's SVIDs are verified with. A bundle without keys is legal and means that none is
// trusted any more.
type Bundle struct {
	TrustDomain spiffeid.TrustDomain // not part of the document: it is known before the bundle is read
	X509        []*x509.Certificate
	JWT, WIT    []Key
	Sequence    uint64        // 0: none
	RefreshHint time.Duration // whole seconds; 0: none
}

// Key is a public key that signs tokens of one kind.
type Key struct {
	ID  string          // "kid"; unique among a bundle's JWT and WIT keys
	JWK json.RawMessage // the public members of RFC 7517: kty and those of the key itself
	// Proof is the key's own word on the trust domain that it belongs to (ca.KeyProof), which readers that do not know it
	// pass over; empty: none. It is carried here and verified where keys of several domains are compared.
	Proof string
}

// NewKey makes a key of a SubjectPublicKeyInfo in DER.
func NewKey(id string, spki []byte) (Key, error) {
	public, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		return Key{}, fmt.Errorf("key %q: %w", shorten(id), err)
	}
	text, err := jose.JSONWebKey{Key: public}.MarshalJSON()
	if err != nil {
		return Key{}, fmt.Errorf("key %q: %w", shorten(id), err)
	}
	return Key{ID: id, JWK: text}, nil
}

// Public is the key itself: *ecdsa.PublicKey, *rsa.PublicKey or ed25519.PublicKey.
func (k Key) Public() (crypto.PublicKey, error) {
	members, err := object(k.JWK)
	if err != nil {
		return nil, fmt.Errorf("key %q: %w", shorten(k.ID), err)
	}
	public, err := publicKey(members)
	if err != nil {
		return nil, fmt.Errorf("key %q: %w", shorten(k.ID), err)
	}
	return public, nil
}

// X509Bundle returns the X.509 authorities in the form that a peer verifier takes.
func (b *Bundle) X509Bundle() *x509bundle.Bundle {
	return x509bundle.FromX509Authorities(b.TrustDomain, b.X509)
}

// document and entry fix the order in which members are written.
type document struct {
	Keys        []entry `json:"keys"` // [] when empty, never null
	Sequence    uint64  `json:"spiffe_sequence,omitempty"`
	RefreshHint int64   `json:"spiffe_refresh_hint,omitempty"`
}

type entry struct {
	KeyType string   `json:"kty"`
	Use     string   `json:"use"`
	KeyID   string   `json:"kid,omitempty"`
	Curve   string   `json:"crv,omitempty"`
	X       string   `json:"x,omitempty"`
	Y       string   `json:"y,omitempty"`
	N       string   `json:"n,omitempty"`
	E       string   `json:"e,omitempty"`
	X5C     [][]byte `json:"x5c,omitempty"` // []byte is standard base64, as x5c is
	Proof   string   `json:"entente_proof,omitempty"`
}

// Marshal writes the bundle: the same bytes for the same content, in whatever order it is given. It refuses what no
// SPIFFE consumer could use: a certificate that may not sign, a key of unknown kind, a key id twice.
func (b *Bundle) Marshal() ([]byte, error) {
	doc := document{Keys: []entry{}, Sequence: b.Sequence}
	if b.RefreshHint < 0 {
		return nil, fmt.Errorf("writing the bundle of %s: negative refresh hint %s", b.TrustDomain, b.RefreshHint)
	}
	doc.RefreshHint = int64((b.RefreshHint + time.Second - 1) / time.Second)

	for _, keys := range []struct {
		use  string
		keys []Key
	}{{useJWT, b.JWT}, {useWIT, b.WIT}} {
		for _, key := range keys.keys {
			if slices.ContainsFunc(doc.Keys, func(e entry) bool { return e.KeyID == key.ID }) {
				return nil, fmt.Errorf("writing the bundle of %s: key id %q is used twice", b.TrustDomain, key.ID)
			}
			e, err := tokenEntry(keys.use, key)
			if err != nil {
				return nil, fmt.Errorf("writing the bundle of %s: key %q: %w", b.TrustDomain, key.ID, err)
			}
			doc.Keys = append(doc.Keys, e)
		}
	}
	for _, cert := range b.X509 {
		e, err := authorityEntry(cert)
		if err != nil {
			return nil, fmt.Errorf("writing the bundle of %s: authority of serial number %s: %w", b.TrustDomain, cert.SerialNumber, err)
		}
		doc.Keys = append(doc.Keys, e)
	}

	slices.SortFunc(doc.Keys, func(a, b entry) int {
		return cmp.Or(cmp.Compare(a.Use, b.Use), cmp.Compare(a.KeyID, b.KeyID), slices.CompareFunc(a.X5C, b.X5C, bytes.Compare))
	})
	doc.Keys = slices.CompactFunc(doc.Keys, func(a, b entry) bool {
		return a.Use == useX509 && b.Use == useX509 && bytes.Equal(a.X5C[0], b.X5C[0])
	})
	return json.Marshal(doc)
}

// MarshalMap writes a SPIFFE bundle map (Trust Domain and Bundle 5.1.1): the bundles of several trust domains in one
// document, which is replaced as a whole. Refresh hints are left out. A trust domain may be given once only.
func MarshalMap(bundles ...*Bundle) ([]byte, error) {
	domains := map[string]json.RawMessage{}
	for _, b := range bundles {
		name := b.TrustDomain.Name()
		if _, twice := domains[name]; twice {
			return nil, fmt.Errorf("writing a bundle map: two bundles of %s", name)
		}
		unhinted := *b
		unhinted.RefreshHint = 0
		doc, err := unhinted.Marshal()
		if err != nil {
			return nil, err
		}
		domains[name] = doc
	}
	return json.Marshal(map[string]any{"trust_domains": domains})
}

func authorityEntry(cert *x509.Certificate) (entry, error) {
	if err := checkAuthority(cert); err != nil {
		return entry{}, err
	}
	e, err := publicEntry(cert.PublicKey)
	if err != nil {
		return entry{}, err
	}
	e.Use, e.X5C = useX509, [][]byte{cert.Raw}
	return e, nil
}

func tokenEntry(use string, key Key) (entry, error) {
	if key.ID == "" {
		return entry{}, errNoKeyID
	}
	members, err := object(key.JWK)
	if err != nil {
		return entry{}, err
	}
	public, err := publicKey(members)
	if err != nil {
		return entry{}, err
	}
	e, err := publicEntry(public)
	if err != nil {
		return entry{}, err
	}
	e.Use, e.KeyID, e.Proof = use, key.ID, key.Proof
	return e, nil
}

// publicEntry has the members of RFC 7518 6 that make up the key.
func publicEntry(public crypto.PublicKey) (entry, error) {
	text, err := jose.JSONWebKey{Key: public}.MarshalJSON()
	if err != nil {
		return entry{}, err
	}
	var e entry
	return e, json.Unmarshal(text, &e)
}

// checkAuthority: X509-SVID 4.1 and 4.3.
func checkAuthority(cert *x509.Certificate) error {
	switch {
	case !cert.BasicConstraintsValid || !cert.IsCA:
		return errors.New("the certificate is not a CA's")
	case cert.KeyUsage&x509.KeyUsageCertSign == 0:
		return errors.New("the certificate's key usage lacks keyCertSign")
	}
	return nil
}
