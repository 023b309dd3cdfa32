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
	"github.com/entente-mesh/entente/ca/feed"
	"github.com/entente-mesh/entente/ca/local"
	"github.com/entente-mesh/entente/ca/server"
	"github.com/entente-mesh/entente/federation/exchange"
)

// foreignStatus is how following the other domains' bundles goes, at this node.
type foreignStatus struct {
	mu sync.Mutex
	of map[string]server.Fetched
}

func (s *foreignStatus) set(td string, fetched server.Fetched) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.of == nil {
		s.of = make(map[string]server.Fetched)
	}
	s.of[td] = fetched
}

func (s *foreignStatus) all() map[string]server.Fetched {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.of)
}

// following keeps the bundles of other domains the newest: the leader for all, and each node
// for its own subscribers while nothing can be agreed.
type following struct {
	*core
	feed   *feed.Feed
	status foreignStatus

	changing sync.Mutex // what is held, and what the feed shows of it
}

// accept is what becomes of a bundle that passed.
type accept func(context.Context, *statev1.ForeignBundle) error

// keep runs one fetcher for each relationship.
func (f *following) keep(ctx context.Context, take accept) {
	type follower struct {
		revision uint64
		whole    bool // bundles are kept as fetched
		cancel   context.CancelFunc
	}
	running := make(map[string]follower)
	var fetchers sync.WaitGroup
	defer fetchers.Wait()
	defer func() {
		for _, r := range running {
			r.cancel()
		}
	}()
	for {
		changed := f.applied.wait()
		wanted := make(map[string]*statev1.Object)
		var whole bool
		f.Read(func(st *domain.State) {
			whole = st.KeepsForeignWhole()
			for _, td := range st.Peers() {
				wanted[td], _ = st.Object("Relationship/" + td)
			}
		})
		for td, r := range running {
			if o := wanted[td]; o == nil || o.GetRevision() != r.revision || r.whole != whole {
				r.cancel()
				delete(running, td)
			}
		}
		for td, o := range wanted {
			if _, ok := running[td]; ok {
				continue
			}
			ctx, cancel := context.WithCancel(ctx)
			running[td] = follower{o.GetRevision(), whole, cancel}
			fetchers.Go(func() { f.follow(ctx, o.GetRelationship(), take) })
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// run follows the other domains' bundles at this node while nothing can be agreed,
// which else the leader does for all: what passes the same checks counts in this node's
// memory and for its own subscribers (I5, I8). When there is quorum again, the leader
// has what it holds agreed, and fetches; until that is as new, each node keeps its own.
func (f *following) run(ctx context.Context) error {
	for {
		if !f.noQuorumSince(time.Now()).IsZero() {
			alone, stop := context.WithCancel(ctx)
			var following sync.WaitGroup
			following.Go(func() { f.keep(alone, f.holdAlone) })
			for ctx.Err() == nil && !f.noQuorumSince(time.Now()).IsZero() {
				sleep(ctx, lookForQuorum)
			}
			stop()
			following.Wait()
		}
		f.settle()
		if err := sleep(ctx, lookForQuorum); err != nil {
			return err
		}
	}
}

const lookForQuorum = 500 * time.Millisecond

// holdAlone takes a bundle into use here while nothing can be agreed.
func (f *following) holdAlone(_ context.Context, record *statev1.ForeignBundle) error {
	f.change(func(v local.View) local.View { return v.WithForeign(record) })
	f.log.Warn("the bundle of another domain is in use at this node alone, until it can be agreed", "peer_domain", record.GetTrustDomain(), "sequence", record.GetSequence())
	return nil
}

// settle gives up what is agreed by now, or concerns nobody any more.
func (f *following) settle() {
	held := f.local.view()
	if len(held.Foreign()) == 0 {
		return
	}
	var settled []string
	f.Read(func(st *domain.State) { settled = held.Settled(st) })
	f.change(func(v local.View) local.View { return v.WithoutForeign(settled) })
}

// change has another view of what is held count. Which of their keys are used follows from
// the bundles held and the agreed ones together.
func (f *following) change(next func(local.View) local.View) {
	f.changing.Lock()
	defer f.changing.Unlock()
	held := f.local.change(next).Foreign()
	var usable map[string]*statev1.ForeignBundle
	if len(held) > 0 {
		read := make(map[string]*domain.Foreign, len(held))
		for td, b := range held {
			read[td] = domain.ReadForeign(b)
		}
		f.Read(func(st *domain.State) { usable = st.UsableWith(read) })
	}
	f.feed.HoldForeign(usable)
}

// follow keeps the accepted bundle of one domain the newest.
func (f *following) follow(ctx context.Context, r *statev1.Relationship, take accept) {
	log := f.log.With("peer_domain", r.GetTrustDomain())
	for ctx.Err() == nil {
		err := f.followOnce(ctx, r, take)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			<-ctx.Done() // nothing to fetch from
			return
		}
		log.Error("the bundle of another domain cannot be followed; trying again", "error", err)
		f.status.set(r.GetTrustDomain(), server.Fetched{Err: err.Error()})
		if sleep(ctx, 2*time.Second) != nil {
			return
		}
	}
}

func (f *following) followOnce(ctx context.Context, r *statev1.Relationship, take accept) error {
	td, err := ca.ParseTrustDomain(r.GetTrustDomain())
	if err != nil {
		return err
	}
	var last, agreed *statev1.ForeignBundle
	f.Read(func(st *domain.State) {
		agreed, _ = st.FetchedBundle(td.Name())
		last = f.local.view().Newest(st, td.Name())
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
		if last, err = f.hold(last); err != nil {
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
		TrustDomain: td, URLs: r.GetEndpointUrls(), Bundles: server.ForeignBundles{State: f, Feed: f.feed},
		AllowLoopback: f.cfg.Keys.InsecureDev, // which the cluster is for as long as it lives
	}
	if r.GetEndpointId() != "" {
		if endpoint.ID, err = spiffeid.FromString(r.GetEndpointId()); err != nil {
			return fmt.Errorf("endpoint id: %w", err)
		}
	}
	return exchange.Follow(ctx, exchange.FollowConfig{
		Endpoint: endpoint,
		Last:     last,
		Hold:     f.hold,
		Accept: func(ctx context.Context, fetched *exchange.Fetched) error {
			return take(ctx, fetched.Record)
		},
		OnStatus: func(s exchange.Status) {
			fetched := server.Fetched{At: s.Succeeded, Err: s.Error}
			if s.Refused != "" {
				fetched.Err = s.Refused
			}
			f.status.set(td.Name(), fetched)
		},
		Log: f.log,
	})
}

// hold is what of a fetched bundle is kept: all of it, for which keys are used is
// found when it is read. Below feature level 5 an older CA node would use all that is kept,
// so only what is used is.
func (f *following) hold(record *statev1.ForeignBundle) (*statev1.ForeignBundle, error) {
	if size := len(record.GetJwks()); size > domain.MaxForeignBundle {
		return nil, fmt.Errorf("bundle of %s has %d bytes, and more than %d are not kept: its administrators must take keys out", record.GetTrustDomain(), size, domain.MaxForeignBundle)
	}
	record = proto.CloneOf(record)
	td := record.GetTrustDomain()
	read := map[string]*domain.Foreign{td: domain.ReadForeign(record)}
	f.Read(func(st *domain.State) {
		if record.AsFetched = st.KeepsForeignWhole(); !record.AsFetched {
			record = st.UsableWith(read)[td]
		}
	})
	return record, nil
}

// watchDropped says in the log what the status shows: which keys of other domains' bundles
// are not used.
func (f *following) watchDropped(ctx context.Context) error {
	said := map[string]string{}
	for {
		changed := f.applied.wait()
		f.Read(func(st *domain.State) {
			for _, td := range st.Peers() {
				var keys []string
				for _, d := range st.DroppedKeys(td) {
					keys = append(keys, d.String())
				}
				if text := strings.Join(keys, "; "); text != said[td] {
					if said[td] = text; text != "" {
						f.log.Error("keys of another domain's bundle are not used: ask its administrators", "peer_domain", td, "keys", keys)
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

// store has a bundle agreed.
func (f *following) store(ctx context.Context, record *statev1.ForeignBundle) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	command := f.byItself(&statev1.Command{Body: &statev1.Command_StoreForeignBundle{StoreForeignBundle: &statev1.StoreForeignBundle{
		TrustDomain: record.GetTrustDomain(), Jwks: record.GetJwks(), Sequence: record.GetSequence(),
	}}})
	outcome, err := f.replica.Load().Propose(ctx, command)
	if err == nil {
		f.audit.Command(command, outcome, nil)
	}
	if err == nil && outcome.Refused != nil {
		err = outcome.Refused
	}
	if err != nil {
		return fmt.Errorf("store the bundle of %s: %w", record.GetTrustDomain(), err)
	}
	f.log.Info("the bundle of another domain is agreed", "peer_domain", record.GetTrustDomain(), "sequence", record.GetSequence())
	return nil
}
