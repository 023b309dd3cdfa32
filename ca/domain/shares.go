package domain

import (
	"slices"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

// What an owner with prefixes may fill is bounded where it begins (I14): entries, which
// leave distrust items behind when they go, agreements, and what is put aside of changes.
// So no owner can fill a table for the others, and no removal needs to be refused.
const (
	// maxOwned is how many entries, and distrust items of entries that went, may lie at or
	// below an owner's prefixes before it may create no more.
	maxOwned = 20_000
	// maxOwnedAgreements is the same for an api-owner's agreements.
	maxOwnedAgreements = 1000
	// maxStagedOwner is what one administrator who does not govern may have put aside, and
	// maxStagedOwners all of them together, of maxStaged bytes.
	maxStagedOwner  = 2 << 20
	maxStagedOwners = 8 << 20
)

// countShares counts, for each prefix of a service-owner, what lies at or below it. It
// looks at every entry.
func (s *State) countShares() {
	s.shares = nil
	for _, o := range s.objects.rows {
		b := o.GetRoleBinding()
		if b.GetRole() != statev1.AdminRole_ADMIN_ROLE_SERVICE_OWNER {
			continue
		}
		for _, prefix := range b.GetPrefixes() {
			if s.shares == nil {
				s.shares = map[string]int{}
			}
			s.shares[prefix] = 0
		}
	}
	if len(s.shares) == 0 {
		return
	}
	for raw := range s.entries.rawFrom("") {
		v, _ := viewEntry(raw, false)
		s.share(string(v.path), 1)
	}
	for _, item := range s.distrust.rows {
		s.share(item.GetPath(), 1)
	}
}

// share counts n more at a path.
func (s *State) share(path string, n int) {
	if path == "" {
		return
	}
	for prefix := range s.shares {
		if ca.AtOrBelow(path, prefix) {
			s.shares[prefix] += n
		}
	}
}

// settleShares follows a change of who owns what.
func (a *application) settleShares() {
	if slices.ContainsFunc(a.changes, func(c Change) bool {
		return c.Kind == ChangeObject && len(c.Key) > len(bindingKey) && c.Key[:len(bindingKey)] == bindingKey
	}) {
		a.countShares()
	}
}

const bindingKey = "RoleBinding/"

// mayAdd refuses an owner with prefixes what would take more than its share: n more
// entries, or, with 0, hosts of one that is there.
func (a *Administrator) mayAdd(what string, n int) *Refusal {
	if a.Governs || a.Owns.All || !a.state.hardened() {
		return nil
	}
	owned := 0
	for i, prefix := range a.Owns.List {
		if slices.Contains(a.Owns.List[:i], prefix) || slices.ContainsFunc(a.Owns.List, func(other string) bool { return other != prefix && ca.AtOrBelow(prefix, other) }) {
			continue // counted with the other
		}
		owned += a.state.shares[prefix]
	}
	if a.added += n; owned+a.added > maxOwned {
		return refuse(CodeLimit, "%s: %s owns %d entries, with those that were deleted lately and whose SVIDs are not over yet, and %d are its share: delete some and wait until their SVIDs have ended, or ask a service-owner without prefixes", what, a.Path, owned, maxOwned)
	}
	return nil
}

// mayAddTo asks about an entry or service whose path and hosts were and would be these. What
// takes nothing is not asked about.
func (a *Administrator) mayAddTo(what, have, next string, haveHosts, nextHosts []string) *Refusal {
	switch {
	case have != next:
		return a.mayAdd(what, 1)
	case !subset(nextHosts, haveHosts):
		return a.mayAdd(what, 0)
	}
	return nil
}

// mayAgree refuses an api-owner with prefixes more agreements than its share.
func (a *Administrator) mayAgree(key string) *Refusal {
	if a.Governs || a.Exports.All || !a.state.hardened() {
		return nil
	}
	if a.agreed == 0 {
		for _, o := range a.state.objects.rows {
			if agreement := o.GetAgreement(); agreement != nil && !slices.ContainsFunc(agreement.GetAllow(), func(allow *statev1.Allow) bool {
				return slices.ContainsFunc(a.pathsOf(allow, nil), func(path string) bool { return !a.Exports.Cover(path) })
			}) {
				a.agreed++
			}
		}
	}
	if a.agreed++; a.agreed > maxOwnedAgreements {
		return refuse(CodeLimit, "%s: %s has %d agreements, which is its share: delete some, or ask an api-owner without prefixes", key, a.Path, maxOwnedAgreements)
	}
	return nil
}

// roomForStaged refuses to put more aside than an administrator's share.
func (a *application) roomForStaged(size int) *Refusal {
	if !a.hardened() || a.principal == "" || a.Administrator(a.principal).Governs {
		return nil
	}
	own, all := size, size
	for _, part := range a.staged.rows {
		if part.GetOwner() == "" || a.Administrator(part.GetOwner()).Governs {
			continue
		}
		n := stagedSize(part)
		all += n
		if part.GetOwner() == a.principal {
			own += n
		}
	}
	if own > maxStagedOwner || all > maxStagedOwners {
		return refuse(CodeLimit, "changes of the catalogue that are put aside for administrators have over %d bytes, or yours over %d: repeat when others have ended, or change less at once", maxStagedOwners, maxStagedOwner)
	}
	return nil
}
