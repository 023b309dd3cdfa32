package daemontest

import (
	"fmt"
	"net"
	"os"
	"testing"
)

// What FreePort gives is free, given once, and not among the ports that the system gives to
// connections: the kernel may put one of these on a connection between two uses of the port.
func TestFreePort(t *testing.T) {
	var first, last int
	if text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err != nil {
		t.Skip("the range of ephemeral ports is not known here:", err)
	} else if _, err := fmt.Sscan(string(text), &first, &last); err != nil {
		t.Fatal(err)
	}
	taken, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", FreePort(t)+1)) // the next in the row
	if err == nil {
		defer taken.Close()
	}
	given := map[int]bool{}
	for range 100 {
		port := FreePort(t)
		if port >= first && port <= last || given[port] {
			t.Errorf("%d is ephemeral (%d to %d), or given twice", port, first, last)
		}
		given[port] = true
		listener, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", port))
		if err != nil {
			t.Fatal(err)
		}
		listener.Close()
	}
	if taken != nil && given[taken.Addr().(*net.TCPAddr).Port] {
		t.Errorf("%v was given, and is not free", taken.Addr())
	}
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	if port := closed.Addr().(*net.TCPAddr).Port; port < first || port > last {
		t.Errorf("control: the system gave port %d, which it may not give to connections", port)
	}
}
