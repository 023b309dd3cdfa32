package main

import (
	"context"
	"fmt"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
)

// measureEntries fills one CA node, and kills and starts it again when it is full.
func measureEntries(ctx context.Context, b *bench) error {
	d, err := b.domain(ctx, 1)
	if err != nil {
		return err
	}
	defer d.close()
	n := d.nodes[0]

	if b.wants("entries_single_per_s") {
		b.say("entries, one per call")
		call := func(ctx context.Context, _, i int) error { return n.change(ctx, create(filler(1_000_000_000+i))) }
		before, err := n.cpu()
		if err != nil {
			return err
		}
		calls, took, err := drive(ctx, b.while(), call)
		if err != nil {
			return err
		}
		after, err := n.cpu()
		if err != nil {
			return err
		}
		b.report("entries_single_per_s", float64(calls)/took.Seconds(), calls, "one CA node, each agreed and on its disk; %.0f us CPU of it each", perItem(after-before, calls))
	}

	filled := 0
	fill := func(to int) (took, cpu time.Duration, err error) {
		before, err := n.cpu()
		if err != nil {
			return 0, 0, err
		}
		for ; filled < to; filled += min(10_000, to-filled) {
			entries := make([]*statev1.Entry, min(10_000, to-filled))
			for i := range entries {
				entries[i] = filler(filled + i)
			}
			began := time.Now()
			if err := n.createEntries(ctx, entries); err != nil {
				return 0, 0, err
			}
			took += time.Since(began)
			if filled > 0 && filled%100_000 == 0 {
				b.say("%d entries", filled)
			}
		}
		after, err := n.cpu()
		return took, after - before, err
	}

	some, many := b.count(100_000, 2_000), b.count(1_000_000, 4_000)
	b.say("entries, batched, to %d", some)
	took, cpu, err := fill(some)
	if err != nil {
		return err
	}
	b.report("entries_batched_per_s", float64(some)/took.Seconds(), some, "one CA node; %.0f us CPU of it each", perItem(cpu, some))

	if b.wants("restart_100k_s") || b.wants("rss_100k_mib") || b.wants("idle_cpu_100k_pct") {
		if err := b.restart(ctx, n, some, "restart_100k_s", "rss_100k_mib"); err != nil {
			return err
		}
		if b.wants("idle_cpu_100k_pct") {
			before, err := n.cpu()
			if err != nil {
				return err
			}
			window := b.while() * 8
			if err := sleep(ctx, window); err != nil {
				return err
			}
			after, err := n.cpu()
			if err != nil {
				return err
			}
			b.report("idle_cpu_100k_pct", 100*(after-before).Seconds()/window.Seconds(), some, "over %.0f s, one CA node that leads", window.Seconds())
		}
	}
	if b.wants("restart_1m_s") || b.wants("rss_1m_mib") {
		b.say("entries, batched, to %d", many)
		if _, _, err := fill(many); err != nil {
			return err
		}
		return b.restart(ctx, n, many, "restart_1m_s", "rss_1m_mib")
	}
	return nil
}

// restart kills the node and starts it again, five times, and looks at its memory.
func (b *bench) restart(ctx context.Context, n *caNode, entries int, seconds, memory string) error {
	full, err := rss(n.process)
	if err != nil {
		return err
	}
	var times []time.Duration
	for range b.count(5, 1) {
		b.say("kill and start with %d entries", entries)
		n.kill()
		began := time.Now()
		if err := n.start(ctx); err != nil {
			return err
		}
		times = append(times, time.Since(began))
	}
	b.report(seconds, percentile(times, 50).Seconds(), len(times), "killed, not stopped; median, longest %.2f s; keys not sealed", percentile(times, 100).Seconds())
	counted, err := n.admin.CountEntries(ctx, &ententev1.ListEntriesRequest{})
	if err != nil {
		return err
	}
	if int(counted.GetEntries()) < entries {
		return fmt.Errorf("after the restart there are %d entries, not %d", counted.GetEntries(), entries)
	}
	if err := sleep(ctx, b.while()); err != nil {
		return err
	}
	now, err := rss(n.process)
	b.report(memory, now/mib, entries, "%.0f s after the start; %.0f MiB right after the entries were made", b.while().Seconds(), full/mib)
	return err
}

// filler is an entry of a usual size on one of 1,000 hosts.
func filler(i int) *statev1.Entry {
	return &statev1.Entry{
		Id:        fmt.Sprintf("entry/service-%d", i),
		Path:      fmt.Sprintf("/ns/team-%d/sa/service-%d", i%100, i),
		Hosts:     []string{fmt.Sprintf("host-%d", i%1000)},
		Selectors: []string{fmt.Sprintf("unix:uid:%d", 1000+i%5000), fmt.Sprintf("unix:path:/opt/team-%d/service-%d", i%100, i)},
		DnsNames:  []string{fmt.Sprintf("service-%d.team-%d.internal", i, i%100)},
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
