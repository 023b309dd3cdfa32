package main

import (
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/entente-mesh/entente/ca/catest"
)

// entente runs a command line and returns what it prints.
func entente(t *testing.T, args ...string) (out string, code int) {
	t.Helper()
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, stderr := os.Stdout, os.Stderr
	os.Stdout, os.Stderr = write, write
	defer func() { os.Stdout, os.Stderr = stdout, stderr }()
	printed := make(chan string, 1)
	go func() {
		all, _ := io.ReadAll(read)
		printed <- string(all)
	}()
	code = run(append([]string{"entente"}, args...))
	write.Close()
	return <-printed, code
}

// The verbs that end trust, as an operator types them: what they print, and the exit
// code when they are refused.
func TestTrustVerbs(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	expect := func(code int, want []string, args ...string) string {
		t.Helper()
		out, got := entente(t, append(args, "--socket", c.Socket())...)
		if got != code {
			t.Fatalf("%v: exit code %d, want %d:\n%s", args, got, code, out)
		}
		for _, text := range want {
			if !strings.Contains(out, text) {
				t.Errorf("%v: no %q in\n%s", args, text, out)
			}
		}
		return out
	}
	column := func(out, row string, n int) string {
		t.Helper()
		for line := range strings.Lines(out) {
			if fields := strings.Fields(line); strings.Contains(line, row) && len(fields) > n {
				return fields[n]
			}
		}
		t.Fatalf("no line with %q in\n%s", row, out)
		return ""
	}
	var list string
	for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		list = expect(exitOK, []string{"AUTHORITY", "WAITS FOR", "ca-1", "X509", "ACTIVE"}, "authority", "list")
		if strings.Count(list, "may be activated") == 3 {
			break
		}
		if time.Since(begin) > 10*time.Second {
			t.Fatal(list)
		}
	}
	old, next := column(list, "ACTIVE", 0), column(list, "PREPARED", 0)
	expect(exitRefused, []string{"taint it first"}, "authority", "revoke", old)
	for _, use := range []string{"x509", "jwt", "wit"} {
		expect(exitRefused, []string{"already"}, "authority", "prepare", "--use", use)
	}
	expect(exitUsage, []string{"x509, jwt or wit"}, "authority", "prepare", "--use", "JWT")
	expect(exitOK, []string{"NEXT", "by everybody", "WIT"}, "ca", "status")
	expect(exitUsage, []string{"missing"}, "authority", "taint")
	expect(exitRefused, []string{"no authority"}, "authority", "taint", "ffffffff")
	expect(exitOK, []string{"is ACTIVE at revision 0."}, "authority", "activate", next)
	expect(exitOK, []string{"is TAINTED", "next: entente authority list"}, "authority", "taint", old)
	for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		if list = expect(exitOK, nil, "authority", "list"); strings.Contains(list, "may be revoked") {
			break
		}
		if time.Since(begin) > 10*time.Second {
			t.Fatal(list)
		}
	}
	expect(exitOK, []string{"is REVOKED"}, "authority", "revoke", old)
	expect(exitRefused, nil, "authority", "taint", old)

	expect(exitOK, []string{"NODE", "ca-1", "leader"}, "node", "list")
	expect(exitRefused, []string{"last voter"}, "node", "remove", "ca-1", "--compromised")

	c.AgentToken("h1", "dc1")
	tokens := expect(exitOK, []string{"TOKEN", "agent h1", "unused"}, "token", "list")
	expect(exitOK, []string{"admits nobody"}, "token", "revoke", column(tokens, "agent h1", 0))
	expect(exitRefused, []string{"no token"}, "token", "revoke", column(tokens, "agent h1", 0))
	expect(exitOK, []string{"AGENT", "STATE"}, "agent", "list")
	expect(exitRefused, []string{"no agent is named h1"}, "agent", "ban", "h1")
	expect(exitRefused, []string{"no agent is named h1"}, "agent", "evict", "h1")
	expect(exitRefused, []string{"no agent is named h1"}, "agent", "show", "h1")
}

func TestEntryVerbs(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	expect := func(code int, want []string, args ...string) string {
		t.Helper()
		out, got := entente(t, append(args, "--socket", c.Socket())...)
		if got != code {
			t.Fatalf("%v: exit code %d, want %d:\n%s", args, got, code, out)
		}
		for _, text := range want {
			if !strings.Contains(out, text) {
				t.Errorf("%v: no %q in\n%s", args, text, out)
			}
		}
		return out
	}
	file := filepath.Join(t.TempDir(), "entries.yaml")
	if err := os.WriteFile(file, []byte(`
id: entry/nightly
path: /batch/nightly
hosts: [h1, h2]
selectors: ["unix:uid:1000"]
ttl: 1h
hint: batch
---
id: entry/bad
path: /entente/ca/x
hosts: [h1]
selectors: ["unix:uid:1000"]
`), 0o600); err != nil {
		t.Fatal(err)
	}
	expect(exitOK, []string{"warning: entry/far: there is no Relationship with nowhere.example", "created"}, "entry", "create", "entry/far", "--path", "/far", "--host", "h1", "--selector", "unix:uid:1", "--federates-with", "nowhere.example")
	expect(exitOK, []string{"deleted"}, "entry", "delete", "entry/far")
	expect(exitRefused, []string{"entry/nightly  created", "REFUSED", "reserved", "nothing was changed"}, "entry", "create", "-f", file, "--dry-run")
	expect(exitOK, []string{"0"}, "entry", "count")
	expect(exitRefused, []string{"entry/nightly  created", "1 of 2 changes were refused"}, "entry", "create", "-f", file)
	shown := expect(exitOK, []string{"/batch/nightly", "h1, h2", "1h0m0s", "batch"}, "entry", "show", "entry/nightly")
	revision := strings.Fields(shown[strings.Index(shown, "REVISION"):])[1]
	tool := []string{"entry", "update", "entry/nightly", "--path", "/batch/nightly", "--host", "h1", "--selector", "unix:uid:1000"}
	expect(exitOK, []string{"updated"}, append(tool, "--if-revision", revision)...)
	expect(exitRefused, []string{"read it again"}, append(tool, "--selector", "unix:gid:7", "--if-revision", revision)...)
	expect(exitOK, []string{"entry/nightly", "/batch/nightly"}, "entry", "list", "--host", "h1", "--path-prefix", "/batch", "--declared")
	expect(exitOK, []string{"1"}, "entry", "count", "--host", "h1")
	expect(exitUsage, []string{"either"}, "entry", "create")
	expect(exitUsage, []string{"--path"}, "entry", "create", "entry/x")
	out := expect(exitOK, nil, "entry", "list", "--json")
	var list struct {
		Entries []struct{ Id string }
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil || len(list.Entries) != 1 || list.Entries[0].Id != "entry/nightly" {
		t.Errorf("%v: %s", err, out)
	}
	expect(exitOK, []string{"deleted"}, "entry", "delete", "entry/nightly")
	expect(exitRefused, []string{"no entry"}, "entry", "show", "entry/nightly")
	if out, code := entente(t, "entry", "list", "--socket", c.Socket()+".not"); code != exitUnreachable {
		t.Errorf("exit code %d: %s", code, out)
	}
}
