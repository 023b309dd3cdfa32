package dataplane

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/entente-mesh/entente/internal/dataplane/header"
)

// load sends requests at fixed instants, whether the ones before are answered or
// not, and counts those without a good answer.
type load struct {
	mu       sync.Mutex
	sent     int
	failures []string
	slowest  time.Duration
}

func (l *load) run(c *http.Client, url, host string, every time.Duration, stop <-chan struct{}) {
	var all sync.WaitGroup
	defer all.Wait()
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case at := <-tick.C:
			all.Go(func() {
				why := ""
				r, _ := http.NewRequest("GET", url, nil)
				r.Host = host
				res, err := c.Do(r)
				if err != nil {
					why = err.Error()
				} else {
					body, err := io.ReadAll(res.Body)
					_ = res.Body.Close()
					if res.StatusCode != 200 || err != nil {
						why = fmt.Sprint(res.Status, " ", string(body), " ", err)
					}
				}
				l.mu.Lock()
				defer l.mu.Unlock()
				l.sent++
				l.slowest = max(l.slowest, time.Since(at))
				if why != "" {
					l.failures = append(l.failures, why)
				}
			})
		}
	}
}

// during runs f while trading's portfolio in dc1 keeps asking banking's accounts, and
// some time before and after.
func during(t *testing.T, w *world, every time.Duration, f func()) {
	t.Helper()
	for _, a := range w.banking.apps {
		h := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			time.Sleep(15 * time.Millisecond) // so that there is always something in flight
			_, _ = io.WriteString(rw, "ok")
		})
		a.handler.Store(&h)
	}
	l, stop, done := &load{}, make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		l.run(w.client(), w.trading.outURL[0]+"/v1/balance", "accounts.banking.example", every, stop)
	}()
	time.Sleep(200 * time.Millisecond)
	f()
	time.Sleep(300 * time.Millisecond)
	close(stop)
	<-done
	t.Logf("%d requests, %d failed, slowest %v; dc2 served %d", l.sent, len(l.failures), l.slowest.Round(time.Millisecond), w.banking.apps[1].served.Load())
	if len(l.failures) > 0 {
		t.Errorf("%d of %d requests failed: %s", len(l.failures), l.sent, l.failures[0])
	}
	if l.sent < 20 {
		t.Errorf("only %d requests: no load", l.sent)
	}
	if w.memory != nil && l.slowest > time.Second {
		t.Errorf("the slowest took %v", l.slowest)
	}
}

// kills are the processes on the path that may die; the caller's own sidecar may not.
var kills = map[string]func(*world) []*process{
	"own gateway":                func(w *world) []*process { return w.trading.gateways[:1] },
	"peer gateway":               func(w *world) []*process { return w.banking.gateways[:1] },
	"callee's sidecar":           func(w *world) []*process { return w.banking.sidecars[:1] },
	"gateways of the datacenter": func(w *world) []*process { return []*process{w.trading.gateways[0], w.banking.gateways[0]} },
	"all of the datacenter": func(w *world) []*process {
		return []*process{w.trading.gateways[0], w.banking.gateways[0], w.banking.sidecars[0]}
	},
}

func killAndRestart(w *world, victims []*process) {
	for _, p := range victims {
		p.kill()
	}
	time.Sleep(500 * time.Millisecond)
	for _, p := range victims {
		d := w.banking
		if p.config.TrustDomain == trading {
			d = w.trading
		}
		p.restart(d.view(w.t))
	}
	time.Sleep(5 * time.Second) // probe, then the hold time
}

// Any process on the path may be killed, and come back; 100 requests a second in virtual time.
func TestKillCostsNoIdempotentRequest(t *testing.T) {
	for name, kill := range kills {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, inMemory)
				during(t, w, 10*time.Millisecond, func() { killAndRestart(w, kill(w)) })
				before := w.banking.apps[0].served.Load()
				if a := do(t, w.client(), "GET", w.trading.outURL[0]+"/v1/balance", "accounts.banking.example", nil, nil); a.StatusCode != 200 {
					t.Error(a)
				}
				if w.banking.apps[0].served.Load() == before {
					t.Error("dc1 is back and was not asked again")
				}
			})
		})
	}
	t.Run("the application", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, inMemory)
			during(t, w, 10*time.Millisecond, func() {
				_ = w.banking.apps[0].server.Close()
				time.Sleep(300 * time.Millisecond)
			})
			if w.banking.apps[1].served.Load() == 0 {
				t.Error("dc2 was never asked")
			}
		})
	})
	t.Run("control: everything", func(t *testing.T) {
		w := newWorld(t)
		for _, p := range append(w.banking.sidecars[:], w.banking.gateways[:]...) {
			p.kill()
		}
		a := get(t, w.trading.outURL[0], "accounts.banking.example", "/v1/balance")
		if a.StatusCode != 502 || a.Header.Get(header.Outcome) != header.NotSent {
			t.Error(a)
		}
	})
}

// The same over the kernel's loopback, with resets; slowly, as the machine may be busy.
func TestKillOverLoopback(t *testing.T) {
	w := newWorld(t)
	during(t, w, 20*time.Millisecond, func() { killAndRestart(w, kills["all of the datacenter"](w)) })
}

// A place that swallows everything costs one request less than a second, and the next ones nothing.
func TestBlackHole(t *testing.T) {
	for name, hole := range map[string]func(*world, *memoryListener){
		"packets vanish": func(w *world, l *memoryListener) { l.dropped.Store(true) },
		"frozen process": func(w *world, l *memoryListener) { l.frozen.Store(true) },
		"open connections hang too": func(w *world, l *memoryListener) {
			l.frozen.Store(true)
			h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
			w.trading.apps[0].handler.Store(&h)
			time.Sleep(time.Second) // since the last answer
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, inMemory)
				c := w.client()
				ask := func() (time.Duration, answer) {
					started := time.Now()
					a := do(t, c, "GET", w.trading.outURL[0]+"/", "market.trading.example", nil, nil)
					return time.Since(started), a
				}
				if took, a := ask(); a.StatusCode != 200 || took > 0 {
					t.Fatalf("control: %v after %v", a, took)
				}
				p := w.trading.sidecars[0]
				if name != "open connections hang too" {
					for _, q := range w.trading.processes() { // no connection is open
						q.upstream.closeAll()
					}
				}
				hole(w, p.ln.Listener.(*memoryListener))
				took, a := ask()
				if a.StatusCode != 200 || took >= time.Second {
					t.Errorf("%v after %v", a, took)
				}
				t.Logf("the first request took %v", took)
				time.Sleep(2 * time.Second) // until the probe has failed
				if took, a := ask(); a.StatusCode != 200 || took > 0 {
					t.Errorf("the next: %v after %v: the place was not left out", a, took)
				}
			})
		})
	}
}

// A slow application is asked once, by everybody on the way, and is nobody's reason to be left out.
func TestSlowIsNotDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, inMemory)
		h := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			time.Sleep(5 * time.Second)
			_, _ = io.WriteString(rw, "ok")
		})
		w.banking.apps[0].handler.Store(&h)
		var all sync.WaitGroup
		for range 50 {
			all.Go(func() {
				a := do(t, w.client(), "GET", w.trading.outURL[0]+"/v1/balance", "accounts.banking.example", nil, nil)
				if a.StatusCode != 200 {
					t.Error(a)
				}
			})
			time.Sleep(100 * time.Millisecond)
		}
		all.Wait()
		if one, two := w.banking.apps[0].served.Load(), w.banking.apps[1].served.Load(); one != 50 || two != 0 {
			t.Errorf("50 requests; dc1 was asked %d times, dc2 %d times", one, two)
		}
	})
}

// After sending, only idempotent requests are sent again; the others say so.
func TestOutcomeUnknown(t *testing.T) {
	tests := []struct {
		name, method string
		header       http.Header
		body         string
		status       int
		outcome      string
		times        int64 // that applications were asked, in total
	}{
		{"control: GET goes elsewhere", "GET", nil, "", 200, "", 2},
		{"PUT is idempotent", "PUT", nil, "state", 200, "", 2},
		{"POST", "POST", nil, "order", 502, header.Unknown, 1},
		{"POST with a key", "POST", http.Header{"Idempotency-Key": {"a"}}, "order", 200, "", 2},
		{"PATCH", "PATCH", nil, "order", 502, header.Unknown, 1},
		{"PUT too big to be kept", "PUT", nil, strings.Repeat("x", maxReplay+1), 502, header.Unknown, 1},
		{"PUT just small enough", "PUT", nil, strings.Repeat("x", maxReplay), 200, "", 2},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			lose := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
				_, _ = io.Copy(io.Discard, r.Body)
				panic(http.ErrAbortHandler) // after having read it all
			})
			w.trading.apps[0].handler.Store(&lose)
			a := do(t, client, test.method, w.trading.outURL[0]+"/", "market.trading.example", test.header, strings.NewReader(test.body))
			if a.StatusCode != test.status || a.Header.Get(header.Outcome) != test.outcome {
				t.Fatalf("%d %s", a.StatusCode, a.Header)
			}
			if test.status == 200 && a.body != test.body+"ok" {
				t.Errorf("the body was not sent again as it was: %d bytes", len(a.body))
			}
			if n := w.trading.apps[0].served.Load() + w.trading.apps[1].served.Load(); n != test.times {
				t.Errorf("applications were asked %d times, not %d", n, test.times)
			}
			record := w.trading.out[0].access.of(a.id())
			if test.outcome != "" && record["outcome"] != "unknown" {
				t.Errorf("%v", record)
			}
		})
	}
}

// Nothing was sent: everything may be sent elsewhere, POST too.
func TestNotSentIsAlwaysRepeated(t *testing.T) {
	w := newWorld(t)
	_ = w.trading.apps[0].server.Close()
	a := do(t, client, "POST", w.trading.outURL[0]+"/", "market.trading.example", nil, strings.NewReader("order"))
	if a.StatusCode != 200 || a.body != "orderok" {
		t.Fatal(a)
	}
	if record := w.trading.out[0].access.of(a.id()); record["attempts"] != 2.0 {
		t.Errorf("%v", record)
	}
}

// The deadline travels, and shrinks; a request that may not be repeated is waited for until then.
func TestDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, inMemory, func(w *world) { w.timing.Deadline = 4 * time.Second })
		told := make(chan string, 1)
		h := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			told <- r.Header.Get(header.TimeoutMS)
			_, _ = io.Copy(io.Discard, r.Body) // net/http looks for a lost client only after that
			<-r.Context().Done()
		})
		w.trading.apps[0].handler.Store(&h)
		started := time.Now()
		a := do(t, w.client(), "POST", w.trading.outURL[0]+"/", "market.trading.example", nil, strings.NewReader("x"))
		if took := time.Since(started); a.StatusCode != 504 || took != 4*time.Second {
			t.Errorf("%v after %v", a, took)
		}
		if said := <-told; a.Header.Get(header.Outcome) != header.Unknown || said != "" {
			t.Error(a, said)
		}
		if n := w.trading.apps[0].served.Load() + w.trading.apps[1].served.Load(); n != 1 {
			t.Errorf("asked %d times", n)
		}
	})
}

// SVIDs of two seconds under load: connections are replaced before they end.
func TestRotationLosesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, inMemory, withTTL(2*time.Second))
		stop, done := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(done)
			tick := time.NewTicker(time.Second)
			defer tick.Stop()
			for {
				select {
				case <-stop:
					return
				case <-tick.C:
					w.rotate()
				}
			}
		}()
		during(t, w, 20*time.Millisecond, func() { time.Sleep(10 * time.Second) })
		close(stop)
		<-done
		if n := w.banking.apps[1].served.Load(); n > 0 {
			t.Errorf("%d requests went to dc2: something was left out", n)
		}
	})
}

// A door that drains finishes what it has begun and sends everybody else away.
func TestDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, inMemory)
		during(t, w, 10*time.Millisecond, func() {
			w.banking.gateways[0].cancelDoor() // SIGTERM
			time.Sleep(time.Second)
		})
		if w.banking.apps[1].served.Load() == 0 {
			t.Error("dc2 was never asked: nothing was drained")
		}
	})
}
