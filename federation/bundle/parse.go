package bundle

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// MaxSize is the largest document that is read, in bytes. A bundle of ten authorities has some 10 KiB.
const MaxSize = 4 << 20

// The largest number of entries, and the longest key id, that are looked at.
const (
	maxKeys  = 4096
	maxKeyID = 1024
	maxProof = 2048
)

var errNoKeyID = errors.New("it has no kid")

// Skipped is a part of a document that does not count.
type Skipped struct {
	Index int // in "keys", from 0; -1: a member of the document itself
	KeyID string
	Why   string
}

func (s Skipped) String() string {
	switch {
	case s.Index < 0:
		return s.Why
	case s.KeyID != "":
		return fmt.Sprintf("key %d (kid %q): %s", s.Index, s.KeyID, s.Why)
	default:
		return fmt.Sprintf("key %d: %s", s.Index, s.Why)
	}
}

// Parse reads a bundle of the trust domain td. Entries of an unknown kind, or that break the specification, are skipped one
// by one and reported. A document that is no JSON object, has a member twice, no "keys", a sequence that is no unsigned 64-bit
// integer, or anything behind its end, is refused.
func Parse(td spiffeid.TrustDomain, data []byte) (*Bundle, []Skipped, error) {
	b, skipped, err := parse(td, data)
	if err != nil {
		return nil, nil, fmt.Errorf("bundle of %s: %w", td, err)
	}
	return b, skipped, nil
}

func parse(td spiffeid.TrustDomain, data []byte) (*Bundle, []Skipped, error) {
	switch {
	case td.IsZero():
		return nil, nil, errors.New("whose it is must be known before it is read")
	case len(data) > MaxSize:
		return nil, nil, fmt.Errorf("it is larger than %d bytes", MaxSize)
	case !utf8.Valid(data):
		return nil, nil, errors.New("it is not UTF-8")
	}
	members, err := object(data)
	if err != nil {
		return nil, nil, err
	}
	b := &Bundle{TrustDomain: td}
	var skipped []Skipped

	if raw, ok := value(members, "spiffe_sequence"); ok {
		if b.Sequence, err = strconv.ParseUint(string(raw), 10, 64); err != nil {
			return nil, nil, errors.New("its spiffe_sequence is not an unsigned 64-bit integer")
		}
	}
	if raw, ok := value(members, "spiffe_refresh_hint"); ok {
		seconds, err := strconv.ParseInt(string(raw), 10, 64)
		if err != nil || seconds < 0 || seconds > math.MaxInt64/int64(time.Second) {
			skipped = append(skipped, Skipped{Index: -1, Why: "spiffe_refresh_hint is not a number of seconds"})
		} else {
			b.RefreshHint = time.Duration(seconds) * time.Second
		}
	}

	raw, ok := value(members, "keys")
	if !ok || raw[0] != '[' {
		return nil, nil, errors.New(`it has no "keys", which may be empty but not missing`)
	}
	var keys []json.RawMessage
	if err := json.Unmarshal(raw, &keys); err != nil {
		return nil, nil, err
	}
	if len(keys) > maxKeys {
		return nil, nil, fmt.Errorf("it has %d keys: more than %d are not read", len(keys), maxKeys)
	}
	seen := map[string]bool{}
	for i, key := range keys {
		keyID, err := b.add(key, seen)
		if err != nil {
			skipped = append(skipped, Skipped{Index: i, KeyID: keyID, Why: err.Error()})
		}
	}
	return b, skipped, nil
}

// add takes an entry into the bundle, or says why not. seen holds the ids of the keys taken so far.
func (b *Bundle) add(raw json.RawMessage, seen map[string]bool) (keyID string, err error) {
	members, err := object(raw)
	if err != nil {
		return "", err
	}
	if keyID, err = text(members, "kid"); err != nil {
		return "", err
	}
	if len(keyID) > maxKeyID {
		return "", fmt.Errorf("its kid is longer than %d bytes", maxKeyID)
	}
	use, err := text(members, "use")
	if err != nil {
		return keyID, err
	}
	switch use {
	case useX509, useJWT, useWIT:
	case "":
		return keyID, errors.New("it has no use")
	default:
		return keyID, fmt.Errorf("unknown use %q", shorten(use))
	}
	public, err := publicKey(members)
	if err != nil {
		return keyID, err
	}

	if use == useX509 {
		cert, err := authority(members, public)
		if err != nil {
			return keyID, err
		}
		if !slices.ContainsFunc(b.X509, cert.Equal) {
			b.X509 = append(b.X509, cert)
		}
		return keyID, nil
	}
	switch {
	case keyID == "":
		return keyID, errNoKeyID
	case seen[keyID]:
		return keyID, errors.New("its kid stands before another key")
	}
	seen[keyID] = true
	jwk, err := jose.JSONWebKey{Key: public}.MarshalJSON()
	if err != nil {
		return keyID, err
	}
	key := Key{ID: keyID, JWK: jwk}
	if proof, err := text(members, "entente_proof"); err == nil && len(proof) <= maxProof {
		key.Proof = proof
	}
	if use == useJWT {
		b.JWT = append(b.JWT, key)
	} else {
		b.WIT = append(b.WIT, key)
	}
	return keyID, nil
}

// authority returns the certificate of an X.509 entry: the first of its x5c (X509-SVID 6.2), whose key is that of the entry.
func authority(members map[string]json.RawMessage, public crypto.PublicKey) (*x509.Certificate, error) {
	raw, ok := value(members, "x5c")
	if !ok {
		return nil, errors.New("it has no x5c")
	}
	var chain []json.RawMessage
	if err := json.Unmarshal(raw, &chain); err != nil {
		return nil, errors.New("its x5c is no list")
	}
	if len(chain) == 0 {
		return nil, errors.New("its x5c is empty")
	}
	var der []byte
	if err := json.Unmarshal(chain[0], &der); err != nil {
		return nil, errors.New("its x5c is not base64")
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("its x5c holds no certificate: %w", err)
	}
	if key, ok := cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !key.Equal(public) {
		return nil, errors.New("its certificate is for another key")
	}
	return cert, checkAuthority(cert)
}

// publicKey reads the public members, and no private ones, of a key (RFC 7518 6, RFC 8037 2).
func publicKey(members map[string]json.RawMessage) (crypto.PublicKey, error) {
	kind, err := text(members, "kty")
	switch {
	case err != nil:
		return nil, err
	case kind == "":
		return nil, errors.New("it has no kty")
	case kind != "EC" && kind != "RSA" && kind != "OKP":
		return nil, fmt.Errorf("unknown kty %q", shorten(kind))
	}
	public := map[string]json.RawMessage{}
	for _, name := range []string{"kty", "crv", "x", "y", "n", "e"} {
		if raw, ok := value(members, name); ok {
			public[name] = raw
		}
	}
	encoded, err := json.Marshal(public)
	if err != nil {
		return nil, err
	}
	var key jose.JSONWebKey
	if err := key.UnmarshalJSON(encoded); err != nil {
		return nil, fmt.Errorf("unreadable key: %w", err)
	}
	if !key.Valid() {
		return nil, errors.New("unreadable key")
	}
	return key.Key, nil
}

// object splits a JSON object into its members, by their exact names. encoding/json alone would take "KEYS" for "keys" and the
// last of two.
func object(data []byte) (map[string]json.RawMessage, error) {
	decoder := json.NewDecoder(bytes.NewReader(data))
	if start, err := decoder.Token(); err != nil || start != json.Delim('{') {
		return nil, errors.New("it is not a JSON object")
	}
	members := map[string]json.RawMessage{}
	for decoder.More() {
		name, err := decoder.Token()
		if err != nil {
			return nil, fmt.Errorf("it is not JSON: %w", err)
		}
		key := name.(string) // the decoder lets nothing else stand here
		var raw json.RawMessage
		if err := decoder.Decode(&raw); err != nil {
			return nil, fmt.Errorf("it is not JSON: %w", err)
		}
		if _, twice := members[key]; twice {
			return nil, fmt.Errorf("its member %q stands there twice", shorten(key))
		}
		members[key] = raw
	}
	if _, err := decoder.Token(); err != nil {
		return nil, fmt.Errorf("it is not JSON: %w", err)
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("something follows the end of the JSON object")
	}
	return members, nil
}

// value returns a member that is there and not null.
func value(members map[string]json.RawMessage, name string) (json.RawMessage, bool) {
	raw, ok := members[name]
	return raw, ok && string(raw) != "null"
}

func text(members map[string]json.RawMessage, name string) (string, error) {
	raw, ok := value(members, name)
	if !ok {
		return "", nil
	}
	var s string
	if err := json.Unmarshal(raw, &s); err != nil {
		return "", fmt.Errorf("its %s is no text", name)
	}
	return s, nil
}

// shorten bounds what a stranger can write into our logs.
func shorten(s string) string {
	if len(s) > 64 {
		return s[:64] + "..."
	}
	return s
}
