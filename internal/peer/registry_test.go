package peer_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"maps"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/entente-mesh/entente/internal/peer"
	"github.com/entente-mesh/entente/internal/peer/peertest"
)

// stateOf is what a finished handshake with the owner of the SVID leaves.
func stateOf(svid *x509svid.SVID) tls.ConnectionState {
	return tls.ConnectionState{HandshakeComplete: true, PeerCertificates: svid.Certificates}
}

func pipe(t *testing.T) net.Conn {
	a, b := net.Pipe()
	t.Cleanup(func() { a.Close(); b.Close() })
	return a
}

// isOpen distinguishes a closed pipe from one on which nobody writes.
func isOpen(c net.Conn) bool {
	c.SetReadDeadline(time.Unix(1, 0))
	_, err := c.Read(make([]byte, 1))
	return !errors.Is(err, io.ErrClosedPipe)
}

func run(t *testing.T, r *peer.Registry) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v", err)
		}
	})
}

// Requirements: 39, 46.
func TestRegistryExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r peer.Registry
		run(t, &r)
		ca := peertest.NewAuthority(banking)
		long, short, shortest, gone := pipe(t), pipe(t), pipe(t), pipe(t)
		track := func(c net.Conn, ttl time.Duration) (untrack func()) {
			return r.Track(c, stateOf(ca.Issue("/accounts", peertest.TTL(ttl))), nil)
		}
		track(long, time.Hour)
		synctest.Wait()
		track(short, 20*time.Second)
		track(shortest, 3*time.Second)
		untrack := track(gone, 10*time.Second)
		r.Track(pipe(t), tls.ConnectionState{}, nil) // an anonymous peer: nothing ends

		time.Sleep(2 * time.Second)
		synctest.Wait()
		if r.Len() != 5 || !isOpen(shortest) {
			t.Errorf("after 2 s: %d open", r.Len())
		}
		time.Sleep(1 * time.Second)
		synctest.Wait()
		if r.Len() != 4 || isOpen(shortest) || !isOpen(short) {
			t.Errorf("after 3 s: %d open", r.Len())
		}
		untrack()
		untrack()
		time.Sleep(17 * time.Second)
		synctest.Wait()
		if r.Len() != 2 || isOpen(short) || !isOpen(long) || !isOpen(gone) {
			t.Errorf("after 20 s: %d open; the untracked one is open: %t", r.Len(), isOpen(gone))
		}
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		if r.Len() != 1 || isOpen(long) {
			t.Errorf("after 2 h: %d open", r.Len())
		}
	})
}

// RecheckOf asks those that rest on what has changed, and those of which that is not known.
func TestRegistryRecheckOf(t *testing.T) {
	var r peer.Registry
	refused := map[string]bool{}
	var asking sync.Mutex // several connections are asked at once
	asked := map[string]int{}
	open := map[string]net.Conn{}
	for name, restsOn := range map[string][]string{"h1": {"h1"}, "h1/web": {"h1", "web"}, "h2/web": {"h2", "web"}, "any": nil} {
		open[name] = pipe(t)
		r.Track(open[name], tls.ConnectionState{}, func() error {
			asking.Lock()
			defer asking.Unlock()
			if asked[name]++; refused[name] {
				return errNo
			}
			return nil
		}, restsOn...)
	}
	expect := func(n int, changed string, want ...string) {
		t.Helper()
		clear(asked)
		if got := r.RecheckOf(map[string]struct{}{changed: {}}); got != n {
			t.Errorf("%s: %d closed, want %d", changed, got, n)
		}
		if got := slices.Sorted(maps.Keys(asked)); !slices.Equal(got, want) {
			t.Errorf("%s: %v were asked, want %v", changed, got, want)
		}
	}
	expect(0, "nobody", "any")
	expect(0, "h1", "any", "h1", "h1/web")
	refused["h2/web"] = true
	expect(0, "h1", "any", "h1", "h1/web")
	expect(1, "web", "any", "h1/web", "h2/web")
	if isOpen(open["h2/web"]) || !isOpen(open["h1/web"]) {
		t.Error("the wrong one was cut")
	}
}

// I4: ending a relationship cuts what is open, and only that.
// Requirements: 46.
func TestRegistryRecheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		bank, trade := peertest.NewAuthority(banking), peertest.NewAuthority(trading)
		set := x509bundle.NewSet(bank.Bundle(), trade.Bundle())
		var banned sync.Map
		authz := func(id spiffeid.ID) error {
			if _, no := banned.Load(id); no {
				return errNo
			}
			return nil
		}
		var r peer.Registry
		track := func(svid *x509svid.SVID) (net.Conn, func()) {
			c := pipe(t)
			return c, r.Track(c, stateOf(svid), peer.Recheck(stateOf(svid), set, authz))
		}
		accounts, untrackAccounts := track(bank.Issue("/accounts"))
		ledger, _ := track(bank.Issue("/ledger"))
		portfolio, untrackPortfolio := track(trade.Issue("/portfolio"))
		brief, _ := track(bank.Issue("/brief", peertest.TTL(time.Minute)))

		for range 2 {
			if n := r.Recheck(); n != 0 || r.Len() != 4 {
				t.Fatalf("nothing has changed, %d closed, %d open", n, r.Len())
			}
		}
		banned.Store(id("spiffe://banking.example/ledger"), true)
		if n := r.Recheck(); n != 1 || isOpen(ledger) || !isOpen(accounts) {
			t.Errorf("ledger is banned, %d closed", n)
		}
		set.Remove(trading)
		if n := r.Recheck(); n != 1 || isOpen(portfolio) || !isOpen(accounts) {
			t.Errorf("trading is ended, %d closed", n)
		}
		untrackPortfolio()
		time.Sleep(2 * time.Minute)
		if n := r.Recheck(); n != 1 || isOpen(brief) || !isOpen(accounts) {
			t.Errorf("an SVID has ended, %d closed", n)
		}

		// The authority is exchanged; an SVID of the old one falls with it.
		next := peertest.NewAuthority(banking)
		set.Add(x509bundle.FromX509Authorities(banking, []*x509.Certificate{bank.Cert, next.Cert}))
		if n := r.Recheck(); n != 0 {
			t.Errorf("an authority was added, %d closed", n)
		}
		set.Add(next.Bundle())
		if n := r.Recheck(); n != 1 || isOpen(accounts) {
			t.Errorf("the authority was removed, %d closed", n)
		}
		untrackAccounts()
		if r.Len() != 0 {
			t.Errorf("%d left", r.Len())
		}
	})
}

// A handshake that verified before a change and is tracked after the recheck does not slip through.
func TestRegistryLateTrack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		trade := peertest.NewAuthority(trading)
		set := x509bundle.NewSet(trade.Bundle())
		var r peer.Registry
		state := stateOf(trade.Issue("/portfolio")) // verified
		r.Recheck()
		good := pipe(t)
		r.Track(good, state, peer.Recheck(state, set, peer.AnyVerified()))
		if !isOpen(good) {
			t.Error("closed without need")
		}

		set.Remove(trading)
		r.Recheck()
		time.Sleep(30 * time.Second)
		late := pipe(t)
		untrack := r.Track(late, state, peer.Recheck(state, set, peer.AnyVerified()))
		if isOpen(late) || r.Len() != 0 {
			t.Errorf("slipped through, %d open", r.Len())
		}
		untrack()
	})
}

// A peer that does not read cannot hold up the cut of the others.
func TestRegistryCutsTransport(t *testing.T) {
	bank := peertest.NewAuthority(banking)
	_, s, clientErr, serverErr := shake(t, peer.ClientTLS(bank.Issue("/a"), bank.Bundle(), peer.AnyVerified()),
		peer.ServerTLS(bank.Issue("/b"), bank.Bundle(), peer.AnyVerified()))
	if clientErr != nil || serverErr != nil {
		t.Fatal(clientErr, serverErr)
	}
	blocked := make(chan error, 1)
	go func() { // fills the socket and holds the write lock of the TLS connection
		for {
			if _, err := s.Write(make([]byte, 1<<20)); err != nil {
				blocked <- err
				return
			}
		}
	}()
	time.Sleep(20 * time.Millisecond) // real sockets: no virtual time
	var r peer.Registry
	r.Track(s, s.ConnectionState(), func() error { return errNo })
	start := time.Now()
	if n := r.Recheck(); n != 1 || time.Since(start) > time.Second {
		t.Errorf("%d closed after %s", n, time.Since(start))
	}
	<-blocked
}

func TestRegistryConcurrently(t *testing.T) {
	bank := peertest.NewAuthority(banking)
	state := stateOf(bank.Issue("/accounts"))
	var r peer.Registry
	run(t, &r)
	var work sync.WaitGroup
	for range 8 {
		work.Go(func() {
			for range 50 {
				a, b := net.Pipe()
				untrack := r.Track(a, state, peer.Recheck(state, bank.Bundle(), peer.AnyVerified()))
				if r.Recheck() != 0 {
					t.Error("closed without need")
				}
				untrack()
				a.Close()
				b.Close()
			}
		})
	}
	work.Wait()
	if r.Len() != 0 {
		t.Errorf("%d left", r.Len())
	}
}

// The bar of I4 is one second.
func BenchmarkRecheck10000(b *testing.B) {
	ca := peertest.NewAuthority(banking)
	bundle := ca.Bundle()
	for _, bench := range []struct {
		name  string
		fresh bool
	}{{"first", true}, {"again", false}} {
		b.Run(bench.name, func(b *testing.B) {
			state := stateOf(ca.Issue("/accounts"))
			fill := func() *peer.Registry {
				r := &peer.Registry{}
				for range 10_000 {
					r.Track(nil, state, peer.Recheck(state, bundle, peer.AnyVerified()))
				}
				return r
			}
			r := fill()
			r.Recheck()
			for b.Loop() {
				if bench.fresh {
					b.StopTimer()
					r = fill()
					b.StartTimer()
				}
				r.Recheck()
			}
		})
	}
}
