package node

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/signer"
)

func newBootID() string { return strings.ToLower(rand.Text()) }

// svids are the node's own: one under its name with the node key, and one for the
// bundle endpoint, which has the same name at every node and a key of its own. Signed
// by the node's own authority; renewed at half of their life.
type svids struct {
	authorities *authorities

	mu       sync.Mutex
	own      *tls.Certificate
	endpoint *x509svid.SVID
	signedBy string // id of the authority
}

// node is the certificate under the node's own name, nil while there is none that is
// valid.
func (s *svids) node() *tls.Certificate {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.own == nil || time.Now().After(s.own.Leaf.NotAfter) {
		return nil
	}
	return s.own
}

// GetX509SVID is the bundle endpoint's SVID.
func (s *svids) GetX509SVID() (*x509svid.SVID, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.endpoint == nil {
		return nil, errors.New("this CA node has not signed its own SVIDs yet")
	}
	return s.endpoint, nil
}

// authority is the one that they are signed under; empty while there are none.
func (s *svids) authority() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.signedBy
}

// run keeps them valid until ctx ends.
func (s *svids) run(ctx context.Context) error {
	failed := ""
	for {
		changed := s.authorities.applied.wait()
		wait := time.Second
		if until := s.due(); until <= 0 {
			if err := s.renew(ctx); err == nil {
				failed = ""
				continue
			} else if text := err.Error(); text != failed && ctx.Err() == nil && !errors.Is(err, signer.ErrNoAuthority) {
				failed = text
				s.authorities.log.Error("the node's own SVIDs cannot be renewed", "error", err)
			}
		} else {
			wait = until
		}
		timer := time.NewTimer(wait)
		select {
		case <-changed:
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
		timer.Stop()
	}
}

// due is the time until renewal.
func (s *svids) due() time.Duration {
	active := s.authorities.activeAuthority()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.own == nil || active != nil && active.GetId() != s.signedBy {
		return 0
	}
	leaf := s.own.Leaf
	half := leaf.NotBefore.Add(ca.Backdate)
	half = half.Add(leaf.NotAfter.Sub(half) / 2)
	return time.Until(half)
}

func (s *svids) renew(ctx context.Context) error {
	as := s.authorities
	active := as.activeAuthority()
	if active == nil {
		return signer.ErrNoAuthority
	}
	var life time.Duration
	as.Read(func(st *domain.State) { life = st.Lifetimes().X509SVID })
	own, err := s.sign(ctx, ca.NodePath(as.cfg.Name), as.own.key, life)
	if err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	endpoint, err := s.sign(ctx, ca.BundleEndpointPath, key, life)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.own = &tls.Certificate{PrivateKey: own.PrivateKey, Leaf: own.Certificates[0]}
	for _, cert := range own.Certificates {
		s.own.Certificate = append(s.own.Certificate, cert.Raw)
	}
	s.endpoint, s.signedBy = endpoint, active.GetId()
	return nil
}

func (s *svids) sign(ctx context.Context, path string, key crypto.Signer, life time.Duration) (*x509svid.SVID, error) {
	id, err := spiffeid.FromPath(s.authorities.td, path)
	if err != nil {
		return nil, err
	}
	chain, err := s.authorities.signer.Sign(ctx, signer.Request{ID: id, PublicKey: key.Public(), Life: life})
	if err != nil {
		return nil, err
	}
	svid := &x509svid.SVID{ID: id, PrivateKey: key}
	for _, der := range chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("own SVID: %w", err)
		}
		svid.Certificates = append(svid.Certificates, cert)
	}
	return svid, nil
}
