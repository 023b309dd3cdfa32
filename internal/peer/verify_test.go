package peer_test

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/entente-mesh/entente/internal/peer"
	"github.com/entente-mesh/entente/internal/peer/peertest"
)

var (
	banking = spiffeid.RequireTrustDomainFromString("banking.example")
	trading = spiffeid.RequireTrustDomainFromString("trading.example")
)

// names replaces the subject alternative names by raw URI names, which net/url would not write.
func names(uris ...string) peertest.Option {
	return func(template *x509.Certificate) {
		var sequence []asn1.RawValue
		for _, uri := range uris {
			sequence = append(sequence, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(uri)})
		}
		value, err := asn1.Marshal(sequence)
		if err != nil {
			panic(err)
		}
		template.URIs = nil
		template.ExtraExtensions = append(template.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: value})
	}
}

func keyUsage(critical bool, bits byte) peertest.Option {
	return func(template *x509.Certificate) {
		value, err := asn1.Marshal(asn1.BitString{Bytes: []byte{bits}, BitLength: 8})
		if err != nil {
			panic(err)
		}
		template.ExtraExtensions = append(template.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Critical: critical, Value: value})
	}
}

func uses(uses ...x509.ExtKeyUsage) peertest.Option {
	return func(template *x509.Certificate) { template.ExtKeyUsage = uses }
}

func uri(raw string) peertest.Option {
	return func(template *x509.Certificate) {
		u, err := url.Parse(raw)
		if err != nil {
			panic(err)
		}
		template.URIs = []*url.URL{u}
	}
}

// The attacks that need only a leaf. Each differs from the first line, which is accepted, in one thing.
// Requirements: 1-6, 8-11, 15, 34, 39-44, 47, T1, T13, T14.
func TestVerifyLeaf(t *testing.T) {
	ca := peertest.NewAuthority(banking)
	now := time.Now()
	long := strings.Repeat("a", 300)
	const digitalSignature, keyCertSign, cRLSign, keyAgreement = 0x80, 0x04, 0x02, 0x08
	tests := []struct {
		name string
		opts []peertest.Option
		want string // part of the error; "" if accepted
	}{
		{"good", nil, ""},
		{"good, raw name", []peertest.Option{names("spiffe://banking.example/accounts")}, ""},
		{"good, raw key usage", []peertest.Option{keyUsage(true, digitalSignature)}, ""},
		{"good, digitalSignature and more", []peertest.Option{keyUsage(true, digitalSignature|keyAgreement)}, ""},
		{"good, no extended key usage", []peertest.Option{uses()}, ""},
		{"good, one use more", []peertest.Option{uses(x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageCodeSigning)}, ""},
		{"good, DNS name beside", []peertest.Option{func(c *x509.Certificate) { c.DNSNames = []string{"accounts.banking.example"} }}, ""},
		{"good, no subject", []peertest.Option{func(c *x509.Certificate) { c.Subject = pkix.Name{} }}, ""},

		{"no name", []peertest.Option{names()}, "0 URI names"},
		{"no extension of names", []peertest.Option{func(c *x509.Certificate) { c.URIs = nil }}, "0 URI names"},
		{"DNS name only", []peertest.Option{func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"banking.example"} }}, "0 URI names"},
		{"two URI names", []peertest.Option{names("spiffe://banking.example/accounts", "spiffe://banking.example/ledger")}, "2 URI names"},
		{"two URI names, one no SPIFFE ID", []peertest.Option{names("https://banking.example/accounts", "spiffe://banking.example/accounts")}, "2 URI names"},
		{"the same name twice", []peertest.Option{names("spiffe://banking.example/accounts", "spiffe://banking.example/accounts")}, "2 URI names"},
		{"no path", []peertest.Option{names("spiffe://banking.example")}, "no path"},
		{"root path", []peertest.Option{names("spiffe://banking.example/")}, "trailing slash"},
		{"empty fragment", []peertest.Option{names("spiffe://banking.example/accounts#")}, "URI name"},
		{"fragment", []peertest.Option{names("spiffe://banking.example/accounts#x")}, "URI name"},
		{"empty query", []peertest.Option{names("spiffe://banking.example/accounts?")}, "URI name"},
		{"query", []peertest.Option{names("spiffe://banking.example/accounts?x=y")}, "URI name"},
		{"upper-case scheme", []peertest.Option{names("SPIFFE://banking.example/accounts")}, "URI name"},
		{"upper-case trust domain", []peertest.Option{names("spiffe://Banking.example/accounts")}, "URI name"},
		{"other scheme", []peertest.Option{names("https://banking.example/accounts")}, "URI name"},
		{"user", []peertest.Option{names("spiffe://root@banking.example/accounts")}, "URI name"},
		{"port", []peertest.Option{names("spiffe://banking.example:443/accounts")}, "URI name"},
		{"no trust domain", []peertest.Option{names("spiffe:///accounts")}, "URI name"},
		{"percent encoding", []peertest.Option{names("spiffe://banking.example/acc%6funts")}, "URI name"},
		{"dot segment", []peertest.Option{names("spiffe://banking.example/x/../accounts")}, "URI name"},
		{"double slash", []peertest.Option{names("spiffe://banking.example//accounts")}, "URI name"},
		{"zero byte", []peertest.Option{names("spiffe://banking.example/accounts\x00")}, ""}, // refused by the parser, see below
		{"path too long", []peertest.Option{names("spiffe://banking.example/" + strings.Repeat("a", 2100))}, "longer than 2048"},
		{"trust domain too long", []peertest.Option{names("spiffe://" + long + "/a")}, "longer than 255"},

		{"signing certificate", []peertest.Option{func(c *x509.Certificate) { c.IsCA = true }}, "signing certificate"},
		{"may sign certificates", []peertest.Option{keyUsage(true, digitalSignature|keyCertSign)}, "may sign"},
		{"may sign revocation lists", []peertest.Option{keyUsage(true, digitalSignature|cRLSign)}, "may sign"},
		{"no key usage", []peertest.Option{func(c *x509.Certificate) { c.KeyUsage = 0 }}, "no critical key usage"},
		{"key usage not critical", []peertest.Option{keyUsage(false, digitalSignature)}, "no critical key usage"},
		{"no digitalSignature", []peertest.Option{keyUsage(true, keyAgreement)}, "lacks digitalSignature"},
		{"code signing", []peertest.Option{uses(x509.ExtKeyUsageCodeSigning)}, "extended key usage"},
		{"server only", []peertest.Option{uses(x509.ExtKeyUsageServerAuth)}, "extended key usage"},
		{"client only", []peertest.Option{uses(x509.ExtKeyUsageClientAuth)}, "extended key usage"},
		{"unknown use only", []peertest.Option{func(c *x509.Certificate) {
			c.ExtKeyUsage, c.UnknownExtKeyUsage = nil, []asn1.ObjectIdentifier{{1, 2, 3}}
		}}, "extended key usage"},
		{"unknown critical extension", []peertest.Option{func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}}
		}}, "unhandled critical extension"},

		{"expired", []peertest.Option{peertest.Lifetime(now.Add(-time.Hour), now.Add(-time.Second))}, "expired"},
		{"not yet valid", []peertest.Option{peertest.Lifetime(now.Add(time.Minute), now.Add(time.Hour))}, "not yet valid"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var svid *x509svid.SVID
			func() {
				defer func() {
					if why := recover(); why != nil && test.name != "zero byte" {
						t.Fatal(why)
					}
				}()
				svid = ca.Issue("/accounts", test.opts...)
			}()
			if svid == nil {
				return // crypto/x509 already cannot read it
			}
			id, err := peer.Verify(svid.Certificates, ca.Bundle(), now)
			if test.name == "zero byte" {
				test.want = "URI name"
			}
			expect(t, id, err, "spiffe://banking.example/accounts", test.want)
		})
	}
}

// The names of trust domains are words and mean nothing, and lengths count up to their last byte.
// Requirements: 7, 12, 14, T12.
func TestVerifyNames(t *testing.T) {
	now := time.Now()
	long := "/" + strings.Repeat("a", 2048-len("spiffe://banking.example/"))
	for _, test := range []struct{ td, path, want string }{
		{"banking.example", "/accounts", ""},
		{"10.1.2.3", "/accounts", ""},
		{"1.2", "/accounts", ""},
		{"localhost", "/accounts", ""},
		{"my_bank", "/accounts", ""},
		{"-", "/accounts", ""},
		{strings.Repeat("a", 255), "/accounts", ""},
		{strings.Repeat("a", 256), "/accounts", "longer than 255"},
		{"banking.example", long, ""},
		{"banking.example", long + "a", "longer than 2048"},
	} {
		t.Run(fmt.Sprintf("%.20s%.10s %d", test.td, test.path, len(test.td+test.path)), func(t *testing.T) {
			td := spiffeid.RequireTrustDomainFromString(test.td)
			ca := peertest.NewAuthority(td)
			id, err := peer.Verify(ca.Issue(test.path).Certificates, ca.Bundle(), now)
			expect(t, id, err, td.IDString()+test.path, test.want)
			if test.want != "" {
				return
			}
			// It has no power over others, whatever it looks like.
			_, err = peer.Verify(ca.IssueFor(peertest.NewKey(), trading, "/portfolio").Certificates, x509bundle.NewSet(ca.Bundle(), peertest.NewAuthority(trading).Bundle()), now)
			expect(t, spiffeid.ID{}, err, "", "not signed by its trust domain")
		})
	}
}

func expect(t *testing.T, id spiffeid.ID, err error, wantID, wantErr string) {
	t.Helper()
	switch {
	case wantErr == "" && err != nil:
		t.Errorf("refused: %v", err)
	case wantErr == "" && id.String() != wantID:
		t.Errorf("accepted as %s, want %s", id, wantID)
	case wantErr != "" && err == nil:
		t.Errorf("accepted as %s", id)
	case wantErr != "" && !strings.Contains(err.Error(), wantErr):
		t.Errorf("refused with %q, want %q in it", err, wantErr)
	}
}

// What is accepted at the edges of an SVID's life, both ends included.
// Requirements: 39.
func TestVerifyAtTheEnds(t *testing.T) {
	ca := peertest.NewAuthority(banking)
	svid := ca.Issue("/accounts")
	leaf := svid.Certificates[0]
	for _, test := range []struct {
		now  time.Time
		want string
	}{
		{leaf.NotBefore, ""},
		{leaf.NotAfter, ""},
		{leaf.NotBefore.Add(-time.Second), "not yet valid"},
		{leaf.NotAfter.Add(time.Second), "expired"},
	} {
		id, err := peer.Verify(svid.Certificates, ca.Bundle(), test.now)
		expect(t, id, err, "spiffe://banking.example/accounts", test.want)
	}
}

// I2: an SVID is verified only with the bundle of the trust domain it names.
// Requirements: 29, 45, 54, 104, 121, 172.
func TestVerifyBundlesAreNotPooled(t *testing.T) {
	bank, trade, rogue := peertest.NewAuthority(banking), peertest.NewAuthority(trading), peertest.NewAuthority(banking)
	both := x509bundle.NewSet(bank.Bundle(), trade.Bundle())
	now := time.Now()
	const accounts = "spiffe://banking.example/accounts"
	forged := trade.IssueFor(peertest.NewKey(), banking, "/accounts")

	tests := []struct {
		name    string
		chain   []*x509.Certificate
		bundles x509bundle.Source
		want    string
	}{
		{"banking's SVID", bank.Issue("/accounts").Certificates, both, ""},
		{"banking's SVID, its bundle alone", bank.Issue("/accounts").Certificates, bank.Bundle(), ""},
		{"trading's authority signs banking's name", forged.Certificates, both, "not signed by its trust domain"},
		{"and sends its authority along", append(slices.Clone(forged.Certificates), trade.Cert), both, "not signed by its trust domain"},
		{"and banking's too", append(slices.Clone(forged.Certificates), bank.Cert, trade.Cert), both, "not signed by its trust domain"},
		{"a rogue authority that calls itself banking", append(rogue.Issue("/accounts").Certificates, rogue.Cert), both, "not signed by its trust domain"},
		{"no bundle of banking", bank.Issue("/accounts").Certificates, x509bundle.NewSet(trade.Bundle()), "no bundle of trust domain banking.example"},
		{"empty bundle: everything revoked", bank.Issue("/accounts").Certificates, x509bundle.New(banking), "not signed by its trust domain"},
		{"a source that gives trading's bundle for banking", forged.Certificates, anyBundle{trade.Bundle()}, "is that of trading.example"},
		{"a source that gives nothing", bank.Issue("/accounts").Certificates, anyBundle{nil}, "no bundle of trust domain"},
		{"no source", bank.Issue("/accounts").Certificates, nil, "no trust bundles"},
		{"no certificate", nil, both, "no certificate"},
		{"too many", slices.Repeat(bank.Issue("/accounts").Certificates, 9), both, "more than 8"},
		{"the authority itself", []*x509.Certificate{bank.Cert}, both, "no path"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			id, err := peer.Verify(test.chain, test.bundles, now)
			expect(t, id, err, accounts, test.want)
		})
	}
}

// anyBundle answers with its bundle whatever is asked for, as a careless source might.
type anyBundle struct{ *x509bundle.Bundle }

func (b anyBundle) GetX509BundleForTrustDomain(spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	return b.Bundle, nil
}

// Requirements: 39, 47, T14, T15.
func TestVerifyIntermediates(t *testing.T) {
	ca := peertest.NewAuthority(banking)
	other := peertest.NewAuthority(trading)
	now := time.Now()
	under := func(opts ...peertest.Option) []*x509.Certificate {
		return ca.Intermediate(opts...).Issue("/accounts").Certificates
	}
	twoDeep := ca.Intermediate().Intermediate().Issue("/accounts").Certificates
	noSign := func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }
	leafAsCA := func() []*x509.Certificate {
		workload := ca.Issue("/evil")
		stolen := &peertest.Authority{Cert: workload.Certificates[0], Key: workload.PrivateKey}
		return append(stolen.IssueFor(peertest.NewKey(), banking, "/accounts").Certificates, workload.Certificates[0])
	}
	tests := []struct {
		name  string
		chain []*x509.Certificate
		want  string
	}{
		{"good", under(), ""},
		{"two of them", twoDeep, ""},
		{"in another order, with a stranger among them", []*x509.Certificate{twoDeep[0], other.Cert, twoDeep[2], twoDeep[1]}, ""},
		{"without a name", under(names()), ""},
		{"with a web name", under(names("https://pki.example/ca")), ""},
		{"with both uses", under(uses(x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth)), ""},
		{"with any use", under(uses(x509.ExtKeyUsageAny)), ""},
		{"pathLen 0", under(func(c *x509.Certificate) { c.MaxPathLenZero = true }), ""},

		{"missing", under()[:1], "not signed by its trust domain"},
		{"of another domain", under(names("spiffe://trading.example")), "not the authority of banking.example"},
		{"with a path", under(names("spiffe://banking.example/ca/1")), "not the authority of banking.example"},
		{"with an upper-case scheme and a path", under(names("SPIFFE://banking.example/ca")), "not the authority of banking.example"},
		{"with an unreadable name", under(names("spiffe://banking.example", "spiffe://evil.example#")), "not the authority of banking.example"},
		{"code signing", under(uses(x509.ExtKeyUsageCodeSigning)), "extended key usage"},
		{"without keyCertSign", under(noSign), "not signed by its trust domain"},
		{"without key usage", under(func(c *x509.Certificate) { c.KeyUsage = 0 }), "keyCertSign"},
		{"not a CA", leafAsCA(), "not signed by its trust domain"},
		{"expired", under(peertest.Lifetime(now.Add(-time.Hour), now.Add(-time.Second))), "not signed by its trust domain"},
		{"beyond its path length", ca.Intermediate(func(c *x509.Certificate) { c.MaxPathLenZero = true }).Intermediate().Issue("/accounts").Certificates, "not signed by its trust domain"},
		{"name constraint of another domain", under(func(c *x509.Certificate) {
			c.PermittedURIDomains, c.PermittedDNSDomainsCritical = []string{"trading.example"}, true
		}), "not signed by its trust domain"},
		// T15: crypto/x509 lets a constraint to the parent domain pass for a subdomain. The bundle does not.
		{"constraint to a parent of the trust domain", peertest.NewAuthority(spiffeid.RequireTrustDomainFromString("example"), func(c *x509.Certificate) {
			c.PermittedURIDomains, c.PermittedDNSDomainsCritical = []string{"example"}, true
		}).IssueFor(peertest.NewKey(), banking, "/accounts").Certificates, "not signed by its trust domain"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			id, err := peer.Verify(test.chain, x509bundle.NewSet(ca.Bundle(), other.Bundle()), now)
			expect(t, id, err, "spiffe://banking.example/accounts", test.want)
		})
	}
}

// An authority that found its way into another domain's bundle still says whose it is.
// Requirements: 47, 121.
func TestVerifyAuthorityOfAnotherDomain(t *testing.T) {
	trade := peertest.NewAuthority(trading)
	misplaced := x509bundle.FromX509Authorities(banking, []*x509.Certificate{trade.Cert})
	id, err := peer.Verify(trade.IssueFor(peertest.NewKey(), banking, "/accounts").Certificates, misplaced, time.Now())
	expect(t, id, err, "", "not the authority of banking.example")

	unnamed := peertest.NewAuthority(banking, names("https://pki.example/root"))
	id, err = peer.Verify(unnamed.Issue("/accounts").Certificates, unnamed.Bundle(), time.Now())
	expect(t, id, err, "spiffe://banking.example/accounts", "")
}

// Where go-spiffe is sound, we refuse at least what it refuses.
// Requirements: 40-44, T1.
func TestVerifyIsNoLaxerThanGoSPIFFE(t *testing.T) {
	ca := peertest.NewAuthority(banking)
	now := time.Now()
	options := []peertest.Option{
		names("spiffe://banking.example/a#"), names("spiffe://banking.example"), names("spiffe://banking.example/a", "spiffe://banking.example/b"),
		keyUsage(true, 0x84), keyUsage(false, 0x80), uses(x509.ExtKeyUsageCodeSigning), uri("spiffe://trading.example/a"),
		func(c *x509.Certificate) { c.IsCA = true }, func(*x509.Certificate) {},
	}
	accepted := 0
	for i, opt := range options {
		chain := ca.Issue("/accounts", opt).Certificates
		_, ours := peer.Verify(chain, ca.Bundle(), now)
		_, _, theirs := x509svid.Verify(chain, ca.Bundle(), x509svid.WithTime(now))
		if ours == nil && theirs != nil {
			t.Errorf("case %d: accepted, go-spiffe refuses: %v", i, theirs)
		}
		if ours == nil {
			accepted++
		}
	}
	if accepted != 1 {
		t.Errorf("%d cases accepted, want only the good one", accepted)
	}
}

func TestAuthorize(t *testing.T) {
	accounts, ledger := id("spiffe://banking.example/accounts"), id("spiffe://banking.example/ledger")
	portfolio := id("spiffe://trading.example/portfolio")
	tests := []struct {
		name  string
		authz peer.Authorize
		id    spiffeid.ID
		ok    bool
	}{
		{"one of", peer.AnyOf(ledger, accounts), accounts, true},
		{"none of", peer.AnyOf(ledger, accounts), portfolio, false},
		{"a longer name", peer.AnyOf(accounts), id("spiffe://banking.example/accounts/x"), false},
		{"empty list", peer.AnyOf(), accounts, false},
		{"member", peer.MemberOf(banking), accounts, true},
		{"no member", peer.MemberOf(banking), portfolio, false},
		{"member of a subdomain", peer.MemberOf(banking), id("spiffe://x.banking.example/accounts"), false},
		{"anybody verified", peer.AnyVerified(), portfolio, true},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if err := test.authz(test.id); (err == nil) != test.ok {
				t.Errorf("%s: %v", test.id, err)
			}
		})
	}
}

func id(s string) spiffeid.ID { return spiffeid.RequireFromString(s) }

var errNo = errors.New("no")

func BenchmarkVerify(b *testing.B) {
	ca := peertest.NewAuthority(banking)
	svid, bundle := ca.Issue("/accounts"), ca.Bundle()
	for b.Loop() {
		if _, err := peer.Verify(svid.Certificates, bundle, time.Now()); err != nil {
			b.Fatal(err)
		}
	}
}
