package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
)

// enrolling is how many hosts attest at once; a CA node turns away more than 32.
const enrolling = 24

// audience is many subscribers with an open Sync stream each. Each has its own key, SVID
// and TLS connection.
type audience struct {
	*bench
	size       int
	waits      atomic.Pointer[round]
	held       sync.WaitGroup
	level      uint32       // of their Hello
	statements atomic.Int64 // that came with heartbeats
	lost       atomic.Int64 // streams that ended and were opened again
}

// round is one change that streams wait for.
type round struct {
	name  string // of the Service, or id of the entry
	began time.Time
	took  []time.Duration // by stream; 0: it has not come
	left  atomic.Int64
	done  chan struct{}
}

// measureStreams opens one Sync stream for each of 10,000 hosts.
func measureStreams(ctx context.Context, b *bench) error {
	count := b.count(10_000, 50)
	d, err := b.domain(ctx, 1)
	if err != nil {
		return err
	}
	defer d.close()
	n := d.nodes[0]

	b.say("%d hosts attest", count)
	began := time.Now()
	subscribers := make([]*subscriber, count)
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(enrolling)
	for i := range subscribers {
		group.Go(func() (err error) {
			if groupCtx.Err() != nil {
				return groupCtx.Err()
			}
			subscribers[i], err = d.admit(groupCtx, hostName(i))
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	enrolled := time.Since(began)
	entries := make([]*statev1.Entry, count)
	for i := range entries {
		entries[i] = entry(fmt.Sprintf("of-%d", i), hostName(i))
	}
	if err := n.createEntries(ctx, entries); err != nil {
		return err
	}

	// A fresh process: what it holds then is the state, and what comes on top the streams.
	n.kill()
	if err := n.start(ctx); err != nil {
		return err
	}
	if err := sleep(ctx, b.while()); err != nil {
		return err
	}
	before, err := rss(n.process)
	if err != nil {
		return err
	}
	b.say("%d streams open; %d hosts were admitted in %.0f s", count, count, enrolled.Seconds())
	ctx, cancel := context.WithCancel(ctx)
	all := &audience{bench: b, size: count}
	defer all.held.Wait()
	defer cancel()
	group, groupCtx = errgroup.WithContext(ctx)
	group.SetLimit(enrolling)
	for i, s := range subscribers {
		group.Go(func() error { return all.open(groupCtx, ctx, i, s) })
	}
	if err := group.Wait(); err != nil {
		return err
	}
	settle := 5 * b.while() // two collections of the process's garbage, some rounds of heartbeats
	if err := sleep(ctx, settle); err != nil {
		return err
	}
	after, err := rss(n.process)
	if err != nil {
		return err
	}
	cpu, err := n.idle(ctx, b.while())
	if err != nil {
		return err
	}
	const shared = "each stream an attested host of its own with a TLS connection of its own, all held by one other process on this machine"
	b.report("sync_stream_kib", (after-before)/1024/float64(count), count, "%s; %.0f MiB before, %.0f MiB with them after %.0f s; heartbeats take %.1f %% of a core; %d were lost and opened again meanwhile",
		shared, before/mib, after/mib, settle.Seconds(), cpu, all.lost.Load())

	if b.wants("broadcast_10k_p99_ms") {
		rounds := b.count(20, 2)
		b.say("broadcast, %d times", rounds)
		var times []time.Duration
		for i := range rounds {
			name := fmt.Sprintf("broadcast-%d", i)
			took, err := all.time(ctx, name, count, func() error { return n.applyService(ctx, name) })
			if err != nil {
				return err
			}
			times = append(times, took...)
			if err := sleep(ctx, b.while()/4); err != nil {
				return err
			}
		}
		b.report("broadcast_10k_p99_ms", milliseconds(percentile(times, 99)), len(times), "a Service applied until each of %d streams has it, %d times; median %.0f ms; %s", count, rounds, milliseconds(percentile(times, 50)), shared)
	}
	if b.wants("change_one_p99_ms") {
		changes := b.count(500, 10)
		b.say("change for one, %d times", changes)
		var times []time.Duration
		for i := range changes {
			e := entry(fmt.Sprintf("one-%d", i), hostName(rand.IntN(count)))
			took, err := all.time(ctx, e.GetId(), 1, func() error { return n.change(ctx, create(e)) })
			if err != nil {
				return err
			}
			times = append(times, took...)
			if err := sleep(ctx, rand.N(40*time.Millisecond)); err != nil {
				return err
			}
		}
		b.report("change_one_p99_ms", milliseconds(percentile(times, 99)), len(times), "median %.1f ms; %s", milliseconds(percentile(times, 50)), shared)
	}
	return nil
}

func hostName(i int) string { return fmt.Sprintf("host-%d", i) }

// idle is how many percent of a core the node uses.
func (n *caNode) idle(ctx context.Context, window time.Duration) (percent float64, err error) {
	before, err := n.cpu()
	if err != nil {
		return 0, err
	}
	began := time.Now()
	if err := sleep(ctx, window); err != nil {
		return 0, err
	}
	after, err := n.cpu()
	return 100 * (after - before).Seconds() / time.Since(began).Seconds(), err
}

// open keeps a stream of one subscriber open until ctx ends: one that is lost is opened
// again, as every agent does. It returns when the subscriber has the full state.
func (a *audience) open(opening, ctx context.Context, i int, s *subscriber) error {
	whole := make(chan struct{})
	a.held.Go(func() {
		tell := sync.OnceFunc(func() { close(whole) })
		var last error
		for connect := uint64(1); ctx.Err() == nil; connect++ {
			if connect > 1 {
				a.lost.Add(1)
				a.say("%s lost its stream: %v", s.name, last)
				sleep(ctx, rand.N(time.Second))
			}
			last = a.follow(ctx, i, s, connect, tell)
		}
	})
	select {
	case <-whole:
		return nil
	case <-opening.Done():
		return opening.Err()
	}
}

// follow opens one stream and takes in what the CA node says until it ends.
func (a *audience) follow(ctx context.Context, i int, s *subscriber, connect uint64, whole func()) error {
	conn, err := s.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	stream, err := ententev1.NewSyncClient(conn).Sync(ctx)
	if err != nil {
		return err
	}
	err = stream.Send(&ententev1.SyncRequest{Message: &ententev1.SyncRequest_Hello{Hello: &ententev1.Hello{BootId: s.name, Connect: connect, Level: a.level}}})
	for err == nil {
		var message *ententev1.SyncResponse
		if message, err = stream.Recv(); err != nil {
			break
		}
		a.statements.Add(int64(len(message.GetHeartbeat().GetStatements())))
		policy := message.GetPolicy()
		if policy == nil {
			continue
		}
		if r := a.waits.Load(); r != nil && r.in(policy) && r.took[i] == 0 {
			r.took[i] = time.Since(r.began)
			if r.left.Add(-1) == 0 {
				close(r.done)
			}
		}
		if policy.GetLast() {
			whole()
			err = stream.Send(&ententev1.SyncRequest{Message: &ententev1.SyncRequest_Ack{Ack: &ententev1.Ack{Revision: policy.GetRevision()}}})
		}
	}
	return err
}

// in tells whether the change stands in what a stream was told.
func (r *round) in(policy *ententev1.Policy) bool {
	for _, o := range policy.GetObjects() {
		if o.GetService().GetName() == r.name {
			return true
		}
	}
	for _, e := range policy.GetEntries() {
		if e.GetId() == r.name {
			return true
		}
	}
	return false
}

// time makes a change and returns how long each of so many streams waited for it.
func (a *audience) time(ctx context.Context, name string, streams int, change func() error) ([]time.Duration, error) {
	r := &round{name: name, took: make([]time.Duration, a.size), done: make(chan struct{})}
	r.left.Store(int64(streams))
	r.began = time.Now()
	a.waits.Store(r)
	defer a.waits.Store(nil)
	if err := change(); err != nil {
		return nil, err
	}
	select {
	case <-r.done:
	case <-time.After(time.Minute):
		return nil, fmt.Errorf("%d of %d streams did not get %s", r.left.Load(), streams, name)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	var took []time.Duration
	for _, t := range r.took {
		if t != 0 {
			took = append(took, t)
		}
	}
	return took, nil
}

// applyService declares a service, which every host of the domain is told.
func (n *caNode) applyService(ctx context.Context, name string) error {
	answer, err := n.admin.Apply(ctx, &ententev1.ApplyRequest{Objects: []*statev1.Object{{
		Kind: &statev1.Object_Service{Service: &statev1.Service{
			Name: name, Path: "/" + name, Hosts: []string{"nowhere"}, Selectors: []string{fmt.Sprintf("unix:uid:%d", os.Getuid())}, Port: 8080,
		}},
	}}})
	if err == nil && len(answer.GetChanges()) != 1 {
		err = errors.New("nothing was changed by it")
	}
	return err
}
