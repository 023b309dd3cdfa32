package sidecar

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/internal/daemon/daemontest"
	"github.com/entente-mesh/entente/internal/peer/peertest"
)

var td = spiffeid.RequireTrustDomainFromString("trading.example")

// agent is an agent whose workloads are all who they should be, but for one.
type agent struct {
	authority *peertest.Authority
	mu        sync.Mutex
	svids     map[string]*x509svid.SVID
	stranger  atomic.Value // entry id whose connections are refused
}

func (a *agent) Bundles() x509bundle.Source { return a.authority.Bundle() }

func (a *agent) SVIDs(entryID string) x509svid.Source {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.svids[entryID] == nil {
		a.svids[entryID] = a.authority.Issue("/" + strings.TrimPrefix(entryID, "service/"))
	}
	return a.svids[entryID]
}

func (a *agent) AttestCaller(_ net.Conn, entryID string) error {
	if a.stranger.Load() == entryID {
		return errors.New("not the workload")
	}
	return nil
}

func (a *agent) AttestApplication(_ net.Conn, entryID string) error {
	if a.stranger.Load() == "application of "+entryID {
		return errors.New("somebody else listens there")
	}
	return nil
}

func freePort(t *testing.T) uint32 { return uint32(daemontest.FreePort(t)) }

type host struct {
	*Sidecar
	t       *testing.T
	agent   *agent
	inbound string
	offset  int // of the ports of applications
	world   World
}

func newOffsetHost(t *testing.T, offset int) *host {
	h := newHost(t, func(c *Config) { c.PortOffset = offset })
	h.offset = offset
	return h
}

func newHost(t *testing.T, change ...func(*Config)) *host {
	h := &host{t: t, agent: &agent{authority: peertest.NewAuthority(td), svids: map[string]*x509svid.SVID{}}, world: World{Local: map[string]Local{}}}
	h.inbound = fmt.Sprintf("127.0.0.1:%d", freePort(t))
	cfg := Config{TrustDomain: td, Datacenter: "dc1", Agent: "a1", Inbound: h.inbound}
	for _, f := range change {
		f(&cfg)
	}
	var err error
	h.Sidecar, err = New(cfg, h.agent)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	return h
}

// service declares a service of this host; it takes effect with apply.
func (h *host) service(name string, port, outbound uint32) {
	h.world.Objects = append(h.world.Objects, &statev1.Object{Revision: 1, Kind: &statev1.Object_Service{Service: &statev1.Service{
		Name: name, Path: "/" + name, Hosts: []string{"a1"}, Selectors: []string{"unix:uid:1000"}, Port: port, OutboundPort: outbound}}})
	h.world.Entries = append(h.world.Entries, &statev1.Entry{Id: "service/" + name, Path: "/" + name})
	if port += uint32(h.offset); port > uint32(h.offset) && port <= math.MaxUint16 {
		h.world.Local = maps.Clone(h.world.Local)
		h.world.Local[name] = Local{Address: fmt.Sprintf("127.0.0.1:%d", port)}
	}
	if port > uint32(h.offset) {
		h.world.Endpoints = append(h.world.Endpoints, catalog.Endpoint{Service: name, Agent: "a1", Datacenter: "dc1", Address: h.inbound, Healthy: true})
	}
}

func (h *host) apply() {
	h.t.Helper()
	h.world.Revision++
	if err := h.Update(h.world); err != nil {
		h.t.Fatal(err)
	}
}

func ask(port uint32, service string) (string, error) {
	c := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := http.NewRequest("GET", fmt.Sprintf("http://127.0.0.1:%d/", port), nil)
	if err != nil {
		return "", err
	}
	r.Host = service
	res, err := c.Do(r)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return fmt.Sprintf("%d %s", res.StatusCode, body), err
}

// eventually asks until the answer begins with want.
func eventually(t *testing.T, port uint32, service, want string) {
	t.Helper()
	var got string
	var err error
	for range 100 {
		if got, err = ask(port, service); err == nil && strings.HasPrefix(got, want) {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatalf("%s: %q, %v; want %q", service, got, err, want)
}

func (h *host) application(name string) uint32 {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		h.t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, name+" called by "+r.Header.Get("X-Forwarded-Client-Cert"))
	})}
	go func() { _ = server.Serve(ln) }()
	h.t.Cleanup(func() { _ = server.Close() })
	return uint32(ln.Addr().(*net.TCPAddr).Port)
}

func TestDoorsFollowTheEntries(t *testing.T) {
	h := newHost(t)
	if h.Ready() == nil {
		t.Error("ready before the first world")
	}
	market, news := h.application("market"), h.application("news")
	cart, other := freePort(t), freePort(t)
	h.service("market", market, 0)
	h.service("cart", 0, cart)
	h.apply()
	if err := h.Ready(); err != nil {
		t.Error(err)
	}
	eventually(t, cart, "market.trading.example", "200 market called by By=spiffe://trading.example/market;Hash=")
	if got, err := ask(cart, "market.trading.example"); !strings.HasSuffix(got, "URI=spiffe://trading.example/cart") {
		t.Errorf("%q, %v", got, err)
	}

	// Load on one door while others come and go.
	stop, done := make(chan struct{}), make(chan struct{})
	var asked, failed atomic.Int64
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			asked.Add(1)
			if got, err := ask(cart, "market.trading.example"); err != nil || !strings.HasPrefix(got, "200") {
				failed.Add(1)
				t.Logf("%q, %v", got, err)
			}
		}
	}()
	before := h.world
	h.service("news", news, 0)
	h.service("wallet", 0, other)
	h.apply()
	eventually(t, other, "news.trading.example", "200 news called by")
	revision := h.world.Revision
	h.world = World{Revision: revision, Objects: slices.Clone(before.Objects), Entries: slices.Clone(before.Entries), Endpoints: slices.Clone(before.Endpoints), Local: before.Local}
	h.apply()
	gone := false
	for range 100 {
		if _, err := ask(other, "market.trading.example"); err != nil {
			gone = true
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if !gone {
		t.Error("the door of a deleted entry is still open")
	}
	close(stop)
	<-done
	if asked.Load() == 0 || failed.Load() > 0 {
		t.Errorf("%d of %d requests failed although nothing of theirs changed", failed.Load(), asked.Load())
	}
	if got, _ := ask(cart, "news.trading.example"); !strings.HasPrefix(got, "421") {
		t.Errorf("a deleted service answers: %q", got)
	}
}

func TestAttestation(t *testing.T) {
	h := newHost(t)
	cart := freePort(t)
	h.service("market", h.application("market"), 0)
	h.service("cart", 0, cart)
	h.apply()
	h.agent.stranger.Store("application of service/market")
	eventually(t, cart, "market.trading.example", "502") // nothing is sent to whoever listens there
	h.agent.stranger.Store("")
	eventually(t, cart, "market.trading.example", "200") // control
	h.agent.stranger.Store("service/cart")
	if got, err := ask(cart, "market.trading.example"); err == nil {
		t.Errorf("a stranger is served: %q", got)
	}
}

// A port that is taken costs its workload only, and heals.
// An object that this release cannot use costs nobody but itself: what goes is gone, and
// connections are looked at again.
func TestObjectThatCannotBeUsedFreezesNothing(t *testing.T) {
	h := newHost(t)
	market, news, cart := h.application("market"), h.application("news"), freePort(t)
	h.service("market", market, 0)
	h.service("news", news, 0)
	h.service("cart", 0, cart)
	h.apply()
	eventually(t, cart, "market.trading.example", "200 market")
	eventually(t, cart, "news.trading.example", "200 news")

	h.world.Revision++
	h.world.Objects = slices.DeleteFunc(slices.Clone(h.world.Objects), func(o *statev1.Object) bool { return o.GetService().GetName() == "news" })
	h.world.Objects = append(h.world.Objects, &statev1.Object{})
	if err := h.Update(h.world); err == nil || !strings.Contains(err.Error(), "no known kind") {
		t.Errorf("nothing is said of it: %v", err)
	}
	if got, err := ask(cart, "news.trading.example"); err == nil && strings.HasPrefix(got, "200") {
		t.Errorf("what was taken away is still there: %q", got)
	}
	eventually(t, cart, "market.trading.example", "200 market") // control
}

func TestPortTaken(t *testing.T) {
	h := newHost(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	taken, cart := uint32(ln.Addr().(*net.TCPAddr).Port), freePort(t)
	h.service("market", h.application("market"), 0)
	h.service("wallet", 0, taken)
	h.service("cart", 0, cart)
	h.apply()
	eventually(t, cart, "market.trading.example", "200")
	_ = ln.Close()
	eventually(t, taken, "market.trading.example", "200")
}

// The ports of the catalogue are moved by the offset, all of them and nothing else.
func TestPortOffset(t *testing.T) {
	const offset = 1000
	h := newOffsetHost(t, offset)
	market, cart := h.application("market"), freePort(t)
	h.service("market", market-offset, 0)
	h.service("high", 65535, 0) // nobody can listen there
	h.service("cart", 0, cart-offset)
	h.service("higher", 0, 65535)
	h.apply()
	eventually(t, cart, "market.trading.example", "200 market called by")
	eventually(t, cart, "high.trading.example", "502")
	if got, err := ask(cart-offset, "market.trading.example"); err == nil {
		t.Errorf("the door is open at the catalogue's port, too: %q", got)
	}
}

func TestNewRefuses(t *testing.T) {
	a := &agent{authority: peertest.NewAuthority(td)}
	for _, address := range []string{"10.0.0.1", "0.0.0.0", "localhost"} {
		if _, err := New(Config{TrustDomain: td, Datacenter: "dc1", Agent: "a1", AppAddress: address}, a); err == nil || !strings.Contains(err.Error(), "loopback") {
			t.Errorf("%s: %v", address, err)
		}
	}
	s, err := New(Config{TrustDomain: td, Datacenter: "dc1", Agent: "a1", Inbound: "127.0.0.1:1:1"}, a)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "sidecar.inbound") {
		t.Error(err)
	}
}
