//go:build pkcs11

package catest_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/node"
)

const softHSM = "/usr/lib/softhsm/libsofthsm2.so"

// A CA node whose keys are all in a token: it signs, is the same one after a restart, and
// has no key on its disk.
func TestNodeOnToken(t *testing.T) {
	if _, err := os.Stat(softHSM); err != nil {
		t.Skipf("NOT RUN: no SoftHSM (Debian: apt-get install softhsm2): %v", err)
	}
	dir := t.TempDir()
	conf, pin := filepath.Join(dir, "softhsm2.conf"), filepath.Join(dir, "pin")
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "tokens"), 0o700), os.WriteFile(pin, []byte("654321\n"), 0o600),
		os.WriteFile(conf, []byte("directories.tokendir = "+filepath.Join(dir, "tokens")+"\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", conf)
	if out, err := exec.Command("softhsm2-util", "--init-token", "--free", "--label", "entente", "--so-pin", "12345678", "--pin", "654321").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	c := catest.Prepare(t, catest.Options{})
	c.Config().Keys = node.Keys{PKCS11: node.PKCS11{Module: softHSM, Token: "entente", PINFile: pin}, JWT: "RS256"}
	if err := node.Init(c.Config(), c.KeepRecoveryKey); err != nil {
		t.Fatal(err)
	}
	c.Restart()
	c.WaitReady()
	c.Apply(workloads)
	h1 := newAgent(t, c, "h1", "service/accounts")
	if err := spiffeVerifies(h1.svid(t), c.Bundle()); err != nil {
		t.Error(err)
	}
	id, before := c.Node().ID(), h1.svid(t)
	c.Restart()
	c.WaitReady()
	if c.Node().ID() != id {
		t.Error("another node came back")
	}
	if err := spiffeVerifies(before, c.Bundle()); err != nil {
		t.Error(err)
	}
	h2 := newAgent(t, c, "h2", "service/cards") // signed after the restart
	if err := spiffeVerifies(h2.svid(t), c.Bundle()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(c.Config().DataDir, "keys")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("there are key files: %v", err)
	}
	eventually(t, "ready", 5*time.Second, c.Node().Ready)
}
