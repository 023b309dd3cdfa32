package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/node"
)

// writeCAConfig writes the file of a node that stands in dir.
func writeCAConfig(t *testing.T, path string, c *node.Config) {
	t.Helper()
	text := fmt.Sprintf("trustDomain: %s\nname: %s\ndatacenter: %s\ndataDir: %s\nlisten: {raft: %q, api: %q}\nkeys: {insecureDev: true}\n",
		c.TrustDomain, c.Name, c.Datacenter, c.DataDir, c.Listen.Raft, c.Listen.API)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// The verbs of a CA's operators, with their exit codes.
func TestOperatorsVerbs(t *testing.T) {
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	expect := func(code int, args ...string) {
		t.Helper()
		if got := run(append([]string{"entente"}, args...)); got != code {
			t.Errorf("entente %q: exit code %d, want %d", args, got, code)
		}
	}
	c := catest.Start(t, catest.Options{})
	stranger := catest.Start(t, catest.Options{})
	socket := "--socket=" + c.Socket()
	writeCAConfig(t, file("ca.yaml"), c.Config())
	os.WriteFile(file("key"), []byte(c.RecoveryKey()+"\n"), 0o600)
	os.WriteFile(file("wrong"), []byte(stranger.RecoveryKey()), 0o600)

	expect(exitOK, "ca", "status", socket)
	expect(exitOK, "node", "list", socket)
	expect(exitOK, "node", "list", socket, "--json")
	expect(exitRefused, "node", "promote", socket, "ca-1") // it votes already
	expect(exitRefused, "node", "promote", socket, "nobody")
	expect(exitUsage, "node", "promote", socket)
	expect(exitUnreachable, "snapshot", "save", "--socket="+file("none.sock"), file("none"))

	expect(exitOK, "snapshot", "save", socket, file("a.snapshot"))
	expect(exitUsage, "snapshot", "save", socket, file("a.snapshot"))
	expect(exitOK, "snapshot", "save", socket, "--force", file("a.snapshot"))
	info, err := os.Stat(file("a.snapshot"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	expect(exitOK, "snapshot", "inspect", file("a.snapshot"))
	expect(exitUsage, "snapshot", "inspect", file("nothing"))
	data, err := os.ReadFile(file("a.snapshot"))
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 1
	os.WriteFile(file("altered"), data, 0o600)
	expect(exitFindings, "snapshot", "inspect", file("altered"))

	// The node runs: its directory is in use.
	expect(exitFindings, "ca", "recover", "--config", file("ca.yaml"))
	c.Stop()
	expect(exitOK, "ca", "recover", "--config", file("ca.yaml"))
	expect(exitRefused, "ca", "recover", "--config", file("ca.yaml"), "--recovery-key-file", file("wrong"))
	expect(exitOK, "ca", "recover", "--config", file("ca.yaml"), "--recovery-key-file", file("key"), "--json")

	expect(exitRefused, "snapshot", "restore", "--config", file("ca.yaml"), "--recovery-key-file", file("key"), file("a.snapshot"))
	config := *c.Config()
	config.DataDir = file("restored")
	writeCAConfig(t, file("restored.yaml"), &config)
	expect(exitUsage, "snapshot", "restore", "--config", file("restored.yaml"), file("a.snapshot"))
	expect(exitRefused, "snapshot", "restore", "--config", file("restored.yaml"), "--recovery-key-file", file("wrong"), file("a.snapshot"))
	expect(exitOK, "snapshot", "restore", "--config", file("restored.yaml"), "--recovery-key-file", file("key"), "--epoch", "7", file("a.snapshot"))

	// The recovery key of a new cluster goes to a file on demand, and is not overwritten.
	config.DataDir = file("fresh")
	writeCAConfig(t, file("fresh.yaml"), &config)
	expect(exitFindings, "ca", "init", "--config", file("fresh.yaml"), "--recovery-key-file", file("key"))
	expect(exitOK, "ca", "init", "--config", file("fresh.yaml"), "--recovery-key-file", file("fresh.key"))
	if info, err := os.Stat(file("fresh.key")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
}

// The JSON of a snapshot has stable names.
func TestContentsJSON(t *testing.T) {
	raw, err := json.Marshal(node.Contents{})
	if err != nil {
		t.Fatal(err)
	}
	var names map[string]any
	json.Unmarshal(raw, &names)
	for _, name := range []string{"trustDomain", "clusterId", "epoch", "revision", "index", "time", "checksum", "members", "authorities", "agents", "banned", "entries", "objects", "foreign"} {
		if _, ok := names[name]; !ok {
			t.Errorf("%s is missing", name)
		}
	}
}

// `snapshot restore --bans`: whom a node shut out after the backup stays out. Without the
// flag he is back, for the backup knows nothing of it.
func TestRestoreWithBans(t *testing.T) {
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	expect := func(code int, args ...string) string {
		t.Helper()
		out, got := entente(t, args...)
		if got != code {
			t.Fatalf("entente %q: exit code %d, want %d:\n%s", args, got, code, out)
		}
		return out
	}
	c := catest.Start(t, catest.Options{})
	for _, name := range []string{"h1", "h2", "h3"} {
		attestHost(t, c, c.AgentToken(name, "dc1"))
	}
	os.WriteFile(file("key"), []byte(c.RecoveryKey()+"\n"), 0o600)
	expect(exitOK, "snapshot", "save", "--socket", c.Socket(), file("backup"))
	expect(exitOK, "agent", "ban", "--socket", c.Socket(), "h1")
	journal := filepath.Join(c.Config().DataDir, "bans.journal")
	for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		if text, _ := os.ReadFile(journal); strings.Contains(string(text), `"h1"`) {
			break
		}
		if time.Since(begin) > time.Minute {
			t.Fatal("the node does not remember the ban")
		}
	}
	c.Stop()
	text, err := os.ReadFile(journal)
	if err != nil {
		t.Fatal(err)
	}
	os.WriteFile(file("damaged"), []byte(strings.Replace(string(text), "h1", "h3", 1)), 0o600)

	// restored is the restored node's list of agents, when a line of it is there.
	restored := func(line string, bans ...string) string {
		t.Helper()
		other, config := place(t, catest.Options{})
		restore := []string{"snapshot", "restore", "--config", config, "--recovery-key-file", file("key")}
		for _, refused := range []string{file("nothing"), file("damaged")} {
			if out, code := entente(t, append(restore, "--bans", refused, file("backup"))...); code == exitOK || !strings.Contains(out, filepath.Base(refused)) {
				t.Errorf("--bans %s: exit code %d:\n%s", refused, code, out)
			}
		}
		for _, b := range bans {
			restore = append(restore, "--bans", b)
		}
		expect(exitOK, append(restore, file("backup"))...)
		other.Restart()
		defer other.Stop()
		for begin := time.Now(); ; time.Sleep(20 * time.Millisecond) {
			list, _ := entente(t, "agent", "list", "--socket", other.Socket())
			if regexp.MustCompile(`(?m)^` + line).MatchString(list) {
				return list
			}
			if time.Since(begin) > time.Minute {
				t.Fatalf("no line %q in\n%s", line, list)
			}
		}
	}
	if list := restored(`h1 .* admitted`); strings.Contains(list, "BANNED") {
		t.Errorf("control: without --bans:\n%s", list)
	}
	if list := restored(`h1 .* BANNED`, journal, journal); strings.Count(list, "admitted\n") != 2 {
		t.Errorf("whom nobody banned:\n%s", list)
	}
}
