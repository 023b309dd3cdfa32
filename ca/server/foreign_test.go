package server_test

import (
	"crypto/x509"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/server"
	"github.com/entente-mesh/entente/federation/bundle"
)

// A key of one domain is never accepted in another's bundle (I2), and listing it there takes
// nothing from its owner: whether the thief's bundle was there first or came later.
// Requirements: 95.
func TestWithoutSharedKeys(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	trading := catest.Start(t, catest.Options{TrustDomain: "trading.example"})
	parse := func(td spiffeid.TrustDomain, jwks []byte) *bundle.Bundle {
		t.Helper()
		b, _, err := bundle.Parse(td, jwks)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	victims := func() *bundle.Bundle { return parse(trading.TrustDomain(), trading.BundleJSON()) }
	ours := func() *bundle.Bundle { return parse(c.TrustDomain(), c.BundleJSON()) }
	within(t, "both domains have keys of their own, with proofs", func() bool {
		for _, b := range []*bundle.Bundle{ours(), victims()} {
			if len(b.X509) == 0 || !slices.ContainsFunc(b.JWT, func(k bundle.Key) bool { return k.Proof != "" }) {
				return false
			}
		}
		return true
	})

	// A thief's bundle: its own keys, and of each victim all, as they are and under its name.
	own := map[string]*x509.Certificate{}
	steal := func(name string) {
		t.Helper()
		td := spiffeid.RequireTrustDomainFromString(name)
		key, cert := selfSigned(t, "spiffe://"+name, true)
		own[name] = cert
		b := &bundle.Bundle{TrustDomain: td, X509: []*x509.Certificate{cert}, Sequence: 7}
		for i, victim := range []*bundle.Bundle{victims(), ours()} {
			for _, cert := range victim.X509 {
				b.X509 = append(b.X509, cert, certifiedBy(t, key.PrivateKey, own[name], cert))
			}
			for _, k := range victim.JWT {
				k.ID = string(rune('a'+i)) + k.ID
				b.JWT = append(b.JWT, k)
			}
		}
		jwks, err := b.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Admin().Apply(t.Context(), &ententev1.ApplyRequest{Objects: []*statev1.Object{{Source: "x:1", Kind: &statev1.Object_Relationship{
			Relationship: &statev1.Relationship{TrustDomain: name, BootstrapBundle: jwks}}}}}); err != nil {
			t.Fatal(err)
		}
		within(t, "the bundle of "+name+" is agreed", func() (ok bool) {
			c.Node().Read(func(st *domain.State) { _, ok = st.FetchedBundle(name) })
			return ok
		})
	}
	used := func(td string) (b *bundle.Bundle, fetched []byte, dropped []domain.Dropped) {
		t.Helper()
		var jwks []byte
		c.Node().Read(func(st *domain.State) {
			u, _ := st.ForeignBundle(td)
			f, _ := st.FetchedBundle(td)
			jwks, fetched, dropped = u.GetJwks(), f.GetJwks(), st.DroppedKeys(td)
		})
		return parse(spiffeid.RequireTrustDomainFromString(td), jwks), fetched, dropped
	}

	steal("first.example")
	c.Relate(trading)
	within(t, "trading's bundle is agreed", func() (ok bool) {
		c.Node().Read(func(st *domain.State) { _, ok = st.ForeignBundle("trading.example") })
		return ok
	})
	steal("late.example")

	for td, cert := range own {
		b, fetched, dropped := used(td)
		if len(b.X509) != 1 || !b.X509[0].Equal(cert) || len(b.JWT) != 0 {
			t.Errorf("%s: %d X.509 and %d JWT keys are used; only its own may be", td, len(b.X509), len(b.JWT))
		}
		if whole := parse(b.TrustDomain, fetched); len(whole.X509) < 5 || len(whole.JWT) < 2 {
			t.Errorf("control: of %s %d X.509 and %d JWT keys are kept; the test stole nothing", td, len(whole.X509), len(whole.JWT))
		}
		for _, victim := range []string{"banking.example", "trading.example"} {
			for _, use := range []statev1.KeyUse{statev1.KeyUse_KEY_USE_X509, statev1.KeyUse_KEY_USE_JWT} {
				if !slices.ContainsFunc(dropped, func(d domain.Dropped) bool { return d.Other == victim && d.Use == use }) {
					t.Errorf("%s: no dropped key of use %v is said to be %s's: %+v", td, use, victim, dropped)
				}
			}
		}
	}
	b, fetched, dropped := used("trading.example")
	if whole := parse(b.TrustDomain, fetched); len(dropped) != 0 || len(b.X509) != len(whole.X509) || len(b.JWT) != len(whole.JWT) || len(b.X509) == 0 || len(b.JWT) == 0 {
		t.Errorf("trading lost %+v", dropped)
	}
	for _, f := range c.Status().GetForeign() {
		if thief := own[f.GetTrustDomain()] != nil; thief != (len(f.GetDropped()) > 0) || f.GetX509Authorities() == 0 {
			t.Errorf("status of %s: %d authorities, dropped %v", f.GetTrustDomain(), f.GetX509Authorities(), f.GetDropped())
		}
	}
}

// certifiedBy is another certificate for the same key, made by somebody else.
func certifiedBy(t *testing.T, key any, issuer, of *x509.Certificate) *x509.Certificate {
	t.Helper()
	template := *issuer
	template.SerialNumber = of.SerialNumber
	template.SubjectKeyId = of.SubjectKeyId
	der, err := x509.CreateCertificate(nil, &template, issuer, of.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func within(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

// A domain that lists the root of this one cannot stop it from being used.
func TestCheckUpstream(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	listed := func(name string) *x509.Certificate {
		_, root := selfSigned(t, name, true)
		return root
	}
	named, peers, nobodys := listed("spiffe://banking.example"), listed("spiffe://evil.example"), listed("spiffe://third.example")
	evil := spiffeid.RequireTrustDomainFromString("evil.example")
	jwks, err := (&bundle.Bundle{TrustDomain: evil, X509: []*x509.Certificate{named, peers, nobodys}, Sequence: 1}).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Admin().Apply(t.Context(), &ententev1.ApplyRequest{Objects: []*statev1.Object{{Source: "x:1", Kind: &statev1.Object_Relationship{
		Relationship: &statev1.Relationship{TrustDomain: "evil.example", BootstrapBundle: jwks}}}}}); err != nil {
		t.Fatal(err)
	}
	within(t, "the bundle is agreed", func() (ok bool) {
		c.Node().Read(func(st *domain.State) { _, ok = st.FetchedBundle("evil.example") })
		return ok
	})
	c.Node().Read(func(st *domain.State) {
		if err := server.CheckUpstream(st, named.Raw); err != nil {
			t.Errorf("a root that names this domain: %v", err)
		}
		if err := server.CheckUpstream(st, listed("spiffe://other.example").Raw); err != nil {
			t.Errorf("control: a root that nobody lists: %v", err)
		}
		for what, root := range map[string]*x509.Certificate{"the peer's own": peers, "one of nobody that the peer lists": nobodys} {
			if server.CheckUpstream(st, root.Raw) == nil {
				t.Errorf("%s is accepted", what)
			}
		}
		if id := ca.CertificateKeyID(named.Raw); id != ca.KeyID(named.RawSubjectPublicKeyInfo) {
			t.Errorf("key id %s", id)
		}
	})
}
