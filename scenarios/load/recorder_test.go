package load

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"
	"time"
)

var recordStart = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// answered is a good answer from dc1 to a request scheduled at an offset.
func answered(at, latency time.Duration) Sample {
	scheduled := recordStart.Add(at)
	return Sample{Scheduled: scheduled, Done: scheduled.Add(latency), OK: true, Attempts: 1, ServedBy: []string{"dc1"}}
}

func failed(at time.Duration, text string) Sample {
	s := answered(at, time.Second)
	s.OK, s.ServedBy, s.Error = false, nil, text
	return s
}

// Every quantile is between the exact one and 1/128 above it (and the microsecond that
// the histogram counts in).
func TestHistogramQuantiles(t *testing.T) {
	random := rand.New(rand.NewPCG(7, 7))
	for _, longest := range []time.Duration{50 * time.Microsecond, 3 * time.Millisecond, 40 * time.Second, 200 * time.Hour} {
		var first, second Histogram
		var exact []time.Duration
		for i := range 5000 {
			d := time.Duration(random.Int64N(int64(longest)))
			exact = append(exact, d)
			if i%2 == 0 {
				first.Add(d)
			} else {
				second.Add(d)
			}
		}
		first.Merge(&second)
		slices.Sort(exact)
		for _, q := range []float64{0.0001, 0.01, 0.5, 0.9, 0.99, 0.999, 1} {
			want := Quantile(exact, q).Truncate(time.Microsecond)
			if got := first.Quantile(q); got < want || got > want+want/128+time.Microsecond {
				t.Errorf("up to %s: quantile %v is %s, want %s or up to 1/128 more", longest, q, got, want)
			}
		}
	}
}

func TestHistogramEnds(t *testing.T) {
	var h Histogram
	if got := h.Quantile(0.5); got != 0 {
		t.Errorf("empty: %s, want 0", got)
	}
	h.Add(-time.Second)
	if got := h.Quantile(1); got != 0 {
		t.Errorf("negative: %s, want 0", got)
	}
	h.Add(1<<63 - 1)
	if got := h.Quantile(1); got < 200*365*24*time.Hour {
		t.Errorf("longest duration: %s", got)
	}
}

// A request belongs to the second it was scheduled in, however late its answer is, and
// its latency counts from that instant.
func TestRecorderCountsFromTheScheduledInstant(t *testing.T) {
	r := NewRecorder(recordStart)
	r.Add(answered(900*time.Millisecond, 3*time.Second))
	r.Add(answered(2*time.Second, time.Millisecond))
	lost := failed(2*time.Second, "refused")
	lost.Unknown, lost.Attempts = true, 2
	r.Add(lost)
	r.Add(answered(-time.Nanosecond, time.Millisecond))
	r.Add(answered(recorderSpan*time.Second, time.Millisecond))

	if r.Seconds() != 3 || r.Outside() != 2 {
		t.Errorf("%d seconds and %d requests outside, want 3 and 2", r.Seconds(), r.Outside())
	}
	if c := r.Between(0, 1); c.Good != 1 || c.Latency.Quantile(1) < 3*time.Second {
		t.Errorf("second 0: %d good, longest %s; want 1 good of at least 3s", c.Good, c.Latency.Quantile(1))
	}
	if c := r.Between(1, 2); c.Good+c.Failed != 0 {
		t.Errorf("second 1 has %d requests, want none", c.Good+c.Failed)
	}
	c := r.Between(-5, 99)
	if c.Good != 2 || c.Failed != 1 || c.Unknown != 1 || c.Attempts != 4 || c.ServedBy["dc1"] != 2 || c.Errors["refused"] != 1 {
		t.Errorf("all seconds: %+v", c)
	}
}

func TestRecorderKeepsRecordsAroundFailuresOnly(t *testing.T) {
	r := NewRecorder(recordStart)
	const before, after = 500, 500
	for i := range before {
		r.Add(answered(time.Duration(i)*time.Millisecond, time.Millisecond))
	}
	if records, _ := r.Records(); len(records) != 0 {
		t.Fatalf("%d records kept without a failure", len(records))
	}
	r.Add(failed(before*time.Millisecond, "refused"))
	for i := range after {
		r.Add(answered(time.Duration(before+1+i)*time.Millisecond, time.Millisecond))
	}
	records, dropped := r.Records()
	if len(records) != 2*aroundFailure+1 || dropped != 0 {
		t.Fatalf("%d records kept and %d dropped, want %d and 0", len(records), dropped, 2*aroundFailure+1)
	}
	for i, s := range records {
		if want := recordStart.Add(time.Duration(before-aroundFailure+i) * time.Millisecond); !s.Scheduled.Equal(want) {
			t.Fatalf("record %d was scheduled at %s, want %s", i, s.Scheduled, want)
		}
	}
	if records[aroundFailure].OK {
		t.Error("the failure is not in the middle of its records")
	}
}

// An outage with a new error text for every request fills neither memory nor tables,
// and every failure is still counted.
func TestRecorderIsBoundedInAnOutage(t *testing.T) {
	r := NewRecorder(recordStart)
	const requests = maxRecords + 500
	for i := range requests {
		r.Add(failed(time.Duration(i)*time.Millisecond, fmt.Sprint("error ", i)))
	}
	records, dropped := r.Records()
	if len(records) != maxRecords || dropped != 500 {
		t.Errorf("%d records kept and %d dropped, want %d and 500", len(records), dropped, maxRecords)
	}
	all, counted := r.Between(0, r.Seconds()), 0
	for _, n := range all.Errors {
		counted += n
	}
	if all.Failed != requests || counted != requests || len(all.Errors) > maxErrors+1 {
		t.Errorf("%d failed, %d by error, %d errors; want %d, %d, at most %d", all.Failed, counted, len(all.Errors), requests, requests, maxErrors+1)
	}
}

// A million requests at 5,000 a second, of which one second fails, stay under 64 MiB.
func TestRecorderMemoryOfAMillionRequests(t *testing.T) {
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	r := NewRecorder(recordStart)
	for i := range 1_000_000 {
		r.Add(numbered(i))
	}
	after := heap()
	if all := r.Between(0, r.Seconds()); all.Good+all.Failed != 1_000_000 || all.Failed != 5000 {
		t.Errorf("%d good and %d failed, want 995000 and 5000", all.Good, all.Failed)
	}
	if grown := int64(after) - int64(before); grown > 64<<20 {
		t.Errorf("a million requests take %d MiB, want at most 64", grown>>20)
	} else {
		t.Logf("a million requests take %d KiB", grown>>10)
	}
}

// numbered is the request n of an open load of 5,000 a second that fails in second 100.
func numbered(n int) Sample {
	at := time.Duration(n) * 200 * time.Microsecond
	if at/time.Second == 100 {
		return failed(at, "refused")
	}
	s := answered(at, time.Duration(n%50_000)*10*time.Microsecond)
	s.RequestID = fmt.Sprint("request-", n)
	return s
}

func BenchmarkRecorder(b *testing.B) {
	samples := make([]Sample, 1_000_000)
	for i := range samples {
		samples[i] = numbered(i)
	}
	b.ReportAllocs()
	var r *Recorder
	for n := 0; b.Loop(); n++ {
		if n%len(samples) == 0 {
			r = NewRecorder(recordStart)
		}
		r.Add(samples[n%len(samples)])
	}
}
