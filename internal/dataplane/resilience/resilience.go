// Package resilience holds the rules of trying again: what may be tried again, how
// often, and who is left out for a while. Time arrives as an argument.
package resilience

import (
	"math"
	"net/http"
	"sync"
	"time"
)

// Idempotent reports whether a request may be sent twice: by its method (RFC 9110
// section 9.2.2), or because the caller says so with an Idempotency-Key.
func Idempotent(method string, h http.Header) bool {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodPut, http.MethodDelete, http.MethodTrace:
		return true
	}
	return h.Get("Idempotency-Key") != ""
}

// Budget bounds the retries of a hop: a share of its requests plus a floor, over a
// sliding window of about ten seconds. Retries of several hops multiply; a budget
// at each keeps the sum small. Safe for concurrent use.
type Budget struct {
	mu      sync.Mutex
	share   float64
	floor   float64 // per second
	balance float64
	last    time.Time
}

const budgetWindow = 10 // seconds

// NewBudget allows share (0.2: one retry in five requests) plus floor per second.
func NewBudget(share, floor float64, now time.Time) *Budget {
	return &Budget{share: share, floor: floor, balance: floor * budgetWindow, last: now}
}

func (b *Budget) pass(now time.Time) {
	dt := now.Sub(b.last).Seconds()
	if dt <= 0 {
		return
	}
	b.last = now
	// Old deposits fade away with a time constant of the window; the floor flows in.
	keep := math.Exp(-dt / budgetWindow)
	b.balance = b.balance*keep + b.floor*budgetWindow*(1-keep)
}

// Request deposits for one request.
func (b *Budget) Request(now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.pass(now)
	b.balance += b.share
}

// Retry withdraws one retry and reports whether there was one.
func (b *Budget) Retry(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.pass(now)
	if b.balance < 1 {
		return false
	}
	b.balance--
	return true
}

// Backoff is an exponential delay with a ceiling. The zero value is not useful.
type Backoff struct {
	Base, Max time.Duration
	n         int
}

// Next returns the delay before the next try; r in [0, 1) spreads it over the upper half.
func (b *Backoff) Next(r float64) time.Duration {
	d := b.Base << min(b.n, 20)
	if d <= 0 || d > b.Max {
		d = b.Max
	}
	b.n++
	return d/2 + time.Duration(r*float64(d/2))
}

// Reset starts again at Base.
func (b *Backoff) Reset() { b.n = 0 }

// Health is what one endpoint has shown. An endpoint is left out from its first
// failure until a probe or a request succeeds and it has then been good for the
// hold time. Safe for concurrent use; the zero value is a healthy endpoint.
type Health struct {
	mu      sync.Mutex
	down    bool
	good    time.Time // since when probes succeed; zero: they do not
	probeAt time.Time
	backoff Backoff
}

const (
	probeBase = 200 * time.Millisecond
	probeMax  = 5 * time.Second
)

// Fail leaves the endpoint out. It reports whether that is new.
func (h *Health) Fail(now time.Time, r float64) (ejected bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	ejected = !h.down
	if ejected {
		h.backoff = Backoff{Base: probeBase, Max: probeMax}
	}
	if ejected || !h.good.IsZero() || !now.Before(h.probeAt) {
		h.probeAt = now.Add(h.backoff.Next(r))
	}
	h.down, h.good = true, time.Time{}
	return ejected
}

// OK says that the endpoint answered a probe or a request.
func (h *Health) OK(now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.down || !h.good.IsZero() {
		return
	}
	h.good = now
	h.backoff.Reset()
}

// Available reports whether the endpoint may be chosen. hold is how long it must
// have been good again.
func (h *Health) Available(now time.Time, hold time.Duration) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.down {
		return true
	}
	if h.good.IsZero() || now.Sub(h.good) < hold {
		return false
	}
	h.down = false
	return true
}

// ProbeDue reports whether a probe should be made now, and if so when the next
// one is due should nobody report before.
func (h *Health) ProbeDue(now time.Time, r float64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.down || now.Before(h.probeAt) {
		return false
	}
	h.probeAt = now.Add(h.backoff.Next(r))
	return true
}

// Failback keeps the requests of one service at the group that serves them until a
// more preferred one has been available for the hold time. Safe for concurrent use.
type Failback[K comparable] struct {
	mu        sync.Mutex
	current   K
	candidate K
	since     time.Time
	chosen    bool
}

// Choose returns the index of the group to begin with, of those that are available,
// in order of preference; -1 if none is. never: a more preferred group is not taken
// again while the current one is available.
func (f *Failback[K]) Choose(now time.Time, keys []K, available []bool, hold time.Duration, never bool) int {
	best, current := -1, -1
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, ok := range available {
		if !ok {
			continue
		}
		if best < 0 {
			best = i
		}
		if f.chosen && current < 0 && keys[i] == f.current {
			current = i
		}
	}
	if best < 0 {
		return -1
	}
	if current < 0 || current == best { // also: the candidate was lost again
		f.take(keys[best])
		return best
	}
	if f.since.IsZero() || f.candidate != keys[best] {
		f.candidate, f.since = keys[best], now
	}
	if never || now.Sub(f.since) < hold {
		return current
	}
	f.take(keys[best])
	return best
}

func (f *Failback[K]) take(k K) {
	f.current, f.chosen, f.since = k, true, time.Time{}
}

// Penalty leaves out, for a growing while, somebody who lives but could not serve.
// Safe for concurrent use; the zero value is no penalty.
type Penalty struct {
	mu      sync.Mutex
	until   time.Time
	backoff Backoff
}

const (
	penaltyBase = 200 * time.Millisecond
	penaltyMax  = 5 * time.Second
)

// Fail begins a penalty, longer than the one before. While one lasts, it does nothing.
func (p *Penalty) Fail(now time.Time, r float64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if now.Before(p.until) {
		return
	}
	p.backoff.Base, p.backoff.Max = penaltyBase, penaltyMax
	p.until = now.Add(p.backoff.Next(r))
}

// OK ends it.
func (p *Penalty) OK() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.until = time.Time{}
	p.backoff.Reset()
}

// Available reports whether there is none at this time.
func (p *Penalty) Available(now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !now.Before(p.until)
}
