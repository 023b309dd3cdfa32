package server

import (
	"slices"
	"testing"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
)

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
