package domain

import (
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/selector"
)

const maxEntryChanges = 1000

// Declared tells whether an entry with that id is declared by itself, and does not follow
// from an object of the catalogue.
func Declared(id string) bool { return strings.HasPrefix(id, ca.DeclaredPrefix) }

// changeEntries changes entries that are declared by themselves, all or none.
func (a *application) changeEntries(c *statev1.ChangeEntries) *Refusal {
	if n := len(c.GetChanges()); n == 0 || n > maxEntryChanges {
		return refuse(CodeInvalid, "%d changes of entries, not 1 to %d", n, maxEntryChanges)
	}
	type planned struct {
		id         string
		have, next *statev1.Entry
	}
	seen := make(map[string]bool, len(c.GetChanges()))
	plan := make([]planned, 0, len(c.GetChanges()))
	items := 0
	for _, change := range c.GetChanges() {
		id, have, next, refusal := a.planEntry(change)
		if refusal != nil {
			return refusal
		}
		if seen[id] {
			return refuse(CodeInvalid, "entry %s stands there twice", id)
		}
		seen[id] = true
		if next != nil && a.hardened() {
			if err := a.CheckAnchored(next); err != nil {
				return refuse(CodeInvalid, "entry %s: %v", id, err)
			}
		}
		if have != nil && next != nil {
			if next.Revision = have.GetRevision(); proto.Equal(next, have) {
				continue
			}
		}
		items += len(a.voided(have, next))
		plan = append(plan, planned{id, have, next})
	}
	if refusal := a.roomForDistrust(items); refusal != nil {
		return refusal
	}
	for _, p := range plan {
		if p.next != nil {
			p.next.Revision = a.rev
		}
		a.replaceEntry(p.id, p.have, p.next)
	}
	return nil
}

// PlanEntry says what a change of an entry comes down to in this state: the entry as it
// would be, nil when it goes, without its new revision. Doors ask it before they
// propose.
func (s *State) PlanEntry(change *statev1.EntryChange) (id string, next *statev1.Entry, refusal *Refusal) {
	id, _, next, refusal = s.planEntry(change)
	if next != nil && refusal == nil {
		if err := s.CheckAnchored(next); err != nil {
			return id, nil, refuse(CodeInvalid, "entry %s: %v", id, err)
		}
	}
	return id, next, refusal
}

// CheckAnchored refuses an entry whose selectors any user of its hosts could satisfy. One
// that was stored before that was a rule may change, as long as it gives no more: the same
// identity, by the same selectors, on no other host. Doors ask it at any feature level,
// Apply from hardened() on.
func (s *State) CheckAnchored(next *statev1.Entry) error {
	err := selector.CheckAnchored(next.GetSelectors())
	if err == nil {
		return nil
	}
	have, ok := s.entries.get(next.GetId())
	if ok && have.GetPath() == next.GetPath() && slices.Equal(have.GetSelectors(), next.GetSelectors()) && subset(next.GetHosts(), have.GetHosts()) {
		return nil
	}
	return err
}

func subset(of, all []string) bool {
	return !slices.ContainsFunc(of, func(s string) bool { return !slices.Contains(all, s) })
}

// planEntry gives the entry as it is as well, nil if there is none.
func (s *State) planEntry(change *statev1.EntryChange) (id string, have, next *statev1.Entry, refusal *Refusal) {
	switch action := change.GetAction().(type) {
	case *statev1.EntryChange_Create:
		id, next = action.Create.GetId(), proto.CloneOf(action.Create)
	case *statev1.EntryChange_Update:
		id, next = action.Update.GetId(), proto.CloneOf(action.Update)
	case *statev1.EntryChange_Delete:
		id = action.Delete
	default:
		return "", nil, nil, refuse(CodeInvalid, "a change of an entry creates, updates or deletes")
	}
	invalid := func(err error) (string, *statev1.Entry, *statev1.Entry, *Refusal) {
		return id, nil, nil, refuse(CodeInvalid, "entry %.250s: %v", id, err)
	}
	if err := ca.CheckEntryID(id); err != nil {
		return id, nil, nil, refuse(CodeInvalid, "%v", err)
	}
	have, exists := s.entries.get(id)
	_, creates := change.GetAction().(*statev1.EntryChange_Create)
	switch {
	case creates && change.GetIfRevision() != 0:
		return invalid(fmt.Errorf("what is created has no revision yet"))
	case !creates && !exists:
		return id, nil, nil, refuse(CodeNotFound, "there is no entry %s", id)
	case !creates && change.GetIfRevision() != 0 && change.GetIfRevision() != have.GetRevision():
		return id, nil, nil, refuse(CodeCAS, "entry %s is at revision %s, the change was made for %s: read it again and repeat",
			id, ca.Revision(have.GetRevision()), ca.Revision(change.GetIfRevision()))
	case next == nil:
		return id, have, nil, nil
	}
	ca.Canonical(next)
	next.Revision = 0
	if err := ca.CheckDeclared(s.td, next, s.lifetimes.Phase); err != nil {
		return invalid(err)
	}
	spiffeID, err := ca.ID(s.td, next.GetPath())
	if err != nil {
		return invalid(err)
	}
	if service, ok := s.tables.ServiceByID(spiffeID); ok {
		return id, nil, nil, refuse(CodeExists, "entry %s: the SPIFFE path %s belongs to Service %s", id, next.GetPath(), service.Name)
	}
	if creates && exists {
		same := proto.CloneOf(have)
		if same.Revision = 0; !proto.Equal(same, next) {
			return id, nil, nil, refuse(CodeExists, "there is an entry %s already: update it", id)
		}
		// The proposer did not hear the first answer.
	}
	return id, have, next, nil
}
