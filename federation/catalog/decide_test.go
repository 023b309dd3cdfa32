package catalog_test

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	. "github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/federation/manifest"
	"github.com/entente-mesh/entente/internal/refusal"
)

func TestDecide(t *testing.T) {
	tables := compileYAML(t, bankingYAML)
	rogue := spiffeid.RequireFromString("spiffe://rogue.example/portfolio")
	type query struct {
		caller, peer         spiffeid.ID
		target, method, path string
		now                  time.Time
	}
	// good is a request that passes; every refusal below differs from it in one thing.
	good := query{other("/portfolio"), other("/entente/gateway/gw-dc1"), "accounts.banking.example", "GET", "/v1/balance/42", now}
	goodOwn := query{own("/notices"), spiffeid.ID{}, "accounts.banking.example", "GET", "/", now}
	goodOut := query{own("/notices"), spiffeid.ID{}, "prices.trading.example", "GET", "/", now}

	type change = func(*query)
	tests := []struct {
		name   string
		base   query
		change change
		reason refusal.Reason // "": allowed
		rule   string
	}{
		{"agreed", good, nil, "", "Agreement/trading-reads-balances"},
		{"agreed, other gateway", good, func(q *query) { q.peer = other("/entente/gateway/gw-dc2") }, "", "Agreement/trading-reads-balances"},
		{"agreed, at the callee's sidecar", good, func(q *query) { q.peer = own("/entente/gateway/gw-dc2") }, "", "Agreement/trading-reads-balances"},
		{"pattern", good, func(q *query) { q.caller = other("/orders/eu") }, "", "Agreement/trading-reads-balances"},
		{"the prefix itself", good, func(q *query) { q.path = "/v1/balance" }, "", "Agreement/trading-reads-balances"},
		{"escaped letter", good, func(q *query) { q.path = "/v1/%62alance/4%32" }, "", "Agreement/trading-reads-balances"},
		{"exact path", good, func(q *query) { q.method, q.path = "POST", "/v1/holds" }, "", "Agreement/trading-reads-balances"},
		{"Host with port, case and dot", good, func(q *query) { q.target = "Accounts.BANKING.example.:443" }, "", "Agreement/trading-reads-balances"},

		{"other caller", good, func(q *query) { q.caller = other("/market-data") }, refusal.AgreementCaller, "Agreement/trading-reads-balances"},
		{"substring of a caller", good, func(q *query) { q.caller = other("/portfolio2") }, refusal.AgreementCaller, "Agreement/trading-reads-balances"},
		{"below a caller", good, func(q *query) { q.caller = other("/portfolio/x") }, refusal.AgreementCaller, "Agreement/trading-reads-balances"},
		{"pattern needs a segment", good, func(q *query) { q.caller = other("/orders") }, refusal.AgreementCaller, "Agreement/trading-reads-balances"},
		{"pattern takes one segment", good, func(q *query) { q.caller = other("/orders/eu/1") }, refusal.AgreementCaller, "Agreement/trading-reads-balances"},
		{"a gateway is no caller", good, func(q *query) { q.caller = q.peer }, refusal.AgreementCaller, "Agreement/trading-reads-balances"},
		{"other method", good, func(q *query) { q.method = "DELETE" }, refusal.AgreementMethod, "Agreement/trading-reads-balances"},
		{"method in lower case", good, func(q *query) { q.method = "get" }, refusal.AgreementMethod, "Agreement/trading-reads-balances"},
		{"other path", good, func(q *query) { q.path = "/v1/transfers" }, refusal.AgreementMethod, "Agreement/trading-reads-balances"},
		{"prefix ends inside a segment", good, func(q *query) { q.path = "/v1/balances" }, refusal.AgreementMethod, "Agreement/trading-reads-balances"},
		{"path in another case", good, func(q *query) { q.path = "/V1/balance" }, refusal.AgreementMethod, "Agreement/trading-reads-balances"},
		{"below an exact path", good, func(q *query) { q.method, q.path = "POST", "/v1/holds/1" }, refusal.AgreementMethod, "Agreement/trading-reads-balances"},
		{"method of another rule", good, func(q *query) { q.method = "POST" }, refusal.AgreementMethod, "Agreement/trading-reads-balances"},
		{"expired", good, func(q *query) { q.now = time.Date(2027, 11, 20, 0, 0, 0, 0, time.UTC) }, refusal.AgreementExpired, "Agreement/trading-reads-balances"},
		{"the second before", good, func(q *query) { q.now = time.Date(2027, 11, 19, 23, 59, 59, 0, time.UTC) }, "", "Agreement/trading-reads-balances"},

		{"service that is not exported", good, func(q *query) { q.target = "fx.banking.example" }, refusal.UnknownService, ""},
		{"on to an import", good, func(q *query) { q.target = "prices.trading.example" }, refusal.UnknownService, ""},
		{"no such service", good, func(q *query) { q.target = "acounts.banking.example" }, refusal.UnknownService, ""},
		{"label alone", good, func(q *query) { q.target = "accounts" }, refusal.UnknownService, ""},
		{"two labels", good, func(q *query) { q.target = "x.accounts.banking.example" }, refusal.UnknownService, ""},

		{"gateway that is not listed", good, func(q *query) { q.peer = other("/entente/gateway/gw-9") }, refusal.GatewayNotAgreed, ""},
		{"caller dials the gateway itself", good, func(q *query) { q.peer = q.caller }, refusal.GatewayNotAgreed, ""},
		{"third domain's gateway", good, func(q *query) { q.peer = spiffeid.RequireFromString("spiffe://rogue.example/entente/gateway/gw-dc1") }, refusal.PeerNotAllowed, ""},
		{"third domain's caller through an agreed gateway", good, func(q *query) { q.caller = rogue }, refusal.PeerNotAllowed, ""},
		{"third domain's caller through an own gateway", good, func(q *query) { q.caller, q.peer = rogue, own("/entente/gateway/gw-dc1") }, refusal.UnknownService, ""},
		{"own caller through a foreign gateway", good, func(q *query) { q.caller = own("/notices") }, refusal.PeerNotAllowed, ""},
		{"foreign caller through an own service", good, func(q *query) { q.peer = own("/fx") }, refusal.PeerNotAllowed, ""},
		{"foreign caller from a local application", good, func(q *query) { q.peer = spiffeid.ID{} }, refusal.PeerNotAllowed, ""},
		{"no caller", good, func(q *query) { q.caller = spiffeid.ID{} }, refusal.CallerUnknown, ""},
		{"domain as caller", good, func(q *query) { q.caller = trading.ID() }, refusal.CallerUnknown, ""},

		{"own call", goodOwn, nil, "", "Service/notices"},
		{"own call over mTLS", goodOwn, func(q *query) { q.peer = q.caller }, "", "Service/notices"},
		{"own call through an own gateway", goodOwn, func(q *query) { q.peer = own("/entente/gateway/gw-dc2") }, "", "Service/notices"},
		{"calls is not restricted", goodOwn, func(q *query) { q.caller, q.target = own("/accounts"), "ledger.banking.example" }, "", "Service/accounts"},
		{"outside calls", goodOwn, func(q *query) { q.target = "fx.banking.example" }, refusal.CallerCalls, "Service/notices"},
		{"own service speaks for another", goodOwn, func(q *query) { q.peer = own("/fx") }, refusal.PeerNotAllowed, ""},
		{"unknown own caller", goodOwn, func(q *query) { q.caller = own("/ghost") }, refusal.CallerUnknown, ""},
		{"own gateway as caller", goodOwn, func(q *query) { q.caller = own("/entente/gateway/gw-dc1"); q.peer = q.caller }, refusal.CallerUnknown, ""},
		{"agent as caller", goodOwn, func(q *query) { q.caller = own("/entente/agent/h1"); q.peer = q.caller }, refusal.CallerUnknown, ""},
		{"undeclared gateway speaks for another", goodOwn, func(q *query) { q.peer = own("/entente/gateway/gw-9") }, refusal.PeerNotAllowed, ""},
		{"unknown Host", goodOwn, func(q *query) { q.target = "www.example.com" }, refusal.UnknownService, ""},

		{"import", goodOut, nil, "", "Agreement/trading-reads-balances"},
		{"import, caller is not in the agreement", goodOut, func(q *query) { q.caller = own("/ledger") }, refusal.AgreementCaller, "Agreement/trading-reads-balances"},
		{"import, agreed but outside calls", goodOut, func(q *query) { q.target = "fx.banking.example" }, refusal.CallerCalls, "Service/notices"},
		{"not imported", goodOut, func(q *query) { q.caller, q.target = own("/fx"), "orders.trading.example" }, refusal.NotImported, ""},

		{"no method", good, func(q *query) { q.method = "" }, refusal.BadRequest, ""},
		{"method with a space", good, func(q *query) { q.method = "GET /x" }, refusal.BadRequest, ""},
		{"no path", good, func(q *query) { q.path = "" }, refusal.BadRequest, ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			q := test.base
			if test.change != nil {
				test.change(&q)
			}
			query := Query{Caller: q.caller, Peer: q.peer, Target: q.target, Method: q.method, Path: q.path, Now: q.now}
			d := tables.Decide(query)
			if d.Allowed != (test.reason == "") || d.Reason != test.reason || d.Rule != test.rule {
				t.Errorf("got %+v\nwant reason %q, rule %q", d, test.reason, test.rule)
			}
			if (d.Rule != "") != (d.Revision != 0) || (d.Rule != "") != (d.Source != "") || d.Allowed == (d.Detail != "") {
				t.Errorf("revision, source or detail do not go with it: %+v", d)
			}
			if !d.Allowed && !d.Reason.Known() {
				t.Errorf("reason %q is not in the table", d.Reason)
			}
			e := tables.Explain(query)
			if e.Decision != d {
				t.Errorf("Explain says otherwise:\n%+v\n%+v", e.Decision, d)
			}
			if len(e.Steps) == 0 {
				t.Error("Explain gives no step")
			}
		})
	}
}

// A TCP service is called without method and path, by a rule that lists none; neither
// protocol passes for the other.
func TestDecideTCP(t *testing.T) {
	text := strings.Replace(bankingYAML, "port: 8080\n  health: {http: /healthz}", "port: 5432\n  protocol: tcp", 1)
	from, to := strings.Index(text, "    service: accounts\n    http:"), strings.Index(text, "  - callers: [notices")
	if from < 0 || to < from {
		t.Fatal("the catalogue of the tests is another one")
	}
	tables := compileYAML(t, text[:from]+"    service: accounts\n"+text[to:])
	if target, ok := tables.Resolve("accounts.banking.example"); !ok || !target.TCP || target.Port != 5432 {
		t.Errorf("%+v", target)
	}
	gateway := other("/entente/gateway/gw-dc1")
	for _, test := range []struct {
		name   string
		q      Query
		reason refusal.Reason
	}{
		{"agreed", Query{Caller: other("/portfolio"), Peer: gateway, TCP: true}, ""},
		{"own", Query{Caller: own("/notices"), TCP: true}, ""},
		{"other caller", Query{Caller: other("/market-data"), Peer: gateway, TCP: true}, refusal.AgreementCaller},
		{"other gateway", Query{Caller: other("/portfolio"), Peer: other("/entente/gateway/gw-9"), TCP: true}, refusal.GatewayNotAgreed},
		{"HTTP, agreed", Query{Caller: other("/portfolio"), Peer: gateway, Method: "GET", Path: "/"}, refusal.Protocol},
		{"HTTP, own", Query{Caller: own("/notices"), Method: "GET", Path: "/"}, refusal.Protocol},
		{"outside calls", Query{Caller: own("/notices"), Target: "fx.banking.example", TCP: true}, refusal.CallerCalls},
		{"TCP to an HTTP service", Query{Caller: own("/accounts"), Target: "fx.banking.example", TCP: true}, refusal.Protocol},
		{"TCP to an HTTP import", Query{Caller: own("/notices"), Target: "prices.trading.example", TCP: true}, refusal.Protocol},
		{"control", Query{Caller: own("/notices"), Target: "prices.trading.example", Method: "GET", Path: "/"}, ""},
	} {
		test.q.Now = now
		if test.q.Target == "" {
			test.q.Target = "accounts.banking.example"
		}
		d := tables.Explain(test.q)
		if d.Reason != test.reason || d.Allowed != (test.reason == "") || len(d.Steps) == 0 {
			t.Errorf("%s: %+v", test.name, d)
		}
	}
}

// Content on a method that usually has none reaches only an own service that takes it.
func TestDecideContent(t *testing.T) {
	takes := strings.Replace(bankingYAML, "port: 8080\n  health: {http: /healthz}", "port: 8080\n  http: {content: any}\n  health: {http: /healthz}", 1)
	gateway := other("/entente/gateway/gw-dc1")
	for _, test := range []struct {
		name          string
		q             Query
		closed, taken refusal.Reason
	}{
		{"control: another domain's GET", Query{Caller: other("/portfolio"), Peer: gateway, Method: "GET", Path: "/v1/balance/1"}, "", ""},
		{"another domain's GET", Query{Caller: other("/portfolio"), Peer: gateway, Method: "GET", Path: "/v1/balance/1", Content: true}, refusal.Content, ""},
		{"another domain's, not agreed", Query{Caller: other("/market-data"), Peer: gateway, Method: "GET", Path: "/v1/balance/1", Content: true}, refusal.AgreementCaller, refusal.AgreementCaller},
		{"own GET", Query{Caller: own("/notices"), Method: "GET", Path: "/", Content: true}, refusal.Content, ""},
		{"own HEAD", Query{Caller: own("/notices"), Method: "HEAD", Path: "/", Content: true}, refusal.Content, ""},
		{"own OPTIONS", Query{Caller: own("/notices"), Method: "OPTIONS", Path: "/", Content: true}, refusal.Content, ""},
		{"own DELETE", Query{Caller: own("/notices"), Method: "DELETE", Path: "/", Content: true}, refusal.Content, ""},
		{"own TRACE", Query{Caller: own("/notices"), Method: "TRACE", Path: "/", Content: true}, refusal.Content, ""},
		{"own get", Query{Caller: own("/notices"), Method: "get", Path: "/", Content: true}, refusal.Content, ""},
		{"control: own DELETE", Query{Caller: own("/notices"), Method: "DELETE", Path: "/"}, "", ""},
		{"own POST", Query{Caller: own("/notices"), Method: "POST", Path: "/", Content: true}, "", ""},
		{"own QUERY", Query{Caller: own("/notices"), Method: "QUERY", Path: "/", Content: true}, "", ""},
		{"an import: its own domain decides", Query{Caller: own("/notices"), Target: "prices.trading.example", Method: "GET", Path: "/", Content: true}, "", ""},
	} {
		test.q.Now = now
		if test.q.Target == "" {
			test.q.Target = "accounts.banking.example"
		}
		for text, reason := range map[string]refusal.Reason{bankingYAML: test.closed, takes: test.taken} {
			if d := compileYAML(t, text).Explain(test.q); d.Reason != reason || d.Allowed != (reason == "") {
				t.Errorf("%s, taken %v: %+v", test.name, text == takes, d)
			}
		}
	}
}

// What could be read in two ways is refused before any rule is looked at, at the
// same place where the plain form passes.
func TestDecideRefusesAmbiguousPaths(t *testing.T) {
	tables := compileYAML(t, bankingYAML)
	ask := func(path string) Decision {
		return tables.Decide(Query{other("/portfolio"), "accounts.banking.example", "GET", path, own("/entente/gateway/gw-dc1"), now, false, false})
	}
	for _, path := range []string{"/v1/balance", "/v1/balance/", "/v1/balance/42", "/v1/balance/a..b", "/v1/balance/..a", "/v1/balance/...", "/v1/balance/a%20b", "/v1/balance/%C3%A9", "/v1/balance/100%25", "/v1/balance/a;v=1"} {
		if d := ask(path); !d.Allowed {
			t.Errorf("%q: %+v, want it to pass", path, d)
		}
	}
	for _, path := range []string{
		"v1/balance", "*", "http://accounts.banking.example/v1/balance", "/v1/balance/../admin", "/v1/balance/..", "/v1/./balance", "/..", "/.",
		"//v1/balance", "/v1//balance", "/v1/balance//", "/v1/balance/%2e%2e/admin", "/v1/balance/.%2E/admin", "/v1/balance/%2e", "/v1/balance%2fx", "/v1%2Fbalance",
		"/v1/balance/%00", "/v1/balance/%0d%0aX: y", "/v1/balance/%7f", "/v1/balance\\..\\admin", "/v1/balance/%5c..", "/v1/balance/..;/admin", "/v1/balance/..;x=1/admin", "/v1/balance/.;/x",
		"/v1/balance/%252e%252e/admin", "/v1/balance/%252Fx", "/v1/balance/%2525252e", "/v1/balance/%", "/v1/balance/%2", "/v1/balance/%zz", "/v1/balance/%c0%af", "/v1/balance/%ff",
		"/v1/balance?x=1", "/v1/balance#x", "/v1/balance/a b", "/v1/balance/\x00", "/v1/balance/\xc3\xa9", "/v1/balance/" + strings.Repeat("a", MaxPath),
	} {
		if d := ask(path); d.Allowed || d.Reason != refusal.BadRequest {
			t.Errorf("%q: %+v, want bad-request", path, d)
		}
	}
}

// An agreement with one gateway does not lend it to another agreement.
func TestGatewayCountsForItsAgreementOnly(t *testing.T) {
	tables := compileYAML(t, bankingYAML+`---
apiVersion: entente/v1
kind: Agreement
metadata: {name: second}
spec:
  peer: trading.example
  expires: 2027-11-20
  gateways: [{id: "spiffe://trading.example/entente/gateway/gw-3", datacenter: dc1, address: "10.1.0.3:7443"}]
  allow: [{callers: [desk], service: accounts}]
`)
	ask := func(caller, gateway string) Decision {
		return tables.Decide(Query{other(caller), "accounts.banking.example", "GET", "/v1/balance", other("/entente/gateway/" + gateway), now, false, false})
	}
	for _, good := range [][2]string{{"/desk", "gw-3"}, {"/portfolio", "gw-dc1"}} {
		if d := ask(good[0], good[1]); !d.Allowed {
			t.Errorf("%v: %+v", good, d)
		}
	}
	for _, bad := range [][2]string{{"/desk", "gw-dc1"}, {"/portfolio", "gw-3"}} {
		if d := ask(bad[0], bad[1]); d.Reason != refusal.GatewayNotAgreed || d.Rule == "" {
			t.Errorf("%v: %+v, want gateway-not-agreed with the rule that came nearest", bad, d)
		}
	}
}

func TestTakingAwayBitesAtOnce(t *testing.T) {
	ask := func(tables *Tables) Decision {
		return tables.Decide(Query{other("/portfolio"), "accounts.banking.example", "GET", "/v1/balance", other("/entente/gateway/gw-dc1"), now, false, false})
	}
	if d := ask(compileYAML(t, bankingYAML)); !d.Allowed {
		t.Fatalf("%+v", d)
	}
	without := func(keep func(*statev1.Object) bool) *Tables {
		tables, err := Compile(banking, slices.DeleteFunc(parseYAML(t, bankingYAML), func(o *statev1.Object) bool { return !keep(o) }))
		if err != nil {
			t.Fatal(err)
		}
		return tables
	}
	noRelation := without(func(o *statev1.Object) bool { return o.GetRelationship() == nil })
	if d := ask(noRelation); d.Reason != refusal.GatewayNotAgreed {
		t.Errorf("without the relationship: %+v", d)
	}
	if noRelation.IsPeerGateway(other("/entente/gateway/gw-dc1")) {
		t.Error("without the relationship its gateways still complete connections")
	}
	d := noRelation.Decide(Query{other("/portfolio"), "accounts.banking.example", "GET", "/v1/balance", own("/entente/gateway/gw-dc1"), now, false, false})
	if d.Reason != refusal.AgreementMissing {
		t.Errorf("without the relationship, at the callee: %+v", d)
	}
	noAgreement := without(func(o *statev1.Object) bool { return o.GetAgreement() == nil })
	if d := ask(noAgreement); d.Reason != refusal.GatewayNotAgreed {
		t.Errorf("without the agreement: %+v", d)
	}
	d = noAgreement.Decide(Query{own("/notices"), "prices.trading.example", "GET", "/", spiffeid.ID{}, now, false, false})
	if d.Reason != refusal.AgreementMissing {
		t.Errorf("without the agreement, outbound: %+v", d)
	}
}

// genQuery draws requests that come near the rules of bankingYAML.
func genQuery() *rapid.Generator[Query] {
	ids := []spiffeid.ID{
		{}, other("/portfolio"), other("/orders/eu"), other("/orders"), other("/market-data"), other("/entente/gateway/gw-dc1"), other("/entente/gateway/gw-dc2"),
		own("/accounts"), own("/fx"), own("/notices"), own("/ghost"), own("/entente/gateway/gw-dc1"), own("/entente/agent/h1"),
		spiffeid.RequireFromString("spiffe://rogue.example/portfolio"),
	}
	return rapid.Custom(func(t *rapid.T) Query {
		return Query{
			Caller: rapid.SampledFrom(ids).Draw(t, "caller"),
			Peer:   rapid.SampledFrom(ids).Draw(t, "peer"),
			Target: rapid.SampledFrom([]string{"accounts.banking.example", "fx.banking.example", "notices.banking.example", "prices.trading.example", "orders.trading.example", "nothing"}).Draw(t, "target"),
			Method: rapid.SampledFrom([]string{"GET", "POST", "HEAD", "get"}).Draw(t, "method"),
			Path:   rapid.SampledFrom([]string{"/", "/v1/balance", "/v1/balance/4", "/v1/balances", "/v1/holds", "/v1/holds/1", "/v1/../x"}).Draw(t, "path"),
			Now:    time.Unix(now.Unix()+rapid.SampledFrom([]int64{0, 400 * 24 * 3600}).Draw(t, "days"), 0),
		}
	})
}

// narrow takes something away from the agreements; false: nothing was left to take.
func narrow(t *rapid.T, objects []*statev1.Object) {
	var agreements []*statev1.Agreement
	for _, o := range objects {
		if a := o.GetAgreement(); a != nil {
			agreements = append(agreements, a)
		}
	}
	a := rapid.SampledFrom(agreements).Draw(t, "agreement")
	remove := func(what string, n int) int { return rapid.IntRange(0, n-1).Draw(t, what) }
	switch rapid.IntRange(0, 6).Draw(t, "narrow") {
	case 0:
		if n := len(a.Gateways); n > 0 {
			i := remove("gateway", n)
			a.Gateways = slices.Delete(a.Gateways, i, i+1)
		}
	case 1:
		if n := len(a.Allow); n > 0 {
			i := remove("allow", n)
			a.Allow = slices.Delete(a.Allow, i, i+1)
		}
	case 2:
		a.Expires = now.Unix() - 1
	default:
		if len(a.Allow) == 0 {
			return
		}
		allow := a.Allow[remove("in", len(a.Allow))]
		switch rapid.IntRange(0, 3).Draw(t, "part") {
		case 0:
			if n := len(allow.Callers); n > 1 {
				i := remove("caller", n)
				allow.Callers = slices.Delete(allow.Callers, i, i+1)
			}
		case 1:
			if n := len(allow.Http); n > 1 {
				i := remove("http", n)
				allow.Http = slices.Delete(allow.Http, i, i+1)
			} else if n == 0 {
				allow.Http = []*statev1.HTTPMatch{{Methods: []string{"GET"}}}
			}
		case 2:
			if len(allow.Http) > 0 {
				h := allow.Http[remove("rule", len(allow.Http))]
				if len(h.Methods) > 1 {
					h.Methods = h.Methods[1:]
				}
			}
		case 3:
			if len(allow.Http) > 0 {
				h := allow.Http[remove("rule", len(allow.Http))]
				if h.Path != "" {
					h.PathType = statev1.PathType_PATH_TYPE_EXACT
				}
			}
		}
	}
}

func TestNarrowingNeverAllowsMore(t *testing.T) {
	base := parseYAML(t, bankingYAML)
	wide, err := Compile(banking, base)
	if err != nil {
		t.Fatal(err)
	}
	allowed := 0
	rapid.Check(t, func(t *rapid.T) {
		objects := make([]*statev1.Object, len(base))
		for i, o := range base {
			objects[i] = proto.CloneOf(o)
		}
		for range rapid.IntRange(1, 4).Draw(t, "steps") {
			narrow(t, objects)
		}
		tables, err := Compile(banking, objects)
		if err != nil {
			t.Fatalf("narrowing was refused: %v", err)
		}
		for range 20 {
			q := genQuery().Draw(t, "query")
			if tables.Decide(q).Allowed {
				allowed++
				if !wide.Decide(q).Allowed {
					t.Fatalf("allowed only when narrowed: %+v", q)
				}
			}
		}
	})
	if allowed == 0 {
		t.Error("nothing was allowed at all: the property says nothing")
	}
}

// The same objects in any order, compiled anew, decide alike; Explain agrees.
func TestDecideIsDeterministic(t *testing.T) {
	base := parseYAML(t, bankingYAML)
	first, err := Compile(banking, base)
	if err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(t *rapid.T) {
		shuffled := slices.Clone(base)
		random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		random.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		tables, err := Compile(banking, shuffled)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(first, tables) {
			t.Fatal("the tables depend on the order of the objects")
		}
		q := genQuery().Draw(t, "query")
		d := first.Decide(q)
		if d != tables.Decide(q) || d != first.Explain(q).Decision {
			t.Fatalf("%+v is not decided alike", q)
		}
	})
}

func TestExplainShowsEveryRule(t *testing.T) {
	tables := compileYAML(t, bankingYAML+`---
apiVersion: entente/v1
kind: Agreement
metadata: {name: second}
spec:
  peer: trading.example
  expires: 2026-01-01
  allow: [{callers: [market-data], service: accounts}]
`)
	e := tables.Explain(Query{other("/market-data"), "accounts.banking.example", "GET", "/v1/balance", own("/entente/gateway/gw-dc1"), now, false, false})
	if e.Reason != refusal.AgreementExpired || e.Rule != "Agreement/second" || len(e.Steps) != 2 {
		t.Errorf("the rule that came nearest is not the one reported: %+v", e)
	}
	if e.Steps[1].Rule != "Agreement/trading-reads-balances" && e.Steps[0].Rule != "Agreement/trading-reads-balances" {
		t.Errorf("a rule is missing: %+v", e.Steps)
	}
}

func FuzzDecidePath(f *testing.F) {
	tables := compileYAML(f, bankingYAML)
	for _, seed := range []string{"/v1/balance/42", "/v1/balance/%2e%2e/x", "/v1//", "/%", "/v1/%62alance", "*", "/..;/", "/%252e"} {
		f.Add("GET", seed)
	}
	f.Fuzz(func(t *testing.T, method, path string) {
		q := Query{other("/portfolio"), "accounts.banking.example", method, path, own("/entente/gateway/gw-dc1"), now, false, false}
		d := tables.Decide(q)
		if !d.Allowed {
			return
		}
		// However an application decodes and cleans it, it stays where the rule put it.
		for range 3 {
			decoded, ok := lenientUnescape(path)
			if !ok {
				break
			}
			path = decoded
		}
		for segment := range strings.SplitSeq(path, "/") {
			name, _, _ := strings.Cut(segment, ";")
			if name == "." || name == ".." {
				t.Fatalf("allowed, and leads elsewhere: %q", q.Path)
			}
		}
		if method != "GET" && method != "HEAD" && method != "POST" || strings.ContainsAny(path, "\\\x00\r\n") || strings.Contains(path, "//") {
			t.Fatalf("allowed: %q %q", method, q.Path)
		}
		if !strings.HasPrefix(path, "/v1/balance") && path != "/v1/holds" {
			t.Fatalf("allowed: %q", q.Path)
		}
	})
}

// lenientUnescape is a careless application: it decodes what it can, for as long as
// there is something.
func lenientUnescape(s string) (string, bool) {
	if !strings.Contains(s, "%") {
		return s, false
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '%' && i+2 < len(s) {
			high, ok1 := Unhex(s[i+1])
			low, ok2 := Unhex(s[i+2])
			if ok1 && ok2 {
				b.WriteByte(high<<4 | low)
				i += 2
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String(), true
}

func TestDecideDoesNotAllocate(t *testing.T) {
	tables := compileYAML(t, bankingYAML)
	for name, q := range benchQueries() {
		if n := testing.AllocsPerRun(100, func() {
			if !tables.Decide(q).Allowed {
				t.Fatal("refused")
			}
		}); n > 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func benchQueries() map[string]Query {
	return map[string]Query{
		"in-domain": {own("/notices"), "accounts.banking.example", "GET", "/v1/balance/42", spiffeid.ID{}, now, false, false},
		"import":    {own("/notices"), "prices.trading.example", "GET", "/v1/quotes/ACME", own("/notices"), now, false, false},
		"export":    {other("/portfolio"), "accounts.banking.example", "GET", "/v1/balance/42", other("/entente/gateway/gw-dc1"), now, false, false},
	}
}

func BenchmarkDecide(b *testing.B) {
	tables := compileYAML(b, bankingYAML)
	for name, q := range benchQueries() {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if !tables.Decide(q).Allowed {
					b.Fatal("refused")
				}
			}
		})
	}
}

func ExampleTables_Explain() {
	objects, _ := manifest.Parse("banking.yaml", strings.NewReader(bankingYAML), nil)
	tables, _ := Compile(banking, objects)
	e := tables.Explain(Query{
		Caller: other("/cart"),
		Target: "accounts.banking.example",
		Method: "GET",
		Path:   "/v1/balance/42",
		Peer:   other("/entente/gateway/gw-dc1"),
		Now:    now,
	})
	fmt.Println(e.Reason)
	for _, step := range e.Steps {
		fmt.Println(step.Rule, step.Source, step.Why)
	}
	// Output:
	// agreement-caller
	// Agreement/trading-reads-balances banking.yaml:50 callers does not list the caller
}
