package daemon

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
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
	unlock, err := lockDir(dir)
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
	if err := os.Chmod(draft, mode); err != nil {
		return nil, err
	}
	own, err := os.Lstat(draft)
	if err != nil {
		return nil, err
	}
	return own, os.Rename(draft, path)
}

// lockDir keeps two processes that start at the same moment from both finding the same stale socket.
func lockDir(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("directory %s does not exist: create it: %w", dir, err)
	}
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("locking %s: %w", dir, err)
	}
	return func() { f.Close() }, nil
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
