package bundle_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"net/url"
	"testing"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/federation/bundle"
)

func signers(t testing.TB) map[string]crypto.Signer {
	t.Helper()
	keys := map[string]crypto.Signer{}
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521()} {
		key, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		keys[curve.Params().Name] = key
	}
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	keys["Ed25519"] = key
	if keys["RSA"], err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		t.Fatal(err)
	}
	return keys
}

func authority(t testing.TB, name string, public crypto.PublicKey, by crypto.Signer) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "x"}, NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	if name != "" {
		u, err := url.Parse(name)
		if err != nil {
			t.Fatal(err)
		}
		template.URIs = []*url.URL{u}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, by)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// proven makes a token key with the proof that its holder would make.
func proven(t testing.TB, id string, key crypto.Signer, use statev1.KeyUse, td string) bundle.Key {
	t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	k, err := bundle.NewKey(id, spki)
	if err != nil {
		t.Fatal(err)
	}
	alg, err := ca.TokenAlgorithm(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(ca.KeyProof(td, alg, use, ca.KeyID(spki)))
	signature, err := key.Sign(rand.Reader, sum[:], crypto.SHA256)
	if err == nil && alg == ca.ES256 {
		signature, err = ca.FixedSignature(signature)
	}
	if err != nil {
		t.Fatal(err)
	}
	k.Proof = ca.KeyProofOf(td, &statev1.Authority{Id: ca.KeyID(spki), Use: use, PublicKey: spki, Proof: signature})
	return k
}

// What Apply reads by itself is what our writer writes and our reader reads, of every kind of
// key; and whose a key is follows from what it signed alone.
func TestOwnerOfKeys(t *testing.T) {
	const td = "trading.example"
	keys := signers(t)
	other := keys["P-256"]
	for kind, key := range keys {
		if kind == "P-256" {
			fresh, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			key = fresh
		}
		spki, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			t.Fatal(err)
		}
		for what, test := range map[string]struct {
			cert *x509.Certificate
			want string
		}{
			"self-signed":            {authority(t, "spiffe://trading.example", key.Public(), key), td},
			"signed by another":      {authority(t, "spiffe://trading.example", key.Public(), other), ""},
			"self-signed, no name":   {authority(t, "", key.Public(), key), ""},
			"self-signed, a path":    {authority(t, "spiffe://trading.example/x", key.Public(), key), ""},
			"self-signed, no SPIFFE": {authority(t, "https://trading.example", key.Public(), key), ""},
		} {
			jwks, err := (&bundle.Bundle{TrustDomain: trading, X509: []*x509.Certificate{test.cert}, Sequence: 3}).Marshal()
			if err != nil {
				t.Fatal(err)
			}
			read, sequence, err := ca.BundleKeys(jwks)
			if err != nil || sequence != 3 || len(read) != 1 || read[0].Broken != nil {
				t.Fatalf("%s, %s: %v %+v", kind, what, err, read)
			}
			if read[0].ID != ca.KeyID(spki) || read[0].Use != statev1.KeyUse_KEY_USE_X509 || read[0].Owner() != test.want {
				t.Errorf("%s, %s: id %s, owner %q, want %q", kind, what, read[0].ID, read[0].Owner(), test.want)
			}
		}
	}

	for _, kind := range []string{"P-256", "RSA"} {
		key := proven(t, `k "1" <é>`, keys[kind], statev1.KeyUse_KEY_USE_JWT, td)
		for what, test := range map[string]struct {
			change func(*bundle.Bundle)
			want   string
		}{
			"as made":         {func(*bundle.Bundle) {}, td},
			"without a proof": {func(b *bundle.Bundle) { b.JWT[0].Proof = "" }, ""},
			"no proof at all": {func(b *bundle.Bundle) { b.JWT[0].Proof = "a.b.c" }, ""},
			"for another use": {func(b *bundle.Bundle) { b.WIT, b.JWT = b.JWT, nil }, ""},
			"another key's":   {func(b *bundle.Bundle) { b.JWT[0].JWK = proven(t, "k", signers(t)[kind], 2, td).JWK }, ""},
			"bent":            {func(b *bundle.Bundle) { b.JWT[0].Proof = key.Proof[:len(key.Proof)-8] + "AAAAAAAA" }, ""},
		} {
			b := &bundle.Bundle{TrustDomain: trading, JWT: []bundle.Key{key}, Sequence: 1}
			test.change(b)
			jwks, err := b.Marshal()
			if err != nil {
				t.Fatal(err)
			}
			again, skipped, err := bundle.Parse(trading, jwks)
			if err != nil || len(skipped) > 0 {
				t.Fatal(err, skipped)
			}
			if second, err := again.Marshal(); err != nil || !bytes.Equal(second, jwks) {
				t.Errorf("%s: read and written again it is %s, was %s", what, second, jwks)
			}
			read, _, err := ca.BundleKeys(jwks)
			if err != nil || len(read) != 1 || read[0].Broken != nil || read[0].Owner() != test.want {
				t.Errorf("%s, %s: %v, owner %+v, want %q", kind, what, err, read, test.want)
			}
		}
	}

	// The proof is a JWS that any library reads, and no JWT-SVID.
	proof := proven(t, "k", keys["P-256"], statev1.KeyUse_KEY_USE_JWT, td).Proof
	var header, payload map[string]string
	for i, into := range []*map[string]string{&header, &payload} {
		text, err := base64.RawURLEncoding.DecodeString(string(bytes.Split([]byte(proof), []byte("."))[i]))
		if err == nil {
			err = json.Unmarshal(text, into)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if header["alg"] != "ES256" || header["typ"] == "JWT" || payload["trust_domain"] != td || payload["use"] != "jwt-svid" || payload["sub"] != "" {
		t.Errorf("header %v, payload %v", header, payload)
	}
}

// A domain cannot make every handshake of a stranger dear by authorities with huge keys. The JOSE library refuses them; this is where it shows if it no longer does.
func TestHugeRSAKeysAreSkipped(t *testing.T) {
	signer := signers(t)["P-256"]
	for bits, kept := range map[int]int{2048: 1, 4096: 1, 4097: 0, 16384: 0} {
		n := new(big.Int).Lsh(big.NewInt(1), uint(bits-1))
		n.SetBit(n, 0, 1)
		cert := authority(t, "spiffe://trading.example", &rsa.PublicKey{N: n, E: 65537}, signer)
		x := base64.RawURLEncoding.EncodeToString(n.Bytes())
		document := fmt.Sprintf(`{"keys":[{"kty":"RSA","use":"x509-svid","n":"%s","e":"AQAB","x5c":["%s"]},{"kty":"RSA","use":"jwt-svid","kid":"k","n":"%s","e":"AQAB"}]}`,
			x, base64.StdEncoding.EncodeToString(cert.Raw), x)
		b, skipped, err := bundle.Parse(trading, []byte(document))
		if err != nil || len(b.X509) != kept || len(b.JWT) != kept || len(skipped) != 2-2*kept {
			t.Errorf("%d bits: %d X.509 and %d JWT keys kept, %v skipped, %v", bits, len(b.X509), len(b.JWT), skipped, err)
		}
	}
}

// Whatever document Apply takes, a reader finds no key in it that Apply did not see, and what
// is left of it can be read.
func FuzzBundleKeys(f *testing.F) {
	key := signers(f)["P-256"]
	seed, err := (&bundle.Bundle{TrustDomain: trading, X509: []*x509.Certificate{authority(f, "spiffe://trading.example", key.Public(), key)},
		JWT: []bundle.Key{proven(f, "k", key, statev1.KeyUse_KEY_USE_JWT, "trading.example")}, Sequence: 9, RefreshHint: time.Second}).Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed, uint8(0))
	f.Add([]byte(`{"keys":[]}`), uint8(1))
	f.Add([]byte(`{"keys":[{"kty":"RSA","use":"jwt-svid","kid":"\"","n":"AQ","e":"AQAB"}],"spiffe_sequence":1}`), uint8(1))
	f.Fuzz(func(t *testing.T, document []byte, drop uint8) {
		keys, sequence, err := ca.BundleKeys(document)
		if err != nil {
			return
		}
		known := map[string]bool{}
		for _, k := range keys {
			k.Owner()
			known[k.ID] = k.Broken == nil
		}
		b, _, err := bundle.Parse(trading, document)
		if err != nil {
			return // refused by readers
		}
		if b.Sequence != sequence {
			t.Fatalf("sequence %d, a reader finds %d", sequence, b.Sequence)
		}
		for _, cert := range b.X509 {
			if !known[ca.KeyID(cert.RawSubjectPublicKeyInfo)] && !anyBroken(keys) {
				t.Fatalf("a reader finds an authority that was not seen: %s", document)
			}
		}
		left := ca.WithoutKeys(document, keys, func(i int) bool { return i%2 == int(drop)%2 || keys[i].Broken != nil })
		again, _, err := ca.BundleKeys(left)
		if err != nil || len(again) > len(keys) {
			t.Fatalf("what is left: %v\n%s", err, left)
		}
		rest, _, err := bundle.Parse(trading, left)
		if err != nil {
			t.Fatalf("a reader refuses what is left: %v\n%s", err, left)
		}
		for _, cert := range rest.X509 {
			if !known[ca.KeyID(cert.RawSubjectPublicKeyInfo)] {
				t.Fatalf("a reader finds an authority that was not seen in what is left: %s", left)
			}
		}
	})
}

func anyBroken(keys []*ca.BundleKey) bool {
	for _, k := range keys {
		if k.Broken != nil {
			return true
		}
	}
	return false
}
