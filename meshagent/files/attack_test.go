package files

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/entente-mesh/entente/internal/safepath"
)

const app, stranger = 1234, 1235

// openBase is a directory of root that every user can enter.
func openBase(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to act as several users")
	}
	base := t.TempDir()
	for p := base; p != filepath.Clean(os.TempDir()); p = filepath.Dir(p) {
		if err := os.Chmod(p, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return base
}

func as(uid int, name string, args ...string) *exec.Cmd {
	c := exec.Command(name, args...)
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	return c
}

// An agent of root writes for a user into the user's own directory, and a symbolic link that
// the user put in the place of that directory leads it nowhere.
func TestFilesFollowNoLinkOfAnotherUser(t *testing.T) {
	base := openBase(t)
	home, etc := filepath.Join(base, "home"), filepath.Join(base, "etc")
	if err := errors.Join(os.Mkdir(home, 0o755), os.Chown(home, app, app), os.Mkdir(etc, 0o755),
		os.WriteFile(filepath.Join(etc, "key.pem"), []byte("root's key"), 0o600)); err != nil {
		t.Fatal(err)
	}
	key := []file{{filepath.Join(home, "tls", "key.pem"), 0o600, []byte("key of app")}}
	if out, err := as(app, "mkdir", filepath.Join(home, "tls")).CombinedOutput(); err != nil {
		t.Fatalf("%s %v", out, err)
	}
	if err := write(key, ids{app, app}); err != nil {
		t.Errorf("into the user's own directory: %v", err)
	}
	info, err := os.Stat(key[0].path)
	if err != nil || info.Sys().(*syscall.Stat_t).Uid != app || info.Mode() != 0o600 {
		t.Errorf("the user's file: %v %v", info, err)
	}
	if err := write(key, ids{-1, -1}); !errors.Is(err, safepath.ErrUnsafe) {
		t.Errorf("root's file into a directory of app: %v", err)
	}
	if err := write(key, ids{-1, -1}, app); err != nil {
		t.Errorf("root's file, of an entry of app: %v", err)
	}

	if out, err := as(app, "sh", "-c", fmt.Sprintf("rm -r %[1]s/tls && ln -s %[2]s %[1]s/tls", home, etc)).CombinedOutput(); err != nil {
		t.Fatalf("%s %v", out, err)
	}
	err = write(key, ids{app, app})
	if !errors.Is(err, safepath.ErrUnsafe) || !strings.Contains(err.Error(), "home/tls is a symbolic link") {
		t.Errorf("through a link of app: %v", err)
	}
	got, _ := os.ReadFile(filepath.Join(etc, "key.pem"))
	info, err = os.Stat(filepath.Join(etc, "key.pem"))
	if err != nil || string(got) != "root's key" || info.Sys().(*syscall.Stat_t).Uid != 0 {
		t.Errorf("root's file holds %q: %v", got, err)
	}
}

// sleeper is a process of a user, and how it ends.
func sleeper(t *testing.T, uid int) (pid int, ended func(within time.Duration) bool) {
	t.Helper()
	// The shell says when it runs as the user.
	c := as(uid, "sh", "-c", "echo up; exec sleep 60")
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() { c.Process.Wait(); cancel() }()
	t.Cleanup(func() { c.Process.Kill(); <-ctx.Done() })
	return c.Process.Pid, func(within time.Duration) bool {
		select {
		case <-ctx.Done():
			return true
		case <-time.After(within):
			return false
		}
	}
}

// A pid file has a process signalled that the pid file's owner could signal himself, or, if
// only root can change it, one of root or of the files' user; no other.
func TestPIDFileSignalsOnlyItsOwnersProcesses(t *testing.T) {
	base := openBase(t)
	for name, test := range map[string]struct {
		file    int // owner of the pid file
		mode    os.FileMode
		process int
		users   []int
		ends    bool
		says    string
	}{
		"the user's process":                 {app, 0o644, app, []int{app}, true, ""},
		"root's pid file, the user's":        {0, 0o644, app, []int{app}, true, ""},
		"root's pid file and process":        {0, 0o644, 0, nil, true, ""},
		"root's process, in a user's file":   {app, 0o644, 0, []int{app}, false, "runs as uid 0"},
		"with root as the files' owner":      {app, 0o644, 0, []int{0, app}, false, "runs as uid 0"},
		"another user's process":             {app, 0o644, stranger, []int{app}, false, "runs as uid 1235"},
		"another user's, in root's pid file": {0, 0o644, stranger, []int{app}, false, "runs as uid 1235"},
		"a pid file of a user not named":     {app, 0o644, 0, nil, false, "belongs to uid 1234"},
		"a pid file that all can write":      {0, 0o666, 0, nil, false, "mode 0666"},
	} {
		t.Run(name, func(t *testing.T) {
			pid, ended := sleeper(t, test.process)
			path := filepath.Join(base, strings.ReplaceAll(name, " ", "-"))
			if err := errors.Join(os.WriteFile(path, []byte(strconv.Itoa(pid)+"\n"), 0o600), os.Chmod(path, test.mode), os.Chown(path, test.file, test.file)); err != nil {
				t.Fatal(err)
			}
			err := signal(path, syscall.SIGUSR1, test.users)
			if test.says == "" && err != nil || test.says != "" && (err == nil || !strings.Contains(err.Error(), test.says)) {
				t.Errorf("%v, want it to say %q", err, test.says)
			}
			within := 10 * time.Second
			if !test.ends {
				within = 100 * time.Millisecond
			}
			if ended(within) != test.ends {
				t.Errorf("it ended: %v", !test.ends)
			}
		})
	}
}
