package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/entente-mesh/entente/scenarios/process"
)

// bulkMiB is one answer of a bulk transfer.
const bulkMiB = 64

// The whole way, and what of it is nginx's too: see mesh and nginxChain.
var wholeWay = []string{"chain_cpu_1_ratio", "chain_cpu_8_ratio", "chain_cpu_64_ratio", "chain_p50_1_ratio", "chain_rate_64_ratio",
	"h2_1_ratio", "h2_8_ratio", "h2_64_ratio", "sidecar_ratio", "h1_post_ratio", "bulk_ratio", "conn_ratio"}

var dataplaneSuite = suite{
	name:  "dataplane",
	short: "Measure sidecars and gateways beside nginx on the same way",
	lines: append([]line{
		{"chain_cpu_1_ratio", "x", "CPU of the four hops for a GET of 1 KiB, one connection, to nginx's for its four", 1, none},
		{"chain_cpu_8_ratio", "x", "the same, 8 connections", 0.9, none},
		{"chain_cpu_64_ratio", "x", "the same, 64 connections", 0.85, none},
		{"chain_p50_1_ratio", "x", "time of a request over one connection, median, to nginx's", 1, none},
		{"chain_rate_64_ratio", "x", "requests a second over 64 connections, to nginx's", 1.1, none},
		{"h2_1_ratio", "x", "CPU of a gateway for a GET of 1 KiB, HTTP/2 in and out, one at a time, to a hop of nginx's", 0.85, none},
		{"h2_8_ratio", "x", "the same, 8 at once", 0.85, none},
		{"h2_64_ratio", "x", "the same, 64 at once", 0.8, none},
		{"sidecar_ratio", "x", "CPU of the caller's sidecar, plain HTTP/1.1 in and mTLS out, 64 connections, to nginx's first hop", 1.1, none},
		{"h1_post_ratio", "x", "CPU of the called sidecar for a POST of 1 KiB to an application that closes, to nginx's last hop", 1, none},
		{"bulk_ratio", "x", "CPU of the four hops for a GB, to nginx's", 0.95, none},
		{"conn_ratio", "x", "CPU of the called sidecar for a request on a new mTLS connection, to nginx's last hop", 0.4, none},
		{"idle_kib", "KiB", "resident memory of the called sidecar for each idle mTLS connection", 22, none},
		{"p99_added_ms", "ms", "99th percentile at 4,000 requests a second, open loop, beyond that of the application alone", 3, none},
	}, ofRun(25)...),
	groups: []group{
		{wholeWay, measureWholeWay},
		{[]string{"idle_kib"}, measureIdle},
		{[]string{"p99_added_ms"}, measureAdded},
	},
}

// window is how long one load lasts: with few items, too, long enough for the system's
// account of processor time, which counts in 10 ms.
func (b *bench) window() time.Duration { return max(b.while()/2, 400*time.Millisecond) }

// beside is what was measured in a round of Entente's hops and of nginx's, right after
// each other.
type beside struct{ ours, peers []asked }

// both measures a load on both ways in turn, round after round; who begins changes. A
// round before them does not count: hops open their connections to each other in it.
func (b *bench) both(ctx context.Context, ours, peers func(context.Context) (asked, error)) (r beside, err error) {
	warm := b.count(1, 0)
	for round := range warm + b.count(5, 1) {
		var one [2]asked
		for _, i := range []int{round % 2, 1 - round%2} {
			if one[i], err = []func(context.Context) (asked, error){ours, peers}[i](ctx); err != nil {
				return r, fmt.Errorf("%s: %w", []string{"entente", "nginx"}[i], err)
			}
		}
		if round >= warm {
			r.ours, r.peers = append(r.ours, one[0]), append(r.peers, one[1])
		}
	}
	return r, nil
}

// compare reports a ratio: the median over the rounds, with both medians in the note.
func (b *bench) compare(name string, r beside, unit string, of func(asked) float64, format string, args ...any) {
	var ratios, ours, peers []float64
	items := 0
	for i := range r.ours {
		ours, peers = append(ours, of(r.ours[i])), append(peers, of(r.peers[i]))
		ratios = append(ratios, ours[i]/max(peers[i], 1e-9))
		items += len(r.ours[i].took)
	}
	b.report(name, median(ratios), items, "%s %s, nginx %s, rounds %s; %s", figure(rounded(median(ours))), unit, figure(rounded(median(peers))),
		spread(roundedAll(ratios), ""), fmt.Sprintf(format, args...))
}

func roundedAll(list []float64) []float64 {
	out := make([]float64, len(list))
	for i, v := range list {
		out[i] = rounded(v)
	}
	return out
}

// measureWholeWay sends the same requests through Entente's four hops and nginx's.
func measureWholeWay(ctx context.Context, b *bench) error {
	if _, err := nginxBinary(); err != nil {
		return err // each line says so, and nothing is started for it
	}
	m, err := b.mesh(ctx)
	if err != nil {
		return err
	}
	defer m.close()
	stop, err := serveApp(m.app)
	if err != nil {
		return err
	}
	defer stop()
	n, err := b.nginxPeer(ctx, m.app)
	if err != nil {
		return err
	}
	defer n.close()
	if err := m.flows(ctx); err != nil {
		return err
	}
	way := func(what ask, d time.Duration) (beside, error) {
		return b.both(ctx,
			func(ctx context.Context) (asked, error) { what.address = m.entry; return what.run(ctx, d, m.hops()) },
			func(ctx context.Context) (asked, error) { what.address = n.entry; return what.run(ctx, d, n.processes) })
	}
	for _, connections := range []int{1, 8, 64} {
		chain, gateways := fmt.Sprintf("chain_cpu_%d_ratio", connections), fmt.Sprintf("h2_%d_ratio", connections)
		if !b.wants(chain) && !b.wants(gateways) && !(connections == 1 && b.wants("chain_p50_1_ratio")) &&
			!(connections == 64 && (b.wants("chain_rate_64_ratio") || b.wants("sidecar_ratio"))) {
			continue
		}
		b.say("GET, %d connections", connections)
		r, err := way(ask{request: get("/"), connections: connections}, b.window())
		if err != nil {
			return err
		}
		b.compare(chain, r, "us a hop", func(a asked) float64 { return a.cpuOf(0, 4) / 4 }, "four processes on the machine of client and application")
		b.compare(gateways, r, "us", func(a asked) float64 { return a.cpuOf(1, 3) / 2 }, "of the gateways' two hops; nginx speaks HTTP/1.1 to the next")
		switch connections {
		case 1:
			b.compare("chain_p50_1_ratio", r, "ms", func(a asked) float64 { return milliseconds(percentile(a.took, 50)) }, "client and application are the same")
		case 64:
			b.compare("chain_rate_64_ratio", r, "/s", asked.perSecond, "on all cores of the machine")
			b.compare("sidecar_ratio", r, "us", func(a asked) float64 { return a.cpuOf(0, 1) }, "it finds out which process asks, too")
		}
	}
	if b.wants("h1_post_ratio") {
		b.say("POST to an application that closes")
		r, err := way(ask{request: post(strings.Repeat("x", 1<<10)), connections: 8}, b.window())
		if err != nil {
			return err
		}
		b.compare("h1_post_ratio", r, "us", func(a asked) float64 { return a.cpuOf(3, 4) }, "8 connections; it takes HTTP/2 from its gateway, nginx HTTP/1.1")
	}
	if b.wants("bulk_ratio") {
		b.say("bulk")
		r, err := way(ask{request: get("/bulk"), connections: 1}, b.window())
		if err != nil {
			return err
		}
		b.compare("bulk_ratio", r, "s/GB", func(a asked) float64 { return a.cpuOf(0, 4) * float64(len(a.took)) / 1e6 / (float64(a.bytes) / 1e9) },
			"answers of %d MiB over one connection, all four hops", bulkMiB)
	}
	if b.wants("conn_ratio") {
		return m.measureConnections(ctx, n)
	}
	return nil
}

// flows waits until the way is open: the catalogue has to reach all hops, and the bundles.
func (m *mesh) flows(ctx context.Context) error {
	return m.calling.until(ctx, "a request passes all hops", func(ctx context.Context) error {
		c, err := ask{address: m.entry}.dial(ctx)
		if err != nil {
			return err
		}
		defer c.Close()
		_, _, err = c.ask(get("/"))
		return err
	})
}

// clientTLS is the configuration of a client that the called sidecar takes: the
// application's own SVID.
func (m *mesh) clientTLS(ctx context.Context) (*tls.Config, error) {
	svid, roots, err := m.identity(ctx)
	if err != nil {
		return nil, err
	}
	config := tlsconfig.MTLSClientConfig(svid, roots, tlsconfig.AuthorizeID(spiffeid.RequireFromString("spiffe://"+servingDomain+"/app")))
	config.ServerName, config.NextProtos, config.CurvePreferences = callee, []string{"http/1.1"}, []tls.CurveID{tls.X25519}
	return config, nil
}

// measureConnections opens a new connection to the last hop for each request.
func (m *mesh) measureConnections(ctx context.Context, n *nginxChain) error {
	b := m.bench
	b.say("new connections")
	ours, err := m.clientTLS(ctx)
	if err != nil {
		return err
	}
	peers, err := n.clientTLS()
	if err != nil {
		return err
	}
	r, err := b.both(ctx,
		func(ctx context.Context) (asked, error) {
			return ask{address: m.serving.at(inboundPort), request: get("/"), connections: 4, fresh: ours}.run(ctx, b.window(), []*process.Process{m.serving.agent.process})
		},
		func(ctx context.Context) (asked, error) {
			return ask{address: n.last, request: get("/"), connections: 4, fresh: peers}.run(ctx, b.window(), n.processes[len(n.processes)-1:])
		})
	if err != nil {
		return err
	}
	b.compare("conn_ratio", r, "us", func(a asked) float64 { return a.cpuOf(0, 1) }, "TLS 1.3, X25519, full handshakes, both ends verified, four at once")
	return nil
}

// measureIdle opens many connections to the called sidecar and lets them be.
func measureIdle(ctx context.Context, b *bench) error {
	m, err := b.mesh(ctx)
	if err != nil {
		return err
	}
	defer m.close()
	stop, err := serveApp(m.app)
	if err != nil {
		return err
	}
	defer stop()
	config, err := m.clientTLS(ctx)
	if err != nil {
		return err
	}
	if err := sleep(ctx, b.while()); err != nil {
		return err
	}
	sidecar := m.serving.agent.process
	before, err := rss(sidecar)
	if err != nil {
		return err
	}
	count := b.count(2000, 50)
	b.say("%d idle connections", count)
	for range count {
		c, err := ask{address: m.serving.at(inboundPort), fresh: config}.dial(ctx)
		if err != nil {
			return err
		}
		defer c.Close()
	}
	if err := sleep(ctx, 3*b.while()); err != nil {
		return err
	}
	after, err := rss(sidecar)
	if err != nil {
		return err
	}
	b.report("idle_kib", (after-before)/1024/float64(count), count, "after their handshakes and %.0f s, no request on them; %.0f MiB before, %.0f MiB with them", (3 * b.while()).Seconds(), before/mib, after/mib)
	return nil
}

// measureAdded sends at a steady pace, whether answers come or not, to the application
// alone and through all hops.
func measureAdded(ctx context.Context, b *bench) error {
	m, err := b.mesh(ctx)
	if err != nil {
		return err
	}
	defer m.close()
	stop, err := serveApp(m.app)
	if err != nil {
		return err
	}
	defer stop()
	if err := m.flows(ctx); err != nil {
		return err
	}
	const rate, connections = 4000, 64
	what := ask{request: get("/"), connections: connections, every: time.Second * connections / rate}
	var alone, through []float64
	items := 0
	for range b.count(3, 1) {
		for _, to := range []struct {
			address string
			p99     *[]float64
		}{{m.app, &alone}, {m.entry, &through}} {
			what.address = to.address
			got, err := what.run(ctx, b.while(), nil)
			if err != nil {
				return err
			}
			items += len(got.took)
			*to.p99 = append(*to.p99, milliseconds(percentile(got.took, 99)))
		}
	}
	b.report("p99_added_ms", max(median(through)-median(alone), 0), items, "median of the rounds; %s ms through all hops, %s ms alone, counted from when a request was to be sent; client and application share the cores with the four hops",
		figure(rounded(median(through))), figure(rounded(median(alone))))
	return nil
}
