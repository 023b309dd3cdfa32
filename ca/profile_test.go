package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

var (
	start  = time.Date(2026, 11, 20, 12, 0, 0, 500, time.UTC)
	serial = [16]byte{0x80, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
)

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func sign(t testing.TB, template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func authorityRequest(key crypto.Signer) AuthorityRequest {
	return AuthorityRequest{TrustDomain: banking, PublicKey: key.Public(), Serial: serial, Now: start, Phase: 48 * time.Hour}
}

func newAuthority(t testing.TB, key crypto.Signer) *x509.Certificate {
	t.Helper()
	template, err := AuthorityTemplate(authorityRequest(key))
	if err != nil {
		t.Fatal(err)
	}
	return sign(t, template, template, key.Public(), key)
}

// Requirements: 16, 17, 20, 25-28, 31-33, 38.
func TestAuthority(t *testing.T) {
	key := newKey(t)
	cert := newAuthority(t, key)
	if err := LintAuthority(cert, nil, banking, 48*time.Hour); err != nil {
		t.Fatal(err)
	}
	if !cert.NotBefore.Equal(start.Truncate(time.Second).Add(-time.Minute)) || !cert.NotAfter.Equal(start.Truncate(time.Second).Add(144*time.Hour)) {
		t.Errorf("valid from %s to %s", cert.NotBefore, cert.NotAfter)
	}
	if cert.SerialNumber.Cmp(new(big.Int).SetBytes(serial[:])) != 0 {
		t.Errorf("serial %x", cert.SerialNumber)
	}
	record, err := NewAuthority(banking, "member", cert.Raw, nil, 48*time.Hour, start)
	if err != nil {
		t.Fatal(err)
	}
	if record.GetId() != KeyID(cert.RawSubjectPublicKeyInfo) || record.GetMemberId() != "member" || record.GetUse() != statev1.KeyUse_KEY_USE_X509 ||
		record.GetNotBefore() != cert.NotBefore.Unix() || record.GetNotAfter() != cert.NotAfter.Unix() || record.GetPhase() != statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED {
		t.Errorf("record %v", record)
	}
	trading := spiffeid.RequireTrustDomainFromString("trading.example")
	if LintAuthority(cert, nil, trading, 48*time.Hour) == nil {
		t.Error("an authority of another trust domain is accepted")
	}
	if LintAuthority(cert, nil, banking, 47*time.Hour) == nil {
		t.Error("an authority of over three phases is accepted")
	}
	for name, when := range map[string]time.Time{"early": start.Add(-time.Hour), "late": start.Add(145 * time.Hour)} {
		if _, err := NewAuthority(banking, "member", cert.Raw, nil, 48*time.Hour, when); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	for name, der := range map[string][]byte{"none": nil, "rubbish": []byte("x"), "two": slices.Concat(cert.Raw, cert.Raw), "large": make([]byte, maxCertificate+1)} {
		if _, err := NewAuthority(banking, "member", der, nil, 48*time.Hour, start); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// Each authority differs from a good one in one point.
// Requirements: 17, 22, 25, 27, 28, 31, 33, 38, 51.
func TestLintAuthorityRefuses(t *testing.T) {
	key, other := newKey(t), newKey(t)
	uri := func(s string) *url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	var tests = map[string]struct {
		change func(*x509.Certificate)
		says   string
	}{
		"control":                {func(c *x509.Certificate) {}, ""},
		"not a CA":               {func(c *x509.Certificate) { c.IsCA, c.MaxPathLenZero = false, false }, "not a CA"},
		"path length 1":          {func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 1, false }, "path length"},
		"path length unlimited":  {func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = -1, false }, "path length"},
		"an ID with a path":      {func(c *x509.Certificate) { c.URIs = []*url.URL{uri("spiffe://banking.example/ca")} }, "not spiffe://banking.example"},
		"another domain":         {func(c *x509.Certificate) { c.URIs = []*url.URL{uri("spiffe://trading.example")} }, "not spiffe://banking.example"},
		"two IDs":                {func(c *x509.Certificate) { c.URIs = append(c.URIs, uri("spiffe://trading.example")) }, "2 URI names"},
		"no ID":                  {func(c *x509.Certificate) { c.URIs = nil }, "0 URI names"},
		"another scheme":         {func(c *x509.Certificate) { c.URIs = []*url.URL{uri("https://banking.example")} }, "not a SPIFFE ID"},
		"also digital signature": {func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageDigitalSignature }, "key usage"},
		"no CRL signing":         {func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCertSign }, "key usage"},
		"extended key usage":     {func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, "extended key usage"},
		"a DNS name":             {func(c *x509.Certificate) { c.DNSNames = []string{"banking.example"} }, "DNS names"},
		"an IP address":          {func(c *x509.Certificate) { c.IPAddresses = []net.IP{{127, 0, 0, 1}} }, "IP names"},
		"name constraints":       {func(c *x509.Certificate) { c.PermittedURIDomains = []string{"banking.example"} }, "name constraints"},
		"a critical extension": {func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
		}, "critical"},
		"lives too long": {func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(time.Hour) }, "three phases"},
		"a small serial number": {func(c *x509.Certificate) {
			c.SerialNumber = new(big.Int).Lsh(big.NewInt(1), 129)
		}, "serial"},
	}
	for name, test := range tests {
		template, err := AuthorityTemplate(authorityRequest(key))
		if err != nil {
			t.Fatal(err)
		}
		test.change(template)
		err = LintAuthority(sign(t, template, template, key.Public(), key), nil, banking, 48*time.Hour)
		checkSays(t, name, err, test.says)
	}
	template, _ := AuthorityTemplate(authorityRequest(key))
	checkSays(t, "signed by another", LintAuthority(sign(t, template, newAuthority(t, other), key.Public(), other), nil, banking, 48*time.Hour), "not signed by its own key")
	checkSays(t, "another key in it", LintAuthority(sign(t, template, template, other.Public(), key), nil, banking, 48*time.Hour), "not signed by its own key")
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := AuthorityTemplate(authorityRequest(p224)); err == nil {
		t.Error("an authority on P-224")
	}
	weak, _ := AuthorityTemplate(authorityRequest(key))
	weak.PublicKey = p224.Public()
	checkSays(t, "a weak key", LintAuthority(sign(t, weak, weak, p224.Public(), p224), nil, banking, 48*time.Hour), "not on P-256 or P-384")
	for name, change := range map[string]func(*AuthorityRequest){
		"no trust domain": func(r *AuthorityRequest) { r.TrustDomain = spiffeid.TrustDomain{} },
		"no phase":        func(r *AuthorityRequest) { r.Phase = 0 },
		"no serial":       func(r *AuthorityRequest) { r.Serial = [16]byte{} },
		"no key":          func(r *AuthorityRequest) { r.PublicKey = nil },
	} {
		req := authorityRequest(key)
		change(&req)
		if _, err := AuthorityTemplate(req); err == nil {
			t.Errorf("%s: template made", name)
		}
	}
}

func checkSays(t *testing.T, name string, err error, says string) {
	t.Helper()
	switch {
	case says == "" && err != nil:
		t.Errorf("%s: %v", name, err)
	case says != "" && err == nil:
		t.Errorf("%s: accepted", name)
	case says != "" && !strings.Contains(err.Error(), says):
		t.Errorf("%s: %v, does not say %q", name, err, says)
	}
}

func leafRequest(key crypto.Signer, authority *x509.Certificate) LeafRequest {
	return LeafRequest{
		ID: spiffeid.RequireFromPath(banking, "/accounts"), DNSNames: []string{"accounts.banking.example"}, PublicKey: key.Public(),
		Serial: serial, Now: start.Add(time.Hour), Life: 12 * time.Hour, Authority: authority,
		Origin: Origin{Entry: "service/accounts", EntryGeneration: 8812, Agent: "h1", AgentGeneration: 1<<44 | 77},
	}
}

// Requirements: 13, 20, 22-24, 30, 32, 34-37.
func TestLeaf(t *testing.T) {
	caKey, key := newKey(t), newKey(t)
	authority := newAuthority(t, caKey)
	req := leafRequest(key, authority)
	template, err := LeafTemplate(req)
	if err != nil {
		t.Fatal(err)
	}
	cert := sign(t, template, authority, key.Public(), caKey)
	if err := LintLeaf(cert, authority); err != nil {
		t.Fatal(err)
	}
	now := req.Now.Truncate(time.Second)
	if !cert.NotBefore.Equal(now.Add(-Backdate)) || !cert.NotAfter.Equal(now.Add(12*time.Hour)) {
		t.Errorf("valid from %s to %s", cert.NotBefore, cert.NotAfter)
	}
	// go-spiffe, which we do not rely on, agrees.
	bundle := x509bundle.FromX509Authorities(banking, []*x509.Certificate{authority})
	id, _, err := x509svid.Verify([]*x509.Certificate{cert}, bundle, x509svid.WithTime(req.Now))
	if err != nil || id != req.ID {
		t.Errorf("verified as %s, %v", id, err)
	}
	origin, ok, err := OriginOf(cert)
	if !ok || err != nil || origin != req.Origin {
		t.Errorf("origin %+v, %v, %v", origin, ok, err)
	}
	critical := map[string]bool{}
	for _, ext := range cert.Extensions {
		critical[ext.Id.String()] = ext.Critical
	}
	if !critical["2.5.29.15"] || !critical["2.5.29.17"] || !critical["2.5.29.19"] || critical[OriginOID.String()] {
		t.Errorf("critical: %v", critical)
	}

	// It never outlives its authority, and is never older.
	req.Now = authority.NotAfter.Add(-time.Minute)
	if template, err = LeafTemplate(req); err != nil || !template.NotAfter.Equal(authority.NotAfter) {
		t.Errorf("ends at %v, %v", template.NotAfter, err)
	}
	req.Now = authority.NotBefore.Add(time.Second)
	if template, err = LeafTemplate(req); err != nil || template.NotBefore.Before(authority.NotBefore) {
		t.Errorf("begins at %v, %v", template.NotBefore, err)
	}
	plain := leafRequest(key, authority)
	plain.Origin, plain.DNSNames = Origin{}, nil
	if template, err = LeafTemplate(plain); err != nil {
		t.Fatal(err)
	}
	if _, ok, err := OriginOf(sign(t, template, authority, key.Public(), caKey)); ok || err != nil {
		t.Errorf("an SVID without origin has one: %v", err)
	}

	for name, change := range map[string]func(*LeafRequest){
		"another trust domain":    func(r *LeafRequest) { r.ID = spiffeid.RequireFromString("spiffe://trading.example/accounts") },
		"no path":                 func(r *LeafRequest) { r.ID = banking.ID() },
		"no ID":                   func(r *LeafRequest) { r.ID = spiffeid.ID{} },
		"an ID over 2048 bytes":   func(r *LeafRequest) { r.ID = spiffeid.RequireFromPath(banking, "/"+strings.Repeat("a", 2040)) },
		"a bad DNS name":          func(r *LeafRequest) { r.DNSNames = []string{"*.banking.example"} },
		"no key":                  func(r *LeafRequest) { r.PublicKey = nil },
		"no serial":               func(r *LeafRequest) { r.Serial = [16]byte{} },
		"no life":                 func(r *LeafRequest) { r.Life = 0 },
		"no authority":            func(r *LeafRequest) { r.Authority = nil },
		"a leaf as authority":     func(r *LeafRequest) { r.Authority = cert },
		"the authority has ended": func(r *LeafRequest) { r.Now = authority.NotAfter },
		"a clock far behind":      func(r *LeafRequest) { r.Now = authority.NotBefore.Add(-time.Hour) },
		"no revision":             func(r *LeafRequest) { r.Origin.EntryGeneration = 1 << 54 },
		"a long agent name":       func(r *LeafRequest) { r.Origin.Agent = strings.Repeat("a", 300) },
	} {
		req := leafRequest(key, authority)
		change(&req)
		if _, err := LeafTemplate(req); err == nil {
			t.Errorf("%s: template made", name)
		}
	}
}

// Each SVID differs from a good one in one point.
// Requirements: 2, 22, 23, 30, 32, 35, 37, T13.
func TestLintLeafRefuses(t *testing.T) {
	caKey, key := newKey(t), newKey(t)
	authority := newAuthority(t, caKey)
	otherKey := newKey(t)
	otherRequest := authorityRequest(otherKey)
	otherRequest.Serial[3]++
	otherTemplate, err := AuthorityTemplate(otherRequest)
	if err != nil {
		t.Fatal(err)
	}
	other := sign(t, otherTemplate, otherTemplate, otherKey.Public(), otherKey)
	rawSAN := func(uris ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			var names []asn1.RawValue
			for _, uri := range uris {
				names = append(names, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(uri)})
			}
			der, err := asn1.Marshal(names)
			if err != nil {
				t.Fatal(err)
			}
			c.URIs, c.DNSNames = nil, nil
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: oidSubjectAltName, Critical: true, Value: der})
		}
	}
	tests := map[string]struct {
		change func(*x509.Certificate)
		says   string
	}{
		"control":           {func(c *x509.Certificate) {}, ""},
		"raw control":       {rawSAN("spiffe://banking.example/accounts"), ""},
		"an empty fragment": {rawSAN("spiffe://banking.example/accounts#"), "not a plain SPIFFE ID"}, // T13
		"an empty query":    {rawSAN("spiffe://banking.example/accounts?"), "not a plain SPIFFE ID"},
		"percent":           {rawSAN("spiffe://banking.example/a%2fb"), "not a plain SPIFFE ID"},
		"upper-case domain": {rawSAN("spiffe://Banking.example/accounts"), "not a SPIFFE ID"},
		"two IDs":           {rawSAN("spiffe://banking.example/a", "spiffe://banking.example/b"), "2 URI names"},
		"over 2048 bytes":   {rawSAN("spiffe://banking.example/" + strings.Repeat("a", 2048)), "over 2048"},
		"a CA":              {func(c *x509.Certificate) { c.IsCA = true }, "no CA"},
		"no basic constraints": {func(c *x509.Certificate) {
			c.BasicConstraintsValid = false
		}, "no CA"},
		"no path":              {func(c *x509.Certificate) { c.URIs = []*url.URL{banking.ID().URL()} }, "no path"},
		"another domain":       {func(c *x509.Certificate) { c.URIs[0].Host = "trading.example" }, "outside banking.example"},
		"no key usage":         {func(c *x509.Certificate) { c.KeyUsage = 0 }, "key usage"},
		"may sign":             {func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }, "key usage"},
		"server only":          {func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }, "extended key usage"},
		"any use":              {func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageAny) }, "extended key usage"},
		"outlives":             {func(c *x509.Certificate) { c.NotAfter = authority.NotAfter.Add(time.Second) }, "outside its authority's life"},
		"is older":             {func(c *x509.Certificate) { c.NotBefore = authority.NotBefore.Add(-time.Second) }, "outside its authority's life"},
		"a wildcard":           {func(c *x509.Certificate) { c.DNSNames = []string{"*.banking.example"} }, "not a DNS name"},
		"an e-mail address":    {func(c *x509.Certificate) { c.EmailAddresses = []string{"a@banking.example"} }, "e-mail"},
		"a critical extension": {func(c *x509.Certificate) { c.ExtraExtensions[0].Critical = true }, "critical"},
		"a broken origin":      {func(c *x509.Certificate) { c.ExtraExtensions[0].Value = []byte{0x30, 1} }, "origin"},
	}
	for name, test := range tests {
		template, err := LeafTemplate(leafRequest(key, authority))
		if err != nil {
			t.Fatal(err)
		}
		test.change(template)
		der, err := x509.CreateCertificate(rand.Reader, template, authority, key.Public(), caKey)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Logf("%s: refused by the parser already: %v", name, err)
			continue
		}
		checkSays(t, name, LintLeaf(cert, authority), test.says)
	}
	template, _ := LeafTemplate(leafRequest(key, authority))
	checkSays(t, "another issuer", LintLeaf(sign(t, template, authority, key.Public(), caKey), other), "issuer is not the authority")
	if err := LintLeaf(sign(t, template, authority, key.Public(), caKey), nil); err == nil {
		t.Error("no authority accepted")
	}
}

func TestOrigin(t *testing.T) {
	for _, o := range []Origin{
		{}, {Agent: "h1", AgentGeneration: 1}, {"service/accounts", 5, "h1", 1<<53 - 1},
	} {
		ext, err := o.Extension()
		if err != nil {
			t.Fatal(err)
		}
		if back, err := ParseOrigin(ext.Value); err != nil || back != o {
			t.Errorf("%+v came back as %+v, %v", o, back, err)
		}
	}
	good, _ := asn1.Marshal(originASN1{originVersion, "e", 1, "a", 1})
	if _, err := ParseOrigin(good); err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string]originASN1{
		"another version":     {2, "e", 1, "a", 1},
		"negative":            {originVersion, "e", -1, "a", 1},
		"beyond revisions":    {originVersion, "e", 1 << 53, "a", 1},
		"a name over bounds":  {originVersion, strings.Repeat("e", 257), 1, "a", 1},
		"a generation beyond": {originVersion, "e", 1, "a", 1 << 60},
	} {
		der, err := asn1.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		if o, err := ParseOrigin(der); err == nil {
			t.Errorf("%s: %+v", name, o)
		}
	}
	for name, der := range map[string][]byte{"nothing": nil, "cut": good[:len(good)-1], "trailing": append(slices.Clone(good), 0), "large": make([]byte, 2000)} {
		if o, err := ParseOrigin(der); err == nil {
			t.Errorf("%s: %+v", name, o)
		}
	}
}

func FuzzParseOrigin(f *testing.F) {
	ext, _ := Origin{"service/accounts", 8812, "h1", 77}.Extension()
	f.Add(ext.Value)
	f.Add([]byte{0x30, 0})
	f.Fuzz(func(t *testing.T, der []byte) {
		o, err := ParseOrigin(der)
		if err != nil {
			return
		}
		ext, err := o.Extension()
		if err != nil {
			t.Fatal(err)
		}
		if back, err := ParseOrigin(ext.Value); err != nil || back != o {
			t.Errorf("%+v came back as %+v, %v", o, back, err)
		}
	})
}
