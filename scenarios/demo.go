// Package scenarios replays a whole platform on one machine, with real processes
// of this binary, real certificates and real requests, and measures what happens.
//
// A scenario is one YAML file: trust domains, datacenters, services, agreements,
// and a story of typed steps with the thresholds they must keep.
package scenarios

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"runtime"
	"time"
)

// FinancialPlatform is the scenario that the demo replays unless it is given another.
//
//go:embed financial-platform.yaml
var FinancialPlatform []byte

// ErrFailed: the story ran, and at least one of its assertions did not hold.
var ErrFailed = errors.New("assertions failed")

// Options say how a scenario is replayed.
type Options struct {
	File     string // scenario to replay; empty: FinancialPlatform
	Binary   string // the entente binary that every process runs; empty: os.Executable
	WorkDir  string // kept afterwards; must be empty or absent. Empty: a temporary directory, removed at the end
	JSONFile string // where the report is written too; empty: nowhere
	Keep     bool   // stay up after the story until ctx ends
	// OneAddress puts every host at 127.0.0.1, with ports of its own, as is done by itself
	// where the system has no further loopback addresses.
	OneAddress bool
	Verbose    bool      // say what is started, and every leg and request that was looked at
	Out        io.Writer // the narrative
}

// Demo replays a scenario: it starts every process, plays the story, measures, and
// ends every process and removes its directory before it returns, whatever happened.
// The report is nil only if nothing could be started; the error is ErrFailed (wrapped)
// if an assertion did not hold, and ctx's if it was interrupted.
func Demo(ctx context.Context, o Options) (report *Report, err error) {
	began := time.Now()
	if o.Out == nil {
		o.Out = io.Discard
	}
	scenario, err := ReadFile(o.File)
	if err != nil {
		return nil, err
	}
	if runtime.GOOS != "linux" {
		return nil, fmt.Errorf("a scenario needs Linux: on %s there is no way to see which process owns a local TCP connection, by which callers are recognised", runtime.GOOS)
	}
	w, err := newWorld(&scenario.Spec, o)
	if err != nil {
		return nil, fmt.Errorf("prepare scenario %s: %w", scenario.Metadata.Name, err)
	}
	defer func() { err = errors.Join(err, w.Close()) }()

	say := &narrator{o.Out}
	fmt.Fprintf(o.Out, "%s: %s\n", scenario.Metadata.Name, scenario.Metadata.Title)
	say.line("%d processes, in %s", len(w.units), w.dir)
	if w.one {
		say.line("every host is %s, and has ports of its own", onlyAddress)
	}
	if w.note != "" {
		say.line("other addresses than usual are used, since %s", w.note)
	}
	report = &Report{Scenario: scenario.Metadata.Name, Steps: []Step{}}
	s := &story{world: w, report: report, say: say}
	defer s.stop()
	err = s.play(ctx)
	if ctx.Err() != nil {
		return report, ctx.Err()
	}
	report.Seconds = time.Since(began).Seconds()
	report.finish(scenario.Spec.Limits, err)
	say.table(report)
	if o.JSONFile != "" {
		err = errors.Join(err, report.writeJSON(o.JSONFile))
	}
	if o.Keep && len(w.supervisor.Running()) > 0 {
		s.stop()
		forget, announceErr := w.announce()
		if announceErr != nil {
			say.line("`entente run` will need --agent-socket and --ca-socket: %v", announceErr)
			forget = func() error { return nil }
		}
		w.describe(o.Out)
		<-ctx.Done()
		err = errors.Join(err, forget())
	}
	if failed, all := report.failed(); failed > 0 {
		err = errors.Join(fmt.Errorf("%d of %d %w", failed, all, ErrFailed), err)
	}
	return report, err
}

// finish judges the run as a whole.
func (r *Report) finish(limits Limits, err error) {
	whole := Step{Name: "the run as a whole", Seconds: r.Seconds, OK: true, Checks: []Assertion{}}
	check := func(ok bool, what, want, got string) {
		whole.Checks = append(whole.Checks, Assertion{What: what, Want: want, Got: got, OK: ok})
		whole.OK = whole.OK && ok
	}
	if limits.Time > 0 && err == nil {
		check(r.Seconds <= limits.Time.Seconds(), "time", fmt.Sprintf("at most %s", limits.Time), fmt.Sprintf("%.1f s", r.Seconds))
	}
	if limits.MemoryMiB > 0 {
		check(r.RSSTotalMiB <= float64(limits.MemoryMiB), "resident memory of all processes", fmt.Sprintf("at most %d MiB", limits.MemoryMiB), fmt.Sprintf("%.0f MiB", r.RSSTotalMiB))
	}
	if len(whole.Checks) > 0 {
		r.Steps = append(r.Steps, whole)
	}
	failed, _ := r.failed()
	r.OK = err == nil && failed == 0
}

// describe says what can be tried while everything stays up.
func (w *world) describe(out io.Writer) {
	fmt.Fprintf(out, "\nEverything stays up until Ctrl-C. To try, from another terminal:\n\n  cd %s\n", w.dir)
	if w.users != nil {
		token, err := w.users.token("good", "you", "gold")
		if err == nil {
			err = w.write(w.file("phone.jwt"), []byte(token))
		}
		if err == nil {
			for _, address := range w.edges(w.users.edge.In[0]) {
				for _, l := range w.spec.Load {
					if l.From == phone && l.Method == http.MethodGet {
						fmt.Fprintf(out, "  curl --cacert edge-ca.crt -H \"Authorization: Bearer $(cat phone.jwt)\" https://%s%s\n", address, l.URL)
						break
					}
				}
			}
		}
	}
	for i := range w.spec.TrustDomains {
		td := &w.spec.TrustDomains[i]
		fmt.Fprintf(out, "  bin/entente ca status --socket %s\n", w.find(kindCA, td.Name, td.CA[0]).socket)
	}
	if td := w.spec.TrustDomains[len(w.spec.TrustDomains)-1]; len(td.Mesh) > 0 {
		fmt.Fprintf(out, "\nA program of your own joins with:\n\n  bin/entente run --domain %s --service mine --port 9000 -- python3 -m http.server 9000\n", td.Name)
	}
	fmt.Fprintf(out, "\nEach process has its log beside its config.yaml; those of the mesh have access.jsonl too:\n\n")
	for _, u := range w.units {
		p := w.process(u)
		if p == nil {
			continue
		}
		where := "no admin listener: an application"
		if u.admin != "" {
			where = "http://" + u.admin + "/metrics"
		}
		fmt.Fprintf(out, "  %-30s pid %-7d %-36s %s\n", u.name, p.PID(), where, filepath.Join(u.datacenter, u.name))
	}
}
