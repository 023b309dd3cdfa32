//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/internal/daemon/daemontest"
	"github.com/entente-mesh/entente/meshagent"
	"github.com/entente-mesh/entente/meshagent/admin"
	"github.com/entente-mesh/entente/meshagent/sidecar"
)

// programs are what the test binary is when `entente run` starts it.
var programs = map[string]func() int{
	// serve answers with who called, and ends when it is told to.
	"serve": func() int {
		http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, r.Header.Get("X-Forwarded-Client-Cert"))
		})
		http.HandleFunc("/end", func(http.ResponseWriter, *http.Request) { os.Exit(23) })
		fmt.Fprintln(os.Stderr, http.ListenAndServe(os.Getenv("ENTENTE_LISTEN"), nil))
		return 1
	},
	// call asks cart by name, as http_proxy leads it.
	"call": func() int {
		for range 200 {
			answer, err := http.Get("http://cart.banking.example/")
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
			text, _ := io.ReadAll(answer.Body)
			answer.Body.Close()
			if answer.StatusCode == 200 && strings.Contains(string(text), "URI=spiffe://banking.example/probe") {
				return 5
			}
			time.Sleep(25 * time.Millisecond)
		}
		return 2
	},
	// resolve asks the agent's DNS for cart and calls what it is told.
	"resolve": func() int {
		resolver := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, os.Getenv("ENTENTE_TEST_DNS"))
		}}
		client := &http.Client{Transport: &http.Transport{DialContext: (&net.Dialer{Resolver: resolver}).DialContext}}
		tries := 200
		if os.Getenv("ENTENTE_OUTBOUND") == "" {
			tries = 5 // started by nobody's run: it is not to succeed
		}
		for range tries {
			answer, err := client.Get("http://cart.banking.example:" + os.Getenv("ENTENTE_TEST_PORT") + "/")
			if err == nil {
				text, _ := io.ReadAll(answer.Body)
				answer.Body.Close()
				if answer.StatusCode == 200 && strings.HasSuffix(string(text), "URI=spiffe://banking.example/probe") {
					return 6
				}
			}
			time.Sleep(25 * time.Millisecond)
		}
		return 2
	},
	// dial asks the agent's DNS for ledger, and it for what it sends back.
	"dial": func() int {
		resolver := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, os.Getenv("ENTENTE_TEST_DNS"))
		}}
		tries := 200
		if os.Getenv("ENTENTE_OUTBOUND") == "" {
			tries = 5
		}
		for range tries {
			conn, err := (&net.Dialer{Resolver: resolver}).Dial("tcp", "ledger.banking.example:"+os.Getenv("ENTENTE_TEST_PORT"))
			if err == nil {
				io.WriteString(conn, "select")
				conn.(*net.TCPConn).CloseWrite()
				text, err := io.ReadAll(conn)
				conn.Close()
				if err == nil && string(text) == "select" {
					return 7
				}
			}
			time.Sleep(25 * time.Millisecond)
		}
		return 2
	},
	// slow takes its time to answer, and none to end.
	"slow": func() int {
		http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
			time.Sleep(500 * time.Millisecond)
			io.WriteString(w, "served")
		})
		fmt.Fprintln(os.Stderr, http.ListenAndServe(os.Getenv("ENTENTE_LISTEN"), nil))
		return 1
	},
	"entente": func() int { return run(append([]string{"entente"}, os.Args[1:]...)) },
	"signalled": func() int {
		syscall.Kill(os.Getppid(), syscall.SIGHUP) // comes back as ours, and ends us
		time.Sleep(10 * time.Second)
		return 1
	},
}

func TestMain(m *testing.M) {
	if program := programs[os.Getenv("ENTENTE_TEST_PROGRAM")]; program != nil {
		os.Exit(program())
	}
	os.Exit(m.Run())
}

// host runs the agent of h1 with its admin socket and its sidecar.
func host(t *testing.T, c *catest.CA, more ...string) (socket, dns string) {
	t.Helper()
	socket, dns, _ = hostNamed(t, c, "h1", more...)
	return socket, dns
}

func hostNamed(t *testing.T, c *catest.CA, name string, more ...string) (socket, dns string, stop func()) {
	t.Helper()
	dir, err := os.MkdirTemp("", "run") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cfg, err := meshagent.ReadConfig("agent.yaml", strings.NewReader(fmt.Sprintf(
		"trustDomain: banking.example\nname: %s\ndatacenter: dc1\ndataDir: %s\nca: {token: %s}\nsidecar: {inbound: \"%s\"}\nhealth: {interval: 100ms}\n"+strings.Join(more, "\n"),
		name, filepath.Join(dir, "data"), c.AgentToken(name, "dc1", "127.0.0.1"), daemontest.FreeAddress(t))))
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	agent, err := meshagent.New(cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	doors := []meshagent.Door{}
	named, resolver, err := openNames(cfg, agent, log)
	if err != nil {
		t.Fatal(err)
	}
	if resolver != nil {
		dns = resolver.Addr()
		doors = append(doors, meshagent.Door{Name: "DNS", Run: resolver.Run})
	}
	car, err := sidecar.New(sidecar.Config{Names: named, TrustDomain: cfg.Domain(), Datacenter: cfg.Datacenter, Agent: cfg.Name,
		Inbound: cfg.Sidecar.Inbound, AppAddress: cfg.Sidecar.AppAddress, Log: log}, agent)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := admin.Listen(cfg.Admin.Socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	doors = append(doors, meshagent.Door{Name: "admin", Run: admin.New(agent, listener, log).Run}, meshagent.Door{Name: "sidecar", Run: car.Run},
		meshagent.Door{Name: "sidecar's view", Run: func(ctx context.Context) error { return follow(ctx, agent, car, log) }})
	go func() { ended <- agent.Run(ctx, doors...) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return cfg.Admin.Socket, dns, stop
}

// A program serves and another one calls it, each with its own identity though they
// are one executable of one user; exit codes and signals go through; nothing is left.
func TestRun(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	socket, _ := host(t, c)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	port := daemontest.FreePort(t)
	start := func(program, service string, more ...string) int {
		args := append([]string{"entente", "run", "--domain", "banking.example", "--service", service, "--agent-socket", socket, "--ca-socket", c.Socket()}, more...)
		return run(append(args, "--", "env", "ENTENTE_TEST_PROGRAM="+program, self))
	}
	served := make(chan int, 1)
	go func() { served <- start("serve", "cart", "--port", fmt.Sprint(port)) }()
	called := make(chan int, 1)
	// One registration per process and id, so both may run in this one.
	go func() { called <- start("call", "probe") }()
	if code := <-called; code != 5 {
		t.Errorf("the caller ended with %d", code)
	}
	if code := start("call", "cart"); code != exitRefused {
		t.Errorf("a name that is taken: %d", code)
	}
	if _, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/end", port)); err == nil {
		t.Error("it did not end")
	}
	if code := <-served; code != 23 {
		t.Errorf("the server ended with %d", code)
	}
	if code := start("signalled", "cart"); code != 128+int(syscall.SIGHUP) {
		t.Errorf("a signal: %d", code)
	}
	// What was declared is gone: the name is free again, and the domain is as it was.
	if code := run([]string{"entente", "run", "--domain", "banking.example", "--service", "cart", "--agent-socket", socket, "--ca-socket", c.Socket(), "--", "true"}); code != exitOK {
		t.Errorf("after all that: %d", code)
	}
}

// A program that knows nothing of a mesh calls a service by its name and is that
// caller; one without an identity gets the same answers from DNS and no connection.
func TestNamesThatResolve(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	application, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, r.Header.Get("X-Forwarded-Client-Cert"))
	})}
	go server.Serve(application)
	defer server.Close()
	port := daemontest.FreePort(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), "other")
	if err := os.Link(self, other); err != nil {
		text, err := os.ReadFile(self)
		if err == nil {
			err = os.WriteFile(other, text, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	ledger, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ledger.Close()
	go func() {
		for {
			conn, err := ledger.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				io.Copy(conn, conn)
			}()
		}
	}()
	at := func(l net.Listener) int { return l.Addr().(*net.TCPAddr).Port }
	c.Apply(fmt.Sprintf("apiVersion: entente/v1\nkind: Service\nmetadata: {name: cart, owner: t}\nspec: {run: {uid: %[1]d, path: %[2]s, hosts: [h1]}, port: %[3]d}\n---\n"+
		"apiVersion: entente/v1\nkind: Service\nmetadata: {name: ledger, owner: t}\nspec: {run: {uid: %[1]d, path: %[2]s, hosts: [h1]}, port: %[4]d, protocol: tcp}\n",
		os.Getuid(), self, at(application), at(ledger)))
	socket, dns := host(t, c, fmt.Sprintf("dns: {listen: \"127.0.0.1:0\", network: 127.83.0.0/16, httpPort: %d}\n", port))
	t.Setenv("ENTENTE_TEST_DNS", dns)
	for _, test := range []struct {
		program string
		port    int
		want    int
	}{{"resolve", port, 6}, {"resolve", at(application), 6}, {"dial", at(ledger), 7}} {
		t.Setenv("ENTENTE_TEST_PORT", fmt.Sprint(test.port))
		code := run([]string{"entente", "run", "--domain", "banking.example", "--service", "probe", "--proxy=false", "--agent-socket", socket, "--ca-socket", c.Socket(),
			"--", "env", "ENTENTE_TEST_PROGRAM=" + test.program, other})
		if code != test.want {
			t.Errorf("%s at port %d: %d", test.program, test.port, code)
		}
		// The run has ended, and with it the identity.
		stranger := exec.Command(other)
		stranger.Env = append(os.Environ(), "ENTENTE_TEST_PROGRAM="+test.program)
		if err := stranger.Run(); stranger.ProcessState.ExitCode() != 2 {
			t.Errorf("a stranger, %s at port %d: %v", test.program, test.port, err)
		}
	}
}

func TestRunRefuses(t *testing.T) {
	none := filepath.Join(t.TempDir(), "none.sock")
	for _, test := range []struct {
		args string
		want int
	}{
		{"run --domain a.example --service x true", exitUsage},
		{"run --domain a.example --service x --", exitUsage},
		{"run --domain a.example --service X -- true", exitUsage},
		{"run --domain A/b --service x -- true", exitUsage},
		{"run --domain a.example --service x -- /no/such/program", exitUsage},
		{"run --domain a.example --service x --agent-socket " + none + " --ca-socket " + none + " -- true", exitUnreachable},
		{"agent explain-pid", exitUsage},
		{"agent explain-pid x", exitUsage},
		{"agent explain-pid 1 --socket " + none, exitUnreachable},
		{"agent healthcheck --socket " + none, exitUnreachable},
	} {
		if code := run(append([]string{"entente"}, strings.Fields(test.args)...)); code != test.want {
			t.Errorf("%s: %d", test.args, code)
		}
	}
}
