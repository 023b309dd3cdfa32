package main

import (
	"context"
	"crypto/x509"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
)

// measureDelivery is a workload of a host whose agent is real: this process, known by
// its user.
func measureDelivery(ctx context.Context, b *bench) error {
	d, err := b.domain(ctx, 1)
	if err != nil {
		return err
	}
	defer d.close()
	n := d.nodes[0]
	if err := n.change(ctx, create(entry("standing", "h1"))); err != nil {
		return err
	}
	a, err := d.agent(ctx, "h1")
	if err != nil {
		return err
	}
	w, err := a.watch(ctx)
	if err != nil {
		return err
	}
	defer w.close()
	if err := w.until(ctx, func(svids []*workload.X509SVID) bool { return len(svids) == 1 }); err != nil {
		return err
	}

	if b.wants("entry_to_svid_p50_ms") || b.wants("entry_to_svid_p99_ms") || b.wants("entry_to_svid_cpu_us") {
		count := b.count(1000, 10)
		b.say("entry to SVID, %d times", count)
		var times []time.Duration
		before, err := d.cpu()
		if err != nil {
			return err
		}
		for i := range count {
			e := entry(fmt.Sprintf("new-%d", i), "h1")
			if err := sleep(ctx, rand.N(40*time.Millisecond)); err != nil {
				return err
			}
			began := time.Now()
			if err := n.change(ctx, create(e)); err != nil {
				return err
			}
			if err := w.until(ctx, func(svids []*workload.X509SVID) bool { return holds(svids, e) }); err != nil {
				return err
			}
			times = append(times, time.Since(began))
			if err := n.change(ctx, remove(e.GetId())); err != nil {
				return err
			}
			if err := w.until(ctx, func(svids []*workload.X509SVID) bool { return !holds(svids, e) }); err != nil {
				return err
			}
		}
		after, err := d.cpu()
		if err != nil {
			return err
		}
		const note = "from the operator's call to the SVID on the workload's stream; one CA node, agent and workload on one machine"
		b.report("entry_to_svid_p50_ms", milliseconds(percentile(times, 50)), count, note)
		b.report("entry_to_svid_p99_ms", milliseconds(percentile(times, 99)), count, "longest %.1f ms", milliseconds(percentile(times, 100)))
		b.report("entry_to_svid_cpu_us", perItem(after-before, count), count, "all that both use meanwhile")
	}

	if !b.wants("taint_reissue_1_ms") {
		return nil
	}
	var times []time.Duration
	for range b.count(12, 1) { // a node may have 16 authorities, tainted ones among them
		b.say("taint")
		old := ca.SignedUnder(w.leaf())
		took, err := d.taint(ctx, func() error {
			return w.until(ctx, func([]*workload.X509SVID) bool { return ca.SignedUnder(w.leaf()) != old })
		})
		if err != nil {
			return err
		}
		times = append(times, took)
	}
	b.report("taint_reissue_1_ms", milliseconds(percentile(times, 50)), len(times), "median, longest %.0f ms; one CA node, its next authority prepared and acknowledged before", milliseconds(percentile(times, 100)))
	return nil
}

func holds(svids []*workload.X509SVID, e *statev1.Entry) bool {
	return slices.ContainsFunc(svids, func(s *workload.X509SVID) bool { return s.GetSpiffeId() == "spiffe://"+trustDomain+e.GetPath() })
}

// taint waits until the first CA node's next X.509 authority may be activated, taints the
// ACTIVE one, and takes the time from then until replaced returns.
func (d *domain) taint(ctx context.Context, replaced func() error) (took time.Duration, err error) {
	n := d.nodes[0]
	var active string
	err = d.until(ctx, "the next authority is ready", func(ctx context.Context) error {
		list, err := n.admin.ListAuthorities(ctx, &ententev1.ListAuthoritiesRequest{})
		if err != nil {
			return err
		}
		active = ""
		ready, there := false, []string(nil)
		for _, s := range list.GetAuthorities() {
			a := s.GetAuthority()
			if a.GetUse() != statev1.KeyUse_KEY_USE_X509 {
				continue
			}
			there = append(there, fmt.Sprintf("%v waits for %v", a.GetPhase(), s.GetWaitingFor()))
			switch a.GetPhase() {
			case statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE:
				active = a.GetId()
			case statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED:
				ready = ready || a.GetReady()
			}
		}
		if active == "" || !ready {
			return fmt.Errorf("there are: %s", strings.Join(there, "; "))
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	began := time.Now()
	if _, err := n.admin.TaintAuthority(ctx, &ententev1.ChangeAuthorityRequest{Id: active}); err != nil {
		return 0, err
	}
	err = replaced()
	return time.Since(began), err
}

// watch is an open stream of FetchX509SVID.
type watch struct {
	conn   *grpc.ClientConn
	cancel context.CancelFunc

	answers chan []*workload.X509SVID
	ended   error // set before answers is closed
	svids   []*workload.X509SVID
}

// workloadAPI opens a connection to the agent's Workload API.
func (a *agent) workloadAPI() (workload.SpiffeWorkloadAPIClient, *grpc.ClientConn, error) {
	conn, err := grpc.NewClient("unix:"+a.socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64*mib)))
	if err != nil {
		return nil, nil, err
	}
	return workload.NewSpiffeWorkloadAPIClient(conn), conn, nil
}

// withHeader is what the Workload API demands of its clients.
func withHeader(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// watch opens a stream. One goroutine may use what it returns.
func (a *agent) watch(ctx context.Context) (*watch, error) {
	api, conn, err := a.workloadAPI()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(withHeader(ctx))
	stream, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		cancel()
		conn.Close()
		return nil, err
	}
	w := &watch{conn: conn, cancel: cancel, answers: make(chan []*workload.X509SVID)}
	go func() {
		defer close(w.answers)
		for {
			answer, err := stream.Recv()
			if err != nil {
				w.ended = err
				return
			}
			select {
			case w.answers <- answer.GetSvids():
			case <-ctx.Done():
				w.ended = ctx.Err()
				return
			}
		}
	}()
	return w, nil
}

func (w *watch) close() {
	w.cancel()
	w.conn.Close()
	for range w.answers {
	}
}

// until reads answers until one is as it should be. The error is the stream's.
func (w *watch) until(ctx context.Context, is func([]*workload.X509SVID) bool) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		select {
		case svids, ok := <-w.answers:
			if !ok {
				return w.ended
			}
			w.svids = svids
			if is(svids) {
				return nil
			}
		case <-ctx.Done():
			return fmt.Errorf("the workload did not get what it waits for: %w", ctx.Err())
		}
	}
}

// leaf is the first SVID of the newest answer.
func (w *watch) leaf() *x509.Certificate {
	chain, err := x509.ParseCertificates(w.svids[0].GetX509Svid())
	if err != nil {
		panic(err) // our own agent's
	}
	return chain[0]
}
