package catalog

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/federation"
)

// PeerGateway is a gateway of another domain, as an agreement names it.
type PeerGateway struct {
	ID         spiffeid.ID
	Datacenter string
	Address    string // host:port
}

// rule is one entry of an agreement's allow list.
type rule struct {
	agreement *agreement
	callers   []federation.Pattern
	http      []httpMatch // empty: everything
}

type agreement struct {
	key      string // "Agreement/NAME"
	source   string
	revision uint64
	expires  int64
	gateways map[spiffeid.ID]struct{}
}

type httpMatch struct {
	methods []string // empty: every one
	path    string   // empty: every one; a prefix has no "/" at its end, save for "/" itself
	exact   bool
}

var agreementKind = kind{
	name: "Agreement",
	id: func(o *statev1.Object) (string, bool) {
		a := o.GetAgreement()
		return a.GetName(), a != nil
	},
	references: (*compiler).agreement,
	forHosts:   whole,
	ends:       (*Tables).agreementEnds,
}

func (c *compiler) agreement() {
	a := c.object.GetAgreement()
	c.label("name", a.GetName())
	td, ok := c.domain("peer", a.GetPeer())
	if !ok {
		return
	}
	if a.GetExpires() <= 0 {
		c.fail("add expires: YYYY-MM-DD", "it does not say when it expires")
	}
	if !c.tables.related(td.Name()) {
		c.warn(c.suggestPeer(td.Name()), "there is no Relationship with %s: every call is refused", td)
	}
	compiled := &agreement{
		key:      c.object.key,
		source:   c.object.GetSource(),
		revision: c.object.GetRevision(),
		expires:  a.GetExpires(),
		gateways: map[spiffeid.ID]struct{}{},
	}
	gates := c.peerGateways(a, td, compiled)
	if len(a.GetAllow()) == 0 {
		c.warn("add allow, or delete it", "it allows nothing")
	}
	for i, allow := range a.GetAllow() {
		c.allow(fmt.Sprintf("allow[%d]", i), allow, td, compiled, gates)
	}
}

func (c *compiler) peerGateways(a *statev1.Agreement, td spiffeid.TrustDomain, compiled *agreement) []PeerGateway {
	var gates []PeerGateway
	for i, g := range a.GetGateways() {
		what := fmt.Sprintf("gateways[%d]", i)
		id, err := spiffeid.FromPath(td, g.GetPath())
		switch {
		case g.GetPath() == "":
			c.fail("", "%s has no SPIFFE path", what)
			continue
		case err != nil:
			c.fail("", "%s: SPIFFE path %q is not valid: %v", what, g.GetPath(), err)
			continue
		}
		if !c.label(what+".datacenter", g.GetDatacenter()) || !c.address(what+".address", g.GetAddress(), true) {
			continue
		}
		gate := PeerGateway{id, g.GetDatacenter(), g.GetAddress()}
		if slices.Contains(gates, gate) {
			c.fail("", "%s is listed twice", what)
			continue
		}
		gates = append(gates, gate)
		compiled.gateways[id] = struct{}{}
		p := c.peer(td.Name())
		p.ids[id] = struct{}{}
		if !slices.Contains(p.gateways, gate) {
			p.gateways = append(p.gateways, gate)
		}
	}
	if len(a.GetGateways()) == 0 {
		c.warn("list the peer's gateways", "no gateway is listed: no connection is completed for it")
	}
	return gates
}

func (c *compiler) allow(what string, allow *statev1.Allow, td spiffeid.TrustDomain, compiled *agreement, gates []PeerGateway) {
	r := rule{agreement: compiled}
	calling := strings.Contains(allow.GetService(), ".")
	for i, text := range allow.GetCallers() {
		pattern, err := federation.ParsePattern(text)
		if err != nil {
			c.fail("", "%s.callers: %v", what, err)
			continue
		}
		for _, before := range r.callers {
			if federation.Overlap(before, pattern) {
				c.warn("keep one", "%s.callers: %q overlaps %q", what, text, before)
			}
		}
		r.callers = append(r.callers, pattern)
		if calling && !c.anyCaller(pattern) {
			c.warn(c.suggestCaller(text), "%s.callers[%d]: no Service of this domain is meant by %q", what, i, text)
		}
	}
	if len(allow.GetCallers()) == 0 {
		c.fail("name the callers, as in callers: [portfolio]", "%s lists no caller", what)
	}
	for i, m := range allow.GetHttp() {
		if match, ok := c.http(fmt.Sprintf("%s.http[%d]", what, i), m); ok {
			r.http = append(r.http, match)
		}
	}
	target := c.tables.targets[allow.GetService()]
	if service := c.tables.services[allow.GetService()]; service != nil {
		target = c.tables.targets[service.Name]
	}
	if target.TCP && len(allow.GetHttp()) > 0 {
		c.fail("leave http out", "%s: %s speaks TCP, which has no methods and paths", what, target.Name)
	}
	if calling {
		c.allowCalling(what, allow.GetService(), td, r, gates)
	} else {
		c.allowServing(what, allow.GetService(), td, r)
	}
}

// allowServing takes a rule about an own service that the peer may call.
func (c *compiler) allowServing(what, label string, td spiffeid.TrustDomain, r rule) {
	service := c.tables.services[label]
	switch {
	case label == "":
		c.fail("name an exported service", "%s names no service", what)
	case service == nil:
		c.fail(c.suggestTarget(label+"."+c.tables.td.Name()), "%s: service %q is not a Service of this domain", what, label)
	case !service.exported(td.Name()):
		c.fail(fmt.Sprintf("add %s to export.to of %s", td, service.objectKey), "%s: service %q is not exported to %s", what, label, td)
	default:
		key := export{td.Name(), label}
		c.tables.serving[key] = append(c.tables.serving[key], r)
	}
}

// allowCalling takes a rule about a service of the peer that own services may call.
func (c *compiler) allowCalling(what, name string, td spiffeid.TrustDomain, r rule, gates []PeerGateway) {
	label, domain, ok := splitServiceName(name)
	target, known := c.tables.targets[name]
	switch {
	case !ok:
		c.fail("write a label for an own service, LABEL.TRUSTDOMAIN for the peer's", "%s: service %q is no service name", what, name)
	case domain == c.tables.td.Name():
		c.fail(fmt.Sprintf("write %q", label), "%s: own services are named by their label, not %q", what, name)
	case domain != td.Name():
		c.fail("write an agreement with "+domain, "%s: service %q is not of peer %s", what, name, td)
	case !known:
		fix := c.suggestTarget(name)
		if fix == "" {
			fix = "declare kind: Import with spec: {service: " + name + "}"
		}
		c.fail(fix, "%s: service %q is not imported", what, name)
	default:
		c.tables.calling[target.Name] = append(c.tables.calling[target.Name], r)
		for _, g := range gates {
			hop := Hop{ToPeerGateway, g.Address, td.Name(), g.Datacenter, []spiffeid.ID{g.ID}, false}
			c.tables.routes[target.Name] = addHop(c.tables.routes[target.Name], hop)
		}
	}
}

func (c *compiler) http(what string, m *statev1.HTTPMatch) (httpMatch, bool) {
	ok := true
	match := httpMatch{methods: slices.Clone(m.GetMethods()), path: m.GetPath()}
	for _, method := range match.methods {
		if !validMethod(method) {
			c.fail("", "%s: %q is not a method", what, method)
			ok = false
		} else if upper := strings.ToUpper(method); upper != method {
			c.fail(fmt.Sprintf("write %q", upper), "%s: method %q: methods are compared case-sensitively", what, method)
			ok = false
		}
	}
	switch m.GetPathType() {
	case statev1.PathType_PATH_TYPE_EXACT:
		match.exact = true
	case statev1.PathType_PATH_TYPE_PREFIX, statev1.PathType_PATH_TYPE_UNSPECIFIED:
	default:
		c.fail("use PathPrefix or Exact", "%s: unknown path type %d", what, m.GetPathType())
		ok = false
	}
	if match.path == "" {
		if match.exact {
			c.fail("give it a value", "%s: an exact path is empty", what)
			ok = false
		}
		return match, ok
	}
	if _, why := cleanPath(match.path); why != "" || strings.Contains(match.path, "%") {
		c.fail("write the path plainly, without escapes", "%s: path %q: %s", what, match.path, cmp.Or(why, "the path holds an escape"))
		return match, false
	}
	if !match.exact && match.path != "/" {
		match.path = strings.TrimSuffix(match.path, "/")
	}
	return match, ok
}

// anyCaller reports whether the pattern means an own service.
func (c *compiler) anyCaller(pattern federation.Pattern) bool {
	for path := range c.tables.callers {
		if pattern.Match(path) {
			return true
		}
	}
	return false
}

func (c *compiler) suggestCaller(text string) string {
	var paths []string
	for path := range c.tables.callers {
		paths = append(paths, path[1:])
	}
	return didYouMean(text, paths)
}

func (t *Tables) agreementEnds(o *statev1.Object) (ends []string) {
	a := o.GetAgreement()
	for _, allow := range a.GetAllow() {
		from, service := a.GetPeer(), allow.GetService()
		if strings.Contains(service, ".") {
			from = t.td.Name() // the calling side: it names the peer's service
		}
		ends = append(ends, fmt.Sprintf("%s of %s may not call %s any more, unless another agreement allows it", strings.Join(allow.GetCallers(), ", "), from, service))
	}
	return ends
}

// agreementsOf are the keys of the agreements that rules stand in, sorted.
func agreementsOf(rules []rule) []string {
	var keys []string
	for _, r := range rules {
		keys = append(keys, r.agreement.key)
	}
	slices.Sort(keys)
	return slices.Compact(keys)
}
