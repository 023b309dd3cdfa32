package edge

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/internal/problem"
	"github.com/entente-mesh/entente/internal/refusal"
)

const (
	maxTokenBytes = 8 << 10
	maxJWKSBytes  = 1 << 20
	maxJWKSKeys   = 256
	leeway        = 30 * time.Second // for nbf and iat only; exp has none
)

// signatureAlgorithms are those a configuration may pin (RFC 8725: asymmetric ones only).
var signatureAlgorithms = []jose.SignatureAlgorithm{
	jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512,
	jose.ES256, jose.ES384, jose.ES512, jose.EdDSA,
}

// User is whom a verified token speaks for.
type User struct {
	Subject string
	Tier    string // value of the tier claim; empty if the token has none
	Expires time.Time

	still func() error // says why the token is no longer good
}

// tokens verifies bearer tokens against a JWKS file. Safe for concurrent use.
type tokens struct {
	keys       *daemon.Followed[*jose.JSONWebKeySet]
	algorithms []jose.SignatureAlgorithm
	issuer     string
	audience   string
	tierClaim  string
	revoked    func(subject, keyID string, claims map[string]any) error
}

func newTokens(c JWT, tierClaim string, revoked func(subject, keyID string, claims map[string]any) error, files *daemon.Files, log *slog.Logger) (*tokens, error) {
	// A set that cannot be used yet is a problem of files: it may be there in a moment.
	keys, _ := daemon.Follow(files, "edge.jwt.jwksFile", func(contents [][]byte) (*jose.JSONWebKeySet, error) {
		set, odd, err := parseJWKS(contents[0])
		for _, why := range odd {
			log.Warn("a key of the JWKS is passed over", "file", c.JWKSFile, "reason", why)
		}
		return set, err
	}, c.JWKSFile)
	t := &tokens{keys: keys, issuer: c.Issuer, audience: c.Audience, tierClaim: tierClaim, revoked: revoked}
	for _, name := range c.Algorithms {
		algorithm := jose.SignatureAlgorithm(name)
		if !slices.Contains(signatureAlgorithms, algorithm) {
			return nil, fmt.Errorf("edge.jwt.algorithms: %q is not one of %v", name, signatureAlgorithms)
		}
		t.algorithms = append(t.algorithms, algorithm)
	}
	if len(t.algorithms) == 0 {
		return nil, errors.New("edge.jwt.algorithms: name at least one, for example ES256")
	}
	return t, nil
}

// parseJWKS takes the public signature keys that have a key id. Others are passed over, as
// RFC 7517 section 5 has it, and named in odd: one key of a kind that is not known here must
// not keep the others from being taken. Two keys may have one id if they are of different
// kinds (section 4.5). A set without any key that can be used is an error.
func parseJWKS(raw []byte) (set *jose.JSONWebKeySet, odd []string, err error) {
	if len(raw) > maxJWKSBytes {
		return nil, nil, fmt.Errorf("%d bytes, more than %d", len(raw), maxJWKSBytes)
	}
	var document struct{ Keys []json.RawMessage }
	if err := json.Unmarshal(raw, &document); err != nil {
		return nil, nil, fmt.Errorf("not a JWK Set: %w", err)
	}
	if len(document.Keys) > maxJWKSKeys {
		return nil, nil, fmt.Errorf("%d keys, more than %d", len(document.Keys), maxJWKSKeys)
	}
	set = &jose.JSONWebKeySet{}
	for i, member := range document.Keys {
		key, why := usableKey(member)
		if why == "" && slices.ContainsFunc(set.Key(key.KeyID), func(other jose.JSONWebKey) bool {
			return fmt.Sprintf("%T", other.Key) == fmt.Sprintf("%T", key.Key)
		}) {
			why = fmt.Sprintf("kid %.100q stands there already", key.KeyID)
		}
		if why != "" {
			odd = append(odd, fmt.Sprintf("keys[%d]: %s", i, why))
			continue
		}
		set.Keys = append(set.Keys, key)
	}
	if len(set.Keys) == 0 {
		return nil, odd, fmt.Errorf("none of its %d keys can be used: %s", len(document.Keys), strings.Join(odd[:min(len(odd), 3)], "; "))
	}
	return set, odd, nil
}

// usableKey says why a key is passed over; empty: it is not.
func usableKey(member []byte) (key jose.JSONWebKey, why string) {
	err := key.UnmarshalJSON(member)
	switch {
	case err != nil:
		return key, err.Error()
	case key.Use == "enc":
		return key, "it is for encryption"
	case key.KeyID == "":
		return key, "it has no kid"
	case !key.Valid() || !key.IsPublic():
		return key, "it is a private or symmetric key: whoever reads this file can sign with it"
	}
	if rsa, ok := key.Key.(*rsa.PublicKey); ok && rsa.N.BitLen() < minRSABits {
		return key, fmt.Sprintf("RSA with %d bits, fewer than %d", rsa.N.BitLen(), minRSABits)
	}
	return key, ""
}

// minRSABits is what RFC 7518 section 3.3 asks for.
const minRSABits = 2048

// verify returns the user that the request's bearer token speaks for (RFC 6750
// section 2.1, RFC 8725). The problem says which of missing, invalid and expired it is.
func (t *tokens) verify(r *http.Request, now time.Time) (User, *problem.Problem) {
	invalid := func(format string, args ...any) (User, *problem.Problem) {
		return User{}, &problem.Problem{Reason: refusal.TokenInvalid, Detail: fmt.Sprintf(format, args...)}
	}
	values := r.Header.Values("Authorization")
	if len(values) == 0 {
		return User{}, &problem.Problem{Reason: refusal.TokenMissing, Detail: "send Authorization: Bearer TOKEN"}
	}
	if len(values) > 1 {
		return invalid("more than one Authorization header")
	}
	scheme, raw, _ := strings.Cut(values[0], " ")
	raw = strings.TrimLeft(raw, " ") // 1*SP (RFC 9110 section 11.4)
	if !strings.EqualFold(scheme, "Bearer") {
		return User{}, &problem.Problem{Reason: refusal.TokenMissing, Detail: "the Authorization header is not a Bearer token"}
	}
	if len(raw) > maxTokenBytes {
		return invalid("the token has %d bytes, more than %d", len(raw), maxTokenBytes)
	}
	token, err := jwt.ParseSigned(raw, t.algorithms)
	if err != nil {
		return invalid("the token does not parse, or its algorithm is not one of %v", t.algorithms)
	}
	header := token.Headers[0]
	if typ, _ := header.ExtraHeaders[jose.HeaderType].(string); !bearerType(typ) {
		// A WIT-SVID must never stand in Authorization (WIT-SVID section 5).
		return invalid("a token of type %q is no bearer token", typ)
	}
	keys, err := t.keys.Get()
	if err != nil {
		return invalid("no key to verify with")
	}
	found := keys.Key(header.KeyID)
	if header.KeyID == "" || len(found) == 0 {
		return invalid("the token's key id is not known")
	}
	found = slices.DeleteFunc(found, func(k jose.JSONWebKey) bool { return !signs(k, header.Algorithm) })
	if len(found) != 1 {
		return invalid("the token's algorithm is not its key's")
	}
	var claims jwt.Claims
	var all map[string]any
	switch err := token.Claims(found[0].Key, &claims, &all); {
	case errors.Is(err, jose.ErrCryptoFailure):
		return invalid("the signature does not verify")
	case err != nil:
		return invalid("the signature verifies and the claims cannot be read: %.200s", err)
	}
	switch {
	case claims.Issuer != t.issuer:
		return invalid("the token is not from the issuer this edge takes")
	case !claims.Audience.Contains(t.audience):
		return invalid("the token is not for this audience")
	case claims.Subject == "":
		return invalid("the token has no subject")
	case claims.Expiry == nil:
		return invalid("the token has no expiry")
	case !now.Before(claims.Expiry.Time()):
		return User{}, &problem.Problem{Reason: refusal.TokenExpired,
			Detail: "the token ended at " + claims.Expiry.Time().UTC().Format(time.RFC3339)}
	case claims.NotBefore != nil && now.Add(leeway).Before(claims.NotBefore.Time()):
		return invalid("the token is not valid yet")
	case claims.IssuedAt != nil && now.Add(leeway).Before(claims.IssuedAt.Time()):
		return invalid("the token was issued in the future")
	}
	still := func() error { return t.revoked(claims.Subject, header.KeyID, all) }
	if still() != nil {
		return invalid("the token was revoked")
	}
	tier, _ := all[t.tierClaim].(string)
	return User{Subject: claims.Subject, Tier: tier, Expires: claims.Expiry.Time(), still: still}, nil
}

// bearerType tells whether a token of this type may stand in Authorization: an access token
// (RFC 9068 section 2.1) or one that does not say. Media types are compared without their
// case and without application/ (RFC 7515 section 4.1.9).
func bearerType(typ string) bool {
	switch strings.TrimPrefix(strings.ToLower(typ), "application/") {
	case "", "jwt", "jose", "at+jwt":
		return true
	}
	return false
}

// signs tells whether a key makes signatures by this algorithm.
func signs(key jose.JSONWebKey, algorithm string) bool {
	if key.Algorithm != "" {
		return key.Algorithm == algorithm
	}
	switch key.Key.(type) {
	case *rsa.PublicKey:
		return strings.HasPrefix(algorithm, "RS") || strings.HasPrefix(algorithm, "PS")
	case *ecdsa.PublicKey:
		return strings.HasPrefix(algorithm, "ES")
	}
	return algorithm == string(jose.EdDSA)
}
