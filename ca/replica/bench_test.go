package replica

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"
)

// BenchmarkPropose measures agreed and applied commands per second, on a real disk:
// one node, and three in one process over TLS on loopback.
func BenchmarkPropose(b *testing.B) {
	for _, size := range []int{1, 3} {
		names := []string{"ca1", "ca2", "ca3"}[:size]
		for _, callers := range []int{1, 256} {
			b.Run(fmt.Sprintf("nodes=%d/callers=%d", size, callers), func(b *testing.B) {
				onDisk = true
				defer func() { onDisk = false }()
				leader := leaderOf(b, cluster(b, names...)[0])
				ctx := b.Context()
				var n atomic.Uint64
				b.SetParallelism((callers + 1) / 2) // of two processors
				b.ResetTimer()
				if callers == 1 {
					for b.Loop() {
						if _, err := leader.Propose(ctx, tickCommand(time.Unix(int64(n.Add(1)), 0))); err != nil {
							b.Fatal(err)
						}
					}
				} else {
					b.RunParallel(func(pb *testing.PB) {
						for pb.Next() {
							if _, err := leader.Propose(ctx, tickCommand(time.Unix(int64(n.Add(1)), 0))); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commands/s")
			})
		}
	}
}

// BenchmarkBarrier shows that readers share entries.
func BenchmarkBarrier(b *testing.B) {
	leader := cluster(b, "ca1")[0]
	b.SetParallelism(64)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := leader.Barrier(b.Context()); err != nil {
				b.Error(err)
				return
			}
		}
	})
}
