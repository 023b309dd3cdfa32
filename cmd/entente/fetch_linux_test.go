package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/meshagent"
	"github.com/entente-mesh/entente/meshagent/admin"
)

// --watch says and writes again what changes, a line of JSON for each; without, once.
func TestFetchWatch(t *testing.T) {
	c, socket := workloadHost(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	watch := func(kind string, more ...string) *json.Decoder {
		cmd := exec.CommandContext(ctx, self, append([]string{"fetch", kind, "--watch", "--json", "--write", dir}, more...)...)
		cmd.Env = append(os.Environ(), "ENTENTE_TEST_PROGRAM=entente", socketVariable+"=unix://"+socket)
		cmd.Stderr = t.Output()
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Wait() })
		return json.NewDecoder(out)
	}
	lines := watch("x509")
	type answer struct {
		SVIDs []struct {
			Hint   string
			Serial string `json:"serial_number"`
		}
		Bundles map[string]any
	}
	next := func(lines *json.Decoder) (a answer) {
		t.Helper()
		if err := lines.Decode(&a); err != nil {
			t.Fatal(err)
		}
		return a
	}
	first := next(lines)
	key := func() string {
		text, err := os.ReadFile(filepath.Join(dir, "svid.0.key"))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	before := key()
	if len(first.SVIDs) != 1 || first.SVIDs[0].Hint != "internal" || !strings.Contains(before, "PRIVATE KEY") {
		t.Fatalf("%+v", first)
	}
	bundles := watch("bundle", "--kind", "jwt")
	if b := next(bundles); b.Bundles["banking.example"] == nil {
		t.Errorf("%+v", b)
	}
	if info, err := os.Stat(filepath.Join(dir, "banking.example.jwt.json")); err != nil || info.Mode().Perm() != 0o644 {
		t.Errorf("%v, %v", info, err)
	}
	if tokens := next(watch("wit")); len(tokens.SVIDs) != 1 {
		t.Errorf("%+v", tokens)
	}

	c.Apply(fmt.Sprintf("apiVersion: entente/v1\nkind: Service\nmetadata: {name: accounts, owner: team}\nspec:\n  run: {uid: %d, path: %s, hosts: [h1]}\n  hint: external\n", os.Getuid(), self))
	for a := first; a.SVIDs[0].Hint != "external"; {
		if a = next(lines); len(a.SVIDs) != 1 {
			t.Fatalf("%+v", a)
		}
	}
	c.Apply(fmt.Sprintf("apiVersion: entente/v1\nkind: Service\nmetadata: {name: accounts, owner: team}\nspec:\n  run: {uid: %d, path: %s, hosts: [h1]}\n  ttl: {x509: 1h}\n", os.Getuid(), self))
	for a := first; a.SVIDs[0].Serial == first.SVIDs[0].Serial || a.SVIDs[0].Hint != ""; {
		a = next(lines)
	}
	if key() == before {
		t.Error("the files hold the key of before")
	}
	if code, out, errs := command(t, "", "fetch", "x509", "--socket", socket, "--json"); code != exitOK || json.Unmarshal([]byte(out), &answer{}) != nil || strings.Contains(out, "PRIVATE") {
		t.Errorf("%d %s %s", code, out, errs)
	}
	if code, out, errs := command(t, "", "fetch", "bundle", "--socket", socket, "--write", dir); code != exitOK || !strings.Contains(out, "banking.example.pem") {
		t.Errorf("%d %s %s", code, out, errs)
	}
}

// Ready is 0, something missing 1, nobody there 3 (TestRunRefuses).
func TestHealthcheck(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	socket, _ := host(t, c)
	var s admin.Status
	for range 500 { // it has to be admitted first
		if code, _, _ := command(t, "", "agent", "healthcheck", "--socket", socket); code == exitOK {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	code, out, errs := command(t, "", "agent", "healthcheck", "--socket", socket)
	if code != exitOK || !strings.Contains(out, "h1 of banking.example is ready: 0 identities") {
		t.Errorf("%d %s %s", code, out, errs)
	}
	code, out, errs = command(t, "", "agent", "healthcheck", "--socket", socket, "--json")
	if err := json.Unmarshal([]byte(out), &s); code != exitOK || err != nil || !s.Ready || s.Agent != "h1" {
		t.Errorf("%d %s %s", code, out, errs)
	}

	other := catest.Start(t, catest.Options{})
	token := other.AgentToken("h2", "dc1")
	other.Stop()
	dir, err := os.MkdirTemp("", "health") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cfg, err := meshagent.ReadConfig("agent.yaml", strings.NewReader(fmt.Sprintf("trustDomain: banking.example\nname: h2\ndatacenter: dc1\ndataDir: %s\nca: {token: %s}\n", dir, token)))
	if err != nil {
		t.Fatal(err)
	}
	agent, err := meshagent.New(cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := admin.Listen(cfg.Admin.Socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- agent.Run(ctx, meshagent.Door{Name: "admin", Run: admin.New(agent, listener, nil).Run})
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	if code, out, errs := command(t, "", "agent", "healthcheck", "--socket", cfg.Admin.Socket); code != exitFindings || !strings.Contains(errs, "h2 of banking.example is not ready: ") {
		t.Errorf("no CA: %d %s %s", code, out, errs)
	}
	if code, out, _ := command(t, "", "agent", "healthcheck", "--socket", cfg.Admin.Socket, "--json"); code != exitFindings || json.Unmarshal([]byte(out), &s) != nil || s.Ready || s.Why == "" {
		t.Errorf("no CA: %d %s", code, out)
	}
}
