package ca_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

func madeAuthority(t testing.TB, now time.Time) *statev1.Authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	td := spiffeid.RequireTrustDomainFromString("banking.example")
	template, err := ca.AuthorityTemplate(ca.AuthorityRequest{TrustDomain: td, PublicKey: key.Public(), Serial: [16]byte{1}, Now: now, Phase: 48 * time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	a, err := ca.NewAuthority(td, "member", der, nil, 48*time.Hour, now)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// What the doors make passes what every replica looks at, in every century.
func TestCheckAuthorityCertificate(t *testing.T) {
	for _, now := range []time.Time{time.Date(2026, 11, 21, 0, 0, 0, 0, time.UTC), time.Date(2049, 12, 30, 0, 0, 0, 0, time.UTC), time.Date(2051, 1, 1, 0, 0, 0, 0, time.UTC)} {
		a := madeAuthority(t, now)
		if err := ca.CheckAuthorityCertificate("banking.example", a); err != nil {
			t.Fatalf("%v: %v", now, err)
		}
		for name, change := range map[string]func(*statev1.Authority){
			"another life":    func(a *statev1.Authority) { a.NotAfter++ },
			"another begin":   func(a *statev1.Authority) { a.NotBefore-- },
			"another key":     func(a *statev1.Authority) { a.PublicKey[40] ^= 1 },
			"cut off":         func(a *statev1.Authority) { a.Certificate = a.Certificate[:len(a.Certificate)-1] },
			"something after": func(a *statev1.Authority) { a.Certificate = append(a.Certificate, 0) },
			"no name": func(a *statev1.Authority) {
				a.Certificate = bytes.Replace(a.Certificate, []byte{0x55, 0x1d, 0x11}, []byte{0x55, 0x1d, 0x12}, 1)
			},
			"empty": func(a *statev1.Authority) { a.Certificate = nil },
		} {
			bad := proto.CloneOf(a)
			change(bad)
			if ca.CheckAuthorityCertificate("banking.example", bad) == nil {
				t.Errorf("%s is accepted", name)
			}
		}
		for _, td := range []string{"trading.example", "banking.exampl", "banking.example.com", ""} {
			if ca.CheckAuthorityCertificate(td, a) == nil {
				t.Errorf("accepted for %q", td)
			}
		}
	}
}

func TestVerifyAuthority(t *testing.T) {
	a := madeAuthority(t, time.Now())
	node, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(node.Public())
	if err != nil {
		t.Fatal(err)
	}
	a.MemberId = ca.KeyID(spki)
	cluster := &statev1.Cluster{TrustDomain: "banking.example", Id: []byte("0123456789abcdef")}
	sum := ca.AuthorityStatement(cluster, a)
	der, err := ecdsa.SignASN1(rand.Reader, node, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	signature, err := ca.FixedSignature(der)
	if err != nil {
		t.Fatal(err)
	}
	if err := ca.VerifyAuthority(cluster, a, spki, signature); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(a *statev1.Authority){
		"member": func(a *statev1.Authority) { a.MemberId = "other" }, "use": func(a *statev1.Authority) { a.Use++ },
		"key": func(a *statev1.Authority) { a.PublicKey[0]++ }, "certificate": func(a *statev1.Authority) { a.Certificate[0]++ },
		"begin": func(a *statev1.Authority) { a.NotBefore++ }, "end": func(a *statev1.Authority) { a.NotAfter++ },
	} {
		other := proto.CloneOf(a)
		change(other)
		if ca.VerifyAuthority(cluster, other, spki, signature) == nil {
			t.Errorf("another %s is accepted", name)
		}
	}
	for i := range signature {
		wrong := bytes.Clone(signature)
		wrong[i] ^= 1
		if ca.VerifyAuthority(cluster, a, spki, wrong) == nil {
			t.Errorf("byte %d of the signature does not matter", i)
		}
	}
	if ca.VerifyAuthority(cluster, a, nil, nil) == nil || ca.VerifyAuthority(cluster, a, spki[:90], signature) == nil {
		t.Error("accepted without a key")
	}
}

func FuzzCheckAuthorityCertificate(f *testing.F) {
	a := madeAuthority(f, time.Now())
	f.Add(a.GetCertificate())
	f.Add([]byte{0x30, 0x82, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, der []byte) {
		said := proto.CloneOf(a)
		said.Certificate = der
		if ca.CheckAuthorityCertificate("banking.example", said) != nil {
			return
		}
		// What is accepted and parses says the same to the library.
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return
		}
		if len(cert.URIs) != 1 || cert.URIs[0].String() != "spiffe://banking.example" || cert.NotAfter.Unix() != a.GetNotAfter() ||
			!bytes.Equal(cert.RawSubjectPublicKeyInfo, a.GetPublicKey()) || len(cert.DNSNames)+len(cert.EmailAddresses)+len(cert.IPAddresses) > 0 {
			t.Errorf("accepted as %v until %v", cert.URIs, cert.NotAfter)
		}
	})
}

func FuzzFixedSignature(f *testing.F) {
	f.Add([]byte{0x30, 0x06, 0x02, 0x01, 0x01, 0x02, 0x01, 0x01})
	f.Fuzz(func(t *testing.T, der []byte) {
		if fixed, err := ca.FixedSignature(der); err == nil && len(fixed) != 64 {
			t.Errorf("%d bytes", len(fixed))
		}
	})
}
