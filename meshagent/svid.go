package meshagent

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"slices"
	"sync/atomic"
	"time"
	"unique"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/internal/peer"
	"github.com/entente-mesh/entente/internal/secret"
)

// X509SVID is an entry's X.509-SVID in the encoding in which workloads get it. Parsed it
// takes five times the memory, and most of a host's SVIDs are only handed out. It was
// verified when it was made. Its bytes are not to be changed.
type X509SVID struct {
	ID           spiffeid.ID
	Certificates [][]byte     // DER, leaf first
	Key          secret.Bytes // PKCS #8, DER
	NotAfter     time.Time

	signedFor *record // of the entry: the request named it
	under     string  // key id of its authority
	origin    ca.Origin
	anchor    *x509.Certificate // of the bundle, that it verified with
	parsed    atomic.Pointer[x509svid.SVID]
}

// Parsed is the SVID as TLS needs it. It is held from the first use on.
func (s *X509SVID) Parsed() (*x509svid.SVID, error) {
	if svid := s.parsed.Load(); svid != nil {
		return svid, nil
	}
	svid, err := x509svid.ParseRaw(slices.Concat(s.Certificates...), s.Key)
	if err != nil {
		return nil, fmt.Errorf("the SVID of %s: %w", s.ID, err)
	}
	s.parsed.Store(svid)
	return svid, nil
}

// PEM is the SVID as files and Envoy take it.
func (s *X509SVID) PEM() (chain, key []byte) {
	for _, der := range s.Certificates {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return chain, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: s.Key})
}

// verify returns nil while the SVID is good under a bundle. Where that has the authority
// still, nothing is verified again: signatures do not change.
func (s *X509SVID) verify(bundle *x509bundle.Bundle, now time.Time) error {
	if !now.After(s.NotAfter) && bundle.HasX509Authority(s.anchor) {
		return nil
	}
	chain, err := parseChain(s.ID, s.Certificates)
	if err == nil {
		_, err = peer.Verify(chain, bundle, now)
	}
	return err
}

// revoked says why nobody in sync accepts the SVID any more, although it is valid.
func (s *X509SVID) revoked(d *ca.Distrusted) error { return d.CheckHeld(s.under, s.origin) }

func parseChain(id spiffeid.ID, certificates [][]byte) ([]*x509.Certificate, error) {
	chain := make([]*x509.Certificate, len(certificates))
	for i, der := range certificates {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("the CA's certificate for %s cannot be read: %w", id, err)
		}
		chain[i] = cert
	}
	return chain, nil
}

// keptSVID is verifySVID for an entry. It refuses an SVID that is distrusted: of a CA node
// that lags, or of a former admission of this host.
func keptSVID(want spiffeid.ID, signedFor *record, certificates [][]byte, key crypto.Signer, state *State, now time.Time) (*X509SVID, error) {
	svid, anchor, err := proveSVID(want, certificates, key, state.Bundle, now)
	if err != nil {
		return nil, err
	}
	origin, _, err := ca.OriginOf(svid.Certificates[0])
	if err != nil {
		return nil, fmt.Errorf("the CA's certificate for %s: %w", want, err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("the SVID of %s cannot be kept: %w", want, err)
	}
	leaf := svid.Certificates[0]
	kept := &X509SVID{ID: want, Certificates: certificates, Key: pkcs8, NotAfter: leaf.NotAfter, signedFor: signedFor, under: unique.Make(ca.SignedUnder(leaf)).Value(), origin: origin, anchor: anchor}
	if err := kept.revoked(state.View.Announced); err != nil {
		return nil, fmt.Errorf("the CA's certificate for %s: %w", want, err)
	}
	return kept, nil
}

// verifySVID makes an SVID of what a CA signed, and refuses it when it is not what
// was asked for: for this identity, for this key, and under the own bundle.
func verifySVID(want spiffeid.ID, certificates [][]byte, key crypto.Signer, own x509bundle.Source, now time.Time) (*x509svid.SVID, error) {
	svid, _, err := proveSVID(want, certificates, key, own, now)
	return svid, err
}

// proveSVID is verifySVID that says which authority of the bundle it is under.
func proveSVID(want spiffeid.ID, certificates [][]byte, key crypto.Signer, own x509bundle.Source, now time.Time) (*x509svid.SVID, *x509.Certificate, error) {
	chain, err := parseChain(want, certificates)
	if err != nil {
		return nil, nil, err
	}
	var proof peer.Proof
	id, err := proof.Verify(chain, own, now)
	if err != nil {
		return nil, nil, fmt.Errorf("the CA's certificate for %s does not verify: %w", want, err)
	}
	if id != want {
		return nil, nil, fmt.Errorf("the CA's certificate for %s is for %s", want, id)
	}
	if public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !public.Equal(chain[0].PublicKey) {
		return nil, nil, fmt.Errorf("the CA's certificate for %s is for another key", want)
	}
	return &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}, proof.Anchor(), nil
}
