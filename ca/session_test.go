package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"testing"
	"time"
)

func aSession() Session {
	return Session{Cluster: []byte("0123456789abcdef"), Subscriber: "h1", BootID: "boot", Connect: 7, NodeID: "node"}
}

// A proof holds for the session that was signed and for no other one; the fields are
// told apart wherever one ends and the next begins.
func TestSessionProofHoldsForOneSession(t *testing.T) {
	p256, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	rsaKey, _ := rsa.GenerateKey(rand.Reader, 2048)
	for name, key := range map[string]crypto.Signer{"P-256": p256, "P-384": p384, "Ed25519": ed, "RSA": rsaKey} {
		t.Run(name, func(t *testing.T) {
			spki, signature, err := aSession().Sign(rand.Reader, key)
			if err != nil {
				t.Fatal(err)
			}
			if id, err := aSession().Verify(spki, signature); err != nil || id != KeyID(spki) {
				t.Fatalf("control: %q, %v", id, err)
			}
			for what, edit := range map[string]func(*Session){
				"another cluster":    func(s *Session) { s.Cluster = []byte("fedcba9876543210") },
				"another subscriber": func(s *Session) { s.Subscriber = "h2" },
				"another boot":       func(s *Session) { s.BootID = "boot2" },
				"a later connect":    func(s *Session) { s.Connect++ },
				"another CA node":    func(s *Session) { s.NodeID = "node2" },
				"shifted fields":     func(s *Session) { s.Subscriber, s.BootID = "h1b", "oot" },
			} {
				s := aSession()
				edit(&s)
				if _, err := s.Verify(spki, signature); err == nil {
					t.Errorf("the proof holds for %s", what)
				}
			}
		})
	}
	spki, signature, _ := aSession().Sign(rand.Reader, p256)
	other, _, _ := aSession().Sign(rand.Reader, p384)
	if _, err := aSession().Verify(other, signature); err == nil {
		t.Error("the proof holds for another key")
	}
	if _, err := aSession().Verify(spki, append(signature, make([]byte, maxSessionProof)...)); err == nil {
		t.Error("a signature of any length is looked at")
	}
}

func FuzzVerifySession(f *testing.F) {
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	spki, signature, _ := aSession().Sign(rand.Reader, key)
	f.Add(spki, signature)
	f.Add([]byte{}, []byte{})
	f.Fuzz(func(t *testing.T, spki, signature []byte) {
		if id, err := aSession().Verify(spki, signature); err == nil && id != KeyID(spki) {
			t.Errorf("signed by %s", id)
		}
	})
}

// Boots are in the order of their starts, and only those that say when that was.
func TestEarlierBoot(t *testing.T) {
	now := time.Unix(1_790_000_000, 0)
	first, second := NewBootID(now, [8]byte{255}), NewBootID(now.Add(time.Nanosecond), [8]byte{})
	for _, test := range []struct {
		x, y string
		want bool
	}{
		{first, second, true}, {second, first, false}, {first, first, false},
		{first, "0123456789abcdef0123456789abcdef", false}, {"0123456789abcdef0123456789abcdef", first, false},
		{"t", first, false}, {first[:32], second, false}, {first + "0", second, false}, {"t+00000000000000" + first[16:], second, false}, {"", second, false},
	} {
		if got := EarlierBoot(test.x, test.y); got != test.want {
			t.Errorf("%q is earlier than %q: %v", test.x, test.y, got)
		}
	}
	if len(first) != len(second) || len(first) > 64 {
		t.Errorf("%q, %q", first, second)
	}
}
