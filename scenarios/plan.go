package scenarios

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/federation/manifest"
	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/internal/yamlfile"
	"github.com/entente-mesh/entente/scenarios/platform"
)

// Ports are fixed and below the range of ephemeral ones; hosts differ by address.
const (
	portGuard    = 7399 // held by the runner: two runs never share a slot
	portCAAPI    = 7400
	portCARaft   = 7401
	portCABundle = 7443
	portInbound  = 7500
	portGateway  = 7600
	portAdmin    = 7690
	portEdge     = 8443
	portApp      = 20001 // and up: one for each service of a host
	portOutbound = 21001
)

// Roles of a trust domain's hosts; the last digit of their addresses.
const (
	hostCA = 1 + iota
	hostMesh
	hostGateway
	hostEdge
)

// A rehearsal's keys are plain files. Its agents, which are not root, look at the
// gateways' executables, and it measures everybody's memory.
const debuggable = "--debuggable"

// Slots that are tried: third octet of every address.
const maxSlots = 64

// Where there is only one address, a slot is a range of its ports, all of them below
// the ephemeral ones. Its first is the guard; then each domain has a block for each of
// its datacenters: its doors, its services, their outbound listeners.
const (
	onlyAddress = "127.0.0.1"
	firstPort   = 12000
	slotPorts   = 2560
	oneSlots    = 8
)

// doors are the listeners of a domain in a datacenter, those of its services aside.
var doors = []struct{ role, port int }{
	{hostCA, portCAAPI}, {hostCA, portCARaft}, {hostCA, portCABundle}, {hostCA, portAdmin},
	{hostMesh, portInbound}, {hostMesh, portAdmin}, {hostGateway, portGateway}, {hostGateway, portAdmin},
	{hostEdge, portEdge}, {hostEdge, portAdmin},
}

// kind is what a process is.
type kind string

const (
	kindCA      kind = "ca"
	kindAgent   kind = "agent"
	kindGateway kind = "gateway"
	kindEdge    kind = "edge"
	kindService kind = "service"
)

// unit is one process of the plan.
type unit struct {
	name       string // banking-ca-dc1
	kind       kind
	domain     string
	datacenter string
	services   []string // service names that it serves, of a service process

	link    string   // name under bin/ that it is run by
	args    []string // after the configuration is written
	dir     string
	socket  string // admin socket of a CA, Workload API of an agent, control socket of a service process
	listens []string
	door    string // where others dial it: inbound, east-west or edge
	admin   string // host:port; empty for service programs
	access  string // file of access records
	config  any    // written as config.yaml
}

// plan is every process of a scenario with its place, files and addresses.
type plan struct {
	spec    *Spec
	dir     string // work directory
	sockets string // short-named directory for unix sockets
	place
	blocks map[block]int // first port of each, where there is only one address
	units  []*unit
}

// place is where on the loopback network a plan is.
type place struct {
	slot int
	one  bool // every host is 127.0.0.1, and ports tell them apart
}

// block is a domain's part of a datacenter.
type block struct{ domain, datacenter string }

// newPlan places a scenario's processes. It touches nothing.
func newPlan(spec *Spec, dir, sockets string, at place) *plan {
	p := &plan{spec: spec, dir: dir, sockets: sockets, place: at}
	p.blocks, _ = at.portBlocks(spec)
	for i := range spec.TrustDomains {
		td := &spec.TrustDomains[i]
		for _, dc := range td.CA {
			p.addCA(td, dc)
		}
		for _, dc := range td.Mesh {
			p.addAgent(td, dc)
			p.addGateway(td, dc)
			p.addServices(td, dc)
		}
		if td.Edge != nil {
			for _, dc := range td.Edge.In {
				p.addEdge(td, dc)
			}
		}
	}
	return p
}

// host is the address of one host of a trust domain in a datacenter.
func (p *plan) host(domain, datacenter string, role int) string {
	at := slices.IndexFunc(p.spec.TrustDomains, func(td TrustDomain) bool { return td.Name == domain })
	return p.address(datacenter, 10*(at+1)+role)
}

func (p *plan) address(datacenter string, last int) string {
	if p.one {
		return onlyAddress
	}
	i := slices.IndexFunc(p.spec.Datacenters, func(dc Datacenter) bool { return dc.Name == datacenter })
	network := netip.MustParsePrefix(p.spec.Datacenters[i].Network).Addr().As4()
	network[2], network[3] = byte(p.slot), byte(last)
	return netip.AddrFrom4(network).String()
}

// portBlocks gives each block its first port, and says how many ports there are in all.
// A domain's first mesh datacenter comes before its others, so that no offset is below zero.
func (at place) portBlocks(spec *Spec) (blocks map[block]int, ports int) {
	first := firstPort + at.slot*slotPorts
	blocks, ports = map[block]int{}, 1 // the guard's
	add := func(b block, n int) {
		if _, ok := blocks[b]; !ok {
			blocks[b] = first + ports
			ports += n
		}
	}
	for _, td := range spec.TrustDomains {
		for _, dc := range td.Mesh {
			add(block{td.Name, dc}, len(doors)+2*len(td.Services))
		}
		for _, dc := range td.CA {
			add(block{td.Name, dc}, len(doors))
		}
	}
	return blocks, ports
}

// at is the address of a door of one host.
func (p *plan) at(domain, datacenter string, role, port int) string {
	if p.one {
		port = p.blocks[block{domain, datacenter}] + slices.Index(doors, struct{ role, port int }{role, port})
	}
	return join(p.host(domain, datacenter, role), port)
}

// appPort and outboundPort are those of the catalogue: the same in every datacenter.
func (p *plan) appPort(td *TrustDomain, service int) int {
	if p.one {
		return p.blocks[block{td.Name, td.Mesh[0]}] + len(doors) + service
	}
	return portApp + service
}

func (p *plan) outboundPort(td *TrustDomain, service int) int {
	if p.one {
		return p.appPort(td, len(td.Services)+service)
	}
	return portOutbound + service
}

// offset is what a host adds to the ports of the catalogue.
func (p *plan) offset(td *TrustDomain, datacenter string) int {
	if p.one {
		return p.blocks[block{td.Name, datacenter}] - p.blocks[block{td.Name, td.Mesh[0]}]
	}
	return 0
}

// guard is the address that the runner itself holds while the slot is its own.
func (p *plan) guard() string {
	if p.one {
		return join(onlyAddress, firstPort+p.slot*slotPorts)
	}
	return join(p.address(p.spec.Datacenters[0].Name, 1), portGuard)
}

func join(host string, port int) string { return net.JoinHostPort(host, strconv.Itoa(port)) }

func (p *plan) add(td *TrustDomain, dc string, k kind, name string) *unit {
	u := &unit{name: short(td.Name) + "-" + name + "-" + dc, kind: k, domain: td.Name, datacenter: dc, link: "entente"}
	u.dir = filepath.Join(p.dir, dc, u.name)
	u.socket = filepath.Join(p.sockets, u.name+".sock")
	p.units = append(p.units, u)
	return u
}

// adminSocket is the admin socket of an agent.
func (u *unit) adminSocket() string { return strings.TrimSuffix(u.socket, ".sock") + "-admin.sock" }

// find returns the unit of a kind. There is one per domain and datacenter, save for services.
func (p *plan) find(k kind, domain, datacenter string) *unit {
	i := slices.IndexFunc(p.units, func(u *unit) bool { return u.kind == k && u.domain == domain && u.datacenter == datacenter })
	if i < 0 {
		return nil
	}
	return p.units[i]
}

// server returns the unit that serves a service in a datacenter.
func (p *plan) server(service, datacenter string) *unit {
	i := slices.IndexFunc(p.units, func(u *unit) bool { return u.datacenter == datacenter && slices.Contains(u.services, service) })
	if i < 0 {
		return nil
	}
	return p.units[i]
}

// in lists the units of a datacenter.
func (p *plan) in(datacenter string) []*unit {
	return slices.DeleteFunc(slices.Clone(p.units), func(u *unit) bool { return u.datacenter != datacenter })
}

type (
	logConfig struct {
		Level string `yaml:"level"`
	}
	listenConfig struct {
		Listen string `yaml:"listen"`
	}
	fileConfig struct {
		File string `yaml:"file"`
	}
	socketConfig struct {
		Socket string `yaml:"socket"`
	}
	addressesConfig struct {
		Addresses []string `yaml:"addresses"`
		TokenFile string   `yaml:"tokenFile"`
	}
	upstreamConfig struct {
		Certificate string `yaml:"certificate"`
		Key         string `yaml:"key"`
	}
	caConfig struct {
		TrustDomain string `yaml:"trustDomain"`
		Name        string `yaml:"name"`
		Datacenter  string `yaml:"datacenter"`
		DataDir     string `yaml:"dataDir"`
		Listen      struct {
			Raft   string `yaml:"raft"`
			API    string `yaml:"api"`
			Bundle string `yaml:"bundle"`
			Admin  string `yaml:"admin"`
		} `yaml:"listen"`
		Socket string `yaml:"socket"`
		Keys   struct {
			InsecureDev bool `yaml:"insecureDev"`
		} `yaml:"keys"`
		Upstream  *upstreamConfig `yaml:"upstream"`
		Lifetimes struct {
			X509SVID          time.Duration `yaml:"x509SVID"`
			BundleRefreshHint time.Duration `yaml:"bundleRefreshHint"`
		} `yaml:"lifetimes"`
		Log logConfig `yaml:"log"`
	}
	agentConfig struct {
		TrustDomain string          `yaml:"trustDomain"`
		Name        string          `yaml:"name"`
		Datacenter  string          `yaml:"datacenter"`
		DataDir     string          `yaml:"dataDir"`
		Settle      string          `yaml:"settle"`
		CA          addressesConfig `yaml:"ca"`
		WorkloadAPI socketConfig    `yaml:"workloadAPI"`
		Sidecar     struct {
			Inbound    string `yaml:"inbound"`
			AppAddress string `yaml:"appAddress"`
			PortOffset int    `yaml:"portOffset"`
		} `yaml:"sidecar"`
		Admin     agentAdmin `yaml:"admin"`
		AccessLog fileConfig `yaml:"accessLog"`
		Log       logConfig  `yaml:"log"`
	}
	agentAdmin struct {
		Listen string `yaml:"listen"`
		Socket string `yaml:"socket"`
	}
	gatewayConfig struct {
		TrustDomain string          `yaml:"trustDomain"`
		Name        string          `yaml:"name"`
		Datacenter  string          `yaml:"datacenter"`
		WorkloadAPI socketConfig    `yaml:"workloadAPI"`
		CA          addressesConfig `yaml:"ca"`
		EastWest    *listenConfig   `yaml:"eastWest"`
		Edge        *edgeConfig     `yaml:"edge"`
		Admin       listenConfig    `yaml:"admin"`
		AccessLog   fileConfig      `yaml:"accessLog"`
		Log         logConfig       `yaml:"log"`
	}
	edgeConfig struct {
		Listen string `yaml:"listen"`
		TLS    struct {
			CertFile string `yaml:"certFile"`
			KeyFile  string `yaml:"keyFile"`
		} `yaml:"tls"`
		Identity string `yaml:"identity"`
		JWT      struct {
			JWKSFile   string   `yaml:"jwksFile"`
			Issuer     string   `yaml:"issuer"`
			Audience   string   `yaml:"audience"`
			Algorithms []string `yaml:"algorithms"`
		} `yaml:"jwt"`
		TierClaim string                `yaml:"tierClaim"`
		Tiers     map[string]tierConfig `yaml:"tiers"`
		Routes    []routeConfig         `yaml:"routes"`
	}
	tierConfig struct {
		Rate  yamlfile.Rate `yaml:"rate"`
		Burst int           `yaml:"burst"`
	}
	routeConfig struct {
		PathPrefix  string `yaml:"pathPrefix"`
		Service     string `yaml:"service"`
		StripPrefix bool   `yaml:"stripPrefix"`
	}
)

var quiet = logConfig{Level: "info"}

func (p *plan) addCA(td *TrustDomain, dc string) {
	u := p.add(td, dc, kindCA, "ca")
	var c caConfig
	c.TrustDomain, c.Name, c.Datacenter, c.DataDir = td.Name, "ca-"+dc, dc, filepath.Join(u.dir, "data")
	c.Listen.Raft, c.Listen.API = p.at(td.Name, dc, hostCA, portCARaft), p.at(td.Name, dc, hostCA, portCAAPI)
	c.Listen.Bundle, c.Listen.Admin = p.at(td.Name, dc, hostCA, portCABundle), p.at(td.Name, dc, hostCA, portAdmin)
	c.Socket = u.socket
	c.Keys.InsecureDev = true // only such clusters may name loopback addresses to each other
	c.Upstream = p.upstream(td)
	c.Lifetimes.X509SVID, c.Lifetimes.BundleRefreshHint = td.Lifetimes.X509SVID, td.Lifetimes.BundleRefreshHint
	c.Log = quiet
	u.config, u.admin, u.door = c, c.Listen.Admin, c.Listen.API
	u.listens = []string{c.Listen.Raft, c.Listen.API, c.Listen.Bundle, c.Listen.Admin}
	u.args = []string{"ca", "run", debuggable}
}

// caAddresses are the APIs of a domain's CA nodes, those of the datacenter first.
func (p *plan) caAddresses(td *TrustDomain, dc string) []string {
	nodes := slices.Clone(td.CA)
	slices.SortStableFunc(nodes, func(a, b string) int {
		switch {
		case a == b:
			return 0
		case a == dc:
			return -1
		case b == dc:
			return 1
		}
		return 0
	})
	var list []string
	for _, at := range nodes {
		list = append(list, p.at(td.Name, at, hostCA, portCAAPI))
	}
	return list
}

// meshHost is the name of the one agent of a domain in a datacenter.
func meshHost(dc string) string { return "host-" + dc }

func (p *plan) addAgent(td *TrustDomain, dc string) {
	u := p.add(td, dc, kindAgent, "agent")
	var c agentConfig
	c.Settle = "200ms" // a rehearsal's workloads take what they are given at once
	c.TrustDomain, c.Name, c.Datacenter, c.DataDir = td.Name, meshHost(dc), dc, filepath.Join(u.dir, "data")
	c.CA = addressesConfig{p.caAddresses(td, dc), filepath.Join(u.dir, "token")}
	c.WorkloadAPI.Socket = u.socket
	c.Sidecar.Inbound, c.Sidecar.AppAddress = p.at(td.Name, dc, hostMesh, portInbound), p.host(td.Name, dc, hostMesh)
	c.Sidecar.PortOffset = p.offset(td, dc)
	c.Admin = agentAdmin{p.at(td.Name, dc, hostMesh, portAdmin), u.adminSocket()}
	c.AccessLog.File = filepath.Join(u.dir, "access.jsonl")
	c.Log = quiet
	u.config, u.admin, u.door, u.access = c, c.Admin.Listen, c.Sidecar.Inbound, c.AccessLog.File
	u.listens = []string{c.Sidecar.Inbound, c.Admin.Listen}
	u.args = []string{"agent", "run", debuggable}
}

func gatewayName(dc string) string { return "gw-" + dc }

func (p *plan) gatewayAddress(domain, dc string) string {
	return p.at(domain, dc, hostGateway, portGateway)
}

func (p *plan) addGateway(td *TrustDomain, dc string) {
	u := p.add(td, dc, kindGateway, "gateway")
	u.link = short(td.Name) + "-gateway"
	c := p.gatewayConfig(td, dc, u, gatewayName(dc), hostGateway)
	c.EastWest = &listenConfig{p.gatewayAddress(td.Name, dc)}
	u.config, u.door = c, c.EastWest.Listen
	u.listens = append(u.listens, u.door)
}

func (p *plan) gatewayConfig(td *TrustDomain, dc string, u *unit, name string, role int) gatewayConfig {
	c := gatewayConfig{TrustDomain: td.Name, Name: name, Datacenter: dc, Log: quiet}
	c.WorkloadAPI.Socket = p.find(kindAgent, td.Name, dc).socket
	c.CA.Addresses = p.caAddresses(td, dc)
	c.Admin.Listen = p.at(td.Name, dc, role, portAdmin)
	c.AccessLog.File = filepath.Join(u.dir, "access.jsonl")
	u.admin, u.access = c.Admin.Listen, c.AccessLog.File
	u.listens = []string{u.admin}
	u.args = []string{"gateway", "run", debuggable}
	return c
}

func (p *plan) addEdge(td *TrustDomain, dc string) {
	u := p.add(td, dc, kindEdge, "edge")
	u.link = short(td.Name) + "-edge"
	c := p.gatewayConfig(td, dc, u, "edge-"+dc, hostEdge)
	e := &edgeConfig{Listen: p.at(td.Name, dc, hostEdge, portEdge), Identity: "/" + td.Edge.Identity, TierClaim: "tier"}
	e.TLS.CertFile, e.TLS.KeyFile = p.file("edge.crt"), p.file("edge.key")
	e.JWT.JWKSFile, e.JWT.Issuer, e.JWT.Audience, e.JWT.Algorithms = p.file("jwks.json"), td.Edge.Issuer, td.Edge.Audience, []string{"ES256"}
	e.Tiers = map[string]tierConfig{}
	for name, tier := range td.Edge.Tiers {
		e.Tiers[name] = tierConfig{tier.Rate, tier.Burst}
	}
	for _, r := range td.Edge.Routes {
		e.Routes = append(e.Routes, routeConfig{r.PathPrefix, r.Service + "." + td.Name, r.StripPrefix})
	}
	c.Edge = e
	u.config, u.door = c, e.Listen
	u.listens = append(u.listens, e.Listen)
}

// file is one that the runner makes for all.
func (p *plan) file(name string) string { return filepath.Join(p.dir, name) }

// shared is the link of the process that serves what is not alone.
const shared = "services"

func (p *plan) link(td *TrustDomain, s Service) string {
	if s.Alone {
		return short(td.Name) + "-" + s.Name
	}
	return short(td.Name) + "-" + shared
}

func (p *plan) addServices(td *TrustDomain, dc string) {
	host := p.host(td.Name, dc, hostMesh)
	configs := map[*unit]*platform.Config{}
	var rest *unit
	for i, s := range td.Services {
		u := rest
		if s.Alone || rest == nil {
			name := s.Name
			if !s.Alone {
				name = shared
			}
			u = p.add(td, dc, kindService, name)
			u.link = p.link(td, s)
			u.args = []string{"demo-service"}
			configs[u] = &platform.Config{Datacenter: dc, Control: u.socket, WorkloadAPI: p.find(kindAgent, td.Name, dc).socket}
			if !s.Alone {
				rest = u
			}
		}
		full := s.Name + "." + td.Name
		program := platform.Service{Name: full, Program: s.Program, Listen: join(host, p.appPort(td, i)+p.offset(td, dc)), Answers: s.Answers}
		u.listens = append(u.listens, program.Listen)
		if len(s.Calls) > 0 {
			program.Outbound = join(host, p.outboundPort(td, i)+p.offset(td, dc))
			agent := p.find(kindAgent, td.Name, dc)
			agent.listens = append(agent.listens, program.Outbound)
		}
		u.services = append(u.services, full)
		configs[u].Services = append(configs[u].Services, program)
	}
	for u, c := range configs {
		u.config = *c
	}
}

// objects is a domain's catalogue: what `entente apply -f` gets. bundles are the
// SPIFFE bundles of the other domains, as JSON.
func (p *plan) objects(td *TrustDomain, now time.Time, bundles map[string][]byte) []*statev1.Object {
	var hosts []string
	for _, dc := range td.Mesh {
		hosts = append(hosts, meshHost(dc))
	}
	run := func(link string) []string {
		return []string{"unix:uid:" + strconv.Itoa(os.Getuid()), "unix:path:" + filepath.Join(p.dir, "bin", link)}
	}
	var objects []*statev1.Object
	for i, s := range td.Services {
		service := &statev1.Service{
			Name: s.Name, Path: "/" + s.Name, Hosts: hosts, Selectors: run(p.link(td, s)),
			Port: uint32(p.appPort(td, i)), HealthPath: "/healthz", ExportTo: s.Export, Calls: s.Calls,
		}
		if len(s.Calls) > 0 {
			service.OutboundPort = uint32(p.outboundPort(td, i))
		}
		if f := s.Failover; f != nil {
			service.Failover = &statev1.Failover{Mode: mode(f.Mode), Order: f.Order, Failback: mode(f.Failback), HoldSeconds: uint32(f.Hold / time.Second)}
		}
		objects = append(objects, &statev1.Object{Kind: &statev1.Object_Service{Service: service}, Owner: "team-" + s.Name})
	}
	if e := td.Edge; e != nil {
		service := &statev1.Service{Name: e.Identity, Path: "/" + e.Identity, Hosts: hosts, Selectors: run(short(td.Name) + "-edge"), Edge: true}
		for _, r := range e.Routes {
			if target := r.Service + "." + td.Name; !slices.Contains(service.Calls, target) {
				service.Calls = append(service.Calls, target)
			}
		}
		objects = append(objects, &statev1.Object{Kind: &statev1.Object_Service{Service: service}, Owner: "team-edge"})
	}
	for _, dc := range td.Mesh {
		objects = append(objects, &statev1.Object{Kind: &statev1.Object_Gateway{Gateway: &statev1.Gateway{
			Name: gatewayName(dc), Datacenter: dc, Address: p.gatewayAddress(td.Name, dc),
			Hosts: []string{meshHost(dc)}, Selectors: run(short(td.Name) + "-gateway"),
		}}, Owner: "platform"})
	}
	return append(objects, p.foreign(td, now, bundles)...)
}

// foreign is the part of the catalogue that is about other domains.
func (p *plan) foreign(td *TrustDomain, now time.Time, bundles map[string][]byte) []*statev1.Object {
	var objects []*statev1.Object
	for _, other := range p.spec.TrustDomains {
		if other.Name == td.Name || !p.related(td.Name, other.Name) {
			continue
		}
		r := &statev1.Relationship{TrustDomain: other.Name, EndpointId: "spiffe://" + other.Name + "/entente/bundle-endpoint", BootstrapBundle: bundles[other.Name]}
		for _, dc := range other.CA {
			r.EndpointUrls = append(r.EndpointUrls, "https://"+p.at(other.Name, dc, hostCA, portCABundle)+"/")
		}
		objects = append(objects, &statev1.Object{Kind: &statev1.Object_Relationship{Relationship: r}, Owner: "security"})
		for _, s := range other.Services {
			if slices.Contains(s.Export, td.Name) {
				objects = append(objects, &statev1.Object{Kind: &statev1.Object_Import{Import: &statev1.Import{Service: s.Name + "." + other.Name}}, Owner: "platform"})
			}
		}
	}
	for _, a := range p.spec.Agreements {
		serves := a.Between.Server == td.Name
		if !serves && a.Between.Caller != td.Name {
			continue
		}
		peer := p.spec.domain(a.Between.Server)
		if serves {
			peer = p.spec.domain(a.Between.Caller)
		}
		agreement := &statev1.Agreement{Name: a.Name, Peer: peer.Name, Expires: now.Add(a.ValidFor).Truncate(24 * time.Hour).Unix()}
		for _, dc := range peer.Mesh {
			agreement.Gateways = append(agreement.Gateways, &statev1.PeerGateway{
				Path: "/entente/gateway/" + gatewayName(dc), Datacenter: dc, Address: p.gatewayAddress(peer.Name, dc),
			})
		}
		for _, allow := range a.Allow {
			out := &statev1.Allow{Callers: allow.Callers, Service: allow.Service}
			if !serves {
				out.Service += "." + peer.Name
			}
			if len(allow.Methods) > 0 || allow.PathPrefix != "" {
				match := &statev1.HTTPMatch{Methods: allow.Methods, Path: allow.PathPrefix}
				if allow.PathPrefix != "" {
					match.PathType = statev1.PathType_PATH_TYPE_PREFIX
				}
				out.Http = []*statev1.HTTPMatch{match}
			}
			agreement.Allow = append(agreement.Allow, out)
		}
		objects = append(objects, &statev1.Object{Kind: &statev1.Object_Agreement{Agreement: agreement}, Owner: "security"})
	}
	return objects
}

// related: an agreement is between the two.
func (p *plan) related(a, b string) bool {
	return slices.ContainsFunc(p.spec.Agreements, func(g Agreement) bool {
		return g.Between.Server == a && g.Between.Caller == b || g.Between.Server == b && g.Between.Caller == a
	})
}

func mode(text string) statev1.Mode {
	if text == "manual" {
		return statev1.Mode_MODE_MANUAL
	}
	return statev1.Mode_MODE_AUTO
}

// catalogue writes a domain's objects as the file for `entente apply -f`.
func (p *plan) catalogue(td *TrustDomain, now time.Time, bundles map[string][]byte) ([]byte, error) {
	text, err := manifest.Format(p.objects(td, now, bundles)...)
	if err != nil {
		return nil, fmt.Errorf("write the catalogue of %s: %w", td.Name, err)
	}
	return text, nil
}

// free finds the first slot in which every address of the scenario can be listened
// at, and holds it until the returned listener is closed. Where the system does not
// give every host an address of its own, or one says so, all share 127.0.0.1. note
// says why the place is not the usual one, unless another run has that.
func free(plan func(place) *plan, one bool) (p *plan, guard net.Listener, note string, err error) {
	p, guard, note, err = freeSlot(plan, one)
	if err != nil && !one && !errors.Is(err, syscall.EADDRINUSE) {
		note = err.Error()
		p, guard, _, err = freeSlot(plan, true)
	}
	if err != nil {
		return nil, nil, "", fmt.Errorf("no room for the scenario on the loopback network: %w", err)
	}
	return p, guard, note, nil
}

func freeSlot(plan func(place) *plan, one bool) (p *plan, guard net.Listener, note string, err error) {
	slots := maxSlots
	if one {
		slots = oneSlots
	}
	var taken error
	for slot := range slots {
		p = plan(place{slot, one})
		if _, ports := p.portBlocks(p.spec); one && ports > slotPorts {
			return nil, nil, "", fmt.Errorf("the scenario needs %d ports of %s, and may have %d: leave out some services", ports, onlyAddress, slotPorts)
		}
		guard, err = daemon.Listen(p.guard())
		if err == nil {
			if err = p.tryAll(); err == nil {
				return p, guard, note, nil
			}
			guard.Close()
			if note == "" {
				note = err.Error()
			}
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			return nil, nil, "", err
		}
		if taken == nil {
			taken = err
		}
	}
	return nil, nil, "", taken
}

// tryAll listens at every address of the plan for a moment.
func (p *plan) tryAll() error {
	for _, u := range p.units {
		for _, address := range u.listens {
			listener, err := daemon.Listen(address)
			if err != nil {
				return fmt.Errorf("%s: %w", u.name, err)
			}
			listener.Close()
		}
	}
	return nil
}
