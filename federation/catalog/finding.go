package catalog

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Severity says how much a finding matters.
type Severity string

// A catalogue with a Fail is not compiled.
const (
	Warn Severity = "warn"
	Fail Severity = "fail"
)

// Finding is one thing that is wrong with an object, or that deserves attention.
type Finding struct {
	Severity Severity
	Object   string // "Agreement/trading-reads-balances"
	Source   string // FILE:LINE it was declared at; may be empty
	Detail   string // what is wrong
	Fix      string // what to do about it; may be empty
}

func (f Finding) String() string {
	var b strings.Builder
	if f.Source != "" {
		b.WriteString(f.Source + ": ")
	}
	fmt.Fprintf(&b, "%s: %s", f.Object, f.Detail)
	if f.Fix != "" {
		b.WriteString("; " + f.Fix)
	}
	return b.String()
}

// Error is what makes a catalogue wrong: every finding of severity Fail.
type Error struct {
	Findings []Finding
}

func (e *Error) Error() string {
	lines := make([]string, len(e.Findings))
	for i, f := range e.Findings {
		lines[i] = f.String()
	}
	return strings.Join(lines, "\n")
}

func (c *compiler) find(severity Severity, fix, format string, args ...any) {
	f := Finding{severity, c.object.key, c.object.GetSource(), fmt.Sprintf(format, args...), fix}
	if severity == Fail {
		c.failed = append(c.failed, f)
	} else {
		c.tables.findings = append(c.tables.findings, f)
	}
}

func (c *compiler) fail(fix, format string, args ...any) { c.find(Fail, fix, format, args...) }

func (c *compiler) warn(fix, format string, args ...any) { c.find(Warn, fix, format, args...) }

func sortFindings(list []Finding) {
	slices.SortStableFunc(list, func(a, b Finding) int {
		fileA, lineA := splitSource(a.Source)
		fileB, lineB := splitSource(b.Source)
		return cmp.Or(strings.Compare(fileA, fileB), cmp.Compare(lineA, lineB), strings.Compare(a.Object, b.Object))
	})
}

func splitSource(source string) (file string, line int) {
	colon := strings.LastIndexByte(source, ':')
	if colon < 0 {
		return source, 0
	}
	line, _ = strconv.Atoi(source[colon+1:])
	return source[:colon], line
}
