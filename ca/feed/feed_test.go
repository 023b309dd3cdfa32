package feed

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/domain/domaintest"
	"github.com/entente-mesh/entente/ca/presence"
	"github.com/entente-mesh/entente/ca/wire"
	"github.com/entente-mesh/entente/federation/catalog"
)

var start = time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)

// world is a state and the feed of one replica.
type world struct {
	t     fataler
	st    *domain.State
	f     *Feed
	index uint64
}

type fataler interface {
	Helper()
	Fatalf(format string, args ...any)
}

func keyID(name string) string { return domaintest.KeyID(name) }

func newWorld(t fataler, ring int) *world {
	w := &world{t: t, st: domain.New(), f: New(keyID("ca-1"), 0, ring)}
	w.must(&statev1.Command{Body: &statev1.Command_Init{Init: &statev1.Init{
		Cluster: &statev1.Cluster{TrustDomain: "banking.example", Id: make([]byte, 16)},
		Member: &statev1.Member{Id: keyID("ca-1"), Name: "ca-1", Datacenter: "dc1", Voter: true, Signing: true, FeatureLevel: domain.FeatureLevel,
			RaftAddress: "10.0.0.1:7000", ApiAddress: "10.0.0.1:7001"},
	}}})
	return w
}

func (w *world) must(command *statev1.Command) {
	w.t.Helper()
	w.index++
	outcome := w.st.Apply(w.index, command)
	if outcome.Refused != nil || outcome.Fatal != nil {
		w.t.Fatalf("%T: %v %v", command.GetBody(), outcome.Refused, outcome.Fatal)
	}
	w.f.Publish(outcome)
}

// attest makes a host an agent, with a new token and key each time.
func (w *world) attest(name string) {
	w.t.Helper()
	seed := bytes.Repeat([]byte{byte(w.index)}, 32)
	id := fmt.Sprint("t", w.index)
	w.must(&statev1.Command{Body: &statev1.Command_CreateToken{CreateToken: &statev1.CreateToken{Token: &statev1.Token{
		Id: id, PublicKey: ed25519.NewKeyFromSeed(seed).Public().(ed25519.PublicKey), NotAfter: start.Add(time.Hour).Unix(),
		Grant: &statev1.Token_Agent{Agent: &statev1.AgentGrant{Name: name, Datacenter: "dc1", Addresses: []string{"10.0.1.1"}}},
	}}}})
	statement, signature, err := ca.SignStatement(seed, &statev1.JoinStatement{
		ClusterId: make([]byte, 16), TokenId: id, Role: ca.RoleAgent, KeyId: keyID(id), Exporter: make([]byte, 32),
	})
	if err != nil {
		w.t.Fatalf("%v", err)
	}
	w.must(&statev1.Command{Body: &statev1.Command_AttestAgent{AttestAgent: &statev1.AttestAgent{
		TokenId: id, KeyId: keyID(id), Statement: statement, Signature: signature,
	}}})
}

func (w *world) apply(objects ...*statev1.Object) {
	w.t.Helper()
	w.must(&statev1.Command{Body: &statev1.Command_ApplyObjects{ApplyObjects: &statev1.ApplyObjects{Upserts: objects}}})
}

func (w *world) remove(kind, name string) {
	w.t.Helper()
	w.must(&statev1.Command{Body: &statev1.Command_ApplyObjects{ApplyObjects: &statev1.ApplyObjects{
		Deletes: []*statev1.ObjectKey{{Kind: kind, Name: name}},
	}}})
}

func (w *world) bundleOf(td string, sequence uint64) {
	w.t.Helper()
	w.must(&statev1.Command{Body: &statev1.Command_StoreForeignBundle{StoreForeignBundle: &statev1.StoreForeignBundle{
		TrustDomain: td, Jwks: fmt.Appendf(nil, `{"keys":[],"spiffe_sequence":%d}`, sequence), Sequence: sequence,
	}}})
}

func (w *world) authority(name string) *statev1.Authority {
	w.t.Helper()
	made := domaintest.Authority("ca-1", name, "banking.example", statev1.KeyUse_KEY_USE_X509, start, 20*time.Minute)
	w.must(domaintest.Prepare(w.st.Cluster(), made))
	a, _ := w.st.Authority(made.GetId())
	return a
}

func service(name string, hosts ...string) *statev1.Object {
	return &statev1.Object{Kind: &statev1.Object_Service{Service: &statev1.Service{
		Name: name, Path: "/" + name, Hosts: hosts, Selectors: []string{"unix:uid:1000"}, Port: 8080,
	}}}
}

func gateway(name string, hosts ...string) *statev1.Object {
	return &statev1.Object{Kind: &statev1.Object_Gateway{Gateway: &statev1.Gateway{
		Name: name, Datacenter: "dc1", Address: fmt.Sprintf("10.0.2.%d:8443", name[len(name)-1]), Hosts: hosts, Selectors: []string{"unix:uid:1001"},
	}}}
}

func relationship(td string) *statev1.Object {
	return &statev1.Object{Kind: &statev1.Object_Relationship{Relationship: &statev1.Relationship{
		TrustDomain: td, EndpointUrls: []string{"https://10.9.9.9:8443/"}, EndpointId: "spiffe://" + td + "/entente/bundle-endpoint",
		BootstrapBundle: []byte(`{"keys":[]}`),
	}}}
}

func agentSub(name string, connect uint64) Subscriber {
	return Subscriber{Agent: name, Path: ca.AgentPath(name), Version: presence.Version{BootID: "boot-" + name, Connect: connect}}
}

func gatewaySub(name, host string) Subscriber {
	return Subscriber{Agent: host, EntryID: ca.GatewayEntry(name), Path: ca.GatewayPath(name), Version: presence.Version{BootID: "boot-" + name, Connect: 1}}
}

func (w *world) subscribe(who Subscriber, resume uint64) *Session {
	w.t.Helper()
	s, err := w.f.Subscribe(start, w.st, who, resume)
	if err != nil {
		w.t.Fatalf("subscribe %+v: %v", who, err)
	}
	return s
}

func serving(service, address string, healthy bool) presence.Instance {
	return presence.Instance{Endpoint: catalog.Endpoint{Service: service, Address: address, Healthy: healthy}}
}

// mirror is what a subscriber holds after the updates it got.
type mirror struct {
	revision uint64
	full     int
	entries  map[string]*statev1.Entry
	bundles  map[string]uint64 // foreign, with sequence
	objects  map[string]*statev1.Object
	own      *OwnBundle
	members  int
	state    wire.State // the same from chunks
}

func (m *mirror) take(u Update) {
	var pending wire.Pending
	for _, chunk := range u.Encode(256) {
		if err := pending.Add(chunk); err != nil {
			panic(err)
		}
	}
	m.state = m.state.With(&pending.Update)
	if u.Full {
		m.full++
		m.entries, m.bundles, m.objects = map[string]*statev1.Entry{}, map[string]uint64{}, map[string]*statev1.Object{}
	}
	for _, e := range u.Entries {
		m.entries[e.GetId()] = e
	}
	for _, id := range u.DeletedEntries {
		delete(m.entries, id)
	}
	for _, b := range u.Bundles {
		m.bundles[b.GetTrustDomain()] = b.GetSequence()
	}
	for _, td := range u.DeletedBundles {
		delete(m.bundles, td)
	}
	for _, o := range u.Objects {
		m.objects[domain.ObjectKey(o)] = o
	}
	for _, key := range u.DeletedObjects {
		delete(m.objects, key)
	}
	if u.OwnBundle != nil {
		m.own = u.OwnBundle
	}
	if u.MembersChanged {
		m.members = len(u.Members)
	}
	m.revision = u.Revision
}

// drain takes everything the policy lane has.
func (w *world) drain(s *Session, m *mirror) {
	w.t.Helper()
	for {
		u, has, err := s.Policy(w.st)
		if err != nil {
			w.t.Fatalf("policy: %v", err)
		}
		if !has {
			return
		}
		if u.Revision < m.revision {
			w.t.Fatalf("went back from revision %d to %d", m.revision, u.Revision)
		}
		m.take(u)
	}
}

func (m *mirror) objectKeys() string {
	return strings.Join(slices.Sorted(maps.Keys(m.objects)), " ")
}

func (m *mirror) entryIDs() string {
	return strings.Join(slices.Sorted(maps.Keys(m.entries)), " ")
}

func TestFullThenDelta(t *testing.T) {
	w := newWorld(t, 0)
	w.attest("h1")
	w.apply(service("accounts", "h1"), service("ledger", "h2"))
	var m mirror
	s := w.subscribe(agentSub("h1", 1), 0)
	w.drain(s, &m)
	if m.full != 1 || m.entryIDs() != "service/accounts" || m.objectKeys() != "Service/accounts Service/ledger" || m.own == nil || m.members != 1 {
		t.Fatalf("full state: %+v", m)
	}
	if m.revision != w.st.Revision() {
		t.Errorf("at %d, the state is at %d", m.revision, w.st.Revision())
	}

	w.apply(service("cards", "h1"))
	u, has, err := s.Policy(w.st)
	if err != nil || !has {
		t.Fatal(has, err)
	}
	if u.Full || len(u.Entries) != 1 || len(u.Objects) != 1 || u.OwnBundle != nil || u.MembersChanged || u.Cluster != nil {
		t.Errorf("delta: %+v", u)
	}
	m.take(u)
	w.remove("Service", "accounts")
	w.drain(s, &m)
	if m.full != 1 || m.entryIDs() != "service/cards" || m.objectKeys() != "Service/cards Service/ledger" {
		t.Errorf("after a delete: %s %s", m.entryIDs(), m.objectKeys())
	}
	w.authority("a1")
	w.drain(s, &m)
	if len(m.own.X509) != 1 || m.own.Sequence != w.st.BundleRevision() {
		t.Errorf("own bundle %+v", m.own)
	}
}

// Resuming works at any replica, for the revisions are the same there.
func TestResume(t *testing.T) {
	w := newWorld(t, 0)
	other := New(keyID("ca-2"), 0, 0) // a second replica of the same state
	w.attest("h1")
	w.apply(service("accounts", "h1"))
	var m mirror
	s := w.subscribe(agentSub("h1", 1), 0)
	w.drain(s, &m)
	s.Close(start, false)

	w.apply(service("cards", "h1"))
	w.remove("Service", "accounts")
	s = w.subscribe(agentSub("h1", 2), m.revision)
	w.drain(s, &m)
	if m.full != 1 || m.entryIDs() != "service/cards" {
		t.Errorf("resumed: full %d, %s", m.full, m.entryIDs())
	}

	// The other replica has no ring to resume from: the full state.
	other.Reset(w.st.Revision())
	w.f = other
	w.apply(service("ledger", "h1"))
	s = w.subscribe(agentSub("h1", 3), m.revision-1)
	w.drain(s, &m)
	if m.full != 2 || m.entryIDs() != "service/cards service/ledger" {
		t.Errorf("at another replica: full %d, %s", m.full, m.entryIDs())
	}

	// One that is behind what the subscriber has seen does not take it back.
	if _, err := w.f.Subscribe(start, w.st, agentSub("h1", 4), m.revision+1); !errors.Is(err, ErrAhead) {
		t.Errorf("a subscriber from the future: %v", err)
	}
}

func TestSlowSubscriberIsCoalescedThenFull(t *testing.T) {
	w := newWorld(t, 16)
	w.attest("h1")
	var m mirror
	s := w.subscribe(agentSub("h1", 1), 0)
	w.drain(s, &m)

	for i := range 3 {
		o := service("accounts", "h1")
		o.GetService().Port = uint32(8080 + i)
		w.apply(o)
	}
	u, _, err := s.Policy(w.st)
	if err != nil || u.Full || len(u.Entries) != 1 || len(u.Objects) != 1 || u.Objects[0].GetService().GetPort() != 8082 {
		t.Errorf("coalesced: %+v, %v", u, err)
	}
	m.take(u)
	for i := range 20 {
		w.apply(service(fmt.Sprint("s", i), "h1"))
	}
	w.drain(s, &m)
	if m.full != 2 || len(m.entries) != 21 {
		t.Errorf("fallen out of the ring: full %d, %d entries", m.full, len(m.entries))
	}
	if n := w.f.Overtaken(); n != 1 {
		t.Errorf("overtaken %d times", n)
	}
	// Out of the ring while away, too.
	s.Close(start, false)
	at := m.revision
	for i := range 20 {
		w.apply(service(fmt.Sprint("t", i), "h1"))
	}
	s = w.subscribe(agentSub("h1", 2), at)
	w.drain(s, &m)
	if m.full != 3 || len(m.entries) != 41 {
		t.Errorf("resumed from outside the ring: full %d, %d entries", m.full, len(m.entries))
	}
}

// I6: a foreign bundle, in whatever form, reaches only whom an entry federates.
// Requirements: 126, 145.
func TestForeignRootsReachOnlyGateways(t *testing.T) {
	w := newWorld(t, 0)
	w.attest("h1")
	w.attest("h2")
	w.apply(service("accounts", "h1"), gateway("gw-1", "h2"), relationship("trading.example"))
	w.bundleOf("trading.example", 5)

	var plain, host, gw mirror
	workload := w.subscribe(agentSub("h1", 1), 0)
	gatewayHost := w.subscribe(agentSub("h2", 1), 0)
	gatewaySelf := w.subscribe(gatewaySub("gw-1", "h2"), 0)
	look := func() {
		t.Helper()
		w.drain(workload, &plain)
		w.drain(gatewayHost, &host)
		w.drain(gatewaySelf, &gw)
		if len(plain.bundles) != 0 {
			t.Errorf("an agent without a gateway holds %v", plain.bundles)
		}
		for _, m := range []mirror{plain, host, gw} {
			r := m.objects["Relationship/trading.example"]
			if r != nil && len(r.GetRelationship().GetBootstrapBundle()) != 0 {
				t.Error("the bootstrap bundle was handed out")
			}
		}
	}
	look()
	if host.bundles["trading.example"] != 5 || gw.bundles["trading.example"] != 5 {
		t.Errorf("control: the gateway and its host hold %v, %v", gw.bundles, host.bundles)
	}
	if gw.entryIDs() != "gateway/gw-1" {
		t.Errorf("the gateway's entries: %s", gw.entryIDs())
	}
	w.bundleOf("trading.example", 6)
	look()
	if host.bundles["trading.example"] != 6 || gw.bundles["trading.example"] != 6 {
		t.Errorf("control: an update: %v, %v", gw.bundles, host.bundles)
	}

	// The gateway moves to h1: its bundles move with it.
	w.apply(gateway("gw-1", "h1"))
	w.drain(workload, &plain)
	w.drain(gatewayHost, &host)
	if plain.bundles["trading.example"] != 6 || len(host.bundles) != 0 {
		t.Errorf("after the move: new host %v, old host %v", plain.bundles, host.bundles)
	}
	if _, _, err := gatewaySelf.Policy(w.st); !errors.Is(err, ErrUnknown) {
		t.Errorf("the gateway at its old host: %v", err)
	}
	gatewaySelf = w.subscribe(gatewaySub("gw-1", "h1"), 0)
	// The relationship ends: nobody keeps it (I4).
	w.remove("Relationship", "trading.example")
	w.drain(workload, &plain)
	w.drain(gatewaySelf, &gw)
	if len(plain.bundles)+len(gw.bundles) != 0 {
		t.Errorf("after the end: %v, %v", plain.bundles, gw.bundles)
	}
}

// What a subscriber lost while it was away is taken from it when it resumes.
// Requirements: 145.
func TestResumeTakesForeignBundleAway(t *testing.T) {
	w := newWorld(t, 0)
	w.attest("h1")
	w.apply(gateway("gw-1", "h1"), relationship("trading.example"), relationship("insurance.example"))
	w.bundleOf("trading.example", 5)
	w.bundleOf("insurance.example", 7)
	var m mirror
	s := w.subscribe(agentSub("h1", 1), 0)
	w.drain(s, &m)
	if len(m.bundles) != 2 {
		t.Fatalf("control: %v", m.bundles)
	}
	s.Close(start, false)
	w.remove("Relationship", "trading.example")
	s = w.subscribe(agentSub("h1", 2), m.revision)
	w.drain(s, &m)
	if m.full != 1 || len(m.bundles) != 1 || m.bundles["insurance.example"] != 7 {
		t.Errorf("after the resume: full %d, %v", m.full, m.bundles)
	}
}

func TestEntitlement(t *testing.T) {
	w := newWorld(t, 0)
	w.attest("h1")
	w.apply(gateway("gw-1", "h1"))
	if _, err := w.f.Subscribe(start, w.st, agentSub("h9", 1), 0); !errors.Is(err, ErrUnknown) {
		t.Errorf("an unknown agent: %v", err)
	}
	wrong := gatewaySub("gw-1", "h1")
	wrong.Path = "/entente/gateway/gw-2"
	if _, err := w.f.Subscribe(start, w.st, wrong, 0); !errors.Is(err, ErrUnknown) {
		t.Errorf("a gateway with another path: %v", err)
	}
	agent, gw := w.subscribe(agentSub("h1", 1), 0), w.subscribe(gatewaySub("gw-1", "h1"), 0)
	var m mirror
	w.drain(agent, &m)
	w.drain(gw, &m)

	w.remove("Gateway", "gw-1")
	if _, _, err := gw.Policy(w.st); !errors.Is(err, ErrUnknown) {
		t.Errorf("a deleted gateway: %v", err)
	}
	w.attest("h1") // with another key
	if _, _, err := agent.Policy(w.st); !errors.Is(err, ErrUnknown) {
		t.Errorf("a replaced agent: %v", err)
	}
	w.f.Expire(start, w.st)
	select {
	case <-agent.Wake:
	default:
		t.Error("the stream of a replaced agent is not woken")
	}
}

func TestLaterSessionTakesOver(t *testing.T) {
	w := newWorld(t, 0)
	w.attest("h1")
	old := w.subscribe(agentSub("h1", 1), 0)
	w.subscribe(agentSub("h1", 2), 0)
	if _, _, err := old.Policy(w.st); !errors.Is(err, ErrSuperseded) {
		t.Errorf("the older session: %v", err)
	}
	if _, err := w.f.Subscribe(start, w.st, agentSub("h1", 1), 0); !errors.Is(err, ErrSuperseded) {
		t.Errorf("an older session that comes later: %v", err)
	}
	if n := w.f.Status(start, time.Hour).Subscribers; n != 1 {
		t.Errorf("%d subscribers", n)
	}
}

// I3: the minimum does not reach a revision before every subscriber that counts has
// acknowledged it.
func TestAcknowledgementMinimum(t *testing.T) {
	const longest = time.Hour
	w := newWorld(t, 0)
	w.attest("h1")
	w.attest("h2")
	held := func() uint64 { return w.f.Status(start, longest).Acknowledged }
	if held() != w.st.Revision() {
		t.Fatal("without subscribers the minimum is not the replica's own revision")
	}
	var m1, m2 mirror
	s1, s2 := w.subscribe(agentSub("h1", 1), 0), w.subscribe(agentSub("h2", 1), 0)
	if held() != 0 {
		t.Errorf("new subscribers hold %d", held())
	}
	w.drain(s1, &m1)
	w.drain(s2, &m2)
	s1.Ack(m1.revision)
	s2.Ack(m2.revision)
	if held() != w.st.Revision() {
		t.Errorf("all acknowledged: %d of %d", held(), w.st.Revision())
	}

	a := w.authority("a1")
	s1.Ack(1 << 60) // what was not sent to it does not count
	if held() >= a.GetPreparedRevision() {
		t.Error("nobody was sent the authority, and the minimum has reached it")
	}
	w.drain(s1, &m1)
	w.drain(s2, &m2)
	s1.Ack(m1.revision)
	if held() >= a.GetPreparedRevision() {
		t.Error("one has not acknowledged, and the minimum has reached the authority")
	}
	status := w.f.Status(start, longest)
	if len(status.Behind) != 1 || status.Behind[0].Name != "agent h2" {
		t.Errorf("waiting for %v", status.Behind)
	}

	// A lost subscriber still counts: its workloads run. Until its SVIDs have ended,
	s2.Close(start, false)
	if held() >= a.GetPreparedRevision() {
		t.Error("a lost subscriber does not count any more")
	}
	if now := w.f.Status(start.Add(longest+time.Second), longest).Acknowledged; now < a.GetPreparedRevision() {
		t.Error("a subscriber without valid SVIDs still counts")
	}

	// or it is seen at another replica, or said goodbye.
	s2 = w.subscribe(agentSub("h2", 2), 0)
	s2.Close(start, false)
	elsewhere := presence.Version{BootID: "boot-h2", Connect: 3}
	w.f.Remote(start, "ca-2", Instances{Upserts: []presence.Instance{{Endpoint: catalog.Endpoint{Agent: "h2"}, Version: elsewhere, Worth: presence.Proven}}, Complete: true})
	if held() < a.GetPreparedRevision() {
		t.Error("a subscriber that is at another replica counts here")
	}
	w.f.Lost(start, "ca-2")
	s2 = w.subscribe(agentSub("h2", 4), 0)
	if held() >= a.GetPreparedRevision() {
		t.Error("a subscriber that came back does not count")
	}
	s2.Close(start, true)
	if held() < a.GetPreparedRevision() {
		t.Error("a subscriber that said goodbye counts")
	}
}

// What does not concern a subscriber is not sent, and does not hold up the minimum.
func TestIrrelevantChanges(t *testing.T) {
	w := newWorld(t, 0)
	w.attest("h1")
	var m mirror
	s := w.subscribe(agentSub("h1", 1), 0)
	w.drain(s, &m)
	s.Ack(m.revision)
	w.attest("h2")
	if _, has, _ := s.Policy(w.st); has {
		t.Error("another agent's attestation was sent")
	}
	if held := w.f.Status(start, time.Hour).Acknowledged; held != w.st.Revision() {
		t.Errorf("the minimum stands at %d of %d", held, w.st.Revision())
	}
	revision, ok := s.Catch()
	if !ok || revision != w.st.Revision() {
		t.Errorf("the resume point does not move: %d, %v", revision, ok)
	}
	if _, ok := s.Catch(); ok {
		t.Error("it moves twice")
	}
}

// An acknowledgement that arrives before the first update of a session, as after a
// reconnect, is not lost.
func TestAcknowledgementBeforeFirstUpdate(t *testing.T) {
	w := newWorld(t, 0)
	w.attest("h1")
	var m mirror
	s := w.subscribe(agentSub("h1", 1), 0)
	w.drain(s, &m)
	s.Ack(m.revision)
	w.f = New(keyID("ca-2"), 0, 0)
	w.f.Reset(w.st.Revision())
	s = w.subscribe(agentSub("h1", 2), 0)
	s.Ack(m.revision)
	w.drain(s, &m)
	if held := w.f.Status(start, time.Hour).Acknowledged; held != w.st.Revision() {
		t.Errorf("the minimum stands at %d of %d", held, w.st.Revision())
	}
}

// A change of entries alone wakes those whom it concerns, and nobody else.
func TestEntryChangeWakes(t *testing.T) {
	w := newWorld(t, 0)
	w.attest("h1")
	w.attest("h2")
	w.apply(gateway("gw-1", "h1"))
	agent, gw, other := w.subscribe(agentSub("h1", 1), 0), w.subscribe(gatewaySub("gw-1", "h1"), 0), w.subscribe(agentSub("h2", 1), 0)
	for _, s := range []*Session{agent, gw, other} {
		<-s.Wake
	}
	w.f.Publish(domain.Outcome{Revision: w.st.Revision(), Changes: []domain.Change{
		{Kind: domain.ChangeEntry, Key: ca.GatewayEntry("gw-1"), Hosts: []string{"h1"}},
	}})
	for name, s := range map[string]*Session{"its agent": agent, "the gateway": gw} {
		select {
		case <-s.Wake:
		default:
			t.Errorf("%s was not woken", name)
		}
	}
	select {
	case <-other.Wake:
		t.Error("another host's agent was woken")
	default:
	}
}

// However many entries change on other hosts, a subscriber goes on where it is, and its
// resume point moves with them. Who does not come for what concerns it falls behind.
func TestChangesElsewhereLeaveTheRing(t *testing.T) {
	const ring = 16
	w := newWorld(t, ring)
	w.attest("h1")
	w.attest("h2")
	var m, of2 mirror
	s, slow := w.subscribe(agentSub("h1", 1), 0), w.subscribe(agentSub("h2", 1), 0)
	w.drain(s, &m)
	w.drain(slow, &of2)
	entries := func(n int, host string) {
		for i := range n {
			w.must(&statev1.Command{Body: &statev1.Command_ChangeEntries{ChangeEntries: &statev1.ChangeEntries{Changes: []*statev1.EntryChange{{
				Action: &statev1.EntryChange_Create{Create: &statev1.Entry{
					Id: fmt.Sprintf("entry/%s-%d", host, i), Path: fmt.Sprintf("/%s/%d", host, i), Hosts: []string{host}, Selectors: []string{"unix:uid:1"},
				}},
			}}}}})
		}
	}
	entries(3*ring, "h2")
	if at, ok := s.Catch(); !ok || at != w.st.Revision() {
		t.Errorf("the resume point stays behind: %d, %v", at, ok)
	}
	if _, ok := slow.Catch(); ok {
		t.Error("it moves over what was not told")
	}
	if _, has := s.Urgent(w.st); has {
		t.Error("changes elsewhere are urgent")
	}
	w.apply(service("accounts", "h1"))
	w.must(&statev1.Command{Body: &statev1.Command_BanAgent{BanAgent: &statev1.BanAgent{Name: "h2"}}})
	if u, has := s.Urgent(w.st); !has || len(u.Distrust) != 1 {
		t.Errorf("the ban is not urgent: %+v, %v", u, has)
	}
	w.drain(s, &m)
	if m.full != 1 || len(m.entries) != 1 || len(m.objects) != 1 {
		t.Errorf("told everything %d times; it holds %d entries and %d objects", m.full, len(m.entries), len(m.objects))
	}
	entries(2*ring, "h1")
	w.drain(s, &m)
	if m.full != 2 || len(m.entries) != 2*ring+1 {
		t.Errorf("control: who is behind the ring was told everything %d times, and holds %d entries", m.full, len(m.entries))
	}
}

func TestRestoreSendsEverything(t *testing.T) {
	w := newWorld(t, 0)
	w.attest("h1")
	var m mirror
	s := w.subscribe(agentSub("h1", 1), 0)
	w.drain(s, &m)
	w.f.Reset(w.st.Revision())
	w.drain(s, &m)
	if m.full != 2 {
		t.Errorf("%d full states", m.full)
	}
}

func TestPresenceLane(t *testing.T) {
	w := newWorld(t, 0)
	w.attest("h1")
	w.attest("h2")
	s1, s2 := w.subscribe(agentSub("h1", 1), 0), w.subscribe(agentSub("h2", 1), 0)
	first, has := s2.Presence()
	if !has || !first.Complete || len(first.Upserts) != 0 {
		t.Fatalf("the set at attach: %+v", first)
	}
	s1.Report(start, []presence.Instance{serving("accounts", ":1", true)})
	s1.Report(start, []presence.Instance{serving("accounts", ":2", true)})
	news, has := s2.Presence()
	if !has || news.Complete || len(news.Upserts) != 1 || news.Upserts[0].Address != ":2" {
		t.Errorf("coalesced: %+v", news)
	}
	s1.Close(start, true)
	news, _ = s2.Presence()
	if len(news.Withdrawn) != 1 || news.Withdrawn[0].Service != "accounts" {
		t.Errorf("withdrawn: %+v", news)
	}
	if _, has := s2.Presence(); has {
		t.Error("said twice")
	}

	// A subscriber that does not read gets the whole set instead of its history.
	s1 = w.subscribe(agentSub("h1", 2), 0)
	for batch := range 6 {
		var many []presence.Instance
		for i := range 900 {
			many = append(many, serving(fmt.Sprint("s", batch, "-", i), "", false))
		}
		s1.Report(start, many)
	}
	news, _ = s2.Presence()
	if !news.Complete || len(news.Upserts) != 900 {
		t.Errorf("complete %v, %d instances", news.Complete, len(news.Upserts))
	}
}

// A subscriber of before ids takes instances of one service and agent for the same: it is told
// of one, a healthy one if there is, and of its end when the last one ends.
func TestInstanceIDsAreForWhoKnowsThem(t *testing.T) {
	w := newWorld(t, 0)
	for _, name := range []string{"h1", "h2", "h3"} {
		w.attest(name)
	}
	reporter := w.subscribe(agentSub("h1", 1), 0)
	older, newer := agentSub("h2", 1), agentSub("h3", 1)
	newer.Level = ca.LevelInstanceIDs
	was, is := w.subscribe(older, 0), w.subscribe(newer, 0)
	was.Presence()
	is.Presence()
	of := func(id, address string, healthy bool) presence.Instance {
		i := serving("accounts", address, healthy)
		i.ID = id
		return i
	}
	say := func(s *Session) (text string) {
		news, _ := s.Presence()
		for _, i := range news.Upserts {
			text += "+" + i.ID + i.Address + " "
		}
		for _, i := range news.Withdrawn {
			text += "-" + i.ID + " "
		}
		return strings.TrimSpace(text)
	}
	for _, step := range []struct {
		reports    []presence.Instance
		older, new string
	}{
		{[]presence.Instance{of("a", ":1", true), of("b", ":2", true)}, "+:1", "+a:1 +b:2"},
		{[]presence.Instance{of("a", ":1", false), of("b", ":2", true)}, "+:2", "+a:1"},
		{[]presence.Instance{of("b", ":2", true)}, "+:2", "-a"},
		{nil, "-", "-b"},
	} {
		reporter.Report(start, step.reports)
		if got := say(was); got != step.older {
			t.Errorf("%v: who knows no ids hears %q, not %q", step.reports, got, step.older)
		}
		if got := say(is); got != step.new {
			t.Errorf("%v: who knows them hears %q, not %q", step.reports, got, step.new)
		}
	}
	reporter.Report(start, []presence.Instance{of("a", ":1", false), of("b", ":2", true)})
	older.Version.Connect++
	if got := say(w.subscribe(older, 0)); got != "+:2" {
		t.Errorf("at attach %q", got)
	}
}

func TestWatcher(t *testing.T) {
	w := newWorld(t, 0)
	w.attest("h1")
	watch := w.f.Watch()
	defer watch.Close()
	if first, has := watch.Next(); !has || !first.Complete || len(first.Upserts) != 0 {
		t.Fatalf("the set at attach: %+v", first)
	}
	s := w.subscribe(agentSub("h1", 1), 0)
	s.Report(start, []presence.Instance{serving("accounts", ":1", false)})
	other := presence.New(keyID("ca-2"))
	news, _ := watch.Next()
	other.Remote(start, keyID("ca-1"), news.Upserts, news.Withdrawn, false)
	if all := other.All(); len(all) != 1 || all[0].Stale {
		t.Errorf("the other replica shows %+v", all)
	}
	// What this replica hears from others it does not tell as its own.
	w.f.Remote(start, keyID("ca-3"), Instances{Upserts: []presence.Instance{
		{Endpoint: catalog.Endpoint{Agent: "h7"}, Version: presence.Version{BootID: "b", Connect: 1}},
		{Endpoint: catalog.Endpoint{Agent: "h7", Service: "x"}, Version: presence.Version{BootID: "b", Connect: 1}},
	}})
	if len(w.f.Instances()) != 2 {
		t.Errorf("control: %+v", w.f.Instances())
	}
	if news, has := watch.Next(); has {
		t.Errorf("hearsay was told: %+v", news)
	}
}

// Whatever changes in whatever order, and however often a subscriber is cut off and
// resumes, what it holds is what it is entitled to.
func TestSubscriberConverges(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		w := newWorld(rt, rapid.SampledFrom([]int{4, 16, 1024}).Draw(rt, "ring"))
		w.attest("h1")
		w.attest("h2")
		domains := []string{"trading.example", "insurance.example"}
		var m mirror
		connect := uint64(1)
		s := w.subscribe(agentSub("h1", connect), 0)
		sequence := uint64(1)
		hosts := func() []string {
			return rapid.SampledFrom([][]string{{"h1"}, {"h2"}, {"h1", "h2"}}).Draw(rt, "hosts")
		}
		for range rapid.IntRange(1, 30).Draw(rt, "steps") {
			td := rapid.SampledFrom(domains).Draw(rt, "td")
			name := rapid.SampledFrom([]string{"a", "b", "c"}).Draw(rt, "name")
			_, related := w.st.Object("Relationship/" + td)
			switch rapid.IntRange(0, 7).Draw(rt, "step") {
			case 0:
				w.apply(service(name, hosts()...))
			case 1:
				w.apply(gateway("gw-"+name, hosts()...))
			case 2:
				if _, ok := w.st.Object("Gateway/gw-" + name); ok {
					w.remove("Gateway", "gw-"+name)
				}
			case 3:
				if !related {
					w.apply(relationship(td))
				} else {
					w.remove("Relationship", td)
				}
			case 4:
				if related {
					sequence++
					w.bundleOf(td, sequence)
				}
			case 5:
				w.drain(s, &m)
			case 6: // cut off, and back
				s.Close(start, false)
				connect++
				s = w.subscribe(agentSub("h1", connect), m.revision)
			case 7:
				if _, ok := w.st.Object("Service/" + name); ok {
					w.remove("Service", name)
				}
			}
		}
		w.drain(s, &m)

		var want mirror
		all := w.subscribe(agentSub("h1", connect+1), 0)
		w.drain(all, &want)
		if m.full == 0 {
			rt.Fatalf("never got a full state")
		}
		diff := cmp.Diff(want.entries, m.entries, protocmp.Transform()) + cmp.Diff(want.objects, m.objects, protocmp.Transform()) + cmp.Diff(want.bundles, m.bundles) +
			cmp.Diff(want.state, m.state, protocmp.Transform(), cmpopts.EquateEmpty())
		if diff != "" {
			rt.Fatalf("a subscriber that followed differs from a new one (-new +followed):\n%s", diff)
		}
		entitled := map[string]uint64{}
		for _, e := range w.st.EntriesOnHost("h1") {
			for _, td := range e.GetFederatesWith() {
				if b, ok := w.st.ForeignBundle(td); ok {
					entitled[td] = b.GetSequence()
				}
			}
		}
		if diff := cmp.Diff(entitled, m.bundles); diff != "" {
			rt.Fatalf("foreign bundles (-entitled +held):\n%s", diff)
		}
	})
}
