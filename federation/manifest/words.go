package manifest

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/internal/nearest"
)

// protocol is statev1.Protocol as people write it.
type protocol statev1.Protocol

var protocols = map[string]statev1.Protocol{"http": statev1.Protocol_PROTOCOL_UNSPECIFIED, "tcp": statev1.Protocol_PROTOCOL_TCP}

func (p *protocol) UnmarshalText(text []byte) error {
	value, ok := protocols[string(text)]
	if !ok {
		return notOneOf(string(text), slices.Sorted(maps.Keys(protocols)))
	}
	*p = protocol(value)
	return nil
}

func (p protocol) MarshalText() ([]byte, error) { return nameOf(protocols, statev1.Protocol(p)) }

func notOneOf(text string, names []string) error {
	err := fmt.Sprintf("%q is not one of %s", text, strings.Join(names, ", "))
	if near := nearest.Word(text, names); near != "" {
		err += fmt.Sprintf("; did you mean %q?", near)
	}
	return errors.New(err)
}

func nameOf[E ~int32](names map[string]E, value E) ([]byte, error) {
	for name, each := range names {
		if each == value {
			return []byte(name), nil
		}
	}
	return nil, fmt.Errorf("value %d has no name", value)
}
