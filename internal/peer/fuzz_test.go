package peer_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/internal/peer"
	"github.com/entente-mesh/entente/internal/peer/peertest"
)

// An ID is believed only if it stands in the certificate, byte for byte.
func FuzzIDFromState(f *testing.F) {
	for _, opt := range []peertest.Option{
		func(*x509.Certificate) {},
		names("spiffe://banking.example/accounts#"),
		names("spiffe://banking.example/a", "spiffe://banking.example/b"),
		func(c *x509.Certificate) { c.DNSNames = []string{"accounts.banking.example"} },
	} {
		for _, ext := range peertest.NewAuthority(banking).Issue("/accounts", opt).Certificates[0].Extensions {
			if ext.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 17}) {
				f.Add(ext.Value)
			}
		}
	}
	f.Fuzz(func(t *testing.T, names []byte) {
		cert := &x509.Certificate{Extensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: names}}}
		id, err := peer.IDFromState(tls.ConnectionState{HandshakeComplete: true, PeerCertificates: []*x509.Certificate{cert}})
		if err != nil {
			return
		}
		if again, err := spiffeid.FromString(id.String()); err != nil || again != id || id.Path() == "" || len(id.String()) > 2048 {
			t.Fatalf("%q, %v", id, err)
		}
		if bytes.Count(names, []byte(id.String())) < 1 {
			t.Fatalf("%s does not stand in %q", id, names)
		}
	})
}
