package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	_ "crypto/sha256" // crypto.SHA256
	_ "crypto/sha512" // crypto.SHA384, crypto.SHA512
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"strconv"
	"strings"
	"sync"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// A key belongs to the trust domain whose name it signed: an X.509 authority by a
// self-signed certificate with that name, a JWT or WIT key by a key proof. Every replica
// decides that in Apply, so this file reads the one form that our bundle writer gives,
// by fixed prefixes, and uses no parser of the library.

// Key proof: a compact JWS that the key signs over its own id, use and trust domain. The
// type keeps it apart from tokens, and it has no claim that one needs.
const keyProofType = "entente-key-proof+jws"

// KeyProof is what a JWT or WIT key signs to show that it belongs to the trust domain:
// the signing input of its proof. alg is ES256 or RS256.
func KeyProof(trustDomain, alg string, use statev1.KeyUse, keyID string) []byte {
	header := `{"alg":"` + alg + `","typ":"` + keyProofType + `"}`
	payload := `{"trust_domain":"` + trustDomain + `","use":"` + UseName(use) + `","key":"` + keyID + `"}`
	return []byte(base64.RawURLEncoding.EncodeToString([]byte(header)) + "." + base64.RawURLEncoding.EncodeToString([]byte(payload)))
}

// KeyProofOf is the whole proof of an authority, as it stands in a bundle; empty if it has
// none.
func KeyProofOf(trustDomain string, a *statev1.Authority) string {
	if len(a.GetProof()) == 0 {
		return ""
	}
	_, alg, err := publicOfSPKI(a.GetPublicKey())
	if err != nil {
		return ""
	}
	return string(KeyProof(trustDomain, alg, a.GetUse(), a.GetId())) + "." + base64.RawURLEncoding.EncodeToString(a.GetProof())
}

// UseName is how a bundle names the use of a key.
func UseName(use statev1.KeyUse) string {
	switch use {
	case statev1.KeyUse_KEY_USE_X509:
		return "x509-svid"
	case statev1.KeyUse_KEY_USE_JWT:
		return "jwt-svid"
	case statev1.KeyUse_KEY_USE_WIT:
		return "wit-svid"
	}
	return ""
}

func useOf(name string) statev1.KeyUse {
	for _, use := range []statev1.KeyUse{statev1.KeyUse_KEY_USE_X509, statev1.KeyUse_KEY_USE_JWT, statev1.KeyUse_KEY_USE_WIT} {
		if name == UseName(use) {
			return use
		}
	}
	return statev1.KeyUse_KEY_USE_UNSPECIFIED
}

// CheckAuthorityHeld says why an authority of our own does not show that whoever proposes
// it holds its key: a token key by its proof, an X.509 one by its signature, or by that of
// the upstream that certified it.
func CheckAuthorityHeld(trustDomain string, a *statev1.Authority) error {
	if a.GetUse() != statev1.KeyUse_KEY_USE_X509 {
		public, alg, err := publicOfSPKI(a.GetPublicKey())
		if err != nil {
			return err
		}
		if !verify(public, crypto.SHA256, KeyProof(trustDomain, alg, a.GetUse(), a.GetId()), a.GetProof()) {
			return fmt.Errorf("the authority's key has not signed that it belongs to %s", trustDomain)
		}
		return nil
	}
	if len(a.GetProof()) != 0 {
		return errors.New("only a JWT or WIT key has a proof beside it")
	}
	c, err := walk(a.GetCertificate())
	if err != nil {
		return err
	}
	signer := a.GetPublicKey()
	if len(a.GetUpstream()) > 0 {
		root, err := walk(a.GetUpstream())
		if err != nil {
			return err
		}
		signer = root.spki
	}
	if !c.signedBy(signer) {
		return errors.New("the authority's certificate is not signed by its own key, nor by that of its upstream")
	}
	return nil
}

// CertificateKeyID is the id of the key that a certificate, DER, is for; empty if it cannot
// be read.
func CertificateKeyID(der []byte) string {
	c, err := walk(der)
	if err != nil {
		return ""
	}
	return KeyID(c.spki)
}

// CertificateOwner is the trust domain that a self-signed certificate, DER, names; empty if
// it is not self-signed or names none.
func CertificateOwner(der []byte) string {
	c, err := walk(der)
	if err != nil || c.trustDomain() == "" || !c.signedBy(c.spki) {
		return ""
	}
	return c.trustDomain()
}

// BundleKey is one key of another domain's bundle.
type BundleKey struct {
	ID       string // hex SHA-256 of its SubjectPublicKeyInfo
	Use      statev1.KeyUse
	From, To int   // its place in the document: document[From:To]
	Broken   error // why nobody can tell which key it is; it has no ID then, and counts nowhere

	Names string // the trust domain that its certificate or proof names; nothing is verified yet

	verify func() bool
}

// Owner is the trust domain that the key has signed it belongs to; empty without a proof.
// What it costs to verify that is paid once, when it is asked.
func (k *BundleKey) Owner() string {
	if k.Names == "" || !k.verify() {
		return ""
	}
	return k.Names
}

// BundleKeys reads a bundle as our writer writes it, and only so: a document in which a
// reader could find another key is refused.
func BundleKeys(document []byte) (keys []*BundleKey, sequence uint64, err error) {
	s := scanner{rest: document}
	s.text(`{"keys":[`)
	for i := 0; s.err == nil && !s.has(`]`); i++ {
		if i > 0 {
			s.text(`,`)
		}
		from := len(document) - len(s.rest)
		members := s.object()
		if s.err != nil {
			break
		}
		key := &BundleKey{Use: useOf(members["use"])}
		key.Broken = key.read(members)
		key.From, key.To = from, len(document)-len(s.rest)
		keys = append(keys, key)
	}
	if s.has(`,"spiffe_sequence":`) {
		sequence = s.number()
	}
	if s.has(`,"spiffe_refresh_hint":`) {
		s.number()
	}
	if s.text(`}`); s.err == nil && len(s.rest) > 0 {
		s.fail()
	}
	return keys, sequence, s.err
}

// WithoutKeys is the document without some of its keys, which are named by their place
// among all of them.
func WithoutKeys(document []byte, keys []*BundleKey, drop func(i int) bool) []byte {
	out := []byte(`{"keys":[`)
	end := len(out)
	for i, k := range keys {
		if end = k.To; drop(i) {
			continue
		}
		if out[len(out)-1] != '[' {
			out = append(out, ',')
		}
		out = append(out, document[k.From:k.To]...)
	}
	return append(out, document[end:]...)
}

func (k *BundleKey) read(members map[string]string) error {
	spki, err := spkiOfJWK(members)
	if err != nil {
		return err
	}
	switch k.Use {
	case statev1.KeyUse_KEY_USE_X509:
		der, err := base64.StdEncoding.Strict().DecodeString(members["x5c"])
		if err != nil {
			return errors.New("its x5c is not base64")
		}
		c, err := walk(der)
		if err != nil {
			return err
		}
		if !bytes.Equal(c.spki, spki) {
			return errors.New("its certificate is for another key, or writes its key in a way of its own")
		}
		k.Names = c.trustDomain()
		k.verify = sync.OnceValue(func() bool { return c.signedBy(c.spki) })
	case statev1.KeyUse_KEY_USE_JWT, statev1.KeyUse_KEY_USE_WIT:
		k.readProof(members["entente_proof"], spki)
	default:
		return errors.New("it has no use of SPIFFE's")
	}
	k.ID = KeyID(spki)
	return nil
}

func (k *BundleKey) readProof(proof string, spki []byte) {
	parts := strings.Split(proof, ".")
	if len(parts) != 3 {
		return
	}
	payload, err := base64.RawURLEncoding.Strict().DecodeString(parts[1])
	if err != nil {
		return
	}
	name, ok := strings.CutPrefix(string(payload), `{"trust_domain":"`)
	td, _, _ := strings.Cut(name, `"`)
	if _, err := ParseTrustDomain(td); err != nil || !ok {
		return
	}
	k.Names = td
	k.verify = sync.OnceValue(func() bool {
		public, alg, err := publicOfSPKI(spki)
		if err != nil {
			return false
		}
		signed := KeyProof(td, alg, k.Use, KeyID(spki))
		signature, err := base64.RawURLEncoding.Strict().DecodeString(parts[2])
		return err == nil && parts[0]+"."+parts[1] == string(signed) && verify(public, crypto.SHA256, signed, signature)
	})
}

// ---------------------------------------------------------------- the document

// scanner reads what encoding/json writes for the members of our bundles, without blanks.
type scanner struct {
	rest []byte
	err  error
}

func (s *scanner) fail() { s.err = errors.New("the bundle is not written as our writer writes it") }

func (s *scanner) has(text string) bool {
	rest, ok := bytes.CutPrefix(s.rest, []byte(text))
	if ok && s.err == nil {
		s.rest = rest
		return true
	}
	return false
}

func (s *scanner) text(text string) {
	if s.err == nil && !s.has(text) {
		s.fail()
	}
}

func (s *scanner) number() uint64 {
	end := 0
	for end < len(s.rest) && '0' <= s.rest[end] && s.rest[end] <= '9' {
		end++
	}
	n, err := strconv.ParseUint(string(s.rest[:end]), 10, 64)
	if err != nil {
		s.fail()
	}
	s.rest = s.rest[end:]
	return n
}

// value is a string's content, with its escapes.
func (s *scanner) value() string {
	s.text(`"`)
	for i := 0; s.err == nil && i < len(s.rest); i++ {
		switch s.rest[i] {
		case '\\':
			i++
		case '"':
			v := string(s.rest[:i])
			s.rest = s.rest[i+1:]
			return v
		}
	}
	s.fail()
	return ""
}

// object reads the members of a key: strings, and the list of one string that x5c is.
func (s *scanner) object() map[string]string {
	members := map[string]string{}
	s.text(`{`)
	for s.err == nil {
		name := s.value()
		s.text(`:`)
		list := s.has(`[`)
		v := s.value()
		if list {
			s.text(`]`)
		}
		if _, twice := members[name]; twice || list != (name == "x5c") || strings.Contains(name, `\`) {
			s.fail()
		}
		members[name] = v
		if s.has(`}`) {
			break
		}
		s.text(`,`)
	}
	return members
}

// ---------------------------------------------------------------- keys

// The bytes before the key itself in a SubjectPublicKeyInfo (RFC 5480, RFC 8410, RFC 8017).
var (
	curves = []struct {
		name   string
		curve  elliptic.Curve
		prefix []byte
	}{
		{"P-256", elliptic.P256(), pointPrefix},
		{"P-384", elliptic.P384(), unhex("3076301006072a8648ce3d020106052b8104002203620004")},
		{"P-521", elliptic.P521(), unhex("30819b301006072a8648ce3d020106052b810400230381860004")},
	}
	edPrefix     = unhex("302a300506032b6570032100")
	rsaAlgorithm = unhex("300d06092a864886f70d0101010500")
)

func unhex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

func spkiOfJWK(members map[string]string) ([]byte, error) {
	number := func(name string) []byte {
		b, _ := base64.RawURLEncoding.Strict().DecodeString(members[name])
		return b
	}
	switch members["kty"] {
	case "EC":
		for _, c := range curves {
			x, y := number("x"), number("y")
			if size := (c.curve.Params().BitSize + 7) / 8; members["crv"] == c.name && len(x) == size && len(y) == size {
				return append(append(bytes.Clone(c.prefix), x...), y...), nil
			}
		}
	case "OKP":
		if x := number("x"); members["crv"] == "Ed25519" && len(x) == ed25519.PublicKeySize {
			return append(bytes.Clone(edPrefix), x...), nil
		}
	case "RSA":
		if n, e := number("n"), number("e"); len(n) > 0 && len(n) <= 8<<10 && len(e) > 0 && len(e) <= 8 && n[0] != 0 && e[0] != 0 {
			key := sequence(append(integer(n), integer(e)...))
			bits := append([]byte{0x03}, prefixed(append([]byte{0}, key...))...)
			return sequence(append(bytes.Clone(rsaAlgorithm), bits...)), nil
		}
	}
	return nil, errors.New("its key is none that a bundle holds")
}

// integer is a positive INTEGER of its bytes, which begin with no zero.
func integer(n []byte) []byte {
	if n[0] >= 0x80 {
		n = append([]byte{0}, n...)
	}
	return append([]byte{0x02}, prefixed(n)...)
}

// maxRSABits: a larger key proves nothing, since what verifying costs would be a stranger's choice.
const maxRSABits = 4096

// publicOfSPKI gives the key, and the algorithm of its proof if it may have one.
func publicOfSPKI(spki []byte) (public crypto.PublicKey, alg string, err error) {
	for _, c := range curves {
		if point, ok := bytes.CutPrefix(spki, c.prefix); ok {
			key, err := ecdsa.ParseUncompressedPublicKey(c.curve, append([]byte{4}, point...))
			if err != nil {
				return nil, "", errors.New("the key is no point of its curve")
			}
			if c.name == "P-256" {
				alg = ES256
			}
			return key, alg, nil
		}
	}
	if key, ok := bytes.CutPrefix(spki, edPrefix); ok && len(key) == ed25519.PublicKeySize {
		return ed25519.PublicKey(key), "", nil
	}
	_, content, whole, rest := element(spki)
	if content, ok := bytes.CutPrefix(content, rsaAlgorithm); ok && whole != nil && len(rest) == 0 {
		_, bits, _, _ := element(content)
		if len(bits) > 0 {
			_, key, _, _ := element(bits[1:])
			_, n, _, key := element(key)
			_, e, _, key := element(key)
			if modulus := new(big.Int).SetBytes(n); len(key) == 0 && modulus.Bit(0) == 1 && modulus.BitLen() >= minRSABits && modulus.BitLen() <= maxRSABits {
				if exponent := new(big.Int).SetBytes(e); exponent.BitLen() <= 31 && exponent.Bit(0) == 1 && exponent.BitLen() > 1 {
					return &rsa.PublicKey{N: modulus, E: int(exponent.Int64())}, RS256, nil
				}
			}
		}
	}
	return nil, "", errors.New("the key is of a kind or size that proves nothing")
}

// verify takes ECDSA signatures as r and s of equal length.
func verify(public crypto.PublicKey, hash crypto.Hash, message, signature []byte) bool {
	if key, ok := public.(ed25519.PublicKey); ok {
		return hash == 0 && ed25519.Verify(key, message, signature)
	}
	if hash == 0 {
		return false
	}
	h := hash.New()
	h.Write(message)
	switch key := public.(type) {
	case *ecdsa.PublicKey:
		size := (key.Curve.Params().BitSize + 7) / 8
		if len(signature) != 2*size {
			return false
		}
		return ecdsa.Verify(key, h.Sum(nil), new(big.Int).SetBytes(signature[:size]), new(big.Int).SetBytes(signature[size:]))
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(key, hash, h.Sum(nil), signature) == nil
	}
	return false
}

// ---------------------------------------------------------------- certificates

// certificate is what of one every replica sees for itself.
type certificate struct {
	tbs, spki            []byte
	validity             []byte
	names                [][]byte // subject alternative names: the content of each such extension
	algorithm, signature []byte   // nil: not of the usual form; then nobody signed it
}

// walk takes a certificate apart.
func walk(der []byte) (*certificate, error) {
	errForm := errors.New("the certificate has not the form of one")
	tag, content, whole, rest := element(der)
	if whole == nil || tag != 0x30 || len(rest) != 0 {
		return nil, errForm
	}
	c := &certificate{}
	var tbs []byte
	if tag, tbs, c.tbs, content = element(content); c.tbs == nil || tag != 0x30 {
		return nil, errForm
	}
	_, _, c.algorithm, content = element(content)
	tag, signature, whole, rest := element(content)
	if whole != nil && tag == 0x03 && len(rest) == 0 && len(signature) > 0 && signature[0] == 0 {
		c.signature = signature[1:]
	}
	// [0] version, serial, algorithm, issuer, validity, subject, key, ..., [3] extensions.
	var fields [7][]byte
	for i := range fields {
		_, _, fields[i], tbs = element(tbs)
	}
	if fields[6] == nil || fields[0][0] != 0xa0 {
		return nil, errForm
	}
	c.validity, c.spki = fields[4], fields[6]
	for len(tbs) > 0 {
		tag, content, whole, tbs = element(tbs)
		if whole == nil {
			return nil, errForm
		}
		if tag != 0xa3 {
			continue // unique identifiers, which nobody uses
		}
		_, list, _, rest := element(content)
		if len(rest) != 0 {
			return nil, errForm
		}
		for len(list) > 0 {
			var extension []byte
			_, extension, whole, list = element(list)
			_, _, oid, rest := element(extension)
			if whole == nil || oid == nil {
				return nil, errForm
			}
			if !bytes.Equal(oid, subjectAltName) {
				continue
			}
			tag, value, _, after := element(rest)
			if tag == 0x01 { // critical
				tag, value, _, after = element(after)
			}
			if tag != 0x04 || len(after) != 0 {
				return nil, errForm
			}
			c.names = append(c.names, value)
		}
	}
	return c, nil
}

// trustDomain is the one that the certificate names: by its only URI, without a path;
// empty if it names none.
func (c *certificate) trustDomain() string {
	if len(c.names) != 1 {
		return ""
	}
	_, names, whole, rest := element(c.names[0])
	if whole == nil || len(rest) != 0 {
		return ""
	}
	td, named, uris := "", false, 0
	for len(names) > 0 {
		var tag byte
		var name []byte
		tag, name, whole, names = element(names)
		if whole == nil {
			return ""
		}
		if tag == 0x86 {
			uris++
			td, named = strings.CutPrefix(string(name), "spiffe://")
		}
	}
	if _, err := ParseTrustDomain(td); err != nil || !named || uris != 1 {
		return ""
	}
	return td
}

// signatureAlgorithms are the AlgorithmIdentifiers of which a signature is verified.
var signatureAlgorithms = []struct {
	der  []byte
	hash crypto.Hash
}{
	{unhex("300a06082a8648ce3d040302"), crypto.SHA256}, // ecdsa-with-SHA256
	{unhex("300a06082a8648ce3d040303"), crypto.SHA384},
	{unhex("300a06082a8648ce3d040304"), crypto.SHA512},
	{unhex("300d06092a864886f70d01010b0500"), crypto.SHA256}, // sha256WithRSAEncryption
	{unhex("300d06092a864886f70d01010c0500"), crypto.SHA384},
	{unhex("300d06092a864886f70d01010d0500"), crypto.SHA512},
	{unhex("300506032b6570"), 0}, // Ed25519
}

// signedBy tells whether that key signed the certificate.
func (c *certificate) signedBy(spki []byte) bool {
	public, _, err := publicOfSPKI(spki)
	if err != nil {
		return false
	}
	for _, a := range signatureAlgorithms {
		if !bytes.Equal(a.der, c.algorithm) {
			continue
		}
		signature := c.signature
		key, ec := public.(*ecdsa.PublicKey)
		if ec != (a.der[1] == 0x0a) {
			return false
		}
		if ec {
			if signature = fixed(c.signature, (key.Curve.Params().BitSize+7)/8); signature == nil {
				return false
			}
		}
		return verify(public, a.hash, c.tbs, signature)
	}
	return false
}

// fixed turns the DER of an ECDSA signature into r and s of so many bytes each; nil if it
// is none.
func fixed(der []byte, size int) []byte {
	_, content, whole, rest := element(der)
	out := make([]byte, 2*size)
	if whole == nil || len(rest) != 0 {
		return nil
	}
	for i := range 2 {
		var n []byte
		if _, n, whole, content = element(content); whole == nil || len(n) == 0 || n[0] >= 0x80 {
			return nil
		}
		if n = bytes.TrimLeft(n, "\x00"); len(n) > size {
			return nil
		}
		copy(out[(i+1)*size-len(n):], n)
	}
	if len(content) != 0 {
		return nil
	}
	return out
}
