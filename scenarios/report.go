package scenarios

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/entente-mesh/entente/internal/daemon"
)

// Report is what was asserted and measured, as --json writes it.
type Report struct {
	OK          bool     `json:"ok"`
	Scenario    string   `json:"scenario"`
	Seconds     float64  `json:"seconds"`
	Steps       []Step   `json:"steps"`
	Failover    Failover `json:"failover"`
	RSSTotalMiB float64  `json:"rss_total_mib"` // sum over all processes, shared pages counted in each
	PSSTotalMiB float64  `json:"pss_total_mib"` // shared pages counted once
	Processes   int      `json:"processes"`
}

// Step is one step of the story.
type Step struct {
	Name    string      `json:"name"`
	OK      bool        `json:"ok"`
	Seconds float64     `json:"seconds"`
	Checks  []Assertion `json:"checks"`
}

// Assertion is one thing that had to hold.
type Assertion struct {
	What string `json:"what"`
	Want string `json:"want"`
	Got  string `json:"got"`
	OK   bool   `json:"ok"`
}

// Failover is what the loss of a datacenter cost, over all groups of clients.
// Requests and failures are those of idempotent requests; others stand in Groups.
type Failover struct {
	Requests       int             `json:"requests"`
	Failed         int             `json:"failed"`
	LongestGapMS   float64         `json:"longest_gap_ms"`
	SwitchedMS     float64         `json:"switched_ms"` // -1: never
	Attempts       int             `json:"attempts"`
	OutcomeUnknown int             `json:"outcome_unknown"`
	P50MS          float64         `json:"p50_ms"`
	P99MS          float64         `json:"p99_ms"`
	Groups         []FailoverGroup `json:"groups"`
}

// FailoverGroup is one group of clients.
type FailoverGroup struct {
	Name           string         `json:"name"`
	Idempotent     bool           `json:"idempotent"` // false: stands in no sum but that of unknown outcomes
	Requests       int            `json:"requests"`
	Failed         int            `json:"failed"`
	LongestGapMS   float64        `json:"longest_gap_ms"`
	SwitchedMS     float64        `json:"switched_ms"`
	Attempts       int            `json:"attempts"`
	OutcomeUnknown int            `json:"outcome_unknown"`
	P50MS          float64        `json:"p50_ms"`
	P99MS          float64        `json:"p99_ms"`
	MaxMS          float64        `json:"max_ms"`
	ServedBefore   map[string]int `json:"served_before"` // good answers by datacenter, before the loss
	ServedAfter    map[string]int `json:"served_after"`
	Errors         map[string]int `json:"errors,omitempty"`
}

// writeJSON writes the report to a file.
func (r *Report) writeJSON(file string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	return daemon.WriteFileAtomic(file, append(text, '\n'), 0o644)
}

// failed counts the assertions that did not hold, and all.
func (r *Report) failed() (failed, all int) {
	for _, step := range r.Steps {
		for _, c := range step.Checks {
			all++
			if !c.OK {
				failed++
			}
		}
	}
	return failed, all
}

// narrator writes the story as it happens.
type narrator struct{ out io.Writer }

func (n *narrator) line(format string, args ...any) { fmt.Fprintf(n.out, "    "+format+"\n", args...) }

func (n *narrator) chapter(number int, name string) { fmt.Fprintf(n.out, "\n%d  %s\n", number, name) }

func (n *narrator) took(seconds float64) { n.line("(%.1f s)", seconds) }

func (n *narrator) check(ok bool, what, want, got string) {
	word := "ok  "
	if !ok {
		word = "FAIL"
	}
	if ok && got == want {
		n.line("%s %s: %s", word, what, got)
		return
	}
	n.line("%s %s: %s (wanted: %s)", word, what, got, want)
}

// table writes what was asserted and measured, one line each.
func (n *narrator) table(r *Report) {
	fmt.Fprintf(n.out, "\n%-34s %7s  %s\n", "STEP", "SECONDS", "ASSERTED")
	for i, step := range r.Steps {
		held := 0
		for _, c := range step.Checks {
			if c.OK {
				held++
			}
		}
		verdict := fmt.Sprintf("%d of %d", held, len(step.Checks))
		if !step.OK {
			verdict += "   FAILED"
		}
		fmt.Fprintf(n.out, "%-34s %7.1f  %s\n", fmt.Sprintf("%d %s", i+1, clip(step.Name, 31)), step.Seconds, verdict)
		for _, c := range step.Checks {
			if !c.OK {
				fmt.Fprintf(n.out, "    FAIL %s: %s (wanted: %s)\n", c.What, firstLine(c.Got), c.Want)
			}
		}
	}
	if f := r.Failover; len(f.Groups) > 0 {
		fmt.Fprintf(n.out, "\n%-22s %8s %6s %9s %8s %11s %11s %8s %8s\n", "LOSS OF A DATACENTER", "REQUESTS", "FAILED", "ATTEMPTS", "UNKNOWN", "LONGEST GAP", "SWITCHED", "P50", "P99")
		for _, g := range f.Groups {
			fmt.Fprintf(n.out, "%-22s %8d %6d %9d %8d %8.1f ms %8.1f ms %5.1f ms %5.1f ms\n",
				clip(g.Name, 22), g.Requests, g.Failed, g.Attempts, g.OutcomeUnknown, g.LongestGapMS, g.SwitchedMS, g.P50MS, g.P99MS)
		}
	}
	failed, all := r.failed()
	fmt.Fprintf(n.out, "\n%d processes, %.0f MiB resident (%.0f MiB with shared pages counted once), %.1f s\n", r.Processes, r.RSSTotalMiB, r.PSSTotalMiB, r.Seconds)
	if r.OK {
		fmt.Fprintf(n.out, "all %d assertions held\n", all)
	} else {
		fmt.Fprintf(n.out, "%d of %d assertions FAILED\n", failed, all)
	}
}

func clip(s string, most int) string {
	if runes := []rune(s); len(runes) > most {
		return string(runes[:most-1]) + "\u2026"
	}
	return s
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}
