package signer

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
)

// MaxCSR is the size of the largest certificate request that is read, in bytes.
const MaxCSR = 4 << 10

var errNotItsKey = errors.New("certificate request is not signed with its own key")

// KeyOf returns the key of a PKCS#10 request (DER) after checking that the request
// is signed with it. Nothing else in the request means anything.
func KeyOf(csr []byte) (crypto.PublicKey, error) {
	if len(csr) > MaxCSR {
		return nil, fmt.Errorf("certificate request has %d bytes, over %d", len(csr), MaxCSR)
	}
	if info, point, signature, ok := plainRequest(csr); ok {
		key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
		if err != nil {
			return nil, fmt.Errorf("certificate request does not parse: %w", err)
		}
		if digest := sha256.Sum256(info); !ecdsa.VerifyASN1(key, digest[:], signature) {
			return nil, errNotItsKey
		}
		return key, nil
	}
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, fmt.Errorf("certificate request does not parse: %w", err)
	}
	if err := req.CheckSignature(); err != nil {
		return nil, fmt.Errorf("%w: %w", errNotItsKey, err)
	}
	return req.PublicKey, nil
}

const pointSize = 65 // of a public key on P-256

// Around the key of a plain request: version, no subject; no attributes, algorithm.
var (
	beforeKey = slices.Concat([]byte{tagSequence, byte(5 + len(spkiP256) + pointSize + 2), tagInteger, 1, 0, tagSequence, 0}, spkiP256)
	afterKey  = slices.Concat([]byte{0xa0, 0}, ecdsaWithSHA256)
)

// plainRequest takes a request apart that says nothing but its key, on P-256, as agents
// make them: all of it but the key and the signature is the same in each, and is compared
// in the place of being parsed. What differs in anything is not ok, and for
// x509.ParseCertificateRequest to judge.
func plainRequest(csr []byte) (info, point, signature []byte, ok bool) {
	if len(csr) < 3+0x80 || len(csr) > 3+0xff {
		return nil, nil, nil, false
	}
	whole, ok := bytes.CutPrefix(csr, []byte{tagSequence, 0x81, byte(len(csr) - 3)})
	if !ok {
		return nil, nil, nil, false
	}
	rest, ok := bytes.CutPrefix(whole, beforeKey)
	if !ok || len(rest) < pointSize {
		return nil, nil, nil, false
	}
	point = rest[:pointSize]
	if rest, ok = bytes.CutPrefix(rest[pointSize:], afterKey); !ok {
		return nil, nil, nil, false
	}
	if len(rest) < 3 || len(rest) > 2+0x7f || !bytes.HasPrefix(rest, []byte{tagBitString, byte(len(rest) - 2), 0}) {
		return nil, nil, nil, false
	}
	return whole[:len(beforeKey)+pointSize+2], point, rest[3:], true
}
