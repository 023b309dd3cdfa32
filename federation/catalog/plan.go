package catalog

import (
	"slices"
	"strings"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Endpoint is one known instance of an own service.
type Endpoint struct {
	Service    string // label
	Agent      string // its host; one that the service does not list is passed over
	Datacenter string
	Address    string // host:port of the sidecar's inbound listener
	Healthy    bool
	Stale      bool   // nobody vouches for it just now
	ID         string // among the agent's others of the service; empty: it has one
}

// Role is what the planning process is.
type Role uint8

const (
	Sidecar Role = iota + 1
	Gateway      // an east-west gateway
	Edge
)

// Place is where a request stands when it is planned.
type Place struct {
	Datacenter     string
	Role           Role
	FromOwnGateway bool // another gateway of this domain handed it over: only local instances are left
	FromPeer       bool // a gateway of another domain handed it over: never on to an import
}

// HopKind says what is dialled.
type HopKind uint8

const (
	ToInstance    HopKind = iota + 1 // a sidecar in front of the service
	ToOwnGateway                     // a gateway of this domain
	ToPeerGateway                    // a gateway of another domain
)

// Hop is one address that may be tried, and who may answer there.
type Hop struct {
	Kind       HopKind
	Address    string // host:port
	ServerName string // SNI: the service name towards a sidecar, the trust domain towards a gateway
	Datacenter string
	IDs        []spiffeid.ID // the only SPIFFE IDs that may answer
	Stale      bool
}

// Group is hops of equal rank: the balancer picks among them, and goes on to the
// next group when they fail.
type Group struct {
	Datacenter string
	Hops       []Hop
}

// Plan lists, best first, the groups of hops by which a request at the given place
// reaches the target. Nil: there is none.
//
// A sidecar or an edge goes to instances of its own datacenter directly and to
// every other datacenter through gateways: those of its own, then those of the
// other. It never gets an address of another domain (I6). A gateway goes to
// instances of its datacenter, to own gateways of the others, or, for an import, to
// the gateways that an agreement about it names. What came through another own
// gateway ends at local instances, so that nothing goes round.
//
// Datacenters are taken in the order of the service's failover (the caller's own
// first where there is none); those without a healthy instance only if no other has
// one. Within a datacenter stale instances come after fresh ones; that alone does
// not move requests to another, since a CA node that restarts makes many of them
// stale for a moment (I12). A manual service stays in its first datacenter.
func (t *Tables) Plan(from Place, target Target, endpoints []Endpoint) []Group {
	switch {
	case target.Name == "":
		return nil
	case !target.Import():
		return t.planOwn(from, target.Service, endpoints)
	case from.FromPeer || from.FromOwnGateway:
		return nil
	case from.Role == Gateway:
		return groups(t.routes[target.Name], from.Datacenter)
	default:
		return groups(t.sites, from.Datacenter)
	}
}

// groups is all sites, the given datacenter's first, the others in order.
func groups(sites []site, first string) []Group {
	if len(sites) == 0 {
		return nil
	}
	list := make([]Group, 0, len(sites))
	for _, s := range sites {
		if s.datacenter == first {
			list = append(list, Group{s.datacenter, s.hops})
		}
	}
	for _, s := range sites {
		if s.datacenter != first {
			list = append(list, Group{s.datacenter, s.hops})
		}
	}
	return list
}

// instances is one datacenter's, by how good they are.
type instances struct {
	datacenter              string
	fresh, stale, unhealthy []Hop
}

func (in *instances) healthy() bool { return len(in.fresh)+len(in.stale) > 0 }

func (t *Tables) planOwn(from Place, s *Service, endpoints []Endpoint) []Group {
	var known []*instances
	ids := []spiffeid.ID{s.ID}
	for i := range endpoints {
		e := &endpoints[i]
		if e.Service != s.Label || !slices.Contains(s.Hosts, e.Agent) {
			continue
		}
		at := slices.IndexFunc(known, func(in *instances) bool { return in.datacenter == e.Datacenter })
		if at < 0 {
			at = len(known)
			known = append(known, &instances{datacenter: e.Datacenter})
		}
		hop := Hop{ToInstance, e.Address, s.Name, e.Datacenter, ids, e.Stale}
		switch in := known[at]; {
		case !e.Healthy:
			in.unhealthy = append(in.unhealthy, hop)
		case e.Stale:
			in.stale = append(in.stale, hop)
		default:
			in.fresh = append(in.fresh, hop)
		}
	}
	order := s.datacenters(from.Datacenter, known)
	if from.FromOwnGateway {
		order = slices.DeleteFunc(order, func(in *instances) bool { return in.datacenter != from.Datacenter })
	}
	anyHealthy := slices.ContainsFunc(order, (*instances).healthy)

	var plan []Group
	for _, in := range order {
		if anyHealthy && !in.healthy() {
			continue
		}
		switch {
		case in.datacenter == from.Datacenter:
			plan = in.appendGroups(plan)
		case from.Role == Gateway:
			plan = t.appendSite(plan, in.datacenter)
		default:
			// The nearest gateways first: they know every way that is left. The
			// other datacenter's serve when these are gone.
			plan = t.appendSite(plan, from.Datacenter)
			plan = t.appendSite(plan, in.datacenter)
		}
	}
	return plan
}

func (in *instances) appendGroups(plan []Group) []Group {
	if !in.healthy() {
		return append(plan, Group{in.datacenter, in.unhealthy})
	}
	if len(in.fresh) > 0 {
		plan = append(plan, Group{in.datacenter, in.fresh})
	}
	if len(in.stale) > 0 {
		plan = append(plan, Group{in.datacenter, in.stale})
	}
	return plan
}

// appendSite adds the own gateways of a datacenter, once.
func (t *Tables) appendSite(plan []Group, datacenter string) []Group {
	for _, s := range t.sites {
		if s.datacenter != datacenter {
			continue
		}
		for _, g := range plan {
			if g.Datacenter == datacenter && g.Hops[0].Kind == ToOwnGateway {
				return plan
			}
		}
		return append(plan, Group{datacenter, s.hops})
	}
	return plan
}

// datacenters puts what is known into the order in which it may be used.
func (s *Service) datacenters(own string, known []*instances) []*instances {
	slices.SortFunc(known, func(a, b *instances) int {
		switch {
		case a.datacenter == own && b.datacenter != own:
			return -1
		case a.datacenter != own && b.datacenter == own:
			return 1
		default:
			return strings.Compare(a.datacenter, b.datacenter)
		}
	})
	if len(s.Failover.Order) == 0 {
		return known
	}
	listed := s.Failover.Order
	if s.Failover.Manual {
		listed = listed[:1]
	}
	var order []*instances
	for _, datacenter := range listed {
		for _, in := range known {
			if in.datacenter == datacenter {
				order = append(order, in)
			}
		}
	}
	return order
}

// Planner answers Plan for one picture of the world (tables and endpoints) and
// remembers the answers: make a new one whenever either changes. It is safe for
// concurrent use; what it returns is shared, so it must not be written to.
type Planner struct {
	tables    *Tables
	endpoints map[string][]Endpoint // by label

	mu    sync.RWMutex
	plans map[planKey][]Group // grows to places times services at most
}

type planKey struct {
	from Place
	name string
}

// NewPlanner takes the endpoints as they are now; it does not keep the slice.
func (t *Tables) NewPlanner(endpoints []Endpoint) *Planner {
	p := &Planner{tables: t, endpoints: map[string][]Endpoint{}, plans: map[planKey][]Group{}}
	for _, e := range endpoints {
		p.endpoints[e.Service] = append(p.endpoints[e.Service], e)
	}
	return p
}

// With is a planner for the same tables and other endpoints. It keeps the answers that do
// not change; stays says of which targets they are.
func (p *Planner) With(endpoints []Endpoint) (next *Planner, stays func(Target) bool) {
	next = p.tables.NewPlanner(endpoints)
	stays = func(target Target) bool {
		return target.Service == nil || slices.Equal(p.endpoints[target.Service.Label], next.endpoints[target.Service.Label])
	}
	p.mu.RLock()
	defer p.mu.RUnlock()
	for key, plan := range p.plans {
		if target, ok := p.tables.Resolve(key.name); ok && stays(target) {
			next.plans[key] = plan
		}
	}
	return next, stays
}

// Tables are those it was made of.
func (p *Planner) Tables() *Tables { return p.tables }

// Endpoints are the known instances of an own service, by its label.
func (p *Planner) Endpoints(label string) []Endpoint { return p.endpoints[label] }

// Plan is Tables.Plan with the planner's endpoints. It does not allocate for a
// question that was asked before.
func (p *Planner) Plan(from Place, target Target) []Group {
	key := planKey{from, target.Name}
	p.mu.RLock()
	plan, ok := p.plans[key]
	p.mu.RUnlock()
	if ok {
		return plan
	}
	var endpoints []Endpoint
	if target.Service != nil {
		endpoints = p.endpoints[target.Service.Label]
	}
	plan = p.tables.Plan(from, target, endpoints)
	p.mu.Lock()
	p.plans[key] = plan
	p.mu.Unlock()
	return plan
}
