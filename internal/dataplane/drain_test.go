package dataplane

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"
)

// A door that closes answers what it has taken: no connection is closed in the face of
// its first request. (One that the kernel still held is reset, which is another error.)
func TestDrainAnswersFreshConnections(t *testing.T) {
	e := &Engine{cfg: Config{Timing: Timing{Drain: 5 * time.Second}}}
	handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(time.Millisecond)
		io.WriteString(w, "hello")
	})
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	answered := 0
	for range 40 {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		closed := make(chan error, 1)
		go func() {
			closed <- e.serve(ctx, newGate(ln, func(c net.Conn) (net.Conn, error) { return c, nil }), &http.Server{Handler: handler})
		}()
		var callers sync.WaitGroup
		var mu sync.Mutex
		for range 4 {
			callers.Go(func() {
				for {
					response, err := client.Get("http://" + ln.Addr().String())
					if errors.Is(err, io.EOF) {
						t.Error("a connection was closed before its request was answered")
					}
					if err != nil {
						return
					}
					response.Body.Close()
					mu.Lock()
					answered++
					mu.Unlock()
				}
			})
		}
		time.Sleep(10 * time.Millisecond)
		stop()
		if err := <-closed; err != nil {
			t.Error(err)
		}
		callers.Wait()
	}
	if answered < 40 {
		t.Errorf("control: %d requests were answered", answered)
	}
}
