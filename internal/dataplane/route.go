package dataplane

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/internal/dataplane/balance"
	"github.com/entente-mesh/entente/internal/dataplane/resilience"
)

// route is a plan with the places it names, made once per view, identity, place and target.
type route struct {
	service  string
	groups   []routeGroup
	failback *resilience.Failback[groupKey] // outlives the view
	hold     time.Duration
	manual   bool // no failback by itself
}

type routeGroup struct {
	key  groupKey
	hops []routeHop
}

// groupKey tells groups apart for failback: fresh and stale instances of one
// datacenter are the same.
type groupKey struct {
	datacenter string
	kind       catalog.HopKind
}

type routeHop struct {
	catalog.Hop
	place *place
	spec  *dialSpec
}

type routeKey struct {
	from     catalog.Place
	service  string
	identity string
}

type failbackKey struct {
	from    catalog.Place
	service string
}

// failbacks remembers which group serves what.
type failbacks struct {
	mu  sync.Mutex
	all map[failbackKey]*resilience.Failback[groupKey]
}

func (f *failbacks) of(key failbackKey) *resilience.Failback[groupKey] {
	f.mu.Lock()
	defer f.mu.Unlock()
	fb := f.all[key]
	if fb == nil {
		if f.all == nil {
			f.all = map[failbackKey]*resilience.Failback[groupKey]{}
		}
		fb = new(resilience.Failback[groupKey])
		f.all[key] = fb
	}
	return fb
}

// route finds the places to try for a target.
func (e *Engine) route(v *view, identity Identity, from catalog.Place, target catalog.Target) *route {
	key := routeKey{from, target.Name, identity.ID.String()}
	if r, ok := v.routes.Load(key); ok {
		return r.(*route)
	}
	// Without a hold time of the service's own, that of each place is enough.
	r := &route{service: target.Name, failback: e.failbacks.of(failbackKey{from, target.Name})}
	if s := target.Service; s != nil {
		r.hold, r.manual = s.Failover.Hold, s.Failover.ManualFailback
	}
	for _, g := range v.planner.Plan(from, target) {
		group := routeGroup{hops: make([]routeHop, len(g.Hops))}
		for i, hop := range g.Hops {
			group.key = groupKey{g.Datacenter, hop.Kind}
			p := e.upstream.at(hop.Address)
			group.hops[i] = routeHop{hop, p, &dialSpec{identity, hop.ServerName, hop.Kind, hop.IDs}}
		}
		r.groups = append(r.groups, group)
	}
	r.want(v)
	v.routes.Store(key, r)
	return r
}

// want has the places of the route kept while v is current.
func (r *route) want(v *view) {
	for _, group := range r.groups {
		for _, hop := range group.hops {
			hop.place.wanted.Store(v)
		}
	}
}

// choose picks the hop for the next attempt: of the group that serves now, else of the next
// one in order, the one with the fewest requests of those that are not tried and not
// left out; if there is none, one that was left out. Nil: all were tried. skip is a
// datacenter whose instances come last. more: another good one would be left after this.
func (r *route) choose(tried []*place, skip string, hold time.Duration, now time.Time) (hop *routeHop, more bool) {
	var (
		keysArray [8]groupKey
		goodArray [8]bool
		keys      = keysArray[:0]
		good      = goodArray[:0]
		total     int
	)
	for i := range r.groups {
		n := 0
		if r.groups[i].key == (groupKey{skip, catalog.ToInstance}) {
			keys, good = append(keys, r.groups[i].key), append(good, false)
			continue
		}
		for j := range r.groups[i].hops {
			if r.groups[i].hops[j].usable(r.service, tried, hold, now) {
				n++
			}
		}
		total += n
		keys, good = append(keys, r.groups[i].key), append(good, n > 0)
	}
	at := -1
	if len(tried) == 0 {
		at = r.failback.Choose(now, keys, good, r.hold, r.manual)
	} else {
		at = slices.Index(good, true)
	}
	if at >= 0 {
		if hop := r.groups[at].pick(func(h *routeHop) bool { return h.usable(r.service, tried, hold, now) }); hop != nil {
			return hop, total > 1
		}
	}
	for i := range r.groups {
		if hop := r.groups[i].pick(func(h *routeHop) bool { return !slices.Contains(tried, h.place) }); hop != nil {
			return hop, false
		}
	}
	return nil, false
}

// passedOver is the datacenter whose instances were preferred to hop and not chosen:
// hop, if it is a gateway there, need not find out for itself.
func (r *route) passedOver(hop *routeHop) string {
	if hop.Kind != catalog.ToOwnGateway || len(r.groups) == 0 || r.groups[0].key.kind != catalog.ToInstance {
		return ""
	}
	return r.groups[0].key.datacenter
}

func (h *routeHop) usable(service string, tried []*place, hold time.Duration, now time.Time) bool {
	return !slices.Contains(tried, h.place) && h.place.available(service, now, hold)
}

func (g *routeGroup) pick(may func(*routeHop) bool) *routeHop {
	var array [16]int
	list := array[:0]
	for i := range g.hops {
		if may(&g.hops[i]) {
			list = append(list, i)
		}
	}
	n := balance.LeastRequest(len(list), func(i int) int64 { return g.hops[list[i]].place.inflight.Load() }, rand.IntN)
	if n < 0 {
		return nil
	}
	return &g.hops[list[n]]
}

// checkForeign refuses addresses at which no peer of another domain can stand. It
// is asked with the address that is really dialled, after any look-up of a name.
func (e *Engine) checkForeign(_ context.Context, _, address string, _ syscall.RawConn) error {
	v := e.current.Load()
	if v == nil {
		return errNoView
	}
	if err := v.Tables.CheckForeignDial(address); err != nil {
		return fmt.Errorf("a gateway of another domain cannot be at %s: %w", address, err)
	}
	return nil
}
