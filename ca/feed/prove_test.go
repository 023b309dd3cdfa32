package feed

import (
	"errors"
	"math"
	"testing"
	"time"

	"github.com/entente-mesh/entente/ca/presence"
	"github.com/entente-mesh/entente/federation/catalog"
)

// said is one session as another replica tells of it.
func said(worth presence.Worth, key, boot string, connect uint64) Instances {
	return Instances{Upserts: []presence.Instance{{Endpoint: catalog.Endpoint{Agent: key}, Version: presence.Version{BootID: boot, Connect: connect}, Worth: worth}}}
}

// A replica that says of all subscribers that they have later sessions with it changes
// nothing (I3): their streams go on, what they serve is shown, and those that are waited
// for are waited for, until they sign a later session or the time is over that their
// SVIDs have.
func TestBareWordChangesNothing(t *testing.T) {
	const longest = time.Hour
	w := newWorld(t, 0)
	w.attest("h1")
	w.attest("h2")
	w.apply(service("accounts", "h1"), gateway("gw-1", "h2"))
	subscribers := map[string]*Session{
		"h1":              w.subscribe(agentSub("h1", 1), 0),
		"h2":              w.subscribe(agentSub("h2", 1), 0),
		"gateway/gw-1@h2": w.subscribe(gatewaySub("gw-1", "h2"), 0),
	}
	for _, s := range subscribers {
		var m mirror
		w.drain(s, &m)
		s.Ack(m.revision)
	}
	subscribers["h1"].Report(start, []presence.Instance{serving("accounts", ":1", false)})
	a := w.authority("a1") // nobody acknowledges it
	reached := func(now time.Time) bool {
		return w.f.Status(now, longest).Acknowledged >= a.GetPreparedRevision()
	}
	lie := func(worth presence.Worth) {
		for _, boot := range []string{"boot-h1", "boot-h2", "boot-gw-1", "new"} {
			for key := range subscribers {
				w.f.Remote(start, keyID("ca-2"), said(worth, key, boot, math.MaxUint64))
			}
		}
	}
	live := func(what string) {
		t.Helper()
		for key, s := range subscribers {
			var m mirror
			u, _, err := s.Policy(w.st)
			if m.take(u); err != nil {
				t.Errorf("%s: the stream of %s: %v", what, key, err)
			}
		}
		if all := w.f.Instances(); len(all) != 1 || all[0].Address != ":1" || all[0].Stale {
			t.Errorf("%s: shown %+v", what, all)
		}
		if reached(start) {
			t.Errorf("%s: nobody is waited for", what)
		}
	}
	lie(presence.Unproven)
	live("unproven")
	w.f.Remote(start, keyID("ca-2"), said(presence.Claimed, "gateway/gw-1@h2", "boot-gw-1", math.MaxUint64))
	live("claimed")
	lie(presence.Unproven)

	// The streams are lost: agents and gateways are waited for.
	for _, s := range subscribers {
		s.Close(start, false)
	}
	lie(presence.Unproven)
	if status := w.f.Status(start, longest); len(status.Behind) != 3 {
		t.Errorf("lost, unproven: waiting for %v", status.Behind)
	}
	if !reached(start.Add(longest + time.Second)) {
		t.Error("control: they are waited for although their SVIDs have ended")
	}
}

// What a subscriber signed is believed: an agent's later session ends its stream and it is
// waited for where it is now; a gateway's claim does that only where it has no stream.
func TestSignedSessionMoves(t *testing.T) {
	const longest = time.Hour
	w := newWorld(t, 0)
	w.attest("h1")
	w.attest("h2")
	w.apply(gateway("gw-1", "h2"))
	agent, gw := w.subscribe(agentSub("h1", 1), 0), w.subscribe(gatewaySub("gw-1", "h2"), 0)
	w.authority("a1")
	behind := func() int { return len(w.f.Status(start, longest).Behind) }

	w.f.Remote(start, keyID("ca-2"), said(presence.Proven, "h1", "boot-h1", 0))
	w.f.Remote(start, keyID("ca-2"), said(presence.Proven, "h1", "boot-h1", 1))
	if _, _, err := agent.Policy(w.st); err != nil {
		t.Errorf("an earlier session, repeated, ends a stream: %v", err)
	}
	w.f.Remote(start, keyID("ca-2"), said(presence.Proven, "h1", "boot-h1", 2))
	if _, _, err := agent.Policy(w.st); !errors.Is(err, ErrSuperseded) {
		t.Errorf("a later session that the agent signed: %v", err)
	}
	if behind() != 2 {
		t.Fatalf("control: %d are waited for", behind())
	}
	if agent.Close(start, false); behind() != 1 {
		t.Error("an agent that has moved is waited for here")
	}

	claim := said(presence.Claimed, "gateway/gw-1@h2", "boot-gw-1", 2)
	w.f.Remote(start, keyID("ca-2"), claim)
	if _, _, err := gw.Policy(w.st); err != nil {
		t.Errorf("a gateway's claim ends its stream: %v", err)
	}
	if behind() != 1 {
		t.Error("a gateway's claim clears it where it has a stream")
	}
	gw.Close(start, false)
	if behind() != 0 {
		t.Error("a gateway that has moved is waited for where it has no stream")
	}
}

// A signature is passed on with the session, also one that came after the Hello.
func TestProofIsPassedOn(t *testing.T) {
	w := newWorld(t, 0)
	w.attest("h1")
	watch := w.f.Watch()
	defer watch.Close()
	watch.Next()
	who := agentSub("h1", 1)
	who.Proof = presence.Proof{PublicKey: "k", Signature: "s"}
	w.subscribe(who, 0)
	if in, _ := watch.Next(); len(in.Upserts) != 1 || in.Upserts[0].Proof != who.Proof {
		t.Errorf("with the Hello: %+v", in)
	}
	s := w.subscribe(agentSub("h1", 2), 0)
	if in, _ := watch.Next(); len(in.Upserts) != 1 || in.Upserts[0].Proof != (presence.Proof{}) {
		t.Errorf("control: a session without one: %+v", in)
	}
	s.Prove(who.Proof)
	if in, _ := watch.Next(); len(in.Upserts) != 1 || in.Upserts[0].Proof != who.Proof {
		t.Errorf("after it: %+v", in)
	}
}

// What other replicas said of an agent goes with the agent, and with the replica.
func TestHearsayGoesWithAgentAndReplica(t *testing.T) {
	w := newWorld(t, 0)
	w.attest("h1")
	w.attest("h2")
	w.apply(service("accounts", "h1", "h2"))
	for _, name := range []string{"h1", "h2", "h9"} {
		in := said(presence.Proven, name, "b", 1)
		in.Upserts = append(in.Upserts, presence.Instance{Endpoint: catalog.Endpoint{Agent: name, Service: "accounts"}, Version: in.Upserts[0].Version})
		w.f.Remote(start, keyID("ca-2"), in)
	}
	if n := len(w.f.Instances()); n != 3 {
		t.Fatalf("control: %d instances", n)
	}
	if w.f.Expire(start, w.st); len(w.f.Instances()) != 2 {
		t.Errorf("of agents that are gone: %+v", w.f.Instances())
	}
	if w.f.Dismiss(start, keyID("ca-3")); len(w.f.Instances()) != 2 {
		t.Error("control: another replica was dismissed")
	}
	if w.f.Dismiss(start, keyID("ca-2")); len(w.f.Instances()) != 0 {
		t.Errorf("of a replica that is none any more: %+v", w.f.Instances())
	}
}
