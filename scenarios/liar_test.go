package scenarios

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/entente-mesh/entente/scenarios/evil"
	"github.com/entente-mesh/entente/scenarios/load"
	"github.com/entente-mesh/entente/scenarios/platform"
	"github.com/entente-mesh/entente/scenarios/process"
)

// healed is how long a subscriber that reaches two honest CA nodes may believe a third.
const healed = 25 * time.Second

// One of three CA nodes of each domain is in an attacker's hands: it adds a root of its
// own, says that it alone is the CA, at a revision that nothing honest will reach, keeps
// revocations to itself, and claims every session. It is then removed. No agent believes
// it for longer than healed, none learns of a revocation later than that, and no request
// is lost, neither then nor when the operators of the honest nodes remove it. The controls
// are that an agent that asks the liar believes it at first, and that the revoked SVID was
// accepted before.
func TestLyingNodes(t *testing.T) {
	path := binary(t)
	// SVIDs that live longer than the test: what is refused was revoked, and did not end.
	scenario, err := ReadFile(lenient(t, "lifetimes: {x509SVID: 16s", "lifetimes: {x509SVID: 10m"))
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", shortTemp(t))
	w, err := newWorld(&scenario.Spec, Options{Binary: path, Out: io.Discard})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()

	l := &liars{t: t, world: w, processes: map[string]*process.Process{}, forged: map[string]tls.Certificate{}, visitors: map[string]tls.Certificate{}}
	defer func() {
		if !t.Failed() {
			return
		}
		for _, u := range w.units {
			if p := w.process(u); p != nil && u.datacenter == taken && (u.kind == kindCA || u.kind == kindAgent) {
				t.Logf("%s:\n%s", u.name, p.Tail(12))
			}
		}
	}()
	if err := l.bringUp(ctx); err != nil {
		t.Fatal(err)
	}
	for i := range scenario.Spec.TrustDomains {
		for _, dc := range scenario.Spec.TrustDomains[i].Mesh {
			if err := l.attach(ctx, w.find(kindAgent, scenario.Spec.TrustDomains[i].Name, dc)); err != nil {
				t.Fatal(err)
			}
		}
	}
	g, err := w.startLoad(ctx, scenario.Spec.Load[0])
	if err != nil {
		t.Fatal(err)
	}
	defer g.stop()
	began := time.Now()
	served(ctx, t, g, began)

	l.each(func(td *TrustDomain) error {
		if err := l.admit(ctx, td); err != nil {
			return err
		}
		for _, dc := range td.Mesh {
			if d := l.dial(ctx, td, dc, l.visitors[td.Name]); !d.Accepted {
				return fmt.Errorf("control: the agent of %s in %s does not accept the visitor: %s", td.Name, dc, d.Detail)
			}
			if d := l.dial(ctx, td, dc, l.forged[td.Name]); d.Accepted {
				return fmt.Errorf("the agent of %s in %s accepts a forged SVID before the lie", td.Name, dc)
			}
		}
		return nil
	})

	lied := time.Now()
	l.each(func(td *TrustDomain) error {
		if err := syscall.Kill(l.processes[td.Name].PID(), syscall.SIGUSR1); err != nil {
			return err
		}
		// What prevents the lie altogether must change this control, not leave it out.
		captured, got, err := await(ctx, 10*time.Second, lookEvery, func(ctx context.Context) (bool, string, error) {
			d := l.dial(ctx, td, taken, l.forged[td.Name])
			if ctx.Err() != nil {
				d.Detail = "" // cut off: what came before counts
			}
			return d.Accepted, d.Detail, nil
		})
		if err != nil || !captured {
			return fmt.Errorf("control: the lie does not arrive at the agent of %s in %s: %s %v", td.Name, taken, got, err)
		}
		t.Logf("%s: an agent is captured %.1f s after the lie began", td.Name, time.Since(lied).Seconds())
		return nil
	})

	// A revocation, and the removal of the liar, which goes on. Both are agreed by the
	// honest nodes; both must be known wherever the liar is heard.
	revoked := time.Now()
	l.each(func(td *TrustDomain) error {
		honest := w.find(kindCA, td.Name, "dc1")
		if _, err := w.run(ctx, "entry", "delete", visitor, "--socket", honest.socket); err != nil {
			return err
		}
		for _, dc := range td.Mesh {
			if err := l.refused(ctx, td, dc, "the revoked SVID", l.visitors[td.Name], revoked); err != nil {
				t.Error(err)
			}
		}
		return nil
	})
	l.each(func(td *TrustDomain) error {
		for _, dc := range td.Mesh {
			if err := l.refused(ctx, td, dc, "an SVID under the liar's root", l.forged[td.Name], lied); err != nil {
				t.Error(err)
			}
		}
		return nil
	})
	removed := time.Now()
	l.each(func(td *TrustDomain) error { return l.remove(ctx, td) })
	l.each(func(td *TrustDomain) error {
		for _, dc := range td.Mesh {
			for what, cert := range map[string]tls.Certificate{"an SVID under the liar's root": l.forged[td.Name], "the revoked SVID": l.visitors[td.Name]} {
				if err := l.refused(ctx, td, dc, what+", after the removal", cert, removed); err != nil {
					t.Error(err)
				}
			}
		}
		return nil
	})
	served(ctx, t, g, time.Now())
	g.stop()
	samples, err := g.recorded()
	if err != nil {
		t.Fatal(err)
	}
	if r := load.Measure(samples, began, time.Now(), "dc1"); r.Failed > 0 || r.Requests < 20 {
		t.Errorf("%d of %d requests failed: %v", r.Failed, r.Requests, r.Errors)
	} else {
		t.Logf("%d requests, none failed; %.1f s", r.Requests, time.Since(began).Seconds())
	}
	for _, p := range w.supervisor.Died() {
		if !strings.HasPrefix(p.Name, "evil ") { // a real node stops when it is removed
			t.Error(p.Obituary())
		}
	}
}

// visitor is the entry of the test's own process.
const visitor = "entry/visitor"

// taken is where the node stands that is taken over: agents there prefer it.
const taken = "dc2"

// liars are the nodes that were taken over, one of each domain, and what the attacker and
// the test hold.
type liars struct {
	*world
	t         *testing.T
	mu        sync.Mutex
	processes map[string]*process.Process
	forged    map[string]tls.Certificate // under the liar's root
	visitors  map[string]tls.Certificate // true ones, of an entry that is to go
}

// each does something in all domains at once.
func (l *liars) each(do func(*TrustDomain) error) {
	l.t.Helper()
	if err := l.eachDomain(l.t.Context(), func(_ context.Context, td *TrustDomain) error { return do(td) }); err != nil {
		l.t.Fatal(err)
	}
}

// bringUp is the world's, with a node of each CA taken over before the mesh comes.
func (l *liars) bringUp(ctx context.Context) error {
	bundles := map[string][]byte{}
	err := l.eachDomain(ctx, func(ctx context.Context, td *TrustDomain) error {
		if err := l.foundCA(ctx, td); err != nil {
			return err
		}
		if err := l.take(ctx, td); err != nil {
			return err
		}
		bundle, err := l.run(ctx, "ca", "bundle", "--socket", l.find(kindCA, td.Name, "dc1").socket)
		l.mu.Lock()
		defer l.mu.Unlock()
		bundles[td.Name] = bundle
		return err
	})
	if err != nil {
		return err
	}
	return l.eachDomain(ctx, func(ctx context.Context, td *TrustDomain) error { return l.buildMesh(ctx, td, bundles) })
}

// take ends a node and starts the attacker's in its place. It tells the truth for now.
func (l *liars) take(ctx context.Context, td *TrustDomain) error {
	u := l.find(kindCA, td.Name, taken)
	l.kill(u)
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	orders := evil.Orders{
		Config: filepath.Join(u.dir, "config.yaml"),
		Lies:   []string{"own-root", fmt.Sprintf("ahead-%x", evil.FarAhead), "alone", "hidden-revocations", "later-connects"},
		Forged: filepath.Join(u.dir, "forged.pem"), Path: "/anybody",
	}
	p, err := l.supervisor.Start(process.Spec{Name: "evil " + u.name, Binary: exe, Env: append(orders.Env(), frugal...), Log: filepath.Join(u.dir, "evil.log")})
	if err != nil {
		return err
	}
	l.world.mu.Lock()
	l.world.processes[u] = p
	l.world.mu.Unlock()
	if err := l.ready(ctx, u); err != nil {
		return err
	}
	forged, err := tls.LoadX509KeyPair(orders.Forged, orders.Forged)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.processes[td.Name], l.forged[td.Name] = p, forged
	return err
}

// attach has an agent ask the CA node of its own datacenter, which it prefers once it
// knows the members: at its first start it knows addresses only.
func (l *liars) attach(ctx context.Context, agent *unit) error {
	near := "address=" + l.find(kindCA, agent.domain, agent.datacenter).door
	asks := func() bool {
		text, err := os.ReadFile(filepath.Join(agent.dir, "log"))
		if err != nil {
			return false
		}
		at := strings.LastIndex(string(text), "connected to the CA")
		line, _, _ := strings.Cut(string(text[max(at, 0):]), "\n")
		return at >= 0 && strings.Contains(line+" ", near)
	}
	for range 10 {
		if asks() {
			return l.healthy(ctx, agent)
		}
		l.kill(agent)
		if err := l.up(ctx, agent); err != nil {
			return err
		}
	}
	return fmt.Errorf("%s does not ask the CA node near it", agent.name)
}

// admit makes the test's own process a service of the domain, and keeps its SVID.
func (l *liars) admit(ctx context.Context, td *TrustDomain) error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	_, err = l.run(ctx, "entry", "create", visitor, "--path", "/visitor", "--host", meshHost("dc1"),
		"--selector", fmt.Sprint("unix:uid:", os.Getuid()), "--selector", "unix:path:"+exe, "--socket", l.find(kindCA, td.Name, "dc1").socket)
	if err != nil {
		return err
	}
	ok, got, err := await(ctx, 20*time.Second, lookEvery, func(ctx context.Context) (bool, string, error) {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr("unix://"+l.find(kindAgent, td.Name, "dc1").socket))
		if err != nil {
			return false, err.Error(), nil
		}
		cert := tls.Certificate{PrivateKey: svid.PrivateKey}
		for _, c := range svid.Certificates {
			cert.Certificate = append(cert.Certificate, c.Raw)
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		l.visitors[td.Name] = cert
		return true, "", nil
	})
	if err == nil && !ok {
		err = fmt.Errorf("no SVID for the visitor of %s: %s", td.Name, got)
	}
	return err
}

// dial asks an agent's sidecar something with a certificate.
func (l *liars) dial(ctx context.Context, td *TrustDomain, dc string, cert tls.Certificate) platform.Dialled {
	return platform.Dial(ctx, l.find(kindAgent, td.Name, dc).door, td.Services[0].Name+"."+td.Name, cert)
}

// refused waits until an agent refuses a certificate, for as long as it may take since a
// moment, and then makes sure that it goes on to.
func (l *liars) refused(ctx context.Context, td *TrustDomain, dc, what string, cert tls.Certificate, since time.Time) error {
	ok, got, err := await(ctx, max(time.Until(since.Add(healed)), time.Second), lookEvery, func(ctx context.Context) (bool, string, error) {
		d := l.dial(ctx, td, dc, cert)
		if ctx.Err() != nil {
			d.Detail = "" // cut off: what came before counts
		}
		return d.ByTLS, d.Detail, nil
	})
	if err != nil || !ok {
		return fmt.Errorf("%s in %s: %s is accepted %.1f s later: %s %v", td.Name, dc, what, time.Since(since).Seconds(), got, err)
	}
	l.t.Logf("%s in %s: %s is refused after %.1f s", td.Name, dc, what, time.Since(since).Seconds())
	return nil
}

// remove has the operators at both honest nodes remove the third as compromised.
func (l *liars) remove(ctx context.Context, td *TrustDomain) error {
	name := "ca-" + taken
	first, second := l.find(kindCA, td.Name, "dc1"), l.find(kindCA, td.Name, "dc3")
	if _, err := l.run(ctx, "node", "remove", name, "--compromised", "--socket", first.socket); err != nil {
		return err
	}
	change := ""
	ok, got, err := await(ctx, 10*time.Second, lookEvery, func(ctx context.Context) (bool, string, error) {
		pending, err := l.run(ctx, "node", "approve", "--socket", second.socket)
		if lines := strings.Split(strings.TrimSpace(string(pending)), "\n"); len(lines) == 2 {
			change = strings.Fields(lines[1])[0]
		}
		return change != "", string(pending), err
	})
	if err != nil || !ok {
		return fmt.Errorf("pending at %s: %s %w", second.name, got, err)
	}
	if _, err := l.run(ctx, "node", "approve", change, "--socket", second.socket); err != nil {
		return err
	}
	ok, got, err = await(ctx, 10*time.Second, lookEvery, func(ctx context.Context) (bool, string, error) {
		status, err := l.status(ctx, first)
		return len(status.GetMembers()) == len(td.CA)-1, status.String(), err
	})
	if err != nil || !ok {
		return fmt.Errorf("%s is still a member of %s: %s %w", name, td.Name, got, err)
	}
	return nil
}

// served waits until dc1 alone has answered a few requests since a moment.
func served(ctx context.Context, t *testing.T, g *group, since time.Time) {
	t.Helper()
	ok, got, err := await(ctx, time.Minute, lookEvery, func(context.Context) (bool, string, error) {
		samples, err := g.recorded()
		n := len(load.Share(samples, since, "dc1"))
		return n >= 8, fmt.Sprint(n), err
	})
	if err != nil || !ok {
		t.Fatalf("dc1 does not answer: %s good answers, %v", got, err)
	}
}
