package roles

import (
	"slices"
	"testing"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

func binding(name string, role statev1.AdminRole, subject string, prefixes ...string) *statev1.RoleBinding {
	return &statev1.RoleBinding{Name: name, Role: role, Subjects: []string{subject}, Prefixes: prefixes}
}

const (
	viewer       = statev1.AdminRole_ADMIN_ROLE_VIEWER
	serviceOwner = statev1.AdminRole_ADMIN_ROLE_SERVICE_OWNER
	apiOwner     = statev1.AdminRole_ADMIN_ROLE_API_OWNER
	trustAdmin   = statev1.AdminRole_ADMIN_ROLE_TRUST_ADMIN
)

var bindings = []*statev1.RoleBinding{
	binding("tom", trustAdmin, "/people/tom"),
	binding("olaf", serviceOwner, "/people/olaf"),
	binding("pia", serviceOwner, "/people/pia", "/team/pay"),
	binding("eva", viewer, "/people/eva"),
	binding("vic", viewer, "/people/vic", "/team/pay"),
	binding("ann", apiOwner, "/people/ann"),
	binding("later", 99, "/people/later"),
	binding("agent", trustAdmin, "/entente/agent/h1"), // no CA node agrees to it
	binding("nobody", trustAdmin, ""),
	binding("both-b", viewer, "/people/both", "/a"),
	binding("both-a", serviceOwner, "/people/both", "/b"),
}

func TestRights(t *testing.T) {
	type want struct{ see, all, govern, gateway, own bool }
	for path, w := range map[string]want{
		"/people/tom":   {true, true, true, true, true},
		"/people/olaf":  {true, true, false, true, true},
		"/people/pia":   {see: true, own: true},
		"/people/eva":   {see: true, all: true},
		"/people/vic":   {see: true},
		"/people/ann":   {see: true, all: true},
		"/people/both":  {see: true},
		"/people/later": {}, "/people/none": {}, "/people": {}, "/people/tom/x": {}, "/entente/agent/h1": {}, "": {},
	} {
		r := Of(path, slices.Values(bindings))
		got := want{
			r.Lacks(See) == "", r.Lacks(SeeAll) == "", r.Lacks(Govern) == "",
			r.Lacks(Operate, "/entente/gateway/gw-1") == "", r.Lacks(Operate, "/team/pay/edge") == "",
		}
		if got != w {
			t.Errorf("%q: %+v, want %+v", path, got, w)
		}
		if r.Lacks(Operate) == "" != w.govern {
			t.Errorf("%q may operate what stands for nothing: %v", path, !w.govern)
		}
		if r.Lacks(Operate, "/team/pay/edge", "/entente/gateway/gw-1") == "" && !w.gateway {
			t.Errorf("%q may operate a process of which it owns one half", path)
		}
	}
	if r := (Roles{}); r.Lacks(See) == "" || r.Lacks(Operate, "/a") == "" || r.Sees("/a") {
		t.Error("nobody may something")
	}
	if r := Of("/people/both", slices.Values(bindings)); !r.Sees("/a/x") || !r.Sees("/b") || r.Sees("/c") || len(r.Bindings) != 2 || r.Bindings[0].GetName() != "both-a" {
		t.Errorf("%+v", r)
	}
}

// What is no SPIFFE path is below no prefix.
func TestPrefixesAreWholeSegments(t *testing.T) {
	p := Prefixes{List: []string{"/team/pay"}}
	for path, covered := range map[string]bool{
		"/team/pay": true, "/team/pay/a": true, "/team/pay/a/b": true,
		"": false, "/": false, "/team": false, "/team/payments": false, "/team/pay/": false, "/team/pay/../payments": false, "/team/pay/.": false,
		"/team//pay/a": false, "team/pay/a": false, "/team/pay%2f..": false, "/team/pay/\x00": false, "/TEAM/pay/a": false,
	} {
		if p.Cover(path) != covered {
			t.Errorf("%q: %v", path, !covered)
		}
	}
	all := Prefixes{All: true}
	if all.Cover("/team/../x") || !all.Cover("/team/x") {
		t.Error("everything is every SPIFFE path")
	}
}
