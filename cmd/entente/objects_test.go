package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/entente-mesh/entente/ca/catest"
)

const shop = `apiVersion: entente/v1
kind: Relationship
metadata:
  name: trading.example
  owner: sec
spec: {}
---
apiVersion: entente/v1
kind: Gateway
metadata:
  name: gw-1
  owner: sec
spec:
  run:
    hosts: [h9]
    user: gateway
  datacenter: dc1
  address: gw-1.shop.example:8443
---
apiVersion: entente/v1
kind: Service
metadata:
  name: accounts
  owner: team-a
spec:
  run:
    hosts: [h1]
    user: accounts
  port: 8080
  export:
    to: [trading.example]
---
apiVersion: entente/v1
kind: Service
metadata:
  name: ledger
  owner: team-a
spec:
  run:
    hosts: [h2]
    user: ledger
  port: 8081
---
apiVersion: entente/v1
kind: Agreement
metadata:
  name: reads
  owner: sec
spec:
  peer: trading.example
  expires: 2099-01-01
  allow:
    - callers: [portfolio]
      service: accounts
      http:
        - methods: [GET]
          path:
            type: PathPrefix
            value: /v1
`

// What was applied can be read back as it was written, deleted and declared again.
func TestGetDeleteAndPrune(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	dir := t.TempDir()
	file := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
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
	expect(exitOK, []string{"there is none"}, "get")
	all := file("shop.yaml", shop)
	expect(exitOK, []string{"Service/accounts", "created"}, "apply", "-f", all)

	// Read back, applied again: nothing changes, and the text is the same a second time.
	back := expect(exitOK, nil, "get", "-o", "yaml")
	if out := expect(exitOK, nil, "apply", "-f", file("back.yaml", back), "--diff"); strings.Contains(out, "~") {
		t.Error(out)
	}
	for _, part := range strings.Split(shop, "---\n") {
		if kind, _, _ := strings.Cut(strings.SplitAfter(part, "kind: ")[1], "\n"); !strings.Contains(back, "kind: "+kind+"\n") {
			t.Errorf("no %s in\n%s", kind, back)
		}
	}
	expect(exitOK, []string{"OBJECT", "Service/accounts", "team-a", "shop.yaml:20"}, "get", "services")
	if out := expect(exitOK, nil, "get", "--owner", "sec"); strings.Contains(out, "Service/") || !strings.Contains(out, "Relationship/trading.example") {
		t.Error(out)
	}
	var shown struct {
		Objects []struct {
			Name, Owner, Revision, Source string
			Manifest                      struct{ Spec struct{ Port int } }
		}
	}
	if err := json.Unmarshal([]byte(expect(exitOK, nil, "get", "service/ledger", "--json")), &shown); err != nil || len(shown.Objects) != 1 || shown.Objects[0].Manifest.Spec.Port != 8081 {
		t.Errorf("%v: %+v", err, shown)
	}
	expect(exitUsage, []string{`do you mean "service"`}, "get", "servce")
	expect(exitUsage, []string{"table, yaml or json"}, "get", "-o", "xml")
	expect(exitRefused, []string{"no Service/nobody"}, "get", "service/nobody")

	// What ends is said, and nothing happens unless somebody says yes.
	expect(exitOK, []string{"spiffe://" + c.TrustDomain().Name() + "/accounts gets no SVID", "callers of trading.example lose it: Agreement/reads", "nothing was changed"}, "delete", "service/accounts", "agreement/reads", "--dry-run")
	expect(exitRefused, []string{"shop.yaml:44: Agreement/reads", "nothing was deleted"}, "delete", "service/accounts", "--yes")
	expect(exitUsage, []string{"--yes"}, "delete", "service/ledger")
	expect(exitUsage, []string{"names no object"}, "delete", "service", "--yes")
	expect(exitRefused, []string{"there is no Service/nobody"}, "delete", "service/ledger", "service/nobody", "--yes")
	expect(exitOK, nil, "get", "service/accounts")
	expect(exitOK, []string{"callers of trading.example lose accounts", "portfolio of trading.example may not call accounts", "no other gateway is left"}, "delete", "relationship/trading.example", "agreement/reads", "gateway/gw-1", "--dry-run")
	expect(exitOK, []string{"Relationship/trading.example  deleted"}, "delete", "relationship/trading.example", "agreement/reads", "--yes")
	expect(exitRefused, nil, "get", "relationship/trading.example")
	expect(exitOK, []string{"Relationship/trading.example", "created", "unchanged"}, "apply", "-f", all)
	if again := expect(exitOK, nil, "get", "-o", "yaml"); again != back {
		t.Errorf("made again it is\n%s\nand was\n%s", again, back)
	}

	// A team's folder is all that it has.
	expect(exitOK, nil, "delete", "agreement/reads", "--yes")
	keep := shop[strings.Index(shop, "apiVersion: entente/v1\nkind: Service\nmetadata:\n  name: ledger"):]
	keep, _, _ = strings.Cut(keep, "---\n")
	file("team-a/ledger.yaml", keep)
	file("team-a/notes.txt", "no object")
	folder := filepath.Join(dir, "team-a")
	expect(exitUsage, []string{"--owner"}, "apply", "-f", folder, "--prune")
	expect(exitUsage, []string{`has the owner "sec"`}, "apply", "-f", all, "--prune", "--owner", "team-a")
	expect(exitFindings, []string{"- Service/accounts", "gets no SVID"}, "apply", "-f", folder, "--prune", "--owner", "team-a", "--diff")
	expect(exitUsage, []string{"--yes"}, "apply", "-f", folder, "--prune", "--owner", "team-a")
	expect(exitOK, []string{"Service/accounts", "deleted", "Service/ledger", "unchanged"}, "apply", "-f", folder, "--prune", "--owner", "team-a", "--yes")
	expect(exitOK, []string{"Gateway/gw-1"}, "get")
	expect(exitRefused, []string{"no Service/accounts"}, "get", "service/accounts")

	// Bad input, with its place.
	expect(exitUsage, []string{"ledger.yaml:1: Service/ledger stands at", "ledger.yaml:1 already"}, "apply", "-f", folder, "-f", file("other/ledger.yaml", keep))
	expect(exitUsage, []string{"holds no .yaml file"}, "apply", "-f", t.TempDir())
	expect(exitUsage, []string{"no such file"}, "apply", "-f", filepath.Join(dir, "none.yaml"))
	expect(exitUsage, []string{"the file is empty"}, "apply", "-f", file("empty.yaml", "\n"))
}

// A role shows what belongs to its prefixes, and nothing else.
func TestGetByRole(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	path := filepath.Join(t.TempDir(), "all.yaml")
	text := shop + `---
apiVersion: entente/v1
kind: RoleBinding
metadata: {name: a}
spec: {role: viewer, subjects: [/people/ann], prefixes: [/accounts]}
---
apiVersion: entente/v1
kind: RoleBinding
metadata: {name: all}
spec: {role: viewer, subjects: [/people/all]}
`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, code := entente(t, "apply", "-f", path, "--socket", c.Socket()); code != exitOK {
		t.Fatal(out)
	}
	host := attestHost(t, c, c.AgentToken("h1", "dc1", "127.0.0.1"))
	for person, sees := range map[string]string{
		"ann":    "Agreement/reads RoleBinding/a Service/accounts",
		"all":    "Agreement/reads Gateway/gw-1 Relationship/trading.example RoleBinding/a RoleBinding/all Service/accounts Service/ledger",
		"nobody": "",
	} {
		if out, code := entente(t, "entry", "create", "entry/"+person, "--path", "/people/"+person, "--host", "h1", "--selector", "unix:user:"+person, "--socket", c.Socket()); code != exitOK {
			t.Fatal(out)
		}
		identity := identityFiles(t, c, host, "entry/"+person)
		out, code := entente(t, "get", "--server", c.Addresses()[0], "--identity", identity)
		if sees == "" {
			if code != exitRefused || !strings.Contains(out, "no role is bound") {
				t.Errorf("%s: exit code %d: %s", person, code, out)
			}
			continue
		}
		var got []string
		for line := range strings.Lines(out) {
			if word := strings.Fields(line)[0]; word != "OBJECT" {
				got = append(got, word)
			}
		}
		if strings.Join(got, " ") != sees {
			t.Errorf("%s sees %v, want %s", person, got, sees)
		}
	}
}
