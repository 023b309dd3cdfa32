package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/entente-mesh/entente/scenarios/process"
)

// suite is what one verb measures.
type suite struct {
	name, short string
	lines       []line
	groups      []group // of all lines but those of the run
}

var suites = []*suite{&caSuite, &agentSuite, &dataplaneSuite, &linksSuite}

// line is one number.
type line struct {
	name   string
	unit   string
	what   string
	target float64 // in microseconds: where a verification takes referenceVerifyUS
	peer   float64 // SPIRE's on a machine of this kind
}

// none is a target that was not set, a value of SPIRE's that is not known.
const none = -1

// up tells whether more is better.
func (l line) up() bool {
	return strings.HasSuffix(l.name, "_per_s") || strings.Contains(l.name, "_rate_")
}

// limit is the target where one verification takes so many microseconds; 0: not known.
func (l line) limit(verifyUS float64) float64 {
	if l.unit != "us" || l.target == none {
		return l.target
	}
	return rounded(l.target * max(1, verifyUS/referenceVerifyUS))
}

// met tells whether a value reaches a limit.
func (l line) met(value, limit float64) bool {
	if l.up() {
		return value >= limit
	}
	return value <= limit
}

func (s *suite) line(name string) (line, bool) {
	i := slices.IndexFunc(s.lines, func(l line) bool { return l.name == name })
	if i < 0 {
		return line{}, false
	}
	return s.lines[i], true
}

// group measures lines that need the same processes.
type group struct {
	lines   []string
	measure func(context.Context, *bench) error
}

// result is one measured line, as --json writes it.
type result struct {
	Name  string   `json:"name"`
	Value *float64 `json:"value"` // null: it could not be measured; the note says why
	Unit  string   `json:"unit"`
	N     int      `json:"n"` // items that were measured
	Note  string   `json:"note"`
	// VerifyUS is what one verification took just then, of lines in microseconds.
	VerifyUS float64 `json:"verify_us,omitempty"`

	// Turns compare with the other build of --binary.
	Turns *turns `json:"turns,omitempty"`
}

type options struct {
	suite    *suite
	json     string
	markdown string
	from     string
	only     []string
	quick    bool
	binary   string // another build, measured in turn with the source's
	rounds   int    // how often then
	built    string // the source's build if it is there already: in tests

	out, progress io.Writer
}

// bench is one run.
type bench struct {
	*options
	exe       string // the entente that is measured
	dir       string // its own, removed at the end
	host      string // loopback address that no other program uses
	processes *process.Supervisor
	domains   int
	results   []result
	verifyUS  []float64 // what one verification took, each time that it was measured
}

func run(ctx context.Context, o *options) (err error) {
	for _, name := range o.only {
		if _, ok := o.suite.line(name); !ok {
			return fmt.Errorf("%s measures no %q; see --list", o.suite.name, name)
		}
	}
	if o.binary != "" && (o.markdown != "" || o.from != "") {
		return errors.New("--binary compares two builds: the page has no place for that, and --from measures nothing")
	}
	if o.binary != "" && o.rounds < 1 {
		return fmt.Errorf("--rounds %d: each build is measured at least once", o.rounds)
	}
	b := &bench{options: o}
	if o.from != "" {
		err = b.read()
	} else {
		err = b.measure(ctx)
	}
	// What was measured before something failed is worth keeping.
	if o.json != "" && o.from == "" {
		err = errors.Join(err, b.write())
	}
	if o.markdown != "" && err == nil {
		err = b.writePage()
	}
	return err
}

// measure runs the groups one after the other. What fails keeps nothing else from being
// measured.
func (b *bench) measure(ctx context.Context) (err error) {
	if _, err := process.CPUOf(os.Getpid()); err != nil {
		return fmt.Errorf("processor time of other processes cannot be read on this system: %w", err)
	}
	if b.dir, err = os.MkdirTemp("", "entente-bench-"); err != nil {
		return err
	}
	b.processes = process.New()
	defer context.AfterFunc(ctx, b.processes.Close)() // an interrupt ends them at once, whatever waits for them here
	defer func() {
		b.processes.Close()
		err = errors.Join(err, os.RemoveAll(b.dir))
	}()
	b.host = fmt.Sprintf("127.%d.%d.%d", 64+rand.IntN(128), rand.IntN(256), 1+rand.IntN(254))
	if err := b.build(ctx); err != nil {
		return err
	}

	b.tableHead()
	began := time.Now()
	var failures []error
	for _, g := range b.suite.groups {
		if !slices.ContainsFunc(g.lines, b.wants) {
			continue
		}
		begun, measure := time.Now(), b.measureGroup
		if b.binary != "" {
			measure = b.inTurn
		}
		failures = append(failures, measure(ctx, g))
		if ctx.Err() != nil {
			return ctx.Err()
		}
		b.say("%.0f s for %s", time.Since(begun).Seconds(), strings.Join(g.lines, ", "))
	}
	return errors.Join(append(failures, b.reportRun(began))...)
}

// measureGroup measures the lines of a group together, and if that fails, each of those
// that it leaves by itself. One that fails again stands in the results with the reason.
func (b *bench) measureGroup(ctx context.Context, g group) error {
	err := b.verify()
	if err == nil {
		err = g.measure(ctx, b)
	}
	var left []string
	for _, name := range g.lines {
		if b.wants(name) && !slices.ContainsFunc(b.results, func(r result) bool { return r.Name == name }) {
			left = append(left, name)
		}
	}
	if ctx.Err() != nil || len(left) == 0 {
		return err
	}
	if len(left) == 1 {
		return b.fail(left[0], err)
	}
	b.say("failed, each line by itself now: %v", err)
	var failures []error
	all := b.only
	defer func() { b.only = all }()
	for _, name := range left {
		b.only = []string{name}
		failures = append(failures, b.measureGroup(ctx, g))
	}
	return errors.Join(failures...)
}

// fail reports a line that could not be measured.
func (b *bench) fail(name string, err error) error {
	if err == nil {
		err = errors.New("nothing was reported")
	}
	l, _ := b.suite.line(name)
	b.take(l, result{Name: name, Unit: l.unit, Note: "FAILED: " + strings.ReplaceAll(err.Error(), "\n", "; ")})
	return fmt.Errorf("%s: %w", name, err)
}

// take adds a finished line to the results and to the table.
func (b *bench) take(l line, r result) {
	b.results = append(b.results, r)
	b.tableLine(l, r)
}

// build makes the binary as a release has it.
func (b *bench) build(ctx context.Context) (err error) {
	if b.binary != "" {
		if b.binary, err = exec.LookPath(b.binary); err == nil {
			b.binary, err = filepath.Abs(b.binary)
		}
		if err != nil {
			return fmt.Errorf("--binary: %w", err)
		}
	}
	if b.exe = b.built; b.exe != "" {
		return nil
	}
	b.say("building entente")
	b.exe = filepath.Join(b.dir, "entente")
	_, err = b.processes.Run(ctx, process.Spec{
		Name: "go build", Binary: "go", Env: []string{"CGO_ENABLED=0"},
		Args: []string{"build", "-trimpath", "-ldflags", "-s -w", "-o", b.exe, "github.com/entente-mesh/entente/cmd/entente"},
	})
	return err
}

// wants tells whether a line is to be measured.
func (b *bench) wants(name string) bool {
	return len(b.only) == 0 || slices.Contains(b.only, name) || name == verifyLine
}

// count is how many items are measured.
func (b *bench) count(full, quick int) int {
	if b.quick {
		return quick
	}
	return full
}

// while is how long something is done that is measured by the time.
func (b *bench) while() time.Duration {
	if b.quick {
		return 300 * time.Millisecond
	}
	return 4 * time.Second
}

// say is progress, for who waits.
func (b *bench) say(format string, args ...any) {
	fmt.Fprintf(b.progress, "%s "+format+"\n", append([]any{time.Now().Format("15:04:05")}, args...)...)
}

// report takes a number that was measured over n items.
func (b *bench) report(name string, value float64, n int, format string, args ...any) {
	if !b.wants(name) {
		return
	}
	l, ok := b.suite.line(name)
	if !ok {
		panic("no line " + name)
	}
	value = rounded(value)
	r := result{Name: name, Value: &value, Unit: l.unit, N: n, Note: fmt.Sprintf(format, args...)}
	if b.quick {
		r.Note = "--quick, not to be quoted; " + r.Note
	}
	if l.unit == "us" {
		r.VerifyUS = b.verifyUS[len(b.verifyUS)-1]
	}
	b.take(l, r)
}

// rounded keeps three digits: more would be noise.
func rounded(v float64) float64 {
	text := fmt.Sprintf("%.3g", v)
	if v >= 1000 {
		text = fmt.Sprintf("%.0f", v)
	}
	var out float64
	fmt.Sscan(text, &out)
	return out
}

func (b *bench) write() error {
	data, err := json.MarshalIndent(slices.Clip(append([]result{}, b.results...)), "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(b.json, append(data, '\n'), 0o644)
}

func (b *bench) read() error {
	data, err := os.ReadFile(b.from)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, &b.results); err != nil {
		return fmt.Errorf("%s: %w", b.from, err)
	}
	b.tableHead()
	for _, r := range b.results {
		l, ok := b.suite.line(r.Name)
		if !ok {
			return fmt.Errorf("%s: %s measures no %q", b.from, b.suite.name, r.Name)
		}
		b.tableLine(l, r)
	}
	return nil
}

// percentile is the value that p of 100 do not exceed. It sorts.
func percentile(times []time.Duration, p int) time.Duration {
	if len(times) == 0 {
		return 0
	}
	slices.Sort(times)
	return times[min(len(times)*p/100, len(times)-1)]
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// perItem is processor time for each of n, in microseconds.
func perItem(cpu time.Duration, n int) float64 {
	return float64(cpu) / float64(time.Microsecond) / float64(max(n, 1))
}

const mib = 1 << 20
