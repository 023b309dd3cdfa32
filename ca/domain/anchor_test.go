package domain

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

// A digest says which program runs, and any user can start it and load code into it. Entries and Services that rest on one
// alone are refused; those that were stored before go on, may change, and give no more than they did.
func TestSelectorsSayWhoseProcessItIs(t *testing.T) {
	weak := []string{"unix:path:/opt/app", "unix:sha256:" + strings.Repeat("a", 64)}
	weakEntry := func(name string, hosts ...string) *statev1.Entry {
		e := entry(name, "/"+name, hosts...)
		e.Selectors = weak
		return e
	}
	weakService := func(name string, hosts ...string) *statev1.Object {
		o := service(name, hosts...)
		o.GetService().Selectors = weak
		return o
	}
	w := newWorld(t)
	// Below the level all members decide as the release before did; doors refuse at once.
	w.must(entries(create(weakEntry("old", "h1", "h2"))))
	w.must(objects(weakService("oldsvc", "h1", "h2"), gateway("g", 1, "h3")))
	if _, _, refusal := w.s.PlanEntry(create(weakEntry("new", "h1"))); refusal == nil || !strings.Contains(refusal.Error(), "add unix:uid") {
		t.Errorf("the door below the level: %v", refusal)
	}
	if _, _, refusal := w.s.PlanEntry(create(entry("new", "/new", "h1"))); refusal != nil {
		t.Errorf("control: %v", refusal)
	}
	w.must(level("n1", levelHardened))
	if n := w.s.WeakEntryCount(); n != 2 {
		t.Errorf("%d entries count as weak, not 2 of %d", n, w.s.EntryCount())
	}

	w.refused(entries(create(weakEntry("new", "h1"))), CodeInvalid)
	w.refused(objects(weakService("newsvc", "h1")), CodeInvalid)
	w.must(entries(create(entry("new", "/new", "h1"))))
	w.must(objects(service("newsvc", "h1")))
	weakened := entry("new", "/new", "h1")
	weakened.Selectors = weak
	w.refused(entries(update(weakened, 0)), CodeInvalid)
	w.refused(objects(weakService("newsvc", "h1")), CodeInvalid)

	// Stored before: what gives no more.
	for _, id := range []string{"entry/old", ca.ServiceEntry("oldsvc")} {
		if e, ok := w.s.Entry(id); !ok || len(e.GetSelectors()) != 2 {
			t.Fatalf("%s: %v", id, e)
		}
	}
	same := weakEntry("old", "h1", "h2")
	same.Hint = "changed"
	w.must(entries(update(same, 0)))
	w.must(entries(update(weakEntry("old", "h1"), 0)))
	changed := weakService("oldsvc", "h1", "h2")
	changed.GetService().Hint = "changed"
	w.must(objects(changed))
	w.must(objects(proto.CloneOf(changed)))
	w.must(objects(relationship("trading.example"))) // looks at the gateways again

	// And what gives more.
	w.refused(entries(update(weakEntry("old", "h1", "h9"), 0)), CodeInvalid)
	moved := weakEntry("old", "h1")
	moved.Path = "/other"
	w.refused(entries(update(moved, 0)), CodeInvalid)
	other := weakEntry("old", "h1")
	other.Selectors = weak[1:]
	w.refused(entries(update(other, 0)), CodeInvalid)
	w.refused(objects(weakService("oldsvc", "h1", "h2", "h9")), CodeInvalid)

	anchored := weakEntry("old", "h1", "h9")
	anchored.Selectors = append([]string{"systemd:unit:app.service"}, weak...)
	w.must(entries(update(anchored, 0)))
	if n := w.s.WeakEntryCount(); n != 1 {
		t.Errorf("%d entries count as weak, not only the Service's", n)
	}
}

// User names of over 32 bytes stand in Services and Gateways once all CA nodes take them;
// the release before refuses them there, and takes them in entries.
func TestLongUserNamesInTheCatalogueNeedTheLevel(t *testing.T) {
	user := func(n int) []string { return []string{"unix:user:" + strings.Repeat("u", n)} }
	named := func(n int) *statev1.Object {
		o := service("svc", "h1")
		o.GetService().Selectors = user(n)
		return o
	}
	door := gateway("g", 1, "h3")
	door.GetGateway().Selectors = user(33)
	e := entry("job", "/job", "h1")
	e.Selectors = user(256)

	w := newWorld(t)
	w.must(entries(create(e)))
	w.must(objects(named(32))) // control
	w.refused(objects(named(33)), CodeFeature)
	w.refused(objects(door), CodeFeature)

	w.must(level("n1", levelHardened))
	w.must(objects(named(256)))
	w.must(objects(door))
	w.refused(objects(named(257)), CodeInvalid)
	if e, ok := w.s.Entry(ca.ServiceEntry("svc")); !ok || e.GetSelectors()[0] != user(256)[0] {
		t.Errorf("%v", e)
	}
}
