package daemon

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A value is made anew when its files hold something else, whatever their times say; a bad
// or half replaced pair leaves the last good one, and is said until it is mended.
func TestFollow(t *testing.T) {
	dir := t.TempDir()
	one, other := filepath.Join(dir, "one"), filepath.Join(dir, "other")
	same := time.Unix(1700000000, 0)
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, same, same); err != nil {
			t.Fatal(err)
		}
	}
	var log bytes.Buffer
	metrics := NewMetrics("agent")
	files := NewFiles(metrics, slog.New(slog.NewTextHandler(&log, nil)))
	parsed := 0
	f, err := Follow(files, "pair", func(contents [][]byte) (string, error) {
		parsed++
		if a := string(contents[0]); a != strings.ToUpper(string(contents[1])) {
			return "", errBroken
		}
		return string(contents[0]), nil
	}, one, other)
	if err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Fatal(err)
	}
	expect := func(want string, wantParsed int, problem string) {
		t.Helper()
		files.look()
		got, err := f.Get()
		if got != want || (err == nil) != (want != "") || parsed != wantParsed {
			t.Errorf("%q, %v after %d times; want %q after %d", got, err, parsed, want, wantParsed)
		}
		list := files.Problems()
		if (problem != "") != (len(list) == 1) || problem != "" && (!strings.Contains(list[0].String(), problem) || list[0].None != (want == "")) {
			t.Errorf("%v, want %q", list, problem)
		}
	}
	expect("", 0, "no such file")
	write(one, "A")
	write(other, "a")
	expect("A", 1, "")
	expect("A", 1, "")
	write(one, "B") // as long, and with the same time
	expect("A", 2, errBroken.Error())
	expect("A", 2, errBroken.Error()) // said, and not tried again
	write(other, "b")
	expect("B", 3, "")
	os.Remove(one)
	expect("B", 3, "what was read before stays in use")
	write(one, "B")
	expect("B", 4, "")
	write(one, strings.Repeat("x", 5<<20))
	expect("B", 4, "over")
	if n := strings.Count(log.String(), "cannot be used; what was read before"); n != 3 {
		t.Errorf("%d warnings in\n%s", n, log.String())
	}
	families, err := metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	found := ""
	for _, family := range families {
		if name := family.GetName(); name == "entente_agent_files_unusable" || name == "entente_agent_file_reloads_total" {
			found += family.String()
		}
	}
	for _, want := range []string{`value:"failed"`, "counter:{value:3", "gauge:{value:1}"} {
		if !strings.Contains(strings.ReplaceAll(found, " ", ""), want) {
			t.Errorf("no %s in %s", want, found)
		}
	}
}
