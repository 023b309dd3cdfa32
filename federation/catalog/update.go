package catalog

import (
	"maps"
	"slices"
	"strings"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// Update makes the tables of a catalogue that differs from this one's in the changed
// objects, by key; nil is one that is gone. It returns what [Compile] returns for all of
// them, and asks for them only if it must. While only services change, and nothing else
// says other things because of it, the others are not compiled again: the cost is that of
// copying maps.
func (t *Tables) Update(changed map[string]*statev1.Object, all func() []*statev1.Object) (*Tables, error) {
	if next := t.updateServices(changed); next != nil {
		return next, nil
	}
	return Compile(t.td, all(), AllowLoopback(t.allowLoopback), Datacenters(t.datacenters...))
}

const serviceKey = "Service/"

// updateServices returns nil where only a whole compilation can tell: something fails, or
// a finding or a rule of another object may depend on what changes.
func (t *Tables) updateServices(changed map[string]*statev1.Object) *Tables {
	if len(t.gateways) == 0 && len(t.peers) > 0 {
		return nil // a warning names the first service that is exported
	}
	for _, f := range t.findings {
		if strings.HasPrefix(f.Object, "Agreement/") {
			return nil // it may be about the services that there are
		}
	}
	next := *t
	next.services, next.callers, next.targets = maps.Clone(t.services), maps.Clone(t.callers), maps.Clone(t.targets)
	next.findings = nil
	for _, f := range t.findings {
		if _, is := changed[f.Object]; !is {
			next.findings = append(next.findings, f)
		}
	}
	c := compiler{tables: &next, datacenters: t.datacenters, listeners: map[listener]*Service{}}
	for key, object := range changed {
		label, is := strings.CutPrefix(key, serviceKey)
		if !is || object != nil && Key(object) != key {
			return nil
		}
		before := t.services[label]
		switch {
		case object != nil:
			c.sorted = append(c.sorted, declare(object))
			if before != nil && (before.ID.Path() != object.GetService().GetPath() || before.TCP != (object.GetService().GetProtocol() == statev1.Protocol_PROTOCOL_TCP) || narrows(before.ExportTo, object.GetService().GetExportTo())) {
				return nil
			}
		case before == nil || t.refersTo(before):
			return nil
		}
		if before != nil {
			delete(next.services, label)
			delete(next.callers, before.ID.Path())
			delete(next.targets, before.Name)
		}
	}
	slices.SortFunc(c.sorted, byKey)
	for _, c.object = range c.sorted {
		c.service()
	}
	for _, c.object = range c.sorted {
		c.serviceReferences()
	}
	if len(c.failed) > 0 || c.takesListener(changed) {
		return nil
	}
	sortFindings(next.findings)
	return &next
}

// narrows tells whether one list lacks something of the list before.
func narrows(before, after []string) bool {
	return slices.ContainsFunc(before, func(s string) bool { return !slices.Contains(after, s) })
}

// refersTo tells whether another service calls this one, or an agreement means it.
func (t *Tables) refersTo(s *Service) bool {
	for _, other := range t.services {
		if _, calls := other.calls[s.Name]; calls && other != s {
			return true
		}
	}
	for domain := range t.peers {
		if _, serves := t.serving[export{domain, s.Label}]; serves {
			return true
		}
	}
	for _, rules := range t.calling {
		for _, r := range rules {
			for _, pattern := range r.callers {
				if pattern.Match(s.ID.Path()) {
					return true
				}
			}
		}
	}
	return false
}

// takesListener tells whether a service that did not change listens where one does that
// did.
func (c *compiler) takesListener(changed map[string]*statev1.Object) bool {
	if len(c.listeners) == 0 {
		return false
	}
	for _, other := range c.tables.services {
		if _, is := changed[other.objectKey]; is || other.OutboundPort == 0 {
			continue
		}
		for _, host := range other.Hosts {
			if c.listeners[listener{host, other.OutboundPort}] != nil {
				return true
			}
		}
	}
	return false
}
