// Package domain is the whole replicated state of a trust domain: what every CA
// node agrees on. One switch (Apply) takes every command; the same commands in the
// same order give the same state on every replica.
//
// It is pure: no socket, disk, goroutine, clock or randomness, and it can be tested
// without Raft. A State is not safe for concurrent use: its owner (ca/replica) holds
// a lock, for writing during Apply and for reading during reads. Records that reads
// return are never changed afterwards and may be kept without the lock; callers must
// not change them.
package domain

import (
	"bytes"
	"cmp"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/federation/catalog"
)

// State is the agreed state of one trust domain.
type State struct {
	scalars
	sum setHash // over all records of the tables

	td        spiffeid.TrustDomain // of cluster, parsed
	lifetimes ca.Lifetimes         // of cluster, with defaults

	cluster     table[*statev1.Cluster] // one row at most, key ""
	members     table[*statev1.Member]
	authorities table[*statev1.Authority]
	tokens      table[*statev1.Token]
	agents      table[*statev1.Agent]
	entries     entryTable
	objects     table[*statev1.Object] // by Kind/name
	foreign     table[*statev1.ForeignBundle]
	distrust    table[*statev1.Distrust]
	staged      table[*statev1.Staged] // by stageKey
	pending     table[*statev1.PendingChange]

	agentByKey map[string]string // key id -> agent name
	tables     *catalog.Tables   // of objects

	stagedBytes int // of staged

	use    foreignUse     // of foreign
	shares map[string]int // of entries, distrust and objects: see shares.go

	history history
}

// scalars are the numbers of the state beside its records.
type scalars struct {
	applied   uint64 // log index of the last command
	revision  uint64 // of the last change of a record
	bundle    uint64 // of the last change of the own bundle
	catalogue uint64 // of the last change of an object
	now       int64  // Unix nanoseconds; 0 before the first Tick
}

// New is the state before Init.
func New() *State {
	return &State{agentByKey: map[string]string{}}
}

// Applied is the log index of the last command.
func (s *State) Applied() uint64 { return s.applied }

// Revision is the version of the records: it moves with every change but that of
// time. 0 before Init.
func (s *State) Revision() uint64 { return s.revision }

// BundleRevision is the revision at which the own bundle last changed: its
// spiffe_sequence.
func (s *State) BundleRevision() uint64 { return s.bundle }

// CatalogueRevision is the revision at which an object last changed; if_revision of
// a command is compared with it.
func (s *State) CatalogueRevision() uint64 { return s.catalogue }

// Now is the state's time: the median of the voters' clocks at the last Tick. Zero
// before the first.
func (s *State) Now() time.Time {
	if s.now == 0 {
		return time.Time{}
	}
	return time.Unix(0, s.now).UTC()
}

// Cluster is nil before Init.
func (s *State) Cluster() *statev1.Cluster {
	c, _ := s.cluster.get("")
	return c
}

// TrustDomain is zero before Init.
func (s *State) TrustDomain() spiffeid.TrustDomain { return s.td }

// Lifetimes are the domain's, with the defaults filled in.
func (s *State) Lifetimes() ca.Lifetimes { return s.lifetimes }

// Members are all CA nodes, by id.
func (s *State) Members() []*statev1.Member { return s.members.sorted() }

// Member is the CA node with that id.
func (s *State) Member(id string) (*statev1.Member, bool) { return s.members.get(id) }

// Authorities are all signing authorities, by id.
func (s *State) Authorities() []*statev1.Authority { return s.authorities.sorted() }

// Authority is the one with that id.
func (s *State) Authority(id string) (*statev1.Authority, bool) { return s.authorities.get(id) }

// Active is the authority with which a member signs now.
func (s *State) Active(memberID string, use statev1.KeyUse) (*statev1.Authority, bool) {
	for _, a := range s.authorities.rows {
		if a.GetMemberId() == memberID && a.GetUse() == use && ca.Signs(a.GetPhase()) {
			return a, true
		}
	}
	return nil, false
}

// OwnBundle holds the certificates of the domain's bundle, DER, by authority id, and the
// bundle's sequence. Authorities that an upstream certified are there by their root, once.
func (s *State) OwnBundle() (x509 [][]byte, sequence uint64) {
	for _, a := range s.authorities.sorted() {
		if a.GetUse() != statev1.KeyUse_KEY_USE_X509 || !ca.InBundle(a.GetPhase()) {
			continue
		}
		root := a.GetUpstream()
		if len(root) == 0 {
			root = a.GetCertificate()
		}
		if !slices.ContainsFunc(x509, func(have []byte) bool { return bytes.Equal(have, root) }) {
			x509 = append(x509, root)
		}
	}
	return x509, s.bundle
}

// Tainted are the ids of the authorities whose SVIDs are to be issued anew, sorted.
func (s *State) Tainted() []string {
	var ids []string
	for _, a := range s.authorities.rows {
		if a.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED {
			ids = append(ids, a.GetId())
		}
	}
	slices.Sort(ids)
	return ids
}

// Distrust are the items that name SVIDs not to be accepted, by id.
func (s *State) Distrust() []*statev1.Distrust { return s.distrust.sorted() }

// DistrustItem is the one with that id.
func (s *State) DistrustItem(id string) (*statev1.Distrust, bool) { return s.distrust.get(id) }

// Tokens are the join tokens that are remembered, by id.
func (s *State) Tokens() []*statev1.Token { return s.tokens.sorted() }

// OwnKeys are the authorities of one use (JWT or WIT) whose keys stand in the domain's
// bundle, by id.
func (s *State) OwnKeys(use statev1.KeyUse) (keys []*statev1.Authority) {
	for _, a := range s.authorities.sorted() {
		if a.GetUse() == use && ca.InBundle(a.GetPhase()) {
			keys = append(keys, a)
		}
	}
	return keys
}

// Token is the record of the join token with that id.
func (s *State) Token(id string) (*statev1.Token, bool) { return s.tokens.get(id) }

// Agents are all attested hosts, in no order, for as long as the lock is held.
func (s *State) Agents() iter.Seq[*statev1.Agent] { return slices.Values(s.agents.rows) }

// AgentCount is the number of attested hosts.
func (s *State) AgentCount() int { return len(s.agents.rows) }

// Agent is the host with that name.
func (s *State) Agent(name string) (*statev1.Agent, bool) { return s.agents.get(name) }

// AgentByKey is the host that holds that key now.
func (s *State) AgentByKey(keyID string) (*statev1.Agent, bool) {
	name, ok := s.agentByKey[keyID]
	if !ok {
		return nil, false
	}
	return s.agents.get(name)
}

// EntriesAfter are the registration entries whose id is after a given one, by id, for
// as long as the lock is held. Each is decoded when it is asked for.
func (s *State) EntriesAfter(id string) iter.Seq[*statev1.Entry] { return s.entries.from(id) }

// EntryCount is the number of registration entries.
func (s *State) EntryCount() int { return s.entries.len() }

// WeakEntryCount is how many of them name no user, unit or container, so that any user of
// their hosts could get their SVIDs: they were stored before CheckAnchored refused them.
func (s *State) WeakEntryCount() int { return s.entries.weak }

// Entry is the registration entry with that id.
func (s *State) Entry(id string) (*statev1.Entry, bool) { return s.entries.get(id) }

// EntriesOnHost are the entries that an agent may hold, by id. Its cost is that of
// the host's entries.
func (s *State) EntriesOnHost(agent string) []*statev1.Entry { return s.entries.onHostOf(agent) }

// EntryCountOnHost is the number of entries that an agent may hold.
func (s *State) EntryCountOnHost(agent string) int { return s.entries.countOnHost(agent) }

// LongestLeaf is the longest life of any SVID that the domain issues now.
func (s *State) LongestLeaf() time.Duration {
	return max(s.lifetimes.X509SVID, s.lifetimes.AgentSVID, s.entries.longest(s.lifetimes))
}

// Objects are all objects of the catalogue, by key (ObjectKey).
func (s *State) Objects() []*statev1.Object { return s.objects.sorted() }

// Object is the one with that key, as in Service/accounts.
func (s *State) Object(key string) (*statev1.Object, bool) { return s.objects.get(key) }

// Tables are the compiled catalogue: who is where and who may call whom. Nil before
// Init. They are immutable and may be kept.
func (s *State) Tables() *catalog.Tables { return s.tables }

// ForeignBundles are the bundles of peers as fetched, by trust domain.
func (s *State) ForeignBundles() []*statev1.ForeignBundle { return s.foreign.sorted() }

// ForeignBundle is what is used of the last accepted bundle of a peer.
func (s *State) ForeignBundle(trustDomain string) (*statev1.ForeignBundle, bool) {
	if s.use.usable == nil {
		return s.foreign.get(trustDomain)
	}
	b, ok := s.use.usable[trustDomain]
	return b, ok
}

// Peers are the trust domains that this domain has a relationship with, sorted.
func (s *State) Peers() []string {
	var peers []string
	for _, o := range s.objects.rows {
		if r := o.GetRelationship(); r != nil {
			peers = append(peers, r.GetTrustDomain())
		}
	}
	slices.Sort(peers)
	return peers
}

// ObjectKey is the key of an object of the catalogue, as in Service/accounts; "" for
// one without a kind. A Relationship's name is its trust domain, an Import's its
// service name.
func ObjectKey(o *statev1.Object) string { return catalog.Key(o) }

// table holds the records of one kind: dense, so that a snapshot is a copy of a
// slice of pointers (4.6 ms for a million), and indexed by key.
type table[R any] struct {
	rows []R
	keys []string // of rows
	at   map[string]uint32
}

func (t *table[R]) get(key string) (R, bool) {
	i, ok := t.at[key]
	if !ok {
		var none R
		return none, false
	}
	return t.rows[i], true
}

func (t *table[R]) put(key string, r R) {
	if i, ok := t.at[key]; ok {
		t.rows[i] = r
		return
	}
	if t.at == nil {
		t.at = map[string]uint32{}
	}
	t.at[key] = uint32(len(t.rows))
	t.rows = append(t.rows, r)
	t.keys = append(t.keys, key)
}

func (t *table[R]) remove(key string) {
	i, ok := t.at[key]
	if !ok {
		return
	}
	last := len(t.rows) - 1
	t.rows[i], t.keys[i] = t.rows[last], t.keys[last]
	t.at[t.keys[i]] = i
	var none R
	t.rows[last], t.keys[last] = none, ""
	t.rows, t.keys = t.rows[:last], t.keys[:last]
	delete(t.at, key)
}

// sorted is a copy by key; for the small tables.
func (t *table[R]) sorted() []R {
	keys := slices.SortedFunc(slices.Values(t.keys), strings.Compare)
	rows := make([]R, len(keys))
	for i, key := range keys {
		rows[i], _ = t.get(key)
	}
	return rows
}

// median is the lower one of an even number.
func median[T cmp.Ordered](list []T) T {
	sorted := slices.Sorted(slices.Values(list))
	return sorted[(len(sorted)-1)/2]
}
