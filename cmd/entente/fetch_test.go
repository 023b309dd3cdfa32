package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"context"

	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/meshagent"
	"github.com/entente-mesh/entente/meshagent/admin"
	"github.com/entente-mesh/entente/meshagent/workloadapi"
)

// workloadHost is an agent in this process whose Workload API gives this process an
// identity.
func workloadHost(t *testing.T) (c *catest.CA, socket string) {
	t.Helper()
	c = catest.Start(t, catest.Options{})
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c.Apply(fmt.Sprintf("apiVersion: entente/v1\nkind: Service\nmetadata: {name: accounts, owner: team}\nspec:\n  run: {uid: %d, path: %s, hosts: [h1]}\n  hint: internal\n", os.Getuid(), exe))
	dir, err := os.MkdirTemp("", "fetch") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket = filepath.Join(dir, "agent.sock")
	cfg, err := meshagent.ReadConfig("agent.yaml", strings.NewReader(fmt.Sprintf(
		"trustDomain: banking.example\nname: h1\ndatacenter: dc1\nsettle: 20ms\ndataDir: %s\nca: {token: %s}\nworkloadAPI: {socket: %s, wit: true}\n",
		filepath.Join(dir, "data"), c.AgentToken("h1", "dc1"), socket)))
	if err != nil {
		t.Fatal(err)
	}
	agent, err := meshagent.New(cfg, meshagent.Options{})
	if err != nil {
		t.Fatal(err)
	}
	listener, err := workloadapi.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	api := workloadapi.New(agent, listener, nil)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- agent.Run(ctx, meshagent.Door{Name: "workload API", Run: api.Run}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return c, socket
}

// command runs the program and returns its exit code and what it printed.
func command(t *testing.T, input string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	redirect := func(name string, to **os.File) (read func() string) {
		file, err := os.CreateTemp(t.TempDir(), name)
		if err != nil {
			t.Fatal(err)
		}
		before := *to
		*to = file
		return func() string {
			*to = before
			file.Seek(0, io.SeekStart)
			data, _ := io.ReadAll(file)
			file.Close()
			return string(data)
		}
	}
	out, errs := redirect("out", &os.Stdout), redirect("err", &os.Stderr)
	in := redirect("in", &os.Stdin)
	os.Stdin.WriteString(input)
	os.Stdin.Seek(0, io.SeekStart)
	code = run(append([]string{"entente"}, args...))
	in()
	return code, out(), errs()
}

// Requirements: 150.
func TestFetchAndValidate(t *testing.T) {
	_, socket := workloadHost(t)
	t.Setenv(socketVariable, "unix://"+socket)
	dir := t.TempDir()

	code, out, errs := command(t, "", "fetch", "x509", "--write", dir)
	if code != exitOK || !strings.Contains(out, "spiffe://banking.example/accounts  internal") || strings.Contains(out, "PRIVATE") {
		t.Errorf("x509: %d %s %s", code, out, errs)
	}
	for name, mode := range map[string]os.FileMode{"svid.0.pem": 0o644, "svid.0.key": 0o600, "bundle.0.pem": 0o644} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	code, out, errs = command(t, "", "fetch", "jwt", "--audience", "ledger", "--json")
	var fetched struct {
		SVIDs []tokenRow `json:"svids"`
	}
	if err := json.Unmarshal([]byte(out), &fetched); code != exitOK || err != nil || len(fetched.SVIDs) != 1 || time.Until(fetched.SVIDs[0].Expires) < time.Minute {
		t.Fatalf("jwt: %d %s %s", code, out, errs)
	}
	token := fetched.SVIDs[0].Token
	code, out, errs = command(t, token+"\n", "validate", "jwt", "--audience", "ledger", "--token-file", "-")
	if code != exitOK || !strings.Contains(out, "VALID") || !strings.Contains(out, "spiffe://banking.example/accounts") {
		t.Errorf("validate: %d %s %s", code, out, errs)
	}
	code, out, errs = command(t, "", "validate", "jwt", "--audience", "ledger", "--token", token, "--json")
	var verdict struct {
		ID string `json:"spiffe_id"`
	}
	if err := json.Unmarshal([]byte(out), &verdict); code != exitOK || err != nil || verdict.ID != "spiffe://banking.example/accounts" {
		t.Errorf("validate: %d %s %s", code, out, errs)
	}
	for _, kind := range []string{"x509", "jwt", "wit"} {
		if code, out, errs = command(t, "", "fetch", "bundle", "--kind", kind); code != exitOK || !strings.Contains(out, "banking.example") {
			t.Errorf("bundle %s: %d %s %s", kind, code, out, errs)
		}
	}
	if code, out, errs = command(t, "", "fetch", "wit", "--write", dir, "--json"); code != exitOK || !strings.Contains(out, "accounts") || strings.Contains(out, `"d"`) {
		t.Errorf("wit: %d %s %s", code, out, errs)
	}
	if info, err := os.Stat(filepath.Join(dir, "wit_svid.0.key.jwk")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the WIT key: %v, %v", info, err)
	}

	for name, test := range map[string]struct {
		want int
		args []string
		err  string
	}{
		"another audience":  {exitFindings, []string{"validate", "jwt", "--audience", "other", "--token", token}, "another audience"},
		"no token":          {exitUsage, []string{"validate", "jwt", "--audience", "a"}, "--token-file"},
		"no audience":       {exitUsage, []string{"fetch", "jwt"}, "--audience"},
		"somebody else":     {exitRefused, []string{"fetch", "jwt", "--audience", "a", "--spiffe-id", "spiffe://banking.example/x"}, "no identity issued"},
		"no agent":          {exitUnreachable, []string{"fetch", "x509", "--socket", dir + "/none.sock"}, "no agent answers"},
		"no such kind":      {exitUsage, []string{"fetch", "bundle", "--kind", "pgp"}, "--kind"},
		"no socket address": {exitUsage, []string{"fetch", "x509", "--socket", "http://127.0.0.1"}, "no Workload API address"},
		"stray word":        {exitUsage, []string{"fetch", "x509", "now"}, "takes no argument"},
	} {
		if code, out, errs := command(t, "", test.args...); code != test.want || !strings.Contains(errs, test.err) {
			t.Errorf("%s: %d, want %d; %s %s", name, code, test.want, out, errs)
		}
	}
}

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

// agent run --check prints every setting, in a form that it reads itself, and starts nothing.
func TestAgentCheck(t *testing.T) {
	file := filepath.Join(t.TempDir(), "agent.yaml")
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("trustDomain: banking.example\nname: h1\ndatacenter: dc1\ndataDir: /var/lib/entente/agent\n")
	code, out, errs := command(t, "", "agent", "run", "--config", file, "--check")
	if code != exitOK || !strings.Contains(out, "defaultSVIDName: default") {
		t.Fatalf("%d %s %s", code, out, errs)
	}
	write(out)
	if code, again, errs := command(t, "", "agent", "run", "--config", file, "--check"); code != exitOK || again != out {
		t.Errorf("what it printed is read otherwise: %d %s %s", code, again, errs)
	}
	write("trustDomain: banking.example\nname: h1\ndatacenter: dc1\ndatadir: /x\n")
	if code, _, errs := command(t, "", "agent", "run", "--config", file, "--check"); code != exitUsage || !strings.Contains(errs, "agent.yaml:4:1") || !strings.Contains(errs, "dataDir") {
		t.Errorf("%d %s", code, errs)
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
	agent, err := meshagent.New(cfg, meshagent.Options{})
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

// Workload Endpoint 4.
// Requirements: 153.
func TestEndpoint(t *testing.T) {
	for address, want := range map[string]string{
		"unix:///run/agent.sock":     "unix:///run/agent.sock",
		"unix:/run/agent.sock":       "unix:///run/agent.sock",
		"/run/agent.sock":            "unix:///run/agent.sock",
		"tcp://127.0.0.1:8000":       "passthrough:///127.0.0.1:8000",
		"unix://host/run/agent.sock": "",
		"unix:///run/agent.sock?x=1": "",
		"tcp://localhost:8000":       "",
		"tcp://127.0.0.1":            "",
		"tcp://127.0.0.1:8000/path":  "",
		"http://127.0.0.1":           "",
		"":                           "",
	} {
		got, err := endpoint(address)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", address, got, err)
		}
	}
}
