package node

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

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
	own map[string]*statev1.ForeignBundle // accepted while nothing could be agreed, as fetched
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
		whole    bool // bundles are kept as fetched
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
		var whole bool
		n.Read(func(st *domain.State) {
			whole = st.KeepsForeignWhole()
			for _, td := range st.Peers() {
				wanted[td], _ = st.Object("Relationship/" + td)
			}
		})
		for td, f := range running {
			if o := wanted[td]; o == nil || o.GetRevision() != f.revision || f.whole != whole {
				f.cancel()
				delete(running, td)
			}
		}
		for td, o := range wanted {
			if _, ok := running[td]; ok {
				continue
			}
			ctx, cancel := context.WithCancel(ctx)
			running[td] = follower{o.GetRevision(), whole, cancel}
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
	f.use(n, own)
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
			agreed, ok := st.FetchedBundle(td)
			_, related := st.Object("Relationship/" + td)
			return !related || ok && b.GetSequence() <= agreed.GetSequence()
		})
	})
	f.use(n, own)
}

// use takes these in place of those of before. Which of their keys are used follows from them
// and the agreed ones together. Called with mu.
func (f *foreignStatus) use(n *Node, own map[string]*statev1.ForeignBundle) {
	f.own = own
	var usable map[string]*statev1.ForeignBundle
	if len(own) > 0 {
		read := make(map[string]*domain.Foreign, len(own))
		for td, b := range own {
			read[td] = domain.ReadForeign(b)
		}
		n.Read(func(st *domain.State) { usable = st.UsableWith(read) })
	}
	n.feed.HoldForeign(usable)
}

// newest is the last bundle of that domain that this node has accepted, as fetched.
func (f *foreignStatus) newest(st *domain.State, td string) *statev1.ForeignBundle {
	agreed, _ := st.FetchedBundle(td)
	f.mu.Lock()
	defer f.mu.Unlock()
	if own := f.own[td]; own != nil && own.GetSequence() > agreed.GetSequence() {
		return own
	}
	return agreed
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
	var last, agreed *statev1.ForeignBundle
	n.Read(func(st *domain.State) {
		agreed, _ = st.FetchedBundle(td.Name())
		last = n.foreign.newest(st, td.Name())
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
		if last, err = n.holdForeign(last); err != nil {
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
		Hold:     n.holdForeign,
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

// holdForeign is what of a fetched bundle is kept: all of it, for which keys are used is
// found when it is read. Below feature level 5 an older CA node would use all that is kept,
// so only what is used is.
func (n *Node) holdForeign(record *statev1.ForeignBundle) (*statev1.ForeignBundle, error) {
	if size := len(record.GetJwks()); size > domain.MaxForeignBundle {
		return nil, fmt.Errorf("bundle of %s has %d bytes, and more than %d are not kept: its administrators must take keys out", record.GetTrustDomain(), size, domain.MaxForeignBundle)
	}
	record = proto.CloneOf(record)
	td := record.GetTrustDomain()
	read := map[string]*domain.Foreign{td: domain.ReadForeign(record)}
	n.Read(func(st *domain.State) {
		if record.AsFetched = st.KeepsForeignWhole(); !record.AsFetched {
			record = st.UsableWith(read)[td]
		}
	})
	return record, nil
}

// watchDropped says in the log what the status shows: which keys of other domains' bundles
// are not used.
func (n *Node) watchDropped(ctx context.Context) error {
	said := map[string]string{}
	for {
		changed := n.applied.wait()
		n.Read(func(st *domain.State) {
			for _, td := range st.Peers() {
				var keys []string
				for _, d := range st.DroppedKeys(td) {
					keys = append(keys, d.String())
				}
				if text := strings.Join(keys, "; "); text != said[td] {
					if said[td] = text; text != "" {
						n.log.Error("keys of another domain's bundle are not used: ask its administrators", "peer_domain", td, "keys", keys)
					}
				}
			}
		})
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// storeForeign has a bundle agreed.
func (n *Node) storeForeign(ctx context.Context, record *statev1.ForeignBundle) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	command := n.byItself(&statev1.Command{Body: &statev1.Command_StoreForeignBundle{StoreForeignBundle: &statev1.StoreForeignBundle{
		TrustDomain: record.GetTrustDomain(), Jwks: record.GetJwks(), Sequence: record.GetSequence(),
	}}})
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
