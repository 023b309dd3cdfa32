package peer

import (
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Authorize decides whether a verified peer may connect. It is called at each handshake, concurrently; nil refuses all.
type Authorize func(spiffeid.ID) error

// AnyOf admits exactly the given IDs.
func AnyOf(ids ...spiffeid.ID) Authorize {
	ids = slices.Clone(ids)
	return func(id spiffeid.ID) error {
		if !slices.Contains(ids, id) {
			return fmt.Errorf("%s is not one of %v", id, ids)
		}
		return nil
	}
}

// MemberOf admits every workload of one trust domain.
func MemberOf(td spiffeid.TrustDomain) Authorize {
	return func(id spiffeid.ID) error {
		if !id.MemberOf(td) {
			return fmt.Errorf("%s is not in trust domain %s", id, td)
		}
		return nil
	}
}

// AnyVerified admits every peer whose SVID verifies: for doors that look at each request afterwards.
func AnyVerified() Authorize {
	return func(spiffeid.ID) error { return nil }
}

// Certificate gives the certificate to show. It is asked at each handshake, concurrently.
type Certificate func() (*tls.Certificate, error)

// FromSVID shows the current SVID of a source.
func FromSVID(source x509svid.Source) Certificate {
	return func() (*tls.Certificate, error) {
		if source == nil {
			return nil, errors.New("no SVID to show to the peer: none is configured")
		}
		svid, err := source.GetX509SVID()
		if err != nil {
			return nil, fmt.Errorf("no SVID to show to the peer: %w", err)
		}
		if len(svid.Certificates) == 0 || svid.PrivateKey == nil {
			return nil, errors.New("no SVID to show to the peer: it is empty")
		}
		cert := &tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: svid.Certificates[0]}
		for _, c := range svid.Certificates {
			cert.Certificate = append(cert.Certificate, c.Raw)
		}
		return cert, nil
	}
}

// Check decides on the peer of a connection whose handshake has proved that the peer holds the key of its certificate.
// It is called at each handshake, concurrently.
type Check func(tls.ConnectionState) error

// SVID accepts a peer whose X509-SVID verifies (see [Verify]) and whom authz admits.
func SVID(bundles x509bundle.Source, authz Authorize) Check {
	return func(state tls.ConnectionState) error {
		id, err := Verify(state.PeerCertificates, bundles, time.Now())
		if err != nil {
			return err
		}
		return authorize(authz, id)
	}
}

// Pin accepts a peer by the [KeyID] of its key alone. Names and dates of its certificate mean nothing then:
// whoever admits pinned keys must not take an ID from the same connection.
func Pin(allow func(keyID string) error) Check {
	return func(state tls.ConnectionState) error {
		if len(state.PeerCertificates) == 0 {
			return errors.New("peer showed no certificate")
		}
		if allow == nil {
			return errors.New("no peer keys are known")
		}
		keyID := KeyID(state.PeerCertificates[0])
		if err := allow(keyID); err != nil {
			return fmt.Errorf("peer key %s is not accepted: %w", keyID, err)
		}
		return nil
	}
}

// Either accepts a peer that one of the checks accepts.
func Either(checks ...Check) Check {
	checks = slices.Clone(checks)
	return func(state tls.ConnectionState) error {
		errs := []error{errors.New("peer is not accepted")}
		for _, check := range checks {
			err := check(state)
			if err == nil {
				return nil
			}
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	}
}

func authorize(authz Authorize, id spiffeid.ID) error {
	if authz == nil {
		return fmt.Errorf("%s is not authorised: no peer is", id)
	}
	if err := authz(id); err != nil {
		return fmt.Errorf("%s is not authorised: %w", id, err)
	}
	return nil
}

// ServerTLS accepts clients by their SVID. svid and bundles are consulted at each handshake.
func ServerTLS(svid x509svid.Source, bundles x509bundle.Source, authz Authorize, alpn ...string) *tls.Config {
	return RequireClient(FromSVID(svid), SVID(bundles, authz), alpn...)
}

// ClientTLS accepts the server by its SVID. A nil svid shows no client certificate.
func ClientTLS(svid x509svid.Source, bundles x509bundle.Source, authz Authorize, alpn ...string) *tls.Config {
	if svid == nil {
		return Client(nil, SVID(bundles, authz), alpn...)
	}
	return Client(FromSVID(svid), SVID(bundles, authz), alpn...)
}

// PinnedServerTLS accepts clients by the key of their certificate.
func PinnedServerTLS(cert func() (*tls.Certificate, error), allow func(keyID string) error, alpn ...string) *tls.Config {
	return RequireClient(cert, Pin(allow), alpn...)
}

// PinnedClientTLS accepts the server by the key of its certificate. A nil cert shows no client certificate.
func PinnedClientTLS(cert func() (*tls.Certificate, error), allow func(keyID string) error, alpn ...string) *tls.Config {
	return Client(cert, Pin(allow), alpn...)
}

// RequireClient is a server's configuration: each client must show a certificate that check accepts.
func RequireClient(cert Certificate, check Check, alpn ...string) *tls.Config {
	config := server(cert, alpn)
	config.ClientAuth = tls.RequireAnyClientCert
	config.VerifyConnection = check
	return config
}

// AllowClient is a server's configuration for a door that newcomers knock at too: a client may show no certificate, but one
// that is shown must be accepted by check. After the handshake, len(state.PeerCertificates) tells the two apart.
func AllowClient(cert Certificate, check Check, alpn ...string) *tls.Config {
	config := server(cert, alpn)
	config.ClientAuth = tls.RequestClientCert
	config.VerifyConnection = func(state tls.ConnectionState) error {
		if len(state.PeerCertificates) == 0 {
			return nil
		}
		return check(state)
	}
	return config
}

// NoClient is a server's configuration that asks for no client certificate, as a bundle endpoint must (Federation 5.2.1.3).
func NoClient(cert Certificate, alpn ...string) *tls.Config {
	return server(cert, alpn)
}

// Client is a client's configuration: the server must be accepted by check. A nil cert shows no certificate.
func Client(cert Certificate, check Check, alpn ...string) *tls.Config {
	config := base(alpn)
	// Not insecure: crypto/tls would verify against host names and the system's roots; check does it by SPIFFE ID or key.
	config.InsecureSkipVerify = true
	config.VerifyConnection = check
	if cert != nil {
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert() }
	}
	return config
}

// Intermediate has a configuration speak TLS 1.2 as well, with the suites of Mozilla's intermediate settings (Federation 5):
// forward secrecy, authenticated encryption, no CBC. It is for bundle endpoints and their clients, whose other side may be any
// implementation of SPIFFE; connections of the mesh stay at TLS 1.3. It returns config.
func Intermediate(config *tls.Config) *tls.Config {
	config.MinVersion = tls.VersionTLS12
	config.CipherSuites = []uint16{
		tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
		tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
		tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
	}
	return config
}

func server(cert Certificate, alpn []string) *tls.Config {
	config := base(alpn)
	config.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert() }
	return config
}

func base(alpn []string) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true,
		NextProtos:             slices.Clone(alpn),
	}
}

// IDFromState returns the SPIFFE ID of the peer of a connection that was verified by [SVID], as by [ServerTLS] and
// [ClientTLS], and by nothing else: it reads the ID and verifies nothing.
func IDFromState(state tls.ConnectionState) (spiffeid.ID, error) {
	if len(state.PeerCertificates) == 0 {
		return spiffeid.ID{}, errors.New("peer showed no certificate")
	}
	if !state.HandshakeComplete {
		return spiffeid.ID{}, errors.New("the TLS handshake is not complete")
	}
	id, err := leafID(state.PeerCertificates[0])
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("peer certificate is not an X509-SVID: %w", err)
	}
	return id, nil
}

// SelfSigned makes a certificate that carries a node's key to peers that pin it. It is no SVID and does not expire:
// a node's membership ends when its key is unpinned.
func SelfSigned(key crypto.Signer, commonName string) (tls.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("making the node certificate: %w", err)
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: commonName},
		NotBefore:             time.Unix(0, 0),
		NotAfter:              time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), // RFC 5280 4.1.2.5: no expiration
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("making the node certificate: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("making the node certificate: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, nil
}
