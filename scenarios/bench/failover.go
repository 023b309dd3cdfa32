package main

import (
	"context"
	"fmt"
	"sync"
	"time"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
)

// measureFailover kills the leader of three voters again and again while operators of the
// others go on writing.
func measureFailover(ctx context.Context, b *bench) error {
	d, err := b.domain(ctx, 3)
	if err != nil {
		return err
	}
	defer d.close()

	var times []time.Duration
	for kill := range b.count(25, 1) {
		leader, others, err := d.leader(ctx)
		if err != nil {
			return err
		}
		b.say("kill the leader, %s", leader.name)
		leader.kill()
		took, err := firstWrite(ctx, others, kill)
		if err != nil {
			return err
		}
		times = append(times, took)
		if err := leader.start(ctx); err != nil {
			return err
		}
	}
	b.report("leader_kill_write_p99_ms", milliseconds(percentile(times, 99)), len(times),
		"with n below 100 the longest; median %.0f ms; three voters on one machine, default heartbeat; writes are tried at both others, one after the other, until one is agreed", milliseconds(percentile(times, 50)))
	return nil
}

// leader waits until all three nodes stand in one log, and returns who leads.
func (d *domain) leader(ctx context.Context) (leader *caNode, others []*caNode, err error) {
	err = d.until(ctx, "all follow one leader", func(ctx context.Context) error {
		leader, others = nil, nil
		for _, n := range d.nodes {
			status, err := n.admin.Status(ctx, &ententev1.StatusRequest{})
			if err != nil {
				return err
			}
			if status.GetLeaderId() == "" || !status.GetQuorum() {
				return fmt.Errorf("%s knows no leader", n.name)
			}
			if status.GetLeaderId() == status.GetNodeId() {
				leader = n
			} else {
				others = append(others, n)
			}
		}
		if leader == nil || len(others) != len(d.nodes)-1 {
			return fmt.Errorf("they do not agree who leads")
		}
		list, err := leader.admin.ListNodes(ctx, &ententev1.ListNodesRequest{})
		if err != nil {
			return err
		}
		for _, m := range list.GetNodes() {
			if !m.GetVoterNow() || m.GetLag() > 8 {
				return fmt.Errorf("%s has not caught up", m.GetMember().GetName())
			}
		}
		return nil
	})
	return leader, others, err
}

// firstWrite is how long it takes until one of the nodes agrees to a new entry.
func firstWrite(ctx context.Context, nodes []*caNode, round int) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	began := time.Now()
	first := make(chan time.Duration, len(nodes))
	var all sync.WaitGroup
	for i, n := range nodes {
		all.Go(func() {
			for try := 0; ctx.Err() == nil; try++ {
				attempt, done := context.WithTimeout(ctx, time.Second)
				err := n.change(attempt, create(filler((round*len(nodes)+i)*1_000_000+try)))
				done()
				if err == nil {
					first <- time.Since(began)
					cancel()
					return
				}
				sleep(ctx, 10*time.Millisecond)
			}
		})
	}
	all.Wait()
	select {
	case took := <-first:
		return took, nil
	default:
		return 0, fmt.Errorf("nothing was agreed after the leader was killed: %w", context.Cause(ctx))
	}
}
