package resilience

import (
	"net/http"
	"testing"
	"time"
)

var t0 = time.Unix(1_000_000, 0)

func at(seconds float64) time.Time { return t0.Add(time.Duration(seconds * float64(time.Second))) }

func TestIdempotent(t *testing.T) {
	for method, want := range map[string]bool{"GET": true, "HEAD": true, "OPTIONS": true, "PUT": true, "DELETE": true, "TRACE": true,
		"POST": false, "PATCH": false, "CONNECT": false, "get": false, "QUERY": false} {
		if Idempotent(method, http.Header{}) != want {
			t.Errorf("%s: not %v", method, want)
		}
	}
	if !Idempotent("POST", http.Header{"Idempotency-Key": {"k"}}) {
		t.Error("a key makes it so")
	}
}

func TestBudget(t *testing.T) {
	b := NewBudget(0.2, 10, t0)
	n := 0
	for b.Retry(t0) {
		n++
	}
	if n != 100 {
		t.Errorf("%d retries at once, want ten seconds of the floor", n)
	}
	// A thousand requests a second, each wanting a retry, for a minute.
	retries, requests := 0, 0
	for i := range 60_000 {
		now := at(float64(i) / 1000)
		b.Request(now)
		requests++
		if b.Retry(now) {
			retries++
		}
	}
	if share := float64(retries) / float64(requests); share > 0.22 || share < 0.19 {
		t.Errorf("%.3f retries for a request", share)
	}
	// An idle while gives the floor back, and no more.
	n = 0
	for b.Retry(at(1000)) {
		n++
	}
	if n < 99 || n > 100 {
		t.Errorf("%d after an idle while", n)
	}
}

func TestHealth(t *testing.T) {
	var h Health
	hold := 2 * time.Second
	if !h.Available(t0, hold) || h.ProbeDue(t0, 0) {
		t.Fatal("it begins healthy")
	}
	if !h.Fail(t0, 0) || h.Fail(t0, 0) {
		t.Error("the first failure ejects, the second does not")
	}
	if h.Available(at(100), hold) {
		t.Error("time alone mends nothing")
	}
	// Probes back off from 100-200 ms to 2.5-5 s.
	probes, now := 0, t0
	for now.Before(at(60)) {
		if h.ProbeDue(now, 0.5) {
			probes++
			h.Fail(now, 0.5)
		}
		now = now.Add(10 * time.Millisecond)
	}
	if probes < 12 || probes > 30 {
		t.Errorf("%d probes in a minute", probes)
	}
	h.OK(at(60))
	if h.Available(at(61), hold) {
		t.Error("before the hold time is over")
	}
	h.Fail(at(61), 0)
	h.OK(at(62))
	if h.Available(at(63.5), hold) {
		t.Error("a relapse starts the hold time again")
	}
	if !h.Available(at(64), hold) {
		t.Error("after the hold time")
	}
	if !h.Fail(at(65), 0) {
		t.Error("a new failure is a new ejection")
	}
}

func TestPenalty(t *testing.T) {
	var p Penalty
	if !p.Available(t0) {
		t.Fatal("none at first")
	}
	p.Fail(t0, 0)
	p.Fail(t0, 0) // the same burst
	if p.Available(at(0.05)) || !p.Available(at(0.2)) {
		t.Error("the first is short")
	}
	p.Fail(at(0.2), 0)
	if p.Available(at(0.35)) || !p.Available(at(0.41)) {
		t.Error("the second is twice as long")
	}
	p.OK()
	p.Fail(at(1), 0)
	if !p.Available(at(1.11)) {
		t.Error("success forgets")
	}
}

func TestFailback(t *testing.T) {
	var f Failback[string]
	keys, hold := []string{"dc1", "dc2"}, 10*time.Second
	step := func(seconds float64, dc1, dc2 bool, want int) {
		t.Helper()
		if got := f.Choose(at(seconds), keys, []bool{dc1, dc2}, hold, false); got != want {
			t.Errorf("at %v: %d, want %d", seconds, got, want)
		}
	}
	step(0, true, true, 0)
	step(1, false, true, 1) // lost
	step(2, true, true, 1)  // back, held
	step(5, false, true, 1) // lost again: the hold time starts over...
	step(6, true, true, 1)
	step(12, true, true, 1)
	step(16, true, true, 0)
	step(17, false, false, -1)
	step(18, false, true, 1)
	step(19, true, false, 0) // the current one is gone: no hold

	var manual Failback[string]
	manual.Choose(at(0), keys, []bool{false, true}, 0, true)
	if manual.Choose(at(1e6), keys, []bool{true, true}, 0, true) != 1 {
		t.Error("manual means manual")
	}
	if manual.Choose(at(1e6), keys, []bool{true, false}, 0, true) != 0 {
		t.Error("but not to go nowhere")
	}
}
