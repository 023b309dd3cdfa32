package meshagent

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/client"
	casigner "github.com/entente-mesh/entente/ca/signer"
	"github.com/entente-mesh/entente/federation/bundle"
	"github.com/entente-mesh/entente/internal/jwtsvid"
	"github.com/entente-mesh/entente/internal/peer/peertest"
	"github.com/entente-mesh/entente/internal/secret"
)

// fakeTokens is the token half of fakeCA: a real signer with keys of its own.
type fakeTokens struct {
	signer *casigner.Signer
	keys   map[statev1.KeyUse]crypto.Signer
	batch  []int         // sizes of the batches of JWTs
	delay  time.Duration // before an answer
	as     string        // sign for this path instead: the lie
	life   time.Duration
	origin ca.Origin
}

func tokenCA(life time.Duration) *fakeCA {
	f := newFakeCA(life)
	f.tokens.life = life
	f.rekey()
	return f
}

// rekey makes new authorities in place of the old ones.
func (f *fakeCA) rekey() {
	authorities := map[statev1.KeyUse]*statev1.Authority{}
	f.tokens.keys = map[statev1.KeyUse]crypto.Signer{}
	f.tokens.signer = casigner.New(casigner.Config{
		TrustDomain: bank,
		Active:      func(use statev1.KeyUse) *statev1.Authority { return authorities[use] },
		Clock:       func() casigner.Clock { return casigner.Clock{} },
	})
	for _, use := range []statev1.KeyUse{statev1.KeyUse_KEY_USE_JWT, statev1.KeyUse_KEY_USE_WIT} {
		key := peertest.NewKey()
		spki, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			panic(err)
		}
		authority, err := ca.NewTokenAuthority(strings.Repeat("0", 64), use, spki, time.Now(), 48*time.Hour, time.Now())
		if err != nil {
			panic(err)
		}
		authority.Phase = statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE
		authorities[use], f.tokens.keys[use] = authority, key
		f.tokens.signer.Add(key)
	}
}

func (f *fakeCA) tokenSigner() *casigner.Signer {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.tokens.signer
}

func (f *fakeCA) path(entryID string) (spiffeid.ID, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	path, known := f.paths[entryID]
	switch {
	case f.fails != nil:
		return spiffeid.ID{}, f.fails
	case !known:
		return spiffeid.ID{}, fmt.Errorf("%w: no such entry", client.ErrDenied)
	case f.tokens.as != "":
		path = f.tokens.as
	}
	f.signed[entryID]++
	return spiffeid.RequireFromPath(bank, path), nil
}

func (f *fakeCA) SignJWT(ctx context.Context, requests []client.JWTRequest) []client.TokenResult {
	f.mu.Lock()
	f.tokens.batch = append(f.tokens.batch, len(requests))
	delay := f.tokens.delay
	f.mu.Unlock()
	time.Sleep(delay)
	results := make([]client.TokenResult, len(requests))
	for i, r := range requests {
		id, err := f.path(r.EntryID)
		if err == nil {
			var token string
			token, err = f.tokenSigner().SignJWT(ctx, casigner.JWTRequest{ID: id, Audience: r.Audience, Life: f.tokens.life, Origin: f.tokens.origin})
			results[i].Token = secret.Of(token)
		}
		results[i].Err = err
	}
	return results
}

func (f *fakeCA) SignWIT(ctx context.Context, requests []client.WITRequest) []client.TokenResult {
	results := make([]client.TokenResult, len(requests))
	for i, r := range requests {
		id, err := f.path(r.EntryID)
		if err == nil {
			var public crypto.PublicKey
			if public, err = ca.KeyOf(r.CSR); err == nil {
				var token string
				token, err = f.tokenSigner().SignWIT(ctx, casigner.WITRequest{ID: id, PublicKey: public, Life: f.tokens.life, Origin: f.tokens.origin})
				results[i].Token = secret.Of(token)
			}
		}
		results[i].Err = err
	}
	return results
}

// holdKeys gives the agent the CA's token keys.
func holdKeys(a *Agent, f *fakeCA) {
	b := &bundle.Bundle{TrustDomain: bank}
	for use, into := range map[statev1.KeyUse]*[]bundle.Key{statev1.KeyUse_KEY_USE_JWT: &b.JWT, statev1.KeyUse_KEY_USE_WIT: &b.WIT} {
		spki, _ := x509.MarshalPKIXPublicKey(f.tokens.keys[use].Public())
		key, err := bundle.NewKey(ca.KeyID(spki), spki)
		if err != nil {
			panic(err)
		}
		*into = []bundle.Key{key}
	}
	jwt, wit, err := tokenBundles(b)
	if err != nil {
		panic(err)
	}
	a.change(func(s *State) *State {
		next := *s
		next.JWT, next.WIT, next.reissued = jwt, wit, nil
		return &next
	})
}

func accounts(a *Agent) *Identity {
	identity, _ := a.State().Identity("service/accounts")
	return identity
}

func jwtAgent(t *testing.T, life time.Duration) (*Agent, *fakeCA, func()) {
	f := tokenCA(life)
	f.paths["service/accounts"] = "/accounts"
	a := newAgent(t, f)
	hold(a, f, entry("service/accounts", "/accounts", 7))
	holdKeys(a, f)
	return a, f, background(t, a.jwts.run)
}

// A token is signed once for a set of audiences, whatever their order, and again when
// it is asked for in the second half of its life.
func TestJWTIsHeldAndRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, f, stop := jwtAgent(t, 5*time.Minute)
		defer stop()
		fetch := func(audience ...string) string {
			t.Helper()
			token, _, err := a.FetchJWT(t.Context(), accounts(a), audience)
			if err != nil {
				t.Fatal(err)
			}
			return token
		}
		one := fetch("a", "b")
		if two := fetch("b", "a", "b"); two != one || f.count("service/accounts") != 1 {
			t.Errorf("the same set was signed %d times", f.count("service/accounts"))
		}
		if fetch("a") == one || f.count("service/accounts") != 2 {
			t.Error("another set got the same token")
		}
		time.Sleep(2 * time.Minute)
		if fetch("a", "b") != one {
			t.Error("renewed before half of its life")
		}
		time.Sleep(time.Minute)
		if fetch("a", "b") == one {
			t.Error("not renewed after half of its life")
		}
	})
}

// Without a CA a token stays in use until its end, and not after; the CA is not
// asked with each call.
func TestJWTWithoutCA(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, f, stop := jwtAgent(t, 5*time.Minute)
		defer stop()
		one, _, err := a.FetchJWT(t.Context(), accounts(a), []string{"a"})
		if err != nil {
			t.Fatal(err)
		}
		f.set(func() { f.fails = client.ErrUnreachable; f.tokens.delay = 10 * time.Second })
		time.Sleep(3 * time.Minute)
		f.set(func() { f.tokens.batch = nil })
		begin := time.Now()
		for range 100 {
			if token, _, err := a.FetchJWT(t.Context(), accounts(a), []string{"a"}); err != nil || token != one {
				t.Fatalf("%v", err)
			}
			time.Sleep(100 * time.Millisecond)
		}
		if waited := time.Since(begin) - 10*time.Second; waited > 100*jwtPatience {
			t.Errorf("callers waited %v for a CA that is away", waited)
		}
		f.mu.Lock()
		if n := len(f.tokens.batch); n > 4 {
			t.Errorf("asked %d times within 20 s", n)
		}
		f.tokens.delay = 0
		f.mu.Unlock()
		time.Sleep(2 * time.Minute)
		if _, _, err := a.FetchJWT(t.Context(), accounts(a), []string{"a"}); !errors.Is(err, client.ErrUnreachable) {
			t.Errorf("a token that has ended: %v", err)
		}
		f.set(func() { f.fails = nil })
		time.Sleep(retryEnded)
		if token, _, err := a.FetchJWT(t.Context(), accounts(a), []string{"a"}); err != nil || token == one {
			t.Errorf("after the CA came back: %v", err)
		}
	})
}

// What was signed for what an entry was, or by a key that was revoked, is not handed
// out any more.
func TestJWTEndsWithWhatItRestsOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, f, stop := jwtAgent(t, 5*time.Minute)
		defer stop()
		fetch := func() string {
			t.Helper()
			token, _, err := a.FetchJWT(t.Context(), accounts(a), []string{"a"})
			if err != nil {
				t.Fatal(err)
			}
			return token
		}
		one := fetch()
		if fetch() != one {
			t.Error("control: not held")
		}
		hold(a, f, entry("service/accounts", "/accounts", 8))
		two := fetch()
		if two == one {
			t.Error("the token of the entry before was handed out")
		}
		f.rekey()
		holdKeys(a, f)
		if fetch() == two {
			t.Error("a token under a revoked key was handed out")
		}
	})
}

// distrust puts items in force at the agent.
func distrust(a *Agent, items ...*statev1.Distrust) {
	a.change(func(s *State) *State {
		next, view := *s, *s.View
		view.Distrust = ca.NewDistrusted(bank, items)
		view.Announced = view.Distrust
		next.View = &view
		next.reissued = nil
		return &next
	})
}

// A JWT-SVID is accepted by its origin and its authority, also while the bundle has the
// authority's key: that comes with the revision, a revocation ahead of it. One of the own
// domain without an origin is not, nor is another domain's bound to our names.
func TestJWTIsAcceptedByItsOrigin(t *testing.T) {
	a, f, stop := jwtAgent(t, time.Hour)
	defer stop()
	foreign := tokenCA(time.Hour)
	spki, err := x509.MarshalPKIXPublicKey(f.tokens.keys[statev1.KeyUse_KEY_USE_JWT].Public())
	if err != nil {
		t.Fatal(err)
	}
	sign := func(of *casigner.Signer, td spiffeid.TrustDomain, origin ca.Origin) string {
		t.Helper()
		token, err := of.SignJWT(t.Context(), casigner.JWTRequest{ID: spiffeid.RequireFromPath(td, "/ledger"), Audience: []string{"a"}, Life: time.Hour, Origin: origin})
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	trade := spiffeid.RequireTrustDomainFromString("trading.example")
	key := foreign.tokens.keys[statev1.KeyUse_KEY_USE_JWT]
	authority, err := ca.NewTokenAuthority(strings.Repeat("1", 64), statev1.KeyUse_KEY_USE_JWT, mustSPKI(t, key), time.Now(), 48*time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	theirs := casigner.New(casigner.Config{
		TrustDomain: trade, Active: func(statev1.KeyUse) *statev1.Authority { return authority }, Clock: func() casigner.Clock { return casigner.Clock{} },
	})
	authority.Phase = statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE
	theirs.Add(key)
	federated := []*Identity{{FederatedJWT: []*TokenBundle{{TrustDomain: trade, Keys: jwtsvid.Keys{authority.GetId(): key.Public()}}}}}

	ours := ca.Origin{Entry: "service/ledger", EntryGeneration: 7, Agent: "h2", AgentGeneration: 4}
	good := sign(f.tokens.signer, bank, ours)
	bare := sign(f.tokens.signer, bank, ca.Origin{})
	other := sign(theirs, trade, ours)
	otherBare := sign(theirs, trade, ca.Origin{})

	for name, test := range map[string]struct {
		token    string
		distrust *statev1.Distrust
		want     bool
	}{
		"nothing is distrusted, control":          {good, nil, true},
		"its agent":                               {good, &statev1.Distrust{Agent: "h2", AgentGeneration: 4}, false},
		"its agent before, control":               {good, &statev1.Distrust{Agent: "h2", AgentGeneration: 3}, true},
		"another agent, control":                  {good, &statev1.Distrust{Agent: "h3", AgentGeneration: 9}, true},
		"its entry":                               {good, &statev1.Distrust{Entry: "service/ledger", EntryGeneration: 7}, false},
		"its entry's former generation, control":  {good, &statev1.Distrust{Entry: "service/ledger", EntryGeneration: 6}, true},
		"its entry at its agent":                  {good, &statev1.Distrust{Agent: "h2", Entry: "service/ledger", EntryGeneration: 7}, false},
		"its entry at another agent, control":     {good, &statev1.Distrust{Agent: "h3", Entry: "service/ledger", EntryGeneration: 7}, true},
		"its authority":                           {good, &statev1.Distrust{Authority: ca.KeyID(spki)}, false},
		"another authority, control":              {good, &statev1.Distrust{Authority: authority.GetId()}, true},
		"ours without an origin":                  {bare, nil, false},
		"another domain's, by our names, control": {other, &statev1.Distrust{Agent: "h2", AgentGeneration: 4}, true},
		"another domain's, no origin, control":    {otherBare, &statev1.Distrust{Agent: "h2", AgentGeneration: 4}, true},
	} {
		var items []*statev1.Distrust
		if test.distrust != nil {
			items = append(items, test.distrust)
		}
		distrust(a, items...)
		_, revoked, err := a.State().VerifyJWT(federated, test.token, "a", time.Now(), 0)
		if (err == nil) != test.want || (revoked != nil) != (test.distrust != nil && !test.want) {
			t.Errorf("%s: %v, %v", name, err, revoked)
		}
	}
}

func mustSPKI(t *testing.T, key crypto.Signer) []byte {
	t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return spki
}

// An agent that was evicted and admitted again hands out no token of its former
// admission, and takes none from a CA node that has not heard of the eviction.
func TestDistrustedTokensAreNotHandedOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, f, stop := jwtAgent(t, time.Hour)
		defer stop()
		f.tokens.origin = ca.Origin{Entry: "service/accounts", EntryGeneration: 7, Agent: "h1", AgentGeneration: 4}
		stopWITs := background(t, a.entries.keepWITs)
		defer stopWITs()
		synctest.Wait()
		fetch := func() (string, error) {
			token, _, err := a.FetchJWT(t.Context(), accounts(a), []string{"a"})
			return token, err
		}
		jwt, err := fetch()
		wit := accounts(a).WIT
		if err != nil || wit == nil {
			t.Fatalf("%v, %v", err, wit)
		}
		distrust(a, &statev1.Distrust{Agent: "h9", AgentGeneration: 4})
		synctest.Wait()
		if again, err := fetch(); again != jwt || err != nil || accounts(a).WIT != wit {
			t.Errorf("control: not held while another agent is distrusted: %v", err)
		}

		distrust(a, &statev1.Distrust{Agent: "h1", AgentGeneration: 4})
		synctest.Wait()
		if _, err := fetch(); err == nil {
			t.Error("a distrusted JWT-SVID is handed out")
		}
		if accounts(a).WIT != wit { // there is no better one
			t.Error("a WIT-SVID that is distrusted already was taken into use")
		}
		f.mu.Lock()
		f.tokens.origin.AgentGeneration = 5
		f.mu.Unlock()
		time.Sleep(10 * time.Second)
		if again, err := fetch(); err != nil || again == jwt {
			t.Errorf("no new JWT-SVID: %v", err)
		}
		if accounts(a).WIT == wit {
			t.Error("no new WIT-SVID")
		}
	})
}

// A CA that signs for somebody else, or with a key that is not in the bundle, is not
// believed.
func TestJWTOfLyingCA(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, f, stop := jwtAgent(t, 5*time.Minute)
		defer stop()
		f.set(func() { f.tokens.as = "/ledger" })
		if _, _, err := a.FetchJWT(t.Context(), accounts(a), []string{"a"}); err == nil {
			t.Error("a token for another identity was taken")
		}
		f.set(func() { f.tokens.as = "" })
		f.rekey() // and the agent does not hold them
		time.Sleep(time.Minute)
		if _, _, err := a.FetchJWT(t.Context(), accounts(a), []string{"a"}); err == nil {
			t.Error("a token under an unknown key was taken")
		}
		holdKeys(a, f)
		time.Sleep(time.Minute)
		if _, _, err := a.FetchJWT(t.Context(), accounts(a), []string{"a"}); err != nil {
			t.Errorf("control: %v", err)
		}
	})
}

// Tokens that are asked for together are signed together; one entry cannot fill the
// queue; what is held is bounded.
func TestJWTBatchesAndBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, f, stop := jwtAgent(t, time.Hour)
		defer stop()
		f.set(func() { f.tokens.delay = time.Second })
		var group sync.WaitGroup
		var mu sync.Mutex
		busy := 0
		for i := range 200 {
			group.Go(func() {
				_, _, err := a.FetchJWT(t.Context(), accounts(a), []string{fmt.Sprint("a", i)})
				mu.Lock()
				defer mu.Unlock()
				if wait, ok := RetryAfter(err); ok && wait > 0 {
					busy++
				} else if err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
		if busy != 200-maxPendingPerEntry {
			t.Errorf("%d of 200 were sent away", busy)
		}
		f.mu.Lock()
		if len(f.tokens.batch) > jwtCallers+2 || slices.Max(f.tokens.batch) < 10 {
			t.Errorf("batches of %v", f.tokens.batch)
		}
		f.tokens.delay = 0
		f.mu.Unlock()
		for i := range maxJWTsPerEntry + 50 {
			if _, _, err := a.FetchJWT(t.Context(), accounts(a), []string{fmt.Sprint("b", i)}); err != nil {
				t.Fatal(err)
			}
		}
		a.jwts.mu.Lock()
		if n := a.jwts.count; n > maxJWTsPerEntry || n != len(a.jwts.held["service/accounts"]) {
			t.Errorf("%d tokens are held", n)
		}
		a.jwts.mu.Unlock()
		time.Sleep(2 * time.Hour)
		a.jwts.mu.Lock()
		if a.jwts.count != 0 || len(a.jwts.held) != 0 {
			t.Errorf("%d tokens that have ended are held", a.jwts.count)
		}
		a.jwts.mu.Unlock()
	})
}

func TestJWTAudience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, f, stop := jwtAgent(t, time.Hour)
		defer stop()
		for _, audience := range [][]string{nil, {}, {""}, {"a", ""}, {"a\x00b"}, {strings.Repeat("a", 5000)}, make([]string, 17)} {
			if _, _, err := a.FetchJWT(t.Context(), accounts(a), audience); err == nil {
				t.Errorf("audience %.40q was taken", audience)
			}
		}
		if f.count("service/accounts") != 0 {
			t.Error("the CA was asked")
		}
	})
}

// WIT-SVIDs are renewed at half of their life, each with a new key, and when their
// authority is revoked.
func TestWITIsRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, f, stopJWTs := jwtAgent(t, time.Hour)
		defer stopJWTs()
		stop := background(t, a.entries.keepWITs)
		defer stop()
		held := func() *WITSVID { return accounts(a).WIT }
		synctest.Wait()
		one := held()
		if one == nil || one.ID != accounts(a).ID {
			t.Fatalf("got %+v", one)
		}
		time.Sleep(20 * time.Minute)
		if held() != one {
			t.Error("renewed too early")
		}
		time.Sleep(20 * time.Minute)
		two := held()
		if two == one || two.Key == one.Key {
			t.Error("not renewed with a new key at half of its life")
		}
		f.rekey()
		holdKeys(a, f)
		synctest.Wait()
		if held() == two {
			t.Error("not renewed when its authority was gone")
		}
	})
}

func BenchmarkFetchJWTHeld(b *testing.B) {
	f := tokenCA(time.Hour)
	f.paths["service/accounts"] = "/accounts"
	a := newAgent(&testing.T{}, f)
	hold(a, f, entry("service/accounts", "/accounts", 7))
	holdKeys(a, f)
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan error)
	go func() { done <- a.jwts.run(ctx) }()
	identity := accounts(a)
	for b.Loop() {
		if _, _, err := a.FetchJWT(ctx, identity, []string{"a"}); err != nil {
			b.Fatal(err)
		}
	}
	cancel()
	<-done
}

// A key of a bundle is for one kind of SVID: what it is handed on as, and what it
// verifies.
// Requirements: 68, 71, 94, 126, 180, 185, T11.
func TestKeysAreKeptApart(t *testing.T) {
	authority := peertest.NewAuthority(trade)
	key := func(id string) bundle.Key {
		spki, err := x509.MarshalPKIXPublicKey(peertest.NewKey().Public())
		if err != nil {
			t.Fatal(err)
		}
		k, err := bundle.NewKey(id, spki)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	whole := &bundle.Bundle{TrustDomain: trade, X509: []*x509.Certificate{authority.Cert}, JWT: []bundle.Key{key("j")}, WIT: []bundle.Key{key("w")}, Sequence: 7}
	text, err := whole.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	s := &State{Foreign: map[spiffeid.TrustDomain]*x509bundle.Bundle{}, foreignJWT: map[spiffeid.TrustDomain]*TokenBundle{}, foreignWIT: map[spiffeid.TrustDomain]*TokenBundle{}}
	if err := s.takeForeign(trade, text); err != nil {
		t.Fatal(err)
	}
	if got := s.Foreign[trade]; len(got.X509Authorities()) != 1 || !got.HasX509Authority(authority.Cert) {
		t.Errorf("X.509: %v", got.X509Authorities())
	}
	for name, test := range map[string]struct {
		bundle   *TokenBundle
		id       string
		jwt, wit int
	}{"JWT": {s.foreignJWT[trade], "j", 1, 0}, "WIT": {s.foreignWIT[trade], "w", 0, 1}} {
		if len(test.bundle.Keys) != 1 || test.bundle.Keys[test.id] == nil {
			t.Errorf("%s: verifies with %v", name, test.bundle.Keys)
		}
		b, skipped, err := bundle.Parse(trade, test.bundle.JWKS)
		if err != nil || len(skipped) > 0 || len(b.X509) != 0 || len(b.JWT) != test.jwt || len(b.WIT) != test.wit {
			t.Errorf("%s: handed on as %s", name, test.bundle.JWKS)
		}
	}

	// Who federates gets the JWT keys, and the WIT keys of a relationship that has them;
	// each verifies its own domain's tokens only.
	gateway := entry("gateway/gw", "/entente/gateway/gw", 1)
	gateway.Role, gateway.FederatesWith = statev1.Role_ROLE_GATEWAY, []string{"trading.example"}
	for _, wit := range []bool{false, true} {
		s.witPeers = map[string]bool{"trading.example": wit, "banking.example": true}
		identity, err := s.identify(gateway, nil, bank, "h1")
		if err != nil {
			t.Fatal(err)
		}
		if len(identity.FederatedJWT) != 1 || (len(identity.FederatedWIT) == 1) != wit {
			t.Errorf("a relationship with WIT keys: %v; %d JWT, %d WIT", wit, len(identity.FederatedJWT), len(identity.FederatedWIT))
		}
		s.JWT = &TokenBundle{TrustDomain: bank, Keys: jwtsvid.Keys{"own": nil}}
		for td, want := range map[string]string{"banking.example": "own", "trading.example": "j", "clearing.example": ""} {
			keys, ok := s.JWTKeys([]*Identity{identity})(spiffeid.RequireTrustDomainFromString(td))
			if _, has := keys[want]; ok != (want != "") || ok && (!has || len(keys) != 1) {
				t.Errorf("keys of %s: %v", td, keys)
			}
		}
		if keys, ok := s.JWTKeys(nil)(trade); ok {
			t.Errorf("who federates with nobody verifies with %v", keys)
		}
	}
}
