// Package nodeattest is the attesting half of node attestation: what a host
// shows a CA to be admitted as an agent, and again later.
//
// The host makes its key itself and never lets go of it. A one-time join token (I9), or a
// certificate that the host has already, admits the key; from then on the key speaks for
// itself.
package nodeattest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/internal/pemfile"
)

// NewKey makes an ECDSA P-256 key.
func NewKey() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// LoadKey reads the host's key (PKCS#8, PEM). When there is none it makes one and
// returns when that is on the disk with mode 0600: a key that a token has admitted
// must survive a crash, or the token is spent on nothing. A file that others may
// read is refused.
func LoadKey(path string) (crypto.Signer, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return makeKey(path)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read the agent's key: %w", err)
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read the agent's key: %w", err)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return nil, fmt.Errorf("the agent's key %s has mode %#o: others may have read it; make it 0600 if you know that none did, or delete it and attest with a new token", path, mode)
	}
	block, err := pemfile.PrivateKey(data)
	if err == nil && block.Type != "PRIVATE KEY" {
		err = fmt.Errorf("it holds a %s, not a PRIVATE KEY", block.Type)
	}
	if err != nil {
		return nil, fmt.Errorf("the agent's key %s is damaged; delete it and attest with a new token: %w", path, err)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("the agent's key %s is damaged (delete it and attest with a new token): %w", path, err)
	}
	key, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("the agent's key %s is a %T, which cannot sign", path, parsed)
	}
	return key, nil
}

func makeKey(path string) (crypto.Signer, error) {
	key, err := NewKey()
	if err != nil {
		return nil, fmt.Errorf("cannot make the agent's key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("cannot make the agent's key: %w", err)
	}
	data := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	if err := daemon.WriteFileAtomic(path, data, 0o600); err != nil {
		return nil, fmt.Errorf("cannot keep the agent's key: %w", err)
	}
	return key, nil
}

// CSR is a PKCS#10 request (DER) that proves possession of the key and says
// nothing else: the CA decides on the content of what it signs.
func CSR(key crypto.Signer) ([]byte, error) {
	csr, err := ca.CSR(rand.Reader, key)
	if err != nil {
		return nil, fmt.Errorf("cannot make a certificate request: %w", err)
	}
	return csr, nil
}

// ReadToken parses a join token for agents, given as text or as the name of a file that
// holds it. Without either it returns nil.
func ReadToken(text, file string) (*ca.Token, error) {
	if text == "" && file == "" {
		return nil, nil
	}
	where := "the join token"
	if text == "" {
		data, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("cannot read the join token: %w", err)
		}
		text, where = string(data), "the join token in "+file
	}
	token, err := ca.ParseToken(strings.TrimSpace(text))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", where, err)
	}
	if token.Role != ca.RoleAgent {
		return nil, fmt.Errorf("%s admits a %s, not an agent; make one with `entente token create --agent NAME`", where, token.Role)
	}
	return token, nil
}

// ByToken proves with a join token that the key may be admitted. The proof is
// bound to one TLS connection by its exporter.
func ByToken(token *ca.Token, key crypto.Signer) Prove {
	return func(exporter []byte) (*ententev1.AttestRequest, error) {
		spki, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			return nil, fmt.Errorf("cannot name the agent's key: %w", err)
		}
		statement, signature, err := token.Sign(ca.KeyID(spki), exporter)
		return &ententev1.AttestRequest{TokenId: token.ID, Statement: statement, Signature: signature}, err
	}
}

// ByKey attests again with a key that was admitted before. Nothing is said beside
// the certificate request: that proves possession, and what the CA answers to it is
// of use to the holder of the key alone.
func ByKey() Prove {
	return func([]byte) (*ententev1.AttestRequest, error) { return &ententev1.AttestRequest{}, nil }
}
