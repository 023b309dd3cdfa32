package feed

import (
	"fmt"
	"slices"
	"testing"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

func (w *world) taint(id string) {
	w.t.Helper()
	w.must(&statev1.Command{Body: &statev1.Command_TaintAuthority{TaintAuthority: &statev1.TaintAuthority{Id: id}}})
}

func (w *world) ban(name string) {
	w.t.Helper()
	w.must(&statev1.Command{Body: &statev1.Command_BanAgent{BanAgent: &statev1.BanAgent{Name: name}}})
}

// Distrust and taint are sent ahead of the policy lane and repeated in it; they move
// neither the resume point nor what counts as acknowledged.
func TestUrgentIsAhead(t *testing.T) {
	w := newWorld(t, 0)
	w.attest("h1")
	w.attest("h2")
	a := w.authority("a1")
	var m mirror
	s := w.subscribe(agentSub("h1", 1), 0)
	if u, ok := s.Urgent(w.st); ok {
		t.Fatalf("control: urgent without need: %+v", u)
	}
	w.drain(s, &m)
	s.Ack(m.revision)
	before := w.f.Status(start, time.Hour).Acknowledged

	w.ban("h2")
	w.taint(a.GetId())
	u, ok := s.Urgent(w.st)
	if !ok || len(u.Distrust) != 1 || u.Distrust[0].GetAgent() != "h2" || !slices.Equal(u.Tainted, []string{a.GetId()}) {
		t.Fatalf("urgent: %v %+v", ok, u)
	}
	if _, again := s.Urgent(w.st); again {
		t.Error("sent twice")
	}
	if got := w.f.Status(start, time.Hour).Acknowledged; got != before {
		t.Errorf("acknowledged %d, before the urgent item %d", got, before)
	}
	p, has, err := s.Policy(w.st)
	if err != nil || !has || len(p.Distrust) != 1 || !p.TaintedChanged || !slices.Equal(p.Tainted, u.Tainted) || p.Revision != w.st.Revision() {
		t.Fatalf("the policy lane does not repeat it: %v %v %+v", has, err, p)
	}
	// A later session that resumes before it is told again; a full one of all.
	for i, resume := range []uint64{before, w.st.Revision(), 0} {
		s = w.subscribe(agentSub("h1", uint64(2+i)), resume)
		p, has, err = s.Policy(w.st)
		if err != nil || !has || !p.TaintedChanged || !slices.Equal(p.Tainted, u.Tainted) {
			t.Errorf("resumed at %d: %v %v %+v", resume, has, err, p)
		}
		if want := resume != w.st.Revision(); (len(p.Distrust) == 1) != want {
			t.Errorf("resumed at %d: distrust %v", resume, p.Distrust)
		}
	}
	// An authority's other phases are no news to subscribers.
	b := w.authority("a2")
	w.drain(s, &m)
	w.must(&statev1.Command{Body: &statev1.Command_AuthorityReady{AuthorityReady: &statev1.AuthorityReady{Id: b.GetId()}}})
	if u, has, _ := s.Policy(w.st); has {
		t.Errorf("told of %+v", u)
	}
	// The end of an item is told in the policy lane.
	w.must(&statev1.Command{Body: &statev1.Command_Tick{Tick: &statev1.Tick{UnixNanos: []int64{start.UnixNano()}}}})
	w.ban("h1")
	if _, _, err := s.Policy(w.st); err == nil {
		t.Error("a banned subscriber is told more")
	}
}

// Whoever did not say what it holds counts as holding; the word of a session goes over
// to the next, and ends with a goodbye.
func TestHeld(t *testing.T) {
	w := newWorld(t, 0)
	w.attest("h1")
	a := w.authority("a1").GetId()
	held := func() []string { return w.f.Held([]string{a})[a] }
	if got := held(); got != nil {
		t.Fatalf("control: %v", got)
	}
	s := w.subscribe(agentSub("h1", 1), 0)
	if got := held(); !slices.Equal(got, []string{"agent h1"}) {
		t.Errorf("one that is silent: %v", got)
	}
	s.Holds([]string{"something else"})
	if got := held(); got != nil {
		t.Errorf("one that holds another: %v", got)
	}
	s.Holds([]string{ca.AuthorityKeyID(a), "something else"})
	if got := held(); len(got) != 1 {
		t.Errorf("one that holds it: %v", got)
	}
	s.Close(start, false)
	s.Holds(nil)
	if got := held(); len(got) != 1 {
		t.Errorf("one whose stream was lost: %v", got)
	}
	next := w.subscribe(agentSub("h1", 2), 0)
	if got := held(); len(got) != 1 {
		t.Errorf("one that came back: %v", got)
	}
	next.Close(start, true)
	if got := held(); got != nil {
		t.Errorf("one that said goodbye: %v", got)
	}
	for i := range 12 {
		w.attest(fmt.Sprint("x", i))
		w.subscribe(agentSub(fmt.Sprint("x", i), 1), 0)
	}
	if got := held(); len(got) != 10 {
		t.Errorf("%d names", len(got))
	}
}

func TestReissueIsSpread(t *testing.T) {
	w := newWorld(t, 0)
	w.attest("h1")
	w.apply(service("accounts", "h1"))
	if got := w.f.reissue(w.st); got != 0 {
		t.Errorf("one SVID is spread over %v", got)
	}
	for i := range 10 {
		var changes []*statev1.EntryChange
		for j := range 1000 {
			changes = append(changes, &statev1.EntryChange{Action: &statev1.EntryChange_Create{Create: &statev1.Entry{
				Id: fmt.Sprintf("entry/e%d", i*1000+j), Path: "/e", Hosts: []string{"h1"}, Selectors: []string{"unix:uid:1"},
			}}})
		}
		w.must(&statev1.Command{Body: &statev1.Command_ChangeEntries{ChangeEntries: &statev1.ChangeEntries{Changes: changes}}})
	}
	if got := w.f.reissue(w.st); got < 2*time.Second || got > 4*time.Second {
		t.Errorf("10,000 SVIDs are spread over %v, 5 s are allowed for all of it", got)
	}
}
