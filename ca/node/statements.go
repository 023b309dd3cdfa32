package node

import (
	"context"
	"crypto/x509"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/compare"
	"github.com/entente-mesh/entente/ca/domain"
)

const (
	stateEvery  = time.Second     // a statement, and the others'
	stateReuse  = time.Second / 2 // a younger one is not made again
	stateBehind = 5 * time.Second // age of the state from which on this node says that it may lack something
	stateWait   = 2 * time.Second // for another node's answer
)

// statements are what this node states of its own state, and the newest that it heard of
// the others: subscribers of this node hear them with its heartbeats.
type statements struct {
	*core

	mu      sync.Mutex
	history compare.History
	items   compare.DistrustSet
	own     *compare.Signed
	made    time.Time
	others  map[string]*compare.Signed
}

// Own is this node's statement, not older than half a second.
func (s *statements) Own() (*compare.Signed, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if s.own != nil && now.Sub(s.made) < stateReuse {
		return s.own, nil
	}
	st := &compare.Statement{Member: s.core.own.id, Time: s.wall(), Behind: s.replica.Load().Age() > stateBehind}
	var (
		content  compare.Content
		cluster  *statev1.Cluster
		revision uint64
		items    []*statev1.Distrust
	)
	s.Read(func(state *domain.State) {
		cluster, revision, items = state.Cluster(), state.Revision(), state.Distrust()
		content[compare.Members] = compare.MembersHash(state.Members())
		content[compare.Bundle] = bundleHash(state)
	})
	content[compare.Distrust] = s.items.Hash(items)
	st.Epoch = cluster.GetEpoch()
	s.history.Add(revision, content)
	st.History = s.history
	signed, err := st.Sign(cluster.GetId(), s.SignStatement)
	if err != nil {
		return nil, err
	}
	s.own, s.made = signed, now
	return signed, nil
}

func bundleHash(st *domain.State) compare.Hash {
	roots, _ := st.OwnBundle()
	return compare.BundleHash(roots, publicKeys(st, statev1.KeyUse_KEY_USE_JWT), publicKeys(st, statev1.KeyUse_KEY_USE_WIT))
}

// publicKeys are in PKIX form, as subscribers write them that read them from the bundle.
func publicKeys(st *domain.State, use statev1.KeyUse) (keys [][]byte) {
	for _, a := range st.OwnKeys(use) {
		der := a.GetPublicKey()
		if key, err := x509.ParsePKIXPublicKey(der); err == nil {
			if again, err := x509.MarshalPKIXPublicKey(key); err == nil {
				der = again
			}
		}
		keys = append(keys, der)
	}
	return keys
}

// Others are the newest statements of other members.
func (s *statements) Others() []*compare.Signed {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]*compare.Signed, 0, len(s.others))
	for _, id := range slices.Sorted(maps.Keys(s.others)) {
		list = append(list, s.others[id])
	}
	return list
}

// run asks each other member every second. What they say is passed on as it is:
// subscribers verify it.
func (s *statements) run(ctx context.Context) error {
	for {
		var others []*statev1.Member
		s.Read(func(st *domain.State) {
			for _, m := range st.Members() {
				if m.GetId() != s.core.own.id {
					others = append(others, m)
				}
			}
		})
		if len(others) > 0 {
			if _, err := s.Own(); err != nil { // so that its history has no long gaps
				s.log.Warn("cannot sign a statement of this node's state", "error", err)
			}
		}
		heard := make(map[string]*compare.Signed, len(others))
		var mu sync.Mutex
		var asked sync.WaitGroup
		for _, m := range others {
			asked.Go(func() {
				callCtx, cancel := context.WithTimeout(ctx, stateWait)
				defer cancel()
				signed, err := s.peers.Statement(callCtx, m)
				if err != nil {
					s.log.Debug("another CA node states nothing", "member", m.GetName(), "error", err)
					return
				}
				if st, err := compare.Read(signed); err != nil || st.Member != m.GetId() {
					s.log.Debug("another CA node's statement is malformed", "member", m.GetName(), "error", err)
					return
				}
				mu.Lock()
				heard[m.GetId()] = signed
				mu.Unlock()
			})
		}
		asked.Wait()
		s.mu.Lock()
		s.others = heard
		s.mu.Unlock()
		if err := sleep(ctx, stateEvery-rand.N(stateEvery/8)); err != nil {
			return err
		}
	}
}
