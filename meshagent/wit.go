package meshagent

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/internal/jwtsvid"
	"github.com/entente-mesh/entente/internal/secret"
)

// keepWITs keeps a WIT-SVID for every entry of the host, each time with a new key.
func (r *renewer) keepWITs(ctx context.Context) error {
	return r.keep(ctx, renewal{
		bundle: func(s *State) any { return [2]any{s.WIT, s.View.Announced} },
		void: func(s *State, identity *Identity, now time.Time) bool {
			if identity.WIT == nil {
				return false
			}
			return s.WIT == nil || s.WIT.Keys[identity.WIT.keyID] == nil || identity.WIT.revoked(s.View.Announced) != nil
		},
		ends: func(identity *Identity) (end time.Time) {
			if identity.WIT != nil {
				end = identity.WIT.Expires
			}
			return end
		},
		signedFor: func(identity *Identity) (signedFor *record) {
			if identity.WIT != nil {
				signedFor = identity.WIT.signedFor
			}
			return signedFor
		},
		renew: r.renewWITs,
		tainted: func(s *State, identity *Identity) any {
			if identity.WIT == nil || !s.taintedKey(identity.WIT.keyID) {
				return nil
			}
			return identity.WIT
		},
	})
}

// renewWITs has one WIT-SVID signed for each slot and takes those that are good into
// use.
func (r *renewer) renewWITs(ctx context.Context, slots []*slot) {
	keys, csrs, ok := r.newKeys(ctx, len(slots))
	if !ok {
		return
	}
	requests := make([]client.WITRequest, len(slots))
	for i, s := range slots {
		requests[i] = client.WITRequest{EntryID: s.entryID, Record: s.record.Record, CSR: csrs[i]}
	}
	results := r.signer.SignWIT(ctx, requests)
	if ctx.Err() != nil {
		return
	}
	now := r.now()
	state := r.store.State()
	signed := map[string]*WITSVID{}
	var failed []error
	news := false
	for i, s := range slots {
		wit, err := (*WITSVID)(nil), results[i].Err
		if err == nil {
			wit, err = verifyWIT(s.id, s.record, results[i].Token.Reveal(), keys[i], state, now)
		}
		if err == nil && state.taintedKey(wit.keyID) {
			err = errTainted
		}
		if err != nil {
			s.failures++
			s.due = now.Add(pauseAfter(err, s.failures, s.ends.Sub(now)))
			failed = append(failed, fmt.Errorf("%s: %w", s.id, err))
			news = news || s.failures == 1
			continue
		}
		signed[s.entryID] = wit
		s.due, s.failures, s.ends, s.heldFor = halfTime(wit.Expires, now), 0, wit.Expires, s.record
	}
	if len(signed) > 0 {
		r.store.change(func(state *State) *State { return state.withWITs(signed) })
		r.metrics.wits.Add(float64(len(signed)))
	}
	if len(failed) > 0 {
		r.metrics.failures.Add(float64(len(failed)))
		if news {
			r.log.Warn("WIT-SVIDs are not renewed; trying again, and what is held stays in use until it ends",
				"entries", len(failed), "error", failed[0])
		}
	}
}

// verifyWIT refuses what the CA signed when it is not for this identity and key, or is
// distrusted.
func verifyWIT(want spiffeid.ID, signedFor *record, token string, key crypto.Signer, state *State, now time.Time) (*WITSVID, error) {
	svid, err := jwtsvid.VerifyWIT(token, only(state.WIT), now, 0)
	if err != nil {
		return nil, fmt.Errorf("what the CA signed does not verify: %w", err)
	}
	if svid.ID != want {
		return nil, fmt.Errorf("the CA's WIT-SVID is for %s", svid.ID)
	}
	if public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !public.Equal(svid.Key) {
		return nil, errors.New("the CA's WIT-SVID is for another key")
	}
	origin, err := originOf(svid, state)
	if err != nil {
		return nil, fmt.Errorf("the CA's WIT-SVID for %s: %w", want, err)
	}
	return &WITSVID{ID: want, Token: secret.Of(token), Key: key, Expires: svid.Expires, keyID: svid.KeyID, origin: origin, signedFor: signedFor}, nil
}

// revoked says why nobody in sync accepts the SVID any more, although it is valid.
func (w *WITSVID) revoked(d *ca.Distrusted) error {
	return d.CheckHeld(ca.AuthorityKeyID(w.keyID), w.origin)
}

// withWITs makes the state that follows when WIT-SVIDs were signed.
func (s *State) withWITs(signed map[string]*WITSVID) *State {
	next := *s
	next.reissued = nil
	next.Identities = slices.Clone(s.Identities)
	for i, identity := range s.Identities {
		wit := signed[identity.Entry.GetId()]
		if wit == nil || wit.ID != identity.ID || !wit.signedFor.is(identity.record) {
			continue
		}
		renewed := *identity
		renewed.WIT = wit
		renewed.demand()
		next.Identities[i] = &renewed
	}
	return &next
}
