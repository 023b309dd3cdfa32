package exchange_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/federation/bundle"
	"github.com/entente-mesh/entente/federation/exchange"
	"github.com/entente-mesh/entente/internal/peer/peertest"
)

// pipes is a network in memory: each host name in a URL is one server.
type pipes struct {
	t     *testing.T
	mu    sync.Mutex
	hosts map[string]chan net.Conn
}

func (p *pipes) dial(ctx context.Context, _, address string) (net.Conn, error) {
	p.mu.Lock()
	host := p.hosts[address]
	p.mu.Unlock()
	if host == nil {
		return nil, errors.New("nobody is there")
	}
	near, far := net.Pipe()
	select {
	case host <- far:
		return near, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

type pipeListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}
func (l *pipeListener) Close() error   { l.once.Do(func() { close(l.done) }); return nil }
func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe"} }

// start runs a server under a host name until stop is called or the test ends.
func (p *pipes) start(host string, svid x509svid.Source, handler http.Handler) (stop func()) {
	l := &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := exchange.Serve(ctx, l, svid, handler); err != nil {
			p.t.Errorf("Serve: %v", err)
		}
	}()
	p.mu.Lock()
	if p.hosts == nil {
		p.hosts = map[string]chan net.Conn{}
	}
	p.hosts[host+":443"] = l.conns
	p.mu.Unlock()
	stop = sync.OnceFunc(func() {
		p.mu.Lock()
		delete(p.hosts, host+":443")
		p.mu.Unlock()
		cancel()
		<-done
	})
	p.t.Cleanup(stop)
	return stop
}

// world is a follower of trading's bundle and what it has reported.
type world struct {
	*pipes
	ca       *peertest.Authority
	endpoint *x509svid.SVID
	config   exchange.FollowConfig

	mu       sync.Mutex
	accepted []uint64
	at       []time.Time
	latest   exchange.Status
	fail     error // what Accept answers
}

func newWorld(t *testing.T, hosts ...string) *world {
	t.Cleanup(func() { time.Sleep(time.Minute) }) // last: TLS takes seconds to say goodbye to a pipe nobody reads
	ca := peertest.NewAuthority(trading)
	w := &world{pipes: &pipes{t: t}, ca: ca, endpoint: ca.Issue(endpointID.Path(), peertest.TTL(1000*time.Hour))}
	w.config = exchange.FollowConfig{
		Endpoint:  exchange.Endpoint{TrustDomain: trading, ID: endpointID, Dial: w.dial},
		Bootstrap: jwks(1, ca),
		Accept: func(_ context.Context, f *exchange.Fetched) error {
			w.mu.Lock()
			defer w.mu.Unlock()
			if w.fail == nil {
				w.accepted, w.at = append(w.accepted, f.Record.GetSequence()), append(w.at, time.Now())
			}
			return w.fail
		},
		OnStatus: func(s exchange.Status) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.latest = s
		},
	}
	for _, host := range hosts {
		w.config.URLs = append(w.config.URLs, "https://"+host+"/bundle.json")
	}
	return w
}

func (w *world) follow() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- exchange.Follow(ctx, w.config) }()
	w.t.Cleanup(func() {
		began := time.Now()
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) || time.Since(began) > 10*time.Second {
			w.t.Errorf("Follow returned %v after %s", err, time.Since(began))
		}
	})
}

func (w *world) sequences() []uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.accepted)
}

func (w *world) status() exchange.Status {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.latest
}

func (w *world) expect(want ...uint64) {
	w.t.Helper()
	synctest.Wait()
	if got := w.sequences(); !slices.Equal(got, want) {
		w.t.Errorf("accepted %v, want %v; status %+v", got, want, w.status())
	}
}

func counting(n *atomic.Int64, handler http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n.Add(1)
		handler.ServeHTTP(w, r)
	})
}

// A new bundle is there in one round trip, whenever it comes, with one request a minute in between.
// Requirements: 117.
func TestFollowHeldBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "a")
		p := publish(1, jwks(1, w.ca))
		var requests atomic.Int64
		w.start("a", w.endpoint, counting(&requests, exchange.Handler("/bundle.json", p.source)))
		w.follow()
		time.Sleep(10 * time.Second)
		w.expect(1) // the bootstrap bundle itself is reported too
		for sequence, pause := range []time.Duration{0, 0, 25 * time.Second, 59*time.Second + 999*time.Millisecond, 61 * time.Second, 30 * time.Minute} {
			if sequence < 2 {
				continue
			}
			time.Sleep(pause)
			before := time.Now()
			p.set(uint64(sequence), jwks(uint64(sequence), w.ca))
			time.Sleep(2 * time.Second)
			synctest.Wait()
			if n := len(w.sequences()); n != sequence || w.at[n-1].Sub(before) > time.Second {
				t.Errorf("sequence %d: %v, at %v, changed %s", sequence, w.sequences(), w.at, before)
			} else if sequence == 2 && w.at[n-1] != before {
				t.Errorf("noticed after %s", w.at[n-1].Sub(before))
			}
		}
		if n := requests.Load(); n < 32 || n > 45 {
			t.Errorf("%d requests in half an hour", n)
		}
		if s := w.status(); s.Failures != 0 || s.Error != "" || s.Sequence != 5 || s.Refused != "" || s.URL != "https://a/bundle.json" || time.Since(s.Succeeded) > time.Minute {
			t.Errorf("status %+v", s)
		}
	})
}

// How often a server is asked, whatever it says.
// Requirements: 113, 117, 144, T4.
func TestFollowPace(t *testing.T) {
	authority := func(w *world) []byte { return jwks(1, w.ca) }
	hint := func(seconds string) func(w *world) []byte {
		return func(w *world) []byte {
			return []byte(strings.Replace(string(jwks(1, w.ca)), `"spiffe_sequence"`, `"spiffe_refresh_hint":`+seconds+`,"spiffe_sequence"`, 1))
		}
	}
	tests := []struct {
		name     string
		body     func(*world) []byte
		header   map[string]string
		status   int // for a conditional request; 0: 200
		over     time.Duration
		min, max int64
	}{
		{"no hint", authority, nil, 0, time.Hour, 48, 54},
		{"hint of 300 s", hint("300"), nil, 0, time.Hour, 48, 54},
		{"hint of 10 s", hint("10"), nil, 0, 3 * time.Minute, 36, 37},
		{"hint of 0", hint("0"), nil, 0, time.Hour, 48, 54},
		{"negative hint", hint("-1"), nil, 0, time.Hour, 48, 54},
		{"hint of a century", hint("3153600000"), nil, 0, time.Hour, 12, 14},
		{"knows conditions, does not wait", hint("60"), map[string]string{"ETag": `"1"`}, 304, 20 * time.Minute, 80, 90},
		{"has a tag, ignores conditions", hint("60"), map[string]string{"ETag": `"1"`}, 200, 20 * time.Minute, 80, 90},
		{"says that it waited, and did not", hint("60"), map[string]string{"ETag": `"1"`, "Preference-Applied": "wait"}, 304, 30 * time.Second, 25, 31},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, "a")
				var requests atomic.Int64
				body := test.body(w)
				w.start("a", w.endpoint, counting(&requests, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
					for name, value := range test.header {
						rw.Header().Set(name, value)
					}
					if r.Header.Get("If-None-Match") != "" && test.status != 0 {
						rw.WriteHeader(test.status)
						if test.status == 304 {
							return
						}
					}
					rw.Write(body)
				})))
				w.follow()
				time.Sleep(test.over - time.Millisecond)
				w.expect(1)
				if n := requests.Load(); n < test.min || n > test.max {
					t.Errorf("%d requests in %s, want %d to %d", n, test.over, test.min, test.max)
				}
			})
		})
	}
}

// A server whose bundle is new each time can make us write once a second, not more.
// Requirements: T4.
func TestFollowRestlessServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "a")
		var sequence atomic.Uint64
		w.start("a", w.endpoint, http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
			n := sequence.Add(1)
			rw.Header().Set("ETag", fmt.Sprintf(`"%d"`, n))
			rw.Header().Set("Preference-Applied", "wait")
			rw.Write(jwks(n, w.ca))
		}))
		w.follow()
		time.Sleep(20 * time.Second)
		synctest.Wait()
		if n := len(w.sequences()); n < 17 || n > 21 {
			t.Errorf("%d accepted in twenty seconds", n)
		}
	})
}

// I8: the sequence never goes back, and one sequence has one content. What is refused is reported until a newer one comes.
// Requirements: 119, T4.
func TestFollowSequence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "a")
		other := peertest.NewAuthority(trading)
		p := publish(10, jwks(10, w.ca))
		w.start("a", w.endpoint, exchange.Handler("/bundle.json", p.source))
		w.follow()
		time.Sleep(time.Minute)
		w.expect(10)
		for _, step := range []struct {
			name     string
			sequence uint64
			jwks     []byte
			accepted []uint64
			refused  string
		}{
			{"back to 5", 5, jwks(5, w.ca, other), []uint64{10}, "lower"},
			{"back to none", 0, jwks(0, w.ca, other), []uint64{10}, "lower"},
			{"10 again, with another key", 10, jwks(10, w.ca, other), []uint64{10}, "differs"},
			{"10 as it was", 10, jwks(10, w.ca), []uint64{10}, "differs"}, // no alarm is lost by a good answer
			{"11", 11, jwks(11, w.ca, other), []uint64{10, 11}, ""},
			{"11 with another hint is the same", 11, []byte(strings.Replace(string(jwks(11, w.ca, other)), `"spiffe_sequence"`, `"spiffe_refresh_hint":60,"spiffe_sequence"`, 1)), []uint64{10, 11}, ""},
			{"far ahead", 1 << 63, jwks(1<<63, w.ca), []uint64{10, 11, 1 << 63}, ""},
		} {
			p.set(step.sequence, step.jwks)
			time.Sleep(3 * time.Minute)
			w.expect(step.accepted...)
			if got := w.status().Refused; (got == "") != (step.refused == "") || !strings.Contains(got, step.refused) {
				t.Errorf("%s: refused %q, want %q", step.name, got, step.refused)
			}
		}
	})
}

// What was accepted before counts after a restart, also when an older release wrote it in another way.
// Requirements: 119.
func TestFollowRemembers(t *testing.T) {
	for _, test := range []struct {
		name     string
		last     uint64
		served   uint64
		accepted []uint64
		refused  bool
	}{
		{"the same", 7, 7, nil, false},
		{"newer", 7, 8, []uint64{8}, false},
		{"older", 7, 6, nil, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, "a")
				w.config.Last = &statev1.ForeignBundle{TrustDomain: "trading.example", Sequence: test.last, Jwks: append([]byte("\n "), jwks(test.last, w.ca)...)}
				w.config.Bootstrap = []byte("not looked at any more")
				w.start("a", w.endpoint, exchange.Handler("/bundle.json", publish(test.served, jwks(test.served, w.ca)).source))
				w.follow()
				time.Sleep(time.Minute)
				w.expect(test.accepted...)
				if s := w.status(); (s.Refused != "") != test.refused {
					t.Errorf("status %+v", s)
				}
			})
		})
	}
}

// Of what is served only a part is held: that part is what a bundle of the same sequence is compared with.
// Requirements: 119.
func TestFollowHold(t *testing.T) {
	for name, hold := range map[string]bool{"held in part": true, "control: held as a whole": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, "a")
				other := peertest.NewAuthority(trading)
				part := func(sequence uint64) *statev1.ForeignBundle {
					return &statev1.ForeignBundle{TrustDomain: "trading.example", Sequence: sequence, Jwks: jwks(sequence, w.ca)}
				}
				w.config.Last = part(7)
				if hold {
					w.config.Hold = func(b *statev1.ForeignBundle) (*statev1.ForeignBundle, error) { return part(b.GetSequence()), nil }
				}
				p := publish(7, jwks(7, w.ca, other))
				w.start("a", w.endpoint, exchange.Handler("/bundle.json", p.source))
				w.follow()
				time.Sleep(time.Minute)
				w.expect()
				if s := w.status(); (s.Refused == "") != hold {
					t.Errorf("status %+v", s)
				}
				p.set(8, jwks(8, w.ca, other))
				time.Sleep(2 * time.Minute)
				w.expect(8)
			})
		})
	}
}

// Requirements: 120, 139.
func TestFollowBootstrap(t *testing.T) {
	other := peertest.NewAuthority(trading)
	for _, test := range []struct {
		name     string
		jwks     func(*world) []byte
		accepted []uint64
	}{
		{"the same", func(w *world) []byte { return jwks(5, w.ca) }, []uint64{5}},
		{"newer", func(w *world) []byte { return jwks(6, w.ca) }, []uint64{6}},
		{"the same sequence, more keys than were given by hand", func(w *world) []byte { return jwks(5, w.ca, other) }, []uint64{5}},
		{"older", func(w *world) []byte { return jwks(4, w.ca) }, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, "a")
				w.config.Bootstrap = jwks(5, w.ca)
				served := test.jwks(w)
				b, _, err := bundle.Parse(trading, served)
				if err != nil {
					t.Fatal(err)
				}
				w.start("a", w.endpoint, exchange.Handler("/bundle.json", publish(b.Sequence, served).source))
				w.follow()
				time.Sleep(time.Minute)
				w.expect(test.accepted...)
			})
		})
	}
}

// A self-serving endpoint is verified with the newest bundle it served itself (Federation 5.2.2.4).
// Requirements: 104, 143.
func TestFollowRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "a")
		next := peertest.NewAuthority(trading)
		var svid liveSVID
		svid.Store(w.endpoint)
		p := publish(1, jwks(1, w.ca))
		w.start("a", &svid, exchange.Handler("/bundle.json", p.source))
		w.follow()
		time.Sleep(time.Minute)

		p.set(2, jwks(2, w.ca, next)) // announced
		time.Sleep(time.Minute)
		w.expect(1, 2)
		svid.Store(next.Issue(endpointID.Path(), peertest.TTL(1000*time.Hour))) // used
		time.Sleep(2 * time.Minute)
		p.set(3, jwks(3, next)) // the old one is gone
		time.Sleep(2 * time.Minute)
		w.expect(1, 2, 3)
		if s := w.status(); s.Error != "" {
			t.Errorf("status %+v", s)
		}

		svid.Store(w.endpoint) // who still has the old one's key is not believed
		time.Sleep(2 * time.Minute)
		p.set(4, jwks(4, w.ca))
		time.Sleep(5 * time.Minute)
		w.expect(1, 2, 3)
		if s := w.status(); s.Error == "" {
			t.Errorf("status %+v", s)
		}
		svid.Store(next.Issue(endpointID.Path(), peertest.TTL(time.Hour)))
		p.set(5, jwks(5)) // everything is revoked, the endpoint included
		time.Sleep(5 * time.Minute)
		w.expect(1, 2, 3, 5)
		p.set(6, jwks(6, next))
		time.Sleep(time.Hour)
		w.expect(1, 2, 3, 5)
	})
}

type liveSVID struct{ atomic.Pointer[x509svid.SVID] }

func (l *liveSVID) GetX509SVID() (*x509svid.SVID, error) { return l.Load(), nil }

// SVIDs of the endpoint that live for seconds do not disturb; an answer that comes after the SVID's end does not count.
func TestFollowShortSVIDs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "a")
		p := publish(1, jwks(1, w.ca))
		fresh := svidFunc(func() *x509svid.SVID { // half of its life has passed already
			return w.ca.Issue(endpointID.Path(), peertest.Lifetime(time.Now().Add(-8*time.Second), time.Now().Add(8*time.Second)))
		})
		w.start("a", fresh, exchange.Handler("/bundle.json", p.source))
		w.follow()
		for sequence := range uint64(20) {
			p.set(sequence+2, jwks(sequence+2, w.ca))
			time.Sleep(17 * time.Second)
			synctest.Wait()
			if s := w.status(); s.Error != "" || s.Sequence != sequence+2 {
				t.Fatalf("status %+v", s)
			}
		}
	})
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "a")
		w.start("a", w.ca.Issue(endpointID.Path(), peertest.TTL(time.Second)), http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
			time.Sleep(3 * time.Second)
			rw.Write(jwks(2, w.ca))
		}))
		w.follow()
		time.Sleep(3500 * time.Millisecond)
		w.expect()
		if s := w.status(); !strings.Contains(s.Error, "expired") {
			t.Errorf("status %+v", s)
		}
	})
}

type svidFunc func() *x509svid.SVID

func (f svidFunc) GetX509SVID() (*x509svid.SVID, error) { return f(), nil }

// It stays with the URL that works, and goes to the next when that fails.
func TestFollowSeveralURLs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "a", "b", "c")
		p := publish(2, jwks(2, w.ca))
		behind := publish(1, jwks(1, w.ca))
		handler := exchange.Handler("/bundle.json", p.source)
		at := func() string {
			return strings.TrimSuffix(strings.TrimPrefix(w.status().URL, "https://"), "/bundle.json")
		}

		began := time.Now()
		stopB := w.start("b", w.endpoint, handler)
		w.follow()
		time.Sleep(10 * time.Second)
		w.expect(2)
		if at() != "b" || w.at[0].Sub(began) > 2*time.Second {
			t.Errorf("at %s, first bundle after %s", at(), w.at[0].Sub(began))
		}
		w.start("a", w.endpoint, handler)
		time.Sleep(10 * time.Minute)
		if at() != "b" {
			t.Errorf("left a URL that works for %s", at())
		}
		// c serves what is older: it is refused there, and found at a.
		w.start("c", w.endpoint, exchange.Handler("/bundle.json", behind.source))
		p.set(3, jwks(3, w.ca))
		time.Sleep(time.Minute)
		stopB()
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if s := w.status(); at() != "a" || s.Error != "" || s.Sequence != 3 || s.Refused == "" {
			t.Errorf("status %+v", s)
		}
		p.set(4, jwks(4, w.ca))
		time.Sleep(time.Second)
		w.expect(2, 3, 4)
		if s := w.status(); s.Refused != "" {
			t.Errorf("still alarmed: %+v", s)
		}
	})
}

// When nobody answers it asks less and less, and is there within a minute when somebody does.
// Requirements: 144.
func TestFollowBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "a", "b")
		var attempts atomic.Int64
		dial := w.config.Dial
		w.config.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			attempts.Add(1)
			return dial(ctx, network, address)
		}
		w.follow()
		time.Sleep(10 * time.Second)
		if n := attempts.Load(); n < 6 || n > 20 {
			t.Errorf("%d attempts in ten seconds", n)
		}
		time.Sleep(time.Hour)
		if n := attempts.Load(); n < 2*60 || n > 2*150 {
			t.Errorf("%d attempts in an hour", n)
		}
		if s := w.status(); s.Failures < 100 || s.Error == "" || !s.Succeeded.IsZero() {
			t.Errorf("status %+v", s)
		}
		w.start("b", w.endpoint, exchange.Handler("/bundle.json", publish(2, jwks(2, w.ca)).source))
		time.Sleep(time.Minute)
		w.expect(2)
		if s := w.status(); s.Failures != 0 {
			t.Errorf("status %+v", s)
		}
	})
}

// A bundle that could not be stored is not taken as accepted.
// Requirements: 118.
func TestFollowStoreFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "a", "b")
		handler := exchange.Handler("/bundle.json", publish(2, jwks(2, w.ca)).source)
		w.start("a", w.endpoint, handler)
		w.fail = errors.New("no quorum")
		w.follow()
		time.Sleep(5 * time.Minute)
		w.expect()
		if s := w.status(); !strings.Contains(s.Error, "no quorum") || s.URL != "https://a/bundle.json" || s.Sequence != 1 {
			t.Errorf("status %+v", s)
		}
		w.mu.Lock()
		w.fail = nil
		w.mu.Unlock()
		time.Sleep(6 * time.Second)
		w.expect(2)
	})
}

// Requirements: 125, 128, 136, 138, 140.
func TestFollowConfig(t *testing.T) {
	ca := peertest.NewAuthority(trading)
	good := exchange.FollowConfig{
		Endpoint:  exchange.Endpoint{TrustDomain: trading, URLs: []string{"https://a/"}, ID: endpointID},
		Bootstrap: jwks(1, ca),
		Accept:    func(context.Context, *exchange.Fetched) error { return nil },
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, test := range []struct {
		name   string
		change func(*exchange.FollowConfig)
		want   string
	}{
		{"good", func(*exchange.FollowConfig) {}, "canceled"},
		{"https_web needs no bundle", func(c *exchange.FollowConfig) { c.ID, c.Bootstrap = spiffeid.ID{}, nil }, "canceled"},
		{"endpoint of a third domain, with its bundle", func(c *exchange.FollowConfig) {
			c.ID, c.Bundles = spiffeid.RequireFromString("spiffe://banking.example/e"), x509bundle.New(banking)
		}, "canceled"},
		{"endpoint of a third domain", func(c *exchange.FollowConfig) { c.ID = spiffeid.RequireFromString("spiffe://banking.example/e") }, "no bundle of banking.example"},
		{"no first bundle", func(c *exchange.FollowConfig) { c.Bootstrap = nil }, "a first bundle is needed"},
		{"unreadable first bundle", func(c *exchange.FollowConfig) { c.Bootstrap = []byte("x") }, "the bootstrap bundle"},
		{"unreadable last bundle", func(c *exchange.FollowConfig) { c.Last = &statev1.ForeignBundle{Jwks: []byte("x")} }, "accepted before"},
		{"http", func(c *exchange.FollowConfig) { c.URLs = []string{"https://a/", "http://a/"} }, "does not begin with https"},
		{"no URL", func(c *exchange.FollowConfig) { c.URLs = nil }, "no URL"},
		{"no domain", func(c *exchange.FollowConfig) { c.TrustDomain = spiffeid.TrustDomain{} }, "trust domain"},
		{"nobody listens", func(c *exchange.FollowConfig) { c.Accept = nil }, "nobody accepts"},
	} {
		t.Run(test.name, func(t *testing.T) {
			config := good
			test.change(&config)
			if err := exchange.Follow(canceled, config); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want %q", err, test.want)
			}
		})
	}
}

// At most so many requests are held back, of one address a quarter of them; the others are
// answered at once, and not said to have waited. An address that comes later finds a place.
func TestHandlerBoundsWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := peertest.NewAuthority(trading)
		p := publish(1, jwks(1, ca))
		handler := exchange.Handler("/", p.source)
		first := &response{header: http.Header{}, status: 200}
		request, err := http.NewRequestWithContext(t.Context(), "GET", "/", nil)
		if err != nil {
			t.Fatal(err)
		}
		handler.ServeHTTP(first, request)
		request.Header.Set("If-None-Match", first.header.Get("ETag"))
		request.Header.Set("Prefer", "wait=3600, respond-async")
		began := time.Now()
		var all sync.WaitGroup
		type answers struct{ held, early, refused atomic.Int64 }
		ask := func(address string, times int) *answers {
			got, request := &answers{}, request.Clone(t.Context())
			request.RemoteAddr = address
			for range times {
				all.Go(func() {
					w := &response{header: http.Header{}, status: 200}
					handler.ServeHTTP(w, request)
					switch {
					case w.header.Get("Preference-Applied") == "":
						got.refused.Add(1)
					case w.status == 304 && time.Since(began) == exchange.MaxWait:
						got.held.Add(1)
					case w.status == 304:
						got.early.Add(1)
					}
				})
			}
			synctest.Wait()
			return got
		}
		var greedy []*answers
		for _, address := range []string{"192.0.2.1:1", "192.0.2.2:1", "192.0.2.3:1", "192.0.2.4:1"} {
			greedy = append(greedy, ask(address, 100))
		}
		follower := ask("192.0.2.9:1", 2)
		all.Wait()
		var held, early, refused int64
		for _, g := range greedy {
			if g.held.Load() > 64 {
				t.Errorf("%d requests of one address are held back", g.held.Load())
			}
			held, early, refused = held+g.held.Load(), early+g.early.Load(), refused+g.refused.Load()
		}
		if held != 254 || early != 2 || refused != 144 || follower.held.Load() != 2 {
			t.Errorf("of the greedy %d were held back for a minute, %d answered early, %d at once; of the follower's 2 were held back %d", held, early, refused, follower.held.Load())
		}
	})
}

// https_spiffe as others serve it, with a server of the standard library, to show that the follower needs nothing of ours.
func TestFollowStranger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "a")
		l := &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}
		w.hosts = map[string]chan net.Conn{"a:443": l.conns}
		server := &http.Server{Handler: static(jwks(3, w.ca)), ErrorLog: log.New(io.Discard, "", 0)}
		config := &tls.Config{Certificates: []tls.Certificate{{PrivateKey: w.endpoint.PrivateKey, Certificate: raws(w.endpoint.Certificates)}}}
		go server.Serve(tls.NewListener(l, config))
		t.Cleanup(func() { server.Close() })
		w.follow()
		time.Sleep(time.Minute)
		w.expect(3)
		if got := w.status(); got.Sequence != 3 {
			t.Errorf("status %+v", got)
		}
	})
}

func raws(certs []*x509.Certificate) (raw [][]byte) {
	for _, cert := range certs {
		raw = append(raw, cert.Raw)
	}
	return raw
}
