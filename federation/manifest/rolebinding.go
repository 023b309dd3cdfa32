package manifest

import (
	"maps"
	"slices"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

type roleBindingSpec struct {
	yamlfile.Pos
	Role     adminRole `yaml:"role,required"`
	Subjects []string  `yaml:"subjects,required"` // SPIFFE paths
	Prefixes []string  `yaml:"prefixes"`          // SPIFFE paths at or below which the role counts; none: everywhere
}

// adminRole is statev1.AdminRole as people write it.
type adminRole statev1.AdminRole

var adminRoles = catalog.Roles()

func (r *adminRole) UnmarshalText(text []byte) error {
	value, ok := adminRoles[string(text)]
	if !ok {
		return notOneOf(string(text), slices.Sorted(maps.Keys(adminRoles)))
	}
	*r = adminRole(value)
	return nil
}

func (r adminRole) MarshalText() ([]byte, error) { return nameOf(adminRoles, statev1.AdminRole(r)) }

func (p *parser) roleBinding(d *document[roleBindingSpec], object *statev1.Object) error {
	object.Kind = &statev1.Object_RoleBinding{RoleBinding: &statev1.RoleBinding{
		Name: d.Metadata.Name, Role: statev1.AdminRole(d.Spec.Role), Subjects: d.Spec.Subjects, Prefixes: d.Spec.Prefixes,
	}}
	return nil
}

func formatRoleBinding(o *statev1.Object) (roleBindingSpec, error) {
	b := o.GetRoleBinding()
	return roleBindingSpec{Role: adminRole(b.GetRole()), Subjects: b.GetSubjects(), Prefixes: b.GetPrefixes()}, nil
}
