package scenarios

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/internal/nearest"
	"github.com/entente-mesh/entente/internal/refusal"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

// Most services that fit the ports of one host.
const maxServices = 500

var dnsLabel = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// checker collects what cannot be played.
type checker struct {
	spec *Spec
	errs yamlfile.Errors

	datacenters []string
	domains     []string
	services    []string // service names of all domains
	loads       []string
}

func check(s *Scenario) yamlfile.Errors {
	c := &checker{spec: &s.Spec}
	c.label(s.Metadata.At("name"), "the scenario", s.Metadata.Name)
	c.topology()
	c.agreements()
	c.groups()
	c.story()
	slices.SortStableFunc(c.errs, func(a, b *yamlfile.Error) int { return a.Line - b.Line })
	return c.errs
}

func (c *checker) add(at yamlfile.Pos, format string, args ...any) {
	c.errs = append(c.errs, at.Errorf(format, args...))
}

func (c *checker) label(at yamlfile.Pos, what, name string) {
	if !dnsLabel.MatchString(name) {
		c.add(at, "%s is called %q, which is no DNS label: lower-case letters, digits and inner hyphens, at most 63", what, name)
	}
}

// known complains about a word that is not in words, and proposes the nearest.
func (c *checker) known(at yamlfile.Pos, what, word string, words []string) bool {
	if slices.Contains(words, word) {
		return true
	}
	hint := ""
	if near := nearest.Word(word, words); near != "" {
		hint = fmt.Sprintf("; did you mean %q?", near)
	} else if len(words) <= 12 {
		hint = "; there are: " + strings.Join(words, ", ")
	}
	c.add(at, "%s %q does not exist%s", what, word, hint)
	return false
}

// each complains about unknown and doubled words of a list.
func (c *checker) each(at yamlfile.Pos, what string, list, words []string) {
	for i, word := range list {
		if slices.Contains(list[:i], word) {
			c.add(at, "%s %q is listed twice", what, word)
		}
		c.known(at, what, word, words)
	}
}

func (c *checker) topology() {
	networks := map[string]string{}
	for _, dc := range c.spec.Datacenters {
		c.label(dc.At("name"), "a datacenter", dc.Name)
		if slices.Contains(c.datacenters, dc.Name) {
			c.add(dc.At("name"), "datacenter %q stands here twice", dc.Name)
		}
		c.datacenters = append(c.datacenters, dc.Name)
		prefix, err := netip.ParsePrefix(dc.Network)
		if err != nil || !prefix.Addr().Is4() || prefix.Addr().As4()[0] != 127 || prefix.Bits() != 16 || prefix.Masked() != prefix || prefix.Addr().As4()[1] == 0 {
			c.add(dc.At("network"), "network %q is not a /16 of the loopback network above 127.0.0.0/16, as in 127.1.0.0/16", dc.Network)
		}
		if other := networks[dc.Network]; other != "" {
			c.add(dc.At("network"), "network %s already belongs to %s", dc.Network, other)
		}
		networks[dc.Network] = dc.Name
	}
	shorts := map[string]string{}
	for _, td := range c.spec.TrustDomains {
		if _, err := spiffeid.TrustDomainFromString(td.Name); err != nil || strings.Contains(td.Name, "/") {
			c.add(td.At("name"), "%q is no trust domain: a lower-case DNS name such as banking.example", td.Name)
		}
		if slices.Contains(c.domains, td.Name) {
			c.add(td.At("name"), "trust domain %q stands here twice", td.Name)
		} else if other := shorts[short(td.Name)]; other != "" {
			c.add(td.At("name"), "%s and %s begin with the same label, which names their processes here", td.Name, other)
		}
		shorts[short(td.Name)] = td.Name
		c.domains = append(c.domains, td.Name)
		for _, s := range td.Services {
			c.services = append(c.services, s.Name+"."+td.Name)
		}
	}
	for i := range c.spec.TrustDomains {
		c.trustDomain(&c.spec.TrustDomains[i])
	}
}

func (c *checker) trustDomain(td *TrustDomain) {
	c.each(td.At("ca"), "datacenter", td.CA, c.datacenters)
	c.each(td.At("mesh"), "datacenter", td.Mesh, c.datacenters)
	if len(td.Services) > maxServices {
		c.add(td.At("services"), "%d services are more than the %d that fit one host", len(td.Services), maxServices)
	}
	var labels []string
	for _, s := range td.Services {
		c.label(s.At("name"), "a service", s.Name)
		if slices.Contains(labels, s.Name) {
			c.add(s.At("name"), "service %q of %s stands here twice", s.Name, td.Name)
		}
		labels = append(labels, s.Name)
	}
	for _, s := range td.Services {
		c.service(td, s)
	}
	if e := td.Edge; e != nil {
		c.label(e.At("identity"), "the edge's identity", e.Identity)
		if slices.Contains(labels, e.Identity) {
			c.add(e.At("identity"), "the edge calls as %q, which is also a service of %s: give it a name of its own", e.Identity, td.Name)
		}
		c.each(e.At("in"), "datacenter of the mesh", e.In, td.Mesh)
		for _, r := range e.Routes {
			c.known(r.At("service"), "service of "+td.Name, r.Service, labels)
			if !strings.HasPrefix(r.PathPrefix, "/") {
				c.add(r.At("pathPrefix"), "path prefix %q does not begin with a slash", r.PathPrefix)
			}
		}
	}
}

func (c *checker) service(td *TrustDomain, s Service) {
	full := s.Name + "." + td.Name
	for _, name := range s.Calls {
		if !c.known(s.At("calls"), "service", name, c.services) {
			continue
		}
		switch target, home := c.find(name); {
		case name == full:
			c.add(s.At("calls"), "%s calls itself", full)
		case home.Name != td.Name && !slices.Contains(target.Export, td.Name):
			c.add(s.At("calls"), "%s calls %s, which %s does not export to %s", full, name, home.Name, td.Name)
		}
	}
	for _, domain := range s.Export {
		if c.known(s.At("export"), "trust domain", domain, c.domains) && domain == td.Name {
			c.add(s.At("export"), "%s is exported to its own domain, which sees it anyway", full)
		}
	}
	if f := s.Failover; f != nil {
		c.each(f.At("order"), "datacenter of the mesh", f.Order, td.Mesh)
	}
	for _, path := range slices.Sorted(maps.Keys(s.Answers)) {
		if !strings.HasPrefix(path, "/") || strings.ContainsAny(path, " {}?#") {
			c.add(s.At("answers"), "%s answers at %q, which is no plain path", full, path)
		}
		if !json.Valid([]byte(s.Answers[path])) {
			c.add(s.At("answers"), "what %s answers at %s is no JSON", full, path)
		}
	}
	if s.Program == "" && len(s.Answers) == 0 {
		c.add(s.Pos, "service %s has neither a program nor answers", full)
	}
}

// find returns a service that exists by its full name, and its domain.
func (c *checker) find(name string) (*Service, *TrustDomain) { return c.spec.find(name) }

func (s *Spec) find(name string) (*Service, *TrustDomain) {
	label, domain, _ := strings.Cut(name, ".")
	td := s.domain(domain)
	if td == nil {
		return nil, nil
	}
	i := slices.IndexFunc(td.Services, func(s Service) bool { return s.Name == label })
	if i < 0 {
		return nil, nil
	}
	return &td.Services[i], td
}

func (s *Spec) domain(name string) *TrustDomain {
	i := slices.IndexFunc(s.TrustDomains, func(td TrustDomain) bool { return td.Name == name })
	if i < 0 {
		return nil
	}
	return &s.TrustDomains[i]
}

// edge returns the domain whose edge phones use: the first that has one.
func (s *Spec) edge() *TrustDomain {
	i := slices.IndexFunc(s.TrustDomains, func(td TrustDomain) bool { return td.Edge != nil })
	if i < 0 {
		return nil
	}
	return &s.TrustDomains[i]
}

func (c *checker) agreements() {
	var names []string
	for _, a := range c.spec.Agreements {
		c.label(a.At("name"), "an agreement", a.Name)
		if slices.Contains(names, a.Name) {
			c.add(a.At("name"), "agreement %q stands here twice", a.Name)
		}
		names = append(names, a.Name)
		server, caller := c.spec.domain(a.Between.Server), c.spec.domain(a.Between.Caller)
		c.known(a.Between.At("server"), "trust domain", a.Between.Server, c.domains)
		c.known(a.Between.At("caller"), "trust domain", a.Between.Caller, c.domains)
		if server == nil || caller == nil {
			continue
		}
		if server == caller {
			c.add(a.Between.Pos, "agreement %q is between %s and itself", a.Name, server.Name)
			continue
		}
		var exported, callers []string
		for _, s := range server.Services {
			if slices.Contains(s.Export, caller.Name) {
				exported = append(exported, s.Name)
			}
		}
		for _, s := range caller.Services {
			callers = append(callers, s.Name)
		}
		for _, allow := range a.Allow {
			if s, _ := c.find(allow.Service + "." + server.Name); s != nil && !slices.Contains(exported, allow.Service) {
				c.add(allow.At("service"), "agreement %q is for %s, which %s does not export: add \"export: [%s]\" to it at line %d",
					a.Name, allow.Service, server.Name, caller.Name, s.Line)
			} else {
				c.known(allow.At("service"), "exported service of "+server.Name, allow.Service, exported)
			}
			c.each(allow.At("callers"), "service of "+caller.Name, allow.Callers, callers)
		}
	}
}

// sender checks who asks what from where.
func (c *checker) sender(at yamlfile.Pos, from, datacenter, rawURL, tier string) {
	u, err := url.Parse(rawURL)
	if err != nil {
		c.add(at.At("url"), "%q is no URL: %v", rawURL, err)
		return
	}
	if from == phone {
		td := c.spec.edge()
		if td == nil {
			c.add(at.At("from"), "a phone needs an edge, and no trust domain has one")
			return
		}
		c.known(at.At("datacenter"), "datacenter with an edge", datacenter, td.Edge.In)
		if u.IsAbs() || !strings.HasPrefix(rawURL, "/") {
			c.add(at.At("url"), "a phone asks for a path of the edge, as in /portfolio/v1/..., not %q", rawURL)
		} else if !slices.ContainsFunc(td.Edge.Routes, func(r Route) bool {
			return u.Path == r.PathPrefix || strings.HasPrefix(u.Path, strings.TrimSuffix(r.PathPrefix, "/")+"/")
		}) {
			c.add(at.At("url"), "no route of the edge leads to %q", rawURL)
		}
		if tier != "" {
			c.known(at.At("tier"), "tier", tier, slices.Sorted(maps.Keys(td.Edge.Tiers)))
		}
		return
	}
	if !c.known(at.At("from"), "service", from, append(slices.Clone(c.services), phone)) {
		return
	}
	service, td := c.find(from)
	c.known(at.At("datacenter"), "datacenter of the mesh", datacenter, td.Mesh)
	if !service.Alone {
		c.add(at.At("from"), "%s must be a process of its own to send requests: add \"alone: true\" at line %d", from, service.Line)
	}
	if u.Scheme != "http" {
		c.add(at.At("url"), "a service asks for http://NAME/PATH, not %q", rawURL)
		return
	}
	if c.known(at.At("url"), "service", u.Host, c.services) && !slices.Contains(service.Calls, u.Host) {
		c.add(at.At("url"), "%s does not list %s under its calls at line %d", from, u.Host, service.Line)
	}
}

func (c *checker) groups() {
	for _, l := range c.spec.Load {
		if slices.Contains(c.loads, l.Name) {
			c.add(l.At("name"), "load %q stands here twice", l.Name)
		}
		c.loads = append(c.loads, l.Name)
		c.known(l.At("servedBy"), "datacenter", l.ServedBy, c.datacenters)
		c.sender(l.Pos, l.From, l.Datacenter, l.URL, l.Tier)
	}
}

func (c *checker) story() {
	lost := ""
	for i, ch := range c.spec.Story {
		given := 0
		for _, part := range []string{"start", "call", "refuse", "lose", "endure", "restore"} {
			if ch.Given(part) {
				given++
			}
		}
		if given != 1 {
			c.add(ch.Pos, "step %q must have exactly one of start, call, refuse, lose, endure, restore", ch.Name)
			continue
		}
		if (i == 0) != (ch.Start != nil) {
			c.add(ch.Pos, "the first step, and only the first, must be start")
		}
		switch {
		case ch.Call != nil:
			c.call(ch.Call)
		case ch.Refuse != nil:
			for _, r := range ch.Refuse {
				c.refuse(r)
			}
		case ch.Lose != nil:
			if lost != "" {
				c.add(ch.Lose.Pos, "datacenter %s is lost already", lost)
			}
			lost = ch.Lose.Datacenter
			c.lose(ch.Lose)
		case ch.Endure != nil:
			c.each(ch.Endure.At("quorum"), "trust domain", ch.Endure.Quorum, c.domains)
			if ch.Endure.Renewed != "" && c.known(ch.Endure.At("renewed"), "datacenter", ch.Endure.Renewed, c.datacenters) && ch.Endure.Renewed == lost {
				c.add(ch.Endure.At("renewed"), "nothing renews in %s, which is lost", lost)
			}
		case ch.Restore != nil:
			if lost == "" || lost != ch.Restore.Datacenter {
				c.add(ch.Restore.At("datacenter"), "datacenter %q is not lost", ch.Restore.Datacenter)
			}
			lost = ""
		}
	}
}

func (c *checker) call(s *CallStep) {
	c.sender(s.Request.Pos, s.Request.From, s.Request.Datacenter, s.Request.URL, s.Request.Tier)
	id := func(at yamlfile.Pos, text string) {
		if _, err := spiffeid.FromString("spiffe://" + text); err != nil {
			c.add(at, "%q is no SPIFFE ID without its scheme, as in trading.example/portfolio", text)
			return
		}
		domain, _, _ := strings.Cut(text, "/")
		c.known(at, "trust domain", domain, c.domains)
	}
	for _, seen := range s.Sees {
		c.known(seen.At("service"), "service", seen.Service, c.services)
		id(seen.At("caller"), seen.Caller)
	}
	for _, leg := range s.Legs {
		id(leg.At("from"), leg.From)
		id(leg.At("to"), leg.To)
	}
}

func (c *checker) refuse(r Refusal) {
	c.attempt(Attempt{r.Pos, r.Call, r.Dial})
	c.attempt(r.Control)
	switch {
	case r.Call != nil && r.Expect == nil:
		c.add(r.Pos, "%q does not say with which status and reason it is refused: add \"expect\"", r.Name)
	case r.Dial != nil && r.Expect != nil:
		c.add(r.At("expect"), "a dial is refused by TLS itself, without a status: leave \"expect\" out")
	case r.Expect != nil:
		var reasons []string
		for _, row := range refusal.All() {
			reasons = append(reasons, string(row.Reason))
		}
		c.known(r.Expect.At("reason"), "reason", r.Expect.Reason, reasons)
	}
}

func (c *checker) attempt(a Attempt) {
	if (a.Call == nil) == (a.Dial == nil) {
		c.add(a.Pos, "an attempt is either a call or a dial")
		return
	}
	if a.Call != nil {
		c.sender(a.Call.Pos, a.Call.From, a.Call.Datacenter, a.Call.URL, a.Call.Tier)
		return
	}
	d := a.Dial
	if (d.As == "") == (d.Forged == "") {
		c.add(d.Pos, "a dial shows either a service's true SVID (as) or a forged one (forged)")
	}
	if (d.Sidecar == "") == (d.Gateway == "") {
		c.add(d.Pos, "a dial goes either to a sidecar or to a gateway")
		return
	}
	if d.As != "" && c.known(d.At("as"), "service", d.As, c.services) {
		if s, _ := c.find(d.As); !s.Alone {
			c.add(d.At("as"), "%s must be a process of its own to dial: add \"alone: true\" at line %d", d.As, s.Line)
		}
	}
	if d.Forged != "" {
		if _, err := spiffeid.FromString(d.Forged); err != nil {
			c.add(d.At("forged"), "%q is no SPIFFE ID: %v", d.Forged, err)
		}
	}
	key, target := "sidecar", d.Sidecar
	if d.Gateway != "" {
		key, target = "gateway", d.Gateway
	}
	if c.known(d.At(key), "trust domain", target, c.domains) {
		c.known(d.At("datacenter"), "datacenter of the mesh", d.Datacenter, c.spec.domain(target).Mesh)
	}
}

func (c *checker) lose(l *LoseStep) {
	c.each(l.At("load"), "load", l.Load, c.loads)
	if !c.known(l.At("datacenter"), "datacenter", l.Datacenter, c.datacenters) {
		return
	}
	for _, td := range c.spec.TrustDomains {
		if slices.Contains(td.Mesh, l.Datacenter) && len(td.Mesh) == 1 {
			c.add(l.At("datacenter"), "%s has its mesh in %s alone (line %d): when that is lost nothing can go on", td.Name, l.Datacenter, td.Line)
		}
	}
	for _, name := range l.Load {
		i := slices.IndexFunc(c.spec.Load, func(l Load) bool { return l.Name == name })
		if i < 0 {
			continue
		}
		if g := c.spec.Load[i]; g.From != phone && g.Datacenter == l.Datacenter {
			c.add(l.At("load"), "load %q is sent from %s, which is lost itself; a measure needs senders that survive", name, l.Datacenter)
		}
	}
}

// short is the first label of a trust domain; it names its processes.
func short(domain string) string {
	label, _, _ := strings.Cut(domain, ".")
	return label
}
