package killpoint

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
)

// The program is this test, which writes a file, syncs it and renames it.
func TestEachPointIsMet(t *testing.T) {
	if dir := os.Getenv("ENTENTE_TEST_KILLPOINT"); dir != "" {
		f, err := os.Create(filepath.Join(dir, "new"))
		if err != nil {
			t.Fatal(err)
		}
		f.WriteString("whole")
		f.Sync()
		f.Close()
		os.Rename(f.Name(), filepath.Join(dir, "file"))
		return
	}
	want := []string{"openat new", "write new", "fsync new", "renameat file"}
	for at := range len(want) + 1 {
		dir := t.TempDir()
		command := Command{
			Path: os.Args[0], Args: []string{"-test.run=^TestEachPointIsMet$"},
			Env: append(os.Environ(), "ENTENTE_TEST_KILLPOINT="+dir), Dir: dir,
		}
		r, err := Run(command, at)
		if errors.Is(err, ErrUnsupported) || errors.Is(err, syscall.EPERM) {
			t.Skipf("NOT RUN: %v", err)
		}
		if err != nil {
			t.Fatal(err)
		}
		if at == len(want) {
			if r.Killed || r.ExitCode != 0 || !slices.Equal(r.Points, want) {
				t.Errorf("%+v", r)
			}
			return
		}
		if !r.Killed || !slices.Equal(r.Points, want[:at+1]) {
			t.Fatalf("killed before %d: %+v", at, r)
		}
		_, unfinished := os.Stat(filepath.Join(dir, "new"))
		_, finished := os.Stat(filepath.Join(dir, "file"))
		if (unfinished == nil) != (at > 0) || finished == nil {
			t.Errorf("killed before %q: new %v, file %v", want[at], unfinished, finished)
		}
	}
}
