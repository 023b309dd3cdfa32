package scenarios

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/entente-mesh/entente/scenarios/evil"
	"github.com/entente-mesh/entente/scenarios/load"
)

func TestMain(m *testing.M) {
	evil.Main()
	code := m.Run()
	if built.dir != "" {
		os.RemoveAll(built.dir)
	}
	os.Exit(code)
}

var built struct {
	once sync.Once
	dir  string
	path string
	err  error
}

// binary builds the real binary, once.
func binary(t *testing.T) string {
	t.Helper()
	if testing.Short() {
		t.Skip("real processes are left out with -short")
	}
	if runtime.GOOS != "linux" {
		t.Skip("scenarios need Linux")
	}
	built.once.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "entente-test-"); built.err != nil {
			return
		}
		built.path = filepath.Join(built.dir, "entente")
		out, err := exec.Command("go", "build", "-o", built.path, "../cmd/entente").CombinedOutput()
		if err != nil {
			built.err = fmt.Errorf("build the binary: %w\n%s", err, out)
		}
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return built.path
}

// shortTemp makes a directory for temporary files with a path that is short enough
// for unix sockets, so that all that is left behind is found in it.
func shortTemp(t *testing.T) string {
	dir, err := os.MkdirTemp("/tmp", "et-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// lenient is the built-in scenario with times for a machine that runs other tests,
// too. What may not happen at all stays as it is.
func lenient(t *testing.T, change ...string) string {
	changes := append([]string{
		"longestGap: 500ms, switched: 1500ms", "longestGap: 4s, switched: 10s",
		"start: {within: 40s}", "start: {within: 90s}",
		"dc2, within: 18s", "dc2, within: 60s",
		"datacenter: dc1, within: 20s", "datacenter: dc1, within: 60s",
		"limits: {time: 60s,", "limits: {time: 5m,",
		"rate: 30/s", "rate: 10/s",
		"deadline: 2s", "deadline: 8s",
	}, change...)
	text := string(FinancialPlatform)
	for i := 0; i < len(changes); i += 2 {
		if !strings.Contains(text, changes[i]) {
			t.Fatalf("the scenario has no %q", changes[i])
		}
		text = strings.ReplaceAll(text, changes[i], changes[i+1])
	}
	file := filepath.Join(t.TempDir(), "platform.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// The main job, with real processes. Both domains' authorities are intermediates here,
// each of a root of its own; elsewhere they sign themselves.
func TestDemo(t *testing.T) {
	upstream := lenient(t, "bundleRefreshHint: 2s}", "bundleRefreshHint: 2s}\n    upstream: true")
	options := Options{Binary: binary(t), File: upstream, JSONFile: filepath.Join(t.TempDir(), "report.json")}
	temp := shortTemp(t)
	t.Setenv("TMPDIR", temp)
	var out bytes.Buffer
	options.Out = &out
	report, err := Demo(t.Context(), options)
	if err != nil {
		t.Errorf("%v\n%s", err, &out)
	}
	if left, _ := os.ReadDir(temp); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if report == nil {
		return
	}
	var written Report
	text, err := os.ReadFile(options.JSONFile)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &written); err != nil {
		t.Fatal(err)
	}
	f := written.Failover
	if !written.OK || len(written.Steps) != 7 || f.Failed != 0 || f.Requests < 100 || f.LongestGapMS <= 0 || f.SwitchedMS <= 0 || f.Attempts < f.Requests || f.P99MS < f.P50MS || written.RSSTotalMiB <= 0 {
		t.Errorf("report:\n%s", text)
	}
	for _, name := range []string{"ok", "steps", "failover"} {
		if !bytes.Contains(text, []byte(`"`+name+`"`)) {
			t.Errorf("the report has no %q", name)
		}
	}
	t.Logf("%s", out.Bytes()[max(0, bytes.LastIndex(out.Bytes(), []byte("\nLOSS"))):])
}

// kill -9 of any single process on the path, the caller's own sidecar excepted, costs
// no failed idempotent request.
func TestKillAnyProcess(t *testing.T) {
	path := binary(t)
	scenario, err := ReadFile(lenient(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", shortTemp(t))
	w, err := newWorld(&scenario.Spec, Options{Binary: path, Out: io.Discard})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	if err := w.bringUp(ctx); err != nil {
		t.Fatal(err)
	}
	g, err := w.startLoad(ctx, scenario.Spec.Load[0])
	if err != nil {
		t.Fatal(err)
	}
	defer g.stop()

	began := time.Now()
	served(ctx, t, g, began)
	leader := func(domain string) *unit {
		t.Helper()
		var u *unit
		ok, _, err := await(ctx, 20*time.Second, statusEvery, func(ctx context.Context) (bool, string, error) {
			status, err := w.status(ctx, w.find(kindCA, domain, "dc3"))
			if err != nil {
				return false, "", err
			}
			for _, m := range status.GetMembers() {
				if m.GetMember().GetId() == status.GetLeaderId() {
					u = w.find(kindCA, domain, m.GetMember().GetDatacenter())
				}
			}
			return u != nil, "", nil
		})
		if err != nil || !ok {
			t.Fatalf("no leader of %s: %v", domain, err)
		}
		return u
	}

	const settle = 500 * time.Millisecond // what is out is answered, or shows up in the sum at the end
	for _, victim := range []struct {
		name string
		unit func() *unit
	}{
		{"the edge", func() *unit { return w.find(kindEdge, "trading.example", "dc1") }},
		{"the caller's gateway", func() *unit { return w.find(kindGateway, "trading.example", "dc1") }},
		{"the callee's gateway", func() *unit { return w.find(kindGateway, "banking.example", "dc1") }},
		{"the callee's sidecar", func() *unit { return w.find(kindAgent, "banking.example", "dc1") }},
		{"the callee", func() *unit { return w.server("accounts.banking.example", "dc1") }},
		{"a service in the middle", func() *unit { return w.server("portfolio.trading.example", "dc1") }},
		{"the leader of the callee's CA", func() *unit { return leader("banking.example") }},
		{"the leader of the caller's CA", func() *unit { return leader("trading.example") }},
	} {
		u := victim.unit()
		at := w.kill(u)
		if err := pause(ctx, 1500*time.Millisecond); err != nil {
			t.Fatal(err)
		}
		up := time.Now()
		if err := w.up(ctx, u); err != nil {
			t.Fatalf("%s does not come back: %v", victim.name, err)
		}
		served(ctx, t, g, time.Now())
		if err := pause(ctx, settle); err != nil {
			t.Fatal(err)
		}
		samples, err := g.recorded()
		if err != nil {
			t.Fatal(err)
		}
		r := load.Measure(slices.DeleteFunc(samples, func(s load.Sample) bool { return s.Done.Before(at.Add(-time.Second)) }), at, time.Now().Add(-settle), "dc1")
		t.Logf("%-30s %-24s %3d requests, %d failed, %3d attempts, longest gap %6.1f ms, up again after %.1f s", victim.name, u.name, r.Requests, r.Failed, r.Attempts, inMS(r.LongestGap), time.Since(up).Seconds())
		if r.Failed > 0 || r.Requests < 10 {
			t.Errorf("kill -9 of %s (%s): %d of %d requests failed: %v", victim.name, u.name, r.Failed, r.Requests, r.Errors)
		}
	}
	g.stop()
	samples, _ := g.recorded()
	if r := load.Measure(samples, began, time.Now(), "dc1"); r.Failed > 0 {
		t.Errorf("%d of %d requests failed in all: %v", r.Failed, r.Requests, r.Errors)
	}
	if died := w.supervisor.Died(); len(died) > 0 {
		t.Error(died[0].Obituary())
	}
}

// Ctrl-C at any moment leaves no process and no directory behind.
func TestInterrupt(t *testing.T) {
	path := binary(t)
	moments := []time.Duration{ // each tells apart another part of the run
		time.Duration(rand.IntN(300)) * time.Millisecond,
		time.Duration(300+rand.IntN(1500)) * time.Millisecond,
		time.Duration(1800+rand.IntN(6000)) * time.Millisecond,
	}
	for _, moment := range moments {
		t.Run(moment.String(), func(t *testing.T) {
			temp := shortTemp(t)
			demo, out := startDemo(t, path, temp)
			time.Sleep(moment)
			if err := demo.Process.Signal(os.Interrupt); err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			err := demo.Wait()
			t.Logf("gone %s after the interrupt", time.Since(began).Round(time.Millisecond))
			if took := time.Since(began); took > 10*time.Second {
				t.Errorf("it took %s to end", took)
			}
			var exit *exec.ExitError
			// Before the program has asked for the signal, it is killed by it.
			if !errors.As(err, &exit) || exit.ExitCode() != 130 && exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGINT {
				t.Errorf("it ended with %v\n%s", err, out)
			}
			nothingLeft(t, temp)
		})
	}
}

// --keep stays up, and what it says to try works.
func TestKeep(t *testing.T) {
	t.Run("an address for each host", func(t *testing.T) { keep(t) })
	t.Run("one address", func(t *testing.T) { keep(t, "--one-address") })
}

func keep(t *testing.T, flags ...string) {
	path := binary(t)
	at := bytes.Index(FinancialPlatform, []byte("  - name: what must be refused"))
	end := bytes.Index(FinancialPlatform, []byte("  limits:"))
	file := filepath.Join(t.TempDir(), "short.yaml")
	if err := os.WriteFile(file, append(slices.Clone(FinancialPlatform[:at]), FinancialPlatform[end:]...), 0o600); err != nil {
		t.Fatal(err)
	}
	temp := shortTemp(t)
	demo, out := startDemo(t, path, temp, append(flags, "--file", file, "--keep")...)
	for began := time.Now(); !strings.Contains(out.String(), "dc2/trading-edge-dc2"); time.Sleep(50 * time.Millisecond) {
		if time.Since(began) > 2*time.Minute {
			t.Fatalf("it does not stay up:\n%s", out)
		}
	}
	dir := regexp.MustCompile(`(?m)^  cd (\S+)$`).FindStringSubmatch(out.String())
	urls := regexp.MustCompile(`(?m)^  curl .* (https://\S+)$`).FindAllStringSubmatch(out.String(), -1)
	if dir == nil || len(urls) != 2 {
		t.Fatalf("it does not say what to try:\n%s", out)
	}
	if one := strings.Contains(urls[0][1], "//"+onlyAddress+":"); one != (len(flags) > 0) {
		t.Errorf("%s, with %q", urls[0][1], flags)
	}
	root, err := os.ReadFile(filepath.Join(dir[1], "edge-ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	token, err := os.ReadFile(filepath.Join(dir[1], "phone.jwt"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(root)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}, Timeout: 10 * time.Second}
	for _, url := range urls {
		request, _ := http.NewRequest("GET", url[1], nil)
		request.Header.Set("Authorization", "Bearer "+string(token))
		answer, err := client.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		answer.Body.Close()
		if answer.StatusCode != http.StatusOK {
			t.Errorf("%s: %s", url[1], answer.Status)
		}
	}
	demo.Process.Signal(os.Interrupt)
	if err := demo.Wait(); err != nil {
		t.Errorf("it ended with %v\n%s", err, out)
	}
	nothingLeft(t, temp)
}

// output is written by one goroutine and read by another.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

func startDemo(t *testing.T, path, temp string, args ...string) (*exec.Cmd, *output) {
	t.Helper()
	out := &output{}
	demo := exec.Command(path, append([]string{"demo"}, args...)...)
	demo.Env = append(os.Environ(), "TMPDIR="+temp)
	demo.Stdout, demo.Stderr = out, out
	if err := demo.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { demo.Process.Kill(); demo.Wait() })
	return demo, out
}

// nothingLeft looks for files, and for processes that were started with a path in temp.
func nothingLeft(t *testing.T, temp string) {
	t.Helper()
	left, err := os.ReadDir(temp)
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, line := range lines {
		if text, err := os.ReadFile(line); err == nil && bytes.Contains(text, []byte(temp)) {
			t.Errorf("a process is left behind: %s %s", line, bytes.ReplaceAll(text, []byte{0}, []byte(" ")))
		}
	}
}
