package bundle_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/federation/bundle"
	"github.com/entente-mesh/entente/internal/peer/peertest"
)

var trading = spiffeid.RequireTrustDomainFromString("trading.example")

func b64(der []byte) string { return base64.StdEncoding.EncodeToString(der) }

// jwk writes an entry: the public members of the key, then the others given as JSON members.
func jwk(key any, members ...string) string {
	text, err := jose.JSONWebKey{Key: key}.MarshalJSON()
	if err != nil {
		panic(err)
	}
	return strings.TrimSuffix(string(text), "}") + "," + strings.Join(members, ",") + "}"
}

func x5c(ders ...[]byte) string {
	var list []string
	for _, der := range ders {
		list = append(list, `"`+b64(der)+`"`)
	}
	return `"x5c":[` + strings.Join(list, ",") + `]`
}

func doc(keys ...string) string {
	return `{"keys":[` + strings.Join(keys, ",") + `],"spiffe_sequence":7,"spiffe_refresh_hint":300}`
}

// One line for each thing that a consumer meets: the entry beside it always counts.
// Requirements: 50, 52-54, 71, 94, 96, 103, 106, 107, T5, T8.
func TestParseEntries(t *testing.T) {
	ca, other := peertest.NewAuthority(trading), peertest.NewAuthority(trading)
	leaf := ca.Issue("/portfolio").Certificates[0]
	noSign := peertest.NewAuthority(trading, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature })
	good := jwk(other.Cert.PublicKey, `"use":"x509-svid"`, x5c(other.Cert.Raw))
	public := ca.Cert.PublicKey
	const x509Use, jwtUse, witUse = `"use":"x509-svid"`, `"use":"jwt-svid"`, `"use":"wit-svid"`

	tests := []struct {
		name           string
		key            string
		x509, jwt, wit int    // counted beside the good one
		why            string // "" if it counts
	}{
		{"good", jwk(public, x509Use, x5c(ca.Cert.Raw)), 1, 0, 0, ""},
		{"unknown members", jwk(public, x509Use, x5c(ca.Cert.Raw), `"x-owner":{"a":[1,{"b":null}]}`, `"alg":"ES256"`), 1, 0, 0, ""},
		{"two certificates: the first counts", jwk(public, x509Use, x5c(ca.Cert.Raw, leaf.Raw)), 1, 0, 0, ""},
		{"two certificates, the second is rubbish", jwk(public, x509Use, x5c(ca.Cert.Raw, []byte("rubbish"))), 1, 0, 0, ""},
		{"the same again", good, 0, 0, 0, ""},
		{"kid on a certificate", jwk(public, x509Use, x5c(ca.Cert.Raw), `"kid":"k"`), 1, 0, 0, ""},
		{"null kid", jwk(public, x509Use, x5c(ca.Cert.Raw), `"kid":null`), 1, 0, 0, ""},
		{"token key", jwk(public, jwtUse, `"kid":"k"`), 0, 1, 0, ""},
		{"WIT key", jwk(public, witUse, `"kid":"k"`), 0, 0, 1, ""},
		{"private key: its public half", jwk(ca.Key, jwtUse, `"kid":"k"`), 0, 1, 0, ""},

		{"unknown kty", `{"kty":"AKP","alg":"ML-DSA-44","pub":"AA","use":"x509-svid",` + x5c(ca.Cert.Raw) + `}`, 0, 0, 0, `unknown kty "AKP"`},
		{"symmetric key", `{"kty":"oct","k":"AAAA","use":"jwt-svid","kid":"k"}`, 0, 0, 0, `unknown kty "oct"`},
		{"no kty", `{"use":"x509-svid",` + x5c(ca.Cert.Raw) + `}`, 0, 0, 0, "no kty"},
		{"kty in other case", `{"kty":"ec","use":"x509-svid",` + x5c(ca.Cert.Raw) + `}`, 0, 0, 0, "unknown kty"},
		{"unknown curve", `{"kty":"EC","crv":"secp256k1","x":"AA","y":"AA","use":"jwt-svid","kid":"k"}`, 0, 0, 0, "unreadable key"},
		{"point off the curve", `{"kty":"EC","crv":"P-256","x":"` + strings.Repeat("A", 43) + `","y":"` + strings.Repeat("A", 43) + `","use":"jwt-svid","kid":"k"}`, 0, 0, 0, "unreadable key"},
		{"no key parameters", `{"kty":"EC","use":"x509-svid",` + x5c(ca.Cert.Raw) + `}`, 0, 0, 0, "unreadable key"},
		{"unknown use", jwk(public, `"use":"sig"`, x5c(ca.Cert.Raw)), 0, 0, 0, `unknown use "sig"`},
		{"use in other case", jwk(public, `"use":"X509-SVID"`, x5c(ca.Cert.Raw)), 0, 0, 0, "unknown use"},
		{"member in other case", jwk(public, `"USE":"x509-svid"`, x5c(ca.Cert.Raw)), 0, 0, 0, "no use"},
		{"no use", jwk(public, x5c(ca.Cert.Raw)), 0, 0, 0, "no use"},
		{"use is no text", jwk(public, `"use":5`, x5c(ca.Cert.Raw)), 0, 0, 0, "use is no text"},
		{"no x5c", jwk(public, x509Use), 0, 0, 0, "no x5c"},
		{"empty x5c", jwk(public, x509Use, x5c()), 0, 0, 0, "x5c is empty"},
		{"x5c is text", jwk(public, x509Use, `"x5c":"`+b64(ca.Cert.Raw)+`"`), 0, 0, 0, "x5c is no list"},
		{"x5c in URL base64", jwk(public, x509Use, `"x5c":["`+base64.URLEncoding.EncodeToString([]byte{0xff, 0xff, 0xff})+`"]`), 0, 0, 0, "not base64"},
		{"x5c with two certificates in one", jwk(public, x509Use, x5c(append(slices.Clone(ca.Cert.Raw), ca.Cert.Raw...))), 0, 0, 0, "no certificate"},
		{"x5c is rubbish", jwk(public, x509Use, x5c([]byte("rubbish"))), 0, 0, 0, "no certificate"},
		{"leaf certificate", jwk(leaf.PublicKey, x509Use, x5c(leaf.Raw)), 0, 0, 0, "not a CA"},
		{"CA without keyCertSign", jwk(noSign.Cert.PublicKey, x509Use, x5c(noSign.Cert.Raw)), 0, 0, 0, "keyCertSign"},
		{"certificate of another key", jwk(public, x509Use, x5c(peertest.NewAuthority(trading).Cert.Raw)), 0, 0, 0, "another key"},
		{"token key without kid", jwk(public, jwtUse), 0, 0, 0, "no kid"},
		{"WIT key without kid", jwk(public, witUse), 0, 0, 0, "no kid"},
		{"kid too long", jwk(public, jwtUse, `"kid":"`+strings.Repeat("k", 2000)+`"`), 0, 0, 0, "kid is longer"},
		{"kid is no text", jwk(public, jwtUse, `"kid":1`), 0, 0, 0, "kid is no text"},
		{"member twice", jwk(public, x509Use, x509Use, x5c(ca.Cert.Raw)), 0, 0, 0, `"use" stands there twice`},
		{"member twice, once escaped", jwk(public, x509Use, `"us\u0065":"jwt-svid"`, `"kid":"k"`), 0, 0, 0, `"use" stands there twice`},
		{"no object", `"key"`, 0, 0, 0, "not a JSON object"},
		{"null", `null`, 0, 0, 0, "not a JSON object"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			b, skipped, err := bundle.Parse(trading, []byte(doc(good, test.key)))
			if err != nil {
				t.Fatal(err)
			}
			if len(b.X509) != test.x509+1 || len(b.JWT) != test.jwt || len(b.WIT) != test.wit {
				t.Errorf("%d X.509, %d JWT, %d WIT", len(b.X509), len(b.JWT), len(b.WIT))
			}
			if b.TrustDomain != trading || b.Sequence != 7 || b.RefreshHint != 5*time.Minute {
				t.Errorf("%s, sequence %d, hint %s", b.TrustDomain, b.Sequence, b.RefreshHint)
			}
			switch {
			case test.why == "" && len(skipped) > 0:
				t.Errorf("skipped: %v", skipped)
			case test.why != "" && (len(skipped) != 1 || skipped[0].Index != 1 || !strings.Contains(skipped[0].String(), test.why)):
				t.Errorf("skipped: %v, want the second, %s", skipped, test.why)
			}
			if !b.X509Bundle().HasX509Authority(other.Cert) {
				t.Error("the good authority is missing")
			}
		})
	}
}

// A key id stands for one key, over both kinds of tokens.
// Requirements: 93.
func TestParseKeyIDTwice(t *testing.T) {
	one, two := peertest.NewKey().Public(), peertest.NewKey().Public()
	b, skipped, err := bundle.Parse(trading, []byte(doc(
		jwk(one, `"use":"jwt-svid"`, `"kid":"k"`), jwk(two, `"use":"jwt-svid"`, `"kid":"k"`),
		jwk(two, `"use":"wit-svid"`, `"kid":"k"`), jwk(two, `"use":"wit-svid"`, `"kid":"K"`))))
	if err != nil || len(b.JWT) != 1 || len(b.WIT) != 1 || len(skipped) != 2 {
		t.Fatalf("%+v, skipped %v, %v", b, skipped, err)
	}
	if want, _ := (jose.JSONWebKey{Key: one}).MarshalJSON(); !bytes.Equal(b.JWT[0].JWK, want) {
		t.Errorf("the later key won: %s", b.JWT[0].JWK)
	}
}

// Requirements: 96, 99, 101, 102, 108, T8.
func TestParseDocument(t *testing.T) {
	ca := peertest.NewAuthority(trading)
	good := jwk(ca.Cert.PublicKey, `"use":"x509-svid"`, x5c(ca.Cert.Raw))
	many := strings.Repeat("{},", 5000) + "{}"
	tests := []struct {
		name     string
		data     string
		sequence uint64
		hint     time.Duration
		skipped  int
		want     string // part of the error; "" if it is read
	}{
		{"good", `{"keys":[` + good + `],"spiffe_sequence":18446744073709551615,"spiffe_refresh_hint":60}`, 1<<64 - 1, time.Minute, 0, ""},
		{"neither sequence nor hint", `{"keys":[` + good + `]}`, 0, 0, 0, ""},
		{"null is none", `{"keys":[],"spiffe_sequence":null,"spiffe_refresh_hint":null}`, 0, 0, 0, ""},
		{"empty: everything is revoked", `{"keys":[],"spiffe_sequence":8}`, 8, 0, 0, ""},
		{"unknown members", `{"a":{"keys":5,"keys":6},"keys":[],"spiffe_sequence":8,"z":[[[]]]}`, 8, 0, 0, ""},
		{"white space around", " \n{\"keys\" : [ ] }\r\n\t", 0, 0, 0, ""},
		{"negative hint", `{"keys":[],"spiffe_refresh_hint":-1}`, 0, 0, 1, ""},
		{"hint that overflows", `{"keys":[],"spiffe_refresh_hint":9223372036854775807}`, 0, 0, 1, ""},
		{"hint is text", `{"keys":[],"spiffe_refresh_hint":"60"}`, 0, 0, 1, ""},
		{"hint is a fraction", `{"keys":[],"spiffe_refresh_hint":0.5}`, 0, 0, 1, ""},
		{"zero hint", `{"keys":[],"spiffe_refresh_hint":0}`, 0, 0, 0, ""},
		{"more than a thousand keys", `{"keys":[` + strings.Repeat("{},", 2000) + `{}]}`, 0, 0, 2001, ""},

		{"nothing", ``, 0, 0, 0, "not a JSON object"},
		{"a list", `[]`, 0, 0, 0, "not a JSON object"},
		{"a web page", `<html>`, 0, 0, 0, "not a JSON object"},
		{"no keys", `{"spiffe_sequence":8}`, 0, 0, 0, `no "keys"`},
		{"null keys", `{"keys":null}`, 0, 0, 0, `no "keys"`},
		{"keys in other case", `{"Keys":[]}`, 0, 0, 0, `no "keys"`},
		{"keys is an object", `{"keys":{}}`, 0, 0, 0, `no "keys"`},
		{"keys twice", `{"keys":[],"keys":[` + good + `]}`, 0, 0, 0, `"keys" stands there twice`},
		{"keys twice, once escaped", `{"keys":[],"\u006beys":[` + good + `]}`, 0, 0, 0, `"keys" stands there twice`},
		{"sequence twice", `{"keys":[],"spiffe_sequence":1,"spiffe_sequence":2}`, 0, 0, 0, "twice"},
		{"negative sequence", `{"keys":[],"spiffe_sequence":-1}`, 0, 0, 0, "unsigned 64-bit"},
		{"sequence of 65 bits", `{"keys":[],"spiffe_sequence":18446744073709551616}`, 0, 0, 0, "unsigned 64-bit"},
		{"sequence is a fraction", `{"keys":[],"spiffe_sequence":1.0}`, 0, 0, 0, "unsigned 64-bit"},
		{"sequence is text", `{"keys":[],"spiffe_sequence":"1"}`, 0, 0, 0, "unsigned 64-bit"},
		{"something behind", `{"keys":[]}{"keys":[` + good + `]}`, 0, 0, 0, "follows the end"},
		{"rubbish behind", `{"keys":[]}x`, 0, 0, 0, "follows the end"},
		{"cut off", `{"keys":[` + good, 0, 0, 0, "not JSON"},
		{"cut off after a member", `{"keys":[]`, 0, 0, 0, "not JSON"},
		{"byte order mark", "\ufeff" + `{"keys":[]}`, 0, 0, 0, "not a JSON object"},
		{"not UTF-8", "{\"keys\":[],\"\xff\":1}", 0, 0, 0, "not UTF-8"},
		{"too many keys", `{"keys":[` + many + `]}`, 0, 0, 0, "more than 4096"},
		{"too large", `{"keys":[]}` + strings.Repeat(" ", bundle.MaxSize), 0, 0, 0, "larger than"},
		{"deep", `{"keys":[],"x":` + strings.Repeat("[", 100_000) + strings.Repeat("]", 100_000) + `}`, 0, 0, 0, "not JSON"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			b, skipped, err := bundle.Parse(trading, []byte(test.data))
			if test.want != "" {
				if err == nil || !strings.Contains(err.Error(), test.want) || b != nil {
					t.Fatalf("read as %+v, error %v", b, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if b.Sequence != test.sequence || b.RefreshHint != test.hint || len(skipped) != test.skipped {
				t.Errorf("sequence %d, hint %s, skipped %v", b.Sequence, b.RefreshHint, skipped)
			}
		})
	}
	if _, _, err := bundle.Parse(spiffeid.TrustDomain{}, []byte(`{"keys":[]}`)); err == nil {
		t.Error("a bundle of nobody is read")
	}
}

// Requirements: 48-50, 70, 93, 97, 101, 102, 105, 106, T6, T7.
func TestMarshal(t *testing.T) {
	one, two := peertest.NewAuthority(trading), peertest.NewAuthority(trading)
	key := func(id string) bundle.Key {
		text, err := jose.JSONWebKey{Key: peertest.NewKey().Public()}.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		return bundle.Key{ID: id, JWK: text}
	}
	a, b, w := key("a"), key("b"), key("w")
	this := &bundle.Bundle{TrustDomain: trading, X509: []*x509.Certificate{one.Cert, two.Cert, one.Cert}, JWT: []bundle.Key{a, b},
		WIT: []bundle.Key{w}, Sequence: 1 << 63, RefreshHint: 1500 * time.Millisecond}
	that := &bundle.Bundle{TrustDomain: trading, X509: []*x509.Certificate{two.Cert, one.Cert}, JWT: []bundle.Key{b, a},
		WIT: []bundle.Key{w}, Sequence: 1 << 63, RefreshHint: 2 * time.Second}
	text, err := this.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if other, err := that.Marshal(); err != nil || !bytes.Equal(text, other) {
		t.Errorf("the same bundle in another order is written differently: %v\n%s\n%s", err, text, other)
	}
	back, skipped, err := bundle.Parse(trading, text)
	if err != nil || len(skipped) > 0 || back.Sequence != 1<<63 || back.RefreshHint != 2*time.Second || len(back.X509) != 2 || len(back.JWT) != 2 || len(back.WIT) != 1 {
		t.Errorf("read back: %+v, skipped %v, %v", back, skipped, err)
	}
	if again, err := back.Marshal(); err != nil || !bytes.Equal(text, again) {
		t.Errorf("not the same after reading: %v\n%s\n%s", err, text, again)
	}

	// Each entry has the members that SPIFFE defines for it, and no others.
	var written struct {
		Keys []map[string]json.RawMessage
	}
	if err := json.Unmarshal(text, &written); err != nil || len(written.Keys) != 5 {
		t.Fatalf("%d entries, %v", len(written.Keys), err)
	}
	for _, entry := range written.Keys {
		want := []string{"crv", "kid", "kty", "use", "x", "y"}
		if string(entry["use"]) == `"x509-svid"` {
			want = []string{"crv", "kty", "use", "x", "x5c", "y"}
			var chain [][]byte
			if err := json.Unmarshal(entry["x5c"], &chain); err != nil || len(chain) != 1 || !bytes.Equal(chain[0], one.Cert.Raw) && !bytes.Equal(chain[0], two.Cert.Raw) {
				t.Errorf("x5c %s, %v", entry["x5c"], err)
			}
		}
		if names := slices.Sorted(maps.Keys(entry)); !slices.Equal(names, want) {
			t.Errorf("an entry of use %s has %v", entry["use"], names)
		}
	}

	empty, err := (&bundle.Bundle{TrustDomain: trading, Sequence: 9}).Marshal()
	if err != nil || string(empty) != `{"keys":[],"spiffe_sequence":9}` {
		t.Errorf("the bundle that revokes everything: %s, %v", empty, err)
	}

	for name, wrong := range map[string]*bundle.Bundle{
		"leaf":          {TrustDomain: trading, X509: one.Issue("/portfolio").Certificates},
		"key id twice":  {TrustDomain: trading, JWT: []bundle.Key{a}, WIT: []bundle.Key{{ID: "a", JWK: w.JWK}}},
		"no key id":     {TrustDomain: trading, JWT: []bundle.Key{{JWK: a.JWK}}},
		"symmetric key": {TrustDomain: trading, JWT: []bundle.Key{{ID: "s", JWK: json.RawMessage(`{"kty":"oct","k":"AAAA"}`)}}},
		"no key":        {TrustDomain: trading, JWT: []bundle.Key{{ID: "s"}}},
		"negative hint": {TrustDomain: trading, RefreshHint: -time.Second},
	} {
		if text, err := wrong.Marshal(); err == nil {
			t.Errorf("%s: written as %s", name, text)
		}
	}
}

// A map has each trust domain once, with its bundle as it is but for the hint.
// Requirements: 109, 111.
func TestMarshalMap(t *testing.T) {
	banking := spiffeid.RequireTrustDomainFromString("banking.example")
	one, two := peertest.NewAuthority(trading), peertest.NewAuthority(banking)
	hinted := &bundle.Bundle{TrustDomain: trading, X509: []*x509.Certificate{one.Cert}, Sequence: 3, RefreshHint: time.Minute}
	other := &bundle.Bundle{TrustDomain: banking, X509: []*x509.Certificate{two.Cert}, Sequence: 4}
	text, err := bundle.MarshalMap(hinted, other)
	if err != nil {
		t.Fatal(err)
	}
	var written map[string]map[string]json.RawMessage
	if err := json.Unmarshal(text, &written); err != nil || len(written) != 1 || len(written["trust_domains"]) != 2 {
		t.Fatalf("%s, %v", text, err)
	}
	b, skipped, err := bundle.Parse(trading, written["trust_domains"]["trading.example"])
	if err != nil || len(skipped) > 0 || b.Sequence != 3 || b.RefreshHint != 0 || !b.X509Bundle().HasX509Authority(one.Cert) || len(b.X509) != 1 {
		t.Errorf("read back: %+v, skipped %v, %v", b, skipped, err)
	}
	if hinted.RefreshHint != time.Minute {
		t.Error("the bundle that was given lost its hint")
	}
	if text, err := bundle.MarshalMap(hinted, other, hinted); err == nil {
		t.Errorf("one trust domain twice: %s", text)
	}
	if text, err := bundle.MarshalMap(); err != nil || string(text) != `{"trust_domains":{}}` {
		t.Errorf("the map of nobody: %s, %v", text, err)
	}
}

// What go-spiffe writes, we read, and the other way round: with every kind of key.
// Requirements: 48, 50, 54, 70, 96, 101, T6.
func TestGoSPIFFE(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	theirs := spiffebundle.New(trading)
	for i, key := range []crypto.Signer{rsaKey, p384, edKey, peertest.NewKey()} {
		template := &x509.Certificate{SerialNumber: big.NewInt(int64(i + 1)), NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		theirs.AddX509Authority(cert)
		if err := theirs.AddJWTAuthority(fmt.Sprint("jwt", i), key.Public()); err != nil {
			t.Fatal(err)
		}
		if err := theirs.AddWITAuthority(fmt.Sprint("wit", i), key.Public()); err != nil {
			t.Fatal(err)
		}
	}
	theirs.SetSequenceNumber(42)
	theirs.SetRefreshHint(time.Minute)
	text, err := theirs.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	ours, skipped, err := bundle.Parse(trading, text)
	if err != nil || len(skipped) > 0 || len(ours.X509) != 4 || len(ours.JWT) != 4 || len(ours.WIT) != 4 {
		t.Fatalf("%+v, skipped %v, %v", ours, skipped, err)
	}
	written, err := ours.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	back, err := spiffebundle.Parse(trading, written)
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(ours.X509, func(a, b *x509.Certificate) int { return a.SerialNumber.Cmp(b.SerialNumber) })
	sorted := back.X509Authorities()
	slices.SortFunc(sorted, func(a, b *x509.Certificate) int { return a.SerialNumber.Cmp(b.SerialNumber) })
	back.SetX509Authorities(sorted)
	if !back.Equal(theirs) {
		t.Errorf("after both: %s\nbefore: %s", written, text)
	}
	if empty, err := (&bundle.Bundle{TrustDomain: trading, Sequence: 1}).Marshal(); err != nil {
		t.Error(err)
	} else if b, err := spiffebundle.Parse(trading, empty); err != nil || !b.Empty() {
		t.Errorf("go-spiffe reads our empty bundle as %v, %v", b, err)
	}
}

// Whatever is read can be written, and reading that gives the same; and what go-spiffe reads, we read with no key more.
func FuzzParse(f *testing.F) {
	ca := peertest.NewAuthority(trading)
	f.Add([]byte(doc(jwk(ca.Cert.PublicKey, `"use":"x509-svid"`, x5c(ca.Cert.Raw)), jwk(ca.Cert.PublicKey, `"use":"jwt-svid"`, `"kid":"k"`))))
	f.Add([]byte(`{"keys":[{"kty":"AKP"}],"spiffe_sequence":1,"spiffe_refresh_hint":-3}`))
	f.Add([]byte(`{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo","use":"jwt-svid","kid":"e"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, skipped, err := bundle.Parse(trading, data)
		if err != nil {
			return
		}
		text, err := b.Marshal()
		if err != nil {
			t.Fatalf("read but not writable: %v\n%s", err, data)
		}
		back, none, err := bundle.Parse(trading, text)
		if err != nil || len(none) > 0 {
			t.Fatalf("our own writing is not read: %v, skipped %v\n%s", err, none, text)
		}
		if again, err := back.Marshal(); err != nil || !bytes.Equal(text, again) {
			t.Fatalf("unstable: %v\n%s\n%s", err, text, again)
		}
		// encoding/json, which go-spiffe uses, also takes names in other letters, and the last of several.
		lower := bytes.ToLower(data)
		for _, name := range []string{`"keys"`, `"spiffe_sequence"`} {
			if n := bytes.Count(lower, []byte(name)); n > 1 || n != bytes.Count(data, []byte(name)) {
				return
			}
		}
		if bytes.ContainsFunc(data, func(r rune) bool { return r == '\\' || r > 0x7f }) {
			return
		}
		theirs, err := spiffebundle.Parse(trading, data)
		if err != nil {
			return
		}
		if _, stated := theirs.SequenceNumber(); len(skipped) == 0 && stated {
			if sequence, _ := theirs.SequenceNumber(); sequence != b.Sequence {
				t.Fatalf("sequence %d, go-spiffe %d", b.Sequence, sequence)
			}
		}
		for _, cert := range b.X509 {
			if !theirs.HasX509Authority(cert) {
				t.Fatalf("an authority that go-spiffe does not see: %s", data)
			}
		}
		for _, key := range b.JWT {
			if !theirs.HasJWTAuthority(key.ID) {
				t.Fatalf("a JWT key %q that go-spiffe does not see: %s", key.ID, data)
			}
		}
	})
}
