package domain

import (
	"bytes"
	"strings"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

// mayName refuses a service whose DNS name another owner's entry has: who calls that name
// means the workload of that entry. An entry has the name that it is called by (entry/NAME),
// the one that a service of its SPIFFE path would have (/NAME), and its DNS names. Another
// owner's service has its name alone anyway. Only a name that is new is looked for, since
// that looks at every entry.
func (a *Administrator) mayName(upserts []*statev1.Object) *Refusal {
	if a.Owns.All || !a.state.hardened() {
		return nil
	}
	names := map[string]bool{}
	for _, next := range upserts {
		have, _ := a.state.Object(ObjectKey(next))
		if next.GetService().GetPort() != 0 && have.GetService().GetPort() == 0 { // without a port nobody calls it
			names[next.GetService().GetName()] = true
		}
	}
	if len(names) == 0 {
		return nil
	}
	suffix := "." + a.state.td.Name()
	for raw := range a.state.entries.rawFrom(ca.DeclaredPrefix) {
		v, _ := viewEntry(raw, false)
		if !Declared(string(v.id)) {
			break // they stand together
		}
		if a.Owns.Cover(string(v.path)) {
			continue
		}
		has := []string{strings.TrimPrefix(string(v.id), ca.DeclaredPrefix), strings.TrimPrefix(string(v.path), "/")}
		if bytes.Contains(raw, []byte(suffix)) {
			for _, name := range decodeStored(raw).GetDnsNames() {
				has = append(has, strings.TrimSuffix(name, suffix))
			}
		}
		for _, name := range has {
			if names[name] {
				return a.refuse("Service/%s would have the DNS name %s%s, which is that of entry %s (%s) of another owner: choose another name, or have a trust-admin apply it", name, name, suffix, v.id, v.path)
			}
		}
	}
	return nil
}

// mayNameEntry refuses a new entry that is called as another owner's service is.
func (a *Administrator) mayNameEntry(id string, have *statev1.Entry) *Refusal {
	if have != nil || a.Owns.All || !a.state.hardened() {
		return nil
	}
	name := strings.TrimPrefix(id, ca.DeclaredPrefix)
	if o, _ := a.state.Object("Service/" + name); o != nil && !a.Owns.Cover(o.GetService().GetPath()) {
		return a.refuse("entry %s would have the DNS name %s.%s, which is that of Service/%s of another owner: choose another id, or have a trust-admin create it", id, name, a.state.td.Name(), name)
	}
	return nil
}
