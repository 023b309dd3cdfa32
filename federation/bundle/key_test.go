package bundle_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/federation/bundle"
)

// A key goes into a bundle and comes out of it as the same key.
func TestKey(t *testing.T) {
	ec, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	rs, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	td := spiffeid.RequireTrustDomainFromString("banking.example")
	for _, public := range []crypto.PublicKey{ec.Public(), rs.Public()} {
		spki, err := x509.MarshalPKIXPublicKey(public)
		if err != nil {
			t.Fatal(err)
		}
		key, err := bundle.NewKey("k1", spki)
		if err != nil {
			t.Fatal(err)
		}
		text, err := (&bundle.Bundle{TrustDomain: td, JWT: []bundle.Key{key}}).Marshal()
		if err != nil {
			t.Fatal(err)
		}
		read, skipped, err := bundle.Parse(td, text)
		if err != nil || len(skipped) > 0 || len(read.JWT) != 1 || len(read.WIT) != 0 {
			t.Fatalf("%s: %v %v", text, skipped, err)
		}
		back, err := read.JWT[0].Public()
		if err != nil || read.JWT[0].ID != "k1" || !back.(interface{ Equal(crypto.PublicKey) bool }).Equal(public) {
			t.Errorf("%T: %v, %v", public, back, err)
		}
	}
	if _, err := bundle.NewKey("k1", []byte("no key")); err == nil {
		t.Error("a key that is none")
	}
	if _, err := (bundle.Key{ID: "k1", JWK: []byte(`{"kty":"oct","k":"AAAA"}`)}).Public(); err == nil {
		t.Error("a secret is no public key")
	}
}
