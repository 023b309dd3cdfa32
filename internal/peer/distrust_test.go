package peer_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/internal/peer"
	"github.com/entente-mesh/entente/internal/peer/peertest"
)

// wary is a source of bundles that distrusts one SVID as long as told.
type wary struct {
	x509bundle.Source
	refuse atomic.Bool
	asked  atomic.Int64
}

func (w *wary) Distrusted(path []*x509.Certificate) error {
	w.asked.Add(1)
	if len(path) < 2 || path[0].IsCA || !path[len(path)-1].IsCA {
		return errors.New("not a path from leaf to authority")
	}
	if w.refuse.Load() {
		return errors.New("its agent was banned")
	}
	return nil
}

// I4: an SVID that its bundle verifies is refused all the same when it is distrusted,
// at a new connection and at one that is open.
func TestDistrust(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("banking.example")
	authority := peertest.NewAuthority(td)
	svid := authority.Issue("/accounts")
	source := &wary{Source: authority.Bundle()}
	state := tls.ConnectionState{PeerCertificates: svid.Certificates, HandshakeComplete: true}
	recheck := peer.Recheck(state, source, peer.AnyVerified())
	for range 2 { // the second time the path is known
		if _, err := peer.Verify(svid.Certificates, source, time.Now()); err != nil {
			t.Fatalf("control: %v", err)
		}
		if err := recheck(); err != nil {
			t.Fatalf("control: %v", err)
		}
	}
	source.refuse.Store(true)
	if _, err := peer.Verify(svid.Certificates, source, time.Now()); err == nil {
		t.Error("a distrusted SVID verifies")
	}
	if err := recheck(); err == nil {
		t.Error("an open connection of a distrusted SVID stays")
	}
	if err := peer.SVID(source, peer.AnyVerified())(state); err == nil {
		t.Error("a handshake with a distrusted SVID succeeds")
	}
	source.refuse.Store(false)
	if err := recheck(); err != nil {
		t.Errorf("control: %v", err)
	}
	if source.asked.Load() < 6 {
		t.Errorf("asked %d times only", source.asked.Load())
	}
}
