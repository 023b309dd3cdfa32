package feed

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/entente-mesh/entente/ca/presence"
	"github.com/entente-mesh/entente/federation/catalog"
)

// I3: after a restart a replica waits for the subscribers of before until they are seen
// again, wherever, or have no SVID any more.
func TestRecall(t *testing.T) {
	const longest = 12 * time.Hour
	w := newWorld(t, 0)
	for _, name := range []string{"h1", "h2", "h3"} {
		w.attest(name)
	}
	sub := func(name string) Subscriber {
		return Subscriber{Agent: name, Path: "/entente/agent/" + name, Version: presence.Version{BootID: "boot-" + name, Connect: 1}}
	}
	var seen [3]mirror
	for i, name := range []string{"h1", "h2", "h3"} {
		s := w.subscribe(sub(name), 0)
		w.drain(s, &seen[i])
		s.Ack(seen[i].revision)
	}
	data, err := json.Marshal(w.f.Roll())
	if err != nil {
		t.Fatal(err)
	}
	restart := func(recall bool) {
		w.f = New(keyID("ca-1"), w.st.Revision(), 0)
		var roll []Known
		if err := json.Unmarshal(data, &roll); err != nil {
			t.Fatal(err)
		}
		if recall {
			w.f.Recall(start, roll)
		}
	}
	waiting := func(now time.Time) int { return len(w.f.Status(now, longest).Behind) }

	restart(false)
	if waiting(start) != 0 {
		t.Fatal("control: without a roll nobody is waited for")
	}
	restart(true)
	if waiting(start) != 3 {
		t.Fatalf("%d are waited for", waiting(start))
	}
	// One comes back here and acknowledges, also by a boot of its own.
	back := sub("h1")
	back.Version = presence.Version{BootID: "another", Connect: 1}
	s := w.subscribe(back, 0)
	w.drain(s, &seen[0])
	s.Ack(seen[0].revision)
	if waiting(start) != 2 {
		t.Errorf("%d are waited for, after one came back", waiting(start))
	}
	// One is seen at another replica, which told of it before this one heard anything else.
	newer := presence.Instance{Endpoint: catalog.Endpoint{Agent: "h2"}, Version: presence.Version{BootID: "newer", Connect: 1}}
	w.f.Remote(start, keyID("ca-2"), Instances{Upserts: []presence.Instance{newer}, Complete: true})
	if waiting(start) != 2 {
		t.Errorf("%d are waited for, after another replica said that it has one, and no more", waiting(start))
	}
	newer.Worth = presence.Proven
	w.f.Remote(start, keyID("ca-2"), Instances{Upserts: []presence.Instance{newer}, Complete: true})
	if waiting(start) != 1 {
		t.Errorf("%d are waited for, after one was seen elsewhere", waiting(start))
	}
	// The third is banned, or its SVIDs end.
	if waiting(start.Add(longest+time.Second)) != 0 {
		t.Error("it has no SVID any more, and is waited for")
	}
}
