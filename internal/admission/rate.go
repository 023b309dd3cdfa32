package admission

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	// maxSources is how many sources a Rate tells apart; those that come while so many are
	// remembered share one rate.
	maxSources = 1 << 14
	// sweepEvery is how often sources that have their whole burst back are forgotten.
	sweepEvery = time.Second
	// quietSources is how many are remembered without looking.
	quietSources = 1 << 10
)

// Rate bounds how often each source may try. Methods may be called concurrently.
type Rate struct {
	each  rate.Limit
	burst int

	mu      sync.Mutex
	sources map[string]*rate.Limiter
	others  *rate.Limiter // of those beyond maxSources, together
	swept   time.Time
}

// NewRate lets each source try so often a second, and burst times at once.
func NewRate(each float64, burst int) *Rate {
	return &Rate{
		each: rate.Limit(each), burst: burst, sources: make(map[string]*rate.Limiter), others: rate.NewLimiter(rate.Limit(each), burst),
	}
}

// Take lets one attempt pass, or says how long to wait for it.
func (r *Rate) Take(source string, now time.Time) (wait time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	bucket := r.sources[source]
	if bucket == nil {
		if len(r.sources) >= quietSources && now.Sub(r.swept) >= sweepEvery {
			r.swept = now
			for name, other := range r.sources {
				if other.TokensAt(now) >= float64(r.burst) {
					delete(r.sources, name)
				}
			}
		}
		if len(r.sources) >= maxSources {
			bucket = r.others
		} else {
			bucket = rate.NewLimiter(r.each, r.burst)
			r.sources[source] = bucket
		}
	}
	reservation := bucket.ReserveN(now, 1)
	if wait = reservation.DelayFrom(now); wait > 0 {
		reservation.CancelAt(now)
	}
	return wait
}
