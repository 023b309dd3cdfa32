package load

import (
	"context"
	"crypto/x509"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// fakeEdge is an edge that can be told how to answer.
type fakeEdge struct {
	*httptest.Server
	mode  atomic.Value // string
	asked atomic.Int64
	got   atomic.Value // last Authorization
}

func newFakeEdge(t *testing.T) *fakeEdge {
	e := &fakeEdge{}
	e.mode.Store("good")
	e.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		e.got.Store(r.Header.Get("Authorization"))
		if r.URL.Path == "/" { // a probe
			if e.mode.Load() != "good" {
				panic(http.ErrAbortHandler)
			}
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		e.asked.Add(1)
		switch e.mode.Load() {
		case "cut":
			panic(http.ErrAbortHandler)
		case "not-sent", "unknown":
			w.Header().Set("Entente-Refused", "upstream-unreachable")
			w.Header().Set("Entente-Outcome", e.mode.Load().(string))
			w.WriteHeader(http.StatusBadGateway)
		case "hang":
			<-r.Context().Done()
		case "application":
			w.WriteHeader(http.StatusInternalServerError)
		}
	}))
	e.Config.ErrorLog = nil
	t.Cleanup(e.Close)
	return e
}

func (e *fakeEdge) address() string { return strings.TrimPrefix(e.URL, "https://") }

func TestPhone(t *testing.T) {
	tests := []struct {
		name, method, mode string
		attempts           int
		unknown            bool
		status             int // 0: an error
	}{
		{"good", "GET", "good", 1, false, 200},
		{"hangs, idempotent", "GET", "hang", 2, false, 200},
		{"hangs, not idempotent", "POST", "hang", 1, true, 0},
		{"cut off, idempotent", "GET", "cut", 2, false, 200},
		{"cut off, not idempotent", "POST", "cut", 1, true, 0},
		{"edge refuses, idempotent", "GET", "unknown", 2, false, 200},
		{"edge says it was not sent", "POST", "not-sent", 2, false, 200},
		{"edge does not know", "POST", "unknown", 1, true, 502},
		{"the application's own failure is an answer", "GET", "application", 1, false, 500},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			first, second := newFakeEdge(t), newFakeEdge(t)
			roots := x509.NewCertPool()
			roots.AddCert(first.Certificate())
			roots.AddCert(second.Certificate())
			p := NewPhone([]string{first.address(), second.address()}, roots, "secret")
			defer p.Close()
			first.mode.Store(test.mode)
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			answer, attempts, unknown, err := p.Try(ctx, test.method, "/x", nil)
			if answer.Status != test.status || (err == nil) != (test.status != 0) || attempts != test.attempts || unknown != test.unknown {
				t.Errorf("status %d, %d attempts, unknown %v, error %v", answer.Status, attempts, unknown, err)
			}
			if first.got.Load() != "Bearer secret" {
				t.Errorf("the edge got %q", first.got.Load())
			}
		})
	}
}

// A phone leaves a dead edge at once, and returns when a probe is answered again.
func TestPhoneReturns(t *testing.T) {
	first, second := newFakeEdge(t), newFakeEdge(t)
	roots := x509.NewCertPool()
	roots.AddCert(first.Certificate())
	roots.AddCert(second.Certificate())
	p := NewPhone([]string{first.address(), second.address()}, roots, "")
	defer p.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()

	first.mode.Store("cut")
	for range 3 {
		if answer, _, _, err := p.Try(ctx, "GET", "/x", nil); err != nil || answer.Status != 200 {
			t.Fatal(answer.Status, err)
		}
	}
	if n := first.asked.Load(); n != 1 {
		t.Errorf("the dead edge was asked %d times", n)
	}
	first.mode.Store("good")
	for first.asked.Load() < 2 {
		if _, _, _, err := p.Try(ctx, "GET", "/x", nil); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
