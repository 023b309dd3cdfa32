package dataplane

import (
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/entente-mesh/entente/federation/catalog"
)

// What people are shown of an engine is what it does: requests and connections as long as
// they last, and who is left out.
func TestSeen(t *testing.T) {
	w := newWorld(t)
	gateway, sidecar := w.banking.gateways[0], w.banking.sidecars[0]
	instance := func() SeenEndpoint {
		t.Helper()
		seen := gateway.Seen(catalog.Gateway)
		i := slices.IndexFunc(seen.Services, func(s SeenService) bool { return s.Name == "accounts.banking.example" })
		if i < 0 {
			t.Fatalf("the service is not seen: %+v", seen)
		}
		for _, e := range seen.Services[i].Endpoints {
			if e.Address == sidecar.addr {
				return e
			}
		}
		t.Fatalf("the instance is not seen: %+v", seen)
		return SeenEndpoint{}
	}
	for begin := time.Now(); len(gateway.Seen(catalog.Gateway).Listeners) == 0 && time.Since(begin) < 10*time.Second; {
		time.Sleep(time.Millisecond) // the door opens in its own time
	}
	if seen := gateway.Seen(catalog.Gateway); seen.Requests != 0 || len(seen.Listeners) != 1 || seen.Listeners[0].Name != "eastWest" || seen.Listeners[0].Connections != 0 {
		t.Fatalf("before there is traffic: %+v", seen)
	}

	asked, hold := make(chan struct{}), make(chan struct{})
	handler := http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { close(asked); <-hold })
	w.banking.apps[0].handler.Store(&handler)
	ended := make(chan int, 1)
	go func() { ended <- get(t, w.trading.outURL[0], "accounts.banking.example", "/v1").StatusCode }()
	<-asked
	if seen := gateway.Seen(catalog.Gateway); seen.Requests != 1 || seen.Listeners[0].Connections != 1 || seen.Connections < 2 {
		t.Errorf("a request is under way: %+v", seen)
	}
	if e := instance(); !e.Healthy || e.Ejected {
		t.Errorf("control: %+v", e)
	}
	close(hold)
	if code := <-ended; code != 200 {
		t.Fatalf("%d", code)
	}

	w.banking.apps[0].handler.Store(nil)
	sidecar.kill()
	get(t, w.trading.outURL[0], "accounts.banking.example", "/v1")
	for begin := time.Now(); !instance().Ejected || gateway.Seen(catalog.Gateway).Requests > 0; time.Sleep(time.Millisecond) {
		if time.Since(begin) > 10*time.Second {
			t.Fatalf("the place of a dead process is not seen as ejected, or a request as ended: %+v", gateway.Seen(catalog.Gateway))
		}
	}

	// The way to another domain is its gateways.
	seen := w.trading.gateways[0].Seen(catalog.Gateway)
	i := slices.IndexFunc(seen.Services, func(s SeenService) bool { return s.Name == "accounts.banking.example" })
	if i < 0 || !seen.Services[i].Import() || !slices.ContainsFunc(seen.Services[i].Endpoints, func(e SeenEndpoint) bool { return e.Address == gateway.addr }) {
		t.Errorf("an import: %+v", seen.Services)
	}
}
