package sidecar

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/federation/catalog"
)

// A service is called by its name, at an address of its own and its real port, as the
// entry that the calling process satisfies; who satisfies none or several is cut off.
func TestNames(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux has all of 127/8 without being asked")
	}
	addresses := map[string]netip.Addr{
		"market.trading.example":   netip.MustParseAddr("127.80.7.1"),
		"cart.trading.example":     netip.MustParseAddr("127.80.7.2"),
		"accounts.banking.example": netip.MustParseAddr("127.80.7.3"),
	}
	var who atomic.Value
	who.Store([]string{"service/cart"})
	http80 := freePort(t)
	var asked atomic.Value
	h := newHost(t, func(c *Config) {
		c.Names = &Names{
			Assign: func(services []string) map[string]netip.Addr {
				slices.Sort(services)
				asked.Store(strings.Join(services, " "))
				return addresses
			},
			Identify: func(net.Conn) ([]string, error) {
				if ids := who.Load().([]string); ids != nil {
					return slices.Clone(ids), nil
				}
				return nil, errors.New("nobody has the socket open")
			},
			HTTPPort: uint16(http80),
		}
	})
	market := h.application("market")
	h.service("market", market, 0)
	h.service("cart", 0, 0)
	h.world.Objects = append(h.world.Objects, &statev1.Object{Kind: &statev1.Object_Import{Import: &statev1.Import{Service: "accounts.banking.example"}}})
	h.apply()
	if got := asked.Load(); got != "accounts.banking.example market.trading.example" {
		t.Errorf("names of %q", got)
	}
	get := func(host string, port uint32) (string, error) {
		c := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
		r, err := http.NewRequest("GET", fmt.Sprintf("http://%s:%d/", addresses[host], port), nil)
		if err != nil {
			return "", err
		}
		r.Host = fmt.Sprintf("%s:%d", host, port)
		answer, err := c.Do(r)
		if err != nil {
			return "", err
		}
		defer answer.Body.Close()
		text, err := io.ReadAll(answer.Body)
		return fmt.Sprintf("%d %s", answer.StatusCode, text), err
	}
	const want = "200 market called by By=spiffe://trading.example/market;"
	var got string
	var err error
	for range 200 {
		if got, err = get("market.trading.example", http80); err == nil && strings.HasPrefix(got, want) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if !strings.HasPrefix(got, want) || !strings.HasSuffix(got, "URI=spiffe://trading.example/cart") {
		t.Fatalf("%q %v", got, err)
	}
	if got, err := get("accounts.banking.example", http80); err != nil || !strings.HasPrefix(got, "403 ") && !strings.HasPrefix(got, "503 ") && !strings.HasPrefix(got, "502 ") {
		t.Errorf("an import without a way there: %q %v", got, err)
	}
	// The service's own port, too: its application listens at 127.0.0.1 only.
	for range 500 {
		if got, err = get("market.trading.example", market); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if !strings.HasPrefix(got, want) {
		t.Errorf("at its real port: %q %v", got, err)
	}
	for name, ids := range map[string][]string{"none": {}, "unknown": {"service/other"}, "several": {"service/cart", "service/market"}, "not attested": nil} {
		who.Store(ids)
		if got, err := get("market.trading.example", http80); err == nil {
			t.Errorf("%s: %q", name, got)
		}
	}
	who.Store([]string{"service/market"})
	if got, err := get("market.trading.example", http80); err != nil || !strings.HasSuffix(got, "URI=spiffe://trading.example/market") {
		t.Errorf("control: %q %v", got, err)
	}
	// The entry goes, and with it the door behind the name.
	h.world.Entries = slices.DeleteFunc(slices.Clone(h.world.Entries), func(e *statev1.Entry) bool { return e.GetId() == "service/cart" })
	who.Store([]string{"service/cart"})
	h.apply()
	for range 200 {
		if _, err = get("market.trading.example", http80); err != nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err == nil {
		t.Error("an entry that is gone still calls")
	}
}

// Each service has its own port and the one of HTTP, one that speaks TCP its own alone.
func TestNameDoors(t *testing.T) {
	n := &Names{HTTPPort: 80, Assign: func(services []string) map[string]netip.Addr {
		given := map[string]netip.Addr{}
		for i, name := range slices.Sorted(slices.Values(services)) {
			given[name] = netip.AddrFrom4([4]byte{127, 80, 1, byte(i + 1)})
		}
		return given
	}}
	object := func(name string, port uint32, protocol statev1.Protocol) *statev1.Object {
		return &statev1.Object{Kind: &statev1.Object_Service{Service: &statev1.Service{
			Name: name, Path: "/" + name, Hosts: []string{"a1"}, Selectors: []string{"unix:uid:1"}, Port: port, Protocol: protocol}}}
	}
	imported := func(name string, port uint32, protocol statev1.Protocol) *statev1.Object {
		return &statev1.Object{Kind: &statev1.Object_Import{Import: &statev1.Import{Service: name, Port: port, Protocol: protocol}}}
	}
	const http, tcp = statev1.Protocol_PROTOCOL_UNSPECIFIED, statev1.Protocol_PROTOCOL_TCP
	tables, err := catalog.Compile(td, []*statev1.Object{
		object("far", 8080, http), object("near", 9090, http), object("caller", 0, http), object("db", 5432, tcp),
		imported("a.banking.example", 0, http), imported("b.banking.example", 8443, http), imported("c.banking.example", 5432, tcp),
	})
	if err != nil {
		t.Fatal(err)
	}
	got := nameDoors(n, tables, map[uint16]bool{9090: true})
	want := map[string]nameDoor{
		"127.80.1.1:80":   {service: "a.banking.example"},
		"127.80.1.2:80":   {service: "b.banking.example"},
		"127.80.1.2:8443": {service: "b.banking.example"},
		"127.80.1.3:5432": {service: "c.banking.example", tcp: true},
		"127.80.1.4:5432": {service: "db.trading.example", tcp: true},
		"127.80.1.5:80":   {service: "far.trading.example"},
		"127.80.1.5:8080": {service: "far.trading.example"},
		"127.80.1.6:80":   {service: "near.trading.example"},
		"127.80.1.6:9090": {service: "near.trading.example", taken: true},
	}
	for at, door := range want {
		if got[netip.MustParseAddrPort(at)] != door {
			t.Errorf("%s is %+v, not %+v", at, got[netip.MustParseAddrPort(at)], door)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%v", got)
	}
}

// named is a host whose market and ledger have names; who says which entry calls.
func named(t *testing.T, who *atomic.Value, log *slog.Logger) *host {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux has all of 127/8 without being asked")
	}
	return newHost(t, func(c *Config) {
		c.Log = log
		c.Names = &Names{
			Assign: func([]string) map[string]netip.Addr {
				return map[string]netip.Addr{"ledger.trading.example": netip.MustParseAddr("127.80.8.1"), "market.trading.example": netip.MustParseAddr("127.80.8.2")}
			},
			Identify: func(net.Conn) ([]string, error) { return []string{who.Load().(string)}, nil },
		}
	})
}

// A database is dialled at its name's address and its port: the caller is attested and
// decided on, and whoever listens behind is attested, too.
func TestTCPByName(t *testing.T) {
	var who atomic.Value
	who.Store("service/cart")
	h := named(t, &who, nil)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var served atomic.Int64
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() { // the agent looks whether somebody listens, and says nothing
				defer c.Close()
				if b, _ := io.ReadAll(c); len(b) > 0 {
					served.Add(1)
					fmt.Fprintf(c, "got %s", b)
				}
			}()
		}
	}()
	port := uint32(ln.Addr().(*net.TCPAddr).Port)
	h.service("ledger", port, 0)
	h.world.Objects[0].GetService().Protocol = statev1.Protocol_PROTOCOL_TCP
	h.service("market", h.application("market"), 0)
	h.service("cart", 0, 0)
	h.service("news", 0, 0)
	h.world.Objects[3].GetService().Calls = []string{"market.trading.example"}
	h.apply()
	ask := func() (string, error) {
		c, err := net.Dial("tcp", fmt.Sprintf("127.80.8.1:%d", port))
		if err != nil {
			return "", err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.WriteString(c, "select"); err != nil {
			return "", err
		}
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			return "", err
		}
		answer, err := io.ReadAll(c)
		return string(answer), err
	}
	var got string
	for range 500 {
		if got, err = ask(); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil || got != "got select" {
		t.Fatalf("%q, %v", got, err)
	}
	for _, entry := range []string{"service/news", "service/nobody"} {
		who.Store(entry)
		if got, err := ask(); err == nil {
			t.Errorf("%s: %q", entry, got)
		}
	}
	who.Store("service/cart")
	h.agent.stranger.Store("application of service/ledger")
	if got, err := ask(); err == nil {
		t.Errorf("somebody else listens at its port, and gets what is sent: %q", got)
	}
	h.agent.stranger.Store("")
	if n := served.Load(); n != 1 {
		t.Errorf("%d calls reached the application", n)
	}
	if got, err := ask(); err != nil || got != "got select" {
		t.Errorf("control: %q, %v", got, err)
	}
}

// The application of this host that wants a port on every address gets it, and it is
// said what that means for other services of this port.
func TestNamesLeaveTheApplicationItsPort(t *testing.T) {
	var who atomic.Value
	who.Store("service/cart")
	said := make(lines, 100)
	h := named(t, &who, slog.New(slog.NewTextHandler(said, nil)))
	port := freePort(t)
	h.service("market", port, 0)
	h.apply()
	time.Sleep(50 * time.Millisecond) // it would have opened it by now
	ln, err := net.Listen("tcp", fmt.Sprintf("0.0.0.0:%d", port))
	if err != nil {
		t.Fatalf("the application cannot have its port: %v", err)
	}
	defer ln.Close()
	for {
		select {
		case line := <-said:
			if strings.Contains(line, "market.trading.example") && strings.Contains(line, "listen at 127.0.0.1 only") {
				return
			}
		case <-time.After(20 * time.Second):
			t.Fatal("nobody is told")
		}
	}
}

type lines chan string

func (l lines) Write(b []byte) (int, error) {
	select {
	case l <- string(b):
	default:
	}
	return len(b), nil
}

func TestWhyNot(t *testing.T) {
	for err, want := range map[error]string{
		fmt.Errorf("listen: %w", syscall.EACCES):        "CAP_NET_BIND_SERVICE",
		fmt.Errorf("listen: %w", syscall.EADDRINUSE):    "127.0.0.1 only",
		fmt.Errorf("listen: %w", syscall.EADDRNOTAVAIL): "alias",
	} {
		if got := whyNot(err, 443); !strings.Contains(got, want) {
			t.Errorf("%v: %q", err, got)
		}
	}
}
