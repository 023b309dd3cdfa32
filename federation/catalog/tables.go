// Package catalog turns the declared objects of a trust domain (services, gateways,
// imports, agreements, relationships) into tables, and answers from them the two
// questions of every request: may it pass ([Tables.Decide], [Tables.Explain]), and
// where to ([Tables.Plan]). The same code answers at the CA's door, in every proxy
// and in the command line.
//
// The package is pure: no clock, no sockets, no goroutines. The same objects give
// the same tables on every replica, whatever their order.
package catalog

import (
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/federation"
)

// Tables are the compiled catalogue of one trust domain. They are immutable and
// may be used by any number of goroutines. Everything that a method returns is
// shared: read it, never write to it.
type Tables struct {
	td            spiffeid.TrustDomain
	allowLoopback bool
	datacenters   []string // nil: any

	services map[string]*Service // by label
	callers  map[string]*Service // by SPIFFE path
	targets  map[string]Target   // by service name: own services and imports
	peers    map[string]*peer    // by trust domain
	serving  map[export][]rule   // what peers may call here
	calling  map[string][]rule   // what own services may call there, by service name
	routes   map[string][]site   // imports: the peer's gateways by datacenter, by service name

	gateways []*OwnGateway // by name
	sites    []site        // own gateways by datacenter

	bindings []*statev1.RoleBinding // by name

	findings []Finding
}

type export struct{ peer, label string }

// peer is all that the catalogue knows of another trust domain.
type peer struct {
	related  bool
	gateways []PeerGateway
	ids      map[spiffeid.ID]struct{}
}

// site is the gateways of one datacenter.
type site struct {
	datacenter string
	hops       []Hop
}

// Target is where a service name leads: to an own service or to an import.
type Target struct {
	Name        string // canonical service name
	TrustDomain spiffeid.TrustDomain
	Service     *Service // nil: an import
	Port        uint16   // the service's own; 0: not known, or none
	TCP         bool     // it is not HTTP
}

// Import reports whether another domain serves the target.
func (t Target) Import() bool { return t.Service == nil }

// TrustDomain is the domain whose catalogue this is.
func (t *Tables) TrustDomain() spiffeid.TrustDomain { return t.td }

// Findings are what deserves attention but does not make the catalogue wrong, in
// the order of their sources.
func (t *Tables) Findings() []Finding { return t.findings }

// Service returns an own service by its label.
func (t *Tables) Service(label string) (*Service, bool) {
	s, ok := t.services[label]
	return s, ok
}

// ServiceByID returns the own service that an SVID stands for.
func (t *Tables) ServiceByID(id spiffeid.ID) (*Service, bool) {
	if !id.MemberOf(t.td) {
		return nil, false
	}
	s, ok := t.callers[id.Path()]
	return s, ok
}

// RoleBindings returns the role bindings in the order of their names.
func (t *Tables) RoleBindings() []*statev1.RoleBinding { return t.bindings }

// Services returns the own services in the order of their labels.
func (t *Tables) Services() []*Service {
	list := make([]*Service, 0, len(t.services))
	for _, s := range t.services {
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b *Service) int { return strings.Compare(a.Label, b.Label) })
	return list
}

// Imports returns the service names that lead to other domains, in order.
func (t *Tables) Imports() []string {
	var names []string
	for name, target := range t.targets {
		if target.Import() {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// Gateways returns the own gateways in the order of their names.
func (t *Tables) Gateways() []*OwnGateway { return t.gateways }

// Gateway returns an own gateway by its name.
func (t *Tables) Gateway(name string) (*OwnGateway, bool) {
	i, ok := slices.BinarySearchFunc(t.gateways, name, func(g *OwnGateway, name string) int { return strings.Compare(g.Name, name) })
	if !ok {
		return nil, false
	}
	return t.gateways[i], true
}

// IsOwnGateway reports whether id is a declared gateway of this domain.
func (t *Tables) IsOwnGateway(id spiffeid.ID) bool {
	name, ok := strings.CutPrefix(id.Path(), gatewayPath)
	if !ok || !id.MemberOf(t.td) {
		return false
	}
	_, ok = t.Gateway(name)
	return ok
}

// Peers returns the trust domains that a relationship or an agreement names, in order.
func (t *Tables) Peers() []spiffeid.TrustDomain {
	var list []spiffeid.TrustDomain
	for name := range t.peers {
		td, err := spiffeid.TrustDomainFromString(name)
		if err == nil { // it was checked when compiled
			list = append(list, td)
		}
	}
	slices.SortFunc(list, spiffeid.TrustDomain.Compare)
	return list
}

// PeerGateways returns the gateways of a domain that any agreement names, in order.
func (t *Tables) PeerGateways(td spiffeid.TrustDomain) []PeerGateway {
	if p := t.peers[td.Name()]; p != nil {
		return p.gateways
	}
	return nil
}

// IsPeerGateway reports whether any agreement names id as a gateway of its domain,
// with which a relationship exists. It is what a gateway asks before it completes a
// connection; whether that agreement is about the request at hand, and still in
// force, is Decide's to say.
func (t *Tables) IsPeerGateway(id spiffeid.ID) bool {
	p := t.peers[id.TrustDomain().Name()]
	if p == nil || !p.related {
		return false
	}
	_, ok := p.ids[id]
	return ok
}

// CheckForeignDial is federation.CheckDial with the exception that a development cluster
// makes for loopback.
func (t *Tables) CheckForeignDial(address string) error {
	return federation.CheckDial(address, t.allowLoopback)
}

// Resolve finds the target of a Host or :authority: a service name in any case,
// with or without a port and a final dot. It does not allocate for a name in its
// canonical form.
func (t *Tables) Resolve(host string) (Target, bool) {
	if target, ok := t.targets[host]; ok {
		return target, true
	}
	name, ok := canonicalHost(host)
	if !ok {
		return Target{}, false
	}
	target, ok := t.targets[name]
	return target, ok
}

// canonicalHost strips the port and one final dot and lowers the case.
func canonicalHost(host string) (string, bool) {
	const longest = 255 + len(".:65535")
	if len(host) > longest {
		return "", false
	}
	if colon := strings.IndexByte(host, ':'); colon >= 0 {
		port := host[colon+1:]
		if port == "" || len(port) > 5 || strings.Trim(port, "0123456789") != "" {
			return "", false
		}
		host = host[:colon]
	}
	host = strings.TrimSuffix(host, ".")
	// strings.ToLower would also fold letters outside ASCII, such as the Kelvin
	// sign, into names that nobody wrote.
	for i := range len(host) {
		if host[i] >= 0x80 {
			return "", false
		}
	}
	return strings.ToLower(host), host != ""
}
