package feed

import (
	"slices"
	"strings"
	"testing"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
)

// laterLevels is what a later release might have added, named by what there is today.
var laterLevels = levels{
	"entente.state.v1.Object.gateway":            {level: ca.SyncLevel + 1},
	"entente.state.v1.Service.health_path":       {level: ca.SyncLevel + 1},
	"entente.state.v1.Service.calls":             {level: ca.SyncLevel + 1, restricts: true},
	"entente.state.v1.Distrust.agent_generation": {level: ca.SyncLevel + 1, restricts: true},
}

func (w *world) subscribeAt(level uint32, name string, connect, resume uint64) *Session {
	w.t.Helper()
	who := agentSub(name, connect)
	who.Level = level
	s, err := w.f.Subscribe(start, w.st, who, resume)
	if err != nil {
		w.t.Fatalf("%v", err)
	}
	return s
}

func (w *world) told(s *Session) Update {
	w.t.Helper()
	u, ok, err := s.Policy(w.st)
	if err != nil || !ok {
		w.t.Fatalf("told nothing: %v", err)
	}
	return u
}

func keys(objects []*statev1.Object) (list []string) {
	for _, o := range objects {
		list = append(list, domain.ObjectKey(o))
	}
	return list
}

// Who does not know a kind of object or a field is told without it; who knows it gets all.
// What restricts is named to whom cannot enforce it, and to operators, until it is gone.
func TestOlderSubscribersAreToldWhatTheyKnow(t *testing.T) {
	w := newWorld(t, 0)
	w.f.levels = laterLevels
	w.attest("h1")
	w.attest("h2")
	accounts := service("accounts", "h1")
	accounts.GetService().HealthPath = "/ok"
	w.apply(accounts, gateway("gw-1", "h2"))

	older, present := w.subscribeAt(ca.SyncLevel, "h1", 1, 0), w.subscribeAt(ca.SyncLevel+1, "h2", 1, 0)
	full, all := w.told(older), w.told(present)
	if got := keys(full.Objects); !slices.Equal(got, []string{"Service/accounts"}) || full.Objects[0].GetService().GetHealthPath() != "" {
		t.Errorf("the older one was told %v", full.Objects)
	}
	if got := keys(all.Objects); !slices.Equal(got, []string{"Gateway/gw-1", "Service/accounts"}) || all.Objects[1].GetService().GetHealthPath() != "/ok" {
		t.Errorf("the present one was told %v", all.Objects)
	}
	if o, _ := w.st.Object("Service/accounts"); o.GetService().GetHealthPath() != "/ok" {
		t.Error("the state's own record was changed")
	}
	if len(full.TooOld) > 0 || len(all.TooOld) > 0 {
		t.Errorf("nothing restricts, and %v and %v are too old for it", full.TooOld, all.TooOld)
	}
	if list := w.f.Older(); len(list) > 0 {
		t.Errorf("both are of this release's level, and listed: %v", list)
	}

	narrowed := service("accounts", "h1")
	narrowed.GetService().Calls = []string{"ledger.banking.example"}
	ledger := service("ledger", "h2")
	w.apply(narrowed, gateway("gw-2", "h2"), ledger)
	u := w.told(older)
	if !u.TooOldChanged || len(u.TooOld) != 1 || !strings.Contains(u.TooOld[0], "object Service/accounts: calls") {
		t.Errorf("the older one cannot enforce %v", u.TooOld)
	}
	if slices.Contains(keys(u.Objects), "Gateway/gw-2") {
		t.Error("the older one was told of a kind of object that it does not know")
	}
	if u := w.told(present); len(u.TooOld) > 0 || !slices.Contains(keys(u.Objects), "Gateway/gw-2") || len(u.Objects[1].GetService().GetCalls()) == 0 {
		t.Errorf("the present one was told %v, too old for %v", u.Objects, u.TooOld)
	}
	if list := w.f.Older(); len(list) != 1 || list[0].Name != "agent h1" || len(list[0].TooOld) != 1 {
		t.Errorf("operators are told of %v", list)
	}

	// After a resume all of it is known again, whatever changed.
	resumed := w.subscribeAt(ca.SyncLevel, "h1", 2, w.f.Revision())
	if u := w.told(resumed); !u.TooOldChanged || len(u.TooOld) != 1 || u.Full {
		t.Errorf("resumed: %v", u.TooOld)
	}
	w.apply(service("accounts", "h1"))
	if u := w.told(resumed); !u.TooOldChanged || len(u.TooOld) != 0 {
		t.Errorf("nothing restricts any more, and it cannot enforce %v", u.TooOld)
	}
	if list := w.f.Older(); len(list) > 0 {
		t.Errorf("operators are told of %v", list)
	}
}

// A distrust item that names something by a field the subscriber does not know would name
// more without it: it is left out of both lanes, and the subscriber is too old.
func TestOlderSubscribersAreNotToldHalfADistrust(t *testing.T) {
	w := newWorld(t, 0)
	w.f.levels = laterLevels
	for _, name := range []string{"h1", "h2", "h3"} {
		w.attest(name)
	}
	older, present := w.subscribeAt(ca.SyncLevel, "h1", 1, 0), w.subscribeAt(ca.SyncLevel+1, "h2", 1, 0)
	w.told(older)
	w.told(present)
	w.must(&statev1.Command{Body: &statev1.Command_BanAgent{BanAgent: &statev1.BanAgent{Name: "h3"}}})
	if u, _ := older.Urgent(w.st); len(u.Distrust) > 0 {
		t.Errorf("urgent: %v", u.Distrust)
	}
	if u := w.told(older); len(u.Distrust) > 0 || len(u.TooOld) != 1 {
		t.Errorf("%v; too old for %v", u.Distrust, u.TooOld)
	}
	if u, ok := present.Urgent(w.st); !ok || len(u.Distrust) != 1 {
		t.Errorf("the present one, urgent: %v", u.Distrust)
	}
	if u := w.told(present); len(u.Distrust) != 1 || len(u.TooOld) > 0 {
		t.Errorf("the present one: %v; too old for %v", u.Distrust, u.TooOld)
	}
}

// Rows name fields that there are, and of a level that this release has.
func TestLevelsNameFields(t *testing.T) {
	for _, table := range []levels{sinceLevel, laterLevels} {
		for name, row := range table {
			message := statev1.File_entente_state_v1_state_proto.Messages().ByName(name.Parent().Name())
			if message == nil || message.Fields().ByName(name.Name()) == nil {
				t.Errorf("%s is not a field of the state's records", name)
			}
			if row.level == 0 {
				t.Errorf("%s is of level 0, which every release knows", name)
			}
		}
	}
	for name, row := range sinceLevel {
		if row.level > ca.SyncLevel {
			t.Errorf("%s is of level %d, this release of %d: raise ca.SyncLevel", name, row.level, ca.SyncLevel)
		}
	}
}

// An older level, and what a subscriber says it does not know, stand in the status.
func TestOlderSubscribersAreListed(t *testing.T) {
	w := newWorld(t, 0)
	for _, name := range []string{"h1", "h2", "h3"} {
		w.attest(name)
	}
	w.subscribeAt(0, "h1", 1, 0)
	w.subscribeAt(ca.SyncLevel, "h2", 1, 0)
	said := w.subscribeAt(ca.SyncLevel, "h3", 1, 0)
	said.Skipped([]string{"Object: field 300"})
	list := w.f.Older()
	if len(list) != 2 || list[0].Name != "agent h3" || !slices.Equal(list[0].Skipped, []string{"Object: field 300"}) || list[1].Name != "agent h1" || list[1].Level != 0 {
		t.Errorf("%+v", list)
	}
	if level, ok := w.f.LevelOf("h2"); !ok || level != ca.SyncLevel {
		t.Errorf("level %d, %v", level, ok)
	}
	if _, ok := w.f.LevelOf("h9"); ok {
		t.Error("an agent without a session has a level")
	}
}

// Role bindings are told to whom knows what to do with them, and not to releases before.
func TestRoleBindingsAreNewsOfLevel2(t *testing.T) {
	w := newWorld(t, 0)
	w.attest("h1")
	w.attest("h2")
	binding := func(name string) *statev1.Object {
		return &statev1.Object{Kind: &statev1.Object_RoleBinding{RoleBinding: &statev1.RoleBinding{
			Name: name, Role: statev1.AdminRole_ADMIN_ROLE_VIEWER, Subjects: []string{"/people/eva"}}}}
	}
	w.apply(service("accounts", "h1"), binding("eva"))
	older, present := w.subscribeAt(1, "h1", 1, 0), w.subscribeAt(2, "h2", 1, 0)
	if u := w.told(older); !slices.Equal(keys(u.Objects), []string{"Service/accounts"}) || len(u.TooOld) > 0 {
		t.Errorf("level 1 is told %v, too old for %v", keys(u.Objects), u.TooOld)
	}
	if u := w.told(present); !slices.Equal(keys(u.Objects), []string{"RoleBinding/eva", "Service/accounts"}) {
		t.Errorf("level 2 is told %v", keys(u.Objects))
	}
	w.apply(binding("eva2"), service("ledger", "h2"))
	if u := w.told(older); !slices.Equal(keys(u.Objects), []string{"Service/ledger"}) {
		t.Errorf("level 1 is told %v", keys(u.Objects))
	}
	if u := w.told(present); !slices.Equal(keys(u.Objects), []string{"RoleBinding/eva2", "Service/ledger"}) {
		t.Errorf("level 2 is told %v", keys(u.Objects))
	}
}
