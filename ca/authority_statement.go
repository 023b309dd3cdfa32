package ca

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// What a member says of its own authority is verified by every replica in Apply, so
// that not even a leader can put a key into the bundle under another member's name:
// removing that member would then not take out what the leader signs. Apply must
// decide the same with every release of Go, so it uses the few fixed forms of this file
// and no parser of the library.

// AuthorityStatement is what a member's node key signs when it prepares an authority:
// the SHA-256 of its fields, bound to the cluster.
func AuthorityStatement(cluster *statev1.Cluster, a *statev1.Authority) [sha256.Size]byte {
	b := []byte("entente authority 1\x00")
	for _, field := range [][]byte{cluster.GetId(), []byte(cluster.GetTrustDomain()), []byte(a.GetMemberId()), a.GetPublicKey(), a.GetCertificate(), a.GetUpstream()} {
		b = appendField(b, field)
	}
	for _, n := range []int64{int64(a.GetUse()), a.GetNotBefore(), a.GetNotAfter(), a.GetUpstreamNotAfter()} {
		b = binary.BigEndian.AppendUint64(b, uint64(n))
	}
	return sha256.Sum256(b)
}

// appendField writes a field of what is signed, with its length before it: no two lists of
// fields have the same bytes.
func appendField(b, field []byte) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(field))), field...)
}

// pointPrefix begins the SubjectPublicKeyInfo of every P-256 key (RFC 5480); the 64
// bytes of an uncompressed point follow.
var pointPrefix, _ = hex.DecodeString("3059301306072a8648ce3d020106082a8648ce3d03010703420004")

const signatureSize = 64

// FixedSignature turns the ASN.1 form of an ECDSA signature on P-256 into r and s, 32
// bytes each.
func FixedSignature(der []byte) ([]byte, error) {
	var v struct{ R, S *big.Int }
	if rest, err := asn1.Unmarshal(der, &v); err != nil || len(rest) != 0 || v.R.Sign() <= 0 || v.S.Sign() <= 0 || v.R.BitLen() > 256 || v.S.BitLen() > 256 {
		return nil, errors.New("it is no ECDSA signature on P-256")
	}
	fixed := make([]byte, signatureSize)
	v.R.FillBytes(fixed[:32])
	v.S.FillBytes(fixed[32:])
	return fixed, nil
}

// VerifyAuthority says why an authority is not the word of the member that it names.
func VerifyAuthority(cluster *statev1.Cluster, a *statev1.Authority, nodeKey, signature []byte) error {
	key, err := nodePublicKey(nodeKey)
	switch {
	case err != nil:
		return err
	case len(signature) != signatureSize:
		return errors.New("the authority does not come with a signature of a node key")
	case KeyID(nodeKey) != a.GetMemberId():
		return errors.New("the authority is signed by another node than the member that it names")
	}
	if !verifyFixed(key, AuthorityStatement(cluster, a), signature) {
		return fmt.Errorf("member %.12s has not signed this authority for this cluster", a.GetMemberId())
	}
	return nil
}

// nodePublicKey reads the SubjectPublicKeyInfo of a node key.
func nodePublicKey(spki []byte) (*ecdsa.PublicKey, error) {
	point, ok := bytes.CutPrefix(spki, pointPrefix)
	if !ok || len(point) != 64 {
		return nil, errors.New("it does not come with a node key")
	}
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), append([]byte{4}, point...))
	if err != nil {
		return nil, errors.New("the node key is no point of P-256")
	}
	return key, nil
}

// verifyFixed verifies a signature of signatureSize bytes, as FixedSignature gives it.
func verifyFixed(key *ecdsa.PublicKey, sum [sha256.Size]byte, signature []byte) bool {
	return ecdsa.Verify(key, sum[:], new(big.Int).SetBytes(signature[:32]), new(big.Int).SetBytes(signature[32:]))
}

// CheckAuthorityCertificate says where an X.509 authority's certificate differs from its
// record: in its key, its life, or the one trust domain that it may name. A door has
// looked at all of it (LintAuthority); this is what every replica still sees for itself.
func CheckAuthorityCertificate(trustDomain string, a *statev1.Authority) error {
	c, err := walk(a.GetCertificate())
	if err != nil {
		return fmt.Errorf("the authority's certificate: %w", err)
	}
	uri := "spiffe://" + trustDomain
	want := sequence(append([]byte{0x86}, prefixed([]byte(uri))...))
	switch {
	case !bytes.Equal(c.spki, a.GetPublicKey()):
		return errors.New("the authority's certificate is for another key")
	case !bytes.Equal(c.validity, sequence(validity(a.GetNotBefore(), a.GetNotAfter()))):
		return errors.New("the authority's certificate lives at other times than its record says")
	case len(c.names) != 1:
		return fmt.Errorf("the authority's certificate does not name %s once", uri)
	case !bytes.Equal(c.names[0], want):
		return fmt.Errorf("the authority's certificate does not name %s alone", uri)
	}
	return nil
}

var subjectAltName = []byte{0x06, 0x03, 0x55, 0x1d, 0x11} // 2.5.29.17

// element cuts the first DER element off; whole is nil when there is none.
func element(der []byte) (tag byte, value, whole, rest []byte) {
	if len(der) < 2 {
		return 0, nil, nil, nil
	}
	header, size := 2, int(der[1])
	switch {
	case size < 0x80:
	case size == 0x81 && len(der) > 2 && der[2] >= 0x80:
		header, size = 3, int(der[2])
	case size == 0x82 && len(der) > 3 && der[2] > 0:
		header, size = 4, int(der[2])<<8|int(der[3])
	default:
		return 0, nil, nil, nil
	}
	if len(der)-header < size {
		return 0, nil, nil, nil
	}
	end := header + size
	return der[0], der[header:end:end], der[:end:end], der[end:]
}

// prefixed is content with its DER length before it.
func prefixed(content []byte) []byte {
	switch n := len(content); {
	case n < 0x80:
		return append([]byte{byte(n)}, content...)
	case n < 0x100:
		return append([]byte{0x81, byte(n)}, content...)
	default:
		return append([]byte{0x82, byte(n >> 8), byte(n)}, content...)
	}
}

func sequence(content []byte) []byte { return append([]byte{0x30}, prefixed(content)...) }

// validity are moments as certificates write them: UTCTime until 2049, then
// GeneralizedTime (RFC 5280 section 4.1.2.5).
func validity(unix ...int64) (der []byte) {
	for _, seconds := range unix {
		at := time.Unix(seconds, 0).UTC()
		tag, text := byte(0x17), at.Format("060102150405Z")
		if at.Year() < 1950 || at.Year() >= 2050 {
			tag, text = 0x18, at.Format("20060102150405Z")
		}
		der = append(append(der, tag), prefixed([]byte(text))...)
	}
	return der
}
