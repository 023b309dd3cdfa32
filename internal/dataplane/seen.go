package dataplane

import (
	"cmp"
	"net"
	"slices"
	"sync/atomic"
	"time"

	"github.com/entente-mesh/entente/federation/catalog"
)

// Seen is what an engine does and knows at one moment, for people.
type Seen struct {
	Connections int // open, with verified peers, both sides
	Requests    int // under way; a tunnel is one
	Listeners   []SeenListener
	Services    []SeenService // nil: the domain is not known yet
}

// SeenListener is an mTLS listener that is open.
type SeenListener struct {
	Name        string // as in the configuration
	Address     string
	ID          string // SPIFFE ID that it shows; empty: that of the service that is called
	Connections int    // open, with verified peers
}

// SeenService is where requests for one service name may be sent.
type SeenService struct {
	catalog.Target
	Endpoints []SeenEndpoint // instances of an own service; gateways on the way to an import
}

// SeenEndpoint is one address.
type SeenEndpoint struct {
	catalog.Endpoint // of a gateway: its SPIFFE ID as the agent, healthy
	Ejected          bool
}

// listener is an mTLS listener that is open.
type listener struct {
	name, id       string
	ln             net.Listener
	shifts         bool // Drain ends them
	identity       Identity
	administration Administration // nil: none
	connections    atomic.Int64
}

// opened counts a listener until closed is called.
func (e *Engine) opened(l *listener) (closed func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.listeners = append(e.listeners, l)
	return func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.listeners = slices.DeleteFunc(e.listeners, func(other *listener) bool { return other == l })
	}
}

// Seen looks at everything. role is what the process sends requests as.
func (e *Engine) Seen(role catalog.Role) Seen {
	seen := Seen{Connections: e.registry.Len(), Requests: e.inflight.len()}
	e.mu.Lock()
	for _, l := range e.listeners {
		seen.Listeners = append(seen.Listeners, SeenListener{l.name, l.ln.Addr().String(), l.id, int(l.connections.Load())})
	}
	e.mu.Unlock()
	slices.SortFunc(seen.Listeners, func(a, b SeenListener) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Address, b.Address))
	})
	v := e.current.Load()
	if v == nil {
		return seen
	}
	names := v.Tables.Imports()
	for _, s := range v.Tables.Services() {
		names = append(names, s.Name)
	}
	slices.Sort(names)
	seen.Services = make([]SeenService, 0, len(names))
	from := catalog.Place{Datacenter: e.cfg.Datacenter, Role: role}
	for _, name := range names {
		if target, ok := v.Tables.Resolve(name); ok {
			seen.Services = append(seen.Services, SeenService{target, e.endpoints(v, from, target)})
		}
	}
	return seen
}

func (e *Engine) endpoints(v *view, from catalog.Place, target catalog.Target) (list []SeenEndpoint) {
	if target.Service != nil {
		for _, endpoint := range v.planner.Endpoints(target.Service.Label) {
			list = append(list, SeenEndpoint{endpoint, e.ejected(endpoint.Address)})
		}
		return list
	}
	for _, group := range v.planner.Plan(from, target) {
		for _, hop := range group.Hops {
			endpoint := catalog.Endpoint{Datacenter: hop.Datacenter, Address: hop.Address, Healthy: true, Stale: hop.Stale}
			if len(hop.IDs) > 0 {
				endpoint.Agent = hop.IDs[0].String()
			}
			list = append(list, SeenEndpoint{endpoint, e.ejected(hop.Address)})
		}
	}
	return list
}

// ejected reports whether an address is left out, since it could not be reached.
func (e *Engine) ejected(address string) bool {
	e.upstream.mu.RLock()
	p := e.upstream.places[address]
	e.upstream.mu.RUnlock()
	return p != nil && !p.health.Available(time.Now(), e.cfg.Timing.Hold)
}

func (f *inflight) len() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.all)
}
