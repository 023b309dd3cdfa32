package catalog

import (
	"fmt"
	"slices"
	"strings"

	"github.com/entente-mesh/entente/internal/nearest"
)

func didYouMean(word string, words []string) string {
	if near := nearest.Word(word, words); near != "" {
		return fmt.Sprintf("did you mean %q?", near)
	}
	return ""
}

// manySuggestions is how many faults are looked for a nearest name: each is compared with
// every name that there is.
const manySuggestions = 64

func (c *compiler) suggestTarget(name string) string {
	if len(c.failed) >= manySuggestions {
		return ""
	}
	domain := "." + c.tables.td.Name()
	names := sortedKeys(c.tables.targets)
	near := nearest.Word(name, names)
	if label, own := strings.CutSuffix(name, domain); own {
		// Compare labels alone: a long domain would make any two names look near.
		var labels []string
		for _, each := range names {
			if l, ok := strings.CutSuffix(each, domain); ok {
				labels = append(labels, l)
			}
		}
		near = nearest.Word(label, labels)
	} else if label, domain, ok := splitServiceName(name); ok {
		var labels []string
		for _, each := range names {
			if l, d, _ := splitServiceName(each); d == domain {
				labels = append(labels, l)
			}
		}
		if l := nearest.Word(label, labels); l != "" {
			near = l + "." + domain
		} else {
			near = ""
		}
	}
	if near == "" {
		return ""
	}
	return fmt.Sprintf("did you mean %q?", near)
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for key := range m {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}
