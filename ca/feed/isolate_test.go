package feed

import (
	"errors"
	"testing"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// What this replica shuts out by itself is told ahead, stands in each full state, and
// moves no revision; the agent's own streams end.
func TestIsolate(t *testing.T) {
	w := newWorld(t, 0)
	w.attest("h1")
	w.attest("h2")
	h1, _ := w.st.Agent("h1")
	var m mirror
	own, other := w.subscribe(agentSub("h1", 1), 0), w.subscribe(agentSub("h2", 1), 0)
	w.drain(own, &m)
	w.drain(other, &m)
	own.Ack(m.revision)
	other.Ack(m.revision)
	<-other.Wake
	if _, ok := other.Urgent(w.st); ok || w.f.Banned(h1) {
		t.Fatal("control: shut out before")
	}

	w.f.Isolate([]*statev1.Agent{h1})
	<-other.Wake
	u, ok := other.Urgent(w.st)
	if !ok || len(u.Distrust) != 1 || u.Distrust[0].GetId() != "agent/h1" || u.Distrust[0].GetAgentGeneration() != h1.GetGeneration() {
		t.Fatalf("urgent: %v, %v", u, ok)
	}
	if _, again := other.Urgent(w.st); again {
		t.Error("told twice")
	}
	if p, has, err := other.Policy(w.st); has || err != nil {
		t.Errorf("the policy lane moved: %v, %v", p, err)
	}
	if got := w.f.Status(start, time.Hour).Acknowledged; got != m.revision {
		t.Errorf("acknowledged %d, was %d", got, m.revision)
	}
	if _, _, err := own.Policy(w.st); !errors.Is(err, ErrBanned) {
		t.Errorf("its own stream: %v", err)
	}
	if _, err := w.f.Subscribe(start, w.st, agentSub("h1", 2), 0); !errors.Is(err, ErrBanned) {
		t.Errorf("its next stream: %v", err)
	}
	// One that resumes is told ahead, one that begins with its full state.
	again := w.subscribe(agentSub("h2", 2), m.revision)
	if u, ok := again.Urgent(w.st); !ok || len(u.Distrust) != 1 {
		t.Errorf("after a resume: %v, %v", u, ok)
	}
	fresh := w.subscribe(agentSub("h2", 3), 0)
	if p, has, err := fresh.Policy(w.st); err != nil || !has || len(p.Distrust) != 1 {
		t.Errorf("the full state: %v, %v", p.Distrust, err)
	}
	if _, ok := fresh.Urgent(w.st); ok {
		t.Error("told again after the full state")
	}
	// The same again is no news; agreed, it comes by the policy lane.
	w.f.Isolate([]*statev1.Agent{h1})
	if _, ok := fresh.Urgent(w.st); ok {
		t.Error("told of what it knows")
	}
	w.ban("h1")
	w.f.Isolate(nil)
	if p, has, err := fresh.Policy(w.st); err != nil || !has || len(p.Distrust) != 1 || len(p.DeletedDistrust) != 0 {
		t.Errorf("agreed: %+v, %v", p, err)
	}
	// Another attestation is another agent.
	w.f.Isolate([]*statev1.Agent{h1})
	w.must(&statev1.Command{Body: &statev1.Command_EvictAgent{EvictAgent: &statev1.EvictAgent{Name: "h1"}}})
	w.attest("h1")
	if now, _ := w.st.Agent("h1"); w.f.Banned(now) {
		t.Error("the host that was attested anew is shut out")
	}
}
