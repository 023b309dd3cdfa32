package admission

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	// MaxSources is how many sources of strangers are told apart.
	MaxSources = 1 << 14
	// sweepEvery is how often sources that have their whole burst back are forgotten.
	sweepEvery = time.Second
	// quietSources is how many are remembered without looking.
	quietSources = 1 << 10
)

// Rate bounds how often each source may try. Methods may be called concurrently.
type Rate struct {
	each  rate.Limit
	burst int
	most  int

	mu      sync.Mutex
	sources map[string]*rate.Limiter
	others  *rate.Limiter // of those beyond most, together
	swept   time.Time
}

// NewRate lets each source try so often a second, and burst times at once. Sources that come
// while most are remembered share one rate; 0: none do, for their number is bounded elsewhere.
func NewRate(each float64, burst, most int) *Rate {
	return &Rate{
		each: rate.Limit(each), burst: burst, most: most, sources: make(map[string]*rate.Limiter), others: rate.NewLimiter(rate.Limit(each), burst),
	}
}

// Take lets n attempts pass, or says how long to wait for them.
func (r *Rate) Take(source string, n int, now time.Time) (wait time.Duration) {
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
		if r.most > 0 && len(r.sources) >= r.most {
			bucket = r.others
		} else {
			bucket = rate.NewLimiter(r.each, r.burst)
			r.sources[source] = bucket
		}
	}
	reservation := bucket.ReserveN(now, n)
	if wait = reservation.DelayFrom(now); wait > 0 {
		reservation.CancelAt(now)
	}
	return wait
}
