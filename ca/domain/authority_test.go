package domain

import (
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain/domaintest"
)

// A malicious member that leads may propose what it likes, and no door stands before it:
// every replica refuses for itself. Each case has its control beside it.
func TestMaliciousAuthority(t *testing.T) {
	w := newWorld(t)
	w.must(w.nodeToken("t1", "n2", time.Hour))
	w.must(w.join("t1", "n2"))
	other := w.restored() // another replica
	own := &statev1.Cluster{Id: clusterID, TrustDomain: "banking.example"}
	n1, n2 := domaintest.Key("n1"), domaintest.Key("n2")
	as := func(change func(a *statev1.Authority)) *statev1.Authority {
		a := w.authority("n2", "k")
		change(a)
		return a
	}
	recertified := func(change func(a *statev1.Authority), trustDomain string) *statev1.Authority {
		return as(func(a *statev1.Authority) {
			said := proto.CloneOf(a)
			change(said)
			a.Certificate = domaintest.Certificate(said, trustDomain, domaintest.Key("authority fresh"))
		})
	}
	same := func(*statev1.Authority) {}
	for name, cmd := range map[string]*statev1.Command{
		"for another node":             domaintest.PrepareBy(own, as(same), n1),
		"for another node, not signed": {Body: &statev1.Command_PrepareAuthority{PrepareAuthority: &statev1.PrepareAuthority{Authority: as(same)}}},
		"for another cluster":          domaintest.PrepareBy(&statev1.Cluster{Id: make([]byte, ca.ClusterIDSize), TrustDomain: "banking.example"}, as(same), n2),
		"for another domain":           domaintest.PrepareBy(own, recertified(same, "trading.example"), n2),
		"for a longer name":            domaintest.PrepareBy(own, recertified(same, "banking.example.trading.example"), n2),
		"too long a life": domaintest.PrepareBy(own, as(func(a *statev1.Authority) {
			a.NotAfter += 3600
			a.Certificate = domaintest.Certificate(a, "banking.example", domaintest.Key("authority fresh"))
		}), n2),
		"too long a life of certificate": domaintest.PrepareBy(own, recertified(func(a *statev1.Authority) { a.NotAfter += 1 << 27 }, "banking.example"), n2),
		"a certificate of another key":   domaintest.PrepareBy(own, recertified(func(a *statev1.Authority) { a.PublicKey = domaintest.DER(0x30, []byte("other")) }, "banking.example"), n2),
		"as another use": func() *statev1.Command {
			cmd := domaintest.PrepareBy(own, as(func(a *statev1.Authority) { a.Use, a.Certificate = statev1.KeyUse_KEY_USE_JWT, nil }), n2)
			cmd.GetPrepareAuthority().Authority.Use = statev1.KeyUse_KEY_USE_WIT
			return cmd
		}(),
	} {
		for replica, s := range map[string]*State{"the proposer": w.s, "another": other} {
			out := s.Apply(w.index+1, reencode(t, cmd))
			if out.Refused == nil || out.Refused.Code != CodeInvalid || len(out.Changes) > 0 {
				t.Errorf("%s, at %s: %v", name, replica, out.Refused)
			} else if replica == "another" {
				t.Logf("%s: %v", name, out.Refused)
			}
		}
		w.index++
	}
	for _, s := range []*State{w.s, other} { // control
		if out := s.Apply(w.index+1, reencode(t, domaintest.PrepareBy(own, as(same), n2))); out.Refused != nil {
			t.Errorf("control: %v", out.Refused)
		}
	}
}

// The moment at which an authority entered its phase is part of the state, so that a new
// leader goes on counting where the one before was.
func TestAuthoritySince(t *testing.T) {
	w := &world{t: t, s: New(), seeds: map[string][]byte{}}
	w.must(w.initCommand())
	a := w.authority("n1", "k1")
	a.NotBefore, a.NotAfter = epochTime.Unix(), epochTime.Add(48*time.Hour).Unix()
	a.Certificate = domaintest.Certificate(a, "banking.example", domaintest.Key("authority fresh"))
	since := func() int64 { have, _ := w.s.Authority(a.GetId()); return have.GetSince() }
	w.must(prepare(a))
	if since() != 0 {
		t.Errorf("before the first tick: %d", since())
	}
	w.must(tick(epochTime))
	if since() != epochTime.Unix() {
		t.Errorf("counted from %d", since())
	}
	w.must(tick(epochTime.Add(time.Hour)))
	w.must(ready(a.GetId()))
	if since() != epochTime.Unix() {
		t.Error("readiness is no phase")
	}
	w.must(activate(a.GetId()))
	w.must(tick(epochTime.Add(2 * time.Hour)))
	w.must(taint(a.GetId()))
	if want := epochTime.Add(2 * time.Hour).Unix(); since() != want {
		t.Errorf("TAINTED since %d", since()-want)
	}
	w.must(drained(a.GetId()))

	// One that waited until its end makes room for another.
	b := w.authority("n1", "k2")
	w.must(prepare(b))
	w.refused(prepare(w.authority("n1", "k3")), CodeExists)
	w.must(tick(time.Unix(b.GetNotAfter(), 0)))
	if have, _ := w.s.Authority(b.GetId()); have.GetPhase() != statev1.AuthorityPhase_AUTHORITY_PHASE_RETIRED {
		t.Errorf("an ended one is %s", have.GetPhase())
	}
	w.must(prepare(w.authority("n1", "k3")))

	// A PREPARED one that nobody wants is given up: it was used by nobody.
	c, _ := w.s.Authority(w.authority("n1", "k3").GetId())
	w.must(taint(c.GetId()))
	w.must(drained(c.GetId()))
	w.must(revoke(c.GetId(), false))
}
