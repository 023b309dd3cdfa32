package signer

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	"github.com/entente-mesh/entente/ca"
)

// selfCheckEvery: of so many signatures that a key in this process's memory makes, one
// is verified. A check costs twice what a signature does, and what could spoil one, a
// memory fault, spoils the next as well. Keys that are elsewhere are checked each time.
const selfCheckEvery = 64

// certify signs a leaf of ca.LeafTemplate. For ECDSA keys on P-256 in memory it writes
// the certificate itself; x509.CreateCertificate, which it is equal to, verifies every
// signature and takes its time.
func (s *Signer) certify(template, authority *x509.Certificate, key crypto.Signer) ([]byte, error) {
	own, ok := key.(*ecdsa.PrivateKey)
	if !ok || own.Curve != elliptic.P256() {
		return x509.CreateCertificate(rand.Reader, template, authority, template.PublicKey, key)
	}
	if !own.PublicKey.Equal(authority.PublicKey) {
		return nil, errors.New("the key is not the authority's")
	}
	tbs, err := encodeLeaf(template, authority)
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256(tbs)
	signature, err := ecdsa.SignASN1(rand.Reader, own, digest[:])
	if err != nil {
		return nil, err
	}
	if s.signatures.Add(1)%selfCheckEvery == 1 && !ecdsa.VerifyASN1(&own.PublicKey, digest[:], signature) {
		return nil, errors.New("the key of the authority makes signatures that do not verify")
	}
	return der(tagSequence, tbs, ecdsaWithSHA256, bitString(signature)), nil
}

// DER, as much of it as a leaf needs.
const (
	tagInteger         = 0x02
	tagBitString       = 0x03
	tagOctetString     = 0x04
	tagUTCTime         = 0x17
	tagGeneralizedTime = 0x18
	tagSequence        = 0x30
	tagDNSName         = 0x82 // of a GeneralName
	tagURI             = 0x86
)

// The parts that are the same in each leaf.
var (
	ecdsaWithSHA256 = []byte{0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02} // RFC 5758 3.2
	version3        = []byte{0xa0, 0x03, tagInteger, 1, 2}
	noSubject       = []byte{tagSequence, 0}
	spkiP256        = []byte{ // RFC 5480, as far as the point
		0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01,
		0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
	}
	critical = []byte{0x01, 0x01, 0xff}

	oidAuthorityKeyID = []byte{0x06, 0x03, 0x55, 0x1d, 0x23}
	oidSubjectAltName = []byte{0x06, 0x03, 0x55, 0x1d, 0x11}
	oidOrigin         = []byte{0x06, 0x0a, 0x2b, 0x06, 0x01, 0x04, 0x01, 0x81, 0xfd, 0x59, 0x11, 0x01} // ca.OriginOID

	// Key usage digitalSignature, critical; server and client authentication; not a CA,
	// critical.
	fixedExtensions = []byte{
		0x30, 0x0e, 0x06, 0x03, 0x55, 0x1d, 0x0f, 0x01, 0x01, 0xff, 0x04, 0x04, 0x03, 0x02, 0x07, 0x80,
		0x30, 0x1d, 0x06, 0x03, 0x55, 0x1d, 0x25, 0x04, 0x16, 0x30, 0x14,
		0x06, 0x08, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x01, 0x06, 0x08, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x02,
		0x30, 0x0c, 0x06, 0x03, 0x55, 0x1d, 0x13, 0x01, 0x01, 0xff, 0x04, 0x02, 0x30, 0x00,
	}
)

// encodeLeaf is the TBSCertificate (RFC 5280 4.1) of a leaf of ca.LeafTemplate.
func encodeLeaf(leaf, authority *x509.Certificate) ([]byte, error) {
	if leaf.IsCA || leaf.KeyUsage != x509.KeyUsageDigitalSignature || len(leaf.ExtKeyUsage) != 2 || len(leaf.SubjectKeyId) != 0 ||
		len(leaf.URIs) != 1 || len(leaf.EmailAddresses)+len(leaf.IPAddresses) != 0 || len(leaf.ExtraExtensions) > 1 {
		return nil, errors.New("encode SVID: the template is not that of a leaf")
	}
	spki, err := encodeKey(leaf.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("encode SVID: %w", err)
	}
	var names []byte
	for _, name := range leaf.DNSNames {
		names = append(names, der(tagDNSName, []byte(name))...)
	}
	names = append(names, der(tagURI, []byte(leaf.URIs[0].String()))...)

	extensions := append([]byte{}, fixedExtensions...)
	extensions = append(extensions, der(tagSequence, oidAuthorityKeyID, der(tagOctetString, der(tagSequence, der(0x80, authority.SubjectKeyId))))...)
	extensions = append(extensions, der(tagSequence, oidSubjectAltName, critical, der(tagOctetString, der(tagSequence, names)))...)
	for _, ext := range leaf.ExtraExtensions {
		if !ext.Id.Equal(ca.OriginOID) || ext.Critical {
			return nil, errors.New("encode SVID: an extension that a leaf does not have")
		}
		extensions = append(extensions, der(tagSequence, oidOrigin, der(tagOctetString, ext.Value))...)
	}
	return der(tagSequence,
		version3,
		integer(leaf.SerialNumber),
		ecdsaWithSHA256,
		authority.RawSubject,
		der(tagSequence, date(leaf.NotBefore), date(leaf.NotAfter)),
		noSubject,
		spki,
		der(0xa3, der(tagSequence, extensions)),
	), nil
}

// encodeKey is a SubjectPublicKeyInfo.
func encodeKey(public any) ([]byte, error) {
	if key, ok := public.(*ecdsa.PublicKey); ok && key.Curve == elliptic.P256() {
		point, err := key.Bytes()
		return slices.Concat(spkiP256, point), err
	}
	return x509.MarshalPKIXPublicKey(public)
}

// der is one element with its parts one behind the other.
func der(tag byte, parts ...[]byte) []byte {
	n := 0
	for _, part := range parts {
		n += len(part)
	}
	out := make([]byte, 0, n+5)
	switch {
	case n < 1<<7:
		out = append(out, tag, byte(n))
	case n < 1<<8:
		out = append(out, tag, 0x81, byte(n))
	case n < 1<<16:
		out = append(out, tag, 0x82, byte(n>>8), byte(n))
	default:
		out = append(out, tag, 0x83, byte(n>>16), byte(n>>8), byte(n))
	}
	for _, part := range parts {
		out = append(out, part...)
	}
	return out
}

func bitString(bytes []byte) []byte { return der(tagBitString, []byte{0}, bytes) }

// integer is a positive number.
func integer(n *big.Int) []byte {
	bytes := n.Bytes()
	if len(bytes) == 0 || bytes[0]&0x80 != 0 {
		bytes = append([]byte{0}, bytes...)
	}
	return der(tagInteger, bytes)
}

// date is a time in UTC (RFC 5280 4.1.2.5).
func date(t time.Time) []byte {
	t = t.UTC()
	if y := t.Year(); y < 1950 || y >= 2050 {
		return der(tagGeneralizedTime, []byte(t.Format("20060102150405Z")))
	}
	return der(tagUTCTime, []byte(t.Format("060102150405Z")))
}
