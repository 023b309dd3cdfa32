package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// What any user may do, to hold a lock on a directory that he can read, keeps no socket from being opened; the lock that
// does is on a file that others cannot open, is waited for a limited time, and its holder is named.
func TestNoOtherUserBlocksASocket(t *testing.T) {
	dir := t.TempDir()
	path, lock := filepath.Join(dir, "agent.sock"), filepath.Join(dir, ".agent.sock.lock")
	open := func() error {
		opened := make(chan error, 1)
		go func() {
			l, err := ListenUnix(path, 0o777)
			if err == nil {
				l.Close()
			}
			opened <- err
		}()
		select {
		case err := <-opened:
			return err
		case <-time.After(2 * lockWait):
			return errors.New("it hangs")
		}
	}
	if err := open(); err != nil {
		t.Fatalf("unhindered: %v", err)
	}
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := syscall.Flock(int(d.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if err := open(); err != nil {
		t.Errorf("with a lock on the directory: %v", err)
	}

	unlock, err := lockSocket(path, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(lock); err != nil || info.Mode() != 0o600 {
		t.Errorf("the lock file: %v %v", info, err)
	}
	_, err = lockSocket(path, 50*time.Millisecond)
	if want := fmt.Sprintf("process %d has held the lock file %s for 50ms", os.Getpid(), lock); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%v, want it to say %q", err, want)
	}
	if other, err := lockSocket(filepath.Join(dir, "other.sock"), time.Second); err != nil {
		t.Errorf("another socket of the directory: %v", err)
	} else {
		other()
	}
	taken := make(chan error, 1)
	go func() {
		next, err := lockSocket(path, 5*time.Second)
		if err == nil {
			next()
		}
		taken <- err
	}()
	unlock()
	if err := <-taken; err != nil {
		t.Errorf("after it was let go: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}

	// A file left by a crash is taken; one that others can open is not.
	if err := os.WriteFile(lock, []byte("1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := open(); err != nil {
		t.Errorf("after a crash: %v", err)
	}
	for name, make := range map[string]func() error{
		"mode 0644":       func() error { return errors.Join(os.WriteFile(lock, nil, 0o600), os.Chmod(lock, 0o644)) },
		"too many levels": func() error { return os.Symlink(filepath.Join(dir, "gone"), lock) },
		"belongs to uid 65534": func() error {
			if os.Geteuid() != 0 {
				return os.ErrPermission
			}
			return errors.Join(os.WriteFile(lock, nil, 0o600), os.Chown(lock, 65534, 65534))
		},
	} {
		if err := make(); errors.Is(err, os.ErrPermission) {
			t.Log("needs root, to make a file of another user")
			continue
		} else if err != nil {
			t.Fatal(err)
		}
		if err := open(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%v, want it to say %q", err, name)
		}
		os.Remove(lock)
	}
}

// The mode is given to the socket, not to what a link in its place leads to.
func TestSocketModeFollowsNoLink(t *testing.T) {
	dir := t.TempDir()
	secret, draft := filepath.Join(dir, "secret"), filepath.Join(dir, "draft")
	if err := errors.Join(os.WriteFile(secret, nil, 0o600), os.Symlink(secret, draft)); err != nil {
		t.Fatal(err)
	}
	place(draft, filepath.Join(dir, "sock"), 0o777)
	if info, err := os.Stat(secret); err != nil || info.Mode() != 0o600 {
		t.Errorf("the file has %v: %v", info.Mode(), err)
	}
	l, err := ListenUnix(filepath.Join(dir, "real.sock"), 0o622)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if info, err := os.Stat(filepath.Join(dir, "real.sock")); err != nil || info.Mode().Perm() != 0o622 {
		t.Errorf("the socket has %v: %v", info.Mode(), err)
	}
}
