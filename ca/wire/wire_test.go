package wire

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/presence"
	"github.com/entente-mesh/entente/federation/catalog"
)

// over sends an update in chunks, each as bytes, and folds it into what the receiver holds.
func over(t rapid.TB, u *Update, size int, held State) State {
	t.Helper()
	var p Pending
	chunks := u.Encode(size)
	for i, chunk := range chunks {
		raw, err := proto.Marshal(chunk)
		if err != nil {
			t.Fatal(err)
		}
		came := &ententev1.Policy{}
		if err := proto.Unmarshal(raw, came); err != nil {
			t.Fatal(err)
		}
		if err := p.Add(came); err != nil {
			t.Fatal(err)
		}
		if came.GetLast() != (i == len(chunks)-1) || came.GetFull() != (i == 0 && u.Full) {
			t.Fatalf("chunk %d of %d: last %v, full %v", i+1, len(chunks), came.GetLast(), came.GetFull())
		}
	}
	if p.Revision != u.Revision || p.Empty() != u.Empty() {
		t.Fatalf("at revision %d, not %d; empty %v, not %v", p.Revision, u.Revision, p.Empty(), u.Empty())
	}
	return held.With(&p.Update)
}

// Deltas folded one after the other are the full state, however they are cut into chunks:
// who followed holds what the CA has, and so does one that was told everything at once.
func TestDeltasAreTheFullState(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.SampledFrom([]int{1, 60, 1 << 20})
		truth := world{cluster: &statev1.Cluster{TrustDomain: "banking.example"}, members: []*statev1.Member{{Id: "m"}}, records: map[string]proto.Message{}}
		followed := over(t, truth.state().Everything(1), size.Draw(t, "size"), State{})
		for revision := range uint64(rapid.IntRange(0, 20).Draw(t, "deltas")) {
			before, was := followed, fmt.Sprint(followed)
			followed = over(t, truth.change(t, revision+2), size.Draw(t, "size"), followed)
			if fmt.Sprint(before) != was {
				t.Fatal("a state that was handed out has changed")
			}
		}
		other := truth
		other.records = map[string]proto.Message{}
		elsewhere := over(t, other.change(t, 7), 1, State{})
		for what, have := range map[string]State{
			"by deltas":           followed,
			"at once":             over(t, truth.state().Everything(99), size.Draw(t, "size"), State{}),
			"over something else": over(t, followed.Everything(99), size.Draw(t, "size"), elsewhere),
		} {
			if diff := cmp.Diff(truth.state(), have, protocmp.Transform(), cmpopts.EquateEmpty()); diff != "" {
				t.Fatalf("%s (-CA +receiver):\n%s", what, diff)
			}
		}
	})
}

// world is what a CA has, in the plainest form: records by KIND NAME.
type world struct {
	cluster         *statev1.Cluster
	members         []*statev1.Member
	records         map[string]proto.Message
	tainted, tooOld []string
	reissue         time.Duration
}

func (w *world) state() State {
	s := State{Cluster: w.cluster, Members: w.members, Tainted: w.tainted, Reissue: w.reissue, TooOld: w.tooOld,
		Bundles: map[string]*statev1.ForeignBundle{}, Distrust: map[string]*statev1.Distrust{}}
	for _, key := range slices.Sorted(maps.Keys(w.records)) {
		switch record := w.records[key].(type) {
		case *statev1.Entry:
			s.Entries = append(s.Entries, record)
		case *statev1.Object:
			s.Objects = append(s.Objects, record)
		case *statev1.ForeignBundle:
			s.Bundles[record.GetTrustDomain()] = record
		case *statev1.Distrust:
			s.Distrust[record.GetId()] = record
		}
	}
	return s
}

// change changes anything, and says what.
func (w *world) change(t *rapid.T, revision uint64) *Update {
	u := &Update{Revision: revision}
	each := func(kind string, deleted *[]string, prefix string, set func(name string) proto.Message) {
		for _, name := range []string{"a", "b", "c"} {
			switch rapid.SampledFrom([]string{"", "", "set", "deleted"}).Draw(t, kind+name) {
			case "set":
				w.records[kind+name] = set(name)
			case "deleted":
				delete(w.records, kind+name)
				*deleted = append(*deleted, prefix+name)
			}
		}
	}
	each("entry ", &u.DeletedEntries, "", func(name string) proto.Message {
		u.Entries = append(u.Entries, &statev1.Entry{Id: name, Revision: revision})
		return u.Entries[len(u.Entries)-1]
	})
	each("object ", &u.DeletedObjects, "Service/", func(name string) proto.Message {
		u.Objects = append(u.Objects, &statev1.Object{Revision: revision, Kind: &statev1.Object_Service{Service: &statev1.Service{Name: name}}})
		return u.Objects[len(u.Objects)-1]
	})
	each("bundle ", &u.DeletedBundles, "", func(name string) proto.Message {
		u.Bundles = append(u.Bundles, &statev1.ForeignBundle{TrustDomain: name, Jwks: fmt.Append(nil, revision), Sequence: revision})
		return u.Bundles[len(u.Bundles)-1]
	})
	each("distrust ", &u.DeletedDistrust, "", func(name string) proto.Message {
		u.Distrust = append(u.Distrust, &statev1.Distrust{Id: name, AgentGeneration: revision})
		return u.Distrust[len(u.Distrust)-1]
	})
	one := []string{fmt.Sprint(revision)}
	if rapid.Bool().Draw(t, "members") {
		w.members = []*statev1.Member{{Id: one[0]}, {Id: "m"}}
		u.Members, u.MembersChanged = w.members, true
	}
	if rapid.Bool().Draw(t, "cluster") {
		w.cluster = &statev1.Cluster{TrustDomain: "banking.example", Epoch: uint32(revision)}
		u.Cluster = w.cluster
	}
	if rapid.Bool().Draw(t, "tainted") {
		w.tainted, w.reissue = one[rapid.IntRange(0, 1).Draw(t, "none tainted"):], time.Second
		u.Tainted, u.TaintedChanged, u.Reissue = w.tainted, true, w.reissue
	}
	if rapid.Bool().Draw(t, "too old") {
		w.tooOld = one[rapid.IntRange(0, 1).Draw(t, "nothing too old"):]
		u.TooOld, u.TooOldChanged = w.tooOld, true
	}
	return u
}

// An update says nothing without an end, and what it names must be whole. Records of a later
// release are passed over.
func TestPendingIsBounded(t *testing.T) {
	p := Pending{size: MaxPending}
	if err := p.Add(&ententev1.Policy{Full: true}); !errors.Is(err, ErrTooLarge) {
		t.Errorf("an update without an end: %v", err)
	}
	for name, b := range map[string]*ententev1.Bundle{"no trust domain": {Jwks: []byte("{}")}, "no content": {TrustDomain: "a.example"}, "no name": {TrustDomain: "A b", Jwks: []byte("{}")}} {
		if err := new(Pending).Add(&ententev1.Policy{Bundles: []*ententev1.Bundle{b}}); err == nil {
			t.Errorf("%s: it was taken", name)
		}
	}
	p = Pending{}
	if err := p.Add(&ententev1.Policy{Bundles: []*ententev1.Bundle{{TrustDomain: "a.example", Jwks: []byte("{}")}}, Objects: []*statev1.Object{{}}}); err != nil || len(p.Bundles) != 1 || len(p.Objects) != 0 {
		t.Errorf("control: %v, %v", p.Update, err)
	}
}

// What is said of an instance arrives as it is, and the wire has no field beside.
func TestInstanceOnTheWire(t *testing.T) {
	i := presence.Instance{
		Endpoint: catalog.Endpoint{Service: "accounts", ID: "b", Agent: "h1", Datacenter: "dc1", Address: "10.0.0.1:7443", Healthy: true, Stale: true},
		Version:  presence.Version{BootID: "boot", Connect: 7},
	}
	row := FromInstance(i)
	if got := ToInstance(row); got != i {
		t.Errorf("%+v came back as %+v", i, got)
	}
	i.Proof = presence.Proof{PublicKey: "key", Signature: "signature"}
	row = FromInstance(i)
	if !bytes.Equal(row.GetProof().GetPublicKey(), []byte("key")) || !bytes.Equal(row.GetProof().GetSignature(), []byte("signature")) {
		t.Errorf("proof %v", row.GetProof())
	}
	fields := row.ProtoReflect().Descriptor().Fields()
	for n := range fields.Len() {
		if !row.ProtoReflect().Has(fields.Get(n)) {
			t.Errorf("field %s is not said", fields.Get(n).Name())
		}
	}
	i.Healthy = false
	if ToInstance(FromInstance(i)).Healthy || FromInstance(presence.Instance{}).GetHealth() != ententev1.Health_HEALTH_UNSPECIFIED {
		t.Error("health")
	}
}
