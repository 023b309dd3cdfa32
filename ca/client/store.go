package client

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/federation/catalog"
)

// epochShift: a revision is epoch<<44 | log index.
const epochShift = 44

// maxPendingBytes bounds what a CA node may send before the last chunk of an update.
const maxPendingBytes = 1 << 30

var (
	// errResync: what arrived does not fit onto what is held. A session that asks
	// for the full state mends it.
	errResync = errors.New("the full state is needed")
	// errRefused: a CA node sent what none of this domain may send.
	errRefused = errors.New("the CA node's update is refused")
)

// Store makes one picture of the policy lane's chunks and the presence lane's
// messages. The chunks of an update take effect together, with the last one. Its
// methods may be called concurrently.
type Store struct {
	td      spiffeid.TrustDomain
	domain  string        // its name
	changed chan struct{} // holds one token when view is newer than the last Snapshot taken for it

	mu        sync.Mutex
	recovery  []byte // the cluster's recovery key, pinned; nil: none was seen yet
	source    string // id of the CA node whose full state the picture is made of; empty: unknown
	from      string // id of the CA node of the present session
	view      *View
	update    *update                      // chunks since the last applied one; nil: none
	distrust  map[string]*statev1.Distrust // all that was heard of
	graces    map[string]grace             // of those that are not in force yet
	ending    *time.Timer                  // calls graceEnded; nil: graces is empty
	sequences map[string]uint64            // of view.Bundles, where known: they do not go back
	unusable  map[string]string            // distrust items that this release does not understand, by id
	told      []string                     // what restricts and this process cannot enforce, as the CA says
	places    map[place]Instance           // what view.Instances is made of
	counted   uint64                       // counts the changes of distrust, from 1
	yielding
	arriving map[place]Instance // presence of this session until it is complete; nil: it is
}

// place identifies an instance.
type place struct{ service, agent, id string }

// update collects chunks. A nil record means that it was deleted.
type update struct {
	full       bool
	size       int
	cluster    *statev1.Cluster
	entries    map[string]*statev1.Entry
	objects    map[string]*statev1.Object
	bundles    map[string]*ententev1.Bundle
	members    []*statev1.Member
	newMembers bool
	distrust   map[string]*statev1.Distrust
	tainted    []string
	newTainted bool
	within     time.Duration
	unusable   map[string]string // empty: not any more
	told       []string
	newTold    bool
}

// newStore begins with what was known before. The recovery key is pinned: recoveryKey, else
// that of the cluster known, else that of the first cluster heard of.
func newStore(td spiffeid.TrustDomain, cluster *statev1.Cluster, members []*statev1.Member, recoveryKey []byte) *Store {
	if len(recoveryKey) == 0 {
		recoveryKey = cluster.GetRecoveryKey()
	}
	return &Store{
		recovery: recoveryKey,
		td:       td,
		domain:   td.Name(),
		changed:  make(chan struct{}, 1),
		view:     &View{Cluster: cluster, Members: sorted(members, (*statev1.Member).GetId), Bundles: map[string][]byte{}},
		places:   map[place]Instance{},

		distrust:  map[string]*statev1.Distrust{},
		unusable:  map[string]string{},
		graces:    map[string]grace{},
		sequences: map[string]uint64{},
		counted:   1,
	}
}

// Snapshot returns the newest picture.
func (s *Store) Snapshot() *View {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.view
}

// attach begins a session with a node: half an update of the former one is forgotten, and
// the presence to come replaces the former one once it is complete. It returns the revision
// to resume at: 0 at another node than the one whose words the picture is made of. Its
// changes would leave in the picture what that one made up, also after it was removed.
func (s *Store) attach(node string) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.update = nil
	s.arriving = map[place]Instance{}
	s.from = node
	if node != s.source {
		return 0
	}
	return s.view.Revision
}

// origin is the id of the node whose words the picture is made of; empty: unknown.
func (s *Store) origin() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.source
}

// policy takes one chunk. After an error the session is of no more use; what is
// held stays as it was.
func (s *Store) policy(chunk *ententev1.Policy) error {
	s.mu.Lock()
	defer s.mu.Unlock()

	if chunk.GetFull() {
		s.update = nil
	}
	if s.update == nil {
		s.update = &update{
			full:    chunk.GetFull(),
			entries: map[string]*statev1.Entry{},
			objects: map[string]*statev1.Object{},
			bundles: map[string]*ententev1.Bundle{},

			distrust: map[string]*statev1.Distrust{},
			unusable: map[string]string{},
		}
	}
	if err := s.update.add(chunk); err != nil {
		return err
	}
	if !chunk.GetLast() {
		return nil
	}
	done := s.update
	s.update = nil
	applied, err := s.apply(done, chunk.GetRevision())
	if !applied && err == nil && done.full && s.from != s.source {
		s.update = done // of a node that has seen less: in use when it has caught up
	}
	return err
}

func (u *update) add(chunk *ententev1.Policy) error {
	u.size += proto.Size(chunk)
	if u.size > maxPendingBytes {
		return fmt.Errorf("%w: more than %d bytes without a last chunk", errRefused, maxPendingBytes)
	}
	for _, e := range chunk.GetEntries() {
		u.entries[e.GetId()] = e
	}
	for _, id := range chunk.GetDeletedEntries() {
		u.entries[id] = nil
	}
	for _, o := range chunk.GetObjects() {
		if o.GetKind() == nil { // of a later release
			continue
		}
		u.objects[catalog.Key(o)] = o
	}
	for _, k := range chunk.GetDeletedObjects() {
		u.objects[k.GetKind()+"/"+k.GetName()] = nil
	}
	for _, b := range chunk.GetBundles() {
		if _, err := spiffeid.TrustDomainFromString(b.GetTrustDomain()); err != nil || len(b.GetJwks()) == 0 {
			return fmt.Errorf("%w: a bundle without a trust domain or without content (%q)", errRefused, b.GetTrustDomain())
		}
		u.bundles[b.GetTrustDomain()] = b
	}
	for _, td := range chunk.GetDeletedBundles() {
		u.bundles[td] = nil
	}
	for _, d := range chunk.GetDistrust() {
		if why := cannotUse(d); why != "" {
			u.unusable[d.GetId()] = why
			continue
		}
		u.distrust[d.GetId()], u.unusable[d.GetId()] = d, ""
	}
	for _, id := range chunk.GetDeletedDistrust() {
		u.distrust[id], u.unusable[id] = nil, ""
	}
	if chunk.GetTooOldChanged() {
		u.told, u.newTold = chunk.GetTooOld(), true
	}
	if chunk.GetTaintedChanged() {
		u.tainted, u.newTainted = chunk.GetTainted(), true
		u.within = time.Duration(chunk.GetReissueWithinMs()) * time.Millisecond
	}
	if chunk.GetMembersChanged() {
		if !u.newMembers {
			u.members = nil
		}
		u.members, u.newMembers = append(u.members, chunk.GetMembers()...), true
	}
	if chunk.GetCluster() != nil {
		u.cluster = chunk.GetCluster()
	}
	return nil
}

// empty: it only moves the revision.
func (u *update) empty() bool {
	return !u.full && !u.newMembers && !u.newTainted && !u.newTold && len(u.unusable) == 0 && u.cluster == nil &&
		len(u.entries) == 0 && len(u.objects) == 0 && len(u.bundles) == 0 && len(u.distrust) == 0
}

// due tells whether an update continues the picture; false without an error: it is old.
func (s *Store) due(u *update, revision uint64) (bool, error) {
	have := s.view.Revision
	switch {
	case revision == 0:
		return false, fmt.Errorf("%w: it has no revision", errRefused)
	case revision>>epochShift < have>>epochShift:
		return false, fmt.Errorf("%w: it is of epoch %d, which a recovery has ended (now %d)", errRefused, revision>>epochShift, have>>epochShift)
	case !u.full && (s.yields || have == 0 || s.from != s.source || revision>>epochShift > have>>epochShift):
		return false, errResync
	}
	return s.yields || revision >= have, nil
}

// apply replaces the picture. A revision never goes back, unless the picture yields: what a lagging replica
// sends is passed over until it has caught up. Its later updates fit all the
// same, since a record always travels whole. A new epoch (after a recovery) begins
// with a full state; an old one is refused.
func (s *Store) apply(u *update, revision uint64) (applied bool, err error) {
	old := s.view
	if due, err := s.due(u, revision); !due {
		return false, err
	}
	if err := s.check(u, revision); err != nil {
		return false, err
	}
	if s.yields {
		s.replaced()
	}
	if u.full {
		s.begins(u)
	}
	if u.empty() {
		view := *old
		view.Revision = revision
		s.publish(&view)
		return true, nil
	}

	view := &View{
		Revision:  revision,
		Changed:   revision ^ s.salt,
		Cluster:   old.Cluster,
		Entries:   merge(old.Entries, u.entries, u.full, (*statev1.Entry).GetId),
		Objects:   merge(old.Objects, u.objects, u.full, catalog.Key),
		Members:   old.Members,
		Bundles:   old.Bundles,
		Instances: old.Instances,

		Distrust:      old.Distrust,
		Announced:     old.Announced,
		Tainted:       old.Tainted,
		ReissueWithin: old.ReissueWithin,
		Urgent:        old.Urgent,

		Skipped: old.Skipped,
	}
	if u.full {
		clear(s.unusable)
	}
	maps.Copy(s.unusable, u.unusable)
	maps.DeleteFunc(s.unusable, func(_, why string) bool { return why == "" })
	if u.full || u.newTold {
		s.told = u.told
	}
	view.TooOld = s.tooOld()
	if u.full || len(u.distrust) > 0 {
		s.distrustAlso(u.distrust, u.full)
		view.Distrust, view.Announced = s.distrusted()
	}
	if u.full || u.newTainted {
		view.Tainted, view.ReissueWithin = u.tainted, u.within
	}
	if u.cluster != nil {
		view.Cluster = u.cluster
		if s.recovery == nil {
			s.recovery = u.cluster.GetRecoveryKey()
		}
		s.recovery = ca.FollowRecoveryKey(u.cluster, s.recovery)
	}
	if u.newMembers {
		view.Members = sorted(u.members, (*statev1.Member).GetId)
	}
	if u.full || len(u.bundles) > 0 {
		view.Bundles = map[string][]byte{}
		if !u.full {
			maps.Copy(view.Bundles, old.Bundles)
		}
		for td, b := range u.bundles {
			switch {
			case b == nil:
				delete(view.Bundles, td)
				delete(s.sequences, td)
			case b.GetSequence() != 0 && b.GetSequence() < s.sequences[td] && related(old, td) == related(view, td):
				view.Bundles[td] = old.Bundles[td] // the node has seen less (I8)
			default:
				view.Bundles[td], s.sequences[td] = b.GetJwks(), b.GetSequence()
			}
		}
		maps.DeleteFunc(s.sequences, func(td string, _ uint64) bool { return view.Bundles[td] == nil })
	}
	s.publish(view)
	return true, nil
}

// begins makes the picture one of the present session's node. Sequences that a node named
// which is none any more may have been made up: they hold nothing back. Called with mu held.
func (s *Store) begins(u *update) {
	isSource := func(m *statev1.Member) bool { return m.GetId() == s.source }
	if s.source != "" && u.newMembers && !slices.ContainsFunc(u.members, isSource) {
		clear(s.sequences)
	}
	s.source = s.from
}

// related is the revision of the relationship with another domain; 0: there is none.
func related(v *View, td string) uint64 {
	key := "Relationship/" + td
	i, found := slices.BinarySearchFunc(v.Objects, key, func(o *statev1.Object, key string) int { return strings.Compare(catalog.Key(o), key) })
	if !found {
		return 0
	}
	return v.Objects[i].GetRevision()
}

// grace is the time that holders of an announced distrust item have to renew.
type grace struct {
	until  time.Time
	before *statev1.Distrust // of the same id, in force meanwhile; nil: none
}

// maxGrace bounds what a CA node may ask: restrictions hold within a second (I4).
const maxGrace = time.Second

// distrustAlso takes items over; nil takes one away. An item with a grace is in force when
// that has passed. Of a full state it is in force at once, unless its grace is running:
// when it was made is not known. A grace is never extended.
func (s *Store) distrustAlso(items map[string]*statev1.Distrust, full bool) {
	s.counted++
	known := s.distrust
	if full {
		s.distrust = make(map[string]*statev1.Distrust, len(items))
		maps.DeleteFunc(s.graces, func(id string, _ grace) bool { return items[id] == nil })
	}
	for id, item := range items {
		have, running := known[id], s.graces[id]
		again := have != nil && item != nil && have.GetAgentGeneration() == item.GetAgentGeneration() && have.GetEntryGeneration() == item.GetEntryGeneration()
		switch {
		case item.GetGraceMs() == 0, full && !again:
			delete(s.graces, id)
		case again || !running.until.IsZero():
		default:
			s.graces[id] = grace{until: time.Now().Add(min(time.Duration(item.GetGraceMs())*time.Millisecond, maxGrace)), before: have}
		}
		if item == nil {
			delete(s.distrust, id)
		} else {
			s.distrust[id] = item
		}
	}
	s.awaitGrace()
}

// awaitGrace has graceEnded called when the first grace has passed.
func (s *Store) awaitGrace() {
	if s.ending != nil {
		s.ending.Stop()
		s.ending = nil
	}
	var first time.Time
	for _, g := range s.graces {
		if first.IsZero() || g.until.Before(first) {
			first = g.until
		}
	}
	if !first.IsZero() {
		s.ending = time.AfterFunc(time.Until(first), s.graceEnded)
	}
}

func (s *Store) graceEnded() {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	maps.DeleteFunc(s.graces, func(_ string, g grace) bool { return !g.until.After(now) })
	s.awaitGrace()
	view := *s.view
	view.Urgent++
	view.Distrust, view.Announced = s.distrusted()
	s.publish(&view)
}

// distrusted is what is in force, and what is announced.
func (s *Store) distrusted() (inForce, announced *ca.Distrusted) {
	if len(s.over)+len(s.also) > 0 {
		return s.distrustedByAll()
	}
	announced = ca.NewDistrusted(s.td, slices.Collect(maps.Values(s.distrust)))
	if len(s.graces) == 0 {
		return announced, announced
	}
	items := make([]*statev1.Distrust, 0, len(s.distrust))
	for id, item := range s.distrust {
		if g, running := s.graces[id]; running {
			item = g.before
		}
		if item != nil {
			items = append(items, item)
		}
	}
	return ca.NewDistrusted(s.td, items), announced
}

// urgent takes what is sent ahead of the policy lane, which will repeat it. Before the
// first full state there is nothing yet that it could be said of.
func (s *Store) urgent(message *ententev1.Urgent) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.view.Revision == 0 {
		return
	}
	items := map[string]*statev1.Distrust{}
	for _, d := range message.GetDistrust() {
		if why := cannotUse(d); why != "" {
			s.unusable[d.GetId()] = why
			continue
		}
		items[d.GetId()] = d
	}
	s.distrustAlso(items, false)
	view := *s.view
	view.TooOld = s.tooOld()
	view.Urgent++
	for _, b := range message.GetBundles() {
		// Whom it concerns has one already: nothing is granted ahead of an agreement.
		if td := b.GetTrustDomain(); td != s.domain && len(b.GetJwks()) > 0 && s.view.Bundles[td] != nil && b.GetSequence() > s.sequences[td] {
			view.Bundles = maps.Clone(view.Bundles)
			view.Bundles[td], s.sequences[td] = b.GetJwks(), b.GetSequence()
		}
	}
	view.Distrust, view.Announced = s.distrusted()
	view.Tainted = message.GetTainted()
	view.ReissueWithin = time.Duration(message.GetReissueWithinMs()) * time.Millisecond
	s.publish(&view)
}

// check refuses an update that a CA of this domain cannot send.
func (s *Store) check(u *update, revision uint64) error {
	if c := u.cluster; c != nil {
		if c.GetTrustDomain() != s.domain {
			return fmt.Errorf("%w: it is of trust domain %q, not of %q", errRefused, c.GetTrustDomain(), s.domain)
		}
		if err := ca.FollowCluster(s.view.Cluster, c, s.recovery); err != nil {
			return fmt.Errorf("%w: %w", errRefused, err)
		}
	}
	if c := cmp.Or(u.cluster, s.view.Cluster); c != nil && uint64(c.GetEpoch()) != revision>>epochShift {
		return fmt.Errorf("%w: its revision is of epoch %d, and the cluster is in epoch %d", errRefused, revision>>epochShift, c.GetEpoch())
	}
	if own, told := u.bundles[s.domain]; (u.full || told) && own == nil {
		return fmt.Errorf("%w: it lacks the own domain's bundle", errRefused)
	}
	if u.newMembers && len(u.members) == 0 {
		return fmt.Errorf("%w: it lists no CA node", errRefused)
	}
	return nil
}

// presence takes one message of the presence lane.
func (s *Store) presence(message *ententev1.Presence) {
	s.mu.Lock()
	defer s.mu.Unlock()

	into := s.places
	if s.arriving != nil {
		into = s.arriving
	}
	for _, i := range message.GetInstances() {
		into[place{i.GetService(), i.GetAgent(), i.GetId()}] = instanceFromWire(i)
	}
	for _, i := range message.GetWithdrawn() {
		delete(into, place{i.GetService(), i.GetAgent(), i.GetId()})
	}
	if s.arriving != nil {
		if !message.GetComplete() {
			return
		}
		s.places, s.arriving = s.arriving, nil
	}
	s.publishInstances(slices.Collect(maps.Values(s.places)))
}

// disown marks every instance as stale: nobody has vouched for them for a while.
// The complete presence of the next session takes the mark away.
func (s *Store) disown() {
	s.mu.Lock()
	defer s.mu.Unlock()
	instances := slices.Clone(s.view.Instances)
	for i := range instances {
		instances[i].Stale = true
	}
	s.publishInstances(instances)
}

func (s *Store) publishInstances(instances []Instance) {
	slices.SortFunc(instances, func(a, b Instance) int {
		return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.Agent, b.Agent), cmp.Compare(a.ID, b.ID))
	})
	if slices.Equal(instances, s.view.Instances) {
		return
	}
	view := *s.view
	view.Instances = instances
	s.publish(&view)
}

func (s *Store) publish(view *View) {
	s.view = view
	select {
	case s.changed <- struct{}{}:
	default: // the reader has not yet come for the one before
	}
}

// merge lays changes over a sorted list, or over nothing when they are the full
// state. Without a change it returns the list itself.
func merge[T any](list []*T, changes map[string]*T, full bool, key func(*T) string) []*T {
	if !full && len(changes) == 0 {
		return list
	}
	all := make(map[string]*T, len(list)+len(changes))
	if !full {
		for _, record := range list {
			all[key(record)] = record
		}
	}
	maps.Copy(all, changes)
	maps.DeleteFunc(all, func(_ string, record *T) bool { return record == nil })
	return sorted(slices.Collect(maps.Values(all)), key)
}

func sorted[T any](list []*T, key func(*T) string) []*T {
	return slices.SortedFunc(slices.Values(list), func(a, b *T) int { return cmp.Compare(key(a), key(b)) })
}
