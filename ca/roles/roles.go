// Package roles says what the holder of an SVID may do by the role bindings of its trust
// domain. CA nodes, gateways and agents ask it alike, so that a role means the same
// wherever it is asked about.
//
// It is pure: the bindings arrive as an argument.
package roles

import (
	"fmt"
	"iter"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

// Right is what is asked of an administrator before anybody looks at a request.
type Right uint8

const (
	// See is had with any role. What is shown is narrowed by Sees.
	See Right = iota + 1
	// SeeAll is had with a role that no prefix narrows.
	SeeAll
	// Govern is had as a trust-admin: everything that no path owns.
	Govern
	// Operate is had as a service-owner of all that a process stands for, and as a trust-admin.
	Operate
)

// Roles are one holder's. The zero value may do nothing.
type Roles struct {
	Path     string                 // SPIFFE path of the holder
	Governs  bool                   // trust-admin
	Owns     Prefixes               // service-owner
	Exports  Prefixes               // api-owner
	Views    Prefixes               // any role
	Bindings []*statev1.RoleBinding // that name the holder, by name
}

// Of reads the roles of the holder of a SPIFFE path of the bindings' domain.
func Of(path string, bindings iter.Seq[*statev1.RoleBinding]) Roles {
	r := Roles{Path: path}
	if path == "" || ca.Reserved(path) {
		return r
	}
	for b := range bindings {
		if slices.Contains(b.GetSubjects(), path) {
			r.add(b)
		}
	}
	slices.SortFunc(r.Bindings, func(x, y *statev1.RoleBinding) int { return strings.Compare(x.GetName(), y.GetName()) })
	return r
}

func (r *Roles) add(b *statev1.RoleBinding) {
	r.Bindings = append(r.Bindings, b)
	switch b.GetRole() {
	case statev1.AdminRole_ADMIN_ROLE_TRUST_ADMIN:
		r.Governs = true
	case statev1.AdminRole_ADMIN_ROLE_SERVICE_OWNER:
		r.Owns.add(b.GetPrefixes())
	case statev1.AdminRole_ADMIN_ROLE_API_OWNER:
		r.Exports.add(b.GetPrefixes())
	case statev1.AdminRole_ADMIN_ROLE_VIEWER:
	default:
		return // a later release's
	}
	r.Views.add(b.GetPrefixes())
}

// Lacks says why the holder does not have a right; empty if it has. paths are what the
// right is asked for, where it can be had for some: every one must be the holder's, and
// without any none is.
func (r *Roles) Lacks(right Right, paths ...string) string {
	switch {
	case r.Governs, right == See && r.Views.Some(), right == SeeAll && r.Views.All:
		return ""
	case !r.Views.Some():
		return "no role is bound to it: a trust-admin applies a RoleBinding"
	case right == Govern:
		return "that takes the role trust-admin"
	case right == SeeAll:
		return "that takes a role without prefixes: it shows the whole domain"
	}
	if len(paths) == 0 {
		return "that takes the role trust-admin"
	}
	for _, path := range paths {
		if !r.Owns.Cover(path) {
			return fmt.Sprintf("that takes the role service-owner for %s, or without prefixes", path)
		}
	}
	return ""
}

// Sees tells whether what belongs to a SPIFFE path may be shown.
func (r *Roles) Sees(path string) bool { return r.Governs || r.Views.Cover(path) }

// Prefixes is a set of SPIFFE paths and all below them. The zero value is empty.
type Prefixes struct {
	All  bool
	List []string
}

func (p *Prefixes) add(list []string) {
	p.All = p.All || len(list) == 0
	p.List = append(p.List, list...)
}

// Some tells whether the set is not empty.
func (p *Prefixes) Some() bool { return p.All || len(p.List) > 0 }

// Cover tells whether a path stands at or below one of them, compared by whole
// segments. What is no SPIFFE path (dot segments, doubled or trailing slashes) stands
// nowhere.
func (p *Prefixes) Cover(path string) bool {
	if path == "" || spiffeid.ValidatePath(path) != nil {
		return false
	}
	return p.All || slices.ContainsFunc(p.List, func(prefix string) bool { return ca.AtOrBelow(path, prefix) })
}
