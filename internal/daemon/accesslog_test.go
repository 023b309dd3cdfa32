package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/entente-mesh/entente/internal/yamlfile"
)

// An access log keeps its bound whatever is written, by deleting what it rotated itself,
// the oldest first; what somebody else put beside it stays.
func TestAccessLogIsBounded(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a[c]cess.jsonl") // a pattern that would not match itself
	foreign := path + ".1.gz"
	if err := os.WriteFile(foreign, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	const bound, keep = 40_000, 4
	l, err := OpenLogFile(path, 0o640, LogBound{Bytes: bound, Keep: keep})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	line := func(i int) string { return fmt.Sprintf("%099d\n", i) }
	const lines = 2000 // five times the bound
	for i := range lines {
		if n, err := l.Write([]byte(line(i))); n != 100 || err != nil {
			t.Fatalf("line %d: %d, %v", i, n, err)
		}
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		total, files := int64(0), 0
		for _, e := range entries {
			if info, err := e.Info(); err == nil && e.Name() != filepath.Base(foreign) {
				total, files = total+info.Size(), files+1
			}
		}
		if total > bound || files > keep {
			t.Fatalf("after %d lines: %d bytes in %d files", i+1, total, files)
		}
	}
	// Control: the newest lines are all there, in order.
	var kept strings.Builder
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range append(entries[1:], entries[0]) { // the current file's name is the shortest
		if e.Name() != filepath.Base(foreign) {
			text, err := os.ReadFile(filepath.Join(dir, e.Name()))
			if err != nil {
				t.Fatal(err)
			}
			kept.Write(text)
		}
	}
	if text := kept.String(); len(text) <= bound*3/4 || !strings.HasSuffix(text, line(lines-2)+line(lines-1)) {
		t.Errorf("%d bytes are kept, the last are %q", len(text), text[max(0, len(text)-200):])
	}
	for i, first := 0, lines-kept.Len()/100; i < kept.Len()/100; i++ {
		if got := kept.String()[i*100 : i*100+100]; got != line(first+i) {
			t.Fatalf("line %d is %q", first+i, got)
		}
	}
	if _, err := os.Stat(foreign); err != nil {
		t.Errorf("somebody else's file: %v", err)
	}
}

// Where it cannot rotate, the bound holds too: what is beyond is lost, and counted. When
// there is room again, it goes on.
func TestAccessLogThatCannotRotate(t *testing.T) {
	dir := t.TempDir()
	target, path := filepath.Join(dir, "target"), filepath.Join(dir, "access.jsonl")
	if err := os.Symlink(target, path); err != nil { // is not ours to rename
		t.Fatal(err)
	}
	config := AccessLog{File: path, MaxSize: yamlfile.Size{Bytes: 4000}, MaxFiles: 2}
	metrics := NewMetrics("agent")
	records, err := config.Open(metrics)
	if err != nil {
		t.Fatal(err)
	}
	defer records.Close()
	lost := func(want int) {
		t.Helper()
		families, err := metrics.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if f.GetName() == "entente_agent_access_records_lost_total" {
				if got := f.GetMetric()[0].GetCounter().GetValue(); got != float64(want) {
					t.Errorf("%v records are lost, want %d", got, want)
				}
				return
			}
		}
		t.Error("lost records are not counted")
	}
	record := []byte(strings.Repeat("x", 999) + "\n")
	for range 4 {
		if _, err := records.Write(record); err != nil {
			t.Fatal(err)
		}
	}
	lost(0)
	if _, err := records.Write(record); err == nil || !strings.Contains(err.Error(), "4000 bytes") {
		t.Errorf("beyond the bound: %v", err)
	}
	lost(1)
	if info, err := os.Stat(target); err != nil || info.Size() != 4000 {
		t.Errorf("%v, %v", info, err)
	}
	if err := os.Truncate(target, 0); err != nil {
		t.Fatal(err)
	}
	records.Info("request", "method", "GET") // as the data plane writes
	if text, err := os.ReadFile(target); err != nil || !strings.Contains(string(text), `"msg":"request","method":"GET"`) {
		t.Errorf("%q, %v", text, err)
	}
	lost(1)

	// A device has no size, and stays where it is. A named pipe is one that this test may lose.
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	reader, err := os.OpenFile(pipe, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	device, err := AccessLog{File: pipe, MaxSize: yamlfile.Size{Bytes: 4000}, MaxFiles: 2}.Open(NewMetrics("agent"))
	if err != nil {
		t.Fatal(err)
	}
	defer device.Close()
	for range 10 {
		if _, err := device.Write(record); err != nil {
			t.Fatal(err)
		}
	}
	if is, err := os.Lstat(pipe); err != nil || is.Mode().Type() != os.ModeNamedPipe {
		t.Errorf("the device was renamed: %v, %v", is, err)
	}
}

func TestAccessLogComplete(t *testing.T) {
	for _, test := range []struct {
		in, want AccessLog
		err      string
	}{
		{AccessLog{}, AccessLog{MaxSize: yamlfile.Size{Bytes: 1 << 30}, MaxFiles: 8}, ""},
		{AccessLog{File: "a", MaxSize: yamlfile.Size{Bytes: 4 << 20}, MaxFiles: 4}, AccessLog{File: "a", MaxSize: yamlfile.Size{Bytes: 4 << 20}, MaxFiles: 4}, ""},
		{AccessLog{MaxFiles: 1}, AccessLog{}, "accessLog.maxFiles is 1"},
		{AccessLog{MaxFiles: -2}, AccessLog{}, "accessLog.maxFiles is -2"},
		{AccessLog{MaxFiles: 1001}, AccessLog{}, "accessLog.maxFiles is 1001"},
		{AccessLog{MaxSize: yamlfile.Size{Bytes: 7 << 20}}, AccessLog{}, "accessLog.maxSize leaves each of 8 files less than 1MiB"},
	} {
		got := test.in
		switch err := got.Complete(); {
		case test.err == "" && (err != nil || got != test.want):
			t.Errorf("%+v: %+v, %v", test.in, got, err)
		case test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err)):
			t.Errorf("%+v: %v, want %q", test.in, err, test.err)
		}
	}
	if records, err := (AccessLog{}).Open(NewMetrics("agent")); records != nil || err != nil {
		t.Errorf("no file: %v, %v", records, err)
	}
}
