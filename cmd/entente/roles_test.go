package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/meshagent/nodeattest"
)

// identityFiles writes what `fetch x509 --write` would on a host, for an entry.
func identityFiles(t *testing.T, c *catest.CA, host *x509svid.SVID, entry string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := nodeattest.CSR(key)
	if err != nil {
		t.Fatal(err)
	}
	agent, err := client.New(client.Config{TrustDomain: c.TrustDomain(), Addresses: c.Addresses(), SVID: host, Bundles: c.Bundle()})
	if err != nil {
		t.Fatal(err)
	}
	signed := agent.SignX509(t.Context(), []client.SignRequest{{EntryID: entry, CSR: csr}})[0]
	if signed.Err != nil {
		t.Fatal(signed.Err)
	}
	der, _ := x509.MarshalPKCS8PrivateKey(key)
	dir := t.TempDir()
	write := func(name, kind string, blocks ...[]byte) {
		var text []byte
		for _, block := range blocks {
			text = append(text, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: block})...)
		}
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("svid.0.pem", "CERTIFICATE", signed.Certificates...)
	write("svid.0.key", "PRIVATE KEY", der)
	var roots [][]byte
	for _, root := range c.Bundle().X509Authorities() {
		roots = append(roots, root.Raw)
	}
	write("bundle.0.pem", "CERTIFICATE", roots...)
	return dir
}

// Administration over the network, as people type it.
func TestRemoteAdministration(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	c := catest.Start(t, catest.Options{})
	expect := func(code int, want string, args ...string) string {
		t.Helper()
		out, got := entente(t, args...)
		if got != code || !strings.Contains(out, want) {
			t.Fatalf("%v: exit code %d, want %d and %q:\n%s", args, got, code, want, out)
		}
		return out
	}
	socket := "--socket=" + c.Socket()
	roles := file("roles.yaml", `
apiVersion: entente/v1
kind: RoleBinding
metadata: {name: pay}
spec: {role: service-owner, subjects: [/people/pia], prefixes: [/team/pay]}
---
apiVersion: entente/v1
kind: RoleBinding
metadata: {name: trust}
spec: {role: trust-admin, subjects: [/people/tom]}
`)
	out := expect(exitFindings, "+ RoleBinding/pay", "apply", "-f", roles, "--diff", socket)
	if !strings.Contains(out, "+ spec.prefixes") || !strings.Contains(out, "[/team/pay]") {
		t.Errorf("diff:\n%s", out)
	}
	expect(exitOK, "created", "apply", "-f", roles, socket)
	expect(exitOK, "= RoleBinding/pay", "apply", "-f", roles, "--diff", socket)
	wider := file("wider.yaml", "apiVersion: entente/v1\nkind: RoleBinding\nmetadata: {name: pay}\nspec: {role: service-owner, subjects: [/people/pia], prefixes: [/team]}\n")
	expect(exitFindings, "[/team/pay] -> [/team]", "apply", "-f", wider, "--diff", socket)
	expect(exitFindings, `"before": "[/team/pay]"`, "apply", "-f", wider, "--diff", "--json", socket)
	expect(exitOK, "may do everything", "whoami", socket)

	people := file("people.jsonl", `{"id": "entry/pia", "path": "/people/pia", "hosts": ["desk"], "selectors": ["unix:uid:1"]}

{"id": "entry/tom", "path": "/people/tom", "hosts": ["desk"], "selectors": ["unix:uid:2"], "ttl": "1h", "jwtTTL": "2m"}
{"id": "entry/eve", "path": "/people/eve", "hosts": ["desk"], "selectors": ["unix:uid:3"], "nodeSelectors": ["token:desk"]}
`)
	out = expect(exitOK, "created", "entry", "create", "-f", people, socket)
	if !strings.Contains(out, "people.jsonl:3") {
		t.Errorf("no line of the file in\n%s", out)
	}
	more := file("more.jsonl", "\n\n\n"+`{"id": "entry/x", "path": "/entente/x", "hosts": ["desk"], "selectors": ["unix:uid:9"]}`)
	expect(exitRefused, more+":4", "entry", "create", "-f", more, socket)
	expect(exitUsage, "", "entry", "create", "-f", file("bad.jsonl", "{}\n{\"id\": \"entry/x\"\n"), socket)
	expect(exitOK, "JWT TTL", "entry", "show", "entry/tom", socket)
	expect(exitOK, "--page-token entry/eve", "entry", "list", "--page-size", "1", socket)
	expect(exitOK, "entry/pia", "entry", "list", "--page-size", "1", "--page-token", "entry/eve", socket)

	tokenText := strings.TrimSpace(firstLine(expect(exitOK, "entente-join-", "token", "create", "--agent", "desk", "--datacenter", "dc1", "--address", "127.0.0.1", "--selector", "token:desk", "--path-prefix", "/people", socket)))
	host := attestHost(t, c, tokenText)
	expect(exitOK, "token:desk", "agent", "show", "desk", socket)

	server := []string{"--server", c.Config().Listen.API}
	pia := append([]string{"--identity", identityFiles(t, c, host, "entry/pia")}, server...)
	tom := append([]string{"--identity", identityFiles(t, c, host, "entry/tom")}, server...)
	eve := append([]string{"--identity", identityFiles(t, c, host, "entry/eve")}, server...)
	as := func(who []string, args ...string) []string { return append(args, who...) }

	expect(exitOK, "spiffe://banking.example/people/pia", as(pia, "whoami")...)
	expect(exitOK, "/team/pay", as(pia, "whoami")...)
	expect(exitRefused, "spiffe://banking.example/people/eve", as(eve, "whoami")...)
	expect(exitOK, "created", as(pia, "entry", "create", "entry/job", "--path", "/team/pay/job", "--host", "h1", "--selector", "unix:uid:7")...)
	expect(exitRefused, "forbidden", as(pia, "entry", "create", "entry/other", "--path", "/team/payments/job", "--host", "h1", "--selector", "unix:uid:8")...)
	expect(exitRefused, "", as(pia, "apply", "-f", wider)...)
	expect(exitRefused, "", as(pia, "agent", "ban", "desk")...)
	expect(exitRefused, "", as(eve, "entry", "list")...)
	expect(exitOK, "entry/job", as(pia, "entry", "list")...)
	expect(exitOK, "1", as(pia, "entry", "count")...)
	expect(exitOK, "desk", as(tom, "agent", "list")...)
	expect(exitOK, "updated", as(tom, "apply", "-f", wider)...)
	expect(exitOK, "created", as(pia, "entry", "create", "entry/other", "--path", "/team/payments/job", "--host", "h1", "--selector", "unix:uid:8")...) // control
	expect(exitUnreachable, "", "whoami", "--server", "127.0.0.1:1", "--identity", pia[1])

	// A CA of another domain is not believed, and does not believe.
	stranger := catest.Start(t, catest.Options{TrustDomain: "trading.example"})
	expect(exitUnreachable, "", "whoami", "--server", stranger.Config().Listen.API, "--identity", tom[1])
}

func firstLine(text string) string {
	line, _, _ := strings.Cut(text, "\n")
	return line
}

// attestHost is what an agent does with a token.
func attestHost(t *testing.T, c *catest.CA, text string) *x509svid.SVID {
	t.Helper()
	token, err := ca.ParseToken(text)
	if err != nil {
		t.Fatal(err)
	}
	key, err := nodeattest.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := nodeattest.CSR(key)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := client.Attest(t.Context(), client.Config{TrustDomain: c.TrustDomain(), Addresses: c.Addresses(), Pins: token.Pinned}, nodeattest.ByToken(token, key), csr)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(answer.Certificates[0])
	if err != nil {
		t.Fatal(err)
	}
	return &x509svid.SVID{ID: spiffeid.RequireFromPath(c.TrustDomain(), ca.AgentPath(answer.Agent.GetName())), Certificates: []*x509.Certificate{leaf}, PrivateKey: key}
}
