package dataplane

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// monitor remembers how requests ended.
type monitor struct {
	mu       sync.Mutex
	underWay int
	ended    []string
}

func (m *monitor) Begin() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.underWay++
}

func (m *monitor) End(status int, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.underWay--
	m.ended = append(m.ended, fmt.Sprint(status, err != nil))
}

// take waits until nothing is under way, and returns what has ended since the last time.
func (m *monitor) take(t *testing.T) string {
	t.Helper()
	for begin := time.Now(); ; time.Sleep(time.Millisecond) {
		m.mu.Lock()
		if m.underWay == 0 && len(m.ended) > 0 {
			defer m.mu.Unlock()
			ended := strings.Join(m.ended, ", ")
			m.ended = nil
			return ended
		}
		m.mu.Unlock()
		if time.Since(begin) > 10*time.Second {
			t.Fatal("it has not ended")
		}
	}
}

// The monitor learns what the application is to blame for, and nothing of what its callers do.
func TestMonitor(t *testing.T) {
	w := newWorld(t)
	seen := w.banking.monitors[0]
	handle := func(h http.HandlerFunc) { w.banking.apps[0].handler.Store(&h) }
	post := func(header http.Header) answer {
		return do(t, w.client(), "POST", w.banking.outURL[0]+"/v1", "accounts.banking.example", header, strings.NewReader("x"))
	}
	for _, status := range []int{200, 404, 500, 503} {
		handle(func(rw http.ResponseWriter, _ *http.Request) { rw.WriteHeader(status) })
		if a := post(nil); a.StatusCode != status {
			t.Errorf("%s", a)
		}
		if got := seen.take(t); got != fmt.Sprint(status, false) {
			t.Errorf("%d: %s", status, got)
		}
	}
	handle(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	post(nil)
	if got := seen.take(t); got != "0 true" {
		t.Errorf("no answer: %s", got)
	}
	handle(func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Content-Length", "100")
		io.WriteString(rw, "half")
		http.NewResponseController(rw).Flush()
		panic(http.ErrAbortHandler)
	})
	r, _ := http.NewRequest("POST", w.banking.outURL[0]+"/v1", nil)
	r.Host = "accounts.banking.example"
	if res, err := w.client().Do(r); err == nil {
		io.Copy(io.Discard, res.Body)
		res.Body.Close()
	}
	if got := seen.take(t); got != "0 false" {
		t.Errorf("an answer that breaks off: %s", got)
	}
	handle(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	impatient := w.client()
	impatient.Timeout = 200 * time.Millisecond
	r, _ = http.NewRequest("POST", w.banking.outURL[0]+"/v1", nil)
	r.Host = "accounts.banking.example"
	if res, err := impatient.Do(r); err == nil {
		t.Errorf("%s", res.Status)
		res.Body.Close()
	}
	if got := seen.take(t); got != "0 false" {
		t.Errorf("a caller that leaves: %s", got)
	}
	w.banking.apps[0].server.Close()
	post(nil)
	if got := seen.take(t); !strings.HasPrefix(got, "0 true") {
		t.Errorf("nobody listens: %s", got)
	}
}

// A drained instance is given nothing, and what it would have got goes elsewhere, even what
// must not be sent twice. What is under way is cut, and its caller told.
func TestDrainedInstance(t *testing.T) {
	w := newWorld(t)
	began, end := make(chan struct{}), make(chan struct{})
	defer close(end)
	h := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		close(began)
		select {
		case <-r.Context().Done():
		case <-end:
		}
	})
	w.banking.apps[0].handler.Store(&h)
	post := func() answer {
		return do(t, w.client(), "POST", w.banking.outURL[0]+"/v1", "accounts.banking.example", nil, strings.NewReader("x"))
	}
	cut := make(chan answer, 1)
	go func() { cut <- post() }()
	<-began // control: it is given requests
	w.banking.drain[0]()
	if a := <-cut; a.StatusCode != http.StatusBadGateway || a.Header.Get("Entente-Outcome") != "unknown" {
		t.Errorf("what was under way: %s", a)
	}
	if got := w.banking.monitors[0].take(t); got != "0 false" {
		t.Errorf("the application is to blame for that: %s", got)
	}
	for range 20 {
		if a := post(); a.StatusCode != http.StatusOK || a.body != "xok" {
			t.Fatalf("%s", a)
		}
	}
	if m := w.banking.monitors[0]; m.underWay != 0 || len(m.ended) != 0 {
		t.Errorf("it was given requests: %v", m.ended)
	}
	if n := len(w.banking.monitors[1].ended); n != 20 {
		t.Errorf("control: %d requests at the other instance", n)
	}
}
