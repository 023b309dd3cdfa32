package manifest

import (
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/selector"
	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

// banking is the text of a domain with every kind of object that services need.
func banking(t testing.TB) string {
	t.Helper()
	text, err := os.ReadFile("testdata/banking.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func parseYAML(t testing.TB, text string) []*statev1.Object {
	t.Helper()
	objects, err := Parse("banking.yaml", strings.NewReader(text), nil)
	if err != nil {
		t.Fatal(err)
	}
	for i, object := range objects {
		object.Revision = uint64(i + 1)
	}
	return objects
}

func TestParse(t *testing.T) {
	objects := parseYAML(t, banking(t))
	want := &statev1.Object{
		Owner:    "team-accounts",
		Source:   "banking.yaml:17",
		Revision: 4,
		Kind: &statev1.Object_Service{Service: &statev1.Service{
			Name: "accounts", Path: "/accounts", Hosts: []string{"h1", "h2"}, Selectors: []string{"unix:uid:1000", "unix:path:/opt/accounts"},
			Port: 8080, HealthPath: "/healthz", ExportTo: []string{"trading.example"},
		}},
	}
	if !proto.Equal(objects[3], want) {
		t.Errorf("got  %v\nwant %v", objects[3], want)
	}
	agreement := objects[len(objects)-1].GetAgreement()
	if agreement.GetExpires() != 1826668800 || agreement.GetGateways()[1].GetPath() != "/entente/gateway/gw-dc2" || agreement.GetAllow()[0].GetHttp()[1].GetPathType() != statev1.PathType_PATH_TYPE_EXACT {
		t.Errorf("agreement: %v", agreement)
	}
}

func TestParseRefuses(t *testing.T) {
	head := func(kind string) string {
		return "apiVersion: entente/v1\nkind: " + kind + "\nmetadata: {name: x}\nspec:\n"
	}
	agreement := head("Agreement") + "  peer: trading.example\n  expires: 2027-11-20\n"
	tests := []struct{ name, text, want string }{
		{"nothing", "", "b.yaml: the file is empty"},
		{"no mapping", "- a\n", "b.yaml:1:1: the document has no kind"},
		{"no kind", "apiVersion: entente/v1\n", "b.yaml:1:1: the document has no kind; it is one of"},
		{"other kind", head("Servce"), `b.yaml:2:7: kind: "Servce" is not one of Relationship, Gateway, Service, Import, Agreement, RoleBinding; did you mean "Service"?`},
		{"other version", "apiVersion: entente/v2\nkind: Service\n", `b.yaml:1:13: apiVersion is "entente/v2"; this release reads "entente/v1"`},
		{"unknown key", head("Service") + "  run: {uid: 1, hosts: [h]}\n  expot: {to: [a]}\n", `b.yaml:6:3: unknown key "expot" in Service spec; did you mean "export"?`},
		{"unknown key below", head("Service") + "  run: {uid: 1, host: [h]}\n", `unknown key "host" in Service spec.run; did you mean "hosts"?`},
		{"key twice", head("Service") + "  run: {uid: 1, hosts: [h]}\n  port: 1\n  port: 2\n", `b.yaml:7:3: key "port" is given twice in Service spec, first at line 6`},
		{"wrong type", head("Service") + "  run: {uid: 1, hosts: [h]}\n  port: http\n", `b.yaml:6:9: Service spec.port must be a whole number from 0 to 65535, not "http"`},
		{"port 0", head("Service") + "  run: {uid: 1, hosts: [h]}\n  port: 0\n", "0 is too small; the least is 1"},
		{"no name", "apiVersion: entente/v1\nkind: Service\nspec: {run: {uid: 1, hosts: [h]}}\n", "Service has no metadata.name"},
		{"no run", head("Service") + "  port: 1\n", `key "run" is missing in Service spec`},
		{"content", head("Service") + "  run: {uid: 1, hosts: [h]}\n  http: {content: none}\n", `"none" is not one of any`},
		{"protocol", head("Service") + "  run: {uid: 1, hosts: [h]}\n  protocol: udp\n", `"udp" is not one of http, tcp`},
		{"port of an import", "apiVersion: entente/v1\nkind: Import\nspec: {service: a.b, port: 65536}\n", "from 0 to 65535"},
		{"mode", head("Service") + "  run: {uid: 1, hosts: [h]}\n  failover: {mode: atuo}\n", `"atuo" is not one of auto, manual; did you mean "auto"?`},
		{"hold", head("Service") + "  run: {uid: 1, hosts: [h]}\n  failover: {hold: 1500ms}\n", "failover.hold must be whole seconds"},
		{"path alone", head("Service") + "  run: {path: /x, hosts: [h]}\n", "run.path stands alone"},
		{"gid alone", head("Service") + "  run: {gid: 1, hosts: [h]}\n", "run.gid stands alone"},
		{"nobody", head("Service") + "  run: {hosts: [h]}\n", "nothing by which the process is recognised"},
		{"run alone", head("Service") + "  run: {run: abcdefghijklmnop, hosts: [h]}\n", "nothing that identifies a process"},
		{"command line alone", head("Service") + "  run: {cmdline: aa, hosts: [h]}\n", "run.cmdline stands alone"},
		{"not yet, value", head("Service") + "  run: {uid: 1, hosts: [h]}\n  inbound: permissive\n", `"permissive" is not one of strict`},
		{"rate", agreement + "  allow: [{callers: [a], service: b, rate: 500/s}]\n", `key "rate" in Agreement spec.allow[0] is not supported`},
		{"assurance", agreement + "  allow: [{callers: [a], service: b, assurance: origin}]\n", `"origin" is not one of attested`},
		{"pattern", agreement + "  allow:\n  - {callers: [\"a*\"], service: b}\n", `b.yaml:8:6: callers: pattern "a*": "*" stands for one whole segment`},
		{"pattern with domain", agreement + "  allow: [{callers: [\"spiffe://trading.example/a\"], service: b}]\n", "write the path only"},
		{"gateway of another domain", agreement + "  gateways: [{id: \"spiffe://rogue.example/g\", datacenter: dc1, address: \"a:1\"}]\n", "is not in trust domain trading.example, the agreement's peer"},
		{"gateway is a domain", agreement + "  gateways: [{id: \"spiffe://trading.example\", datacenter: dc1, address: \"a:1\"}]\n", "names the whole trust domain"},
		{"no expiry", head("Agreement") + "  peer: trading.example\n", `key "expires" is missing`},
		{"expiry", head("Agreement") + "  peer: trading.example\n  expires: tomorrow\n", `"tomorrow" is neither a day such as 2027-11-20`},
		{"empty http", agreement + "  allow: [{callers: [a], service: b, http: []}]\n", "http is empty"},
		{"http that says nothing", agreement + "  allow: [{callers: [a], service: b, http: [{}]}]\n", "allows everything"},
		{"path type", agreement + "  allow: [{callers: [a], service: b, http: [{path: {type: Regex, value: /x}}]}]\n", `"Regex" is not one of Exact, PathPrefix`},
		{"import with a name", "apiVersion: entente/v1\nkind: Import\nmetadata: {name: x}\nspec: {service: a.b}\n", "an Import is named by its service"},
		{"no bundle", head("Relationship") + "  endpoint: {urls: [\"https://x/\"], id: \"spiffe://x/y\"}\n", "without a bundle to verify it with"},
		{"bundle twice", head("Relationship") + "  bundle: \"{}\"\n  bundleFile: x\n", "both given"},
		{"bundle is not there", head("Relationship") + "  bundleFile: gone.json\n", "b.yaml:5:3: bundleFile: "},
		{"alias", "a: &x 1\nb: *x\n", "anchors and aliases are not allowed"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			objects, err := Parse("b.yaml", strings.NewReader(test.text), func(string) ([]byte, error) { return nil, fs.ErrNotExist })
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("got:  %v %v\nwant: %s", objects, err, test.want)
			}
			var e *yamlfile.Error
			if !errors.As(err, &e) || e.File != "b.yaml" {
				t.Errorf("the error names no place: %#v", err)
			}
		})
	}
}

func TestBundleFileStandsBesideTheFile(t *testing.T) {
	const text = "apiVersion: entente/v1\nkind: Relationship\nmetadata: {name: trading.example}\nspec:\n  endpoint: {urls: [\"https://a/\"], id: \"spiffe://trading.example/entente/bundle-endpoint\"}\n  bundleFile: trading.bundle.json\n"
	asked := ""
	objects, err := Parse("/etc/entente/banking.yaml", strings.NewReader(text), func(path string) ([]byte, error) {
		asked = path
		return []byte(`{"keys":[]}`), nil
	})
	if err != nil || asked != "/etc/entente/trading.bundle.json" || string(objects[0].GetRelationship().GetBootstrapBundle()) != `{"keys":[]}` {
		t.Errorf("asked for %q: %v %v", asked, objects, err)
	}
	if _, err := Parse("x.yaml", strings.NewReader(text), nil); err == nil || !strings.Contains(err.Error(), "write the bundle itself") {
		t.Errorf("without a reader: %v", err)
	}
}

// Every kind that the API has can be written and read: one that is forgotten fails here.
func TestEveryKindStandsInAFile(t *testing.T) {
	oneof := (*statev1.Object)(nil).ProtoReflect().Descriptor().Oneofs().ByName("kind").Fields()
	for i := range oneof.Len() {
		if name := string(oneof.Get(i).Message().Name()); find(name) == nil {
			t.Errorf("%s has no row in kinds", name)
		}
	}
	if len(kinds) != oneof.Len() {
		t.Errorf("%d rows for %d kinds", len(kinds), oneof.Len())
	}
	if find("Thing") != nil {
		t.Error("control: a kind that does not exist has a row")
	}
}

// genObject draws objects that a file can say; Compile need not like them.
func genObject() *rapid.Generator[*statev1.Object] {
	word := rapid.StringMatching(`[a-z][a-z0-9-]{0,8}`)
	odd := rapid.OneOf(word, rapid.SampledFrom([]string{"yes", "null", "1", "2027-11-20", "1e3", "~", "a: b", "#x", "- x", "*a", "&a", "é", "'\"", "0x1f", "true", "=", "<<", " lead", "trail ", "two\nlines", "tab\there", "{}", "[a]", "%x", "@x", "`x`"}))
	words := rapid.SliceOfN(odd, 1, 3)
	maybe := rapid.SliceOfN(odd, 0, 3)
	selectors := rapid.SampledFrom([][]string{{"unix:uid:0"}, {"unix:user:app"}, {"unix:uid:1000", "unix:path:/opt/a b"}, {"unix:user:a", "unix:uid:5", "unix:gid:7", "unix:path:/x", "unix:sha256:" + strings.Repeat("0", 64)}})
	// A list that is absent is nil, as in what a file gives.
	list := func(t *rapid.T, g *rapid.Generator[[]string], label string) []string {
		if l := g.Draw(t, label); len(l) > 0 {
			return l
		}
		return nil
	}
	return rapid.Custom(func(t *rapid.T) *statev1.Object {
		object := &statev1.Object{Owner: rapid.OneOf(rapid.Just(""), odd).Draw(t, "owner")}
		switch kind := rapid.SampledFrom(catalog.Kinds()).Draw(t, "kind"); kind {
		case "Service":
			name := odd.Draw(t, "name")
			s := &statev1.Service{
				Name: name, Path: "/" + name, Hosts: words.Draw(t, "hosts"), Selectors: selectors.Draw(t, "selectors"),
				Port: rapid.Uint32Range(0, 65535).Draw(t, "port"), OutboundPort: rapid.Uint32Range(0, 65535).Draw(t, "out"),
				HealthPath: rapid.OneOf(rapid.Just(""), odd).Draw(t, "health"), ExportTo: list(t, maybe, "export"), Calls: list(t, maybe, "calls"),
				X509SvidSeconds: rapid.Uint32Range(0, 1<<20).Draw(t, "ttl"),
				Protocol:        statev1.Protocol(rapid.IntRange(0, 1).Draw(t, "protocol")),
				Edge:            rapid.Bool().Draw(t, "edge"),
				JwtSvidSeconds:  rapid.Uint32Range(0, 3600).Draw(t, "jwt"),
				WitSvidSeconds:  rapid.Uint32Range(0, 1<<16).Draw(t, "wit"),
				Hint:            rapid.SampledFrom([]string{"", "internal", "for: people"}).Draw(t, "hint"),
			}
			if rapid.Bool().Draw(t, "other path") {
				s.Path = odd.Draw(t, "path")
			}
			if content := rapid.IntRange(0, 3).Draw(t, "content"); content > 0 {
				s.Http = &statev1.ServiceHTTP{AnyContent: content&1 != 0, ReadsBodies: content&2 != 0}
			}
			if rapid.Bool().Draw(t, "failover") {
				s.Failover = &statev1.Failover{
					Mode: statev1.Mode(rapid.IntRange(0, 2).Draw(t, "mode")), Failback: statev1.Mode(rapid.IntRange(0, 2).Draw(t, "failback")),
					Order: list(t, maybe, "order"), HoldSeconds: rapid.Uint32Range(0, 86400).Draw(t, "hold"),
				}
			}
			object.Kind = &statev1.Object_Service{Service: s}
		case "Gateway":
			object.Kind = &statev1.Object_Gateway{Gateway: &statev1.Gateway{
				Name: odd.Draw(t, "name"), Datacenter: odd.Draw(t, "dc"), Address: odd.Draw(t, "address"), Hosts: words.Draw(t, "hosts"), Selectors: selectors.Draw(t, "selectors"),
			}}
		case "Import":
			object.Kind = &statev1.Object_Import{Import: &statev1.Import{Service: odd.Draw(t, "service"), Port: rapid.Uint32Range(0, 65535).Draw(t, "port"), Protocol: statev1.Protocol(rapid.IntRange(0, 1).Draw(t, "protocol"))}}
		case "Agreement":
			a := &statev1.Agreement{Name: odd.Draw(t, "name"), Peer: "trading.example", Expires: rapid.OneOf(rapid.Just[int64](1826668800), rapid.Int64Range(1, 1<<33)).Draw(t, "expires")}
			for range rapid.IntRange(0, 2).Draw(t, "gateways") {
				a.Gateways = append(a.Gateways, &statev1.PeerGateway{Path: "/" + word.Draw(t, "path"), Datacenter: odd.Draw(t, "dc"), Address: odd.Draw(t, "address")})
			}
			for range rapid.IntRange(0, 2).Draw(t, "allow") {
				allow := &statev1.Allow{Callers: rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b/*", "**", "no", "1"}), 1, 3).Draw(t, "callers"), Service: odd.Draw(t, "service")}
				for range rapid.IntRange(0, 2).Draw(t, "http") {
					m := &statev1.HTTPMatch{Methods: list(t, maybe, "methods")}
					if m.Methods == nil || rapid.Bool().Draw(t, "with path") {
						m.Path, m.PathType = odd.Draw(t, "path"), statev1.PathType(rapid.IntRange(0, 2).Draw(t, "type"))
					}
					allow.Http = append(allow.Http, m)
				}
				a.Allow = append(a.Allow, allow)
			}
			object.Kind = &statev1.Object_Agreement{Agreement: a}
		case "RoleBinding":
			object.Kind = &statev1.Object_RoleBinding{RoleBinding: &statev1.RoleBinding{
				Name: odd.Draw(t, "name"), Role: statev1.AdminRole(rapid.IntRange(1, 4).Draw(t, "role")), Subjects: words.Draw(t, "subjects"), Prefixes: list(t, maybe, "prefixes"),
			}}
		case "Relationship":
			r := &statev1.Relationship{TrustDomain: odd.Draw(t, "name"), EndpointUrls: words.Draw(t, "urls")}
			if rapid.Bool().Draw(t, "bundle") {
				r.EndpointId, r.BootstrapBundle = odd.Draw(t, "id"), []byte(rapid.SampledFrom([]string{`{"keys":[]}`, "{\n  \"keys\": []\n}\n", "{\"a\":\t1}"}).Draw(t, "json"))
			}
			object.Kind = &statev1.Object_Relationship{Relationship: r}
		default:
			t.Fatalf("no %s is drawn here", kind)
		}
		return object
	})
}

func TestFormatRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		objects := rapid.SliceOfN(genObject(), 1, 3).Draw(t, "objects")
		text, err := Format(objects...)
		if err != nil {
			t.Fatal(err)
		}
		again, err := Parse("again.yaml", strings.NewReader(string(text)), nil)
		if err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		if len(again) != len(objects) {
			t.Fatalf("%d objects became %d\n%s", len(objects), len(again), text)
		}
		for i := range objects {
			again[i].Source = ""
			if !proto.Equal(objects[i], again[i]) {
				t.Fatalf("wrote %v\nread  %v\n%s", objects[i], again[i], text)
			}
		}
	})
}

func TestFormatIsForPeople(t *testing.T) {
	objects := parseYAML(t, banking(t))
	text, err := Format(objects[3], objects[len(objects)-1])
	if err != nil {
		t.Fatal(err)
	}
	const want = `apiVersion: entente/v1
kind: Service
metadata:
  name: accounts
  owner: team-accounts
spec:
  run:
    uid: 1000
    path: /opt/accounts
    hosts: [h1, h2]
  port: 8080
  health:
    http: /healthz
  export:
    to: [trading.example]
---
apiVersion: entente/v1
kind: Agreement
metadata:
  name: trading-reads-balances
  owner: sec-banking
spec:
  peer: trading.example
  expires: 2027-11-20
  gateways:
    - id: spiffe://trading.example/entente/gateway/gw-dc1
      datacenter: dc1
      address: 10.1.0.2:7443
    - id: spiffe://trading.example/entente/gateway/gw-dc2
      datacenter: dc2
      address: 10.2.0.2:7443
  allow:
    - callers: [portfolio, orders/*]
      service: accounts
      http:
        - methods: [GET, HEAD]
          path:
            type: PathPrefix
            value: /v1/balance
        - methods: [POST]
          path:
            type: Exact
            value: /v1/holds
    - callers: [notices, fx]
      service: prices.trading.example
`
	if string(text) != want {
		t.Errorf("got:\n%s", text)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(banking(f))
	f.Add("apiVersion: entente/v1\nkind: Import\nspec: {service: a.b}\n")
	f.Add("kind: Service\nspec: {run: {uid: 1}}\n")
	f.Fuzz(func(t *testing.T, text string) {
		objects, err := Parse("f.yaml", strings.NewReader(text), nil)
		if err != nil {
			return
		}
		// Whatever was read can be compiled or refused, and written and read again.
		_, _ = catalog.Compile(spiffeid.RequireTrustDomainFromString("banking.example"), objects)
		out, err := Format(objects...)
		if err != nil {
			t.Fatalf("read but not written: %v\n%q", err, text)
		}
		again, err := Parse("again.yaml", strings.NewReader(string(out)), nil)
		if err != nil || len(again) != len(objects) {
			t.Fatalf("written but not read: %v\n%s", err, out)
		}
		for i := range again {
			again[i].Source, objects[i].Source = "", ""
			if !proto.Equal(again[i], objects[i]) {
				t.Fatalf("wrote %v\nread  %v\n%s", objects[i], again[i], out)
			}
		}
	})
}

// Every selector that a file can say is read, compiled, and written again.
func TestSelectorsInFiles(t *testing.T) {
	const hex = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	text := `apiVersion: entente/v1
kind: Service
metadata:
  name: web
  owner: team
spec:
  run:
    user: web
    uid: 7
    gid: 8
    path: /opt/web
    groups: [9, 10]
    sha256: ` + hex + `
    cmdline: ` + hex + `
    systemd: web@1.service
    container: ` + hex + `
    run: abcdefghijklmnopqrst
    hosts: [h1]
`
	objects, err := Parse("web.yaml", strings.NewReader(text), nil)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"systemd:unit:web@1.service", "container:id:" + hex, "unix:user:web", "unix:uid:7", "unix:gid:8", "unix:group:9", "unix:group:10",
		"unix:path:/opt/web", "unix:sha256:" + hex, "unix:cmdline:" + hex, "run:id:abcdefghijklmnopqrst"}
	if got := objects[0].GetService().GetSelectors(); !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}
	if _, err := catalog.Compile(spiffeid.RequireTrustDomainFromString("banking.example"), objects); err != nil {
		t.Error(err)
	}
	objects[0].Source = ""
	if again, err := Format(objects...); err != nil || string(again) != text {
		t.Errorf("%v\n%s", err, again)
	}
	for bad, why := range map[string]string{
		"{systemd: web, hosts: [h]}":                   "not the name of a service or scope unit",
		"{systemd: a/b.service, hosts: [h]}":           "not the name of a service or scope unit",
		"{container: abc, hosts: [h]}":                 "not 64 lower-case",
		"{uid: 1, cmdline: abc, hosts: [h]}":           "not 64 lower-case",
		"{uid: 1, run: ABCDEFGHIJKLMNOPQ, hosts: [h]}": "entente run",
	} {
		objects, err := Parse("b.yaml", strings.NewReader("apiVersion: entente/v1\nkind: Service\nmetadata: {name: x, owner: t}\nspec: {run: "+bad+"}\n"), nil)
		if err == nil {
			_, err = catalog.Compile(spiffeid.RequireTrustDomainFromString("banking.example"), objects)
		}
		if err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

// Each kind of selectors has a key of run, and the value stands there as in a record.
func TestEveryKindOfSelectorIsSaidInFiles(t *testing.T) {
	for _, kind := range selector.Kinds() {
		beside, said := "systemd: web.service", kind.Key+": "+kind.Example
		if kind.Name == selector.Unit {
			beside = "uid: 1"
		}
		if kind.Many {
			said = kind.Key + ": [" + kind.Example + "]"
		}
		objects, err := Parse("k.yaml", strings.NewReader("apiVersion: entente/v1\nkind: Service\nmetadata: {name: x, owner: t}\nspec: {run: {"+said+", "+beside+", hosts: [h]}}\n"), nil)
		if err != nil {
			t.Errorf("%s: %v", kind.Name, err)
			continue
		}
		if got := objects[0].GetService().GetSelectors(); !slices.Contains(got, kind.Name+":"+kind.Example) {
			t.Errorf("%s: %q", kind.Name, got)
		}
		text, err := Format(objects...)
		if err != nil {
			t.Errorf("%s: %v", kind.Name, err)
			continue
		}
		again, err := Parse("again.yaml", strings.NewReader(string(text)), nil)
		if err != nil || !slices.Equal(again[0].GetService().GetSelectors(), objects[0].GetService().GetSelectors()) {
			t.Errorf("%s: %v\n%s", kind.Name, err, text)
		}
	}
}

func TestHealthInFiles(t *testing.T) {
	read := func(health string) (*statev1.Object, error) {
		objects, err := Parse("b.yaml", strings.NewReader("apiVersion: entente/v1\nkind: Service\nmetadata: {name: x, owner: t}\nspec: {run: {uid: 1, hosts: [h]}, port: 80, health: "+health+"}\n"), nil)
		if err == nil {
			_, err = catalog.Compile(spiffeid.RequireTrustDomainFromString("banking.example"), objects)
		}
		if err != nil {
			return nil, err
		}
		return objects[0], nil
	}
	for health, want := range map[string]string{"{http: /healthz}": "/healthz", "{grpc: {service: bank.v1.Accounts}}": "grpc:bank.v1.Accounts", "{grpc: {}}": "grpc:"} {
		object, err := read(health)
		if err != nil || object.GetService().GetHealthPath() != want {
			t.Errorf("%s: %v %v", health, object, err)
			continue
		}
		text, err := Format(object)
		if err != nil {
			t.Error(err)
			continue
		}
		again, err := Parse("again.yaml", strings.NewReader(string(text)), nil)
		if err != nil || again[0].GetService().GetHealthPath() != want {
			t.Errorf("%s: %v\n%s", health, err, text)
		}
	}
	for health, why := range map[string]string{"{}": "either", "{http: /a, grpc: {}}": "either", "{http: \"grpc:x\"}": "not a path", "{grpc: {service: a/b}}": "not the name of a gRPC service"} {
		if _, err := read(health); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v", health, err)
		}
	}
}
