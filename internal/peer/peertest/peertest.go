// Package peertest makes authorities and SVIDs for tests. Nothing else may import it. Its functions panic on failure.
package peertest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Authority is an X.509 authority of a trust domain, with its key in memory.
type Authority struct {
	Cert *x509.Certificate
	Key  crypto.Signer

	td    spiffeid.TrustDomain
	chain []*x509.Certificate // from this one up, without the root
}

// Option changes the template of a certificate before it is signed.
type Option func(*x509.Certificate)

// Lifetime sets the validity; the default is a minute ago to an hour ahead.
func Lifetime(notBefore, notAfter time.Time) Option {
	return func(template *x509.Certificate) { template.NotBefore, template.NotAfter = notBefore, notAfter }
}

// TTL sets the end to this long from now.
func TTL(ttl time.Duration) Option {
	return func(template *x509.Certificate) { template.NotAfter = time.Now().Add(ttl) }
}

// NewAuthority makes a self-signed authority, valid from a day ago to ten years ahead.
func NewAuthority(td spiffeid.TrustDomain, opts ...Option) *Authority {
	a := &Authority{Key: NewKey(), td: td}
	template := a.authority(opts)
	a.Cert = sign(template, template, a.Key.Public(), a.Key)
	return a
}

// Intermediate makes an authority signed by this one. Its SVIDs carry it in their chain.
func (a *Authority) Intermediate(opts ...Option) *Authority {
	below := &Authority{Key: NewKey(), td: a.td}
	below.Cert = sign(below.authority(opts), a.Cert, below.Key.Public(), a.Key)
	below.chain = append([]*x509.Certificate{below.Cert}, a.chain...)
	return below
}

// TrustDomain returns the name of the authority's trust domain.
func (a *Authority) TrustDomain() spiffeid.TrustDomain { return a.td }

// Issue makes an SVID with a new key for the path, which may be empty to make a wrong one.
func (a *Authority) Issue(path string, opts ...Option) *x509svid.SVID {
	return a.IssueFor(NewKey(), a.td, path, opts...)
}

// IssueFor makes an SVID for a key and for any trust domain, the authority's own or not.
func (a *Authority) IssueFor(key crypto.Signer, td spiffeid.TrustDomain, path string, opts ...Option) *x509svid.SVID {
	id := must(spiffeid.FromPath(td, path))
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{Organization: []string{"test"}},
		NotBefore:             now.Add(-time.Minute),
		NotAfter:              now.Add(time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{id.URL()},
	}
	for _, opt := range opts {
		opt(template)
	}
	leaf := sign(template, a.Cert, key.Public(), a.Key)
	return &x509svid.SVID{ID: id, Certificates: append([]*x509.Certificate{leaf}, a.chain...), PrivateKey: key}
}

// Bundle returns a new bundle that holds this authority.
func (a *Authority) Bundle() *x509bundle.Bundle {
	return x509bundle.FromX509Authorities(a.td, []*x509.Certificate{a.Cert})
}

func (a *Authority) authority(opts []Option) *x509.Certificate {
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{CommonName: "authority " + serial().Text(36)},
		NotBefore:             now.Add(-24 * time.Hour),
		NotAfter:              now.Add(10 * 365 * 24 * time.Hour),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		URIs:                  []*url.URL{a.td.ID().URL()},
	}
	for _, opt := range opts {
		opt(template)
	}
	return template
}

// NewKey makes a P-256 key.
func NewKey() crypto.Signer {
	return must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
}

func sign(template, parent *x509.Certificate, public crypto.PublicKey, signer crypto.Signer) *x509.Certificate {
	return must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, template, parent, public, signer))))
}

func serial() *big.Int {
	return must(rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127)))
}

func must[T any](value T, err error) T {
	if err != nil {
		panic("peertest: " + err.Error())
	}
	return value
}
