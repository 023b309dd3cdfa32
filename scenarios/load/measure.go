// Package load sends requests at a constant rate whatever happens to them (open
// loop), records each, and computes from the records what a failure cost.
//
// A request has a scheduled instant. It leaves then even if those before it have
// no answer yet, and its latency counts from that instant, so that a system that
// stalls cannot hide it by slowing its clients down (coordinated omission).
package load

import (
	"math"
	"slices"
	"time"
)

// Sample is one recorded request.
type Sample struct {
	Scheduled time.Time `json:"scheduled"`
	Done      time.Time `json:"done"`      // when its answer was complete, or it was given up
	OK        bool      `json:"ok"`        // a good answer within its deadline
	ServedBy  []string  `json:"served_by"` // datacenters that the answer names, each once, sorted
	Attempts  int       `json:"attempts"`  // how often the client sent it
	Unknown   bool      `json:"unknown"`   // not OK, and it may have taken effect
	RequestID string    `json:"request_id"`
	Error     string    `json:"error,omitempty"` // short and countable
}

// from reports whether the answer is good and every part of it came from dc.
func (s Sample) from(dc string) bool {
	return s.OK && len(s.ServedBy) == 1 && s.ServedBy[0] == dc
}

// Result is what a group of clients saw of a failure.
type Result struct {
	Requests, Failed  int
	Attempts, Unknown int
	LongestGap        time.Duration // see LongestGap
	Switched          time.Duration // see Switched; -1: never
	P50, P99, Max     time.Duration // of good answers, from the scheduled instants
	Before, After     map[string]int
	Errors            map[string]int
}

// Measure computes a Result from the requests that were scheduled in [.., end) and
// a failure inside that time, after which to has to serve alone.
func Measure(samples []Sample, failure, end time.Time, to string) Result {
	r := Result{Before: map[string]int{}, After: map[string]int{}, Errors: map[string]int{}}
	var window []Sample
	for _, s := range samples {
		if !s.Scheduled.Before(end) {
			continue
		}
		window = append(window, s)
		r.Requests++
		r.Attempts += s.Attempts
		if s.Unknown {
			r.Unknown++
		}
		if !s.OK {
			r.Failed++
			r.Errors[s.Error]++
			continue
		}
		served := r.After
		if s.Done.Before(failure) {
			served = r.Before
		}
		for _, dc := range s.ServedBy {
			served[dc]++
		}
	}
	latencies := Latencies(samples, end)
	slices.Sort(latencies)
	r.P50, r.P99, r.Max = Quantile(latencies, 0.50), Quantile(latencies, 0.99), Quantile(latencies, 1)
	r.LongestGap = LongestGap(window, failure, end)
	r.Switched = Switched(window, failure, to)
	return r
}

// LongestGap is the longest time without a good answer that ends after the
// failure: between two good answers next to each other, or from the last one to end
// if requests failed after it.
func LongestGap(samples []Sample, failure, end time.Time) time.Duration {
	var good []time.Time
	var lastBad time.Time
	for _, s := range samples {
		if s.OK {
			good = append(good, s.Done)
		} else if s.Done.After(lastBad) {
			lastBad = s.Done
		}
	}
	if len(good) == 0 {
		return end.Sub(failure)
	}
	slices.SortFunc(good, time.Time.Compare)
	longest := time.Duration(0)
	for i := 1; i < len(good); i++ {
		if good[i].After(failure) {
			longest = max(longest, good[i].Sub(good[i-1]))
		}
	}
	if last := good[len(good)-1]; lastBad.After(last) {
		longest = max(longest, end.Sub(last), lastBad.Sub(last))
	}
	return longest
}

// Switched is the time from the failure until from then on all answers were good
// and came from to alone: the moment of the first such answer after the last other
// one. -1: there is no such moment. A failed request counts when it was given up.
func Switched(samples []Sample, failure time.Time, to string) time.Duration {
	last := failure
	for _, s := range samples {
		if s.Done.After(last) && !s.from(to) {
			last = s.Done
		}
	}
	first, found := time.Duration(math.MaxInt64), false
	for _, s := range samples {
		if s.from(to) && s.Done.After(last) {
			first, found = min(first, s.Done.Sub(failure)), true
		}
	}
	if !found {
		return -1
	}
	return first
}

// Share returns the samples, in the order of their answers, that were scheduled at or
// after since and that dc alone answered well.
func Share(samples []Sample, since time.Time, dc string) []Sample {
	var share []Sample
	for _, s := range samples {
		if s.from(dc) && !s.Scheduled.Before(since) {
			share = append(share, s)
		}
	}
	slices.SortStableFunc(share, func(a, b Sample) int { return a.Done.Compare(b.Done) })
	return share
}

// Due is how many requests of a load at a rate were due before a moment, by the first
// of its samples, and how many of them have been recorded. Nothing is due before the
// first sample.
func Due(samples []Sample, rate float64, before time.Time) (due, recorded int) {
	if len(samples) == 0 {
		return 1, 0
	}
	first := samples[0].Scheduled
	for _, s := range samples {
		if s.Scheduled.Before(first) {
			first = s.Scheduled
		}
		if s.Scheduled.Before(before) {
			recorded++
		}
	}
	// A hair less: the instants are rounded to nanoseconds.
	return int(math.Ceil(before.Sub(first).Seconds()*rate - 1e-3)), recorded
}

// Latencies lists those of the good answers to requests scheduled before end.
func Latencies(samples []Sample, end time.Time) []time.Duration {
	var list []time.Duration
	for _, s := range samples {
		if s.OK && s.Scheduled.Before(end) {
			list = append(list, s.Done.Sub(s.Scheduled))
		}
	}
	return list
}

// Quantile returns the q-quantile of a sorted list by the nearest rank, q in (0, 1];
// 0 for an empty list.
func Quantile(sorted []time.Duration, q float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	rank := int(math.Ceil(q * float64(len(sorted))))
	return sorted[min(max(rank, 1), len(sorted))-1]
}
