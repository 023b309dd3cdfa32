package meshagent

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/client"
)

// riseAfter is how many good checks in a row make an instance healthy again that
// was healthy before. The first good one of all is enough, and so is each bad one.
const riseAfter = 2

// checked is a service of this host and how it is to be checked.
type checked struct {
	name string
	url  string // HTTP GET, 2xx is good; empty: a TCP connect is
	addr string
}

// watchHealth checks every service of this host that listens, and reports them as
// instances. One goroutine per service; all have ended when it returns.
func (a *Agent) watchHealth(ctx context.Context) error {
	var mu sync.Mutex
	healthy := map[string]bool{}
	changed := make(chan struct{}, 1)

	var checks sync.WaitGroup
	running := map[checked]context.CancelFunc{}
	defer checks.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	for {
		state := a.State()
		services := a.services(state)
		for c, stop := range running {
			if !slices.Contains(services, c) {
				stop()
				delete(running, c)
			}
		}
		for _, c := range services {
			if running[c] != nil {
				continue
			}
			checkCtx, stop := context.WithCancel(ctx)
			running[c] = stop
			checks.Go(func() {
				a.watchService(checkCtx, c, func(good bool) {
					mu.Lock()
					defer mu.Unlock()
					if checkCtx.Err() == nil {
						healthy[c.name] = good
						select {
						case changed <- struct{}{}:
						default:
						}
					}
				})
			})
		}
		if state.Ready {
			mu.Lock()
			instances := make([]client.Instance, 0, len(services))
			for _, c := range services {
				instances = append(instances, client.Instance{
					Service: c.name, Agent: a.cfg.Name, Datacenter: a.cfg.Datacenter,
					Address: a.cfg.Sidecar.Advertise, Healthy: healthy[c.name],
				})
			}
			mu.Unlock()
			a.report(instances)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-state.Changed():
		case <-changed:
		}
	}
}

// services are the host's services that listen, by name: those of which it holds
// the entry.
func (a *Agent) services(state *State) []checked {
	var list []checked
	for _, object := range state.View.Objects {
		s := object.GetService()
		if s == nil {
			continue
		}
		addr, err := a.cfg.App(s.GetPort())
		if _, here := state.Identity(ca.ServiceEntry(s.GetName())); !here || err != nil {
			continue
		}
		list = append(list, checked{name: s.GetName(), url: healthURL(s, addr), addr: addr})
	}
	slices.SortFunc(list, func(x, y checked) int { return cmp.Compare(x.name, y.name) })
	return list
}

func healthURL(s *statev1.Service, addr string) string {
	if s.GetHealthPath() == "" {
		return ""
	}
	return "http://" + addr + s.GetHealthPath()
}

// watchService checks one service until ctx ends, and tells what changes.
func (a *Agent) watchService(ctx context.Context, c checked, tell func(good bool)) {
	// A little longer or shorter for each, so that a host's services are not all
	// checked in one moment.
	ticker := time.NewTicker(a.cfg.Health.Interval*19/20 + rand.N(a.cfg.Health.Interval/10+1))
	defer ticker.Stop()
	first, ever, good, streak := true, false, false, 0
	for {
		err := a.check(ctx, c)
		if ctx.Err() != nil {
			return
		}
		streak++
		if err != nil {
			streak = 0
		}
		now := err == nil && (good || !ever || streak >= riseAfter)
		if first || now != good {
			tell(now)
			if !first || !now {
				a.log.Info("health", "service", c.name, "address", c.addr, "healthy", now, "error", err)
			}
		}
		good, ever, first = now, ever || now, false
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// check makes one check.
func (a *Agent) check(ctx context.Context, c checked) error {
	ctx, cancel := context.WithTimeout(ctx, a.cfg.Health.Timeout)
	defer cancel()
	if c.url == "" {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", c.addr)
		if err != nil {
			return err
		}
		return conn.Close()
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, c.url, nil)
	if err != nil {
		return err
	}
	request.Host = ca.ServiceName(c.name, a.cfg.Domain())
	request.Header.Set("User-Agent", "entente-agent-health")
	answer, err := a.health.RoundTrip(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode < 200 || answer.StatusCode > 299 {
		return fmt.Errorf("it answers %s", answer.Status)
	}
	_, err = io.CopyN(io.Discard, answer.Body, 64<<10)
	if err == io.EOF {
		err = nil
	}
	return err
}

// healthTransport makes a connection per check: an application that accepts no
// more connections is not healthy.
func healthTransport() *http.Transport {
	return &http.Transport{DisableKeepAlives: true, MaxResponseHeaderBytes: 64 << 10}
}
