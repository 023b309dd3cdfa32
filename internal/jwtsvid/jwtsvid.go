// Package jwtsvid decides whether a token is a JWT-SVID or a WIT-SVID of a trust
// domain, by the rules of the SPIFFE specifications JWT-SVID and WIT-SVID and of
// RFC 7515 and 7519 where they refer to them.
//
// It has its own reader, since the usual ones accept what may not be accepted (a token
// without audience where none is asked for, any key of a bundle whatever its use) and
// refuse what must be accepted (a token without kid). Keys come from the caller alone,
// by trust domain and kind: what a token itself says of keys (jwk, jku, x5c) means
// nothing.
//
// Pure: time arrives as an argument. All functions may be called concurrently.
package jwtsvid

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	_ "crypto/sha256" // the hashes of the nine algorithms
	_ "crypto/sha512"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"math/big"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// MaxSize is the size of the largest token that is read, in bytes.
const MaxSize = 16 << 10

// DefaultLeeway is how far clocks may be apart.
const DefaultLeeway = 10 * time.Second

// maxTried bounds the signatures that are checked for a token that names no key.
const maxTried = 16

// Keys are the keys of one trust domain for one kind of token, by key id.
type Keys map[string]crypto.PublicKey

// Source returns the keys of a trust domain for the kind of token that is verified;
// false: tokens of that domain are not trusted. It must never give a key of another
// domain or of another use (I2; JWT-SVID 6.2).
type Source func(spiffeid.TrustDomain) (Keys, bool)

// SVID is a token that verified.
type SVID struct {
	ID       spiffeid.ID
	KeyID    string // of the key that signed it
	Expires  time.Time
	Audience []string       // of a JWT-SVID: one value or more
	Claims   map[string]any // all of them, as encoding/json reads them

	// Key is, of a WIT-SVID, the one whose possession its bearer must prove, and
	// Algorithm the one that the proof is signed with.
	Key       crypto.PublicKey
	Algorithm string
}

// Verify tells whether token is a JWT-SVID for that audience, which may not be empty.
// leeway is how much later than its exp and earlier than its nbf it is accepted. The
// error says why not, in words that a stranger may read; it quotes nothing of the
// token.
func Verify(token string, keys Source, audience string, now time.Time, leeway time.Duration) (*SVID, error) {
	svid, err := verify(token, keys, now, leeway, func(t *parsed) error {
		if typ, ok := t.header["typ"]; ok {
			if name, err := text(typ); err != nil || name != "JWT" && name != "JOSE" {
				return errors.New("its typ is neither JWT nor JOSE: it is no JWT-SVID")
			}
		}
		var err error
		if t.svid.Audience, err = audienceOf(t.claims["aud"]); err != nil {
			return err
		}
		if audience == "" || !slices.Contains(t.svid.Audience, audience) {
			return errors.New("it is for another audience")
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("the token is no valid JWT-SVID: %w", err)
	}
	return svid, nil
}

// VerifyWIT tells whether token is a WIT-SVID. That alone proves nothing about who
// shows it: the caller must see a proof of possession of Key (WIT-SVID 4). leeway and
// the error as of Verify.
func VerifyWIT(token string, keys Source, now time.Time, leeway time.Duration) (*SVID, error) {
	svid, err := verify(token, keys, now, leeway, func(t *parsed) error {
		if typ, err := text(t.header["typ"]); err != nil || typ != "wit+jwt" {
			return errors.New("its typ is not wit+jwt")
		}
		if t.svid.KeyID == "" {
			return errors.New("it has no kid")
		}
		if _, ok := t.claims["aud"]; ok {
			return errors.New("it has an aud, which a WIT-SVID may not have")
		}
		return t.confirmation()
	})
	if err != nil {
		return nil, fmt.Errorf("the token is no valid WIT-SVID: %w", err)
	}
	return svid, nil
}

// parsed is a token on its way.
type parsed struct {
	header, claims map[string]json.RawMessage
	alg            string
	svid           *SVID
}

func verify(token string, source Source, now time.Time, leeway time.Duration, kind func(*parsed) error) (*SVID, error) {
	header, payload, signature, signed, err := split(token)
	if err != nil {
		return nil, err
	}
	t := &parsed{svid: &SVID{}}
	if t.header, err = object(header); err != nil {
		return nil, fmt.Errorf("its header: %w", err)
	}
	// Before anything else is looked at (JWT-SVID 2.1).
	if t.alg, err = text(t.header["alg"]); err != nil || !allowed(t.alg) {
		return nil, errors.New("its alg is none of RS256, RS384, RS512, ES256, ES384, ES512, PS256, PS384, PS512")
	}
	if _, ok := t.header["crit"]; ok {
		return nil, errors.New("its header has crit: extensions that must be understood and are not")
	}
	if kid, ok := t.header["kid"]; ok {
		if t.svid.KeyID, err = text(kid); err != nil || t.svid.KeyID == "" {
			return nil, errors.New("its kid is no text")
		}
	}
	if t.claims, err = object(payload); err != nil {
		return nil, fmt.Errorf("its claims: %w", err)
	}
	if err := kind(t); err != nil {
		return nil, err
	}
	if err := t.subject(); err != nil {
		return nil, err
	}
	keys, ok := source(t.svid.ID.TrustDomain())
	if !ok {
		return nil, errors.New("its trust domain is not trusted here")
	}
	if err := t.signature(keys, signed, signature); err != nil {
		return nil, err
	}
	// Last, so that only who holds a valid signature learns of clocks.
	if err := t.times(now, leeway); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(payload, &t.svid.Claims); err != nil {
		return nil, errors.New("its claims are not JSON")
	}
	return t.svid, nil
}

// split takes the compact serialization apart (RFC 7515 7.1), the only one allowed
// (JWT-SVID 1).
func split(token string) (header, payload, signature, signed []byte, err error) {
	fail := func(why string) ([]byte, []byte, []byte, []byte, error) {
		return nil, nil, nil, nil, errors.New(why)
	}
	if len(token) > MaxSize {
		return fail(fmt.Sprintf("it has over %d bytes", MaxSize))
	}
	// Base64 readers pass over line ends: here nothing is passed over.
	for _, c := range []byte(token) {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.') {
			return fail("it is no JWS in compact serialization")
		}
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 || parts[0] == "" || parts[1] == "" || parts[2] == "" {
		return fail("it is no signed JWS in compact serialization")
	}
	var out [3][]byte
	for i, part := range parts {
		if out[i], err = base64.RawURLEncoding.Strict().DecodeString(part); err != nil {
			return fail("it is not base64url")
		}
	}
	return out[0], out[1], out[2], []byte(token[:len(parts[0])+1+len(parts[1])]), nil
}

func (t *parsed) subject() error {
	sub, err := text(t.claims["sub"])
	if err != nil {
		return errors.New("it has no sub")
	}
	const maxID, maxDomain = 2048, 255 // SPIFFE-ID 2.3
	id, err := spiffeid.FromString(sub)
	if err != nil || len(sub) > maxID || len(id.TrustDomain().Name()) > maxDomain || id.Path() == "" {
		return errors.New("its sub is no SPIFFE ID of a workload")
	}
	t.svid.ID = id
	return nil
}

// signature tries the key that the token names, or, when it names none, each that fits
// its algorithm (kid is optional: JWT-SVID 2.2).
func (t *parsed) signature(keys Keys, signed, signature []byte) error {
	unknown := errors.New("its signature is by no key of its trust domain")
	if t.svid.KeyID != "" {
		key := keys[t.svid.KeyID]
		if key == nil || !fits(t.alg, key) || !check(t.alg, key, signed, signature) {
			return unknown
		}
		return nil
	}
	tried := 0
	for id, key := range keys {
		if !fits(t.alg, key) {
			continue
		}
		if tried++; tried > maxTried {
			return errors.New("it names no key, and its trust domain has too many to try")
		}
		if check(t.alg, key, signed, signature) {
			t.svid.KeyID = id
			return nil
		}
	}
	return unknown
}

func (t *parsed) times(now time.Time, leeway time.Duration) error {
	exp, ok, err := numericDate(t.claims["exp"])
	switch {
	case err != nil || !ok:
		return errors.New("it has no exp")
	case !now.Before(exp.Add(leeway)):
		return errors.New("it has expired")
	}
	t.svid.Expires = exp
	nbf, ok, err := numericDate(t.claims["nbf"])
	switch {
	case err != nil:
		return errors.New("its nbf is no time")
	case ok && now.Add(leeway).Before(nbf):
		return errors.New("it is not valid yet")
	}
	return nil // iat limits nothing (WIT-SVID 3.6)
}

// confirmation reads cnf.jwk (WIT-SVID 3.2): a public key, with its algorithm.
func (t *parsed) confirmation() error {
	cnf, err := object(t.claims["cnf"])
	if err != nil {
		return errors.New("it has no cnf")
	}
	members, err := object(cnf["jwk"])
	if err != nil {
		return errors.New("its cnf has no jwk")
	}
	for _, private := range []string{"d", "p", "q", "dp", "dq", "qi", "oth", "k"} {
		if _, ok := members[private]; ok {
			return errors.New("its cnf.jwk is no public key")
		}
	}
	alg, err := text(members["alg"])
	if err != nil || !allowed(alg) {
		return errors.New("its cnf.jwk has no alg of those that are allowed")
	}
	key, err := publicKey(members)
	if err != nil {
		return err
	}
	if !fits(alg, key) {
		return errors.New("its cnf.jwk has an alg that its key is not for")
	}
	t.svid.Key, t.svid.Algorithm = key, alg
	return nil
}

// publicKey reads an EC or RSA key (RFC 7518 6.2.1 and 6.3.1).
func publicKey(members map[string]json.RawMessage) (crypto.PublicKey, error) {
	bad := errors.New("its cnf.jwk is no key that can be read")
	number := func(name string) []byte {
		s, err := text(members[name])
		if err != nil || strings.ContainsAny(s, "\r\n") {
			return nil
		}
		b, err := base64.RawURLEncoding.Strict().DecodeString(s)
		if err != nil {
			return nil
		}
		return b
	}
	kty, err := text(members["kty"])
	if err != nil {
		return nil, bad
	}
	switch kty {
	case "EC":
		crv, _ := text(members["crv"])
		curve, ok := map[string]elliptic.Curve{"P-256": elliptic.P256(), "P-384": elliptic.P384(), "P-521": elliptic.P521()}[crv]
		x, y := number("x"), number("y")
		if !ok || len(x) != (curve.Params().BitSize+7)/8 || len(y) != len(x) {
			return nil, bad
		}
		key, err := ecdsa.ParseUncompressedPublicKey(curve, slices.Concat([]byte{4}, x, y))
		if err != nil {
			return nil, bad
		}
		return key, nil
	case "RSA":
		n, e := number("n"), new(big.Int).SetBytes(number("e"))
		if len(n) == 0 || len(n) > 1024 || !e.IsInt64() || e.Int64() < 3 || e.Int64() > math.MaxInt32 || e.Bit(0) == 0 {
			return nil, bad
		}
		return &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: int(e.Int64())}, nil
	}
	return nil, bad
}

// algorithms are the nine of JWT-SVID 2.1.
var algorithms = map[string]struct {
	hash  crypto.Hash
	curve elliptic.Curve // of ES
	pss   bool
}{
	"RS256": {hash: crypto.SHA256}, "RS384": {hash: crypto.SHA384}, "RS512": {hash: crypto.SHA512},
	"PS256": {hash: crypto.SHA256, pss: true}, "PS384": {hash: crypto.SHA384, pss: true}, "PS512": {hash: crypto.SHA512, pss: true},
	"ES256": {hash: crypto.SHA256, curve: elliptic.P256()}, "ES384": {hash: crypto.SHA384, curve: elliptic.P384()}, "ES512": {hash: crypto.SHA512, curve: elliptic.P521()},
}

func allowed(alg string) bool { _, ok := algorithms[alg]; return ok }

// fits: the key is of the algorithm's kind, and long enough. An algorithm never
// decides what a key's bytes mean.
func fits(alg string, key crypto.PublicKey) bool {
	a := algorithms[alg]
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		return a.curve != nil && k.Curve == a.curve
	case *rsa.PublicKey:
		n := k.N.BitLen()
		return a.curve == nil && n >= 2048 && n <= 8192
	}
	return false
}

func check(alg string, key crypto.PublicKey, signed, signature []byte) bool {
	a := algorithms[alg]
	h := a.hash.New()
	h.Write(signed)
	sum := h.Sum(nil)
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		size := (a.curve.Params().BitSize + 7) / 8
		if len(signature) != 2*size {
			return false
		}
		return ecdsa.Verify(k, sum, new(big.Int).SetBytes(signature[:size]), new(big.Int).SetBytes(signature[size:]))
	case *rsa.PublicKey:
		if a.pss {
			// The salt is as long as the hash (RFC 7518 3.5).
			return rsa.VerifyPSS(k, a.hash, sum, signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
		}
		return rsa.VerifyPKCS1v15(k, a.hash, sum, signature) == nil
	}
	return false
}

// object splits a JSON object by the exact names of its members; each may stand there
// once (RFC 7519 4).
func object(data []byte) (map[string]json.RawMessage, error) {
	decoder := json.NewDecoder(bytes.NewReader(data))
	if start, err := decoder.Token(); err != nil || start != json.Delim('{') {
		return nil, errors.New("no JSON object")
	}
	members := map[string]json.RawMessage{}
	for decoder.More() {
		name, err := decoder.Token()
		if err != nil {
			return nil, errors.New("not JSON")
		}
		var raw json.RawMessage
		if err := decoder.Decode(&raw); err != nil {
			return nil, errors.New("not JSON")
		}
		key := name.(string) // the decoder lets nothing else stand here
		if _, twice := members[key]; twice {
			return nil, errors.New("a member stands there twice")
		}
		members[key] = raw
	}
	if _, err := decoder.Token(); err != nil {
		return nil, errors.New("not JSON")
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("something follows the JSON object")
	}
	return members, nil
}

// text is a JSON string; null and nothing are none.
func text(raw json.RawMessage) (string, error) {
	var s *string
	if len(raw) == 0 {
		return "", errors.New("missing")
	}
	if err := json.Unmarshal(raw, &s); err != nil || s == nil {
		return "", errors.New("no text")
	}
	return *s, nil
}

// audienceOf reads aud: one text, or a list of them, at least one (JWT-SVID 3.2).
func audienceOf(raw json.RawMessage) ([]string, error) {
	if one, err := text(raw); err == nil {
		return []string{one}, nil
	}
	var list []*string
	if len(raw) == 0 || json.Unmarshal(raw, &list) != nil || len(list) == 0 {
		return nil, errors.New("it has no aud")
	}
	out := make([]string, len(list))
	for i, s := range list {
		if s == nil {
			return nil, errors.New("its aud is no list of texts")
		}
		out[i] = *s
	}
	return out, nil
}

// numericDate is seconds since 1970, whole or not (RFC 7519 2).
func numericDate(raw json.RawMessage) (at time.Time, ok bool, err error) {
	if len(raw) == 0 {
		return time.Time{}, false, nil
	}
	var seconds *float64
	if err := json.Unmarshal(raw, &seconds); err != nil || seconds == nil || math.Abs(*seconds) > 1<<40 {
		return time.Time{}, true, errors.New("no time")
	}
	whole, part := math.Modf(*seconds)
	return time.Unix(int64(whole), int64(part*1e9)), true, nil
}
