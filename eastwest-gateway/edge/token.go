package edge

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
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

func newTokens(c JWT, tierClaim string, revoked func(subject, keyID string, claims map[string]any) error) (*tokens, error) {
	keys := daemon.Follow(func() (*jose.JSONWebKeySet, error) { return readJWKS(c.JWKSFile) }, c.JWKSFile)
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
	if _, err := keys.Get(); err != nil {
		return nil, fmt.Errorf("edge.jwt.jwksFile: %w", err)
	}
	return t, nil
}

func readJWKS(file string) (*jose.JSONWebKeySet, error) {
	if info, err := os.Stat(file); err != nil {
		return nil, err
	} else if info.Size() > maxJWKSBytes {
		return nil, fmt.Errorf("%s has %d bytes, more than %d", file, info.Size(), maxJWKSBytes)
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	keys, err := parseJWKS(raw)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return keys, nil
}

// parseJWKS takes public signature keys that have a key id. Keys of an unknown type
// and keys for encryption are passed over (RFC 7517 section 5).
func parseJWKS(raw []byte) (*jose.JSONWebKeySet, error) {
	var document struct{ Keys []json.RawMessage }
	if err := json.Unmarshal(raw, &document); err != nil {
		return nil, fmt.Errorf("not a JWK Set: %w", err)
	}
	if len(document.Keys) > maxJWKSKeys {
		return nil, fmt.Errorf("%d keys, more than %d", len(document.Keys), maxJWKSKeys)
	}
	set := &jose.JSONWebKeySet{}
	for i, member := range document.Keys {
		var key jose.JSONWebKey
		err := key.UnmarshalJSON(member)
		switch {
		case errors.Is(err, jose.ErrUnsupportedKeyType), err == nil && key.Use == "enc":
			continue
		case err != nil:
			return nil, fmt.Errorf("keys[%d]: %w", i, err)
		case key.KeyID == "":
			return nil, fmt.Errorf("keys[%d] has no kid", i)
		case len(set.Key(key.KeyID)) > 0:
			return nil, fmt.Errorf("keys[%d]: kid %q stands twice", i, key.KeyID)
		case !key.Valid() || !key.IsPublic():
			return nil, fmt.Errorf("keys[%d] is a private or symmetric key; a JWKS for verification holds public keys only", i)
		}
		set.Keys = append(set.Keys, key)
	}
	return set, nil
}

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
	if typ, _ := header.ExtraHeaders[jose.HeaderType].(string); !slices.Contains([]string{"", "JWT", "JOSE", "at+jwt"}, typ) {
		// A WIT-SVID must never stand in Authorization (WIT-SVID section 5).
		return invalid("a token of type %q is no bearer token", typ)
	}
	keys, err := t.keys.Get()
	if err != nil {
		return invalid("no key to verify with")
	}
	found := keys.Key(header.KeyID)
	if header.KeyID == "" || len(found) != 1 {
		return invalid("the token's key id is not known")
	}
	if found[0].Algorithm != "" && found[0].Algorithm != header.Algorithm {
		return invalid("the token's algorithm is not its key's")
	}
	var claims jwt.Claims
	var all map[string]any
	if err := token.Claims(found[0].Key, &claims, &all); err != nil {
		return invalid("the signature does not verify")
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
