package meshagent

import (
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// store owns the agent's state: whoever changes it does so here, one after the other. With
// each change it places the host's services and tells deliveries, which acknowledge to the CA
// what the consumers of the state were given.
type store struct {
	deliveries deliveries

	mu       sync.Mutex // orders changes of state; readers need none
	services *places    // guarded by mu
	state    atomic.Pointer[State]
}

// newStore holds an initial state that has no entries yet.
func newStore(initial *State, services *places, settle time.Duration) *store {
	s := &store{services: services}
	initial.changed, initial.reissued = make(chan struct{}), make(chan struct{})
	initial.underIDs = initial.under()
	s.state.Store(initial)
	s.deliveries.settle, s.deliveries.state = settle, initial
	return s
}

// State is the newest state. It is never nil.
func (s *store) State() *State { return s.state.Load() }

// change replaces the state by the one that f makes of it; nil leaves it.
func (s *store) change(f func(*State) *State) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.state.Load()
	next := f(old)
	if next == nil {
		return
	}
	next.changed = make(chan struct{})
	again := next.reissued == nil
	if again {
		next.reissued = make(chan struct{})
		next.content = old.content + 1
	}
	s.services.place(next, old)
	next.underIDs = next.under()
	s.state.Store(next)
	s.deliveries.applied(next, 0)
	close(old.changed)
	if again {
		close(old.reissued)
	}
}

// touch makes a new state of the present one: what the host says of its services has changed.
func (s *store) touch() {
	s.change(func(state *State) *State { next := *state; return &next })
}

// SVIDs is the source of one entry's X.509-SVID: always the newest one. It fails
// while the entry is not there or not signed yet.
func (s *store) SVIDs(entryID string) x509svid.Source { return entrySVID{s, entryID} }

// Bundles is the source of the own trust domain's X.509 bundle, and of no other:
// a foreign root never reaches a sidecar (I6).
func (s *store) Bundles() x509bundle.Source { return ownBundle{s} }

// Deliver begins the delivery to one consumer; name is for people. Close ends it: who is
// gone holds nothing up.
func (s *store) Deliver(name string) *Delivery { return s.deliveries.begin(name) }

type entrySVID struct {
	store   *store
	entryID string
}

func (e entrySVID) GetX509SVID() (*x509svid.SVID, error) {
	identity, ok := e.store.State().Identity(e.entryID)
	if !ok {
		return nil, fmt.Errorf("this host has no entry %q", e.entryID)
	}
	if identity.SVID == nil {
		return nil, fmt.Errorf("there is no SVID for %s: the CA has not signed one yet, or none since the last one ended", identity.ID)
	}
	return identity.SVID.Parsed()
}

// OwnSVID is the source of the agent's own SVID.
func (a *Agent) OwnSVID() x509svid.Source { return ownSVID{a.store} }

// ownSVID is that source.
type ownSVID struct{ store *store }

func (o ownSVID) GetX509SVID() (*x509svid.SVID, error) {
	svid := o.store.State().own
	if svid == nil {
		return nil, errors.New("the agent has not attested yet")
	}
	if end := svid.Certificates[0].NotAfter; !time.Now().Before(end) {
		return nil, fmt.Errorf("the agent's SVID has ended at %s", end.Format(time.RFC3339))
	}
	return svid, nil
}

type ownBundle struct{ store *store }

func (o ownBundle) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if own := o.store.State().Bundle; own != nil && own.TrustDomain() == td {
		return own, nil
	}
	return nil, fmt.Errorf("no bundle of trust domain %s is held here", td.Name())
}

// Distrusted makes it a peer.Distruster: the SVIDs of agents that were banned, of
// entries that are gone and of authorities that were revoked count for nothing.
func (o ownBundle) Distrusted(path []*x509.Certificate) error {
	return o.store.State().View.Distrust.Check(path)
}

// Announced makes it a peer.Announcer.
func (o ownBundle) Announced() func([]*x509.Certificate) error {
	view := o.store.State().View
	if view.Announced == view.Distrust {
		return nil
	}
	return view.Announced.Check
}
