package services

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// Instance is a service as it runs here: the requests that it is given, how healthy it
// is, and whether it still takes any. Its methods may be called concurrently.
type Instance struct {
	open     context.Context
	close    context.CancelFunc
	ejected  chan ejection
	finished chan struct{} // capacity 1: there was a moment without requests

	mu       sync.Mutex
	requests int
	limits   Limits
	streaks  [2]int // of failures: local origin, 5xx
	times    int    // how often in a row it was ejected for 5xx
	last     time.Time
	healthy  bool
	err      error // why it is not
	since    time.Time
}

// ejection is the verdict of requests that went wrong.
type ejection struct {
	why    error
	during time.Duration
}

const (
	localOrigin = iota
	fives
)

// NewInstance returns an instance that takes requests and is not known to be healthy.
func NewInstance() *Instance {
	i := &Instance{ejected: make(chan ejection, 1), finished: make(chan struct{}, 1), since: time.Now()}
	i.open, i.close = context.WithCancel(context.Background())
	return i
}

// Open is done when the instance takes no more requests.
func (i *Instance) Open() context.Context { return i.open }

// Close ends the requests under way and takes no more.
func (i *Instance) Close() { i.close() }

// Begin says that the application is given a request.
func (i *Instance) Begin() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.requests++
}

// End says how it ended: with the status of the answer; with an error, if there was none
// or it broke off and the application is to blame; with neither, if that is not known.
func (i *Instance) End(status int, err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.requests--; i.requests == 0 {
		select {
		case i.finished <- struct{}{}:
		default:
		}
	}
	switch {
	case err != nil:
		i.count(localOrigin, i.limits.LocalOriginFailures, err)
	case status >= 500:
		i.streaks[localOrigin] = 0
		i.count(fives, i.limits.Fives, fmt.Errorf("it answers %d", status))
	case status != 0:
		i.streaks = [2]int{}
	}
}

// count adds one to a streak and ejects the instance when it is long enough. mu is held.
func (i *Instance) count(kind, limit int, err error) {
	i.streaks[kind]++
	if limit == 0 || i.streaks[kind] < limit {
		return
	}
	e := ejection{why: fmt.Errorf("%d requests in a row went wrong, the last: %w", i.streaks[kind], err)}
	i.streaks = [2]int{}
	now := time.Now()
	if kind == fives {
		if now.Before(i.last) { // ejected already
			return
		}
		if now.Sub(i.last) > i.limits.MaxEjection {
			i.times = 0
		}
		i.times++
		e.during = min(i.limits.BaseEjection*time.Duration(i.times), i.limits.MaxEjection)
		i.last = now.Add(e.during)
	}
	select {
	case i.ejected <- e:
	default:
	}
}

func (i *Instance) limit(l Limits) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.limits = l
}

func (i *Instance) set(healthy bool, err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if healthy != i.healthy {
		i.since = time.Now()
	}
	if i.healthy = healthy; healthy {
		err = nil
	}
	i.err = err
}

// Healthy says whether the instance is healthy.
func (i *Instance) Healthy() bool {
	healthy, _, _ := i.Health()
	return healthy
}

// Health says whether the instance is healthy, since when, and why it is not.
func (i *Instance) Health() (healthy bool, since time.Time, why error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.healthy, i.since, i.err
}

// Requests are how many are under way.
func (i *Instance) Requests() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.requests
}

// Idle waits until no request is under way, or until ctx ends.
func (i *Instance) Idle(ctx context.Context) {
	for i.Requests() > 0 {
		select {
		case <-i.finished:
		case <-ctx.Done():
			return
		}
	}
}
