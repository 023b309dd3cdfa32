package pemfile

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"
)

func certificate(t testing.TB, name string) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}))
}

// A file is read whole or refused with the line; what encoding/pem would pass over is not
// taken for a shorter file.
func TestCertificates(t *testing.T) {
	a, key := certificate(t, "a")
	b, _ := certificate(t, "b")
	lines := strings.SplitAfter(a, "\n")
	for name, c := range map[string]struct {
		text string
		n    int    // certificates
		want string // error; empty: none
	}{
		"two":                     {a + b, 2, ""},
		"CRLF":                    {strings.ReplaceAll(a+b, "\n", "\r\n"), 2, ""},
		"text of openssl":         {"Certificate:\n    Data:\n        Version: 3 (0x2)\n" + a + "# corporate root 2026\n" + b, 2, ""},
		"spaces at ends of lines": {strings.ReplaceAll(a, "\n", "  \n"), 1, ""},
		"no newline at the end":   {strings.TrimSuffix(a, "\n"), 1, ""},

		"empty":                   {"", 0, "no certificate"},
		"byte order mark":         {"\xef\xbb\xbf" + a, 0, "line 1: the file begins with a byte order mark"},
		"UTF-16":                  {"\xff\xfe-\x00-\x00", 0, "UTF-16"},
		"cut off in the second":   {a + b[:len(b)/2], 0, "has no END"},
		"second without its END":  {a + strings.SplitAfter(b, "-----END")[0] + "\n", 0, "which does not end before"},
		"glued":                   {strings.TrimSuffix(a, "\n") + b, 0, "which does not end before"},
		"indented":                {"  " + strings.ReplaceAll(a, "\n", "\n  "), 0, "line 1: "},
		"second one indented":     {a + " " + b, 0, "is indented"},
		"bad letter":              {strings.Replace(a, lines[2][:5], "ab!cd", 1), 0, "line 3: '!' is no base64, column 3"},
		"a letter lost":           {strings.Replace(a, lines[2], lines[2][1:], 1), 0, "line 1: the CERTIFICATE that begins here is damaged"},
		"bytes changed":           {strings.Replace(a, lines[1], strings.Repeat("A", len(lines[1])-1)+"\n", 1), 0, "cannot be read"},
		"BEGIN of another kind":   {strings.Replace(a, "BEGIN CERTIFICATE", "BEGIN TRUSTED CERTIFICATE", 1), 0, "which does not end before"},
		"key among certificates":  {a + key, 0, "a PRIVATE KEY stands there"},
		"an END alone":            {a + "-----END CERTIFICATE-----\n", 0, "outside of a block"},
		"BEGIN cut off":           {a + "-----BEGIN CERTIF", 0, "not one BEGIN line"},
		"more than there may be":  {a + b + a, 0, "over 2 certificates"},
		"file of another program": {"\x7fELF\x00\x00", 0, "no certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			list, err := Certificates([]byte(c.text), 2)
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) || len(list) != c.n {
				t.Errorf("%d certificates, %v; want %d, %q", len(list), err, c.n, c.want)
			}
		})
	}
}

func TestKeyPair(t *testing.T) {
	a, key := certificate(t, "a")
	b, other := certificate(t, "b")
	if pair, err := KeyPair([]byte(a+b), []byte("-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"+key)); err != nil || len(pair.Certificate) != 2 {
		t.Errorf("%+v, %v", pair, err)
	}
	for want, pair := range map[string][2]string{
		"does not match":                {a, other},
		"the certificate: line":         {a[:100], key},
		"the key: line":                 {a, key[:100]},
		"the key: no PEM":               {a, ""},
		"a second private":              {a, key + other},
		"the certificate: it holds no":  {"", key},
		"a CERTIFICATE stands there, w": {a, a},
	} {
		if _, err := KeyPair([]byte(pair[0]), []byte(pair[1])); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

// What is read is what encoding/pem reads of it; what that reads otherwise is refused.
func FuzzBlocks(f *testing.F) {
	a, key := certificate(f, "a")
	for _, seed := range []string{a, a + key, " " + a, a[:50], "-----BEGIN A-----\n-----END A-----\n"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		blocks, err := Blocks(text)
		if err != nil {
			var place *Error
			if !errors.As(err, &place) || place.Line < 1 || place.Line > bytes.Count(text, []byte("\n"))+1 {
				t.Fatalf("%v has no place in the text", err)
			}
			return
		}
		rest := text
		for i, b := range blocks {
			var other *pem.Block
			if other, rest = pem.Decode(rest); other == nil || other.Type != b.Type || !bytes.Equal(other.Bytes, b.Bytes) {
				t.Fatalf("block %d: encoding/pem reads %+v, this %+v", i, other, b)
			}
		}
		if other, _ := pem.Decode(rest); other != nil {
			t.Fatalf("encoding/pem reads one more: %+v", other)
		}
	})
}
