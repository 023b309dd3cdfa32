package load

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// A server that stalls must not slow its clients down: every request leaves at its
// scheduled instant, and latency counts from there.
func TestOpenKeepsItsPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second-time.Millisecond)
		defer cancel()
		start := time.Now()
		stall := start.Add(200 * time.Millisecond)
		recover := start.Add(700 * time.Millisecond)
		var samples []Sample
		err := Open(ctx, 100, 2*time.Second, func(ctx context.Context, _ int) Sample {
			if now := time.Now(); now.After(stall) && now.Before(recover) {
				time.Sleep(time.Until(recover))
			}
			time.Sleep(time.Millisecond)
			return Sample{OK: true, Attempts: 1}
		}, func(s Sample) { samples = append(samples, s) })
		if err != nil {
			t.Fatal(err)
		}
		if len(samples) != 100 {
			t.Fatalf("%d requests in a second at 100/s", len(samples))
		}
		slow := 0
		for _, s := range samples {
			if s.Scheduled.Sub(start)%(10*time.Millisecond) != 0 {
				t.Fatalf("a request was scheduled at %s", s.Scheduled.Sub(start))
			}
			if s.Done.Sub(s.Scheduled) > 10*time.Millisecond {
				slow++
			}
		}
		if slow < 45 { // all of the half second that stalled, save the last few
			t.Errorf("only %d requests saw the stall: the clients waited for the server", slow)
		}
	})
}

func TestOpenDeadlines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(context.Background(), 95*time.Millisecond)
		defer cancel()
		var samples []Sample
		err := Open(ctx, 10, 300*time.Millisecond, func(ctx context.Context, _ int) Sample {
			<-ctx.Done() // the end of the load must not cut off what is out
			return Sample{Attempts: 1, Error: "no answer within the deadline"}
		}, func(s Sample) { samples = append(samples, s) })
		if err != nil || len(samples) != 1 {
			t.Fatal(samples, err)
		}
		if took := samples[0].Done.Sub(samples[0].Scheduled); took != 300*time.Millisecond {
			t.Errorf("the request was given up after %s", took)
		}

		samples = nil
		ctx, cancel = context.WithTimeout(context.Background(), time.Millisecond)
		defer cancel()
		Open(ctx, 10, 300*time.Millisecond, func(context.Context, int) Sample {
			time.Sleep(301 * time.Millisecond)
			return Sample{OK: true}
		}, func(s Sample) { samples = append(samples, s) })
		if len(samples) != 1 || samples[0].OK {
			t.Errorf("an answer after the deadline is good: %+v", samples)
		}
	})
	if Open(context.Background(), 0, time.Second, nil, nil) == nil {
		t.Error("a rate of 0 is accepted")
	}
}
