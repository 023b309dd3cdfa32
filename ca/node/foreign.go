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
	mu  sync.Mutex
	of  map[string]server.Fetched
	own map[string]*statev1.ForeignBundle // accepted while nothing could be agreed
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

// accept is what becomes of a bundle that passed.
type accept func(context.Context, *statev1.ForeignBundle) error

// keepFollowing runs one fetcher for each relationship.
func (n *Node) keepFollowing(ctx context.Context, take accept) {
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
			fetchers.Go(func() { n.follow(ctx, o.GetRelationship(), take) })
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// runForeign follows the other domains' bundles at this node while nothing can be agreed,
// which else the leader does for all: what passes the same checks counts in this node's
// memory and for its own subscribers (I5, I8). When there is quorum again, the leader
// has what it holds agreed, and fetches; until that is as new, each node keeps its own.
func (n *Node) runForeign(ctx context.Context) error {
	for {
		if !n.noQuorumSince(time.Now()).IsZero() {
			alone, stop := context.WithCancel(ctx)
			var following sync.WaitGroup
			following.Go(func() { n.keepFollowing(alone, n.holdForeignAlone) })
			for ctx.Err() == nil && !n.noQuorumSince(time.Now()).IsZero() {
				sleep(ctx, lookForQuorum)
			}
			stop()
			following.Wait()
		}
		n.foreign.settle(n)
		if err := sleep(ctx, lookForQuorum); err != nil {
			return err
		}
	}
}

const lookForQuorum = 500 * time.Millisecond

// holdForeignAlone takes a bundle into use here while nothing can be agreed.
func (n *Node) holdForeignAlone(_ context.Context, record *statev1.ForeignBundle) error {
	n.foreign.hold(n, record)
	n.log.Warn("the bundle of another domain is in use at this node alone, until it can be agreed", "peer_domain", record.GetTrustDomain(), "sequence", record.GetSequence())
	return nil
}

// hold takes a bundle for this node's own; it is newer than all before, its follower saw
// to that.
func (f *foreignStatus) hold(n *Node, record *statev1.ForeignBundle) {
	f.mu.Lock()
	defer f.mu.Unlock()
	own := maps.Clone(f.own)
	if own == nil {
		own = make(map[string]*statev1.ForeignBundle)
	}
	own[record.GetTrustDomain()] = record
	f.own = own
	n.feed.HoldForeign(own)
}

// settle gives up what is agreed by now, or concerns nobody any more.
func (f *foreignStatus) settle(n *Node) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.own) == 0 {
		return
	}
	own := maps.Clone(f.own)
	n.Read(func(st *domain.State) {
		maps.DeleteFunc(own, func(td string, b *statev1.ForeignBundle) bool {
			newest, _ := n.feed.ForeignBundle(st, td)
			return newest != b
		})
	})
	f.own = own
	n.feed.HoldForeign(own)
}

// follow keeps the accepted bundle of one domain the newest.
func (n *Node) follow(ctx context.Context, r *statev1.Relationship, take accept) {
	log := n.log.With("peer_domain", r.GetTrustDomain())
	for ctx.Err() == nil {
		err := n.followOnce(ctx, r, take)
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

func (n *Node) followOnce(ctx context.Context, r *statev1.Relationship, take accept) error {
	td, err := ca.ParseTrustDomain(r.GetTrustDomain())
	if err != nil {
		return err
	}
	hold := n.holdForeign()
	var last, agreed *statev1.ForeignBundle
	n.Read(func(st *domain.State) {
		agreed, _ = st.ForeignBundle(td.Name())
		last, _ = n.feed.ForeignBundle(st, td.Name())
	})
	if last != agreed { // this node's own, from before there was quorum
		if err := take(ctx, last); err != nil {
			return err
		}
	}
	if last == nil && len(r.GetBootstrapBundle()) > 0 {
		// What was given by hand counts from the start, before its endpoint is up.
		if last, err = server.ForeignRecord(td, r.GetBootstrapBundle()); err != nil {
			return err
		}
		if last, err = hold(last); err != nil {
			return err
		}
		if err := take(ctx, last); err != nil {
			return err
		}
	}
	if len(r.GetEndpointUrls()) == 0 {
		return nil
	}
	endpoint := exchange.Endpoint{
		TrustDomain: td, URLs: r.GetEndpointUrls(), Bundles: server.ForeignBundles{State: n, Feed: n.feed},
		AllowLoopback: n.cfg.Keys.InsecureDev, // which the cluster is for as long as it lives
	}
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
			return take(ctx, f.Record)
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
