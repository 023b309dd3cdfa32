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
	s := newStore(td, nil, nil)
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
