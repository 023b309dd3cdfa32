package client

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/compare"
)

func distrusting(s *Store, agent string) bool {
	return s.Snapshot().Distrust.CheckOrigin(ca.Origin{Agent: agent, AgentGeneration: 1}) != nil
}

func distrustOf(agents ...string) (list []*statev1.Distrust) {
	for _, agent := range agents {
		d := &statev1.Distrust{Agent: agent, AgentGeneration: 9, NotAfter: 1 << 36}
		d.Id = ca.DistrustID(d)
		list = append(list, d)
	}
	return list
}

// The state of a node that two others contradict goes as a whole when another node's has
// come, at whatever revision; only what it denied stays until that state was compared.
func TestStoreYieldsOnce(t *testing.T) {
	lie := full(1<<43, "forged")
	lie.Members = []*statev1.Member{{Id: "liar"}}
	lie.Bundles[0].Sequence = 1 << 50
	lie.Bundles = append(lie.Bundles, &ententev1.Bundle{TrustDomain: "trading.example", Jwks: []byte(`"forged"`), Sequence: 1 << 50})
	lie.Distrust = distrustOf("h1", "h2")
	truth := func(revision uint64) *ententev1.Policy {
		p := full(revision, "true")
		p.Bundles[0].Sequence = 3
		p.Bundles = append(p.Bundles, &ententev1.Bundle{TrustDomain: "trading.example", Jwks: []byte(`"true"`), Sequence: 7})
		p.Distrust = distrustOf("h2", "h3")
		return p
	}
	s := newStore(bank, nil, nil, nil)
	apply := func(p *ententev1.Policy) {
		t.Helper()
		if err := s.policy(p); err != nil {
			t.Fatal(err)
		}
	}
	apply(lie)
	apply(truth(50))
	if held(s) != "forged" || s.hasYielded() {
		t.Fatal("control: a revision goes back by itself")
	}
	captured := s.Snapshot()
	s.yield()
	if err := s.policy(&ententev1.Policy{Last: true, Revision: 1<<43 + 1, Entries: entries("more")}); !errors.Is(err, errResync) || held(s) != "forged" {
		t.Errorf("a change of what is left: %v", err)
	}
	apply(truth(50))
	v := s.Snapshot()
	if held(s) != "true" || v.Revision != 50 || len(v.Members) != 1 || v.Members[0].GetId() != "m" || string(v.Bundles["trading.example"]) != `"true"` {
		t.Errorf("after it yielded: %+v", v)
	}
	if v.Changed == captured.Changed || !s.hasYielded() || s.hasYielded() {
		t.Error("nobody is told that it yielded")
	}
	for _, agent := range []string{"h1", "h2", "h3"} {
		if !distrusting(s, agent) {
			t.Errorf("%s is accepted before the new state was compared", agent)
		}
	}
	s.compared()
	if distrusting(s, "h1") || !distrusting(s, "h2") || !distrusting(s, "h3") {
		t.Error("compared: not the new state's distrust")
	}
	apply(truth(40)) // once only
	if s.Snapshot().Revision != 50 {
		t.Error("a revision went back again")
	}
	// Two views of one revision are two, also if the lie was at that revision.
	s.yield()
	before := s.Snapshot().Changed
	apply(truth(50))
	if s.Snapshot().Changed == before {
		t.Error("the same Changed for another node's state")
	}
	next := truth(2 << epochShift)
	next.Cluster.Epoch, next.Cluster.Recovery = 2, nil
	s.yield()
	if err := s.policy(next); err == nil {
		t.Error("an epoch without its statement was believed because the state before yields")
	}
}

// What the only other CA node in reach denies is denied, and nothing more is believed.
func TestBothNodesDenials(t *testing.T) {
	s := newStore(bank, nil, nil, nil)
	p := full(5, "a")
	p.Distrust = distrustOf("h1")
	if err := s.policy(p); err != nil {
		t.Fatal(err)
	}
	if !s.holds(distrustOf("h1")) || s.holds(distrustOf("h1", "h2")) || !s.holds(nil) {
		t.Error("what is held in common")
	}
	s.deny(distrustOf("h2"))
	urgent := s.Snapshot().Urgent
	s.deny(distrustOf("h2"))
	if s.Snapshot().Urgent != urgent {
		t.Error("the same again is news")
	}
	if !distrusting(s, "h1") || !distrusting(s, "h2") || distrusting(s, "h3") || held(s) != "a" {
		t.Error("not both sides' denials")
	}
	if items, told := s.items(0); told == 0 || len(items) != 1 {
		t.Errorf("the own node told %d items", len(items))
	}
	s.compared()
	if !distrusting(s, "h1") || distrusting(s, "h2") {
		t.Error("denied for good")
	}
}

// What was held of a node that is being left is not acknowledged to another one: no node
// may count a subscriber that does not hold what that node means (I3).
func TestLeftRevisionsAreNotAcknowledged(t *testing.T) {
	c, err := New(Config{TrustDomain: bank, Addresses: []string{"a:1"}, AcknowledgeLater: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.store.policy(full(1<<43, "forged")); err != nil {
		t.Fatal(err)
	}
	c.Acknowledge(1<<43, nil)
	if c.acked.Load() != 1<<43 {
		t.Fatal("control: not acknowledged")
	}
	c.acked.Store(0)
	c.compare.moving = true
	c.store.yield()
	if c.Acknowledge(1<<43, nil); c.acked.Load() != 0 {
		t.Error("acknowledged while the node is left")
	}
	if err := c.store.policy(full(50, "true")); err != nil {
		t.Fatal(err)
	}
	c.compare.arrived()
	if c.Acknowledge(1<<43, nil); c.acked.Load() != 0 {
		t.Error("a revision of the node that was left is acknowledged")
	}
	if c.Acknowledge(50, nil); c.acked.Load() != 50 {
		t.Error("control: the new node's revision is not acknowledged")
	}
}

// Who was left for being late only may be honest: it is avoided for longer each time, and
// used again when nobody else is in reach. Who contradicted is not.
func TestWhoWasLateIsTheLastResort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, err := New(Config{TrustDomain: bank, Addresses: []string{"a:1"}, Members: []*statev1.Member{{Id: "late", ApiAddress: "late:1"}, {Id: "liar", ApiAddress: "liar:1"}}})
		if err != nil {
			t.Fatal(err)
		}
		avoids := func(id string) bool {
			_, err := c.compare.refuses(id)
			_, not := c.compare.addresses()
			if not[id+":1"] != (err != nil) {
				t.Errorf("%s: its address is dialled, and it is refused", id)
			}
			return err != nil
		}
		leave := func(id string, late bool) {
			c.compare.leave(time.Now(), id, nil, compare.Decision{Late: late})
			c.compare.moving = false
		}
		session := func() {
			c.compare.mu.Lock()
			defer c.compare.mu.Unlock()
			c.compare.node, c.compare.alone = "other", time.Time{}
		}
		session()
		leave("late", true)
		leave("liar", false)
		time.Sleep(avoidLate - time.Second)
		if !avoids("late") || !avoids("liar") {
			t.Error("not avoided")
		}
		time.Sleep(2 * time.Second)
		if avoids("late") || !avoids("liar") {
			t.Error("late for good, or the liar not")
		}
		leave("late", true)
		time.Sleep(2*avoidLate - time.Second)
		if !avoids("late") {
			t.Error("not for longer the second time")
		}
		leave("late", true)
		c.compare.at(nil)
		time.Sleep(lastResort - time.Second)
		if !avoids("late") {
			t.Error("used again at once")
		}
		time.Sleep(2 * time.Second)
		if avoids("late") || !avoids("liar") {
			t.Error("not the last resort")
		}
	})
}

// While no CA node that was confirmed is heard, those that the own node names are compared
// with, and confirm nothing: it may have made them up.
func TestUnknownNodesConfirmNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		honest := []*statev1.Member{{Id: "a"}, {Id: "b"}, {Id: "liar"}}
		c, err := New(Config{TrustDomain: bank, Addresses: []string{"a:1"}, Members: honest})
		if err != nil {
			t.Fatal(err)
		}
		p := full(5, "a")
		p.Members = []*statev1.Member{{Id: "liar"}, {Id: "made up"}, {Id: "made up, too"}}
		c.store.attach("liar")
		if err := c.store.policy(p); err != nil {
			t.Fatal(err)
		}
		c.compare.node, c.compare.began = "liar", time.Now()
		if list, known := c.compare.partners(); len(list) != 2 || list["made up"] != nil || !known {
			t.Errorf("control: %v", list)
		}
		time.Sleep(unheardAfter + time.Second)
		if list, known := c.compare.partners(); len(list) != 4 || known {
			t.Errorf("%v, known: %v", list, known)
		}
		c.compare.heardAt["b"] = time.Now()
		if list, known := c.compare.partners(); len(list) != 2 || !known {
			t.Errorf("one is heard again: %v", list)
		}
	})
}
