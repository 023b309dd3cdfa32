package meshagent

import (
	"cmp"
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/internal/daemon"
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

// lookAtClock is how often the agent looks whether its host's clock was set.
const lookAtClock = 10 * time.Second

// clock notices when the host's clock is set, or the host has slept: what is due was
// reckoned by it.
type clock struct {
	now        func() time.Time
	wall, mono time.Time
}

// clockSlack is what nobody has to care for.
const clockSlack = 10 * time.Second

func newClock(now func() time.Time) *clock {
	return &clock{now: now, wall: now().Round(0), mono: time.Now()}
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

// spread is a moment within d at random: all agents hear of a taint at once, and the CA
// is not to be asked by all of them at once.
func spread(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return rand.N(d)
}

// errTainted: a CA node that lags, or lies. What is held is as good.
var errTainted = errors.New("a CA node signed it under an authority that is tainted")

// renewer keeps the SVIDs of the host's entries. Its fields do not change; the SVIDs are in
// the store.
type renewer struct {
	log     *slog.Logger
	now     func() time.Time // time.Now, but in tests
	store   *store
	signer  signer
	metrics *metrics
}

// run keeps the X.509-SVIDs, with wit the WIT-SVIDs too, and drops what has ended.
func (r *renewer) run(ctx context.Context, wit bool) error {
	group := daemon.NewGroup(ctx)
	group.Go("SVIDs", r.keepX509)
	group.Go("expiry", r.dropEnded)
	if wit {
		group.Go("WIT-SVIDs", r.keepWITs)
	}
	return group.Wait()
}

// slot is the renewal of one entry's SVID. It belongs to the goroutine of keep.
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

// keepX509 keeps an X.509-SVID for every entry of the host, each time with a new key.
func (r *renewer) keepX509(ctx context.Context) error {
	return r.keep(ctx, renewal{
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
		renew: r.renewX509,
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

// keep keeps an SVID of one kind for every entry of the host: in batches, renewed at
// half-life, tried again with growing pauses.
func (r *renewer) keep(ctx context.Context, kind renewal) error {
	schedule := schedule{kind: kind, slots: map[string]*slot{}}
	burst := 0 // SVIDs that were asked for since memory was last given back
	clock := newClock(r.now)
	var together time.Time // when the next batch is asked for; by the monotonic clock
	for {
		state := r.store.State()
		now := r.now()
		if by := clock.set(); by != 0 {
			r.log.Warn("the host's clock was set; all SVIDs are looked at again", "offset", by)
			schedule.reckon(now)
		}
		schedule.follow(state, now)
		due, next := schedule.due(now, time.Until(together))
		if len(due) > 0 {
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

// schedule says when the SVIDs of one kind are renewed. It does no I/O, and belongs to one
// goroutine.
type schedule struct {
	kind   renewal
	slots  map[string]*slot // by entry id
	bundle any              // of the state before: when it has changed, SVIDs may have become void
}

// reckon sets anew when each SVID is due: at once if it has ended, or there is none.
func (s *schedule) reckon(now time.Time) {
	for _, slot := range s.slots {
		slot.due = halfTime(slot.ends, now)
	}
}

// follow takes in a newer state: entries that came, went or changed, and SVIDs that ended, or
// that will soon be accepted no more.
func (s *schedule) follow(state *State, now time.Time) {
	for id := range s.slots {
		if _, there := state.Identity(id); !there {
			delete(s.slots, id)
		}
	}
	bundle := s.kind.bundle(state)
	for _, identity := range state.Identities {
		slot := s.slotOf(identity, now)
		if held := s.kind.tainted(state, identity); held != nil && slot.tainted != held {
			slot.tainted = held
			if due := now.Add(spread(state.View.ReissueWithin)); due.Before(slot.due) {
				slot.due = due
			}
		}
		if !slot.ends.IsZero() && s.kind.ends(identity).IsZero() || s.bundle != bundle && s.kind.void(state, identity, now) {
			slot.due, slot.ends = now, time.Time{}
		}
	}
	s.bundle = bundle
}

// slotOf is the slot of an identity: another one, due at once, when its record has changed.
func (s *schedule) slotOf(identity *Identity, now time.Time) *slot {
	id := identity.Entry.GetId()
	current, ends, heldFor := s.slots[id], s.kind.ends(identity), s.kind.signedFor(identity)
	if current == nil && !ends.IsZero() { // of the cache
		current = &slot{entryID: id, id: identity.ID, record: heldFor, heldFor: heldFor, due: halfTime(ends, now), ends: ends}
	}
	if current == nil || current.id != identity.ID || !current.record.is(identity.record) {
		current = &slot{entryID: id, id: identity.ID, record: identity.record, heldFor: heldFor, due: now, ends: ends}
	}
	s.slots[id] = current
	return current
}

// due is the next batch to be asked for, or, when there is none, when to look again. Unless
// one has no SVID, or none for its record yet, all of them wait for as long as pause says.
func (s *schedule) due(now time.Time, pause time.Duration) (due []*slot, next time.Time) {
	next = now.Add(time.Hour)
	for _, slot := range s.slots {
		if !slot.due.After(now) {
			due = append(due, slot)
		} else if slot.due.Before(next) {
			next = slot.due
		}
	}
	lacks := func(s *slot) bool { return s.ends.IsZero() || s.failures == 0 && !s.record.is(s.heldFor) }
	if len(due) > 0 && pause > 0 && !slices.ContainsFunc(due, lacks) {
		return nil, now.Add(pause)
	}
	// What ends first is renewed first; what has no SVID at all before that.
	slices.SortFunc(due, func(x, y *slot) int {
		return cmp.Or(x.ends.Compare(y.ends), cmp.Compare(x.entryID, y.entryID))
	})
	return due[:min(len(due), maxBatch)], next
}

// newKeys makes n keys, each with the request to certify it. It fails only without
// randomness; nothing can go on then, and it has waited before it says so.
func (r *renewer) newKeys(ctx context.Context, n int) (keys []crypto.Signer, csrs [][]byte, ok bool) {
	for range n {
		key, err := nodeattest.NewKey()
		var csr []byte
		if err == nil {
			csr, err = nodeattest.CSR(key)
		}
		if err != nil {
			r.log.Error("cannot make keys", "error", err)
			wait(ctx, time.Second)
			return nil, nil, false
		}
		keys, csrs = append(keys, key), append(csrs, csr)
	}
	return keys, csrs, true
}

// renewX509 has one SVID signed for each slot and takes those that are good into use.
func (r *renewer) renewX509(ctx context.Context, slots []*slot) {
	keys, csrs, ok := r.newKeys(ctx, len(slots))
	if !ok {
		return
	}
	requests := make([]client.SignRequest, len(slots))
	for i, s := range slots {
		requests[i] = client.SignRequest{EntryID: s.entryID, Record: s.record.Record, CSR: csrs[i]}
	}
	results := r.signer.SignX509(ctx, requests)
	if ctx.Err() != nil {
		return
	}

	now := r.now()
	state := r.store.State()
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
		r.store.change(func(state *State) *State { return state.withSVIDs(signed) })
		r.metrics.signed.Add(float64(len(signed)))
	}
	if len(failed) > 0 {
		r.metrics.failures.Add(float64(len(failed)))
		if news { // once per entry that fails, not with every attempt
			r.log.Warn("SVIDs are not renewed; trying again, and what is held stays in use until it ends",
				"entries", len(failed), "error", failed[0])
		}
	}
}
