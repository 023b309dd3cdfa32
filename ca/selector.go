package ca

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
)

// Kinds of selectors: what a mesh agent's workload attestation can see of a
// process.
const (
	SelectorUID    = "uid"    // decimal user id
	SelectorUser   = "user"   // user name, as the host resolves it
	SelectorGID    = "gid"    // decimal group id
	SelectorPath   = "path"   // absolute path of the executable
	SelectorSHA256 = "sha256" // lower-case hex digest of the executable
)

const (
	maxSelectors     = 16
	maxSelectorValue = 1024
)

// Selector is one statement about a process, written unix:KIND:VALUE.
type Selector struct {
	Kind  string
	Value string
}

// String writes the form that ParseSelector reads. There is one form only, so
// that selectors can be compared as text.
func (s Selector) String() string { return "unix:" + s.Kind + ":" + s.Value }

// ParseSelector reads one selector, as in unix:uid:1000.
func ParseSelector(text string) (Selector, error) {
	rest, ok := strings.CutPrefix(text, "unix:")
	kind, value, found := strings.Cut(rest, ":")
	if !ok || !found {
		return Selector{}, fmt.Errorf("selector %.80q is not of the form unix:KIND:VALUE, as in unix:uid:1000", text)
	}
	if value == "" || len(value) > maxSelectorValue {
		return Selector{}, fmt.Errorf("selector %.80q: value has %d bytes, not 1 to %d", text, len(value), maxSelectorValue)
	}
	for i := range len(value) {
		if value[i] < ' ' || value[i] == 0x7f {
			return Selector{}, fmt.Errorf("selector %.80q holds a control character", text)
		}
	}
	switch kind {
	case SelectorUID, SelectorGID:
		// 2^32-1 means "none" to the kernel.
		n, err := strconv.ParseUint(value, 10, 32)
		if err != nil || n == 1<<32-1 || strconv.FormatUint(n, 10) != value {
			return Selector{}, fmt.Errorf("selector %.80q: not a decimal number below 4294967295 without leading zeros", text)
		}
	case SelectorUser:
		if len(value) > 256 || strings.ContainsAny(value, ":/ ") {
			return Selector{}, fmt.Errorf("selector %.80q: not a user name", text)
		}
	case SelectorPath:
		if value[0] != '/' || value == "/" || path.Clean(value) != value {
			return Selector{}, fmt.Errorf("selector %.80q: not an absolute path in its shortest form", text)
		}
	case SelectorSHA256:
		if CheckKeyID(value) != nil {
			return Selector{}, fmt.Errorf("selector %.80q: not 64 lower-case hex digits", text)
		}
	default:
		return Selector{}, fmt.Errorf("selector %.80q: kind %.20q is not one of uid, user, gid, path, sha256", text, kind)
	}
	return Selector{Kind: kind, Value: value}, nil
}

// CheckSelectors refuses a set that no process or the wrong process could match: an
// empty one, two of one kind, and a path or a group that stands alone: whoever may
// create files or mount namespaces could make a process with that path. A path needs
// a user or the digest beside it, a group a user.
func CheckSelectors(selectors []string) error {
	if len(selectors) == 0 {
		return errors.New("no selector: nothing says which process this is")
	}
	if len(selectors) > maxSelectors {
		return fmt.Errorf("%d selectors, over %d", len(selectors), maxSelectors)
	}
	kinds := map[string]bool{}
	for _, text := range selectors {
		s, err := ParseSelector(text)
		if err != nil {
			return err
		}
		if kinds[s.Kind] {
			return fmt.Errorf("two selectors of kind %s: all must match, so nothing would", s.Kind)
		}
		kinds[s.Kind] = true
	}
	if !kinds[SelectorUID] && !kinds[SelectorUser] && !kinds[SelectorSHA256] {
		return errors.New("path and group alone do not identify a process: add unix:uid, unix:user or unix:sha256")
	}
	return nil
}

// Match tells whether a process with the attested selectors has all that an entry
// wants. A want that is empty matches nothing.
func Match(want, attested []string) bool {
	if len(want) == 0 {
		return false
	}
	for _, w := range want {
		if !slices.Contains(attested, w) {
			return false
		}
	}
	return true
}
