package scenarios

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/federation/manifest"
	"github.com/entente-mesh/entente/scenarios/platform"
)

func TestFinancialPlatform(t *testing.T) {
	s, err := ReadFile("")
	if err != nil {
		t.Fatal(err)
	}
	counts := map[string]int{}
	for _, td := range s.Spec.TrustDomains {
		counts[td.Name] = len(td.Services)
	}
	if counts["banking.example"] != 25 || counts["trading.example"] != 18 {
		t.Errorf("services: %v", counts)
	}
}

// Each case changes one piece of the good file; the complaint must name the line of
// the change and say what to do.
func TestImpossibleScenarios(t *testing.T) {
	tests := []struct {
		name, old, new string
		want           []string
	}{
		{"unknown key", "export: [trading.example]\n      failover: {hold", "expot: [trading.example]\n      failover: {hold", []string{`unknown key "expot"`, `did you mean "export"?`}},
		{"wrong type", "memoryMiB: 1536", "memoryMiB: much", []string{"memoryMiB", "whole number"}},
		{"no duration", "x509SVID: 16s", "x509SVID: 16", []string{"x509SVID", "no unit"}},
		{"other kind", "kind: Scenario", "kind: Scenery", []string{`"Scenery"`}},
		{"datacenter that does not exist", "mesh: [dc1, dc2] # an agent", "mesh: [dc1, dc4] # an agent", []string{`datacenter "dc4" does not exist`, `did you mean "dc`}},
		{"service in a datacenter without mesh", "order: [dc1, dc2], failback", "order: [dc1, dc3], failback", []string{`datacenter of the mesh "dc3" does not exist`}},
		{"network outside loopback", "network: 127.1.0.0/16", "network: 10.1.0.0/16", []string{"10.1.0.0/16", "127.1.0.0/16"}},
		{"network taken", "network: 127.2.0.0/16", "network: 127.1.0.0/16", []string{"already belongs to dc1"}},
		{"service twice", "{name: savings,", "{name: deposits,", []string{`service "deposits"`, "twice"}},
		{"no DNS label", "{name: savings,", "{name: Savings_1,", []string{"no DNS label"}},
		{"agreement for what nobody exports", "service: accounts, methods", "service: savings, methods", []string{"savings", "does not export", `add "export: [trading.example]"`}},
		{"agreement for what does not exist", "service: accounts, methods", "service: acounts, methods", []string{`did you mean "accounts"?`}},
		{"agreement for a caller that does not exist", "callers: [orders]", "callers: [order]", []string{`"order" does not exist`, `did you mean "orders"?`}},
		{"agreement with a stranger", "caller: trading.example}", "caller: treding.example}", []string{`did you mean "trading.example"?`}},
		{"call to what is not exported", "calls: [ledger.banking.example, risk.trading.example]", "calls: [fees.banking.example, risk.trading.example]", []string{"does not export"}},
		{"route to nowhere", "service: portfolio, stripPrefix", "service: portfolios, stripPrefix", []string{`did you mean "portfolio"?`}},
		{"answer that is no JSON", `{/v1/fees/retail: '{"monthly"`, `{/v1/fees/retail: '{monthly`, []string{"no JSON"}},
		{"load that does not exist", "load: [phones near dc1,", "load: [fones near dc1,", []string{`did you mean "phones near dc1"?`}},
		{"load from the datacenter that is lost", "datacenter: dc2\n    servedBy: dc1\n    url: http://ledger", "datacenter: dc1\n    servedBy: dc1\n    url: http://ledger", []string{"lost itself"}},
		{"load by who may not call", "from: orders.trading.example", "from: risk.trading.example", []string{"calls"}},
		{"unknown reason", "reason: token-missing", "reason: token-mising", []string{`did you mean "token-missing"?`}},
		{"refusal of a call without a reason", "      expect: {status: 403, reason: agreement-caller}\n", "", []string{"does not say with which status"}},
		{"tier nobody has", "tier: trial, times: 12", "tier: tiral, times: 12", []string{`did you mean "trial"?`}},
		{"path without a route", "url: /portfolio/v1/buying-power/C-1042\n    rate", "url: /portfolios/v1\n    rate", []string{"no route"}},
		{"step of two kinds", "endure: {quorum", "start: {within: 1s}\n    endure: {quorum", []string{"exactly one of"}},
		{"restores what is not lost", "restore: {datacenter: dc1", "restore: {datacenter: dc2", []string{`"dc2" is not lost`}},
		{"renewal where nothing lives", "renewed: dc2", "renewed: dc1", []string{"which is lost"}},
		{"dial with two identities", "dial: {as: portfolio.trading.example, datacenter", "dial: {as: portfolio.trading.example, forged: spiffe://a/b, datacenter", []string{"either"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			at := bytes.Index(FinancialPlatform, []byte(test.old))
			if at < 0 {
				t.Fatalf("the file has no %q", test.old)
			}
			changed := strings.Replace(string(FinancialPlatform), test.old, test.new, 1)
			_, err := Read("platform.yaml", []byte(changed))
			if err == nil {
				t.Fatal("it was accepted")
			}
			for _, want := range test.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the complaint does not say %q:\n%v", want, err)
				}
			}
			if test.new != "" && !strings.Contains(test.name, "without") && !strings.Contains(test.name, "is lost") {
				line := 1 + bytes.Count(FinancialPlatform[:at], []byte("\n"))
				near := slices.ContainsFunc([]int{line, line + 1, line + 2, line - 1, line - 2, line - 3, line + 3, line + 4}, func(n int) bool {
					return strings.Contains(err.Error(), fmt.Sprintf("platform.yaml:%d:", n))
				})
				if !near {
					t.Errorf("the complaint is not about line %d:\n%v", line, err)
				}
			}
		})
	}
}

func TestMissingFile(t *testing.T) {
	if _, err := ReadFile("/none/x.yaml"); err == nil || !strings.Contains(err.Error(), "/none/x.yaml") {
		t.Error(err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add(FinancialPlatform)
	f.Add([]byte("apiVersion: entente/v1\nkind: Scenario\nmetadata: {name: x}\nspec:\n  datacenters: [{name: a, network: 127.1.0.0/16}]\n  trustDomains: [{name: b.c, ca: [a], mesh: [a], services: [{name: d, answers: {/: '1'}}]}]\n  story: [{name: e, start: {within: 1s}}]\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := Read("fuzz.yaml", data)
		if err != nil {
			if err.Error() == "" {
				t.Error("a complaint without words")
			}
			return
		}
		// What is accepted can be placed, and its catalogue can be written.
		p := newPlan(&s.Spec, "/w", "/w/s", place{})
		for i := range s.Spec.TrustDomains {
			if _, err := p.catalogue(&s.Spec.TrustDomains[i], time.Unix(1_800_000_000, 0), nil); err != nil {
				t.Errorf("accepted, and then: %v", err)
			}
		}
	})
}

// The catalogue of each domain is read back by the parser of `entente apply -f` and
// fits together.
func TestCatalogueCompiles(t *testing.T) {
	s, err := ReadFile("")
	if err != nil {
		t.Fatal(err)
	}
	bundles := map[string][]byte{"banking.example": []byte(`{"keys":[]}`), "trading.example": []byte(`{"keys":[]}`)}
	for i := range 2 * len(s.Spec.TrustDomains) {
		p := newPlan(&s.Spec, "/demo", "/demo/s", place{one: i%2 == 1})
		td := &s.Spec.TrustDomains[i/2]
		text, err := p.catalogue(td, time.Now(), bundles)
		if err != nil {
			t.Fatal(err)
		}
		objects, err := manifest.Parse(td.Name+".yaml", bytes.NewReader(text), nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := catalog.Compile(spiffeid.RequireTrustDomainFromString(td.Name), objects, catalog.AllowLoopback(true)); err != nil {
			t.Error(err)
		}
	}
}

func TestPlan(t *testing.T) {
	s, err := ReadFile("")
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []place{{slot: 3}, {slot: 0, one: true}, {slot: oneSlots - 1, one: true}} {
		p := newPlan(&s.Spec, "/demo", "/demo/s", at)
		seen := map[string]string{p.guard(): "the runner"}
		names := map[string]bool{}
		for _, u := range p.units {
			if names[u.name] {
				t.Errorf("two processes are called %s", u.name)
			}
			names[u.name] = true
			for _, address := range u.listens {
				if other := seen[address]; other != "" {
					t.Errorf("%s and %s both listen at %s", other, u.name, address)
				}
				seen[address] = u.name
				host, text, err := net.SplitHostPort(address)
				if err != nil {
					t.Fatal(err)
				}
				octets := strings.Split(host, ".")
				port, _ := strconv.Atoi(text)
				first := firstPort + at.slot*slotPorts
				if at.one && (host != onlyAddress || port < first || port >= first+slotPorts || port >= 32768) ||
					!at.one && (octets[0] != "127" || octets[1] != u.datacenter[2:] || octets[2] != "3") {
					t.Errorf("%s of %s listens at %s", u.name, u.datacenter, address)
				}
			}
			if u.door != "" && p.listener(u.door) != u {
				t.Errorf("the door of %s is somebody else's", u.name)
			}
		}
		if u := p.server("accounts.banking.example", "dc1"); u == nil || len(u.services) != 1 {
			t.Error("accounts has no process of its own in dc1")
		}
		if u := p.server("fees.banking.example", "dc2"); u == nil || len(u.services) != 22 {
			t.Error("fees does not share a process with 21 others in dc2")
		}
		if got := len(p.in("dc3")); got != 2 {
			t.Errorf("%d processes in dc3", got)
		}
		reachable(t, p)
	}
}

// reachable: what a domain's catalogue and an agent's configuration make of a port
// together is where the program listens, or calls others, in each datacenter.
func reachable(t *testing.T, p *plan) {
	t.Helper()
	for i := range p.spec.TrustDomains {
		td := &p.spec.TrustDomains[i]
		for _, object := range p.objects(td, time.Now(), nil) {
			s := object.GetService()
			if s.GetPort() == 0 {
				continue // another kind, or an edge
			}
			for _, dc := range td.Mesh {
				car := p.find(kindAgent, td.Name, dc).config.(agentConfig).Sidecar
				name := s.GetName() + "." + td.Name
				services := p.server(name, dc).config.(platform.Config).Services
				at := slices.IndexFunc(services, func(s platform.Service) bool { return s.Name == name })
				if want := join(car.AppAddress, int(s.GetPort())+car.PortOffset); services[at].Listen != want {
					t.Errorf("%s of %s listens at %s, and is looked for at %s", name, dc, services[at].Listen, want)
				}
				if s.GetOutboundPort() == 0 {
					continue
				}
				if want := join(car.AppAddress, int(s.GetOutboundPort())+car.PortOffset); services[at].Outbound != want {
					t.Errorf("%s of %s calls others at %s, and the door is at %s", name, dc, services[at].Outbound, want)
				}
			}
		}
	}
}

// Two runs at once get different slots, and an address in use by another program is
// passed over, or said plainly when there is no way around it.
func TestFree(t *testing.T) {
	s, err := ReadFile("")
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		one  bool
		slot func(n int) int // away from any real run
	}{
		"an address for each": {false, func(n int) int { return 200 + n%3 }},
		"one address":         {true, func(n int) int { return oneSlots - 1 - n%3 }},
	} {
		t.Run(name, func(t *testing.T) {
			at := func(p place) *plan { return newPlan(&s.Spec, "/demo", "/demo/s", place{test.slot(p.slot), p.one}) }
			first, guard, _, err := free(at, test.one)
			if err != nil {
				t.Fatal(err)
			}
			defer guard.Close()
			if first.one != test.one {
				t.Skip("no loopback address but 127.0.0.1 here")
			}
			second, guard2, note, err := free(at, test.one)
			if err != nil {
				t.Fatal(err)
			}
			if first.slot == second.slot || note != "" {
				t.Errorf("slots %d and %d, note %q", first.slot, second.slot, note)
			}
			guard2.Close()
			taken, err := net.Listen("tcp", second.units[0].listens[0])
			if err != nil {
				t.Fatal(err)
			}
			defer taken.Close()
			third, guard3, note, err := free(at, test.one)
			if err != nil {
				t.Fatal(err)
			}
			defer guard3.Close()
			if third.slot == second.slot || !strings.Contains(note, "already in use") {
				t.Errorf("slot %d, note %q", third.slot, note)
			}
			if _, _, _, err := free(at, test.one); err == nil || !strings.Contains(err.Error(), "already in use") {
				t.Errorf("everything is taken: %v", err)
			}
		})
	}
}

// Where a datacenter's addresses are none of this machine's, ports take their place.
func TestFreeOneAddress(t *testing.T) {
	s, err := ReadFile("")
	if err != nil {
		t.Fatal(err)
	}
	for i := range s.Spec.Datacenters {
		spec := s.Spec
		spec.Datacenters = slices.Clone(spec.Datacenters)
		spec.Datacenters[i].Network = "198.18.0.0/16" // for benchmarks between networks, RFC 2544
		p, guard, note, err := free(func(at place) *plan { return newPlan(&spec, "/demo", "/demo/s", at) }, false)
		if err != nil {
			t.Fatal(err)
		}
		guard.Close()
		if !p.one || !strings.Contains(note, "198.18.") {
			t.Errorf("%s: one address: %v, note %q", spec.Datacenters[i].Name, p.one, note)
		}
	}
	var many Spec
	for _, name := range []string{"a.example", "b.example"} {
		many.TrustDomains = append(many.TrustDomains, TrustDomain{Name: name, CA: []string{"dc1"}, Mesh: []string{"dc1", "dc2"}, Services: make([]Service, maxServices)})
	}
	many.Datacenters = s.Spec.Datacenters
	_, _, _, err = free(func(at place) *plan { return newPlan(&many, "/demo", "/demo/s", at) }, true)
	if err == nil || !strings.Contains(err.Error(), "leave out some services") {
		t.Errorf("more ports than there are: %v", err)
	}
}

func TestWorkDirectory(t *testing.T) {
	s, err := ReadFile("")
	if err != nil {
		t.Fatal(err)
	}
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		options Options
		want    string
	}{
		"missing binary":   {Options{Binary: "/none/entente"}, "missing"},
		"not a program":    {Options{Binary: full}, "no program"},
		"directory in use": {Options{WorkDir: full}, "not empty"},
	} {
		t.Setenv("TMPDIR", t.TempDir())
		_, err := newWorld(&s.Spec, test.options)
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v", name, err)
		}
		left, err := os.ReadDir(os.TempDir())
		if err != nil || len(left) > 0 {
			t.Errorf("%s: left behind: %v %v", name, left, err)
		}
	}
}
