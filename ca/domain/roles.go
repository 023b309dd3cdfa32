package domain

import (
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/roles"
	"github.com/entente-mesh/entente/ca/selector"
	"github.com/entente-mesh/entente/federation"
)

// Administrator is what somebody may do by the role bindings of one state. It is the one
// place where that is decided: doors ask it before they act or show, Apply asks it again
// about the command, whose turn may come when roles are others. The zero value may do
// nothing. It is for use under the lock of the state's owner.
type Administrator struct {
	roles.Roles // an operator has none, and governs
	state       *State

	added  int // entries by this command, so far
	agreed int // agreements of its own, with those of this command so far; 0: not counted yet

	protected map[string]struct{}         // SPIFFE paths that roles are bound to
	others    map[string][]*statev1.Entry // by host: entries that are not this owner's; found when needed
}

// Operator may do everything: who can open the administrative socket of a CA node.
func (s *State) Operator() *Administrator {
	return &Administrator{state: s, Roles: roles.Roles{Governs: true}}
}

// Administrator is the holder of an SVID of this domain with that path.
func (s *State) Administrator(path string) *Administrator {
	a := &Administrator{state: s, protected: map[string]struct{}{}, others: map[string][]*statev1.Entry{}}
	a.Roles = roles.Of(path, func(yield func(*statev1.RoleBinding) bool) {
		for _, o := range s.objects.rows {
			b := o.GetRoleBinding()
			for _, subject := range b.GetSubjects() {
				a.protected[subject] = struct{}{}
			}
			if b != nil && !yield(b) {
				return
			}
		}
	})
	return a
}

// May says why the administrator does not have a right; nil if he has it.
func (a *Administrator) May(right roles.Right) *Refusal {
	if why := a.Lacks(right); why != "" {
		return a.refuse("%s", why)
	}
	return nil
}

func (a *Administrator) refuse(format string, args ...any) *Refusal {
	return refuse(CodeForbidden, a.Path+" may not do that: "+format, args...)
}

// SeesObject tells whether an object may be shown: a service by its path, an agreement where
// all its own paths may be, a role to whom it names, the rest with a role for the whole domain.
func (a *Administrator) SeesObject(o *statev1.Object) bool {
	switch {
	case a.Governs || a.Views.All:
		return true
	case o.GetService() != nil:
		return a.Sees(o.GetService().GetPath())
	case o.GetAgreement() != nil:
		for _, allow := range o.GetAgreement().GetAllow() {
			for _, path := range a.pathsOf(allow, nil) {
				if !a.Sees(path) {
					return false
				}
			}
		}
		return len(o.GetAgreement().GetAllow()) > 0
	case o.GetRoleBinding() != nil:
		return a.Path != "" && slices.Contains(o.GetRoleBinding().GetSubjects(), a.Path)
	}
	return false
}

// MayCarryOut says why the administrator may not have a command carried out; nil if he
// may.
func (a *Administrator) MayCarryOut(cmd *statev1.Command) *Refusal {
	if refusal := a.May(roles.See); refusal != nil {
		return refusal
	}
	if d, _ := describe(cmd); d.may != nil {
		return d.may(a, cmd)
	}
	return a.May(roles.Govern)
}

func (a *Administrator) mayChangeEntries(cmd *statev1.Command) *Refusal {
	for _, change := range cmd.GetChangeEntries().GetChanges() {
		if refusal := a.MayChangeEntry(change); refusal != nil {
			return refusal
		}
	}
	return nil
}

// mayStage: what is staged means nothing until all of it is applied, and asked about; but
// it takes room.
func (a *Administrator) mayStage(*statev1.Command) *Refusal {
	if a.state.hardened() && !a.Governs && !a.Owns.Some() && !a.Exports.Some() {
		return a.refuse("its roles change nothing")
	}
	return nil
}

func (a *Administrator) mayApplyStaged(cmd *statev1.Command) *Refusal {
	whole, _ := a.state.staging(cmd.GetApplyStaged(), a.Path)
	return a.mayApply(whole)
}

// MayChangeEntry says why the administrator may not change an entry that is declared by
// itself: a service owner, what lies and stays at or below his prefixes.
func (a *Administrator) MayChangeEntry(change *statev1.EntryChange) *Refusal {
	var id string
	var next *statev1.Entry
	switch action := change.GetAction().(type) {
	case *statev1.EntryChange_Create:
		id, next = action.Create.GetId(), action.Create
	case *statev1.EntryChange_Update:
		id, next = action.Update.GetId(), action.Update
	case *statev1.EntryChange_Delete:
		id = action.Delete
	}
	if refusal := a.May(roles.See); refusal != nil || a.Governs {
		return refusal
	}
	have, _ := a.state.Entry(id)
	what := "entry " + id
	if refusal := a.mayOwn(what, have.GetPath(), next.GetPath()); refusal != nil {
		return refusal
	}
	if next == nil {
		return nil
	}
	if !a.Owns.All && !slices.Equal(sorted(have.GetDnsNames()), sorted(next.GetDnsNames())) {
		return a.refuse("the DNS names of %s are the whole domain's: that takes a service-owner without prefixes", what)
	}
	if refusal := a.mayNameEntry(id, have); refusal != nil {
		return refusal
	}
	if refusal := a.mayAddTo(what, have.GetPath(), next.GetPath(), have.GetHosts(), next.GetHosts()); refusal != nil {
		return refusal
	}
	if !slices.Equal(sorted(have.GetFederatesWith()), sorted(next.GetFederatesWith())) && !a.Exports.Cover(next.GetPath()) {
		return a.refuse("whom %s federates with takes the role api-owner for %s", what, next.GetPath())
	}
	if slices.Equal(sorted(have.GetHosts()), sorted(next.GetHosts())) && slices.Equal(sorted(have.GetSelectors()), sorted(next.GetSelectors())) {
		return nil
	}
	return a.mayTake(what, id, next.GetHosts(), next.GetSelectors())
}

// mayOwn asks for the role service-owner where something was and where it would be; an
// empty path is nowhere.
func (a *Administrator) mayOwn(what, have, next string) *Refusal {
	if have == "" && next == "" {
		return nil // nothing is there, and nothing will be: the state says so
	}
	for _, path := range []string{have, next} {
		if path == "" {
			continue
		}
		if !a.Owns.Cover(path) {
			return a.refuse("%s is or would be %.200s, for which it is no service-owner", what, path)
		}
		if _, bound := a.protected[path]; bound {
			return a.refuse("roles are bound to %s, so only a trust-admin decides which process holds it", path)
		}
	}
	return nil
}

// mayTake refuses an identity for a process that may be somebody else's already: another
// owner's entry on the same host whose selectors do not exclude it. It would let its
// maker act for that process's owner, or the process act under a name it does not know.
func (a *Administrator) mayTake(what, id string, hosts, selectors []string) *Refusal {
	if a.Owns.All {
		return nil
	}
	for _, host := range hosts {
		others, known := a.others[host]
		if !known {
			for _, e := range a.state.EntriesOnHost(host) {
				if !a.Owns.Cover(e.GetPath()) {
					others = append(others, e)
				}
			}
			a.others[host] = others
		}
		for _, other := range others {
			if other.GetId() != id && !a.exclusive(selectors, other.GetSelectors()) {
				return a.refuse("%s could be held on host %s by a process that entry %s of another owner is for: give it a %s whose value differs from that entry's, or another host", what, host, other.GetId(), selector.Separators())
			}
		}
	}
	return nil
}

// exclusive tells whether no process can match both sets of selectors: they want two
// values of something of which a process has one, which nobody but root can give to
// another one. Names of users do not tell processes apart: one user may have several, as a
// directory gives them (web, web@corp.example), and each host looks them up for itself. Nor
// do paths: two may name one file (a symbolic link, a bind mount), a process can execute
// another file, and of one user's processes each can become the other. Nor do digests,
// command lines and groups.
func (a *Administrator) exclusive(one, other []string) bool {
	separates := selector.TellsApart
	if !a.state.hardened() {
		separates = func(kind string) bool { return kind != selector.Group && kind != selector.Run }
	}
	for _, x := range one {
		s, err := selector.Parse(x)
		if err != nil || !separates(s.Kind) {
			continue
		}
		for _, y := range other {
			if t, err := selector.Parse(y); err == nil && s.Kind == t.Kind && s.Value != t.Value {
				return true
			}
		}
	}
	return false
}

// mayApply asks about each object as it is and as it would be.
func (a *Administrator) mayApply(c *statev1.ApplyObjects) *Refusal {
	if a.Governs {
		return nil
	}
	services := map[string]string{} // path by label, of this proposal
	for _, o := range c.GetUpserts() {
		if s := o.GetService(); s != nil {
			services[s.GetName()] = s.GetPath()
		}
	}
	for _, next := range c.GetUpserts() {
		have, _ := a.state.Object(ObjectKey(next))
		if refusal := a.mayChangeObject(have, next, services); refusal != nil {
			return refusal
		}
	}
	for _, key := range c.GetDeletes() {
		have, _ := a.state.Object(key.GetKind() + "/" + key.GetName())
		if refusal := a.mayChangeObject(have, nil, services); refusal != nil {
			return refusal
		}
	}
	return a.mayName(c.GetUpserts())
}

// mayChangeObject: have is nil for a new one, next for one that goes.
func (a *Administrator) mayChangeObject(have, next *statev1.Object, services map[string]string) *Refusal {
	either := next
	if either == nil {
		either = have
	}
	key := ObjectKey(either)
	switch {
	case either == nil:
		return nil // there is nothing to delete: the state says so
	case either.GetService() != nil:
		return a.mayChangeService(key, have, next)
	case either.GetAgreement() != nil:
		return a.mayChangeAgreement(key, have.GetAgreement(), next.GetAgreement(), services)
	case either.GetImport() != nil:
		if !a.Exports.All {
			return a.refuse("%s is the whole domain's: that takes an api-owner without prefixes", key)
		}
		return nil
	}
	return a.refuse("%s takes the role trust-admin", key)
}

// mayChangeService tells apart what a service is, which its service owner says, and to
// whom it is shown, which its API owner says. Who deletes it withdraws it from everybody.
func (a *Administrator) mayChangeService(key string, have, next *statev1.Object) *Refusal {
	before, after := have.GetService(), next.GetService()
	if next != nil && !slices.Equal(sorted(before.GetExportTo()), sorted(after.GetExportTo())) {
		for _, path := range []string{before.GetPath(), after.GetPath()} {
			if path != "" && !a.Exports.Cover(path) {
				return a.refuse("to whom %s is exported takes the role api-owner for %s", key, path)
			}
		}
	}
	if have != nil && next != nil && proto.Equal(unexported(have), unexported(next)) {
		return nil
	}
	if refusal := a.mayOwn(key, before.GetPath(), after.GetPath()); refusal != nil || after == nil {
		return refusal
	}
	if refusal := a.mayAddTo(key, before.GetPath(), after.GetPath(), before.GetHosts(), after.GetHosts()); refusal != nil {
		return refusal
	}
	if slices.Equal(sorted(before.GetHosts()), sorted(after.GetHosts())) && slices.Equal(sorted(before.GetSelectors()), sorted(after.GetSelectors())) {
		return nil
	}
	return a.mayTake(key, ca.ServiceEntry(after.GetName()), after.GetHosts(), after.GetSelectors())
}

func unexported(o *statev1.Object) *statev1.Object {
	o = proto.CloneOf(o)
	o.Revision, o.Source, o.GetService().ExportTo = 0, "", nil
	return o
}

// mayChangeAgreement asks for the role api-owner for everything that the agreement was
// and would be about. Whom the domain exchanges traffic with is not one owner's business:
// a gateway of the peer must be one that another agreement names.
func (a *Administrator) mayChangeAgreement(key string, have, next *statev1.Agreement, services map[string]string) *Refusal {
	if a.Exports.All {
		return nil
	}
	if have == nil {
		if refusal := a.mayAgree(key); refusal != nil {
			return refusal
		}
	}
	for _, agreement := range []*statev1.Agreement{have, next} {
		if agreement != nil && len(agreement.GetAllow()) == 0 {
			return a.refuse("%s is about no service of its: that takes an api-owner without prefixes", key)
		}
		for _, allow := range agreement.GetAllow() {
			for _, path := range a.pathsOf(allow, services) {
				if !a.Exports.Cover(path) {
					return a.refuse("%s allows what takes the role api-owner for %s", key, path)
				}
			}
		}
	}
	known := have.GetGateways()
	for _, o := range a.state.objects.rows {
		if other := o.GetAgreement(); other.GetPeer() == next.GetPeer() {
			known = slices.Concat(known, other.GetGateways())
		}
	}
	for _, g := range next.GetGateways() {
		if !slices.ContainsFunc(known, func(k *statev1.PeerGateway) bool { return proto.Equal(k, g) }) {
			return a.refuse("%s names gateway %s at %s, which no agreement with %s does yet: that takes an api-owner without prefixes", key, g.GetPath(), g.GetAddress(), next.GetPeer())
		}
	}
	return nil
}

// pathsOf are the own paths that an allowance is about: on the serving side the
// service's, on the calling side its callers', down to the first wildcard.
func (a *Administrator) pathsOf(allow *statev1.Allow, services map[string]string) (paths []string) {
	if label := allow.GetService(); !strings.Contains(label, ".") {
		if s, ok := a.state.Object("Service/" + label); ok {
			paths = append(paths, s.GetService().GetPath())
		}
		if path, ok := services[label]; ok {
			paths = append(paths, path)
		}
		if len(paths) == 0 {
			return []string{"(service " + label + ")"} // there is none: no prefix covers it
		}
		return paths
	}
	for _, text := range allow.GetCallers() {
		literal := "(callers " + text + ")"
		if _, err := federation.ParsePattern(text); err == nil {
			literal, _, _ = strings.Cut("/"+text, "/*")
		}
		paths = append(paths, literal)
	}
	return paths
}

func sorted(list []string) []string { return slices.Sorted(slices.Values(list)) }
