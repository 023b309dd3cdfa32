package client

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
)

// revision = epoch<<44 | index
const epochShift = 44

// maxPolicyBytes bounds what one policy update may hold before its last chunk.
const maxPolicyBytes = 1 << 30

// errResync: what was received does not fit onto what is held; a new session
// that asks for the full state can mend it.
var errResync = errors.New("a full state is needed")

// Store makes one picture of the chunks of the policy lane and the messages of
// the presence lane. Chunks take effect together, with the last one of their
// update. Its methods may be called concurrently.
type Store struct {
	domain spiffeid.TrustDomain

	mu       sync.Mutex
	view     *View
	pending  *pending           // chunks since the last applied one; nil: none
	arriving map[place]Instance // presence of a new session until it is complete
	complete bool               // of the presence lane of this session
	places   map[place]Instance // what view.Instances was made of
	stale    bool               // no session vouches for places
}

// place identifies an instance: an agent serves a service at one place.
type place struct{ service, agent string }

// pending collects an update. Records are kept by key, so that an entry that is
// changed twice before the last chunk counts once.
type pending struct {
	size    int
	full    bool
	cluster *statev1.Cluster
	entries map[string]*statev1.Entry // nil value: deleted
	bundles map[string][]byte
	objects map[string]*statev1.Object
	members []*statev1.Member
	newList bool // members replaces the list
}

func newStore(td spiffeid.TrustDomain, cluster *statev1.Cluster, members []*statev1.Member) *Store {
	members = slices.Clone(members)
	slices.SortFunc(members, func(a, b *statev1.Member) int { return cmp.Compare(a.GetId(), b.GetId()) })
	return &Store{
		domain: td,
		view:   &View{Cluster: cluster, Members: members, Bundles: map[string][]byte{}},
		places: map[place]Instance{},
	}
}

// Snapshot returns the newest picture.
func (s *Store) Snapshot() *View {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.view
}

// attach begins a new session: half an update of the former one is forgotten,
// and the presence that is to come replaces the former one when it is complete.
// It returns the revision to resume at.
func (s *Store) attach() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pending, s.complete, s.arriving = nil, false, map[place]Instance{}
	return s.view.Revision
}

// reset forgets the revision, so that the next session asks for the full state.
// What is held stays in use until that has come.
func (s *Store) policy(chunk *ententev1.Policy, resumed bool) (changed bool, err error) {
	return false, fmt.Errorf("%w %v %v %v", errResync, bytes.MinRead, maps.Keys(s.places), resumed)
}
