package dataplane

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/internal/dataplane/header"
)

// store is an application that speaks TCP: it says hello first, as databases do, and sends
// back what it gets; after the end of that, a farewell.
type store struct {
	net.Listener
	handler atomic.Pointer[func(net.Conn)]
	served  atomic.Int64
}

func newStore(t testing.TB, ln net.Listener) *store {
	s := &store{Listener: ln}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			s.served.Add(1)
			go func() {
				defer c.Close()
				if h := s.handler.Load(); h != nil {
					(*h)(c)
					return
				}
				_, _ = io.WriteString(c, "hello ")
				if _, err := io.Copy(c, c); err == nil {
					_, _ = io.WriteString(c, " bye")
				}
			}()
		}
	}()
	t.Cleanup(func() {
		ln.Close()
		<-done
	})
	return s
}

// declareStores gives each domain a TCP service, and trading's portfolio banking's.
func (w *world) declareStores() {
	for _, d := range []*domain{w.banking, w.trading} {
		object := func(o *statev1.Object) { o.Revision = 9; o.Source = "store.yaml:1"; d.objects = append(d.objects, o) }
		s := &statev1.Service{Name: "store", Path: "/store", Hosts: []string{"agent-dc1", "agent-dc2"}, Selectors: []string{"unix:uid:1000"},
			Port: 5432, Protocol: statev1.Protocol_PROTOCOL_TCP, Failover: &statev1.Failover{HoldSeconds: 1}}
		object(&statev1.Object{Kind: &statev1.Object_Service{Service: s}})
		agreement := &statev1.Agreement{Name: "stores", Expires: time.Now().Add(time.Hour).Unix()}
		allow := &statev1.Allow{Callers: []string{"portfolio"}, Service: "store"}
		for _, o := range d.objects {
			if reads := o.GetAgreement(); reads != nil {
				agreement.Peer, agreement.Gateways = reads.GetPeer(), reads.GetGateways()
			}
		}
		if d == w.banking {
			s.ExportTo = []string{"trading.example"}
		} else {
			object(&statev1.Object{Kind: &statev1.Object_Import{Import: &statev1.Import{
				Service: "store.banking.example", Port: 5432, Protocol: statev1.Protocol_PROTOCOL_TCP}}})
			allow.Service = "store.banking.example"
		}
		agreement.Allow = []*statev1.Allow{allow}
		object(&statev1.Object{Kind: &statev1.Object_Agreement{Agreement: agreement}})
		for i, dc := range []string{"dc1", "dc2"} {
			d.endpoints = append(d.endpoints, catalog.Endpoint{Service: "store", Agent: "agent-" + dc, Datacenter: dc, Address: d.sidecars[i].addr, Healthy: true})
		}
	}
	w.push()
}

// carry connects with a service in the name of one of trading's workloads.
func (w *world) carry(caller, service string) *net.TCPConn {
	w.t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	defer ln.Close()
	near, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		w.t.Fatal(err)
	}
	far, err := ln.Accept()
	if err != nil {
		w.t.Fatal(err)
	}
	door, done := w.trading.out[0].Outbound(w.identity(w.trading, caller)), make(chan struct{})
	go func() {
		defer close(done)
		door.Carry(w.t.Context(), far, service, nil)
	}()
	w.t.Cleanup(func() {
		near.Close()
		<-done
	})
	_ = near.SetDeadline(time.Now().Add(20 * time.Second))
	return near.(*net.TCPConn)
}

// last is the newest record of a process about a service.
func (a *accessLog) last(service string) map[string]any {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i := len(a.lines) - 1; i >= 0; i-- {
		if a.lines[i]["service"] == service {
			return a.lines[i]
		}
	}
	return nil
}

// talk sends what and ends its half; it returns all that comes back.
func talk(c *net.TCPConn, what []byte) ([]byte, error) {
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(what)
		sent <- errors.Join(err, c.CloseWrite())
	}()
	got, err := io.ReadAll(c)
	return got, errors.Join(err, <-sent)
}

// The bytes of a TCP service, and the end of each half, pass inside a domain, through
// the gateways of another datacenter, and through those of another domain.
func TestTCP(t *testing.T) {
	w := newWorld(t)
	w.declareStores()
	big := make([]byte, 1<<20)
	_, _ = rand.Read(big)
	for _, service := range []string{"store.trading.example", "store.banking.example"} {
		got, err := talk(w.carry("/portfolio", service), big)
		if err != nil || !bytes.Equal(got, []byte("hello "+string(big)+" bye")) {
			t.Errorf("%s: %d bytes, %v", service, len(got), err)
		}
	}
	for range 30 { // a caller whose half ends as soon as the connection stands
		if got, err := talk(w.carry("/portfolio", "store.banking.example"), nil); err != nil || string(got) != "hello  bye" {
			t.Fatalf("%q, %v", got, err)
		}
	}
	in := w.banking.sidecars[0].access.last("store.banking.example")
	for field, want := range map[string]any{
		"caller": "spiffe://trading.example/portfolio", "peer": "spiffe://banking.example/entente/gateway/gw-dc1", "method": "TCP", "outcome": "answered", "rule": "Agreement/stores",
	} {
		if in[field] != want {
			t.Errorf("%s is %v, not %v", field, in[field], want)
		}
	}
	w.trading.endpoints = w.trading.endpoints[len(w.trading.endpoints)-1:] // dc2's only
	w.push()
	if got, err := talk(w.carry("/portfolio", "store.trading.example"), []byte("x")); err != nil || string(got) != "hello x bye" || w.trading.stores[1].served.Load() != 1 {
		t.Errorf("the other datacenter: %q, %v", got, err)
	}
}

// What is not allowed is reset before anything reaches the service; so is what would
// take a connection nobody looks into past rules on methods and paths.
func TestTCPRefusals(t *testing.T) {
	w := newWorld(t)
	w.declareStores()
	for _, test := range []struct{ caller, service, reason string }{
		{"/cart", "store.trading.example", "caller-calls"},
		{"/rogue", "store.banking.example", "agreement-caller"},
		{"/nobody", "store.trading.example", "caller-unknown"},
		{"/portfolio", "vault.trading.example", "unknown-service"},
		{"/portfolio", "market.trading.example", "protocol"},
		{"/portfolio", "accounts.banking.example", "protocol"},
	} {
		got, err := talk(w.carry(test.caller, test.service), []byte("x"))
		if len(got) > 0 || !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%v: %q, %v", test, got, err)
		}
		if record := w.trading.out[0].access.last(test.service); record["reason"] != test.reason || record["outcome"] != "refused" {
			t.Errorf("%v: %v", test, record)
		}
	}
	if a := get(t, w.trading.outURL[0], "store.trading.example", "/"); a.StatusCode != 421 || a.Header.Get(header.Refused) != "protocol" {
		t.Errorf("HTTP to a TCP service: %v", a)
	}
	upgrade := http.Header{"Connection": {"Upgrade"}, "Upgrade": {header.TCP}}
	if a := do(t, client, "GET", w.trading.outURL[0]+"/v1/x", "accounts.banking.example", upgrade, nil); a.StatusCode != 421 {
		t.Errorf("a tunnel to an HTTP service: %v", a)
	}
	for _, d := range []*domain{w.banking, w.trading} {
		for i := range d.stores {
			if d.stores[i].served.Load() != 0 {
				t.Errorf("%s: a store was asked", d.td)
			}
		}
	}

	// A domain that declares the other's HTTP service as TCP gets no further than its door.
	for _, o := range w.trading.objects {
		if i := o.GetImport(); i.GetService() == "accounts.banking.example" {
			i.Port, i.Protocol = 8080, statev1.Protocol_PROTOCOL_TCP
		}
		for _, allow := range o.GetAgreement().GetAllow() {
			allow.Http = nil
		}
	}
	w.trading.push(t)
	if got, err := talk(w.carry("/portfolio", "accounts.banking.example"), []byte("GET /v2/secret HTTP/1.1\r\nHost: x\r\n\r\n")); len(got) > 0 || err == nil {
		t.Errorf("past the rules: %q, %v", got, err)
	}
	if record := w.banking.gateways[0].access.last("accounts.banking.example"); record["reason"] != "protocol" {
		t.Errorf("%v", record)
	}
	if w.banking.apps[0].served.Load() != 0 {
		t.Error("the application was asked")
	}
	if got, err := talk(w.carry("/portfolio", "store.banking.example"), nil); err != nil || string(got) != "hello  bye" {
		t.Errorf("control: %q, %v", got, err)
	}
}

// An open connection ends with what permits it (I4), and an end that is none is not
// taken for one.
func TestTCPIsCut(t *testing.T) {
	w := newWorld(t)
	w.declareStores()
	open := func() *net.TCPConn {
		c := w.carry("/portfolio", "store.banking.example")
		if _, err := io.ReadFull(c, make([]byte, 6)); err != nil {
			t.Fatal(err)
		}
		return c
	}
	hangUp := func(c net.Conn) {
		_, _ = io.ReadFull(c, make([]byte, 1))
		_ = c.(*net.TCPConn).SetLinger(0)
	}
	w.banking.stores[0].handler.Store(&hangUp)
	if got, err := talk(w.carry("/portfolio", "store.banking.example"), []byte("x")); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the service broke off: %q, %v", got, err)
	}
	failed := make(chan error, 1)
	read := func(c net.Conn) {
		_, _ = io.WriteString(c, "hello ")
		_, err := io.Copy(io.Discard, c)
		failed <- err
	}
	w.banking.stores[0].handler.Store(&read)
	c := open()
	_ = c.SetLinger(0)
	c.Close()
	if err := <-failed; err == nil {
		t.Error("the caller broke off, and the service takes it for the end")
	}

	c = open()
	w.banking.drop("Agreement/stores")
	w.banking.push(t)
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("without its agreement: %v", err)
	}
	<-failed

	c = w.carry("/portfolio", "store.trading.example")
	if _, err := io.ReadFull(c, make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	w.trading.drain[0]()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("of a drained instance: %v", err)
	}
	if got, err := talk(w.carry("/portfolio", "store.trading.example"), []byte("x")); err != nil || string(got) != "hello x bye" || w.trading.stores[1].served.Load() != 1 {
		t.Errorf("after that: %q, %v", got, err)
	}
}

// A place that cannot be reached, or where nobody listens, is passed over.
func TestTCPFailsOver(t *testing.T) {
	w := newWorld(t)
	w.declareStores()
	w.trading.stores[0].Close()
	for i := range 3 {
		if got, err := talk(w.carry("/portfolio", "store.trading.example"), []byte("x")); err != nil || string(got) != "hello x bye" {
			t.Errorf("%d: %q, %v", i, got, err)
		}
	}
	w.trading.stores[1].Close()
	if _, err := talk(w.carry("/portfolio", "store.trading.example"), []byte("x")); err == nil {
		t.Error("nobody is left, and somebody answered")
	}
}

func BenchmarkTCP(b *testing.B) {
	w := newWorld(b)
	w.declareStores()
	c := w.carry("/portfolio", "store.trading.example")
	if _, err := io.ReadFull(c, make([]byte, 6)); err != nil {
		b.Fatal(err)
	}
	_ = c.SetDeadline(time.Time{})
	piece := make([]byte, 32<<10)
	b.SetBytes(int64(len(piece)))
	for b.Loop() {
		go func() { _, _ = c.Write(piece) }()
		if _, err := io.ReadFull(c, piece); err != nil {
			b.Fatal(err)
		}
	}
}
