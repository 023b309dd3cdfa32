package client

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"net/url"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
)

// issued is the path of an SVID for an entry at a generation.
func issued(t *testing.T, entry string, generation uint64) []*x509.Certificate {
	t.Helper()
	ext, err := ca.Origin{Entry: entry, EntryGeneration: generation, Agent: "h1", AgentGeneration: 1}.Extension()
	if err != nil {
		t.Fatal(err)
	}
	return []*x509.Certificate{{URIs: []*url.URL{{Scheme: "spiffe", Host: "banking.example", Path: "/a"}}, Extensions: []pkix.Extension{ext}}}
}

// A narrowed entry's SVIDs are announced at once and rejected when the grace has passed,
// within a second whatever a CA node asks. Repeating or changing the item gains nothing.
func TestGraceOfDistrustEndsWithinASecond(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("banking.example")
	narrowed := func(generation uint64, ms uint32) []*statev1.Distrust {
		return []*statev1.Distrust{{Id: "entry/entry/a", Entry: "entry/a", EntryGeneration: generation, GraceMs: ms}}
	}
	full := func(revision uint64, distrust []*statev1.Distrust) *ententev1.Policy {
		return &ententev1.Policy{Full: true, Last: true, Revision: revision, Bundles: []*ententev1.Bundle{{TrustDomain: td.Name(), Jwks: []byte("{}")}}, Distrust: distrust}
	}
	delta := func(revision uint64, distrust []*statev1.Distrust) *ententev1.Policy {
		return &ententev1.Policy{Last: true, Revision: revision, Distrust: distrust}
	}
	start := func(t *testing.T) (*Store, func(*ententev1.Policy)) {
		s := newStore(td, nil, nil, nil)
		return s, func(p *ententev1.Policy) {
			t.Helper()
			if err := s.policy(p); err != nil {
				t.Fatal(err)
			}
		}
	}
	check := func(t *testing.T, s *Store, generation uint64, rejected, announced bool) {
		t.Helper()
		synctest.Wait()
		v, path := s.Snapshot(), issued(t, "entry/a", generation)
		if got := v.Distrust.Check(path) != nil; got != rejected {
			t.Errorf("generation %d rejected: %v", generation, got)
		}
		if got := v.Announced.Check(path) != nil; got != announced {
			t.Errorf("generation %d announced: %v", generation, got)
		}
	}
	for name, run := range map[string]func(t *testing.T){
		"in force after the grace": func(t *testing.T) {
			s, apply := start(t)
			apply(full(5, nil))
			before := s.Snapshot()
			apply(delta(6, narrowed(4, 500)))
			check(t, s, 4, false, true)
			check(t, s, 5, false, false) // control: what is issued now
			<-s.changed
			time.Sleep(499 * time.Millisecond)
			check(t, s, 4, false, true)
			time.Sleep(2 * time.Millisecond)
			check(t, s, 4, true, true)
			check(t, s, 5, false, false)
			if v := s.Snapshot(); v.Urgent == before.Urgent || len(s.changed) != 1 {
				t.Error("nobody is told")
			}
		},
		"by the urgent lane": func(t *testing.T) {
			s, apply := start(t)
			apply(full(5, nil))
			s.urgent(&ententev1.Urgent{Distrust: narrowed(4, 500)})
			check(t, s, 4, false, true)
			time.Sleep(400 * time.Millisecond)
			apply(delta(6, narrowed(4, 500))) // the policy lane repeats it
			time.Sleep(101 * time.Millisecond)
			check(t, s, 4, true, true)
			apply(delta(7, narrowed(4, 500)))
			check(t, s, 4, true, true)
		},
		"without one at once": func(t *testing.T) {
			s, apply := start(t)
			apply(full(5, nil))
			apply(delta(6, narrowed(4, 0)))
			check(t, s, 4, true, true)
		},
		"a full state at once": func(t *testing.T) {
			s, apply := start(t)
			apply(full(5, narrowed(4, 500)))
			check(t, s, 4, true, true)
		},
		"a full state during the grace": func(t *testing.T) {
			s, apply := start(t)
			apply(full(5, nil))
			apply(delta(6, narrowed(4, 500)))
			apply(full(7, narrowed(4, 500)))
			check(t, s, 4, false, true)
			time.Sleep(501 * time.Millisecond)
			check(t, s, 4, true, true)
		},
		"deleted during the grace": func(t *testing.T) {
			s, apply := start(t)
			apply(full(5, nil))
			apply(delta(6, narrowed(4, 500)))
			apply(delta(7, narrowed(6, 0)))
			check(t, s, 6, true, true)
		},
		"narrowed again and again": func(t *testing.T) {
			s, apply := start(t)
			apply(full(5, nil))
			for i := range uint64(10) {
				apply(delta(6+i, narrowed(4+i, 500)))
				time.Sleep(100 * time.Millisecond)
			}
			check(t, s, 4, true, true)
		},
		"the one before stays in force": func(t *testing.T) {
			s, apply := start(t)
			apply(full(5, narrowed(3, 500)))
			apply(delta(6, narrowed(5, 500)))
			check(t, s, 3, true, true)
			check(t, s, 5, false, true)
		},
		"a node asks for an hour": func(t *testing.T) {
			s, apply := start(t)
			apply(full(5, nil))
			apply(delta(6, narrowed(4, 3_600_000)))
			time.Sleep(time.Second + time.Millisecond)
			check(t, s, 4, true, true)
		},
	} {
		t.Run(name, func(t *testing.T) { synctest.Test(t, run) })
	}
}
