package client

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
)

// Urgent items take effect at once and move no revision; the policy lane repeats and
// ends them.
func TestUrgentItems(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("banking.example")
	s := newStore(td, nil, nil, nil)
	item := &statev1.Distrust{Id: "agent/h1", Agent: "h1", AgentGeneration: 3}
	urgent := &ententev1.Urgent{Distrust: []*statev1.Distrust{item}, Tainted: []string{"a"}, ReissueWithinMs: 1500}
	s.urgent(urgent)
	if v := s.Snapshot(); v.Distrust != nil || v.Urgent != 0 {
		t.Fatalf("before the first state: %+v", v)
	}
	apply := func(p *ententev1.Policy) *View {
		t.Helper()
		p.Last = true
		if p.GetFull() {
			p.Bundles = []*ententev1.Bundle{{TrustDomain: td.Name(), Jwks: []byte("{}")}}
		}
		if err := s.policy(p); err != nil {
			t.Fatal(err)
		}
		return s.Snapshot()
	}
	before := apply(&ententev1.Policy{Full: true, Revision: 5})
	s.urgent(urgent)
	v := s.Snapshot()
	if v.Revision != before.Revision || v.Changed != before.Changed || v.Urgent == before.Urgent || v.Distrust == nil || len(v.Tainted) != 1 || v.ReissueWithin != 1500*time.Millisecond {
		t.Errorf("after an urgent item: %+v", v)
	}
	if before.Distrust != nil {
		t.Error("a picture that was handed out has changed")
	}
	if v = apply(&ententev1.Policy{Revision: 6, Distrust: []*statev1.Distrust{item}, TaintedChanged: true, Tainted: []string{"a"}}); v.Distrust == nil || v.Changed != 6 {
		t.Errorf("repeated: %+v", v)
	}
	if v = apply(&ententev1.Policy{Revision: 7}); v.Distrust == nil || len(v.Tainted) != 1 || v.Changed != 6 {
		t.Errorf("an update of the revision only: %+v", v)
	}
	if v = apply(&ententev1.Policy{Revision: 8, DeletedDistrust: []string{item.GetId()}, TaintedChanged: true}); v.Distrust != nil || len(v.Tainted) != 0 || v.Changed != 8 {
		t.Errorf("ended: %+v", v)
	}
	apply(&ententev1.Policy{Revision: 9, Distrust: []*statev1.Distrust{item}})
	if v = apply(&ententev1.Policy{Full: true, Revision: 10}); v.Distrust != nil {
		t.Errorf("a full state without it: %+v", v)
	}
}

// Another domain's bundle that comes ahead counts at once, and no node that has seen less
// takes it back; but only for whom an agreement gave one before, and not beyond the
// relationship it rests on.
func TestForeignBundleNeverGoesBack(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("banking.example")
	s := newStore(td, nil, nil, nil)
	of := func(name string, sequence uint64) *ententev1.Bundle {
		return &ententev1.Bundle{TrustDomain: name, Jwks: fmt.Appendf(nil, "%d", sequence), Sequence: sequence}
	}
	own := &ententev1.Bundle{TrustDomain: td.Name(), Jwks: []byte("{}")}
	related := func(revision uint64) []*statev1.Object {
		return []*statev1.Object{{Revision: revision, Kind: &statev1.Object_Relationship{Relationship: &statev1.Relationship{TrustDomain: "trading.example"}}}}
	}
	holds := func(what, want string) {
		t.Helper()
		if got := string(s.Snapshot().Bundles["trading.example"]); got != want {
			t.Errorf("%s: holds %q, want %q", what, got, want)
		}
	}
	policy := func(p *ententev1.Policy) {
		t.Helper()
		p.Last = true
		if err := s.policy(p); err != nil {
			t.Fatal(err)
		}
	}
	full := func(revision, sequence, relationship uint64) {
		t.Helper()
		policy(&ententev1.Policy{Full: true, Revision: revision, Objects: related(relationship), Bundles: []*ententev1.Bundle{own, of("trading.example", sequence)}})
	}
	full(5, 5, 2)
	before := s.Snapshot()
	s.urgent(&ententev1.Urgent{Bundles: []*ententev1.Bundle{of("trading.example", 7), of("evil.example", 9), of(td.Name(), 9)}})
	holds("ahead", "7")
	if v := s.Snapshot(); v.Urgent == before.Urgent || v.Bundles["evil.example"] != nil || string(v.Bundles[td.Name()]) != "{}" || string(before.Bundles["trading.example"]) != "5" {
		t.Errorf("ahead: %v, before %v", v.Bundles, before.Bundles)
	}
	s.urgent(&ententev1.Urgent{Bundles: []*ententev1.Bundle{of("trading.example", 6)}})
	holds("an older one ahead", "7")
	policy(&ententev1.Policy{Revision: 6, Bundles: []*ententev1.Bundle{of("trading.example", 6)}})
	holds("an older one agreed", "7")
	full(7, 5, 2)
	holds("the full state of a node that has seen less", "7")

	kept := newStore(td, nil, nil, nil)
	if err := kept.policy(s.picture().GetPolicy()); err != nil {
		t.Fatal(err)
	}
	s = kept
	full(7, 5, 2)
	holds("after a restart", "7")
	full(8, 8, 2)
	holds("a newer one", "8")
	full(9, 1, 9)
	holds("another relationship", "1")
	policy(&ententev1.Policy{Revision: 10, DeletedBundles: []string{"trading.example"}})
	policy(&ententev1.Policy{Revision: 11, Bundles: []*ententev1.Bundle{of("trading.example", 1)}})
	holds("taken away and given anew", "1")
}

func TestIsRefusal(t *testing.T) {
	for _, test := range []struct {
		err  error
		want bool
	}{
		{errors.New("connection refused"), false},
		{status.Error(codes.Unavailable, "shuts down"), false},
		{status.Error(codes.Aborted, "a later session of yours took over"), false},
		{status.Error(codes.Unavailable, "error reading server preface: remote error: tls: bad certificate"), true},
		{fmt.Errorf("CA node at x: %w", plain(status.Error(codes.Unauthenticated, "no"))), true},
		{fmt.Errorf("CA node at x: %w", plain(status.Error(codes.PermissionDenied, "banned"))), true},
	} {
		if got := isRefusal(test.err); got != test.want {
			t.Errorf("%v: %v", test.err, got)
		}
	}
}
