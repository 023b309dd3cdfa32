package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"

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
	expect(exitOK, "node", "promote", socket, "ca-1") // it votes already
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
