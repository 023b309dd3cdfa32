package keystore

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func saysError(t *testing.T, err error, says string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), says) {
		t.Errorf("error %v, want it to say %q", err, says)
	}
}

func TestCredential(t *testing.T) {
	t.Setenv(credentialsDirectory, "")
	_, err := Credential("entente-ca")
	saysError(t, err, "the unit needs LoadCredentialEncrypted=entente-ca:FILE")

	dir := t.TempDir()
	t.Setenv(credentialsDirectory, dir)
	_, err = Credential("entente-ca")
	saysError(t, err, `no credential "entente-ca"`)
	for _, name := range []string{"", ".", "..", "../passwd", "a/b"} {
		_, err := Credential(name)
		saysError(t, err, "is no name of a systemd credential")
	}

	path := filepath.Join(dir, "entente-ca")
	if err := os.WriteFile(path, []byte("correct horse battery\n"), 0o440); err != nil { // as systemd shows an access list
		t.Fatal(err)
	}
	sealer, err := Credential("entente-ca")
	if err != nil {
		t.Fatal(err)
	}
	sealer.(*passphraseSealer).iterations = iterationsMin
	keys := filepath.Join(t.TempDir(), "keys")
	made, err := open(t, keys, sealer).Create("node")
	if err != nil {
		t.Fatal(err)
	}
	// A file with the same passphrase opens it: one may go over to the other.
	again, err := open(t, keys, passphrase(t, "correct horse battery")).Load("node")
	if err != nil || !made.(*ecdsa.PrivateKey).Equal(again) {
		t.Errorf("from a file: %v", err)
	}
	if err := os.Chmod(path, 0o444); err != nil {
		t.Fatal(err)
	}
	_, err = Credential("entente-ca")
	saysError(t, err, "others may read it")
}

func TestSealedRootKey(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	sec1, _ := x509.MarshalECPrivateKey(key)
	pkcs8, _ := x509.MarshalPKCS8PrivateKey(key)
	text := func(kind string, der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}) }
	for kind, form := range map[string][]byte{
		"SEC 1":  append(text("EC PARAMETERS", []byte{6, 0}), text("EC PRIVATE KEY", sec1)...),
		"PKCS#8": text("PRIVATE KEY", pkcs8),
		"PKCS#1": text("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(rsaKey)),
	} {
		sealer := passphrase(t, "correct horse battery")
		sealed, err := SealKey(sealer, "upstream", form)
		if err != nil {
			t.Fatalf("%s: %v", kind, err)
		}
		path := filepath.Join(t.TempDir(), "root.key")
		if err := os.WriteFile(path, sealed, 0o600); err != nil {
			t.Fatal(err)
		}
		loaded, err := LoadKey(path, sealer, "upstream", false)
		if err != nil || !key.Equal(loaded) && !rsaKey.Equal(loaded) {
			t.Errorf("%s: %v", kind, err)
		}
		_, err = LoadKey(path, sealer, "node", false)
		saysError(t, err, "renamed")
		if err := os.WriteFile(path, form, 0o600); err != nil {
			t.Fatal(err)
		}
		_, err = LoadKey(path, sealer, "upstream", false)
		saysError(t, err, "entente ca seal")
		if _, err := LoadKey(path, Plain(), "upstream", true); err != nil {
			t.Errorf("%s, plain, for development: %v", kind, err)
		}
		os.Chmod(path, 0o640)
		_, err = LoadKey(path, sealer, "upstream", true)
		saysError(t, err, "others may read it")
	}
	_, err = SealKey(Plain(), "upstream", []byte("nothing"))
	saysError(t, err, "no PEM private key")
	_, err = SealKey(Plain(), "upstream", text("ENCRYPTED PRIVATE KEY", pkcs8))
	saysError(t, err, "is encrypted")
	_, err = SealKey(Plain(), "upstream", text("PRIVATE KEY", []byte("garbage")))
	saysError(t, err, "no PKCS#8")
}

func FuzzParsePEM(f *testing.F) {
	f.Add([]byte("-----BEGIN EC PRIVATE KEY-----\nMAA=\n-----END EC PRIVATE KEY-----\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if key, err := parsePEM(text); err == nil && key.Public() == nil {
			t.Error("a key without a public half")
		}
	})
}
