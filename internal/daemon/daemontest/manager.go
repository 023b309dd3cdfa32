// Package daemontest holds the sockets of real processes over their restarts, as
// systemd does, and finds free ports, for the tests of other packages.
package daemontest

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Manager is a service manager as far as sockets go: sd_listen_fds(3), and FDSTORE of
// sd_notify(3). It is for one goroutine.
type Manager struct {
	t      testing.TB
	socket *net.UnixConn
	Stored map[string]*os.File // what it holds, by the name that the process gave it
}

// NewManager hears from processes at a socket of that path. All that it holds is closed
// at the end of the test.
func NewManager(t testing.TB, path string) *Manager {
	t.Helper()
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	m := &Manager{t, socket, map[string]*os.File{}}
	t.Cleanup(m.Close)
	return m
}

// Close lets go of everything.
func (m *Manager) Close() {
	for _, file := range m.Stored {
		file.Close()
	}
	m.socket.Close()
}

// Command is the program with what is held as its first file descriptors, under the
// names that rename gives them.
func (m *Manager) Command(rename func(string) string, program string, args ...string) *exec.Cmd {
	// LISTEN_PID is the process's own number, which the shell has before exec.
	cmd := exec.Command("/bin/sh", append([]string{"-c", `LISTEN_PID=$$ exec "$0" "$@"`, program}, args...)...)
	var names []string
	for _, stored := range m.Stored {
		cmd.ExtraFiles = append(cmd.ExtraFiles, stored)
		names = append(names, rename(stored.Name()))
	}
	cmd.Env = slices.Concat(os.Environ(), []string{
		"NOTIFY_SOCKET=" + m.socket.LocalAddr().String(),
		fmt.Sprint("LISTEN_FDS=", len(names)), "LISTEN_FDNAMES=" + strings.Join(names, ":"),
	})
	return cmd
}

// Receive takes in what processes have said, until they have been silent for a moment.
func (m *Manager) Receive() {
	m.t.Helper()
	for {
		message, rights := make([]byte, 1024), make([]byte, 1024)
		m.socket.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		n, r, _, _, err := m.socket.ReadMsgUnix(message, rights)
		if err != nil {
			return
		}
		text := string(message[:n])
		_, name, _ := strings.Cut(text, "FDNAME=")
		if strings.ContainsAny(name, ":\n") || name == "" || len(name) > 255 {
			m.t.Errorf("a name that systemd does not allow: %q", name)
		}
		switch {
		case strings.HasPrefix(text, "FDSTOREREMOVE=1\n"):
			m.Stored[name].Close()
			delete(m.Stored, name)
		case strings.HasPrefix(text, "FDSTORE=1\n"):
			control, err := syscall.ParseSocketControlMessage(rights[:r])
			if err != nil || len(control) != 1 {
				m.t.Fatal(control, err)
			}
			fds, err := syscall.ParseUnixRights(&control[0])
			if err != nil || len(fds) != 1 {
				m.t.Fatal(fds, err)
			}
			m.Stored[name] = os.NewFile(uintptr(fds[0]), name)
		default:
			m.t.Errorf("the manager was told %q", text)
		}
	}
}
