package signer

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/ca"
)

// What is written by hand is, byte by byte, what crypto/x509 writes.
func TestCertificateIsThatOfTheLibrary(t *testing.T) {
	key := newKey(t)
	authority, err := x509.ParseCertificate(newAuthority(t, key, 48*time.Hour).GetCertificate())
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	edKey, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	long := make([]string, 40) // over 255 bytes of names
	for i := range long {
		long[i] = fmt.Sprintf("instance-%d.accounts.banking.example", i)
	}
	w := &Signer{}
	for _, public := range []crypto.PublicKey{newKey(t).Public(), p384.Public(), rsaKey.Public(), edKey} {
		for _, names := range [][]string{nil, {"accounts.banking.example"}, long} {
			for _, origin := range []ca.Origin{{}, {Entry: "service/accounts", EntryGeneration: 1<<44 | 7, Agent: "h1", AgentGeneration: 5}} {
				for _, first := range []byte{0x00, 0x01, 0x7f, 0x80, 0xff} {
					serial := [16]byte{first}
					rand.Read(serial[1:])
					template, err := ca.LeafTemplate(ca.LeafRequest{
						ID: spiffeid.RequireFromPath(banking, "/ns/payments/sa/accounts"), DNSNames: names, PublicKey: public, Serial: serial,
						Now: time.Now(), Life: time.Hour, Authority: authority, Origin: origin,
					})
					if err != nil {
						t.Fatal(err)
					}
					want, err := x509.CreateCertificate(rand.Reader, template, authority, public, key)
					if err != nil {
						t.Fatal(err)
					}
					got, err := w.certify(template, authority, key)
					if err != nil {
						t.Fatal(err)
					}
					theirs, _ := x509.ParseCertificate(want)
					ours, err := x509.ParseCertificate(got)
					if err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(ours.RawTBSCertificate, theirs.RawTBSCertificate) {
						t.Fatalf("%T, %d names, origin %v, serial %x:\n% x\nthe library writes\n% x", public, len(names), origin, serial, ours.RawTBSCertificate, theirs.RawTBSCertificate)
					}
					if err := ours.CheckSignatureFrom(authority); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
	}
}

func TestDates(t *testing.T) {
	for text, want := range map[string]string{
		"2026-11-20T12:00:00Z":      "\x17\x0d261120120000Z",
		"2049-12-31T23:59:59Z":      "\x17\x0d491231235959Z",
		"2050-01-01T00:00:00Z":      "\x18\x0f20500101000000Z",
		"2026-11-20T14:00:00+02:00": "\x17\x0d261120120000Z",
	} {
		when, err := time.Parse(time.RFC3339, text)
		if err != nil {
			t.Fatal(err)
		}
		if got := string(date(when)); got != want {
			t.Errorf("%s: %q, not %q", text, got, want)
		}
	}
}

// hardware is a key that is not in memory and makes wrong signatures when it is broken.
type hardware struct {
	*ecdsa.PrivateKey
	broken bool
	signed int
}

func (h *hardware) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	h.signed++
	if h.broken {
		digest = bytes.Repeat([]byte{1}, len(digest))
	}
	return h.PrivateKey.Sign(random, digest, opts)
}

// Every signature of a key that is elsewhere is checked.
func TestKeyElsewhereIsAlwaysChecked(t *testing.T) {
	w := newWorld(t, 48*time.Hour, 1)
	key := &hardware{PrivateKey: newKey(t)}
	w.authority = newAuthority(t, key.PrivateKey, 48*time.Hour)
	if _, err := w.Add(key); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := w.Sign(t.Context(), request(t)); err != nil {
			t.Fatal(err)
		}
	}
	key.broken = true
	for range 3 {
		if _, err := w.Sign(t.Context(), request(t)); err == nil {
			t.Fatal("a wrong signature was handed out")
		}
	}
	if key.signed != 6 {
		t.Errorf("it signed %d times", key.signed)
	}
}

// The library sees that a key is not the authority's, and so must we.
func TestKeyOfAnotherAuthority(t *testing.T) {
	w := newWorld(t, 48*time.Hour, 1)
	w.keys[w.authority.GetId()] = newKey(t)
	if _, err := w.Sign(t.Context(), request(t)); err == nil {
		t.Error("signed with a key that is not the authority's")
	}
}
