package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// The names are a promise: others read the JSON.
var promised = map[string]string{
	"ca": `entry_to_svid_p50_ms entry_to_svid_p99_ms x509_single_cpu_us x509_batch100_cpu_us jwt_cpu_us entries_batched_per_s
		entries_single_per_s restart_100k_s restart_1m_s rss_100k_mib rss_1m_mib idle_cpu_100k_pct sync_stream_kib
		broadcast_10k_p99_ms change_one_p99_ms leader_kill_write_p99_ms taint_reissue_1_ms taint_reissue_10k_s`,
	"agent": `fetch_x509_p50_ms fetch_x509_p99_ms fetch_x509_32_per_s jwt_cached_per_s jwt_uncached_per_s agent_rss_idle_mib
		agent_rss_6000_mib entry_delete_denied_ms attest_pid_ms`,
}

func TestNames(t *testing.T) {
	for _, s := range suites {
		var lines, measured []string
		for _, l := range s.lines {
			lines = append(lines, l.name)
			if l.what == "" || l.unit == "" {
				t.Errorf("%s says nothing of itself", l.name)
			}
		}
		for _, g := range s.groups {
			measured = append(measured, g.lines...)
		}
		want := strings.Fields(promised[s.name])
		for _, list := range [][]string{want, lines, measured} {
			slices.Sort(list)
		}
		if !slices.Equal(lines, want) || !slices.Equal(measured, want) {
			t.Errorf("%s: promised %q\nlines %q\nmeasured %q", s.name, want, lines, measured)
		}
	}
}

var built struct {
	once sync.Once
	dir  string
	path string
	err  error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if built.dir != "" {
		os.RemoveAll(built.dir)
	}
	os.Exit(code)
}

// buildBinary builds the real binary, once.
func buildBinary(t *testing.T) string {
	t.Helper()
	if testing.Short() {
		t.Skip("starts real processes")
	}
	if runtime.GOOS != "linux" {
		t.Skip("processor time of other processes can be read on Linux only")
	}
	built.once.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "entente-built-"); built.err != nil {
			return
		}
		built.path = filepath.Join(built.dir, "entente")
		if out, err := exec.Command("go", "build", "-o", built.path, "../../cmd/entente").CombinedOutput(); err != nil {
			built.err = fmt.Errorf("%w\n%s", err, out)
		}
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return built.path
}

// scratch is where a run makes its directory. Unix sockets need short paths.
func scratch(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "bench")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	t.Setenv("TMPDIR", dir)
	return dir
}

func checkNothingLeft(t *testing.T, dir string) {
	t.Helper()
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
	// No process names the directory on its command line.
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range lines {
		if line, err := os.ReadFile(file); err == nil && bytes.Contains(line, []byte(dir+"/entente-bench")) {
			t.Errorf("still running: %q", line)
		}
	}
}

// Everything is measured, with few items, and nothing is left behind.
func TestQuick(t *testing.T) {
	binary := buildBinary(t)
	for _, s := range suites {
		t.Run(s.name, func(t *testing.T) {
			file, page := filepath.Join(t.TempDir(), "results.json"), filepath.Join(t.TempDir(), "page.md")
			dir := scratch(t)
			text, err := os.ReadFile("../../docs/benchmarks.md")
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(page, text, 0o600); err != nil {
				t.Fatal(err)
			}
			var table, progress bytes.Buffer
			began := time.Now()
			err = run(t.Context(), &options{suite: s, json: file, markdown: page, quick: true, binary: binary, out: &table, progress: &progress})
			t.Logf("%.0f s\n%s", time.Since(began).Seconds(), table.String())
			if err != nil {
				t.Fatalf("%v\n%s", err, progress.String())
			}
			checkNothingLeft(t, dir)

			var results []result
			data, err := os.ReadFile(file)
			if err == nil {
				err = json.Unmarshal(data, &results)
			}
			if err != nil {
				t.Fatal(err)
			}
			var names []string
			for _, r := range results {
				names = append(names, r.Name)
				if r.Value == nil || *r.Value < 0 || *r.Value == 0 && r.Name != "idle_cpu_100k_pct" || r.N <= 0 || r.Unit == "" {
					t.Errorf("%+v", r)
				}
			}
			slices.Sort(names)
			if want := strings.Fields(promised[s.name]); !slices.Equal(names, slices.Sorted(slices.Values(want))) {
				t.Errorf("measured %q, promised %q", names, want)
			}
			text, err = os.ReadFile(page)
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range names {
				if !bytes.Contains(text, []byte("| `"+name+"` | ")) {
					t.Errorf("%s does not stand in the page", name)
				}
			}
		})
	}
}

// onWrite calls do when something is written for the first time.
type onWrite struct {
	io.Writer
	once sync.Once
	do   func()
}

func (w *onWrite) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte("streams open")) {
		w.once.Do(w.do)
	}
	return w.Writer.Write(p)
}

// An interrupt in the midst of it leaves no process and no directory.
func TestInterrupt(t *testing.T) {
	binary := buildBinary(t)
	dir := scratch(t)
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	var progress bytes.Buffer
	err := run(ctx, &options{
		suite: &caSuite, only: []string{"sync_stream_kib"}, quick: true, binary: binary,
		out: io.Discard, progress: &onWrite{Writer: &progress, do: interrupt},
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v\n%s", err, progress.String())
	}
	checkNothingLeft(t, dir)
}

// A line that fails is said with the reason, and loses no other of its group.
func TestOneFails(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("processor time of other processes can be read on Linux only")
	}
	file := filepath.Join(t.TempDir(), "results.json")
	dir := scratch(t)
	s := &suite{name: "some", lines: []line{{"a_ms", "ms", "the first", 1, 0}, {"b_ms", "ms", "the second", 1, 0}, {"c_ms", "ms", "the third", 1, 0}, {"d_ms", "ms", "the fourth", 0, 0}}}
	s.groups = []group{
		{[]string{"a_ms", "b_ms", "c_ms"}, func(_ context.Context, b *bench) error {
			b.report("a_ms", 1, 1, "")
			if b.wants("b_ms") {
				return errors.New("it broke")
			}
			b.report("c_ms", 3, 1, "")
			return nil
		}},
		{[]string{"d_ms"}, func(_ context.Context, b *bench) error {
			b.report("d_ms", 4, 1, "")
			return nil
		}},
	}
	var table bytes.Buffer
	err := run(t.Context(), &options{suite: s, json: file, binary: "entente", out: &table, progress: io.Discard})
	if err == nil || !strings.Contains(err.Error(), "b_ms: it broke") {
		t.Errorf("%v", err)
	}
	text, _ := os.ReadFile(file)
	var results []result
	if err := json.Unmarshal(text, &results); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, r := range results {
		got[r.Name] = r.Note
		if (r.Value == nil) != (r.Name == "b_ms") {
			t.Errorf("%+v", r)
		}
	}
	if len(results) != 4 || !strings.Contains(got["b_ms"], "it broke") || !bytes.Contains(text, []byte(`"value": null`)) || !strings.Contains(table.String(), "FAILED") {
		t.Errorf("%s\n%s", text, table.String())
	}
	checkNothingLeft(t, dir)
}

func TestTable(t *testing.T) {
	l, _ := caSuite.line("entries_batched_per_s")
	for value, want := range map[float64][2]string{25_000: {">= 20000", "25 x"}, 5000: {">= 20000 !", "5.0 x"}} {
		if got := [2]string{l.bound(&value), l.ratio(value)}; got != want {
			t.Errorf("%v: %q", value, got)
		}
	}
	l, _ = caSuite.line("jwt_cpu_us")
	for value, want := range map[float64][2]string{100: {"<= 120", "3.4 x"}, 170: {"<= 120 !", "2.0 x"}} {
		if got := [2]string{l.bound(&value), l.ratio(value)}; got != want {
			t.Errorf("%v: %q", value, got)
		}
	}
	if err := run(t.Context(), &options{suite: &caSuite, only: []string{"jwt_cpu_ms"}}); err == nil {
		t.Error("a line that there is not")
	}
	times := []time.Duration{3, 1, 2, 4}
	if p := percentile(times, 50); p != 3 {
		t.Errorf("median %v", p)
	}
	if p := percentile(times, 99); p != 4 {
		t.Errorf("99th %v", p)
	}
}
