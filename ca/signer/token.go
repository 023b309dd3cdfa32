package signer

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

// JWTRequest is one JWT-SVID to sign. The caller has decided that it may be.
type JWTRequest struct {
	ID       spiffeid.ID
	Audience []string
	Life     time.Duration // cut to the authority's own end and to ca.MaxJWTSVID
	Origin   ca.Origin
}

// SignJWT returns a JWT-SVID in compact serialization. Errors as of Sign.
func (s *Signer) SignJWT(ctx context.Context, req JWTRequest) (string, error) {
	issued := Issued{Kind: "jwt-svid", ID: req.ID, Origin: req.Origin, Audience: req.Audience}
	return s.signToken(ctx, statev1.KeyUse_KEY_USE_JWT, ca.TypeJWT, issued, func(authority *statev1.Authority, now time.Time) ([]byte, time.Time, error) {
		return ca.JWTClaims(ca.JWTRequest{
			ID: req.ID, Audience: req.Audience, Issuer: s.config.Issuer,
			Now: now, Life: req.Life, Authority: authority, Origin: req.Origin,
		})
	})
}

// WITRequest is one WIT-SVID to sign. The caller has decided that it may be, and seen
// that whoever asks holds the key (KeyOf).
type WITRequest struct {
	ID        spiffeid.ID
	PublicKey crypto.PublicKey
	Life      time.Duration // cut to the authority's own end and to ca.MaxWITSVID
	Origin    ca.Origin
}

// SignWIT returns a WIT-SVID in compact serialization. Errors as of Sign.
func (s *Signer) SignWIT(ctx context.Context, req WITRequest) (string, error) {
	issued := Issued{Kind: "wit-svid", ID: req.ID, Origin: req.Origin}
	return s.signToken(ctx, statev1.KeyUse_KEY_USE_WIT, ca.TypeWIT, issued, func(authority *statev1.Authority, now time.Time) ([]byte, time.Time, error) {
		return ca.WITClaims(ca.WITRequest{
			ID: req.ID, PublicKey: req.PublicKey,
			Now: now, Life: req.Life, Authority: authority, Origin: req.Origin,
		})
	})
}

func (s *Signer) signToken(ctx context.Context, use statev1.KeyUse, typ string, issued Issued, claims func(*statev1.Authority, time.Time) ([]byte, time.Time, error)) (string, error) {
	if !issued.ID.MemberOf(s.config.TrustDomain) {
		return "", fmt.Errorf("sign token for %s: this CA signs for %s only", issued.ID, s.config.TrustDomain.Name())
	}
	if err := s.await(ctx, use); err != nil {
		return "", err
	}
	if err := s.acquire(ctx); err != nil {
		return "", err
	}
	defer func() { <-s.slots }()

	now := time.Now()
	if err := s.config.Clock().Check(now); err != nil {
		return "", err
	}
	key, authority, err := s.activeKey(use)
	if err != nil {
		return "", err
	}
	payload, end, err := claims(authority, now)
	if err != nil {
		return "", err
	}
	alg, err := ca.TokenAlgorithm(key.Public())
	if err != nil {
		return "", fmt.Errorf("authority %.12s: %w", authority.GetId(), err)
	}
	token, digest, err := compact(key, alg, ca.TokenHeader(alg, authority.GetId(), typ), payload)
	if err == nil && s.config.Signed != nil {
		issued.Digest, issued.Authority, issued.NotAfter = hex.EncodeToString(digest[:]), authority.GetId(), end
		s.config.Signed(issued)
	}
	return token, err
}

// compact makes a JWS in compact serialization (RFC 7515 7.1). ES256 and RS256 both
// sign the SHA-256 of what stands before the signature, which is returned as well.
func compact(key crypto.Signer, alg string, header, payload []byte) (_ string, digest [sha256.Size]byte, err error) {
	encoding := base64.RawURLEncoding
	token := make([]byte, 0, encoding.EncodedLen(len(header))+encoding.EncodedLen(len(payload))+2+encoding.EncodedLen(512))
	token = encoding.AppendEncode(token, header)
	token = append(token, '.')
	token = encoding.AppendEncode(token, payload)
	digest = sha256.Sum256(token)
	signature, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return "", digest, fmt.Errorf("sign token: %w", err)
	}
	if alg == ca.ES256 {
		if signature, err = joseSignature(signature); err != nil {
			return "", digest, err
		}
	}
	token = append(token, '.')
	return string(encoding.AppendEncode(token, signature)), digest, nil
}

// joseSignature turns an ECDSA signature on P-256 from ASN.1 into R and S, 32 bytes each
// (RFC 7518 3.4).
func joseSignature(der []byte) ([]byte, error) {
	const size = 32
	var sig struct{ R, S *big.Int }
	if rest, err := asn1.Unmarshal(der, &sig); err != nil || len(rest) != 0 || sig.R.Sign() <= 0 || sig.S.Sign() <= 0 ||
		sig.R.BitLen() > 8*size || sig.S.BitLen() > 8*size {
		return nil, errors.New("sign token: the key store gave no ECDSA signature on P-256")
	}
	out := make([]byte, 2*size)
	sig.R.FillBytes(out[:size])
	sig.S.FillBytes(out[size:])
	return out, nil
}
