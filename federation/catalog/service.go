package catalog

import (
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// DefaultHold is how long a datacenter must be healthy again before requests go
// back to it, where a service does not say.
const DefaultHold = 30 * time.Second

// Service is one service of this domain.
type Service struct {
	Label string
	Name  string      // LABEL.TRUSTDOMAIN: what callers write into Host
	ID    spiffeid.ID // who serves it, and who its workload is when it calls

	Hosts        []string // agents that may run it
	Port         uint16   // where the application listens; 0: it only calls
	TCP          bool     // what it speaks there is carried, not looked at; else it is HTTP
	AnyContent   bool     // it takes content on methods that usually have none
	ReadsBodies  bool     // it reads all content of a request before the connection's next one
	HealthPath   string   // empty: a TCP connect is the check
	OutboundPort uint16   // loopback port on which its workload calls others; 0: none
	Failover     Failover
	ExportTo     []string // trust domains that may see it
	Calls        []string // service names it may call; nil: its own domain's and every import

	Owner    string
	Source   string // FILE:LINE, for people
	Revision uint64

	objectKey string              // "Service/LABEL"
	calls     map[string]struct{} // nil: everything visible
}

// Failover says which datacenters may answer for a service. Moving back is left to
// the balancer, which is told here how.
type Failover struct {
	Manual         bool          // it does not leave the first datacenter of Order by itself
	Order          []string      // most preferred first, others are never used; empty: the caller's own, then every other
	ManualFailback bool          // requests stay where they are until an operator sends them back
	Hold           time.Duration // how long a datacenter must be healthy again before failback
}

// GRPCHealth marks a health check by gRPC's health protocol in a Service's record: the
// name of the gRPC service follows it.
const GRPCHealth = "grpc:"

var serviceKind = kind{
	name: "Service",
	id: func(o *statev1.Object) (string, bool) {
		s := o.GetService()
		return s.GetName(), s != nil
	},
	compile:    (*compiler).service,
	references: (*compiler).serviceReferences,
	level: func(o *statev1.Object) uint32 {
		s := o.GetService()
		level := runLevel(s.GetSelectors())
		switch {
		case s.GetEdge() || s.GetHttp() != nil:
			return max(level, 5)
		case s.GetProtocol() != 0:
			return max(level, 4)
		default:
			return level
		}
	},
	forHosts: whole,
	ends:     (*Tables).serviceEnds,
}

func (c *compiler) service() {
	s := c.object.GetService()
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
	c.serviceHealth(s)
	c.protocol(s.GetProtocol(), s.GetPort())
	if s.GetEdge() && (s.GetPort() != 0 || s.GetOutboundPort() != 0) {
		c.fail("leave edge out, or port and outbound", "it is an edge, which no sidecar serves, and has a port")
	}
	if s.GetHttp() != nil && (s.GetProtocol() == statev1.Protocol_PROTOCOL_TCP || s.GetPort() == 0) {
		c.fail("leave http out", "its http section is for a service that serves HTTP: it speaks TCP, or has no port")
	}
	c.serviceLifetimes(s)
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
		objectKey:    c.object.key,
	}
	c.tables.services[service.Label] = service
	c.tables.callers[s.GetPath()] = service
	c.tables.targets[service.Name] = Target{service.Name, c.tables.td, service, service.Port, service.TCP}
}

func (c *compiler) serviceHealth(s *statev1.Service) {
	health := s.GetHealthPath()
	if health == "" {
		return
	}
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

// serviceLifetimes checks how long the SVIDs of a service may live.
func (c *compiler) serviceLifetimes(s *statev1.Service) {
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

func (c *compiler) serviceReferences() {
	s := c.object.GetService()
	service := c.tables.services[s.GetName()]
	if service == nil || service.objectKey != c.object.key {
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

func (s *Service) exported(domain string) bool {
	for _, each := range s.ExportTo {
		if each == domain {
			return true
		}
	}
	return false
}

func (t *Tables) serviceEnds(o *statev1.Object) (ends []string) {
	s, ok := t.services[o.GetService().GetName()]
	if !ok {
		return nil
	}
	ends = append(ends, s.ID.String()+" gets no SVID any more; those that its hosts hold stop counting")
	if s.Port == 0 {
		return ends
	}
	ends = append(ends, "calls of "+s.Name+" are refused")
	for _, peer := range s.ExportTo {
		if rules := t.serving[export{peer, s.Label}]; len(rules) > 0 {
			ends = append(ends, "callers of "+peer+" lose it: "+strings.Join(agreementsOf(rules), ", "))
		}
	}
	return ends
}
