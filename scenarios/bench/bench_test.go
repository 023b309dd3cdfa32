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

	"github.com/entente-mesh/entente/scenarios/evil"
	"github.com/entente-mesh/entente/scenarios/process"
)

// The names are a promise: others read the JSON.
var promised = map[string]string{
	"ca": `entry_to_svid_p50_ms entry_to_svid_p99_ms x509_single_cpu_us x509_batch100_cpu_us jwt_cpu_us entries_batched_per_s
		entries_single_per_s restart_100k_s restart_1m_s rss_100k_mib rss_1m_mib idle_cpu_100k_pct sync_stream_kib
		broadcast_10k_p99_ms change_one_p99_ms leader_kill_write_p99_ms taint_reissue_1_ms taint_reissue_10k_s
		entry_to_svid_cpu_us broadcast_10k_cpu_us taint_reissue_10k_cpu_us quiet_10k_cpu_pct capture_healed_s compare_10k_pct
		strangers_log_bytes verify_us suite_min`,
	"agent": `fetch_x509_p50_ms fetch_x509_p99_ms fetch_x509_32_per_s jwt_cached_per_s jwt_uncached_per_s agent_rss_idle_mib
		agent_rss_6000_mib entry_delete_denied_ms attest_pid_ms verify_us suite_min`,
	"dataplane": `chain_cpu_1_ratio chain_cpu_8_ratio chain_cpu_64_ratio chain_p50_1_ratio chain_rate_64_ratio h2_1_ratio h2_8_ratio
		h2_64_ratio sidecar_ratio h1_post_ratio bulk_ratio conn_ratio idle_kib p99_added_ms verify_us suite_min`,
	"links": `recorder_us verify_us suite_min`,
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
		for _, l := range ofRun(0) {
			measured = append(measured, l.name)
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

// mayBeNone are lines that with few items may be less than can be measured.
var mayBeNone = []string{"idle_cpu_100k_pct", "compare_10k_pct", "broadcast_10k_cpu_us", "strangers_log_bytes", "idle_kib", "p99_added_ms"}

var built struct {
	once sync.Once
	dir  string
	path string
	err  error
}

func TestMain(m *testing.M) {
	evil.Main() // this program is also the CA node that lies
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
			if _, err := nginxBinary(); s == &dataplaneSuite && err != nil {
				t.Skipf("NOT RUN: %v", err)
			}
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
			err = run(t.Context(), &options{suite: s, json: file, markdown: page, quick: true, built: binary, out: &table, progress: &progress})
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
				if r.Value == nil || *r.Value <= 0 && !slices.Contains(mayBeNone, r.Name) || r.N <= 0 || r.Unit == "" {
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
		suite: &caSuite, only: []string{"sync_stream_kib"}, quick: true, built: binary,
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
	s := &suite{name: "some", lines: append(ofRun(1), line{"a_ms", "ms", "the first", 1, none}, line{"b_ms", "ms", "the second", 1, none}, line{"c_ms", "ms", "the third", 1, none}, line{"d_ms", "ms", "the fourth", none, none})}
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
	err := run(t.Context(), &options{suite: s, json: file, quick: true, built: "entente", out: &table, progress: io.Discard})
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
	if len(results) != 4+len(ofRun(1)) || !strings.Contains(got["b_ms"], "it broke") || !bytes.Contains(text, []byte(`"value": null`)) || !strings.Contains(table.String(), "FAILED") {
		t.Errorf("%s\n%s", text, table.String())
	}
	checkNothingLeft(t, dir)
}

// Two builds are measured in turn, each first in every other round. The other build need
// not have all that is measured.
func TestInTurn(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("processor time of other processes can be read on Linux only")
	}
	file := filepath.Join(t.TempDir(), "results.json")
	dir := scratch(t)
	other, err := exec.LookPath("true")
	if err != nil {
		t.Skip(err)
	}
	var order []string
	cost := map[string][]float64{"this": {10, 40, 22}, other: {10, 20, 20}} // the machine was slow in the second round
	s := &suite{name: "some", lines: append(ofRun(1), line{"a_ms", "ms", "both", none, none}, line{"b_ms", "ms", "one", none, none})}
	s.groups = []group{{[]string{"a_ms", "b_ms"}, func(_ context.Context, b *bench) error {
		if b.wants("a_ms") {
			b.report("a_ms", cost[b.exe][0], 1, "")
			order, cost[b.exe] = append(order, b.exe), cost[b.exe][1:]
		}
		if b.wants("b_ms") {
			if b.exe == other {
				return errors.New("it has no such thing")
			}
			b.report("b_ms", 5, 1, "")
		}
		return nil
	}}}
	var table bytes.Buffer
	o := &options{suite: s, json: file, quick: true, built: "this", binary: other, rounds: 3, out: &table, progress: io.Discard}
	if err := run(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if want := []string{"this", other, other, "this", "this", other}; !slices.Equal(order, want) {
		t.Errorf("measured in the order %q", order)
	}
	text, _ := os.ReadFile(file)
	var results []result
	if err := json.Unmarshal(text, &results); err != nil {
		t.Fatal(err)
	}
	a, b := results[0], results[1]
	if a.Name != "a_ms" || *a.Value != 22 || *a.Turns.Other != 20 || *a.Turns.Ratio != 1.1 || !slices.Equal(a.Turns.Ratios, []float64{1, 2, 1.1}) || a.N != 3 {
		t.Errorf("%+v %+v", a, a.Turns)
	}
	if b.Name != "b_ms" || *b.Value != 5 || b.Turns.Other != nil || b.Turns.Ratio != nil || !strings.Contains(b.Note, "it has no such thing") {
		t.Errorf("%+v %+v", b, b.Turns)
	}
	if !strings.Contains(table.String(), "1.000 to 2.000") {
		t.Errorf("%s", table.String())
	}
	checkNothingLeft(t, dir)

	// This build must have all of it.
	cost["this"], cost[other] = []float64{1}, []float64{1}
	o.rounds, o.only = 1, []string{"b_ms"}
	s.groups[0].measure = func(_ context.Context, b *bench) error {
		if b.exe == "this" {
			return errors.New("it broke")
		}
		b.report("b_ms", 5, 1, "")
		return nil
	}
	if err := run(t.Context(), o); err == nil || !strings.Contains(err.Error(), "it broke") {
		t.Errorf("%v", err)
	}
	o.rounds = 0
	if err := run(t.Context(), o); err == nil {
		t.Error("no round at all")
	}
	o.rounds, o.only, o.binary = 1, []string{verifyLine}, ""
	table.Reset()
	if err := run(t.Context(), o); err != nil || !strings.Contains(table.String(), verifyLine) {
		t.Errorf("the machine alone: %v\n%s", err, table.String())
	}
	o.binary, o.markdown = other, "page.md"
	if err := run(t.Context(), o); err == nil {
		t.Error("the page has no place for two builds")
	}
}

// A configuration has only what its binary knows.
func TestOlderBinary(t *testing.T) {
	for _, test := range []struct {
		name, says string
		want       bool // whether the limit stands in the file
		fails      bool
	}{
		{"knows the key", "exit 0", true, false},
		{"does not", `grep -q tokensPerEntry "$5" || exit 0; echo 'ca.yaml:7:10: unknown key "tokensPerEntry" in limits; did you mean "tokensPerAgent"?' >&2; exit 1`, false, false},
		{"refuses all", "echo 'it is broken' >&2; exit 1", true, true},
	} {
		exe := filepath.Join(t.TempDir(), "entente")
		if err := os.WriteFile(exe, []byte("#!/bin/sh\n"+test.says+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		d := &domain{bench: &bench{options: &options{}, exe: exe, host: "127.0.0.1", processes: process.New()}, dir: t.TempDir()}
		n, err := d.newNode(t.Context())
		d.processes.Close()
		if (err != nil) != test.fails {
			t.Errorf("%s: %v", test.name, err)
			continue
		}
		if text, err := os.ReadFile(n.file()); err != nil || bytes.Contains(text, []byte("tokensPerEntry")) != test.want {
			t.Errorf("%s: %v\n%s", test.name, err, text)
		}
	}
}

// Limits in microseconds hold on the machine that they were set for, and grow with the
// time of a verification on a slower one; on a faster one they stay.
func TestLimits(t *testing.T) {
	for _, test := range []struct {
		line     string
		verifyUS float64
		want     float64
	}{
		{"x509_single_cpu_us", referenceVerifyUS, 250},
		{"x509_single_cpu_us", 2 * referenceVerifyUS, 500},
		{"x509_single_cpu_us", referenceVerifyUS / 2, 250},
		{"x509_single_cpu_us", 0, 250}, // of results that do not say
		{"entry_to_svid_p50_ms", 2 * referenceVerifyUS, 10},
		{"entry_to_svid_cpu_us", 2 * referenceVerifyUS, none},
		{"strangers_log_bytes", 2 * referenceVerifyUS, 0},
	} {
		l, ok := caSuite.line(test.line)
		if got := l.limit(test.verifyUS); !ok || got != test.want {
			t.Errorf("%s at %v: %v", test.line, test.verifyUS, got)
		}
	}
	l, _ := caSuite.line("strangers_log_bytes")
	for value, want := range map[float64]string{0: "<= 0", 1: "<= 0 !"} {
		if got := l.bound(&value, l.limit(0)); got != want {
			t.Errorf("%v bytes: %q", value, got)
		}
	}
}

// What strangers wrote is told apart from ticks, which may be late or one more.
func TestWrittenBeyond(t *testing.T) {
	idle := written{entries: 20, log: 20 * 60, files: 5}
	for name, test := range map[string]struct {
		is   written
		want float64
	}{
		"as idle":                {idle, 0},
		"a tick is late":         {written{entries: 18, log: 18 * 60}, 0},
		"one tick more":          {written{entries: 21, log: 21 * 60}, 0},
		"an entry among them":    {written{entries: 21, log: 20*60 + 400}, 340},
		"and two ticks are late": {written{entries: 19, log: 18*60 + 400}, 340},
		"many":                   {written{entries: 1020, log: 20*60 + 1000*400}, 1000*400 - 60},
		"a file":                 {written{entries: 20, log: 20 * 60, files: 105, audit: 7}, 100},
	} {
		if got := test.is.beyond(idle); got != test.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestTable(t *testing.T) {
	l, _ := caSuite.line("entries_batched_per_s")
	for value, want := range map[float64][2]string{25_000: {">= 20000", "25 x"}, 5000: {">= 20000 !", "5.0 x"}} {
		if got := [2]string{l.bound(&value, l.limit(referenceVerifyUS)), l.ratio(value)}; got != want {
			t.Errorf("%v: %q", value, got)
		}
	}
	l, _ = caSuite.line("jwt_cpu_us")
	for value, want := range map[float64][2]string{100: {"<= 120", "3.4 x"}, 170: {"<= 120 !", "2.0 x"}} {
		if got := [2]string{l.bound(&value, l.limit(referenceVerifyUS)), l.ratio(value)}; got != want {
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
