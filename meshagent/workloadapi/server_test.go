package workloadapi

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/internal/peer"
	"github.com/entente-mesh/entente/meshagent"
)

// The test binary is also another workload: one that fetches and says what it got.
func TestMain(m *testing.M) {
	if kind := os.Getenv("ENTENTE_TEST_ATTACK"); kind != "" {
		attack(kind, os.Getenv("ENTENTE_TEST_SOCKET"))
		os.Exit(0)
	}
	if socket := os.Getenv("ENTENTE_TEST_SOCKET"); socket != "" {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		fmt.Println(fetch(ctx, socket))
		if os.Getenv("ENTENTE_TEST_HOLD") != "" {
			bufio.NewReader(os.Stdin).ReadString('\n')
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// fetch is one FetchX509SVID with go-spiffe's client: the IDs, or the code.
func fetch(ctx context.Context, socket string) string {
	client, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+socket))
	if err != nil {
		return err.Error()
	}
	defer client.Close()
	got, err := client.FetchX509Context(ctx)
	if err != nil {
		return status.Code(err).String()
	}
	return ids(got.SVIDs)
}

func ids(svids []*x509svid.SVID) string {
	var list []string
	for _, svid := range svids {
		list = append(list, svid.ID.String())
	}
	return strings.Join(list, " ")
}

func run(exe string) string {
	return fmt.Sprintf("run: {uid: %d, path: %s, hosts: [h1]}", os.Getuid(), exe)
}

func serviceYAML(name, spec string) string {
	return "apiVersion: entente/v1\nkind: Service\nmetadata: {name: " + name + ", owner: team}\nspec:\n  " + spec + "\n---\n"
}

func myself(t testing.TB) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

// host is an agent whose Workload API is served.
type host struct {
	agent  *meshagent.Agent
	server *Server
	socket string
	stop   func()
}

// newHost is a host of banking.example.
func newHost(t testing.TB, token string, ready bool, change ...func(*Server)) *host {
	t.Helper()
	return newHostOf(t, "banking.example", token, "", ready, change...)
}

// newHostOf is a host of any trust domain, with more settings of workloadAPI.
func newHostOf(t testing.TB, domain, token, settings string, ready bool, change ...func(*Server)) *host {
	t.Helper()
	dir, err := os.MkdirTemp("", "wl") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	h := &host{socket: filepath.Join(dir, "api", "agent.sock")}
	cfg, err := meshagent.ReadConfig("agent.yaml", strings.NewReader(fmt.Sprintf(
		"trustDomain: %s\nname: h1\ndatacenter: dc1\nsettle: 20ms\ndataDir: %s\nca: {token: %s}\nworkloadAPI: {socket: %s%s}\n",
		domain, filepath.Join(dir, "data"), token, h.socket, settings)))
	if err != nil {
		t.Fatal(err)
	}
	if h.agent, err = meshagent.New(cfg, nil); err != nil {
		t.Fatal(err)
	}
	listener, err := Listen(h.socket)
	if err != nil {
		t.Fatal(err)
	}
	h.server = New(h.agent, listener, nil)
	for _, f := range change {
		f(h.server)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- h.agent.Run(ctx, meshagent.Door{Name: "workload API", Run: h.server.Run}) }()
	stopped := false
	h.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(h.stop)
	if ready {
		eventually(t, "ready", h.agent.Ready)
	}
	return h
}

func eventually(t testing.TB, what string, check func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(15 * time.Second); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}

// raw is a client that sends what it likes.
func raw(t testing.TB, socket string) (workload.SpiffeWorkloadAPIClient, *grpc.ClientConn) {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return workload.NewSpiffeWorkloadAPIClient(conn), conn
}

func withHeader(ctx context.Context, values ...string) context.Context {
	for _, v := range values {
		ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", v)
	}
	return ctx
}

// A workload gets exactly the identities whose selectors its process satisfies:
// here another executable of the same user, and then the one that is named.
// Requirements: 154, 155, 158.
func TestIdentityFollowsTheProcess(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	other := filepath.Join(t.TempDir(), "other")
	if err := os.Link(myself(t), other); err != nil {
		data, _ := os.ReadFile(myself(t))
		if err := os.WriteFile(other, data, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	c.Apply(serviceYAML("accounts", run(myself(t))))
	h := newHost(t, c.AgentToken("h1", "dc1"), true)
	child := func() string {
		t.Helper()
		cmd := exec.Command(other)
		cmd.Env = append(os.Environ(), "ENTENTE_TEST_SOCKET="+h.socket)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v %s", err, out)
		}
		return strings.TrimSpace(string(out))
	}
	if got := fetch(t.Context(), h.socket); got != "spiffe://banking.example/accounts" {
		t.Errorf("control: %s", got)
	}
	if got := child(); got != "PermissionDenied" {
		t.Errorf("another executable of the same user: %s", got)
	}
	c.Apply(serviceYAML("ledger", run(other)))
	eventually(t, "the other's entry", func() error {
		if got := child(); got != "spiffe://banking.example/ledger" {
			return errors.New(got)
		}
		return nil
	})
	if got := fetch(t.Context(), h.socket); got != "spiffe://banking.example/accounts" {
		t.Errorf("the first one after that: %s", got)
	}
}

// What go-spiffe's source gives is whole: chain, key and bundle fit together.
// Requirements: 148, 165, 173, 174.
func TestX509Source(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply(serviceYAML("accounts", run(myself(t))))
	h := newHost(t, c.AgentToken("h1", "dc1"), true)
	source, err := workloadapi.NewX509Source(t.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+h.socket)))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	svid, err := source.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	if id, _, err := x509svid.Verify(svid.Certificates, source); err != nil || id.Path() != "/accounts" {
		t.Errorf("%v %v", id, err)
	}
	bundle, err := source.GetX509BundleForTrustDomain(c.TrustDomain())
	if err != nil || !bundle.Equal(c.Bundle()) {
		t.Errorf("bundle: %v", err)
	}
	if info, err := os.Stat(h.socket); err != nil || info.Mode().Perm() != 0o777 {
		t.Errorf("socket: %v %v", info.Mode(), err)
	}
	if info, err := os.Stat(filepath.Dir(h.socket)); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("directory: %v %v", info.Mode(), err)
	}
}

// Everybody reaches the socket in directories that were missing, whatever the umask; a
// directory that was there keeps its mode.
func TestSocketIsReachable(t *testing.T) {
	closed := t.TempDir()
	if err := os.Chmod(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	before := syscall.Umask(0o077)
	listener, err := Listen(filepath.Join(closed, "a", "b", "api.sock"))
	syscall.Umask(before)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	for path, want := range map[string]os.FileMode{"": 0o700, "a": 0o755, "a/b": 0o755, "a/b/api.sock": 0o777} {
		if info, err := os.Stat(filepath.Join(closed, path)); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
	file := filepath.Join(closed, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if l, err := Listen(filepath.Join(file, "api.sock")); err == nil {
		l.Close()
		t.Error("a socket in a file")
	}
}

// A message as it is on the wire: every field set, each hint once, the longest ID that
// there may be like any other; and tokens for it that verify.
// Requirements: 12, 162, 173-176, 179-181.
func TestMessage(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	h := newHost(t, c.AgentToken("h1", "dc1"), true)
	long := "/" + strings.Repeat("a", 2048-len("spiffe://banking.example/"))
	var changes []*statev1.EntryChange
	for id, path := range map[string]string{"entry/a": "/accounts", "entry/b": long, "entry/c": "/ledger"} {
		entry := &statev1.Entry{Id: id, Path: path, Hosts: []string{"h1"}, Selectors: []string{fmt.Sprintf("unix:uid:%d", os.Getuid())}, Hint: "same"}
		if id == "entry/c" {
			entry.Hint = strings.Repeat("h", 1024)
		}
		changes = append(changes, &statev1.EntryChange{Action: &statev1.EntryChange_Create{Create: entry}})
	}
	if _, err := c.Admin().ChangeEntries(t.Context(), &ententev1.ChangeEntriesRequest{Changes: changes}); err != nil {
		t.Fatal(err)
	}
	api, _ := raw(t, h.socket)
	ctx, cancel := context.WithTimeout(withHeader(t.Context(), "true"), 30*time.Second)
	defer cancel()
	var message *workload.X509SVIDResponse
	eventually(t, "all three", func() error {
		stream, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		if err == nil {
			message, err = stream.Recv()
		}
		if err == nil && len(message.GetSvids()) != 3 {
			err = fmt.Errorf("%d identities", len(message.GetSvids()))
		}
		return err
	})
	want := []struct{ path, hint string }{{"/accounts", "same"}, {long, ""}, {"/ledger", strings.Repeat("h", 1024)}}
	for i, got := range message.GetSvids() {
		if got.GetSpiffeId() != "spiffe://banking.example"+want[i].path || got.GetHint() != want[i].hint {
			t.Errorf("identity %d is %.60s with hint %.20q", i, got.GetSpiffeId(), got.GetHint())
		}
		chain, err := x509.ParseCertificates(got.GetX509Svid())
		if err != nil {
			t.Fatal(err)
		}
		key, err := x509.ParsePKCS8PrivateKey(got.GetX509SvidKey())
		if err != nil {
			t.Fatal(err)
		}
		if public := key.(crypto.Signer).Public(); !public.(interface{ Equal(crypto.PublicKey) bool }).Equal(chain[0].PublicKey) {
			t.Errorf("identity %d: the key is not the certificate's", i)
		}
		roots, err := x509.ParseCertificates(got.GetBundle())
		if err != nil || !x509bundle.FromX509Authorities(c.TrustDomain(), roots).Equal(c.Bundle()) {
			t.Errorf("identity %d: bundle of %d certificates, %v", i, len(roots), err)
		}
		if id, _, err := x509svid.Verify(chain, c.Bundle()); err != nil || id.String() != got.GetSpiffeId() {
			t.Errorf("identity %d: go-spiffe finds %.60s, %v", i, id, err)
		}
		if id, err := peer.Verify(chain, c.Bundle(), time.Now()); err != nil || id.String() != got.GetSpiffeId() {
			t.Errorf("identity %d: verified as %.60s, %v", i, id, err)
		}
	}
	if len(message.GetFederatedBundles()) != 0 {
		t.Errorf("federated bundles %v", message.GetFederatedBundles())
	}
	tokens, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"ledger"}})
	if err != nil || len(tokens.GetSvids()) != 3 {
		t.Fatalf("tokens: %v", err)
	}
	for i, token := range tokens.GetSvids() {
		got, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "ledger", Svid: token.GetSvid()})
		if err != nil || got.GetSpiffeId() != "spiffe://banking.example"+want[i].path || token.GetSpiffeId() != got.GetSpiffeId() || token.GetHint() != want[i].hint {
			t.Errorf("token %d: %.60s, %v", i, got.GetSpiffeId(), err)
		}
	}
	// One byte more is no ID.
	more := &statev1.Entry{Id: "entry/d", Path: long + "a", Hosts: []string{"h1"}, Selectors: []string{"unix:uid:1"}}
	answer, err := c.Admin().ChangeEntries(ctx, &ententev1.ChangeEntriesRequest{Changes: []*statev1.EntryChange{{Action: &statev1.EntryChange_Create{Create: more}}}})
	if err != nil || !strings.Contains(answer.GetResults()[0].GetError(), "over 2048") {
		t.Errorf("an entry of 2049 bytes: %v, %v", answer, err)
	}
}

// watcher keeps what a stream brought.
type watcher struct {
	updates chan *workloadapi.X509Context
	errs    chan error
}

func (w watcher) OnX509ContextUpdate(x *workloadapi.X509Context) { w.updates <- x }
func (w watcher) OnX509ContextWatchError(err error)              { w.errs <- err }

// Changes are pushed to open streams: another entry, other selectors, and the end
// of the entitlement.
// Requirements: 166-168, 177, 188.
func TestUpdatesArePushed(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply(serviceYAML("ledger", run(myself(t))))
	h := newHost(t, c.AgentToken("h1", "dc1"), true)
	client, err := workloadapi.New(t.Context(), workloadapi.WithAddr("unix://"+h.socket))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	w := watcher{make(chan *workloadapi.X509Context, 100), make(chan error, 100)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); client.WatchX509Context(ctx, w) }()
	defer func() { cancel(); <-done }()

	next := func(want string) {
		t.Helper()
		begin := time.Now()
		for {
			select {
			case x := <-w.updates:
				if got := ids(x.SVIDs); got == want {
					t.Logf("%q after %v", want, time.Since(begin))
					return
				}
			case err := <-w.errs:
				if status.Code(err).String() == want {
					t.Logf("%q after %v", want, time.Since(begin))
					return
				}
				t.Fatalf("want %q: %v", want, err)
			case <-time.After(10 * time.Second):
				t.Fatalf("want %q: nothing comes", want)
			}
		}
	}
	next("spiffe://banking.example/ledger")
	c.Apply(serviceYAML("accounts", run(myself(t))))
	next("spiffe://banking.example/accounts spiffe://banking.example/ledger") // by entry id, always
	c.Apply(serviceYAML("accounts", run("/bin/true")))
	next("spiffe://banking.example/ledger")
	c.Apply(serviceYAML("ledger", run("/bin/true")))
	next("PermissionDenied")
	c.Apply(serviceYAML("ledger", run(myself(t))))
	next("spiffe://banking.example/ledger")
}

// A caller without the security header gets nothing, whatever it calls; with it,
// WIT-SVIDs answer Unimplemented unless they are switched on.
// Requirements: 151, 152, 156, 159-164.
func TestSecurityHeader(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply(serviceYAML("accounts", run(myself(t))))
	h := newHost(t, c.AgentToken("h1", "dc1"), true)
	api, conn := raw(t, h.socket)

	calls := map[string]func(context.Context) error{
		"FetchX509SVID": func(ctx context.Context) error {
			return first(api.FetchX509SVID(ctx, &workload.X509SVIDRequest{}))
		},
		"FetchX509Bundles": func(ctx context.Context) error {
			return first(api.FetchX509Bundles(ctx, &workload.X509BundlesRequest{}))
		},
		"FetchJWTSVID": func(ctx context.Context) error {
			_, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}})
			return err
		},
		"FetchJWTBundles": func(ctx context.Context) error {
			return first(api.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{}))
		},
		"ValidateJWTSVID": func(ctx context.Context) error {
			_, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: "b"})
			return err
		},
		"FetchWITSVID": func(ctx context.Context) error {
			return first(api.FetchWITSVID(ctx, &workload.WITSVIDRequest{}))
		},
		"FetchWITBundles": func(ctx context.Context) error {
			return first(api.FetchWITBundles(ctx, &workload.WITBundlesRequest{}))
		},
	}
	if n := len(workload.SpiffeWorkloadAPI_ServiceDesc.Methods) + len(workload.SpiffeWorkloadAPI_ServiceDesc.Streams); n != len(calls) {
		t.Errorf("the API has %d calls, %d are tried", n, len(calls))
	}
	for name, call := range calls {
		for _, values := range [][]string{nil, {"false"}, {"True"}, {""}, {"true", "true"}} {
			ctx, cancel := context.WithTimeout(withHeader(t.Context(), values...), 5*time.Second)
			if err := call(ctx); status.Code(err) != codes.InvalidArgument {
				t.Errorf("%s with header %q: %v", name, values, err)
			}
			cancel()
		}
		want := codes.OK
		switch {
		case strings.HasPrefix(name, "FetchWIT"): // not switched on (163)
			want = codes.Unimplemented
		case name == "ValidateJWTSVID": // "b" is no token
			want = codes.InvalidArgument
		}
		ctx, cancel := context.WithTimeout(withHeader(t.Context(), "true"), 5*time.Second)
		if err := call(ctx); status.Code(err) != want {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
		cancel()
	}

	// Reflection is another service on the socket: it needs no header.
	stream, err := grpc_reflection_v1.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	stream.Send(&grpc_reflection_v1.ServerReflectionRequest{MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_ListServices{}})
	answer, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range answer.GetListServicesResponse().GetService() {
		names = append(names, s.GetName())
	}
	if !slices.Contains(names, "SpiffeWorkloadAPI") {
		t.Errorf("reflection lists %v", names)
	}
	stream.CloseSend()
}

func first[M any](stream grpc.ServerStreamingClient[M], err error) error {
	if err != nil {
		return err
	}
	_, err = stream.Recv()
	return err
}

// I6: foreign roots reach the entries that federate by name, and nobody else.
// Requirements: 176, 179.
func TestForeignRoots(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	trading := catest.Start(t, catest.Options{TrustDomain: "trading.example"})
	c.Relate(trading)
	c.Apply(serviceYAML("accounts", run(myself(t))))
	h := newHost(t, c.AgentToken("h1", "dc1"), true)
	client, err := workloadapi.New(t.Context(), workloadapi.WithAddr("unix://"+h.socket))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	domains := func() (string, *x509bundle.Set) {
		t.Helper()
		got, err := client.FetchX509Context(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		bundles, err := client.FetchX509Bundles(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		names := func(set *x509bundle.Set) (list []string) {
			for _, b := range set.Bundles() {
				list = append(list, b.TrustDomain().Name())
			}
			slices.Sort(list)
			return list
		}
		if !slices.Equal(names(got.Bundles), names(bundles)) { // between two changes, or wrong
			return fmt.Sprintf("FetchX509SVID gives %v, FetchX509Bundles %v", names(got.Bundles), names(bundles)), bundles
		}
		return strings.Join(names(bundles), " "), bundles
	}
	time.Sleep(300 * time.Millisecond) // a foreign bundle would have had the time to come
	if got, _ := domains(); got != "banking.example" {
		t.Errorf("a service trusts %s", got)
	}
	c.Apply("apiVersion: entente/v1\nkind: Gateway\nmetadata: {name: gw, owner: team}\nspec: {" + run(myself(t)) + ", datacenter: dc1, address: '127.0.0.1:8443'}\n")
	eventually(t, "the gateway's bundles", func() error {
		got, bundles := domains()
		if got != "banking.example trading.example" {
			return errors.New(got)
		}
		foreign, err := bundles.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("trading.example"))
		if err != nil || !foreign.Equal(trading.Bundle()) {
			return fmt.Errorf("not the other domain's bundle: %v", err)
		}
		return nil
	})
}

// One process cannot take every stream; another one is served meanwhile.
func TestStreamsPerProcess(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply(serviceYAML("accounts", fmt.Sprintf("run: {uid: %d, hosts: [h1]}", os.Getuid())))
	h := newHost(t, c.AgentToken("h1", "dc1"), true)
	ctx, cancel := context.WithCancel(withHeader(t.Context(), "true"))
	defer cancel()
	open := func() error {
		api, _ := raw(t, h.socket)
		return first(api.FetchX509SVID(ctx, &workload.X509SVIDRequest{}))
	}
	api, _ := raw(t, h.socket)
	for i := range maxStreams {
		if i%100 == 99 {
			api, _ = raw(t, h.socket)
		}
		if err := first(api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})); err != nil {
			t.Fatalf("stream %d: %v", i, err)
		}
	}
	if err := open(); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("one more: %v", err)
	}
	cmd := exec.Command(myself(t))
	cmd.Env = append(os.Environ(), "ENTENTE_TEST_SOCKET="+h.socket)
	if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("spiffe://banking.example/accounts")) {
		t.Errorf("another process meanwhile: %s %v", out, err)
	}
	cancel()
	ctx = withHeader(t.Context(), "true")
	eventually(t, "room again", open)
}

// Before the agent is ready a caller waits a little and then is told to come back;
// on shutdown streams end the same way, and the socket goes.
// Requirements: 157.
func TestStartAndStop(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply(serviceYAML("accounts", run(myself(t))))
	token := c.AgentToken("h1", "dc1")
	c.Stop()
	h := newHost(t, token, false, func(s *Server) { s.patience = 100 * time.Millisecond })
	if got := fetch(t.Context(), h.socket); got != "Unavailable" {
		t.Errorf("before the agent is ready: %s", got)
	}
	c.Restart()
	c.WaitReady()
	eventually(t, "ready", h.agent.Ready)
	api, _ := raw(t, h.socket)
	stream, err := api.FetchX509SVID(withHeader(t.Context(), "true"), &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	h.stop()
	if took := time.Since(begin); took > drainTime {
		t.Errorf("stopped after %v", took)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("an open stream: %v", err)
	}
	if _, err := os.Stat(h.socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

func BenchmarkFetchX509SVID(b *testing.B) {
	c := catest.Start(b, catest.Options{})
	exe, _ := os.Executable()
	c.Apply(serviceYAML("accounts", run(exe)))
	dir := b.TempDir()
	cfg, err := meshagent.ReadConfig("agent.yaml", strings.NewReader(fmt.Sprintf(
		"trustDomain: banking.example\nname: h1\ndatacenter: dc1\nsettle: 20ms\ndataDir: %s\nca: {token: %s}\n", dir, c.AgentToken("h1", "dc1"))))
	if err != nil {
		b.Fatal(err)
	}
	agent, err := meshagent.New(cfg, nil)
	if err != nil {
		b.Fatal(err)
	}
	socket := filepath.Join(os.TempDir(), fmt.Sprintf("wl-bench-%d.sock", os.Getpid()))
	listener, err := Listen(socket)
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- agent.Run(ctx, meshagent.Door{Name: "w", Run: New(agent, listener, nil).Run}) }()
	defer func() { cancel(); <-ended }()
	for agent.Ready() != nil {
		time.Sleep(time.Millisecond)
	}
	for b.Loop() { // a fresh client each time: connect, attest, fetch
		if got := fetch(ctx, socket); got != "spiffe://banking.example/accounts" {
			b.Fatal(got)
		}
	}
}
