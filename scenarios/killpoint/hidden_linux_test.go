package killpoint

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// A program that seals its memory hides its changes from a user who is not root. That is
// an error, and neither a run without points nor a reason to skip.
func TestNoPointIsHidden(t *testing.T) {
	if dir := os.Getenv("ENTENTE_TEST_KILLPOINT"); dir != "" {
		if os.Getenv("ENTENTE_TEST_SEALED") != "" {
			if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
				t.Fatal(err)
			}
		}
		os.Mkdir(filepath.Join(dir, "new"), 0o700)
		return
	}
	for _, sealed := range []string{"", "1"} {
		dir := t.TempDir()
		r, err := Run(Command{
			Path: os.Args[0], Args: []string{"-test.run=^TestNoPointIsHidden$"},
			Env: append(os.Environ(), "ENTENTE_TEST_KILLPOINT="+dir, "ENTENTE_TEST_SEALED="+sealed), Dir: dir,
		}, 0)
		if errors.Is(err, ErrUnsupported) || errors.Is(err, syscall.EPERM) {
			t.Skipf("NOT RUN: %v", err)
		}
		if sealed != "" && err != nil {
			if !strings.Contains(err.Error(), "debuggable") {
				t.Errorf("sealed: %v", err)
			}
			continue
		}
		if want := []string{"mkdirat new"}; err != nil || !r.Killed || !slices.Equal(r.Points, want) {
			t.Errorf("sealed %q: %+v, %v", sealed, r, err)
		}
	}
}
