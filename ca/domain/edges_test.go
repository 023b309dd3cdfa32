package domain

import (
	"testing"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

// Gateways and declared edges follow Sync. A Service that listens nowhere does if it was
// stored when none could be declared as an edge, and until it changes: one that is made
// later is an application that only uses the Workload API.
func TestOnlyEdgesOfBeforeNeedNoDeclaration(t *testing.T) {
	listensNowhere := func(name string) *statev1.Object {
		o := service(name, "h1")
		o.GetService().Port, o.GetService().OutboundPort = 0, 0
		return o
	}
	entry := func(w *world, name string) *statev1.Entry {
		t.Helper()
		e, ok := w.s.Entry(ca.ServiceEntry(name))
		if !ok {
			t.Fatalf("no entry of %s", name)
		}
		return e
	}
	check := func(w *world, name string, want bool) {
		t.Helper()
		if got := w.s.MaySync(entry(w, name)); got != want {
			t.Errorf("%s may follow Sync: %v", name, got)
		}
	}
	w := newWorld(t)
	w.must(level("n1", 4))
	w.must(objects(listensNowhere("old"), listensNowhere("changed"), service("accounts", "h1")))
	check(w, "old", true) // a cluster with a member of the release before decides as that did
	check(w, "accounts", false)
	w.must(level("n1", 5))
	check(w, "old", true)
	check(w, "changed", true)

	changed, declared := listensNowhere("changed"), listensNowhere("declared")
	changed.GetService().Calls = []string{"accounts.banking.example"}
	declared.GetService().Edge = true
	w.must(objects(listensNowhere("new"), declared, changed, listensNowhere("old"))) // old is the same as before
	check(w, "new", false)
	check(w, "changed", false)
	check(w, "declared", true)
	check(w, "old", true)
	check(w, "accounts", false)
	w.s = w.restored() // from a snapshot
	check(w, "old", true)
	check(w, "new", false)
}
