package load

import "time"

const (
	// recorderSpan bounds the seconds of a recorder, whatever instants it is given.
	recorderSpan = 24 * 60 * 60
	// aroundFailure is how many records before a failure, and after it, are kept.
	aroundFailure = 64
	// maxRecords bounds the records that are kept, so that an outage cannot fill memory.
	maxRecords = 10_000
	// maxErrors bounds the different error texts of a second; the rest is otherErrors.
	maxErrors   = 32
	otherErrors = "other errors"
)

// Counts is what became of the requests scheduled within some time.
type Counts struct {
	Good, Failed      int
	Attempts, Unknown int
	Latency           Histogram      // of good answers, from their scheduled instants
	ServedBy          map[string]int // good answers by datacenter
	Errors            map[string]int
}

// Recorder counts the requests of one group for each second of their scheduled
// instants, and keeps whole records only around failures: what it holds depends on how
// long the load lasts, not on how many requests it makes. It is for one goroutine.
type Recorder struct {
	start   time.Time
	seconds []*Counts // nil where nothing was scheduled
	outside int

	recent  [aroundFailure]Sample // ring of the records that are not kept so far
	held    int                   // how many of them there are
	next    int                   // where the next one goes
	follow  int                   // how many records are still kept after a failure
	records []Sample
	dropped int
}

// NewRecorder returns one whose first second begins at start.
func NewRecorder(start time.Time) *Recorder { return &Recorder{start: start} }

// Add counts a request that is done. Records are kept in the order of these calls.
func (r *Recorder) Add(s Sample) {
	r.keep(s)
	second := r.second(s.Scheduled)
	if second == nil {
		r.outside++
		return
	}
	second.Attempts += s.Attempts
	if s.Unknown {
		second.Unknown++
	}
	if !s.OK {
		second.Failed++
		second.countError(s.Error, 1)
		return
	}
	second.Good++
	second.Latency.Add(s.Done.Sub(s.Scheduled))
	for _, dc := range s.ServedBy {
		second.ServedBy[dc]++
	}
}

func (r *Recorder) second(scheduled time.Time) *Counts {
	since := scheduled.Sub(r.start)
	if since < 0 || since >= recorderSpan*time.Second {
		return nil
	}
	n := int(since / time.Second)
	for len(r.seconds) <= n {
		r.seconds = append(r.seconds, nil)
	}
	if r.seconds[n] == nil {
		r.seconds[n] = newCounts()
	}
	return r.seconds[n]
}

func newCounts() *Counts {
	return &Counts{ServedBy: map[string]int{}, Errors: map[string]int{}}
}

func (c *Counts) countError(text string, n int) {
	if _, known := c.Errors[text]; !known && len(c.Errors) >= maxErrors {
		text = otherErrors
	}
	c.Errors[text] += n
}

func (r *Recorder) keep(s Sample) {
	switch {
	case !s.OK:
		for i := range r.held {
			r.record(r.recent[(r.next-r.held+i+aroundFailure)%aroundFailure])
		}
		r.held, r.follow = 0, aroundFailure
		r.record(s)
	case r.follow > 0:
		r.follow--
		r.record(s)
	default:
		r.recent[r.next] = s
		r.next = (r.next + 1) % aroundFailure
		r.held = min(r.held+1, aroundFailure)
	}
}

func (r *Recorder) record(s Sample) {
	if len(r.records) == maxRecords {
		r.dropped++
		return
	}
	r.records = append(r.records, s)
}

// Seconds is how many seconds the recorder has, up to the last with a request.
func (r *Recorder) Seconds() int { return len(r.seconds) }

// Between adds up the seconds in [from, to), counted from the start of the recorder.
func (r *Recorder) Between(from, to int) *Counts {
	sum := newCounts()
	for n := max(from, 0); n < min(to, len(r.seconds)); n++ {
		second := r.seconds[n]
		if second == nil {
			continue
		}
		sum.Good += second.Good
		sum.Failed += second.Failed
		sum.Attempts += second.Attempts
		sum.Unknown += second.Unknown
		sum.Latency.Merge(&second.Latency)
		for dc, good := range second.ServedBy {
			sum.ServedBy[dc] += good
		}
		for text, failed := range second.Errors {
			sum.countError(text, failed)
		}
	}
	return sum
}

// Outside is how many requests were scheduled before the start or a day after it.
// They are in no second: a load with any was not measured whole.
func (r *Recorder) Outside() int { return r.outside }

// Records lists the records around failures. dropped is how many more there were than
// a recorder keeps; these are counted all the same.
func (r *Recorder) Records() (records []Sample, dropped int) { return r.records, r.dropped }
