package catalog

import (
	"slices"
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

	// level returns the feature level (ca/domain) that every CA node must have before an
	// object can be agreed; nil: 1. A kind that is added needs at least that of its release.
	level func(*statev1.Object) uint32

	// forHosts returns what agents and gateways are told of an object; nil: they are not
	// told that it exists.
	forHosts func(*statev1.Object) *statev1.Object

	// ends says what an object's removal ends, a sentence each.
	ends func(*Tables, *statev1.Object) []string
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
	k, name := kindOf(object)
	if k == nil {
		return declared{Object: object}
	}
	return declared{object, k, k.name + "/" + name}
}

// kindOf returns the row of an object's kind, nil if there is none, and the object's name.
func kindOf(object *statev1.Object) (k *kind, name string) {
	for i := range kinds {
		if name, is := kinds[i].id(object); is {
			return &kinds[i], name
		}
	}
	return nil, ""
}

// Key is the key of an object, "Service/accounts". An Import's name is its service
// name, a Relationship's its trust domain. Empty for an object without a kind.
func Key(object *statev1.Object) string { return declare(object).key }

// KindName is the kind and the name of an object; both empty if it has no kind.
func KindName(object *statev1.Object) (kind, name string) {
	k, name := kindOf(object)
	if k == nil {
		return "", ""
	}
	return k.name, name
}

// Kinds are the kinds of objects, in the order in which they are best read.
func Kinds() []string {
	names := make([]string, len(kinds))
	for i, k := range kinds {
		names[i] = k.name
	}
	return names
}

// Level is the feature level that every CA node must have before the object can be agreed.
func Level(object *statev1.Object) uint32 {
	if k, _ := kindOf(object); k != nil && k.level != nil {
		return k.level(object)
	}
	return 1
}

// ForHosts is what agents and gateways are told of an object; nil: nothing. It may be the
// object itself.
func ForHosts(object *statev1.Object) *statev1.Object {
	if k, _ := kindOf(object); k != nil && k.forHosts != nil {
		return k.forHosts(object)
	}
	return nil
}

// Ends says what ends when an object that the tables were made of is removed, a sentence
// each, for whoever is about to do it.
func (t *Tables) Ends(object *statev1.Object) []string {
	if k, _ := kindOf(object); k != nil {
		return k.ends(t, object)
	}
	return nil
}

// HostsSee reports whether agents and gateways are told of objects with such a key.
func HostsSee(key string) bool {
	name, _, _ := strings.Cut(key, "/")
	return slices.ContainsFunc(kinds, func(k kind) bool { return k.name == name && k.forHosts != nil })
}

// whole is forHosts of a kind that has nothing to hide.
func whole(object *statev1.Object) *statev1.Object { return object }
