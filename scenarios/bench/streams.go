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
	"github.com/entente-mesh/entente/ca"
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

// shared stands in the note of what is measured with many streams.
const shared = "each stream an attested host of its own with a TLS connection of its own, all held by one other process on this machine"

// measureStreams opens one Sync stream for each of 10,000 hosts.
func measureStreams(ctx context.Context, b *bench) error {
	count := b.count(10_000, 50)
	d, err := b.domain(ctx, 1)
	if err != nil {
		return err
	}
	defer d.close()
	n := d.nodes[0]

	began := time.Now()
	subscribers, err := d.admitAll(ctx, count)
	if err != nil {
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
	all := &audience{bench: b, size: count, level: ca.SyncLevel}
	defer all.held.Wait()
	defer cancel()
	if err := all.openAll(ctx, subscribers); err != nil {
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
	quiet := 5 * b.while() // some heartbeats of each stream
	percent, err := n.idle(ctx, quiet)
	if err != nil {
		return err
	}
	b.report("sync_stream_kib", (after-before)/1024/float64(count), count, "%s; %.0f MiB before, %.0f MiB with them after %.0f s; %d were lost and opened again meanwhile",
		shared, before/mib, after/mib, settle.Seconds(), all.lost.Load())
	b.report("quiet_10k_cpu_pct", percent, count, "all that the node uses, over %.0f s; %s", quiet.Seconds(), shared)

	if b.wants("broadcast_10k_p99_ms") || b.wants("broadcast_10k_cpu_us") {
		if err := all.measureBroadcast(ctx, n, percent); err != nil {
			return err
		}
	}
	if b.wants("change_one_p99_ms") {
		return all.measureChangeOne(ctx, n)
	}
	return nil
}

// measureBroadcast has all streams told of a change, again and again. quiet is how many
// percent of a core they cost without one.
func (a *audience) measureBroadcast(ctx context.Context, n *caNode, quiet float64) error {
	rounds := a.count(20, 2)
	a.say("broadcast, %d times", rounds)
	var times []time.Duration
	var used time.Duration
	for i := range rounds {
		name := fmt.Sprintf("broadcast-%d", i)
		before, err := n.cpu()
		if err != nil {
			return err
		}
		began := time.Now()
		took, err := a.time(ctx, name, a.size, func() error { return n.applyService(ctx, name) })
		if err != nil {
			return err
		}
		after, err := n.cpu()
		if err != nil {
			return err
		}
		used += after - before - time.Duration(quiet/100*float64(time.Since(began)))
		times = append(times, took...)
		if err := sleep(ctx, a.while()/4); err != nil {
			return err
		}
	}
	a.report("broadcast_10k_p99_ms", milliseconds(percentile(times, 99)), len(times), "a Service applied until each of %d streams has it, %d times; median %.0f ms; %s", a.size, rounds, milliseconds(percentile(times, 50)), shared)
	a.report("broadcast_10k_cpu_us", perItem(max(used, 0), rounds*a.size), rounds*a.size, "without the %.1f %% of a core that the streams cost when nothing changes", quiet)
	return nil
}

// measureChangeOne has one stream after the other told of a change that is for it alone.
func (a *audience) measureChangeOne(ctx context.Context, n *caNode) error {
	changes := a.count(500, 10)
	a.say("change for one, %d times", changes)
	var times []time.Duration
	for i := range changes {
		e := entry(fmt.Sprintf("one-%d", i), hostName(rand.IntN(a.size)))
		took, err := a.time(ctx, e.GetId(), 1, func() error { return n.change(ctx, create(e)) })
		if err != nil {
			return err
		}
		times = append(times, took...)
		if err := sleep(ctx, rand.N(40*time.Millisecond)); err != nil {
			return err
		}
	}
	a.report("change_one_p99_ms", milliseconds(percentile(times, 99)), len(times), "median %.1f ms; %s", milliseconds(percentile(times, 50)), shared)
	return nil
}

// admitAll has so many hosts attest.
func (d *domain) admitAll(ctx context.Context, count int) ([]*subscriber, error) {
	d.say("%d hosts attest", count)
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
	return subscribers, group.Wait()
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

// openAll opens a stream for each subscriber, which lasts until ctx ends.
func (a *audience) openAll(ctx context.Context, subscribers []*subscriber) error {
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(enrolling)
	for i, s := range subscribers {
		group.Go(func() error { return a.open(groupCtx, ctx, i, s) })
	}
	return group.Wait()
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
