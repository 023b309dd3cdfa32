package server_test

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/node"
	"github.com/entente-mesh/entente/ca/nodeattest"
)

// hostPKI is another PKI, that gives hosts certificates.
type hostPKI struct {
	t    testing.TB
	cert *x509.Certificate
	key  crypto.Signer
}

func newHostPKI(t testing.TB) *hostPKI {
	p := &hostPKI{t: t, key: newKey(t)}
	p.cert = p.issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: "host authority"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, p.key)
	return p
}

func (p *hostPKI) issue(template *x509.Certificate, key crypto.Signer) *x509.Certificate {
	p.t.Helper()
	serial, _ := rand.Int(rand.Reader, big.NewInt(1<<62))
	template.SerialNumber, template.NotBefore, template.NotAfter = serial, time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent := p.cert
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), p.key)
	if err != nil {
		p.t.Fatal(err)
	}
	return parseLeaf(p.t.(*testing.T), der)
}

func (p *hostPKI) host(name string) (*x509.Certificate, crypto.Signer) {
	key := newKey(p.t)
	return p.issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: name + ".hosts.example"}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, key), key
}

func (p *hostPKI) file() string {
	file := filepath.Join(p.t.TempDir(), "hosts.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.cert.Raw}), 0o600); err != nil {
		p.t.Fatal(err)
	}
	return file
}

// startWithX509PoP starts a CA that admits the PKI's hosts.
func startWithX509PoP(t *testing.T, p *hostPKI) *catest.CA {
	t.Helper()
	c := catest.Prepare(t, catest.Options{})
	c.Config().X509PoP = nodeattest.X509PoPSection{CABundle: p.file(), Zone: "hosts.example", Datacenter: "dc1", PathPrefixes: []string{"/team/pay", "/accounts"}}
	if err := node.Init(c.Config(), c.KeepRecoveryKey); err != nil {
		t.Fatal(err)
	}
	c.Restart()
	c.WaitReady()
	return c
}

// A host with a certificate of its own PKI is admitted by it, and nobody else is.
func TestAttestByCertificate(t *testing.T) {
	t.Parallel()
	p := newHostPKI(t)
	c := startWithX509PoP(t, p)
	conn := dial(t, c, nil)
	bound := exporter(t, conn)
	door := ententev1.NewAttestClient(conn)
	request := func(leaf *x509.Certificate, signer, key crypto.Signer, edit func(*statev1.PossessionStatement)) *ententev1.AttestRequest {
		st := &statev1.PossessionStatement{TrustDomain: "banking.example", KeyId: keyIDOf(t, key), Certificate: nodeattest.Fingerprint(leaf.Raw), Exporter: bound}
		if edit != nil {
			edit(st)
		}
		statement, signature, err := ca.SignPossession(rand.Reader, signer, st)
		if err != nil {
			t.Fatal(err)
		}
		return &ententev1.AttestRequest{Certificates: [][]byte{leaf.Raw}, Statement: statement, Signature: signature, Csr: csrOf(t, key)}
	}
	leaf, signer := p.host("h1")
	key := newKey(t)
	good := request(leaf, signer, key, nil)

	attack := func(what string, req *ententev1.AttestRequest, want string) {
		t.Helper()
		_, err := door.Attest(t.Context(), req)
		wantCode(t, what, err, codes.PermissionDenied)
		if err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	strange, strangeKey := newHostPKI(t).host("h1")
	attack("another PKI", request(strange, strangeKey, key, nil), "does not verify")
	attack("a key that is not possessed", request(leaf, newKey(t), key, nil), "not signed with the key")
	attack("another domain's statement", request(leaf, signer, key, func(st *statev1.PossessionStatement) { st.TrustDomain = "trading.example" }), "trading.example")
	attack("another agent's key", request(leaf, signer, key, func(st *statev1.PossessionStatement) { st.KeyId = keyIDOf(t, newKey(t)) }), "another key")
	otherLeaf, _ := p.host("h2")
	attack("another certificate", request(leaf, signer, key, func(st *statev1.PossessionStatement) { st.Certificate = nodeattest.Fingerprint(otherLeaf.Raw) }), "another certificate")
	attack("another connection", request(leaf, signer, key, func(st *statev1.PossessionStatement) { st.Exporter = exporter(t, dial(t, c, nil)) }), "another connection")
	replay := dial(t, c, nil)
	_, err := ententev1.NewAttestClient(replay).Attest(t.Context(), good)
	wantCode(t, "replayed on another connection", err, codes.PermissionDenied)
	attack("the authority's own certificate", request(p.cert, p.key, key, nil), "authority's")

	admitted, err := door.Attest(t.Context(), good)
	if err != nil {
		t.Fatal(err)
	}
	agent := admitted.GetAgent()
	if agent.GetName() != "h1" || agent.GetDatacenter() != "dc1" || agent.GetCertificate() != nodeattest.Fingerprint(leaf.Raw) {
		t.Errorf("admitted: %v", agent)
	}
	revision := c.Status().GetRevision()
	if again, err := door.Attest(t.Context(), good); err != nil || again.GetAgent().GetGeneration() != agent.GetGeneration() || c.Status().GetRevision() != revision {
		t.Errorf("repeated: %v, %v", again.GetAgent(), err)
	}
	if _, err := door.Attest(t.Context(), &ententev1.AttestRequest{Csr: csrOf(t, key)}); err != nil {
		t.Errorf("by the known key: %v", err)
	}
	_, err = door.Attest(t.Context(), request(leaf, signer, newKey(t), nil))
	wantCode(t, "the same certificate by another agent", err, codes.AlreadyExists)
	namesake, namesakeKey := p.host("h1")
	_, err = door.Attest(t.Context(), request(namesake, namesakeKey, newKey(t), nil))
	wantCode(t, "another certificate of the same name", err, codes.AlreadyExists)

	// Its scope and its selectors decide what it holds.
	c.Apply(twoHosts)
	demanding := change("pay", "/team/pay/job", "h1", 1)
	demanding.GetCreate().NodeSelectors = []string{"x509pop:subject:cn:h1.hosts.example"}
	lacking := change("pci", "/team/pay/pci", "h1", 2)
	lacking.GetCreate().NodeSelectors = []string{"token:pci"}
	for _, one := range []*statev1.EntryChange{demanding, lacking, change("out", "/team/payments/job", "h1", 3)} {
		if err := changeOne(t, c.Admin(), one); err != nil {
			t.Fatal(err)
		}
	}
	host := dial(t, c, tlsCertificate(admitted.GetCertificates(), key))
	for entry, want := range map[string]codes.Code{"service/accounts": codes.OK, "entry/pay": codes.OK, "entry/pci": codes.PermissionDenied, "entry/out": codes.PermissionDenied} {
		_, err := sign(t, host, entry, newKey(t))
		wantCode(t, entry, err, want)
	}

	// A ban shuts it out, with whatever key.
	if _, err := c.Admin().BanAgent(t.Context(), &ententev1.ChangeAgentRequest{Name: "h1"}); err != nil {
		t.Fatal(err)
	}
	_, err = door.Attest(t.Context(), good)
	wantCode(t, "banned", err, codes.PermissionDenied)
	_, err = door.Attest(t.Context(), request(leaf, signer, newKey(t), nil))
	wantCode(t, "banned, with another key", err, codes.PermissionDenied)
	if _, err := c.Admin().EvictAgent(t.Context(), &ententev1.ChangeAgentRequest{Name: "h1"}); err != nil {
		t.Fatal(err)
	}
	if _, err := door.Attest(t.Context(), request(leaf, signer, newKey(t), nil)); err != nil {
		t.Errorf("control: after it was evicted: %v", err)
	}
	_, raw := auditLines(t, c)
	// Who holds a certificate of the host authority is in the audit log, a stranger is not.
	for _, want := range []string{`"on":["certificate/` + nodeattest.Fingerprint(leaf.Raw) + `","agent/h1"],"result":"done"`, `"on":["certificate/` + nodeattest.Fingerprint(leaf.Raw) + `"],"result":"refused"`} {
		if !strings.Contains(string(raw), want) {
			t.Errorf("no %s in the audit log", want)
		}
	}
	if strings.Contains(string(raw), nodeattest.Fingerprint(strange.Raw)) {
		t.Error("a stranger's refusal is in the audit log")
	}
}

// possession is the request of who holds a certificate's key.
func possession(t testing.TB, leaf *x509.Certificate, signer, key crypto.Signer, bound []byte) *ententev1.AttestRequest {
	t.Helper()
	statement, signature, err := ca.SignPossession(rand.Reader, signer, &statev1.PossessionStatement{
		TrustDomain: "banking.example", KeyId: keyIDOf(t, key), Certificate: nodeattest.Fingerprint(leaf.Raw), Exporter: bound,
	})
	if err != nil {
		t.Fatal(err)
	}
	return &ententev1.AttestRequest{Certificates: [][]byte{leaf.Raw}, Statement: statement, Signature: signature, Csr: csrOf(t, key)}
}

// Without the setting no certificate admits anybody.
func TestCertificatesAreOffByDefault(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	leaf, _ := newHostPKI(t).host("h1")
	_, err := ententev1.NewAttestClient(dial(t, c, nil)).Attest(t.Context(), &ententev1.AttestRequest{Certificates: [][]byte{leaf.Raw}, Csr: csrOf(t, newKey(t))})
	wantCode(t, "a certificate", err, codes.PermissionDenied)
}
