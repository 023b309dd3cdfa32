package main

import (
	"io"
	"strings"
	"testing"
	"time"
)

// Entries in lines are JSON as any program writes it.
func TestReadEntryLines(t *testing.T) {
	const rest = `, "path": "/a", "hosts": ["h1"], "selectors": ["unix:uid:1000"]`
	for _, test := range []struct{ name, line, hint, want string }{
		{"plain", `{"id": "entry/a"` + rest + `, "hint": "x: y"}`, "x: y", ""},
		{"compact", `{"id":"entry/a"` + rest + `,"hint":"x"}`, "x", ""},
		{"escaped slash", `{"id": "entry\/a"` + rest + `, "hint": "a\/b"}`, "a/b", ""},
		{"surrogates", `{"id": "entry/a"` + rest + `, "hint": "\ud83d\ude00"}`, "\U0001f600", ""},
		{"raw emoji", `{"id": "entry/a"` + rest + `, "hint": "` + "\U0001f600" + `"}`, "\U0001f600", ""},
		{"line separator", `{"id": "entry/a"` + rest + `, "hint": "` + "a\u2028b" + `"}`, "a\u2028b", ""},
		{"quotes and backslashes", `{"id": "entry/a"` + rest + `, "hint": "a\\\"b\\"}`, `a\"b\`, ""},
		{"DEL", `{"id": "entry/a"` + rest + `, "hint": "` + "\x7f" + `"}`, "\x7f", ""},
		{"tabs", "{\t\"id\":\t\"entry/a\"" + rest + ",\t\"hint\":\t\"x\"\t}\r", "x", ""},
		{"byte order mark", "\ufeff" + `{"id": "entry/a"` + rest + `, "hint": "x"}`, "x", ""},
		{"YAML", `{id: entry/a}`, "", "not one JSON object"},
		{"two values", `{"id": "entry/a"} {}`, "", "not one JSON object"},
		{"not UTF-8", "{\"id\": \"entry/\xe9\"" + rest + "}", "", "UTF-8"},
		{"twice", `{"id": "entry/a", "id": "entry/b"` + rest + `}`, "", "f.jsonl:2"},
		{"no unit", `{"id": "entry/a"` + rest + `, "ttl": 3600}`, "", "unit"},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := readEntryLines("f.jsonl", strings.NewReader("\n"+test.line+"\n"))
			switch {
			case test.want == "" && (err != nil || len(got) != 1 || got[0].ID != "entry/a" || got[0].Hint != test.hint):
				t.Errorf("%v, %v; want entry/a with hint %q", got, err, test.hint)
			case test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), "f.jsonl:2")):
				t.Errorf("error %v, want one of f.jsonl:2 with %q", err, test.want)
			}
		})
	}
}

// A lifetime that 32 bits of seconds do not hold is refused, in files and as a flag.
func TestEntryLifetimes(t *testing.T) {
	const entry = "id: entry/a\npath: /a\nhosts: [h1]\nselectors: ['unix:uid:1000']\n"
	for _, test := range []struct {
		text string
		want time.Duration // 0: refused
	}{
		{"1h", time.Hour}, {"7d", 7 * 24 * time.Hour}, {"1s", time.Second},
		{"900ms", 0}, {"4294970896s", 0}, {"50000d", 0}, {"-1h", 0}, {"3600", 0},
	} {
		for _, field := range []string{"ttl", "jwtTTL", "witTTL"} {
			got, err := decodeEntries("f.yaml", strings.NewReader(entry+field+": "+test.text+"\n"))
			if (err == nil) != (test.want != 0) || err == nil && got[0].TTL+got[0].JWTTTL+got[0].WITTTL != test.want {
				t.Errorf("%s: %s: %v, %v; want %v", field, test.text, got, err, test.want)
			}
		}
		for _, flag := range []string{"--ttl", "--jwt-ttl", "--wit-ttl"} {
			c := entryCreateCommand()
			c.SetOut(io.Discard)
			if err := c.ParseFlags([]string{flag + "=" + test.text}); (err == nil) != (test.want != 0) {
				t.Errorf("%s=%s: %v; want %v", flag, test.text, err, test.want)
			}
		}
		if err := tokenCreateCommand().ParseFlags([]string{"--ttl=" + test.text}); (err == nil) != (test.want != 0) {
			t.Errorf("token create --ttl=%s: %v; want %v", test.text, err, test.want)
		}
	}
}
