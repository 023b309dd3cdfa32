// Package selector is the grammar of selectors: how one is written, which kinds there are,
// and which sets of them say whose process is meant. The catalogue, the CA and the agent
// all ask it. It is pure.
//
// A new kind is a row of kinds here, a key of run in federation/manifest, what the agent
// looks at in meshagent/workloadattest, and docs/reference/selectors.md, which a test
// writes. Tests fail while one of them is missing.
package selector

import (
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
)

// Names of the kinds: what a mesh agent's workload attestation can see of a process.
const (
	UID       = "unix:uid"
	User      = "unix:user"
	GID       = "unix:gid"
	Group     = "unix:group"
	Path      = "unix:path"
	SHA256    = "unix:sha256"
	Cmdline   = "unix:cmdline"
	Unit      = "systemd:unit"
	Container = "container:id"
	Run       = "run:id"
)

// Kind is what is known of one kind of selectors.
type Kind struct {
	Name    string // as in unix:uid:1000
	Key     string // in run of a Service or a Gateway
	Value   string // what a value is
	Match   string // what of the process it is compared with
	Example string // a value
	Hint    string // where to take a value from

	// Anchor: it says whose process it is. Nobody but root, or the user in question, can
	// make another process that has it. One stands in every set of selectors.
	Anchor bool
	// Apart: no process has two values of it, so sets that want different ones are for
	// different processes. Two names may be of one user (web and web@corp.example).
	Apart bool
	Weak  string // why it is no anchor
	// Stored: it was accepted without an anchor before feature level 5. Entries that were
	// stored then keep working.
	Stored bool
	Many   bool // it may stand several times in a set
	// Level is the feature level that all CA nodes need before they accept it; 0: any.
	Level uint32

	good func(value string) bool
}

// kinds is the table. All that is known of a kind stands in its row.
var kinds = []Kind{
	{
		Name: UID, Key: "uid", Value: number, Match: "effective user id", Example: "998",
		Anchor: true, Apart: true, good: isNumber,
	},
	{
		Name: User, Key: "user", Value: "a user name of at most 256 bytes without space, colon and slash", Match: "effective user id, which the host looks up by that name", Example: "web",
		Anchor: true, good: func(s string) bool { return len(s) <= maxUser && !strings.ContainsAny(s, ":/ ") },
	},
	{
		Name: GID, Key: "gid", Value: number, Match: "effective group id", Example: "998",
		Weak: "other users may be in that group", good: isNumber,
	},
	{
		Name: Group, Key: "groups", Value: number, Match: "one of the supplementary group ids", Example: "27",
		Weak: "other users may be in that group", Many: true, good: isNumber,
	},
	{
		Name: Path, Key: "path", Value: "a clean absolute path: no . or .., no double slash, no slash at the end", Match: "file of the executable, by device and inode as the agent sees that path", Example: "/opt/web/bin/web",
		Weak: "any user may start a program from a path", good: func(s string) bool { return s[0] == '/' && s != "/" && path.Clean(s) == s },
	},
	{
		Name: SHA256, Key: "sha256", Value: digest, Match: "SHA-256 of the executable", Example: exampleDigest, Hint: "take the first column of: sha256sum FILE",
		Weak: "any user can start that program and load code into it (LD_PRELOAD)", Stored: true, good: isDigest,
	},
	{
		Name: Cmdline, Key: "cmdline", Value: digest, Match: "SHA-256 of /proc/PID/cmdline: the arguments, each with a zero byte behind it", Example: exampleDigest, Hint: "take the first column of: sha256sum /proc/PID/cmdline",
		Weak: "a command line is what a process says of itself", good: isDigest,
	},
	{
		Name: Unit, Key: "systemd", Value: "the name of a service or scope unit", Match: "unit of the host's service manager, by cgroup", Example: "web.service", Hint: "write the unit as systemctl status shows it: web.service",
		Anchor: true, Apart: true, good: isUnit,
	},
	{
		Name: Container, Key: "container", Value: digest, Match: "id that docker, containerd, CRI-O or root's podman gave the container, by cgroup; not what a user's own podman claims", Example: exampleDigest, Hint: "take it from: docker inspect --format {{.Id}} NAME",
		Anchor: true, Apart: true, good: isDigest,
	},
	{
		Name: Run, Key: "run", Value: "an id that `entente run` makes", Match: "a process that `entente run` registered with its agent, and what it started", Example: "abcdefghijklmnop",
		Weak: "whoever registers a process chooses the id", good: func(s string) bool {
			return len(s) >= 16 && len(s) <= 64 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz234567") == ""
		},
	},
}

const (
	number        = "a number from 0 to 4294967294 without leading zeros"
	digest        = "64 lower-case hexadecimal digits"
	exampleDigest = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"

	// MaxCount is how many selectors stand in a set.
	MaxCount = 16
	// MaxValue is the length of the longest value in bytes.
	MaxValue = 1024
	// maxUser is LOGIN_NAME_MAX of Linux. Names of a directory (web@corp.example) are
	// longer than the 32 bytes of utmp.
	maxUser = 256
)

// Kinds are all kinds there are.
func Kinds() []Kind { return slices.Clone(kinds) }

// kindOf finds the kind of a selector by what stands before its value.
func kindOf(text string) *Kind {
	for i := range kinds {
		if rest, ok := strings.CutPrefix(text, kinds[i].Name); ok && strings.HasPrefix(rest, ":") {
			return &kinds[i]
		}
	}
	return nil
}

// IsAnchor tells whether a kind says whose process it is.
func IsAnchor(name string) bool {
	return slices.ContainsFunc(kinds, func(k Kind) bool { return k.Anchor && k.Name == name })
}

// TellsApart tells whether two values of a kind are never one process's.
func TellsApart(name string) bool {
	return slices.ContainsFunc(kinds, func(k Kind) bool { return k.Apart && k.Name == name })
}

// Anchors are the names of the kinds that say whose process it is, for people to choose from.
func Anchors() string { return list(func(k Kind) bool { return k.Anchor }) }

// Separators are the names of the kinds that tell processes apart, for people to choose from.
func Separators() string { return list(func(k Kind) bool { return k.Apart }) }

func list(which func(Kind) bool) string {
	var names []string
	for _, k := range kinds {
		if which(k) {
			names = append(names, k.Name)
		}
	}
	last := len(names) - 1
	return strings.Join(names[:last], ", ") + " or " + names[last]
}

// Selector is one statement about a process, written KIND:VALUE.
type Selector struct {
	Kind  string // UID and so on
	Value string
}

// String writes the form that Parse reads. There is one form only, so that selectors can
// be compared as text.
func (s Selector) String() string { return s.Kind + ":" + s.Value }

// Problem is what is wrong with a selector or a set of them.
type Problem struct {
	Kind Kind // of the selector in question; empty if that is not known
	What string
	Fix  string // what to write instead; may be empty
}

func (p *Problem) Error() string {
	if p.Fix == "" {
		return p.What
	}
	return p.What + "; " + p.Fix
}

// Parse reads one selector, as in unix:uid:1000 or systemd:unit:web.service.
func Parse(text string) (Selector, error) {
	kind, value, problem := parse(text)
	if problem != nil {
		return Selector{}, problem
	}
	return Selector{kind.Name, value}, nil
}

func parse(text string) (kind *Kind, value string, problem *Problem) {
	if kind = kindOf(text); kind == nil || len(text) == len(kind.Name)+1 {
		return nil, "", &Problem{What: fmt.Sprintf("selector %.80q is not understood", text),
			Fix: "write KIND:VALUE, as in unix:uid:1000; KIND is " + list(func(k Kind) bool { return k.Name != Run })}
	}
	value = text[len(kind.Name)+1:]
	bad := func(why string) (*Kind, string, *Problem) {
		return nil, "", &Problem{*kind, fmt.Sprintf("selector %.80q: %s", text, why), kind.Hint}
	}
	if len(value) > MaxValue {
		return bad(fmt.Sprintf("the value has %d bytes, over %d", len(value), MaxValue))
	}
	for i := range len(value) {
		if value[i] < ' ' || value[i] == 0x7f {
			return bad("the value holds a control character")
		}
	}
	if !kind.good(value) {
		return bad("not " + kind.Value)
	}
	return kind, value, nil
}

// Check refuses a set with anything wrong with it (Problems).
func Check(selectors []string) error {
	if problems := Problems(selectors); len(problems) > 0 {
		return problems[0]
	}
	return nil
}

// Problems says what is wrong with a set that no process or the wrong process could match:
// a selector that cannot be read, an empty set, two of one kind, and a set in which nothing
// identifies a process. A digest alone passes, since entries have it that were stored
// before feature level 5; new ones are asked about by CheckAnchored as well.
func Problems(selectors []string) (problems []*Problem) {
	if n := len(selectors); n > MaxCount {
		return []*Problem{{What: fmt.Sprintf("%d selectors, over %d", n, MaxCount)}}
	}
	seen := make([]*Kind, 0, MaxCount)
	for _, text := range selectors {
		kind, _, problem := parse(text)
		if problem == nil && !kind.Many && slices.Contains(seen, kind) {
			problem = &Problem{Kind: *kind, What: fmt.Sprintf("two selectors of kind %s: all must match, so nothing would", kind.Name)}
		}
		if problem != nil {
			problems = append(problems, problem)
			continue
		}
		seen = append(seen, kind)
	}
	if problem := Identify(selectors); problem != nil && len(problems) == 0 {
		problems = append(problems, problem)
	}
	return problems
}

// Identify looks only at the kinds of a set: nil if one of them identifies a process.
func Identify(selectors []string) *Problem {
	if len(selectors) == 0 {
		return &Problem{What: "no selector: nothing says by what the process is recognised", Fix: "add " + Anchors()}
	}
	var weak *Problem
	for _, text := range selectors {
		kind := kindOf(text)
		switch {
		case kind == nil:
		case kind.Anchor || kind.Stored:
			return nil
		case weak == nil:
			weak = &Problem{*kind, fmt.Sprintf("%s stands alone, with nothing that identifies a process: %s", text, kind.Weak), "add " + Anchors()}
		}
	}
	return weak
}

// CheckAnchored refuses a set of selectors that any user of the host can satisfy with a
// process of his own: one without an anchor.
func CheckAnchored(selectors []string) error {
	for _, text := range selectors {
		if kind, _, problem := parse(text); problem == nil && kind.Anchor {
			return nil
		}
	}
	return fmt.Errorf("selectors %s say which program it is, not whose process: any user can start that program and load code into it (LD_PRELOAD); add %s",
		strings.Join(selectors, " "), Anchors())
}

// Anchored tells whether a selector that was checked says whose process it is, so that a
// set with it passes CheckAnchored. It is quick.
func Anchored(text string) bool {
	kind := kindOf(text)
	return kind != nil && kind.Anchor
}

// Level is the feature level that all CA nodes need before they accept these selectors.
func Level(selectors []string) (level uint32) {
	for _, text := range selectors {
		if kind := kindOf(text); kind != nil {
			level = max(level, kind.Level)
		}
	}
	return level
}

func isNumber(s string) bool {
	n, err := strconv.ParseUint(s, 10, 32)
	return err == nil && n != 1<<32-1 && strconv.FormatUint(n, 10) == s // 2^32-1 means "none" to the kernel
}

func isDigest(s string) bool { return len(s) == 64 && strings.Trim(s, "0123456789abcdef") == "" }

// isUnit tells whether s can be a unit that processes run in (systemd.unit(5)).
func isUnit(s string) bool {
	name, ok := strings.CutSuffix(s, ".service")
	if !ok {
		name, ok = strings.CutSuffix(s, ".scope")
	}
	return ok && name != "" && len(s) <= 255 &&
		strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:-_.@\\") == ""
}
