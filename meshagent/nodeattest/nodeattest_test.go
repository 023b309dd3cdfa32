package nodeattest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

func token(role string) *ca.Token {
	return &ca.Token{
		Role: role, TrustDomain: spiffeid.RequireTrustDomainFromString("banking.example"),
		ClusterID: bytes.Repeat([]byte{1}, ca.ClusterIDSize), ID: "t1", Seed: bytes.Repeat([]byte{2}, 32),
		Addresses: []string{"127.0.0.1:7000"}, Pins: []string{strings.Repeat("a", 64)},
	}
}

func text(t *testing.T, token *ca.Token) string {
	t.Helper()
	s, err := token.Text()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// The key is made once, kept to the agent alone, and refused when it was not.
func TestLoadKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.key")
	made, err := LoadKey(path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info.Mode(), err)
	}
	loaded, err := LoadKey(path)
	if err != nil || !made.(*ecdsa.PrivateKey).Equal(loaded) {
		t.Errorf("another key: %v", err)
	}
	for _, mode := range []os.FileMode{0o640, 0o604, 0o620} {
		os.Chmod(path, mode)
		if _, err := LoadKey(path); err == nil {
			t.Errorf("mode %#o was taken", mode)
		}
	}
	if _, err := LoadKey(filepath.Join(t.TempDir(), "no", "such", "dir")); err == nil {
		t.Error("a key that cannot be kept was made")
	}
	for _, damaged := range []string{"", "nonsense", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"} {
		os.WriteFile(path, []byte(damaged), 0o600)
		os.Chmod(path, 0o600)
		if _, err := LoadKey(path); err == nil {
			t.Errorf("%q was taken for a key", damaged)
		}
	}
}

func TestReadToken(t *testing.T) {
	if got, err := ReadToken("", ""); got != nil || err != nil {
		t.Errorf("none: %v %v", got, err)
	}
	file := filepath.Join(t.TempDir(), "token")
	os.WriteFile(file, []byte(text(t, token(ca.RoleAgent))+"\n"), 0o600)
	for _, given := range [][2]string{{text(t, token(ca.RoleAgent)), ""}, {"", file}} {
		if got, err := ReadToken(given[0], given[1]); err != nil || got.ID != "t1" {
			t.Errorf("%v: %v %v", given, got, err)
		}
	}
	secret := text(t, token(ca.RoleNode))
	for _, given := range [][2]string{{secret, ""}, {"entente-join-nonsense", ""}, {"", "/does/not/exist"}} {
		_, err := ReadToken(given[0], given[1])
		if err == nil || strings.Contains(err.Error(), secret) {
			t.Errorf("%v: %v", given, err)
		}
	}
}

// A proof is for one key over one connection.
func TestByToken(t *testing.T) {
	key, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	tk := token(ca.RoleAgent)
	exporter := bytes.Repeat([]byte{7}, ca.ExporterSize)
	proof, err := ByToken(tk, key)(exporter)
	if err != nil || proof.TokenId != "t1" {
		t.Fatalf("%v %v", proof, err)
	}
	statement, err := ca.VerifyStatement(tk.PublicKey(), proof.Statement, proof.Signature)
	if err != nil {
		t.Fatal(err)
	}
	spki, _ := x509.MarshalPKIXPublicKey(key.Public())
	cluster := &statev1.Cluster{Id: tk.ClusterID}
	if err := ca.CheckStatement(statement, cluster, "t1", ca.RoleAgent, ca.KeyID(spki), exporter); err != nil {
		t.Errorf("control: %v", err)
	}
	if ca.CheckStatement(statement, cluster, "t1", ca.RoleAgent, ca.KeyID(spki), bytes.Repeat([]byte{8}, ca.ExporterSize)) == nil {
		t.Error("the proof is good on another connection")
	}
	if ca.CheckStatement(statement, cluster, "t1", ca.RoleAgent, strings.Repeat("0", 64), exporter) == nil {
		t.Error("the proof is good for another key")
	}
	if proof, err := ByKey()(exporter); err != nil || proof.TokenId != "" {
		t.Errorf("by key: %v %v", proof, err)
	}
	csr, err := CSR(key)
	if err != nil {
		t.Fatal(err)
	}
	request, err := x509.ParseCertificateRequest(csr)
	if err != nil || request.CheckSignature() != nil || !key.(*ecdsa.PrivateKey).PublicKey.Equal(request.PublicKey) {
		t.Errorf("the request: %v", err)
	}
}
