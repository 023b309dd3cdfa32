package domain

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

func (w *world) phase(id string) statev1.AuthorityPhase {
	a, _ := w.s.Authority(id)
	return a.GetPhase()
}

// The legal order of an authority's end, and every step out of order refused.
// Requirements: 116.
func TestTaintAndRevoke(t *testing.T) {
	w := newWorld(t)
	a := w.authority("n1", "k1")
	w.must(prepare(a))
	id := a.GetId()
	for _, cmd := range []*statev1.Command{taint(keyID("x")), drained(keyID("x")), revoke(keyID("x"), true)} {
		w.refused(cmd, CodeNotFound)
	}
	w.must(ready(id))
	w.must(activate(id))
	if r := w.refused(revoke(id, false), CodePhase); !strings.Contains(r.Detail, "taint it first") {
		t.Errorf("the refusal says %q", r.Detail)
	}
	w.refused(drained(id), CodePhase)
	w.must(taint(id))
	w.unchanged(taint(id))
	if _, ok := w.s.Active(keyID("n1"), statev1.KeyUse_KEY_USE_X509); ok {
		t.Error("a tainted authority signs")
	}
	if bundle, _ := w.s.OwnBundle(); len(bundle) != 1 {
		t.Error("a tainted authority is not in the bundle: what it signed no longer verifies")
	}
	if got := w.s.Tainted(); !slices.Equal(got, []string{id}) {
		t.Errorf("tainted: %v", got)
	}
	w.refused(activate(id), CodePhase)
	w.refused(revoke(id, false), CodeInUse)
	w.must(drained(id, "CA node n2 does not report"))
	w.unchanged(drained(id))
	if a, _ := w.s.Authority(id); !slices.Equal(a.GetAssumedDrained(), []string{"CA node n2 does not report"}) {
		t.Errorf("who was assumed is not kept: %v", a)
	}
	if len(w.s.Distrust()) != 0 {
		t.Fatal("control: nothing is distrusted yet")
	}
	w.must(revoke(id, false))
	w.unchanged(revoke(id, false))
	if bundle, _ := w.s.OwnBundle(); len(bundle) != 0 {
		t.Error("a revoked authority is in the bundle")
	}
	if d, ok := w.s.DistrustItem("authority/" + id); !ok || d.GetAuthority() != id {
		t.Errorf("distrust: %v", w.s.Distrust())
	}
	w.refused(taint(id), CodePhase)
	w.refused(activate(id), CodePhase)
	// It does not come back as a new one.
	w.unchanged(prepare(a))
	if w.phase(id) != statev1.AuthorityPhase_AUTHORITY_PHASE_REVOKED {
		t.Errorf("it is %s again", w.phase(id))
	}
}

// In an emergency from any phase.
func TestRevokeNow(t *testing.T) {
	for _, steps := range [][]func(string) *statev1.Command{
		{}, {ready}, {ready, activate}, {taint}, {ready, activate, taint},
	} {
		w := newWorld(t)
		a := w.authority("n1", "k1")
		w.must(prepare(a))
		for _, step := range steps {
			w.must(step(a.GetId()))
		}
		w.refused(revoke(a.GetId(), false), map[bool]string{true: CodeInUse, false: CodePhase}[w.phase(a.GetId()) == statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED])
		w.must(revoke(a.GetId(), true))
		if w.phase(a.GetId()) != statev1.AuthorityPhase_AUTHORITY_PHASE_REVOKED {
			t.Errorf("after %d steps it is %s", len(steps), w.phase(a.GetId()))
		}
		// A next one can be made and used.
		b := w.authority("n1", "k2")
		w.must(prepare(b))
		w.must(ready(b.GetId()))
		w.must(activate(b.GetId()))
	}
}

// I9, I4: who was banned is not admitted by any token; who was evicted only by a new one.
func TestBanAndEvict(t *testing.T) {
	w := newWorld(t)
	w.refused(ban("h1"), CodeNotFound)
	w.refused(evict("h1"), CodeNotFound)
	w.must(w.agentToken("t1", "h1", time.Hour))
	w.must(w.attest("t1", keyID("a1")))
	first, _ := w.s.Agent("h1")
	w.must(ban("h1"))
	w.unchanged(ban("h1"))
	w.refused(w.attest("t1", keyID("a1")), CodeAgentBanned)
	w.must(w.agentToken("t2", "h1", time.Hour))
	w.refused(w.attest("t2", keyID("a2")), CodeAgentBanned)
	w.refused(w.attest("t2", keyID("a1")), CodeAgentBanned)

	w.must(evict("h1"))
	if _, ok := w.s.AgentByKey(keyID("a1")); ok || w.s.AgentCount() != 0 {
		t.Error("an evicted agent is still known")
	}
	w.refused(w.attest("t1", keyID("a1")), CodeTokenSpent) // the old word counts no more
	w.must(w.attest("t2", keyID("a1")))                    // the old key does, with a new token
	again, _ := w.s.Agent("h1")
	d, ok := w.s.DistrustItem("agent/h1")
	if !ok || d.GetAgentGeneration() < first.GetGeneration() || d.GetAgentGeneration() >= again.GetGeneration() {
		t.Errorf("generations %d and %d, distrusted: %v", first.GetGeneration(), again.GetGeneration(), d)
	}
	w.refused(revokeToken("t2"), CodeTokenSpent)
	w.refused(revokeToken("t9"), CodeNotFound)
	w.must(w.agentToken("t3", "h2", time.Hour))
	w.must(revokeToken("t3"))
	w.refused(w.attest("t3", keyID("a3")), CodeTokenUnknown)

	// An item is forgotten when nothing that it names can be valid, not before.
	w.must(tick(w.s.Now().Add(w.s.Lifetimes().Phase)))
	if len(w.s.Distrust()) != 1 {
		t.Error("forgotten too early")
	}
	w.must(tick(w.s.Now().Add(ca.DistrustGrace + time.Second)))
	if len(w.s.Distrust()) != 0 {
		t.Error("never forgotten")
	}
}

func TestDeclaredEntries(t *testing.T) {
	w := newWorld(t)
	w.must(w.agentToken("t1", "h1", time.Hour))
	w.must(w.attest("t1", keyID("a1")))
	w.must(objects(service("accounts", "h1"), gateway("gw-1", 1, "h1")))
	good := func() *statev1.Entry { return entry("batch/nightly", "/batch/nightly", "h2", "h1", "h1") }
	for name, test := range map[string]struct {
		code   string
		change *statev1.EntryChange
	}{
		"no action":           {CodeInvalid, &statev1.EntryChange{}},
		"derived id":          {CodeInvalid, create(&statev1.Entry{Id: "service/x", Path: "/x", Hosts: []string{"h1"}, Selectors: []string{"unix:uid:1"}})},
		"delete derived":      {CodeInvalid, deleteEntry("service/accounts")},
		"delete gateway's":    {CodeInvalid, deleteEntry("gateway/gw-1")},
		"bad id":              {CodeInvalid, create(entry("A", "/x", "h1"))},
		"reserved path":       {CodeInvalid, create(entry("x", "/entente/gateway/gw-1", "h1"))},
		"service's path":      {CodeExists, create(entry("x", "/accounts", "h1"))},
		"no host":             {CodeInvalid, create(entry("x", "/x"))},
		"role":                {CodeInvalid, create(&statev1.Entry{Id: "entry/x", Path: "/x", Hosts: []string{"h1"}, Selectors: []string{"unix:uid:1"}, Role: statev1.Role_ROLE_GATEWAY})},
		"service's name":      {CodeInvalid, create(&statev1.Entry{Id: "entry/x", Path: "/x", Hosts: []string{"h1"}, Selectors: []string{"unix:uid:1"}, DnsNames: []string{"accounts.banking.example"}})},
		"path selector alone": {CodeInvalid, create(&statev1.Entry{Id: "entry/x", Path: "/x", Hosts: []string{"h1"}, Selectors: []string{"unix:path:/bin/x"}})},
		"own domain":          {CodeInvalid, create(&statev1.Entry{Id: "entry/x", Path: "/x", Hosts: []string{"h1"}, Selectors: []string{"unix:uid:1"}, FederatesWith: []string{"banking.example"}})},
		"create at revision":  {CodeInvalid, &statev1.EntryChange{Action: create(good()).GetAction(), IfRevision: 5}},
		"update of none":      {CodeNotFound, update(good(), 0)},
		"delete of none":      {CodeNotFound, deleteEntry("entry/x")},
	} {
		if r := w.refused(entries(create(entry("other", "/other", "h1")), test.change), test.code); r.Detail == "" {
			t.Errorf("%s: no reason", name)
		}
	}
	if _, ok := w.s.Entry("entry/other"); ok {
		t.Fatal("a refused command made an entry")
	}
	w.refused(entries(), CodeInvalid)
	w.refused(entries(create(good()), create(good())), CodeInvalid)

	w.must(entries(create(good())))
	w.unchanged(entries(create(good())))
	made, _ := w.s.Entry("entry/batch/nightly")
	if !slices.Equal(made.GetHosts(), []string{"h1", "h2"}) {
		t.Errorf("hosts %v", made.GetHosts())
	}
	other := good()
	other.Path = "/batch/other"
	w.refused(entries(create(other)), CodeExists)
	w.refused(entries(update(other, made.GetRevision()-1)), CodeCAS)

	// Another selector voids nothing; a host less voids at that host; another path all.
	same := good()
	same.Selectors = []string{"unix:uid:2"}
	w.must(entries(update(same, made.GetRevision())))
	if n := len(w.s.Distrust()); n != 0 {
		t.Fatalf("control: %v", w.s.Distrust())
	}
	same.Hosts = []string{"h2"}
	w.must(entries(update(same, 0)))
	if d, ok := w.s.DistrustItem("agent/h1 entry/entry/batch/nightly"); !ok || d.GetEntryGeneration() == 0 {
		t.Errorf("%v", w.s.Distrust())
	}
	w.must(entries(update(good(), 0)))
	w.must(entries(update(other, 0)))
	if _, ok := w.s.DistrustItem("entry/entry/batch/nightly"); !ok {
		t.Errorf("%v", w.s.Distrust())
	}
	// A service cannot take its identity over.
	r := w.refused(objects(&statev1.Object{Kind: &statev1.Object_Service{Service: &statev1.Service{
		Name: "other", Path: "/batch/other", Hosts: []string{"h1"}, Selectors: []string{"unix:uid:1"}, Port: 1,
	}}}), CodeExists)
	if !strings.Contains(r.Detail, "entry/batch/nightly") {
		t.Error(r)
	}
	w.must(entries(deleteEntry("entry/batch/nightly")))
	// An entry whose hosts were never attested leaves nothing behind.
	before := len(w.s.Distrust())
	w.must(entries(create(entry("nobody", "/nobody", "h9"))))
	w.must(entries(deleteEntry("entry/nobody")))
	if len(w.s.Distrust()) != before {
		t.Error("distrust of what nobody can hold")
	}
}

// A Tick must not be where replicas part: the bound counts the items that are there.
func TestDistrustIsBounded(t *testing.T) {
	w := newWorld(t)
	w.must(w.agentToken("t1", "h1", time.Hour))
	w.must(w.attest("t1", keyID("a1")))
	w.must(entries(create(entry("x", "/x", "h1"))))
	full := &application{State: w.s, rev: w.s.revision}
	for i := range maxDistrust {
		id := fmt.Sprintf("authority/%064x", i)
		put(full, &w.s.distrust, id, &statev1.Distrust{Id: id, Authority: "x", NotAfter: 1 << 40})
	}
	w.index++
	if out := w.s.Apply(w.index, entries(deleteEntry("entry/x"))); out.Refused == nil || out.Refused.Code != CodeLimit {
		t.Errorf("%v", out.Refused)
	}
	w.index++
	if out := w.s.Apply(w.index, ban("h1")); out.Refused != nil {
		t.Errorf("a ban is always possible: %v", out.Refused)
	}
}

// One entry of the log may hold many commands, all of one revision. What it makes, ends
// and makes again is not distrusted; what was there before it is.
func TestMadeAndEndedInOneEntry(t *testing.T) {
	w := newWorld(t)
	w.must(level("n1", 3))
	together := func(commands ...*statev1.Command) {
		t.Helper()
		for i, cmd := range commands {
			w.must(cmd)
			if i < len(commands)-1 {
				w.index--
			}
		}
	}
	w.must(admit("h1", "k1", "c1"))
	held, _ := w.s.Agent("h1")
	together(evict("h1"), admit("h1", "k2", "c1"), evict("h1"), admit("h1", "k3", "c1"))
	if host, _ := w.s.Agent("h1"); w.s.Distrusts(ca.Origin{Agent: "h1", AgentGeneration: host.GetGeneration()}) {
		t.Error("the host that was admitted last is distrusted")
	}
	if !w.s.Distrusts(ca.Origin{Agent: "h1", AgentGeneration: held.GetGeneration()}) {
		t.Error("control: the host of before is not distrusted")
	}
	w.must(entries(create(entry("a", "/a", "h1"))))
	before, _ := w.s.Entry("entry/a")
	together(entries(deleteEntry("entry/a")), entries(create(entry("a", "/a", "h1"))), entries(deleteEntry("entry/a")), entries(create(entry("a", "/b", "h1"))))
	host, _ := w.s.Agent("h1")
	of := func(e *statev1.Entry) ca.Origin {
		return ca.Origin{Agent: "h1", AgentGeneration: host.GetGeneration(), Entry: e.GetId(), EntryGeneration: e.GetRevision()}
	}
	if now, _ := w.s.Entry("entry/a"); w.s.Distrusts(of(now)) {
		t.Error("the entry that was created last is distrusted")
	}
	if !w.s.Distrusts(of(before)) {
		t.Error("control: the entry of before is not distrusted")
	}
}

// I4: SVIDs of an entry that somebody who matched it no longer matches are distrusted; a
// wider entry voids nothing. Below the feature level Apply decides as before.
func TestNarrowedEntriesAreDistrusted(t *testing.T) {
	const byEntry, byHost = "entry/entry/a", "agent/h1 entry/entry/a"
	with := func(change func(*statev1.Entry)) *statev1.Entry {
		e := entry("a", "/a", "h1", "h2")
		e.Selectors, e.NodeSelectors = []string{"unix:uid:1000", "unix:gid:5"}, []string{"token:rack:r1"}
		change(e)
		return e
	}
	for name, test := range map[string]struct {
		change func(*statev1.Entry)
		item   string // empty: none
		grace  bool
	}{
		"a selector more":                    {func(e *statev1.Entry) { e.Selectors = append(e.Selectors, "unix:path:/bin/a") }, byEntry, true},
		"another value":                      {func(e *statev1.Entry) { e.Selectors[0] = "unix:uid:2000" }, byEntry, true},
		"another value and a selector fewer": {func(e *statev1.Entry) { e.Selectors = []string{"unix:uid:2000"} }, byEntry, true},
		"another kind":                       {func(e *statev1.Entry) { e.Selectors = []string{"systemd:unit:a.service"} }, byEntry, true},
		"a host fewer":                       {func(e *statev1.Entry) { e.Hosts = []string{"h2"} }, byHost, false},
		"a node selector that the host lacks": {func(e *statev1.Entry) {
			e.NodeSelectors = append(e.NodeSelectors, "token:hsm")
		}, byHost, false},
		"a node selector that the host has": {func(e *statev1.Entry) { e.NodeSelectors = append(e.NodeSelectors, "token:pci") }, "", false},
		"a node selector fewer":             {func(e *statev1.Entry) { e.NodeSelectors = nil }, "", false},
		"a selector fewer":                  {func(e *statev1.Entry) { e.Selectors = e.Selectors[:1] }, "", false},
		"a host more":                       {func(e *statev1.Entry) { e.Hosts = append(e.Hosts, "h3") }, "", false},
		"the same in another order":         {func(e *statev1.Entry) { slices.Reverse(e.Selectors); e.Hint = "x" }, "", false},
	} {
		t.Run(name, func(t *testing.T) {
			for _, n := range []uint32{levelHardened - 1, levelHardened} {
				w := newWorld(t)
				w.must(level("n1", n))
				w.must(w.token("t1", &statev1.Token{Grant: &statev1.Token_Agent{Agent: &statev1.AgentGrant{
					Name: "h1", Datacenter: "dc1", Addresses: []string{"127.1.0.9"}, Selectors: []string{"token:rack:r1", "token:pci"}}}}, time.Hour))
				w.must(w.attest("t1", keyID("a1")))
				w.must(entries(create(with(func(*statev1.Entry) {}))))
				host, _ := w.s.Agent("h1")
				before, _ := w.s.Entry("entry/a")
				w.must(entries(update(with(test.change), 0)))
				after, _ := w.s.Entry("entry/a")

				wanted := test.item
				if n < levelHardened && name != "a host fewer" {
					wanted = ""
				}
				all := w.s.Distrust()
				if wanted == "" {
					if len(all) > 0 {
						t.Errorf("level %d: %v", n, all)
					}
					continue
				}
				if len(all) != 1 || all[0].GetId() != wanted || (all[0].GetGraceMs() > 0) != test.grace {
					t.Fatalf("level %d: %v", n, all)
				}
				of := func(e *statev1.Entry) ca.Origin {
					return ca.Origin{Agent: "h1", AgentGeneration: host.GetGeneration(), Entry: e.GetId(), EntryGeneration: e.GetRevision()}
				}
				if !w.s.Distrusts(of(before)) {
					t.Error("an SVID of before is accepted")
				}
				if test.item == byEntry && w.s.Distrusts(of(after)) { // control
					t.Error("an SVID of the narrowed entry is distrusted")
				}
			}
		})
	}
}

// The same of entries that follow from services and gateways.
func TestNarrowedServicesAreDistrusted(t *testing.T) {
	w := newWorld(t)
	w.must(level("n1", levelHardened))
	w.must(w.agentToken("t1", "h1", time.Hour))
	w.must(w.attest("t1", keyID("a1")))
	w.must(objects(service("accounts", "h1"), gateway("gw-1", 1, "h1")))
	wider, narrower := service("accounts", "h1"), service("accounts", "h1")
	wider.GetService().Selectors = []string{"unix:uid:1000"}
	narrower.GetService().Selectors = []string{"unix:uid:1000", "unix:path:/opt/other"}
	w.must(objects(wider))
	if all := w.s.Distrust(); len(all) > 0 {
		t.Fatalf("control: %v", all)
	}
	w.must(objects(narrower))
	if _, ok := w.s.DistrustItem("entry/service/accounts"); !ok {
		t.Errorf("%v", w.s.Distrust())
	}
	other := gateway("gw-1", 1, "h1")
	other.GetGateway().Selectors = []string{"unix:uid:2000"}
	w.must(objects(other))
	if _, ok := w.s.DistrustItem("entry/gateway/gw-1"); !ok {
		t.Errorf("%v", w.s.Distrust())
	}
}
