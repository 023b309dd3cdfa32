package daemon

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestMain is also the service that TestHandover replaces: it answers every
// connection, and every datagram, with its name.
func TestMain(m *testing.M) {
	name := os.Getenv("HANDOVER_NAME")
	if name == "" {
		os.Exit(m.Run())
	}
	os.Exit(Main(context.Background(), slog.New(slog.DiscardHandler), func(ctx context.Context) error {
		var open []io.Closer
		answer := func(l net.Listener, err error) error {
			if err != nil {
				return err
			}
			open = append(open, l)
			go func() {
				for {
					conn, err := l.Accept()
					if err != nil {
						return
					}
					io.WriteString(conn, name)
					conn.Close()
				}
			}()
			return nil
		}
		for _, address := range strings.Fields(os.Getenv("HANDOVER_TCP")) {
			if err := answer(Listen(address)); err != nil {
				return err
			}
		}
		if err := answer(ListenUnix(os.Getenv("HANDOVER_UNIX"), 0o600)); err != nil {
			return err
		}
		udp, err := ListenPacket(os.Getenv("HANDOVER_UDP"))
		if err != nil {
			return err
		}
		open = append(open, udp)
		go func() {
			for buffer := make([]byte, 64); ; {
				_, from, err := udp.ReadFrom(buffer)
				if err != nil {
					return
				}
				udp.WriteTo([]byte(name), from)
			}
		}()
		gone, err := Listen(os.Getenv("HANDOVER_GONE")) // a door that is closed while the process goes on
		if err != nil {
			return err
		}
		gone.Close()
		fmt.Println("serving")
		<-ctx.Done()
		for _, c := range open {
			c.Close()
		}
		return ctx.Err()
	}))
}

// manager is a service manager, as far as sockets go.
type manager struct {
	t      *testing.T
	socket *net.UnixConn
	stored map[string]*os.File
	env    []string
}

func newManager(t *testing.T, env ...string) *manager {
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { socket.Close() })
	return &manager{t, socket, map[string]*os.File{}, env}
}

// receive takes what the service has said so far.
func (m *manager) receive() {
	for {
		message, rights := make([]byte, 1024), make([]byte, 1024)
		m.socket.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		n, r, _, _, err := m.socket.ReadMsgUnix(message, rights)
		if err != nil {
			return
		}
		text := string(message[:n])
		_, name, _ := strings.Cut(text, "FDNAME=")
		if strings.ContainsAny(name, ":\n") || len(name) > 255 {
			m.t.Errorf("a name that is not allowed: %q", name)
		}
		switch {
		case strings.HasPrefix(text, "FDSTOREREMOVE=1\n"):
			m.stored[name].Close()
			delete(m.stored, name)
		case strings.HasPrefix(text, "FDSTORE=1\n"):
			control, err := syscall.ParseSocketControlMessage(rights[:r])
			if err != nil {
				m.t.Fatal(err)
			}
			fds, err := syscall.ParseUnixRights(&control[0])
			if err != nil || len(fds) != 1 {
				m.t.Fatal(fds, err)
			}
			m.stored[name] = os.NewFile(uintptr(fds[0]), name)
		default:
			m.t.Errorf("the manager was told %q", text)
		}
	}
}

// start starts the service with what is stored, under the names that rename gives.
func (m *manager) start(name string, rename func(string) string) (stop func()) {
	m.t.Helper()
	// LISTEN_PID is the process's own number, which the shell has before exec.
	cmd := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ exec "$0"`, os.Args[0])
	var names []string
	for _, stored := range m.stored {
		cmd.ExtraFiles = append(cmd.ExtraFiles, stored)
		names = append(names, rename(stored.Name()))
	}
	cmd.Env = slices.Concat(os.Environ(), m.env, []string{
		"HANDOVER_NAME=" + name, "NOTIFY_SOCKET=" + m.socket.LocalAddr().String(),
		fmt.Sprint("LISTEN_FDS=", len(names)), "LISTEN_FDNAMES=" + strings.Join(names, ":"),
	})
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		m.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	line := make([]byte, 16)
	if n, err := stdout.Read(line); string(line[:n]) != "serving\n" {
		m.t.Fatalf("%q %v", line[:n], err)
	}
	m.receive()
	return func() {
		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			m.t.Error(err)
		}
		m.receive()
	}
}

func freePort(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// A connection that arrives while a process is replaced waits for the next one; a door
// that was closed for good is not handed on.
func TestHandover(t *testing.T) {
	tcp, udp, gone := freePort(t), freePort(t), freePort(t)
	path := filepath.Join(t.TempDir(), "socket")
	m := newManager(t, "HANDOVER_TCP="+tcp, "HANDOVER_UNIX="+path, "HANDOVER_UDP="+udp, "HANDOVER_GONE="+gone)
	ask := func(network, address string) net.Conn {
		conn, err := net.Dial(network, address)
		if err != nil {
			t.Fatalf("%s %s: %v", network, address, err)
		}
		t.Cleanup(func() { conn.Close() })
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		if network == "udp" {
			io.WriteString(conn, "?")
		}
		return conn
	}
	hear := func(conn net.Conn, want string) {
		t.Helper()
		answer := make([]byte, 16)
		if n, err := conn.Read(answer); string(answer[:n]) != want {
			t.Errorf("%s: %q %v, want %q", conn.RemoteAddr().Network(), answer[:n], err, want)
		}
	}
	same := func(name string) string { return name }
	byUnit := func(name string) string { // as systemd names what a socket unit opens
		if strings.HasPrefix(name, "unix=") {
			return name
		}
		return "entente.socket"
	}
	var waiting []net.Conn // of those who came while no process was there
	names := []string{"first", "second", "third"}
	for i, rename := range []func(string) string{same, same, byUnit} {
		stop := m.start(names[i], rename)
		if len(m.stored) != 3 {
			t.Fatalf("the manager holds %d sockets, want those that are open", len(m.stored))
		}
		if i > 0 {
			for _, conn := range waiting {
				hear(conn, names[i])
			}
		}
		waiting = nil
		for network, address := range map[string]string{"tcp": tcp, "unix": path, "udp": udp} {
			hear(ask(network, address), names[i])
		}
		if _, err := net.Dial("tcp", gone); err == nil {
			t.Error("a door that is closed still takes connections")
		}
		stop()
		for network, address := range map[string]string{"tcp": tcp, "unix": path, "udp": udp} {
			waiting = append(waiting, ask(network, address))
		}
	}
	for _, file := range m.stored {
		file.Close()
	}
	if _, err := net.Dial("tcp", tcp); err == nil {
		t.Error("control: without a manager nobody takes the connection, and yet it was made")
	}
}
