package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// OriginClaim is the private claim with a token's Origin, the twin of OriginOID.
const OriginClaim = "entente_origin"

// Bounds of a JWT-SVID's audience: what a caller may ask for.
const (
	MaxAudiences     = 16
	MaxAudienceBytes = 4 << 10 // all of them together
)

// The algorithms of token authorities (of the nine that JWT-SVID 2.1 allows), and the
// header types.
const (
	ES256 = "ES256"
	RS256 = "RS256"

	TypeJWT = "JWT"
	TypeWIT = "wit+jwt"
)

// NewTokenAuthority makes the record that PrepareAuthority proposes for a key that
// signs JWT-SVIDs or WIT-SVIDs: from now on for three phases. A CA node's door asks it
// for the same record again, since Apply parses no keys. ECDSA on P-256; for JWT-SVIDs
// also RSA of 2048 to 4096 bits, for verifiers that know nothing else.
func NewTokenAuthority(memberID string, use statev1.KeyUse, spki []byte, begin time.Time, phase time.Duration, now time.Time) (*statev1.Authority, error) {
	if use != statev1.KeyUse_KEY_USE_JWT && use != statev1.KeyUse_KEY_USE_WIT {
		return nil, fmt.Errorf("%s is no use of a token authority", use)
	}
	if phase <= 0 {
		return nil, errors.New("token authority: phase is not positive")
	}
	alg, err := tokenAlgorithm(spki)
	if err != nil {
		return nil, fmt.Errorf("token authority: %w", err)
	}
	if use == statev1.KeyUse_KEY_USE_WIT && alg != ES256 {
		return nil, errors.New("token authority: a WIT-SVID is signed with a P-256 key only")
	}
	begin = begin.Truncate(time.Second)
	if begin.After(now.Add(authorityBackdate)) || !now.Before(begin.Add(3*phase)) {
		return nil, errors.New("token authority is not valid now: compare the clocks of the CA nodes")
	}
	return &statev1.Authority{
		Id:        KeyID(spki),
		MemberId:  memberID,
		Use:       use,
		PublicKey: slices.Clone(spki),
		NotBefore: begin.Add(-authorityBackdate).Unix(),
		NotAfter:  begin.Add(3 * phase).Unix(),
		Phase:     statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED,
	}, nil
}

// SameTokenAuthority tells whether a proposed record is the one that NewTokenAuthority
// makes of its key and begin.
func SameTokenAuthority(trustDomain, memberID string, proposed *statev1.Authority, phase time.Duration, now time.Time) error {
	begin := time.Unix(proposed.GetNotBefore(), 0).Add(authorityBackdate)
	made, err := NewTokenAuthority(memberID, proposed.GetUse(), proposed.GetPublicKey(), begin, phase, now)
	if err != nil {
		return err
	}
	if made.GetId() != proposed.GetId() || made.GetMemberId() != proposed.GetMemberId() || made.GetNotAfter() != proposed.GetNotAfter() ||
		proposed.GetPhase() != made.GetPhase() || proposed.GetReady() || len(proposed.GetCertificate()) != 0 ||
		proposed.GetRevision() != 0 || proposed.GetPreparedRevision() != 0 {
		return errors.New("the authority's record does not say what its key and begin say")
	}
	if len(proposed.GetProof()) > 0 { // Apply says whether it must
		return CheckAuthorityHeld(trustDomain, proposed)
	}
	return nil
}

func tokenAlgorithm(spki []byte) (string, error) {
	key, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		return "", errors.New("its key does not parse")
	}
	return TokenAlgorithm(key)
}

// TokenAlgorithm is the algorithm that an authority with that key signs tokens with.
func TokenAlgorithm(key crypto.PublicKey) (string, error) {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() {
			return ES256, nil
		}
	case *rsa.PublicKey:
		if checkKey(k) == nil {
			return RS256, nil
		}
	}
	return "", errors.New("its key is neither ECDSA on P-256 nor RSA of 2048 to 4096 bits")
}

// TokenHeader is the JOSE header of a token: alg, kid and typ, and nothing else
// (JWT-SVID 2, WIT-SVID 2.4). kid is the authority's id: unique over both uses.
func TokenHeader(alg, kid, typ string) []byte {
	header, _ := json.Marshal(struct {
		Alg string `json:"alg"`
		Kid string `json:"kid"`
		Typ string `json:"typ"`
	}{alg, kid, typ})
	return header
}

// JWTRequest is what a JWT-SVID is made from.
type JWTRequest struct {
	ID        spiffeid.ID
	Audience  []string // one is best: who holds the token can use it at each of them
	Issuer    string   // empty: none is written
	Now       time.Time
	Life      time.Duration // cut to the authority's own end
	Authority *statev1.Authority
	Origin    Origin // zero: none is written
}

type claims struct {
	Issuer   string        `json:"iss,omitempty"`
	Subject  string        `json:"sub"`
	Audience any           `json:"aud,omitempty"`
	Expires  int64         `json:"exp"`
	IssuedAt int64         `json:"iat"`
	Confirm  *confirmation `json:"cnf,omitempty"`
	Origin   *originClaim  `json:"entente_origin,omitempty"`
}

type originClaim struct {
	Entry           string `json:"entry,omitempty"`
	EntryGeneration uint64 `json:"entry_generation,omitempty"`
	Agent           string `json:"agent,omitempty"`
	AgentGeneration uint64 `json:"agent_generation,omitempty"`
}

// OriginOfClaims reads the origin of a token's claims; ok is false if it has none.
// Members that this release does not know are passed over.
func OriginOfClaims(claims map[string]any) (o Origin, ok bool, err error) {
	claim, ok := claims[OriginClaim]
	if !ok {
		return Origin{}, false, nil
	}
	text, err := json.Marshal(claim)
	var c *originClaim
	if err == nil {
		err = json.Unmarshal(text, &c)
	}
	if err != nil || c == nil {
		return Origin{}, false, errors.New("the token's origin does not decode")
	}
	o = Origin{c.Entry, c.EntryGeneration, c.Agent, c.AgentGeneration}
	return o, true, o.check()
}

type confirmation struct {
	JWK jwk `json:"jwk"`
}

type jwk struct {
	KeyType   string `json:"kty"`
	Curve     string `json:"crv,omitempty"`
	X         string `json:"x,omitempty"`
	Y         string `json:"y,omitempty"`
	N         string `json:"n,omitempty"`
	E         string `json:"e,omitempty"`
	Algorithm string `json:"alg"`
}

// JWTClaims is the payload of a JWT-SVID before it is signed (JWT-SVID 3), and when it
// ends. A single audience is written as a string, which every reader knows.
func JWTClaims(req JWTRequest) (payload []byte, end time.Time, err error) {
	fail := func(err error) ([]byte, time.Time, error) {
		return nil, time.Time{}, fmt.Errorf("JWT-SVID for %s: %w", req.ID, err)
	}
	if err := CheckAudience(req.Audience); err != nil {
		return fail(err)
	}
	c, err := commonClaims(req.ID, req.Now, min(req.Life, MaxJWTSVID), req.Authority, statev1.KeyUse_KEY_USE_JWT, req.Origin)
	if err != nil {
		return fail(err)
	}
	c.Issuer, c.Audience = req.Issuer, req.Audience
	if len(req.Audience) == 1 {
		c.Audience = req.Audience[0]
	}
	payload, err = json.Marshal(c)
	return payload, time.Unix(c.Expires, 0), err
}

// CheckAudience refuses an audience that no JWT-SVID may have (JWT-SVID 3.2: at least
// one value), or that is beyond our bounds.
func CheckAudience(audience []string) error {
	if len(audience) == 0 {
		return errors.New("no audience: name who is to accept the token")
	}
	if len(audience) > MaxAudiences {
		return fmt.Errorf("%d audiences, over %d", len(audience), MaxAudiences)
	}
	size := 0
	for _, a := range audience {
		size += len(a)
		if a == "" || !utf8.ValidString(a) || slices.ContainsFunc([]rune(a), unicode.IsControl) {
			return fmt.Errorf("audience %.80q is empty or not plain text", a)
		}
	}
	if size > MaxAudienceBytes {
		return fmt.Errorf("audiences have %d bytes together, over %d", size, MaxAudienceBytes)
	}
	return nil
}

// WITRequest is what a WIT-SVID is made from.
type WITRequest struct {
	ID        spiffeid.ID
	PublicKey crypto.PublicKey // the workload's, whose possession it must prove with each use
	Now       time.Time
	Life      time.Duration // cut to the authority's own end
	Authority *statev1.Authority
	Origin    Origin // zero: none is written
}

// WITClaims is the payload of a WIT-SVID before it is signed (WIT-SVID 3), and when it
// ends: no audience, no issuer, and the workload's key as cnf.jwk with its algorithm.
func WITClaims(req WITRequest) (payload []byte, end time.Time, err error) {
	fail := func(err error) ([]byte, time.Time, error) {
		return nil, time.Time{}, fmt.Errorf("WIT-SVID for %s: %w", req.ID, err)
	}
	key, err := publicJWK(req.PublicKey)
	if err != nil {
		return fail(err)
	}
	if spki, err := x509.MarshalPKIXPublicKey(req.PublicKey); err != nil || KeyID(spki) == req.Authority.GetId() {
		return fail(errors.New("its key is the authority's"))
	}
	c, err := commonClaims(req.ID, req.Now, min(req.Life, MaxWITSVID), req.Authority, statev1.KeyUse_KEY_USE_WIT, req.Origin)
	if err != nil {
		return fail(err)
	}
	c.Confirm = &confirmation{key}
	payload, err = json.Marshal(c)
	return payload, time.Unix(c.Expires, 0), err
}

func commonClaims(id spiffeid.ID, now time.Time, life time.Duration, authority *statev1.Authority, use statev1.KeyUse, origin Origin) (*claims, error) {
	switch {
	case id.Path() == "":
		return nil, errors.New("an SVID needs a SPIFFE ID with a path")
	case authority.GetUse() != use:
		return nil, errors.New("the authority is for another kind of SVID")
	case life <= 0:
		return nil, errors.New("life is not positive")
	}
	if err := checkIDLength(id); err != nil {
		return nil, err
	}
	if err := origin.check(); err != nil {
		return nil, err
	}
	c := &claims{Subject: id.String(), IssuedAt: now.Unix(), Expires: min(now.Add(life).Unix(), authority.GetNotAfter())}
	if c.Expires <= c.IssuedAt || c.IssuedAt < authority.GetNotBefore() {
		return nil, fmt.Errorf("the authority is valid from %s to %s only", time.Unix(authority.GetNotBefore(), 0).UTC().Format(time.RFC3339),
			time.Unix(authority.GetNotAfter(), 0).UTC().Format(time.RFC3339))
	}
	if origin != (Origin{}) {
		c.Origin = &originClaim{origin.Entry, origin.EntryGeneration, origin.Agent, origin.AgentGeneration}
	}
	return c, nil
}

// publicJWK is a public key as RFC 7518 6 writes it, with the algorithm that proofs of
// its possession are signed with (WIT-SVID 3.2).
func publicJWK(key crypto.PublicKey) (jwk, error) {
	encode := base64.RawURLEncoding.EncodeToString
	if err := checkKey(key); err != nil {
		return jwk{}, err
	}
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		point, err := k.Bytes() // 4, X, Y
		if err != nil {
			return jwk{}, err
		}
		half := len(point) / 2
		out := jwk{KeyType: "EC", Curve: "P-256", X: encode(point[1 : 1+half]), Y: encode(point[1+half:]), Algorithm: ES256}
		if k.Curve == elliptic.P384() {
			out.Curve, out.Algorithm = "P-384", "ES384"
		}
		return out, nil
	case *rsa.PublicKey:
		return jwk{KeyType: "RSA", N: encode(k.N.Bytes()), E: encode(big.NewInt(int64(k.E)).Bytes()), Algorithm: RS256}, nil
	}
	return jwk{}, errors.New("its key is not one of ECDSA and RSA: WIT-SVIDs know no other algorithms")
}
