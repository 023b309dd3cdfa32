package secret

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/entente-mesh/entente/internal/yamlfile"
)

const hidden = "correct-horse-battery"

type inside struct {
	Name  string `yaml:"name" json:"name"`
	Token Text   `yaml:"token" json:"token"`
	Key   Bytes  `yaml:"-" json:"key"`
	quiet Text
	List  []Text          `yaml:"list" json:"list"`
	Map   map[string]Text `yaml:"map" json:"map"`
}

// Nothing prints a secret, alone or in what holds it; what stands next to it is printed.
func TestNothingPrintsASecret(t *testing.T) {
	in := inside{"visible", Of(hidden), Bytes(hidden), Of(hidden), []Text{Of(hidden)}, map[string]Text{"a": Of(hidden)}}
	printed := map[string]string{}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%T %v"} {
		for name, v := range map[string]any{"text": in.Token, "pointer": &in.Token, "bytes": in.Key, "struct": in, "struct's pointer": &in, "list": []any{in, in.Key}} {
			args := []any{v}
			if strings.Count(verb, "%") == 2 {
				args = []any{v, v}
			}
			printed[name+" as "+verb] = fmt.Sprintf(verb, args...)
		}
	}
	for name, marshal := range map[string]func(any) ([]byte, error){"json": json.Marshal, "yaml": yaml.Marshal, "yamlfile": yamlfile.Marshal} {
		text, err := marshal(in)
		if err != nil {
			t.Fatal(name, err)
		}
		printed[name] = string(text)
		if !bytes.Contains(text, []byte("visible")) || !bytes.Contains(text, []byte(Redacted)) {
			t.Errorf("%s: %s", name, text)
		}
	}
	var log bytes.Buffer
	for _, handler := range []slog.Handler{slog.NewTextHandler(&log, nil), slog.NewJSONHandler(&log, nil)} {
		slog.New(handler).Info("config", "token", in.Token, "key", in.Key, "all", in, "err", fmt.Errorf("failed with %v and %s", in.Token, in.Key))
	}
	printed["slog"] = log.String()
	if !strings.Contains(printed["struct as %+v"], "visible") || !strings.Contains(printed["struct as %+v"], Redacted) {
		t.Errorf("control: %s", printed["struct as %+v"])
	}
	forms := []string{hidden, hex.EncodeToString([]byte(hidden)), strings.ToUpper(hex.EncodeToString([]byte(hidden))), strings.Trim(fmt.Sprint([]byte(hidden)), "[]"), "Y29ycmVjdC1ob3JzZS"}
	leaks := func(text string) bool {
		for _, form := range forms {
			if strings.Contains(text, form) {
				return true
			}
		}
		return false
	}
	for name, text := range printed {
		if leaks(text) {
			t.Errorf("%s: %s", name, text)
		}
	}
	// Control: the same search finds what is not of these types.
	plain := struct {
		Token string
		Key   []byte
	}{hidden, []byte(hidden)}
	for _, verb := range []string{"%v", "%+v", "%#v", "%x", "%X"} {
		if !leaks(fmt.Sprintf(verb, plain)) {
			t.Errorf("control: %s is not found in %s", verb, fmt.Sprintf(verb, plain))
		}
	}
	if text, _ := json.Marshal(plain); !leaks(string(text)) {
		t.Error("control: not found in JSON")
	}
}

func TestReveal(t *testing.T) {
	var c struct {
		Token Text `yaml:"token"`
		Other Text `yaml:"other"`
	}
	if err := yamlfile.Decode("x.yaml", strings.NewReader("token: "+hidden+"\n"), &c); err != nil || c.Token.Reveal() != hidden || !c.Other.IsZero() || c.Other.Reveal() != "" || c.Other.String() != "" {
		t.Errorf("%v, %q", err, c.Token.Reveal())
	}
	if text, err := yamlfile.Marshal(c); err != nil || string(text) != "token: '"+Redacted+"'\n" {
		t.Errorf("%s %v", text, err)
	}
	// A wrong form is refused without being repeated.
	if err := yamlfile.Decode("x.yaml", strings.NewReader("token: ["+hidden+"]\n"), &c); err == nil || strings.Contains(err.Error(), hidden) {
		t.Errorf("%v", err)
	}
}
