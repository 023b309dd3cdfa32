package meshagent

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/internal/peer"
	"github.com/entente-mesh/entente/meshagent/nodeattest"
)

const (
	// maxBatch SVIDs are asked for at a time; the client splits them as the door demands.
	maxBatch = 500

	// gather is how long what becomes due after a batch waits for the next, where a taint
	// spreads SVIDs over seconds: a hundred in one call cost half of what they do one by one.
	// Who has none does not wait.
	gather = 200 * time.Millisecond

	// manyAtOnce is after how many SVIDs the garbage of it is worth a collection of its own.
	manyAtOnce = 1000

	retryFirst = 100 * time.Millisecond
	retryMost  = 30 * time.Second
	retryEnded = time.Second // when there is nothing left to serve

	retryChanged = 5 * time.Second // the most, while a CA node holds another record of the entry
)

// halfLife is when a certificate received now is renewed: half of what is left of
// its life, give or take a tenth, so that what was signed together is not renewed
// together. It is reckoned from the receipt, since the begin is backdated.
func halfLife(svid *x509svid.SVID, now time.Time) time.Time {
	return halfTime(svid.Certificates[0].NotAfter, now)
}

func halfTime(end, now time.Time) time.Time {
	left := max(end.Sub(now), 0)
	return now.Add(left*45/100 + time.Duration(rand.Int64N(int64(left/10)+1)))
}

// retryAfter is the pause after the nth failure (from 1), jittered, never more
// than a tenth of what is left of the life of what is to be renewed, and short
// when that has ended.
func retryAfter(n int, left time.Duration) time.Duration {
	most := retryEnded
	if left > 0 {
		most = min(retryMost, max(left/10, retryFirst))
	}
	pause := min(retryFirst<<min(n-1, 16), most)
	return pause/2 + rand.N(pause/2+1)
}

// pauseAfter is the pause after the nth failure: not shorter than the CA asked for, if it
// was busy.
func pauseAfter(err error, n int, left time.Duration) time.Duration {
	pause := retryAfter(n, left)
	if errors.Is(err, client.ErrChanged) {
		pause = min(pause, retryChanged)
	}
	if asked, busy := client.RetryAfter(err); busy {
		pause = max(pause, asked+rand.N(asked/4+1))
	}
	return pause
}

func wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// keepOwn keeps the agent's own SVID: it attests when there is none, renews it at
// half-life, and attests again when it has ended or the CA does not know it any more.
// It closes identified when there is one. Only the refusal of a join token ends it.
func (a *Agent) keepOwn(ctx context.Context, identified chan<- struct{}) error {
	now := a.now()
	due, failures := now, 0
	if own := a.State().own; own != nil {
		due = halfLife(own, now)
		close(identified)
		identified = nil
	}
	for {
		if err := a.waitForOwn(ctx, due, failures == 0); err != nil {
			return err
		}
		before := a.State().own
		svid, err := a.renewOwn(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		now = a.now()
		if err == nil {
			due, failures = halfLife(svid, now), 0
			if before != nil && a.client != nil {
				a.client.Renewed()
			}
			if identified != nil {
				close(identified)
				identified = nil
			}
			continue
		}
		if a.neverAdmitted() && (errors.Is(err, client.ErrDenied) || errors.Is(err, errOtherAgent)) {
			return fmt.Errorf("this host was not admitted: %w", err)
		}
		failures++
		a.metrics.failures.Inc()
		var left time.Duration
		if own := a.State().own; own != nil {
			left = own.Certificates[0].NotAfter.Sub(now)
		}
		if failures == 1 {
			a.log.Warn("no fresh SVID for the agent itself; trying again", "valid_for", max(left, 0).Round(time.Second), "error", err)
		}
		due = now.Add(pauseAfter(err, failures, left))
	}
}

// lookAtClock is how often the agent looks whether its host's clock was set.
const lookAtClock = 10 * time.Second

// lookRefused is how often the agent looks whether CA nodes will not have its SVID.
const lookRefused = time.Second

// waitForOwn waits until the agent's own SVID is to be renewed: when it is due, and,
// with early, when its authority was tainted or CA nodes refuse it.
func (a *Agent) waitForOwn(ctx context.Context, due time.Time, early bool) error {
	timer := time.NewTimer(due.Sub(a.now()))
	defer timer.Stop()
	clock := a.clock()
	look := time.NewTicker(lookRefused)
	defer look.Stop()
	scheduled := false // for a taint
	for {
		state := a.State()
		if early && state.own != nil && a.void(state) {
			return nil
		}
		if early && !scheduled && state.tainted(state.own) {
			scheduled = true
			if pause := spread(state.View.ReissueWithin); pause < due.Sub(a.now()) {
				timer.Reset(pause)
			}
		}
		changed := state.Changed()
		if !early || scheduled {
			changed = nil
		}
		select {
		case <-timer.C:
			return nil
		case <-changed:
		case <-look.C:
			if early && a.refused() {
				return nil
			}
			if clock.set() != 0 && state.own != nil {
				now := a.now()
				timer.Reset(halfLife(state.own, now).Sub(now))
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// clock notices when the host's clock is set, or the host has slept: what is due was
// reckoned by it.
type clock struct {
	now        func() time.Time
	wall, mono time.Time
}

// clockSlack is what nobody has to care for.
const clockSlack = 10 * time.Second

func (a *Agent) clock() *clock {
	return &clock{now: a.now, wall: a.now().Round(0), mono: time.Now()}
}

// set is by how much the clock was moved since the last call; 0: not.
func (c *clock) set() time.Duration {
	wall, mono := c.now().Round(0), time.Now()
	by := wall.Sub(c.wall) - mono.Sub(c.mono)
	c.wall, c.mono = wall, mono
	if by.Abs() < clockSlack {
		return 0
	}
	return by
}

// refused tells whether CA nodes will not have the agent's SVID.
func (a *Agent) refused() bool { return a.client != nil && a.client.Refused() }

// void tells whether nobody accepts the agent's own SVID any more: its authority is out
// of the bundle, or it has ended.
func (a *Agent) void(state *State) bool {
	if state.own == nil || state.Bundle == nil {
		return true
	}
	_, err := peer.Verify(state.own.Certificates, state.Bundle, a.now())
	return err != nil
}

// spread is a moment within d at random: all agents hear of a taint at once, and the CA
// is not to be asked by all of them at once.
func spread(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return rand.N(d)
}

func (a *Agent) neverAdmitted() bool {
	a.diskMu.Lock()
	defer a.diskMu.Unlock()
	return a.known.cluster == nil
}

// renewOwn gets one SVID for the agent and puts it into the state.
func (a *Agent) renewOwn(ctx context.Context) (*x509svid.SVID, error) {
	csr, err := nodeattest.CSR(a.key)
	if err != nil {
		return nil, err
	}
	if !a.void(a.State()) && !a.refused() {
		result := a.signer.SignX509(ctx, []client.SignRequest{{CSR: csr}})[0]
		if result.Err == nil {
			return a.install(result.Certificates, nil)
		}
		if !errors.Is(result.Err, client.ErrDenied) {
			return nil, result.Err
		}
		a.log.Warn("the CA does not renew the agent's SVID; attesting again", "error", result.Err)
	}
	return a.attest(ctx, csr)
}

// attest asks to be admitted: by the key if it was admitted before, else, or when
// the CA does not know the key, by the join token or the host's certificate.
func (a *Agent) attest(ctx context.Context, csr []byte) (*x509svid.SVID, error) {
	var byKey error
	if !a.neverAdmitted() {
		answer, err := client.Attest(ctx, a.clientAs, nodeattest.ByKey(), csr)
		if err == nil {
			return a.install(answer.Certificates, answer)
		}
		if a.token == nil && a.cfg.Attest.X509PoP.Certificate == "" || !errors.Is(err, client.ErrDenied) {
			return nil, err
		}
		byKey = err
	}
	prove, err := a.proof()
	if err != nil {
		return nil, errors.Join(byKey, err)
	}
	answer, err := client.Attest(ctx, a.clientAs, prove, csr)
	if err != nil {
		return nil, errors.Join(byKey, err)
	}
	return a.install(answer.Certificates, answer)
}

// proof is what a host that is not known shows.
func (a *Agent) proof() (func(exporter []byte) (client.Proof, error), error) {
	pop := a.cfg.Attest.X509PoP
	if a.token != nil || pop.Certificate == "" {
		return nodeattest.ByToken(a.token, a.key), nil
	}
	host, err := nodeattest.LoadHostCertificate(pop.Certificate, pop.Key)
	if err != nil {
		return nil, err
	}
	return nodeattest.ByCertificate(host, a.cfg.TrustDomain, a.key), nil
}

// errTainted: a CA node that lags, or lies. What is held is as good.
var errTainted = errors.New("a CA node signed it under an authority that is tainted")

// errOtherAgent: the join token, or the template over certificates, is for another name.
var errOtherAgent = errors.New("the CA admits this host as another agent")

// install verifies a new SVID of the agent's own and takes it into use; answer is
// nil when it was renewed and not attested.
func (a *Agent) install(certificates [][]byte, answer *client.Attestation) (*x509svid.SVID, error) {
	bundle := a.State().Bundle
	if answer != nil {
		attested, err := readBundle(a.cfg.Domain(), answer.Bundle)
		if err != nil {
			return nil, err
		}
		bundle = attested
		if name := answer.Agent.GetName(); name != a.cfg.Name {
			return nil, fmt.Errorf("%w: %q, and this one is %q: change its name, or make a token for it or another template (x509pop.name of the CA nodes)", errOtherAgent, name, a.cfg.Name)
		}
		a.diskMu.Lock()
		cluster := a.cluster()
		a.diskMu.Unlock()
		if cluster != nil && !bytes.Equal(cluster.GetId(), answer.Cluster.GetId()) {
			return nil, fmt.Errorf("the CA answers as cluster %x, this host belongs to %x: to join it, delete %s and attest with a new token",
				answer.Cluster.GetId(), cluster.GetId(), a.cfg.DataDir)
		}
		if err := ca.FollowCluster(cluster, answer.Cluster, a.client.RecoveryKey()); err != nil {
			return nil, fmt.Errorf("the CA node that answers is not believed: %w", err)
		}
	}
	svid, err := verifySVID(a.id, certificates, a.key, bundle, a.now())
	if err == nil && a.State().tainted(svid) {
		err = errTainted
	}
	if err != nil {
		return nil, err
	}
	a.change(func(s *State) *State {
		next := *s
		next.own = svid
		if !next.Ready { // later the bundle of Sync is newer
			next.Bundle = bundle
		}
		return &next
	})
	a.keep(func(k *known) {
		k.Certificates = certificates
		if answer != nil {
			k.Bundle, k.cluster, k.members = answer.Bundle, answer.Cluster, answer.Members
		}
	})
	if answer != nil {
		a.log.Info("attested", "spiffe_id", a.id, "valid_until", svid.Certificates[0].NotAfter)
	}
	return svid, nil
}

// slot is the renewal of one entry's SVID. Its goroutine is keepEntries.
type slot struct {
	entryID  string
	id       spiffeid.ID
	record   *record // of the entry
	heldFor  *record // that of the SVID that is held; nil: none is
	due      time.Time
	failures int
	ends     time.Time // of the SVID that is held; zero: none, or none that anybody accepts
	tainted  any       // the SVID whose renewal was scheduled for a taint
}

// keepEntries keeps an X.509-SVID for every entry of the host, each time with a new key.
func (a *Agent) keepEntries(ctx context.Context) error {
	return a.keepSVIDs(ctx, renewal{
		bundle: func(s *State) any { return [2]any{s.Bundle, s.View.Announced} },
		void: func(s *State, identity *Identity, now time.Time) bool {
			if identity.SVID == nil {
				return false
			}
			return identity.SVID.verify(s.Bundle, now) != nil || identity.SVID.revoked(s.View.Announced) != nil
		},
		tainted: func(s *State, identity *Identity) any {
			if identity.SVID == nil || !s.taintedKey(identity.SVID.under) {
				return nil
			}
			return identity.SVID
		},
		ends: func(identity *Identity) (end time.Time) {
			if identity.SVID != nil {
				end = identity.SVID.NotAfter
			}
			return end
		},
		signedFor: func(identity *Identity) (signedFor *record) {
			if identity.SVID != nil {
				signedFor = identity.SVID.signedFor
			}
			return signedFor
		},
		renew: a.renew,
	})
}

// renewal is how one kind of SVID is kept.
type renewal struct {
	bundle func(*State) any                                       // what its SVIDs are verified with, and what distrusts them; comparable
	void   func(s *State, identity *Identity, now time.Time) bool // the one that is held does not verify any more, or is distrusted
	ends   func(*Identity) time.Time                              // zero: none is held
	renew  func(context.Context, []*slot)

	signedFor func(*Identity) *record // which record of the entry the one that is held is for; nil: none is held

	// tainted is the SVID that is held if it was issued under a TAINTED authority, else nil.
	tainted func(s *State, identity *Identity) any
}

// keepSVIDs keeps an SVID of one kind for every entry of the host: in batches, renewed
// at half-life, tried again with growing pauses.
func (a *Agent) keepSVIDs(ctx context.Context, kind renewal) error {
	slots := map[string]*slot{}
	var bundle any // of the state before: when it has changed, SVIDs may have become void
	burst := 0     // SVIDs that were asked for since memory was last given back
	clock := a.clock()
	var together time.Time // when the next batch is asked for; by the monotonic clock
	for {
		state := a.State()
		now := a.now()
		if by := clock.set(); by != 0 {
			a.log.Warn("the host's clock was set; all SVIDs are looked at again", "offset", by)
			for _, s := range slots {
				s.due = halfTime(s.ends, now) // at once if it has ended, or there is none
			}
		}
		for id := range slots {
			if _, there := state.Identity(id); !there {
				delete(slots, id)
			}
		}
		for _, identity := range state.Identities {
			entry := identity.Entry
			s := slots[entry.GetId()]
			if ends := kind.ends(identity); s == nil && !ends.IsZero() { // of the cache
				s = &slot{entryID: entry.GetId(), id: identity.ID, record: kind.signedFor(identity), heldFor: kind.signedFor(identity), due: halfTime(ends, now), ends: ends}
				slots[entry.GetId()] = s
			}
			if s == nil || s.id != identity.ID || !s.record.is(identity.record) {
				s = &slot{entryID: entry.GetId(), id: identity.ID, record: identity.record, heldFor: kind.signedFor(identity), due: now, ends: kind.ends(identity)}
				slots[entry.GetId()] = s
			}
			if held := kind.tainted(state, identity); held != nil && s.tainted != held {
				s.tainted = held
				if due := now.Add(spread(state.View.ReissueWithin)); due.Before(s.due) {
					s.due = due
				}
			}
			if !s.ends.IsZero() && kind.ends(identity).IsZero() || bundle != kind.bundle(state) && kind.void(state, identity, now) {
				s.due, s.ends = now, time.Time{}
			}
		}
		bundle = kind.bundle(state)

		next := now.Add(time.Hour)
		var due []*slot
		for _, s := range slots {
			if !s.due.After(now) {
				due = append(due, s)
			} else if s.due.Before(next) {
				next = s.due
			}
		}
		none := func(s *slot) bool { return s.ends.IsZero() || s.failures == 0 && !s.record.is(s.heldFor) }
		if pause := time.Until(together); len(due) > 0 && pause > 0 && !slices.ContainsFunc(due, none) {
			next, due = now.Add(pause), nil
		}
		if len(due) > 0 {
			// What ends first is renewed first; what has no SVID at all before that.
			slices.SortFunc(due, func(x, y *slot) int {
				return cmp.Or(x.ends.Compare(y.ends), cmp.Compare(x.entryID, y.entryID))
			})
			due = due[:min(len(due), maxBatch)]
			kind.renew(ctx, due)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			burst += len(due)
			if state.View.ReissueWithin > 0 {
				together = time.Now().Add(gather)
			}
			continue
		}
		if burst >= manyAtOnce && next.Sub(now) > time.Second {
			// What a start or a taint took is as much again as what it leaves, and hours may
			// pass before so much is needed next: the host's workloads get it back.
			debug.FreeOSMemory()
			burst = 0
		}

		timer := time.NewTimer(min(next.Sub(now), lookAtClock))
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-state.Changed():
		case <-timer.C:
		}
		timer.Stop()
	}
}

// newKeys makes n keys, each with the request to certify it. It fails only without
// randomness; nothing can go on then, and it has waited before it says so.
func (a *Agent) newKeys(ctx context.Context, n int) (keys []crypto.Signer, csrs [][]byte, ok bool) {
	for range n {
		key, err := nodeattest.NewKey()
		var csr []byte
		if err == nil {
			csr, err = nodeattest.CSR(key)
		}
		if err != nil {
			a.log.Error("cannot make keys", "error", err)
			wait(ctx, time.Second)
			return nil, nil, false
		}
		keys, csrs = append(keys, key), append(csrs, csr)
	}
	return keys, csrs, true
}

// renew has one SVID signed for each slot and takes those that are good into use.
func (a *Agent) renew(ctx context.Context, slots []*slot) {
	keys, csrs, ok := a.newKeys(ctx, len(slots))
	if !ok {
		return
	}
	requests := make([]client.SignRequest, len(slots))
	for i, s := range slots {
		requests[i] = client.SignRequest{EntryID: s.entryID, Record: s.record.Record, CSR: csrs[i]}
	}
	results := a.signer.SignX509(ctx, requests)
	if ctx.Err() != nil {
		return
	}

	now := a.now()
	state := a.State()
	signed := map[string]*X509SVID{}
	var failed []error
	news := false
	for i, s := range slots {
		svid, err := (*X509SVID)(nil), results[i].Err
		if err == nil {
			svid, err = keptSVID(s.id, s.record, results[i].Certificates, keys[i], state, now)
		}
		if err == nil && state.taintedKey(svid.under) {
			err = errTainted
		}
		if err != nil {
			s.failures++
			s.due = now.Add(pauseAfter(err, s.failures, s.ends.Sub(now)))
			failed = append(failed, fmt.Errorf("%s: %w", s.id, err))
			news = news || s.failures == 1
			continue
		}
		signed[s.entryID] = svid
		s.due, s.failures, s.ends, s.heldFor = halfTime(svid.NotAfter, now), 0, svid.NotAfter, s.record
	}
	if len(signed) > 0 {
		a.change(func(state *State) *State { return state.withSVIDs(signed) })
		a.metrics.signed.Add(float64(len(signed)))
	}
	if len(failed) > 0 {
		a.metrics.failures.Add(float64(len(failed)))
		if news { // once per entry that fails, not with every attempt
			a.log.Warn("SVIDs are not renewed; trying again, and what is held stays in use until it ends",
				"entries", len(failed), "error", failed[0])
		}
	}
}
