package catalog

import (
	"errors"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// Usable is Compile for processes that must go on: objects that cannot be used, and what
// cannot be without them, are left out, and everything else is in force, above all what
// narrows. Every object permits something, so without it less is permitted. The error is
// an *[Error] with what was left out and why; the tables are never nil.
func Usable(td spiffeid.TrustDomain, objects []*statev1.Object, options ...Option) (*Tables, error) {
	var left []Finding
	for {
		tables, err := Compile(td, objects, options...)
		if err == nil {
			if len(left) > 0 {
				return tables, &Error{left}
			}
			return tables, nil
		}
		var failed *Error
		errors.As(err, &failed)
		bad := map[string]bool{}
		for _, f := range failed.Findings {
			bad[f.Object] = true
		}
		left = append(left, failed.Findings...)
		// Each finding names an object of the list, so the list gets shorter each time.
		objects = slices.DeleteFunc(slices.Clone(objects), func(o *statev1.Object) bool { return bad[Key(o)] })
	}
}
