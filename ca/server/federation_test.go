package server_test

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/federation/bundle"
)

// A bundle that is given by hand counts each time that it is changed; what has no effect is
// refused, and the sequence goes back only by a reset.
// Requirements: 120.
func TestBundlesGivenByHand(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	const name = "manual.example"
	give := func(jwks string) (*ententev1.ApplyResponse, error) {
		return c.Admin().Apply(t.Context(), &ententev1.ApplyRequest{Objects: []*statev1.Object{{Source: "man.yaml:1", Kind: &statev1.Object_Relationship{
			Relationship: &statev1.Relationship{TrustDomain: name, BootstrapBundle: []byte(jwks)}}}}})
	}
	written := func(sequence uint64) string {
		t.Helper()
		_, cert := selfSigned(t, "spiffe://"+name, true)
		b := &bundle.Bundle{TrustDomain: spiffeid.RequireTrustDomainFromString(name), Sequence: sequence}
		b.X509 = append(b.X509, cert)
		jwks, err := b.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		return string(jwks)
	}
	held := func() string {
		t.Helper()
		got, err := c.Admin().GetBundle(t.Context(), &ententev1.GetBundleRequest{TrustDomain: name})
		if err != nil {
			return err.Error()
		}
		return string(got.GetJwks())
	}
	refused := func(what, jwks, want string) {
		t.Helper()
		if _, err := give(jwks); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "man.yaml:1") {
			t.Errorf("%s: %v, want %q", what, err, want)
		}
	}
	accepted := func(jwks string) {
		t.Helper()
		if got, err := give(jwks); err != nil || len(got.GetWarnings()) > 0 {
			t.Fatal(err, got.GetWarnings())
		}
		within(t, "this bundle is held: "+jwks[len(jwks)-40:], func() bool { return held() == jwks })
	}
	within(t, "there is a bundle of this domain", func() bool {
		_, err := c.Admin().GetBundle(t.Context(), &ententev1.GetBundleRequest{})
		return err == nil
	})

	good := written(7)
	refused("BOM", "\ufeff"+good, "byte order mark")
	refused("UTF-16", "\xff\xfe{\x00}\x00", "byte order mark")
	refused("PEM", "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n", "it is PEM")
	refused("no use", strings.ReplaceAll(good, `"use":"x509-svid"`, `"x":"x"`), "no key that can be used")
	refused("no keys", `{"keys":[]}`, "its list of keys is empty")
	refused("not JSON", "good", "JSON")
	refused("own bundle", string(c.BundleJSON()), "this domain's own")
	if got := held(); !strings.Contains(got, "no bundle") {
		t.Errorf("something refused is held: %s", got)
	}

	accepted(good)
	accepted(written(8))
	same := written(8)
	accepted(same) // of the same sequence: what an operator gives is the latest
	if got, err := give(strings.Replace(written(9), `"keys":[`, `"keys":[{"kty":"EC"},`, 1)); err != nil || len(got.GetWarnings()) != 1 || !strings.Contains(got.GetWarnings()[0], "no use") {
		t.Errorf("a key that does not count: %v, %v", got.GetWarnings(), err)
	}

	within(t, "sequence 9 is held", func() bool { return strings.Contains(held(), `"spiffe_sequence":9`) })

	// The peer was set up again.
	again := written(2)
	_, err := give(again)
	text := status.Convert(err).Message()
	_, command, found := strings.Cut(text, "entente federation reset "+name+" --bundle-sha256 ")
	if err == nil || !found {
		t.Fatalf("a lower sequence: %v", err)
	}
	if _, err := c.Admin().ResetFederation(t.Context(), &ententev1.ResetFederationRequest{TrustDomain: name, BundleSha256: strings.Fields(command)[0]}); err != nil {
		t.Fatal(err)
	}
	refused("another one", written(2), "federation reset")
	accepted(again)
	accepted(written(3)) // and on from there
	if _, err := c.Admin().ResetFederation(t.Context(), &ententev1.ResetFederationRequest{TrustDomain: "nobody.example", BundleSha256: strings.Fields(command)[0]}); err == nil {
		t.Error("a reset without a bundle")
	}
}

// A refresh fetches now, and what is wrong with a peer is an answer.
func TestRefreshFederation(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	trading := catest.Start(t, catest.Options{TrustDomain: "trading.example"})
	c.Relate(trading)
	refresh := func(td string) (*ententev1.RefreshFederationResponse, error) {
		return c.Admin().RefreshFederation(t.Context(), &ententev1.RefreshFederationRequest{TrustDomain: td})
	}
	for _, td := range []string{"trading.example", ""} {
		got, err := refresh(td)
		if err != nil || len(got.GetBundles()) != 1 || got.GetBundles()[0].GetError() != "" || got.GetBundles()[0].GetAgeSeconds() < 0 || got.GetBundles()[0].GetAgeSeconds() > 5 {
			t.Errorf("%q: %v, %v", td, got, err)
		}
	}
	if _, err := refresh("nobody.example"); err == nil || !strings.Contains(err.Error(), "no Relationship") {
		t.Errorf("no relationship: %v", err)
	}
	trading.Stop()
	if got, err := refresh("trading.example"); err != nil || got.GetBundles()[0].GetError() == "" {
		t.Errorf("the peer is down: %v, %v", got, err)
	}
}
