package main

import (
	"bytes"
	"fmt"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

func (b *bench) tableHead() {
	if b.binary != "" {
		fmt.Fprintf(b.out, "%-26s %10s %10s %-4s %7s %15s  %s\n", "LINE", "THIS", "OTHER", "UNIT", "RATIO", "IN ROUNDS", "NOTE")
		return
	}
	fmt.Fprintf(b.out, "%-26s %10s %-4s %9s %9s %7s  %s\n", "LINE", "VALUE", "UNIT", "TARGET", "SPIRE", "RATIO", "NOTE")
}

func (b *bench) tableLine(l line, r result) {
	if b.binary != "" {
		b.turnsLine(r)
		return
	}
	value, unit, bound, ratio := r.columns(l)
	fmt.Fprintf(b.out, "%-26s %10s %-4s %9s %9s %7s  %s\n", r.Name, value, unit, bound, number(l.peer), ratio, r.Note)
}

func (r result) columns(l line) (value, unit, bound, ratio string) {
	limit := l.limit(r.VerifyUS)
	if r.Value == nil {
		return "FAILED", "", l.bound(nil, limit), "-"
	}
	return figure(*r.Value), r.Unit, l.bound(r.Value, limit), l.ratio(*r.Value)
}

// turnsLine is a line of two builds.
func (b *bench) turnsLine(r result) {
	value := func(v *float64) string {
		if v == nil {
			return "-"
		}
		return figure(*v)
	}
	t, rounds := r.Turns, "-"
	if t == nil { // of the machine
		t = &turns{}
	}
	if len(t.Ratios) > 0 {
		rounds = fmt.Sprintf("%.3f to %.3f", slices.Min(t.Ratios), slices.Max(t.Ratios))
	}
	fmt.Fprintf(b.out, "%-26s %10s %10s %-4s %7s %15s  %s\n", r.Name, value(r.Value), value(t.Other), r.Unit, value(t.Ratio), rounds, r.Note)
}

// number is a target or SPIRE's value for people.
func number(v float64) string {
	if v == none {
		return "-"
	}
	return figure(v)
}

// figure writes a value without an exponent.
func figure(v float64) string { return strconv.FormatFloat(v, 'f', -1, 64) }

// bound is the limit, marked when the value misses it or there is none.
func (l line) bound(value *float64, limit float64) string {
	if l.target == none {
		return "-"
	}
	sign, mark := "<= ", ""
	if l.up() {
		sign = ">= "
	}
	if value == nil || !l.met(*value, limit) {
		mark = " !"
	}
	return sign + figure(limit) + mark
}

// ratio is how many times better than the peer the value is.
func (l line) ratio(value float64) string {
	if l.peer == none || value == 0 {
		return "-"
	}
	ratio := l.peer / value
	if l.up() {
		ratio = value / l.peer
	}
	if ratio >= 10 {
		return fmt.Sprintf("%.0f x", ratio)
	}
	return fmt.Sprintf("%.1f x", ratio)
}

// writePage puts the table into the page, between the two comments that mark its place.
func (b *bench) writePage() error {
	page, err := os.ReadFile(b.markdown)
	if err != nil {
		return err
	}
	begin, end := fmt.Sprintf("<!-- bench %s -->\n", b.suite.name), fmt.Sprintf("<!-- bench %s ends -->", b.suite.name)
	i := bytes.Index(page, []byte(begin))
	j := bytes.Index(page, []byte(end))
	if i < 0 || j < i {
		return fmt.Errorf("%s has no place for this table: a line %q and below it %q", b.markdown, strings.TrimSpace(begin), end)
	}
	when := time.Now()
	if b.from != "" {
		info, err := os.Stat(b.from)
		if err != nil {
			return err
		}
		when = info.ModTime()
	}
	var out bytes.Buffer
	out.Write(page[:i+len(begin)])
	fmt.Fprintf(&out, "\nMade %s by `go run ./scenarios/bench %s` on %s.\n\n", when.UTC().Format(time.DateOnly), b.suite.name, machine())
	out.WriteString("| line | what | value | target | SPIRE | better by | n | note |\n|---|---|---|---|---|---|---|---|\n")
	for _, r := range b.results {
		l, _ := b.suite.line(r.Name)
		value, unit, bound, ratio := r.columns(l)
		value = strings.TrimSpace(value + " " + unit)
		bound, missed := strings.CutSuffix(bound, " !")
		if missed {
			value = "**" + value + "**"
		}
		fmt.Fprintf(&out, "| `%s` | %s | %s | %s | %s | %s | %d | %s |\n",
			r.Name, l.what, value, bound, number(l.peer), ratio, r.N, r.Note)
	}
	out.WriteString("\n")
	out.Write(page[j:])
	return os.WriteFile(b.markdown, out.Bytes(), 0o644)
}

// machine is the kind of machine that this is.
func machine() string {
	model := runtime.GOARCH
	info, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(info)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			model = strings.TrimSpace(value)
			break
		}
	}
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	release := regexp.MustCompile(`^\d+\.\d+`) // who built it says nothing
	return fmt.Sprintf("%d cores (%s), Linux %s, %s", runtime.NumCPU(), model, release.FindString(string(kernel)), runtime.Version())
}
