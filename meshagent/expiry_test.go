package meshagent

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

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
		a.log = slog.New(slog.NewTextHandler(&log, nil))
		counted := prometheus.NewRegistry()
		counted.MustRegister(a.metrics.ended)
		ended := func() float64 {
			families, err := counted.Gather()
			if err != nil {
				t.Fatal(err)
			}
			return families[0].GetMetric()[0].GetCounter().GetValue()
		}
		hold(a, ca, entry("service/a", "/a", 1), entry("service/b", "/b", 1))
		defer background(t, a.keepEntries)()
		defer background(t, a.dropEnded)()
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
	stop := background(t, a.keepEntries)
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
	next, ended := s.withoutEnded(s.firstEnd())
	if identity, _ := next.Identity("service/a"); ended != 1 || identity.WIT != nil || identity.SVID != svid {
		t.Errorf("%d ended: %+v", ended, identity)
	}
	if identity, _ := s.Identity("service/a"); identity.WIT == nil {
		t.Error("the state before was changed")
	}
}
