package services

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
)

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// Every kind of check, good and bad, against real servers and programs.
func TestProbe(t *testing.T) {
	l := listen(t)
	status := health.NewServer()
	status.SetServingStatus("bank.v1.Accounts", healthv1.HealthCheckResponse_SERVING)
	status.SetServingStatus("bank.v1.Loans", healthv1.HealthCheckResponse_NOT_SERVING)
	server := grpc.NewServer()
	healthv1.RegisterHealthServer(server, status)
	go server.Serve(l)
	t.Cleanup(server.Stop)
	rpc := l.Addr().String()

	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		code, _ := strconv.Atoi(r.URL.Query().Get("answer"))
		if r.Host != "accounts.banking.example" {
			code = 421
		}
		if code == 0 {
			<-r.Context().Done()
			return
		}
		w.WriteHeader(code)
	}))
	t.Cleanup(web.Close)
	site := web.Listener.Addr().String()
	silent, closed := listen(t).Addr().String(), listen(t)
	closed.Close()
	nobody := closed.Addr().String()
	none := filepath.Join(t.TempDir(), "none")

	for _, test := range []struct {
		kind    Kind
		target  string
		address string
		want    string // part of the error; "": good
	}{
		{ByTCP, "", silent, ""},
		{ByTCP, "", nobody, "refused"},
		{ByHTTP, "/?answer=204", site, ""},
		{ByHTTP, "/?answer=302", site, "302"},
		{ByHTTP, "/?answer=500", site, "500"},
		{ByHTTP, "/", site, "deadline"},
		{ByHTTP, "/", silent, "deadline"},
		{ByHTTP, "/", nobody, "refused"},
		{ByGRPC, "", rpc, ""},
		{ByGRPC, "bank.v1.Accounts", rpc, ""},
		{ByGRPC, "bank.v1.Loans", rpc, "not 1 (SERVING)"},
		{ByGRPC, "bank.v1.Nobody", rpc, `gRPC status "5"`},
		{ByGRPC, "", silent, "deadline"},
		{ByGRPC, "", nobody, "refused"},
		{ByCommand, "/bin/sh -c true", nobody, ""},
		{ByCommand, "/bin/sh -c test\t$ENTENTE_SERVICE\t=\taccounts.banking.example", nobody, ""},
		{ByCommand, "/bin/sh -c test\t-z\t$SECRET\t&&\ttest\t$PWD\t=\t/", nobody, ""},
		{ByCommand, "/bin/sh -c echo\tqueue\tis\tfull;\texit\t2", nobody, "exit status 2: queue is full"},
		{ByCommand, "/bin/sh -c exec\tsleep\t30", nobody, "did not end within"},
		{ByCommand, none, nobody, "no such file"},
	} {
		t.Setenv("SECRET", "of the agent")
		c := Check{Kind: test.kind, Target: test.target, Address: test.address, Name: "accounts.banking.example", Timeout: 2 * time.Second}
		if strings.Contains(test.want, "deadline") || strings.Contains(test.want, "within") {
			c.Timeout = 150 * time.Millisecond
		}
		if test.kind == ByCommand {
			words := strings.Split(test.target, " ")
			for i := range words {
				words[i] = strings.ReplaceAll(words[i], "\t", " ")
			}
			c = c.WithCommand(words)
		}
		ctx, cancel := context.WithTimeout(t.Context(), c.Timeout)
		err := NewProber().Probe(ctx, c, nil)
		cancel()
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s %q: %v, want %q", test.kind, test.target, err, test.want)
		}
	}
}

// What a command has started ends with it, and what it prints is bounded.
func TestCommandEnds(t *testing.T) {
	pids := filepath.Join(t.TempDir(), "pids")
	c := Check{Name: "x", Timeout: 300 * time.Millisecond}.WithCommand([]string{"/bin/sh", "-c", "sleep 300 & echo $! > " + pids + "; while :; do echo 0123456789; done"})
	ctx, cancel := context.WithTimeout(t.Context(), c.Timeout)
	defer cancel()
	err := NewProber().Probe(ctx, c, nil)
	if err == nil || len(err.Error()) > 1000 || !strings.Contains(err.Error(), "0123456789") {
		t.Fatalf("%v", err)
	}
	text, err := os.ReadFile(pids)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		state, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if syscall.Kill(pid, 0) != nil || err == nil && strings.Contains(string(state), ") Z ") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %d still runs", pid)
		}
	}
}

// watched is a service whose checks a test answers, in virtual time.
type watched struct {
	*Instance
	bad atomic.Bool

	mu      sync.Mutex
	changes []string
}

func watch(t *testing.T, h Health, bad bool) *watched {
	w := &watched{Instance: NewInstance()}
	w.bad.Store(bad)
	defaults := Defaults()
	c := FromCatalogue("x.banking.example", "127.0.0.1:1", "", defaults).With(&h, defaults)
	go c.Watch(t.Context(), w.Instance, func(context.Context, Check) error {
		if w.bad.Load() {
			return errors.New("bad")
		}
		return nil
	}, func(err error) {
		healthy := w.Healthy()
		w.mu.Lock()
		defer w.mu.Unlock()
		w.changes = append(w.changes, fmt.Sprint(healthy))
	})
	return w
}

func (w *watched) expect(t *testing.T, when string, want ...string) {
	t.Helper()
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	if fmt.Sprint(w.changes) != fmt.Sprint(want) {
		t.Errorf("%s: %v, want %v", when, w.changes, want)
	}
}

func TestThresholds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := watch(t, Health{Thresholds: Thresholds{Interval: 10 * time.Second, HealthyThreshold: 3, UnhealthyThreshold: 2}}, false)
		w.expect(t, "the first good check is enough", "true")
		w.bad.Store(true)
		time.Sleep(11 * time.Second)
		w.expect(t, "one bad check", "true")
		time.Sleep(11 * time.Second)
		w.expect(t, "two", "true", "false")
		w.bad.Store(false)
		time.Sleep(22 * time.Second)
		w.expect(t, "two good ones", "true", "false")
		time.Sleep(11 * time.Second)
		w.expect(t, "three", "true", "false", "true")
	})
	synctest.Test(t, func(t *testing.T) {
		w := watch(t, Health{Initial: "healthy", Thresholds: Thresholds{UnhealthyThreshold: 2}}, true)
		w.expect(t, "initially healthy, one bad check", "true", "true")
		time.Sleep(1100 * time.Millisecond)
		w.expect(t, "two", "true", "true", "false")
	})
	synctest.Test(t, func(t *testing.T) {
		var spread [2]time.Duration
		for range 50 {
			w := &watched{Instance: NewInstance()}
			c := FromCatalogue("x", "127.0.0.1:1", "", Defaults())
			ctx, cancel := context.WithCancel(t.Context())
			began, n := time.Now(), 0
			done := make(chan struct{})
			go func() {
				defer close(done)
				c.Watch(ctx, w.Instance, func(context.Context, Check) error {
					if n++; n == 2 {
						cancel()
					}
					return nil
				}, func(error) {})
			}()
			<-done
			took := time.Since(began)
			if spread[0] == 0 || took < spread[0] {
				spread[0] = took
			}
			spread[1] = max(spread[1], took)
		}
		if spread[0] < 950*time.Millisecond || spread[1] > 1050*time.Millisecond || spread[1]-spread[0] < 10*time.Millisecond {
			t.Errorf("the second check comes after %v to %v", spread[0], spread[1])
		}
	})
}

// Requests that go wrong make an instance unhealthy at once; checks bring it back, after
// 5xx not before its time is over.
func TestOutlierDetection(t *testing.T) {
	down := errors.New("connection refused")
	local, fives := 3, 4
	limits := Thresholds{OutlierDetection: OutlierDetection{&local, &fives, 10 * time.Second, time.Minute}}
	request := func(w *watched, n, status int, err error) {
		for range n {
			w.Begin()
			w.End(status, err)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		w := watch(t, Health{Thresholds: limits}, false)
		w.expect(t, "at first", "true")
		request(w, 2, 0, down)
		request(w, 1, 200, nil)
		request(w, 2, 0, down)
		request(w, 100, 0, nil) // who asked has left: says nothing
		w.expect(t, "no three in a row", "true")
		request(w, 1, 0, down)
		w.expect(t, "three in a row", "true", "false")
		if _, _, why := w.Health(); why == nil || !strings.Contains(why.Error(), "connection refused") {
			t.Errorf("%v", why)
		}
		time.Sleep(1100 * time.Millisecond)
		w.expect(t, "one good check", "true", "false")
		time.Sleep(1100 * time.Millisecond)
		w.expect(t, "two", "true", "false", "true")
	})
	synctest.Test(t, func(t *testing.T) {
		w := watch(t, Health{Thresholds: limits}, false)
		request(w, 3, 503, nil)
		request(w, 1, 404, nil)
		request(w, 3, 500, nil)
		w.expect(t, "no four in a row", "true")
		request(w, 1, 502, nil)
		w.expect(t, "four", "true", "false")
		time.Sleep(9 * time.Second)
		request(w, 50, 500, nil) // sent here as a last resort
		w.expect(t, "it is not its time", "true", "false")
		time.Sleep(2100 * time.Millisecond)
		w.expect(t, "after 10 s", "true", "false", "true")
		request(w, 4, 500, nil)
		time.Sleep(19 * time.Second)
		w.expect(t, "twice as long", "true", "false", "true", "false")
		time.Sleep(2100 * time.Millisecond)
		w.expect(t, "after 20 s", "true", "false", "true", "false", "true")
	})
	synctest.Test(t, func(t *testing.T) {
		w := watch(t, Health{}, false)
		request(w, 100, 500, nil)
		w.expect(t, "5xx count only where somebody says so", "true")
		request(w, 5, 0, down)
		w.expect(t, "the default", "true", "false")
	})
}

// Idle waits for the last request, and no longer than it may.
func TestIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := NewInstance()
		i.Idle(t.Context())
		i.Begin()
		i.Begin()
		i.End(200, nil)
		idle := make(chan struct{})
		go func() { i.Idle(t.Context()); close(idle) }()
		synctest.Wait()
		select {
		case <-idle:
			t.Error("it did not wait")
		default:
		}
		i.End(200, nil)
		<-idle
		i.Begin()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		if i.Idle(ctx); time.Since(began) != time.Second {
			t.Error(time.Since(began))
		}
	})
}

func FuzzParseHealth(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 2, 8, 1})
	f.Add([]byte{0, 0, 0, 0, 0})
	f.Add([]byte{1, 0, 0, 0, 2, 8, 1})
	f.Add([]byte{0, 0, 0, 0, 6, 0x12, 2, 'h', 'i', 8, 2})
	f.Fuzz(func(t *testing.T, body []byte) {
		status, err := parseHealth(body)
		if err != nil && status == serving && len(body) < 7 {
			t.Errorf("%x is %d", body, status)
		}
		if err == nil && (len(body) < 5 || body[0] != 0) {
			t.Errorf("%x was read", body)
		}
	})
}
