package jwtsvid

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var (
	banking = spiffeid.RequireTrustDomainFromString("banking.example")
	trading = spiffeid.RequireTrustDomainFromString("trading.example")
	now     = time.Date(2027, 3, 1, 12, 0, 0, 0, time.UTC)
)

func ec(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func rsaKey(t testing.TB, bits int) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

type members = map[string]any

func encode(t testing.TB, v any) string {
	t.Helper()
	if text, ok := v.(string); ok {
		return base64.RawURLEncoding.EncodeToString([]byte(text))
	}
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return base64.RawURLEncoding.EncodeToString(data)
}

// sign makes any token, with go-jose's primitives so that both sides are not ours.
func sign(t testing.TB, alg jose.SignatureAlgorithm, key crypto.Signer, header, claims any) string {
	t.Helper()
	input := encode(t, header) + "." + encode(t, claims)
	hash := map[string]crypto.Hash{"256": crypto.SHA256, "384": crypto.SHA384, "512": crypto.SHA512}[string(alg)[2:]]
	h := hash.New()
	h.Write([]byte(input))
	sum := h.Sum(nil)
	var signature []byte
	var err error
	switch k := key.(type) {
	case *ecdsa.PrivateKey:
		size := (k.Curve.Params().BitSize + 7) / 8
		r, s, signErr := ecdsa.Sign(rand.Reader, k, sum)
		err = signErr
		signature = append(r.FillBytes(make([]byte, size)), s.FillBytes(make([]byte, size))...)
	case *rsa.PrivateKey:
		if alg[0] == 'P' {
			signature, err = rsa.SignPSS(rand.Reader, k, hash, sum, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
		} else {
			signature, err = rsa.SignPKCS1v15(rand.Reader, k, hash, sum)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return input + "." + base64.RawURLEncoding.EncodeToString(signature)
}

func claims(change members) members {
	c := members{"sub": "spiffe://banking.example/accounts", "aud": "ledger", "exp": now.Add(time.Minute).Unix(), "iat": now.Unix()}
	maps.Copy(c, change)
	maps.DeleteFunc(c, func(_ string, v any) bool { return v == nil })
	return c
}

func header(change members) members {
	h := members{"alg": "ES256", "kid": "k1", "typ": "JWT"}
	maps.Copy(h, change)
	maps.DeleteFunc(h, func(_ string, v any) bool { return v == nil })
	return h
}

func source(of map[spiffeid.TrustDomain]Keys) Source {
	return func(td spiffeid.TrustDomain) (Keys, bool) { k, ok := of[td]; return k, ok }
}

// The nine algorithms, each with a key that fits it (JWT-SVID 2.1).
// Requirements: 57, 58, 76.
func TestAlgorithms(t *testing.T) {
	p256, p384, p521, r := ec(t, elliptic.P256()), ec(t, elliptic.P384()), ec(t, elliptic.P521()), rsaKey(t, 2048)
	keyOf := map[jose.SignatureAlgorithm]crypto.Signer{
		"ES256": p256, "ES384": p384, "ES512": p521,
		"RS256": r, "RS384": r, "RS512": r, "PS256": r, "PS384": r, "PS512": r,
	}
	if len(keyOf) != len(algorithms) {
		t.Fatal("not all are tried")
	}
	for alg, key := range keyOf {
		keys := source(map[spiffeid.TrustDomain]Keys{banking: {"k1": key.Public()}})
		token := sign(t, alg, key, header(members{"alg": alg}), claims(nil))
		svid, err := Verify(token, keys, "ledger", now, 0)
		if err != nil || svid.ID.String() != "spiffe://banking.example/accounts" || svid.KeyID != "k1" || svid.Expires.Unix() != now.Add(time.Minute).Unix() {
			t.Errorf("%s: %+v, %v", alg, svid, err)
		}
		for other, otherKey := range keyOf {
			if other == alg {
				continue
			}
			// The header says one algorithm, the signature is another's: confusion.
			confused := sign(t, other, otherKey, header(members{"alg": alg}), claims(nil))
			all := source(map[spiffeid.TrustDomain]Keys{banking: {"k1": otherKey.Public()}})
			if _, err := Verify(confused, all, "ledger", now, 0); err == nil {
				t.Errorf("a %s signature passes as %s", other, alg)
			}
		}
	}
}

// Each attack beside the same token without it.
// Requirements: 18, 55, 58, 60-62, 64, 66-68, 71, 84, 89, 185, T9-T12.
func TestAttacks(t *testing.T) {
	key, other, foreign, wit := ec(t, elliptic.P256()), ec(t, elliptic.P256()), ec(t, elliptic.P256()), ec(t, elliptic.P256())
	small := rsaKey(t, 2048)
	keys := source(map[spiffeid.TrustDomain]Keys{
		banking: {"k1": key.Public(), "k2": other.Public(), "rsa": small.Public()},
		trading: {"t1": foreign.Public(), "k1": foreign.Public()},
	})
	good := sign(t, jose.ES256, key, header(nil), claims(nil))
	parts := strings.Split(good, ".")
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	mac := func(secret []byte) string {
		input := encode(t, header(members{"alg": "HS256"})) + "." + encode(t, claims(nil))
		m := hmac.New(sha256.New, secret)
		m.Write([]byte(input))
		return input + "." + base64.RawURLEncoding.EncodeToString(m.Sum(nil))
	}
	_, edKey, _ := ed25519.GenerateKey(rand.Reader)
	eddsa := func() string {
		input := encode(t, header(members{"alg": "EdDSA"})) + "." + encode(t, claims(nil))
		return input + "." + base64.RawURLEncoding.EncodeToString(ed25519.Sign(edKey, []byte(input)))
	}
	es := func(h, c members) string { return sign(t, jose.ES256, key, header(h), claims(c)) }
	// The same R and S, each with zeros before it.
	short := sign(t, "ES384", key, header(members{"alg": "ES384"}), claims(nil))
	cut := strings.LastIndexByte(short, '.') + 1
	rs, err := base64.RawURLEncoding.DecodeString(short[cut:])
	if err != nil {
		t.Fatal(err)
	}
	padded := short[:cut] + base64.RawURLEncoding.EncodeToString(slices.Concat(make([]byte, 16), rs[:32], make([]byte, 16), rs[32:]))
	// Another spelling of the same signature: bits that no byte has.
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	respelled := good[:len(good)-1] + alphabet[strings.IndexByte(alphabet, good[len(good)-1])+1:][:1]
	tests := []struct {
		name  string
		token string
		want  string // part of the error; empty: it is valid
	}{
		{"control", good, ""},
		{"typ JOSE (61)", es(members{"typ": "JOSE"}, nil), ""},
		{"no typ (61)", es(members{"typ": nil}, nil), ""},
		{"no kid (60, T10)", es(members{"kid": nil}, nil), ""},
		{"no kid, the second key", sign(t, jose.ES256, other, header(members{"kid": nil}), claims(nil)), ""},
		{"several audiences (63)", es(nil, members{"aud": []string{"x", "ledger"}}), ""},
		{"unknown claims and headers", es(members{"x": 1}, members{"roles": members{"a": []int{1}}}), ""},
		{"nbf in the past", es(nil, members{"nbf": now.Add(-time.Hour).Unix()}), ""},
		{"iat in the future limits nothing (84)", es(nil, members{"iat": now.Add(time.Hour).Unix()}), ""},
		{"a fraction of a second", es(nil, members{"exp": float64(now.Unix()) + 0.5}), ""},
		{"trading's own", sign(t, jose.ES256, foreign, header(members{"kid": "t1"}), claims(members{"sub": "spiffe://trading.example/p"})), ""},

		{"alg none", encode(t, header(members{"alg": "none"})) + "." + parts[1] + ".", "no signed JWS"},
		{"alg none, with a signature", encode(t, header(members{"alg": "none"})) + "." + parts[1] + "." + parts[2], "alg"},
		{"alg NONE", encode(t, header(members{"alg": "NONE"})) + "." + parts[1] + "." + parts[2], "alg"},
		{"alg missing", encode(t, header(members{"alg": nil})) + "." + parts[1] + "." + parts[2], "alg"},
		{"alg null", `eyJhbGciOm51bGx9` + "." + parts[1] + "." + parts[2], "alg"},
		{"HS256 with the public key as secret", mac(spki), "alg"},
		{"EdDSA (58)", eddsa(), "alg"},
		{"RS256 by name, ES256 by signature", es(members{"alg": "RS256"}, nil), "no key"},
		{"ES384 by name on a P-256 key", sign(t, "ES384", key, header(members{"alg": "ES384"}), claims(nil)), "no key"},
		{"ES384 by name on a P-256 key, padded to its length", padded, "no key"},
		{"kid of another key of the domain", es(members{"kid": "k2"}, nil), "no key"},
		{"kid of no key", es(members{"kid": "k9"}, nil), "no key"},
		{"kid empty", es(members{"kid": ""}, nil), "kid"},
		{"kid no text", es(members{"kid": 1}, nil), "kid"},
		{"key of another domain (68)", sign(t, jose.ES256, foreign, header(members{"kid": "t1"}), claims(nil)), "no key"},
		{"key of another domain, same kid", sign(t, jose.ES256, foreign, header(nil), claims(nil)), "no key"},
		{"key of another domain, no kid", sign(t, jose.ES256, foreign, header(members{"kid": nil}), claims(nil)), "no key"},
		{"subject of a domain that is not trusted", es(nil, members{"sub": "spiffe://evil.example/accounts"}), "not trusted"},
		{"its own key in the header", sign(t, jose.ES256, wit, header(members{"kid": nil, "jwk": jose.JSONWebKey{Key: wit.Public()}}), claims(nil)), "no key"},
		{"a WIT-SVID as bearer (89)", es(members{"typ": "wit+jwt"}, nil), "typ"},
		{"a WIT-SVID's authority", sign(t, jose.ES256, wit, header(nil), claims(nil)), "no key"},
		{"typ jwt in lower case (61)", es(members{"typ": "jwt"}, nil), "typ"},
		{"typ null", sign(t, jose.ES256, key, `{"alg":"ES256","kid":"k1","typ":null}`, claims(nil)), "typ"},
		{"crit (67)", es(members{"crit": []string{"exp"}}, nil), "crit"},
		{"b64 false", es(members{"crit": []string{"b64"}, "b64": false}, nil), "crit"},
		{"no aud (64, T9)", es(nil, members{"aud": nil}), "aud"},
		{"aud empty list (64)", es(nil, members{"aud": []string{}}), "aud"},
		{"aud another's (64)", es(nil, members{"aud": "accounts"}), "audience"},
		{"aud as a prefix", es(nil, members{"aud": "ledger2"}), "audience"},
		{"aud in another case", es(nil, members{"aud": "Ledger"}), "audience"},
		{"aud of numbers", es(nil, members{"aud": []any{1, "ledger"}}), "aud"},
		{"aud with null", es(nil, members{"aud": []any{nil, "ledger"}}), "aud"},
		{"no exp (66)", es(nil, members{"exp": nil}), "exp"},
		{"exp as text", es(nil, members{"exp": "9999999999"}), "exp"},
		{"exp huge", es(nil, members{"exp": 1e300}), "exp"},
		{"expired (66)", es(nil, members{"exp": now.Unix()}), "expired"},
		{"expired long ago", es(nil, members{"exp": 1}), "expired"},
		{"exp negative", es(nil, members{"exp": -5}), "expired"},
		{"not yet valid (67)", es(nil, members{"nbf": now.Add(time.Second).Unix()}), "not valid yet"},
		{"nbf as text", es(nil, members{"nbf": "0"}), "nbf"},
		{"no sub (62)", es(nil, members{"sub": nil}), "sub"},
		{"sub is no SPIFFE ID", es(nil, members{"sub": "accounts"}), "sub"},
		{"sub is https", es(nil, members{"sub": "https://banking.example/accounts"}), "sub"},
		{"sub without path", es(nil, members{"sub": "spiffe://banking.example"}), "sub"},
		{"sub with a query", es(nil, members{"sub": "spiffe://banking.example/a?b"}), "sub"},
		{"sub too long (T12)", es(nil, members{"sub": "spiffe://banking.example/" + strings.Repeat("a", 2048)}), "sub"},
		{"sub twice", sign(t, jose.ES256, key, header(nil), `{"sub":"spiffe://banking.example/a","aud":"ledger","exp":9999999999,"sub":"spiffe://banking.example/b"}`), "claims"},
		{"alg twice", sign(t, jose.ES256, key, `{"alg":"none","alg":"ES256","kid":"k1"}`, claims(nil)), "header"},
		{"claims are a list", sign(t, jose.ES256, key, header(nil), `[]`), "claims"},
		{"claims and more", sign(t, jose.ES256, key, header(nil), `{"sub":"x"}{}`), "claims"},
		{"JSON serialization (55)", `{"payload":"` + parts[1] + `","signatures":[]}`, "compact"},
		{"encrypted, five parts", good + ".a.b", "compact"},
		{"two parts", parts[0] + "." + parts[1], "compact"},
		{"empty", "", "compact"},
		{"a line end inside", parts[0] + ".\n" + parts[1] + "." + parts[2], "compact"},
		{"blank around", " " + good, "compact"},
		{"padding", good + "==", "compact"},
		{"the signature in another spelling", respelled, "base64url"},
		{"signature cut", good[:len(good)-4], "no valid"},
		{"signature of zeros", parts[0] + "." + parts[1] + "." + base64.RawURLEncoding.EncodeToString(make([]byte, 64)), "no key"},
		{"claims changed after signing", parts[0] + "." + encode(t, claims(members{"sub": "spiffe://banking.example/root"})) + "." + parts[2], "no key"},
		{"too large", es(nil, members{"x": strings.Repeat("a", MaxSize)}), "over"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			svid, err := Verify(test.token, keys, "ledger", now, 0)
			switch {
			case test.want == "" && err != nil:
				t.Error(err)
			case test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)):
				t.Errorf("got %+v, %v; want an error with %q", svid, err, test.want)
			}
		})
	}
	if _, err := Verify(good, keys, "", now, 0); err == nil {
		t.Error("verified for no audience at all (T9)")
	}
	if _, err := Verify(es(nil, members{"aud": ""}), keys, "", now, 0); err == nil {
		t.Error("an empty audience matches an empty one")
	}
	if fits("RS256", &rsa.PublicKey{N: new(big.Int).Rsh(small.N, 1100), E: small.E}) {
		t.Error("a short RSA key fits")
	}
}

// Leeway counts in both directions, and no further.
// Requirements: 66, 67, T17.
func TestLeeway(t *testing.T) {
	key := ec(t, elliptic.P256())
	keys := source(map[spiffeid.TrustDomain]Keys{banking: {"k1": key.Public()}})
	for _, test := range []struct {
		change members
		leeway time.Duration
		ok     bool
	}{
		{members{"exp": now.Add(-9 * time.Second).Unix()}, 10 * time.Second, true},
		{members{"exp": now.Add(-10 * time.Second).Unix()}, 10 * time.Second, false},
		{members{"exp": now.Add(-1 * time.Second).Unix()}, 0, false},
		{members{"nbf": now.Add(10 * time.Second).Unix()}, 10 * time.Second, true},
		{members{"nbf": now.Add(11 * time.Second).Unix()}, 10 * time.Second, false},
	} {
		_, err := Verify(sign(t, jose.ES256, key, header(nil), claims(test.change)), keys, "ledger", now, test.leeway)
		if (err == nil) != test.ok {
			t.Errorf("%v with %v: %v", test.change, test.leeway, err)
		}
	}
}

// A token without kid makes no verifier try keys without end.
// Requirements: 60.
func TestNoKidIsBounded(t *testing.T) {
	key := ec(t, elliptic.P256())
	many := Keys{}
	for i := range 1000 {
		many[fmt.Sprint(i)] = key.Public()
	}
	token := sign(t, jose.ES256, ec(t, elliptic.P256()), header(members{"kid": nil}), claims(nil))
	if _, err := Verify(token, source(map[spiffeid.TrustDomain]Keys{banking: many}), "ledger", now, 0); err == nil || !strings.Contains(err.Error(), "too many") {
		t.Errorf("got %v", err)
	}
}

func witClaims(t testing.TB, key crypto.PublicKey, change members) members {
	t.Helper()
	text, err := jose.JSONWebKey{Key: key, Algorithm: "ES256"}.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	var jwk members
	if err := json.Unmarshal(text, &jwk); err != nil {
		t.Fatal(err)
	}
	c := claims(members{"aud": nil, "cnf": members{"jwk": jwk}})
	maps.Copy(c, change)
	return c
}

// Requirements: 73-79, 81-84, 86, 87, 89.
func TestWIT(t *testing.T) {
	authority, holder := ec(t, elliptic.P256()), ec(t, elliptic.P256())
	keys := source(map[spiffeid.TrustDomain]Keys{banking: {"k1": authority.Public()}})
	wit := func(h members, c members) string {
		all := witClaims(t, holder.Public(), nil)
		maps.Copy(all, c)
		maps.DeleteFunc(all, func(_ string, v any) bool { return v == nil })
		head := header(members{"typ": "wit+jwt"})
		maps.Copy(head, h)
		maps.DeleteFunc(head, func(_ string, v any) bool { return v == nil })
		return sign(t, jose.ES256, authority, head, all)
	}
	jwk := func(change members) members {
		inner := witClaims(t, holder.Public(), nil)["cnf"].(members)["jwk"].(members)
		maps.Copy(inner, change)
		maps.DeleteFunc(inner, func(_ string, v any) bool { return v == nil })
		return members{"cnf": members{"jwk": inner}}
	}
	small := rsaKey(t, 2048)
	witOf := func(holder crypto.PublicKey, alg string) string {
		text, err := jose.JSONWebKey{Key: holder, Algorithm: alg}.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		return wit(nil, members{"cnf": members{"jwk": json.RawMessage(text)}})
	}
	svid, err := VerifyWIT(wit(nil, nil), keys, now, 0)
	if err != nil || !holder.PublicKey.Equal(svid.Key) || svid.Algorithm != "ES256" || len(svid.Audience) != 0 {
		t.Fatalf("%+v, %v", svid, err)
	}
	for name, token := range map[string]string{
		"of an RSA key (79)":                witOf(small.Public(), "PS256"),
		"unknown header (77)":               wit(members{"x": 1}, nil),
		"unknown claim (87)":                wit(nil, members{"x": members{"y": 1}}),
		"iat in the future (84)":            wit(nil, members{"iat": now.Add(time.Hour).Unix()}),
		"no iat (84)":                       wit(nil, members{"iat": nil}),
		"iss and jti":                       wit(nil, members{"iss": "https://banking.example", "jti": "1"}),
		"nbf in the past":                   wit(nil, members{"nbf": now.Add(-time.Hour).Unix()}),
		"a lifespan of a year (83, may be)": wit(nil, members{"exp": now.AddDate(1, 0, 0).Unix()}),
	} {
		for range 2 { // the same again is no replay: its proof's jti is (81)
			if _, err := VerifyWIT(token, keys, now, 0); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	parts := strings.Split(wit(nil, nil), ".")
	for name, token := range map[string]string{
		"JSON serialization (73)":    `{"payload":"` + parts[1] + `","protected":"` + parts[0] + `","signature":"` + parts[2] + `"}`,
		"crit (77)":                  wit(members{"crit": []string{"x"}, "x": 1}, nil),
		"alg none (76)":              encode(t, header(members{"typ": "wit+jwt", "alg": "none"})) + "." + parts[1] + "." + parts[2],
		"EdDSA by name (76)":         wit(members{"alg": "EdDSA"}, nil),
		"typ in capitals (75)":       wit(members{"typ": "WIT+JWT"}, nil),
		"kid empty (74)":             wit(members{"kid": ""}, nil),
		"kid in other case (74)":     wit(members{"kid": "K1"}, nil),
		"sub without path (78)":      wit(nil, members{"sub": "spiffe://banking.example"}),
		"a JWT-SVID (75)":            wit(members{"typ": "JWT"}, nil),
		"no typ (75)":                wit(members{"typ": nil}, nil),
		"no kid (74)":                wit(members{"kid": nil}, nil),
		"aud (86)":                   wit(nil, members{"aud": "ledger"}),
		"aud empty (86)":             wit(nil, members{"aud": []string{}}),
		"no cnf (79)":                wit(nil, members{"cnf": nil}),
		"cnf without jwk (79)":       wit(nil, members{"cnf": members{"kid": "x"}}),
		"cnf.jwk without alg":        wit(nil, jwk(members{"alg": nil})),
		"cnf.jwk with HS256":         wit(nil, jwk(members{"alg": "HS256"})),
		"cnf.jwk is RSA, with HS256": witOf(small.Public(), "HS256"),
		"cnf.jwk is RSA, to encrypt": witOf(small.Public(), "RSA-OAEP"),
		"cnf.jwk of another kind":    wit(nil, jwk(members{"alg": "RS256"})),
		"cnf.jwk is private":         wit(nil, jwk(members{"d": "AAAA"})),
		"cnf.jwk not on curve":       wit(nil, jwk(members{"x": base64.RawURLEncoding.EncodeToString(make([]byte, 32))})),
		"cnf.jwk short":              wit(nil, jwk(members{"x": "AAAA"})),
		"cnf.jwk symmetric":          wit(nil, jwk(members{"kty": "oct"})),
		"expired (82)":               wit(nil, members{"exp": now.Unix()}),
		"no exp (82)":                wit(nil, members{"exp": nil}),
		"not yet valid (83)":         wit(nil, members{"nbf": now.Add(time.Minute).Unix()}),
		"no sub (78)":                wit(nil, members{"sub": nil}),
		"signed by its holder":       sign(t, jose.ES256, holder, header(members{"typ": "wit+jwt"}), witClaims(t, holder.Public(), nil)),
	} {
		if got, err := VerifyWIT(token, keys, now, 0); err == nil {
			t.Errorf("%s: accepted as %+v", name, got)
		}
	}
	// And never as a bearer token.
	if _, err := Verify(wit(nil, members{"aud": "ledger"}), keys, "ledger", now, 0); err == nil {
		t.Error("a WIT-SVID passed as a JWT-SVID (89)")
	}
}

func FuzzVerify(f *testing.F) {
	key := ec(f, elliptic.P256())
	keys := source(map[spiffeid.TrustDomain]Keys{banking: {"k1": key.Public()}})
	good := sign(f, jose.ES256, key, header(nil), claims(nil))
	f.Add(good)
	f.Add(sign(f, jose.ES256, key, header(members{"kid": nil, "typ": "wit+jwt"}), witClaims(f, key.Public(), nil)))
	f.Add("e30.e30.AA")
	f.Add(encode(f, `{"alg":"ES256"}`) + "." + encode(f, `{"sub":"spiffe://banking.example/a","aud":["ledger"],"exp":1e99}`) + ".AAAA")
	f.Fuzz(func(t *testing.T, token string) {
		svid, err := Verify(token, keys, "ledger", now, 0)
		// Only the seed verifies: nobody else can sign, and other spellings of the same
		// bytes are refused.
		if err == nil && token != good {
			t.Errorf("%q verifies as %+v", token, svid)
		}
		if _, err := VerifyWIT(token, keys, now, 0); err == nil && !strings.Contains(token, ".") {
			t.Error("a WIT-SVID without parts")
		}
	})
}

func BenchmarkVerifyES256(b *testing.B) {
	key := ec(b, elliptic.P256())
	keys := source(map[spiffeid.TrustDomain]Keys{banking: {"k1": key.Public()}})
	token := sign(b, jose.ES256, key, header(nil), claims(nil))
	for b.Loop() {
		if _, err := Verify(token, keys, "ledger", now, 0); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkVerifyRS256(b *testing.B) {
	key := rsaKey(b, 2048)
	keys := source(map[spiffeid.TrustDomain]Keys{banking: {"k1": key.Public()}})
	token := sign(b, jose.RS256, key, header(members{"alg": "RS256"}), claims(nil))
	for b.Loop() {
		if _, err := Verify(token, keys, "ledger", now, 0); err != nil {
			b.Fatal(err)
		}
	}
}
