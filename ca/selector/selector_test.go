package selector

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

func TestSelectors(t *testing.T) {
	digest := strings.Repeat("9f", 32)
	for _, good := range []string{"unix:uid:0", "unix:uid:1000", "unix:gid:4294967294", "unix:user:svc-accounts", "unix:path:/opt/a b/bin", "unix:path:/x:y", "unix:sha256:" + digest,
		"unix:group:0", "unix:cmdline:" + digest, "systemd:unit:web@1.service", "systemd:unit:docker-" + digest + ".scope", `systemd:unit:a\x2db.service`, "container:id:" + digest, "run:id:abcdefghijklmnop2345"} {
		s, err := Parse(good)
		if err != nil {
			t.Error(err)
		} else if s.String() != good {
			t.Errorf("%q became %q", good, s)
		}
	}
	for _, bad := range []string{
		"", "uid:1", "unix:", "unix:uid", "unix:uid:", "unix:uid:01", "unix:uid:+1", "unix:uid:-1", "unix:uid:4294967295", "unix:uid:x",
		"unix:user:", "unix:user:a/b", "unix:user:a:b", "unix:path:a", "unix:path:/", "unix:path:/a/../b", "unix:path:/a/", "unix:path:/a\nb",
		"unix:path:/a\x00", "unix:sha256:9F" + digest[2:], "unix:sha256:" + digest[1:], "unix:pid:1", "k8s:ns:x", "unix:group:-1", "unix:cmdline:x",
		"systemd:unit:web", "systemd:unit:.service", "systemd:unit:a/b.service", "systemd:unit:a b.service", "systemd:unit:web.slice", "systemd:web.service", "container:id:" + digest[1:], "run:id:short", "run:id:ABCDEFGHIJKLMNOPQ", "unix:path:/" + strings.Repeat("a", MaxValue),
	} {
		if s, err := Parse(bad); err == nil {
			t.Errorf("%q parsed as %v", bad, s)
		}
	}
	for name, test := range map[string]struct {
		list []string
		ok   bool
	}{
		"nothing":          {nil, false},
		"user":             {[]string{"unix:uid:1"}, true},
		"path alone":       {[]string{"unix:path:/a"}, false},
		"path and group":   {[]string{"unix:path:/a", "unix:gid:1"}, false},
		"path and user":    {[]string{"unix:path:/a", "unix:uid:1"}, true},
		"path and name":    {[]string{"unix:path:/a", "unix:user:x"}, true},
		"path and digest":  {[]string{"unix:path:/a", "unix:sha256:" + digest}, true},
		"digest":           {[]string{"unix:sha256:" + digest}, true},
		"two of one kind":  {[]string{"unix:uid:1", "unix:uid:2"}, false},
		"group alone":      {[]string{"unix:gid:1"}, false},
		"several groups":   {[]string{"unix:uid:1", "unix:group:1", "unix:group:2"}, true},
		"groups alone":     {[]string{"unix:group:1", "unix:group:2"}, false},
		"command line":     {[]string{"unix:cmdline:" + digest, "unix:path:/a"}, false},
		"unit":             {[]string{"systemd:unit:a.service"}, true},
		"container":        {[]string{"container:id:" + digest}, true},
		"run alone":        {[]string{"run:id:abcdefghijklmnop"}, false},
		"run and user":     {[]string{"run:id:abcdefghijklmnop", "unix:uid:1"}, true},
		"one is malformed": {[]string{"unix:uid:1", "unix:x"}, false},
	} {
		if err := Check(test.list); (err == nil) != test.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, seed := range []string{"unix:uid:1000", "unix:path:/a", "unix:sha256:", "unix:user:x", "x"} {
		f.Add(seed)
	}
	for _, kind := range Kinds() {
		f.Add(kind.Name + ":" + kind.Example)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := Parse(text)
		_ = CheckAnchored([]string{text})
		if err != nil {
			if Check([]string{text, "unix:uid:1"}) == nil {
				t.Errorf("%q cannot be read, and stands in a set", text)
			}
			return
		}
		if s.String() != text {
			t.Errorf("%q has a second form %q", text, s)
		}
		if len(s.Value) == 0 || len(s.Value) > MaxValue {
			t.Errorf("a value of %d bytes", len(s.Value))
		}
		if (CheckAnchored([]string{text}) == nil) != IsAnchor(s.Kind) {
			t.Errorf("%q alone: %v", text, CheckAnchored([]string{text}))
		}
		if err := Check([]string{text, "systemd:unit:web.service"}); err != nil && s.Kind != Unit {
			t.Errorf("%q beside a unit: %v", text, err)
		}
	})
}

// Each row says all that its users ask for, and its example is what it says.
func TestKinds(t *testing.T) {
	names, keys := map[string]bool{}, map[string]bool{}
	for _, kind := range Kinds() {
		if kind.Key == "" || kind.Value == "" || kind.Match == "" || names[kind.Name] || keys[kind.Key] {
			t.Errorf("%s: the row is not whole, or there twice: %+v", kind.Name, kind)
		}
		names[kind.Name], keys[kind.Key] = true, true
		if kind.Anchor == (kind.Weak != "") || kind.Anchor && (kind.Stored || kind.Many) {
			t.Errorf("%s: is it an anchor?", kind.Name)
		}
		text := kind.Name + ":" + kind.Example
		if s, err := Parse(text); err != nil || s != (Selector{kind.Name, kind.Example}) {
			t.Errorf("%s: its example: %v, %v", kind.Name, s, err)
		}
		if _, err := Parse(kind.Name + ":\x7f"); err == nil {
			t.Errorf("%s: no bounds", kind.Name)
		}
		if err := Check([]string{text}); (err == nil) != (kind.Anchor || kind.Stored) {
			t.Errorf("%s alone: %v", kind.Name, err)
		}
	}
}

// A kind of a later level is told from those that every release knows.
func TestLevel(t *testing.T) {
	before := kinds
	defer func() { kinds = before }()
	kinds = append(Kinds(), Kind{Name: "tpm:quote", Level: 7})
	for want, list := range map[uint32][]string{0: {"unix:uid:1", "unix:user:web"}, 7: {"unix:uid:1", "tpm:quote:x"}} {
		if level := Level(list); level != want {
			t.Errorf("%v need level %d", list, level)
		}
	}
}

// Of every kind of selector only those that say whose process it is may stand without another: which program it is,
// anybody can arrange.
func TestAnchors(t *testing.T) {
	digest := strings.Repeat("0a", 32)
	program := []string{Path + ":/opt/app", SHA256 + ":" + digest, Cmdline + ":" + digest, GID + ":5", Group + ":6", Run + ":abcdefghijklmnop"}
	for i := range program {
		if err := CheckAnchored(program[i : i+1]); err == nil {
			t.Errorf("%s stands alone", program[i])
		}
	}
	if err := CheckAnchored(program); err == nil || !strings.Contains(err.Error(), "add unix:uid") {
		t.Errorf("all of them: %v", err)
	}
	if err := CheckAnchored(nil); err == nil {
		t.Error("none")
	}
	for _, anchor := range []string{UID + ":1", User + ":web", Unit + ":web.service", Container + ":" + digest} {
		for _, set := range [][]string{{anchor}, append(slices.Clone(program), anchor)} {
			if err := errors.Join(Check(set), CheckAnchored(set)); err != nil {
				t.Errorf("%v: %v", set, err)
			}
		}
	}
}
