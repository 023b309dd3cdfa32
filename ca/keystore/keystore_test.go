package keystore

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func passphrase(t testing.TB, phrase string) Sealer {
	t.Helper()
	path := filepath.Join(t.TempDir(), "passphrase")
	if err := os.WriteFile(path, []byte(phrase+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	sealer, err := PassphraseFile(path)
	if err != nil {
		t.Fatal(err)
	}
	sealer.(*passphraseSealer).iterations = iterationsMin // quick enough for tests
	return sealer
}

func open(t testing.TB, dir string, sealer Sealer) *Store {
	t.Helper()
	store, err := Open(dir, sealer)
	if err != nil {
		t.Fatal(err)
	}
	return store
}

func TestKeysSurvive(t *testing.T) {
	for name, again := range map[string]func() Sealer{
		"passphrase": func() Sealer { return passphrase(t, "correct horse battery") },
		"plain":      Plain,
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "keys")
			store := open(t, dir, again())
			made, err := store.LoadOrCreate("node")
			if err != nil {
				t.Fatal(err)
			}
			if _, err := store.Create("x509-1"); err != nil {
				t.Fatal(err)
			}
			if _, err := store.Create("x509-1"); err == nil {
				t.Error("a key was written over")
			}
			loaded, err := open(t, dir, again()).LoadOrCreate("node")
			if err != nil {
				t.Fatal(err)
			}
			if !made.(*ecdsa.PrivateKey).Equal(loaded) {
				t.Error("another key came back")
			}
			if names, err := store.Names(); err != nil || strings.Join(names, " ") != "node x509-1" {
				t.Errorf("names %v, %v", names, err)
			}
			if err := errors.Join(store.Delete("x509-1"), store.Delete("x509-1")); err != nil {
				t.Error(err)
			}
			if _, err := store.Load("x509-1"); !errors.Is(err, ErrNoKey) {
				t.Errorf("a deleted key: %v", err)
			}
		})
	}
}

// I1: the file does not hold the key, nor do errors.
func TestSealedFileHidesTheKey(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	key, err := open(t, dir, passphrase(t, "correct horse battery")).LoadOrCreate("node")
	if err != nil {
		t.Fatal(err)
	}
	secret := key.(*ecdsa.PrivateKey)
	scalar, err := secret.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "node.key")
	sealed, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(sealed, scalar) {
		t.Error("the sealed file holds the private key")
	}
	if info, _ := os.Stat(path); info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}

	// Positive control: the plain form does hold it.
	plainDir := filepath.Join(t.TempDir(), "plain")
	plainKey, err := open(t, plainDir, Plain()).LoadOrCreate("node")
	if err != nil {
		t.Fatal(err)
	}
	plainScalar, _ := plainKey.(*ecdsa.PrivateKey).Bytes()
	if raw, _ := os.ReadFile(filepath.Join(plainDir, "node.key")); !bytes.Contains(raw, plainScalar) {
		t.Error("the search above finds nothing")
	}
}

func TestUnsealRefuses(t *testing.T) {
	good := passphrase(t, "correct horse battery")
	plain := []byte("a key")
	sealed, err := good.Seal("node", plain)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := good.Unseal("node", sealed); err != nil || !bytes.Equal(got, plain) {
		t.Fatalf("control: %q, %v", got, err)
	}
	at := func(i int, flip byte) []byte {
		b := bytes.Clone(sealed)
		b[i] ^= flip
		return b
	}
	unsealed, err := Plain().Seal("node", plain)
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name   string
		sealer Sealer
		key    string
		data   []byte
		want   error
	}{
		{"another passphrase", passphrase(t, "wrong horse battery"), "node", sealed, errWrongPassphrase},
		{"renamed", good, "x509-1", sealed, errWrongPassphrase},
		{"ciphertext changed", good, "node", at(len(sealed)-1, 1), errWrongPassphrase},
		{"salt changed", good, "node", at(len(magic)+6, 1), errWrongPassphrase},
		{"key salt changed", good, "node", at(len(magic)+5+passphraseSaltLen, 1), errWrongPassphrase},
		{"cut short", good, "node", sealed[:headerLen-1], errNoKeyFile},
		{"empty", good, "node", nil, errNoKeyFile},
		{"unsealed", good, "node", unsealed, errNotSealed},
		{"sealed, no passphrase set", Plain(), "node", sealed, errSealed},
		{"version", good, "node", at(len(magic), 0x80), nil},
		{"iterations lowered", good, "node", at(len(magic)+2, 0x01), nil},
		{"iterations raised", good, "node", at(len(magic)+1, 0x80), nil},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, err := test.sealer.Unseal(test.key, test.data)
			if err == nil {
				t.Fatalf("opened: %q", got)
			}
			if test.want != nil && !errors.Is(err, test.want) {
				t.Errorf("got %v", err)
			}
			if strings.Contains(err.Error(), "horse") {
				t.Errorf("the error shows the passphrase: %v", err)
			}
		})
	}
}

// One slow derivation opens all files of a directory.
func TestOneDerivation(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	for _, name := range []string{"a", "b", "c"} {
		if _, err := open(t, dir, passphrase(t, "correct horse battery")).LoadOrCreate("node"); err != nil {
			t.Fatal(err)
		}
		store := open(t, dir, passphrase(t, "correct horse battery"))
		if _, err := store.Load("node"); err != nil {
			t.Fatal(err)
		}
		if _, err := store.Create(name); err != nil {
			t.Fatal(err)
		}
	}
	sealer := passphrase(t, "correct horse battery")
	store := open(t, dir, sealer)
	for _, name := range []string{"node", "a", "b", "c"} {
		if _, err := store.Load(name); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(sealer.(*passphraseSealer).derived); n != 1 {
		t.Errorf("%d derivations for four keys", n)
	}
}

func TestOpenRefuses(t *testing.T) {
	wide := filepath.Join(t.TempDir(), "wide")
	if err := os.Mkdir(wide, 0o755); err != nil {
		t.Fatal(err)
	}
	os.Chmod(wide, 0o755)
	if _, err := Open(wide, Plain()); err == nil || !strings.Contains(err.Error(), "chmod 700") {
		t.Errorf("a directory that others may enter: %v", err)
	}
	if _, err := Open(t.TempDir(), nil); err == nil {
		t.Error("opened without a sealer")
	}

	dir := filepath.Join(t.TempDir(), "keys")
	store := open(t, dir, Plain())
	if _, err := store.Create("node"); err != nil {
		t.Fatal(err)
	}
	os.Chmod(filepath.Join(dir, "node.key"), 0o644)
	if _, err := store.Load("node"); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a key that others may read: %v", err)
	}
	os.WriteFile(filepath.Join(dir, "big.key"), make([]byte, maxFileSize+1), 0o600)
	if _, err := store.Load("big"); err == nil {
		t.Error("a file that is too large was read")
	}
	for _, name := range []string{"", "..", "a/b", "A", "a.b", strings.Repeat("a", maxName+1)} {
		if _, err := store.LoadOrCreate(name); err == nil {
			t.Errorf("name %q was accepted", name)
		}
	}
}

func TestPassphraseFileRefuses(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		os.Chmod(path, mode)
		return path
	}
	for name, path := range map[string]string{
		"missing":  filepath.Join(dir, "nothing"),
		"short":    write("short", "elevenchars\n\n", 0o600),
		"readable": write("readable", "correct horse battery", 0o640),
		"large":    write("large", strings.Repeat("x", maxPassphrase+1), 0o600),
	} {
		_, err := PassphraseFile(path)
		if err == nil {
			t.Errorf("%s: accepted", name)
		} else if strings.Contains(err.Error(), "horse") || strings.Contains(err.Error(), "eleven") {
			t.Errorf("%s: the error shows the passphrase: %v", name, err)
		}
	}
}

// Whatever lies in a key file: no panic, and only what was sealed under this name
// comes out.
func FuzzUnseal(f *testing.F) {
	sealer := passphrase(f, "correct horse battery")
	der, err := os.ReadFile(os.DevNull)
	if err != nil {
		f.Fatal(err)
	}
	sealed, err := sealer.Seal("node", []byte("a key"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(sealed)
	f.Add(sealed[:headerLen])
	f.Add(append([]byte(plainMagic), der...))
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, data []byte) {
		// A salt of its own would cost a slow derivation each.
		same := len(data) >= headerLen && bytes.Equal(data[:headerLen], sealed[:headerLen])
		if same || len(data) < headerLen || !bytes.HasPrefix(data, []byte(magic)) {
			if plain, err := sealer.Unseal("node", data); err == nil && !bytes.Equal(data, sealed) {
				t.Fatalf("%x was opened: %x", data, plain)
			}
		}
		plain, err := Plain().Unseal("node", data)
		if err != nil {
			return
		}
		if key, err := parse(plain); err == nil {
			if _, err := x509.MarshalPKIXPublicKey(key.Public()); err != nil {
				t.Fatalf("a key without a public half: %v", err)
			}
		}
	})
}
