package node

import (
	"bytes"
	"cmp"
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
	"github.com/entente-mesh/entente/ca/replica"
	"github.com/entente-mesh/entente/ca/server"
	"github.com/entente-mesh/entente/federation"
	"github.com/entente-mesh/entente/federation/exchange"
)

// foreignStatus is how following the other domains' bundles goes, at this node, and who of
// them is to be fetched at once.
type foreignStatus struct {
	mu       sync.Mutex
	of       map[string]server.Fetched
	attempts map[string]uint64        // by trust domain
	asked    map[string]chan struct{} // closed by the next one
	changed  chan struct{}            // closed by the next attempt; nil: nobody waits
}

func (s *foreignStatus) set(td string, fetched server.Fetched) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.of == nil {
		s.of, s.attempts = make(map[string]server.Fetched), make(map[string]uint64)
	}
	s.of[td] = fetched
	s.attempts[td]++
	if s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
}

func (s *foreignStatus) all() map[string]server.Fetched {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.of)
}

// since tells whether there was an attempt after that many, and what to wait for if not.
func (s *foreignStatus) since(td string, attempts uint64) (there bool, changed <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.attempts[td] > attempts {
		return true, nil
	}
	if s.changed == nil {
		s.changed = make(chan struct{})
	}
	return false, s.changed
}

// ask has a domain's bundle fetched at once, and returns how many attempts there were before.
func (s *foreignStatus) ask(td string) (attempts uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if asked := s.asked[td]; asked != nil {
		close(asked)
		delete(s.asked, td)
	}
	return s.attempts[td]
}

// refresh is a channel that is closed when a domain's bundle is to be fetched at once.
func (s *foreignStatus) refresh(td string) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.asked == nil {
		s.asked = make(map[string]chan struct{})
	}
	if s.asked[td] == nil {
		s.asked[td] = make(chan struct{})
	}
	return s.asked[td]
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
	// basis is what a follower rests on: another one takes its place when any of it changes.
	type basis struct {
		revision uint64 // of the relationship
		whole    bool   // bundles are kept as fetched
		awaits   bool   // the relationship gives another bundle by hand
		reset    string // hash of the bundle that may follow
	}
	type follower struct {
		basis
		cancel context.CancelFunc
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
		rests := make(map[string]basis)
		f.Read(func(st *domain.State) {
			for _, td := range st.Peers() {
				wanted[td], _ = st.Object("Relationship/" + td)
				held, _ := st.FetchedBundle(td)
				rests[td] = basis{wanted[td].GetRevision(), st.KeepsForeignWhole(), held.GetAwaitsGiven(), held.GetResetSha256()}
			}
		})
		for td, r := range running {
			if now, ok := rests[td]; !ok || now != r.basis {
				r.cancel()
				delete(running, td)
			}
		}
		for td, o := range wanted {
			if _, ok := running[td]; ok {
				continue
			}
			ctx, cancel := context.WithCancel(ctx)
			running[td] = follower{rests[td], cancel}
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
		err := f.untilAsked(ctx, r, take)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			continue
		}
		log.Error("the bundle of another domain cannot be followed; trying again", "error", err)
		f.status.set(r.GetTrustDomain(), server.Fetched{Err: err.Error()})
		if sleep(ctx, 2*time.Second) != nil {
			return
		}
	}
}

// untilAsked follows a bundle until somebody wants it fetched at once: whoever begins fetches.
func (f *following) untilAsked(ctx context.Context, r *statev1.Relationship, take accept) error {
	asked := f.status.refresh(r.GetTrustDomain())
	until, stop := context.WithCancel(ctx)
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- f.followOnce(until, r, take) }()
	select {
	case err := <-ended:
		if err != nil {
			return err
		}
		select { // nothing to fetch from
		case <-asked:
		case <-ctx.Done():
		}
	case <-asked:
		stop()
		<-ended
	}
	return nil
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
	last, notGiven, err := f.takeGiven(ctx, td, r, last, take)
	if err != nil {
		return err
	}
	if len(r.GetEndpointUrls()) == 0 {
		f.status.set(td.Name(), server.Fetched{Err: notGiven})
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
			// A refusal is an alarm: it stays although the server answers.
			fetched := server.Fetched{At: s.Succeeded, Err: cmp.Or(s.Refused, s.Error, notGiven)}
			f.status.set(td.Name(), fetched)
		},
		Log: f.log,
	})
}

// takeGiven takes the bundle that a relationship gives by hand where it counts: as the first
// one, before its endpoint is up; when it was changed, until the next refresh; and as the one
// that an operator lets follow. It returns the bundle that is held then, and why the given one
// is not, if it should be.
func (f *following) takeGiven(ctx context.Context, td spiffeid.TrustDomain, r *statev1.Relationship, last *statev1.ForeignBundle, take accept) (held *statev1.ForeignBundle, why string, err error) {
	if len(r.GetBootstrapBundle()) == 0 || last != nil && !last.GetAwaitsGiven() && last.GetResetSha256() == "" {
		return last, "", nil
	}
	given, err := server.ForeignRecord(td, r.GetBootstrapBundle())
	if err != nil {
		return nil, "", err
	}
	if given, err = f.hold(given); err != nil {
		return nil, "", err
	}
	f.Read(func(st *domain.State) {
		given.Given = st.TakesGiven()
		if now, _ := st.Object("Relationship/" + td.Name()); bytes.Equal(now.GetRelationship().GetBootstrapBundle(), r.GetBootstrapBundle()) {
			given.Revision = now.GetRevision()
		}
	})
	if last != nil && !last.GetAwaitsGiven() && federation.BundleHash(given.GetJwks()) != last.GetResetSha256() {
		return last, "", nil
	}
	if err := federation.RefusedBundle(last, given); err != nil {
		why := fmt.Sprintf("the bundle that the Relationship gives by hand is not used: %v", err)
		f.log.Warn("bundle given by hand refused", "peer_domain", td.Name(), "error", err)
		return last, why, nil
	}
	if err := take(ctx, given); err != nil {
		return nil, "", err
	}
	return given, "", nil
}

// Followed is how following other domains' bundles goes at the node that does it: this one, if
// it leads or nothing can be agreed, else the leader when it is asked. With refresh, they are
// fetched first: that of one domain, or of all.
func (f *following) Followed(ctx context.Context, refresh bool, td string, ask bool) (map[string]server.Fetched, error) {
	ctx, cancel := context.WithTimeout(ctx, refreshPatience)
	defer cancel()
	if f.replica.Load().IsLeader() || !f.noQuorumSince(time.Now()).IsZero() {
		if refresh {
			if err := f.refresh(ctx, td); err != nil {
				return nil, err
			}
		}
		return f.status.all(), nil
	}
	if !ask {
		return nil, server.ErrNotLeader
	}
	leader := f.leader()
	if leader == nil {
		return nil, replica.ErrNoQuorum
	}
	return f.peers.Followed(ctx, leader, refresh, td)
}

// refreshPatience is how long a refresh may take: longer than one attempt at a few URLs.
const refreshPatience = 45 * time.Second

// refresh has bundles fetched at once, and waits until that was tried.
func (f *following) refresh(ctx context.Context, td string) error {
	domains := []string{td}
	if td == "" {
		f.Read(func(st *domain.State) { domains = st.Peers() })
	}
	before := make(map[string]uint64, len(domains))
	for _, td := range domains {
		before[td] = f.status.ask(td)
	}
	for _, td := range domains {
		for {
			tried, changed := f.status.since(td, before[td])
			if tried {
				break
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return fmt.Errorf("the bundle endpoint of %s has not answered within %v; the fetch goes on, and entente ca status shows how it ended", td, refreshPatience)
			}
		}
	}
	return nil
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
	// Its follower ends when it is agreed, and the audit log is still to be told.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	body := &statev1.StoreForeignBundle{TrustDomain: record.GetTrustDomain(), Jwks: record.GetJwks(), Sequence: record.GetSequence()}
	if record.GetGiven() {
		body.Given, body.Relationship = true, record.GetRevision()
	}
	command := f.byItself(&statev1.Command{Body: &statev1.Command_StoreForeignBundle{StoreForeignBundle: body}})
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
