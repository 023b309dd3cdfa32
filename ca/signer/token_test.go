package signer

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

// tokenWorld is a signer with one authority for each use that tokens have.
func tokenWorld(t testing.TB, jwtKey crypto.Signer, phase time.Duration, config Config) (*Signer, map[statev1.KeyUse]*statev1.Authority) {
	t.Helper()
	authorities := map[statev1.KeyUse]*statev1.Authority{}
	config.TrustDomain = banking
	config.Active = func(use statev1.KeyUse) *statev1.Authority { return authorities[use] }
	if config.Clock == nil {
		config.Clock = func() Clock { return Clock{} }
	}
	s := New(config)
	witKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for use, key := range map[statev1.KeyUse]crypto.Signer{statev1.KeyUse_KEY_USE_JWT: jwtKey, statev1.KeyUse_KEY_USE_WIT: witKey} {
		spki, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			t.Fatal(err)
		}
		a, err := ca.NewTokenAuthority(strings.Repeat("0", 64), use, spki, time.Now(), phase, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		a.Phase = statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE
		authorities[use] = a
		if _, err := s.Add(key); err != nil {
			t.Fatal(err)
		}
	}
	return s, authorities
}

func p256(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func jwtRequest() JWTRequest {
	return JWTRequest{
		ID: spiffeid.RequireFromPath(banking, "/accounts"), Audience: []string{"ledger"}, Life: time.Minute,
		Origin: ca.Origin{Entry: "service/accounts", EntryGeneration: 7, Agent: "h1", AgentGeneration: 5},
	}
}

func part(t testing.TB, token string, i int) map[string]any {
	t.Helper()
	data, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[i])
	if err != nil {
		t.Fatal(err)
	}
	var out map[string]any
	if err := json.Unmarshal(data, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

// What is signed follows the profile (JWT-SVID 2, 3), with either kind of key, as
// another library reads it.
// Requirements: 55-57, 59, 61-63, 65.
func TestSignJWT(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for alg, key := range map[string]crypto.Signer{"ES256": p256(t), "RS256": rsaKey} {
		s, authorities := tokenWorld(t, key, 48*time.Hour, Config{Issuer: "https://oidc.banking.example"})
		for range 8 { // R and S are short now and then
			token, err := s.SignJWT(t.Context(), jwtRequest())
			if err != nil {
				t.Fatal(err)
			}
			header, claims := part(t, token, 0), part(t, token, 1)
			if len(header) != 3 || header["alg"] != alg || header["kid"] != authorities[statev1.KeyUse_KEY_USE_JWT].GetId() || header["typ"] != "JWT" {
				t.Errorf("header %v", header)
			}
			if len(claims) != 6 || claims["aud"] != "ledger" || claims["sub"] != "spiffe://banking.example/accounts" || claims["iss"] != "https://oidc.banking.example" ||
				claims["exp"].(float64)-claims["iat"].(float64) != 60 {
				t.Errorf("claims %v", claims)
			}
			if origin := claims[ca.OriginClaim].(map[string]any); origin["entry_generation"] != 7.0 || origin["agent_generation"] != 5.0 {
				t.Errorf("origin %v", origin)
			}
			parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.SignatureAlgorithm(alg)})
			if err != nil {
				t.Fatal(err)
			}
			if err := parsed.Claims(key.Public(), &map[string]any{}); err != nil {
				t.Errorf("%s: %v", alg, err)
			}
		}
		req := jwtRequest()
		req.Audience = []string{"a", "b"}
		token, err := s.SignJWT(t.Context(), req)
		if err != nil || len(part(t, token, 1)["aud"].([]any)) != 2 {
			t.Errorf("two audiences: %v", err)
		}
	}
}

// Requirements: 73-77, 79, 85, 86.
func TestSignWIT(t *testing.T) {
	s, _ := tokenWorld(t, p256(t), 48*time.Hour, Config{Issuer: "https://oidc.banking.example"})
	holder := p256(t)
	token, err := s.SignWIT(t.Context(), WITRequest{ID: jwtRequest().ID, PublicKey: holder.Public(), Life: time.Hour, Origin: jwtRequest().Origin})
	if err != nil {
		t.Fatal(err)
	}
	claims := part(t, token, 1)
	jwk := claims["cnf"].(map[string]any)["jwk"].(map[string]any)
	if part(t, token, 0)["typ"] != "wit+jwt" || claims["aud"] != nil || claims["iss"] != nil || jwk["alg"] != "ES256" || jwk["d"] != nil {
		t.Errorf("%v", claims) // 75, 79, 85, 86
	}
	text, _ := json.Marshal(jwk)
	var key jose.JSONWebKey
	if err := key.UnmarshalJSON(text); err != nil || !holder.PublicKey.Equal(key.Key) {
		t.Errorf("cnf.jwk: %v", err)
	}
}

// What may not be signed is not, beside what may.
// Requirements: 13, 20, 23, 63, 95.
func TestTokensThatAreNotSigned(t *testing.T) {
	key := p256(t)
	s, authorities := tokenWorld(t, key, 48*time.Hour, Config{})
	if _, err := s.SignJWT(t.Context(), jwtRequest()); err != nil {
		t.Fatalf("control: %v", err)
	}
	for name, change := range map[string]func(*JWTRequest){
		"no audience (63)": func(r *JWTRequest) { r.Audience = nil },
		"empty audience":   func(r *JWTRequest) { r.Audience = []string{""} },
		"no path":          func(r *JWTRequest) { r.ID = banking.ID() },
		"no ID":            func(r *JWTRequest) { r.ID = spiffeid.ID{} },
		"too long an ID":   func(r *JWTRequest) { r.ID = spiffeid.RequireFromPath(banking, "/"+strings.Repeat("a", 2048)) },
		"no life":          func(r *JWTRequest) { r.Life = 0 },
		"another domain":   func(r *JWTRequest) { r.ID = spiffeid.RequireFromString("spiffe://trading.example/accounts") },
	} {
		req := jwtRequest()
		change(&req)
		if token, err := s.SignJWT(t.Context(), req); err == nil {
			t.Errorf("%s: signed %s", name, token)
		}
	}
	for name, public := range map[string]crypto.PublicKey{
		"no key": nil, "the authority's own key": s.keys[authorities[statev1.KeyUse_KEY_USE_WIT].GetId()].Public(),
	} {
		if _, err := s.SignWIT(t.Context(), WITRequest{ID: jwtRequest().ID, PublicKey: public, Life: time.Hour}); err == nil {
			t.Errorf("WIT for %s: signed", name)
		}
	}
	abroad := WITRequest{ID: spiffeid.RequireFromString("spiffe://trading.example/accounts"), PublicKey: p256(t).Public(), Life: time.Hour}
	if _, err := s.SignWIT(t.Context(), abroad); err == nil {
		t.Error("WIT of another domain: signed")
	}
	// No authority signs for another use, in another phase, or before it is ACTIVE.
	jwtAuthority := authorities[statev1.KeyUse_KEY_USE_JWT]
	authorities[statev1.KeyUse_KEY_USE_WIT] = jwtAuthority
	if _, err := s.SignWIT(t.Context(), WITRequest{ID: jwtRequest().ID, PublicKey: p256(t).Public(), Life: time.Hour}); !errors.Is(err, ErrNoAuthority) {
		t.Errorf("a JWT key signed a WIT-SVID: %v", err)
	}
	for _, phase := range statev1.AuthorityPhase_value {
		jwtAuthority.Phase = statev1.AuthorityPhase(phase)
		_, err := s.SignJWT(t.Context(), jwtRequest())
		if active := jwtAuthority.Phase == statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE; active != (err == nil) {
			t.Errorf("%s: %v", jwtAuthority.Phase, err)
		}
	}
}

// A life is cut to what the profile and the authority allow.
// Requirements: 65, 82.
func TestTokenLife(t *testing.T) {
	for _, test := range []struct{ phase, asked, jwt, wit time.Duration }{
		{48 * time.Hour, 100 * time.Hour, ca.MaxJWTSVID, ca.MaxWITSVID},
		{time.Minute, time.Hour, 3 * time.Minute, 3 * time.Minute},
		{48 * time.Hour, 5 * time.Second, 5 * time.Second, 5 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			s, _ := tokenWorld(t, p256(t), test.phase, Config{})
			req := jwtRequest()
			req.Life = test.asked
			one, err := s.SignJWT(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			two, err := s.SignWIT(t.Context(), WITRequest{ID: req.ID, PublicKey: p256(t).Public(), Life: test.asked})
			if err != nil {
				t.Fatal(err)
			}
			for token, want := range map[string]time.Duration{one: test.jwt, two: test.wit} {
				if got := time.Duration(part(t, token, 1)["exp"].(float64))*time.Second - time.Duration(time.Now().Unix())*time.Second; got != want {
					t.Errorf("phase %v, asked %v: %v, want %v", test.phase, test.asked, got, want)
				}
			}
		})
	}
}

// The queue is bounded: who comes when it is full is sent away at once.
func TestQueueIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := tokenWorld(t, p256(t), 48*time.Hour, Config{Concurrency: 1})
		s.slots <- struct{}{}
		s.waiting.Store(defaultWaiting)
		begin := time.Now()
		if _, err := s.SignJWT(t.Context(), jwtRequest()); !errors.Is(err, ErrBusy) || time.Since(begin) != 0 {
			t.Errorf("%v after %v", err, time.Since(begin))
		}
		s.waiting.Store(0)
		if _, err := s.SignJWT(t.Context(), jwtRequest()); !errors.Is(err, ErrBusy) || time.Since(begin) != maxWait {
			t.Errorf("control: %v after %v", err, time.Since(begin))
		}
		if n := s.waiting.Load(); n != 0 {
			t.Errorf("%d are still counted", n)
		}
	})
}

func BenchmarkSignJWT(b *testing.B) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		b.Fatal(err)
	}
	for name, key := range map[string]crypto.Signer{"ES256": p256(b), "RS256": rsaKey} {
		b.Run(name, func(b *testing.B) {
			s, _ := tokenWorld(b, key, 48*time.Hour, Config{})
			for b.Loop() {
				if _, err := s.SignJWT(b.Context(), jwtRequest()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
