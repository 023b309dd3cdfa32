package peer_test

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/entente-mesh/entente/internal/peer"
	"github.com/entente-mesh/entente/internal/peer/peertest"
)

// shake makes both ends of a connection shake hands and exchange a byte, which shows a TLS 1.3 client the server's refusal.
func shake(t *testing.T, client, server *tls.Config) (c, s *tls.Conn, clientErr, serverErr error) {
	t.Helper()
	a, b := connect(t)
	c, s = tls.Client(a, client), tls.Server(b, server)
	t.Cleanup(func() { a.Close(); b.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()

	done := make(chan error, 1)
	go func() {
		err := s.HandshakeContext(ctx)
		if err == nil {
			_, err = s.Write([]byte{1})
		}
		if err != nil {
			b.Close()
		}
		done <- err
	}()
	clientErr = c.HandshakeContext(ctx)
	if clientErr == nil {
		_, clientErr = io.ReadFull(c, make([]byte, 1))
	}
	if clientErr != nil {
		a.Close()
	}
	return c, s, clientErr, <-done
}

// connect returns the two ends of a loopback connection; net.Pipe has no buffer for the tickets of a server that goes first.
func connect(t *testing.T) (client, server net.Conn) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	if client, err = net.Dial("tcp", listener.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if server, err = listener.Accept(); err != nil {
		t.Fatal(err)
	}
	return client, server
}

// Requirements: 45, 142.
func TestMutualTLS(t *testing.T) {
	bank, trade := peertest.NewAuthority(banking), peertest.NewAuthority(trading)
	both := x509bundle.NewSet(bank.Bundle(), trade.Bundle())
	accounts, portfolio := bank.Issue("/accounts"), trade.Issue("/portfolio")
	forged := trade.IssueFor(peertest.NewKey(), banking, "/gateway")
	gateway := bank.Issue("/gateway")

	tests := []struct {
		name           string
		client, server *tls.Config
		clientOK       bool // the client accepts the server
		ok             bool
	}{
		{"good", peer.ClientTLS(portfolio, both, peer.AnyOf(accounts.ID), "h2"), peer.ServerTLS(accounts, both, peer.AnyOf(portfolio.ID), "h2"), true, true},
		{"server of another name", peer.ClientTLS(portfolio, both, peer.AnyOf(gateway.ID)), peer.ServerTLS(accounts, both, peer.AnyVerified()), false, false},
		{"client of another name", peer.ClientTLS(portfolio, both, peer.AnyVerified()), peer.ServerTLS(accounts, both, peer.AnyOf(gateway.ID)), true, false},
		{"client of another domain (I6)", peer.ClientTLS(portfolio, both, peer.AnyVerified()), peer.ServerTLS(accounts, bank.Bundle(), peer.AnyVerified()), true, false},
		{"server of another domain (I6)", peer.ClientTLS(portfolio, trade.Bundle(), peer.AnyVerified()), peer.ServerTLS(accounts, both, peer.AnyVerified()), false, false},
		{"server's name signed by another domain (I2)", peer.ClientTLS(portfolio, both, peer.AnyVerified()), peer.ServerTLS(forged, both, peer.AnyVerified()), false, false},
		{"client's name signed by another domain (I2)", peer.ClientTLS(forged, both, peer.AnyVerified()), peer.ServerTLS(accounts, both, peer.AnyVerified()), true, false},
		{"client without certificate", peer.ClientTLS(nil, both, peer.AnyVerified()), peer.ServerTLS(accounts, both, peer.AnyVerified()), true, false},
		{"client without certificate, allowed", peer.ClientTLS(nil, both, peer.AnyVerified()), peer.AllowClient(peer.FromSVID(accounts), peer.SVID(both, peer.AnyVerified())), true, true},
		{"client with a good one, allowed", peer.ClientTLS(portfolio, both, peer.AnyVerified()), peer.AllowClient(peer.FromSVID(accounts), peer.SVID(both, peer.AnyVerified())), true, true},
		{"client with a bad one, not allowed", peer.ClientTLS(forged, both, peer.AnyVerified()), peer.AllowClient(peer.FromSVID(accounts), peer.SVID(both, peer.AnyVerified())), true, false},
		{"client not asked", peer.ClientTLS(portfolio, both, peer.AnyVerified()), peer.NoClient(peer.FromSVID(accounts)), true, true},
		{"nobody authorised", peer.ClientTLS(portfolio, both, nil), peer.ServerTLS(accounts, both, peer.AnyVerified()), false, false},
		{"no protocol in common", peer.ClientTLS(portfolio, both, peer.AnyVerified(), "x"), peer.ServerTLS(accounts, both, peer.AnyVerified(), "h2"), false, false},
		{"server has no SVID", peer.ClientTLS(portfolio, both, peer.AnyVerified()), peer.ServerTLS(noSVID{}, both, peer.AnyVerified()), false, false},
		{"server has no source", peer.ClientTLS(portfolio, both, peer.AnyVerified()), peer.ServerTLS(nil, both, peer.AnyVerified()), false, false},
		{"client has no SVID", peer.ClientTLS(noSVID{}, both, peer.AnyVerified()), peer.ServerTLS(accounts, both, peer.AnyVerified()), false, false},
		{"go-spiffe client", tlsconfig.MTLSClientConfig(portfolio, both, tlsconfig.AuthorizeID(accounts.ID)), peer.ServerTLS(accounts, both, peer.AnyOf(portfolio.ID)), true, true},
		{"go-spiffe server", peer.ClientTLS(portfolio, both, peer.AnyOf(accounts.ID)), tlsconfig.MTLSServerConfig(accounts, both, tlsconfig.AuthorizeAny()), true, true},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			c, s, clientErr, serverErr := shake(t, test.client, test.server)
			if ok := clientErr == nil && serverErr == nil; ok != test.ok {
				t.Fatalf("client: %v, server: %v", clientErr, serverErr)
			}
			if got := c.ConnectionState().HandshakeComplete; got != test.clientOK {
				t.Errorf("client completed its handshake: %t (%v)", got, clientErr)
			}
			if !test.ok {
				return
			}
			if id, err := peer.IDFromState(c.ConnectionState()); err != nil || id != accounts.ID {
				t.Errorf("client sees %v, %v", id, err)
			}
			if len(s.ConnectionState().PeerCertificates) > 0 {
				if id, err := peer.IDFromState(s.ConnectionState()); err != nil || id != portfolio.ID {
					t.Errorf("server sees %v, %v", id, err)
				}
			} else if _, err := peer.IDFromState(s.ConnectionState()); err == nil {
				t.Error("server sees an ID where there is no certificate")
			}
		})
	}
}

type noSVID struct{}

func (noSVID) GetX509SVID() (*x509svid.SVID, error) { return nil, errNo }

// Certificates and bundles are asked for at each handshake.
// Requirements: 46.
func TestSourcesAreLive(t *testing.T) {
	bank, trade := peertest.NewAuthority(banking), peertest.NewAuthority(trading)
	set := x509bundle.NewSet(bank.Bundle(), trade.Bundle())
	own := &liveSVID{}
	first, second := bank.Issue("/accounts"), bank.Issue("/accounts")
	own.Store(first)
	server := peer.ServerTLS(own, set, peer.AnyVerified())
	client := peer.ClientTLS(trade.Issue("/portfolio"), set, peer.AnyVerified())

	c, _, clientErr, serverErr := shake(t, client, server)
	if clientErr != nil || serverErr != nil {
		t.Fatal(clientErr, serverErr)
	}
	if got := peer.KeyID(c.ConnectionState().PeerCertificates[0]); got != peer.KeyID(first.Certificates[0]) {
		t.Error("not the first SVID")
	}
	own.Store(second)
	if c, _, _, _ = shake(t, client, server); peer.KeyID(c.ConnectionState().PeerCertificates[0]) != peer.KeyID(second.Certificates[0]) {
		t.Error("not the second SVID")
	}
	set.Remove(trading)
	if _, _, _, serverErr = shake(t, client, server); serverErr == nil {
		t.Error("trading is accepted after its bundle was removed")
	}
}

type liveSVID struct{ atomic.Pointer[x509svid.SVID] }

func (l *liveSVID) GetX509SVID() (*x509svid.SVID, error) { return l.Load(), nil }

// No session is resumed past a verification. The control shows that a server that gives out tickets would resume.
// Requirements: 46, T2.
func TestResumption(t *testing.T) {
	bank, trade := peertest.NewAuthority(banking), peertest.NewAuthority(trading)
	accounts, portfolio := bank.Issue("/accounts"), trade.Issue("/portfolio")
	tests := []struct {
		name    string
		server  func(x509bundle.Source) *tls.Config
		resumes bool
		open    bool // to trading after its bundle was removed
	}{
		{"ours", func(b x509bundle.Source) *tls.Config { return peer.ServerTLS(accounts, b, peer.AnyVerified()) }, false, false},
		{"ours, were tickets on", func(b x509bundle.Source) *tls.Config {
			config := peer.ServerTLS(accounts, b, peer.AnyVerified())
			config.SessionTicketsDisabled = false
			return config
		}, true, false},
		{"control: verified only in a full handshake", func(b x509bundle.Source) *tls.Config {
			return tlsconfig.MTLSServerConfig(accounts, b, tlsconfig.AuthorizeAny())
		}, true, true},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			set := x509bundle.NewSet(bank.Bundle(), trade.Bundle())
			server := test.server(set)
			client := peer.ClientTLS(portfolio, bank.Bundle(), peer.AnyVerified())
			client.ClientSessionCache = tls.NewLRUClientSessionCache(8)
			client.ServerName = "accounts"
			client.SessionTicketsDisabled = false // an attacker's client does as it likes

			if _, _, clientErr, serverErr := shake(t, client, server); clientErr != nil || serverErr != nil {
				t.Fatal(clientErr, serverErr)
			}
			c, _, clientErr, _ := shake(t, client, server)
			if clientErr != nil {
				t.Fatal(clientErr)
			}
			if got := c.ConnectionState().DidResume; got != test.resumes {
				t.Errorf("resumed: %t", got)
			}
			set.Remove(trading)
			if _, _, _, serverErr := shake(t, client, server); (serverErr == nil) != test.open {
				t.Errorf("after the bundle is gone: %v", serverErr)
			}
		})
	}
}

func TestProtocol(t *testing.T) {
	bank := peertest.NewAuthority(banking)
	server := peer.ServerTLS(bank.Issue("/accounts"), bank.Bundle(), peer.AnyVerified(), "h2", "http/1.1")
	client := peer.ClientTLS(bank.Issue("/ledger"), bank.Bundle(), peer.AnyVerified(), "h2")
	c, s, clientErr, serverErr := shake(t, client, server)
	if clientErr != nil || serverErr != nil {
		t.Fatal(clientErr, serverErr)
	}
	for _, state := range []tls.ConnectionState{c.ConnectionState(), s.ConnectionState()} {
		if state.Version != tls.VersionTLS13 || state.CurveID != tls.X25519MLKEM768 || state.NegotiatedProtocol != "h2" {
			t.Errorf("version %x, group %s, protocol %q", state.Version, state.CurveID, state.NegotiatedProtocol)
		}
	}
	if client.CurvePreferences != nil || server.CurvePreferences != nil {
		t.Error("curves are pinned")
	}

	old := client.Clone()
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	if _, _, _, serverErr := shake(t, old, server); serverErr == nil {
		t.Error("TLS 1.2 is accepted")
	}
}

func TestPinned(t *testing.T) {
	node := func() (peer.Certificate, string) {
		cert, err := peer.SelfSigned(peertest.NewKey(), "ca-1")
		if err != nil {
			t.Fatal(err)
		}
		return func() (*tls.Certificate, error) { return &cert, nil }, peer.KeyID(cert.Leaf)
	}
	only := func(known ...string) func(string) error {
		return func(keyID string) error {
			for _, k := range known {
				if k == keyID {
					return nil
				}
			}
			return errNo
		}
	}
	one, oneKey := node()
	two, twoKey := node()
	three, _ := node()
	tests := []struct {
		name           string
		client, server *tls.Config
		ok             bool
	}{
		{"good", peer.PinnedClientTLS(one, only(twoKey)), peer.PinnedServerTLS(two, only(oneKey)), true},
		{"unknown client", peer.PinnedClientTLS(three, only(twoKey)), peer.PinnedServerTLS(two, only(oneKey)), false},
		{"unknown server", peer.PinnedClientTLS(one, only(twoKey)), peer.PinnedServerTLS(three, only(oneKey)), false},
		{"no client certificate", peer.PinnedClientTLS(nil, only(twoKey)), peer.PinnedServerTLS(two, only(oneKey)), false},
		{"nobody pinned", peer.PinnedClientTLS(one, only(twoKey)), peer.PinnedServerTLS(two, nil), false},
		{"no certificate yet", peer.PinnedClientTLS(one, only(twoKey)), peer.PinnedServerTLS(func() (*tls.Certificate, error) { return nil, errNo }, only(oneKey)), false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			c, s, clientErr, serverErr := shake(t, test.client, test.server)
			if ok := clientErr == nil && serverErr == nil; ok != test.ok {
				t.Fatalf("client: %v, server: %v", clientErr, serverErr)
			}
			if !test.ok {
				return
			}
			if peer.KeyID(c.ConnectionState().PeerCertificates[0]) != twoKey || peer.KeyID(s.ConnectionState().PeerCertificates[0]) != oneKey {
				t.Error("other keys than pinned")
			}
			if _, err := peer.IDFromState(c.ConnectionState()); err == nil {
				t.Error("a node certificate passes for an SVID")
			}
		})
	}
}

// A node is accepted by its pinned key or by its SVID, and by nothing else.
func TestEither(t *testing.T) {
	bank, rogue := peertest.NewAuthority(banking), peertest.NewAuthority(banking)
	pinned, err := peer.SelfSigned(peertest.NewKey(), "ca-1")
	if err != nil {
		t.Fatal(err)
	}
	check := peer.Either(
		peer.Pin(func(keyID string) error {
			if keyID != peer.KeyID(pinned.Leaf) {
				return errNo
			}
			return nil
		}),
		peer.SVID(bank.Bundle(), peer.AnyOf(id("spiffe://banking.example/entente/ca/ca-1"))))
	tests := []struct {
		name string
		cert *x509.Certificate
		ok   bool
	}{
		{"pinned", pinned.Leaf, true},
		{"SVID", bank.Issue("/entente/ca/ca-1").Certificates[0], true},
		{"SVID of another", bank.Issue("/accounts").Certificates[0], false},
		{"forged", rogue.Issue("/entente/ca/ca-1").Certificates[0], false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			err := check(tls.ConnectionState{PeerCertificates: []*x509.Certificate{test.cert}})
			if (err == nil) != test.ok {
				t.Error(err)
			}
			if !test.ok && !errors.Is(err, errNo) {
				t.Errorf("%v does not tell every reason", err)
			}
		})
	}
	if err := peer.Either()(tls.ConnectionState{}); err == nil {
		t.Error("no check accepts")
	}
}

func TestSelfSigned(t *testing.T) {
	key := peertest.NewKey()
	cert, err := peer.SelfSigned(key, "ca-1")
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(spki)
	if got := peer.KeyID(cert.Leaf); got != hex.EncodeToString(sum[:]) {
		t.Errorf("key id %s", got)
	}
	if cert.Leaf.IsCA || len(cert.Leaf.URIs) > 0 || cert.Leaf.NotAfter.Year() != 9999 || cert.Leaf.Subject.CommonName != "ca-1" {
		t.Errorf("certificate: CA %t, names %v, until %s, of %s", cert.Leaf.IsCA, cert.Leaf.URIs, cert.Leaf.NotAfter, cert.Leaf.Subject)
	}
}
