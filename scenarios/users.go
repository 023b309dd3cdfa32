package scenarios

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/entente-mesh/entente/internal/daemon"
)

// users is everything about clients that have no SVID: the issuer of their tokens,
// and the public certificate of the edges.
type users struct {
	edge   *Edge
	domain string
	key    *ecdsa.PrivateKey // of the issuer
	forged *ecdsa.PrivateKey // of somebody who would like to be it
	roots  *x509.CertPool
}

const (
	keyName   = "phones-1" // kid
	tokenLife = 12 * time.Hour
)

// newUsers makes the keys and writes jwks.json, edge.crt, edge.key and edge-ca.crt.
func newUsers(p *plan, td *TrustDomain) (*users, error) {
	u := &users{edge: td.Edge, domain: td.Name}
	var err error
	if u.key, err = newKey(); err != nil {
		return nil, err
	}
	if u.forged, err = newKey(); err != nil {
		return nil, err
	}
	jwks, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: u.key.Public(), KeyID: keyName, Algorithm: string(jose.ES256), Use: "sig"}}})
	if err != nil {
		return nil, fmt.Errorf("write the token issuer's keys: %w", err)
	}
	var addresses []net.IP
	for _, dc := range td.Edge.In {
		addresses = append(addresses, net.ParseIP(p.host(td.Name, dc, hostEdge)))
	}
	addresses = slices.CompactFunc(addresses, net.IP.Equal) // all the same, where there is only one
	ca, err := newRootCA(&url.URL{}, "phones trust this", tokenLife)
	if err != nil {
		return nil, err
	}
	leaf, key, err := ca.issue(&x509.Certificate{IPAddresses: addresses, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	if err != nil {
		return nil, err
	}
	u.roots = x509.NewCertPool()
	u.roots.AddCert(ca.certificate)
	for name, data := range map[string][]byte{
		"jwks.json":   jwks,
		"edge-ca.crt": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.certificate.Raw}),
		"edge.crt":    pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf}),
		"edge.key":    pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}),
	} {
		if err := daemon.WriteFileAtomic(p.file(name), data, 0o600); err != nil {
			return nil, err
		}
	}
	return u, nil
}

// token makes a token of a sort that a Request may name. Each subject is a customer
// of its own to the edge, with a rate of its own.
func (u *users) token(sort, subject, tier string) (string, error) {
	if sort == "none" {
		return "", nil
	}
	key, issued, life := u.key, time.Now().Add(-time.Minute), tokenLife
	switch sort {
	case "forged":
		key = u.forged
	case "expired":
		issued, life = time.Now().Add(-2*time.Hour), time.Hour
	}
	signer, err := jose.NewSigner(
		jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: keyName}},
		(&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return "", fmt.Errorf("make a token: %w", err)
	}
	token, err := jwt.Signed(signer).Claims(jwt.Claims{
		Issuer: u.edge.Issuer, Audience: jwt.Audience{u.edge.Audience}, Subject: subject,
		IssuedAt: jwt.NewNumericDate(issued), NotBefore: jwt.NewNumericDate(issued), Expiry: jwt.NewNumericDate(issued.Add(life)),
	}).Claims(map[string]any{"tier": tier}).Serialize()
	if err != nil {
		return "", fmt.Errorf("make a token: %w", err)
	}
	return token, nil
}

// rootCA is a certificate authority of the runner's own: the one of the edge's public
// certificate, a domain's upstream, or a rogue one.
type rootCA struct {
	certificate *x509.Certificate
	key         crypto.Signer
}

func newRootCA(uri *url.URL, name string, life time.Duration) (*rootCA, error) {
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(life),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	if uri.Scheme != "" {
		template.URIs = []*url.URL{uri}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("make a root certificate: %w", err)
	}
	certificate, err := x509.ParseCertificate(der)
	return &rootCA{certificate, key}, err
}

// issue signs a leaf with a fresh key. What template leaves open is filled in. Both
// results are DER, the key PKCS #8.
func (ca *rootCA) issue(template *x509.Certificate) (leaf, privateKey []byte, err error) {
	key, err := newKey()
	if err != nil {
		return nil, nil, err
	}
	template.SerialNumber = serial()
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(tokenLife)
	template.KeyUsage, template.BasicConstraintsValid = x509.KeyUsageDigitalSignature, true
	if leaf, err = x509.CreateCertificate(rand.Reader, template, ca.certificate, key.Public(), ca.key); err != nil {
		return nil, nil, fmt.Errorf("make a certificate: %w", err)
	}
	privateKey, err = x509.MarshalPKCS8PrivateKey(key)
	return leaf, privateKey, err
}

// forge makes an SVID of an ID as a CA would that nobody trusts: right in every field,
// the authority's own name among them, and signed with the wrong key.
func forge(id string) (tls.Certificate, error) {
	uri, err := url.Parse(id)
	if err != nil {
		return tls.Certificate{}, err
	}
	rogue, err := newRootCA(&url.URL{Scheme: uri.Scheme, Host: uri.Host}, "rogue", tokenLife)
	if err != nil {
		return tls.Certificate{}, err
	}
	leaf, key, err := rogue.issue(&x509.Certificate{
		URIs:        []*url.URL{uri},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.X509KeyPair(
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}))
}

func newKey() (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make a key: %w", err)
	}
	return key, nil
}

func serial() *big.Int {
	return new(big.Int).SetBytes([]byte(rand.Text())[:15])
}
