package server_test

import (
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/server"
	"github.com/entente-mesh/entente/federation/bundle"
	"github.com/entente-mesh/entente/internal/jwtsvid"
)

// tokenKeys are the own keys of one use, from the bundle with everything in it.
func tokenKeys(t testing.TB, c *catest.CA) (jwt, wit jwtsvid.Source) {
	t.Helper()
	resp, err := c.Admin().GetBundle(t.Context(), &ententev1.GetBundleRequest{Wit: true})
	if err != nil {
		t.Fatal(err)
	}
	b, _, err := bundle.Parse(c.TrustDomain(), resp.GetJwks())
	if err != nil {
		t.Fatal(err)
	}
	source := func(list []bundle.Key) jwtsvid.Source {
		keys := jwtsvid.Keys{}
		for _, key := range list {
			public, err := key.Public()
			if err != nil {
				t.Fatal(err)
			}
			keys[key.ID] = public
		}
		return func(td spiffeid.TrustDomain) (jwtsvid.Keys, bool) { return keys, td == c.TrustDomain() }
	}
	return source(b.JWT), source(b.WIT)
}

// Tokens are signed for the entries that name the calling agent's host, for nobody
// else, and looked up with each call.
func TestSignTokens(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	c.Apply(twoHosts)
	agent := attest(t, c, "h1")
	conn := dial(t, c, &agent)
	door := ententev1.NewSignClient(conn)
	jwtKeys, witKeys := tokenKeys(t, c)
	ctx := t.Context()
	csr := csrOf(t, newKey(t))

	resp, err := door.SignJWT(ctx, &ententev1.SignJWTRequest{Requests: []*ententev1.JWTRequest{
		{EntryId: "service/accounts", Audience: []string{"a"}},
		{EntryId: "service/ledger", Audience: []string{"a"}},
		{EntryId: "service/nothing", Audience: []string{"a"}},
		{EntryId: "", Audience: []string{"a"}},
		{EntryId: "service/accounts"},
		{EntryId: "service/accounts", Audience: []string{"a", ""}},
		{EntryId: "service/accounts", Audience: make([]string, ca.MaxAudiences+1)},
	}})
	if err != nil {
		t.Fatal(err)
	}
	results := resp.GetResults()
	if svid, err := jwtsvid.Verify(results[0].GetToken(), jwtKeys, "a", time.Now(), 0); err != nil || svid.ID.Path() != "/accounts" || time.Until(svid.Expires) > ca.DefaultJWTSVID {
		t.Errorf("%+v, %v", svid, err)
	}
	for i, want := range []codes.Code{codes.OK, codes.PermissionDenied, codes.PermissionDenied, codes.PermissionDenied, codes.InvalidArgument, codes.InvalidArgument, codes.InvalidArgument} {
		if got := codes.Code(results[i].GetCode()); got != want || (got == codes.OK) != (results[i].GetToken() != "") {
			t.Errorf("request %d: %v, want %v", i, results[i], want)
		}
	}
	if strings.Replace(results[1].GetError(), "ledger", "nothing", 1) != results[2].GetError() {
		t.Error("the answer tells which entries exist")
	}

	wits, err := door.SignWIT(ctx, &ententev1.SignWITRequest{Requests: []*ententev1.WITRequest{
		{EntryId: "service/accounts", Csr: csr},
		{EntryId: "service/ledger", Csr: csr},
		{EntryId: "service/accounts", Csr: append(csr[:len(csr)-1:len(csr)-1], csr[len(csr)-1]^1)},
		{EntryId: "service/accounts"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if svid, err := jwtsvid.VerifyWIT(wits.GetResults()[0].GetToken(), witKeys, time.Now(), 0); err != nil || svid.ID.Path() != "/accounts" {
		t.Errorf("%+v, %v", svid, err)
	}
	for i, want := range []codes.Code{codes.OK, codes.PermissionDenied, codes.InvalidArgument, codes.InvalidArgument} {
		if got := codes.Code(wits.GetResults()[i].GetCode()); got != want {
			t.Errorf("WIT %d: %v, want %v", i, got, want)
		}
	}
	// Keys are apart: none of one use verifies the other's tokens (95).
	if _, err := jwtsvid.VerifyWIT(wits.GetResults()[0].GetToken(), jwtKeys, time.Now(), 0); err == nil {
		t.Error("a WIT-SVID verifies with the JWT keys")
	}

	_, err = door.SignJWT(ctx, &ententev1.SignJWTRequest{})
	wantCode(t, "an empty batch", err, codes.InvalidArgument)
	_, err = door.SignJWT(ctx, &ententev1.SignJWTRequest{Requests: make([]*ententev1.JWTRequest, 101)})
	wantCode(t, "101 requests", err, codes.InvalidArgument)

	// The entry leaves the host: at once (I4).
	c.Apply(strings.ReplaceAll(twoHosts, "[h1]", "[h3]"))
	resp, err = door.SignJWT(ctx, &ententev1.SignJWTRequest{Requests: []*ententev1.JWTRequest{{EntryId: "service/accounts", Audience: []string{"a"}}}})
	if err != nil || codes.Code(resp.GetResults()[0].GetCode()) != codes.PermissionDenied {
		t.Errorf("after the entry left: %v, %v", resp, err)
	}
}

// A host that asks without end is told when to come back; another one is served.
func TestTokenRate(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	c.Apply(twoHosts)
	one, two := attest(t, c, "h1"), attest(t, c, "h2")
	greedy, other := ententev1.NewSignClient(dial(t, c, &one)), ententev1.NewSignClient(dial(t, c, &two))
	batch := &ententev1.SignJWTRequest{}
	for range 100 {
		batch.Requests = append(batch.Requests, &ententev1.JWTRequest{EntryId: "service/nothing", Audience: []string{"a"}})
	}
	var err error
	for range 1000 {
		if _, err = greedy.SignJWT(t.Context(), batch); err != nil {
			break
		}
	}
	wantCode(t, "a greedy host", err, codes.ResourceExhausted)
	hint := time.Duration(0)
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.RetryInfo); ok {
			hint = info.GetRetryDelay().AsDuration()
		}
	}
	if hint <= 0 || hint > time.Second {
		t.Errorf("retry hint %v", hint)
	}
	if _, err := other.SignJWT(t.Context(), batch); err != nil {
		t.Errorf("another host: %v", err)
	}
}

// WIT keys stand in the variant only, whose sequence is its own, and both are one
// domain's keys.
// Requirements: 93, 95, 97, 100, T16.
func TestBundleVariants(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	get := func(wit bool) *bundle.Bundle {
		t.Helper()
		resp, err := c.Admin().GetBundle(t.Context(), &ententev1.GetBundleRequest{Wit: wit})
		if err != nil {
			t.Fatal(err)
		}
		b, skipped, err := bundle.Parse(c.TrustDomain(), resp.GetJwks())
		if err != nil || len(skipped) > 0 {
			t.Fatal(skipped, err)
		}
		return b
	}
	public, variant := get(false), get(true)
	if len(public.WIT) != 0 || len(public.JWT) != 2 || len(public.X509) != 2 {
		t.Errorf("public: %d WIT, %d JWT, %d X.509", len(public.WIT), len(public.JWT), len(public.X509))
	}
	if public.Sequence == 0 || public.RefreshHint != ca.DefaultRefreshHint {
		t.Errorf("public: sequence %d, refresh hint %v", public.Sequence, public.RefreshHint)
	}
	if len(variant.WIT) != 2 || len(variant.JWT) != 2 || variant.Sequence != public.Sequence+1 {
		t.Errorf("variant: %d WIT, %d JWT, sequence %d after %d", len(variant.WIT), len(variant.JWT), variant.Sequence, public.Sequence)
	}
	ids := map[string]bool{}
	for _, key := range append(variant.JWT, variant.WIT...) {
		ids[key.ID] = true
	}
	for _, cert := range variant.X509 {
		ids[ca.KeyID(cert.RawSubjectPublicKeyInfo)] = true
	}
	if len(ids) != 6 {
		t.Errorf("%d keys for three uses and two phases", len(ids))
	}
}

// A member proposes token authorities for itself only, and only as they are.
func TestTokenAuthorityOfMember(t *testing.T) {
	now := time.Now()
	spki, err := x509.MarshalPKIXPublicKey(newKey(t).Public())
	if err != nil {
		t.Fatal(err)
	}
	const phase = 48 * time.Hour
	self := strings.Repeat("a", 64)
	made := func() *statev1.Authority {
		a, err := ca.NewTokenAuthority(self, statev1.KeyUse_KEY_USE_JWT, spki, now, phase, now)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	if err := ca.SameTokenAuthority("banking.example", self, made(), phase, now); err != nil {
		t.Errorf("control: %v", err)
	}
	for name, change := range map[string]func(*statev1.Authority){
		"another member":  func(a *statev1.Authority) { a.MemberId = strings.Repeat("b", 64) },
		"longer life":     func(a *statev1.Authority) { a.NotAfter += 3600 },
		"another id":      func(a *statev1.Authority) { a.Id = strings.Repeat("0", 64) },
		"active already":  func(a *statev1.Authority) { a.Phase = statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE },
		"ready already":   func(a *statev1.Authority) { a.Ready = true },
		"a certificate":   func(a *statev1.Authority) { a.Certificate = []byte{1} },
		"no key":          func(a *statev1.Authority) { a.PublicKey = []byte{1} },
		"begins tomorrow": func(a *statev1.Authority) { a.NotBefore += 86400; a.NotAfter += 86400 },
		"no use":          func(a *statev1.Authority) { a.Use = statev1.KeyUse_KEY_USE_X509 },
	} {
		a := made()
		change(a)
		if err := ca.SameTokenAuthority("banking.example", self, a, phase, now); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestCheckIssuer(t *testing.T) {
	for issuer, ok := range map[string]bool{
		"https://oidc.banking.example":        true,
		"https://oidc.banking.example/domain": true,
		"https://oidc.banking.example:8443":   true,
		"http://oidc.banking.example":         false,
		"https://oidc.banking.example/":       false,
		"https://oidc.banking.example?x=1":    false,
		"https://oidc.banking.example/#":      false,
		"https://u@oidc.banking.example":      false,
		"https://":                            false,
		"oidc.banking.example":                false,
		"":                                    false,
	} {
		if err := server.CheckIssuer(issuer); (err == nil) != ok {
			t.Errorf("%q: %v", issuer, err)
		}
	}
}

func TestOIDCHandlerBeforeTheFirstBundle(t *testing.T) {
	handler, err := server.OIDCHandler("https://oidc.banking.example/domain", server.NewBundles(spiffeid.RequireTrustDomainFromString("banking.example")))
	if err != nil {
		t.Fatal(err)
	}
	get := func(method, path string, header ...string) *httptest.ResponseRecorder {
		r := httptest.NewRequest(method, path, nil)
		r.Host = "evil.example"
		for i := 0; i+1 < len(header); i += 2 {
			r.Header.Set(header[i], header[i+1])
		}
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		return w
	}
	w := get("GET", "/domain/.well-known/openid-configuration")
	var doc map[string]any
	if err := json.Unmarshal(w.Body.Bytes(), &doc); err != nil || doc["issuer"] != "https://oidc.banking.example/domain" || doc["jwks_uri"] != "https://oidc.banking.example/domain/keys" {
		t.Errorf("%v, %v", doc, err) // whatever Host says
	}
	if again := get("GET", "/domain/.well-known/openid-configuration", "If-None-Match", w.Header().Get("ETag")); again.Code != http.StatusNotModified || again.Body.Len() != 0 {
		t.Errorf("conditional: %d", again.Code)
	}
	for path, want := range map[string]int{
		"/domain/keys": http.StatusServiceUnavailable, "/keys": http.StatusNotFound, "/": http.StatusNotFound,
		"/.well-known/openid-configuration": http.StatusNotFound, "/domain/keys/": http.StatusNotFound, "/domain/%6beys": http.StatusNotFound,
	} {
		if got := get("GET", path).Code; got != want {
			t.Errorf("%s: %d, want %d", path, got, want)
		}
	}
	if got := get("POST", "/domain/keys").Code; got != http.StatusMethodNotAllowed {
		t.Errorf("POST: %d", got)
	}
}

func BenchmarkSignJWTDoor(b *testing.B) {
	c := catest.Start(b, catest.Options{})
	c.Apply(twoHosts)
	agent := attest(b, c, "h1")
	door := ententev1.NewSignClient(dial(b, c, &agent))
	for _, size := range []int{1, 100} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			batch := &ententev1.SignJWTRequest{}
			for range size {
				batch.Requests = append(batch.Requests, &ententev1.JWTRequest{EntryId: "service/accounts", Audience: []string{"a"}})
			}
			for b.Loop() {
				if _, err := door.SignJWT(b.Context(), batch); err != nil && status.Code(err) != codes.ResourceExhausted {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N*size), "us/token")
		})
	}
}

// A taint pauses nothing: who asks before the node's next authority is agreed on waits for
// that moment, and is not refused, to come back a tenth of a second later.
func TestTaintPausesNoIssuance(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	c.Apply(twoHosts)
	agent := attest(t, c, "h1")
	conn := dial(t, c, &agent)
	door := ententev1.NewSignClient(conn)
	csr := csrOf(t, newKey(t))
	authority := func(use statev1.KeyUse, phase statev1.AuthorityPhase) *statev1.Authority {
		list, err := c.Admin().ListAuthorities(t.Context(), &ententev1.ListAuthoritiesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range list.GetAuthorities() {
			if a.GetAuthority().GetUse() == use && a.GetAuthority().GetPhase() == phase {
				return a.GetAuthority()
			}
		}
		return nil
	}
	tokenResult := func(results []*ententev1.TokenResult, err error) error {
		if err == nil && results[0].GetCode() != 0 {
			err = status.Error(codes.Code(results[0].GetCode()), results[0].GetError())
		}
		return err
	}
	for use, ask := range map[statev1.KeyUse]func() error{
		statev1.KeyUse_KEY_USE_X509: func() error {
			resp, err := door.SignX509(t.Context(), &ententev1.SignX509Request{Requests: []*ententev1.X509Request{{EntryId: "service/accounts", Csr: csr}}})
			if err == nil && resp.GetResults()[0].GetCode() != 0 {
				err = status.Error(codes.Code(resp.GetResults()[0].GetCode()), resp.GetResults()[0].GetError())
			}
			return err
		},
		statev1.KeyUse_KEY_USE_JWT: func() error {
			resp, err := door.SignJWT(t.Context(), &ententev1.SignJWTRequest{Requests: []*ententev1.JWTRequest{{EntryId: "service/accounts", Audience: []string{"a"}}}})
			return tokenResult(resp.GetResults(), err)
		},
		statev1.KeyUse_KEY_USE_WIT: func() error {
			resp, err := door.SignWIT(t.Context(), &ententev1.SignWITRequest{Requests: []*ententev1.WITRequest{{EntryId: "service/accounts", Csr: csr}}})
			return tokenResult(resp.GetResults(), err)
		},
	} {
		for !authority(use, statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED).GetReady() {
			time.Sleep(5 * time.Millisecond)
		}
		old := authority(use, statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE).GetId()
		asked, refused := make(chan int), make(chan error, 1)
		done := make(chan struct{})
		go func() {
			n := 0
			for ; ; n++ {
				select {
				case <-done:
					asked <- n
					return
				default:
				}
				if err := ask(); err != nil {
					select {
					case refused <- err:
					default:
					}
				}
			}
		}()
		if _, err := c.Admin().TaintAuthority(t.Context(), &ententev1.ChangeAuthorityRequest{Id: old}); err != nil {
			t.Fatal(err)
		}
		for authority(use, statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE) == nil {
			time.Sleep(time.Millisecond)
		}
		close(done)
		n := <-asked
		select {
		case err := <-refused:
			t.Errorf("%v: refused after a taint: %v", use, err)
		default:
		}
		if now := authority(use, statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE).GetId(); now == old || n == 0 {
			t.Errorf("control: %v: %d requests, under the same authority: %v", use, n, now == old)
		}
	}
}
