package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"slices"
)

// MaxCSR is the size of the largest certificate request that is read, in bytes.
const MaxCSR = 4 << 10

var errNotItsKey = errors.New("certificate request is not signed with its own key")

// CSR is a PKCS#10 request (DER) that proves possession of the key and says nothing else:
// the CA decides on the content of what it signs. For keys on P-256 it is written here;
// x509.CreateCertificateRequest, which it is equal to, verifies its own signature, as the
// CA does anyway.
func CSR(random io.Reader, key crypto.Signer) ([]byte, error) {
	own, ok := key.(*ecdsa.PrivateKey)
	if !ok || own.Curve != elliptic.P256() {
		return x509.CreateCertificateRequest(random, &x509.CertificateRequest{}, key)
	}
	point, err := own.PublicKey.Bytes()
	if err != nil {
		return nil, err
	}
	csr := slices.Concat([]byte{tagSequence, 0x81, 0}, beforeKey, point, afterKey)
	digest := sha256.Sum256(csr[3 : len(csr)-len(ecdsaWithSHA256)])
	signature, err := ecdsa.SignASN1(random, own, digest[:])
	if err != nil {
		return nil, err
	}
	csr = append(csr, tagBitString, byte(1+len(signature)), 0)
	csr = append(csr, signature...)
	csr[2] = byte(len(csr) - 3)
	return csr, nil
}

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

// EncodeKey is a SubjectPublicKeyInfo, DER.
func EncodeKey(public crypto.PublicKey) ([]byte, error) {
	if key, ok := public.(*ecdsa.PublicKey); ok && key.Curve == elliptic.P256() {
		point, err := key.Bytes()
		return slices.Concat(spkiP256, point), err
	}
	return x509.MarshalPKIXPublicKey(public)
}

const (
	tagInteger   = 0x02
	tagBitString = 0x03
	tagSequence  = 0x30
)

var (
	ecdsaWithSHA256 = []byte{0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02} // RFC 5758 3.2
	spkiP256        = []byte{                                                                        // RFC 5480, as far as the point
		0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01,
		0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
	}
)

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
