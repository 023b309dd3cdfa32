package client

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/internal/peer"
)

// later puts a field of a later release into a message.
func later[M proto.Message](m M, number protowire.Number) M {
	raw := protowire.AppendTag(nil, number, protowire.BytesType)
	m.ProtoReflect().SetUnknown(protowire.AppendString(raw, "of a later release"))
	return m
}

func serviceObject(name string) *statev1.Object {
	return &statev1.Object{Kind: &statev1.Object_Service{Service: &statev1.Service{Name: name}}}
}

// What a CA of a later release sends and this one does not know is skipped, and the CA is
// told; all the rest is in force. What of it restricts makes the process too old, which it
// says.
func TestWhatIsNotKnownIsSkipped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDomain(t)
		defer d.stop()
		n := d.add("a")
		p := full(5, "a")
		withField := serviceObject("accounts")
		later(withField.GetService(), 5001)
		p.Objects = []*statev1.Object{serviceObject("ledger"), later(&statev1.Object{}, 5000), later(&statev1.Object{}, 5000), withField}
		p.Distrust = []*statev1.Distrust{{Id: "agent/h9", Agent: "h9", AgentGeneration: 1}}
		n.begin = []*ententev1.SyncResponse{later(&ententev1.SyncResponse{}, 5002), policyMessage(p), presenceMessage(serving(true)), heartbeat()}
		c := run(t, d.config("a:1"))
		defer c.stop()
		synctest.Wait()

		view := c.View()
		if len(view.Objects) != 2 || view.Distrust == nil || view.Revision != 5 {
			t.Errorf("%d objects, %v distrusted at %d", len(view.Objects), view.Distrust, view.Revision)
		}
		want := []string{"Object: field 5000", "Service: field 5001", "SyncResponse: field 5002"}
		if got := slices.Sorted(slices.Values(view.Skipped)); !slices.Equal(got, want) {
			t.Errorf("skipped %v", got)
		}
		if len(view.TooOld) > 0 {
			t.Errorf("nothing restricts, and it is too old for %v", view.TooOld)
		}
		n.mu.Lock()
		hello, said := n.hellos[0], n.skipped
		n.mu.Unlock()
		if hello.GetLevel() != ca.SyncLevel {
			t.Errorf("its Hello is of level %d", hello.GetLevel())
		}
		if got := slices.Sorted(slices.Values(said)); !slices.Equal(got, want) {
			t.Errorf("the CA was told of %v", got)
		}

		// What restricts: by the CA's word, and a distrust item that says more than is known.
		n.push <- policyMessage(&ententev1.Policy{Last: true, Revision: 6, TooOldChanged: true, TooOld: []string{"object Service/accounts: methods (level 9)"},
			Distrust: []*statev1.Distrust{later(&statev1.Distrust{Id: "agent/h8", Agent: "h8", AgentGeneration: 1}, 5003)}})
		synctest.Wait()
		view = c.View()
		if got := strings.Join(view.TooOld, "; "); got != "distrust agent/h8: Distrust: field 5003; object Service/accounts: methods (level 9)" {
			t.Errorf("too old for %q", got)
		}
		if got := fmt.Sprint(view.Distrust); got != fmt.Sprint(ca.NewDistrusted(bank, p.Distrust)) {
			t.Errorf("half of an item is in force: %v", got)
		}
		n.push <- policyMessage(&ententev1.Policy{Last: true, Revision: 7, TooOldChanged: true, DeletedDistrust: []string{"agent/h8"}})
		synctest.Wait()
		if got := c.View().TooOld; len(got) > 0 {
			t.Errorf("still too old for %v", got)
		}
	})
}

// However much is not known, little is remembered of it.
func TestSkippedIsBounded(t *testing.T) {
	raw := []byte{}
	for n := range 1000 {
		raw = protowire.AppendTag(raw, protowire.Number(5000+n), protowire.VarintType)
		raw = protowire.AppendVarint(raw, 1)
	}
	m := policyMessage(full(5, "a"))
	m.GetPolicy().ProtoReflect().SetUnknown(raw)
	s := newStore(bank, nil, nil, nil)
	if news := s.note(m); len(news) != maxSkipped || len(s.Snapshot().Skipped) != maxSkipped {
		t.Errorf("%d, %d", len(news), len(s.Snapshot().Skipped))
	}
	if news := s.note(m); len(news) > 0 {
		t.Errorf("again news: %v", news)
	}
	if names := unknownOf(policyMessage(full(5, "a"))); len(names) > 0 {
		t.Errorf("control: %v", names)
	}
}

// What another release kept lacks what it did not know: a session then begins with the full
// state, while what it kept serves.
func TestPictureOfAnotherLevel(t *testing.T) {
	for level, whole := range map[uint32]bool{0: true, ca.SyncLevel: false, ca.SyncLevel + 1: true} {
		synctest.Test(t, func(t *testing.T) {
			d := newDomain(t)
			defer d.stop()
			n := d.add("a")
			c, err := New(d.config("a:1"))
			if err != nil {
				t.Fatal(err)
			}
			kept, err := proto.Marshal(&ententev1.Picture{Policy: d.of(policyMessage(full(5, "a"))).GetPolicy(), Presence: &ententev1.Presence{Complete: true}, Level: level, Source: peer.KeyID(n.svid.Certificates[0])})
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Recall(kept); err != nil || held(c.store) != "a" {
				t.Fatalf("%v", err)
			}
			r := runClient(t, c)
			synctest.Wait()
			n.mu.Lock()
			if resume := n.hellos[0].GetResumeRevision(); (resume == 0) != whole {
				t.Errorf("a picture of level %d is resumed at %d", level, resume)
			}
			n.mu.Unlock()
			r.stop()
		})
	}
}

// FuzzUnknown: whatever a CA sends, looking for what is not known ends.
func FuzzUnknown(f *testing.F) {
	for _, m := range []*ententev1.SyncResponse{policyMessage(full(5, "a")), later(&ententev1.SyncResponse{}, 5000)} {
		b, _ := proto.Marshal(m)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m := &ententev1.SyncResponse{}
		if proto.Unmarshal(b, m) != nil {
			return
		}
		if names := unknownOf(m); len(names) > maxSkipped {
			t.Errorf("%d names", len(names))
		}
		s := newStore(bank, nil, nil, nil)
		s.note(m)
		if p := m.GetPolicy(); p != nil {
			s.policy(p)
		}
	})
}
