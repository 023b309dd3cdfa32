package main

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/entente-mesh/entente/ca/catest"
)

// The recovery key is printed, replaced with the present one, and with nobody else's.
func TestReplaceRecoveryKey(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	dir := t.TempDir()
	socket := "--socket=" + c.Socket()
	former := filepath.Join(dir, "former")
	if err := writeSecret(former, c.RecoveryKey()); err != nil {
		t.Fatal(err)
	}
	before, code := entente(t, "ca", "recovery-key", socket)
	if code != exitOK || !strings.HasPrefix(before, "entente-recovery-public-") {
		t.Fatalf("%d: %s", code, before)
	}
	next := filepath.Join(dir, "next")
	if out, code := entente(t, "ca", "recovery-key", "replace", socket, "--recovery-key-file", next, "--former-key-file", former); code != exitOK || !strings.Contains(out, "counts since") {
		t.Fatalf("%d: %s", code, out)
	}
	after, _ := entente(t, "ca", "recovery-key", socket)
	if after == before {
		t.Error("the key is the same")
	}
	// The former one is not the present one any more.
	if out, code := entente(t, "ca", "recovery-key", "replace", socket, "--recovery-key-file", filepath.Join(dir, "third"), "--former-key-file", former); code == exitOK || !strings.Contains(out, "former-key-file") {
		t.Errorf("%d: %s", code, out)
	}
	// A file that is there is not written over.
	if out, code := entente(t, "ca", "recovery-key", "replace", socket, "--recovery-key-file", next, "--former-key-file", next); code == exitOK {
		t.Errorf("%d: %s", code, out)
	}
	if again, _ := entente(t, "ca", "recovery-key", socket); again != after {
		t.Error("a refused replacement changed the key")
	}
	if out, code := entente(t, "ca", "recovery-key", "replace", socket, "--recovery-key-file", filepath.Join(dir, "fourth"), "--former-key-file", next); code != exitOK {
		t.Errorf("control: %d: %s", code, out)
	}
}
