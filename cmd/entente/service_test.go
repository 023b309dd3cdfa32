//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/internal/daemon/daemontest"
)

// application is a program that serves at a host.
type application struct {
	port    int
	asked   atomic.Int64
	waiting atomic.Int64
	slow    chan struct{} // requests to /slow wait for it
}

func newApplication(t *testing.T) *application {
	r := &application{slow: make(chan struct{})}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r.port = l.Addr().(*net.TCPAddr).Port
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		r.asked.Add(1)
		if q.URL.Path == "/slow" {
			r.waiting.Add(1)
			<-r.slow
		}
		io.WriteString(w, "served")
	})}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	return r
}

// expectEntente runs a command line until it prints what is wanted, with the wanted exit code.
func expectEntente(t *testing.T, code int, want []string, args ...string) string {
	t.Helper()
	for begin := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		out, got := entente(t, args...)
		missing := ""
		for _, text := range want {
			if !strings.Contains(out, text) {
				missing = text
			}
		}
		if got == code && missing == "" {
			return out
		}
		if time.Since(begin) > 20*time.Second {
			t.Fatalf("%v: exit code %d, want %d; no %q in\n%s", args, got, code, missing, out)
		}
	}
}

// Two hosts serve under load. One is drained by command, put back, and at last its agent is
// stopped: no request fails, those under way end, and a drained host gets none.
func TestDrain(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out := daemontest.FreePort(t)
	one, two := newApplication(t), newApplication(t)
	c.Apply(fmt.Sprintf(`apiVersion: entente/v1
kind: Service
metadata: {name: web, owner: t}
spec: {run: {uid: %[1]d, path: %[2]s, hosts: [h1, h2]}, port: %[3]d}
---
apiVersion: entente/v1
kind: Service
metadata: {name: caller, owner: t}
spec: {run: {uid: %[1]d, path: %[2]s, hosts: [h1]}, outbound: {port: %[4]d}, calls: [web]}
`, os.Getuid(), exe, one.port, out))
	hostNamed(t, c, "h1")
	socket, _, stop := hostNamed(t, c, "h2", fmt.Sprintf("services: [{service: web, port: %d}]", two.port))

	client := &http.Client{Timeout: 30 * time.Second}
	get := func(path string) error {
		request, err := http.NewRequestWithContext(t.Context(), "GET", fmt.Sprintf("http://127.0.0.1:%d%s", out, path), nil)
		if err != nil {
			return err
		}
		request.Host = "web.banking.example"
		response, err := client.Do(request)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if text, err := io.ReadAll(response.Body); err != nil || response.StatusCode != 200 {
			return fmt.Errorf("%s: %s %v", response.Status, text, err)
		}
		return nil
	}
	until := func(what string, check func() bool) {
		t.Helper()
		for begin := time.Now(); !check(); time.Sleep(5 * time.Millisecond) {
			if time.Since(begin) > 20*time.Second {
				t.Fatal(what)
			}
		}
	}
	until("it is never served at h2", func() bool { return get("/") == nil && two.asked.Load() > 0 })

	ctx, cancel := context.WithCancel(t.Context())
	var load sync.WaitGroup
	var failed atomic.Int64
	for range 4 {
		load.Go(func() {
			for ctx.Err() == nil {
				if err := get("/"); err != nil && failed.Add(1) == 1 {
					t.Error("a request failed: ", err)
				}
				time.Sleep(2 * time.Millisecond)
			}
		})
	}
	defer func() { cancel(); load.Wait() }()
	more := func(r *application) func() bool {
		n := r.asked.Load() + 10
		return func() bool { return r.asked.Load() >= n }
	}
	until("control: it gets no load", more(two))

	// One request is under way at h2; at h1 it would have ended at once.
	close(one.slow)
	slow := make(chan error, 1)
	until("no slow request comes to h2", func() bool {
		go func() { slow <- get("/slow") }()
		for two.waiting.Load() == 0 {
			select {
			case <-slow: // h1's
				return false
			case <-time.After(time.Millisecond):
			}
		}
		return true
	})

	drained := make(chan int, 1)
	drain := exec.Command(exe, "service", "drain", "web", "--within", "20s", "--socket", socket)
	drain.Env = append(os.Environ(), "ENTENTE_TEST_PROGRAM=entente")
	go func() { drain.Run(); drained <- drain.ProcessState.ExitCode() }()
	expectEntente(t, exitOK, []string{"draining"}, "service", "list", "--socket", socket)
	until("no new request goes to h1", more(one))
	select {
	case code := <-drained:
		t.Fatalf("it does not wait for the request under way: %d", code)
	case err := <-slow:
		t.Fatal("the slow request has ended: ", err)
	default:
	}
	close(two.slow)
	if err := <-slow; err != nil {
		t.Error("the request under way: ", err)
	}
	if code := <-drained; code != exitOK {
		t.Errorf("exit code %d", code)
	}
	expectEntente(t, exitOK, []string{"drained"}, "service", "list", "--socket", socket)
	asked := two.asked.Load()
	until("nothing goes to h1", more(one))
	if now := two.asked.Load(); now != asked {
		t.Errorf("%d requests at a drained host", now-asked)
	}

	expectEntente(t, exitOK, nil, "service", "restore", "web", "--socket", socket)
	until("it is not put back", more(two))
	if out, code := entente(t, "service", "restore", "web", "--socket", socket); code != exitRefused || !strings.Contains(out, "not drained") {
		t.Errorf("%d: %s", code, out)
	}

	stop() // SIGTERM of the agent
	asked = two.asked.Load()
	until("nothing goes to h1", more(one))
	if now := two.asked.Load(); now != asked {
		t.Errorf("%d requests at a host without an agent", now-asked)
	}
}

// On SIGTERM a run drains: the request under way ends, although the program would end at once.
func TestRunDrains(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	socket, _ := host(t, c)
	start := func(service string, more ...string) (cmd *exec.Cmd, log *strings.Builder, answered chan error) {
		out := daemontest.FreePort(t)
		c.Apply(fmt.Sprintf("apiVersion: entente/v1\nkind: Service\nmetadata: {name: calls-%[4]s, owner: t}\nspec: {run: {uid: %[1]d, path: %[2]s, hosts: [h1]}, outbound: {port: %[3]d}}\n", os.Getuid(), exe, out, service))
		args := append([]string{"run", "--domain", "banking.example", "--service", service, "--port", fmt.Sprint(daemontest.FreePort(t)), "--agent-socket", socket, "--ca-socket", c.Socket()}, more...)
		cmd = exec.Command(exe, append(args, "--", "env", "ENTENTE_TEST_PROGRAM=slow", exe)...)
		cmd.Env = append(os.Environ(), "ENTENTE_TEST_PROGRAM=entente")
		log = &strings.Builder{}
		cmd.Stderr = log
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		expectEntente(t, exitOK, []string{service + "  ", "healthy"}, "service", "list", "--socket", socket)
		expect := func() error {
			request, err := http.NewRequest("POST", fmt.Sprintf("http://127.0.0.1:%d/", out), strings.NewReader("not to be repeated"))
			if err != nil {
				return err
			}
			request.Host = service + ".banking.example"
			response, err := http.DefaultClient.Do(request)
			if err != nil {
				return err
			}
			defer response.Body.Close()
			if text, err := io.ReadAll(response.Body); err != nil || string(text) != "served" {
				return fmt.Errorf("%s: %s %v", response.Status, text, err)
			}
			return nil
		}
		for begin := time.Now(); ; time.Sleep(20 * time.Millisecond) {
			if err = expect(); err == nil {
				break
			}
			if time.Since(begin) > 20*time.Second {
				t.Fatalf("%v\n%s", err, log)
			}
		}
		answered = make(chan error, 1)
		go func() { answered <- expect() }()
		expectEntente(t, exitOK, []string{`"requests": 1`}, "service", "list", "--json", "--socket", socket)
		return cmd, log, answered
	}
	cmd, log, answered := start("cart")
	cmd.Process.Signal(syscall.SIGTERM)
	if err := <-answered; err != nil {
		t.Errorf("the request under way: %v", err)
	}
	if cmd.Wait(); cmd.ProcessState.ExitCode() != 128+int(syscall.SIGTERM) {
		t.Errorf("exit code %d\n%s", cmd.ProcessState.ExitCode(), log)
	}
	if list, code := entente(t, "service", "list", "--socket", socket); code != exitOK || strings.Contains(list, "cart ") {
		t.Errorf("%d\n%s", code, list)
	}

	cmd, _, answered = start("basket", "--drain", "0s") // the control
	cmd.Process.Signal(syscall.SIGTERM)
	if err := <-answered; err == nil {
		t.Error("control: without a drain the request has ended all the same")
	}
	cmd.Wait()
}

// The verbs as an administrator types them: what they print, and the exit codes.
func TestServiceVerbs(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for files to rest; the registry's own test does so in virtual time")
	}
	c := catest.Start(t, catest.Options{})
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	at, elsewhere := newApplication(t), newApplication(t)
	c.Apply(fmt.Sprintf("apiVersion: entente/v1\nkind: Service\nmetadata: {name: web, owner: t}\nspec: {run: {uid: %d, path: %s, hosts: [h1]}, port: %d}\n", os.Getuid(), exe, at.port) +
		"---\napiVersion: entente/v1\nkind: Service\nmetadata: {name: ledger, owner: t}\nspec: {run: {uid: 4711, hosts: [h2]}, port: 9}\n")
	drops := t.TempDir()
	os.Chmod(drops, 0o755)
	socket, _ := host(t, c, "servicesDir: "+drops)
	list := []string{"service", "list", "--socket", socket}
	with := func(args ...string) []string { return append(append([]string{"service"}, args...), "--socket", socket) }
	expectEntente(t, exitOK, []string{"web", "healthy", "tcp", "catalogue", fmt.Sprint(at.port)}, list...)

	expectEntente(t, exitOK, []string{"h1 of banking.example", "READY", "yes", "service/web", "spiffe://banking.example/web"}, "agent", "status", "--socket", socket)
	expectEntente(t, exitOK, []string{`"agent": "h1"`}, "agent", "status", "--socket", socket, "--json")
	expectEntente(t, exitUnreachable, []string{"no agent answers"}, "agent", "status", "--socket", socket+".not")

	register := with("register", "web", "--port", fmt.Sprint(elsewhere.port), "--http", "/healthz", "--interval", "200ms")
	expectEntente(t, exitOK, []string{"command", "http /healthz", fmt.Sprint(elsewhere.port)}, register...)
	expectEntente(t, exitOK, []string{"healthy", fmt.Sprint(elsewhere.port)}, list...)
	expectEntente(t, exitOK, []string{"command /bin/test -n x"}, "service", "register", "web", "--socket", socket, "--command", "--", "/bin/test", "-n", "x")

	expectEntente(t, exitOK, []string{"/run/web/http.sock", "command"}, with("register", "web", "--listen-socket", "/run/web/http.sock")...)
	expectEntente(t, exitUsage, []string{"give one of them"}, with("register", "web", "--listen-socket", "/run/web/http.sock", "--port", "1")...)
	expectEntente(t, exitUsage, []string{"absolute path"}, with("register", "web", "--listen-socket", "http.sock")...)

	expectEntente(t, exitRefused, []string{"no entry places service ledger on host h1", "entente apply"}, with("register", "ledger")...)
	expectEntente(t, exitRefused, []string{"no entry places", "entente apply"}, with("drain", "ledger")...)
	expectEntente(t, exitUsage, []string{"label"}, with("register", "WEB")...)
	expectEntente(t, exitUsage, []string{"loopback"}, with("register", "web", "--address", "10.0.0.1")...)
	expectEntente(t, exitUsage, []string{"give one of them"}, with("register", "web", "--tcp", "--http", "/x")...)
	expectEntente(t, exitUsage, []string{"--command"}, with("register", "web", "--command")...)
	expectEntente(t, exitUsage, []string{"100ms"}, with("register", "web", "--interval", "1ms")...)
	expectEntente(t, exitUsage, nil, with("drain")...)
	expectEntente(t, exitUnreachable, []string{"no agent answers"}, "service", "list", "--socket", socket+".not")

	// A file that does not count beside the command, then does.
	file := filepath.Join(drops, "web.yaml")
	text := fmt.Sprintf("services:\n- service: web\n  port: %d\n  health: {tcp: true}\n- service: ledger\n", at.port)
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	expectEntente(t, exitOK, nil, "service", "validate", file)
	expectEntente(t, exitOK, []string{"(" + file + ":2)", "refused", file + ":5", "no entry places service ledger"}, list...)
	expectEntente(t, exitOK, []string{file + ":2", "tcp"}, with("deregister", "web")...)
	expectEntente(t, exitRefused, []string{"take it out there", file}, with("deregister", "web")...)

	if err := os.WriteFile(file, []byte("services:\n- service: web\n  prot: 1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	expectEntente(t, exitFindings, []string{file + ":3", `did you mean "port"`}, "service", "validate", file)
	expectEntente(t, exitFindings, []string{file + ":2", "healthy", "last good state stays", file + ":3", `"prot"`}, list...)
	expectEntente(t, exitOK, []string{"ready", "last good", file + ":3"}, "agent", "healthcheck", "--socket", socket)
	os.Remove(file)
	expectEntente(t, exitOK, []string{"catalogue"}, list...)
}

// An application that dies between two checks is reported as soon as requests show it, and
// comes back by a check.
func TestOutlier(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out, port := daemontest.FreePort(t), daemontest.FreePort(t)
	serve := func() *http.Server {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			t.Fatal(err)
		}
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "served") })}
		go server.Serve(l)
		t.Cleanup(func() { server.Close() })
		return server
	}
	c.Apply(fmt.Sprintf("apiVersion: entente/v1\nkind: Service\nmetadata: {name: web, owner: t}\nspec: {run: {uid: %d, path: %s, hosts: [h1]}, port: %d, outbound: {port: %d}}\n", os.Getuid(), exe, port, out))
	app := serve()
	socket, _ := host(t, c, "services: [{service: web, health: {tcp: true, interval: 1h}}]")
	expectEntente(t, exitOK, []string{" healthy"}, "service", "list", "--socket", socket)
	ask := func() int {
		request, err := http.NewRequestWithContext(t.Context(), "GET", fmt.Sprintf("http://127.0.0.1:%d/", out), nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Host = "web.banking.example"
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			return 0
		}
		response.Body.Close()
		return response.StatusCode
	}
	for begin := time.Now(); ask() != 200; time.Sleep(10 * time.Millisecond) {
		if time.Since(begin) > 20*time.Second {
			t.Fatal("it is never served")
		}
	}
	app.Close()
	for range 10 {
		if code := ask(); code == 200 {
			t.Fatal("control: the application still answers")
		}
	}
	expectEntente(t, exitOK, []string{"unhealthy", "in a row went wrong", "connection refused"}, "service", "list", "--socket", socket)
	serve()
	expectEntente(t, exitOK, nil, "service", "register", "web", "--interval", "100ms", "--socket", socket)
	expectEntente(t, exitOK, []string{" healthy"}, "service", "list", "--socket", socket)
}

// SIGHUP has the agent read its directory, and nothing else happens to it.
func TestHangup(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "hup") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	file, drops, socket := filepath.Join(dir, "agent.yaml"), filepath.Join(dir, "services.d"), filepath.Join(dir, "data", "admin.sock")
	text := fmt.Sprintf("trustDomain: banking.example\nname: h1\ndatacenter: dc1\ndataDir: %s\nca: {token: %s}\nworkloadAPI: {socket: %s}\nsidecar: {inbound: \"127.0.0.1:%d\"}\nservicesDir: %s\n",
		filepath.Join(dir, "data"), c.AgentToken("h1", "dc1", "127.0.0.1"), filepath.Join(dir, "api.sock"), daemontest.FreePort(t), drops)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	agent := exec.Command(exe, "agent", "run", "--config", file)
	agent.Env = append(os.Environ(), "ENTENTE_TEST_PROGRAM=entente")
	log := &strings.Builder{}
	agent.Stderr = log
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { agent.Process.Kill() })
	expectEntente(t, exitOK, []string{"is ready"}, "agent", "healthcheck", "--socket", socket)
	if err := os.Mkdir(drops, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(drops, "web.yaml"), []byte("services: [{service: web}]\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	agent.Process.Signal(syscall.SIGHUP)
	expectEntente(t, exitOK, []string{"web", "refused", "web.yaml:1"}, "service", "list", "--socket", socket)
	agent.Process.Signal(syscall.SIGTERM)
	if err := agent.Wait(); err != nil || !strings.Contains(log.String(), "opened or read again") {
		t.Errorf("%v\n%s", err, log)
	}
}
