package main

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/internal/peer"
	"github.com/entente-mesh/entente/meshagent/nodeattest"
)

// subscriber is a host that was admitted by a join token as every host is. This program
// holds its key and speaks for it with a bare client, which costs less than an agent.
type subscriber struct {
	name    string
	key     crypto.Signer
	svid    tls.Certificate
	members []*statev1.Member
}

// admit has a host attest by a new token.
func (d *domain) admit(ctx context.Context, name string) (*subscriber, error) {
	text, err := d.token(ctx, name)
	if err != nil {
		return nil, err
	}
	return d.attest(ctx, name, text)
}

// attest has a host attest by a token.
func (d *domain) attest(ctx context.Context, name, text string) (*subscriber, error) {
	token, err := ca.ParseToken(text)
	if err != nil {
		return nil, err
	}
	s := &subscriber{name: name}
	if s.key, err = nodeattest.NewKey(); err != nil {
		return nil, err
	}
	csr, err := nodeattest.CSR(s.key)
	if err != nil {
		return nil, err
	}
	admitted, err := client.Attest(ctx, client.Config{
		TrustDomain: spiffeid.RequireTrustDomainFromString(trustDomain), Addresses: token.Addresses, Pins: token.Pinned,
	}, nodeattest.ByToken(token, s.key), csr)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(admitted.Certificates[0])
	if err != nil {
		return nil, err
	}
	s.svid = tls.Certificate{Certificate: admitted.Certificates, PrivateKey: s.key, Leaf: leaf}
	s.members = admitted.Members
	return s, nil
}

// dial opens a connection of its own to the first CA node, by its SVID, with small buffers.
func (s *subscriber) dial() (*grpc.ClientConn, error) {
	config := peer.Client(
		func() (*tls.Certificate, error) { return &s.svid, nil },
		peer.Pin(func(keyID string) error {
			if slices.ContainsFunc(s.members, func(m *statev1.Member) bool { return m.GetId() == keyID }) {
				return nil
			}
			return fmt.Errorf("it is no CA node")
		}), "h2")
	return grpc.NewClient("passthrough:///"+s.members[0].GetApiAddress(), grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithReadBufferSize(0), grpc.WithDisableServiceConfig(), grpc.WithDisableRetry(), grpc.WithIdleTimeout(0),
		grpc.WithInitialWindowSize(1<<20), grpc.WithInitialConnWindowSize(1<<20), // as ca/client
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16*mib)))
}
