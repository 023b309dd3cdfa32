package ca_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

func svid(t *testing.T, td string, origin ca.Origin) *x509.Certificate {
	t.Helper()
	cert := &x509.Certificate{URIs: []*url.URL{spiffeid.RequireFromString("spiffe://" + td + "/x").URL()}}
	if origin != (ca.Origin{}) {
		ext, err := origin.Extension()
		if err != nil {
			t.Fatal(err)
		}
		cert.Extensions = []pkix.Extension{ext}
	}
	return cert
}

// tokens are the claims of a JWT-SVID and a WIT-SVID, as their readers have them.
func tokens(t *testing.T, td, authority string, origin ca.Origin) map[string]map[string]any {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id, now := spiffeid.RequireFromString("spiffe://"+td+"/x"), time.Now()
	under := func(use statev1.KeyUse) *statev1.Authority {
		return &statev1.Authority{Id: authority, Use: use, NotBefore: now.Add(-time.Hour).Unix(), NotAfter: now.Add(time.Hour).Unix()}
	}
	jwt, _, err := ca.JWTClaims(ca.JWTRequest{ID: id, Audience: []string{"a"}, Now: now, Life: time.Minute, Authority: under(statev1.KeyUse_KEY_USE_JWT), Origin: origin})
	if err != nil {
		t.Fatal(err)
	}
	wit, _, err := ca.WITClaims(ca.WITRequest{ID: id, PublicKey: key.Public(), Now: now, Life: time.Minute, Authority: under(statev1.KeyUse_KEY_USE_WIT), Origin: origin})
	if err != nil {
		t.Fatal(err)
	}
	read := map[string]map[string]any{}
	for kind, payload := range map[string][]byte{"JWT-SVID": jwt, "WIT-SVID": wit} {
		var claims map[string]any
		if err := json.Unmarshal(payload, &claims); err != nil {
			t.Fatal(err)
		}
		read[kind] = claims
	}
	return read
}

// Of two items that name the same, none takes back what the other denies.
func TestDistrustIsNotTakenBack(t *testing.T) {
	banking := spiffeid.RequireTrustDomainFromString("banking.example")
	high := &statev1.Distrust{Id: "agent/h2", Agent: "h2", AgentGeneration: 10}
	low := &statev1.Distrust{Id: "authority/x agent/h2", Authority: "x", Agent: "h2"}
	for name, items := range map[string][]*statev1.Distrust{"control": {high}, "after": {high, low}, "before": {low, high}} {
		d := ca.NewDistrusted(banking, items)
		if d.CheckOrigin(ca.Origin{Agent: "h2", AgentGeneration: 10}) == nil || d.CheckOrigin(ca.Origin{Agent: "h2", AgentGeneration: 11}) != nil {
			t.Errorf("%s: not generations up to 10", name)
		}
	}
}

// An origin that no CA node of ours writes is not taken for the absence of one.
func TestOriginOfClaims(t *testing.T) {
	banking := spiffeid.RequireTrustDomainFromString("banking.example")
	id := spiffeid.RequireFromString("spiffe://banking.example/x")
	d := ca.NewDistrusted(banking, []*statev1.Distrust{{Agent: "h2", AgentGeneration: 10}})
	for text, ok := range map[string]bool{
		`{}`: true,
		`{"entente_origin":{"agent":"h1","agent_generation":5}}`:                        true,
		`{"entente_origin":{"agent":"h1","agent_generation":5,"of_later":{"x":1}}}`:     true,
		`{"entente_origin":{"agent":"h2","agent_generation":11}}`:                       true,
		`{"entente_origin":{"agent":"h2","agent_generation":10}}`:                       false,
		`{"entente_origin":{"agent":"h2"}}`:                                             false,
		`{"entente_origin":null}`:                                                       false,
		`{"entente_origin":"h1"}`:                                                       false,
		`{"entente_origin":[]}`:                                                         false,
		`{"entente_origin":{"agent":7}}`:                                                false,
		`{"entente_origin":{"agent":"h1","agent_generation":-1}}`:                       false,
		`{"entente_origin":{"agent":"h1","agent_generation":1.5}}`:                      false,
		`{"entente_origin":{"agent":"h1","agent_generation":1e300}}`:                    false,
		`{"entente_origin":{"agent":"` + strings.Repeat("h", 300) + `"}}`:               false,
		`{"entente_origin":{"agent":"h1","agent_generation":18446744073709551615}}`:     false,
		`{"entente_origin":{"Agent":"h2","Agent_Generation":10,"entry":"x"},"sub":"x"}`: false,
	} {
		var claims map[string]any
		if err := json.Unmarshal([]byte(text), &claims); err != nil {
			t.Fatal(err)
		}
		if err := d.CheckToken(id, "k", claims); (err == nil) != ok {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// An origin extension that cannot be read is not taken for the absence of one.
func TestOriginThatCannotBeRead(t *testing.T) {
	banking := spiffeid.RequireTrustDomainFromString("banking.example")
	good, err := ca.Origin{Agent: "h1", AgentGeneration: 5}.Extension()
	if err != nil {
		t.Fatal(err)
	}
	ofLater := bytes.Replace(good.Value, []byte{2, 1, 1}, []byte{2, 1, 9}, 1) // the version
	if bytes.Equal(ofLater, good.Value) {
		t.Fatal("the version is elsewhere")
	}
	for name, test := range map[string]struct {
		domain string
		origin []byte // nil: none
		want   bool   // accepted
	}{
		"control":               {"banking.example", good.Value, true},
		"none":                  {"banking.example", nil, true},
		"empty":                 {"banking.example", []byte{}, false},
		"not DER":               {"banking.example", []byte("h1"), false},
		"cut":                   {"banking.example", good.Value[:len(good.Value)-1], false},
		"trailing bytes":        {"banking.example", append(bytes.Clone(good.Value), 0), false},
		"a later version":       {"banking.example", ofLater, false},
		"another domain's":      {"trading.example", []byte("h1"), true},
		"one of 2,000 bytes":    {"banking.example", make([]byte, 2000), false},
		"an agent of 300 bytes": {"banking.example", longOrigin(t), false},
	} {
		cert := svid(t, test.domain, ca.Origin{})
		if test.origin != nil {
			cert.Extensions = []pkix.Extension{{Id: ca.OriginOID, Value: test.origin}}
		}
		d := ca.NewDistrusted(banking, []*statev1.Distrust{{Agent: "h2", AgentGeneration: 10}})
		if err := d.Check([]*x509.Certificate{cert}); (err == nil) != test.want {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func longOrigin(t *testing.T) []byte {
	t.Helper()
	der, err := asn1.Marshal(struct {
		Version         int
		Entry           string `asn1:"utf8"`
		EntryGeneration int64
		Agent           string `asn1:"utf8"`
		AgentGeneration int64
	}{1, "", 0, strings.Repeat("h", 300), 1})
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func FuzzOriginOfClaims(f *testing.F) {
	f.Add([]byte(`{"entente_origin":{"agent":"h1","agent_generation":5,"entry":"service/a","entry_generation":6}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var claims map[string]any
		if json.Unmarshal(text, &claims) != nil {
			return
		}
		o, ok, err := ca.OriginOfClaims(claims)
		if _, there := claims[ca.OriginClaim]; there != (ok || err != nil) {
			t.Errorf("%s: %v, %v", text, ok, err)
		}
		if ok && err == nil {
			if _, err := o.Extension(); err != nil {
				t.Errorf("%s: %+v is none that a certificate could have: %v", text, o, err)
			}
		}
	})
}

// I4: an item names what it says, each generation up to its own, and nothing else.
// Requirements: 21.
func TestDistrusted(t *testing.T) {
	banking := spiffeid.RequireTrustDomainFromString("banking.example")
	signer := &x509.Certificate{RawSubjectPublicKeyInfo: []byte("authority")}
	authority := ca.KeyID(signer.RawSubjectPublicKeyInfo)
	item := func(d *statev1.Distrust) []*statev1.Distrust { d.Id = ca.DistrustID(d); return []*statev1.Distrust{d} }
	base := ca.Origin{Agent: "h1", AgentGeneration: 10, Entry: "service/a", EntryGeneration: 20}
	own := ca.Origin{Agent: "h1", AgentGeneration: 10}
	for name, test := range map[string]struct {
		items  []*statev1.Distrust
		domain string
		origin ca.Origin
		want   bool // distrusted
	}{
		"nothing":                        {nil, "banking.example", base, false},
		"an item that names nothing":     {item(&statev1.Distrust{}), "banking.example", base, false},
		"authority":                      {item(&statev1.Distrust{Authority: authority}), "banking.example", base, true},
		"another authority":              {item(&statev1.Distrust{Authority: ca.KeyID([]byte("x"))}), "banking.example", base, false},
		"authority, no origin":           {item(&statev1.Distrust{Authority: authority}), "banking.example", ca.Origin{}, true},
		"agent":                          {item(&statev1.Distrust{Agent: "h1", AgentGeneration: 10}), "banking.example", base, true},
		"agent's own":                    {item(&statev1.Distrust{Agent: "h1", AgentGeneration: 10}), "banking.example", own, true},
		"agent attested anew":            {item(&statev1.Distrust{Agent: "h1", AgentGeneration: 9}), "banking.example", base, false},
		"another agent":                  {item(&statev1.Distrust{Agent: "h2", AgentGeneration: 99}), "banking.example", base, false},
		"agent of the same name abroad":  {item(&statev1.Distrust{Agent: "h1", AgentGeneration: 10}), "trading.example", base, false},
		"entry":                          {item(&statev1.Distrust{Entry: "service/a", EntryGeneration: 20}), "banking.example", base, true},
		"entry made anew":                {item(&statev1.Distrust{Entry: "service/a", EntryGeneration: 19}), "banking.example", base, false},
		"an agent's own has no entry":    {item(&statev1.Distrust{Entry: "service/a", EntryGeneration: 20}), "banking.example", own, false},
		"entry at one agent":             {item(&statev1.Distrust{Agent: "h1", Entry: "service/a", EntryGeneration: 20}), "banking.example", base, true},
		"entry at another agent":         {item(&statev1.Distrust{Agent: "h2", Entry: "service/a", EntryGeneration: 20}), "banking.example", base, false},
		"another entry at the agent":     {item(&statev1.Distrust{Agent: "h1", Entry: "service/b", EntryGeneration: 20}), "banking.example", base, false},
		"entry at the agent, made anew":  {item(&statev1.Distrust{Agent: "h1", Entry: "service/a", EntryGeneration: 19}), "banking.example", base, false},
		"the agent's own, entry's item":  {item(&statev1.Distrust{Agent: "h1", Entry: "service/a", EntryGeneration: 20}), "banking.example", own, false},
		"no origin can be named by none": {item(&statev1.Distrust{Agent: "h1", AgentGeneration: 10}), "banking.example", ca.Origin{}, false},
	} {
		err := ca.NewDistrusted(banking, test.items).Check([]*x509.Certificate{svid(t, test.domain, test.origin), signer})
		if (err != nil) != test.want {
			t.Errorf("%s: %v", name, err)
		}
		for kind, claims := range tokens(t, test.domain, authority, test.origin) {
			err := ca.NewDistrusted(banking, test.items).CheckToken(spiffeid.RequireFromString("spiffe://"+test.domain+"/x"), authority, claims)
			if (err != nil) != test.want {
				t.Errorf("%s, as a %s: %v", name, kind, err)
			}
		}
	}
	if err := ca.NewDistrusted(banking, nil).Check(nil); err != nil {
		t.Error(err)
	}
}

// Requirements: 116.
func TestMayRevoke(t *testing.T) {
	for phase := range statev1.AuthorityPhase_name {
		a := &statev1.Authority{Phase: statev1.AuthorityPhase(phase)}
		revoked := a.Phase == statev1.AuthorityPhase_AUTHORITY_PHASE_REVOKED
		if err := ca.MayRevoke(a, false); err == nil {
			t.Errorf("%s may be revoked although SVIDs live", a.Phase)
		}
		if err := ca.MayRevoke(a, true); (err != nil) != revoked {
			t.Errorf("%s now: %v", a.Phase, err)
		}
		a.Drained = true
		if err := ca.MayRevoke(a, false); (err == nil) != (a.Phase == statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED) {
			t.Errorf("%s, drained: %v", a.Phase, err)
		}
	}
}

func FuzzCheckEntryID(f *testing.F) {
	for _, seed := range []string{"entry/a", "entry/a/b-c", "entry/", "entry//a", "service/a", "entry/A", "entry/\x00"} {
		f.Add(seed)
	}
	td := spiffeid.RequireTrustDomainFromString("banking.example")
	f.Fuzz(func(t *testing.T, id string) {
		if ca.CheckEntryID(id) != nil {
			return
		}
		if len(id) > 255 || id[:len(ca.DeclaredPrefix)] != ca.DeclaredPrefix {
			t.Fatalf("%q is an entry's id", id)
		}
		// What is an id is fit for an SVID's origin.
		if _, err := (ca.Origin{Entry: id}).Extension(); err != nil {
			t.Fatal(err)
		}
		_ = ca.CheckDeclared(td, &statev1.Entry{Id: id, Path: "/" + id, DnsNames: []string{id}}, time.Hour)
	})
}
