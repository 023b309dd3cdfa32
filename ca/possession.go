package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// possessionContext keeps a signature over a possession statement from meaning anything
// elsewhere: no TLS message that the same key signs begins like it.
const possessionContext = "entente possession statement v1\x00"

// pssOptions are RSA's: PKCS #1 v1.5 is not accepted.
var pssOptions = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256}

const minRSABits = 2048

// CheckPossessionKey refuses a certificate's key with which no statement is signed: only
// Ed25519, ECDSA on P-256, P-384 and P-521, and RSA from 2048 bits on can be.
func CheckPossessionKey(public crypto.PublicKey) error {
	switch key := public.(type) {
	case ed25519.PublicKey:
		return nil
	case *ecdsa.PublicKey:
		if bits := key.Curve.Params().BitSize; bits < 256 {
			return fmt.Errorf("its key is on a curve of %d bits, under 256", bits)
		}
		return nil
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits < minRSABits || bits > 8192 {
			return fmt.Errorf("its RSA key has %d bits, not %d to 8192", bits, minRSABits)
		}
		return nil
	}
	return fmt.Errorf("its key is a %T: Ed25519, ECDSA or RSA is needed", public)
}

// SignPossession encodes a statement and signs it with the key of a certificate.
func SignPossession(random io.Reader, key crypto.Signer, st *statev1.PossessionStatement) (statement, signature []byte, err error) {
	fail := func(err error) ([]byte, []byte, error) {
		return nil, nil, fmt.Errorf("sign possession statement: %w", err)
	}
	if err := CheckPossessionKey(key.Public()); err != nil {
		return fail(err)
	}
	if statement, err = (proto.MarshalOptions{Deterministic: true}).Marshal(st); err != nil {
		return fail(err)
	}
	if signature, err = signMessage(random, key, append([]byte(possessionContext), statement...)); err != nil {
		return fail(err)
	}
	return statement, signature, nil
}

func signMessage(random io.Reader, key crypto.Signer, message []byte) ([]byte, error) {
	sum := sha256.Sum256(message)
	switch key.Public().(type) {
	case ed25519.PublicKey:
		return key.Sign(random, message, crypto.Hash(0))
	case *rsa.PublicKey:
		return key.Sign(random, sum[:], pssOptions)
	}
	return key.Sign(random, sum[:], crypto.SHA256)
}

func verifyMessage(public crypto.PublicKey, message, signature []byte) bool {
	sum := sha256.Sum256(message)
	switch key := public.(type) {
	case ed25519.PublicKey:
		return ed25519.Verify(key, message, signature)
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(key, sum[:], signature)
	case *rsa.PublicKey:
		return rsa.VerifyPSS(key, crypto.SHA256, sum[:], signature, pssOptions) == nil
	}
	return false
}

// VerifyPossession verifies the signature over the statement's bytes as they came and
// only then decodes them. The caller compares the fields (CheckPossession).
func VerifyPossession(public crypto.PublicKey, statement, signature []byte) (*statev1.PossessionStatement, error) {
	if err := CheckPossessionKey(public); err != nil {
		return nil, err
	}
	if len(statement) > maxStatement {
		return nil, fmt.Errorf("possession statement has %d bytes, over %d", len(statement), maxStatement)
	}
	if !verifyMessage(public, append([]byte(possessionContext), statement...), signature) {
		return nil, errors.New("possession statement is not signed with the key of the certificate")
	}
	st := &statev1.PossessionStatement{}
	if err := proto.Unmarshal(statement, st); err != nil {
		return nil, fmt.Errorf("possession statement does not decode: %w", err)
	}
	return st, nil
}

// CheckPossession compares a verified statement with what it must say.
func CheckPossession(st *statev1.PossessionStatement, trustDomain, keyID, certificate string, exporter []byte) error {
	switch {
	case st.GetTrustDomain() != trustDomain:
		return fmt.Errorf("possession statement is for trust domain %.255q, not %s", st.GetTrustDomain(), trustDomain)
	case st.GetKeyId() != keyID || CheckKeyID(keyID) != nil:
		return errors.New("possession statement is for another key")
	case st.GetCertificate() != certificate:
		return errors.New("possession statement is for another certificate")
	case len(exporter) != ExporterSize || !bytes.Equal(st.GetExporter(), exporter):
		return errors.New("possession statement is bound to another connection")
	}
	return nil
}
