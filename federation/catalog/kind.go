package catalog

import (
	"strings"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// kind is what the catalogue knows of one kind of objects.
type kind struct {
	name string // as in "kind:" of a file, and in the keys of its objects

	// id returns the name of an object, and whether it is of this kind.
	id func(*statev1.Object) (name string, is bool)

	// compile checks the compiler's object by itself and enters it into the tables; nil:
	// references does all of it. references checks it against the other objects, which
	// were all compiled before; nil: it refers to none.
	compile, references func(*compiler)
}

// kinds has a row for each kind of objects, in the order in which they are best read.
var kinds = []kind{relationshipKind, gatewayKind, serviceKind, importKind, agreementKind, roleBindingKind}

// declared is an object with what is known of its kind.
type declared struct {
	*statev1.Object
	kind *kind  // nil: it is of none that this release knows
	key  string // "Service/accounts"; empty without a kind
}

func declare(object *statev1.Object) declared {
	for i := range kinds {
		if name, is := kinds[i].id(object); is {
			return declared{object, &kinds[i], kinds[i].name + "/" + name}
		}
	}
	return declared{Object: object}
}

// Key is the key of an object, "Service/accounts". An Import's name is its service
// name, a Relationship's its trust domain. Empty for an object without a kind.
func Key(object *statev1.Object) string { return declare(object).key }

// KindName is the kind and the name of an object; both empty if it has no kind.
func KindName(object *statev1.Object) (kind, name string) {
	kind, name, _ = strings.Cut(Key(object), "/")
	return kind, name
}

// Kinds are the kinds of objects, in the order in which they are best read.
func Kinds() []string {
	names := make([]string, len(kinds))
	for i, k := range kinds {
		names[i] = k.name
	}
	return names
}
