package server

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/entente-mesh/entente/federation/bundle"
)

const (
	discoveryPath = "/.well-known/openid-configuration"
	keysPath      = "/keys"
	// A key stands in the bundle for a phase before it signs, and for one after: a
	// minute of caching loses nothing, and a revoked key is gone after it.
	oidcCache = "public, max-age=60"
)

// CheckIssuer refuses an issuer that OpenID Connect Discovery 1.0 (section 3) does not
// allow, or that two readers could write differently.
func CheckIssuer(issuer string) error {
	u, err := url.Parse(issuer)
	switch {
	case err != nil:
		return fmt.Errorf("%.200q is not a URL", issuer)
	case u.Scheme != "https" || u.Hostname() == "":
		return fmt.Errorf("%.200q is not an https URL", issuer)
	case u.User != nil || u.RawQuery != "" || u.ForceQuery || strings.ContainsAny(issuer, "#"):
		return fmt.Errorf("%.200q has user information, a query or a fragment", issuer)
	case strings.HasSuffix(u.Path, "/") || u.RawPath != "" || u.String() != issuer:
		return fmt.Errorf("%.200q is not written plainly: no slash at its end, no escapes", issuer)
	}
	return nil
}

// OIDCHandler serves OpenID Connect Discovery and the JWT keys of the domain to
// anybody, below the path of the issuer, which is the fixed one that stands in the
// JWT-SVIDs, whatever Host a request names.
func OIDCHandler(issuer string, bundles *Bundles) (http.Handler, error) {
	if err := CheckIssuer(issuer); err != nil {
		return nil, err
	}
	u, _ := url.Parse(issuer)
	discovery, err := json.Marshal(struct {
		Issuer        string   `json:"issuer"`
		JWKSURI       string   `json:"jwks_uri"`
		Authorization string   `json:"authorization_endpoint"`
		ResponseTypes []string `json:"response_types_supported"`
		SubjectTypes  []string `json:"subject_types_supported"`
		Algorithms    []string `json:"id_token_signing_alg_values_supported"`
	}{
		issuer, issuer + keysPath,
		"", // required by the specification; nobody logs in here
		[]string{"id_token"}, []string{"public"}, []string{"RS256", "ES256"},
	})
	if err != nil {
		return nil, err
	}
	documents := map[string]func() []byte{
		u.Path + discoveryPath: func() []byte { return discovery },
		u.Path + keysPath:      bundles.OIDC,
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Content-Type-Options", "nosniff")
		document, ok := documents[r.URL.EscapedPath()]
		switch {
		case !ok:
			http.NotFound(w, r)
			return
		case r.Method != http.MethodGet && r.Method != http.MethodHead:
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "only to be read", http.StatusMethodNotAllowed)
			return
		}
		body := document()
		if len(body) == 0 {
			w.Header().Set("Retry-After", "1")
			http.Error(w, "this node has no keys yet", http.StatusServiceUnavailable)
			return
		}
		sum := sha256.Sum256(body)
		tag := `"` + hex.EncodeToString(sum[:16]) + `"`
		w.Header().Set("ETag", tag)
		w.Header().Set("Cache-Control", oidcCache)
		for _, old := range strings.Split(r.Header.Get("If-None-Match"), ",") {
			if old = strings.TrimSpace(old); old == "*" || strings.TrimPrefix(old, "W/") == tag {
				w.WriteHeader(http.StatusNotModified)
				return
			}
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		if r.Method == http.MethodGet {
			w.Write(body)
		}
	}), nil
}

// oidcKeys writes keys as RFC 7517 and the practice of OpenID Connect want them: use
// "sig" and the algorithm, where SPIFFE has a use of its own.
func oidcKeys(keys []bundle.Key) ([]byte, error) {
	type jwk struct {
		Kty   string `json:"kty"`
		Kid   string `json:"kid"`
		Use   string `json:"use"`
		Alg   string `json:"alg"`
		Curve string `json:"crv,omitempty"`
		X     string `json:"x,omitempty"`
		Y     string `json:"y,omitempty"`
		N     string `json:"n,omitempty"`
		E     string `json:"e,omitempty"`
	}
	set := struct {
		Keys []jwk `json:"keys"`
	}{[]jwk{}}
	for _, key := range keys {
		var out jwk
		if err := json.Unmarshal(key.JWK, &out); err != nil {
			return nil, fmt.Errorf("key %q: %w", key.ID, err)
		}
		public, err := key.Public()
		if err != nil {
			return nil, err
		}
		switch public.(type) {
		case *ecdsa.PublicKey:
			out.Alg = "ES256"
		case *rsa.PublicKey:
			out.Alg = "RS256"
		default:
			return nil, errors.New("a JWT key is neither ECDSA nor RSA")
		}
		out.Kid, out.Use = key.ID, "sig"
		set.Keys = append(set.Keys, out)
	}
	slices.SortFunc(set.Keys, func(a, b jwk) int { return strings.Compare(a.Kid, b.Kid) })
	return json.Marshal(set)
}
