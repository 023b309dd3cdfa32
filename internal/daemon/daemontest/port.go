package daemontest

import (
	"fmt"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"testing"
)

// The ports that FreePort gives: below what the system hands out (from 32768 on Linux, 49152
// elsewhere), and above those that scenarios use.
const firstPort, lastPort = 24_000, 32_767

// nextPort counts up from a random start, so that a process is given each port once and two
// processes rarely look at the same.
var nextPort = func() *atomic.Int32 {
	n := new(atomic.Int32)
	n.Store(rand.Int32N(lastPort - firstPort))
	return n
}()

// FreePort returns a port of 127.0.0.1 at which nobody listens. Unlike the port of a listener
// at port 0 that was closed again, the system gives it to no connection or listener meanwhile.
func FreePort(t testing.TB) int {
	t.Helper()
	for range lastPort - firstPort {
		port := firstPort + int(nextPort.Add(1))%(lastPort-firstPort+1)
		if listener, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", port)); err == nil {
			listener.Close()
			return port
		}
	}
	t.Fatal("no port is free")
	return 0
}

// FreeAddress is 127.0.0.1 with a FreePort.
func FreeAddress(t testing.TB) string {
	t.Helper()
	return fmt.Sprint("127.0.0.1:", FreePort(t))
}
