package ca

import (
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// newRoot makes a root as an operator does, changed by edit.
func newRoot(t testing.TB, key crypto.Signer, edit func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: new(big.Int).Lsh(big.NewInt(1), 158), Subject: pkix.Name{CommonName: "root of banking"},
		NotBefore: start.Add(-time.Hour).Truncate(time.Second), NotAfter: start.AddDate(10, 0, 0).Truncate(time.Second),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs: []*url.URL{banking.ID().URL()},
	}
	if edit != nil {
		edit(template)
	}
	return sign(t, template, template, key.Public(), key)
}

// certified makes an authority under a root, changed by edit before the root signs it.
func certified(t testing.TB, root *x509.Certificate, rootKey, key crypto.Signer, edit func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	request := authorityRequest(key)
	request.Upstream = root
	template, err := AuthorityTemplate(request)
	if err != nil {
		t.Fatal(err)
	}
	if edit != nil {
		edit(template)
	}
	return sign(t, template, root, key.Public(), rootKey)
}

// An authority that a root certified: what it signs verifies with the root alone, by
// go-spiffe's own verifier.
func TestUpstream(t *testing.T) {
	rootKey, key, leafKey := newKey(t), newKey(t), newKey(t)
	root := newRoot(t, rootKey, nil)
	authority := certified(t, root, rootKey, key, nil)
	record, err := NewAuthority(banking, "member", authority.Raw, root.Raw, 48*time.Hour, start)
	if err != nil {
		t.Fatal(err)
	}
	if string(record.GetUpstream()) != string(root.Raw) || record.GetUpstreamNotAfter() != root.NotAfter.Unix() {
		t.Error("the record does not hold its root")
	}
	template, err := LeafTemplate(leafRequest(leafKey, authority))
	if err != nil {
		t.Fatal(err)
	}
	leaf := sign(t, template, authority, leafKey.Public(), key)
	if err := LintLeaf(leaf, authority); err != nil {
		t.Error(err)
	}
	bundle := x509bundle.FromX509Authorities(banking, []*x509.Certificate{root})
	id, _, err := x509svid.Verify([]*x509.Certificate{leaf, authority}, bundle, x509svid.WithTime(start.Add(2*time.Hour)))
	if err != nil || id.String() != "spiffe://banking.example/accounts" {
		t.Errorf("go-spiffe: %v, %v", id, err)
	}
	if _, _, err := x509svid.Verify([]*x509.Certificate{leaf}, bundle, x509svid.WithTime(start.Add(2*time.Hour))); err == nil {
		t.Error("control: it verifies without the intermediate")
	}
	// A root without SPIFFE's name, as an ordinary PKI makes them.
	if err := LintUpstream(newRoot(t, rootKey, func(c *x509.Certificate) { c.URIs = nil }), banking); err != nil {
		t.Error(err)
	}
}

func TestUpstreamEnds(t *testing.T) {
	const phase = 48 * time.Hour
	rootKey, key := newKey(t), newKey(t)
	for _, test := range []struct {
		left, life time.Duration // life 0: refused
	}{
		{10 * phase, 3 * phase}, {3 * phase, 3 * phase}, {5 * phase / 2, 5 * phase / 2}, {2*phase + time.Minute, 2*phase + time.Minute},
		{2*phase - time.Second, 0}, {time.Hour, 0}, {-time.Hour + time.Second, 0},
	} {
		root := newRoot(t, rootKey, func(c *x509.Certificate) { c.NotAfter = start.Truncate(time.Second).Add(test.left) })
		request := authorityRequest(key)
		request.Upstream = root
		template, err := AuthorityTemplate(request)
		switch {
		case test.life == 0 && !errors.Is(err, ErrUpstreamEnds):
			t.Errorf("%v left: %v", test.left, err)
		case test.life != 0 && err != nil:
			t.Errorf("%v left: %v", test.left, err)
		case test.life != 0 && template.NotAfter.Sub(start.Truncate(time.Second)) != test.life:
			t.Errorf("%v left: the authority lives %v", test.left, template.NotAfter.Sub(start))
		}
	}
}

func TestUpstreamRefused(t *testing.T) {
	rootKey, otherKey, key := newKey(t), newKey(t), newKey(t)
	trading := spiffeid.RequireTrustDomainFromString("trading.example")
	name := func(c *x509.Certificate) { c.Subject.CommonName = "another" }
	for what, test := range map[string]struct {
		edit func(*x509.Certificate)
		says string
	}{
		"a path length that forbids it": {func(c *x509.Certificate) { c.MaxPathLenZero = true }, "forbids the intermediates"},
		"another domain's root":         {func(c *x509.Certificate) { c.URIs = []*url.URL{trading.ID().URL()} }, "is the root of spiffe://trading.example"},
		"a workload's name":             {func(c *x509.Certificate) { c.URIs[0] = banking.ID().URL().JoinPath("accounts") }, "is the root of"},
		"two names":                     {func(c *x509.Certificate) { c.URIs = append(c.URIs, trading.ID().URL()) }, "2 URI names"},
		"no CA":                         {func(c *x509.Certificate) { c.IsCA = false }, "not a CA"},
		"no keyCertSign":                {func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }, "keyCertSign"},
		"an extended key usage":         {func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, "extended key usage"},
		"name constraints":              {func(c *x509.Certificate) { c.PermittedURIDomains = []string{"banking.example"} }, "name constraints"},
		"no subject":                    {func(c *x509.Certificate) { c.Subject = pkix.Name{} }, "no subject"},
		"an unknown critical extension": {func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
		}, "critical"},
	} {
		checkSays(t, what, LintUpstream(newRoot(t, rootKey, test.edit), banking), test.says)
	}
	root := newRoot(t, rootKey, nil)
	checkSays(t, "an intermediate as root", LintUpstream(certified(t, root, rootKey, key, nil), banking), "not a root")
	forged := newRoot(t, rootKey, nil)
	parent := *forged
	parent.PublicKey = otherKey.Public()
	forged = sign(t, forged, &parent, rootKey.Public(), otherKey)
	checkSays(t, "not signed by itself", LintUpstream(forged, banking), "not signed by its own key")

	// What a member might propose under a root.
	other := newRoot(t, otherKey, name)
	propose := func(authority, root *x509.Certificate) error {
		_, err := NewAuthority(banking, "member", authority.Raw, root.Raw, 48*time.Hour, start)
		return err
	}
	if err := propose(certified(t, root, rootKey, key, nil), root); err != nil {
		t.Errorf("control: %v", err)
	}
	for what, test := range map[string]struct {
		edit func(*x509.Certificate)
		says string
	}{
		"for another domain":    {func(c *x509.Certificate) { c.URIs = []*url.URL{trading.ID().URL()} }, "its SPIFFE ID is"},
		"without a name":        {func(c *x509.Certificate) { c.URIs = nil }, "0 URI names"},
		"that may have its own": {func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 1, false }, "path length is not 0"},
		"too long a life":       {func(c *x509.Certificate) { c.NotAfter = start.AddDate(0, 0, 30) }, "over three phases"},
		"that outlives it":      {func(c *x509.Certificate) { c.NotAfter = root.NotAfter.Add(time.Second) }, "outside its upstream's life"},
		"that is older":         {func(c *x509.Certificate) { c.NotBefore = root.NotBefore.Add(-time.Second) }, "outside its upstream's life"},
		"with its name":         {func(c *x509.Certificate) { c.Subject = root.Subject }, "has the name of its upstream"},
	} {
		checkSays(t, what, propose(certified(t, root, rootKey, key, test.edit), root), test.says)
	}
	checkSays(t, "under another root", propose(certified(t, root, rootKey, key, nil), other), "its issuer is not its upstream")
	sameName := newRoot(t, otherKey, nil)
	checkSays(t, "under another root of that name", propose(certified(t, root, rootKey, key, nil), sameName), "not signed by its upstream")
	checkSays(t, "with the root's key", propose(certified(t, root, rootKey, rootKey, nil), root), "its upstream's key")
	checkSays(t, "self-signed", propose(newAuthority(t, key), root), "its issuer is not its upstream")
	checkSays(t, "certified, without its root", func() error {
		_, err := NewAuthority(banking, "member", certified(t, root, rootKey, key, nil).Raw, nil, 48*time.Hour, start)
		return err
	}(), "its issuer is not itself")
	if _, err := NewAuthority(banking, "member", certified(t, root, rootKey, key, nil).Raw, []byte("x"), 48*time.Hour, start); err == nil {
		t.Error("a root that does not parse is taken")
	}
}
