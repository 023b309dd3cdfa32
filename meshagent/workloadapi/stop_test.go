package workloadapi

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/entente-mesh/entente/ca/catest"
)

// A server that stops answers whom it has accepted, also if nothing was said yet: over a
// socket that outlives it, as a service manager holds it, no fresh client ever fails.
func TestStopCutsNoFreshClient(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply(serviceYAML("accounts", run(myself(t))))
	h := newHost(t, c.AgentToken("h1", "dc1"), true)
	dir, err := os.MkdirTemp("", "wl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "kept.sock")
	bound, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	bound.(*net.UnixListener).SetUnlinkOnClose(false)
	kept, err := bound.(*net.UnixListener).File()
	bound.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()

	ctx, cancel := context.WithCancel(t.Context())
	var clients sync.WaitGroup
	var fetches atomic.Int64
	for range 4 {
		clients.Go(func() {
			for ctx.Err() == nil {
				once, stop := context.WithTimeout(t.Context(), 20*time.Second)
				if got := fetch(once, socket); got != "spiffe://banking.example/accounts" {
					t.Errorf("a fresh client got %s", got)
				}
				stop()
				fetches.Add(1)
			}
		})
	}
	for range 20 {
		listener, err := net.FileListener(kept)
		if err != nil {
			t.Fatal(err)
		}
		serving, stop := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- New(h.agent, listener, nil).Run(serving) }()
		for enough := fetches.Load() + 5; fetches.Load() < enough && !t.Failed(); {
			time.Sleep(time.Millisecond)
		}
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	cancel()
	// Who connected after the last stop waits for a server.
	listener, err := net.FileListener(kept)
	if err != nil {
		t.Fatal(err)
	}
	serving, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- New(h.agent, listener, nil).Run(serving) }()
	clients.Wait()
	stop()
	<-ended
}
