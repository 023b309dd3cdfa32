package scenarios

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"

	"github.com/entente-mesh/entente/scenarios/load"
	"github.com/entente-mesh/entente/scenarios/platform"
)

// group is a running load and what it has recorded so far.
type group struct {
	Load
	stop func() // no more requests; waits for those that are out

	mu      sync.Mutex
	samples []load.Sample
	broken  error // the load itself ended
}

func (g *group) record(s load.Sample) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.samples = append(g.samples, s)
}

func (g *group) recorded() ([]load.Sample, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.samples), g.broken
}

func (g *group) fail(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.broken == nil {
		g.broken = err
	}
}

// startLoad starts a group of clients; they go on until stop.
func (w *world) startLoad(ctx context.Context, l Load) (*group, error) {
	if l.From == phone {
		return w.startPhones(ctx, l)
	}
	return w.startService(ctx, l)
}

// edges are the addresses of the edges, that of a datacenter first.
func (w *world) edges(first string) []string {
	list := []string{w.find(kindEdge, w.users.domain, first).door}
	for _, u := range w.units {
		if u.kind == kindEdge && u.datacenter != first {
			list = append(list, u.door)
		}
	}
	return list
}

// An order that phones place when they POST.
var order = []byte(`{"customer":"C-1042","symbol":"ACME","quantity":1}`)

func (w *world) startPhones(ctx context.Context, l Load) (*group, error) {
	tier := l.Tier
	if tier == "" {
		tier = "gold"
	}
	phones := make([]*load.Phone, l.Clients)
	for i := range phones {
		token, err := w.users.token("good", fmt.Sprintf("%s %d", l.Name, i), tier)
		if err != nil {
			return nil, err
		}
		phones[i] = load.NewPhone(w.edges(l.Datacenter), w.roots(), token)
	}
	var body []byte
	if l.Method == http.MethodPost {
		body = order
	}
	do := func(ctx context.Context, n int) load.Sample {
		answer, attempts, unknown, err := phones[n%len(phones)].Try(ctx, l.Method, l.URL, body)
		if err != nil {
			reason := "no edge answered"
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				reason = "no answer within the deadline"
			}
			return load.Sample{Attempts: attempts, Unknown: unknown, Error: reason}
		}
		sample := platform.Judge(answer.Status, answer.Header, answer.Body)
		sample.Attempts = attempts
		return sample
	}
	ctx, cancel := context.WithCancel(ctx)
	g := &group{Load: l}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := load.Open(ctx, l.Rate.PerSecond, l.Deadline, do, g.record); err != nil {
			g.fail(err)
		}
		for _, p := range phones {
			p.Close()
		}
	}()
	g.stop = func() { cancel(); <-done }
	return g, nil
}

func (w *world) roots() *x509.CertPool { return w.users.roots }

// startService has a service's own process send the load, and reads its samples.
func (w *world) startService(ctx context.Context, l Load) (*group, error) {
	u := w.server(l.From, l.Datacenter)
	text, err := json.Marshal(platform.LoadOrder{As: l.From, Method: l.Method, URL: l.URL, Rate: l.Rate.PerSecond, Deadline: l.Deadline})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	// The sender stops when the body of its order ends, and then still says how those
	// requests went that were out.
	body, hold := io.Pipe()
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://control/load", io.MultiReader(bytes.NewReader(append(text, '\n')), body))
	if err != nil {
		cancel()
		return nil, err
	}
	answer, err := dialControl(u).Do(request)
	if err == nil && answer.StatusCode != http.StatusOK {
		said, _ := io.ReadAll(io.LimitReader(answer.Body, 4<<10))
		answer.Body.Close()
		err = errors.New(strings.TrimSpace(string(said)))
	}
	if err != nil {
		cancel()
		return nil, fmt.Errorf("start load %q at %s: %w", l.Name, u.name, err)
	}
	g := &group{Load: l}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer answer.Body.Close()
		lines := json.NewDecoder(answer.Body)
		for {
			var s load.Sample
			if err := lines.Decode(&s); err == io.EOF {
				return
			} else if err != nil {
				if ctx.Err() == nil {
					g.fail(fmt.Errorf("load %q at %s broke off: %w", l.Name, u.name, err))
				}
				return
			}
			g.record(s)
		}
	}()
	g.stop = func() {
		hold.Close()
		<-done
		cancel()
	}
	return g, nil
}
