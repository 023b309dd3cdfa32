package catalog_test

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	. "github.com/entente-mesh/entente/federation/catalog"
)

// endpoints reads "accounts@h1/dc1", with "!" for unhealthy and "?" for stale.
func endpoints(texts ...string) []Endpoint {
	var list []Endpoint
	for i, text := range texts {
		rest, stale := strings.CutSuffix(text, "?")
		rest, sick := strings.CutSuffix(rest, "!")
		service, rest, _ := strings.Cut(rest, "@")
		agent, datacenter, _ := strings.Cut(rest, "/")
		list = append(list, Endpoint{Service: service, Agent: agent, Datacenter: datacenter, Address: fmt.Sprintf("10.9.0.%d:7000", i+1), Healthy: !sick, Stale: stale})
	}
	return list
}

// show writes a plan as "dc1:10.9.0.1:7000 | gw dc2:..." for people and tests.
func show(plan []Group) string {
	var groups []string
	for _, g := range plan {
		var hops []string
		for _, h := range g.Hops {
			kind := map[HopKind]string{ToInstance: "", ToOwnGateway: "gw ", ToPeerGateway: "peer "}[h.Kind]
			hops = append(hops, kind+strings.TrimSuffix(h.Address, ":7000"))
		}
		groups = append(groups, g.Datacenter+": "+strings.Join(hops, ", "))
	}
	return strings.Join(groups, " | ")
}

const (
	gw1   = "dc1: gw 10.1.0.1:7443"
	gw2   = "dc2: gw 10.2.0.1:7443"
	peer1 = "dc1: peer 10.1.0.2:7443"
	peer2 = "dc2: peer 10.2.0.2:7443"
)

func TestPlan(t *testing.T) {
	tables := compileYAML(t, bankingYAML)
	both := []string{"accounts@h1/dc1", "accounts@h2/dc2"}
	ledger := []string{"ledger@h1/dc1", "ledger@h2/dc2"}
	statements := []string{"statements@h1/dc1", "statements@h2/dc2"}
	sidecar := func(dc string) Place { return Place{Datacenter: dc, Role: Sidecar} }
	gate := func(dc string) Place { return Place{Datacenter: dc, Role: Gateway} }
	fromOwn := func(dc string) Place { return Place{Datacenter: dc, Role: Gateway, FromOwnGateway: true} }
	fromPeer := func(dc string) Place { return Place{Datacenter: dc, Role: Gateway, FromPeer: true} }
	tests := []struct {
		name      string
		from      Place
		target    string
		endpoints []string
		want      string
	}{
		{"own datacenter first", sidecar("dc1"), "accounts", both, "dc1: 10.9.0.1 | " + gw1 + " | " + gw2},
		{"own datacenter first, there", sidecar("dc2"), "accounts", both, "dc2: 10.9.0.2 | " + gw2 + " | " + gw1},
		{"an edge is like a sidecar", Place{Datacenter: "dc1", Role: Edge}, "accounts", both, "dc1: 10.9.0.1 | " + gw1 + " | " + gw2},
		{"only elsewhere", sidecar("dc1"), "accounts", both[1:], gw1 + " | " + gw2},
		{"a datacenter without gateways", sidecar("dc3"), "accounts", both, gw1 + " | " + gw2},
		{"nowhere", sidecar("dc1"), "accounts", nil, ""},
		{"another service's", sidecar("dc1"), "accounts", []string{"fx@h1/dc1"}, ""},
		{"an agent that may not serve it", sidecar("dc1"), "accounts", []string{"accounts@h9/dc1"}, ""},

		{"unhealthy is left out", sidecar("dc1"), "accounts", []string{"accounts@h1/dc1!", "accounts@h2/dc1"}, "dc1: 10.9.0.2"},
		{"unhealthy datacenter is left out", sidecar("dc1"), "accounts", []string{"accounts@h1/dc1!", "accounts@h2/dc2"}, gw1 + " | " + gw2},
		{"unhealthy when nothing else is left", sidecar("dc1"), "accounts", []string{"accounts@h1/dc1!", "accounts@h2/dc2!"}, "dc1: 10.9.0.1 | " + gw1 + " | " + gw2},
		{"stale after fresh", sidecar("dc1"), "accounts", []string{"accounts@h1/dc1?", "accounts@h2/dc1"}, "dc1: 10.9.0.2 | dc1: 10.9.0.1"},
		{"stale alone does not move requests", sidecar("dc1"), "accounts", []string{"accounts@h1/dc1?", "accounts@h2/dc2"}, "dc1: 10.9.0.1 | " + gw1 + " | " + gw2},

		{"order wins over nearness", sidecar("dc2"), "statements", statements, gw2 + " | " + gw1 + " | dc2: 10.9.0.2"},
		{"order, at home", sidecar("dc1"), "statements", statements, "dc1: 10.9.0.1 | " + gw1 + " | " + gw2},
		{"first of the order is gone", sidecar("dc2"), "statements", statements[1:], "dc2: 10.9.0.1"},
		{"outside the order", sidecar("dc1"), "statements", []string{"statements@h1/dc3"}, ""},
		{"manual stays", sidecar("dc1"), "ledger", ledger, "dc1: 10.9.0.1"},
		{"manual stays, from elsewhere", sidecar("dc2"), "ledger", ledger, gw2 + " | " + gw1},
		{"manual stays, though unhealthy", sidecar("dc1"), "ledger", []string{"ledger@h1/dc1!", "ledger@h2/dc2"}, "dc1: 10.9.0.1"},
		{"manual stays, though gone", sidecar("dc1"), "ledger", ledger[1:], ""},

		{"gateway", gate("dc1"), "accounts", both, "dc1: 10.9.0.1 | " + gw2},
		{"gateway, from a peer", fromPeer("dc2"), "accounts", both, "dc2: 10.9.0.2 | " + gw1},
		{"gateway, order", gate("dc2"), "statements", statements, gw1 + " | dc2: 10.9.0.2"},
		{"gateway, from an own one", fromOwn("dc2"), "accounts", both, "dc2: 10.9.0.2"},
		{"gateway, from an own one, in spite of the order", fromOwn("dc2"), "statements", statements, "dc2: 10.9.0.2"},
		{"gateway, from an own one, nothing here", fromOwn("dc2"), "accounts", both[:1], ""},
		{"gateway, from an own one, only unhealthy here", fromOwn("dc2"), "accounts", []string{"accounts@h1/dc1", "accounts@h2/dc2!"}, "dc2: 10.9.0.2"},

		{"import, from a sidecar", sidecar("dc2"), "prices.trading.example", both, gw2 + " | " + gw1},
		{"import, from a gateway", gate("dc2"), "prices.trading.example", both, peer2 + " | " + peer1},
		{"import, from a gateway elsewhere", gate("dc3"), "prices.trading.example", both, peer1 + " | " + peer2},
		{"import, from a peer", fromPeer("dc1"), "prices.trading.example", both, ""},
		{"import, from an own gateway", fromOwn("dc1"), "prices.trading.example", both, ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			name := test.target
			if !strings.Contains(name, ".") {
				name += ".banking.example"
			}
			target, ok := tables.Resolve(name)
			if !ok {
				t.Fatal("no such target")
			}
			known := endpoints(test.endpoints...)
			if got := show(tables.Plan(test.from, target, known)); got != test.want {
				t.Errorf("got  %s\nwant %s", got, test.want)
			}
			planner := tables.NewPlanner(known)
			for range 2 {
				if got := show(planner.Plan(test.from, target)); got != test.want {
					t.Errorf("planner: got  %s\nwant %s", got, test.want)
				}
			}
		})
	}
	if plan := tables.Plan(sidecar("dc1"), Target{}, endpoints(both...)); plan != nil {
		t.Errorf("the zero target has a plan: %v", plan)
	}
}

func TestPlanNamesWhoMayAnswer(t *testing.T) {
	tables := compileYAML(t, bankingYAML)
	target, _ := tables.Resolve("accounts.banking.example")
	plan := tables.Plan(Place{Datacenter: "dc1", Role: Sidecar}, target, endpoints("accounts@h1/dc1?", "accounts@h2/dc2"))
	instance, gateway := plan[0].Hops[0], plan[1].Hops[0]
	if len(instance.IDs) != 1 || instance.IDs[0] != own("/accounts") || instance.ServerName != "accounts.banking.example" || !instance.Stale {
		t.Errorf("instance: %+v", instance)
	}
	if len(gateway.IDs) != 1 || gateway.IDs[0] != own("/entente/gateway/gw-dc1") || gateway.ServerName != "banking.example" {
		t.Errorf("gateway: %+v", gateway)
	}
	target, _ = tables.Resolve("prices.trading.example")
	peer := tables.Plan(Place{Datacenter: "dc1", Role: Gateway}, target, nil)[0].Hops[0]
	if len(peer.IDs) != 1 || peer.IDs[0] != other("/entente/gateway/gw-dc1") || peer.ServerName != "trading.example" {
		t.Errorf("peer gateway: %+v", peer)
	}
}

func TestPlanProperties(t *testing.T) {
	tables := compileYAML(t, bankingYAML)
	names := []string{"accounts.banking.example", "ledger.banking.example", "statements.banking.example", "prices.trading.example"}
	rapid.Check(t, func(t *rapid.T) {
		known := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) Endpoint {
			return Endpoint{
				Service:    rapid.SampledFrom([]string{"accounts", "ledger", "statements", "prices"}).Draw(t, "service"),
				Agent:      rapid.SampledFrom([]string{"h1", "h2", "h9"}).Draw(t, "agent"),
				Datacenter: rapid.SampledFrom([]string{"dc1", "dc2", "dc3"}).Draw(t, "dc"),
				Address:    fmt.Sprintf("10.9.0.%d:7000", rapid.IntRange(1, 250).Draw(t, "address")),
				Healthy:    rapid.Bool().Draw(t, "healthy"),
				Stale:      rapid.Bool().Draw(t, "stale"),
			}
		}), 0, 8).Draw(t, "endpoints")
		from := Place{
			Datacenter:     rapid.SampledFrom([]string{"dc1", "dc2", "dc3"}).Draw(t, "from"),
			Role:           rapid.SampledFrom([]Role{Sidecar, Gateway, Edge}).Draw(t, "role"),
			FromOwnGateway: rapid.Bool().Draw(t, "own"),
			FromPeer:       rapid.Bool().Draw(t, "peer"),
		}
		target, _ := tables.Resolve(rapid.SampledFrom(names).Draw(t, "target"))
		before := slices.Clone(known)
		plan := tables.Plan(from, target, known)
		if !reflect.DeepEqual(before, known) {
			t.Fatal("the endpoints were changed")
		}
		if again := tables.Plan(from, target, known); !reflect.DeepEqual(plan, again) {
			t.Fatal("the plan is not deterministic")
		}
		healthy := slices.ContainsFunc(known, func(e Endpoint) bool { return e.Healthy })
		for _, g := range plan {
			if len(g.Hops) == 0 {
				t.Fatal("empty group")
			}
			for _, h := range g.Hops {
				foreign := slices.ContainsFunc(h.IDs, func(id spiffeid.ID) bool { return !id.MemberOf(banking) })
				switch {
				case len(h.IDs) == 0:
					t.Fatalf("anybody may answer at %+v", h)
				case from.Role != Gateway && (foreign || h.Kind == ToPeerGateway):
					t.Fatalf("a sidecar gets a foreign address: %+v", h)
				case from.FromOwnGateway && (h.Kind != ToInstance || h.Datacenter != from.Datacenter):
					t.Fatalf("it goes on from an own gateway: %+v", h)
				case from.FromPeer && (foreign || target.Import()):
					t.Fatalf("it goes on to a third domain: %+v", h)
				case foreign != (h.Kind == ToPeerGateway):
					t.Fatalf("kind and identity disagree: %+v", h)
				case from.Role == Gateway && h.Kind == ToOwnGateway && h.Datacenter == from.Datacenter:
					t.Fatalf("a gateway goes to its own datacenter's: %+v", h)
				case h.Kind == ToInstance && h.Datacenter != from.Datacenter:
					t.Fatalf("an instance elsewhere is dialled directly: %+v", h)
				case h.Kind == ToInstance && h.IDs[0] != target.Service.ID:
					t.Fatalf("another may answer: %+v", h)
				case g.Datacenter != h.Datacenter:
					t.Fatalf("group of %s holds %+v", g.Datacenter, h)
				}
			}
		}
		if !target.Import() && !healthy && len(plan) == 0 && len(known) > 0 && target.Service.Failover.Order == nil && !from.FromOwnGateway {
			for _, e := range known {
				if e.Service == target.Service.Label && e.Agent != "h9" && e.Datacenter != "dc3" {
					t.Fatalf("nothing is left though %+v is known", e)
				}
			}
		}
	})
}

func benchPlan() (Place, []string, []Endpoint) {
	var texts []string
	for i := range 8 {
		texts = append(texts, fmt.Sprintf("accounts@h%d/dc%d", i%2+1, i%2+1))
	}
	return Place{Datacenter: "dc1", Role: Sidecar}, texts, endpoints(texts...)
}

func TestPlannerDoesNotAllocate(t *testing.T) {
	tables := compileYAML(t, bankingYAML)
	from, _, known := benchPlan()
	target, _ := tables.Resolve("accounts.banking.example")
	planner := tables.NewPlanner(known)
	planner.Plan(from, target)
	if n := testing.AllocsPerRun(100, func() { planner.Plan(from, target) }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkPlan(b *testing.B) {
	tables := compileYAML(b, bankingYAML)
	from, _, known := benchPlan()
	target, _ := tables.Resolve("accounts.banking.example")
	b.Run("fresh", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			tables.Plan(from, target, known)
		}
	})
	b.Run("planner", func(b *testing.B) {
		planner := tables.NewPlanner(known)
		b.ReportAllocs()
		for b.Loop() {
			planner.Plan(from, target)
		}
	})
}
