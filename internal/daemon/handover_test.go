package daemon

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/entente-mesh/entente/internal/daemon/daemontest"
)

func init() { children["HANDOVER_NAME"] = beService }

// beService is the service that TestHandover replaces: it answers every connection, and
// every datagram, with its name.
func beService(name string) int {
	return Main(context.Background(), slog.New(slog.DiscardHandler), func(ctx context.Context) error {
		var open []io.Closer
		serve := func(l net.Listener, err error) error {
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
			if err := serve(Listen(address)); err != nil {
				return err
			}
		}
		if err := serve(ListenUnix(os.Getenv("HANDOVER_UNIX"), 0o600)); err != nil {
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
	})
}

// start starts the service with what the manager holds.
func start(t *testing.T, m *daemontest.Manager, rename func(string) string, env ...string) (stop func()) {
	t.Helper()
	cmd := m.Command(rename, os.Args[0])
	cmd.Env = append(cmd.Env, env...)
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 16)
	if n, err := stdout.Read(line); string(line[:n]) != "serving\n" {
		t.Fatalf("%q %v", line[:n], err)
	}
	m.Receive()
	return func() {
		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
		m.Receive()
	}
}

// A connection that arrives while a process is replaced waits for the next one; a door
// that was closed for good is not handed on.
func TestHandover(t *testing.T) {
	tcp, udp, gone := daemontest.FreeAddress(t), daemontest.FreeAddress(t), daemontest.FreeAddress(t)
	path := filepath.Join(t.TempDir(), "socket")
	m := daemontest.NewManager(t, filepath.Join(t.TempDir(), "notify"))
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
		stop := start(t, m, rename, "HANDOVER_NAME="+names[i], "HANDOVER_TCP="+tcp, "HANDOVER_UNIX="+path, "HANDOVER_UDP="+udp, "HANDOVER_GONE="+gone)
		if len(m.Stored) != 3 {
			t.Fatalf("the manager holds %d sockets, want those that are open", len(m.Stored))
		}
		for _, conn := range waiting {
			hear(conn, names[i])
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
	m.Close()
	if _, err := net.Dial("tcp", tcp); err == nil {
		t.Error("control: without a manager nobody takes the connection, and yet it was made")
	}
}
