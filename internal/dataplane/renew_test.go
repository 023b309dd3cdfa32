package dataplane

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
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

	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/internal/peer"
)

// verdict is what processes are told of SVIDs, by serial number.
type verdict struct {
	x509bundle.Source
	distrusted, announced *atomic.Pointer[[]string]
	asked                 *atomic.Int64 // for a bundle, as each recheck does
}

func (v verdict) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	v.asked.Add(1)
	return v.Source.GetX509BundleForTrustDomain(td)
}

func named(list *atomic.Pointer[[]string]) func([]*x509.Certificate) error {
	return func(chain []*x509.Certificate) error {
		if slices.Contains(*list.Load(), chain[0].SerialNumber.String()) {
			return errors.New("distrusted")
		}
		return nil
	}
}

func (v verdict) Distrusted(path []*x509.Certificate) error { return named(v.distrusted)(path) }

func (v verdict) Announced() func([]*x509.Certificate) error {
	if len(*v.announced.Load()) == len(*v.distrusted.Load()) {
		return nil
	}
	return named(v.announced)
}

func newVerdict() verdict {
	v := verdict{distrusted: new(atomic.Pointer[[]string]), announced: new(atomic.Pointer[[]string]), asked: new(atomic.Int64)}
	v.distrusted.Store(&[]string{})
	v.announced.Store(&[]string{})
	return v
}

func judgedBy(v verdict) option {
	return func(w *world) {
		w.trust = func(bundles x509bundle.Source) x509bundle.Source {
			v := v
			v.Source = bundles
			return v
		}
	}
}

// I4: the SVIDs of a caller's and a service's entry are distrusted while it calls. Both get
// new ones; no request is lost, not even one that must not be repeated, since no connection
// in use is cut: they were replaced. The old SVIDs are refused.
func TestDistrustLosesNoRequestOfWhoRenews(t *testing.T) {
	v := newVerdict()
	w := newWorld(t, judgedBy(v))
	w.trading.endpoints = w.trading.endpoints[:1] // nobody else serves it
	w.push()

	stop := make(chan struct{})
	var loaders sync.WaitGroup
	var asked, failed atomic.Int64
	for range 4 {
		loaders.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				r, _ := http.NewRequest("POST", w.trading.outURL[0]+"/v1/order", strings.NewReader("one"))
				r.Host = "market.trading.example"
				res, err := client.Do(r)
				if asked.Add(1); err != nil {
					failed.Add(1)
					t.Log(err)
					continue
				}
				if res.Body.Close(); res.StatusCode != 200 {
					failed.Add(1)
					t.Log(res.Status)
				}
			}
		})
	}
	time.Sleep(300 * time.Millisecond)

	old := map[string]*x509svid.SVID{}
	var serials []string
	for _, path := range []string{"/portfolio", "/market"} {
		svid := w.svid(w.trading, path).svid.Load()
		old[path] = svid
		serials = append(serials, svid.Certificates[0].SerialNumber.String())
	}
	before := asked.Load()
	v.announced.Store(&serials)
	time.Sleep(50 * time.Millisecond) // the agents renew
	w.rotate()
	time.Sleep(500 * time.Millisecond)
	v.distrusted.Store(&serials)
	cut := 0
	for _, p := range w.trading.processes() {
		cut += p.registry.Recheck()
	}
	if cut > 0 {
		t.Errorf("%d connections were still in use", cut)
	}
	time.Sleep(300 * time.Millisecond)
	close(stop)
	loaders.Wait()
	if asked.Load() == before || failed.Load() > 0 {
		t.Errorf("%d of %d requests failed", failed.Load(), asked.Load())
	}

	dial := func(svid *x509svid.SVID) error {
		config := peer.ClientTLS(svid, w.trading.own, peer.AnyOf(spiffeid.RequireFromPath(trading, "/market")), "h2")
		config.ServerName = "market.trading.example"
		conn, err := tls.Dial("tcp", w.trading.sidecars[0].addr, config)
		if err != nil {
			return err
		}
		defer conn.Close()
		_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		_, err = conn.Read(make([]byte, 1)) // HTTP/2 says something first
		return err
	}
	if dial(old["/portfolio"]) == nil {
		t.Error("the old SVID is accepted")
	}
	if err := dial(w.svid(w.trading, "/portfolio").svid.Load()); err != nil {
		t.Errorf("control: %v", err)
	}
}

// Other endpoints alone recheck no connection, and make no routes again but those to the
// services that have them; they are used at once. Other tables recheck all.
func TestEndpointsAloneRecheckNothing(t *testing.T) {
	v := newVerdict()
	w := newWorld(t, judgedBy(v))
	out := w.trading.out[0]
	for _, name := range []string{"market.trading.example", "accounts.banking.example"} {
		if a := get(t, w.trading.outURL[0], name, "/v1/x"); a.StatusCode != 200 {
			t.Fatal(name, a)
		}
	}
	routes := func() map[string]*route {
		all := map[string]*route{}
		out.current.Load().routes.Range(func(_, r any) bool {
			all[r.(*route).service] = r.(*route)
			return true
		})
		return all
	}
	before, tables := routes(), out.current.Load().Tables
	if len(before) != 2 {
		t.Fatalf("%d routes", len(before))
	}
	v.asked.Store(0)
	flipped := slices.Clone(w.trading.endpoints)
	for range 1000 {
		flipped[0].Healthy = !flipped[0].Healthy
		out.SetEndpoints(slices.Clone(flipped))
	}
	other := append(slices.Clone(flipped), catalog.Endpoint{Service: "cart", Agent: "agent-dc1", Datacenter: "dc1", Address: "127.0.0.1:1", Healthy: true})
	out.SetEndpoints(other)
	if n := v.asked.Load(); n > 0 {
		t.Errorf("%d rechecks", n)
	}
	after := routes()
	if after["accounts.banking.example"] != before["accounts.banking.example"] || after["market.trading.example"] != nil || out.current.Load().Tables != tables {
		t.Errorf("routes: %v", after)
	}
	flipped[0].Healthy = false
	out.SetEndpoints(flipped)
	if a := get(t, w.trading.outURL[0], "market.trading.example", "/v1/x"); a.StatusCode != 200 {
		t.Error(a)
	}
	if groups := routes()["market.trading.example"].groups; len(groups) == 0 || groups[0].key.datacenter != "dc1" || groups[0].hops[0].Kind != catalog.ToOwnGateway {
		t.Errorf("an unhealthy instance is first: %+v", groups)
	}
	v.asked.Store(0)
	out.SetView(w.trading.view(t)) // control
	if v.asked.Load() == 0 {
		t.Error("control: other tables recheck nothing")
	}
}
