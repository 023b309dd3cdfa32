package daemon

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Listen listens on a TCP address, "host:port": at the socket that a service manager has held for it, if there is one.
// Its errors say what is wrong and what to do.
func Listen(addr string) (net.Listener, error) {
	if _, _, err := net.SplitHostPort(addr); err != nil {
		return nil, fmt.Errorf("address %q is not of the form host:port: %w", addr, err)
	}
	if listener, err := takeTCP(addr); listener != nil || err != nil {
		return listener, err
	}
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, listenError(addr, err)
	}
	return hold(listener), nil
}

func listenError(addr string, err error) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("address %s is already in use: stop the process that listens there (ss -ltnp shows it) or choose another port: %w", addr, err)
	case errors.Is(err, syscall.EACCES):
		return fmt.Errorf("no permission to listen on address %s: choose a port of 1024 or above, or grant CAP_NET_BIND_SERVICE: %w", addr, err)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return fmt.Errorf("address %s cannot be assigned: no network interface of this machine has it; choose one that does (ip addr shows them): %w", addr, err)
	default:
		return fmt.Errorf("cannot listen on address %s: %w", addr, err)
	}
}

// Linux has 108 bytes for the path of a socket and its final zero; Darwin 104.
const maxSocketPath = 103

// ListenUnix listens on a Unix socket with exactly this mode. A socket that a dead process left behind is replaced; one on
// which somebody answers is not, nor is any other kind of file. Connections are *net.UnixConn. Closing the listener
// removes the socket, unless another process has put its own there, or a service manager holds it for the next process.
func ListenUnix(path string, mode fs.FileMode) (net.Listener, error) {
	if file := claim(unixKey(path)); file != nil {
		defer file.Close()
		listener, err := net.FileListener(file)
		if err != nil {
			return nil, fmt.Errorf("the socket that was handed over for %s: %w", path, err)
		}
		if unix, ok := listener.(*net.UnixListener); ok {
			return &unixListener{UnixListener: unix, path: path, key: unixKey(path)}, nil
		}
		listener.Close()
		return nil, fmt.Errorf("the socket that was handed over for %s is no unix socket", path)
	}
	listener, err := listenUnix(path, mode)
	if err != nil {
		return nil, fmt.Errorf("cannot listen on socket %s: %w", path, err)
	}
	return listener, nil
}

func listenUnix(path string, mode fs.FileMode) (net.Listener, error) {
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("its path has %d bytes and the system allows %d: choose a shorter one", len(path), maxSocketPath)
	}
	dir := filepath.Dir(path)
	unlock, err := lockSocket(path, lockWait)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := checkStale(path); err != nil {
		return nil, err
	}

	// Bound under another name, it gets its mode before anybody can find it, and takes a dead one's place in one step.
	draft := filepath.Join(dir, "."+strings.ToLower(rand.Text()[:6]))
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: draft, Net: "unix"})
	if errors.Is(err, syscall.EACCES) {
		return nil, fmt.Errorf("no permission to create files in %s: %w", dir, err)
	}
	if err != nil {
		return nil, err
	}
	listener.SetUnlinkOnClose(false)
	own, err := place(draft, path, mode)
	if err != nil {
		listener.Close()
		os.Remove(draft)
		return nil, err
	}
	held := &unixListener{UnixListener: listener, path: path, own: own}
	if key := unixKey(path); store(listener, key) {
		held.key = key
	}
	return held, nil
}

func place(draft, path string, mode fs.FileMode) (fs.FileInfo, error) {
	// Who may change the directory could put a link there.
	if err := chmodSocket(draft, mode); err != nil {
		return nil, err
	}
	own, err := os.Lstat(draft)
	if err != nil {
		return nil, err
	}
	return own, os.Rename(draft, path)
}

const (
	lockWait  = 5 * time.Second // for another process that opens the same socket, which takes no time
	lockRetry = 10 * time.Millisecond
)

// lockSocket keeps two processes that start at the same moment from both finding the same stale socket. The lock is on a
// file that no other user can open, beside the socket: whoever can open a file can hold a lock on it for ever.
func lockSocket(path string, wait time.Duration) (unlock func(), err error) {
	dir, name := filepath.Split(path)
	lock := filepath.Join(dir, "."+name+".lock")
	for end := time.Now().Add(wait); ; time.Sleep(lockRetry) {
		f, err := openLock(lock)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("directory %s does not exist: create it: %w", filepath.Clean(dir), err)
		}
		if errors.Is(err, syscall.EACCES) {
			return nil, fmt.Errorf("no permission to create files in %s, or another user has made %s: %w", filepath.Clean(dir), lock, err)
		}
		if err != nil {
			return nil, err
		}
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil && inPlace(f, lock) {
			// For whoever waits in vain.
			if err := f.Truncate(0); err == nil {
				fmt.Fprintf(f, "%d\n", os.Getpid())
			}
			return func() {
				os.Remove(lock) // while it is held: see inPlace
				f.Close()
			}, nil
		}
		holder := ""
		if err != nil {
			holder = lockHolder(f)
		}
		f.Close()
		if err != nil && !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			return nil, fmt.Errorf("locking %s: %w", lock, err)
		}
		if time.Now().After(end) {
			return nil, fmt.Errorf("%s has held the lock file %s for %s: end it, or choose another path", holder, lock, wait)
		}
	}
}

// openLock opens a lock file that nobody but this process's user and root can open.
func openLock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil {
		switch is, ok := info.Sys().(*syscall.Stat_t); {
		case !info.Mode().IsRegular():
			err = fmt.Errorf("%s is not a regular file: remove it", path)
		case !ok || is.Uid != 0 && int(is.Uid) != os.Geteuid():
			err = fmt.Errorf("the lock file %s belongs to uid %d, who could hold it for ever: remove it, or choose a directory in which only root and this process's user can create files", path, is.Uid)
		case info.Mode().Perm()&0o077 != 0:
			err = fmt.Errorf("the lock file %s has mode %04o, so that other users could hold it for ever: remove it", path, info.Mode().Perm())
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// inPlace tells whether the file that was locked still has its name: the process before removes it.
func inPlace(f *os.File, path string) bool {
	held, err := f.Stat()
	if err != nil {
		return false
	}
	now, err := os.Lstat(path)
	return err == nil && os.SameFile(held, now)
}

// lockHolder says who holds a lock file, as far as it tells.
func lockHolder(f *os.File) string {
	text := make([]byte, 16)
	n, _ := f.ReadAt(text, 0)
	if pid, err := strconv.Atoi(strings.TrimSpace(string(text[:n]))); err == nil && pid > 0 {
		return fmt.Sprintf("process %d", pid)
	}
	return "another process"
}

func checkStale(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != fs.ModeSocket:
		return errors.New("there is a file of that name that is no socket: move it away or choose another path")
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	switch {
	case err == nil:
		conn.Close()
		return errors.New("another process answers on it: stop that process or choose another path")
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, fs.ErrNotExist):
		return nil // nobody listens: left behind
	default:
		return fmt.Errorf("finding out whether another process uses it: %w", err)
	}
}

// MakeOpenDir makes a directory that is missing, and those above it, so that everybody may
// enter. It leaves alone what is there.
func MakeOpenDir(dir string) error {
	err := os.Mkdir(dir, 0o755)
	if errors.Is(err, fs.ErrNotExist) {
		if err := MakeOpenDir(filepath.Dir(dir)); err != nil {
			return err
		}
		err = os.Mkdir(dir, 0o755)
	}
	if errors.Is(err, fs.ErrExist) {
		return nil // what is wrong with it, the socket will say
	}
	if err != nil {
		return err
	}
	// The umask took bits away. A link in its place is not followed.
	made, err := os.OpenFile(dir, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer made.Close()
	return made.Chmod(0o755)
}

func unixKey(path string) string { return socketKey(&net.UnixAddr{Name: path, Net: "unix"}) }

type unixListener struct {
	*net.UnixListener
	path  string
	own   fs.FileInfo // nil: another process has made it
	key   string      // under which a service manager holds a copy; empty: none does
	close sync.Once
}

func (l *unixListener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

func (l *unixListener) Close() error {
	l.close.Do(func() {
		if l.key != "" {
			forget(l.key)
			if handover.leaving.Load() {
				return // the next process serves it under the same path
			}
		}
		if l.own == nil {
			return
		}
		if now, err := os.Lstat(l.path); err == nil && os.SameFile(now, l.own) {
			os.Remove(l.path)
		}
	})
	return l.UnixListener.Close()
}
