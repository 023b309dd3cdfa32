package nodeattest

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	verifying "github.com/entente-mesh/entente/ca/nodeattest"
)

// Each attestor that CA nodes verify has its half here, and a section of the agent's file.
func TestEveryAttestorHasARow(t *testing.T) {
	sections := func(file reflect.Type) (names []string) {
		for field := range file.Fields() {
			name, _, _ := strings.Cut(field.Tag.Get("yaml"), ",")
			names = append(names, name)
		}
		slices.Sort(names)
		return names
	}
	var rows []string
	for _, a := range attestors {
		rows = append(rows, a.name)
	}
	slices.Sort(rows)
	if own := sections(reflect.TypeFor[Sections]()); !slices.Equal(rows, own) {
		t.Errorf("rows of attestors %v, fields of Sections %v", rows, own)
	}
	if others := sections(reflect.TypeFor[verifying.Sections]()); !slices.Equal(rows, others) {
		t.Errorf("rows of attestors %v, those of CA nodes %v", rows, others)
	}
}

// A host with nothing that admits it says so, and does not crash.
func TestNothingIsGiven(t *testing.T) {
	key, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	none := &Sections{}
	if _, what, err := none.Check(); none.Given() || what != "" || err != nil {
		t.Errorf("%v, %q, %v", none.Given(), what, err)
	}
	if _, err := none.Open("banking.example", key); err == nil || !strings.Contains(err.Error(), Names()) {
		t.Errorf("%v", err)
	}
	given := &Sections{X509PoP: X509PoPConfig{Certificate: "/c", Key: "/k"}}
	if _, what, err := given.Check(); !given.Given() || what != "a certificate" || err != nil {
		t.Errorf("control: %v, %q, %v", given.Given(), what, err)
	}
}
