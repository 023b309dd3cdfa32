package daemon

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A file that was copied and cut to nothing (copytruncate) goes on at its beginning, with
// no hole in front.
func TestLogFileThatIsTruncated(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l, err := OpenLogFile(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, line := range []string{"one\n", "two\n"} {
		if err := os.Truncate(path, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := l.Write([]byte(line)); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != line {
			t.Errorf("%q, %v", got, err)
		}
	}
}

// A file that was moved away is written until SIGHUP; then a new one of the old name.
func TestLogFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l, err := OpenLogFile(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	write := func(line string) {
		t.Helper()
		if _, err := l.Write([]byte(line + "\n")); err != nil {
			t.Fatal(err)
		}
	}
	holds := func(path, want string) {
		t.Helper()
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("%s holds %q, %v; want %q", path, got, err, want)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- l.Run(ctx, slog.New(slog.DiscardHandler)) }()
	write("one")
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	write("two")
	syscall.Kill(os.Getpid(), syscall.SIGHUP)
	for begin := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(path); err == nil {
			break
		}
		if time.Since(begin) > 5*time.Second {
			t.Fatal("SIGHUP does nothing")
		}
	}
	write("three")
	holds(path+".1", "one\ntwo\n")
	holds(path, "three\n")
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}

	// What cannot be opened leaves the old one in use.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := l.Reopen(); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("reopened a directory: %v", err)
	}
	write("four")
	l.Close()
	if _, err := l.Write([]byte("five")); err == nil {
		t.Error("a closed file was written")
	}
	if _, err := OpenLogFile(filepath.Join(path, "no", "such"), 0o600); err == nil {
		t.Error("opened in a directory that is not there")
	}
}
