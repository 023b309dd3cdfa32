package scenarios

import (
	"context"
	"crypto/tls"
	"errors"
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

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/node"
	"github.com/entente-mesh/entente/internal/daemon/daemontest"
)

// freePort is one that is free with offset as well.
func freePort(t *testing.T, offset int) int {
	for range 100 {
		number := daemontest.FreePort(t)
		two, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", number+offset))
		if err == nil {
			two.Close()
			return number
		}
	}
	t.Fatal("no free port")
	return 0
}

// tally counts what one kind of caller sees.
type tally struct {
	done, failed atomic.Int64
	mu           sync.Mutex
	first        error
}

func (l *tally) count(err error) {
	l.done.Add(1)
	if err == nil {
		return
	}
	l.failed.Add(1)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.first == nil {
		l.first = err
	}
}

// A host's agent is replaced under load, as an upgrade does it: no new connection is
// refused at a sidecar or at the Workload API's socket, no request fails, and what
// workloads hold between each other goes on. Once the CA is there, once it is not.
func TestAgentRestart(t *testing.T) {
	entente := binary(t)
	c := catest.Start(t, catest.Options{Lifetimes: node.Lifetimes{}})
	const offset = 1000
	web, out := freePort(t, offset), freePort(t, offset)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	service := func(name, rest string) string {
		return fmt.Sprintf("apiVersion: entente/v1\nkind: Service\nmetadata: {name: %s, owner: team}\nspec: {run: {uid: %d, path: %s, hosts: [h1, h2]}, %s}\n---\n", name, os.Getuid(), exe, rest)
	}
	c.Apply(service("web", fmt.Sprint("port: ", web)) + service("caller", fmt.Sprintf("outbound: {port: %d}, calls: [web]", out)))

	// The application, at both hosts.
	for _, p := range []int{web, web + offset} {
		l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", p))
		if err != nil {
			t.Fatal(err)
		}
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") })}
		go server.Serve(l)
		t.Cleanup(func() { server.Close() })
	}

	dir := shortTemp(t)
	phrase := filepath.Join(dir, "passphrase")
	if err := os.WriteFile(phrase, []byte("a passphrase for the cache"), 0o600); err != nil {
		t.Fatal(err)
	}
	configure := func(name string, offset int) (file, socket string) {
		file, socket = filepath.Join(dir, name+".yaml"), filepath.Join(dir, name+".sock")
		text := fmt.Sprintf("trustDomain: banking.example\nname: %s\ndatacenter: dc1\ndataDir: %s\nca: {token: %s}\nworkloadAPI: {socket: %s}\n"+
			"sidecar: {inbound: \"127.0.0.1:%d\", portOffset: %d}\ncache: {passphraseFile: %s}\nhealth: {interval: 100ms}\n",
			name, filepath.Join(dir, name), c.AgentToken(name, "dc1"), socket, freePort(t, 0), offset, phrase)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file, socket
	}
	first, socket := configure("h1", 0)
	second, _ := configure("h2", offset)
	manager := daemontest.NewManager(t, filepath.Join(dir, "notify"))
	var log strings.Builder
	var logMu sync.Mutex
	run := func(cmd *exec.Cmd) (stop func()) {
		cmd.Stderr = writer(func(p []byte) { logMu.Lock(); defer logMu.Unlock(); log.Write(p) })
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		stop = sync.OnceFunc(func() {
			cmd.Process.Signal(syscall.SIGTERM)
			cmd.Wait()
		})
		t.Cleanup(stop)
		return stop
	}
	same := func(name string) string { return name }
	start := func() (stop func()) { return run(manager.Command(same, entente, "agent", "run", "--config", first)) }
	stop := start()
	run(exec.Command(entente, "agent", "run", "--config", second))

	get := func(client *http.Client, at int) error {
		request, err := http.NewRequestWithContext(t.Context(), "GET", fmt.Sprintf("http://127.0.0.1:%d/", at), nil)
		if err != nil {
			return err
		}
		request.Host = "web.banking.example"
		response, err := client.Do(request)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if body, err := io.ReadAll(response.Body); err != nil || response.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s %v", response.Status, body, err)
		}
		return nil
	}
	fresh := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for _, at := range []int{out, out + offset} {
		var err error
		for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
			if err = get(fresh, at); err == nil {
				break
			}
		}
		if err != nil {
			t.Fatalf("never served at %d: %v\n%s", at, err, log.String())
		}
	}

	fetch := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		svids, err := workloadapi.FetchX509SVIDs(ctx, workloadapi.WithAddr("unix://"+socket))
		if err == nil && len(svids) != 2 {
			err = fmt.Errorf("%d SVIDs", len(svids))
		}
		return err
	}
	held := holdConnection(t, socket)
	kept := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{}}
	kinds := map[string]func() error{
		"new connections at the host's own door":  func() error { return get(fresh, out) },
		"kept connections at the host's own door": func() error { return get(kept, out) },
		"new connections from another host":       func() error { return get(fresh, out+offset) },
		"kept connections from another host":      func() error { return get(kept, out+offset) },
		"fetches at the Workload API":             fetch,
		"a connection that two workloads hold":    held,
	}
	for _, round := range []string{"with a CA", "without a CA"} {
		t.Run(round, func(t *testing.T) {
			if round == "without a CA" {
				c.Stop()
			}
			ctx, cancel := context.WithCancel(t.Context())
			var callers sync.WaitGroup
			loads := map[string]*tally{}
			for name, call := range kinds {
				l := &tally{}
				loads[name] = l
				callers.Go(func() {
					for ctx.Err() == nil {
						l.count(call())
						time.Sleep(5 * time.Millisecond)
					}
				})
			}
			time.Sleep(300 * time.Millisecond)
			manager.Receive()
			if len(manager.Stored) < 4 { // inbound, two doors or more, two sockets
				t.Errorf("the manager holds %d sockets", len(manager.Stored))
			}
			stop()
			manager.Receive()
			time.Sleep(200 * time.Millisecond) // nobody is there
			stop = start()
			deadline := time.Now().Add(20 * time.Second)
			before := loads["fetches at the Workload API"].done.Load()
			for loads["fetches at the Workload API"].done.Load() < before+20 && time.Now().Before(deadline) {
				time.Sleep(10 * time.Millisecond)
			}
			cancel()
			callers.Wait()
			for name, l := range loads {
				if l.failed.Load() > 0 || l.done.Load() < 10 {
					t.Errorf("%s: %d of %d failed, first: %v", name, l.failed.Load(), l.done.Load(), l.first)
				}
				t.Logf("%s: %d, %d failed", name, l.done.Load(), l.failed.Load())
			}
			if t.Failed() {
				logMu.Lock()
				defer logMu.Unlock()
				t.Log(log.String())
			}
		})
	}
	t.Run("control: nobody holds the sockets", func(t *testing.T) {
		stop()
		manager.Close()
		if conn, err := net.Dial("tcp", fmt.Sprint("127.0.0.1:", out)); err == nil || !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a connection was not refused: %v %v", conn, err)
		}
	})
}

type writer func([]byte)

func (w writer) Write(p []byte) (int, error) { w(p); return len(p), nil }

// holdConnection opens one mTLS connection between two workloads, with SVIDs from the socket, and
// returns what sends something over it and back.
func holdConnection(t *testing.T, socket string) func() error {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+socket)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { source.Close() })
	l, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeAny()))
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		conn, err := l.Accept()
		l.Close()
		if err == nil {
			io.Copy(conn, conn)
		}
	}()
	conn, err := tls.Dial("tcp", l.Addr().String(), tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeAny()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return func() error {
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := conn.Write([]byte("?")); err != nil {
			return err
		}
		_, err := io.ReadFull(conn, make([]byte, 1))
		return err
	}
}
