package client

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
)

var bank = spiffeid.RequireTrustDomainFromString("banking.example")

func cluster(td string, id byte) *statev1.Cluster {
	return &statev1.Cluster{TrustDomain: td, Id: bytes.Repeat([]byte{id}, ca.ClusterIDSize)}
}

func entries(ids ...string) (list []*statev1.Entry) {
	for _, id := range ids {
		list = append(list, &statev1.Entry{Id: id})
	}
	return list
}

func ownBundle() []*ententev1.Bundle {
	return []*ententev1.Bundle{{TrustDomain: "banking.example", Jwks: []byte(`{"keys":[]}`)}}
}

// recoveryKey is that of the cluster, stranger one that is not.
func recoveryKey() *ca.RecoveryKey { return keyOf(7) }
func stranger() *ca.RecoveryKey    { return keyOf(8) }

func keyOf(fill byte) *ca.RecoveryKey {
	return &ca.RecoveryKey{TrustDomain: bank, ClusterID: cluster("banking.example", 1).GetId(), Seed: bytes.Repeat([]byte{fill}, 32)}
}

// inEpoch is the cluster after a recovery that key signed; in epoch 0 as it was made.
func inEpoch(epoch uint32, key *ca.RecoveryKey) *statev1.Cluster {
	c := cluster("banking.example", 1)
	c.RecoveryKey = recoveryKey().PublicKey()
	if c.Epoch = epoch; epoch > 0 {
		recovery, err := key.Sign(&statev1.RecoveryStatement{ClusterId: c.GetId(), Epoch: epoch, RecoveryId: make([]byte, ca.RecoveryIDSize), MemberId: strings.Repeat("a", 64)})
		if err != nil {
			panic(err)
		}
		c.Recovery = recovery
	}
	return c
}

func full(revision uint64, ids ...string) *ententev1.Policy {
	return &ententev1.Policy{Full: true, Last: true, Revision: revision, Cluster: inEpoch(uint32(revision>>epochShift), recoveryKey()),
		Bundles: ownBundle(), Entries: entries(ids...), Members: []*statev1.Member{{Id: "m", Name: "a"}}, MembersChanged: true}
}

func held(s *Store) string {
	var ids []string
	for _, e := range s.Snapshot().Entries {
		ids = append(ids, e.GetId())
	}
	return strings.Join(ids, " ")
}

const epoch1 = 1 << epochShift

// Chunks take effect together, in order, and a revision never goes back.
func TestStorePolicy(t *testing.T) {
	delta := func(revision uint64, set []*statev1.Entry, deleted ...string) *ententev1.Policy {
		return &ententev1.Policy{Last: true, Revision: revision, Entries: set, DeletedEntries: deleted}
	}
	tests := []struct {
		name     string
		chunks   []*ententev1.Policy
		entries  string
		revision uint64
		err      error // of the last chunk
	}{
		{"full", []*ententev1.Policy{full(5, "b", "a")}, "a b", 5, nil},
		{"delta", []*ententev1.Policy{full(5, "a"), delta(6, entries("c"), "a")}, "c", 6, nil},
		{"nothing before the last chunk", []*ententev1.Policy{full(5, "a"), {Entries: entries("b")}}, "a", 5, nil},
		{"chunks together", []*ententev1.Policy{full(5, "a"), {Entries: entries("b")}, {DeletedEntries: []string{"a"}}, delta(7, entries("c"))}, "b c", 7, nil},
		{"set and deleted in one update", []*ententev1.Policy{full(5, "a"), {Entries: entries("b")}, delta(7, nil, "b")}, "a", 7, nil},
		{"full in chunks replaces", []*ententev1.Policy{full(5, "a", "b"), {Full: true, Bundles: ownBundle(), Entries: entries("x")}, delta(8, entries("y"))}, "x y", 8, nil},
		{"full begun anew forgets the half one", []*ententev1.Policy{{Full: true, Entries: entries("x")}, full(8, "y")}, "y", 8, nil},
		{"same revision again", []*ententev1.Policy{full(5, "a"), full(5, "a", "b")}, "a b", 5, nil},

		{"lagging full", []*ententev1.Policy{full(5, "a"), full(4, "old")}, "a", 5, nil},
		{"lagging delta", []*ententev1.Policy{full(5, "a"), delta(4, entries("old"))}, "a", 5, nil},
		{"lagging replica catches up", []*ententev1.Policy{full(5, "a"), full(4, "old"), delta(6, entries("b"))}, "a b", 6, nil},

		{"new epoch, full", []*ententev1.Policy{full(5, "a"), full(epoch1+1, "b")}, "b", epoch1 + 1, nil},
		{"new epoch, delta", []*ententev1.Policy{full(5, "a"), delta(epoch1+1, entries("b"))}, "a", 5, errResync},
		{"ended epoch", []*ententev1.Policy{full(epoch1+1, "a"), full(99, "b")}, "a", epoch1 + 1, errRefused},
		{"delta on nothing", []*ententev1.Policy{delta(5, entries("a"))}, "", 0, errResync},
		{"no revision", []*ententev1.Policy{full(0, "a")}, "", 0, errRefused},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := newStore(bank, nil, nil, nil)
			var err error
			for _, chunk := range test.chunks {
				if err != nil {
					t.Fatalf("before the last chunk: %v", err)
				}
				err = s.policy(chunk)
			}
			if !errors.Is(err, test.err) || held(s) != test.entries || s.Snapshot().Revision != test.revision {
				t.Errorf("holds %q at %d (%v), want %q at %d (%v)", held(s), s.Snapshot().Revision, err, test.entries, test.revision, test.err)
			}
		})
	}
}

// What a CA of this domain cannot send is refused as a whole; what is held stays.
func TestStoreRefusesLies(t *testing.T) {
	lie := func(change func(*ententev1.Policy)) *ententev1.Policy {
		p := full(6, "lie")
		change(p)
		return p
	}
	tests := []struct {
		name string
		lie  *ententev1.Policy
	}{
		{"other trust domain", lie(func(p *ententev1.Policy) { p.Cluster = cluster("trading.example", 1) })},
		{"other cluster", lie(func(p *ententev1.Policy) { p.Cluster = cluster("banking.example", 2) })},
		{"no own bundle", lie(func(p *ententev1.Policy) { p.Bundles = nil })},
		{"own bundle deleted", lie(func(p *ententev1.Policy) {
			p.Full, p.Bundles, p.DeletedBundles = false, nil, []string{"banking.example"}
		})},
		{"bundle of nobody", lie(func(p *ententev1.Policy) { p.Bundles = append(p.Bundles, &ententev1.Bundle{Jwks: []byte("{}")}) })},
		{"bundle without content", lie(func(p *ententev1.Policy) { p.Bundles = append(p.Bundles, &ententev1.Bundle{TrustDomain: "x.example"}) })},
		{"no members", lie(func(p *ententev1.Policy) { p.Members = nil })},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := newStore(bank, nil, nil, nil)
			if err := s.policy(full(5, "true")); err != nil {
				t.Fatal(err)
			}
			if err := s.policy(test.lie); !errors.Is(err, errRefused) {
				t.Errorf("not refused: %v", err)
			}
			if held(s) != "true" || s.Snapshot().Revision != 5 || len(s.Snapshot().Members) != 1 {
				t.Errorf("the lie took effect: %q at %d", held(s), s.Snapshot().Revision)
			}
			if err := s.policy(full(6, "also true")); err != nil || held(s) != "also true" {
				t.Errorf("control: %q %v", held(s), err)
			}
		})
	}
}

// No CA node's word begins an epoch: only a statement that the pinned recovery key signed.
func TestEpochNeedsItsStatement(t *testing.T) {
	in := func(c *statev1.Cluster) *ententev1.Policy {
		p := full(epoch1+1, "captured")
		p.Cluster = c
		return p
	}
	without := inEpoch(1, recoveryKey())
	without.Recovery = nil
	ownKey := inEpoch(1, stranger()) // its own recovery key, and a statement by it
	ownKey.RecoveryKey = stranger().PublicKey()
	ofAnother := inEpoch(2, recoveryKey())
	ofAnother.Epoch = 1
	far := full(511<<epochShift|1, "captured")
	far.Cluster = inEpoch(0, recoveryKey())
	for name, lie := range map[string]*ententev1.Policy{
		"no statement": in(without), "another key's": in(inEpoch(1, stranger())), "its own key": in(ownKey), "a statement of another epoch": in(ofAnother),
		"a revision without an epoch": far, "the same cluster record": in(inEpoch(0, recoveryKey())),
	} {
		// Pinned by the first trust, or given, by a token or the configuration.
		for how, s := range map[string]*Store{"first trust": newStore(bank, nil, nil, nil), "given": newStore(bank, nil, nil, recoveryKey().PublicKey())} {
			if err := s.policy(full(5, "true")); err != nil {
				t.Fatal(err)
			}
			// Naming another recovery key in the same epoch does not unpin the first one.
			other := full(6, "true")
			other.Cluster.RecoveryKey = stranger().PublicKey()
			if err := s.policy(other); err != nil {
				t.Fatal(err)
			}
			if err := s.policy(lie); !errors.Is(err, errRefused) || held(s) != "true" || s.Snapshot().Revision != 6 {
				t.Errorf("%s, pinned by %s: %v, holds %q at %d", name, how, err, held(s), s.Snapshot().Revision)
			}
			if err := s.policy(full(epoch1+1, "recovered")); err != nil || held(s) != "recovered" {
				t.Errorf("control: a recovery by the pinned key: %v, holds %q", err, held(s))
			}
		}
	}
	// A replacement that the pinned key signed is followed, also together with the epoch.
	r, err := recoveryKey().Replace(stranger())
	if err != nil {
		t.Fatal(err)
	}
	for _, signed := range []bool{true, false} {
		replaced := newStore(bank, nil, nil, nil)
		if err := replaced.policy(full(5, "true")); err != nil {
			t.Fatal(err)
		}
		next := in(inEpoch(1, stranger()))
		next.Cluster.RecoveryKey, next.Cluster.Replaced = stranger().PublicKey(), []*statev1.RecoveryKeyReplacement{r}
		if !signed {
			r.Signature = nil
		}
		if err := replaced.policy(next); (err == nil) != signed {
			t.Errorf("a replacement, signed %v: %v", signed, err)
		}
	}
	// Where no key was ever pinned, no epoch is believed.
	s := newStore(bank, nil, nil, nil)
	first := full(5, "true")
	first.Cluster.RecoveryKey = nil
	if err := s.policy(first); err != nil {
		t.Fatal(err)
	}
	if err := s.policy(full(epoch1+1, "captured")); !errors.Is(err, ca.ErrEpoch) || held(s) != "true" {
		t.Errorf("without a pinned key: %v, holds %q", err, held(s))
	}
}

// What was believed is kept over a restart.
func TestAnchorKeepsTheRecoveryKey(t *testing.T) {
	s := newStore(bank, nil, nil, nil)
	if err := s.policy(full(5, "a")); err != nil {
		t.Fatal(err)
	}
	data, err := (&Client{store: s, compare: &comparer{}}).Anchor().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	known, err := ParseAnchor(data)
	if err != nil || !bytes.Equal(known.RecoveryKey, recoveryKey().PublicKey()) || len(known.Members) != 1 {
		t.Fatalf("%v, %v", known, err)
	}
	again := newStore(bank, known.Cluster, known.Members, known.RecoveryKey)
	lie := full(epoch1+1, "captured")
	lie.Cluster = inEpoch(1, stranger())
	if err := again.policy(lie); !errors.Is(err, errRefused) {
		t.Errorf("after a restart: %v", err)
	}
	if err := again.policy(full(epoch1+1, "recovered")); err != nil {
		t.Errorf("control: %v", err)
	}
	for _, damaged := range [][]byte{nil, data[:len(data)/2], []byte("x")} {
		if _, err := ParseAnchor(damaged); err == nil {
			t.Errorf("a damaged anchor of %d bytes was read", len(damaged))
		}
	}
}

// Views are immutable, and share what has not changed.
func TestStoreViews(t *testing.T) {
	s := newStore(bank, nil, nil, nil)
	if err := s.policy(full(5, "a")); err != nil {
		t.Fatal(err)
	}
	before := s.Snapshot()
	if err := s.policy(&ententev1.Policy{Last: true, Revision: 6, Entries: entries("b"),
		Objects: []*statev1.Object{{Kind: &statev1.Object_Service{Service: &statev1.Service{Name: "accounts"}}}},
		Bundles: []*ententev1.Bundle{{TrustDomain: "trading.example", Jwks: []byte("{}")}}}); err != nil {
		t.Fatal(err)
	}
	if len(before.Entries) != 1 || len(before.Bundles) != 1 || len(before.Objects) != 0 {
		t.Error("a view has changed under its reader")
	}
	after := s.Snapshot()
	if len(after.Objects) != 1 || len(after.Bundles) != 2 || len(after.Members) != 1 {
		t.Errorf("after: %v", after)
	}
	if err := s.policy(&ententev1.Policy{Last: true, Revision: 7, DeletedObjects: []*statev1.ObjectKey{{Kind: "Service", Name: "accounts"}}, DeletedBundles: []string{"trading.example"}}); err != nil {
		t.Fatal(err)
	}
	if at := s.Snapshot(); at.Changed != 7 {
		t.Errorf("changed at %d", at.Changed)
	}
	if err := s.policy(&ententev1.Policy{Last: true, Revision: 8}); err != nil {
		t.Fatal(err)
	}
	last := s.Snapshot()
	if last.Revision != 8 || last.Changed != 7 {
		t.Errorf("nothing new at %d, changed at %d", last.Revision, last.Changed)
	}
	if len(last.Objects) != 0 || len(last.Bundles) != 1 || &last.Entries[0] != &after.Entries[0] {
		t.Errorf("last: %v", last)
	}
}

func serving(complete bool, services ...string) *ententev1.Presence {
	p := &ententev1.Presence{Complete: complete}
	for _, name := range services {
		p.Instances = append(p.Instances, &ententev1.Instance{Service: name, Agent: "h1", Health: ententev1.Health_HEALTH_HEALTHY})
	}
	return p
}

func served(s *Store) string {
	var names []string
	for _, i := range s.Snapshot().Instances {
		name := i.Service
		if i.Stale {
			name += "?"
		}
		names = append(names, name)
	}
	return strings.Join(names, " ")
}

// A session's presence replaces the former one when it is complete, and not before.
func TestStorePresence(t *testing.T) {
	s := newStore(bank, nil, nil, nil)
	step := func(what, want string) {
		t.Helper()
		if got := served(s); got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	s.attach("m")
	s.presence(serving(false, "b"))
	step("half of the first set", "")
	s.presence(serving(true, "a"))
	step("complete", "a b")
	s.presence(serving(false, "c"))
	step("then each at once", "a b c")
	s.presence(&ententev1.Presence{Withdrawn: []*ententev1.Instance{{Service: "a", Agent: "h1"}, {Service: "b", Agent: "h2"}}})
	step("withdrawn, where it is the same agent", "b c")
	s.disown()
	step("nobody vouches", "b? c?")

	s.attach("m")
	step("a new session", "b? c?")
	s.presence(serving(false, "d"))
	step("half of its set", "b? c?")
	s.attach("m") // it was lost
	s.presence(serving(true, "e"))
	step("complete: what is not in it is gone", "e")

	changed := *s.Snapshot()
	<-s.changed
	s.presence(serving(false, "e"))
	select {
	case <-s.changed:
		t.Errorf("the same again counts as a change: %v to %v", changed, s.Snapshot())
	default:
	}
}
