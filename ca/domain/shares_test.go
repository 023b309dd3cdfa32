package domain

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

// carry applies a command without the checks of the whole state, for tests of large ones.
func (w *world) carry(cmd *statev1.Command) *Refusal {
	w.index++
	return w.s.Apply(w.index, cmd).Refused
}

func (w *world) carried(cmd *statev1.Command) {
	w.t.Helper()
	if refusal := w.carry(cmd); refusal != nil {
		w.t.Fatalf("%T: %v", cmd.GetBody(), refusal)
	}
}

// owned is a domain of that level with the attested hosts h1 and h2, and two owners: pia of
// /team/pay, tom of /team/trade.
func owned(t testing.TB, at uint32) *world {
	w := newWorld(t)
	w.must(level("n1", at))
	for _, host := range []string{"h1", "h2"} {
		w.must(admit(host, "key of "+host, "certificate of "+host))
	}
	w.must(objects(binding("pia", serviceOwner, "/people/pia", "/team/pay"), binding("tom", serviceOwner, "/people/tom", "/team/trade")))
	return w
}

// churn has pia create and delete entries until she is refused, and returns how many went.
func churn(w *world, most int) (n int, refused *Refusal) {
	for n < most {
		var created, deleted []*statev1.EntryChange
		for i := range 500 {
			id := fmt.Sprintf("pay-%d", n+i)
			created = append(created, create(uid(entry(id, "/team/pay/"+id, "h1"), "7")))
			deleted = append(deleted, deleteEntry("entry/"+id))
		}
		if refused = w.carry(as("/people/pia", entries(created...))); refused != nil {
			return n, refused
		}
		if refused = w.carry(as("/people/pia", entries(deleted...))); refused != nil {
			return n, refused
		}
		n += len(created)
	}
	return n, nil
}

// An owner with a prefix fills its own share of the distrust table and no more: nobody else
// notices, whatever it creates and deletes; when SVIDs have ended, it goes on.
func TestOwnerCannotFillTheDistrustTable(t *testing.T) {
	oneGoroutine(t)
	w := owned(t, FeatureLevel)
	w.must(entries(create(uid(entry("kept", "/team/pay/kept", "h1"), "8")), create(uid(entry("other", "/else", "h1"), "9"))))
	n, refused := churn(w, 2*maxDistrust)
	if refused == nil || refused.Code != CodeLimit || n > maxOwned || len(w.s.distrust.rows) > maxOwned {
		t.Fatalf("%d entries went, %d items, refused: %v", n, len(w.s.distrust.rows), refused)
	}
	// It still takes away, also hosts, and still changes what gives no more.
	narrowed := uid(entry("kept", "/team/pay/kept", "h1"), "8")
	narrowed.Hint = "x"
	w.carried(as("/people/pia", entries(update(narrowed, 0))))
	w.carried(as("/people/pia", entries(deleteEntry("entry/kept"))))
	// Others, with a prefix and without, have all their room.
	w.carried(as("/people/tom", entries(create(uid(entry("t", "/team/trade/t", "h2"), "1")))))
	w.carried(as("/people/tom", entries(deleteEntry("entry/t"))))
	w.carried(entries(create(uid(entry("op", "/op", "h2"), "2"))))
	w.carried(entries(deleteEntry("entry/other")))
	w.carried(ban("h1"))
	w.carried(evict("h2"))

	// A replica of a snapshot counts the same.
	var image bytes.Buffer
	if _, err := w.s.Snapshot().WriteTo(&image); err != nil {
		t.Fatal(err)
	}
	restored, err := Restore(&image)
	if err != nil {
		t.Fatal(err)
	}
	again := as("/people/pia", entries(create(uid(entry("again", "/team/pay/again", "h1"), "7"))))
	for name, s := range map[string]*State{"replica": w.s, "of a snapshot": restored} {
		if r := s.Administrator("/people/pia").MayCarryOut(as("/people/pia", entries(create(uid(entry("a", "/team/pay/a", "h1"), "7")), create(uid(entry("b", "/team/pay/b", "h1"), "7"))))); r == nil && s.shares["/team/pay"]+2 > maxOwned {
			t.Errorf("%s: %d owned, and not refused", name, s.shares["/team/pay"])
		}
		if s.shares["/team/pay"] != w.s.shares["/team/pay"] || s.shares["/team/pay"] < maxOwned-500 {
			t.Errorf("%s: %d owned", name, s.shares["/team/pay"])
		}
	}
	for end := w.s.Now().Add(w.s.Lifetimes().Phase + ca.DistrustGrace + time.Hour); w.s.Now().Before(end); {
		w.carried(tick(w.s.Now().Add(MaxTickStep))) // agreed time moves by bounded steps
	}
	if len(w.s.distrust.rows) != 0 || w.s.shares["/team/pay"] != 0 {
		t.Fatalf("%d items after all SVIDs have ended, %d counted", len(w.s.distrust.rows), w.s.shares["/team/pay"])
	}
	w.carried(again)

	// Below the level it is as it was, and this is the hole.
	old := owned(t, levelHardened-1)
	old.must(entries(create(uid(entry("other", "/else", "h1"), "9"))))
	if n, refused := churn(old, 2*maxDistrust); refused == nil || n < maxDistrust-1000 {
		t.Fatalf("control: %d entries went, refused: %v", n, refused)
	}
	for i := 0; old.carry(as("/people/pia", entries(create(uid(entry(fmt.Sprint("z", i), fmt.Sprint("/team/pay/z", i), "h1"), "7"))))) == nil; i++ {
		if old.carry(as("/people/pia", entries(deleteEntry(fmt.Sprint("entry/z", i))))) != nil {
			break
		}
	}
	if r := old.carry(entries(deleteEntry("entry/other"))); r == nil || r.Code != CodeLimit {
		t.Errorf("control: below the level an operator's delete is refused when the table is full: %v", r)
	}
}

// A removal or revocation is never refused for want of room (I14). What is coalesced then
// denies all that was denied before, and nothing that was signed after.
func TestRemovalsAreNeverRefused(t *testing.T) {
	w := newWorld(t)
	w.must(level("n1", FeatureLevel))
	full := &application{State: w.s, rev: w.s.revision}
	const hosts = 400
	var all, left []string
	for i := range hosts {
		name := fmt.Sprintf("h%d", i)
		put(full, &w.s.agents, name, &statev1.Agent{Name: name, KeyId: keyID(name), Datacenter: "dc1", Generation: 1})
		w.s.agentByKey[keyID(name)] = name
		if all = append(all, name); i < 10 {
			left = append(left, name)
		}
	}
	a := w.authority("n1", "k1")
	w.carried(prepare(a))
	w.carried(entries(create(entry("wide", "/wide", all...)), create(entry("gone", "/gone", "h1"))))
	before, _ := w.s.Entry("entry/wide")
	for i := range maxDistrust {
		id := fmt.Sprintf("entry/x%d", i)
		put(full, &w.s.distrust, id, &statev1.Distrust{Id: id, Entry: fmt.Sprintf("x%d", i), EntryGeneration: 1, NotAfter: 1 << 40})
	}

	w.carried(entries(deleteEntry("entry/gone")))
	w.carried(entries(update(entry("wide", "/wide", left...), 0)))
	for _, cmd := range []*statev1.Command{ban("h1"), evict("h2"), revoke(a.GetId(), true), mergeBans(false, &statev1.Agent{Name: "h3", KeyId: keyID("h3"), Datacenter: "dc1", Generation: 1})} {
		w.carried(cmd)
	}
	items := len(w.s.distrust.rows)
	if items > maxDistrust+10 {
		t.Errorf("%d items: those of one entry at %d hosts are not coalesced", items, hosts-len(left))
	}
	after, _ := w.s.Entry("entry/wide")
	for _, host := range all {
		if !w.s.Distrusts(ca.Origin{Agent: host, AgentGeneration: 2, Entry: before.GetId(), EntryGeneration: before.GetRevision()}) {
			t.Fatalf("%s: what was issued before the entry left hosts is accepted", host)
		}
	}
	if w.s.Distrusts(ca.Origin{Agent: "h5", AgentGeneration: 2, Entry: after.GetId(), EntryGeneration: after.GetRevision()}) {
		t.Error("what is issued now is not accepted where the entry still is")
	}
	for name, o := range map[string]ca.Origin{
		"a deleted entry": {Agent: "h9", AgentGeneration: 2, Entry: "entry/gone", EntryGeneration: before.GetRevision()}, "a banned agent": {Agent: "h1", AgentGeneration: 1},
		"an evicted agent": {Agent: "h2", AgentGeneration: 1}, "a remembered ban": {Agent: "h3", AgentGeneration: 1}, "an old item": {Agent: "h9", AgentGeneration: 2, Entry: "x7", EntryGeneration: 1},
	} {
		if !w.s.Distrusts(o) {
			t.Errorf("%s: %+v is accepted", name, o)
		}
	}
	if _, ok := w.s.DistrustItem("authority/" + a.GetId()); !ok {
		t.Error("the revoked authority is not named")
	}
}

// An api-owner's agreements have a share, and what one administrator puts aside of changes
// leaves room for the others; viewers put nothing aside, and nobody takes another's away.
func TestSharesOfOwners(t *testing.T) {
	oneGoroutine(t)
	w := owned(t, FeatureLevel)
	w.must(objects(relationship("trading.example")))
	w.must(objects(at(service("accounts", "h1"), "/team/pay/accounts", "1", "trading.example")))
	w.must(objects(binding("ann", apiOwner, "/people/ann", "/team/pay"), binding("ann2", serviceOwner, "/people/ann", "/team/pay"), binding("vic", viewer, "/people/vic")))
	base := agreement("base", forAccounts, knownGateway)
	w.must(objects(base))
	for i := 1; ; i++ {
		var upserts []*statev1.Object
		for j := range 100 {
			upserts = append(upserts, agreement(fmt.Sprintf("a%d-%d", i, j), forAccounts, knownGateway))
		}
		if r := w.carry(as("/people/ann", objects(upserts...))); r != nil {
			if r.Code != CodeLimit || i*100 < maxOwnedAgreements {
				t.Fatalf("after %d agreements: %v", i*100-100, r)
			}
			break
		}
	}
	w.carried(as("/people/ann", deletes("Agreement/a1-1")))
	w.carried(objects(agreement("operators", forAccounts, knownGateway)))

	big := func(change int, part uint32) *statev1.Command {
		o := at(service("accounts", "h1"), "/team/pay/accounts", "1", "trading.example")
		o.Source = strings.Repeat("x", 60<<10)
		return stage(change, part, o)
	}
	if r := w.carry(as("/people/vic", big(7, 0))); r == nil || r.Code != CodeForbidden {
		t.Errorf("a viewer puts aside: %v", r)
	}
	w.carried(as("/people/ann", big(1, 0)))
	for part := uint32(1); ; part++ {
		if r := w.carry(as("/people/ann", big(1, part))); r != nil {
			if r.Code != CodeLimit || part < 30 {
				t.Fatalf("after %d parts: %v", part, r)
			}
			break
		}
	}
	w.carried(as("/people/pia", big(2, 0)))
	for part := range uint32(200) { // an operator has room for 12 MiB still
		w.carried(big(3, part))
	}
	if r := w.carry(as("/people/pia", applyStaged(1, 1))); r == nil || r.Code != CodeNotFound {
		t.Errorf("another's change is applied: %v", r)
	}
	held := len(w.s.staged.rows)
	w.carried(as("/people/pia", applyStaged(1, 0)))
	if len(w.s.staged.rows) != held {
		t.Error("another's change is taken away")
	}
	w.carried(as("/people/ann", applyStaged(1, 0)))
	if len(w.s.staged.rows) >= held {
		t.Error("control: one's own is not")
	}
	w.carried(as("/people/ann", big(1, 0)))
}
