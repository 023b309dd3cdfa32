package catalog

import (
	"cmp"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
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
	for _, c.object = range c.unique(objects) {
		if compile := c.object.kind.compile; compile != nil {
			compile(&c)
		}
	}
	for _, c.object = range c.sorted {
		if references := c.object.kind.references; references != nil {
			references(&c)
		}
	}
	c.finish()
	if len(c.failed) > 0 {
		sortFindings(c.failed)
		return nil, &Error{c.failed}
	}
	return c.tables, nil
}

type compiler struct {
	tables      *Tables
	datacenters []string
	objects     map[string]*statev1.Object // by key
	sorted      []declared                 // by key
	object      declared                   // the one that is looked at
	listeners   map[listener]*Service      // who calls others from where

	failed []Finding
}

type listener struct {
	host string
	port uint16
}

// unique returns the objects in the order of their keys, each key once.
func (c *compiler) unique(objects []*statev1.Object) []declared {
	for _, object := range objects {
		c.object = declare(object)
		if c.object.kind == nil {
			c.fail("upgrade this process, or declare one of "+strings.Join(Kinds(), ", "), "the object is of no known kind")
			continue
		}
		if first := c.objects[c.object.key]; first != nil {
			where := ""
			if first.GetSource() != "" {
				where = " at " + first.GetSource()
			}
			c.fail("give one of them another name", "it is declared twice, first%s", where)
			continue
		}
		c.objects[c.object.key] = object
		c.sorted = append(c.sorted, c.object)
	}
	slices.SortFunc(c.sorted, byKey)
	return c.sorted
}

func byKey(a, b declared) int { return strings.Compare(a.key, b.key) }

// finish sorts what was collected, and looks at what nobody spoke of.
func (c *compiler) finish() {
	t := c.tables
	for _, p := range t.peers {
		slices.SortFunc(p.gateways, func(a, b PeerGateway) int {
			return cmp.Or(strings.Compare(a.ID.String(), b.ID.String()), strings.Compare(a.Address, b.Address))
		})
	}
	c.unlistedImports()
	if len(t.gateways) == 0 && len(t.peers) > 0 {
		for _, c.object = range c.sorted {
			if c.object.GetImport() != nil || len(c.object.GetService().GetExportTo()) > 0 {
				c.warn("declare a Gateway", "this domain has no gateway: nothing passes between domains")
				break
			}
		}
	}
	sortFindings(t.findings)
}

func (c *compiler) peer(domain string) *peer {
	p := c.tables.peers[domain]
	if p == nil {
		p = &peer{ids: map[spiffeid.ID]struct{}{}}
		c.tables.peers[domain] = p
	}
	return p
}
