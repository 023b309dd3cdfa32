package main

import (
	"bytes"
	"fmt"
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
)

// lockedBuffer takes what a process says while the test reads it.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// SIGHUP ends no daemon: each opens its log file again where logrotate moved it away, as
// often as it is asked, and stops when SIGTERM asks it to.
func TestHangupEndsNoDaemon(t *testing.T) {
	c, caFile := place(t, catest.Options{})
	if code := run([]string{"entente", "ca", "init", "--config", caFile, "--recovery-key-file", filepath.Join(t.TempDir(), "key")}); code != exitOK {
		t.Fatalf("ca init: exit code %d", code)
	}
	dir, err := os.MkdirTemp("", "hup") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	write := func(name, text string) string {
		t.Helper()
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	access := filepath.Join(dir, "access.jsonl")
	gateway := write("gateway.yaml", fmt.Sprintf("trustDomain: banking.example\nname: gw-1\ndatacenter: dc1\nworkloadAPI: {socket: %s}\nca: {addresses: [\"127.0.0.1:1\"]}\neastWest: {listen: \"127.0.0.1:0\"}\naccessLog: {file: %s}\n",
		filepath.Join(dir, "nobody.sock"), access))
	audit := write("ca.yaml", strings.Replace(read(t, caFile), "keys:", "audit: {file: stderr}\nkeys:", 1))
	agentAccess := filepath.Join(dir, "agent-access.jsonl")
	agent := write("agent.yaml", fmt.Sprintf("trustDomain: banking.example\nname: h1\ndatacenter: dc1\ndataDir: %s\nca: {token: %s}\nworkloadAPI: {socket: %s}\nsidecar: {inbound: \"127.0.0.1:%d\"}\nservicesDir: %s\naccessLog: {file: %s}\n",
		filepath.Join(dir, "data"), catest.Start(t, catest.Options{}).AgentToken("h1", "dc1", "127.0.0.1"), filepath.Join(dir, "api.sock"), daemontest.FreePort(t), filepath.Join(dir, "services.d"), agentAccess))
	for _, daemon := range []struct {
		name string
		args []string
		log  string // the file that is moved away; empty: it has none
	}{
		{"gateway", []string{"gateway", "run", "--config", gateway}, access},
		{"agent", []string{"agent", "run", "--config", agent}, agentAccess},
		{"CA node", []string{"ca", "run", "--config", caFile}, filepath.Join(c.Config().DataDir, "audit.log")},
		{"CA node without an audit file", []string{"ca", "run", "--config", audit}, ""},
	} {
		t.Run(daemon.name, func(t *testing.T) {
			process := exec.Command(os.Args[0], daemon.args...)
			process.Env = append(os.Environ(), "ENTENTE_TEST_PROGRAM=entente")
			said := &lockedBuffer{}
			process.Stderr = said
			if err := process.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- process.Wait() }()
			t.Cleanup(func() { process.Process.Kill() })
			until := func(what string, done func() bool) {
				t.Helper()
				for begin := time.Now(); !done(); time.Sleep(10 * time.Millisecond) {
					select {
					case err := <-ended:
						t.Fatalf("%s: it ended: %v\n%s", what, err, said)
					default:
					}
					if time.Since(begin) > 20*time.Second {
						t.Fatalf("%s: not within 20 s\n%s", what, said)
					}
				}
			}
			there := func() bool { _, err := os.Stat(daemon.log); return err == nil }
			if daemon.log == "" {
				until("it runs", func() bool { return strings.Contains(said.String(), "CA node runs") })
			} else {
				until("it opens its log", there)
			}
			for i := range 2 {
				if daemon.log == "" {
					process.Process.Signal(syscall.SIGHUP)
					time.Sleep(100 * time.Millisecond)
					until("it lives on", func() bool { return true })
					continue
				}
				if err := os.Rename(daemon.log, fmt.Sprintf("%s-%d", daemon.log, i)); err != nil {
					t.Fatal(err)
				}
				process.Process.Signal(syscall.SIGHUP)
				until("it opens its log again", there)
			}
			process.Process.Signal(syscall.SIGTERM)
			select {
			case err := <-ended:
				if err != nil {
					t.Errorf("SIGTERM: %v\n%s", err, said)
				}
			case <-time.After(20 * time.Second):
				t.Errorf("SIGTERM does not end it\n%s", said)
			}
		})
	}
}

func read(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
