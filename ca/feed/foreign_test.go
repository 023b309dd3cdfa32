package feed

import (
	"testing"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// A bundle that this replica alone has accepted goes to whom an entry federates and to
// nobody else, ahead of the policy lane and in each full state, until the agreed one is
// as new; an older one, or one of a domain without a relationship, to nobody.
func TestForeignBundleAhead(t *testing.T) {
	w := newWorld(t, 0)
	w.attest("h1")
	w.attest("h2")
	w.apply(service("accounts", "h1"), gateway("gw-1", "h2"), relationship("trading.example"))
	w.bundleOf("trading.example", 5)
	var plain, host mirror
	workload, gatewayHost := w.subscribe(agentSub("h1", 1), 0), w.subscribe(agentSub("h2", 1), 0)
	w.drain(workload, &plain)
	w.drain(gatewayHost, &host)
	own := func(td string, sequence uint64) map[string]*statev1.ForeignBundle {
		return map[string]*statev1.ForeignBundle{td: {TrustDomain: td, Jwks: []byte("{}"), Sequence: sequence}}
	}
	for what, refused := range map[string]map[string]*statev1.ForeignBundle{
		"older": own("trading.example", 4), "as old": own("trading.example", 5), "without a relationship": own("evil.example", 9),
	} {
		w.f.HoldForeign(refused)
		if u, ok := gatewayHost.Urgent(w.st); ok {
			t.Errorf("%s: told %v", what, u)
		}
	}

	w.f.HoldForeign(own("trading.example", 7))
	u, ok := gatewayHost.Urgent(w.st)
	if !ok || len(u.Foreign) != 1 || u.Foreign[0].GetSequence() != 7 {
		t.Fatalf("urgent: %v, %v", u, ok)
	}
	if _, again := gatewayHost.Urgent(w.st); again {
		t.Error("told twice")
	}
	if u, ok := workload.Urgent(w.st); ok {
		t.Errorf("an agent without a gateway is told %v (I6)", u)
	}
	if p, has, err := gatewayHost.Policy(w.st); has || err != nil {
		t.Errorf("the policy lane moved: %v, %v", p, err)
	}
	fresh := w.subscribe(agentSub("h2", 2), 0)
	if p, has, err := fresh.Policy(w.st); err != nil || !has || len(p.Bundles) != 1 || p.Bundles[0].GetSequence() != 7 {
		t.Errorf("the full state: %v, %v", p.Bundles, err)
	}

	w.bundleOf("trading.example", 8)
	if p, has, err := fresh.Policy(w.st); err != nil || !has || len(p.Bundles) != 1 || p.Bundles[0].GetSequence() != 8 {
		t.Errorf("agreed meanwhile: %v, %v", p.Bundles, err)
	}
	if b, ok := w.f.ForeignBundle(w.st, "trading.example"); !ok || b.GetSequence() != 8 {
		t.Errorf("the newest is %v", b)
	}
}
