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

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/presence"
	"github.com/entente-mesh/entente/ca/wire"
	"github.com/entente-mesh/entente/federation/catalog"
)

// epochShift: a revision is epoch<<44 | log index.
const epochShift = 44

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

	mu       sync.Mutex
	recovery []byte // the cluster's recovery key, pinned; nil: none was seen yet
	source   string // id of the CA node whose full state the picture is made of; empty: unknown
	from     string // id of the CA node of the present session
	view     *View
	state    wire.State                // what the policy lane and what came ahead of it come to
	update   *wire.Pending             // chunks since the last applied one; nil: none
	graces   map[string]grace          // of distrust items that are not in force yet
	ending   *time.Timer               // calls graceEnded; nil: graces is empty
	unusable map[string]string         // distrust items that this release does not understand, by id
	places   map[presence.Key]Instance // what view.Instances is made of
	counted  uint64                    // counts the changes of distrust, from 1
	yielding
	arriving map[presence.Key]Instance // presence of this session until it is complete; nil: it is
}

// newStore begins with what was known before. The recovery key is pinned: recoveryKey, else
// that of the cluster known, else that of the first cluster heard of.
func newStore(td spiffeid.TrustDomain, cluster *statev1.Cluster, members []*statev1.Member, recoveryKey []byte) *Store {
	if len(recoveryKey) == 0 {
		recoveryKey = cluster.GetRecoveryKey()
	}
	state := wire.State{}.With(&wire.Update{Cluster: cluster, Members: members, MembersChanged: true})
	return &Store{
		recovery: recoveryKey,
		td:       td,
		domain:   td.Name(),
		changed:  make(chan struct{}, 1),
		view:     &View{Cluster: state.Cluster, Members: state.Members, Bundles: map[string][]byte{}},
		state:    state,
		places:   map[presence.Key]Instance{},
		unusable: map[string]string{},
		graces:   map[string]grace{},
		counted:  1,
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
	s.arriving = map[presence.Key]Instance{}
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
		s.update = &wire.Pending{}
	}
	if err := s.update.Add(chunk); err != nil {
		return fmt.Errorf("%w: %w", errRefused, err)
	}
	if !chunk.GetLast() {
		return nil
	}
	done := s.update
	s.update = nil
	applied, err := s.apply(&done.Update)
	if !applied && err == nil && done.Full && s.from != s.source {
		s.update = done // of a node that has seen less: in use when it has caught up
	}
	return err
}

// due tells whether an update continues the picture; false without an error: it is old.
func (s *Store) due(u *wire.Update) (bool, error) {
	have, revision := s.view.Revision, u.Revision
	switch {
	case revision == 0:
		return false, fmt.Errorf("%w: it has no revision", errRefused)
	case revision>>epochShift < have>>epochShift:
		return false, fmt.Errorf("%w: it is of epoch %d, which a recovery has ended (now %d)", errRefused, revision>>epochShift, have>>epochShift)
	case !u.Full && (s.yields || have == 0 || s.from != s.source || revision>>epochShift > have>>epochShift):
		return false, errResync
	}
	return s.yields || revision >= have, nil
}

// apply replaces the picture. A revision never goes back, unless the picture yields: what a lagging replica
// sends is passed over until it has caught up. Its later updates fit all the
// same, since a record always travels whole. A new epoch (after a recovery) begins
// with a full state; an old one is refused.
func (s *Store) apply(u *wire.Update) (applied bool, err error) {
	if due, err := s.due(u); !due {
		return false, err
	}
	if err := s.check(u); err != nil {
		return false, err
	}
	if s.yields {
		s.replaced()
	}
	if u.Full {
		s.begins(u)
	}
	if u.Empty() {
		view := *s.view
		view.Revision = u.Revision
		s.publish(&view)
		return true, nil
	}

	distrust := len(u.Distrust)+len(u.DeletedDistrust) > 0
	s.setAsideUnusable(u)
	old := s.state
	s.state = old.With(u)
	s.keepNewerBundles(old, u)
	if u.Full || distrust {
		s.distrustAlso(old.Distrust, u)
	}
	if u.Cluster != nil {
		if s.recovery == nil {
			s.recovery = u.Cluster.GetRecoveryKey()
		}
		s.recovery = ca.FollowRecoveryKey(u.Cluster, s.recovery)
	}

	view := *s.view
	view.Revision, view.Changed = u.Revision, u.Revision^s.salt
	view.Cluster, view.Members = s.state.Cluster, s.state.Members
	view.Entries, view.Objects = s.state.Entries, s.state.Objects
	view.Tainted, view.ReissueWithin = s.state.Tainted, s.state.Reissue
	view.TooOld = s.tooOld()
	if u.Full || distrust {
		view.Distrust, view.Announced = s.distrusted()
	}
	if u.Full || len(u.Bundles)+len(u.DeletedBundles) > 0 {
		view.Bundles = s.bundles()
	}
	s.publish(&view)
	return true, nil
}

// setAsideUnusable takes out of an update the distrust items that this release does not
// understand. What it knew by the same id stays in force.
func (s *Store) setAsideUnusable(u *wire.Update) {
	if u.Full {
		clear(s.unusable)
	}
	u.Distrust = slices.DeleteFunc(u.Distrust, func(d *statev1.Distrust) bool {
		why := cannotUse(d)
		if delete(s.unusable, d.GetId()); why != "" {
			s.unusable[d.GetId()] = why
		}
		return why != ""
	})
	for _, id := range u.DeletedDistrust {
		delete(s.unusable, id)
	}
}

// keepNewerBundles undoes what would bring an older bundle of another domain: the node has
// seen less (I8).
func (s *Store) keepNewerBundles(old wire.State, u *wire.Update) {
	for _, b := range u.Bundles {
		td := b.GetTrustDomain()
		if have := old.Bundles[td]; have != nil && s.state.Bundles[td] != nil && b.GetSequence() != 0 && b.GetSequence() < have.GetSequence() && related(old, td) == related(s.state, td) {
			s.state.Bundles[td] = have // of a map that With has made
		}
	}
}

// bundles are those of the state as a view shows them.
func (s *Store) bundles() map[string][]byte {
	bundles := make(map[string][]byte, len(s.state.Bundles))
	for td, b := range s.state.Bundles {
		bundles[td] = b.GetJwks()
	}
	return bundles
}

// begins makes the picture one of the present session's node. Sequences that a node named
// which is none any more may have been made up: they hold nothing back. Called with mu held.
func (s *Store) begins(u *wire.Update) {
	isSource := func(m *statev1.Member) bool { return m.GetId() == s.source }
	if s.source != "" && u.MembersChanged && !slices.ContainsFunc(u.Members, isSource) {
		s.forgetSequences()
	}
	s.source = s.from
}

// forgetSequences has any bundle replace the one of its domain that is held.
func (s *Store) forgetSequences() {
	bundles := make(map[string]*statev1.ForeignBundle, len(s.state.Bundles))
	for td, b := range s.state.Bundles {
		bundles[td] = &statev1.ForeignBundle{TrustDomain: td, Jwks: b.GetJwks()}
	}
	s.state.Bundles = bundles
}

// related is the revision of the relationship with another domain; 0: there is none.
func related(state wire.State, td string) uint64 {
	key := "Relationship/" + td
	i, found := slices.BinarySearchFunc(state.Objects, key, func(o *statev1.Object, key string) int { return strings.Compare(catalog.Key(o), key) })
	if !found {
		return 0
	}
	return state.Objects[i].GetRevision()
}

// grace is the time that holders of an announced distrust item have to renew.
type grace struct {
	until  time.Time
	before *statev1.Distrust // of the same id, in force meanwhile; nil: none
}

// maxGrace bounds what a CA node may ask: restrictions hold within a second (I4).
const maxGrace = time.Second

// distrustAlso begins and ends graces for what an update has brought; known is what was
// distrusted before. An item with a grace is in force when that has passed. Of a full state
// it is in force at once, unless its grace is running: when it was made is not known. A
// grace is never extended.
func (s *Store) distrustAlso(known map[string]*statev1.Distrust, u *wire.Update) {
	s.counted++
	if u.Full {
		maps.DeleteFunc(s.graces, func(id string, _ grace) bool { return s.state.Distrust[id] == nil })
	}
	for _, item := range u.Distrust {
		id := item.GetId()
		have, running := known[id], s.graces[id]
		again := have != nil && have.GetAgentGeneration() == item.GetAgentGeneration() && have.GetEntryGeneration() == item.GetEntryGeneration()
		switch {
		case item.GetGraceMs() == 0, u.Full && !again:
			delete(s.graces, id)
		case again || !running.until.IsZero():
		default:
			s.graces[id] = grace{until: time.Now().Add(min(time.Duration(item.GetGraceMs())*time.Millisecond, maxGrace)), before: have}
		}
	}
	for _, id := range u.DeletedDistrust {
		delete(s.graces, id)
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
	announced = ca.NewDistrusted(s.td, slices.Collect(maps.Values(s.state.Distrust)))
	if len(s.graces) == 0 {
		return announced, announced
	}
	items := make([]*statev1.Distrust, 0, len(s.state.Distrust))
	for id, item := range s.state.Distrust {
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
	u := &wire.Update{Distrust: slices.Clone(message.GetDistrust())}
	s.setAsideUnusable(u)
	for _, b := range message.GetBundles() {
		// Whom it concerns has one already: nothing is granted ahead of an agreement.
		if have := s.state.Bundles[b.GetTrustDomain()]; have != nil && b.GetTrustDomain() != s.domain && len(b.GetJwks()) > 0 && b.GetSequence() > have.GetSequence() {
			u.Bundles = append(u.Bundles, wire.ToBundle(b))
		}
	}
	known := s.state.Distrust
	s.state = s.state.With(u)
	s.state.Tainted = message.GetTainted()
	s.state.Reissue = time.Duration(message.GetReissueWithinMs()) * time.Millisecond
	s.distrustAlso(known, u)

	view := *s.view
	view.Urgent++
	view.TooOld = s.tooOld()
	if len(u.Bundles) > 0 {
		view.Bundles = s.bundles()
	}
	view.Distrust, view.Announced = s.distrusted()
	view.Tainted, view.ReissueWithin = s.state.Tainted, s.state.Reissue
	s.publish(&view)
}

// check refuses an update that a CA of this domain cannot send.
func (s *Store) check(u *wire.Update) error {
	if c := u.Cluster; c != nil {
		if c.GetTrustDomain() != s.domain {
			return fmt.Errorf("%w: it is of trust domain %q, not of %q", errRefused, c.GetTrustDomain(), s.domain)
		}
		if err := ca.FollowCluster(s.view.Cluster, c, s.recovery); err != nil {
			return fmt.Errorf("%w: %w", errRefused, err)
		}
	}
	if c := cmp.Or(u.Cluster, s.view.Cluster); c != nil && uint64(c.GetEpoch()) != u.Revision>>epochShift {
		return fmt.Errorf("%w: its revision is of epoch %d, and the cluster is in epoch %d", errRefused, u.Revision>>epochShift, c.GetEpoch())
	}
	own := func(b *statev1.ForeignBundle) bool { return b.GetTrustDomain() == s.domain }
	if u.Full && !slices.ContainsFunc(u.Bundles, own) || slices.Contains(u.DeletedBundles, s.domain) {
		return fmt.Errorf("%w: it lacks the own domain's bundle", errRefused)
	}
	if u.MembersChanged && len(u.Members) == 0 {
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
		instance := wire.ToInstance(i)
		into[instance.Key()] = instance.Endpoint
	}
	for _, i := range message.GetWithdrawn() {
		delete(into, wire.ToInstance(i).Key())
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
