package server

import (
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// loseAfter has the kernel end a connection whose peer acknowledges nothing for so long: it,
// or the network between, is gone. Where it cannot be set, the ping finds that out, later.
func loseAfter(conn net.Conn, patience time.Duration) {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return
	}
	if raw, err := tcp.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) {
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(patience.Milliseconds()))
		})
	}
}
