package catalog_test

import (
	"slices"
	"strings"
	"testing"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	. "github.com/entente-mesh/entente/federation/catalog"
)

// Every kind that the API has is one of the catalogue: one that is forgotten fails here.
func TestEveryKindHasARow(t *testing.T) {
	oneof := (*statev1.Object)(nil).ProtoReflect().Descriptor().Oneofs().ByName("kind").Fields()
	for i := range oneof.Len() {
		field := oneof.Get(i)
		want := string(field.Message().Name())
		o := &statev1.Object{}
		o.ProtoReflect().Mutable(field)
		if kind, name := KindName(o); kind != want || name != "" {
			t.Errorf("an object with %s is of kind %q with the name %q, not %s", field.Name(), kind, name, want)
		}
		if !slices.Contains(Kinds(), want) {
			t.Errorf("%s is not among the kinds", want)
		}
		// What nobody filled in is refused under its own key, not as something unknown.
		if _, err := Compile(banking, []*statev1.Object{o}); err == nil || !strings.HasPrefix(err.Error(), want+"/: ") {
			t.Errorf("an empty %s: %v", want, err)
		}
	}
	if len(Kinds()) != oneof.Len() {
		t.Errorf("%d rows for %d kinds", len(Kinds()), oneof.Len())
	}
	if kind, _ := KindName(&statev1.Object{}); kind != "" {
		t.Errorf("control: an object without a kind is a %s", kind)
	}
}

func TestEveryRoleHasAName(t *testing.T) {
	roles := statev1.AdminRole(0).Descriptor().Values()
	for i := range roles.Len() {
		role := statev1.AdminRole(roles.Get(i).Number())
		name := RoleName(role)
		switch known := name != "unknown"; {
		case known != (role != statev1.AdminRole_ADMIN_ROLE_UNSPECIFIED):
			t.Errorf("%v is called %q", role, name)
		case known && Roles()[name] != role:
			t.Errorf("%q is %v, not %v", name, Roles()[name], role)
		}
	}
}
