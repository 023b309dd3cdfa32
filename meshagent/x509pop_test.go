package meshagent

import (
	"crypto/ecdsa"
	"crypto/elliptic"
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

	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/node"
	"github.com/entente-mesh/entente/ca/nodeattest"
)

// A host without a token: its own certificate admits it, the domain's bundle tells it
// which CA to believe, and from then on its key speaks for itself.
func TestAttestationByCertificate(t *testing.T) {
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	issue := func(template, parent *x509.Certificate, key, by *ecdsa.PrivateKey) *x509.Certificate {
		t.Helper()
		template.SerialNumber, template.NotBefore, template.NotAfter = big.NewInt(time.Now().UnixNano()), time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
		der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, by)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	newKey := func() *ecdsa.PrivateKey {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	write := func(name, kind string, der []byte) {
		t.Helper()
		if err := os.WriteFile(file(name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	rootKey, hostKey := newKey(), newKey()
	template := &x509.Certificate{Subject: pkix.Name{CommonName: "hosts"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	root := issue(template, template, rootKey, rootKey)
	host := issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: "h1"}, DNSNames: []string{"h1.example"}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, root, hostKey, rootKey)
	der, _ := x509.MarshalPKCS8PrivateKey(hostKey)
	write("root.pem", "CERTIFICATE", root.Raw)
	write("host.pem", "CERTIFICATE", host.Raw)
	write("host.key", "PRIVATE KEY", der)

	c := catest.Prepare(t, catest.Options{})
	c.Config().X509PoP = nodeattest.X509PoPSection{CABundle: file("root.pem"), Zone: "example", Datacenter: "dc1"}
	if err := node.Init(c.Config(), c.KeepRecoveryKey); err != nil {
		t.Fatal(err)
	}
	c.Restart()
	c.WaitReady()
	c.Apply(serviceYAML("accounts", self()))
	stranger := catest.Start(t, catest.Options{})

	at := "ca: {addresses: [" + strings.Join(c.Addresses(), ",") + "], bundleFile: " + file("bundle.json") + "}"
	pop := "attest: {x509pop: {certificate: " + file("host.pem") + ", key: " + file("host.key") + "}}"
	if err := os.WriteFile(file("bundle.json"), stranger.BundleJSON(), 0o600); err != nil {
		t.Fatal(err)
	}
	// A bundle of another CA: this one is not believed, and learns nothing.
	fooled := startAgent(t, configure(t, "dataDir: "+t.TempDir(), at, pop))
	eventually(t, "the agent tries", func() error {
		if strings.Contains(fooled.Ready().Error(), "no SVID yet") {
			return nil
		}
		return fooled.Ready()
	})
	fooled.stop()
	if n := c.Status().GetAgents(); n != 0 {
		t.Fatalf("%d agents were admitted", n)
	}

	if err := os.WriteFile(file("bundle.json"), c.BundleJSON(), 0o600); err != nil {
		t.Fatal(err)
	}
	data := t.TempDir()
	agent := startAgent(t, configure(t, "dataDir: "+data, at, pop))
	eventually(t, "ready", agent.Ready)
	if err := agent.stop(); err != nil {
		t.Fatal(err)
	}
	// Its own files are enough from now on.
	for _, name := range []string{"bundle.json", "host.pem", "host.key"} {
		if err := os.Remove(file(name)); err != nil {
			t.Fatal(err)
		}
	}
	again := startAgent(t, configure(t, "dataDir: "+data, at, pop))
	eventually(t, "ready again", again.Ready)
}

func TestX509PoPConfig(t *testing.T) {
	for text, want := range map[string]string{
		"attest: {x509pop: {certificate: /c}}":                                                                         "belong together",
		"attest: {x509pop: {certificate: /c, key: /k}}":                                                                "bundleFile",
		"attest: {x509pop: {certificate: /c, key: /k}}\nca: {token: x}":                                                "not by both",
		"attest: {x509pop: {certificate: /c, key: /k}}\nca: {addresses: ['ca.example:8443'], bundleFile: /b}\n":        "",
		"attest: {x509pop: {certificate: /c, key: /k, name: x}}\nca: {addresses: ['ca.example:8443'], bundleFile: /b}": "name",
	} {
		_, err := ReadConfig("agent.yaml", strings.NewReader("trustDomain: banking.example\nname: h1\ndatacenter: dc1\ndataDir: /d\n"+text))
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
}
