package edge

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/internal/problem"
	"github.com/entente-mesh/entente/internal/refusal"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

const (
	issuer   = "https://id.example"
	audience = "trading-app"
)

// mesh records what the edge hands on; it stands at the network's edge.
type mesh struct {
	service, path string
	pass          []string
	until         time.Time
	still         func() error
	drained       bool
	revoked       func(subject, keyID string, claims map[string]any) error // nil: nothing is
}

func (m *mesh) Revoked(subject, keyID string, claims map[string]any) error {
	if m.revoked == nil {
		return nil
	}
	return m.revoked(subject, keyID, claims)
}

func (m *mesh) ForwardUser(w http.ResponseWriter, r *http.Request, service string, pass []string, until time.Time, still func() error) {
	m.service, m.path, m.pass, m.until, m.still = service, r.URL.EscapedPath(), pass, until, still
	w.WriteHeader(http.StatusOK)
}

func (m *mesh) Drained() bool { return m.drained }

func (m *mesh) Refuse(w http.ResponseWriter, r *http.Request, _ string, p problem.Problem, _ string) {
	p.RequestID = "01JC0000000000000000000000"
	p.Write(w, r)
}

// world is an edge with its keys: key signs good tokens, stranger is in no JWKS.
type world struct {
	edge          *Edge
	mesh          *mesh
	key, stranger *ecdsa.PrivateKey
	jwks          string // file
	roots         *x509.CertPool
}

func newWorld(t *testing.T, change func(*Config)) *world {
	t.Helper()
	dir := t.TempDir()
	w := &world{mesh: &mesh{}, jwks: filepath.Join(dir, "jwks.json"), roots: x509.NewCertPool()}
	w.key, w.stranger = newKey(t), newKey(t)
	w.writeJWKS(t, map[string]*ecdsa.PrivateKey{"k1": w.key})

	certKey := newKey(t)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"edge.test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, certKey.Public(), certKey)
	check(t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(certKey)
	check(t, err)
	certFile, keyFile := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	check(t, os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	check(t, os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600))
	cert, _ := x509.ParseCertificate(der)
	w.roots.AddCert(cert)

	config := Config{
		Listen: "127.0.0.1:0", TLS: TLS{certFile, keyFile}, Identity: "/edge",
		JWT:   JWT{JWKSFile: w.jwks, Issuer: issuer, Audience: audience, Algorithms: []string{"ES256"}},
		Tiers: map[string]Tier{"gold": {Rate: rateOf(t, "1000/s")}, "basic": {Rate: rateOf(t, "2/s"), Burst: 2}},
		Routes: []Route{
			{PathPrefix: "/portfolio", Service: "portfolio.trading.example", StripPrefix: true, Pass: []string{"Authorization"}},
			{PathPrefix: "/portfolio/research", Service: "research.trading.example"},
		},
	}
	if change != nil {
		change(&config)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	t.Cleanup(func() { listener.Close() })
	w.edge, err = New(config, listener, w.mesh, followed(t), slog.New(slog.DiscardHandler))
	check(t, err)
	return w
}

func (w *world) writeJWKS(t *testing.T, keys map[string]*ecdsa.PrivateKey) {
	t.Helper()
	var set jose.JSONWebKeySet
	for id, key := range keys {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: key.Public(), KeyID: id, Algorithm: "ES256", Use: "sig"})
	}
	raw, err := json.Marshal(set)
	check(t, err)
	check(t, os.WriteFile(w.jwks, raw, 0o600))
}

// token is a good one for a gold user unless changed.
func token(t *testing.T, key *ecdsa.PrivateKey, change func(claims map[string]any, header map[jose.HeaderKey]any)) string {
	t.Helper()
	now := time.Now()
	claims := map[string]any{"iss": issuer, "aud": audience, "sub": "user-42", "tier": "gold",
		"exp": now.Add(time.Minute).Unix(), "iat": now.Unix()}
	header := map[jose.HeaderKey]any{"kid": "k1", "typ": "JWT"}
	if change != nil {
		change(claims, header)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, &jose.SignerOptions{ExtraHeaders: header})
	check(t, err)
	raw, err := jwt.Signed(signer).Claims(claims).Serialize()
	check(t, err)
	return raw
}

// hmacToken is the classic confusion: HS256 with the public key as its secret.
func hmacToken(t *testing.T, key *ecdsa.PrivateKey) string {
	t.Helper()
	encode := base64.RawURLEncoding.EncodeToString
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	check(t, err)
	claims, _ := json.Marshal(map[string]any{"iss": issuer, "aud": audience, "sub": "mallory", "tier": "gold", "exp": time.Now().Add(time.Hour).Unix()})
	signed := encode([]byte(`{"alg":"HS256","kid":"k1"}`)) + "." + encode(claims)
	mac := hmac.New(sha256.New, spki)
	mac.Write([]byte(signed))
	return signed + "." + encode(mac.Sum(nil))
}

// A token that the mesh revoked is refused, and who came in by it before is let go; the
// others stay.
func TestRevokedTokens(t *testing.T) {
	w := newWorld(t, nil)
	banned := map[string]bool{}
	w.mesh.revoked = func(subject, keyID string, claims map[string]any) error {
		if keyID != "k1" || claims["iss"] != issuer {
			t.Errorf("asked for key %q and %v", keyID, claims)
		}
		if banned[subject] {
			return errors.New("agent h2, through which it was issued, was banned")
		}
		return nil
	}
	ask := func(subject string) *httptest.ResponseRecorder {
		r := httptest.NewRequest("GET", "/portfolio/x", nil)
		r.Header.Set("Authorization", "Bearer "+token(t, w.key, func(c map[string]any, _ map[jose.HeaderKey]any) { c["sub"] = subject }))
		answer := httptest.NewRecorder()
		w.edge.ServeHTTP(answer, r)
		return answer
	}
	const h2, h1 = "spiffe://trading.example/ledger", "spiffe://trading.example/accounts"
	if got := ask(h2); got.Code != http.StatusOK {
		t.Fatalf("control: %d", got.Code)
	}
	still := w.mesh.still
	if err := still(); err != nil {
		t.Fatalf("control: %v", err)
	}
	banned[h2] = true
	if still() == nil {
		t.Error("who was let in before stays")
	}
	if got := ask(h2); got.Code != http.StatusUnauthorized || strings.Contains(got.Body.String(), "banned") {
		t.Errorf("%d %s", got.Code, got.Body)
	}
	if got := ask(h1); got.Code != http.StatusOK || w.mesh.still() != nil {
		t.Errorf("control: %d", got.Code)
	}
}

// Requirements: 89.
func TestTokens(t *testing.T) {
	w := newWorld(t, nil)
	claim := func(name string, value any) string {
		return token(t, w.key, func(c map[string]any, _ map[jose.HeaderKey]any) {
			if value == nil {
				delete(c, name)
			} else {
				c[name] = value
			}
		})
	}
	header := func(name jose.HeaderKey, value any) string {
		return token(t, w.key, func(_ map[string]any, h map[jose.HeaderKey]any) { h[name] = value })
	}
	encode := base64.RawURLEncoding.EncodeToString
	good := token(t, w.key, nil)
	cases := []struct {
		name          string
		authorization []string
		want          refusal.Reason // empty: let through
	}{
		{"a good token", []string{"Bearer " + good}, ""},
		{"scheme in lower case", []string{"bearer " + good}, ""},
		{"several spaces", []string{"Bearer   " + good}, ""},
		{"an access token of RFC 9068", []string{"Bearer " + header("typ", "at+jwt")}, ""},
		{"with its whole media type", []string{"Bearer " + header("typ", "application/AT+JWT")}, ""},
		{"audience in a list", []string{"Bearer " + claim("aud", []string{"other", audience})}, ""},
		{"none", nil, refusal.TokenMissing},
		{"basic", []string{"Basic dTpw"}, refusal.TokenMissing},
		{"two headers", []string{"Bearer " + good, "Bearer " + good}, refusal.TokenInvalid},
		{"garbage", []string{"Bearer x.y.z"}, refusal.TokenInvalid},
		{"too long", []string{"Bearer " + strings.Repeat("a", maxTokenBytes+1)}, refusal.TokenInvalid},
		{"signed by a stranger", []string{"Bearer " + token(t, w.stranger, nil)}, refusal.TokenInvalid},
		{"unknown key id", []string{"Bearer " + header("kid", "k2")}, refusal.TokenInvalid},
		{"alg none", []string{"Bearer " + encode([]byte(`{"alg":"none","kid":"k1"}`)) + "." + strings.Split(good, ".")[1] + "."}, refusal.TokenInvalid},
		{"HS256 with the public key", []string{"Bearer " + hmacToken(t, w.key)}, refusal.TokenInvalid},
		{"a WIT in Authorization", []string{"Bearer " + header("typ", "wit+jwt")}, refusal.TokenInvalid},
		{"other issuer", []string{"Bearer " + claim("iss", "https://evil.example")}, refusal.TokenInvalid},
		{"other audience", []string{"Bearer " + claim("aud", "banking-app")}, refusal.TokenInvalid},
		{"no audience", []string{"Bearer " + claim("aud", nil)}, refusal.TokenInvalid},
		{"no subject", []string{"Bearer " + claim("sub", nil)}, refusal.TokenInvalid},
		{"no expiry", []string{"Bearer " + claim("exp", nil)}, refusal.TokenInvalid},
		{"expired a second ago", []string{"Bearer " + claim("exp", time.Now().Add(-time.Second).Unix())}, refusal.TokenExpired},
		{"not yet valid", []string{"Bearer " + claim("nbf", time.Now().Add(time.Hour).Unix())}, refusal.TokenInvalid},
		{"issued in the future", []string{"Bearer " + claim("iat", time.Now().Add(time.Hour).Unix())}, refusal.TokenInvalid},
		{"unknown tier", []string{"Bearer " + claim("tier", "platinum")}, refusal.TierUnknown},
		{"no tier", []string{"Bearer " + claim("tier", nil)}, refusal.TierUnknown},
		{"tier that is a number", []string{"Bearer " + claim("tier", 7)}, refusal.TierUnknown},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			r := httptest.NewRequest("GET", "/portfolio/v1/buying-power/42", nil)
			for _, a := range c.authorization {
				r.Header.Add("Authorization", a)
			}
			answer := httptest.NewRecorder()
			w.edge.ServeHTTP(answer, r)
			got, _ := problem.FromHeader(answer.Header())
			if got != c.want {
				t.Fatalf("refused for %q, want %q: %s", got, c.want, answer.Body)
			}
			if c.want == "" && w.mesh.path != "/v1/buying-power/42" {
				t.Errorf("the service was asked for %q", w.mesh.path)
			}
		})
	}
}

func TestTiers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limits := newTiers(map[string]Tier{"basic": {Rate: rateOf(t, "2/s"), Burst: 2}})
		anna, ben := User{Subject: "anna", Tier: "basic"}, User{Subject: "ben", Tier: "basic"}
		for i := range 2 {
			if p := limits.take(anna, time.Now()); p != nil {
				t.Fatalf("request %d within the burst was refused: %v", i, p)
			}
		}
		p := limits.take(anna, time.Now())
		if p == nil || p.Reason != refusal.Rate || p.RetryAfter != time.Second {
			t.Fatalf("third request at once: %+v, want a rate refusal with one second", p)
		}
		if p := limits.take(ben, time.Now()); p != nil {
			t.Errorf("another consumer of the tier pays for the first: %v", p)
		}
		time.Sleep(time.Second)
		if p := limits.take(anna, time.Now()); p != nil {
			t.Errorf("a second later: %v", p)
		}
	})
}

func TestRoutes(t *testing.T) {
	rs := newRoutes([]Route{
		{PathPrefix: "/", Service: "home.trading.example"},
		{PathPrefix: "/portfolio", Service: "portfolio.trading.example", StripPrefix: true},
		{PathPrefix: "/portfolio/research", Service: "research.trading.example"},
	})
	for path, want := range map[string][2]string{
		"/portfolio":            {"portfolio.trading.example", "/"},
		"/portfolio/v1":         {"portfolio.trading.example", "/v1"},
		"/portfolio/research/a": {"research.trading.example", "/portfolio/research/a"},
		"/portfolios":           {"home.trading.example", "/portfolios"},
		"/":                     {"home.trading.example", "/"},
	} {
		route, rest, ok := rs.match(path)
		if !ok || route.Service != want[0] || rest != want[1] {
			t.Errorf("%s -> %s %s, want %s", path, route.Service, rest, want)
		}
	}
	if _, _, ok := newRoutes([]Route{{PathPrefix: "/a", Service: "x"}}).match("/b"); ok {
		t.Error("a path without a route matched")
	}
}

func TestKeysRotateWithoutRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{key: newKey(t), stranger: newKey(t), jwks: filepath.Join(t.TempDir(), "jwks.json")}
		w.writeJWKS(t, map[string]*ecdsa.PrivateKey{"k1": w.key})
		tokens, err := newTokens(JWT{JWKSFile: w.jwks, Issuer: issuer, Audience: audience, Algorithms: []string{"ES256"}}, "tier", (&mesh{}).Revoked, followed(t), slog.New(slog.DiscardHandler))
		check(t, err)
		verify := func(raw string) *problem.Problem {
			r := httptest.NewRequest("GET", "/", nil)
			r.Header.Set("Authorization", "Bearer "+raw)
			_, problem := tokens.verify(r, time.Now())
			return problem
		}
		fresh := token(t, w.stranger, func(_ map[string]any, h map[jose.HeaderKey]any) { h["kid"] = "k2" })
		if p := verify(fresh); p == nil {
			t.Fatal("a key that stands in no JWKS was accepted")
		}
		w.writeJWKS(t, map[string]*ecdsa.PrivateKey{"k1": w.key, "k2": w.stranger})
		check(t, os.Chtimes(w.jwks, time.Time{}, time.Now().Add(time.Second)))
		time.Sleep(2 * time.Second)
		if p := verify(fresh); p != nil {
			t.Errorf("the new key is not taken: %v", p)
		}
		check(t, os.WriteFile(w.jwks, []byte("{"), 0o600))
		check(t, os.Chtimes(w.jwks, time.Time{}, time.Now().Add(2*time.Second)))
		time.Sleep(2 * time.Second)
		if p := verify(fresh); p != nil {
			t.Errorf("a broken file took the good keys away: %v", p)
		}
	})
}

func TestBadConfigurationIsRefused(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"symmetric algorithm":    func(c *Config) { c.JWT.Algorithms = []string{"HS256"} },
		"no algorithm":           func(c *Config) { c.JWT.Algorithms = nil },
		"identity":               func(c *Config) { c.Identity = "edge" },
		"prefix":                 func(c *Config) { c.Routes[0].PathPrefix = "portfolio" },
		"prefix twice":           func(c *Config) { c.Routes[1].PathPrefix = c.Routes[0].PathPrefix },
		"strip of before":        func(c *Config) { c.JWT.Strip = new(bool) },
		"pass of another header": func(c *Config) { c.Routes[0].Pass = []string{"X-Forwarded-For"} },
		"pass of a hop's header": func(c *Config) { c.Routes[0].Pass = []string{"Proxy-Authorization"} },
		"pass of a parameter":    func(c *Config) { c.Routes[0].Pass = []string{"?q"} },
		"burst":                  func(c *Config) { c.Tiers["gold"] = Tier{Rate: c.Tiers["gold"].Rate, Burst: -1} },
	} {
		w := newWorld(t, nil)
		config := w.edge.config
		config.Routes = append([]Route(nil), config.Routes...)
		change(&config)
		if _, err := New(config, w.edge.listener, w.mesh, followed(t), slog.New(slog.DiscardHandler)); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

// An edge whose files are not there yet begins, serves nobody, and serves when they are.
func TestFilesThatComeLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{key: newKey(t), jwks: filepath.Join(t.TempDir(), "jwks.json")}
		files := followed(t)
		tokens, err := newTokens(JWT{JWKSFile: w.jwks, Issuer: issuer, Audience: audience, Algorithms: []string{"ES256"}}, "tier", (&mesh{}).Revoked, files, slog.New(slog.DiscardHandler))
		check(t, err)
		verify := func() *problem.Problem {
			r := httptest.NewRequest("GET", "/", nil)
			r.Header.Set("Authorization", "Bearer "+token(t, w.key, nil))
			_, problem := tokens.verify(r, time.Now())
			return problem
		}
		time.Sleep(2 * time.Second)
		if list := files.Problems(); verify() == nil || len(list) != 1 || !list[0].None || !strings.Contains(list[0].String(), "no such file") {
			t.Errorf("%v", list)
		}
		w.writeJWKS(t, map[string]*ecdsa.PrivateKey{"k1": w.key})
		time.Sleep(2 * time.Second)
		if p := verify(); p != nil || len(files.Problems()) != 0 {
			t.Errorf("%v, %v", p, files.Problems())
		}
	})
}

// A key that cannot be used is passed over and named; it takes no other with it (RFC 7517
// section 5).
func TestOddKeysOfAJWKS(t *testing.T) {
	ec := `{"kty":"EC","crv":"P-256","kid":"k2","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}`
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	check(t, err)
	weak, err := json.Marshal(jose.JSONWebKey{Key: small.Public(), KeyID: "w"})
	check(t, err)
	large, err := rsa.GenerateKey(rand.Reader, 2048)
	check(t, err)
	strong, err := json.Marshal(jose.JSONWebKey{Key: large.Public(), KeyID: "k2"})
	check(t, err)
	broken := strings.TrimSuffix(string(strong), "}") + `,"x5c":["AAAA"]}`
	for name, c := range map[string]struct {
		key  string
		keys int // that are used, with ec
		odd  string
	}{
		"secp256k1":                     {`{"kty":"EC","crv":"secp256k1","kid":"w","x":"hxgYULEB0NLIrevwMoLMzAzxLyz6T_-_Gbto9Qy3amA","y":"oxWkWIRWUjlqwkSNq633cJMazwa9AE-BsCCoJEIBpp8"}`, 1, "keys[1]: "},
		"Ed448":                         {`{"kty":"OKP","crv":"Ed448","kid":"e","x":"X9dEm1m0Yf0s54fsYWrUah2hNCSFpw4fig6nXYDpZ3jt8SR2m0bHBhvWeD3x5Q9s0foavq_oJWGA"}`, 1, "keys[1]: "},
		"X25519, for encryption":        {`{"kty":"OKP","crv":"X25519","kid":"e","use":"enc","x":"3p7bfXt9wbTTW2HC7OQ1Nz-DQ8hbeGdNrfx-FG-IK08"}`, 1, "keys[1]: "},
		"kind of tomorrow":              {`{"kty":"AKP","kid":"m","alg":"ML-DSA-44","pub":"AAAA"}`, 1, "keys[1]: "},
		"no kid":                        {strings.Replace(ec, `"kid":"k2",`, "", 1), 1, "it has no kid"},
		"one kid, the same kind":        {ec, 1, `kid "k2" stands there already`},
		"one kid, another kind":         {string(strong), 2, ""},
		"symmetric":                     {`{"kty":"oct","kid":"o","k":"AAAA"}`, 1, "symmetric"},
		"broken x5c":                    {broken, 1, "keys[1]: "},
		"RSA with 1024 bits":            {string(weak), 1, "fewer than 2048"},
		"no object":                     {`7`, 1, "keys[1]: "},
		"control: another one, as good": {strings.Replace(ec, "k2", "k3", 1), 2, ""},
	} {
		set, odd, err := parseJWKS([]byte(`{"keys":[` + ec + "," + c.key + `]}`))
		if err != nil || len(set.Keys) != c.keys || set.Keys[0].KeyID != "k2" || (c.odd != "") != (len(odd) == 1) || c.odd != "" && !strings.Contains(odd[0], c.odd) {
			t.Errorf("%s: %v, %v, %v", name, set, odd, err)
		}
	}
	if set, _, err := parseJWKS([]byte(`{"keys":[{"kty":"oct","kid":"o","k":"AAAA"}]}`)); err == nil || !strings.Contains(err.Error(), "none of its 1 keys") {
		t.Errorf("%v, %v", set, err)
	}
}

func TestServesTLSAndDrains(t *testing.T) {
	w := newWorld(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.edge.Run(ctx) }()
	client := &http.Client{Transport: &http.Transport{ForceAttemptHTTP2: true,
		TLSClientConfig: &tls.Config{RootCAs: w.roots, ServerName: "edge.test"}}}
	r, _ := http.NewRequest("GET", "https://"+w.edge.listener.Addr().String()+"/portfolio/v1/x", nil)
	r.Header.Set("Authorization", "Bearer "+token(t, w.key, nil))
	answer, err := client.Do(r)
	check(t, err)
	io.Copy(io.Discard, answer.Body)
	answer.Body.Close()
	if answer.StatusCode != http.StatusOK || w.mesh.service != "portfolio.trading.example" || len(w.mesh.pass) != 1 || time.Until(w.mesh.until) > time.Minute || time.Until(w.mesh.until) < time.Second {
		t.Errorf("status %d, service %q", answer.StatusCode, w.mesh.service)
	}
	// A gateway that an administrator drained serves on, and keeps no connection.
	reused := func() (was bool) {
		trace := &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) { was = info.Reused }}
		answer, err := client.Do(r.WithContext(httptrace.WithClientTrace(t.Context(), trace)))
		check(t, err)
		io.Copy(io.Discard, answer.Body)
		answer.Body.Close()
		if answer.StatusCode != http.StatusOK {
			t.Errorf("status %d", answer.StatusCode)
		}
		return was
	}
	if !reused() {
		t.Error("control: each request has a connection of its own")
	}
	w.mesh.drained = true
	reused()
	time.Sleep(50 * time.Millisecond) // for the GOAWAY
	if reused() {
		t.Error("drained, and the connection is kept")
	}
	client.CloseIdleConnections()
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
}

// An address that holds connections open without a good token has its share, and loses it to
// whoever comes later; users with a token keep their connections and are served.
func TestStrangersKeepNoUserOut(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Connections = Connections{Most: 64, PerAddress: 32} }) // 16 and 8 without a token
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.edge.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}()
	at := w.edge.listener.Addr().String()
	dial := func(address string) *tls.Conn {
		raw, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}).Dial("tcp", at)
		check(t, err)
		conn := tls.Client(raw, &tls.Config{RootCAs: w.roots, ServerName: "edge.test", NextProtos: []string{"http/1.1"}})
		t.Cleanup(func() { raw.Close() })
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		return conn
	}
	ask := func(conn *tls.Conn, token string) int {
		r, err := http.NewRequest("GET", "https://edge.test/portfolio/x", nil)
		check(t, err)
		r.Header.Set("Authorization", "Bearer "+token)
		if r.Write(conn) != nil {
			return 0
		}
		answer, err := http.ReadResponse(bufio.NewReader(conn), r)
		if err != nil {
			return 0
		}
		io.Copy(io.Discard, answer.Body)
		answer.Body.Close()
		return answer.StatusCode
	}
	good, bad := token(t, w.key, nil), token(t, w.stranger, nil)
	early := dial("127.0.0.2") // of the strangers' own address
	if ask(early, good) != http.StatusOK {
		t.Fatal("control: a user is not served")
	}
	var open []net.Conn
	for i := range 60 { // silent ones, and ones with a token that nobody signed
		conn := dial("127.0.0.2")
		if i%2 == 1 {
			ask(conn, bad)
		}
		open = append(open, conn.NetConn())
	}
	kept := 0
	for _, conn := range open {
		conn.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
			kept++
		}
	}
	if kept > 8 || kept == 0 {
		t.Errorf("%d connections without a good token are open, the share is 8", kept)
	}
	if code := ask(dial("127.0.0.3"), good); code != http.StatusOK {
		t.Errorf("a user at another address gets %d", code)
	}
	if code := ask(early, good); code != http.StatusOK {
		t.Errorf("the user who was there gets %d", code)
	}
	served := 0
	for range 40 {
		if ask(dial("127.0.0.4"), good) == http.StatusOK {
			served++
		}
	}
	if served != 32 {
		t.Errorf("%d connections of users at one address are served, the share is 32", served)
	}
}

func FuzzBearer(f *testing.F) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	file := filepath.Join(f.TempDir(), "jwks.json")
	raw, _ := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k1"}}})
	os.WriteFile(file, raw, 0o600)
	tokens, err := newTokens(JWT{JWKSFile: file, Issuer: issuer, Audience: audience, Algorithms: []string{"ES256"}}, "tier", (&mesh{}).Revoked, followed(f), slog.New(slog.DiscardHandler))
	if err != nil {
		f.Fatal(err)
	}
	f.Add("Bearer eyJhbGciOiJFUzI1NiIsImtpZCI6ImsxIn0.e30.AA")
	f.Add("Bearer ..")
	f.Fuzz(func(t *testing.T, authorization string) {
		r := &http.Request{Header: http.Header{"Authorization": {authorization}}}
		if user, problem := tokens.verify(r, time.Now()); problem == nil {
			t.Errorf("nobody holds the key, and yet %q speaks for %+v", authorization, user)
		}
	})
}

func FuzzJWKS(f *testing.F) {
	f.Add([]byte(`{"keys":[{"kty":"oct","k":"AA","kid":"a"}]}`))
	f.Add([]byte(`{"keys":[{"kty":"EC","crv":"P-256","x":"AA","y":"AA","kid":"a"}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		set, _, err := parseJWKS(raw)
		if err != nil {
			return
		}
		for _, key := range set.Keys {
			if !key.IsPublic() || key.KeyID == "" {
				t.Errorf("took key %q", key.KeyID)
			}
		}
	})
}

// followed are files that are looked at until the test ends.
func followed(t testing.TB) *daemon.Files {
	files := daemon.NewFiles(daemon.NewMetrics("gateway"), slog.New(slog.DiscardHandler))
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		files.Run(ctx)
	}()
	t.Cleanup(func() { stop(); <-ended })
	return files
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	return key
}

func rateOf(t *testing.T, text string) (rate yamlfile.Rate) {
	t.Helper()
	check(t, rate.UnmarshalText([]byte(text)))
	return rate
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
