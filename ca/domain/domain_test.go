package domain

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain/domaintest"
	"github.com/entente-mesh/entente/federation"
)

func TestInit(t *testing.T) {
	for name, change := range map[string]func(*statev1.Init){
		"no cluster":          func(i *statev1.Init) { i.Cluster = nil },
		"no member":           func(i *statev1.Init) { i.Member = nil },
		"a bad trust domain":  func(i *statev1.Init) { i.Cluster.TrustDomain = "Banking" },
		"a short id":          func(i *statev1.Init) { i.Cluster.Id = []byte{1} },
		"epoch over 511":      func(i *statev1.Init) { i.Cluster.Epoch = 512 },
		"an SVID over P":      func(i *statev1.Init) { i.Cluster.Lifetimes = &statev1.Lifetimes{X509SvidSeconds: 49 * 3600} },
		"no vote":             func(i *statev1.Init) { i.Member.Voter = false },
		"a witness":           func(i *statev1.Init) { i.Member.Signing = false },
		"a bad key id":        func(i *statev1.Init) { i.Member.Id = "x" },
		"a bad name":          func(i *statev1.Init) { i.Member.Name = "n 1" },
		"no datacenter":       func(i *statev1.Init) { i.Member.Datacenter = "" },
		"a bad raft address":  func(i *statev1.Init) { i.Member.RaftAddress = "x" },
		"no API address":      func(i *statev1.Init) { i.Member.ApiAddress = "" },
		"a port out of range": func(i *statev1.Init) { i.Member.ApiAddress = "127.0.0.1:70000" },
	} {
		w := &world{t: t, s: New()}
		cmd := w.initCommand()
		change(cmd.GetInit())
		if out := w.s.Apply(1, cmd); out.Refused == nil || out.Refused.Code != CodeInvalid || w.s.Cluster() != nil || w.s.Revision() != 0 {
			t.Errorf("%s: %+v", name, out)
		}
	}
	w := &world{t: t, s: New()}
	w.refused(tick(epochTime), CodeNotInit)
	cmd := w.initCommand()
	cmd.GetInit().Cluster.Epoch = 3
	out := w.must(cmd)
	if r := ca.Revision(out.Revision); r.Epoch() != 3 || r.Index() != w.index {
		t.Errorf("revision %s", r)
	}
	if w.s.TrustDomain() != banking || w.s.Lifetimes().X509SVID != time.Hour || len(w.s.Members()) != 1 || w.s.Tables() == nil || w.s.CatalogueRevision() == 0 {
		t.Error("the state does not say what was initialised")
	}
	w.refused(w.initCommand(), CodeExists)
}

func TestFatal(t *testing.T) {
	w := newWorld(t)
	sum := w.s.Checksum()
	unknown := &statev1.Command{}
	if err := proto.Unmarshal([]byte{0xf2, 0x3f, 0}, unknown); err != nil { // field 1022
		t.Fatal(err)
	}
	for name, out := range map[string]Outcome{
		"unknown":     w.s.Apply(w.index+1, unknown),
		"nothing":     w.s.Apply(w.index+1, nil),
		"empty":       w.s.Apply(w.index+1, &statev1.Command{}),
		"went back":   w.s.Apply(w.index-1, tick(epochTime)),
		"index zero":  New().Apply(0, w.initCommand()),
		"beyond 2^44": w.s.Apply(1<<44, tick(epochTime)),
	} {
		if out.Fatal == nil {
			t.Errorf("%s: %+v", name, out)
		}
	}
	if !bytes.Equal(sum, w.s.Checksum()) {
		t.Error("something fatal changed the state")
	}
	unknown.Ignorable = true
	if out := w.s.Apply(w.index+1, unknown); out.Fatal != nil || out.Refused != nil || w.s.Applied() != w.index+1 {
		t.Errorf("ignorable: %+v", out)
	}
	// Every body, empty: refused or harmless, never a panic.
	w = newWorld(t)
	bodies := (&statev1.Command{}).ProtoReflect().Descriptor().Oneofs().ByName("body").Fields()
	for i := range bodies.Len() {
		cmd := &statev1.Command{}
		m := cmd.ProtoReflect()
		m.Set(bodies.Get(i), m.NewField(bodies.Get(i)))
		w.apply(cmd)
	}
}

func TestTokens(t *testing.T) {
	w := newWorld(t)
	good := w.agentToken("t1", "h1", time.Hour)
	for name, change := range map[string]func(*statev1.Token){
		"no id":           func(t *statev1.Token) { t.Id = "" },
		"no key":          func(t *statev1.Token) { t.PublicKey = nil },
		"used":            func(t *statev1.Token) { t.UsedBy = keyID("x") },
		"no grant":        func(t *statev1.Token) { t.Grant = nil },
		"a bad name":      func(t *statev1.Token) { t.GetAgent().Name = "a/b" },
		"no datacenter":   func(t *statev1.Token) { t.GetAgent().Datacenter = "" },
		"a bad host":      func(t *statev1.Token) { t.GetAgent().Addresses = []string{"a b"} },
		"many hosts":      func(t *statev1.Token) { t.GetAgent().Addresses = slices.Repeat([]string{"h"}, 17) },
		"ended":           func(t *statev1.Token) { t.NotAfter = epochTime.Unix() },
		"an ended time 0": func(t *statev1.Token) { t.NotAfter = 0 },
	} {
		cmd := proto.CloneOf(good)
		change(cmd.GetCreateToken().GetToken())
		if r := w.refused(cmd, CodeInvalid); r.Detail == "" {
			t.Errorf("%s: no detail", name)
		}
	}
	w.must(good)
	w.unchanged(good)
	other := proto.CloneOf(good)
	other.GetCreateToken().Token.NotAfter++
	w.refused(other, CodeExists)
}

// I9: one key, whatever fails when; the same key may repeat and gets the same answer.
func TestAttestAgent(t *testing.T) {
	w := newWorld(t)
	w.must(w.agentToken("t1", "h1", time.Hour))
	w.must(w.nodeToken("t2", "n2", time.Hour))
	k1, k2 := keyID("agent 1"), keyID("agent 2")

	w.refused(w.attest("t9", k1), CodeTokenUnknown)
	forged := w.attest("t1", k1)
	forged.GetAttestAgent().Signature[5] ^= 1
	w.refused(forged, CodeTokenInvalid)
	redirected := w.attest("t1", k1)
	redirected.GetAttestAgent().KeyId = k2
	w.refused(redirected, CodeTokenInvalid)
	w.refused(w.attest("t2", k1), CodeTokenInvalid) // it admits a node, and the statement is for an agent

	out := w.must(w.attest("t1", k1))
	agent, ok := w.s.Agent("h1")
	if !ok || agent.GetKeyId() != k1 || agent.GetGeneration() != out.Revision || agent.GetDatacenter() != "dc1" || !slices.Equal(agent.GetAddresses(), []string{"127.1.0.9"}) {
		t.Errorf("agent %v", agent)
	}
	w.unchanged(w.attest("t1", k1))
	w.refused(w.attest("t1", k2), CodeTokenSpent)

	// Also when it is over: the answer was lost, the host asks again tomorrow.
	w.must(tick(epochTime.Add(25 * time.Hour)))
	w.unchanged(w.attest("t1", k1))
	w.refused(w.attest("t1", k2), CodeTokenSpent)

	// A second token for the same host: its key changes, its generation too.
	w.must(w.agentToken("t3", "h1", time.Hour))
	w.must(w.attest("t3", k2))
	if again, _ := w.s.Agent("h1"); again.GetKeyId() != k2 || again.GetGeneration() <= agent.GetGeneration() {
		t.Errorf("agent %v", again)
	}
	if _, ok := w.s.AgentByKey(k1); ok {
		t.Error("the former key still finds the agent")
	}
	w.refused(w.attest("t1", k1), CodeTokenSpent) // it would bring the former key back

	// One key, one agent.
	w.must(w.agentToken("t4", "h2", time.Hour))
	w.refused(w.attest("t4", k2), CodeExists)
	w.must(w.attest("t4", keyID("agent 3")))

	// Over before it was used.
	w.must(w.agentToken("t5", "h3", time.Hour))
	w.must(tick(w.s.Now().Add(time.Hour)))
	w.refused(w.attest("t5", keyID("agent 4")), CodeTokenExpired)
}

func TestBannedAgent(t *testing.T) {
	w := newWorld(t)
	w.must(w.agentToken("t1", "h1", time.Hour))
	w.must(w.attest("t1", keyID("a")))
	have, _ := w.s.Agent("h1")
	banned := proto.CloneOf(have)
	banned.Banned = true // no command of this release does it
	a := &application{State: w.s, rev: w.s.revision}
	put(a, &w.s.agents, "h1", banned)
	w.refused(w.attest("t1", keyID("a")), CodeAgentBanned)
	w.must(w.agentToken("t2", "h1", time.Hour))
	w.refused(w.attest("t2", keyID("b")), CodeAgentBanned)
}

func TestJoinMember(t *testing.T) {
	w := newWorld(t)
	w.must(w.nodeToken("t2", "n2", time.Hour))
	w.must(w.agentToken("t3", "h1", time.Hour))

	asAgent := w.join("t3", "n2")
	w.refused(asAgent, CodeTokenInvalid)
	otherEpoch := w.join("t2", "n2")
	statement, signature, _ := ca.SignStatement(w.seeds["t2"], &statev1.JoinStatement{
		ClusterId: clusterID, Epoch: 1, TokenId: "t2", Role: ca.RoleNode, KeyId: keyID("n2"), Exporter: make([]byte, ca.ExporterSize),
	})
	otherEpoch.GetJoinMember().Statement, otherEpoch.GetJoinMember().Signature = statement, signature
	w.refused(otherEpoch, CodeTokenInvalid)
	badAddress := w.join("t2", "n2")
	badAddress.GetJoinMember().Member.RaftAddress = "nowhere"
	w.refused(badAddress, CodeInvalid)
	taken := w.join("t2", "n2")
	taken.GetJoinMember().Member.RaftAddress = member("n1").GetRaftAddress()
	w.refused(taken, CodeMemberExists)

	// What the token grants counts, not what the joiner says of itself.
	boastful := w.join("t2", "n2")
	boastful.GetJoinMember().Member.Name, boastful.GetJoinMember().Member.Datacenter = "n1", "dc7"
	w.must(boastful)
	m, ok := w.s.Member(keyID("n2"))
	if !ok || m.GetName() != "n2" || m.GetDatacenter() != "dc1" || !m.GetVoter() || !m.GetSigning() {
		t.Errorf("member %v", m)
	}
	w.unchanged(w.join("t2", "n2"))
	w.must(tick(epochTime.Add(2 * time.Hour)))
	w.unchanged(w.join("t2", "n2"))
	w.refused(w.join("t2", "n3"), CodeTokenSpent)

	w.must(w.nodeToken("t4", "n2", time.Hour))
	w.refused(w.join("t4", "n4"), CodeMemberExists) // the name is taken
	w.must(w.nodeToken("t5", "n5", time.Hour))
	w.refused(w.join("t5", "n2"), CodeMemberExists) // the key is

	// A removed one does not come back by its old token; by a new one only if it was
	// not compromised.
	w.must(remove("n2", false))
	w.refused(w.join("t2", "n2"), CodeMemberRemoved)
	w.must(w.join("t4", "n2"))
	w.must(prepare(w.authority("n2", "k1")))
	w.must(remove("n2", true))
	w.must(w.nodeToken("t6", "n2", time.Hour))
	w.refused(w.join("t6", "n2"), CodeMemberRemoved)
}

func TestUpdateMember(t *testing.T) {
	w := newWorld(t)
	w.must(w.nodeToken("t2", "n2", time.Hour))
	w.must(w.join("t2", "n2"))
	update := func(id, raft, api string) *statev1.Command {
		return &statev1.Command{Body: &statev1.Command_UpdateMember{UpdateMember: &statev1.UpdateMember{Id: id, RaftAddress: raft, ApiAddress: api}}}
	}
	m := member("n2")
	w.unchanged(update(m.GetId(), m.GetRaftAddress(), m.GetApiAddress()))
	w.must(update(m.GetId(), "127.9.0.1:1", "127.9.0.1:2"))
	w.refused(update(m.GetId(), "x", "127.9.0.1:2"), CodeInvalid)
	w.refused(update(m.GetId(), member("n1").GetRaftAddress(), "127.9.0.1:2"), CodeMemberExists)
	w.refused(update(m.GetId(), "127.9.0.1:1", member("n1").GetApiAddress()), CodeMemberExists)
	w.refused(update(keyID("nobody"), "127.9.0.1:1", "127.9.0.1:2"), CodeNotFound)
}

func TestRemoveMember(t *testing.T) {
	for _, compromised := range []bool{false, true} {
		w := newWorld(t)
		w.refused(remove("n1", compromised), CodeLastVoter)
		w.must(w.token("w", &statev1.Token{Grant: &statev1.Token_Node{Node: &statev1.NodeGrant{Name: "reader", Datacenter: "dc2", Signing: true}}}, time.Hour))
		w.must(w.join("w", "reader"))
		w.refused(remove("n1", compromised), CodeLastVoter) // the other one does not vote
		w.must(w.nodeToken("t2", "n2", time.Hour))
		w.must(w.join("t2", "n2"))
		w.refused(remove("n9", compromised), CodeNotFound)

		first, second := w.authority("n1", "k1"), w.authority("n1", "k2")
		w.must(prepare(first))
		w.must(ready(first.GetId()))
		w.must(activate(first.GetId()))
		w.must(prepare(second))
		mine := w.authority("n2", "k3")
		w.must(prepare(mine))
		want := statev1.AuthorityPhase_AUTHORITY_PHASE_RETIRED
		inBundle := 3
		if compromised {
			want, inBundle = statev1.AuthorityPhase_AUTHORITY_PHASE_REVOKED, 1
		}
		w.must(remove("n1", compromised))
		for _, id := range []string{first.GetId(), second.GetId()} {
			if a, _ := w.s.Authority(id); a.GetPhase() != want {
				t.Errorf("compromised %v: authority is %s", compromised, a.GetPhase())
			}
		}
		if a, _ := w.s.Authority(mine.GetId()); a.GetPhase() != statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED {
			t.Errorf("another member's authority is %s", a.GetPhase())
		}
		if bundle, _ := w.s.OwnBundle(); len(bundle) != inBundle {
			t.Errorf("compromised %v: %d authorities in the bundle, not %d", compromised, len(bundle), inBundle)
		}
		if n := len(w.s.Distrust()); n != 3-inBundle {
			t.Errorf("compromised %v: %d items of distrust", compromised, n)
		}
		w.refused(activate(second.GetId()), CodePhase)
		w.refused(remove("n2", compromised), CodeLastVoter)
	}
}

// Requirements: 98, 116.
func TestAuthorities(t *testing.T) {
	w := newWorld(t)
	good := w.authority("n1", "k1")
	for name, test := range map[string]struct {
		code   string
		change func(*statev1.Authority)
	}{
		"nobody's":            {CodeNotFound, func(a *statev1.Authority) { a.MemberId = keyID("stranger") }},
		"no use":              {CodeInvalid, func(a *statev1.Authority) { a.Use = 0 }},
		"no certificate":      {CodeInvalid, func(a *statev1.Authority) { a.Certificate = nil }},
		"a large certificate": {CodeInvalid, func(a *statev1.Authority) { a.Certificate = make([]byte, 5000) }},
		"JWT with one":        {CodeInvalid, func(a *statev1.Authority) { a.Use = statev1.KeyUse_KEY_USE_JWT }},
		"another key":         {CodeInvalid, func(a *statev1.Authority) { a.PublicKey = []byte("other") }},
		"no key":              {CodeInvalid, func(a *statev1.Authority) { a.PublicKey = nil }},
		"over three phases":   {CodeInvalid, func(a *statev1.Authority) { a.NotAfter += 3600 }},
		"over a lifetime":     {CodeInvalid, func(a *statev1.Authority) { a.NotAfter = 1 << 62 }},
		"ended":               {CodeInvalid, func(a *statev1.Authority) { a.NotAfter = epochTime.Unix() }},
		"in the future":       {CodeInvalid, func(a *statev1.Authority) { a.NotBefore = epochTime.Add(time.Hour).Unix() }},
		"backwards":           {CodeInvalid, func(a *statev1.Authority) { a.NotAfter = a.NotBefore }},
		"before 1970":         {CodeInvalid, func(a *statev1.Authority) { a.NotBefore = -1 }},
		"the node key": {CodeInvalid, func(a *statev1.Authority) {
			a.PublicKey = domaintest.SPKI(domaintest.Key("n1"))
			a.Id = keyID("n1")
		}},
	} {
		a := proto.CloneOf(good)
		test.change(a)
		if out := w.apply(prepare(a)); out.Refused == nil || out.Refused.Code != test.code {
			t.Errorf("%s: %v", name, out.Refused)
		}
	}

	// What the proposer says of phase and readiness is not believed.
	eager := proto.CloneOf(good)
	eager.Phase, eager.Ready = statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE, true
	w.must(prepare(eager))
	if a, _ := w.s.Authority(good.GetId()); a.GetReady() || a.GetPhase() != statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED || a.GetPreparedRevision() != w.s.BundleRevision() {
		t.Errorf("prepared as %v", a)
	}
	w.unchanged(prepare(good))
	stolen := proto.CloneOf(good)
	stolen.Certificate = []byte("another")
	w.refused(prepare(stolen), CodeExists)
	w.refused(prepare(w.authority("n1", "k2")), CodeExists) // one at a time

	// I3: no signing before everybody holds it.
	w.refused(activate(good.GetId()), CodeNotReady)
	if _, ok := w.s.Active(keyID("n1"), statev1.KeyUse_KEY_USE_X509); ok {
		t.Error("it signs")
	}
	w.refused(ready("x"), CodeNotFound)
	w.refused(activate("x"), CodeNotFound)
	w.must(ready(good.GetId()))
	w.unchanged(ready(good.GetId()))
	sequence := w.s.BundleRevision()
	w.must(activate(good.GetId()))
	w.unchanged(activate(good.GetId()))
	if a, ok := w.s.Active(keyID("n1"), statev1.KeyUse_KEY_USE_X509); !ok || a.GetId() != good.GetId() {
		t.Errorf("active is %v", a)
	}

	second := w.authority("n1", "k2")
	w.must(prepare(second))
	w.must(ready(second.GetId()))
	w.must(activate(second.GetId()))
	if a, _ := w.s.Authority(good.GetId()); a.GetPhase() != statev1.AuthorityPhase_AUTHORITY_PHASE_RETIRED {
		t.Errorf("the former is %s", a.GetPhase())
	}
	w.refused(activate(good.GetId()), CodePhase)
	if bundle, now := w.s.OwnBundle(); len(bundle) != 2 || now <= sequence {
		t.Errorf("%d in the bundle of sequence %d", len(bundle), now)
	}

	// JWT authorities have slots of their own.
	jwt := w.authority("n1", "j1")
	jwt.Use, jwt.Certificate = statev1.KeyUse_KEY_USE_JWT, nil
	sequence = w.s.BundleRevision()
	before, _ := w.s.OwnBundle()
	w.s.Apply(w.next(), prepare(jwt))
	if after, now := w.s.OwnBundle(); len(after) != len(before) || now == sequence {
		t.Errorf("a JWT key: %d X.509 authorities, sequence %d after %d", len(after), now, sequence)
	}

	// What ended is forgotten after a day, not before.
	w.must(tick(time.Unix(good.GetNotAfter(), 0).Add(24 * time.Hour)))
	if _, ok := w.s.Authority(good.GetId()); !ok {
		t.Error("forgotten at once")
	}
	w.s.Apply(w.next(), tick(time.Unix(good.GetNotAfter(), 0).Add(24*time.Hour+time.Second)))
	if len(w.s.Authorities()) != 0 {
		t.Errorf("%d are remembered", len(w.s.Authorities()))
	}
	late := w.authority("n1", "k3")
	w.must(prepare(late))
	w.must(ready(late.GetId()))
	w.must(tick(time.Unix(late.GetNotAfter(), 0)))
	w.refused(activate(late.GetId()), CodePhase)
}

func (w *world) next() uint64 {
	w.index++
	return w.index
}

func TestWitness(t *testing.T) {
	w := newWorld(t)
	w.must(w.token("t2", &statev1.Token{Grant: &statev1.Token_Node{Node: &statev1.NodeGrant{Name: "witness", Datacenter: "dc3", Voter: true}}}, time.Hour))
	w.must(w.join("t2", "witness"))
	w.refused(prepare(w.authority("witness", "k1")), CodeInvalid)
}

func TestAuthorityLimit(t *testing.T) {
	w := newWorld(t)
	for i := range maxPerMember {
		a := w.authority("n1", fmt.Sprint(i))
		w.must(prepare(a))
		w.must(ready(a.GetId()))
		w.must(activate(a.GetId()))
	}
	w.refused(prepare(w.authority("n1", "more")), CodeLimit)
}

func TestApplyObjects(t *testing.T) {
	w := newWorld(t)
	out := w.must(objects(service("accounts", "h1", "h2"), gateway("gw-1", 1, "h1"), relationship("trading.example")))
	if len(out.Changes) != 5 || w.s.CatalogueRevision() != out.Revision {
		t.Errorf("%v", out)
	}
	e, _ := w.s.Entry("service/accounts")
	if e.GetPath() != "/accounts" || len(e.GetFederatesWith()) != 0 || e.GetRevision() != out.Revision {
		t.Errorf("entry %v", e)
	}
	g, _ := w.s.Entry("gateway/gw-1")
	if !slices.Equal(g.GetFederatesWith(), []string{"trading.example"}) {
		t.Errorf("gateway's entry %v", g)
	}
	if _, ok := w.s.Tables().Service("accounts"); !ok {
		t.Error("the tables do not know the service")
	}
	w.unchanged(objects(service("accounts", "h1", "h2"), relationship("trading.example")))

	// A changed line moves the object, not the generation of the entry.
	moved := service("accounts", "h1", "h2")
	moved.Source = "banking.yaml:9"
	w.must(objects(moved))
	if same, _ := w.s.Entry("service/accounts"); !proto.Equal(same, e) {
		t.Errorf("entry %v", same)
	}
	// A changed place names the hosts before and after.
	out = w.must(objects(service("accounts", "h2", "h3")))
	i := slices.IndexFunc(out.Changes, func(c Change) bool { return c.Kind == ChangeEntry })
	if i < 0 || !slices.Equal(out.Changes[i].Hosts, []string{"h1", "h2", "h3"}) {
		t.Errorf("%v", out.Changes)
	}
	// A further peer reaches the gateway, and only it (I6).
	w.must(objects(relationship("clearing.example")))
	if g, _ := w.s.Entry("gateway/gw-1"); !slices.Equal(g.GetFederatesWith(), []string{"clearing.example", "trading.example"}) {
		t.Errorf("gateway's entry %v", g)
	}
	w.must(foreign("clearing.example", "{}", 5))
	out = w.must(deletes("Relationship/clearing.example"))
	if !slices.ContainsFunc(out.Changes, func(c Change) bool { return c.Kind == ChangeForeignBundle && c.Key == "clearing.example" }) {
		t.Errorf("%v", out.Changes)
	}
	if g, _ := w.s.Entry("gateway/gw-1"); !slices.Equal(g.GetFederatesWith(), []string{"trading.example"}) {
		t.Errorf("gateway's entry %v", g)
	}
	w.must(deletes("Service/accounts"))
	if len(w.s.EntriesOnHost("h2")) != 0 || len(w.s.EntriesOnHost("h1")) != 1 {
		t.Error("entries stay on hosts")
	}

	long := service("accounts", "h1")
	long.Owner = strings.Repeat("x", maxLabelText+1)
	reserved := service("accounts", "h1")
	reserved.GetService().Path = "/entente/gateway/gw-1"
	lone := service("accounts", "h1")
	lone.GetService().Selectors = []string{"unix:path:/opt/accounts"}
	eternal := service("accounts", "h1")
	eternal.GetService().X509SvidSeconds = 49 * 3600
	both := objects(service("accounts", "h1"))
	both.GetApplyObjects().Deletes = []*statev1.ObjectKey{{Kind: "Service", Name: "accounts"}}
	for name, test := range map[string]struct {
		cmd  *statev1.Command
		code string
	}{
		"no kind":             {objects(&statev1.Object{}), CodeInvalid},
		"twice":               {objects(service("a", "h1"), service("a", "h1")), CodeInvalid},
		"made and deleted":    {both, CodeInvalid},
		"deleted twice":       {deletes("Gateway/gw-1", "Gateway/gw-1"), CodeInvalid},
		"deletes nothing":     {deletes("Service/nobody"), CodeNotFound},
		"a long owner":        {objects(long), CodeInvalid},
		"a reserved path":     {objects(reserved), CodeInvalid},
		"a path alone":        {objects(lone), CodeInvalid},
		"an SVID over P":      {objects(eternal), CodeInvalid},
		"with itself":         {objects(relationship("banking.example")), CodeInvalid},
		"with nobody":         {objects(relationship("Trading")), CodeInvalid},
		"one of two is wrong": {objects(service("fine", "h1"), service("Bad", "h1")), CodeInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			outer := w.t
			w.t = t
			defer func() { w.t = outer }()
			if r := w.refused(test.cmd, test.code); strings.Contains(name, "reserved") && !strings.Contains(r.Detail, "banking.yaml:7") {
				t.Errorf("does not say where: %v", r)
			}
		})
	}
}

func TestCompareAndSwap(t *testing.T) {
	w := newWorld(t)
	read := w.s.CatalogueRevision()
	with := func(cmd *statev1.Command, revision uint64) *statev1.Command {
		cmd.IfRevision = revision
		return cmd
	}
	w.must(tick(epochTime.Add(time.Second)))
	w.must(with(objects(service("a", "h1")), read)) // time does not move the catalogue
	w.refused(with(objects(service("b", "h1")), read), CodeCAS)
	w.must(with(objects(service("b", "h1")), w.s.CatalogueRevision()))
	w.must(objects(service("c", "h1")))

	// Two of one log entry: the second one sees the first.
	read = w.s.CatalogueRevision()
	w.index++
	first := w.s.Apply(w.index, with(objects(service("d", "h1")), read))
	second := w.s.Apply(w.index, with(objects(service("e", "h1")), read))
	if first.Refused != nil || second.Refused == nil || second.Refused.Code != CodeCAS || first.Revision != second.Revision {
		t.Errorf("%v, %v", first, second)
	}
}

// I8: never back, also not by a repeat or beside a conflicting one.
// Requirements: 118, 119.
func TestStoreForeignBundle(t *testing.T) {
	w := newWorld(t)
	w.refused(foreign("trading.example", "{}", 1), CodeNotFound)
	w.must(objects(relationship("trading.example")))
	w.refused(foreign("trading.example", "", 1), CodeInvalid)
	w.refused(foreign("trading.example", strings.Repeat("x", maxBundle+1), 1), CodeInvalid)
	w.must(foreign("trading.example", "five", 5))
	w.unchanged(foreign("trading.example", "five", 5))
	w.refused(foreign("trading.example", "four", 4), CodeSequence)
	w.refused(foreign("trading.example", "five", 4), CodeSequence)
	w.refused(foreign("trading.example", "none", 0), CodeSequence)
	w.refused(foreign("trading.example", "another five", 5), CodeConflict)
	w.must(foreign("trading.example", "six", 6))
	if b, _ := w.s.ForeignBundle("trading.example"); string(b.GetJwks()) != "six" || b.GetSequence() != 6 {
		t.Errorf("bundle %v", b)
	}
	if len(w.s.ForeignBundles()) != 1 {
		t.Error("bundles")
	}
}

// A bundle given by hand counts until the next refresh, each time that it is changed, and the
// sequence goes back only to the one bundle that an operator has named.
// Requirements: 120.
func TestBundlesGivenByHand(t *testing.T) {
	const td = "trading.example"
	w := newWorld(t)
	w.must(level("n1", levelGiven))
	bundleOf := func(key string, sequence uint64) *statev1.Command {
		return foreign(td, string(domaintest.Bundle(sequence, domaintest.BundleKey{Name: key, Use: statev1.KeyUse_KEY_USE_X509})), sequence)
	}
	given := func(cmd *statev1.Command) *statev1.Command {
		o, _ := w.s.Object("Relationship/" + td)
		cmd.GetStoreForeignBundle().Given, cmd.GetStoreForeignBundle().Relationship = true, o.GetRevision()
		return cmd
	}
	gives := func(text string) *statev1.Command {
		o := relationship(td)
		o.GetRelationship().BootstrapBundle = []byte(text)
		return objects(o)
	}
	reset := func(sum string) *statev1.Command {
		return &statev1.Command{Body: &statev1.Command_ResetForeignBundle{ResetForeignBundle: &statev1.ResetForeignBundle{TrustDomain: td, Sha256: sum}}}
	}
	hash := func(cmd *statev1.Command) string { return federation.BundleHash(cmd.GetStoreForeignBundle().GetJwks()) }
	held := func() *statev1.ForeignBundle { b, _ := w.s.FetchedBundle(td); return b }
	revision := func() uint64 { o, _ := w.s.Object("Relationship/" + td); return o.GetRevision() }

	w.refused(reset(hash(bundleOf("a", 1))), CodeNotFound)
	w.must(gives(`"first"`))
	w.refused(reset(hash(bundleOf("a", 1))), CodeNotFound)
	w.must(given(bundleOf("a", 5)))
	if held().GetAwaitsGiven() || !held().GetGiven() {
		t.Errorf("the first one: %v", held())
	}
	// The next refresh replaces it although the sequence is the same; from then on that is a conflict.
	w.must(bundleOf("b", 5))
	w.refused(bundleOf("c", 5), CodeConflict)
	if held().GetGiven() {
		t.Error("what was fetched is taken for given")
	}

	w.must(gives(`"first"`)) // unchanged
	if held().GetAwaitsGiven() {
		t.Error("an unchanged relationship gives its bundle again")
	}
	w.must(gives(`"second"`))
	if !held().GetAwaitsGiven() {
		t.Error("nobody is told that another bundle is given")
	}
	stale := given(bundleOf("x", 5))
	stale.GetStoreForeignBundle().Relationship--
	w.refused(stale, CodeConflict) // the one given before was on its way
	w.must(given(bundleOf("d", 5)))
	if held().GetAwaitsGiven() {
		t.Error("it is still waited for")
	}
	w.must(bundleOf("d", 5)) // the refresh confirms it
	w.refused(bundleOf("e", 5), CodeConflict)

	// Set up again: lower sequences.
	before := revision()
	w.must(gives(`"third"`))
	w.refused(given(bundleOf("new", 2)), CodeSequence)
	w.refused(reset(strings.ToUpper(hash(bundleOf("new", 2)))), CodeInvalid)
	w.must(reset(hash(bundleOf("new", 2))))
	w.unchanged(reset(hash(bundleOf("new", 2))))
	w.refused(given(bundleOf("another", 2)), CodeSequence)
	w.refused(bundleOf("another", 4), CodeSequence)
	w.must(given(bundleOf("new", 2)))
	if held().GetSequence() != 2 || held().GetResetSha256() != "" || held().GetAwaitsGiven() || revision() <= before {
		t.Errorf("after the reset: %v, relationship of revision %d, before %d", held(), revision(), before)
	}
	w.refused(bundleOf("d", 1), CodeSequence)

	// A permission that was not used ends with the next bundle.
	w.must(reset(hash(bundleOf("old", 1))))
	w.must(bundleOf("newer", 3))
	w.refused(bundleOf("old", 1), CodeSequence)
}

func TestTick(t *testing.T) {
	w := newWorld(t)
	at := func(seconds int) time.Time { return epochTime.Add(time.Duration(seconds) * time.Second) }
	for _, test := range []struct {
		samples []time.Time
		want    time.Time
	}{
		{[]time.Time{at(10)}, at(10)},
		{[]time.Time{at(5)}, at(10)},                    // never back
		{[]time.Time{at(1000), at(20), at(11)}, at(20)}, // one wrong clock does not matter
		{[]time.Time{at(30), at(25)}, at(25)},           // of two, the lower
		{[]time.Time{time.Unix(0, -1<<62)}, at(25)},
	} {
		revision := w.s.Revision()
		w.must(tick(test.samples...))
		if !w.s.Now().Equal(test.want) || w.s.Revision() != revision {
			t.Errorf("%v gave %s", test.samples, w.s.Now())
		}
	}
	w.refused(tick(), CodeInvalid)
	w.refused(tick(slices.Repeat([]time.Time{at(99)}, maxSamples+1)...), CodeInvalid)
}

func TestTokensAreForgotten(t *testing.T) {
	w := newWorld(t)
	a := &application{State: w.s, rev: w.s.revision}
	for i := range maxTokens - 1 {
		id := fmt.Sprintf("x%d", i)
		put(a, &w.s.tokens, id, &statev1.Token{Id: id, NotAfter: epochTime.Add(time.Hour).Unix()})
	}
	w.s.Apply(w.next(), w.agentToken("t1", "h1", time.Hour))
	if out := w.s.Apply(w.next(), w.agentToken("t2", "h1", time.Hour)); out.Refused == nil || out.Refused.Code != CodeLimit {
		t.Fatalf("%v", out)
	}
	w.s.Apply(w.next(), tick(epochTime.Add(26*time.Hour)))
	if out := w.s.Apply(w.next(), w.agentToken("t2", "h1", time.Hour)); out.Refused != nil || len(w.s.tokens.rows) != 1 {
		t.Fatalf("%v, %d tokens", out, len(w.s.tokens.rows))
	}
}
