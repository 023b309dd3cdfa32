// Package selector is the grammar of selectors: how one is written, of which kinds it can be,
// and which sets of them say whose process is meant. The catalogue, the CA and the agent all
// ask it. It is pure.
package selector

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
	UID       = "unix:uid"     // decimal effective user id
	User      = "unix:user"    // user name, as the host resolves it
	GID       = "unix:gid"     // decimal effective group id
	Group     = "unix:group"   // decimal id of a supplementary group; may stand several times
	Path      = "unix:path"    // absolute path of the executable
	SHA256    = "unix:sha256"  // lower-case hex digest of the executable
	Cmdline   = "unix:cmdline" // lower-case hex digest of /proc/PID/cmdline: the arguments, each with a zero behind it
	Unit      = "systemd:unit" // unit of the system's service manager: accounts.service
	Container = "container:id" // 64 hex digits that docker, containerd, CRI-O or podman gave it
	Run       = "run:id"       // a process that `entente run` registered with its agent, and what it started
)

// Anchors say whose process it is: one of them stands in every set of selectors. Nobody but
// root, or the user in question, can make another process that has them. Paths and digests
// say which program runs, and any user can start a program, with LD_PRELOAD and under
// ptrace; a command line is what a process says of itself.
var Anchors = []string{UID, User, Unit, Container}

// identifying selectors were accepted alone before feature level 5.
var identifying = append([]string{SHA256}, Anchors...)

const (
	maxCount = 16
	maxValue = 1024
)

// Selector is one statement about a process, written KIND:VALUE.
type Selector struct {
	Kind  string // one of the Selector constants
	Value string
}

// String writes the form that Parse reads. There is one form only, so
// that selectors can be compared as text.
func (s Selector) String() string { return s.Kind + ":" + s.Value }

// Parse reads one selector, as in unix:uid:1000 or systemd:unit:web.service.
func Parse(text string) (Selector, error) {
	family, rest, ok := strings.Cut(text, ":")
	kind, value, found := strings.Cut(rest, ":")
	if !ok || !found {
		return Selector{}, fmt.Errorf("selector %.80q is not of the form KIND:VALUE, as in unix:uid:1000", text)
	}
	kind = family + ":" + kind
	if value == "" || len(value) > maxValue {
		return Selector{}, fmt.Errorf("selector %.80q: value has %d bytes, not 1 to %d", text, len(value), maxValue)
	}
	for i := range len(value) {
		if value[i] < ' ' || value[i] == 0x7f {
			return Selector{}, fmt.Errorf("selector %.80q holds a control character", text)
		}
	}
	switch kind {
	case UID, GID, Group:
		// 2^32-1 means "none" to the kernel.
		n, err := strconv.ParseUint(value, 10, 32)
		if err != nil || n == 1<<32-1 || strconv.FormatUint(n, 10) != value {
			return Selector{}, fmt.Errorf("selector %.80q: not a decimal number below 4294967295 without leading zeros", text)
		}
	case User:
		if len(value) > 256 || strings.ContainsAny(value, ":/ ") {
			return Selector{}, fmt.Errorf("selector %.80q: not a user name", text)
		}
	case Path:
		if value[0] != '/' || value == "/" || path.Clean(value) != value {
			return Selector{}, fmt.Errorf("selector %.80q: not an absolute path in its shortest form", text)
		}
	case SHA256, Cmdline, Container:
		if !digest(value) {
			return Selector{}, fmt.Errorf("selector %.80q: not 64 lower-case hex digits", text)
		}
	case Unit:
		if !unitName(value) {
			return Selector{}, fmt.Errorf("selector %.80q: not the name of a unit, as in web.service", text)
		}
	case Run:
		if len(value) < 16 || len(value) > 64 || strings.Trim(value, "abcdefghijklmnopqrstuvwxyz234567") != "" {
			return Selector{}, fmt.Errorf("selector %.80q: not an id of a registered run", text)
		}
	default:
		return Selector{}, fmt.Errorf("selector %.80q: kind %.20q is not one of unix:uid, unix:user, unix:gid, unix:group, unix:path, unix:sha256, unix:cmdline, systemd:unit, container:id", text, kind)
	}
	return Selector{Kind: kind, Value: value}, nil
}

// digest tells whether s is a SHA-256, or an id of that form, as a selector has it.
func digest(s string) bool {
	return len(s) == 64 && strings.Trim(s, "0123456789abcdef") == ""
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

// Check refuses a set that no process or the wrong process could match: an
// empty one, two of one kind, and one in which nothing identifies a process: whoever
// may create files or mount namespaces could make one with that path, and a command
// line is what a process says of itself. It accepts a digest alone, as entries have it that
// were stored before feature level 5; new ones are asked about by CheckAnchored as well.
func Check(selectors []string) error {
	if len(selectors) == 0 {
		return errors.New("no selector: nothing says which process this is")
	}
	if len(selectors) > maxCount {
		return fmt.Errorf("%d selectors, over %d", len(selectors), maxCount)
	}
	kinds := map[string]bool{}
	for _, text := range selectors {
		s, err := Parse(text)
		if err != nil {
			return err
		}
		if kinds[s.Kind] && s.Kind != Group {
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
		if s, err := Parse(text); err == nil && slices.Contains(Anchors, s.Kind) {
			return nil
		}
	}
	return fmt.Errorf("selectors %s say which program it is, not whose process: any user can start that program and load code into it (LD_PRELOAD); add unix:uid, unix:user, systemd:unit or container:id",
		strings.Join(selectors, " "))
}
