package domain

import (
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// What a node remembers of bans is taken over, once, and never reaches an agent that was
// attested by a later decision.
func TestMergeBans(t *testing.T) {
	w := newWorld(t)
	w.must(level("n1", FeatureLevel))
	w.must(w.agentToken("t1", "h1", time.Hour))
	w.must(w.attest("t1", keyID("h1-key")))
	h1, _ := w.s.Agent("h1")
	h1 = proto.CloneOf(h1)
	unknown := &statev1.Agent{Name: "h2", Datacenter: "dc1", KeyId: keyID("h2-key"), Generation: h1.GetGeneration()}

	w.must(mergeBans(false, h1, unknown))
	for _, want := range []*statev1.Agent{h1, unknown} {
		got, ok := w.s.Agent(want.GetName())
		item, named := w.s.DistrustItem("agent/" + want.GetName())
		if !ok || !got.GetBanned() || !named || item.GetAgentGeneration() != want.GetGeneration() {
			t.Errorf("%s: %v, item %v", want.GetName(), got, item)
		}
	}
	w.unchanged(mergeBans(false, h1, unknown))
	w.must(w.agentToken("t2", "h2", time.Hour))
	w.refused(w.attest("t2", keyID("another-key")), CodeAgentBanned)

	// Evicted and attested anew: the memory of before means nothing to it.
	w.must(evict("h1"))
	w.unchanged(mergeBans(false, h1))
	w.must(w.agentToken("t3", "h1", time.Hour))
	w.must(w.attest("t3", keyID("h1-new-key")))
	w.unchanged(mergeBans(false, h1))
	w.unchanged(mergeBans(true, h1))
	if a, ok := w.s.Agent("h1"); !ok || a.GetBanned() {
		t.Errorf("the host that was attested anew: %v", a)
	}
	// One that was banned and evicted after the backup: gone, and the name is free.
	newer, _ := w.s.Agent("h1")
	w.must(mergeBans(true, newer))
	if a, ok := w.s.Agent("h1"); ok {
		t.Errorf("the evicted host is still there: %v", a)
	}
	if item, ok := w.s.DistrustItem("agent/h1"); !ok || item.GetAgentGeneration() != newer.GetGeneration() {
		t.Errorf("distrust of the evicted: %v", item)
	}

	alter := func(f func(*statev1.Agent)) *statev1.Command {
		a := proto.CloneOf(unknown)
		f(a)
		return mergeBans(false, a)
	}
	for what, cmd := range map[string]*statev1.Command{
		"nothing":    mergeBans(false),
		"too many":   mergeBans(false, make([]*statev1.Agent, maxMerged+1)...),
		"a bad name": alter(func(a *statev1.Agent) { a.Name = "a/b" }),
		"a bad key":  alter(func(a *statev1.Agent) { a.KeyId = "x" }),
		"no place":   alter(func(a *statev1.Agent) { a.Datacenter = "" }),
		"the future": alter(func(a *statev1.Agent) { a.Generation = 1 << 50 }), // would distrust whoever comes
		"never":      alter(func(a *statev1.Agent) { a.Generation = 0 }),
	} {
		t.Log(what)
		w.refused(cmd, CodeInvalid)
	}
	w.refused(alter(func(a *statev1.Agent) { a.Generation = w.s.Applied() + 1 }), CodeInvalid)
}
