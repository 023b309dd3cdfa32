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
	SelectorUID       = "unix:uid"     // decimal effective user id
	SelectorUser      = "unix:user"    // user name, as the host resolves it
	SelectorGID       = "unix:gid"     // decimal effective group id
	SelectorGroup     = "unix:group"   // decimal id of a supplementary group; may stand several times
	SelectorPath      = "unix:path"    // absolute path of the executable
	SelectorSHA256    = "unix:sha256"  // lower-case hex digest of the executable
	SelectorCmdline   = "unix:cmdline" // lower-case hex digest of /proc/PID/cmdline: the arguments, each with a zero behind it
	SelectorUnit      = "systemd:unit" // unit of the system's service manager: accounts.service
	SelectorContainer = "container:id" // 64 hex digits that docker, containerd, CRI-O or podman gave it
	SelectorRun       = "run:id"       // a process that `entente run` registered with its agent, and what it started
)

// Anchors say whose process it is: one of them stands in every set of selectors. Nobody but
// root, or the user in question, can make another process that has them. Paths and digests
// say which program runs, and any user can start a program, with LD_PRELOAD and under
// ptrace; a command line is what a process says of itself.
var Anchors = []string{SelectorUID, SelectorUser, SelectorUnit, SelectorContainer}

// identifying selectors were accepted alone before feature level 5.
var identifying = append([]string{SelectorSHA256}, Anchors...)

const (
	maxSelectors     = 16
	maxSelectorValue = 1024
)

// Selector is one statement about a process, written KIND:VALUE.
type Selector struct {
	Kind  string // one of the Selector constants
	Value string
}

// String writes the form that ParseSelector reads. There is one form only, so
// that selectors can be compared as text.
func (s Selector) String() string { return s.Kind + ":" + s.Value }

// ParseSelector reads one selector, as in unix:uid:1000 or systemd:unit:web.service.
func ParseSelector(text string) (Selector, error) {
	family, rest, ok := strings.Cut(text, ":")
	kind, value, found := strings.Cut(rest, ":")
	if !ok || !found {
		return Selector{}, fmt.Errorf("selector %.80q is not of the form KIND:VALUE, as in unix:uid:1000", text)
	}
	kind = family + ":" + kind
	if value == "" || len(value) > maxSelectorValue {
		return Selector{}, fmt.Errorf("selector %.80q: value has %d bytes, not 1 to %d", text, len(value), maxSelectorValue)
	}
	for i := range len(value) {
		if value[i] < ' ' || value[i] == 0x7f {
			return Selector{}, fmt.Errorf("selector %.80q holds a control character", text)
		}
	}
	switch kind {
	case SelectorUID, SelectorGID, SelectorGroup:
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
	case SelectorSHA256, SelectorCmdline, SelectorContainer:
		if CheckKeyID(value) != nil {
			return Selector{}, fmt.Errorf("selector %.80q: not 64 lower-case hex digits", text)
		}
	case SelectorUnit:
		if !unitName(value) {
			return Selector{}, fmt.Errorf("selector %.80q: not the name of a unit, as in web.service", text)
		}
	case SelectorRun:
		if len(value) < 16 || len(value) > 64 || strings.Trim(value, "abcdefghijklmnopqrstuvwxyz234567") != "" {
			return Selector{}, fmt.Errorf("selector %.80q: not an id of a registered run", text)
		}
	default:
		return Selector{}, fmt.Errorf("selector %.80q: kind %.20q is not one of unix:uid, unix:user, unix:gid, unix:group, unix:path, unix:sha256, unix:cmdline, systemd:unit, container:id", text, kind)
	}
	return Selector{Kind: kind, Value: value}, nil
}

// unitName tells whether s can be a unit that processes run in (systemd.unit(5)).
func unitName(s string) bool {
	name, ok := strings.CutSuffix(s, ".service")
	if !ok {
		name, ok = strings.CutSuffix(s, ".scope")
	}
	return ok && name != "" && len(s) <= 255 &&
		strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:-_.@\\") == ""
}

// CheckSelectors refuses a set that no process or the wrong process could match: an
// empty one, two of one kind, and one in which nothing identifies a process: whoever
// may create files or mount namespaces could make one with that path, and a command
// line is what a process says of itself. It accepts a digest alone, as entries have it that
// were stored before feature level 5; new ones are asked about by CheckAnchored as well.
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
		if kinds[s.Kind] && s.Kind != SelectorGroup {
			return fmt.Errorf("two selectors of kind %s: all must match, so nothing would", s.Kind)
		}
		kinds[s.Kind] = true
	}
	if !slices.ContainsFunc(identifying, func(kind string) bool { return kinds[kind] }) {
		return errors.New("nothing here identifies a process: add unix:uid, unix:user, systemd:unit or container:id")
	}
	return nil
}

// CheckAnchored refuses a set of selectors that any user of the host can satisfy with a
// process of his own: one without an anchor.
func CheckAnchored(selectors []string) error {
	for _, text := range selectors {
		if s, err := ParseSelector(text); err == nil && slices.Contains(Anchors, s.Kind) {
			return nil
		}
	}
	return fmt.Errorf("selectors %s say which program it is, not whose process: any user can start that program and load code into it (LD_PRELOAD); add unix:uid, unix:user, systemd:unit or container:id",
		strings.Join(selectors, " "))
}
