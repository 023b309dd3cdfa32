package sidecar

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
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
	// The application's own port is left to it on every address.
	if ln, err := net.Listen("tcp", fmt.Sprintf("127.80.7.1:%d", market)); err != nil {
		t.Errorf("its port is taken: %v", err)
	} else {
		ln.Close()
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

// A port of a service elsewhere is opened as it is; one of this host's is not.
func TestNameDoors(t *testing.T) {
	n := &Names{HTTPPort: 80, Assign: func(services []string) map[string]netip.Addr {
		given := map[string]netip.Addr{}
		for i, name := range services {
			given[name] = netip.AddrFrom4([4]byte{127, 80, 1, byte(i + 1)})
		}
		return given
	}}
	object := func(name string, port uint32) *statev1.Object {
		return &statev1.Object{Kind: &statev1.Object_Service{Service: &statev1.Service{Name: name, Port: port}}}
	}
	got := nameDoors(n, td, []*statev1.Object{object("far", 8080), object("near", 9090), object("caller", 0)}, map[uint16]bool{9090: true})
	want := []string{"127.80.1.1:8080", "127.80.1.1:80", "127.80.1.2:80"}
	if len(got) != len(want) {
		t.Errorf("%v", got)
	}
	for _, at := range want {
		if !got[netip.MustParseAddrPort(at)] {
			t.Errorf("%s is not opened", at)
		}
	}
}
