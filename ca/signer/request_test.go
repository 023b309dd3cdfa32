package signer

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"testing"
)

func TestKeyOf(t *testing.T) {
	key := newKey(t)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	got, err := KeyOf(csr)
	if err != nil || !key.PublicKey.Equal(got) {
		t.Fatalf("got %v, %v", got, err)
	}
	forged := append([]byte(nil), csr...)
	forged[len(forged)-1] ^= 1
	for name, bad := range map[string][]byte{
		"forged signature": forged,
		"cut short":        csr[:len(csr)-3],
		"empty":            nil,
		"too large":        make([]byte, MaxCSR+1),
	} {
		if _, err := KeyOf(bad); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// sameJudgement compares KeyOf with what x509 says of a request.
func sameJudgement(t *testing.T, csr []byte) (plain bool) {
	t.Helper()
	_, _, _, plain = plainRequest(csr)
	got, err := KeyOf(csr)
	parsed, want := x509.ParseCertificateRequest(csr)
	if want == nil {
		want = parsed.CheckSignature()
	}
	if len(csr) > MaxCSR {
		want = errors.New("too large")
	}
	if (err == nil) != (want == nil) {
		t.Fatalf("%x\ngot %v, x509 says %v", csr, err, want)
	}
	if err == nil && !parsed.PublicKey.(interface{ Equal(crypto.PublicKey) bool }).Equal(got) {
		t.Fatalf("%x: not the key that x509 reads", csr)
	}
	return plain
}

// Requests that say only their key are compared, not parsed: with the same judgement, of
// them and of all that is near them.
func TestPlainRequest(t *testing.T) {
	key := newKey(t)
	request := func(template x509.CertificateRequest, key crypto.Signer) []byte {
		csr, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
		if err != nil {
			t.Fatal(err)
		}
		return csr
	}
	for range 20 { // signatures differ in length
		if !sameJudgement(t, request(x509.CertificateRequest{}, key)) {
			t.Error("a plain request was parsed")
		}
	}
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	for name, other := range map[string][]byte{
		"P-384":     request(x509.CertificateRequest{}, p384),
		"Ed25519":   request(x509.CertificateRequest{}, ed),
		"SHA-384":   request(x509.CertificateRequest{SignatureAlgorithm: x509.ECDSAWithSHA384}, key),
		"a subject": request(x509.CertificateRequest{Subject: pkix.Name{CommonName: "a"}}, key),
		"a name":    request(x509.CertificateRequest{DNSNames: []string{"a"}}, key),
	} {
		if sameJudgement(t, other) {
			t.Errorf("%s: taken for a plain request", name)
		}
	}
	csr := request(x509.CertificateRequest{}, key)
	for i := range csr {
		for _, flip := range []byte{1, 0x80, 0xff} {
			bad := bytes.Clone(csr)
			bad[i] ^= flip
			sameJudgement(t, bad)
		}
		sameJudgement(t, csr[:i])
		sameJudgement(t, append(bytes.Clone(csr), csr[:i+1]...))
	}
}

func FuzzKeyOf(f *testing.F) {
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	csr, _ := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	f.Add(csr)
	f.Fuzz(func(t *testing.T, csr []byte) { sameJudgement(t, csr) })
}

func BenchmarkKeyOf(b *testing.B) {
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	csr, _ := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	for b.Loop() {
		if _, err := KeyOf(csr); err != nil {
			b.Fatal(err)
		}
	}
}
