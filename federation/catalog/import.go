package catalog

import (
	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

var importKind = kind{
	name: "Import",
	id: func(o *statev1.Object) (string, bool) {
		i := o.GetImport()
		return i.GetService(), i != nil
	},
	compile:    (*compiler).imported,
	references: (*compiler).importReferences,
	level: func(o *statev1.Object) uint32 {
		if i := o.GetImport(); i.GetPort() != 0 || i.GetProtocol() != 0 {
			return 4
		}
		return 1
	},
	forHosts: whole,
	ends:     (*Tables).importEnds,
}

func (c *compiler) imported() {
	i := c.object.GetImport()
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

func (c *compiler) importReferences() {
	_, domain, ok := splitServiceName(c.object.GetImport().GetService())
	if ok && domain != c.tables.td.Name() && !c.tables.related(domain) {
		c.warn(c.suggestPeer(domain), "there is no Relationship with %s: every call is refused", domain)
	}
}

// unlistedImports warns of imports that no agreement lists. It is for when all agreements
// are known.
func (c *compiler) unlistedImports() {
	for _, c.object = range c.sorted {
		name := c.object.GetImport().GetService()
		if name == "" {
			continue
		}
		if _, known := c.tables.targets[name]; known && len(c.tables.calling[name]) == 0 {
			c.warn("list it in an Agreement with its domain", "no agreement lists it: every call is refused")
		}
	}
}

func (t *Tables) importEnds(o *statev1.Object) []string {
	return []string{"no caller of " + t.td.Name() + " reaches " + o.GetImport().GetService() + " any more"}
}
