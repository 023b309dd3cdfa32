package catalog_test

import (
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

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

// A CA node of a release before a kind would not know what to do with it.
func TestLaterKindsNeedALevel(t *testing.T) {
	oneof := (*statev1.Object)(nil).ProtoReflect().Descriptor().Oneofs().ByName("kind").Fields()
	for i := range oneof.Len() {
		field := oneof.Get(i)
		o := &statev1.Object{}
		o.ProtoReflect().Mutable(field)
		first := field.Number() <= 5 // the five kinds of the first release
		if level := Level(o); first != (level == 1) {
			t.Errorf("%s needs level %d", field.Name(), level)
		}
	}
}

// What is told to agents and gateways is decided kind by kind; what is not decided is not told.
func TestHostsAreToldWhatTheyNeed(t *testing.T) {
	objects := parseYAML(t, bankingYAML)
	told := map[string]bool{}
	for _, o := range objects {
		kind, _ := KindName(o)
		if kind != "Relationship" && ForHosts(o) != o || !HostsSee(Key(o)) {
			t.Errorf("%s is not told as it is", Key(o))
		}
		told[kind] = true
	}
	if len(told) != 5 {
		t.Errorf("control: %v", told)
	}
	secret := &statev1.Object{Owner: "security", Revision: 7, Kind: &statev1.Object_Relationship{Relationship: &statev1.Relationship{
		TrustDomain: "trading.example", EndpointUrls: []string{"https://10.1.0.9/"}, EndpointId: "spiffe://trading.example/x", BootstrapBundle: []byte("{}"), Wit: true,
	}}}
	want := &statev1.Object{Owner: "security", Revision: 7, Kind: &statev1.Object_Relationship{Relationship: &statev1.Relationship{TrustDomain: "trading.example", Wit: true}}}
	if got := ForHosts(secret); !proto.Equal(got, want) {
		t.Errorf("of a relationship: %v", got)
	}
	binding := &statev1.Object{Kind: &statev1.Object_RoleBinding{RoleBinding: &statev1.RoleBinding{Name: "trust"}}}
	if ForHosts(binding) != binding || !HostsSee(Key(binding)) {
		t.Error("role bindings are not told: nobody could administer a gateway")
	}
	if got := ForHosts(&statev1.Object{}); got != nil || HostsSee("") {
		t.Errorf("what is of no kind is told: %v", got)
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
