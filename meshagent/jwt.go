package meshagent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/internal/jwtsvid"
	"github.com/entente-mesh/entente/internal/secret"
)

// Bounds of the JWT-SVIDs that are held or asked for, so that one workload cannot
// starve another, nor all of them the CA.
const (
	maxJWTsPerEntry    = 1000
	maxJWTs            = 20_000
	maxPendingPerEntry = 64
	maxPending         = 1024

	jwtBatch    = 100
	jwtCallers  = 4                      // batches under way at once: what waits meanwhile becomes the next one
	jwtPatience = 100 * time.Millisecond // for a fresh token, while the one that is held is still good
	jwtMargin   = 500 * time.Millisecond // a token is not handed out shorter than this before its end
	jwtSweep    = time.Minute
)

var (
	// ErrDenied: the CA has no such entry for this host (any more).
	ErrDenied = client.ErrDenied
	// ErrBusy: too many tokens are being asked for; RetryAfter says when to come back.
	ErrBusy = errors.New("too many JWT-SVIDs are being signed for this workload or host")
)

// CheckAudience refuses an audience that no JWT-SVID may have.
func CheckAudience(audience []string) error { return ca.CheckAudience(audience) }

// RetryAfter is when to come back after an error that says that the agent or the CA is
// busy.
func RetryAfter(err error) (wait time.Duration, busy bool) {
	if errors.Is(err, ErrBusy) {
		return 250 * time.Millisecond, true
	}
	return client.RetryAfter(err)
}

// jwts are the JWT-SVIDs that workloads of this host asked for, by entry and audience
// set. A token is renewed when it is asked for after half of its life.
type jwts struct {
	log     *slog.Logger
	store   *store
	signer  signer
	metrics *metrics
	queue   chan *heldJWT

	mu      sync.Mutex
	held    map[string]map[string]*heldJWT // by entry id, then audiences
	count   int
	pending int
}

func newJWTs(log *slog.Logger, store *store, signer signer, metrics *metrics) *jwts {
	return &jwts{log: log, store: store, signer: signer, metrics: metrics, queue: make(chan *heldJWT, maxPending), held: map[string]map[string]*heldJWT{}}
}

// heldJWT is one of them. Guarded by jwts.mu but for what never changes.
type heldJWT struct {
	entryID  string
	id       spiffeid.ID
	record   *record // of the entry
	audience []string
	key      string // audience as one text

	token   secret.Text
	signer  string // key id of the authority
	origin  ca.Origin
	expires time.Time
	half    time.Time // when it is to be renewed
	used    time.Time
	pending chan struct{} // closed when the CA has answered; nil: nobody asks it

	failures int
	err      error     // of the last attempt
	retry    time.Time // not asked again before
}

// audienceKey makes a set of the list, which names it.
func audienceKey(audience []string) (set []string, key string) {
	set = slices.Compact(slices.Sorted(slices.Values(audience)))
	return set, strings.Join(set, "\x00") // no audience holds one
}

// FetchJWT returns a JWT-SVID of an identity for a set of audiences (CheckAudience tells
// which may be asked for), from memory or newly signed, and when to ask for a fresher
// one. A held one stays in use until its end while the CA cannot be reached. It waits
// for the CA until ctx ends.
func (j *jwts) FetchJWT(ctx context.Context, identity *Identity, audience []string) (token string, renew time.Time, _ error) {
	if err := CheckAudience(audience); err != nil {
		return "", time.Time{}, err
	}
	set, key := audienceKey(audience)
	for range 4 { // a token that has ended when it arrives is asked for no more often
		token, renew, pending, err := j.get(identity, set, key, j.store.State(), time.Now())
		if errors.Is(err, client.ErrChanged) {
			if identity, err = j.changed(ctx, identity, err); err == nil {
				continue
			}
		}
		switch {
		case err != nil:
			return "", time.Time{}, fmt.Errorf("JWT-SVID of %s: %w", identity.ID, err)
		case pending == nil:
			return token, renew, nil
		case token != "":
			// Somebody is renewing it: worth a moment, and no more.
			patience := time.NewTimer(jwtPatience)
			defer patience.Stop()
			select {
			case <-pending:
			case <-patience.C:
				return token, renew, nil
			case <-ctx.Done():
				return token, renew, nil
			}
		default:
			select {
			case <-pending:
			case <-ctx.Done():
				return "", time.Time{}, ctx.Err()
			}
		}
	}
	return "", time.Time{}, fmt.Errorf("JWT-SVID of %s: what the CA signs has ended when it arrives: compare the clocks of this host and the CA nodes", identity.ID)
}

// changed waits a moment for the record of an identity that a CA node has and this agent
// has not yet, and returns the identity with it. The caller was let in for the selectors of
// the one it had: with others the error stands.
func (j *jwts) changed(ctx context.Context, identity *Identity, err error) (*Identity, error) {
	patience := time.NewTimer(jwtPatience)
	defer patience.Stop()
	for {
		state := j.store.State()
		now, ok := state.Identity(identity.Entry.GetId())
		switch {
		case !ok || now.ID != identity.ID || !slices.Equal(now.Demands, identity.Demands):
			return identity, err
		case !now.record.is(identity.record):
			return now, nil
		}
		select {
		case <-state.Changed():
		case <-patience.C:
			return identity, err
		case <-ctx.Done():
			return identity, err
		}
	}
}

// get returns a token that is good and when it is to be renewed, or a channel to wait
// on, or both when the token is being renewed.
func (j *jwts) get(identity *Identity, audience []string, key string, state *State, now time.Time) (token string, renew time.Time, pending chan struct{}, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	entry := identity.Entry
	h := j.held[entry.GetId()][key]
	if h != nil && (!h.record.is(identity.record) || h.id != identity.ID) {
		j.drop(h) // signed for what the entry was
		h = nil
	}
	if h == nil {
		if h, err = j.add(identity, audience, key, now); err != nil {
			return "", renew, nil, err
		}
	}
	h.used = now
	if !h.token.IsZero() && !state.vouches(h.signer, h.origin) {
		h.token, h.half = secret.Text{}, time.Time{}
	}
	good := !h.token.IsZero() && now.Add(jwtMargin).Before(h.expires)
	if good {
		token, renew = h.token.Reveal(), h.half
		if renew.Before(h.retry) {
			renew = h.retry
		}
	}
	switch {
	case good && now.Before(h.half):
		return token, renew, nil, nil
	case h.pending != nil:
		return token, renew, h.pending, nil
	case now.Before(h.retry):
		if good {
			return token, renew, nil, nil
		}
		return "", renew, nil, h.err
	}
	if err := j.ask(h); err != nil {
		if good {
			return token, renew, nil, nil
		}
		return "", renew, nil, err
	}
	return token, renew, h.pending, nil
}

// vouches tells whether a JWT-SVID under that key and with that origin is to be handed
// out: one that is revoked or distrusted no verifier in sync accepts any more (an agent
// that was evicted and admitted again may hold some), and of a tainted key that is soon so.
func (s *State) vouches(signer string, origin ca.Origin) bool {
	return s.JWT != nil && s.JWT.Keys[signer] != nil && !s.taintedKey(signer) && s.View.Distrust.CheckOrigin(origin) == nil
}

// ask puts a token into the queue of those to be signed.
func (j *jwts) ask(h *heldJWT) error {
	waiting := 0
	if j.pending >= maxPendingPerEntry { // else no entry can have so many
		for _, other := range j.held[h.entryID] {
			if other.pending != nil {
				waiting++
			}
		}
	}
	if waiting >= maxPendingPerEntry || j.pending >= maxPending {
		return ErrBusy
	}
	h.pending = make(chan struct{})
	j.pending++
	j.queue <- h // has room: no more than maxPending are pending
	return nil
}

func (j *jwts) add(identity *Identity, audience []string, key string, now time.Time) (*heldJWT, error) {
	id := identity.Entry.GetId()
	if len(j.held[id]) >= maxJWTsPerEntry {
		j.makeRoom(j.held[id], now)
	}
	if j.count >= maxJWTs {
		j.sweep(now, nil)
		for _, of := range j.held {
			if j.count < maxJWTs {
				break
			}
			j.makeRoom(of, now)
		}
	}
	if len(j.held[id]) >= maxJWTsPerEntry || j.count >= maxJWTs {
		return nil, ErrBusy // all of them are being asked for
	}
	h := &heldJWT{entryID: id, id: identity.ID, record: identity.record, audience: audience, key: key}
	if j.held[id] == nil {
		j.held[id] = map[string]*heldJWT{}
	}
	j.held[id][key] = h
	j.count++
	return h, nil
}

// makeRoom drops the one that was not used for longest.
func (j *jwts) makeRoom(of map[string]*heldJWT, now time.Time) {
	var oldest *heldJWT
	for _, h := range of {
		if h.pending == nil && (oldest == nil || h.used.Before(oldest.used)) {
			oldest = h
		}
	}
	if oldest != nil {
		j.drop(oldest)
	}
}

// drop forgets one. If it is pending, its answer goes to those who wait and nowhere
// else.
func (j *jwts) drop(h *heldJWT) {
	of := j.held[h.entryID]
	if of[h.key] != h {
		return
	}
	delete(of, h.key)
	j.count--
	if len(of) == 0 {
		delete(j.held, h.entryID)
	}
}

// sweep drops what has ended and, if a state is given, what belongs to no entry of it.
func (j *jwts) sweep(now time.Time, state *State) {
	for _, of := range j.held {
		for _, h := range of {
			gone := h.pending == nil && !now.Before(h.expires) && !now.Before(h.retry)
			if state != nil && h.pending == nil {
				identity, there := state.Identity(h.entryID)
				gone = gone || !there || !h.token.IsZero() && !state.vouches(h.signer, h.origin) || !identity.record.is(h.record)
			}
			if gone {
				j.drop(h)
			}
		}
	}
}

// run has the tokens that are asked for signed, until ctx ends.
func (j *jwts) run(ctx context.Context) error {
	slots := make(chan struct{}, jwtCallers)
	var calls sync.WaitGroup
	defer calls.Wait()
	sweep := time.NewTicker(jwtSweep)
	defer sweep.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-sweep.C:
			state := j.store.State()
			j.mu.Lock()
			j.sweep(time.Now(), state)
			j.mu.Unlock()
		case first := <-j.queue:
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return ctx.Err()
			}
			batch := []*heldJWT{first}
		more:
			for len(batch) < jwtBatch {
				select {
				case h := <-j.queue:
					batch = append(batch, h)
				default:
					break more
				}
			}
			calls.Go(func() {
				j.sign(ctx, batch)
				<-slots
			})
		}
	}
}

// sign asks the CA for a batch, and takes what verifies into use.
func (j *jwts) sign(ctx context.Context, batch []*heldJWT) {
	requests := make([]client.JWTRequest, len(batch))
	for i, h := range batch {
		requests[i] = client.JWTRequest{EntryID: h.entryID, Record: h.record.Record, Audience: h.audience}
	}
	results := j.signer.SignJWT(ctx, requests)
	now := time.Now()
	state := j.store.State()

	var news error
	failed, signed := 0, 0
	j.mu.Lock()
	for i, h := range batch {
		svid, err := (*jwtsvid.SVID)(nil), results[i].Err
		var origin ca.Origin
		if err == nil {
			svid, origin, err = verifyJWT(h, results[i].Token.Reveal(), state, now)
		}
		if err == nil && state.taintedKey(svid.KeyID) {
			err = errTainted
		}
		if err != nil {
			failed++
			h.failures++
			h.err, h.retry = err, now.Add(retryAfter(h.failures, h.expires.Sub(now)))
			if wait, busy := RetryAfter(err); busy {
				h.retry = now.Add(wait)
			}
			if h.failures == 1 {
				news = err
			}
		} else {
			signed++
			h.token, h.signer, h.expires, h.half = results[i].Token, svid.KeyID, svid.Expires, halfTime(svid.Expires, now)
			h.origin = origin
			h.failures, h.err, h.retry = 0, nil, time.Time{}
		}
		close(h.pending)
		h.pending = nil
		j.pending--
	}
	j.mu.Unlock()
	j.metrics.jwts.Add(float64(signed))
	j.metrics.failures.Add(float64(failed))
	if news != nil && ctx.Err() == nil {
		j.log.Warn("JWT-SVIDs are not signed; what is held stays in use until it ends", "tokens", failed, "error", news)
	}
}

// verifyJWT refuses what the CA signed when it is not what was asked for, or when nobody
// accepts it: a CA node that lags signs for what was revoked meanwhile.
func verifyJWT(h *heldJWT, token string, state *State, now time.Time) (*jwtsvid.SVID, ca.Origin, error) {
	fail := func(err error) (*jwtsvid.SVID, ca.Origin, error) { return nil, ca.Origin{}, err }
	svid, err := jwtsvid.Verify(token, only(state.JWT), h.audience[0], now, 0)
	if err != nil {
		return fail(fmt.Errorf("what the CA signed for %s does not verify: %w", h.id, err))
	}
	if svid.ID != h.id {
		return fail(fmt.Errorf("the CA's JWT-SVID for %s is for %s", h.id, svid.ID))
	}
	if set, _ := audienceKey(svid.Audience); !slices.Equal(set, h.audience) {
		return fail(fmt.Errorf("the CA's JWT-SVID for %s has another audience", h.id))
	}
	origin, err := originOf(svid, state)
	if err != nil {
		return fail(fmt.Errorf("the CA's JWT-SVID for %s: %w", h.id, err))
	}
	return svid, origin, nil
}

// originOf refuses a token of the own domain that is distrusted.
func originOf(svid *jwtsvid.SVID, state *State) (ca.Origin, error) {
	origin, _, err := ca.OriginOfClaims(svid.Claims)
	if err == nil {
		err = state.View.Distrust.CheckToken(svid.ID, svid.KeyID, svid.Claims)
	}
	return origin, err
}
