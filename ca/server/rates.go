package server

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	// tokenRate is how many tokens one host may have signed a second; agents keep
	// them, so a host that needs more runs in a circle.
	tokenRate  = 5000
	tokenBurst = 5000
	// quietRates is how many hosts' buckets are kept before full ones are dropped.
	quietRates = 1024
)

// rates limits each host, so that none takes the whole node. The zero value is ready
// to use.
type rates struct {
	mu      sync.Mutex
	buckets map[string]*rate.Limiter
}

// take lets n pass, or says how long to wait for them.
func (r *rates) take(host string, n int, now time.Time) (wait time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	bucket := r.buckets[host]
	if bucket == nil {
		if len(r.buckets) >= quietRates {
			for name, other := range r.buckets {
				if other.TokensAt(now) >= tokenBurst {
					delete(r.buckets, name)
				}
			}
		}
		if r.buckets == nil {
			r.buckets = make(map[string]*rate.Limiter)
		}
		bucket = rate.NewLimiter(tokenRate, tokenBurst)
		r.buckets[host] = bucket
	}
	reservation := bucket.ReserveN(now, n)
	if wait = reservation.DelayFrom(now); wait > 0 {
		reservation.CancelAt(now)
	}
	return wait
}
