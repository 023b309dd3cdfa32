//go:build pkcs11

package keystore

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/pkcs11"
)

const softHSM = "/usr/lib/softhsm/libsofthsm2.so"

// softToken is a fresh token of SoftHSM's, and where it lies.
func softToken(t testing.TB) (TokenConfig, string) {
	t.Helper()
	if _, err := os.Stat(softHSM); err != nil {
		t.Skipf("NOT RUN: no SoftHSM (Debian: apt-get install softhsm2): %v", err)
	}
	dir := t.TempDir()
	conf, tokens, pin := filepath.Join(dir, "softhsm2.conf"), filepath.Join(dir, "tokens"), filepath.Join(dir, "pin")
	if err := errors.Join(os.Mkdir(tokens, 0o700), os.WriteFile(pin, []byte("654321\n"), 0o600),
		os.WriteFile(conf, []byte("directories.tokendir = "+tokens+"\nobjectstore.backend = file\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", conf)
	if out, err := exec.Command("softhsm2-util", "--init-token", "--free", "--label", "entente", "--so-pin", "12345678", "--pin", "654321").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return TokenConfig{Module: softHSM, Token: "entente", Label: "entente/banking.example/ca-1", PINFile: pin}, tokens
}

func openToken(t testing.TB, config TokenConfig) *Token {
	t.Helper()
	token, err := OpenToken(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { token.Close() })
	return token
}

func signs(key crypto.Signer) error {
	digest := sha256.Sum256([]byte("what is signed"))
	signature, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return err
	}
	switch public := key.Public().(type) {
	case *ecdsa.PublicKey:
		if !ecdsa.VerifyASN1(public, digest[:], signature) {
			return errors.New("does not verify")
		}
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(public, crypto.SHA256, digest[:], signature)
	}
	return nil
}

func TestToken(t *testing.T) {
	config, _ := softToken(t)
	token := openToken(t, config)
	if _, err := token.Load("node"); !errors.Is(err, ErrNoKey) {
		t.Errorf("an empty token: %v", err)
	}
	made, err := token.LoadOrCreate("node")
	if err != nil {
		t.Fatal(err)
	}
	rs, err := token.CreateRSA("jwt-1")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := token.Create("node"); err == nil {
		t.Error("a key was made twice")
	}
	for _, key := range []crypto.Signer{made, rs} {
		if err := signs(key); err != nil {
			t.Error(err)
		}
	}
	if _, err := rs.Sign(rand.Reader, make([]byte, 32), &rsa.PSSOptions{Hash: crypto.SHA256}); err == nil {
		t.Error("RSA-PSS: signed by another scheme")
	}
	other := config
	other.Label = "entente/banking.example/ca-2"
	if names, err := openToken(t, other).Names(); err != nil || len(names) != 0 {
		t.Errorf("another node of the same token sees %v, %v", names, err)
	}
	if _, err := token.Create("../x"); err == nil {
		t.Error("a name that is none")
	}

	// After a restart.
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	if err := signs(made); err == nil {
		t.Error("control: a closed token signs")
	}
	token = openToken(t, config)
	if names, err := token.Names(); err != nil || !slices.Equal(names, []string{"jwt-1", "node"}) {
		t.Errorf("names %v, %v", names, err)
	}
	again, err := token.Load("node")
	if err != nil || !made.Public().(*ecdsa.PublicKey).Equal(again.Public()) {
		t.Fatalf("another key came back: %v", err)
	}
	if err := signs(again); err != nil {
		t.Error(err)
	}
	var all sync.WaitGroup
	for range 4 * maxSessions {
		all.Go(func() {
			for range 10 {
				if err := signs(again); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	if err := errors.Join(token.Delete("node"), token.Delete("node")); err != nil {
		t.Error(err)
	}
	if _, err := token.Load("node"); !errors.Is(err, ErrNoKey) {
		t.Errorf("a deleted key: %v", err)
	}
	if err := signs(again); err == nil {
		t.Error("a deleted key signs")
	}
}

// The token refuses to hand a key out in any way it has, and a key that may leave, or
// came from outside, is not taken.
func TestTokenKeysStay(t *testing.T) {
	config, tokens := softToken(t)
	token := openToken(t, config)
	if _, err := token.Create("node"); err != nil {
		t.Fatal(err)
	}
	err := token.do(func(_ *sessions, session pkcs11.SessionHandle) error {
		key, err := token.one(session, pkcs11.CKO_PRIVATE_KEY, token.label("node"))
		if err != nil {
			return err
		}
		if got, err := token.module.GetAttributeValue(session, key, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_VALUE, nil)}); err == nil && len(got[0].Value) > 0 {
			t.Error("the token gave the key out")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}

	// Imported.
	pkcs8 := filepath.Join(t.TempDir(), "key.pem")
	if out, err := exec.Command("openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", pkcs8).CombinedOutput(); err != nil {
		t.Skipf("no openssl: %v: %s", err, out)
	}
	out, err := exec.Command("softhsm2-util", "--import", pkcs8, "--token", "entente", "--label", token.label("x509-1"), "--id", "aa", "--pin", "654321").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	token = openToken(t, config)
	if _, err := token.Load("x509-1"); err == nil || !strings.Contains(err.Error(), "not made in the token") {
		t.Errorf("an imported key: %v", err)
	}
	if _, err := token.Load("node"); err != nil {
		t.Errorf("control: %v", err)
	}

	// What SoftHSM itself writes is sealed by the PIN; no form of a public key's private
	// half can be told, but no plain PKCS#8 lies there.
	filepath.WalkDir(tokens, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		if _, parsed := x509.ParsePKCS8PrivateKey(data); parsed == nil || bytes.Contains(data, []byte("PRIVATE KEY")) {
			t.Errorf("%s holds a plain key", path)
		}
		return err
	})
}

func TestTokenLost(t *testing.T) {
	config, tokens := softToken(t)
	token := openToken(t, config)
	key, err := token.Create("node")
	if err != nil {
		t.Fatal(err)
	}
	slot := token.open.slot
	for name, lose := range map[string]func() error{
		"sessions closed": func() error { return token.module.CloseAllSessions(slot) },
		"logged out": func() error {
			return token.do(func(_ *sessions, s pkcs11.SessionHandle) error { return token.module.Logout(s) })
		},
		"module finalized": func() error { return token.module.Finalize() },
	} {
		if err := lose(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := signs(key); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}

	// Gone for longer: an error that says what to do; then it signs again by itself.
	away := tokens + ".away"
	if err := errors.Join(os.Rename(tokens, away), os.Mkdir(tokens, 0o700), token.module.Finalize()); err != nil {
		t.Fatal(err)
	}
	err = signs(key)
	if err == nil || !strings.Contains(err.Error(), "tried again every second") || !strings.Contains(err.Error(), "plugged in") {
		t.Errorf("without the token: %v", err)
	}
	if err := errors.Join(os.Remove(tokens), os.Rename(away, tokens)); err != nil {
		t.Fatal(err)
	}
	token.mu.Lock()
	token.at = token.at.Add(-reopenAfter)
	token.mu.Unlock()
	if err := signs(key); err != nil {
		t.Errorf("the token is back: %v", err)
	}
}

func TestTokenRefused(t *testing.T) {
	config, _ := softToken(t)
	for name, test := range map[string]struct {
		change func(*TokenConfig)
		says   string
	}{
		"no module":         {func(c *TokenConfig) { c.Module = "/nonexistent/hsm.so" }, "no PKCS#11 module that can be loaded"},
		"not a module":      {func(c *TokenConfig) { c.Module = "/lib/x86_64-linux-gnu/libm.so.6" }, "PKCS#11"},
		"no such token":     {func(c *TokenConfig) { c.Token = "another" }, "no slot holds a token"},
		"no PIN file":       {func(c *TokenConfig) { c.PINFile = "/nonexistent/pin" }, "PIN of the PKCS#11 token"},
		"PIN by credential": {func(c *TokenConfig) { c.PINFile, c.PINCredential = "", "pin" }, "LoadCredentialEncrypted=pin:FILE"},
		"wrong PIN": {func(c *TokenConfig) {
			c.PINFile = filepath.Join(t.TempDir(), "pin")
			os.WriteFile(c.PINFile, []byte("000000"), 0o600)
		}, "refuses the PIN"},
	} {
		t.Run(name, func(t *testing.T) {
			wrong := config
			test.change(&wrong)
			token, err := OpenToken(wrong)
			if err == nil {
				token.Close()
			}
			saysError(t, err, test.says)
			if err != nil && strings.Contains(fmt.Sprint(err), "654321") {
				t.Error("the PIN is in the error")
			}
		})
	}
	openToken(t, config) // control
}

func BenchmarkTokenSign(b *testing.B) {
	config, _ := softToken(b)
	key, err := openToken(b, config).Create("node")
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := signs(key); err != nil {
			b.Fatal(err)
		}
	}
}
