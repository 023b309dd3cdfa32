package house

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// A package that fails and then passes is named; what fails twice, or does not build, fails.
func TestSecondTry(t *testing.T) {
	const (
		passes = "ok  \tm/a\t0.1s\n"
		flaky  = "--- FAIL: TestOne (7.41s)\n    --- FAIL: TestOne/sub (0.00s)\n--- FAIL: TestTwo (0.01s)\nFAIL\nFAIL\tm/b\t8.5s\n"
		other  = "panic: test timed out after 10m0s\nFAIL\tm/c\t600.0s\n"
		broken = "m/d/d.go:3:1: undefined: x\nFAIL\tm/d [build failed]\n"
	)
	tests := []struct {
		name          string
		first, second string // what go test says; ending in FAIL or not, it exits 1 or 0
		good          bool
		again         string // the packages of the second try, "" if there is none
		named         string
	}{
		{"all pass", passes, "", true, "", ""},
		{"one passes at the second try", passes + flaky + "FAIL\n", "ok  \tm/b\t3s\n", true, "m/b", "m/b TestOne TestTwo\n"},
		{"two do", flaky + passes + other + "FAIL\n", "ok  \tm/b\t3s\nok  \tm/c\t3s\n", true, "m/b m/c", "m/b TestOne TestTwo\nPASSED ONLY AT THE SECOND TRY: m/c (no test was named)\n"},
		{"one fails twice", passes + flaky + "FAIL\n", flaky + "FAIL\n", false, "m/b", ""},
		{"one of two fails twice", flaky + other + "FAIL\n", "ok  \tm/c\t3s\n" + flaky + "FAIL\n", false, "m/b m/c", ""},
		{"one does not build", passes + broken + "FAIL\n", passes, false, "", ""},
		{"one does not build and one is flaky", broken + flaky + "FAIL\n", passes, false, "", ""},
		{"it fails without a package", "go: cannot find main module\nFAIL\n", passes, false, "", ""},
	}
	script, err := filepath.Abs("../../.ci/second-try")
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, text := range map[string]string{
				"first": test.first, "second": test.second,
				"go": "#!/bin/sh\ncd " + dir + "\n" +
					`[ ! -e args ] || mv first done; echo "$@" >>args; say=first; [ -e first ] || say=second; cat $say; ! tail -n 1 $say | grep -qx FAIL` + "\n",
			} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			run := exec.Command("bash", script, "-flag")
			run.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
			out, err := run.CombinedOutput()
			if (err == nil) != test.good {
				t.Errorf("it ends with %v", err)
			}
			if _, named, _ := strings.Cut(string(out), "PASSED ONLY AT THE SECOND TRY: "); named != test.named {
				t.Errorf("named: %q, want %q", named, test.named)
			}
			args, err := os.ReadFile(filepath.Join(dir, "args"))
			want := "test -flag ./...\n"
			if test.again != "" {
				want += "test -flag -count=1 -p 1 " + test.again + "\n"
			}
			if err != nil || string(args) != want {
				t.Errorf("go was called with %q, want %q: %v", args, want, err)
			}
			if t.Failed() {
				t.Logf("it said:\n%s", out)
			}
		})
	}
}
