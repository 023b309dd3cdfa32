// Package signer holds the live keys of a CA node's authorities and signs
// X.509-SVIDs, JWT-SVIDs and WIT-SVIDs, each with the one that is ACTIVE for them in
// the agreed state.
//
// It signs without quorum and writes nothing (I5). It does not sign without an
// ACTIVE authority whose key it has (I3), nor with a clock that it has reason to
// distrust.
package signer

import (
	"cmp"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

// Why nothing is signed now. Callers go to another CA node, or come back later.
var (
	ErrNoAuthority = errors.New("this CA node has no active authority yet")
	ErrBusy        = errors.New("this CA node signs as much as it can")
)

// RetryAfter is when a caller should come back after ErrBusy.
const RetryAfter = 250 * time.Millisecond

const (
	// maxWait is how long a request waits for its turn, and before that for an authority
	// that comes.
	maxWait = 250 * time.Millisecond
	// defaultWaiting is how many wait at once; at 4,000 signatures a second and CPU those
	// behind it would not be served within maxWait.
	defaultWaiting = 1024
)

// Config is what a signer needs. All functions are called concurrently and for
// each signature, and must be quick.
type Config struct {
	// TrustDomain is the only one that tokens are signed for; an X.509 authority's
	// certificate says it for itself.
	TrustDomain spiffeid.TrustDomain
	// Active returns this node's ACTIVE authority for one use as the replicated state
	// has it, nil if there is none.
	Active func(statev1.KeyUse) *statev1.Authority
	// Coming tells, while there is no ACTIVE authority for a use, whether one is agreed on
	// just now, as after a taint: the channel is closed when to look again. Nil: none is. It is
	// not called while there is one.
	Coming func(statev1.KeyUse) <-chan struct{}
	// Clock says what is known of the agreed time.
	Clock func() Clock
	// Signed is called with each SVID that was signed; nil: with none.
	Signed func(Issued)
	// Concurrency is how many signatures are made at once; 0: one per CPU.
	Concurrency int
	// Waiting is how many requests may wait for their turn; 0: 1024.
	Waiting int
	// Issuer is the "iss" of JWT-SVIDs; empty: they have none.
	Issuer string
}

// Signer signs. All methods may be called concurrently.
type Signer struct {
	config  Config
	slots   chan struct{}
	waiting atomic.Int32

	signatures atomic.Uint64 // of certificates, with keys in memory

	mu     sync.RWMutex
	keys   map[string]crypto.Signer     // by authority id
	parsed map[string]*x509.Certificate // by authority id
}

// New returns a signer without keys.
func New(config Config) *Signer {
	n := config.Concurrency
	if n <= 0 {
		n = runtime.GOMAXPROCS(0)
	}
	return &Signer{
		config: config,
		slots:  make(chan struct{}, n),
		keys:   make(map[string]crypto.Signer),
		parsed: make(map[string]*x509.Certificate),
	}
}

// Add gives the signer a key of its node and returns the id of the authority that
// has it.
func (s *Signer) Add(key crypto.Signer) (id string, err error) {
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return "", fmt.Errorf("add signing key: %w", err)
	}
	id = ca.KeyID(spki)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys[id] = key
	return id, nil
}

// Remove takes the key of an authority away.
func (s *Signer) Remove(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.keys, id)
	delete(s.parsed, id)
}

// Has tells whether the signer holds the key of that authority.
func (s *Signer) Has(id string) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.keys[id] != nil
}

// Await waits for the authority of a use if one comes, as Sign does, and says why nothing
// could be signed then; nil if it could.
func (s *Signer) Await(ctx context.Context, use statev1.KeyUse) error {
	if err := s.await(ctx, use); err != nil {
		return err
	}
	return s.Ready(use)
}

// await lets a taint or a revocation pause nothing: callers would otherwise be refused, and
// come back later, for the moment that it takes to agree on the next authority.
func (s *Signer) await(ctx context.Context, use statev1.KeyUse) error {
	if s.config.Coming == nil || s.config.Active(use) != nil {
		return nil
	}
	limit := time.NewTimer(maxWait)
	defer limit.Stop()
	for s.config.Active(use) == nil {
		coming := s.config.Coming(use)
		if coming == nil {
			return nil
		}
		select {
		case <-coming:
		case <-limit.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// Ready says why nothing could be signed now for that use; nil if it could.
func (s *Signer) Ready(use statev1.KeyUse) error {
	if err := s.config.Clock().Check(time.Now()); err != nil {
		return err
	}
	if use == statev1.KeyUse_KEY_USE_X509 {
		_, _, _, err := s.active()
		return err
	}
	_, _, err := s.activeKey(use)
	return err
}

// Request is one X.509-SVID to sign. The caller has decided that it may be.
type Request struct {
	ID        spiffeid.ID
	DNSNames  []string
	PublicKey crypto.PublicKey
	Life      time.Duration // cut to the authority's own end
	Origin    ca.Origin
}

// Issued is an SVID that was signed.
type Issued struct {
	Kind      string // "x509-svid", "jwt-svid", "wit-svid"
	ID        spiffeid.ID
	Origin    ca.Origin
	Serial    string   // hex; of an X.509-SVID
	Digest    string   // hex SHA-256 of a token's header and payload
	Audience  []string // of a JWT-SVID
	Authority string   // id
	NotAfter  time.Time
}

// Sign returns the certificates of an X.509-SVID, DER, leaf first: with the authority's own
// where that is an intermediate, without it where it stands in the bundle. Errors: ErrNoAuthority, ErrBusy, ErrClock, the context's, or what
// is wrong with the request.
func (s *Signer) Sign(ctx context.Context, req Request) ([][]byte, error) {
	chain, err := s.sign(ctx, req)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", req.ID, err)
	}
	return chain, nil
}

func (s *Signer) sign(ctx context.Context, req Request) ([][]byte, error) {
	if err := s.await(ctx, statev1.KeyUse_KEY_USE_X509); err != nil {
		return nil, err
	}
	if err := s.acquire(ctx); err != nil {
		return nil, err
	}
	defer func() { <-s.slots }()

	now := time.Now()
	if err := s.config.Clock().Check(now); err != nil {
		return nil, err
	}
	key, record, authority, err := s.active()
	if err != nil {
		return nil, err
	}
	var serial [16]byte
	rand.Read(serial[:])
	template, err := ca.LeafTemplate(ca.LeafRequest{
		ID:        req.ID,
		DNSNames:  req.DNSNames,
		PublicKey: req.PublicKey,
		Serial:    serial,
		Now:       now,
		Life:      req.Life,
		Authority: authority,
		Origin:    req.Origin,
	})
	if err != nil {
		return nil, err
	}
	der, err := s.certify(template, authority, key)
	if err != nil {
		return nil, err
	}
	if s.config.Signed != nil {
		s.config.Signed(Issued{Kind: "x509-svid", ID: req.ID, Origin: req.Origin, Serial: template.SerialNumber.Text(16), Authority: ca.KeyID(authority.RawSubjectPublicKeyInfo), NotAfter: template.NotAfter})
	}
	chain := [][]byte{der}
	if len(record.GetUpstream()) > 0 {
		chain = append(chain, authority.Raw)
	}
	return chain, nil
}

func (s *Signer) acquire(ctx context.Context) error {
	select {
	case s.slots <- struct{}{}:
		return nil
	default:
	}
	if int(s.waiting.Add(1)) > cmp.Or(s.config.Waiting, defaultWaiting) {
		s.waiting.Add(-1)
		return ErrBusy
	}
	defer s.waiting.Add(-1)
	timer := time.NewTimer(maxWait)
	defer timer.Stop()
	select {
	case s.slots <- struct{}{}:
		return nil
	case <-timer.C:
		return ErrBusy
	case <-ctx.Done():
		return ctx.Err()
	}
}

// activeKey returns the ACTIVE authority for a use and its key.
func (s *Signer) activeKey(use statev1.KeyUse) (crypto.Signer, *statev1.Authority, error) {
	authority := s.config.Active(use)
	if authority == nil || !ca.Signs(authority.GetPhase()) || authority.GetUse() != use {
		return nil, nil, ErrNoAuthority
	}
	s.mu.RLock()
	key := s.keys[authority.GetId()]
	s.mu.RUnlock()
	if key == nil {
		return nil, nil, fmt.Errorf("%w: the key of authority %.12s is not in its key store", ErrNoAuthority, authority.GetId())
	}
	return key, authority, nil
}

// active returns the ACTIVE X.509 authority with its key and its certificate.
func (s *Signer) active() (crypto.Signer, *statev1.Authority, *x509.Certificate, error) {
	key, authority, err := s.activeKey(statev1.KeyUse_KEY_USE_X509)
	if err != nil {
		return nil, nil, nil, err
	}
	id := authority.GetId()
	s.mu.RLock()
	cert := s.parsed[id]
	s.mu.RUnlock()
	if cert == nil {
		if cert, err = x509.ParseCertificate(authority.GetCertificate()); err != nil {
			return nil, nil, nil, fmt.Errorf("certificate of authority %.12s: %w", id, err)
		}
		s.mu.Lock()
		s.parsed[id] = cert
		s.mu.Unlock()
	}
	return key, authority, cert, nil
}
