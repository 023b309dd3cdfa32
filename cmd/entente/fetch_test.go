package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/internal/peer/peertest"
	"github.com/entente-mesh/entente/meshagent"
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
	agent, err := meshagent.New(cfg, nil)
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

// incomplete is a Workload API whose messages lack a field.
type incomplete struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	svid *workload.X509SVID
}

func (i incomplete) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return stream.Send(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{i.svid}})
}

// A message that lacks a field is reported, and nothing of it is used.
// Requirements: 171.
func TestFetchIncomplete(t *testing.T) {
	authority := peertest.NewAuthority(spiffeid.RequireTrustDomainFromString("banking.example"))
	certificates, key, err := authority.Issue("/accounts").MarshalRaw()
	if err != nil {
		t.Fatal(err)
	}
	whole := func() *workload.X509SVID {
		return &workload.X509SVID{SpiffeId: "spiffe://banking.example/accounts", X509Svid: certificates, X509SvidKey: key, Bundle: authority.Bundle().X509Authorities()[0].Raw}
	}
	for name, change := range map[string]func(*workload.X509SVID){
		"":            func(*workload.X509SVID) {}, // the control
		"ID":          func(s *workload.X509SVID) { s.SpiffeId = "" },
		"certificate": func(s *workload.X509SVID) { s.X509Svid = nil },
		"key":         func(s *workload.X509SVID) { s.X509SvidKey = nil },
		"bundle":      func(s *workload.X509SVID) { s.Bundle = nil },
	} {
		dir, err := os.MkdirTemp("", "fetch") // a socket's path is short
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		listener, err := net.Listen("unix", filepath.Join(dir, "s"))
		if err != nil {
			t.Fatal(err)
		}
		svid := whole()
		change(svid)
		server := grpc.NewServer()
		workload.RegisterSpiffeWorkloadAPIServer(server, incomplete{svid: svid})
		go server.Serve(listener)
		t.Cleanup(server.Stop)
		code, out, errs := command(t, "", "fetch", "x509", "--socket", "unix://"+listener.Addr().String(), "--write", dir)
		if left, _ := filepath.Glob(filepath.Join(dir, "*.pem")); (code == exitOK) != (name == "") || (len(left) > 0) != (name == "") || name != "" && errs == "" {
			t.Errorf("without %q: %d, %v; %s %s", name, code, left, out, errs)
		}
	}
}
