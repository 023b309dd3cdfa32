package yamlfile

import (
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

type level int

func (l *level) UnmarshalText(text []byte) error {
	for i, name := range []string{"low", "high"} {
		if name == string(text) {
			*l = level(i + 1)
			return nil
		}
	}
	return fmt.Errorf("%q is neither low nor high", text)
}

func (l level) MarshalText() ([]byte, error) { return []byte([]string{"", "low", "high"}[l]), nil }

type listen struct {
	Raft string `yaml:"raft,required"`
	API  string `yaml:"api"`

	Pos
}

type limits struct {
	Small int8 `yaml:"small,min=-3,max=3"`
}

type config struct {
	Pos
	limits
	Name   string         `yaml:"name,required"`
	Listen listen         `yaml:"listen"`
	Extra  *listen        `yaml:"extra"`
	Port   uint16         `yaml:"port,min=1"`
	TTL    time.Duration  `yaml:"ttl,min=1s,max=7d"`
	Rate   Rate           `yaml:"rate"`
	Size   Size           `yaml:"size"`
	Level  level          `yaml:"level"`
	Mode   string         `yaml:"mode,oneof=auto|manual"`
	On     bool           `yaml:"on"`
	Ratio  float64        `yaml:"ratio"`
	Names  []string       `yaml:"names"`
	Tiers  map[string]int `yaml:"tiers"`
	Many   []listen       `yaml:"many"`
	Old    string         `yaml:"old,unsupported"`
	Later  Node           `yaml:"later"`
	Hidden string         `yaml:"-"`
	Not    string
}

func decode(text string) (config, error) {
	c := config{Port: 7443, Hidden: "kept"}
	err := Decode("ca.yaml", strings.NewReader(text), &c)
	return c, err
}

func TestDecode(t *testing.T) {
	c, err := decode(`# a comment
name: ca-1
listen: {raft: "127.0.0.1:1"}
ttl: 1d12h
rate: 30/m
size: 1536MiB
level: high
mode: manual
on: true
ratio: 0.5
names: [a, b]
tiers: {gold: 3}
small: -3
many:
- raft: x
later: {raft: y}
`)
	if err != nil {
		t.Fatal(err)
	}
	if c.Name != "ca-1" || c.Listen.Raft != "127.0.0.1:1" || c.TTL != 36*time.Hour || c.Rate.PerSecond != 0.5 || c.Size.Bytes != 1536<<20 || c.Level != 2 || c.Mode != "manual" || !c.On || c.Ratio != 0.5 || c.Small != -3 {
		t.Errorf("%+v", c)
	}
	if c.Port != 7443 || c.Hidden != "kept" || c.Extra != nil {
		t.Errorf("defaults were lost: %+v", c)
	}
	if !reflect.DeepEqual(c.Names, []string{"a", "b"}) || c.Tiers["gold"] != 3 || c.Many[0].Raft != "x" {
		t.Errorf("%+v", c)
	}
	if got := c.Many[0].Pos.String(); got != "ca.yaml:15" {
		t.Errorf("many[0] stands at %s", got)
	}
	if got := c.At("listen").Errorf("no").Error(); got != "ca.yaml:3:1: no" {
		t.Errorf("a later complaint about a key: %s", got)
	}
	if got := c.At("extra").String(); got != "ca.yaml:2" {
		t.Errorf("a later complaint about an absent key: %s", got)
	}
	if c.Given("extra") || !c.Given("name") {
		t.Error("Given is wrong")
	}
	var later listen
	if err := c.Later.Decode(&later); err != nil || later.Raft != "y" {
		t.Errorf("later: %+v %v", later, err)
	}
}

func TestDecodeRefuses(t *testing.T) {
	tests := []struct{ name, text, want string }{
		{"unknown key", "name: a\nlisten: {raft: x, apj: y}\n", `ca.yaml:2:19: unknown key "apj" in listen; did you mean "api"?`},
		{"unknown key, nothing near", "name: a\nlisten: {raft: x, zzzzzz: y}\n", `ca.yaml:2:19: unknown key "zzzzzz" in listen; known keys: api, raft`},
		{"unknown key at the top", "name: a\nlisen: {raft: x}\n", `ca.yaml:2:1: unknown key "lisen"; did you mean "listen"?`},
		{"hidden field", "name: a\nHidden: x\n", `unknown key "Hidden"`},
		{"untagged field", "name: a\nnot: x\nNot: y\n", `unknown key "Not"`},
		{"twice", "name: a\nname: b\n", `ca.yaml:2:1: key "name" is given twice, first at line 1`},
		{"twice in a map", "name: a\ntiers: {a: 1, a: 2}\n", `ca.yaml:2:15: key "a" is given twice in tiers, first at line 2`},
		{"missing", "port: 1\n", `ca.yaml:1:1: key "name" is missing`},
		{"missing below", "name: a\nmany: [{api: x}]\n", `key "raft" is missing in many[0]`},
		{"empty", "name: \"\"\n", "name is empty"},
		{"null", "name: a\nport:\n", "ca.yaml:2:6: port has no value; give it one or leave the key out"},
		{"null mapping", "name: a\nlisten: ~\n", "listen has no value"},
		{"text for a number", "name: a\nport: high\n", `port must be a whole number from 0 to 65535, not "high"`},
		{"quoted number", "name: a\nport: \"80\"\n", `port must be a whole number from 0 to 65535, not "80"`},
		{"hexadecimal", "name: a\nport: 0x50\n", "port must be a whole number"},
		{"octal", "name: a\nport: 0o17\n", "port must be a whole number"},
		{"underscores", "name: a\nport: 1_000\n", "port must be a whole number"},
		{"too large", "name: a\nport: 65536\n", "port must be a whole number from 0 to 65535"},
		{"negative", "name: a\nport: -1\n", "port must be a whole number"},
		{"too small", "name: a\nport: 0\n", "port: 0 is too small; the least is 1"},
		{"over the limit", "name: a\nsmall: 4\n", "small: 4 is too large; the most is 3"},
		{"number for text", "name: 12\n", `name must be text, not "12"; put it in quotes`},
		{"boolean for text", "name: true\n", `name must be text, not "true"; put it in quotes`},
		{"text for a boolean", "name: a\non: yes\n", `on must be true or false, not "yes"`},
		{"number without a unit", "name: a\nttl: 30\n", `ttl must be a duration such as "12h" or "1h30m", not "30": it has no unit`},
		{"negative duration", "name: a\nttl: -1h\n", "it must not have a sign"},
		{"unknown unit", "name: a\nttl: 1w\n", "units are ms, s, m, h, d"},
		{"short duration", "name: a\nttl: 10ms\n", "ttl: 10ms is too small; the least is 1s"},
		{"long duration", "name: a\nttl: 8d\n", "ttl: 8d is too large; the most is 7d"},
		{"endless duration", "name: a\nttl: 999999999h\n", "ttl must be a duration"},
		{"rate", "name: a\nrate: 500\n", `rate: "500" is not a rate such as "500/s"`},
		{"size", "name: a\nsize: 500\n", `size: "500" is not a size such as "512KiB"`},
		{"size of nothing", "name: a\nsize: 0MiB\n", "is not a size"},
		{"size in decimal units", "name: a\nsize: 1GB\n", "is not a size"},
		{"rate of nothing", "name: a\nrate: 0/s\n", "would refuse everything"},
		{"enumeration", "name: a\nlevel: middle\n", `level: "middle" is neither low nor high`},
		{"list for an enumeration", "name: a\nlevel: [low]\n", "level must be one value, not a list"},
		{"one of", "name: a\nmode: manuel\n", `mode: "manuel" is not one of auto, manual; did you mean "manual"?`},
		{"text for a list", "name: a\nnames: b\n", "names must be a list, as in [a, b], not \"b\""},
		{"list for a mapping", "name: a\nlisten: [x]\n", "listen must be a mapping (\"key: value\" lines), not a list"},
		{"mapping for text", "name: {a: b}\n", "name must be text, not a mapping"},
		{"document is a list", "- a\n", "the document must be a mapping"},
		{"document is text", "hello\n", "the document must be a mapping"},
		{"not yet", "name: a\nold: x\n", `key "old" is not supported in this release; leave it out`},
		{"infinity", "name: a\nratio: .inf\n", "ratio must be a number"},

		{"nothing", "", "ca.yaml: the file is empty"},
		{"only comments", "# x\n---\n", "ca.yaml: the file is empty"},
		{"second document", "name: a\n---\nname: b\n", "ca.yaml:3:1: a second document begins here"},
		{"tab", "name: a\nlisten:\n\traft: x\n", "ca.yaml:3:1: the line is indented with a tab; YAML wants spaces"},
		{"UTF-16", "\xff\xfen\x00a\x00", "ca.yaml: the file is UTF-16; save it as UTF-8"},
		{"not UTF-8", "name: a\nmode: \xff\n", "ca.yaml:2:7: this is not UTF-8 text"},
		{"control character", "name: a\x00\n", "ca.yaml:1:8: control character U+0000"},
		{"anchor", "name: &x a\nmode: *x\n", "ca.yaml:1:7: anchors and aliases are not allowed here"},
		{"unknown alias", "name: *x\n", "anchors and aliases are not allowed here"},
		{"merge", "name: a\n<<: {mode: auto}\n", "merge keys (<<) are not allowed"},
		{"tag", "name: !!str 12\n", "tags such as !!str are not allowed"},
		{"own tag", "name: !env HOME\n", "tags such as !env are not allowed"},
		{"key that is a list", "[a]: b\n", "a key must be plain text"},
		{"second colon", "name: a: b\n", "this is not valid YAML"},
		{"unclosed", "name: [a\n", "this is not valid YAML"},
		{"deep", "later: " + strings.Repeat("[", 40) + strings.Repeat("]", 40), "nested deeper than 32 levels"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			_, err := decode(test.text)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("got:  %v\nwant: %s", err, test.want)
			}
			var all Errors
			var one *Error
			if !errors.As(err, &all) || !errors.As(err, &one) || one.File != "ca.yaml" {
				t.Errorf("the error has no place: %#v", err)
			}
		})
	}
}

func TestDecodeAcceptsByteOrderMark(t *testing.T) {
	if c, err := decode("\xef\xbb\xbfname: a\n"); err != nil || c.Name != "a" {
		t.Errorf("%+v %v", c, err)
	}
}

func TestDecodeTellsAllAtOnceButNotForEver(t *testing.T) {
	_, err := decode("mode: x\nnam: a\nport: x\n")
	if lines := strings.Split(err.Error(), "\n"); len(lines) != 4 || !strings.HasPrefix(lines[3], "ca.yaml:3:") {
		t.Errorf("want four complaints in the order of their lines:\n%v", err)
	}
	var many strings.Builder
	many.WriteString("name: a\n")
	for i := range 100 {
		fmt.Fprintf(&many, "x%d: 1\n", i)
	}
	_, err = decode(many.String())
	if lines := strings.Split(err.Error(), "\n"); len(lines) != MaxErrors+1 || !strings.HasSuffix(lines[MaxErrors], "and 80 more") {
		t.Errorf("%v", err)
	}
}

func TestDecodeBoundsSize(t *testing.T) {
	_, err := decode("name: " + strings.Repeat("a", MaxSize))
	if err == nil || !strings.Contains(err.Error(), "larger than 8 MiB") {
		t.Error(err)
	}
	err = Decode("ca.yaml", io.LimitReader(neverEnding{}, 1<<40), &config{})
	if err == nil || !strings.Contains(err.Error(), "larger than 8 MiB") {
		t.Error(err)
	}
}

type neverEnding struct{}

func (neverEnding) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = '#'
	}
	return len(p), nil
}

func TestDecodeReportsReading(t *testing.T) {
	broken := errors.New("disk on fire")
	if err := Decode("ca.yaml", io.MultiReader(strings.NewReader("name: a\n"), failing{broken}), &config{}); !errors.Is(err, broken) {
		t.Error(err)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

func TestDecodeAll(t *testing.T) {
	var kinds []string
	err := DecodeAll("x.yaml", strings.NewReader("---\nkind: A\n---\n---\nkind: B\n---\n"), func(doc Node) error {
		kind, pos, ok := doc.Scalar("kind")
		kinds = append(kinds, fmt.Sprint(kind, " ", pos, " ", ok))
		return nil
	})
	if err != nil || strings.Join(kinds, ", ") != "A x.yaml:2 true, B x.yaml:5 true" {
		t.Errorf("%v %v", kinds, err)
	}
	err = DecodeAll("x.yaml", strings.NewReader("a: 1\n---\nb: 2\n"), func(doc Node) error { return doc.Named("Thing").Decode(&struct{}{}) })
	if err == nil || err.Error() != "x.yaml:1:1: unknown key \"a\" in Thing\nx.yaml:3:1: unknown key \"b\" in Thing" {
		t.Errorf("the complaints of all documents: %v", err)
	}
	stop := errors.New("stop")
	if err := DecodeAll("x.yaml", strings.NewReader("a: 1\n---\nb: 2\n"), func(Node) error { return stop }); err != stop {
		t.Errorf("another error ends the reading: %v", err)
	}
}

func TestFormatDuration(t *testing.T) {
	for d, want := range map[time.Duration]string{
		12 * time.Hour: "12h", 90 * time.Minute: "1h30m", 16 * time.Second: "16s", 61 * time.Second: "1m1s", 0: "0s", 100 * time.Millisecond: "100ms", time.Hour + time.Second: "1h0m1s",
	} {
		if got := FormatDuration(d); got != want {
			t.Errorf("%d: %q, want %q", d, got, want)
		}
	}
}

func TestMarshalRoundTrip(t *testing.T) {
	text := rapid.OneOf(rapid.String(), rapid.SampledFrom([]string{"", "yes", "true", "null", "~", "1", "0x1", "2027-11-20", "<<", "a: b", "- x", "#", "{", "two\nlines\n", "\ttab", " x ", "é"}))
	rapid.Check(t, func(t *rapid.T) {
		c := config{
			Name:  rapid.StringMatching(`.{0,3}x.{0,3}`).Draw(t, "name"),
			Port:  rapid.Uint16Range(1, 65535).Draw(t, "port"),
			TTL:   rapid.OneOf(rapid.Just(time.Duration(0)), rapid.Map(rapid.Int64Range(1e9, 6e14), func(n int64) time.Duration { return time.Duration(n) })).Draw(t, "ttl"),
			Level: level(rapid.IntRange(0, 2).Draw(t, "level")),
			On:    rapid.Bool().Draw(t, "on"),
			Ratio: rapid.Float64Range(-1e9, 1e9).Draw(t, "ratio"),
		}
		if names := rapid.SliceOf(text).Draw(t, "names"); len(names) > 0 {
			c.Names = names
		}
		if tiers := rapid.MapOf(text, rapid.Int()).Draw(t, "tiers"); len(tiers) > 0 {
			c.Tiers = tiers
		}
		c.Listen.Raft = rapid.SampledFrom([]string{"a", "b:1"}).Draw(t, "raft")
		data, err := Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		var again config
		if err := Decode("again.yaml", strings.NewReader(string(data)), &again); err != nil {
			t.Fatalf("%v\n%s", err, data)
		}
		again.Pos, again.Listen.Pos = Pos{}, Pos{}
		if !reflect.DeepEqual(c, again) {
			t.Fatalf("wrote %+v\nread  %+v\n%s", c, again, data)
		}
	})
	if _, err := Marshal(config{Name: "\xff"}); err == nil {
		t.Error("text that is not UTF-8 was written")
	}
}

func FuzzDecode(f *testing.F) {
	f.Add("name: ca-1\nlisten: {raft: x}\nttl: 12h\nrate: 5/s\nlevel: low\nmany: [{raft: y}]\nlater: [1]\n")
	f.Add("name: &a b\nmode: *a\n")
	f.Add("a:\n\tb\n")
	f.Add("? [x]\n: y\n")
	f.Add("--- !t\n%YAML 1.1\n...\n")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := decode(text)
		if err != nil {
			if err.Error() == "" {
				t.Fatal("an error that says nothing")
			}
			return
		}
		if c.Name == "" || c.Port == 0 {
			t.Fatalf("accepted: %q", text)
		}
		if _, err := Marshal(c); err != nil {
			t.Fatalf("read but not written: %v", err)
		}
	})
}

func BenchmarkDecode(b *testing.B) {
	text := "name: a\nlisten: {raft: x}\nmany:\n" + strings.Repeat("- {raft: x, api: y}\n", 100)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := decode(text); err != nil {
			b.Fatal(err)
		}
	}
}
