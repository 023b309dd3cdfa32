package ca

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

func sampleToken() *Token {
	return &Token{
		Role: RoleAgent, TrustDomain: banking, ClusterID: bytes.Repeat([]byte{7}, ClusterIDSize), Epoch: 3,
		ID: "01jc5z", Seed: bytes.Repeat([]byte{0xa5}, 32),
		Addresses: []string{"127.1.0.2:7443", "[::1]:7443"},
		Pins:      []string{strings.Repeat("ab", 32), strings.Repeat("01", 32)},
	}
}

func TestTokenText(t *testing.T) {
	for _, role := range []string{RoleNode, RoleAgent} {
		token := sampleToken()
		token.Role = role
		text, err := token.Text()
		if err != nil {
			t.Fatal(err)
		}
		for name, form := range map[string]string{
			"as it is": text, "with a newline": text + "\n", "wrapped": text[:40] + "\r\n  " + text[40:],
		} {
			back, err := ParseToken(form)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if back.Role != role || back.TrustDomain != banking || back.Epoch != 3 || back.ID != token.ID ||
				!bytes.Equal(back.Seed, token.Seed) || !bytes.Equal(back.ClusterID, token.ClusterID) ||
				!slices.Equal(back.Addresses, token.Addresses) || !slices.Equal(back.Pins, token.Pins) {
				t.Errorf("%s: came back as something else", name)
			}
		}
	}
	if token := sampleToken(); !token.Pinned(token.Pins[1]) || token.Pinned(strings.Repeat("ff", 32)) || token.Pinned("") {
		t.Error("pins")
	}
}

func TestTokenTextDamaged(t *testing.T) {
	text, err := sampleToken().Text()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseToken(text); err != nil { // control
		t.Fatal(err)
	}
	for n := range text {
		if _, err := ParseToken(text[:n]); err == nil {
			t.Fatalf("the first %d characters are accepted", n)
		}
	}
	for i := len(tokenPrefix); i < len(text); i++ {
		for _, c := range []byte("Az0-=") {
			if text[i] == c {
				continue
			}
			damaged := text[:i] + string(c) + text[i+1:]
			if _, err := ParseToken(damaged); err == nil {
				t.Fatalf("character %d altered, accepted", i)
			} else if strings.Contains(err.Error(), text[len(tokenPrefix):len(tokenPrefix)+20]) {
				t.Fatalf("the error shows the token: %v", err)
			}
		}
	}
	for name, test := range map[string]struct{ text, says string }{
		"empty":     {" \n", "empty"},
		"something": {"hello", "does not begin with"},
		"cut":       {text[:len(text)-4], "copy the whole line"},
		"too long":  {tokenPrefix + strings.Repeat("A", MaxTokenText), "over 8192"},
	} {
		if _, err := ParseToken(test.text); err == nil || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTokenBounds(t *testing.T) {
	for name, change := range map[string]func(*Token){
		"no role":        func(t *Token) { t.Role = "root" },
		"cluster id":     func(t *Token) { t.ClusterID = nil },
		"epoch":          func(t *Token) { t.Epoch = MaxEpoch + 1 },
		"no id":          func(t *Token) { t.ID = "" },
		"id with slash":  func(t *Token) { t.ID = "a/b" },
		"short seed":     func(t *Token) { t.Seed = t.Seed[1:] },
		"no address":     func(t *Token) { t.Addresses = nil },
		"a bad address":  func(t *Token) { t.Addresses[0] = "x" },
		"many addresses": func(t *Token) { t.Addresses = slices.Repeat([]string{"a:1"}, 33) },
		"no pin":         func(t *Token) { t.Pins = nil },
		"a bad pin":      func(t *Token) { t.Pins[0] = "zz" },
	} {
		token := sampleToken()
		change(token)
		if _, err := token.Text(); err == nil {
			t.Errorf("%s: written", name)
		}
	}
	full := sampleToken()
	full.Addresses = slices.Repeat([]string{strings.Repeat("a", 60) + "." + strings.Repeat("b", 60) + ":12345"}, maxTokenEntries)
	full.Pins = slices.Repeat(full.Pins[:1], maxTokenEntries)
	text, err := full.Text()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseToken(text); err != nil {
		t.Errorf("the largest token of %d characters: %v", len(text), err)
	}
}

// Whatever somebody does to print a token, the seed stays hidden (I1).
func TestTokenHidesSeed(t *testing.T) {
	token := sampleToken()
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "token", token, "value", *token)
	encoded, _ := json.Marshal(map[string]any{"token": token})
	for _, text := range []string{
		fmt.Sprint(token), fmt.Sprint(*token), fmt.Sprintf("%v %+v %#v %d %x %q %s", token, *token, *token, *token, *token, *token, token),
		log.String(), string(encoded),
	} {
		for _, secret := range []string{"a5a5", "165 165", "0xa5", "paWlpa"} {
			if strings.Contains(text, secret) {
				t.Errorf("the seed shows as %s in %s", secret, text)
			}
		}
		if !strings.Contains(text, "01jc5z") {
			t.Errorf("%s does not name the token", text)
		}
	}
}

// Format 1, of releases before the recovery key was pinned, is read and written as well.
func TestTokenFormats(t *testing.T) {
	token := sampleToken()
	for version, key := range map[byte][]byte{1: nil, 2: bytes.Repeat([]byte{9}, 32)} {
		token.RecoveryKey = key
		text, err := token.Text()
		if err != nil {
			t.Fatal(err)
		}
		body, err := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(text, tokenPrefix))
		if err != nil || body[0] != version {
			t.Errorf("format %d, %v", body[0], err)
		}
		again, err := ParseToken(text)
		if err != nil || !bytes.Equal(again.RecoveryKey, key) || again.ID != token.ID {
			t.Errorf("format %d: %v, %v", version, again, err)
		}
	}
	token.RecoveryKey = []byte("short")
	if _, err := token.Text(); err == nil {
		t.Error("a recovery key of 5 bytes was written")
	}
}

func FuzzParseToken(f *testing.F) {
	text, err := sampleToken().Text()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add(tokenPrefix)
	withKey := sampleToken()
	withKey.RecoveryKey = make([]byte, 32)
	if text, err := withKey.Text(); err == nil {
		f.Add(text)
	}
	f.Add(text[:len(text)/2])
	f.Fuzz(func(t *testing.T, text string) {
		token, err := ParseToken(text)
		if err != nil {
			return
		}
		again, err := token.Text()
		if err != nil {
			t.Fatal(err)
		}
		if again != strings.Join(strings.Fields(text), "") {
			t.Errorf("a token has a second form")
		}
	})
}

// FuzzTokenBody goes past the checksum.
func FuzzTokenBody(f *testing.F) {
	f.Add([]byte{tokenVersion, 'n'})
	f.Fuzz(func(t *testing.T, body []byte) {
		r := tokenReader{rest: body}
		r.take(ClusterIDSize)
		for range r.number(maxTokenEntries) {
			r.text(300)
		}
		r.number(MaxEpoch)
	})
}

func TestStatement(t *testing.T) {
	token := sampleToken()
	cluster := &statev1.Cluster{Id: token.ClusterID, Epoch: token.Epoch}
	key, exporter := strings.Repeat("cd", 32), bytes.Repeat([]byte{9}, ExporterSize)
	statement, signature, err := token.Sign(key, exporter)
	if err != nil {
		t.Fatal(err)
	}
	st, err := VerifyStatement(token.PublicKey(), statement, signature)
	if err != nil {
		t.Fatal(err)
	}
	if err := CheckStatement(st, cluster, token.ID, RoleAgent, key, exporter); err != nil {
		t.Fatal(err)
	}

	other := sampleToken()
	other.Seed = bytes.Repeat([]byte{1}, 32)
	altered := bytes.Clone(statement)
	altered[len(altered)-1] ^= 1
	wrong := bytes.Clone(signature)
	wrong[0] ^= 1
	for name, test := range map[string]struct{ key, statement, signature []byte }{
		"another token's key":   {other.PublicKey(), statement, signature},
		"an altered statement":  {token.PublicKey(), altered, signature},
		"a longer statement":    {token.PublicKey(), append(bytes.Clone(statement), 0x52, 0), signature},
		"an altered signature":  {token.PublicKey(), statement, wrong},
		"no signature":          {token.PublicKey(), statement, nil},
		"a key of another size": {token.PublicKey()[1:], statement, signature},
		"no key":                {nil, statement, signature},
		"an oversized one":      {token.PublicKey(), make([]byte, maxStatement+1), signature},
	} {
		if _, err := VerifyStatement(test.key, test.statement, test.signature); err == nil {
			t.Errorf("%s: verified", name)
		}
	}
	for name, change := range map[string]func(*statev1.JoinStatement){
		"cluster":     func(s *statev1.JoinStatement) { s.ClusterId[0] ^= 1 },
		"epoch":       func(s *statev1.JoinStatement) { s.Epoch++ },
		"token":       func(s *statev1.JoinStatement) { s.TokenId = "other" },
		"role":        func(s *statev1.JoinStatement) { s.Role = RoleNode },
		"key":         func(s *statev1.JoinStatement) { s.KeyId = strings.Repeat("ee", 32) },
		"connection":  func(s *statev1.JoinStatement) { s.Exporter[0] ^= 1 },
		"no exporter": func(s *statev1.JoinStatement) { s.Exporter = nil },
	} {
		replayed := proto.CloneOf(st)
		change(replayed)
		if CheckStatement(replayed, cluster, token.ID, RoleAgent, key, exporter) == nil {
			t.Errorf("a statement for another %s is accepted", name)
		}
	}
	if CheckStatement(st, cluster, token.ID, RoleAgent, key, nil) != nil {
		t.Error("Apply, which knows no connection, refuses a good statement")
	}
	if CheckStatement(&statev1.JoinStatement{}, &statev1.Cluster{}, "", "", "", nil) == nil {
		t.Error("an empty statement is accepted")
	}
}
