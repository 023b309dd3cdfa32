package catalog_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	. "github.com/entente-mesh/entente/federation/catalog"
)

// One object that this release cannot use, of an unknown kind or with an unknown value,
// costs what refers to it and nothing else.
func TestUsableLeavesOutWhatCannotBeUsed(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("banking.example")
	service := func(name string, calls ...string) *statev1.Object {
		return &statev1.Object{Kind: &statev1.Object_Service{Service: &statev1.Service{
			Name: name, Path: "/" + name, Hosts: []string{"h1"}, Selectors: []string{"unix:uid:1000"}, Port: 8080, Calls: calls,
		}}}
	}
	later := service("later")
	later.GetService().Protocol = 99
	good, caller := service("good"), service("caller", "later.banking.example")
	all := []*statev1.Object{good, later, caller, {}}
	if _, err := Compile(td, all); err == nil {
		t.Fatal("control: all of it compiles")
	}
	tables, err := Usable(td, all)
	var left *Error
	if !errors.As(err, &left) {
		t.Fatalf("nothing is said to be left out: %v", err)
	}
	for _, want := range []string{"Service/later", "no known kind"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in %v", want, err)
		}
	}
	if _, ok := tables.Service("good"); !ok {
		t.Error("what can be used is not")
	}
	if _, ok := tables.Service("later"); ok {
		t.Error("what cannot be used is")
	}
	if tables, err := Usable(td, []*statev1.Object{good}); err != nil || tables == nil {
		t.Errorf("control: %v", err)
	}
	if tables, _ := Usable(td, []*statev1.Object{{}, {}}); tables == nil {
		t.Error("no tables")
	}
}
