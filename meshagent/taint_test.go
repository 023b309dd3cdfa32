package meshagent

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"

	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/internal/peer/peertest"
)

// taint tells the agent of a tainted authority, as an urgent item does.
func taint(a *Agent, within time.Duration, authorities ...string) {
	a.change(func(s *State) *State {
		next := *s
		view := *s.View
		view.Urgent++
		view.Tainted, view.ReissueWithin = authorities, within
		next.View = &view
		return &next
	})
}

// An SVID under a tainted authority is issued anew within the time that the CA gives,
// not all at once, and never under the tainted authority again, whatever a CA node
// says. What is held stays in use until then (I12).
func TestTaintedIsReissued(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newFakeCA(12 * time.Hour)
		old, next := server.authority, peertest.NewAuthority(bank)
		const services = 40
		a := newAgent(t, server)
		var ids []string
		for i := range services {
			id := "service/s" + string(rune('a'+i%26)) + string(rune('a'+i/26))
			server.paths[id] = "/" + id
			ids = append(ids, id)
		}
		slices.Sort(ids)
		both := x509bundle.FromX509Authorities(bank, append(old.Bundle().X509Authorities(), next.Bundle().X509Authorities()...))
		a.change(func(s *State) *State {
			state := *s
			state.Ready, state.Bundle, state.reissued = true, both, nil
			for _, id := range ids {
				identity, err := state.identify(entry(id, "/"+id, 1), nil, bank, "h1")
				if err != nil {
					panic(err)
				}
				state.Identities = append(state.Identities, identity)
			}
			return &state
		})
		defer background(t, a.entries.keepX509)()
		synctest.Wait()
		if n := server.count(ids[0]); n != 1 {
			t.Fatalf("control: signed %d times", n)
		}
		svid, err := a.SVIDs(ids[0]).GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		under := ca.SignedUnder(svid.Certificates[0])
		tainted := under + strings.Repeat("0", 64-len(under))
		holding := func(authority string) (n int) {
			for _, id := range ids {
				if svid, err := a.SVIDs(id).GetX509SVID(); err == nil && ca.SignedUnder(svid.Certificates[0]) == authority {
					n++
				}
			}
			return n
		}
		if got := a.State().under(); !slices.Equal(got, []string{under}) {
			t.Errorf("it says that it holds %v", got)
		}

		// Somebody signs under it still: a node that lags, or lies.
		taint(a, time.Second, tainted)
		time.Sleep(5 * time.Second)
		if holding(under) != services {
			t.Fatal("an SVID was lost")
		}
		if now, _ := a.SVIDs(ids[0]).GetX509SVID(); !now.Certificates[0].Equal(svid.Certificates[0]) {
			t.Error("a new SVID under a tainted authority was taken")
		}
		if server.count(ids[0]) < 2 {
			t.Fatal("control: none was offered")
		}
		server.set(func() { server.authority = next })
		time.Sleep(2 * retryMost)
		if n := holding(under); n != 0 {
			t.Errorf("%d SVIDs are still under the tainted authority", n)
		}

		// The other one is tainted now: spread over a minute.
		server.set(func() { server.authority = old })
		svid, _ = a.SVIDs(ids[0]).GetX509SVID()
		other := ca.SignedUnder(svid.Certificates[0])
		began := time.Now()
		taint(a, time.Minute, other+strings.Repeat("0", 64-len(other)))
		synctest.Wait()
		time.Sleep(30 * time.Second)
		if n := holding(other); n == 0 || n == services {
			t.Errorf("after half of the time %d of %d are to be renewed: they are not spread", n, services)
		}
		time.Sleep(31 * time.Second)
		if n := holding(other); n != 0 {
			t.Errorf("after %v %d are still under the tainted authority", time.Since(began), n)
		}

		// Within a second: those that come due close together share a call.
		calls := func() (n int) {
			server.set(func() { n = len(server.calls) })
			return n
		}
		server.set(func() { server.authority = next })
		before := calls()
		taint(a, time.Second, tainted)
		time.Sleep(time.Second + gather)
		if n := holding(under); n != 0 {
			t.Errorf("%d are still under the tainted authority", n)
		}
		if n := calls() - before; n < 3 || n > 7 {
			t.Errorf("%d calls for %d SVIDs, spread over a second: %v apart makes 6", n, services, gather)
		}

		// Where there is nothing to spread, all of them at once, not with the next look.
		time.Sleep(gather)
		server.set(func() { server.authority = old })
		taint(a, 0, other+strings.Repeat("0", 64-len(other)))
		synctest.Wait()
		if n := holding(under); n != services {
			t.Errorf("%d of %d are issued anew in the moment of the taint", n, services)
		}

		// Who has none does not wait for others.
		hold(a, server, entry(ids[0], "/"+ids[0], 2))
		synctest.Wait()
		signed := server.count(ids[0])
		hold(a, server, entry(ids[0], "/"+ids[0], 3))
		synctest.Wait()
		if server.count(ids[0]) != signed+1 {
			t.Error("an entry that has changed waits for its SVID")
		}
	})
}

// A JWT-SVID under a tainted authority is not handed out any more, and a new one under
// it is not taken; the workload gets one of another authority.
func TestTaintedJWTIsDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, f, stop := jwtAgent(t, time.Hour)
		defer stop()
		fetch := func() (string, error) {
			token, _, err := a.FetchJWT(t.Context(), accounts(a), []string{"x"})
			return token, err
		}
		one, err := fetch()
		if err != nil {
			t.Fatal(err)
		}
		if again, err := fetch(); err != nil || again != one {
			t.Fatalf("control: %v", err)
		}
		old := keysOf(a.State().JWT)
		taint(a, 0, old...)
		if token, err := fetch(); err == nil {
			t.Errorf("handed out under a tainted authority: %t", token == one)
		}
		f.set(f.rekey)
		addKeys(a, f)
		time.Sleep(retryMost)
		if token, err := fetch(); err != nil || token == one {
			t.Errorf("under the other authority: %v", err)
		}
	})
}

// A WIT-SVID under a tainted authority is issued anew, spread over the time that the CA
// gives, and held until then.
func TestTaintedWITIsReissued(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, f, stopJWT := jwtAgent(t, time.Hour)
		defer stopJWT()
		defer background(t, a.entries.keepWITs)()
		synctest.Wait()
		first := accounts(a).WIT
		if first == nil || !slices.Contains(a.State().under(), ca.AuthorityKeyID(first.keyID)) {
			t.Fatal("control: there is none, or it is not said to be held")
		}
		taint(a, time.Second, first.keyID)
		time.Sleep(5 * time.Second)
		if accounts(a).WIT != first {
			t.Error("one under the tainted authority took its place")
		}
		f.set(f.rekey)
		addKeys(a, f)
		time.Sleep(retryMost)
		if now := accounts(a).WIT; now == first || now.keyID == first.keyID {
			t.Error("not issued anew")
		}
		if slices.Contains(a.State().under(), ca.AuthorityKeyID(first.keyID)) {
			t.Error("it is said to be held")
		}
	})
}

func keysOf(b *TokenBundle) (ids []string) {
	for id := range b.Keys {
		ids = append(ids, id)
	}
	return ids
}

// addKeys gives the agent the CA's new keys beside the ones it has.
func addKeys(a *Agent, f *fakeCA) {
	before := a.State()
	holdKeys(a, f)
	both := func(x, y *TokenBundle) *TokenBundle {
		keys := maps.Clone(x.Keys)
		maps.Copy(keys, y.Keys)
		return &TokenBundle{TrustDomain: x.TrustDomain, Keys: keys}
	}
	a.change(func(s *State) *State {
		next := *s
		next.JWT, next.WIT, next.reissued = both(before.JWT, s.JWT), both(before.WIT, s.WIT), nil
		return &next
	})
}
