package main

import (
	"net"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

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
	if out, code := entente(t, "ca", "recovery-key", "replace", socket, "--recovery-key-file", next, "--former-key-file", next); code != exitUsage || !strings.Contains(out, "exists already") {
		t.Errorf("%d: %s", code, out)
	}
	if again, _ := entente(t, "ca", "recovery-key", socket); again != after {
		t.Error("a refused replacement changed the key")
	}
	if out, code := entente(t, "ca", "recovery-key", "replace", socket, "--recovery-key-file", filepath.Join(dir, "fourth"), "--former-key-file", next); code != exitOK {
		t.Errorf("control: %d: %s", code, out)
	}
}

// Only a refused replacement does not count for certain. The new key is not to be deleted
// when the answer was lost.
func TestReplacementInDoubt(t *testing.T) {
	refused := notReplaced(status.Error(codes.FailedPrecondition, "no"), "new.key", "public")
	if text := message(refused); !strings.HasPrefix(text, "no; the key in new.key does not count: delete it") || exitCode(refused) != exitRefused {
		t.Error(refused)
	}
	for _, code := range []codes.Code{codes.Unavailable, codes.DeadlineExceeded, codes.Internal} {
		lost := notReplaced(status.Error(code, "lost"), "new.key", "public")
		if text := message(lost); !strings.HasPrefix(text, "lost; keep") || exitCode(lost) != exitCode(status.Error(code, "lost")) || strings.Contains(text, "does not count") || !strings.Contains(text, "keep the key in new.key") || !strings.Contains(text, "prints public") {
			t.Error(lost)
		}
	}
}

// A socket where nobody listens any more, and one that is not there, are said with what to do.
func TestDeadSocket(t *testing.T) {
	stale := filepath.Join(t.TempDir(), "admin.sock")
	l, err := net.Listen("unix", stale)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	for path, want := range map[string]string{stale: "connection refused", stale + "x": "no such file"} {
		out, code := entente(t, "ca", "status", "--socket="+path)
		if code != exitUnreachable || !strings.Contains(out, "no CA node answers at "+path+": "+want) || !strings.Contains(out, "are you its user or root?") {
			t.Errorf("%d: %s", code, out)
		}
	}
}

// Nobody is asked to have a voter vote.
func TestPromoteVoter(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	if out, code := entente(t, "node", "promote", "ca-1", "--socket="+c.Socket()); code != exitRefused || !strings.Contains(out, "is a voter already") {
		t.Errorf("%d: %s", code, out)
	}
}
