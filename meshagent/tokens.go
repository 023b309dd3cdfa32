package meshagent

import (
	"crypto"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/federation/bundle"
	"github.com/entente-mesh/entente/internal/jwtsvid"
	"github.com/entente-mesh/entente/internal/secret"
)

// TokenBundle is what one kind of one trust domain's tokens is verified with.
// Immutable.
type TokenBundle struct {
	TrustDomain spiffeid.TrustDomain
	Keys        jwtsvid.Keys
	// JWKS has the same keys and no others, as a SPIFFE bundle.
	JWKS []byte
}

func tokenBundle(td spiffeid.TrustDomain, keys []bundle.Key, document bundle.Bundle) (*TokenBundle, error) {
	b := &TokenBundle{TrustDomain: td, Keys: jwtsvid.Keys{}}
	for _, key := range keys {
		public, err := key.Public()
		if err != nil {
			return nil, fmt.Errorf("the bundle of %s that the CA sent: %w", td.Name(), err)
		}
		b.Keys[key.ID] = public
	}
	var err error
	b.JWKS, err = document.Marshal()
	return b, err
}

// tokenBundles keeps the two kinds apart: a key of one never verifies the other's
// tokens (JWT-SVID 6.2, WIT-SVID 6.2).
func tokenBundles(b *bundle.Bundle) (jwt, wit *TokenBundle, err error) {
	if jwt, err = tokenBundle(b.TrustDomain, b.JWT, bundle.Bundle{TrustDomain: b.TrustDomain, JWT: b.JWT}); err != nil {
		return nil, nil, err
	}
	wit, err = tokenBundle(b.TrustDomain, b.WIT, bundle.Bundle{TrustDomain: b.TrustDomain, WIT: b.WIT})
	return jwt, wit, err
}

func (s *State) takeForeign(td spiffeid.TrustDomain, jwks []byte) error {
	b, err := parseBundle(td, jwks)
	if err != nil {
		return err
	}
	jwt, wit, err := tokenBundles(b)
	if err != nil {
		return err
	}
	s.Foreign[td], s.foreignJWT[td], s.foreignWIT[td] = b.X509Bundle(), jwt, wit
	return nil
}

// witPeers are the trust domains that WIT keys are exchanged with.
func witPeers(view *client.View) map[string]bool {
	peers := map[string]bool{}
	for _, o := range view.Objects {
		if r := o.GetRelationship(); r.GetWit() {
			peers[r.GetTrustDomain()] = true
		}
	}
	return peers
}

// WITSVID is a WIT-SVID with the key that its holder proves possession of. Immutable.
type WITSVID struct {
	ID      spiffeid.ID
	Token   secret.Text
	Key     crypto.Signer
	Expires time.Time
	keyID   string // of the authority
	origin  ca.Origin

	signedFor *record // of the entry: the request named it
}

// JWTKeys are the keys that a workload with these identities may verify JWT-SVIDs
// with: the own trust domain's, and those of the domains they federate with.
func (s *State) JWTKeys(entitled []*Identity) jwtsvid.Source {
	return func(td spiffeid.TrustDomain) (jwtsvid.Keys, bool) {
		if s.JWT != nil && s.JWT.TrustDomain == td {
			return s.JWT.Keys, true
		}
		for _, identity := range entitled {
			for _, foreign := range identity.FederatedJWT {
				if foreign.TrustDomain == td {
					return foreign.Keys, true
				}
			}
		}
		return nil, false
	}
}

// VerifyJWT tells whether a token is a JWT-SVID that a workload with these identities may
// accept. revoked says why not, where it is valid but distrusted; for our log only.
//
// A token of the own domain names its origin: every CA node writes one, whatever its
// release, and without one it could not be told from what was revoked. Another domain's
// origin means nothing here.
func (s *State) VerifyJWT(entitled []*Identity, token, audience string, now time.Time, leeway time.Duration) (svid *jwtsvid.SVID, revoked, _ error) {
	svid, err := jwtsvid.Verify(token, s.JWTKeys(entitled), audience, now, leeway)
	if err != nil {
		return nil, nil, err
	}
	if s.JWT != nil && s.JWT.TrustDomain == svid.ID.TrustDomain() {
		if _, ok, err := ca.OriginOfClaims(svid.Claims); err != nil || !ok {
			return nil, nil, errors.New("the token is no valid JWT-SVID: it does not say for which entry and through which agent it was issued")
		}
	}
	if err := s.View.Distrust.CheckToken(svid.ID, svid.KeyID, svid.Claims); err != nil {
		return svid, err, errors.New("the token is no valid JWT-SVID: it was revoked")
	}
	return svid, nil, nil
}

// only gives the keys of one bundle only.
func only(b *TokenBundle) jwtsvid.Source {
	return func(td spiffeid.TrustDomain) (jwtsvid.Keys, bool) {
		if b == nil || td != b.TrustDomain {
			return nil, false
		}
		return b.Keys, true
	}
}
