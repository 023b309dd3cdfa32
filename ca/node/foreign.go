package node

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/server"
	"github.com/entente-mesh/entente/federation/exchange"
)

// foreignStatus is how following the other domains' bundles goes, at this node.
type foreignStatus struct {
	mu sync.Mutex
	of map[string]server.Fetched
}

func (f *foreignStatus) set(td string, fetched server.Fetched) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.of == nil {
		f.of = make(map[string]server.Fetched)
	}
	f.of[td] = fetched
}

func (f *foreignStatus) all() map[string]server.Fetched {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.of)
}

// keepFollowing runs one fetcher for each relationship.
func (n *Node) keepFollowing(ctx context.Context) {
	type follower struct {
		revision uint64
		cancel   context.CancelFunc
	}
	running := make(map[string]follower)
	var fetchers sync.WaitGroup
	defer fetchers.Wait()
	defer func() {
		for _, f := range running {
			f.cancel()
		}
	}()
	for {
		changed := n.applied.wait()
		wanted := make(map[string]*statev1.Object)
		n.Read(func(st *domain.State) {
			for _, td := range st.Peers() {
				wanted[td], _ = st.Object("Relationship/" + td)
			}
		})
		for td, f := range running {
			if o := wanted[td]; o == nil || o.GetRevision() != f.revision {
				f.cancel()
				delete(running, td)
			}
		}
		for td, o := range wanted {
			if _, ok := running[td]; ok {
				continue
			}
			ctx, cancel := context.WithCancel(ctx)
			running[td] = follower{o.GetRevision(), cancel}
			fetchers.Go(func() { n.follow(ctx, o.GetRelationship()) })
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// follow keeps the agreed bundle of one domain the newest.
func (n *Node) follow(ctx context.Context, r *statev1.Relationship) {
	log := n.log.With("peer_domain", r.GetTrustDomain())
	for ctx.Err() == nil {
		err := n.followOnce(ctx, r)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			<-ctx.Done() // nothing to fetch from
			return
		}
		log.Error("the bundle of another domain cannot be followed; trying again", "error", err)
		n.foreign.set(r.GetTrustDomain(), server.Fetched{Err: err.Error()})
		if sleep(ctx, 2*time.Second) != nil {
			return
		}
	}
}

func (n *Node) followOnce(ctx context.Context, r *statev1.Relationship) error {
	td, err := ca.ParseTrustDomain(r.GetTrustDomain())
	if err != nil {
		return err
	}
	hold := n.holdForeign()
	var last *statev1.ForeignBundle
	n.Read(func(st *domain.State) { last, _ = st.ForeignBundle(td.Name()) })
	if last == nil && len(r.GetBootstrapBundle()) > 0 {
		// What was given by hand counts from the start, before its endpoint is up.
		if last, err = server.ForeignRecord(td, r.GetBootstrapBundle()); err != nil {
			return err
		}
		if last, err = hold(last); err != nil {
			return err
		}
		if err := n.storeForeign(ctx, last); err != nil {
			return err
		}
	}
	if len(r.GetEndpointUrls()) == 0 {
		return nil
	}
	endpoint := exchange.Endpoint{TrustDomain: td, URLs: r.GetEndpointUrls(), Bundles: server.ForeignBundles{State: n}}
	if r.GetEndpointId() != "" {
		if endpoint.ID, err = spiffeid.FromString(r.GetEndpointId()); err != nil {
			return fmt.Errorf("endpoint id: %w", err)
		}
	}
	return exchange.Follow(ctx, exchange.FollowConfig{
		Endpoint: endpoint,
		Last:     last,
		Hold:     hold,
		Accept: func(ctx context.Context, f *exchange.Fetched) error {
			return n.storeForeign(ctx, f.Record)
		},
		OnStatus: func(s exchange.Status) {
			fetched := server.Fetched{At: s.Succeeded, Err: s.Error}
			if s.Refused != "" {
				fetched.Err = s.Refused
			}
			n.foreign.set(td.Name(), fetched)
		},
		Log: n.log,
	})
}

// holdForeign leaves out of a bundle the keys that belong to another domain, and says so
// once for each sequence.
func (n *Node) holdForeign() func(*statev1.ForeignBundle) (*statev1.ForeignBundle, error) {
	told := false
	var of uint64
	return func(record *statev1.ForeignBundle) (*statev1.ForeignBundle, error) {
		var dropped []string
		var err error
		n.Read(func(st *domain.State) { record, dropped, err = server.WithoutSharedKeys(st, record) })
		if err == nil && len(dropped) > 0 && (!told || of != record.GetSequence()) {
			told, of = true, record.GetSequence()
			n.log.Error("another domain's bundle claims keys that belong to a different domain; they were dropped from it: ask its administrators",
				"peer_domain", record.GetTrustDomain(), "keys", dropped)
		}
		return record, err
	}
}

// storeForeign has a bundle agreed.
func (n *Node) storeForeign(ctx context.Context, record *statev1.ForeignBundle) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	command := &statev1.Command{
		Actor: "CA node " + n.cfg.Name,
		Body: &statev1.Command_StoreForeignBundle{StoreForeignBundle: &statev1.StoreForeignBundle{
			TrustDomain: record.GetTrustDomain(), Jwks: record.GetJwks(), Sequence: record.GetSequence(),
		}},
	}
	outcome, err := n.replica.Load().Propose(ctx, command)
	if err == nil {
		n.audit.Command(command, outcome, nil)
	}
	if err == nil && outcome.Refused != nil {
		err = outcome.Refused
	}
	if err != nil {
		return fmt.Errorf("store the bundle of %s: %w", record.GetTrustDomain(), err)
	}
	n.log.Info("the bundle of another domain is agreed", "peer_domain", record.GetTrustDomain(), "sequence", record.GetSequence())
	return nil
}
