package nodeattest

import (
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"os"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/internal/pemfile"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

// X509PoPConfig is a certificate that the host has of another PKI, and that the CA nodes
// admit it by (their x509pop).
type X509PoPConfig struct {
	yamlfile.Pos
	// Certificate is a PEM file: the host's, then those that lead to its authority. Key is
	// its private key.
	Certificate string `yaml:"certificate"`
	Key         string `yaml:"key"`
}

func x509popSection(s *Sections) (at yamlfile.Pos, given bool, err error) {
	c := &s.X509PoP
	if (c.Certificate == "") != (c.Key == "") {
		err = errors.New("certificate and key belong together")
	}
	return c.At("certificate"), c.Certificate != "", err
}

// openX509PoP reads the files again: the host's PKI may have renewed them.
func openX509PoP(s *Sections, trustDomain string, key crypto.Signer) (Prove, error) {
	certificate, hostKey := s.X509PoP.Certificate, s.X509PoP.Key
	chain, err := os.ReadFile(certificate)
	var private []byte
	if err == nil {
		private, err = os.ReadFile(hostKey)
		defer clear(private)
	}
	var pair *tls.Certificate
	if err == nil {
		pair, err = pemfile.KeyPair(chain, private)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot use the host's certificate %s with the key %s: %w", certificate, hostKey, err)
	}
	signer, ok := pair.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("the host's key %s is a %T, which cannot sign", hostKey, pair.PrivateKey)
	}
	return func(exporter []byte) (*ententev1.AttestRequest, error) {
		spki, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			return nil, fmt.Errorf("cannot name the agent's key: %w", err)
		}
		sum := sha256.Sum256(pair.Certificate[0])
		statement, signature, err := ca.SignPossession(rand.Reader, signer, &statev1.PossessionStatement{
			TrustDomain: trustDomain, KeyId: ca.KeyID(spki), Certificate: hex.EncodeToString(sum[:]), Exporter: exporter,
		})
		return &ententev1.AttestRequest{Certificates: pair.Certificate, Statement: statement, Signature: signature}, err
	}, nil
}
