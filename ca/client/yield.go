package client

import (
	"maps"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/federation/bundle"
)

// yielding is how a picture goes whose node two others contradict. Store.mu guards it.
type yielding struct {
	yields  bool                         // the next full state replaces this one, whatever its revision
	yielded bool                         // it has, and nobody has asked
	salt    uint64                       // counts that in the highest bits of View.Changed
	over    map[string]*statev1.Distrust // items of before that: in force until the new state was compared
	also    map[string]*statev1.Distrust // items that the only other CA node in reach holds
}

// yield has the next full state replace the picture, whatever its revision: two CA nodes
// contradict what it is made of. It is the one way back.
func (s *Store) yield() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.yields, s.update, s.source = true, nil, ""
}

// replaced forgets what the node before said, but for what it denied: that is in force
// until the new state was compared. Bundles of other domains may go back here (I8), since
// what it said of them may have been made up, sequence included. Called with mu held.
func (s *Store) replaced() {
	s.yields, s.yielded = false, true
	s.salt += 1 << 57
	s.over, s.also = s.state.Distrust, nil
	s.state.Distrust = nil
	clear(s.graces)
	s.forgetSequences()
}

// hasYielded tells, once, that the picture was replaced.
func (s *Store) hasYielded() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	was := s.yielded
	s.yielded = false
	return was
}

// compared says that others hold what this picture is made of: what a node before, or one
// that contradicted, denied beyond it is denied no more.
func (s *Store) compared() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.yields || len(s.over)+len(s.also) == 0 {
		return
	}
	s.over, s.also = nil, nil
	s.publishDistrust()
}

func (s *Store) publishDistrust() {
	view := *s.view
	view.Urgent++
	view.Distrust, view.Announced = s.distrusted()
	s.publish(&view)
}

// distrustedByAll is distrusted with what others than the present node deny, in force at
// once.
func (s *Store) distrustedByAll() (inForce, announced *ca.Distrusted) {
	var all []*statev1.Distrust
	for _, items := range []map[string]*statev1.Distrust{s.over, s.also, s.state.Distrust} {
		all = slices.AppendSeq(all, maps.Values(items))
	}
	announced = ca.NewDistrusted(s.td, all)
	return announced, announced
}

// covers tells whether one item names at least what another does. An item's id proves
// nothing: a node may give one item the id of another.
func covers(a, b *statev1.Distrust) bool {
	return a.GetAuthority() == b.GetAuthority() && a.GetAgent() == b.GetAgent() && a.GetEntry() == b.GetEntry() &&
		a.GetAgentGeneration() >= b.GetAgentGeneration() && a.GetEntryGeneration() >= b.GetEntryGeneration()
}

// items are all that the present node told, unless they are still those of known; told
// counts their changes.
func (s *Store) items(known uint64) (items []*statev1.Distrust, told uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if known == s.counted {
		return nil, known
	}
	return slices.Collect(maps.Values(s.state.Distrust)), s.counted
}

// holds tells whether all that another CA node distrusts was told here, too, as far as this
// release can use it.
func (s *Store) holds(items []*statev1.Distrust) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !slices.ContainsFunc(items, func(d *statev1.Distrust) bool {
		have := s.state.Distrust[d.GetId()]
		return (have == nil || !covers(have, d)) && cannotUse(d) == ""
	})
}

// deny adds what the only other CA node in reach denies, at most 10,000 items.
func (s *Store) deny(items []*statev1.Distrust) {
	const most = 10_000
	also := map[string]*statev1.Distrust{}
	for _, d := range items[:min(len(items), most)] {
		if cannotUse(d) == "" {
			also[d.GetId()] = d
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.view.Revision == 0 || maps.EqualFunc(also, s.also, func(a, b *statev1.Distrust) bool { return proto.Equal(a, b) }) {
		return
	}
	s.also = also
	s.publishDistrust()
}

// follows tells whether a cluster record begins an epoch after the one that is known.
func (s *Store) follows(c *statev1.Cluster) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return c.GetTrustDomain() == s.domain && ca.FollowCluster(s.view.Cluster, c, ca.FollowRecoveryKey(c, s.recovery)) == nil
}

// bundleKeys are the ids of the authorities in a bundle, those of token keys too.
func bundleKeys(td spiffeid.TrustDomain, jwks []byte) (map[string]bool, error) {
	b, _, err := bundle.Parse(td, jwks)
	if err != nil {
		return nil, err
	}
	keys := map[string]bool{}
	for _, cert := range b.X509 {
		keys[ca.KeyID(cert.RawSubjectPublicKeyInfo)] = true
	}
	for _, key := range append(slices.Clone(b.JWT), b.WIT...) {
		keys[key.ID] = true
	}
	return keys, nil
}

// authorityItem distrusts what an authority signed.
func authorityItem(id string) *statev1.Distrust {
	d := &statev1.Distrust{Authority: id, NotAfter: 1 << 36}
	d.Id = ca.DistrustID(d)
	return d
}
