package main

import (
	"context"
	"fmt"
	"os/exec"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/meshagent/admin"
	"github.com/entente-mesh/entente/scenarios/process"
)

// measureWorkloadAPI uses one agent as the workloads of its host do.
func measureWorkloadAPI(ctx context.Context, b *bench) error {
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
	if b.wants("agent_rss_idle_mib") {
		if err := sleep(ctx, b.while()); err != nil {
			return err
		}
		idle, err := rss(a.process)
		if err != nil {
			return err
		}
		b.report("agent_rss_idle_mib", idle/mib, 1, "%.0f s after its start, no sidecar", b.while().Seconds())
	}

	fetch := func(ctx context.Context) error {
		_, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr("unix://"+a.socket))
		return err
	}
	if b.wants("fetch_x509_p50_ms") || b.wants("fetch_x509_p99_ms") {
		count := b.count(3000, 50)
		b.say("fetch, one caller")
		times := make([]time.Duration, count)
		for i := range times {
			began := time.Now()
			if err := fetch(ctx); err != nil {
				return err
			}
			times[i] = time.Since(began)
		}
		b.report("fetch_x509_p50_ms", milliseconds(percentile(times, 50)), count, "go-spiffe's client, a new one each time, its own work included")
		b.report("fetch_x509_p99_ms", milliseconds(percentile(times, 99)), count, "longest %.1f ms", milliseconds(percentile(times, 100)))
	}
	if b.wants("fetch_x509_32_per_s") {
		b.say("fetch, %d callers", callers)
		err := a.rate(ctx, "fetch_x509_32_per_s", "go-spiffe's client, a new one each time, on the same cores", func(ctx context.Context, _, _ int) error { return fetch(ctx) })
		if err != nil {
			return err
		}
	}

	apis := make([]workload.SpiffeWorkloadAPIClient, callers)
	for i := range apis {
		api, conn, err := a.workloadAPI()
		if err != nil {
			return err
		}
		defer conn.Close()
		apis[i] = api
	}
	jwt := func(ctx context.Context, caller int, audience string) error {
		_, err := apis[caller].FetchJWTSVID(withHeader(ctx), &workload.JWTSVIDRequest{Audience: []string{audience}})
		return err
	}
	if b.wants("jwt_cached_per_s") {
		b.say("JWT-SVID, from memory")
		err := a.rate(ctx, "jwt_cached_per_s", "each caller over a connection that stands, on the same cores", func(ctx context.Context, caller, _ int) error {
			return jwt(ctx, caller, "https://cached.example")
		})
		if err != nil {
			return err
		}
	}
	if b.wants("jwt_uncached_per_s") {
		b.say("JWT-SVID, for new audiences")
		err := a.rate(ctx, "jwt_uncached_per_s", "callers, agent and CA node on the same cores; a CA node signs 5,000/s at most for one host", func(ctx context.Context, caller, n int) error {
			return jwt(ctx, caller, fmt.Sprintf("https://%d.example", n))
		})
		if err != nil {
			return err
		}
	}
	if b.wants("entry_delete_denied_ms") {
		if err := measureDenied(ctx, b, d, a); err != nil {
			return err
		}
	}
	if b.wants("attest_pid_ms") {
		return measureAttestation(ctx, b, a)
	}
	return nil
}

// rate reports how often the callers can call in a second, and what it costs the agent.
func (a *agent) rate(ctx context.Context, name, note string, call func(ctx context.Context, caller, n int) error) error {
	b := a.domain.bench
	if _, _, err := drive(ctx, b.while()/4, func(ctx context.Context, caller, n int) error { return call(ctx, caller, -n) }); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	before, err := process.CPUOf(a.process.PID())
	if err != nil {
		return err
	}
	calls, took, err := drive(ctx, b.while(), call)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	after, err := process.CPUOf(a.process.PID())
	b.report(name, float64(calls)/took.Seconds(), calls, "%.0f us CPU of the agent each; %s", perItem(after-before, calls), note)
	return err
}

// measureDenied deletes the only entry of a workload that holds a stream open. The
// entry that others rest on must be gone for that.
func measureDenied(ctx context.Context, b *bench, d *domain, a *agent) error {
	n := d.nodes[0]
	if err := n.change(ctx, remove("entry/standing")); err != nil {
		return err
	}
	count := b.count(100, 3)
	b.say("entry deleted to PermissionDenied, %d times", count)
	var times []time.Duration
	for i := range count {
		e := entry(fmt.Sprintf("short-%d", i), "h1")
		if err := n.change(ctx, create(e)); err != nil {
			return err
		}
		w, err := a.watchFor(ctx, e)
		if err != nil {
			return err
		}
		began := time.Now()
		err = n.change(ctx, remove(e.GetId()))
		if err == nil {
			err = w.until(ctx, func([]*workload.X509SVID) bool { return false })
		}
		took := time.Since(began)
		w.close()
		if status.Code(err) != codes.PermissionDenied {
			return fmt.Errorf("the stream of a workload without an entry: %w", err)
		}
		times = append(times, took)
	}
	b.report("entry_delete_denied_ms", milliseconds(percentile(times, 99)), count, "from the operator's call to the end of the workload's stream; median %.1f ms", milliseconds(percentile(times, 50)))
	return nil
}

// watchFor opens a stream that holds an entry's SVID. The agent may not know the entry yet.
func (a *agent) watchFor(ctx context.Context, e *statev1.Entry) (w *watch, err error) {
	err = a.domain.until(ctx, "the workload has its entry", func(ctx context.Context) error {
		if w, err = a.watch(context.WithoutCancel(ctx)); err != nil {
			return err
		}
		if err = w.until(ctx, func(svids []*workload.X509SVID) bool { return holds(svids, e) }); err != nil {
			w.close()
		}
		return err
	})
	return w, err
}

// measureAttestation asks the agent what it sees of processes that were not there before.
func measureAttestation(ctx context.Context, b *bench, a *agent) error {
	count := b.count(500, 10)
	b.say("attestation, %d processes", count)
	client := admin.NewClient(a.adminSocket)
	var times []time.Duration
	for i := range count + 1 {
		// A large executable that only waits for what comes on its standard input.
		command := exec.CommandContext(ctx, b.exe, "entry", "create", "-f", "-")
		stdin, err := command.StdinPipe()
		if err != nil {
			return err
		}
		if err := command.Start(); err != nil {
			return err
		}
		sleep(ctx, 20*time.Millisecond) // for its own start to be over
		began := time.Now()
		seen, err := client.Explain(ctx, command.Process.Pid)
		took := time.Since(began)
		stdin.Close()
		command.Wait() // it complains that it was given no entry
		if err != nil {
			return err
		}
		if len(seen.Selectors) == 0 {
			return fmt.Errorf("the agent sees nothing of process %d", command.Process.Pid)
		}
		if i > 0 { // the first of the executable is the one that has it hashed
			times = append(times, took)
		}
	}
	b.report("attest_pid_ms", milliseconds(percentile(times, 99)), count, "asked as `entente agent explain-pid` does, its HTTP included; median %.2f ms", milliseconds(percentile(times, 50)))
	return nil
}

// measureManyEntries has an agent hold 6,000 entries.
func measureManyEntries(ctx context.Context, b *bench) error {
	count := b.count(6000, 100)
	d, err := b.domain(ctx, 1)
	if err != nil {
		return err
	}
	defer d.close()
	entries := make([]*statev1.Entry, count)
	for i := range entries {
		entries[i] = entry(fmt.Sprintf("svc-%d", i), "h1")
	}
	if err := d.nodes[0].createEntries(ctx, entries); err != nil {
		return err
	}
	b.say("an agent takes %d SVIDs", count)
	began := time.Now()
	a, err := d.agent(ctx, "h1")
	if err != nil {
		return err
	}
	took := time.Since(began)
	first, err := rss(a.process)
	if err != nil {
		return err
	}
	settle := 8 * b.while()
	if err := sleep(ctx, settle); err != nil {
		return err
	}
	now, err := rss(a.process)
	b.report("agent_rss_6000_mib", now/mib, count, "%.0f s after it held all; %.0f MiB right then, %.1f s after its start", settle.Seconds(), first/mib, took.Seconds())
	return err
}
