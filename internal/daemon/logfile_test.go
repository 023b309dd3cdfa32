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
	"testing/synctest"
	"time"
)

// A file that was copied and cut to nothing (copytruncate) goes on at its beginning, with
// no hole in front.
func TestLogFileThatIsTruncated(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l, err := OpenLogFile(path, 0o600, LogBound{})
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

// Neither the size of a file that cannot be written nor its end waits for the write.
func TestLogFileThatHangs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	reader, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	l, err := OpenLogFile(path, 0o600, LogBound{Bytes: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 1)
	go func() {
		_, err := l.Write(make([]byte, 4<<20)) // more than a pipe holds
		written <- err
	}()
	time.Sleep(100 * time.Millisecond)
	begin := time.Now()
	l.Size()
	if took := time.Since(begin); took > time.Second {
		t.Errorf("its size is told after %v", took)
	}
	if err := l.Close(); err == nil || time.Since(begin) > 2*closePatience {
		t.Errorf("closed after %v: %v", time.Since(begin), err)
	}
	reader.Close()
	if err := <-written; err == nil {
		t.Error("control: the write did not hang")
	}
	if err := l.Close(); err != nil {
		t.Errorf("control: it is not closed when nothing hangs: %v", err)
	}
}

// A file that was moved away is written until SIGHUP; then a new one of the old name.
func TestLogFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l, err := OpenLogFile(path, 0o600, LogBound{})
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
	if _, err := OpenLogFile(filepath.Join(path, "no", "such"), 0o600, LogBound{}); err == nil {
		t.Error("opened in a directory that is not there")
	}
}

// With a bound the file is rotated and nothing is deleted; the bound is on all files of
// its name, also those that somebody else made, and there is room again when they are gone.
func TestLogFileWithABound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const bound = 8000
		dir := t.TempDir()
		path := filepath.Join(dir, "audit.log")
		others := uint64(0)
		l, err := OpenLogFile(path, 0o600, LogBound{Bytes: bound, Free: func() (uint64, uint64) { return 1 << 30, others }})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		line := []byte(strings.Repeat("x", 99) + "\n")
		room := func(want int64) {
			t.Helper()
			time.Sleep(recount)
			if left, of := l.Room(); left != want || of != bound {
				t.Errorf("room %d of %d, want %d", left, of, want)
			}
		}
		room(bound)
		for range 35 {
			if _, err := l.Write(line); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Millisecond)
		}
		rotated, err := filepath.Glob(path + ".*")
		if err != nil || len(rotated) != 3 {
			t.Fatalf("%q, %v", rotated, err)
		}
		for _, file := range rotated {
			if info, err := os.Stat(file); err != nil || info.Size() != bound/8 || info.Mode().Perm() != 0o600 {
				t.Errorf("%s: %v, %v", file, info, err)
			}
		}
		room(bound - 3500)
		for _, name := range []string{"audit.log-20260101.gz", "audit.log.1"} {
			if err := os.WriteFile(filepath.Join(dir, name), line, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(dir, "audit.logbook"), line, 0o600); err != nil { // somebody else's
			t.Fatal(err)
		}
		room(bound - 3700)
		for _, file := range rotated {
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
		}
		room(bound - 700)
		others = 1<<30 - 50 // others of the file system need what is free
		room(50)
		if err := os.Truncate(path, 0); err != nil { // copytruncate
			t.Fatal(err)
		}
		others = 0
		room(bound - 200)
	})
}

// A link or a device is its owner's business: it is not renamed.
func TestLogFileThatIsALinkIsNotRotated(t *testing.T) {
	dir := t.TempDir()
	path, target := filepath.Join(dir, "audit.log"), filepath.Join(dir, "elsewhere")
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
	l, err := OpenLogFile(path, 0o600, LogBound{Bytes: 800})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for range 5 {
		if _, err := l.Write([]byte(strings.Repeat("x", 100))); err != nil {
			t.Fatal(err)
		}
	}
	if to, err := os.Readlink(path); err != nil || to != target {
		t.Errorf("%q, %v", to, err)
	}
	if left, _ := l.Room(); left != 300 {
		t.Errorf("room %d", left)
	}
}
