package server_test

import (
	"crypto/x509"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/server"
	"github.com/entente-mesh/entente/federation/bundle"
)

// A key that stands in one domain's bundle is never accepted in another's (I2).
// Requirements: 95.
func TestWithoutSharedKeys(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	trading := catest.Start(t, catest.Options{TrustDomain: "trading.example"})
	c.Relate(trading)
	evil := spiffeid.RequireTrustDomainFromString("evil.example")
	_, own := selfSigned(t, "spiffe://evil.example", true)
	record := func(certs ...*x509.Certificate) *statev1.ForeignBundle {
		t.Helper()
		jwks, err := (&bundle.Bundle{TrustDomain: evil, X509: certs, Sequence: 1}).Marshal()
		if err != nil {
			t.Fatal(err)
		}
		r, err := server.ForeignRecord(evil, jwks)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	clean := func(r *statev1.ForeignBundle) (kept []*x509.Certificate, dropped []string) {
		t.Helper()
		c.Node().Read(func(st *domain.State) {
			var err error
			if r, dropped, err = server.WithoutSharedKeys(st, r); err != nil {
				t.Fatal(err)
			}
		})
		b, _, err := bundle.Parse(evil, r.GetJwks())
		if err != nil || b.Sequence != 1 {
			t.Fatal(b, err)
		}
		return b.X509, dropped
	}
	if kept, dropped := clean(record(own)); len(kept) != 1 || len(dropped) != 0 {
		t.Errorf("control: kept %d, dropped %v", len(kept), dropped)
	}
	// What the node holds of trading's, once it has fetched it.
	var tradings []*x509.Certificate
	for len(tradings) == 0 && t.Context().Err() == nil {
		c.Node().Read(func(st *domain.State) {
			if r, ok := st.ForeignBundle("trading.example"); ok {
				if b, _, err := bundle.Parse(trading.TrustDomain(), r.GetJwks()); err == nil {
					tradings = b.X509
				}
			}
		})
		time.Sleep(5 * time.Millisecond)
	}
	for name, stolen := range map[string]*x509.Certificate{
		"own domain's": c.Bundle().X509Authorities()[0],
		"trading's":    tradings[0],
	} {
		kept, dropped := clean(record(own, stolen))
		if len(kept) != 1 || !kept[0].Equal(own) || len(dropped) != 1 || dropped[0] != ca.KeyID(stolen.RawSubjectPublicKeyInfo) {
			t.Errorf("%s: kept %d, dropped %v", name, len(kept), dropped)
		}
	}

	// The same with keys of tokens, whatever kind and kid they come under.
	spki, err := x509.MarshalPKIXPublicKey(newKey(t).Public())
	if err != nil {
		t.Fatal(err)
	}
	free, err := bundle.NewKey("free", spki)
	if err != nil {
		t.Fatal(err)
	}
	for name, owner := range map[string]*catest.CA{"own domain's": c, "trading's": trading} {
		b, _, err := bundle.Parse(owner.TrustDomain(), owner.BundleJSON())
		if err != nil {
			t.Fatal(err)
		}
		stolen := b.JWT[0]
		stolen.ID = "mine"
		jwks, err := (&bundle.Bundle{TrustDomain: evil, X509: []*x509.Certificate{own}, JWT: []bundle.Key{free, stolen}, Sequence: 1}).Marshal()
		if err != nil {
			t.Fatal(err)
		}
		r, err := server.ForeignRecord(evil, jwks)
		if err != nil {
			t.Fatal(err)
		}
		var dropped []string
		c.Node().Read(func(st *domain.State) { r, dropped, err = server.WithoutSharedKeys(st, r) })
		if err != nil {
			t.Fatal(err)
		}
		left, _, err := bundle.Parse(evil, r.GetJwks())
		if err != nil || len(left.X509) != 1 || len(left.JWT) != 1 || left.JWT[0].ID != "free" || len(dropped) != 1 {
			t.Errorf("%s JWT key: left %+v, dropped %v, %v", name, left, dropped, err)
		}
	}
}
