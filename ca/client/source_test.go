package client

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/compare"
	"github.com/entente-mesh/entente/internal/peer"
)

func delta(revision uint64, ids ...string) *ententev1.Policy {
	return &ententev1.Policy{Last: true, Revision: revision, Entries: entries(ids...)}
}

// A picture is made of one node's words: another node's changes are not laid over them,
// since what the first one made up would stay for good.
func TestPictureIsOfOneNode(t *testing.T) {
	s := newStore(bank, nil, nil, nil)
	apply := func(p *ententev1.Policy) {
		t.Helper()
		if err := s.policy(p); err != nil {
			t.Fatal(err)
		}
	}
	s.attach("liar")
	apply(full(5, "a", "made up"))
	if at := s.attach("liar"); at != 5 {
		t.Errorf("control: at the same node it resumes at %d", at)
	}
	apply(delta(6, "b"))
	if held(s) != "a b made up" {
		t.Fatalf("control: %s", held(s))
	}

	if at := s.attach("honest"); at != 0 {
		t.Errorf("at another node it resumes at %d", at)
	}
	if err := s.policy(delta(7, "c")); !errors.Is(err, errResync) || held(s) != "a b made up" {
		t.Errorf("another node's change: %v, holds %s", err, held(s))
	}
	// A node that has seen less replaces nothing before it has caught up.
	s.attach("honest")
	apply(full(4, "a"))
	apply(delta(5))
	if held(s) != "a b made up" || s.origin() != "liar" {
		t.Errorf("a node that has seen less: %s, of %s", held(s), s.origin())
	}
	apply(delta(6, "b"))
	if held(s) != "a b" || s.origin() != "honest" || s.Snapshot().Revision != 6 {
		t.Errorf("it has caught up: %s, of %s, at %d", held(s), s.origin(), s.Snapshot().Revision)
	}
}

// The sequence of another domain's bundle holds an older one back (I8), but not when it is
// the word of a node that is none any more.
func TestRemovedNodesSequencesAreForgotten(t *testing.T) {
	for _, removed := range []bool{false, true} { // false is the control
		s := newStore(bank, nil, nil, nil)
		with := func(revision uint64, jwks string, sequence uint64, members ...string) *ententev1.Policy {
			p := full(revision)
			p.Bundles = append(p.Bundles, &ententev1.Bundle{TrustDomain: "trading.example", Jwks: []byte(jwks), Sequence: sequence})
			p.Members = nil
			for _, id := range members {
				p.Members = append(p.Members, &statev1.Member{Id: id})
			}
			return p
		}
		s.attach("liar")
		if err := s.policy(with(5, "forged", 1<<60, "liar", "honest")); err != nil {
			t.Fatal(err)
		}
		members := []string{"honest"}
		if !removed {
			members = append(members, "liar")
		}
		s.attach("honest")
		if err := s.policy(with(6, "true", 7, members...)); err != nil {
			t.Fatal(err)
		}
		if got := string(s.Snapshot().Bundles["trading.example"]); (got == "true") != removed {
			t.Errorf("removed %v: %s", removed, got)
		}
	}
}

// A node that hides an item behind another of the same id, or behind a field that this
// release does not know, has not told it.
func TestHiddenBehindAnotherItem(t *testing.T) {
	real := distrustOf("h9")[0]
	pair := &statev1.Distrust{Agent: "h8", Entry: "e", AgentGeneration: 2, EntryGeneration: 2}
	pair.Id = ca.DistrustID(pair)
	as := func(of *statev1.Distrust, change func(*statev1.Distrust)) *statev1.Distrust {
		d := proto.CloneOf(of)
		change(d)
		return d
	}
	for name, c := range map[string]struct {
		told, real *statev1.Distrust
		holds      bool
	}{
		"control: the same":            {real, real, true},
		"control: of more generations": {as(real, func(d *statev1.Distrust) { d.AgentGeneration++ }), real, true},
		"another agent under its id":   {as(real, func(d *statev1.Distrust) { d.Agent = "nobody" }), real, false},
		"two names in one":             {as(pair, func(d *statev1.Distrust) { d.Agent, d.Entry, d.EntryGeneration = "h8 entry/e", "", 9 }), pair, false},
		"fewer generations":            {as(real, func(d *statev1.Distrust) { d.AgentGeneration-- }), real, false},
		"with a field of a later release": {as(real, func(d *statev1.Distrust) {
			d.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 5000, protowire.VarintType), 1))
		}), real, false},
	} {
		s := newStore(bank, nil, nil, nil)
		p := full(5)
		p.Distrust = []*statev1.Distrust{c.told}
		if err := s.policy(p); err != nil {
			t.Fatal(err)
		}
		if got := s.holds([]*statev1.Distrust{c.real}); got != c.holds {
			t.Errorf("%s: holds %v", name, got)
		}
		// Nor does it take the place of what another node denies.
		s.deny([]*statev1.Distrust{c.real})
		o := ca.Origin{Agent: c.real.GetAgent(), AgentGeneration: 1, Entry: c.real.GetEntry(), EntryGeneration: 1}
		if s.Snapshot().Distrust.CheckOrigin(o) == nil {
			t.Errorf("%s: not denied, though another node denies it", name)
		}
	}
}

// A bundle that cannot be read is not what the other nodes hold.
func TestUnreadableBundleIsCompared(t *testing.T) {
	c := newClient(t)
	contents := map[compare.Hash]string{}
	for _, jwks := range []string{`{"keys":[]}`, `{"keys":[`, `{"keys":[]} {}`} {
		p := full(5)
		p.Bundles[0].Jwks = []byte(jwks)
		if err := c.store.policy(p); err != nil {
			t.Fatal(err)
		}
		hash := c.compare.content(c.View())[compare.Bundle]
		if other, taken := contents[hash]; taken {
			t.Errorf("%s is compared as %s", jwks, other)
		}
		contents[hash] = jwks
	}
	if compare.BundleHash(nil, nil, nil) != c.compare.content(&View{Bundles: map[string][]byte{bank.Name(): []byte(`{"keys": []}`)}})[compare.Bundle] {
		t.Error("control: an empty bundle")
	}
}

// hearOthers has nodes state the same content.
func (c *comparer) hearOthers(t *testing.T, epoch uint32, revision uint64, content compare.Content, ids ...string) {
	t.Helper()
	now := time.Now()
	for _, id := range ids {
		s := &compare.Statement{Member: id, Epoch: epoch, Time: now}
		s.History.Add(revision, content)
		c.judge.Heard(s, now)
		c.heardAt[id] = now
	}
}

func abc() (list []*statev1.Member) {
	for _, id := range []string{"a", "b", "c"} {
		list = append(list, &statev1.Member{Id: id, Name: "ca-" + id})
	}
	return list
}

// What a node said is compared while there is no session, and while there is one with
// another node that cannot replace it: else who believed a node that then fell silent would
// believe it for good, and so would who was handed on. Only that it lacks what is new is no
// fault of a node that cannot send.
func TestComparesWithoutSession(t *testing.T) {
	for name, test := range map[string]struct {
		session string
		say     func(*ententev1.Policy)
		others  uint64 // their revision
		leaves  bool
	}{
		"its own revision, no session":            {"", func(p *ententev1.Policy) { p.Revision = 1 << 43 }, 50, true},
		"its own revision, at an honest node":     {"b", func(p *ententev1.Policy) { p.Revision = 1 << 43 }, 50, true},
		"its own members, no session":             {"", func(p *ententev1.Policy) { p.Members = p.Members[:1] }, 50, true},
		"its own members, at the node":            {"a", func(p *ententev1.Policy) { p.Members = p.Members[:1] }, 50, true},
		"control: late, and it is connected":      {"a", func(*ententev1.Policy) {}, 90, true},
		"control: late, and there is no session":  {"", func(*ententev1.Policy) {}, 90, false},
		"control: the truth, there is no session": {"", func(*ententev1.Policy) {}, 50, false},
	} {
		synctest.Test(t, func(t *testing.T) {
			c, err := New(Config{TrustDomain: bank, Addresses: []string{"a:1"}, Members: abc()})
			if err != nil {
				t.Fatal(err)
			}
			p := full(50)
			p.Members = abc()
			truth := compare.Content{compare.MembersHash(abc()), compare.BundleHash(nil, nil, nil), compare.DistrustHash(nil)}
			test.say(p)
			c.store.attach("a")
			if err := c.store.policy(p); err != nil {
				t.Fatal(err)
			}
			c.compare.node, c.compare.began = test.session, time.Now()
			c.compare.nextAsk = time.Now().Add(time.Hour)
			for range 18 {
				time.Sleep(time.Second)
				c.compare.hearOthers(t, 0, test.others, truth, "b", "c")
				c.compare.look(t.Context(), nil)
			}
			if _, err := c.compare.refuses("a"); (err != nil) != test.leaves || (c.Comparison().Moves > 0) != test.leaves {
				t.Errorf("%s: %v, %+v", name, err, c.Comparison())
			}
			if _, err := c.compare.refuses("b"); err != nil {
				t.Errorf("%s: an honest node: %v", name, err)
			}
		})
	}
}

// What one node alone denied beyond the others is denied no more when another agrees with
// the present one, even if the denier fell silent, or goes on, meanwhile.
func TestMadeUpDenialsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, err := New(Config{TrustDomain: bank, Addresses: []string{"a:1"}, Members: abc()})
		if err != nil {
			t.Fatal(err)
		}
		p := full(50)
		p.Members = abc()
		truth := compare.Content{compare.MembersHash(abc()), compare.BundleHash(nil, nil, nil), compare.DistrustHash(nil)}
		lie := truth
		lie[compare.Distrust] = compare.Hash{1}
		c.store.attach("a")
		if err := c.store.policy(p); err != nil {
			t.Fatal(err)
		}
		c.compare.node, c.compare.began = "a", time.Now()
		c.compare.nextAsk = time.Now().Add(time.Hour)
		seconds := func(n int, say func()) {
			for range n {
				time.Sleep(time.Second)
				say()
				c.compare.look(t.Context(), nil)
			}
		}
		lies := func() { c.compare.hearOthers(t, 0, 50, lie, "b") }
		seconds(17, lies)
		if c.Comparison().Doubt == "" {
			t.Fatal("control: no doubt")
		}
		c.store.deny(distrustOf("h1"))
		seconds(2, lies)
		if !distrusting(c.store, "h1") {
			t.Error("control: what the only other node denies is not denied")
		}
		seconds(14, func() {}) // the liar is silent
		if c.Comparison().Doubt != "" || !distrusting(c.store, "h1") {
			t.Fatalf("control: nobody has agreed: %+v", c.Comparison())
		}
		seconds(2, func() { lies(); c.compare.hearOthers(t, 0, 50, truth, "c") })
		if distrusting(c.store, "h1") {
			t.Error("denied for good on one node's word")
		}

		// The same after a move away from the node that denied.
		seconds(14, func() {})
		c.store.attach("b")
		p.Distrust = distrustOf("h2")
		p.Revision = 51
		if err := c.store.policy(p); err != nil {
			t.Fatal(err)
		}
		c.compare.leave(time.Now(), "b", map[string]*statev1.Member{}, compare.Decision{})
		c.store.attach("a")
		p.Distrust, p.Revision = nil, 50
		if err := c.store.policy(p); err != nil {
			t.Fatal(err)
		}
		c.compare.arrived()
		seconds(2, lies)
		if !distrusting(c.store, "h2") {
			t.Error("control: dropped before the new state was compared")
		}
		seconds(2, func() { lies(); c.compare.hearOthers(t, 0, 50, truth, "c") })
		if distrusting(c.store, "h2") {
			t.Error("denied for as long as the node that was left goes on")
		}
	})
}

// Statements that are not passed on are asked for so often that two never become too old to
// count: what is held against a node would begin anew.
func TestAsksBeforeStatementsAreOld(t *testing.T) {
	for range 50 { // the pauses have jitter
		synctest.Test(t, func(t *testing.T) {
			c, err := New(Config{TrustDomain: bank, Addresses: []string{"a:1"}, Members: abc(), Dial: func(context.Context, string, string) (net.Conn, error) {
				return nil, errors.New("connection refused")
			}})
			if err != nil {
				t.Fatal(err)
			}
			p := full(50)
			p.Members = abc()
			c.store.attach("a")
			if err := c.store.policy(p); err != nil {
				t.Fatal(err)
			}
			truth := compare.Content{compare.MembersHash(abc()), compare.BundleHash(nil, nil, nil), compare.DistrustHash(nil)}
			c.compare.node, c.compare.began = "a", time.Now()
			c.compare.hearOthers(t, 0, 50, truth, "b")
			time.Sleep(time.Duration(rand.N(4000)) * time.Millisecond)
			c.compare.hearOthers(t, 0, 50, truth, "c")
			c.compare.nextAsk = time.Now().Add(time.Duration(rand.N(int64(askEvery)))) // it asked, or had no need to, some time ago
			var asks sync.WaitGroup
			n := 0
			for range 60 {
				time.Sleep(lookEvery)
				c.compare.look(t.Context(), &asks)
				asks.Wait()
				select {
				case <-c.compare.answers:
					n++
					c.compare.asking = false
					c.compare.hearOthers(t, 0, 50, truth, c.compare.last)
				default:
				}
				for _, id := range []string{"b", "c"} {
					if age, _ := c.compare.judge.Age(id, time.Now()); age >= compare.Fresh-lookEvery {
						t.Errorf("%s's statement is %v old", id, age)
					}
				}
			}
			if most := 2 * 60 / 6; n > most {
				t.Errorf("asked %d times in a minute, over %d", n, most)
			}
		})
	}
}

// A node that never sends a whole state keeps nobody: not who has none, and not who comes
// from another node.
func TestNodeWithoutStateIsLeft(t *testing.T) {
	for name, known := range map[string]bool{"a first picture": false, "a picture of another node": true} {
		synctest.Test(t, func(t *testing.T) {
			d := newDomain(t)
			defer d.stop()
			a, b := d.add("a"), d.add("b")
			half := full(9, "half")
			half.Last = false
			a.begin = []*ententev1.SyncResponse{policyMessage(half)}
			b.begin = []*ententev1.SyncResponse{policyMessage(full(7, "b"))}
			b.stop()
			c, err := New(d.config("a:1", "b:1"))
			if err != nil {
				t.Fatal(err)
			}
			if known {
				kept, err := proto.Marshal(&ententev1.Picture{Policy: d.of(policyMessage(full(5, "a"))).GetPolicy(), Presence: &ententev1.Presence{Complete: true}, Level: ca.SyncLevel, Source: peer.KeyID(b.svid.Certificates[0])})
				if err != nil {
					t.Fatal(err)
				}
				if err := c.Recall(kept); err != nil {
					t.Fatal(err)
				}
			}
			r := runClient(t, c)
			defer r.stop()
			beat := &ententev1.SyncResponse{Message: &ententev1.SyncResponse_Heartbeat{Heartbeat: &ententev1.Heartbeat{Revision: 9}}}
			for range 5 {
				a.push <- beat
				time.Sleep(2 * time.Second)
			}
			if a.sessions() != 1 || b.sessions() != 0 {
				t.Fatalf("%s: control: %d sessions, %d elsewhere", name, a.sessions(), b.sessions())
			}
			b.start()
			for range 5 {
				select {
				case a.push <- beat:
				case <-time.After(2 * time.Second):
				}
				time.Sleep(2 * time.Second)
			}
			waitFor(t, "the other node's state", 5*time.Second, func() bool { return held(c.store) == "b" })
		})
	}
}
