package workloadapi

import (
	"context"
	"crypto"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/exp/bundle/witbundle"
	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/node"
	"github.com/entente-mesh/entente/meshagent"
)

func dial(t *testing.T, h *host) *workloadapi.Client {
	t.Helper()
	client, err := workloadapi.New(t.Context(), workloadapi.WithAddr("unix://"+h.socket))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

func claimsOf(t *testing.T, token string) (header, claims map[string]any) {
	t.Helper()
	parts := strings.Split(token, ".")
	for i, into := range []*map[string]any{&header, &claims} {
		data, err := base64.RawURLEncoding.DecodeString(parts[i])
		if err == nil {
			err = json.Unmarshal(data, into)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return header, claims
}

// go-spiffe's client gets, verifies and validates JWT-SVIDs.
// Requirements: 56, 57, 59, 61-65, 70, 162, 170, 180-184, T9.
func TestJWTSVID(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply(serviceYAML("accounts", run(myself(t))+"\n  hint: internal\n  ttl: {jwt: 2m}"))
	h := newHost(t, c.AgentToken("h1", "dc1"), true)
	client := dial(t, h)
	ctx := t.Context()

	svid, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "spiffe://trading.example/portfolio", ExtraAudiences: []string{"b"}})
	if err != nil {
		t.Fatal(err)
	}
	if svid.ID.String() != "spiffe://banking.example/accounts" || svid.Hint != "internal" || len(svid.Audience) != 2 {
		t.Errorf("got %+v", svid)
	}
	bundles, err := client.FetchJWTBundles(ctx)
	if err != nil || bundles.Len() != 1 {
		t.Fatalf("%v, %v", bundles, err)
	}
	if _, err := jwtsvid.ParseAndValidate(svid.Marshal(), bundles, []string{"b"}); err != nil {
		t.Errorf("go-spiffe finds: %v", err)
	}
	header, claims := claimsOf(t, svid.Marshal())
	if names := slices.Sorted(maps.Keys(header)); !slices.Equal(names, []string{"alg", "kid", "typ"}) || header["alg"] != "ES256" || header["typ"] != "JWT" {
		t.Errorf("header %v (56-61)", header)
	}
	if life := claims["exp"].(float64) - claims["iat"].(float64); life != 120 {
		t.Errorf("it lives %v s", life)
	}
	if origin, ok := claims["entente_origin"].(map[string]any); !ok || origin["entry"] != "service/accounts" || origin["agent"] != "h1" || origin["entry_generation"] == nil || origin["agent_generation"] == nil {
		t.Errorf("origin %v", claims["entente_origin"])
	}
	if _, has := claims["iss"]; has {
		t.Error("an issuer that nobody configured")
	}

	// Only JWT keys, each with its use (70, 183): not those of X.509 or WIT.
	raw, _ := raw(t, h.socket)
	stream, err := raw.FetchJWTBundles(withHeader(ctx, "true"), &workload.JWTBundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	message, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	uses(t, string(message.GetBundles()["spiffe://banking.example"]), "jwt-svid")
	if keys, err := bundles.GetJWTBundleForTrustDomain(c.TrustDomain()); err != nil || len(keys.JWTAuthorities()) != 2 || len(message.GetBundles()) != 1 { // ACTIVE and PREPARED
		t.Errorf("keys %v, %v", keys, err)
	}

	if got, err := client.ValidateJWTSVID(ctx, svid.Marshal(), "b"); err != nil || got.ID != svid.ID {
		t.Errorf("validate: %v, %v", got, err)
	}
	resp, err := raw.ValidateJWTSVID(withHeader(ctx, "true"), &workload.ValidateJWTSVIDRequest{Audience: "b", Svid: svid.Marshal()})
	if err != nil || resp.GetClaims().AsMap()["sub"] != svid.ID.String() || resp.GetSpiffeId() != svid.ID.String() {
		t.Errorf("validate: %v, %v", resp, err)
	}
	for name, req := range map[string]*workload.ValidateJWTSVIDRequest{
		"no audience (T9, 170)": {Svid: svid.Marshal()},
		"no token (170)":        {Audience: "b"},
		"another audience (64)": {Audience: "c", Svid: svid.Marshal()},
		"changed":               {Audience: "b", Svid: svid.Marshal()[:len(svid.Marshal())-8] + "AAAAAAAA"},
		"no token at all":       {Audience: "b", Svid: "abc"},
	} {
		if resp, err := raw.ValidateJWTSVID(withHeader(ctx, "true"), req); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v, %v", name, resp, err)
		}
	}
	for name, req := range map[string]struct {
		*workload.JWTSVIDRequest
		want codes.Code
	}{
		"no audience (170)":         {&workload.JWTSVIDRequest{}, codes.InvalidArgument},
		"empty audience":            {&workload.JWTSVIDRequest{Audience: []string{""}}, codes.InvalidArgument},
		"somebody else's ID (182)":  {&workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: "spiffe://banking.example/ledger"}, codes.PermissionDenied},
		"another domain's ID (182)": {&workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: "spiffe://trading.example/accounts"}, codes.PermissionDenied},
		"no ID (182)":               {&workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: "accounts"}, codes.PermissionDenied},
		"its own ID, control":       {&workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: svid.ID.String()}, codes.OK},
	} {
		if _, err := raw.FetchJWTSVID(withHeader(ctx, "true"), req.JWTSVIDRequest); status.Code(err) != req.want {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Without an id the caller gets all its identities, the first one stable, each hint
// once.
// Requirements: 175, 181, 188.
func TestJWTSVIDsOfSeveralIdentities(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply(serviceYAML("accounts", run(myself(t))+"\n  hint: one") + serviceYAML("ledger", run(myself(t))+"\n  hint: one") + serviceYAML("other", run("/bin/true")))
	h := newHost(t, c.AgentToken("h1", "dc1"), true)
	client := dial(t, h)
	for range 3 {
		svids, err := client.FetchJWTSVIDs(t.Context(), jwtsvid.Params{Audience: "a"})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, svid := range svids {
			got = append(got, svid.ID.Path()+svid.Hint)
		}
		if fmt.Sprint(got) != "[/accountsone /ledger]" {
			t.Errorf("got %v", got)
		}
	}
	one, err := client.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "a", Subject: spiffeid.RequireFromString("spiffe://banking.example/ledger")})
	if err != nil || one.ID.Path() != "/ledger" {
		t.Errorf("got %v, %v", one, err)
	}
}

// The entitlement ends: streams end with PermissionDenied, and so do calls, with the
// token still held.
// Requirements: 177, 182.
func TestTokensEndWithTheEntry(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply(serviceYAML("accounts", run(myself(t))))
	h := newHostOf(t, "banking.example", c.AgentToken("h1", "dc1"), ", wit: true", true)
	api, _ := raw(t, h.socket)
	ctx := withHeader(t.Context(), "true")
	bundles, err := api.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	wits, err := api.FetchWITSVID(ctx, &workload.WITSVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{second(bundles.Recv()), second(wits.Recv())} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}}); err != nil {
		t.Fatalf("control: %v", err)
	}
	c.Apply(serviceYAML("accounts", run("/bin/true")))
	for name, recv := range map[string]func() error{
		"bundles": func() error { return second(bundles.Recv()) },
		"WIT":     func() error { return second(wits.Recv()) },
	} {
		var err error
		for err == nil { // what was on its way
			err = recv()
		}
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a held token after the entitlement: %v", err)
	}
	if _, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: "x"}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("validate: %v", err)
	}
}

// A JWT-SVID is refused within seconds when what it was issued through is no longer trusted,
// and no other one is. "control" stays valid all the time.
func TestDistrustedTokensAreRefused(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	others := map[string]string{"banned": "h2", "evicted": "h3", "deleted": "h4", "isolated": "h5", "control": "h6", "narrowed": "h7", "moved": "h8"}
	yaml := serviceYAML("accounts", run(myself(t)))
	for name, host := range others {
		yaml += serviceYAML(name, "run: {uid: 4711, hosts: ["+host+"]}")
	}
	c.Apply(yaml)
	h1 := newHost(t, c.AgentToken("h1", "dc1"), true)
	api, _ := raw(t, h1.socket)
	ctx := withHeader(t.Context(), "true")

	attest := func(host string) (*meshagent.Agent, func()) {
		t.Helper()
		cfg, err := meshagent.ReadConfig("agent.yaml", strings.NewReader(fmt.Sprintf(
			"trustDomain: banking.example\nname: %s\ndatacenter: dc1\ndataDir: %s\nca: {token: %s}\n", host, t.TempDir(), c.AgentToken(host, "dc1"))))
		if err != nil {
			t.Fatal(err)
		}
		agent, err := meshagent.New(cfg, nil)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- agent.Run(ctx) }()
		stop := sync.OnceFunc(func() { cancel(); <-ended })
		t.Cleanup(stop)
		eventually(t, host+" ready", agent.Ready)
		return agent, stop
	}
	token := func(agent *meshagent.Agent, name string) string {
		t.Helper()
		var token string
		eventually(t, "a token of "+name, func() error {
			identity, ok := agent.State().Service(name)
			if !ok {
				return errors.New("no such entry")
			}
			var err error
			token, _, err = agent.FetchJWT(t.Context(), identity, []string{"accounts"})
			return err
		})
		return token
	}
	agents, stops, tokens := map[string]*meshagent.Agent{}, map[string]func(){}, map[string]string{}
	for name, host := range others {
		agents[name], stops[name] = attest(host)
		tokens[name] = token(agents[name], name)
	}
	validate := func(token string) error {
		_, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "accounts", Svid: token})
		return err
	}
	gone := map[string]bool{}
	check := func(name string) {
		t.Helper()
		if name != "" {
			gone[name] = true
			eventually(t, name+" is refused", func() error {
				if validate(tokens[name]) == nil {
					return errors.New("still valid")
				}
				return nil
			})
		}
		for other, token := range tokens {
			switch err := validate(token); {
			case gone[other] && status.Code(err) != codes.InvalidArgument:
				t.Errorf("after %q: the token of %s: %v", name, other, err)
			case !gone[other] && err != nil:
				t.Errorf("control, after %q: the token of %s: %v", name, other, err)
			}
		}
	}
	check("")

	if _, err := c.Admin().BanAgent(t.Context(), &ententev1.ChangeAgentRequest{Name: "h2"}); err != nil {
		t.Fatal(err)
	}
	check("banned")

	stops["evicted"]()
	if _, err := c.Admin().EvictAgent(t.Context(), &ententev1.ChangeAgentRequest{Name: "h3"}); err != nil {
		t.Fatal(err)
	}
	check("evicted")
	again, _ := attest("h3")
	tokens["evicted and admitted again"] = token(again, "evicted")
	check("")

	if _, err := c.Admin().Apply(t.Context(), &ententev1.ApplyRequest{Deletes: []*statev1.ObjectKey{{Kind: "Service", Name: "deleted"}}}); err != nil {
		t.Fatal(err)
	}
	check("deleted")

	c.Apply(serviceYAML("narrowed", "run: {uid: 4712, hosts: [h7]}"))
	check("narrowed")
	eventually(t, "what is signed for the narrowed entry is good", func() error { return validate(token(agents["narrowed"], "narrowed")) })

	c.Apply(serviceYAML("moved", "run: {uid: 4711, hosts: [h6]}"))
	check("moved")
	eventually(t, "what is signed where the entry went is good", func() error { return validate(token(agents["control"], "moved")) })

	// Without quorum.
	other := c.Join("ca-2", "dc1")
	other.Kill()
	eventually(t, "the loss of quorum", func() error {
		if c.Status().GetQuorum() {
			return errors.New("not noticed")
		}
		return nil
	})
	if _, err := c.Admin().IsolateAgent(t.Context(), &ententev1.IsolateAgentRequest{Name: "h5", Reason: "INC-881"}); err != nil {
		t.Fatal(err)
	}
	check("isolated")
	if len(gone) != 6 {
		t.Errorf("%v", gone)
	}
}

// A JWT-SVID ends with the authority that signed it, and what the next one signs is good.
func TestRevokedAuthoritysTokensAreRefused(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply(serviceYAML("accounts", run(myself(t))))
	h := newHost(t, c.AgentToken("h1", "dc1"), true)
	api, _ := raw(t, h.socket)
	ctx := withHeader(t.Context(), "true")
	fetch := func() (token, keyID string) {
		t.Helper()
		eventually(t, "a token", func() error {
			response, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"accounts"}})
			if err == nil {
				token = response.GetSvids()[0].GetSvid()
			}
			return err
		})
		header, _ := claimsOf(t, token)
		return token, header["kid"].(string)
	}
	validate := func(token string) error {
		_, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "accounts", Svid: token})
		return err
	}
	old, keyID := fetch()
	if err := validate(old); err != nil {
		t.Fatalf("control: %v", err)
	}
	if _, err := c.Admin().TaintAuthority(t.Context(), &ententev1.ChangeAuthorityRequest{Id: keyID}); err != nil {
		t.Fatal(err)
	}
	var fresh string
	eventually(t, "nothing more is handed out under a tainted authority", func() error {
		var by string
		if fresh, by = fetch(); by == keyID {
			return errors.New("still the old one")
		}
		return nil
	})
	for name, token := range map[string]string{"tainted": old, "next": fresh} {
		if err := validate(token); err != nil {
			t.Errorf("control: the %s authority's token, before the revocation: %v", name, err)
		}
	}
	if _, err := c.Admin().RevokeAuthority(t.Context(), &ententev1.ChangeAuthorityRequest{Id: keyID, Now: true}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the token of a revoked authority is refused", func() error {
		if validate(old) == nil {
			return errors.New("still valid")
		}
		return nil
	})
	if err := validate(fresh); err != nil {
		t.Errorf("control: the next authority's token: %v", err)
	}
}

func second[R any](_ R, err error) error { return err }

// A new authority reaches an open stream, and go-spiffe's source uses it.
// Requirements: 165, 168.
func TestJWTBundlesAreUpdated(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply(serviceYAML("accounts", run(myself(t))))
	h := newHost(t, c.AgentToken("h1", "dc1"), true)
	source, err := workloadapi.NewJWTSource(t.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+h.socket)))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	keys := func() (map[string]crypto.PublicKey, error) {
		b, err := source.GetJWTBundleForTrustDomain(c.TrustDomain())
		if err != nil {
			return nil, err
		}
		return b.JWTAuthorities(), nil
	}
	before, err := keys()
	if err != nil {
		t.Fatal(err)
	}
	c.Join("ca-2", "dc2") // with keys of its own
	eventually(t, "the new node's keys", func() error {
		after, err := keys()
		if err == nil && len(after) < len(before)+2 {
			err = fmt.Errorf("%d keys after %d", len(after), len(before))
		}
		return err
	})
	svid, err := source.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "a"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := jwtsvid.ParseAndValidate(svid.Marshal(), source, []string{"a"}); err != nil {
		t.Error(err)
	}
}

// relate has one domain take the bundle of another, WIT keys included.
func relate(t *testing.T, from, to *catest.CA, url string) {
	t.Helper()
	_, err := from.Admin().Apply(t.Context(), &ententev1.ApplyRequest{Objects: []*statev1.Object{{
		Kind: &statev1.Object_Relationship{Relationship: &statev1.Relationship{
			TrustDomain: to.TrustDomain().Name(), EndpointUrls: []string{url}, EndpointId: to.BundleID().String(), BootstrapBundle: to.BundleJSON(), Wit: true,
		}},
	}}})
	if err != nil {
		t.Fatal(err)
	}
}

// Foreign token keys reach only whom federates by name: a service validates nothing of
// another domain (I6), a gateway does as long as the relationship lasts, and no domain's
// keys verify another's tokens (I2).
// Requirements: 68, 94, 126, 145, 176, 183-185, 187.
func TestForeignTokens(t *testing.T) {
	banking := catest.Start(t, catest.Options{})
	trading := catest.Start(t, catest.Options{TrustDomain: "trading.example"})
	relate(t, trading, banking, banking.BundleURL())
	relate(t, banking, trading, trading.BundleURL()+"wit")
	banking.Apply(serviceYAML("accounts", run(myself(t))))
	trading.Apply(serviceYAML("portfolio", run(myself(t))))
	here := newHostOf(t, "banking.example", banking.AgentToken("h1", "dc1"), ", wit: true", true)
	there := newHostOf(t, "trading.example", trading.AgentToken("h1", "dc1"), ", wit: true", true)
	api, _ := raw(t, here.socket)
	abroad, _ := raw(t, there.socket)
	ctx, cancel := context.WithTimeout(withHeader(t.Context(), "true"), time.Minute)
	defer cancel()

	issued, err := abroad.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"ledger"}})
	if err != nil {
		t.Fatal(err)
	}
	token := issued.GetSvids()[0].GetSvid()
	validate := func(api workload.SpiffeWorkloadAPIClient, token string) (string, error) {
		got, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "ledger", Svid: token})
		return got.GetSpiffeId(), err
	}
	if id, err := validate(abroad, token); err != nil || id != "spiffe://trading.example/portfolio" {
		t.Fatalf("control: at home it is %q, %v", id, err)
	}
	wits, err := abroad.FetchWITSVID(ctx, &workload.WITSVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	wit, err := wits.Recv()
	if err != nil {
		t.Fatal(err)
	}

	jwtStream, err := api.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	witStream, err := api.FetchWITBundles(ctx, &workload.WITBundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	jwts, err := jwtStream.Recv()
	if err != nil || len(jwts.GetBundles()) != 1 {
		t.Errorf("a service got %d JWT bundles, %v", len(jwts.GetBundles()), err)
	}
	bundles, err := witStream.Recv()
	if err != nil || len(bundles.GetBundles()) != 1 {
		t.Errorf("a service got %d WIT bundles, %v", len(bundles.GetBundles()), err)
	}
	if id, err := validate(api, token); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a service validates a token of another domain: %q, %v", id, err)
	}

	// A gateway federates. What changes comes on the open streams.
	banking.Apply("apiVersion: entente/v1\nkind: Gateway\nmetadata: {name: gw-1, owner: team}\nspec: {" + run(myself(t)) + ", datacenter: dc1, address: \"127.0.0.1:9443\"}\n")
	const td = "spiffe://trading.example"
	for len(jwts.GetBundles()[td]) == 0 {
		if jwts, err = jwtStream.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	for bundles.GetBundles()[td] == "" {
		if bundles, err = witStream.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	keys, err := witbundle.Parse(trading.TrustDomain(), []byte(bundles.GetBundles()[td]))
	if err != nil {
		t.Fatal(err)
	}
	if svid, err := witsvid.ParseAndValidate(wit.GetSvids()[0].GetWitSvid(), keys); err != nil || svid.ID.String() != "spiffe://trading.example/portfolio" {
		t.Errorf("trading's WIT-SVID by what banking holds: %v, %v", svid, err)
	}
	uses(t, bundles.GetBundles()[td], "wit-svid")
	uses(t, string(jwts.GetBundles()[td]), "jwt-svid")
	if len(jwts.GetBundles()) != 2 || len(bundles.GetBundles()) != 2 {
		t.Errorf("%d JWT and %d WIT bundles", len(jwts.GetBundles()), len(bundles.GetBundles()))
	}
	if id, err := validate(api, token); err != nil || id != "spiffe://trading.example/portfolio" {
		t.Errorf("the gateway's: %q, %v", id, err)
	}
	if _, err := validate(api, token[:len(token)-8]+"AAAAAAAA"); status.Code(err) != codes.InvalidArgument {
		t.Errorf("with another signature: %v", err)
	}
	own, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"ledger"}, SpiffeId: "spiffe://banking.example/accounts"})
	if err != nil {
		t.Fatal(err)
	}
	if id, err := validate(api, own.GetSvids()[0].GetSvid()); err != nil || id != "spiffe://banking.example/accounts" {
		t.Errorf("its own: %q, %v", id, err)
	}
	if id, err := validate(abroad, own.GetSvids()[0].GetSvid()); status.Code(err) != codes.InvalidArgument {
		t.Errorf("trading's service validates banking's: %q, %v", id, err)
	}

	// The relationship ends, and with it the trust.
	if _, err := banking.Admin().Apply(ctx, &ententev1.ApplyRequest{Deletes: []*statev1.ObjectKey{{Kind: "Relationship", Name: "trading.example"}}}); err != nil {
		t.Fatal(err)
	}
	for len(jwts.GetBundles()) > 1 {
		if jwts, err = jwtStream.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	for len(bundles.GetBundles()) > 1 {
		if bundles, err = witStream.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	if id, err := validate(api, token); status.Code(err) != codes.InvalidArgument {
		t.Errorf("after the end: %q, %v", id, err)
	}
}

// uses checks that all keys of a JWK Set are for one use and told apart by kid.
func uses(t *testing.T, jwks, use string) {
	t.Helper()
	var set struct {
		Keys []struct{ Use, Kid string }
	}
	if err := json.Unmarshal([]byte(jwks), &set); err != nil || len(set.Keys) == 0 {
		t.Fatalf("%s: %v", jwks, err)
	}
	seen := map[string]bool{"": true}
	for _, key := range set.Keys {
		if key.Use != use || seen[key.Kid] {
			t.Errorf("%s: key %+v", use, key)
		}
		seen[key.Kid] = true
	}
}

// A domain whose keys are all revoked says so to whom it had told them: it does not fall
// silent.
// Requirements: 104, 166, 179, 183, 187.
func TestEmptyBundlesAreTold(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("banking.example")
	empty := &meshagent.TokenBundle{TrustDomain: td, JWKS: []byte(`{"keys":[]}`)}
	state := &meshagent.State{Bundle: x509bundle.New(td), JWT: empty, WIT: empty}
	x509s, err := bundlesResponse(state, nil)
	if der, told := x509s.GetBundles()[td.IDString()]; err != nil || !told || len(der) > 0 {
		t.Errorf("X.509: %v, %v", x509s, err)
	}
	jwts, err := jwtBundles(state, nil)
	if b, parseErr := jwtbundle.Parse(td, jwts.GetBundles()[td.IDString()]); err != nil || parseErr != nil || !b.Empty() {
		t.Errorf("JWT: %v, %v, %v", jwts, err, parseErr)
	}
	wits, err := witBundles(state, nil)
	if b, parseErr := witbundle.Parse(td, []byte(wits.GetBundles()[td.IDString()])); err != nil || parseErr != nil || !b.Empty() {
		t.Errorf("WIT: %v, %v, %v", wits, err, parseErr)
	}
	// The control: what is not known yet is not told.
	state = &meshagent.State{}
	x509s, _ = bundlesResponse(state, nil)
	jwts, _ = jwtBundles(state, nil)
	wits, _ = witBundles(state, nil)
	if x509s != nil || jwts != nil || wits != nil {
		t.Errorf("before the first picture: %v, %v, %v", x509s, jwts, wits)
	}
}

// WIT-SVIDs: with their key, verified by go-spiffe's parser and bundle, renewed on the
// open stream with another key.
// Requirements: 79, 86, 89, 163, 182, 186, 187.
func TestWITSVID(t *testing.T) {
	c := catest.Start(t, catest.Options{Lifetimes: node.Lifetimes{WITSVID: 4 * time.Second}})
	c.Apply(serviceYAML("accounts", run(myself(t))+"\n  hint: internal"))
	h := newHostOf(t, "banking.example", c.AgentToken("h1", "dc1"), ", wit: true", true)
	api, _ := raw(t, h.socket)
	ctx, cancel := context.WithTimeout(withHeader(t.Context(), "true"), 15*time.Second)
	defer cancel()
	keys, err := api.FetchWITBundles(ctx, &workload.WITBundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	message, err := keys.Recv()
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := witbundle.Parse(c.TrustDomain(), []byte(message.GetBundles()["spiffe://banking.example"]))
	if err != nil {
		t.Fatal(err)
	}
	stream, err := api.FetchWITSVID(ctx, &workload.WITSVIDRequest{SpiffeId: "spiffe://banking.example/accounts"})
	if err != nil {
		t.Fatal(err)
	}
	var seen []string
	for range 2 {
		response, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		got := response.GetSvids()[0]
		svid, err := witsvid.ParseAndValidate(got.GetWitSvid(), bundle)
		if err != nil {
			t.Fatalf("go-spiffe finds: %v", err)
		}
		var key jose.JSONWebKey
		if err := key.UnmarshalJSON([]byte(got.GetWitSvidKey())); err != nil || key.IsPublic() {
			t.Fatalf("its key: %v", err)
		}
		if public := key.Public(); got.GetHint() != "internal" || svid.ID.Path() != "/accounts" || !public.Key.(interface{ Equal(crypto.PublicKey) bool }).Equal(svid.PublicKey) {
			t.Errorf("got %+v", got)
		}
		header, claims := claimsOf(t, got.GetWitSvid())
		if claims["aud"] != nil || header["typ"] != "wit+jwt" {
			t.Errorf("%v %v", header, claims)
		}
		if slices.Contains(seen, got.GetWitSvidKey()) {
			t.Error("renewed with the same key")
		}
		seen = append(seen, got.GetWitSvidKey())
		// It is no bearer token (89).
		if _, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: got.GetWitSvid()}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("a WIT-SVID validates as JWT-SVID: %v", err)
		}
	}
	denied, err := api.FetchWITSVID(ctx, &workload.WITSVIDRequest{SpiffeId: "spiffe://banking.example/ledger"})
	if err == nil {
		_, err = denied.Recv()
	}
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("somebody else's: %v", err)
	}
}

func BenchmarkFetchJWTSVID(b *testing.B) {
	c := catest.Start(b, catest.Options{})
	c.Apply(serviceYAML("accounts", run(myself(b))))
	h := newHost(b, c.AgentToken("h1", "dc1"), true)
	api, _ := raw(b, h.socket)
	ctx := withHeader(b.Context(), "true")
	b.Run("held", func(b *testing.B) {
		for b.Loop() {
			if _, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("signed", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			if _, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{fmt.Sprint(i)}}); err != nil {
				b.Fatal(err)
			}
		}
	})
	token, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}})
	if err != nil {
		b.Fatal(err)
	}
	b.Run("validate", func(b *testing.B) {
		for b.Loop() {
			if _, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: token.GetSvids()[0].GetSvid()}); err != nil {
				b.Fatal(err)
			}
		}
	})
}
