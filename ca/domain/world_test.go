package domain

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain/domaintest"
	"github.com/entente-mesh/entente/federation"
)

var (
	banking   = spiffeid.RequireTrustDomainFromString("banking.example")
	clusterID = bytes.Repeat([]byte{7}, ca.ClusterIDSize)
	epochTime = time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)
)

// world is a state with what stands around it in a test: the log's index, and the
// seeds of the tokens, which the state does not hold.
type world struct {
	t     rapid.TB
	s     *State
	index uint64
	seeds map[string][]byte // token id -> seed

	promised *statev1.Command // a bundle whose hash was made known by a reset

	machine machine // nil: State.Apply
}

// machine is what carries out a command: State.Apply, or something that is broken.
type machine func(*State, uint64, *statev1.Command) Outcome

func newWorld(t rapid.TB) *world {
	w := &world{t: t, s: New(), seeds: map[string][]byte{}}
	w.must(w.initCommand())
	w.must(tick(epochTime))
	return w
}

func keyID(name string) string {
	return once("id of "+name, func() string { return domaintest.KeyID(name) })
}

func member(name string) *statev1.Member {
	sum := sha256.Sum256([]byte(name))
	port := 1024 + int(sum[0])<<8 + int(sum[1])
	return &statev1.Member{
		Id: keyID(name), Name: name, Datacenter: "dc1", Voter: true, Signing: true,
		RaftAddress: fmt.Sprintf("127.1.0.1:%d", port%60000+1), ApiAddress: fmt.Sprintf("127.1.0.2:%d", port%60000+1),
	}
}

func (w *world) initCommand() *statev1.Command {
	return &statev1.Command{Body: &statev1.Command_Init{Init: &statev1.Init{
		Cluster: &statev1.Cluster{TrustDomain: "banking.example", Id: clusterID, Lifetimes: &statev1.Lifetimes{X509SvidSeconds: 3600}},
		Member:  member("n1"),
	}}}
}

func tick(now ...time.Time) *statev1.Command {
	t := &statev1.Tick{}
	for _, n := range now {
		t.UnixNanos = append(t.UnixNanos, n.UnixNano())
	}
	return &statev1.Command{Body: &statev1.Command_Tick{Tick: t}}
}

func (w *world) token(id string, t *statev1.Token, life time.Duration) *statev1.Command {
	seed := sha256.Sum256([]byte("seed of " + id))
	w.seeds[id] = seed[:]
	t.Id = id
	t.PublicKey = bytes.Clone(once("key of "+id, func() []byte { return (&ca.Token{Seed: seed[:]}).PublicKey() }))
	t.NotAfter = epochTime.Add(life).Unix()
	if now := w.s.Now(); !now.IsZero() {
		t.NotAfter = now.Add(life).Unix()
	}
	return &statev1.Command{Body: &statev1.Command_CreateToken{CreateToken: &statev1.CreateToken{Token: t}}}
}

func (w *world) nodeToken(id, name string, life time.Duration) *statev1.Command {
	return w.token(id, &statev1.Token{Grant: &statev1.Token_Node{Node: &statev1.NodeGrant{Name: name, Datacenter: "dc1", Voter: true, Signing: true}}}, life)
}

func (w *world) agentToken(id, name string, life time.Duration) *statev1.Command {
	return w.token(id, &statev1.Token{Grant: &statev1.Token_Agent{Agent: &statev1.AgentGrant{Name: name, Datacenter: "dc1", Addresses: []string{"127.1.0.9"}}}}, life)
}

func (w *world) statement(tokenID, role, key string) (statement, signature []byte) {
	seed := w.seeds[tokenID]
	if seed == nil {
		seed = make([]byte, 32)
	}
	epoch := w.s.Cluster().GetEpoch()
	signed := once(fmt.Sprintf("%x %s %s %s %d", seed, tokenID, role, key, epoch), func() [2][]byte {
		statement, signature, err := ca.SignStatement(seed, &statev1.JoinStatement{
			ClusterId: clusterID, Epoch: epoch, TokenId: tokenID, Role: role, KeyId: key, Exporter: make([]byte, ca.ExporterSize),
		})
		if err != nil {
			w.t.Fatal(err)
		}
		return [2][]byte{statement, signature}
	})
	return bytes.Clone(signed[0]), bytes.Clone(signed[1])
}

// once remembers what costs a signature and never changes.
func once[R any](key string, make func() R) R {
	if made, ok := signatures.Load(key); ok {
		return made.(R)
	}
	made, _ := signatures.LoadOrStore(key, make())
	return made.(R)
}

var signatures sync.Map

func (w *world) join(tokenID, name string) *statev1.Command {
	m := member(name)
	statement, signature := w.statement(tokenID, ca.RoleNode, m.GetId())
	return &statev1.Command{Body: &statev1.Command_JoinMember{JoinMember: &statev1.JoinMember{
		TokenId: tokenID, Member: m, Statement: statement, Signature: signature,
	}}}
}

func (w *world) attest(tokenID, key string) *statev1.Command {
	statement, signature := w.statement(tokenID, ca.RoleAgent, key)
	return &statev1.Command{Body: &statev1.Command_AttestAgent{AttestAgent: &statev1.AttestAgent{
		TokenId: tokenID, KeyId: key, Statement: statement, Signature: signature,
	}}}
}

func (w *world) authority(memberName, name string) *statev1.Authority {
	return domaintest.Authority(memberName, name, "banking.example", statev1.KeyUse_KEY_USE_X509, w.s.Now(), 48*time.Hour)
}

func prepare(a *statev1.Authority) *statev1.Command {
	return domaintest.Prepare(&statev1.Cluster{Id: clusterID, TrustDomain: "banking.example"}, a)
}

func ready(id string) *statev1.Command {
	return &statev1.Command{Body: &statev1.Command_AuthorityReady{AuthorityReady: &statev1.AuthorityReady{Id: id}}}
}

func activate(id string) *statev1.Command {
	return &statev1.Command{Body: &statev1.Command_ActivateAuthority{ActivateAuthority: &statev1.ActivateAuthority{Id: id}}}
}

func remove(name string, compromised bool) *statev1.Command {
	return &statev1.Command{Body: &statev1.Command_RemoveMember{RemoveMember: &statev1.RemoveMember{Id: keyID(name), Compromised: compromised}}}
}

func taint(id string) *statev1.Command {
	return &statev1.Command{Body: &statev1.Command_TaintAuthority{TaintAuthority: &statev1.TaintAuthority{Id: id}}}
}

func drained(id string, assumed ...string) *statev1.Command {
	return &statev1.Command{Body: &statev1.Command_AuthorityDrained{AuthorityDrained: &statev1.AuthorityDrained{Id: id, Assumed: assumed}}}
}

func revoke(id string, now bool) *statev1.Command {
	return &statev1.Command{Body: &statev1.Command_RevokeAuthority{RevokeAuthority: &statev1.RevokeAuthority{Id: id, Now: now}}}
}

func ban(name string) *statev1.Command {
	return &statev1.Command{Body: &statev1.Command_BanAgent{BanAgent: &statev1.BanAgent{Name: name}}}
}

func evict(name string) *statev1.Command {
	return &statev1.Command{Body: &statev1.Command_EvictAgent{EvictAgent: &statev1.EvictAgent{Name: name}}}
}

func admit(name, key, certificate string) *statev1.Command {
	return &statev1.Command{Body: &statev1.Command_AdmitAgent{AdmitAgent: &statev1.AdmitAgent{Agent: &statev1.Agent{
		Name: name, KeyId: keyID(key), Datacenter: "dc1", Addresses: []string{"h1.example"}, Certificate: keyID(certificate), Selectors: []string{"x509pop:subject:cn:" + name},
	}}}}
}

func promote(name string) *statev1.Command {
	return &statev1.Command{Body: &statev1.Command_PromoteMember{PromoteMember: &statev1.PromoteMember{Id: keyID(name)}}}
}

func mergeBans(lifted bool, agents ...*statev1.Agent) *statev1.Command {
	merge := &statev1.MergeBans{}
	for _, a := range agents {
		merge.Bans = append(merge.Bans, &statev1.RememberedBan{Agent: a, Lifted: lifted})
	}
	return &statev1.Command{Body: &statev1.Command_MergeBans{MergeBans: merge}}
}

func revokeToken(id string) *statev1.Command {
	return &statev1.Command{Body: &statev1.Command_RevokeToken{RevokeToken: &statev1.RevokeToken{Id: id}}}
}

func entries(changes ...*statev1.EntryChange) *statev1.Command {
	return &statev1.Command{Body: &statev1.Command_ChangeEntries{ChangeEntries: &statev1.ChangeEntries{Changes: changes}}}
}

func entry(name, path string, hosts ...string) *statev1.Entry {
	return &statev1.Entry{Id: "entry/" + name, Path: path, Hosts: hosts, Selectors: []string{"unix:uid:1000"}}
}

func create(e *statev1.Entry) *statev1.EntryChange {
	return &statev1.EntryChange{Action: &statev1.EntryChange_Create{Create: e}}
}

func update(e *statev1.Entry, revision uint64) *statev1.EntryChange {
	return &statev1.EntryChange{Action: &statev1.EntryChange_Update{Update: e}, IfRevision: revision}
}

func deleteEntry(id string) *statev1.EntryChange {
	return &statev1.EntryChange{Action: &statev1.EntryChange_Delete{Delete: id}}
}

func objects(upserts ...*statev1.Object) *statev1.Command {
	return &statev1.Command{Body: &statev1.Command_ApplyObjects{ApplyObjects: &statev1.ApplyObjects{Upserts: upserts}}}
}

func deletes(keys ...string) *statev1.Command {
	c := &statev1.ApplyObjects{}
	for _, key := range keys {
		kind, name, _ := strings.Cut(key, "/")
		c.Deletes = append(c.Deletes, &statev1.ObjectKey{Kind: kind, Name: name})
	}
	return &statev1.Command{Body: &statev1.Command_ApplyObjects{ApplyObjects: c}}
}

// stage puts aside a part of the change with that number.
func stage(change int, part uint32, upserts ...*statev1.Object) *statev1.Command {
	return &statev1.Command{Body: &statev1.Command_StageObjects{StageObjects: &statev1.StageObjects{
		Id: bytes.Repeat([]byte{byte(change)}, stageIDSize), Part: part, Objects: &statev1.ApplyObjects{Upserts: upserts},
	}}}
}

func applyStaged(change int, parts uint32) *statev1.Command {
	return &statev1.Command{Body: &statev1.Command_ApplyStaged{ApplyStaged: &statev1.ApplyStaged{
		Id: bytes.Repeat([]byte{byte(change)}, stageIDSize), Parts: parts,
	}}}
}

// level has a member announce its feature level.
func level(name string, n uint32) *statev1.Command {
	m := member(name)
	return &statev1.Command{Body: &statev1.Command_UpdateMember{UpdateMember: &statev1.UpdateMember{
		Id: m.GetId(), RaftAddress: m.GetRaftAddress(), ApiAddress: m.GetApiAddress(), FeatureLevel: n,
	}}}
}

func service(name string, hosts ...string) *statev1.Object {
	return &statev1.Object{Kind: &statev1.Object_Service{Service: &statev1.Service{
		Name: name, Path: "/" + name, Hosts: hosts, Selectors: []string{"unix:uid:1000", "unix:path:/opt/" + name}, Port: 8080,
	}}, Source: "banking.yaml:7", Owner: "team"}
}

func gateway(name string, n int, hosts ...string) *statev1.Object {
	return &statev1.Object{Kind: &statev1.Object_Gateway{Gateway: &statev1.Gateway{
		Name: name, Datacenter: "dc1", Address: fmt.Sprintf("10.0.0.%d:8443", n+1), Hosts: hosts, Selectors: []string{"unix:uid:2"},
	}}}
}

func relationship(td string) *statev1.Object {
	return &statev1.Object{Kind: &statev1.Object_Relationship{Relationship: &statev1.Relationship{TrustDomain: td}}}
}

func foreign(td, jwks string, sequence uint64) *statev1.Command {
	return &statev1.Command{Body: &statev1.Command_StoreForeignBundle{StoreForeignBundle: &statev1.StoreForeignBundle{
		TrustDomain: td, Jwks: []byte(jwks), Sequence: sequence,
	}}}
}

// must applies a command that is to succeed.
func (w *world) must(cmd *statev1.Command) Outcome {
	w.t.Helper()
	out := w.apply(cmd)
	if out.Refused != nil {
		w.t.Fatalf("%T refused: %v", cmd.GetBody(), out.Refused)
	}
	return out
}

// refused applies a command that is to be refused with that code.
func (w *world) refused(cmd *statev1.Command, code string) *Refusal {
	w.t.Helper()
	out := w.apply(cmd)
	if out.Refused == nil {
		w.t.Fatalf("%T was carried out, wanted %s", cmd.GetBody(), code)
	}
	if out.Refused.Code != code {
		w.t.Fatalf("%T refused with %v, wanted %s", cmd.GetBody(), out.Refused, code)
	}
	return out.Refused
}

// unchanged applies a command that is to succeed and change nothing.
func (w *world) unchanged(cmd *statev1.Command) {
	w.t.Helper()
	sum, revision := w.s.sum, w.s.revision
	if out := w.must(cmd); len(out.Changes) != 0 || w.s.sum != sum || w.s.revision != revision {
		w.t.Fatalf("%T changed something: %v", cmd.GetBody(), out.Changes)
	}
}

// apply applies a command at the next index, as it comes out of a log, and checks
// every invariant.
func (w *world) apply(cmd *statev1.Command) Outcome {
	w.t.Helper()
	w.index++
	before := w.look()
	out := w.carryOut(w.s, cmd)
	w.check(before, w.look(), cmd, out)
	return out
}

// carryOut gives a state the command of this index.
func (w *world) carryOut(s *State, cmd *statev1.Command) Outcome {
	w.t.Helper()
	apply := w.machine
	if apply == nil {
		apply = (*State).Apply
	}
	foreseen := w.foresee(s, cmd)
	out := apply(s, w.index, reencode(w.t, cmd))
	if out.Fatal != nil {
		w.t.Fatalf("%T: %v", cmd.GetBody(), out.Fatal)
	}
	foreseen(out)
	return out
}

// foresee asks whether a command would be refused that admits a stranger. The returned
// function compares the answer with what came of it.
func (w *world) foresee(s *State, cmd *statev1.Command) func(Outcome) {
	switch cmd.GetBody().(type) {
	case *statev1.Command_JoinMember, *statev1.Command_AttestAgent, *statev1.Command_AdmitAgent:
	default:
		return func(Outcome) {}
	}
	if w.machine != nil || cmd.GetPrincipal() != "" || cmd.GetIfRevision() != 0 {
		return func(Outcome) {}
	}
	sum, revision := s.sum, s.revision
	refusal := s.RefusesAdmission(reencode(w.t, cmd))
	if s.sum != sum || s.revision != revision {
		w.t.Fatalf("%T: to ask whether it is refused changed the state", cmd.GetBody())
	}
	return func(out Outcome) {
		w.t.Helper()
		if (refusal == nil) != (out.Refused == nil) || refusal != nil && *refusal != *out.Refused {
			w.t.Fatalf("%T: foreseen %v, and it came %v", cmd.GetBody(), refusal, out.Refused)
		}
	}
}

func reencode[M proto.Message](t rapid.TB, m M) M {
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	back := m.ProtoReflect().New().Interface().(M)
	if err := proto.Unmarshal(b, back); err != nil {
		t.Fatal(err)
	}
	return back
}

// look is everything in a state, for comparison.
type look struct {
	scalars
	sum      setHash
	computed setHash // over the records as they are
	records  map[named]string
	bundle   []string          // authorities in it, of any use
	tokens   map[string]string // id -> used by
	foreign  map[string]uint64
	resets   map[string]string // hash of the bundle that may follow
	agents   map[string]*statev1.Agent
	entries  map[string]*statev1.Entry
}

func (w *world) look() look {
	s := w.s
	l := look{scalars: s.scalars, sum: s.sum, records: map[named]string{}, tokens: map[string]string{}, foreign: map[string]uint64{}, resets: map[string]string{},
		agents: map[string]*statev1.Agent{}, entries: map[string]*statev1.Entry{}}
	e := encoder{}
	hash := func(record any) []byte {
		e.b = append(e.b[:0], ChecksumFormat)
		e.record(record)
		l.computed.add(hashEncoding(e.b))
		return e.b
	}
	add := func(kind ChangeKind, key string, record any) { l.records[named{kind, key}] = string(hash(record)) }
	for _, r := range s.cluster.rows {
		add(ChangeCluster, "", r)
	}
	for _, r := range s.members.rows {
		add(ChangeMembers, r.GetId(), r)
	}
	for _, r := range s.authorities.rows {
		add(ChangeAuthority, r.GetId(), r)
		if ca.InBundle(r.GetPhase()) {
			l.bundle = append(l.bundle, r.GetId())
		}
	}
	slices.Sort(l.bundle)
	for _, r := range s.agents.rows {
		add(ChangeAgent, r.GetName(), r)
		l.agents[r.GetName()] = r
	}
	for r := range s.EntriesAfter("") {
		add(ChangeEntry, r.GetId(), r)
		l.entries[r.GetId()] = r
	}
	for _, r := range s.objects.rows {
		add(ChangeObject, ObjectKey(r), r)
	}
	for _, r := range s.distrust.rows {
		add(ChangeDistrust, r.GetId(), r)
	}
	for _, r := range s.foreign.rows {
		add(ChangeForeignBundle, r.GetTrustDomain(), r)
		if used, ok := s.ForeignBundle(r.GetTrustDomain()); !ok {
			w.t.Fatalf("nothing is used of the bundle of %s", r.GetTrustDomain())
		} else {
			l.records[named{ChangeForeignBundle, r.GetTrustDomain()}] += string(used.GetJwks())
		}
		l.foreign[r.GetTrustDomain()], l.resets[r.GetTrustDomain()] = r.GetSequence(), r.GetResetSha256()
	}
	for _, r := range s.tokens.rows {
		hash(r)
		l.tokens[r.GetId()] = r.GetUsedBy()
	}
	for _, r := range s.staged.rows {
		hash(r)
	}
	for _, r := range s.pending.rows {
		hash(r)
	}
	return l
}

// check asserts what must hold after every step, whatever the command.
func (w *world) check(before, after look, cmd *statev1.Command, out Outcome) {
	w.t.Helper()
	s := w.s
	fail := func(format string, args ...any) {
		w.t.Helper()
		w.t.Fatalf("index %d, %T (%v): %s", w.index, cmd.GetBody(), out.Refused, fmt.Sprintf(format, args...))
	}

	// Numbers never go back; a refusal changes nothing but the index.
	if after.applied != w.index || after.revision < before.revision || after.scalars.bundle < before.scalars.bundle || after.catalogue < before.catalogue || after.now < before.now {
		fail("numbers went from %+v to %+v", before.scalars, after.scalars)
	}
	if out.Revision != s.Revision() || after.scalars.bundle > after.revision || after.catalogue > after.revision {
		fail("revisions: outcome %d, %+v", out.Revision, after.scalars)
	}
	if out.Refused != nil {
		unmoved := after.scalars
		unmoved.applied = before.applied
		if unmoved != before.scalars || after.sum != before.sum || len(out.Changes) != 0 {
			fail("it was refused and changed the state")
		}
	}

	// The changes named are the changes made. What was changed under this revision before
	// may be changed to what it is.
	shared := before.applied == w.index
	made := map[named]bool{}
	for key, now := range after.records {
		if old, had := before.records[key]; !had || old != now {
			made[key] = true
		}
	}
	for key := range before.records {
		if _, has := after.records[key]; !has {
			made[key] = true
		}
	}
	sameBundle := slices.Equal(before.bundle, after.bundle)
	if !sameBundle {
		made[named{ChangeOwnBundle, ""}] = true
	}
	moved := before.scalars.bundle != after.scalars.bundle
	if moved && sameBundle || !moved && !sameBundle && !shared {
		fail("the bundle's sequence moved from %d to %d, its content changed: %v", before.scalars.bundle, after.scalars.bundle, !sameBundle)
	}
	said := map[named]bool{}
	for _, c := range out.Changes {
		key := named{c.Kind, c.Key}
		if said[key] {
			fail("%v is named twice", c)
		}
		said[key] = true
		if c.Kind == ChangeEntry {
			hosts := slices.Concat(before.entries[c.Key].GetHosts(), after.entries[c.Key].GetHosts())
			slices.Sort(hosts)
			if !slices.Equal(c.Hosts, slices.Compact(hosts)) {
				fail("%s concerns %v, named %v", c.Key, hosts, c.Hosts)
			}
		} else if c.Hosts != nil {
			fail("%v has hosts", c)
		}
	}
	for key := range said {
		if shared && after.records[key] != "" && key.kind != ChangeEntry {
			made[key] = true
		}
	}
	if !maps.Equal(made, said) {
		fail("changes made %v, named %v", made, said)
	}

	// The shares of owners are what they are counted to be.
	shares := s.shares
	s.countShares()
	if !maps.Equal(shares, s.shares) {
		fail("shares %v, counted %v", shares, s.shares)
	}

	// The incremental hash is the hash.
	if after.computed != s.sum {
		fail("the incremental checksum is off")
	}

	// Authorities: one active and one prepared at most per member and use, none active
	// without the ready gate (I3), none of a member that left.
	type slot struct {
		member string
		use    statev1.KeyUse
		phase  statev1.AuthorityPhase
	}
	slots := map[slot]int{}
	for _, a := range s.Authorities() {
		phase := a.GetPhase()
		active := phase == statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE
		if active || phase == statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED {
			k := slot{a.GetMemberId(), a.GetUse(), phase}
			if slots[k]++; slots[k] > 1 {
				fail("%v twice", k)
			}
			if _, ok := s.Member(a.GetMemberId()); !ok {
				fail("authority %s is %s and its member is gone", a.GetId(), phase)
			}
		}
		if active && !a.GetReady() {
			fail("authority %s signs and did not pass the gate", a.GetId())
		}
	}

	// Somebody votes.
	if s.Cluster() != nil && !slices.ContainsFunc(s.Members(), (*statev1.Member).GetVoter) {
		fail("nobody votes")
	}

	// A token admits one key (I9).
	for id, by := range before.tokens {
		if now, ok := after.tokens[id]; ok && by != "" && now != by {
			fail("token %s admitted %s, then %s", id, by, now)
		}
	}

	// Agents by key, entries by host, entries from objects.
	if len(s.agentByKey) != s.AgentCount() {
		fail("%d keys of %d agents", len(s.agentByKey), s.AgentCount())
	}
	onHost := map[string][]string{}
	for a := range s.Agents() {
		if found, ok := s.AgentByKey(a.GetKeyId()); !ok || found != a {
			fail("agent %s is not found by its key", a.GetName())
		}
	}
	for id, e := range after.entries {
		for _, host := range e.GetHosts() {
			onHost[host] = append(onHost[host], id)
		}
	}
	if len(onHost) != len(s.entries.onHost) {
		fail("entries on %d hosts, indexed %d", len(onHost), len(s.entries.onHost))
	}
	for host, ids := range onHost {
		slices.Sort(ids)
		found := s.entries.idsOnHost(host)
		if !slices.Equal(ids, found) {
			fail("host %s has %v, found %v", host, ids, found)
		}
	}
	derived := 0
	for _, o := range s.Objects() {
		entries, err := ca.EntriesFor(banking, o, s.Peers(), s.Lifetimes().Phase)
		if err != nil {
			fail("%s: %v", ObjectKey(o), err)
		}
		for _, want := range entries {
			derived++
			have, ok := after.entries[want.GetId()]
			if want.Revision = have.GetRevision(); !ok || !proto.Equal(want, have) {
				fail("entry %s is %v, not %v", want.GetId(), have, want)
			}
		}
	}
	own := 0
	for _, e := range after.entries {
		if !Declared(e.GetId()) {
			continue
		}
		own++
		if err := ca.CheckDeclared(banking, e, s.Lifetimes().Phase); err != nil {
			fail("%v", err)
		}
		if _, ok := s.Tables().ServiceByID(spiffeid.RequireFromPath(banking, e.GetPath())); ok {
			fail("entry %s has a service's identity", e.GetId())
		}
	}
	if derived+own != s.EntryCount() {
		fail("%d entries, %d follow from the catalogue, %d are declared", s.EntryCount(), derived, own)
	}

	// What ended leaves an item behind (I4): a revoked authority, a banned agent, one
	// that is gone, an entry that is gone and could be held.
	distrusts := func(want *statev1.Distrust) bool {
		have, ok := s.DistrustItem(ca.DistrustID(want))
		covers := func(have, want uint64) bool { return have >= want || want == after.revision } // nobody saw the generation of this very revision
		return ok && covers(have.GetAgentGeneration(), want.GetAgentGeneration()) && covers(have.GetEntryGeneration(), want.GetEntryGeneration())
	}
	for _, a := range s.Authorities() {
		if a.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_REVOKED && time.Unix(a.GetNotAfter(), 0).After(s.Now()) && !distrusts(&statev1.Distrust{Authority: a.GetId()}) {
			fail("authority %s is revoked and not distrusted", a.GetId())
		}
		if a.GetDrained() && ca.Signs(a.GetPhase()) {
			fail("authority %s is drained and signs", a.GetId())
		}
	}
	for name, a := range before.agents {
		now, ok := s.Agent(name)
		switch {
		case !ok, now.GetBanned() && !a.GetBanned():
			if !distrusts(&statev1.Distrust{Agent: name, AgentGeneration: a.GetGeneration()}) {
				fail("agent %s was shut out and is not distrusted", name)
			}
		}
	}
	for id, e := range before.entries {
		now, ok := after.entries[id]
		for _, host := range e.GetHosts() {
			if before.agents[host] == nil {
				continue
			}
			if (!ok || now.GetPath() != e.GetPath()) && !distrusts(&statev1.Distrust{Entry: id, EntryGeneration: e.GetRevision()}) {
				fail("entry %s ended and is not distrusted", id)
			}
			if ok && now.GetPath() == e.GetPath() && !slices.Contains(now.GetHosts(), host) && !distrusts(&statev1.Distrust{Agent: host, Entry: id, EntryGeneration: e.GetRevision()}) {
				fail("entry %s was taken from host %s and is not distrusted there", id, host)
			}
		}
	}
	// Nobody who is admitted now is distrusted.
	for a := range s.Agents() {
		if d, ok := s.DistrustItem("agent/" + a.GetName()); ok && !a.GetBanned() && d.GetAgentGeneration() >= a.GetGeneration() {
			fail("agent %s of generation %d is admitted and distrusted up to %d", a.GetName(), a.GetGeneration(), d.GetAgentGeneration())
		}
	}
	for id, e := range after.entries {
		if d, ok := s.DistrustItem("entry/" + id); ok && d.GetEntryGeneration() >= e.GetRevision() {
			fail("entry %s of generation %d exists and is distrusted up to %d", id, e.GetRevision(), d.GetEntryGeneration())
		}
	}

	// A bundle's sequence never goes back (I8), and none outlives its relationship.
	for td, sequence := range after.foreign {
		if was, ok := before.foreign[td]; ok && sequence < was && before.resets[td] != federation.BundleHash(cmd.GetStoreForeignBundle().GetJwks()) {
			fail("sequence of %s went from %d to %d", td, was, sequence)
		}
		if _, ok := s.Object("Relationship/" + td); !ok {
			fail("bundle of %s without a relationship", td)
		}
	}
}

// named is what a Change names, without hosts, as a map key.
type named struct {
	kind ChangeKind
	key  string
}

// idsOnHost are the ids of onHostOf.
func (t *entryTable) idsOnHost(agent string) (ids []string) {
	if rows := t.onHost[agent]; rows != nil {
		for _, row := range slices.Concat(rows.blocks...) {
			ids = append(ids, string(idOf(t.raw(row))))
		}
	}
	return ids
}
