package exchange

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/federation"
	"github.com/entente-mesh/entente/federation/bundle"
)

const (
	defaultHint = 5 * time.Minute // of a bundle without a refresh hint (Federation 4.1)

	// A server that does not wait is asked four times within its refresh hint: a key must not be used before its bundle could
	// be fetched, so the hint is the longest that a change may stay unknown, not a pace.
	shortestPoll = 5 * time.Second
	longestPoll  = 5 * time.Minute

	// betweenRequests is the least time from one request to the next.
	betweenRequests = time.Second

	firstBackoff    = time.Second
	maxBackoff      = time.Minute
	maxStoreBackoff = 5 * time.Second // our own store is soon well again, and the peer is not bothered more for it
)

// FollowConfig says which bundle to follow and whom to tell.
type FollowConfig struct {
	Endpoint

	// Last is the bundle accepted before, nil if none: nothing older is accepted (I8). After an operator's reset, follow anew.
	Last *statev1.ForeignBundle
	// Bootstrap is the first bundle, given by hand, as a SPIFFE bundle; it counts while there is no Last. It verifies the
	// server of a self-serving endpoint, and nothing older is accepted.
	Bootstrap []byte

	// Hold says what of a bundle its follower holds, or why it holds none; nil: all. Last is such a part, so what is fetched
	// is compared with it as a part too.
	Hold func(*statev1.ForeignBundle) (*statev1.ForeignBundle, error)
	// Accept is given each new bundle that passed, one at a time. If it fails, the bundle is not accepted and is tried again.
	Accept func(context.Context, *Fetched) error
	// OnStatus is told after each attempt; nil: nobody is. It must be quick.
	OnStatus func(Status)
	Log      *slog.Logger // nil: silent
}

// Status is how following a bundle goes.
type Status struct {
	TrustDomain spiffeid.TrustDomain
	URL         string    // asked last
	Sequence    uint64    // of the accepted bundle
	Succeeded   time.Time // the last good answer, changed or not; zero: none yet
	Failures    int       // in a row
	Error       string    // of the last attempt; empty: it succeeded
	// Refused is an alarm: a bundle that went back or contradicts the accepted one, and when it was last seen. It stays until
	// a newer bundle is accepted.
	Refused   string
	RefusedAt time.Time
}

// Follow keeps following a bundle until ctx is done and returns ctx.Err(), or at once an error if it cannot begin. It stays with
// a URL that works and goes on to the next when one fails; when all have failed it backs off.
func Follow(ctx context.Context, config FollowConfig) error {
	f, err := newFollower(config)
	if err != nil {
		return err
	}
	for {
		began := time.Now()
		pause := f.attempt(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		// Neither a server that answers at once though asked to wait, nor one whose bundle changes each time, may drive us.
		pause = max(pause, betweenRequests-time.Since(began))
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-timer.C:
		}
	}
}

// follower is owned by the goroutine of Follow.
type follower struct {
	FollowConfig
	client *client
	own    ownBundle // what verifies a self-serving endpoint

	last      *statev1.ForeignBundle // accepted; or the bootstrap bundle
	bootstrap bool                   // last is the bootstrap bundle, which nobody has been given
	hint      time.Duration

	url     int           // in URLs: the one that worked, or is to be tried next
	tag     string        // of last at that URL; empty: ask without condition
	waits   bool          // that server holds requests back
	life    time.Duration // what was left of that server's certificate's
	backoff time.Duration
	status  Status
}

func newFollower(config FollowConfig) (*follower, error) {
	f := &follower{FollowConfig: config, status: Status{TrustDomain: config.TrustDomain}}
	if err := f.Endpoint.check(); err != nil {
		return nil, err
	}
	if f.Accept == nil {
		return nil, errors.New("following a bundle: nobody accepts it")
	}
	if f.Log == nil {
		f.Log = slog.New(slog.DiscardHandler)
	}
	f.Log = f.Log.With("trust_domain", f.TrustDomain.Name())

	var known *bundle.Bundle
	var err error
	switch {
	case f.Last != nil:
		if known, _, err = bundle.Parse(f.TrustDomain, f.Last.GetJwks()); err != nil {
			return nil, fmt.Errorf("following a bundle: the one accepted before: %w", err)
		}
	case len(f.Bootstrap) > 0:
		if known, _, err = bundle.Parse(f.TrustDomain, f.Bootstrap); err != nil {
			return nil, fmt.Errorf("following a bundle: the bootstrap bundle: %w", err)
		}
		f.bootstrap = true
	}
	if known != nil {
		// Written anew, since an older release of ours may have written it in another way.
		if f.last, err = recordOf(known); err != nil {
			return nil, fmt.Errorf("following a bundle: %w", err)
		}
		f.last.AsFetched, f.last.Given, f.last.ResetSha256 = f.Last.GetAsFetched(), f.Last.GetGiven(), f.Last.GetResetSha256()
		f.own.Store(known.X509Bundle())
		f.status.Sequence = known.Sequence
	}
	if !f.ID.IsZero() && f.Bundles == nil {
		if !f.ID.MemberOf(f.TrustDomain) {
			return nil, fmt.Errorf("bundle endpoint of %s: it is served by %s, and no bundle of %s is given to verify that with", f.TrustDomain, f.ID, f.ID.TrustDomain())
		}
		if known == nil {
			return nil, fmt.Errorf("bundle endpoint of %s: a first bundle is needed to verify %s with: give it by hand", f.TrustDomain, f.ID)
		}
		f.Bundles = &f.own
	}
	f.client = f.Endpoint.client()
	return f, nil
}

// ownBundle is the newest accepted bundle of the followed domain.
type ownBundle struct {
	atomic.Pointer[x509bundle.Bundle]
}

func (o *ownBundle) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	b := o.Load()
	if b == nil || b.TrustDomain() != td {
		return nil, fmt.Errorf("no bundle of %s is held", td)
	}
	return b, nil
}

// attempt asks one URL and returns how long to pause before the next attempt.
func (f *follower) attempt(ctx context.Context) time.Duration {
	u, conditional := f.URLs[f.url], f.tag != ""
	f.status.URL = u
	got, err := f.client.get(ctx, u, f.tag, f.wait())
	if ctx.Err() != nil {
		return 0
	}
	otherURL := true
	if err == nil && got.Fetched != nil {
		otherURL, err = f.judge(ctx, got.Fetched)
	}
	if ctx.Err() != nil {
		return 0
	}
	if err != nil {
		return f.failed(err, otherURL)
	}
	f.tag, f.waits, f.life = got.tag, got.waits, got.life
	f.backoff = 0
	f.status.Succeeded, f.status.Failures, f.status.Error = time.Now(), 0, ""
	f.tell()
	if f.waits || !conditional && f.tag != "" {
		return 0 // ask again at once, to be answered when there is news; the first time, to find out whether the server does so
	}
	return pollInterval(f.hint)
}

// pollInterval is how long to wait before a server that does not hold requests back is asked again.
func pollInterval(hint time.Duration) time.Duration {
	if hint <= 0 {
		hint = defaultHint
	}
	interval := min(max(hint/4, shortestPoll), longestPoll)
	return max(interval-jitter(interval/10), shortestPoll)
}

// wait is how long the server may hold the next request back: so that its certificate, which may have passed half of its life at
// the handshake, has not ended when the answer comes.
func (f *follower) wait() time.Duration {
	if f.tag == "" {
		return 0
	}
	return min(MaxWait, f.life/3).Truncate(time.Second)
}

// judge applies the sequence rule, and hands on what is new. otherURL says whether a failure may be the URL's fault.
func (f *follower) judge(ctx context.Context, got *Fetched) (otherURL bool, err error) {
	f.hint = got.Bundle.RefreshHint
	if f.Hold != nil {
		if got.Record, err = f.Hold(got.Record); err != nil {
			return true, err
		}
	}
	verdict := federation.AcceptBundle(f.last, got.Record)
	if f.bootstrap && (verdict == federation.Unchanged || verdict == federation.Conflicting) {
		verdict = federation.Accepted // what was given by hand is overridden by the first refresh (Federation 4.2)
	}
	log := f.Log.With("url", got.URL, "server_key", got.ServerKey, "sequence", got.Record.GetSequence())
	switch verdict {
	case federation.Accepted:
	case federation.Unchanged:
		log.Debug("bundle fetched: unchanged")
		return false, nil
	default:
		refused := fmt.Errorf("bundle of %s from %s refused: %w", f.TrustDomain, got.URL, federation.RefusedBundle(f.last, got.Record))
		f.status.Refused, f.status.RefusedAt = refused.Error(), time.Now()
		return true, refused
	}
	if err := f.Accept(ctx, got); err != nil {
		return false, fmt.Errorf("bundle of %s with sequence %d is not stored: %w", f.TrustDomain, got.Record.GetSequence(), err)
	}
	f.last, f.bootstrap = got.Record, false
	f.own.Store(got.Bundle.X509Bundle())
	f.status.Sequence, f.status.Refused, f.status.RefusedAt = got.Record.GetSequence(), "", time.Time{}
	log.Info("bundle accepted", "x509_authorities", len(got.Bundle.X509), "skipped", len(got.Skipped))
	for _, skipped := range got.Skipped {
		log.Warn("part of a bundle does not count", "reason", skipped.String())
	}
	return false, nil
}

// failed notes a failure. If another URL may do better, the next is tried at once, until all have had their turn.
func (f *follower) failed(err error, otherURL bool) time.Duration {
	f.status.Failures++
	f.status.Error = err.Error()
	f.Log.Warn("following a bundle failed", "url", f.status.URL, "error", err.Error(), "failures", f.status.Failures)
	f.tell()
	f.tag, f.waits = "", false
	if otherURL {
		f.url = (f.url + 1) % len(f.URLs)
		if f.status.Failures%len(f.URLs) != 0 {
			return 0
		}
	}
	most := maxBackoff
	if !otherURL {
		most = maxStoreBackoff
	}
	f.backoff = min(max(2*f.backoff, firstBackoff), most)
	return f.backoff/2 + jitter(f.backoff/2)
}

func (f *follower) tell() {
	if f.OnStatus != nil {
		f.OnStatus(f.status)
	}
}

func jitter(most time.Duration) time.Duration {
	return time.Duration(rand.Int64N(int64(most) + 1))
}
