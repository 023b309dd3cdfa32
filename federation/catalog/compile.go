package catalog

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/federation"
	"github.com/entente-mesh/entente/internal/nearest"
)

const (
	reservedPath = "/entente" // SPIFFE paths below it are members', agents' and gateways'
	gatewayPath  = reservedPath + "/gateway/"
)

// Option changes how Compile judges.
type Option func(*compiler)

// AllowLoopback lets peers name loopback addresses when dev is true: two domains on
// one machine, as in the demonstration. Pass the cluster's dev flag.
func AllowLoopback(dev bool) Option {
	return func(c *compiler) { c.tables.allowLoopback = dev }
}

// Datacenters makes every datacenter that is named but not among these a Fail. It
// is for whoever knows the whole topology; without it none is checked.
func Datacenters(names ...string) Option {
	return func(c *compiler) { c.datacenters = names }
}

// Compile checks the objects of a trust domain, each alone and all together, and
// makes its tables. The error is an *[Error] with every finding of severity Fail;
// the tables' Findings hold the warnings. Narrowing (a gateway or a caller fewer, a
// relationship gone) is never a Fail: it must not be in anybody's way.
//
// The objects are read, not kept.
func Compile(td spiffeid.TrustDomain, objects []*statev1.Object, options ...Option) (*Tables, error) {
	c := compiler{
		tables: &Tables{
			td:       td,
			services: map[string]*Service{},
			callers:  map[string]*Service{},
			targets:  map[string]Target{},
			peers:    map[string]*peer{},
			serving:  map[export][]rule{},
			calling:  map[string][]rule{},
			routes:   map[string][]site{},
		},
		objects:   map[string]*statev1.Object{},
		listeners: map[listener]*Service{},
	}
	for _, option := range options {
		option(&c)
	}
	c.tables.datacenters = c.datacenters
	for _, object := range c.unique(objects) {
		c.object = object
		switch {
		case object.GetService() != nil:
			c.service(object.GetService())
		case object.GetGateway() != nil:
			c.gateway(object.GetGateway())
		case object.GetRelationship() != nil:
			c.relationship(object.GetRelationship())
		case object.GetImport() != nil:
			c.imported(object.GetImport())
		case object.GetRoleBinding() != nil:
			c.roleBinding(object.GetRoleBinding())
		}
	}
	// What refers to the above comes after all of it.
	for _, object := range c.sorted {
		c.object = object
		switch {
		case object.GetService() != nil:
			c.serviceReferences(object.GetService())
		case object.GetImport() != nil:
			c.importReferences(object.GetImport())
		case object.GetAgreement() != nil:
			c.agreement(object.GetAgreement())
		}
	}
	c.finish()
	if len(c.failed) > 0 {
		sortFindings(c.failed)
		return nil, &Error{c.failed}
	}
	return c.tables, nil
}

// GRPCHealth marks a health check by gRPC's health protocol in a Service's record: the
// name of the gRPC service follows it.
const GRPCHealth = "grpc:"

// CutSelector takes a selector apart: unix:uid:1000 is of kind unix:uid.
func CutSelector(selector string) (kind, value string) {
	family, rest, _ := strings.Cut(selector, ":")
	kind, value, _ = strings.Cut(rest, ":")
	return family + ":" + kind, value
}

var roles = map[string]statev1.AdminRole{
	"viewer":        statev1.AdminRole_ADMIN_ROLE_VIEWER,
	"service-owner": statev1.AdminRole_ADMIN_ROLE_SERVICE_OWNER,
	"api-owner":     statev1.AdminRole_ADMIN_ROLE_API_OWNER,
	"trust-admin":   statev1.AdminRole_ADMIN_ROLE_TRUST_ADMIN,
}

// Roles are the roles that a RoleBinding may give, by the names that files have for them.
func Roles() map[string]statev1.AdminRole { return maps.Clone(roles) }

// RoleName is a role as it stands in a file.
func RoleName(r statev1.AdminRole) string {
	for name, role := range roles {
		if role == r {
			return name
		}
	}
	return "unknown"
}

type compiler struct {
	tables      *Tables
	datacenters []string
	objects     map[string]*statev1.Object // by key
	sorted      []*statev1.Object          // by key
	object      *statev1.Object            // the one that is looked at
	listeners   map[listener]*Service      // who calls others from where

	failed []Finding
}

type listener struct {
	host string
	port uint16
}

func (c *compiler) find(severity Severity, fix, format string, args ...any) {
	f := Finding{severity, Key(c.object), c.object.GetSource(), fmt.Sprintf(format, args...), fix}
	if severity == Fail {
		c.failed = append(c.failed, f)
	} else {
		c.tables.findings = append(c.tables.findings, f)
	}
}

func (c *compiler) fail(fix, format string, args ...any) { c.find(Fail, fix, format, args...) }
func (c *compiler) warn(fix, format string, args ...any) { c.find(Warn, fix, format, args...) }

func sortFindings(list []Finding) {
	slices.SortStableFunc(list, func(a, b Finding) int {
		fileA, lineA := splitSource(a.Source)
		fileB, lineB := splitSource(b.Source)
		return cmp.Or(strings.Compare(fileA, fileB), cmp.Compare(lineA, lineB), strings.Compare(a.Object, b.Object))
	})
}

func splitSource(source string) (file string, line int) {
	colon := strings.LastIndexByte(source, ':')
	if colon < 0 {
		return source, 0
	}
	line, _ = strconv.Atoi(source[colon+1:])
	return source[:colon], line
}

// unique returns the objects in the order of their keys, each key once.
func (c *compiler) unique(objects []*statev1.Object) []*statev1.Object {
	for _, object := range objects {
		key := Key(object)
		c.object = object
		if key == "" {
			c.fail("upgrade this process, or declare one of "+strings.Join(Kinds(), ", "), "the object is of no known kind")
			continue
		}
		if first := c.objects[key]; first != nil {
			where := ""
			if first.GetSource() != "" {
				where = " at " + first.GetSource()
			}
			c.fail("give one of them another name", "it is declared twice, first%s", where)
			continue
		}
		c.objects[key] = object
		c.sorted = append(c.sorted, object)
	}
	slices.SortFunc(c.sorted, func(a, b *statev1.Object) int { return strings.Compare(Key(a), Key(b)) })
	return c.sorted
}

// ---------------------------------------------------------------- each alone

func (c *compiler) service(s *statev1.Service) {
	ok := c.label("name", s.GetName())
	if s.GetName() == reservedPath[1:] {
		c.fail("choose another name", "the name %q is reserved", s.GetName())
		ok = false
	}
	id, err := spiffeid.FromPath(c.tables.td, s.GetPath())
	switch {
	case s.GetPath() == "":
		c.fail("", "its SPIFFE path is missing")
		ok = false
	case err != nil:
		c.fail("", "its SPIFFE path %q is not valid: %v", s.GetPath(), err)
		ok = false
	case s.GetPath() == reservedPath || strings.HasPrefix(s.GetPath(), reservedPath+"/"):
		c.fail("choose another path", "SPIFFE paths under %s/ are reserved", reservedPath)
		ok = false
	case c.tables.callers[s.GetPath()] != nil:
		c.fail("each service needs an identity of its own", "%s has the same SPIFFE path %s", c.tables.callers[s.GetPath()].objectKey, s.GetPath())
		ok = false
	}
	c.run(s.GetHosts(), s.GetSelectors())
	c.port("port", s.GetPort())
	c.port("outbound.port", s.GetOutboundPort())
	if health := s.GetHealthPath(); health != "" {
		if name, ok := strings.CutPrefix(health, GRPCHealth); ok {
			if len(name) > 256 || strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._") != "" {
				c.fail("write it as the .proto does: bank.accounts.v1.Accounts", "health.grpc.service %q is not the name of a gRPC service", name)
			}
		} else if _, why := cleanPath(health); why != "" {
			c.fail("", "health.http %q: %s", health, why)
		}
		if s.GetPort() == 0 {
			c.fail("give it a port, or no health check", "it has a health check and no port")
		}
		if s.GetProtocol() == statev1.Protocol_PROTOCOL_TCP {
			c.fail("leave health out: a TCP connect is the check; or give the agent a command", "it speaks TCP, and its health check does not")
		}
	}
	c.protocol(s.GetProtocol(), s.GetPort())
	if s.GetEdge() && (s.GetPort() != 0 || s.GetOutboundPort() != 0) {
		c.fail("leave edge out, or port and outbound", "it is an edge, which no sidecar serves, and has a port")
	}
	if s.GetHttp() != nil && (s.GetProtocol() == statev1.Protocol_PROTOCOL_TCP || s.GetPort() == 0) {
		c.fail("leave http out", "its http section is for a service that serves HTTP: it speaks TCP, or has no port")
	}
	const shortest, longest = 2, 7 * 24 * 3600
	if ttl := s.GetX509SvidSeconds(); ttl != 0 && (ttl < shortest || ttl > longest) {
		c.fail("", "ttl.x509 of %d s is outside %d s to %d s", ttl, shortest, longest)
	}
	const longestJWT, longestWIT = 3600, 24 * 3600
	if ttl := s.GetJwtSvidSeconds(); ttl != 0 && (ttl < shortest || ttl > longestJWT) {
		c.fail("", "ttl.jwt of %d s is outside %d s to %d s", ttl, shortest, longestJWT)
	}
	if ttl := s.GetWitSvidSeconds(); ttl != 0 && (ttl < shortest || ttl > longestWIT) {
		c.fail("", "ttl.wit of %d s is outside %d s to %d s", ttl, shortest, longestWIT)
	}
	if hint := s.GetHint(); len(hint) > 1024 || !utf8.ValidString(hint) || strings.ContainsFunc(hint, unicode.IsControl) {
		c.fail("", "the hint is not text of at most 1024 bytes on one line")
	}
	failover := c.failover(s.GetFailover())
	if !ok {
		return
	}
	service := &Service{
		Label:        s.GetName(),
		Name:         s.GetName() + "." + c.tables.td.Name(),
		ID:           id,
		Hosts:        slices.Clone(s.GetHosts()),
		Port:         uint16(s.GetPort()),
		TCP:          s.GetProtocol() == statev1.Protocol_PROTOCOL_TCP,
		AnyContent:   s.GetHttp().GetAnyContent(),
		ReadsBodies:  s.GetHttp().GetReadsBodies(),
		HealthPath:   s.GetHealthPath(),
		OutboundPort: uint16(s.GetOutboundPort()),
		Failover:     failover,
		ExportTo:     slices.Clone(s.GetExportTo()),
		Owner:        c.object.GetOwner(),
		Source:       c.object.GetSource(),
		Revision:     c.object.GetRevision(),
		objectKey:    Key(c.object),
	}
	c.tables.services[service.Label] = service
	c.tables.callers[s.GetPath()] = service
	c.tables.targets[service.Name] = Target{service.Name, c.tables.td, service, service.Port, service.TCP}
}

func (c *compiler) failover(f *statev1.Failover) Failover {
	compiled := Failover{
		Manual:         f.GetMode() == statev1.Mode_MODE_MANUAL,
		Order:          slices.Clone(f.GetOrder()),
		ManualFailback: f.GetFailback() == statev1.Mode_MODE_MANUAL,
		Hold:           time.Duration(f.GetHoldSeconds()) * time.Second,
	}
	if compiled.Hold == 0 {
		compiled.Hold = DefaultHold
	}
	for i, datacenter := range compiled.Order {
		c.datacenter("failover.order", datacenter)
		if slices.Contains(compiled.Order[:i], datacenter) {
			c.fail("", "failover.order lists %q twice", datacenter)
		}
	}
	for _, mode := range []statev1.Mode{f.GetMode(), f.GetFailback()} {
		if mode < statev1.Mode_MODE_UNSPECIFIED || mode > statev1.Mode_MODE_MANUAL {
			c.fail("use auto or manual", "failover has the unknown mode %d", mode)
		}
	}
	if compiled.Manual && len(compiled.Order) == 0 {
		c.fail("list the datacenter it lives in first, as in order: [dc1, dc2]", "failover is manual and has no order")
	}
	return compiled
}

func (c *compiler) gateway(g *statev1.Gateway) {
	ok := c.label("name", g.GetName())
	ok = c.datacenter("datacenter", g.GetDatacenter()) && ok
	ok = c.address("address", g.GetAddress(), false) && ok
	c.run(g.GetHosts(), g.GetSelectors())
	if !ok {
		return
	}
	id, err := spiffeid.FromPath(c.tables.td, gatewayPath+g.GetName())
	if err != nil {
		c.fail("", "its SPIFFE ID would not be valid: %v", err)
		return
	}
	for _, other := range c.tables.gateways {
		if other.Address == g.GetAddress() {
			c.fail("", "Gateway/%s has the same address %s", other.Name, other.Address)
		}
	}
	// Objects come in the order of their names, so the list is sorted.
	c.tables.gateways = append(c.tables.gateways, &OwnGateway{
		Name:       g.GetName(),
		ID:         id,
		Datacenter: g.GetDatacenter(),
		Address:    g.GetAddress(),
		Hosts:      slices.Clone(g.GetHosts()),
		Source:     c.object.GetSource(),
		Revision:   c.object.GetRevision(),
	})
	hop := Hop{ToOwnGateway, g.GetAddress(), c.tables.td.Name(), g.GetDatacenter(), []spiffeid.ID{id}, false}
	c.tables.sites = addHop(c.tables.sites, hop)
}

func addHop(sites []site, hop Hop) []site {
	at, found := slices.BinarySearchFunc(sites, hop.Datacenter, func(s site, dc string) int { return strings.Compare(s.datacenter, dc) })
	if !found {
		sites = slices.Insert(sites, at, site{datacenter: hop.Datacenter})
	}
	for i := range sites[at].hops {
		if other := &sites[at].hops[i]; other.Address == hop.Address {
			if !slices.Contains(other.IDs, hop.IDs[0]) {
				other.IDs = append(other.IDs, hop.IDs...)
			}
			return sites
		}
	}
	sites[at].hops = append(sites[at].hops, hop)
	return sites
}

func (c *compiler) relationship(r *statev1.Relationship) {
	td, ok := c.domain("metadata.name", r.GetTrustDomain())
	for _, raw := range r.GetEndpointUrls() {
		u, err := url.Parse(raw)
		switch {
		case err != nil || u.Scheme != "https" || u.Hostname() == "":
			c.fail("write it as https://host:port/path", "endpoint URL %q is not an https URL", raw)
			continue
		case u.User != nil || u.Fragment != "" || u.RawQuery != "":
			c.fail("", "endpoint URL %q has user information, a query or a fragment", raw)
			continue
		}
		if port := u.Port(); port != "" {
			if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
				c.fail("", "endpoint URL %q: the port is outside 1 to 65535", raw)
			}
		}
		c.foreignHost("endpoint URL", u.Hostname())
	}
	if endpoint := r.GetEndpointId(); endpoint != "" {
		id, err := spiffeid.FromString(endpoint)
		switch {
		case err != nil:
			c.fail("", "endpoint.id %q is not a SPIFFE ID: %v", endpoint, err)
		case ok && !id.MemberOf(td):
			c.fail("", "endpoint.id %q is not in trust domain %s", endpoint, td)
		case id.Path() == "":
			c.fail("", "endpoint.id %q has no path", endpoint)
		case len(r.GetBootstrapBundle()) == 0:
			c.fail("give bundleFile the peer's bundle, obtained over a channel that you trust", "endpoint.id is set and there is no bundle to verify it with")
		}
	}
	if bundle := r.GetBootstrapBundle(); len(bundle) > 0 && !json.Valid(bundle) {
		c.fail("", "the bundle is not JSON")
	}
	if len(r.GetEndpointUrls()) == 0 {
		c.warn("add endpoint.urls", "no endpoint URL is given: the peer's key rotations will not be noticed")
	}
	if ok {
		c.peer(td.Name()).related = true
	}
}

// Bounds of a role binding.
const (
	maxSubjects = 256
	maxPrefixes = 64
)

func (c *compiler) roleBinding(b *statev1.RoleBinding) {
	c.label("metadata.name", b.GetName())
	if _, known := statev1.AdminRole_name[int32(b.GetRole())]; !known || b.GetRole() == statev1.AdminRole_ADMIN_ROLE_UNSPECIFIED {
		c.fail("give one of "+strings.Join(sortedKeys(roles), ", "), "the role is none that this release knows")
	}
	if n := len(b.GetSubjects()); n == 0 || n > maxSubjects {
		c.fail("", "%d subjects, not 1 to %d", n, maxSubjects)
	}
	if n := len(b.GetPrefixes()); n > maxPrefixes {
		c.fail("", "%d prefixes, over %d", n, maxPrefixes)
	}
	for _, path := range b.GetSubjects() {
		c.rolePath("subject", path)
	}
	for _, path := range b.GetPrefixes() {
		c.rolePath("prefix", path)
	}
	if b.GetRole() == statev1.AdminRole_ADMIN_ROLE_TRUST_ADMIN && len(b.GetPrefixes()) > 0 {
		c.fail("leave prefixes out, or give another role", "trust-admin is for the whole domain: authorities, hosts and roles have no path")
	}
}

// rolePath refuses a path that no SVID of a workload can have: what the mesh itself runs
// is nobody's administrator, and owns nothing.
func (c *compiler) rolePath(what, path string) {
	switch err := spiffeid.ValidatePath(path); {
	case path == "" || err != nil:
		c.fail("write a SPIFFE path with its leading slash and none at the end, as in /team/payments", "%s %q is not a SPIFFE path: %v", what, path, err)
	case len(path) > maxRolePath:
		c.fail("", "%s %.40q... has over %d bytes", what, path, maxRolePath)
	case path == reservedPath || strings.HasPrefix(path, reservedPath+"/"):
		c.fail("", "%s %q is reserved for what the mesh itself runs", what, path)
	}
}

const maxRolePath = 1024

func (c *compiler) imported(i *statev1.Import) {
	label, domain, ok := splitServiceName(i.GetService())
	if !ok {
		c.fail("write LABEL.TRUSTDOMAIN, as in accounts.banking.example", "service %q is not a service name", i.GetService())
		return
	}
	if !c.label("service", label) {
		return
	}
	td, ok := c.domain("service", domain)
	if !ok {
		return
	}
	c.port("port", i.GetPort())
	c.protocol(i.GetProtocol(), i.GetPort())
	c.tables.targets[i.GetService()] = Target{
		Name: i.GetService(), TrustDomain: td, Port: uint16(i.GetPort()), TCP: i.GetProtocol() == statev1.Protocol_PROTOCOL_TCP,
	}
}

// ---------------------------------------------------------------- all together

func (c *compiler) serviceReferences(s *statev1.Service) {
	service := c.tables.services[s.GetName()]
	if service == nil || service.objectKey != Key(c.object) {
		return // it failed already
	}
	for i, domain := range s.GetExportTo() {
		td, ok := c.domain("export.to", domain)
		switch {
		case !ok:
		case slices.Contains(s.GetExportTo()[:i], domain):
			c.fail("", "export.to lists %s twice", domain)
		case s.GetPort() == 0:
			c.fail("give it a port", "it is exported to %s and listens on no port", domain)
		case !c.tables.related(td.Name()):
			c.warn(c.suggestPeer(domain), "it is exported to %s, with which there is no Relationship: nobody sees it", domain)
		}
	}
	if len(s.GetCalls()) > 0 {
		service.calls = map[string]struct{}{}
	}
	for _, name := range s.GetCalls() {
		full := name
		if !strings.Contains(name, ".") {
			full = name + "." + c.tables.td.Name()
		}
		if _, ok := c.tables.targets[full]; !ok {
			c.fail(c.suggestTarget(full), "calls lists %q, which is neither a Service nor an Import", name)
			continue
		}
		service.calls[full] = struct{}{}
		service.Calls = append(service.Calls, full)
	}
	if service.OutboundPort != 0 {
		for _, host := range service.Hosts {
			at := listener{host, service.OutboundPort}
			if first := c.listeners[at]; first != nil {
				c.fail("give each calling service a port of its own", "outbound.port %d is taken on host %s by %s", at.port, host, first.objectKey)
				break
			}
			c.listeners[at] = service
		}
	}
	if len(c.tables.sites) > 0 {
		for _, datacenter := range service.Failover.Order {
			if !slices.ContainsFunc(c.tables.sites, func(s site) bool { return s.datacenter == datacenter }) {
				c.warn("declare a Gateway there", "failover.order lists %s, where no gateway stands: other datacenters cannot reach it there", datacenter)
			}
		}
	}
}

func (c *compiler) importReferences(i *statev1.Import) {
	_, domain, ok := splitServiceName(i.GetService())
	if ok && domain != c.tables.td.Name() && !c.tables.related(domain) {
		c.warn(c.suggestPeer(domain), "there is no Relationship with %s: every call is refused", domain)
	}
}

func (c *compiler) agreement(a *statev1.Agreement) {
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
		key:      Key(c.object),
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

// finish sorts what was collected, and looks at what nobody spoke of.
func (c *compiler) finish() {
	t := c.tables
	for _, p := range t.peers {
		slices.SortFunc(p.gateways, func(a, b PeerGateway) int {
			return cmp.Or(strings.Compare(a.ID.String(), b.ID.String()), strings.Compare(a.Address, b.Address))
		})
	}
	for _, object := range c.sorted {
		c.object = object
		name := object.GetImport().GetService()
		if name == "" {
			continue
		}
		if _, known := t.targets[name]; known && len(t.calling[name]) == 0 {
			c.warn("list it in an Agreement with its domain", "no agreement lists it: every call is refused")
		}
	}
	if len(t.gateways) == 0 && len(t.peers) > 0 {
		c.object = nil
		for _, object := range c.sorted {
			if object.GetImport() != nil || len(object.GetService().GetExportTo()) > 0 {
				c.object = object
				c.warn("declare a Gateway", "this domain has no gateway: nothing passes between domains")
				break
			}
		}
	}
	sortFindings(t.findings)
}

// ---------------------------------------------------------------- pieces

func (c *compiler) peer(domain string) *peer {
	p := c.tables.peers[domain]
	if p == nil {
		p = &peer{ids: map[spiffeid.ID]struct{}{}}
		c.tables.peers[domain] = p
	}
	return p
}

// label checks a DNS label (RFC 1123, lower case).
func (c *compiler) label(what, s string) bool {
	if why := badLabel(s); why != "" {
		c.fail("", "%s %q %s", what, s, why)
		return false
	}
	return true
}

func badLabel(s string) string {
	switch {
	case s == "":
		return "is missing"
	case len(s) > 63:
		return "is longer than 63 letters"
	case s[0] == '-' || s[len(s)-1] == '-':
		return "begins or ends with \"-\""
	}
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return "may hold only a-z, 0-9 and \"-\""
		}
	}
	return ""
}

func (c *compiler) datacenter(what, name string) bool {
	if !c.label(what, name) {
		return false
	}
	if c.datacenters != nil && !slices.Contains(c.datacenters, name) {
		fix := "known: " + strings.Join(c.datacenters, ", ")
		if near := didYouMean(name, c.datacenters); near != "" {
			fix = near
		}
		c.fail(fix, "%s: there is no datacenter %q", what, name)
		return false
	}
	return true
}

// domain checks the name of another trust domain.
func (c *compiler) domain(what, name string) (spiffeid.TrustDomain, bool) {
	td, err := spiffeid.TrustDomainFromString(name)
	switch {
	case name == "":
		c.fail("", "%s names no trust domain", what)
	case err != nil || strings.Contains(name, "/"):
		c.fail("write it as in banking.example", "%s %q is not a trust domain name", what, name)
	case len(name) > 255-64:
		c.fail("", "%s: the trust domain name is too long for service names below it", what)
	case td == c.tables.td:
		c.fail("", "%s names this domain itself", what)
	default:
		return td, true
	}
	return spiffeid.TrustDomain{}, false
}

func (c *compiler) port(what string, port uint32) {
	if port > 65535 {
		c.fail("", "%s %d is outside 1 to 65535", what, port)
	}
}

// protocol checks what is spoken at a port.
func (c *compiler) protocol(p statev1.Protocol, port uint32) {
	switch {
	case p != statev1.Protocol_PROTOCOL_UNSPECIFIED && p != statev1.Protocol_PROTOCOL_TCP:
		c.fail("upgrade what reads this", "protocol %d is not one that this release knows", p)
	case p == statev1.Protocol_PROTOCOL_TCP && port == 0:
		c.fail("give it a port", "it speaks TCP and has no port: nothing else says which service a connection is for")
	}
}

// run checks where something runs and by what it is recognised.
func (c *compiler) run(hosts, selectors []string) {
	if len(hosts) == 0 {
		c.fail("list the agents, as in run: {hosts: [h1]}", "no host is listed")
	}
	for i, host := range hosts {
		c.label("host", host)
		if slices.Contains(hosts[:i], host) {
			c.fail("", "host %q is listed twice", host)
		}
	}
	if len(selectors) == 0 {
		c.fail("add run: {user: NAME} or run: {uid: N}", "nothing says by what its process is recognised")
	}
	const form = "write unix:uid:N, unix:user:NAME, unix:gid:N, unix:group:N, unix:path:/P, unix:sha256:HEX, unix:cmdline:HEX, systemd:unit:NAME.service or container:id:HEX"
	strong, weak := false, ""
	digest := func(selector, value, how string) {
		if len(value) != 64 || strings.Trim(value, "0123456789abcdef") != "" {
			c.fail(how, "selector %q: not 64 lower-case hexadecimal digits", selector)
		}
	}
	for _, selector := range selectors {
		kind, value := CutSelector(selector)
		if value == "" {
			c.fail(form, "selector %q is not understood", selector)
			continue
		}
		switch kind {
		case "unix:uid", "unix:gid", "unix:group":
			if n, err := strconv.ParseUint(value, 10, 32); err != nil || n == 1<<32-1 || strconv.FormatUint(n, 10) != value {
				c.fail("", "selector %q: not a number from 0 to 4294967294", selector)
			}
			strong = strong || kind == "unix:uid"
		case "unix:user":
			if len(value) > 32 || strings.ContainsAny(value, ": \t\n/") {
				c.fail("", "selector %q: not a user name", selector)
			}
			strong = true
		case "unix:sha256":
			digest(selector, value, "take the first column of: sha256sum FILE")
			strong = true
		case "unix:cmdline":
			digest(selector, value, "take the first column of: sha256sum /proc/PID/cmdline")
			weak = selector
		case "container:id":
			digest(selector, value, "take it from: docker inspect --format {{.Id}} NAME")
			strong = true
		case "systemd:unit":
			if !strings.HasSuffix(value, ".service") && !strings.HasSuffix(value, ".scope") || len(value) > 255 || strings.ContainsAny(value, "/ \t\n") {
				c.fail("write the unit as systemctl status shows it: web.service", "selector %q: not the name of a service or scope unit", selector)
			}
			strong = true
		case "run:id":
			if len(value) < 16 || len(value) > 64 || strings.Trim(value, "abcdefghijklmnopqrstuvwxyz234567") != "" {
				c.fail("", "selector %q: not an id that `entente run` makes", selector)
			}
			weak = selector
		case "unix:path":
			weak = selector
			if value[0] != '/' || strings.Contains(value+"/", "/../") || strings.Contains(value+"/", "/./") || strings.Contains(value, "//") || len(value) > 1 && strings.HasSuffix(value, "/") {
				c.fail("write the program's absolute path", "selector %q: not a clean absolute path", selector)
			}
		default:
			c.fail(form, "selector %q is not understood", selector)
		}
	}
	if weak != "" && !strong {
		c.fail("add systemd, container, user or uid", "%s stands alone: any user may place a program at a path he sees, and say any command line", weak)
	}
}

// address checks host:port; a foreign one may not lead back into our own hosts.
func (c *compiler) address(what, address string, foreign bool) bool {
	colon := strings.LastIndexByte(address, ':')
	if address == "" || colon < 0 {
		c.fail("write host:port", "%s %q is not host:port", what, address)
		return false
	}
	host, port := address[:colon], address[colon+1:]
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || strconv.FormatUint(n, 10) != port {
		c.fail("", "%s %q: the port is outside 1 to 65535", what, address)
		return false
	}
	bare, bracketed := strings.CutPrefix(host, "[")
	if bracketed {
		bare, bracketed = strings.CutSuffix(bare, "]")
	}
	ip, err := netip.ParseAddr(bare)
	switch {
	case bracketed != strings.Contains(host, ":"), bracketed && err != nil:
		c.fail("an IPv6 address stands in brackets, as in [2001:db8::1]:7443", "%s %q is not host:port", what, address)
		return false
	case err == nil && ip.Zone() != "":
		c.fail("", "%s %q has a zone, which means something else on every host", what, address)
		return false
	case err == nil && (ip.IsUnspecified() || ip.IsMulticast()):
		c.fail("write the address that others dial", "%s %q cannot be dialled", what, address)
		return false
	case err != nil && !hostName(bare):
		c.fail("", "%s %q: the host is neither an IP address nor a DNS name", what, address)
		return false
	}
	return !foreign || c.foreignHost(what, bare)
}

// foreignHost checks a host that another domain named: an IP address now, a name's
// addresses again at each dial.
func (c *compiler) foreignHost(what, host string) bool {
	ip, err := netip.ParseAddr(host)
	if err != nil {
		name := strings.TrimSuffix(strings.ToLower(host), ".")
		if (name == "localhost" || strings.HasSuffix(name, ".localhost")) && !c.tables.allowLoopback {
			c.fail("", "%s %q is this host itself, which a peer domain may not name", what, host)
			return false
		}
		return true
	}
	if err := checkForeignAddr(ip, c.tables.allowLoopback); err != nil {
		c.fail("only a cluster made with dev may do that, for loopback", "%s: %v", what, err)
		return false
	}
	return true
}

// hostName accepts DNS names. One whose last label is a number is refused: some
// resolvers read 127.1 or 2130706433 as an IPv4 address.
func hostName(s string) bool {
	s = strings.TrimSuffix(s, ".")
	if s == "" || len(s) > 253 {
		return false
	}
	last := ""
	for label := range strings.SplitSeq(strings.ToLower(s), ".") {
		if badLabel(label) != "" {
			return false
		}
		last = label
	}
	return strings.Trim(last, "0123456789") != "" && !strings.HasPrefix(last, "0x")
}

// splitServiceName parts LABEL.TRUSTDOMAIN; both parts are non-empty.
func splitServiceName(name string) (label, domain string, ok bool) {
	label, domain, ok = strings.Cut(name, ".")
	return label, domain, ok && label != "" && domain != ""
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

// manySuggestions is how many faults are looked for a nearest name: each is compared with
// every name that there is.
const manySuggestions = 64

func (c *compiler) suggestTarget(name string) string {
	if len(c.failed) >= manySuggestions {
		return ""
	}
	domain := "." + c.tables.td.Name()
	names := sortedKeys(c.tables.targets)
	near := nearest.Word(name, names)
	if label, own := strings.CutSuffix(name, domain); own {
		// Compare labels alone: a long domain would make any two names look near.
		var labels []string
		for _, each := range names {
			if l, ok := strings.CutSuffix(each, domain); ok {
				labels = append(labels, l)
			}
		}
		near = nearest.Word(label, labels)
	} else if label, domain, ok := splitServiceName(name); ok {
		var labels []string
		for _, each := range names {
			if l, d, _ := splitServiceName(each); d == domain {
				labels = append(labels, l)
			}
		}
		if l := nearest.Word(label, labels); l != "" {
			near = l + "." + domain
		} else {
			near = ""
		}
	}
	if near == "" {
		return ""
	}
	return fmt.Sprintf("did you mean %q?", near)
}

func (c *compiler) suggestPeer(domain string) string {
	var related []string
	for name, p := range c.tables.peers {
		if p.related {
			related = append(related, name)
		}
	}
	if s := didYouMean(domain, related); s != "" {
		return s
	}
	return "declare kind: Relationship for " + domain
}

func didYouMean(word string, words []string) string {
	if near := nearest.Word(word, words); near != "" {
		return fmt.Sprintf("did you mean %q?", near)
	}
	return ""
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for key := range m {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}
