package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// logged makes a process's log and returns what was written to it since the last call.
func logged(t *testing.T, level string) (*slog.Logger, func() []map[string]any) {
	t.Helper()
	var out bytes.Buffer
	log, err := NewLogger(&out, "json", level)
	if err != nil {
		t.Fatal(err)
	}
	return log, func() (lines []map[string]any) {
		t.Helper()
		for text := range strings.Lines(out.String()) {
			line := map[string]any{}
			if err := json.Unmarshal([]byte(text), &line); err != nil {
				t.Fatal(err)
			}
			lines = append(lines, line)
		}
		out.Reset()
		return lines
	}
}

// Nobody fills the disk of the log, whatever he has said there and as whom; others are
// still heard, and it is said how much is missing.
func TestNobodyFillsTheLog(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		log, since := logged(t, "info")
		refuse := func(log *slog.Logger, caller string) {
			log.Info("request refused", "request_id", "x", "caller", caller, "service", "accounts.example")
		}
		for range 10_000 {
			refuse(log, "spiffe://a.example/greedy")
		}
		if n := len(since()); n != linesOfOne {
			t.Errorf("one caller has %d lines", n)
		}
		refuse(log, "spiffe://a.example/other")
		if n := len(since()); n != 1 {
			t.Error("control: another caller has no line")
		}
		log.Warn("something else", "caller", "spiffe://a.example/greedy")
		if n := len(since()); n != 1 {
			t.Error("control: another message has no line")
		}
		time.Sleep(oneEvery)
		refuse(log, "spiffe://a.example/greedy")
		if lines := since(); len(lines) != 1 || lines[0]["more_since_last_line"] != float64(10_000-linesOfOne) {
			t.Errorf("what is missing is not said: %v", lines)
		}

		// Nor does it help to be many, or to be told apart by what With has given.
		time.Sleep(time.Hour)
		for i := range 10_000 {
			refuse(log, fmt.Sprint("spiffe://a.example/", i))
		}
		if n := len(since()); n != linesOfAll {
			t.Errorf("many callers have %d lines", n)
		}
		time.Sleep(time.Hour)
		with := log.With("part", "raft", "peer", "ca-2")
		for i := range 10_000 {
			with.Warn("refused", "peer_address", fmt.Sprintf("192.0.2.%d:%d", i%250, i))
		}
		if n := len(since()); n != linesOfOne {
			t.Errorf("one peer has %d lines", n)
		}
		for i := range 10_000 {
			log.Warn("refused", "peer_address", fmt.Sprintf("192.0.2.9:%d", i))
		}
		if n := len(since()); n != linesOfOne {
			t.Errorf("one address has %d lines", n)
		}

		// Over a long time each message has its rate, and no line is uncounted.
		log, since = logged(t, "info")
		said, counted := 0, 0
		const refusals = 20_000
		for i := range refusals {
			refuse(log, fmt.Sprint("spiffe://a.example/", i%500))
			time.Sleep(5 * time.Millisecond)
		}
		time.Sleep(time.Hour)
		for i := range 500 {
			refuse(log, fmt.Sprint("spiffe://a.example/", i))
		}
		for _, line := range since() {
			said++
			more, _ := line["more_since_last_line"].(float64)
			counted += int(more)
		}
		if most := linesOfAll + int(100*time.Second/allEvery) + 500; said > most || said < linesOfAll {
			t.Errorf("%d lines in 100 s, at most %d", said, most)
		}
		if said+counted != refusals+500 {
			t.Errorf("%d lines tell of %d more: not %d", said, counted, refusals+500)
		}
	})
}

// What is looked for, and what must not be missing, is written as it comes.
func TestLinesThatAreAlwaysWritten(t *testing.T) {
	t.Parallel()
	log, since := logged(t, "debug")
	act := strings.Repeat("x", 10_000)
	for range 3 * linesOfAll {
		log.Debug("attempt failed")
		log.Warn("administrative act that is missing in the audit log", "line", act)
	}
	lines := since()
	if len(lines) != 6*linesOfAll || lines[len(lines)-1]["line"] != act {
		t.Errorf("%d lines", len(lines))
	}
}

// A value has a length, whoever has chosen it, in access records as well.
func TestLongValuesAreCut(t *testing.T) {
	t.Parallel()
	log, since := logged(t, "info")
	long := "/" + strings.Repeat("ä", 30_000)
	log.InfoContext(context.Background(), "request refused", "path", long, "error", errors.New(long), "service", "accounts")
	line := since()[0]
	for _, key := range []string{"path", "error"} {
		if s, _ := line[key].(string); len(s) > longestValue+50 || !strings.HasPrefix(s, "/ää") || !strings.HasSuffix(s, "(60001 bytes)") {
			t.Errorf("%s has %d bytes: …%s", key, len(s), s[max(0, len(s)-40):])
		}
	}
	if line["service"] != "accounts" {
		t.Errorf("control: %v", line["service"])
	}
}
