package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// A service manager that holds a process's sockets while the process is replaced lets
// connections wait in the meantime: none is refused. Two ways lead there, and both are
// systemd's: the manager opens the sockets (sd_listen_fds(3)), or the process gives it
// a copy of each that it opens (sd_notify(3), FDSTORE=1). In either case the next
// process finds them among its first file descriptors, and Listen takes the one that
// is bound to the address it was asked for.

const (
	firstFD  = 3 // SD_LISTEN_FDS_START
	maxFDs   = 4096
	maxName  = 255         // of a stored descriptor
	claiming = time.Minute // what nobody has asked for by then is given up
)

// handover is what this process was handed, and to whom it hands on: there is one of it,
// as there is one environment.
var handover struct {
	receive   sync.Once
	mu        sync.Mutex
	unclaimed []handed
	manager   *net.UnixConn // nil: nobody holds descriptors
	leaving   atomic.Bool   // what is closed from now on stays with the manager
}

type handed struct {
	file *os.File
	name string // as it was stored; of another kind if the manager has opened it
	key  string // of what it is bound to
}

// received reads the environment, once, and takes it away from children.
func received() {
	handover.receive.Do(func() {
		pid, fds, names := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS"), os.Getenv("LISTEN_FDNAMES")
		manager := os.Getenv("NOTIFY_SOCKET")
		for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET"} {
			os.Unsetenv(name)
		}
		if n, err := strconv.Atoi(fds); err == nil && n > 0 && n <= maxFDs && pid == strconv.Itoa(os.Getpid()) {
			list := strings.Split(names, ":")
			for i := range n {
				syscall.CloseOnExec(firstFD + i)
				h := handed{file: os.NewFile(uintptr(firstFD+i), "handed over")}
				if i < len(list) {
					h.name = list[i]
				}
				if h.key = boundTo(h); h.key == "" {
					h.file.Close()
					continue
				}
				handover.unclaimed = append(handover.unclaimed, h)
			}
		}
		if manager != "" {
			if strings.HasPrefix(manager, "@") {
				manager = "\x00" + manager[1:]
			}
			if conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: manager, Net: "unixgram"}); err == nil {
				handover.manager = conn
			}
		}
	})
}

// boundTo is the key of a socket. A unix socket of ours was bound under another name
// than it has now, so its own word does not count.
func boundTo(h handed) string {
	if strings.HasPrefix(h.name, "unix=") {
		return h.name
	}
	if l, err := net.FileListener(h.file); err == nil {
		defer l.Close()
		return socketKey(l.Addr())
	}
	if c, err := net.FilePacketConn(h.file); err == nil {
		defer c.Close()
		return socketKey(c.LocalAddr())
	}
	return ""
}

// socketKey names a socket by network and address, in what sd_notify(3) allows: no
// colon. Every unspecified address is the same one.
func socketKey(address net.Addr) string {
	text := address.String()
	if host, port, err := net.SplitHostPort(text); err == nil {
		if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
			host = "*"
		}
		text = host + "|" + port
	}
	return address.Network() + "=" + strings.ReplaceAll(text, ":", "|")
}

// claim takes the socket of that key, nil if none was handed over.
func claim(key string) *os.File {
	received()
	handover.mu.Lock()
	defer handover.mu.Unlock()
	for i, h := range handover.unclaimed {
		if h.key == key {
			handover.unclaimed = append(handover.unclaimed[:i:i], handover.unclaimed[i+1:]...)
			return h.file
		}
	}
	return nil
}

// store gives the manager a copy of a socket. It is worth no error: without one the
// address is closed while this process is replaced.
func store(socket syscall.Conn, key string) (stored bool) {
	received()
	if handover.manager == nil || len(key) > maxName {
		return false
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return false
	}
	to, err := handover.manager.SyscallConn()
	if err != nil {
		return false
	}
	message := []byte("FDSTORE=1\nFDNAME=" + key)
	_ = raw.Control(func(fd uintptr) {
		_ = to.Write(func(manager uintptr) bool { // WriteMsgUnix wants an address, which a connected socket may not be given
			err := syscall.Sendmsg(int(manager), message, syscall.UnixRights(int(fd)), nil, 0)
			stored = err == nil
			return err != syscall.EAGAIN
		})
	})
	return stored
}

// forget has the manager close its copy, unless this process is being replaced.
func forget(key string) {
	if handover.manager != nil && !handover.leaving.Load() {
		_, _ = handover.manager.Write([]byte("FDSTOREREMOVE=1\nFDNAME=" + key))
	}
}

// giveUp closes, after a while, what was handed over for something that this process
// does not serve any more: connections to it would wait for ever.
func giveUp(ctx context.Context, log *slog.Logger) {
	received()
	select {
	case <-ctx.Done():
		return
	case <-time.After(claiming):
	}
	handover.mu.Lock()
	defer handover.mu.Unlock()
	for _, h := range handover.unclaimed {
		log.Warn("closed a socket that was handed over and is not used: take it out of the socket unit, if one names it", "socket", h.key)
		forget(h.key)
		h.file.Close()
	}
	handover.unclaimed = nil
}

// heldListener is a listener that the manager has a copy of.
type heldListener struct {
	net.Listener
	key  string
	once sync.Once
}

func (l *heldListener) Close() error {
	l.once.Do(func() { forget(l.key) })
	return l.Listener.Close()
}

type heldPacketConn struct {
	*net.UDPConn
	key  string
	once sync.Once
}

func (c *heldPacketConn) Close() error {
	c.once.Do(func() { forget(c.key) })
	return c.UDPConn.Close()
}

// takeTCP returns nil when nothing was handed over for the address.
func takeTCP(addr string) (net.Listener, error) {
	resolved, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		return nil, nil // listening says so better
	}
	if resolved.IP == nil {
		resolved.IP = net.IPv6unspecified
	}
	key := socketKey(resolved)
	file := claim(key)
	if file == nil {
		return nil, nil
	}
	defer file.Close()
	l, err := net.FileListener(file)
	if err != nil {
		return nil, fmt.Errorf("the socket that was handed over for %s: %w", addr, err)
	}
	return &heldListener{Listener: l, key: key}, nil
}

// hold gives the manager a copy of a new listener and returns what stands for both.
func hold(l net.Listener) net.Listener {
	key := socketKey(l.Addr())
	if socket, ok := l.(syscall.Conn); ok && store(socket, key) {
		return &heldListener{Listener: l, key: key}
	}
	return l
}

// ListenPacket opens a UDP address as Listen opens a TCP one.
func ListenPacket(addr string) (net.PacketConn, error) {
	resolved, err := net.ResolveUDPAddr("udp", addr)
	if err != nil {
		return nil, fmt.Errorf("address %q is not of the form host:port: %w", addr, err)
	}
	if file := claim(socketKey(resolved)); file != nil {
		defer file.Close()
		conn, err := net.FilePacketConn(file)
		if err != nil {
			return nil, fmt.Errorf("the socket that was handed over for %s: %w", addr, err)
		}
		if udp, ok := conn.(*net.UDPConn); ok {
			return &heldPacketConn{UDPConn: udp, key: socketKey(resolved)}, nil
		}
		conn.Close()
		return nil, errors.New("the socket that was handed over for " + addr + " is none of UDP")
	}
	conn, err := net.ListenUDP("udp", resolved)
	if err != nil {
		return nil, listenError(addr, err)
	}
	if key := socketKey(conn.LocalAddr()); store(conn, key) {
		return &heldPacketConn{UDPConn: conn, key: key}, nil
	}
	return conn, nil
}
