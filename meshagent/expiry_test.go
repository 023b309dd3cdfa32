package meshagent

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/internal/peer/peertest"
)

// What ends before the CA signs anew leaves the state at that moment, and is counted and
// said; the one that is signed afterwards is there within a second.
func TestEndedSVIDsAreDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newFakeCA(time.Hour)
		ca.paths["service/a"], ca.paths["service/b"] = "/a", "/b"
		a := newAgent(t, ca)
		var log bytes.Buffer
		a.entries.log = slog.New(slog.NewTextHandler(&log, nil))
		counted := prometheus.NewRegistry()
		counted.MustRegister(a.entries.metrics.ended)
		ended := func() float64 {
			families, err := counted.Gather()
			if err != nil {
				t.Fatal(err)
			}
			return families[0].GetMetric()[0].GetCounter().GetValue()
		}
		hold(a, ca, entry("service/a", "/a", 1), entry("service/b", "/b", 1))
		defer background(t, a.entries.keepX509)()
		defer background(t, a.entries.dropEnded)()
		synctest.Wait()
		identity, _ := a.State().Identity("service/a")
		end := identity.SVID.NotAfter
		time.Sleep(10 * time.Minute)
		ca.set(func() { ca.fails = client.ErrUnreachable })

		time.Sleep(time.Until(end) - time.Second)
		synctest.Wait()
		if serial(a, "service/a") == "" || ended() != 0 {
			t.Fatal("it is gone before its end")
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if _, err := a.SVIDs("service/a").GetX509SVID(); err == nil || !strings.Contains(err.Error(), "ended") || serial(a, "service/b") != "" {
			t.Errorf("an SVID is handed out after its end: %v", err)
		}
		if n := ended(); n != 2 {
			t.Errorf("%v have ended, not both", n)
		}
		quiet := a.State()
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		if a.State() != quiet {
			t.Error("the state goes on changing although nothing else ends")
		}
		ca.set(func() { ca.fails = nil })
		time.Sleep(retryEnded)
		synctest.Wait()
		if serial(a, "service/a") == "" || serial(a, "service/b") == "" {
			t.Error("no new SVID a second after the CA is back")
		}
		if n := strings.Count(log.String(), "have ended before"); n != 1 {
			t.Errorf("said %d times:\n%s", n, log.String())
		}
	})
}

// An agent that was evicted and admitted again without a restart hands out no X.509-SVID of
// its former admission, nor one under an authority that was revoked while its root stays,
// and has new ones at once. A grace that the CA gives is used to renew without a gap.
func TestRevokedSVIDsAreDroppedAndRenewedAtOnce(t *testing.T) {
	readmitted := &statev1.Distrust{Agent: "h1", AgentGeneration: 4}
	start := func(t *testing.T) (*Agent, *fakeCA) {
		server := tokenCA(12 * time.Hour)
		server.paths["service/accounts"] = "/accounts"
		server.tokens.origin = ca.Origin{Entry: "service/accounts", EntryGeneration: 7, Agent: "h1", AgentGeneration: 4}
		a := newAgent(t, server)
		hold(a, server, entry("service/accounts", "/accounts", 7))
		holdKeys(a, server)
		for _, run := range []func(context.Context) error{a.entries.keepX509, a.entries.keepWITs, a.entries.dropEnded} {
			t.Cleanup(background(t, run))
		}
		synctest.Wait()
		if serial(a, "service/accounts") == "" || accounts(a).WIT == nil {
			t.Fatal("control: nothing was signed")
		}
		distrust(a, &statev1.Distrust{Agent: "h9", AgentGeneration: 4})
		synctest.Wait()
		if server.count("service/accounts") != 2 {
			t.Fatal("control: signed again because another agent is distrusted")
		}
		return a, server
	}
	for name, test := range map[string]func(t *testing.T){
		"admitted again": func(t *testing.T) {
			a, server := start(t)
			before, wit := serial(a, "service/accounts"), accounts(a).WIT
			server.set(func() { server.tokens.origin.AgentGeneration = 5 })
			distrust(a, readmitted)
			synctest.Wait() // no time passes
			if now := serial(a, "service/accounts"); now == before || now == "" || accounts(a).WIT == wit || accounts(a).WIT == nil {
				t.Error("what the former admission was given is held, or nothing new is")
			}
		},
		"by a CA node that lags": func(t *testing.T) {
			a, server := start(t)
			distrust(a, readmitted)
			synctest.Wait()
			if serial(a, "service/accounts") != "" || accounts(a).WIT != nil {
				t.Error("an SVID of the former admission is handed out")
			}
			if _, err := a.SVIDs("service/accounts").GetX509SVID(); err == nil {
				t.Error("the sidecar has one")
			}
			server.set(func() { server.tokens.origin.AgentGeneration = 5 })
			time.Sleep(2 * retryEnded)
			synctest.Wait()
			if serial(a, "service/accounts") == "" || accounts(a).WIT == nil {
				t.Error("no new SVID a second after a CA node knows of the new admission")
			}
		},
		"with a grace": func(t *testing.T) {
			a, server := start(t)
			before := serial(a, "service/accounts")
			server.set(func() { server.fails = client.ErrUnreachable })
			announce(a, readmitted)
			synctest.Wait()
			if serial(a, "service/accounts") != before {
				t.Error("dropped during the grace")
			}
			server.set(func() { server.fails, server.tokens.origin.AgentGeneration = nil, 5 })
			time.Sleep(500 * time.Millisecond)
			synctest.Wait()
			if now := serial(a, "service/accounts"); now == before || now == "" {
				t.Error("not renewed during the grace")
			}
		},
		"its authority, under a root that stays": func(t *testing.T) {
			a, server := start(t)
			root := peertest.NewAuthority(bank)
			server.set(func() { server.authority = root.Intermediate() })
			a.change(func(s *State) *State {
				next := *s
				next.Bundle, next.reissued = root.Bundle(), nil
				return &next
			})
			synctest.Wait()
			before := accounts(a).SVID
			server.set(func() { server.authority = root.Intermediate() })
			distrust(a, &statev1.Distrust{Authority: before.under + strings.Repeat("0", 24)})
			synctest.Wait()
			if now := accounts(a).SVID; now == nil || now.under == before.under {
				t.Error("not renewed")
			}
		},
	} {
		t.Run(name, func(t *testing.T) { synctest.Test(t, test) })
	}
}

// announce tells of distrust that is not in force yet.
func announce(a *Agent, items ...*statev1.Distrust) {
	a.change(func(s *State) *State {
		next, view := *s, *s.View
		view.Announced = ca.NewDistrusted(bank, items)
		next.View, next.reissued = &view, nil
		return &next
	})
}

// The clock that counts is that of the wall: a host that has slept wakes with SVIDs that
// ended meanwhile.
func TestFirstEnd(t *testing.T) {
	ca := newFakeCA(time.Hour)
	ca.paths["service/a"] = "/a"
	a := newAgent(t, ca)
	if !a.State().firstEnd().IsZero() {
		t.Error("nothing is held, and something ends")
	}
	hold(a, ca, entry("service/a", "/a", 1))
	stop := background(t, a.entries.keepX509)
	eventually(t, "an SVID", func() error {
		if serial(a, "service/a") == "" {
			return errors.New("none")
		}
		return nil
	})
	stop()
	first, _ := a.State().Identity("service/a")
	svid := first.SVID
	a.change(func(s *State) *State {
		return s.withWITs(map[string]*WITSVID{"service/a": {ID: svid.ID, Key: peertest.NewKey(), Expires: svid.NotAfter.Add(-time.Minute), signedFor: first.record}})
	})
	s := a.State()
	if want := svid.NotAfter.Add(-time.Minute); !s.firstEnd().Equal(want) {
		t.Errorf("the first ends at %v, want %v", s.firstEnd(), want)
	}
	next, ended, _ := s.withoutEnded(s.firstEnd())
	if identity, _ := next.Identity("service/a"); ended != 1 || identity.WIT != nil || identity.SVID != svid {
		t.Errorf("%d ended: %+v", ended, identity)
	}
	if identity, _ := s.Identity("service/a"); identity.WIT == nil {
		t.Error("the state before was changed")
	}
}
