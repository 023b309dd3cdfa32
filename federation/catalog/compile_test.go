package catalog_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/selector"
	. "github.com/entente-mesh/entente/federation/catalog"
)

func TestCompileRefuses(t *testing.T) {
	// Positive control: what every case below departs from.
	if findings := compileYAML(t, bankingYAML, Datacenters("dc1", "dc2")).Findings(); len(findings) > 0 {
		t.Fatalf("the good catalogue has findings: %v", findings)
	}
	service := func(name, spec string) string {
		return "---\napiVersion: entente/v1\nkind: Service\nmetadata: {name: " + name + "}\nspec: {" + spec + "}\n"
	}
	const run = "run: {uid: 1, hosts: [h1]}"
	tests := []struct {
		name     string
		old, new string // old == "": new is appended
		want     string
	}{
		{"twice", "", service("fx", run), `banking.yaml:68: Service/fx: it is declared twice, first at banking.yaml:26`},
		{"reserved", "", service("entente", run), `the name "entente" is reserved`},
		{"reserved path", "", service("x", run+", path: /entente/agent/h1"), "SPIFFE paths under /entente/ are reserved"},
		{"path of another", "", service("x", run+", path: /fx"), "has the same SPIFFE path /fx"},
		{"bad path", "", service("x", run+", path: /a//b"), `SPIFFE path "/a//b" is not valid`},
		{"bad name", "", service("Accounts", run), `Service/Accounts: name "Accounts" may hold only a-z`},
		{"dotted name", "", service("a.b", run), `may hold only a-z`},
		{"health without port", "", service("x", run+", health: {http: /healthz}"), "it has a health check and no port"},
		{"bad health", "", service("x", run+", port: 1, health: {http: /../x}"), `health.http "/../x"`},
		{"TCP without a port", "", service("x", run+", protocol: tcp"), "it speaks TCP and has no port"},
		{"TCP with a health check of HTTP", "", service("x", run+", port: 1, protocol: tcp, health: {http: /healthz}"), "it speaks TCP, and its health check does not"},
		{"TCP with http", "", service("x", run+", port: 1, protocol: tcp, http: {content: any}"), "its http section is for a service that serves HTTP"},
		{"no port with http", "", service("x", run+", http: {readsBodies: true}"), "its http section is for a service that serves HTTP"},
		{"TCP with methods", "port: 8080\n  health: {http: /healthz}", "port: 8080\n  protocol: tcp", "accounts.banking.example speaks TCP, which has no methods and paths"},
		{"imported TCP without a port", "prices.trading.example}\n---", "prices.trading.example, protocol: tcp}\n---", "it speaks TCP and has no port"},
		{"outbound port is taken", "", service("x", run+", outbound: {port: 19001}"), "outbound.port 19001 is taken on host h1 by Service/notices"},
		{"manual without order", "", service("x", run+", failover: {mode: manual}"), "failover is manual and has no order"},
		{"order with a doublet", "", service("x", run+", failover: {order: [dc1, dc1]}"), `failover.order lists "dc1" twice`},
		{"unknown datacenter", "", service("x", run+", failover: {order: [dcl]}"), `failover.order: there is no datacenter "dcl"; did you mean "dc1"?`},
		{"ttl", "", service("x", run+", ttl: {x509: 1s}"), "ttl.x509 of 1 s is outside 2 s"},
		{"ttl of JWT", "", service("x", run+", ttl: {jwt: 2h}"), "ttl.jwt of 7200 s is outside 2 s to 3600 s"},
		{"ttl of WIT", "", service("x", run+", ttl: {wit: 25h}"), "ttl.wit of 90000 s is outside 2 s to 86400 s"},
		{"hint", "", service("x", run+", hint: \"a\\nb\""), "the hint is not text"},
		{"relative program", "", service("x", "run: {uid: 1, path: opt/x, hosts: [h1]}"), "not a clean absolute path"},
		{"program above", "", service("x", "run: {uid: 1, path: /opt/../x, hosts: [h1]}"), "not a clean absolute path"},
		{"sha256", "", service("x", "run: {sha256: abc, hosts: [h1]}"), "not 64 lower-case hexadecimal digits"},
		{"host twice", "", service("x", "run: {uid: 1, hosts: [h1, h1]}"), `host "h1" is listed twice`},
		{"calls nobody", "calls: [accounts, ", "calls: [acounts, ", `calls lists "acounts", which is neither a Service nor an Import; did you mean "accounts"?`},
		{"exported to itself", "export: {to: [trading.example]}", "export: {to: [banking.example, trading.example]}", "export.to names this domain itself"},
		{"exported without a port", "", service("x", run+", export: {to: [trading.example]}"), "listens on no port"},

		{"gateway without datacenter", "datacenter: dc1, address: \"10.1.0.1:7443\"", "datacenter: DC1, address: \"10.1.0.1:7443\"", `datacenter "DC1" may hold only`},
		{"gateway address", "10.1.0.1:7443", "10.1.0.1", `address "10.1.0.1" is not host:port`},
		{"gateway port", "10.1.0.1:7443", "10.1.0.1:0", "the port is outside 1 to 65535"},
		{"gateway nowhere", "10.1.0.1:7443", "0.0.0.0:7443", "cannot be dialled"},
		{"gateway address is taken", "10.2.0.1:7443", "10.1.0.1:7443", "has the same address"},

		{"import of an own service", "service: prices.trading.example}", "service: fx.banking.example}", "Import/fx.banking.example: service names this domain itself"},
		{"import of a label", "", "---\napiVersion: entente/v1\nkind: Import\nspec: {service: prices}\n", `service "prices" is not a service name`},

		{"relationship with itself", "", "---\napiVersion: entente/v1\nkind: Relationship\nmetadata: {name: banking.example}\nspec: {endpoint: {urls: [\"https://10.1.0.1/\"]}}\n", "metadata.name names this domain itself"},
		{"plain http", "https://10.1.0.9:8444/bundle", "http://10.1.0.9:8444/bundle", "is not an https URL"},
		{"endpoint on loopback", "https://10.1.0.9:8444/bundle", "https://127.0.0.1:8444/bundle", "127.0.0.1 is a loopback address, which a peer domain may not name"},
		{"endpoint on localhost", "https://10.1.0.9:8444/bundle", "https://localhost:8444/bundle", "is this host itself"},

		{"agreement with itself", "peer: trading.example\n  expires: 2027-11-20\n  gateways:\n  - {id: \"spiffe://trading.example/entente/gateway/gw-dc1\", datacenter: dc1, address: \"10.1.0.2:7443\"}\n  - {id: \"spiffe://trading.example/entente/gateway/gw-dc2\"", "peer: banking.example\n  expires: 2027-11-20\n  gateways:\n  - {id: \"spiffe://banking.example/entente/gateway/gw-dc1\", datacenter: dc1, address: \"10.1.0.2:7443\"}\n  - {id: \"spiffe://banking.example/entente/gateway/gw-dc2\"", "peer names this domain itself"},
		{"service nobody has", "service: accounts\n", "service: acounts\n", `banking.yaml:50: Agreement/trading-reads-balances: allow[0]: service "acounts" is not a Service of this domain; did you mean "accounts"?`},
		{"service nobody exports", "service: accounts\n", "service: fx\n", `service "fx" is not exported to trading.example; add trading.example to export.to of Service/fx`},
		{"service that is not imported", "kind: Import\nspec: {service: prices.trading.example}", "kind: Import\nspec: {service: quotes.trading.example}", `service "prices.trading.example" is not imported; declare kind: Import`},
		{"own service by its full name", "service: accounts\n", "service: accounts.banking.example\n", `write "accounts"`},
		{"service of a third domain", "service: accounts\n", "service: accounts.third.example\n", `is not of peer trading.example`},
		{"method in lower case", "methods: [POST]", "methods: [post]", `method "post": methods are compared case-sensitively; write "POST"`},
		{"rule path is not clean", "value: /v1/balance", "value: /v1/../balance", `path "/v1/../balance": the path holds`},
		{"rule path with escapes", "value: /v1/balance", "value: /v1/%62alance", "without escapes"},
		{"peer gateway on loopback", "10.1.0.2:7443", "127.1.0.2:7443", "127.1.0.2 is a loopback address"},
		{"peer gateway on loopback, IPv6", "10.1.0.2:7443", "[::ffff:127.0.0.1]:7443", "is a loopback address"},
		{"peer gateway on the metadata address", "10.1.0.2:7443", "169.254.169.254:80", "is a link-local address"},
		{"peer gateway as a number", "10.1.0.2:7443", "2130706433:80", "neither an IP address nor a DNS name"},
		{"peer gateway with few dots", "10.1.0.2:7443", "127.1:80", "neither an IP address nor a DNS name"},
		{"peer gateway on localhost", "10.1.0.2:7443", "LOCALHOST.:7443", "is this host itself"},
		{"peer gateway twice", "gw-dc2\", datacenter: dc2, address: \"10.2.0.2:7443\"", "gw-dc1\", datacenter: dc1, address: \"10.1.0.2:7443\"", "gateways[1] is listed twice"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			text := bankingYAML + test.new
			if test.old != "" {
				text = with(t, bankingYAML, test.old, test.new)
			}
			_, err := Compile(banking, parseYAML(t, text), Datacenters("dc1", "dc2"))
			var findings *Error
			if !errors.As(err, &findings) || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("got:  %v\nwant: %s", err, test.want)
			}
			for _, f := range findings.Findings {
				if f.Source == "" || f.Object == "" || f.Severity != Fail {
					t.Errorf("finding without place or object: %+v", f)
				}
			}
		})
	}
}

func TestCompileRefusesRecords(t *testing.T) {
	service := func(change func(*statev1.Service)) *statev1.Object {
		s := &statev1.Service{Name: "x", Path: "/x", Hosts: []string{"h1"}, Selectors: []string{"unix:uid:1"}}
		change(s)
		return &statev1.Object{Kind: &statev1.Object_Service{Service: s}}
	}
	if _, err := Compile(banking, []*statev1.Object{service(func(*statev1.Service) {})}); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		object *statev1.Object
		want   string
	}{
		{nil, "no known kind"},
		{&statev1.Object{}, "no known kind"},
		{service(func(s *statev1.Service) { s.Path = "" }), "its SPIFFE path is missing"},
		{service(func(s *statev1.Service) { s.Hosts = nil }), "no host is listed"},
		{service(func(s *statev1.Service) { s.Selectors = nil }), "nothing says by what"},
		{service(func(s *statev1.Service) { s.Selectors = []string{"unix:path:/x"} }), "stands alone"},
		{service(func(s *statev1.Service) { s.Selectors = []string{"k8s:ns:x"} }), "is not understood"},
		{service(func(s *statev1.Service) { s.Selectors = []string{"unix:uid:-1"} }), "not a number"},
		{service(func(s *statev1.Service) { s.Selectors = []string{"unix:uid:4294967295"} }), "not a number"},
		{service(func(s *statev1.Service) { s.Port = 65536 }), "outside 1 to 65535"},
		{service(func(s *statev1.Service) { s.Failover = &statev1.Failover{Mode: 9} }), "unknown mode 9"},
		{&statev1.Object{Kind: &statev1.Object_Agreement{Agreement: &statev1.Agreement{Name: "a", Peer: "trading.example"}}}, "does not say when it expires"},
		{&statev1.Object{Kind: &statev1.Object_Agreement{Agreement: &statev1.Agreement{Name: "a", Peer: "trading.example", Expires: 1, Allow: []*statev1.Allow{{Service: "x", Callers: []string{"entente/**"}}}}}}, "never callers"},
		{&statev1.Object{Kind: &statev1.Object_Relationship{Relationship: &statev1.Relationship{TrustDomain: "trading.example", EndpointId: "spiffe://trading.example/x"}}}, "no bundle to verify it with"},
		{&statev1.Object{Kind: &statev1.Object_Relationship{Relationship: &statev1.Relationship{TrustDomain: "trading.example", EndpointId: "spiffe://rogue.example/x", BootstrapBundle: []byte("{}")}}}, "is not in trust domain trading.example"},
		{&statev1.Object{Kind: &statev1.Object_Relationship{Relationship: &statev1.Relationship{TrustDomain: "spiffe://trading.example"}}}, "is not a trust domain name"},
	}
	for _, test := range tests {
		if _, err := Compile(banking, []*statev1.Object{test.object}); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%v\ngot:  %v\nwant: %s", test.object, err, test.want)
		}
	}
}

func TestCompileTellsAllAtOnce(t *testing.T) {
	text := with(t, bankingYAML, "service: accounts\n", "service: acounts\n")
	text = with(t, text, "10.1.0.1:7443", "10.1.0.1")
	_, err := Compile(banking, parseYAML(t, text))
	var findings *Error
	if !errors.As(err, &findings) || len(findings.Findings) != 2 || findings.Findings[0].Object != "Gateway/gw-dc1" {
		t.Errorf("want both, in the order of their lines:\n%v", err)
	}
}

func TestWarnings(t *testing.T) {
	tests := []struct {
		name     string
		old, new string
		want     string
	}{
		{"exported to a stranger", "export: {to: [trading.example]}", "export: {to: [trading.example, tradin.example]}", `Service/accounts: it is exported to tradin.example, with which there is no Relationship: nobody sees it; did you mean "trading.example"?`},
		{"import that no agreement lists", "", "---\napiVersion: entente/v1\nkind: Import\nspec: {service: orders.trading.example}\n", "Import/orders.trading.example: no agreement lists it"},
		{"import from a stranger", "", "---\napiVersion: entente/v1\nkind: Import\nspec: {service: a.third.example}\n", "no Relationship with third.example"},
		{"overlapping patterns", `[portfolio, "orders/*"]`, `[portfolio, "orders/*", "orders/**"]`, `"orders/**" overlaps "orders/*"`},
		{"caller nobody is", "callers: [notices, fx]", "callers: [notice, fx]", `no Service of this domain is meant by "notice"; did you mean "notices"?`},
		{"order without a gateway", "order: [dc1, dc2], hold: 10s", "order: [dc1, dc3], hold: 10s", "failover.order lists dc3, where no gateway stands"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			text := bankingYAML + test.new
			if test.old != "" {
				text = with(t, bankingYAML, test.old, test.new)
			}
			findings := compileYAML(t, text).Findings()
			if !strings.Contains(fmt.Sprint(findings), test.want) {
				t.Errorf("got:  %v\nwant: %s", findings, test.want)
			}
		})
	}
}

func TestLoopbackIsForDevelopment(t *testing.T) {
	text := with(t, bankingYAML, "10.1.0.2:7443", "127.1.0.2:7443")
	tables := compileYAML(t, text, AllowLoopback(true))
	if err := tables.CheckForeignDial("127.9.9.9:443"); err != nil {
		t.Error(err)
	}
	if err := tables.CheckForeignDial("169.254.169.254:443"); err == nil {
		t.Error("link-local passes as well")
	}
	if err := compileYAML(t, bankingYAML).CheckForeignDial("127.9.9.9:443"); err == nil {
		t.Error("loopback passes without dev")
	}
	for _, bad := range []string{"169.254.169.254:80", "0.0.0.0:80", "[fe80::1]:80"} {
		if _, err := Compile(banking, parseYAML(t, with(t, bankingYAML, "10.1.0.2:7443", bad)), AllowLoopback(true)); err == nil {
			t.Errorf("dev lets %s pass as well", bad)
		}
	}
}

func TestResolve(t *testing.T) {
	tables := compileYAML(t, bankingYAML)
	for _, host := range []string{"accounts.banking.example", "accounts.banking.example:80", "accounts.banking.example.", "ACCOUNTS.Banking.Example", "accounts.banking.example.:65535"} {
		target, ok := tables.Resolve(host)
		if !ok || target.Name != "accounts.banking.example" || target.Import() || target.Service.Label != "accounts" || target.TrustDomain != banking {
			t.Errorf("%q: %+v %v", host, target, ok)
		}
	}
	if target, ok := tables.Resolve("prices.trading.example:443"); !ok || !target.Import() || target.TrustDomain != trading {
		t.Errorf("import: %+v %v", target, ok)
	}
	for _, host := range []string{
		"", ".", "accounts", "banking.example", ".banking.example", "x.accounts.banking.example", "accounts.banking.example..", "accounts.banking.example:", "accounts.banking.example:x",
		"accounts.banking.example:123456", "accounts.banking.example:80:80", "accounts.banking.example:-1", " accounts.banking.example", "accounts.banking.example/", "user@accounts.banking.example",
		"[accounts.banking.example]", "[::1]:80", "127.0.0.1", "accounts.trading.example", "accounts.ban\u212Aing.example", strings.Repeat("a", 300) + ".banking.example",
	} {
		if target, ok := tables.Resolve(host); ok {
			t.Errorf("%q leads to %+v", host, target)
		}
	}
}

func TestLookups(t *testing.T) {
	tables := compileYAML(t, bankingYAML)
	if s, ok := tables.Service("statements"); !ok || s.Failover.Hold.Seconds() != 10 || s.Name != "statements.banking.example" || s.ID != own("/statements") {
		t.Errorf("statements: %+v", s)
	}
	if s, ok := tables.ServiceByID(own("/notices")); !ok || len(s.Calls) != 2 || s.OutboundPort != 19001 || s.Failover.Hold != DefaultHold {
		t.Errorf("notices: %+v", s)
	}
	for _, id := range []spiffeid.ID{other("/notices"), own("/ghost"), {}} {
		if s, ok := tables.ServiceByID(id); ok {
			t.Errorf("%s is %+v", id, s)
		}
	}
	for id, want := range map[spiffeid.ID]bool{
		own("/entente/gateway/gw-dc1"): true, own("/entente/gateway/gw-9"): false, own("/entente/gateway/"[:len("/entente/gateway")]): false,
		other("/entente/gateway/gw-dc1"): false, own("/gw-dc1"): false, {}: false,
	} {
		if tables.IsOwnGateway(id) != want {
			t.Errorf("IsOwnGateway(%s) is not %v", id, want)
		}
	}
	for id, want := range map[spiffeid.ID]bool{
		other("/entente/gateway/gw-dc1"): true, other("/entente/gateway/gw-9"): false, own("/entente/gateway/gw-dc1"): false, other("/portfolio"): false, {}: false,
	} {
		if tables.IsPeerGateway(id) != want {
			t.Errorf("IsPeerGateway(%s) is not %v", id, want)
		}
	}
	if gates := tables.PeerGateways(trading); len(gates) != 2 || gates[1].Address != "10.2.0.2:7443" {
		t.Errorf("peer gateways: %+v", gates)
	}
	if gates := tables.PeerGateways(banking); gates != nil {
		t.Errorf("own domain has peer gateways: %+v", gates)
	}
	if names := tables.Imports(); len(names) != 1 || len(tables.Services()) != 5 || len(tables.Gateways()) != 2 || len(tables.Peers()) != 1 {
		t.Errorf("imports %v, services %d, gateways %d, peers %v", names, len(tables.Services()), len(tables.Gateways()), tables.Peers())
	}
}

func BenchmarkCompile(b *testing.B) {
	objects := parseYAML(b, bankingYAML)
	for i := range 10000 {
		objects = append(objects, &statev1.Object{Kind: &statev1.Object_Service{Service: &statev1.Service{
			Name: fmt.Sprintf("s%d", i), Path: fmt.Sprintf("/s%d", i), Hosts: []string{"h1"}, Selectors: []string{"unix:uid:1"}, Port: 80, OutboundPort: uint32(20000 + i),
		}}})
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Compile(banking, objects); err != nil {
			b.Fatal(err)
		}
	}
}

// The catalogue takes the selectors that entries take, and no others.
func TestSelectorsAreThoseOfEntries(t *testing.T) {
	long := func(n int) string { return "unix:user:" + strings.Repeat("u", n) }
	many := []string{"unix:uid:1"}
	for i := range selector.MaxCount {
		many = append(many, fmt.Sprintf("unix:group:%d", i))
	}
	for name, test := range map[string]struct {
		selectors []string
		ok        bool
	}{
		"user":                    {[]string{"unix:user:web"}, true},
		"user of 33 bytes":        {[]string{long(33)}, true},
		"user of 256 bytes":       {[]string{long(256)}, true},
		"user of 257 bytes":       {[]string{long(257)}, false},
		"group and user":          {[]string{"unix:gid:1", "unix:user:web"}, true},
		"group alone":             {[]string{"unix:gid:1"}, false},
		"groups alone":            {[]string{"unix:group:1", "unix:group:2"}, false},
		"digest alone, as stored": {[]string{"unix:sha256:" + strings.Repeat("a", 64)}, true},
		"the root as a program":   {[]string{"unix:uid:1", "unix:path:/"}, false},
		"control character":       {[]string{"unix:uid:1", "unix:path:/a\x01"}, false},
		"unit without a name":     {[]string{"systemd:unit:.service"}, false},
		"unit with odd letters":   {[]string{"systemd:unit:a$b.service"}, false},
		"two of one kind":         {[]string{"unix:uid:1", "unix:uid:2"}, false},
		"as many as there may be": {many[:selector.MaxCount], true},
		"too many":                {many, false},
	} {
		service := &statev1.Service{Name: "x", Path: "/x", Hosts: []string{"h1"}, Selectors: test.selectors}
		_, err := Compile(banking, []*statev1.Object{{Owner: "team", Kind: &statev1.Object_Service{Service: service}}})
		if (err == nil) != test.ok || (selector.Check(test.selectors) == nil) != test.ok {
			t.Errorf("%s: %v; entries: %v", name, err, selector.Check(test.selectors))
		}
	}
}
