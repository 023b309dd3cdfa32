package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"testing"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

func TestPossession(t *testing.T) {
	p256, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	p224, _ := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	rsaKey, _ := rsa.GenerateKey(rand.Reader, 2048)
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	exporter := make([]byte, ExporterSize)
	keyID, certificate := KeyID([]byte("agent")), KeyID([]byte("certificate"))
	st := &statev1.PossessionStatement{TrustDomain: "banking.example", KeyId: keyID, Certificate: certificate, Exporter: exporter}
	for _, key := range []crypto.Signer{p256, rsaKey, ed} {
		statement, signature, err := SignPossession(rand.Reader, key, st)
		if err != nil {
			t.Fatal(err)
		}
		got, err := VerifyPossession(key.Public(), statement, signature)
		if err != nil || CheckPossession(got, "banking.example", keyID, certificate, exporter) != nil {
			t.Fatalf("%T: %v", key, err)
		}
		other := make([]byte, ExporterSize)
		other[0] = 1
		for what, err := range map[string]error{
			"domain":      CheckPossession(got, "trading.example", keyID, certificate, exporter),
			"key":         CheckPossession(got, "banking.example", certificate, certificate, exporter),
			"certificate": CheckPossession(got, "banking.example", keyID, keyID, exporter),
			"connection":  CheckPossession(got, "banking.example", keyID, certificate, other),
			"nothing":     CheckPossession(got, "banking.example", keyID, certificate, nil),
		} {
			if err == nil {
				t.Errorf("%T: a statement for another %s", key, what)
			}
		}
		statement[0] ^= 1
		if _, err := VerifyPossession(key.Public(), statement, signature); err == nil {
			t.Errorf("%T: an altered statement", key)
		}
		statement[0] ^= 1
		if _, err := VerifyPossession(p256.Public(), statement, signature); err == nil && key != crypto.Signer(p256) {
			t.Errorf("%T: another key", key)
		}
		// The bare statement is not what is signed: no other protocol's signature will do.
		sum := sha256.Sum256(statement)
		bare, err := key.Sign(rand.Reader, sum[:], crypto.SHA256)
		if err == nil {
			if _, err := VerifyPossession(key.Public(), statement, bare); err == nil {
				t.Errorf("%T: a signature without context", key)
			}
		}
	}
	if _, _, err := SignPossession(rand.Reader, p224, st); err == nil {
		t.Error("a weak curve")
	}
}

func FuzzVerifyPossession(f *testing.F) {
	public, key, _ := ed25519.GenerateKey(rand.Reader)
	statement, signature, _ := SignPossession(rand.Reader, key, &statev1.PossessionStatement{TrustDomain: "banking.example"})
	f.Add(statement, signature)
	f.Fuzz(func(t *testing.T, other, sig []byte) {
		if _, err := VerifyPossession(public, other, sig); err == nil && string(other) != string(statement) {
			t.Fatalf("accepted %x", other)
		}
	})
}

func TestHostsRules(t *testing.T) {
	host := &statev1.Agent{Name: "h1", PathPrefixes: []string{"/team/pay"}, Selectors: []string{"token:pci"}}
	e := &statev1.Entry{Path: "/team/pay/a", Hosts: []string{"h1"}, NodeSelectors: []string{"token:pci"}}
	if !Entitled(host, e) {
		t.Fatal("control")
	}
	for what, edit := range map[string]func(*statev1.Agent, *statev1.Entry){
		"another host":     func(_ *statev1.Agent, e *statev1.Entry) { e.Hosts = []string{"h2"} },
		"banned":           func(a *statev1.Agent, _ *statev1.Entry) { a.Banned = true },
		"a demand":         func(_ *statev1.Agent, e *statev1.Entry) { e.NodeSelectors = []string{"token:pci", "token:hsm"} },
		"out of scope":     func(_ *statev1.Agent, e *statev1.Entry) { e.Path = "/team/payments/a" },
		"above the scope":  func(_ *statev1.Agent, e *statev1.Entry) { e.Path = "/team" },
		"nobody attested":  func(a *statev1.Agent, e *statev1.Entry) { a.Name, e.Hosts = "", []string{""} },
		"another's letter": func(a *statev1.Agent, _ *statev1.Entry) { a.Selectors = []string{"token:PCI"} },
	} {
		a, b := &statev1.Agent{Name: "h1", PathPrefixes: host.PathPrefixes, Selectors: host.Selectors}, &statev1.Entry{Path: e.Path, Hosts: e.Hosts, NodeSelectors: e.NodeSelectors}
		edit(a, b)
		if Entitled(a, b) {
			t.Error(what)
		}
	}
}
