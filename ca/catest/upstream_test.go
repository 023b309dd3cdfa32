package catest_test

import (
	"bytes"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/node"
	"github.com/entente-mesh/entente/internal/peer/peertest"
)

var bankingDomain = spiffeid.RequireTrustDomainFromString("banking.example")

// rootFiles is a root on the disk, as the configuration names it.
func rootFiles(t *testing.T, dir string, root *x509.Certificate, key crypto.Signer) node.Upstream {
	t.Helper()
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	up := node.Upstream{Certificate: filepath.Join(dir, "root.pem"), Key: filepath.Join(dir, "root.key")}
	for path, block := range map[string]*pem.Block{
		up.Certificate: {Type: "CERTIFICATE", Bytes: root.Raw},
		up.Key:         {Type: "PRIVATE KEY", Bytes: pkcs8},
	} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return up
}

// spiffeVerifies asks go-spiffe's own verifier, which knows nothing of distrust items.
func spiffeVerifies(svid *x509svid.SVID, bundle x509bundle.Source) error {
	_, _, err := x509svid.Verify(svid.Certificates, bundle)
	return err
}

// knock is nil if a CA node's door takes that client certificate.
func knock(address string, svid *x509svid.SVID) error {
	cert := tls.Certificate{PrivateKey: svid.PrivateKey}
	for _, c := range svid.Certificates {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	conn, err := tls.Dial("tcp", address, &tls.Config{
		Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13, InsecureSkipVerify: true,
	})
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Read(make([]byte, 1)) // HTTP/2 begins with the server's settings
	return err
}

// A root certifies the authorities of two nodes: the root is the whole bundle, chains
// carry the intermediates, and agents, another domain and plain SPIFFE verify them.
func TestUpstream(t *testing.T) {
	t.Parallel()
	root := peertest.NewAuthority(bankingDomain)
	one := catest.Start(t, catest.Options{Upstream: rootFiles(t, t.TempDir(), root.Cert, root.Key)})
	two := one.Join("ca-2", "dc1")
	nodes := map[string]*catest.CA{"ca-1": one, "ca-2": two}
	one.Apply(workloads)
	h1, h2 := newAgent(t, one, "h1", "service/accounts"), newAgent(t, one, "h2", "service/cards")
	for name := range nodes {
		waitReady(t, one, name, x509Use)
	}
	if held := two.Bundle().X509Authorities(); len(held) != 1 || !held[0].Equal(root.Cert) {
		t.Fatalf("the bundle holds %d authorities, not the root alone", len(held))
	}
	for _, a := range one.Status().GetAuthorities() {
		if a.GetUse() != statev1.KeyUse_KEY_USE_X509 {
			continue
		}
		cert, err := x509.ParseCertificate(a.GetCertificate())
		if err != nil || cert.CheckSignatureFrom(root.Cert) != nil || cert.MaxPathLen != 0 || len(cert.URIs) != 1 || cert.URIs[0].String() != "spiffe://banking.example" {
			t.Errorf("authority %.8s is no intermediate of the root: %v", a.GetId(), err)
		}
	}
	chain := h1.svid(t).Certificates
	if len(chain) != 2 {
		t.Fatalf("the SVID's chain has %d certificates, not leaf and intermediate", len(chain))
	}
	rootOnly := x509bundle.FromX509Authorities(bankingDomain, []*x509.Certificate{root.Cert})
	if err := spiffeVerifies(h1.svid(t), rootOnly); err != nil {
		t.Errorf("go-spiffe: %v", err)
	}

	// Another domain fetches the root, over an endpoint whose chain has an intermediate.
	trading := catest.Start(t, catest.Options{TrustDomain: "trading.example", Name: "tr-1"})
	trading.Relate(one)
	eventually(t, "trading holds banking's bundle", 10*time.Second, func() error {
		for _, f := range trading.Status().GetForeign() {
			if f.GetX509Authorities() == 1 && f.GetError() == "" && f.GetAgeSeconds() >= 0 {
				return nil
			}
		}
		return fmt.Errorf("%v", trading.Status().GetForeign())
	})

	if up := one.Status().GetUpstream(); up.GetKeyId() != ca.KeyID(root.Cert.RawSubjectPublicKeyInfo) || up.GetProblem() != "" || up.GetNotAfter() != root.Cert.NotAfter.Unix() {
		t.Errorf("status: %v", up)
	}

	// Revoked: by distrust item, and it is said who will not learn of it.
	d := openDoor(t, h1)
	stolen := h2.svid(t)
	conn, err := connect(t, d, stolen)
	if err != nil {
		t.Fatalf("control: %v", err)
	}
	if err := knock(one.Config().Listen.API, stolen); err != nil {
		t.Errorf("control: %v", err)
	}
	victim := ""
	for _, a := range authorities(t, one) {
		if h2.under(t, a.GetAuthority().GetId()) {
			victim = a.GetAuthority().GetId()
		}
	}
	tainted, err := one.Admin().TaintAuthority(t.Context(), &ententev1.ChangeAuthorityRequest{Id: victim})
	if err != nil || !strings.Contains(tainted.GetNote(), "plain SPIFFE peers will not learn of it") {
		t.Errorf("taint says %q, %v", tainted.GetNote(), err)
	}
	r, err := one.Admin().RevokeAuthority(t.Context(), &ententev1.ChangeAuthorityRequest{Id: victim, Now: true})
	if err != nil || !strings.Contains(r.GetNote(), "plain SPIFFE peers will not learn of it") {
		t.Fatalf("revoke says %q, %v", r.GetNote(), err)
	}
	cut(t, "a connection under the revoked intermediate", conn)
	if _, err := connect(t, d, stolen); err == nil {
		t.Error("an SVID under the revoked intermediate is accepted by an agent")
	}
	if err := spiffeVerifies(stolen, two.Bundle()); err != nil {
		t.Errorf("control: plain SPIFFE does not learn of it, and the docs say so: %v", err)
	}
	// Nor do the CA nodes themselves, although their bundle verifies it.
	for name, c := range nodes {
		eventually(t, name+" refuses it", 5*time.Second, func() error {
			if knock(c.Config().Listen.API, stolen) == nil {
				return errors.New("it is accepted")
			}
			return knock(c.Config().Listen.API, h1.svid(t)) // control
		})
	}
	eventually(t, "the workload has another SVID, and is accepted with it", 5*time.Second, func() error {
		if h2.under(t, victim) {
			return errors.New("still the old one")
		}
		_, err := connect(t, d, h2.svid(t))
		return err
	})
}

// A root is replaced by putting another in its place: both are in the bundle while
// authorities under both are, and no SVID is without an accepted one at any time.
func TestUpstreamReplaced(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	old, next := peertest.NewAuthority(bankingDomain), peertest.NewAuthority(bankingDomain)
	c := catest.Start(t, catest.Options{Upstream: rootFiles(t, dir, old.Cert, old.Key)})
	c.Apply(workloads)
	h1 := newAgent(t, c, "h1", "service/accounts")
	holds := func(roots ...*peertest.Authority) error {
		var want, have [][]byte
		for _, r := range roots {
			want = append(want, r.Cert.Raw)
		}
		for _, cert := range c.Bundle().X509Authorities() {
			have = append(have, cert.Raw)
		}
		for _, w := range want {
			if len(have) != len(want) || !bytes.Contains(bytes.Join(have, nil), w) {
				return fmt.Errorf("the bundle has %d roots, want these %d", len(have), len(want))
			}
		}
		return spiffeVerifies(h1.svid(t), c.Bundle()) // at every step
	}
	change := func(do func(*ententev1.ChangeAuthorityRequest) (*ententev1.ChangeAuthorityResponse, error), id string) *ententev1.ChangeAuthorityResponse {
		t.Helper()
		r, err := do(&ententev1.ChangeAuthorityRequest{Id: id})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	taint := func(r *ententev1.ChangeAuthorityRequest) (*ententev1.ChangeAuthorityResponse, error) {
		return c.Admin().TaintAuthority(t.Context(), r)
	}
	revoke := func(r *ententev1.ChangeAuthorityRequest) (*ententev1.ChangeAuthorityResponse, error) {
		r.Now = true
		return c.Admin().RevokeAuthority(t.Context(), r)
	}
	x509Of := func(phase statev1.AuthorityPhase) string {
		for _, a := range c.Status().GetAuthorities() {
			if a.GetUse() == statev1.KeyUse_KEY_USE_X509 && a.GetPhase() == phase {
				return a.GetId()
			}
		}
		return ""
	}
	first, second := x509Of(active), x509Of(statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED)
	if err := holds(old); err != nil {
		t.Fatal(err)
	}

	rootFiles(t, dir, next.Cert, next.Key)
	change(taint, second) // so that another is prepared, under the new root
	eventually(t, "both roots are in the bundle", 10*time.Second, func() error { return holds(old, next) })
	change(revoke, second)
	third := waitReady(t, c, "ca-1", x509Use).GetId()
	if _, err := c.Admin().ActivateAuthority(t.Context(), &ententev1.ChangeAuthorityRequest{Id: third}); err != nil {
		t.Fatal(err)
	}
	change(taint, first)
	eventually(t, "the workload's SVID is under the new root", 10*time.Second, func() error {
		if !h1.under(t, third) {
			return errors.New("not yet")
		}
		return holds(old, next)
	})
	if r := change(revoke, first); r.GetNote() != "" {
		t.Errorf("the last one under the root left with it, and yet: %s", r.GetNote())
	}
	eventually(t, "the old root is gone", 10*time.Second, func() error { return holds(next) })
	if err := spiffeVerifies(h1.svid(t), x509bundle.FromX509Authorities(bankingDomain, []*x509.Certificate{old.Cert})); err == nil {
		t.Error("control: it verifies under the old root")
	}
}

// A root that was replaced by half is said while its key is not needed yet, and what was said
// ends when the other half is there.
func TestUpstreamReplacedByHalf(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	old, next := peertest.NewAuthority(bankingDomain), peertest.NewAuthority(bankingDomain)
	c := catest.Start(t, catest.Options{Upstream: rootFiles(t, dir, old.Cert, old.Key)})
	says := func(want string) error {
		s := c.Status()
		if problem := s.GetUpstream().GetProblem(); want == "" && problem+fmt.Sprint(s.GetFiles()) != "[]" || !strings.Contains(problem, want) {
			return fmt.Errorf("%q, %v; want %q", problem, s.GetFiles(), want)
		}
		return nil
	}
	if err := says(""); err != nil {
		t.Fatal(err)
	}
	rootFiles(t, dir, next.Cert, old.Key)
	eventually(t, "the key does not fit", 10*time.Second, func() error { return says("not that of its certificate") })
	rootFiles(t, dir, next.Cert, next.Key)
	eventually(t, "it fits", 10*time.Second, func() error { return says("") })
}

// What cannot certify is refused before a cluster exists.
func TestUpstreamRefusedAtInit(t *testing.T) {
	t.Parallel()
	root, other := peertest.NewAuthority(bankingDomain), peertest.NewAuthority(bankingDomain)
	trading := peertest.NewAuthority(spiffeid.RequireTrustDomainFromString("trading.example"))
	expired := peertest.NewAuthority(bankingDomain, peertest.Lifetime(time.Now().Add(-48*time.Hour), time.Now().Add(-time.Hour)))
	ending := peertest.NewAuthority(bankingDomain, peertest.TTL(90*time.Hour))
	for name, test := range map[string]struct {
		cert *x509.Certificate
		key  crypto.Signer
		says string
	}{
		"wrong key":       {root.Cert, other.Key, "the upstream's key is not that of its certificate"},
		"another domain":  {trading.Cert, trading.Key, "is the root of spiffe://trading.example"},
		"expired":         {expired.Cert, expired.Key, "ends too soon"},
		"ends too soon":   {ending.Cert, ending.Key, "needs it for two phases of 48h"},
		"no root at all":  {root.Intermediate().Cert, root.Key, "not a root"},
		"control: a root": {root.Cert, root.Key, ""},
	} {
		c := catest.Prepare(t, catest.Options{Upstream: rootFiles(t, t.TempDir(), test.cert, test.key)})
		err := node.Init(c.Config(), c.KeepRecoveryKey)
		if test.says == "" && err != nil || test.says != "" && (err == nil || !strings.Contains(err.Error(), test.says)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A root whose end comes near is warned of.
	near := peertest.NewAuthority(bankingDomain, peertest.TTL(7*48*time.Hour))
	c := catest.Start(t, catest.Options{Upstream: rootFiles(t, t.TempDir(), near.Cert, near.Key)})
	if up := c.Status().GetUpstream(); !strings.Contains(up.GetProblem(), "certifies nothing from") {
		t.Errorf("status: %v", up)
	}

	// A plain root key is for development only; sealed it is taken.
	files := rootFiles(t, t.TempDir(), root.Cert, root.Key)
	passphrase := filepath.Join(t.TempDir(), "passphrase")
	if err := os.WriteFile(passphrase, []byte("a passphrase of a test\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	sealed := catest.Prepare(t, catest.Options{Upstream: files})
	sealed.Config().Keys = node.Keys{PassphraseFile: passphrase}
	if err := node.Init(sealed.Config(), sealed.KeepRecoveryKey); err == nil || !strings.Contains(err.Error(), "entente ca seal") {
		t.Fatalf("a plain root key: %v", err)
	}
	plain, err := os.ReadFile(files.Key)
	if err != nil {
		t.Fatal(err)
	}
	text, err := node.SealUpstreamKey(sealed.Config(), plain)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(files.Key, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := node.Init(sealed.Config(), sealed.KeepRecoveryKey); err != nil {
		t.Errorf("a sealed root key: %v", err)
	}
}
