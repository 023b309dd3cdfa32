package catalog

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// OwnGateway is one east-west gateway.
type OwnGateway struct {
	Name       string
	ID         spiffeid.ID
	Datacenter string
	Address    string // host:port
	Hosts      []string
	Source     string
	Revision   uint64
}

var gatewayKind = kind{
	name: "Gateway",
	id: func(o *statev1.Object) (string, bool) {
		g := o.GetGateway()
		return g.GetName(), g != nil
	},
	compile:  (*compiler).gateway,
	level:    func(o *statev1.Object) uint32 { return runLevel(o.GetGateway().GetSelectors()) },
	forHosts: whole,
	ends:     (*Tables).gatewayEnds,
}

func (c *compiler) gateway() {
	g := c.object.GetGateway()
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

func (t *Tables) gatewayEnds(o *statev1.Object) []string {
	name, datacenter := o.GetGateway().GetName(), o.GetGateway().GetDatacenter()
	left := 0
	for _, g := range t.gateways {
		if g.Datacenter == datacenter && g.Name != name {
			left++
		}
	}
	still := "no other gateway is left there: traffic with other domains and datacenters stops"
	if left > 0 {
		still = fmt.Sprintf("%d left there", left)
	}
	return []string{
		"spiffe://" + t.td.Name() + gatewayPath + name + " gets no SVID any more; peers refuse the one it holds",
		"nothing passes by it in " + datacenter + "; " + still,
	}
}
