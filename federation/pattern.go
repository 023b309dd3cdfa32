package federation

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Pattern means a set of SPIFFE paths inside one trust domain, which the agreement
// around it names literally. It is compared by whole segments:
//
//	portfolio     exactly /portfolio
//	orders/*      /orders and exactly one segment more
//	batch/**      everything below /batch, but not /batch itself
//
// "*" stands for one whole segment, "**" only at the end and for one or more. There
// are no substrings and no regular expressions: what a pattern allows can be read
// from it. Paths under /entente/ are never meant, not even by "**": gateways and
// agents are not callers.
//
// A Pattern is immutable and comparable.
type Pattern struct {
	text string // without "/**"
	deep bool   // ends with "**"
}

// Bounds of a pattern; SPIFFE IDs are at most 2048 bytes.
const (
	maxPatternLength   = 512
	maxPatternSegments = 16
)

// reserved is the first path segment of identities that are never callers.
const reserved = "entente"

// ParsePattern reads a pattern. Errors say what to write instead.
func ParsePattern(s string) (Pattern, error) {
	switch {
	case s == "":
		return Pattern{}, errors.New("the pattern is empty; name a caller, as in \"portfolio\"")
	case len(s) > maxPatternLength:
		return Pattern{}, fmt.Errorf("the pattern is longer than %d bytes", maxPatternLength)
	case strings.Contains(s, "://"):
		return Pattern{}, fmt.Errorf("pattern %q: write the path only; the trust domain is the agreement's", s)
	case s[0] == '/':
		return Pattern{}, fmt.Errorf("pattern %q: leave out the leading \"/\"", s)
	}
	segments := strings.Split(s, "/")
	if len(segments) > maxPatternSegments {
		return Pattern{}, fmt.Errorf("the pattern has more than %d segments", maxPatternSegments)
	}
	p := Pattern{text: s}
	for i, segment := range segments {
		last := i == len(segments)-1
		switch {
		case segment == "**" && last:
			p.deep = true
			p.text = strings.TrimSuffix(strings.TrimSuffix(s, "**"), "/")
		case segment == "**":
			return Pattern{}, fmt.Errorf("pattern %q: \"**\" may only stand at the end", s)
		case segment == "*":
		case strings.Contains(segment, "*"):
			return Pattern{}, fmt.Errorf("pattern %q: \"*\" stands for one whole segment, never for a part of one", s)
		default:
			if err := spiffeid.ValidatePathSegment(segment); err != nil {
				return Pattern{}, fmt.Errorf("pattern %q: %w", s, err)
			}
		}
	}
	if segments[0] == reserved {
		return Pattern{}, fmt.Errorf("pattern %q: identities under /%s/ are never callers", s, reserved)
	}
	return p, nil
}

// String is what was parsed.
func (p Pattern) String() string {
	switch {
	case !p.deep:
		return p.text
	case p.text == "":
		return "**"
	default:
		return p.text + "/**"
	}
}

// Match reports whether the path of a valid SPIFFE ID (with its leading "/") is
// meant. It does not allocate.
func (p Pattern) Match(path string) bool {
	if len(path) < 2 || path[0] != '/' || !p.deep && p.text == "" {
		return false
	}
	path = path[1:]
	if first, _, _ := strings.Cut(path, "/"); first == reserved {
		return false
	}
	pattern, more := p.text, true // more: path is not used up
	for pattern != "" {
		var want, have string
		if !more {
			return false
		}
		want, pattern, _ = strings.Cut(pattern, "/")
		have, path, more = strings.Cut(path, "/")
		if have == "" || want != "*" && want != have {
			return false
		}
	}
	return more == p.deep && (path != "" || !more)
}

// Overlap reports whether some path is meant by both patterns.
func Overlap(a, b Pattern) bool {
	as, bs := a.segments(), b.segments()
	for i := range max(len(as), len(bs)) {
		switch {
		case i >= len(as):
			return a.deep
		case i >= len(bs):
			return b.deep
		case as[i] != bs[i] && as[i] != "*" && bs[i] != "*":
			return false
		}
	}
	// Equally long: two exact ones meet; a deep one meets only what is longer.
	return a.deep == b.deep
}

// Covers reports whether every path that b means is meant by a as well.
func (a Pattern) Covers(b Pattern) bool {
	as, bs := a.segments(), b.segments()
	for i, segment := range as {
		if i >= len(bs) || segment != "*" && segment != bs[i] {
			return false
		}
	}
	if a.deep {
		return b.deep || len(bs) > len(as)
	}
	return !b.deep && len(bs) == len(as)
}

func (p Pattern) segments() []string {
	if p.text == "" {
		return nil
	}
	return slices.Collect(strings.SplitSeq(p.text, "/"))
}
