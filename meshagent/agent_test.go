package meshagent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/ca/node"
	"github.com/entente-mesh/entente/federation/bundle"
	"github.com/entente-mesh/entente/internal/peer/peertest"
)

func jwks(t *testing.T, a *peertest.Authority) []byte {
	t.Helper()
	b := bundle.Bundle{TrustDomain: a.TrustDomain(), X509: a.Bundle().X509Authorities(), Sequence: 1}
	data, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// self is the run section of a service that this test process is.
func self() string {
	exe, _ := os.Executable()
	return fmt.Sprintf("run: {uid: %d, path: %s, hosts: [h1]}", os.Getuid(), exe)
}

func serviceYAML(name, rest string) string {
	return "apiVersion: entente/v1\nkind: Service\nmetadata: {name: " + name + ", owner: team}\nspec:\n  " + strings.ReplaceAll(rest, "\n", "\n  ") + "\n---\n"
}

func configure(t *testing.T, lines ...string) *Config {
	t.Helper()
	cfg, err := ReadConfig("agent.yaml", strings.NewReader("trustDomain: banking.example\nname: h1\ndatacenter: dc1\n"+strings.Join(lines, "\n")))
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// started is an agent that runs.
type started struct {
	*Agent
	stop func() error
}

func startAgent(t *testing.T, cfg *Config, doors ...Door) *started {
	t.Helper()
	var log *slog.Logger
	if testing.Verbose() {
		log = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	a, err := New(cfg, log)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx, doors...) }()
	s := &started{a, sync.OnceValue(func() error { cancel(); return <-ended })}
	t.Cleanup(func() { s.stop() })
	return s
}

func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(15 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}

// A host attests once by its token, and from then on by its key: also when its
// SVID is of no more use. Another host cannot use the token again (I9).
func TestAttestation(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply(serviceYAML("accounts", self()))
	token := c.AgentToken("h1", "dc1")
	dir := t.TempDir()
	withToken := configure(t, "dataDir: "+dir, "ca: {token: "+token+"}")
	agent := startAgent(t, withToken)
	eventually(t, "ready", agent.Ready)
	svid, err := agent.SVIDs("service/accounts").GetX509SVID()
	if err != nil || svid.ID.String() != "spiffe://banking.example/accounts" {
		t.Fatalf("%v %v", svid, err)
	}
	if err := agent.stop(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{keyFile, knownFile} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", name, info.Mode(), err)
		}
	}

	t.Run("again without a token", func(t *testing.T) {
		agent := startAgent(t, configure(t, "dataDir: "+dir, fmt.Sprintf("ca: {addresses: [%q]}", c.Addresses()[0])))
		if agent.State().own == nil {
			t.Error("the SVID was not taken up")
		}
		eventually(t, "ready", agent.Ready)
		agent.stop()
	})
	t.Run("by the key, without the SVID", func(t *testing.T) {
		k, err := load(dir)
		if err != nil {
			t.Fatal(err)
		}
		k.Certificates = nil
		if err := k.save(dir); err != nil {
			t.Fatal(err)
		}
		agent := startAgent(t, configure(t, "dataDir: "+dir))
		if agent.State().own != nil {
			t.Fatal("control: there should be no SVID")
		}
		eventually(t, "ready", agent.Ready)
		agent.stop()
	})
	t.Run("the same key repeats its token", func(t *testing.T) {
		if err := os.Remove(filepath.Join(dir, knownFile)); err != nil { // a crash before it was written
			t.Fatal(err)
		}
		agent := startAgent(t, withToken)
		eventually(t, "ready", agent.Ready)
		agent.stop()
	})
	t.Run("another key with the token", func(t *testing.T) {
		thief, err := New(configure(t, "dataDir: "+t.TempDir(), "ca: {token: "+token+"}"), nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := thief.Run(t.Context()); !errors.Is(err, client.ErrDenied) {
			t.Errorf("a spent token: %v", err)
		}
	})
	t.Run("a token for another host", func(t *testing.T) {
		other, err := New(configure(t, "dataDir: "+t.TempDir(), "ca: {token: "+c.AgentToken("h2", "dc1")+"}"), nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := other.Run(t.Context()); !errors.Is(err, errOtherAgent) || other.State().own != nil {
			t.Errorf("h1 with the token of h2: %v", err)
		}
	})
}

// An agent that has run for long attests again at the CA nodes of now, and to none that was
// removed since its start.
func TestAttestsByTheNewestMemberTable(t *testing.T) {
	a := newAgent(t, newFakeCA(time.Hour))
	for _, id := range []string{"of its start", "of now"} {
		table := []*statev1.Member{{Id: id, ApiAddress: "a:1"}}
		a.own.memory.keep(func(k *known) { k.members, k.confirmed = table, table })
		if as := a.own.attestAs(); !sameMembers(as.Members, table) || !sameMembers(as.Confirmed, table) {
			t.Errorf("%v, confirmed %v, not %v", as.Members, as.Confirmed, table)
		}
	}
}

// Nobody who answers at the CA's address is believed without the pinned key.
func TestImpostorCA(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	other := catest.Start(t, catest.Options{}) // the same name, other keys
	token := c.AgentToken("h1", "dc1")
	cfg := configure(t, "dataDir: "+t.TempDir(), "ca: {token: "+token+"}")
	a, err := New(cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	as := a.own.attestAs()
	as.Addresses = other.Addresses()
	csr := []byte("never sent")
	if _, err := client.Attest(t.Context(), as, func([]byte) (*ententev1.AttestRequest, error) {
		t.Error("a proof was made for an impostor")
		return &ententev1.AttestRequest{}, nil
	}, csr); !errors.Is(err, client.ErrUnreachable) {
		t.Errorf("an impostor: %v", err)
	}
}

// Short lives: SVIDs are renewed, stay until their end while the CA is gone, and are
// renewed when it is back.
func TestRenewal(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{Lifetimes: node.Lifetimes{AgentSVID: 4 * time.Second}})
	c.Apply(serviceYAML("accounts", self()+"\nttl: {x509: 4s}"))
	agent := startAgent(t, configure(t, "dataDir: "+t.TempDir(), "ca: {token: "+c.AgentToken("h1", "dc1")+"}"))
	eventually(t, "ready", agent.Ready)
	source := agent.SVIDs("service/accounts")
	current := func() string {
		svid, err := source.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		return svid.Certificates[0].SerialNumber.String()
	}
	own := func() string { return agent.State().own.Certificates[0].SerialNumber.String() }
	first, firstOwn := current(), own()
	eventually(t, "renewed", func() error {
		if current() == first || own() == firstOwn {
			return errors.New("not yet")
		}
		return nil
	})
	c.Stop()
	// What was asked for before the end may still come.
	time.Sleep(100 * time.Millisecond)
	last := current()
	time.Sleep(500 * time.Millisecond)
	if current() != last || len(agent.State().Identities) != 1 {
		t.Error("without a CA something has changed")
	}
	time.Sleep(4 * time.Second) // the agent's own SVID ends meanwhile
	if _, err := source.GetX509SVID(); err == nil {
		t.Error("the SVID is still there after its end")
	}
	c.Restart()
	eventually(t, "renewed after the CA came back", func() error {
		_, err := source.GetX509SVID()
		return err
	})
	if current() == last {
		t.Error("it is the one of before")
	}
}

// Services that listen are reported with their health, and withdrawn on the way out.
func TestHealth(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	var mu sync.Mutex
	status := http.StatusOK
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if r.URL.Path != "/healthz" || r.Host != "accounts.banking.example" {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		w.WriteHeader(status)
	}))
	defer app.Close()
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	port := func(addr net.Addr) string { return fmt.Sprint(addr.(*net.TCPAddr).Port) }
	c.Apply(serviceYAML("accounts", self()+"\nport: "+port(app.Listener.Addr())+"\nhealth: {http: /healthz}") +
		serviceYAML("ledger", self()+"\nport: "+port(plain.Addr())) +
		serviceYAML("caller", self()))

	agent := startAgent(t, configure(t, "dataDir: "+t.TempDir(), "ca: {token: "+c.AgentToken("h1", "dc1")+"}",
		"sidecar: {inbound: '127.0.0.1:7443'}", "health: {interval: 100ms, timeout: 500ms}"))
	expect := func(want string) {
		t.Helper()
		begin := time.Now()
		eventually(t, want, func() error {
			var got []string
			for _, i := range c.Status().GetInstances() {
				state := "bad"
				if i.GetHealth() == ententev1.Health_HEALTH_HEALTHY {
					state = "good"
				}
				got = append(got, i.GetService()+"@"+i.GetAgent()+" "+i.GetAddress()+" "+state)
			}
			slices.Sort(got)
			if s := strings.Join(got, ", "); s != want {
				return errors.New(s)
			}
			return nil
		})
		t.Logf("%s: after %v", want, time.Since(begin))
	}
	set := func(code int) {
		mu.Lock()
		defer mu.Unlock()
		status = code
	}
	expect("accounts@h1 127.0.0.1:7443 good, ledger@h1 127.0.0.1:7443 good")
	set(http.StatusServiceUnavailable)
	plain.Close()
	expect("accounts@h1 127.0.0.1:7443 bad, ledger@h1 127.0.0.1:7443 bad")
	set(http.StatusNoContent)
	expect("accounts@h1 127.0.0.1:7443 good, ledger@h1 127.0.0.1:7443 bad")
	c.Apply(serviceYAML("ledger", self()))
	expect("accounts@h1 127.0.0.1:7443 good")
	if err := agent.stop(); err != nil {
		t.Error(err)
	}
	expect("")
}

// The owner of a loopback connection is held against the entry's selectors of now.
func TestAttestConnections(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply(serviceYAML("mine", self()) + serviceYAML("other", fmt.Sprintf("run: {uid: %d, path: /bin/true, hosts: [h1]}", os.Getuid())))
	agent := startAgent(t, configure(t, "dataDir: "+t.TempDir(), "ca: {token: "+c.AgentToken("h1", "dc1")+"}"))
	eventually(t, "ready", agent.Ready)

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dialled, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer dialled.Close()
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := errors.Join(agent.AttestCaller(conn, "service/mine"), agent.AttestApplication(dialled, "service/mine")); err != nil {
		t.Errorf("control: %v", err)
	}
	for _, id := range []string{"service/other", "service/none", ""} {
		if agent.AttestCaller(conn, id) == nil {
			t.Errorf("the connection passed for %q", id)
		}
		if agent.AttestApplication(dialled, id) == nil {
			t.Errorf("the application passed for %q", id)
		}
	}

	// The selectors change: so does the answer, on the next connection.
	c.Apply(serviceYAML("mine", fmt.Sprintf("run: {uid: %d, path: /bin/true, hosts: [h1]}", os.Getuid())))
	eventually(t, "refused by the new selectors", func() error {
		if agent.AttestCaller(conn, "service/mine") == nil {
			return errors.New("still accepted")
		}
		return nil
	})
}

// Doors start in order and stop in reverse order, one after the other; one that
// fails stops the agent.
func TestDoors(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	token := c.AgentToken("h1", "dc1")
	dir := t.TempDir()
	var mu sync.Mutex
	var story []string
	tell := func(what string) {
		mu.Lock()
		defer mu.Unlock()
		story = append(story, what)
	}
	door := func(name string, begun chan<- struct{}) Door {
		return Door{Name: name, Run: func(ctx context.Context) error {
			close(begun)
			<-ctx.Done()
			tell(name + " asked")
			time.Sleep(20 * time.Millisecond)
			tell(name + " ended")
			return nil
		}}
	}
	one, two := make(chan struct{}), make(chan struct{})
	cfg := configure(t, "dataDir: "+dir, "ca: {token: "+token+"}", "admin: {listen: '127.0.0.1:0'}")
	agent := startAgent(t, cfg, door("one", one), door("two", two))
	<-one
	<-two
	if err := agent.stop(); err != nil {
		t.Error(err)
	}
	if got := strings.Join(story, ", "); got != "two asked, two ended, one asked, one ended" {
		t.Error(got)
	}

	broken := errors.New("broken")
	three := make(chan struct{})
	again, err := New(cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = again.Run(t.Context(), door("three", three), Door{Name: "four", Run: func(context.Context) error { <-three; return broken }})
	if !errors.Is(err, broken) || !strings.Contains(err.Error(), "four") {
		t.Errorf("a door fails: %v", err)
	}
	if got := story[len(story)-1]; got != "three ended" {
		t.Errorf("last: %s", got)
	}
}

func TestNewRefuses(t *testing.T) {
	dir := t.TempDir()
	if _, err := New(configure(t, "dataDir: "+dir), nil); err == nil || !strings.Contains(err.Error(), "entente token create") {
		t.Errorf("without a token: %v", err)
	}
	if err := os.Chmod(filepath.Join(dir, keyFile), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := New(configure(t, "dataDir: "+dir), nil); err == nil || !strings.Contains(err.Error(), "mode 0644") {
		t.Errorf("a key that others may read: %v", err)
	}
	os.Chmod(filepath.Join(dir, keyFile), 0o600)
	os.WriteFile(filepath.Join(dir, keyFile), []byte("nonsense"), 0o600)
	if _, err := New(configure(t, "dataDir: "+dir), nil); err == nil || !strings.Contains(err.Error(), "no PEM private key") {
		t.Errorf("a damaged key: %v", err)
	}
	os.WriteFile(filepath.Join(dir, knownFile), []byte("{"), 0o600)
	if _, err := New(configure(t, "dataDir: "+dir), nil); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("damaged knowledge: %v", err)
	}
	if _, err := New(configure(t, "dataDir: "+t.TempDir(), "ca: {token: entente-join-nonsense}"), nil); err == nil {
		t.Error("a token that is none was taken")
	}
}

func TestReadConfig(t *testing.T) {
	const good = "trustDomain: banking.example\nname: h1\ndatacenter: dc1\ndataDir: /d\n"
	cfg := configure(t, "dataDir: /d", "sidecar: {inbound: 127.1.0.5:7443}")
	if cfg.Sidecar.Advertise != "127.1.0.5:7443" || cfg.Sidecar.AppAddress != "127.0.0.1" || cfg.Health.Interval != time.Second || cfg.WorkloadAPI.Socket == "" {
		t.Errorf("defaults: %+v", cfg)
	}
	if app, err := cfg.App(8080); err != nil || app != "127.0.0.1:8080" {
		t.Errorf("%v %v", app, err)
	}
	cfg = configure(t, "dataDir: /d", "sidecar: {inbound: 127.0.0.1:7443, portOffset: 40000}")
	if app, err := cfg.App(8080); err != nil || app != "127.0.0.1:48080" || cfg.Sidecar.Advertise != "127.0.0.1:7443" {
		t.Errorf("%v %v, reported at %s", app, err, cfg.Sidecar.Advertise)
	}
	if app, err := cfg.App(0); err == nil {
		t.Errorf("no port is %s", app)
	}
	for text, want := range map[string]string{
		"trustDomain: banking.example\nname: h1\ndatacenter: dc1\n":         "dataDir",
		good + "sidecar: {inbund: '127.0.0.1:1'}\n":                         "did you mean",
		good + "sidecar: {inbound: '0.0.0.0:7443'}\n":                       "advertise",
		good + "sidecar: {inbound: nonsense}\n":                             "agent.yaml:5",
		good + "sidecar: {appAddress: 192.0.2.1}\n":                         "not a loopback address",
		good + "sidecar: {portOffset: 40001}\n":                             "portOffset",
		good + "sidecar: {portOffset: -1}\n":                                "portOffset",
		good + "ca: {addresses: [nowhere]}\n":                               "agent.yaml:5",
		good + "ca: {token: a, tokenFile: b}\n":                             "give one of them",
		good + "health: {interval: 1ms}\n":                                  "interval",
		good + "workloadAPI: {socket: /" + strings.Repeat("x", 200) + "}\n": "103 bytes",
		strings.Replace(good, "name: h1", "name: H1", 1):                    "agent.yaml:2",
		strings.Replace(good, "banking.example", "Bank", 1):                 "agent.yaml:1",
	} {
		if _, err := ReadConfig("agent.yaml", strings.NewReader(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q:\n%v\nwant a complaint with %q", text, err, want)
		}
	}
}
