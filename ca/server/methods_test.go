package server

import (
	"slices"
	"testing"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
)

// What a method's row does not name is named by its request's name or id.
func TestNamed(t *testing.T) {
	for method, request := range map[string]any{
		ententev1.Admin_GetAgent_FullMethodName: &ententev1.GetAgentRequest{Name: "x"}, ententev1.Admin_GetEntry_FullMethodName: &ententev1.GetEntryRequest{Id: "x"},
	} {
		if on := methods[method].named(request, nil, 5); !slices.Equal(on, []string{"x"}) {
			t.Errorf("%s is about %q", method, on)
		}
	}
	if on := methods[ententev1.Admin_SaveSnapshot_FullMethodName].named(nil, nil, 5); len(on) > 0 {
		t.Errorf("a stream is about %q", on)
	}
}

// Every method of every service has a row, and every row is a method's.
func TestEveryMethodHasARow(t *testing.T) {
	described := map[string]bool{}
	services := ententev1.File_entente_v1_entente_proto.Services()
	for i := range services.Len() {
		for j := range services.Get(i).Methods().Len() {
			name := "/" + string(services.Get(i).FullName()) + "/" + string(services.Get(i).Methods().Get(j).Name())
			described[name] = true
			m, known := methods[name]
			if !known || len(m.callers) == 0 {
				t.Errorf("%s: who may call it? Add a row to methods (methods.go)", name)
			}
			if administrative := services.Get(i).Name() == "Admin"; administrative && m.records == recordsNothing || !administrative && m.right != 0 {
				t.Errorf("%s: its row is not one of an administrative method, or is one and it is not", name)
			}
		}
	}
	for name, m := range methods {
		if !described[name] {
			t.Errorf("%s has a row and is no method", name)
		}
		if slices.Contains(m.callers, administrator) {
			t.Errorf("%s: administrators are let in by a right alone", name)
		}
	}
}
