package domain

import (
	"bytes"
	"cmp"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/selector"
)

// Bounds of the state.
const (
	maxTokens      = 1 << 16
	tokenMemory    = 24 * time.Hour // how long an expired token is remembered at least
	maxBundle      = 60 << 10       // a log entry has 64 KiB
	maxPerMember   = 16             // authorities of one use
	maxClockSlack  = 5 * time.Minute
	authorityGrace = 24 * time.Hour // how long an ended authority is kept
	maxSamples     = 64
	maxMinVoters   = 15
)

// Apply carries out one agreed command. index is its place in the log and never goes
// back; commands of one log entry share it, and the caller holds its lock over all
// of them. The command's records may be kept: the caller gives them away. A bad
// command is refused and changes nothing but the index. Apply parses no X.509 and
// checks only what every release of the same feature level checks alike.
func (s *State) Apply(index uint64, cmd *statev1.Command) Outcome {
	a, err := s.begin(index, cmd)
	if err != nil {
		return Outcome{Revision: s.revision, Fatal: err}
	}
	items := len(s.distrust.rows)
	refusal := a.run(cmd)
	a.settleForeign()
	a.settleShares()
	a.coalesceDistrust(items)
	return Outcome{Revision: s.revision, Refused: refusal, Changes: a.changes, Diverged: a.diverged, Checked: cmd.GetChecksum().GetAtIndex()}
}

// application is one command on its way into the state. Its methods check
// everything first and change the state only when nothing can fail any more.
type application struct {
	*State
	rev      uint64 // what the changes are marked with
	changes  []Change
	diverged bool

	principal string // of the command
}

func (s *State) begin(index uint64, cmd *statev1.Command) (*application, error) {
	epoch := s.Cluster().GetEpoch()
	if init := cmd.GetInit(); init != nil && s.Cluster() == nil {
		epoch = min(init.GetCluster().GetEpoch(), ca.MaxEpoch) // over it: refused later
	}
	rev, err := ca.NewRevision(epoch, index)
	switch {
	case err != nil:
		return nil, fmt.Errorf("apply command: %w", err)
	case index == 0 || index < s.applied:
		return nil, fmt.Errorf("apply command: log index %d after %d", index, s.applied)
	case cmd.GetBody() == nil && !cmd.GetIgnorable():
		return nil, errors.New("apply command: this release does not know it; upgrade this node, its peers agreed on something newer")
	}
	if index > s.applied {
		s.history.add(s.applied, s.checksum())
		s.applied = index
	}
	return &application{State: s, rev: uint64(rev), principal: cmd.GetPrincipal()}, nil
}

func (a *application) run(cmd *statev1.Command) *Refusal {
	init, isInit := cmd.GetBody().(*statev1.Command_Init)
	switch {
	case cmd.GetBody() == nil:
		return nil // ignorable
	case isInit:
		return a.init(init.Init)
	case a.Cluster() == nil:
		return refuse(CodeNotInit, "no cluster was initialised yet")
	case cmd.GetIfRevision() != 0 && cmd.GetIfRevision() != a.catalogue:
		return refuse(CodeCAS, "the catalogue is at revision %s, the change was made for %s: read it again and repeat",
			ca.Revision(a.catalogue), ca.Revision(cmd.GetIfRevision()))
	}
	if refusal := a.Admits(cmd); refusal != nil {
		return refusal
	}
	if path := cmd.GetPrincipal(); path != "" {
		if refusal := a.Administrator(path).MayCarryOut(cmd); refusal != nil {
			return refusal
		}
	}
	if refusal := a.needsApproval(cmd); refusal != nil {
		return refusal
	}
	d, known := describe(cmd)
	if !known {
		return refuse(CodeInvalid, "command %T has no meaning here", cmd.GetBody())
	}
	return d.apply(a, cmd)
}

// put stores a record and keeps hash and revision in step.
func put[R any](a *application, t *table[R], key string, r R) {
	if old, ok := t.get(key); ok {
		a.sum.remove(hashRecord(old))
	}
	a.sum.add(hashRecord(r))
	t.put(key, r)
	a.revision = a.rev
}

// drop removes a record, if it is there.
func drop[R any](a *application, t *table[R], key string) {
	if old, ok := t.get(key); ok {
		a.sum.remove(hashRecord(old))
		t.remove(key)
		a.revision = a.rev
	}
}

// changed names a change, once.
func (a *application) changed(kind ChangeKind, key string) {
	if kind == ChangeOwnBundle && slices.ContainsFunc(a.changes, func(c Change) bool { return c.Kind == kind }) {
		return
	}
	a.changes = append(a.changes, Change{Kind: kind, Key: key})
}

func invalid(err error) *Refusal { return refuse(CodeInvalid, "%v", err) }

func (a *application) init(c *statev1.Init) *Refusal {
	cluster, m := c.GetCluster(), c.GetMember()
	if have := a.Cluster(); have != nil {
		return refuse(CodeExists, "the cluster of %s was initialised before", have.GetTrustDomain())
	}
	td, err := ca.ParseTrustDomain(cluster.GetTrustDomain())
	if err != nil {
		return invalid(err)
	}
	if len(cluster.GetId()) != ca.ClusterIDSize {
		return refuse(CodeInvalid, "cluster id has %d bytes, not %d", len(cluster.GetId()), ca.ClusterIDSize)
	}
	if cluster.GetEpoch() > ca.MaxEpoch {
		return refuse(CodeInvalid, "epoch %d is over %d", cluster.GetEpoch(), ca.MaxEpoch)
	}
	lifetimes := ca.LifetimesOf(cluster.GetLifetimes())
	if err := lifetimes.Check(); err != nil {
		return invalid(err)
	}
	if err := checkMember(m); err != nil {
		return invalid(err)
	}
	if !m.GetVoter() || !m.GetSigning() {
		return refuse(CodeInvalid, "the first member must vote and sign")
	}
	if n := len(cluster.GetRecoveryKey()); n != 0 && n != ed25519.PublicKeySize {
		return refuse(CodeInvalid, "recovery key has %d bytes, not %d", n, ed25519.PublicKeySize)
	}
	if cluster.GetRecovery() != nil || cluster.GetMinVoters() > maxMinVoters {
		return refuse(CodeInvalid, "a new cluster was not recovered, and keeps at most %d voters", maxMinVoters)
	}
	cluster = proto.CloneOf(cluster)
	cluster.FeatureLevel, cluster.HardenedAt = m.GetFeatureLevel(), 0
	cluster.TrustDomain = td.Name()
	tables, err := compile(td, cluster.GetDev(), nil)
	if err != nil {
		return invalid(err)
	}
	a.td, a.lifetimes, a.State.tables = td, lifetimes, tables
	put(a, &a.cluster, "", cluster)
	put(a, &a.members, m.GetId(), proto.CloneOf(m))
	a.catalogue = a.rev // never zero from now on: an if_revision can name the empty one
	a.changed(ChangeCluster, "")
	a.changed(ChangeMembers, m.GetId())
	return nil
}

func checkMember(m *statev1.Member) error {
	if err := ca.CheckKeyID(m.GetId()); err != nil {
		return err
	}
	if err := ca.CheckLabel(m.GetName()); err != nil {
		return err
	}
	if err := ca.CheckLabel(m.GetDatacenter()); err != nil {
		return fmt.Errorf("datacenter: %w", err)
	}
	if err := ca.CheckAddress(m.GetRaftAddress()); err != nil {
		return fmt.Errorf("raft: %w", err)
	}
	if err := ca.CheckAddress(m.GetApiAddress()); err != nil {
		return fmt.Errorf("api: %w", err)
	}
	return nil
}

// ---------------------------------------------------------------- tokens

func (a *application) createToken(c *statev1.CreateToken) *Refusal {
	t := c.GetToken()
	if err := ca.CheckTokenID(t.GetId()); err != nil {
		return invalid(err)
	}
	if len(t.GetPublicKey()) != 32 {
		return refuse(CodeInvalid, "token key has %d bytes, not 32", len(t.GetPublicKey()))
	}
	if t.GetUsedBy() != "" {
		return refuse(CodeInvalid, "a new token is not used by anybody")
	}
	var name, datacenter string
	switch grant := t.GetGrant().(type) {
	case *statev1.Token_Node:
		name, datacenter = grant.Node.GetName(), grant.Node.GetDatacenter()
	case *statev1.Token_Agent:
		name, datacenter = grant.Agent.GetName(), grant.Agent.GetDatacenter()
		if err := cmp.Or(ca.CheckHostAddresses(grant.Agent.GetAddresses()), selector.CheckNode(grant.Agent.GetSelectors(), selector.Token),
			ca.CheckScope(grant.Agent.GetPathPrefixes())); err != nil {
			return invalid(err)
		}
	default:
		return refuse(CodeInvalid, "the token grants nothing")
	}
	if err := ca.CheckLabel(name); err != nil {
		return invalid(err)
	}
	if err := ca.CheckLabel(datacenter); err != nil {
		return refuse(CodeInvalid, "datacenter: %v", err)
	}
	if have, ok := a.tokens.get(t.GetId()); ok {
		unused := proto.CloneOf(have)
		unused.UsedBy = ""
		if proto.Equal(unused, t) {
			return nil // the proposer did not hear the first answer
		}
		return refuse(CodeExists, "another token has the id %s", t.GetId())
	}
	if a.now != 0 && a.Now().Unix() >= t.GetNotAfter() {
		return refuse(CodeInvalid, "the token would have ended before it began")
	}
	if len(a.tokens.rows) >= maxTokens {
		a.forgetTokens()
	}
	if len(a.tokens.rows) >= maxTokens {
		return refuse(CodeLimit, "%d tokens are remembered; wait until some have ended for %v", maxTokens, tokenMemory)
	}
	put(a, &a.tokens, t.GetId(), proto.CloneOf(t))
	return nil
}

// forgetTokens drops those that ended long ago. A holder then reads token-unknown
// instead of token-spent; nothing is admitted either way.
func (a *application) forgetTokens() {
	before := a.Now().Add(-tokenMemory).Unix()
	for _, t := range slices.Clone(a.tokens.rows) {
		if a.now != 0 && t.GetNotAfter() < before {
			drop(a, &a.tokens, t.GetId())
		}
	}
}

// redeem verifies that the holder of the token made the statement for that key.
// repeat tells that the token admitted this very key before (I9): then neither its
// expiry nor anything else stands in the way of the same answer.
func (s *State) redeem(tokenID, role, keyID string, statement, signature []byte) (t *statev1.Token, repeat bool, refusal *Refusal) {
	t, ok := s.tokens.get(tokenID)
	if !ok {
		return nil, false, refuse(CodeTokenUnknown, "no such token: ask for a new one")
	}
	st, err := ca.VerifyStatement(t.GetPublicKey(), statement, signature)
	if err != nil {
		return nil, false, refuse(CodeTokenInvalid, "%v", err)
	}
	if err := ca.CheckStatement(st, s.Cluster(), tokenID, role, keyID, nil); err != nil {
		return nil, false, refuse(CodeTokenInvalid, "%v", err)
	}
	switch {
	case t.GetUsedBy() == keyID:
		return t, true, nil
	case t.GetUsedBy() != "":
		return nil, false, refuse(CodeTokenSpent, "the token admitted another key: ask for a new one")
	case s.now != 0 && s.Now().Unix() >= t.GetNotAfter():
		return nil, false, refuse(CodeTokenExpired, "the token ended at %s: ask for a new one",
			time.Unix(t.GetNotAfter(), 0).UTC().Format(time.RFC3339))
	}
	return t, false, nil
}

func (a *application) spend(t *statev1.Token, keyID string) {
	spent := proto.CloneOf(t)
	spent.UsedBy = keyID
	put(a, &a.tokens, t.GetId(), spent)
}

// ---------------------------------------------------------------- members

func (a *application) joinMember(c *statev1.JoinMember) *Refusal {
	m, t, refusal := a.joining(c)
	if refusal != nil || m == nil {
		return refusal
	}
	put(a, &a.members, m.GetId(), m)
	a.spend(t, m.GetId())
	a.changed(ChangeMembers, m.GetId())
	a.forgetPending(everyChange)
	return nil
}

// joining is the member that a token makes, nil if it did before.
func (s *State) joining(c *statev1.JoinMember) (m *statev1.Member, t *statev1.Token, refusal *Refusal) {
	keyID := c.GetMember().GetId()
	t, repeat, refusal := s.redeem(c.GetTokenId(), ca.RoleNode, keyID, c.GetStatement(), c.GetSignature())
	if refusal != nil {
		return nil, nil, refusal
	}
	grant := t.GetNode()
	if grant == nil {
		return nil, nil, refuse(CodeTokenInvalid, "the token does not admit CA nodes")
	}
	have, known := s.members.get(keyID)
	switch {
	case repeat && known:
		return nil, nil, nil
	case repeat:
		return nil, nil, refuse(CodeMemberRemoved, "the member that the token admitted was removed: wipe its data and join with a new key and token")
	case known:
		return nil, nil, refuse(CodeMemberExists, "the key belongs to member %s already: join with an empty data directory", have.GetName())
	}
	// Name, place and rights are the operator's; only the addresses and what its software
	// knows are its own word.
	m = &statev1.Member{
		Id: keyID, Name: grant.GetName(), Datacenter: grant.GetDatacenter(), Voter: grant.GetVoter(), Signing: grant.GetSigning(),
		RaftAddress: c.GetMember().GetRaftAddress(), ApiAddress: c.GetMember().GetApiAddress(),
		FeatureLevel: c.GetMember().GetFeatureLevel(),
	}
	if err := checkMember(m); err != nil {
		return nil, nil, invalid(err)
	}
	if refusal := s.tooOld(m); refusal != nil {
		return nil, nil, refusal
	}
	for _, other := range s.authorities.rows {
		if other.GetMemberId() == keyID && !ca.MayMove(other.GetPhase(), statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED) {
			return nil, nil, refuse(CodeMemberRemoved, "the key belongs to a member that was removed as compromised")
		}
	}
	if refusal := s.takenBy(m); refusal != nil {
		return nil, nil, refusal
	}
	return m, t, nil
}

// takenBy refuses a member whose name or address another one has.
func (s *State) takenBy(m *statev1.Member) *Refusal {
	for _, other := range s.Members() {
		switch {
		case other.GetId() == m.GetId():
		case other.GetName() == m.GetName():
			return refuse(CodeMemberExists, "another member is named %s: remove it first", m.GetName())
		case other.GetRaftAddress() == m.GetRaftAddress():
			return refuse(CodeMemberExists, "member %s has the raft address %s", other.GetName(), m.GetRaftAddress())
		case other.GetApiAddress() == m.GetApiAddress():
			return refuse(CodeMemberExists, "member %s has the API address %s", other.GetName(), m.GetApiAddress())
		}
	}
	return nil
}

func (a *application) updateMember(c *statev1.UpdateMember) *Refusal {
	have, ok := a.members.get(c.GetId())
	if !ok {
		return refuse(CodeNotFound, "no member has the id %.64s", c.GetId())
	}
	m := proto.CloneOf(have)
	m.RaftAddress, m.ApiAddress = c.GetRaftAddress(), c.GetApiAddress()
	if c.GetFeatureLevel() != 0 {
		m.FeatureLevel = c.GetFeatureLevel()
	}
	if proto.Equal(have, m) {
		return nil
	}
	if refusal := a.tooOld(m); refusal != nil {
		return refusal
	}
	if err := checkMember(m); err != nil {
		return invalid(err)
	}
	if refusal := a.takenBy(m); refusal != nil {
		return refusal
	}
	put(a, &a.members, m.GetId(), m)
	a.changed(ChangeMembers, m.GetId())
	a.raiseLevel()
	return nil
}

func (a *application) removeMember(c *statev1.RemoveMember) *Refusal {
	m, ok := a.members.get(c.GetId())
	if !ok {
		return refuse(CodeNotFound, "no member has the id %.64s", c.GetId())
	}
	voters := 0
	for _, other := range a.members.rows {
		if other.GetVoter() && other.GetId() != m.GetId() {
			voters++
		}
	}
	if voters == 0 {
		return refuse(CodeLastVoter, "member %s is the last voter: admit another one first", m.GetName())
	}
	if least := a.Cluster().GetMinVoters(); m.GetVoter() && uint32(voters) < least {
		return refuse(CodeLastVoter, "without member %s there would be %d voters, and the cluster keeps %d: admit another one first", m.GetName(), voters, least)
	}
	drop(a, &a.members, m.GetId())
	a.changed(ChangeMembers, m.GetId())
	a.forgetPending(everyChange)
	a.raiseLevel()
	// Nothing that a stolen key signed is accepted for a moment longer.
	to := statev1.AuthorityPhase_AUTHORITY_PHASE_RETIRED
	if c.GetCompromised() {
		to = statev1.AuthorityPhase_AUTHORITY_PHASE_REVOKED
	}
	for _, authority := range a.Authorities() {
		if authority.GetMemberId() == m.GetId() && ca.MayMove(authority.GetPhase(), to) {
			a.move(authority, to)
		}
	}
	return nil
}

// ---------------------------------------------------------------- authorities

// prepareAuthority takes a member's new key into the bundle. The door has parsed the
// certificate (ca.NewAuthority) and seen that the member itself asks.
func (a *application) prepareAuthority(c *statev1.PrepareAuthority) *Refusal {
	p := c.GetAuthority()
	if have, ok := a.authorities.get(p.GetId()); ok {
		if have.GetMemberId() == p.GetMemberId() && have.GetUse() == p.GetUse() &&
			bytes.Equal(have.GetPublicKey(), p.GetPublicKey()) && bytes.Equal(have.GetCertificate(), p.GetCertificate()) &&
			bytes.Equal(have.GetUpstream(), p.GetUpstream()) {
			return nil
		}
		return refuse(CodeExists, "the key %.64s is an authority already", p.GetId())
	}
	m, ok := a.members.get(p.GetMemberId())
	if !ok {
		return refuse(CodeNotFound, "no member has the id %.64s", p.GetMemberId())
	}
	if !m.GetSigning() {
		return refuse(CodeInvalid, "member %s is a witness: it does not sign", m.GetName())
	}
	switch p.GetUse() {
	case statev1.KeyUse_KEY_USE_X509:
		if n := len(p.GetCertificate()); n == 0 || n > 4<<10 {
			return refuse(CodeInvalid, "authority certificate has %d bytes, not 1 to %d", n, 4<<10)
		}
		if err := ca.CheckAuthorityCertificate(a.td.Name(), p); err != nil {
			return invalid(err)
		}
		if n := len(p.GetUpstream()); n > 4<<10 || (n == 0) != (p.GetUpstreamNotAfter() == 0) {
			return refuse(CodeInvalid, "upstream certificate has %d bytes, over %d, or does not come with its end", n, 4<<10)
		}
		if len(p.GetUpstream()) > 0 && p.GetNotAfter() > p.GetUpstreamNotAfter() {
			return refuse(CodeInvalid, "authority would outlive its upstream, which ends at %d", p.GetUpstreamNotAfter())
		}
	case statev1.KeyUse_KEY_USE_JWT, statev1.KeyUse_KEY_USE_WIT:
		if len(p.GetCertificate()) != 0 || len(p.GetUpstream()) != 0 || p.GetUpstreamNotAfter() != 0 {
			return refuse(CodeInvalid, "only an X.509 authority has a certificate")
		}
	default:
		return refuse(CodeInvalid, "authority has no known use")
	}
	if n := len(p.GetPublicKey()); n == 0 || n > 1<<10 {
		return refuse(CodeInvalid, "authority key has %d bytes, not 1 to %d", n, 1<<10)
	}
	if sum := sha256.Sum256(p.GetPublicKey()); hex.EncodeToString(sum[:]) != p.GetId() {
		return refuse(CodeInvalid, "authority id is not the digest of its key")
	}
	if _, ok := a.members.get(p.GetId()); ok {
		return refuse(CodeInvalid, "a node key cannot be an authority")
	}
	if _, ok := a.AgentByKey(p.GetId()); ok {
		return refuse(CodeInvalid, "an agent's key cannot be an authority")
	}
	life := time.Duration(p.GetNotAfter()-p.GetNotBefore()) * time.Second
	if p.GetNotBefore() <= 0 || p.GetNotAfter() <= p.GetNotBefore() || p.GetNotAfter() > 1<<36 || life > 3*a.lifetimes.Phase+maxClockSlack {
		return refuse(CodeInvalid, "authority lives from %d to %d, not within three phases of %v", p.GetNotBefore(), p.GetNotAfter(), a.lifetimes.Phase)
	}
	if a.now != 0 {
		now := a.Now()
		if p.GetNotAfter() <= now.Unix() || p.GetNotBefore() > now.Add(maxClockSlack).Unix() {
			return refuse(CodeInvalid, "authority is not valid at the agreed time %s: set the clock of member %s", now.Format(time.RFC3339), m.GetName())
		}
	}
	count := 0
	for _, other := range a.authorities.rows {
		if other.GetMemberId() != p.GetMemberId() || other.GetUse() != p.GetUse() {
			continue
		}
		count++
		if other.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED {
			return refuse(CodeExists, "member %s has the prepared authority %s already", m.GetName(), other.GetId())
		}
	}
	if count >= maxPerMember {
		return refuse(CodeLimit, "member %s has %d authorities already; wait until some have ended for %v", m.GetName(), count, authorityGrace)
	}
	if err := ca.VerifyAuthority(a.Cluster(), p, c.GetNodeKey(), c.GetSignature()); err != nil {
		return invalid(err)
	}
	if a.hardened() {
		if err := ca.CheckAuthorityHeld(a.td.Name(), p); err != nil {
			return invalid(err)
		}
		if td, proven := a.ForeignOwner(ca.CertificateKeyID(p.GetUpstream())); proven {
			return refuse(CodeInvalid, "the upstream's key has signed that it belongs to %s", td)
		}
	}
	authority := &statev1.Authority{
		Id: p.GetId(), MemberId: p.GetMemberId(), Use: p.GetUse(),
		PublicKey: bytes.Clone(p.GetPublicKey()), Certificate: bytes.Clone(p.GetCertificate()),
		NotBefore: p.GetNotBefore(), NotAfter: p.GetNotAfter(),
		Upstream: bytes.Clone(p.GetUpstream()), UpstreamNotAfter: p.GetUpstreamNotAfter(), Proof: bytes.Clone(p.GetProof()),
		Phase:    statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED,
		Revision: a.rev, PreparedRevision: a.rev, Since: a.seconds(),
	}
	put(a, &a.authorities, authority.GetId(), authority)
	a.changed(ChangeAuthority, authority.GetId())
	a.bundleChanged()
	return nil
}

func (a *application) bundleChanged() {
	a.bundle = a.rev
	a.changed(ChangeOwnBundle, "")
}

// move puts an authority into another phase. The bundle's content is the same in all
// of them but REVOKED.
func (a *application) move(have *statev1.Authority, to statev1.AuthorityPhase) {
	a.change(have, func(authority *statev1.Authority) { authority.Phase, authority.Since = to, a.seconds() })
	if ca.InBundle(have.GetPhase()) != ca.InBundle(to) {
		a.bundleChanged()
	}
	if to == statev1.AuthorityPhase_AUTHORITY_PHASE_REVOKED {
		a.distrusted(&statev1.Distrust{Authority: have.GetId()}, time.Unix(have.GetNotAfter(), 0))
	}
}

// seconds is the state's time in Unix seconds; 0 before the first Tick.
func (a *application) seconds() int64 {
	if a.now == 0 {
		return 0
	}
	return a.Now().Unix()
}

// change stores an authority as the edit makes it. The record that stands is shared
// with readers and stays as it is.
func (a *application) change(have *statev1.Authority, edit func(*statev1.Authority)) {
	authority := proto.CloneOf(have)
	edit(authority)
	authority.Revision = a.rev
	put(a, &a.authorities, authority.GetId(), authority)
	a.changed(ChangeAuthority, authority.GetId())
}

func (a *application) authorityReady(c *statev1.AuthorityReady) *Refusal {
	have, ok := a.authorities.get(c.GetId())
	switch {
	case !ok:
		return refuse(CodeNotFound, "no authority has the id %.64s", c.GetId())
	case have.GetReady():
		return nil
	case have.GetPhase() != statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED:
		return refuse(CodePhase, "authority is %s, not PREPARED", ca.PhaseName(have.GetPhase()))
	}
	a.change(have, func(authority *statev1.Authority) {
		authority.Ready, authority.Assumed = true, assumed(c.GetAssumed())
	})
	return nil
}

func (a *application) activateAuthority(c *statev1.ActivateAuthority) *Refusal {
	have, ok := a.authorities.get(c.GetId())
	switch {
	case !ok:
		return refuse(CodeNotFound, "no authority has the id %.64s", c.GetId())
	case have.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE:
		return nil
	case have.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED && !have.GetReady():
		return refuse(CodeNotReady, "authority has not passed the ready gate: not everybody holds it yet")
	}
	if err := ca.MayActivate(have, a.Now()); err != nil {
		return refuse(CodePhase, "%v", err)
	}
	if former, ok := a.Active(have.GetMemberId(), have.GetUse()); ok {
		a.move(former, statev1.AuthorityPhase_AUTHORITY_PHASE_RETIRED)
	}
	a.move(have, statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE)
	return nil
}

// ---------------------------------------------------------------- time, checks

// MaxTickStep is the most that one Tick moves the agreed time. After a longer pause the
// leader sends several at once. A leader that lies about the time does not get far with
// the one Tick that it may slip in before its followers reject it (package replica).
const MaxTickStep = time.Hour

// TickTime is the time that a Tick names, Unix nanoseconds: the median of its samples;
// math.MinInt64 without any.
func TickTime(c *statev1.Tick) int64 {
	if len(c.GetUnixNanos()) == 0 {
		return math.MinInt64
	}
	return median(c.GetUnixNanos())
}

func (a *application) tick(c *statev1.Tick) *Refusal {
	samples := c.GetUnixNanos()
	if len(samples) == 0 || len(samples) > maxSamples {
		return refuse(CodeInvalid, "%d clock samples, not 1 to %d", len(samples), maxSamples)
	}
	next := median(samples)
	if a.hardened() && a.now != 0 {
		next = min(next, a.now+int64(MaxTickStep))
	}
	a.now = max(a.now, next)
	// Nothing verifies under an authority that ended; it leaves the bundle and the state.
	gone := false
	for _, authority := range a.Authorities() {
		if time.Unix(authority.GetNotAfter(), 0).Add(authorityGrace).Before(a.Now()) {
			drop(a, &a.authorities, authority.GetId())
			a.changed(ChangeAuthority, authority.GetId())
			gone = gone || ca.InBundle(authority.GetPhase())
			continue
		}
		switch {
		case authority.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED && authority.GetNotAfter() <= a.seconds():
			// It was never used and cannot be any more: its member may prepare another one.
			a.move(authority, statev1.AuthorityPhase_AUTHORITY_PHASE_RETIRED)
		case authority.GetSince() == 0:
			a.change(authority, func(authority *statev1.Authority) { authority.Since = a.seconds() })
		}
	}
	if gone {
		a.bundleChanged()
	}
	a.forgetDistrust()
	a.forgetStaged()
	a.forgetPending(func(p *statev1.PendingChange) bool { return p.GetNotAfter() < a.seconds() })
	a.revokeAbsent()
	return nil
}

// compare looks whether this replica had the proposer's checksum at the index it
// names. Where it cannot tell, it says nothing.
func (a *application) compare(c *statev1.Checksum) {
	if c.GetFormat() != ChecksumFormat {
		return
	}
	if sum, ok := a.history.at(c.GetAtIndex()); ok {
		a.diverged = !bytes.Equal(sum[:], c.GetSum())
	}
}
