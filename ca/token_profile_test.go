package ca

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"strings"
	"testing"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// Which keys may sign which tokens.
// Requirements: 57, 76.
func TestTokenAuthorityKeys(t *testing.T) {
	now := time.Date(2027, 3, 1, 12, 0, 0, 0, time.UTC)
	p256, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	ed, _, _ := ed25519.GenerateKey(rand.Reader)
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	const jwt, wit = statev1.KeyUse_KEY_USE_JWT, statev1.KeyUse_KEY_USE_WIT
	for _, test := range []struct {
		name   string
		public any
		use    statev1.KeyUse
		begin  time.Time
		ok     bool
	}{
		{"P-256 for JWT", p256.Public(), jwt, now, true},
		{"P-256 for WIT", p256.Public(), wit, now, true},
		{"RSA for JWT", rsa2048.Public(), jwt, now, true},
		{"RSA for WIT", rsa2048.Public(), wit, now, false},
		{"P-384", p384.Public(), jwt, now, false},
		{"Ed25519", ed, jwt, now, false},
		{"for X.509", p256.Public(), statev1.KeyUse_KEY_USE_X509, now, false},
		{"begins in an hour", p256.Public(), jwt, now.Add(time.Hour), false},
		{"has ended", p256.Public(), jwt, now.Add(-144 * time.Hour), false},
		{"ends soon", p256.Public(), jwt, now.Add(-143 * time.Hour), true},
	} {
		spki, err := x509.MarshalPKIXPublicKey(test.public)
		if err != nil {
			t.Fatal(err)
		}
		a, err := NewTokenAuthority(strings.Repeat("0", 64), test.use, spki, test.begin, 48*time.Hour, now)
		if (err == nil) != test.ok {
			t.Errorf("%s: %v", test.name, err)
		}
		if err == nil && (a.GetId() != KeyID(spki) || a.GetNotAfter()-test.begin.Unix() != 144*3600 || a.GetPhase() != statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED) {
			t.Errorf("%s: %v", test.name, a)
		}
	}
	if _, err := NewTokenAuthority("", jwt, []byte("no key"), now, time.Hour, now); err == nil {
		t.Error("no key at all")
	}
}

// Requirements: 63.
func TestCheckAudience(t *testing.T) {
	long := strings.Repeat("a", MaxAudienceBytes)
	for _, good := range [][]string{{"a"}, {"spiffe://trading.example/portfolio"}, {"größe"}, {long}, make16("a")} {
		if err := CheckAudience(good); err != nil {
			t.Errorf("%.60q: %v", good, err)
		}
	}
	for _, bad := range [][]string{nil, {}, {""}, {"a", ""}, {"a\n"}, {"a\x00"}, {"\xff"}, {long, "b"}, append(make16("a"), "b")} {
		if err := CheckAudience(bad); err == nil {
			t.Errorf("%.60q was taken", bad)
		}
	}
}

func make16(s string) []string {
	list := make([]string, MaxAudiences)
	for i := range list {
		list[i] = s
	}
	return list
}

// Requirements: 65.
func TestTokenLives(t *testing.T) {
	l := LifetimesOf(nil)
	if err := l.Check(); err != nil || l.JWTSVID != 5*time.Minute || l.WITSVID != time.Hour {
		t.Errorf("defaults %+v, %v", l, err)
	}
	short := LifetimesOf(&statev1.Lifetimes{PhaseSeconds: 60})
	if err := short.Check(); err != nil || short.JWTSVID != time.Minute || short.WITSVID != time.Minute {
		t.Errorf("with a short phase %+v, %v", short, err)
	}
	for name, bad := range map[string]*statev1.Lifetimes{
		"JWT over an hour":   {JwtSvidSeconds: 3601},
		"JWT over the phase": {PhaseSeconds: 60, JwtSvidSeconds: 61},
		"JWT of a second":    {JwtSvidSeconds: 1},
		"WIT over a day":     {WitSvidSeconds: 86401},
		"WIT far over all":   {WitSvidSeconds: 1 << 31},
	} {
		if err := LifetimesOf(bad).Check(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	entry := &statev1.Entry{JwtSvidSeconds: 30, WitSvidSeconds: 1 << 31}
	if JWTLife(entry, l) != 30*time.Second || WITLife(entry, l) != MaxWITSVID || JWTLife(&statev1.Entry{}, l) != l.JWTSVID {
		t.Error("an entry's lives")
	}
}

// Requirements: 175.
func TestCheckHint(t *testing.T) {
	for hint, ok := range map[string]bool{"": true, "internal": true, "für Leute": true, strings.Repeat("a", 1024): true,
		strings.Repeat("a", 1025): false, "a\nb": false, "\xff": false, "a\x1b[31m": false} {
		if err := CheckHint(hint); (err == nil) != ok {
			t.Errorf("%.20q: %v", hint, err)
		}
	}
}
