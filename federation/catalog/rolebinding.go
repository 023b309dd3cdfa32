package catalog

import (
	"maps"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

var roles = map[string]statev1.AdminRole{
	"viewer":        statev1.AdminRole_ADMIN_ROLE_VIEWER,
	"service-owner": statev1.AdminRole_ADMIN_ROLE_SERVICE_OWNER,
	"api-owner":     statev1.AdminRole_ADMIN_ROLE_API_OWNER,
	"trust-admin":   statev1.AdminRole_ADMIN_ROLE_TRUST_ADMIN,
}

// Roles are the roles that a RoleBinding may give, by the names that files have for them.
func Roles() map[string]statev1.AdminRole { return maps.Clone(roles) }

// RoleName is a role as it stands in a file.
func RoleName(r statev1.AdminRole) string {
	for name, role := range roles {
		if role == r {
			return name
		}
	}
	return "unknown"
}

// Bounds of a role binding.
const (
	maxSubjects = 256
	maxPrefixes = 64
	maxRolePath = 1024 // bytes
)

var roleBindingKind = kind{
	name: "RoleBinding",
	id: func(o *statev1.Object) (string, bool) {
		b := o.GetRoleBinding()
		return b.GetName(), b != nil
	},
	compile: (*compiler).roleBinding,
	level:   func(*statev1.Object) uint32 { return 3 },
	// Gateways and agents ask for themselves what an administrator may do there. Each host
	// learns by it who administers the domain.
	forHosts: whole,
	ends:     (*Tables).roleBindingEnds,
}

func (c *compiler) roleBinding() {
	b := c.object.GetRoleBinding()
	c.label("metadata.name", b.GetName())
	if _, known := statev1.AdminRole_name[int32(b.GetRole())]; !known || b.GetRole() == statev1.AdminRole_ADMIN_ROLE_UNSPECIFIED {
		c.fail("give one of "+strings.Join(sortedKeys(roles), ", "), "the role is none that this release knows")
	}
	if n := len(b.GetSubjects()); n == 0 || n > maxSubjects {
		c.fail("", "%d subjects, not 1 to %d", n, maxSubjects)
	}
	if n := len(b.GetPrefixes()); n > maxPrefixes {
		c.fail("", "%d prefixes, over %d", n, maxPrefixes)
	}
	for _, path := range b.GetSubjects() {
		c.rolePath("subject", path)
	}
	for _, path := range b.GetPrefixes() {
		c.rolePath("prefix", path)
	}
	c.tables.bindings = append(c.tables.bindings, proto.CloneOf(b))
	if b.GetRole() == statev1.AdminRole_ADMIN_ROLE_TRUST_ADMIN && len(b.GetPrefixes()) > 0 {
		c.fail("leave prefixes out, or give another role", "trust-admin is for the whole domain: authorities, hosts and roles have no path")
	}
}

// rolePath refuses a path that no SVID of a workload can have: what the mesh itself runs
// is nobody's administrator, and owns nothing.
func (c *compiler) rolePath(what, path string) {
	switch err := spiffeid.ValidatePath(path); {
	case path == "" || err != nil:
		c.fail("write a SPIFFE path with its leading slash and none at the end, as in /team/payments", "%s %q is not a SPIFFE path: %v", what, path, err)
	case len(path) > maxRolePath:
		c.fail("", "%s %.40q... has over %d bytes", what, path, maxRolePath)
	case path == reservedPath || strings.HasPrefix(path, reservedPath+"/"):
		c.fail("", "%s %q is reserved for what the mesh itself runs", what, path)
	}
}

func (t *Tables) roleBindingEnds(o *statev1.Object) (ends []string) {
	b := o.GetRoleBinding()
	where := ""
	if len(b.GetPrefixes()) > 0 {
		where = " for " + strings.Join(b.GetPrefixes(), ", ")
	}
	for _, subject := range b.GetSubjects() {
		ends = append(ends, "spiffe://"+t.td.Name()+subject+" loses the role "+RoleName(b.GetRole())+where+", unless another binding gives it")
	}
	return ends
}
