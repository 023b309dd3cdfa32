package load

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// Do makes one request. ctx carries its deadline, counted from its scheduled
// instant. It fills in everything but Scheduled; it need not set Done.
type Do func(ctx context.Context, n int) Sample

// Open sends rate requests a second until ctx ends, each at its own scheduled
// instant and with its own deadline, and waits for those that are still out. record
// is called for each when it is done, not concurrently.
func Open(ctx context.Context, rate float64, deadline time.Duration, do Do, record func(Sample)) error {
	if rate <= 0 || deadline <= 0 {
		return fmt.Errorf("open-loop load of %v/s with a deadline of %s: both must be positive", rate, deadline)
	}
	var (
		out sync.WaitGroup
		mu  sync.Mutex
	)
	defer out.Wait()
	start := time.Now()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for n := 0; ; n++ {
		scheduled := start.Add(time.Duration(float64(n) / rate * float64(time.Second)))
		timer.Reset(time.Until(scheduled))
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		out.Go(func() {
			// Those that are out when the load ends keep their deadlines: cutting them
			// off would count failures that the system did not make.
			bounded, cancel := context.WithDeadline(context.WithoutCancel(ctx), scheduled.Add(deadline))
			defer cancel()
			sample := do(bounded, n)
			sample.Scheduled = scheduled
			if sample.Done.IsZero() {
				sample.Done = time.Now()
			}
			if sample.OK && sample.Done.Sub(scheduled) > deadline {
				sample.OK, sample.Error = false, "the answer came after the deadline"
			}
			mu.Lock()
			defer mu.Unlock()
			record(sample)
		})
	}
}
