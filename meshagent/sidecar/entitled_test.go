package sidecar

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// kept is a connection that a workload keeps open.
type kept struct {
	net.Conn
	reader *bufio.Reader
}

func keep(t *testing.T, network, address string) *kept {
	t.Helper()
	conn, err := net.Dial(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &kept{conn, bufio.NewReader(conn)}
}

// ask is the status of a call on the connection; 0: it is closed.
func (k *kept) ask(service string) int {
	fmt.Fprintf(k, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", service)
	_ = k.SetReadDeadline(time.Now().Add(10 * time.Second))
	res, err := http.ReadResponse(k.reader, nil)
	if err != nil {
		return 0
	}
	defer res.Body.Close()
	_, _ = io.Copy(io.Discard, res.Body)
	return res.StatusCode
}

// changed is another revision of an entry, as a change of its selectors makes it.
func (h *host) changed(id string) {
	h.world.Entries = slices.Clone(h.world.Entries)
	for i, e := range h.world.Entries {
		if e.GetId() == id {
			h.world.Entries[i] = proto.CloneOf(e)
			h.world.Entries[i].Revision++
		}
	}
}

// I4: what a connection of a workload was attested for is looked at again when its entry
// changes, on ports and sockets; who is still entitled goes on on the same connection.
func TestEntitlementThatEndsClosesConnections(t *testing.T) {
	const market = "market.trading.example"
	sockets := filepath.Join(t.TempDir(), "outbound")
	h := newHost(t, func(c *Config) { c.Sockets = sockets })
	cart, wallet := freePort(t), freePort(t)
	h.service("market", h.application("market"), 0)
	h.service("cart", 0, cart)
	h.service("wallet", 0, wallet)
	h.apply()
	eventually(t, cart, market, "200 market called by")
	eventually(t, wallet, market, "200 market called by")

	byPort := keep(t, "tcp", fmt.Sprintf("127.0.0.1:%d", cart))
	bySocket := keep(t, "unix", filepath.Join(sockets, "cart.sock"))
	other := keep(t, "tcp", fmt.Sprintf("127.0.0.1:%d", wallet))
	all := map[string]*kept{"port": byPort, "socket": bySocket, "another workload's": other}
	for name, k := range all {
		if got := k.ask(market); got != 200 {
			t.Fatalf("%s: %d", name, got)
		}
	}
	h.changed("service/cart") // the same process still matches
	h.changed("service/wallet")
	h.apply()
	for name, k := range all {
		if got := k.ask(market); got != 200 {
			t.Errorf("control: %s: %d", name, got)
		}
	}
	h.agent.stranger.Store("service/cart") // it no longer does
	h.changed("service/cart")
	h.apply()
	for name, k := range map[string]*kept{"port": byPort, "socket": bySocket} {
		if got := k.ask(market); got != 0 {
			t.Errorf("%s: %d", name, got)
		}
	}
	if got := other.ask(market); got != 200 {
		t.Errorf("control: %d", got)
	}

	// Its entry is deleted: at once, and not when its requests have ended.
	h.world.Objects, h.world.Entries = slices.Clone(h.world.Objects[:2]), slices.Clone(h.world.Entries[:2])
	h.apply()
	if got := other.ask(market); got != 0 {
		t.Errorf("the entry is deleted: %d", got)
	}
}

// The same of the sidecar's own connections to an application, which it keeps.
func TestEntitlementThatEndsClosesConnectionsToApplications(t *testing.T) {
	h := newHost(t)
	cart := freePort(t)
	port := h.application("market")
	h.service("market", port, 0)
	h.service("cart", 0, cart)
	h.apply()
	eventually(t, cart, "market.trading.example", "200 market called by")
	h.changed("service/market")
	h.apply()
	eventually(t, cart, "market.trading.example", "200 market called by") // control
	h.agent.stranger.Store("application of service/market")
	if got, err := ask(cart, "market.trading.example"); err != nil || !strings.HasPrefix(got, "200") {
		t.Fatalf("control: the connection is kept: %q, %v", got, err)
	}
	h.changed("service/market")
	h.apply()
	if got, err := ask(cart, "market.trading.example"); err != nil || !strings.HasPrefix(got, "502") {
		t.Errorf("a process that is not entitled any more is asked: %q, %v", got, err)
	}
}

// An application may listen on a unix socket.
func TestApplicationOnASocket(t *testing.T) {
	h := newHost(t)
	path := filepath.Join(t.TempDir(), "app.sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "by socket") })}
	go func() { _ = server.Serve(ln) }()
	t.Cleanup(func() { server.Close() })
	cart := freePort(t)
	h.service("market", 8080, 0)
	h.service("cart", 0, cart)
	h.world.Local["market"] = Local{Address: "unix:" + path}
	h.apply()
	eventually(t, cart, "market.trading.example", "200 by socket")
	h.agent.stranger.Store("application of service/market")
	h.changed("service/market")
	h.apply()
	eventually(t, cart, "market.trading.example", "502")
}

// While somebody else holds the port of a listener, the agent is not ready; the workload's
// socket serves it. Nobody else can make one there.
func TestNotReadyWhileAListenerIsClosed(t *testing.T) {
	sockets := filepath.Join(t.TempDir(), "outbound")
	h := newHost(t, func(c *Config) { c.Sockets = sockets })
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	taken := uint32(ln.Addr().(*net.TCPAddr).Port)
	h.service("market", h.application("market"), 0)
	h.service("wallet", 0, taken)
	h.apply()
	ready := func(want string) {
		t.Helper()
		var got string
		for range 200 {
			if err := h.Ready(); err == nil {
				got = ""
			} else {
				got = err.Error()
			}
			if got == want || want != "" && strings.Contains(got, want) {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Fatalf("ready: %q, not %q", got, want)
	}
	ready(fmt.Sprintf("the listener at 127.0.0.1:%d is closed", taken))
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(sockets, "wallet.sock"))
	}}}
	var res *http.Response
	for range 200 { // the sockets are opened after the ports
		if res, err = client.Get("http://market.trading.example/"); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil || res.StatusCode != 200 {
		t.Fatalf("by socket: %v, %v", res, err)
	}
	res.Body.Close()
	if is, err := os.Stat(sockets); err != nil || is.Mode().Perm() != 0o755 {
		t.Errorf("%v, %v", is.Mode(), err)
	}
	_ = ln.Close()
	ready("")
	eventually(t, taken, "market.trading.example", "200")

	// Nobody wants the listener any more: neither does it keep the agent from being ready.
	ln, err = net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	h.service("cart", 0, uint32(ln.Addr().(*net.TCPAddr).Port))
	h.apply()
	ready("is closed")
	h.world.Objects, h.world.Entries = slices.Clone(h.world.Objects[:2]), slices.Clone(h.world.Entries[:2])
	h.apply()
	ready("")
}

// Endpoints alone compile nothing and attest nothing.
func TestEndpointsAloneCompileNothing(t *testing.T) {
	h := newHost(t)
	cart := freePort(t)
	h.service("market", h.application("market"), 0)
	h.service("cart", 0, cart)
	h.apply()
	eventually(t, cart, "market.trading.example", "200")
	tables, backends := h.tables, h.backends.Load()
	for range 100 {
		h.world.Endpoints = slices.Clone(h.world.Endpoints)
		h.world.Endpoints[0].Healthy = !h.world.Endpoints[0].Healthy
		if err := h.Update(h.world); err != nil {
			t.Fatal(err)
		}
	}
	if h.tables != tables || h.backends.Load() != backends {
		t.Error("the catalogue was compiled again")
	}
	h.world.Endpoints = nil
	if err := h.Update(h.world); err != nil {
		t.Fatal(err)
	}
	if got, err := ask(cart, "market.trading.example"); err != nil || !strings.HasPrefix(got, "503") {
		t.Errorf("endpoints that are gone are used: %q, %v", got, err)
	}
	h.world.Urgent++
	h.world.Objects = append([]*statev1.Object{}, h.world.Objects...)
	if h.apply(); h.tables == tables {
		t.Error("control: another revision is not compiled")
	}
}
