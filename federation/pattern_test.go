package federation

import (
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func parse(t testing.TB, s string) Pattern {
	t.Helper()
	p, err := ParsePattern(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestPattern(t *testing.T) {
	tests := []struct {
		pattern string
		yes, no []string
	}{
		{"portfolio", []string{"/portfolio"}, []string{"/portfolio2", "/portfoli", "/Portfolio", "/portfolio/x", "portfolio", "/", "", "//portfolio", "/x/portfolio", "/portfolio/"}},
		{"orders/*", []string{"/orders/eu", "/orders/*"}, []string{"/orders", "/orders/", "/orders/eu/1", "/order/eu"}},
		{"*", []string{"/a", "/portfolio"}, []string{"/a/b", "/", "/entente"}},
		{"*/worker", []string{"/a/worker"}, []string{"/worker", "/a/b/worker", "/entente/worker"}},
		{"batch/**", []string{"/batch/a", "/batch/a/b/c"}, []string{"/batch", "/batch/", "/batches/a", "/x/batch/a"}},
		{"**", []string{"/a", "/a/b"}, []string{"", "/", "/entente", "/entente/gateway/gw-1", "/entente/agent/h1"}},
		{"a/*/c", []string{"/a/b/c"}, []string{"/a/c", "/a/b/b/c"}},
	}
	for _, test := range tests {
		p := parse(t, test.pattern)
		if p.String() != test.pattern {
			t.Errorf("%q became %q", test.pattern, p)
		}
		for _, path := range test.yes {
			if !p.Match(path) {
				t.Errorf("%q does not match %q", test.pattern, path)
			}
		}
		for _, path := range test.no {
			if p.Match(path) {
				t.Errorf("%q matches %q", test.pattern, path)
			}
		}
	}
	if (Pattern{}).Match("/a") || (Pattern{}).Match("/") {
		t.Error("the zero pattern matches")
	}
}

func TestParsePatternRefuses(t *testing.T) {
	for pattern, want := range map[string]string{
		"": "empty", "/a": "leading", "spiffe://trading.example/a": "path only", "a*": "whole segment", "*a": "whole segment", "**/a": "at the end", "a/**/b": "at the end", "a**": "whole segment",
		"a//b": "a//b", "a/": "a/", "a/../b": "a/../b", "./a": "./a", "a b": "a b", "a%2fb": "a%2fb", "[ab]": "[ab]", "é": "é", "***": "whole segment",
		"entente": "never callers", "entente/gateway/gw-1": "never callers", "entente/**": "never callers", strings.Repeat("a", 600): "longer", strings.Repeat("a/", 20) + "a": "segments",
	} {
		if p, err := ParsePattern(pattern); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %q %v, want %q", pattern, p, err, want)
		}
	}
}

func genPattern() *rapid.Generator[string] {
	return rapid.StringMatching(`(a|b|\*)(/(a|b|\*)){0,2}(/\*\*)?|\*\*`)
}

func genPath() *rapid.Generator[string] { return rapid.StringMatching(`(/(a|b|c)){1,4}`) }

// Overlap and Covers are what they say, measured by Match over every short path.
func TestPatternSets(t *testing.T) {
	var paths []string
	var grow func(prefix string, depth int)
	grow = func(prefix string, depth int) {
		for _, segment := range []string{"a", "b", "c"} {
			path := prefix + "/" + segment
			paths = append(paths, path)
			if depth > 1 {
				grow(path, depth-1)
			}
		}
	}
	grow("", 5)
	rapid.Check(t, func(t *rapid.T) {
		a, err := ParsePattern(genPattern().Draw(t, "a"))
		if err != nil {
			t.Fatal(err)
		}
		b, err := ParsePattern(genPattern().Draw(t, "b"))
		if err != nil {
			t.Fatal(err)
		}
		both := slices.ContainsFunc(paths, func(path string) bool { return a.Match(path) && b.Match(path) })
		if Overlap(a, b) != both || Overlap(b, a) != both {
			t.Errorf("%q and %q overlap: %v", a, b, both)
		}
		beyond := slices.ContainsFunc(paths, func(path string) bool { return b.Match(path) && !a.Match(path) })
		if a.Covers(b) == beyond {
			t.Errorf("%q covers %q: %v", a, b, !beyond)
		}
	})
}

func TestPatternMatchesOneWay(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text, path := genPattern().Draw(t, "pattern"), genPath().Draw(t, "path")
		p, err := ParsePattern(text)
		if err != nil {
			t.Fatal(err)
		}
		want, have := strings.Split(text, "/"), strings.Split(path[1:], "/")
		matches := true
		if want[len(want)-1] == "**" {
			want = want[:len(want)-1]
			matches = len(have) > len(want)
			have = have[:min(len(have), len(want))]
		}
		matches = matches && slices.EqualFunc(want, have, func(w, h string) bool { return w == "*" || w == h })
		if p.Match(path) != matches {
			t.Errorf("%q matches %q: %v", text, path, p.Match(path))
		}
	})
}

func FuzzParsePattern(f *testing.F) {
	for _, seed := range []string{"portfolio", "orders/*", "batch/**", "**", "/a", "a//b", "entente/x"} {
		f.Add(seed, "/"+seed)
	}
	f.Fuzz(func(t *testing.T, text, path string) {
		p, err := ParsePattern(text)
		if err != nil {
			return
		}
		if again, err := ParsePattern(p.String()); err != nil || again != p {
			t.Fatalf("%q became %q: %v", text, p, err)
		}
		if p.Match(path) && (!strings.HasPrefix(path, "/") || strings.HasPrefix(path, "/entente/") || strings.Contains(path, "//")) {
			// An SVID's path is valid before it comes here; only the first two are promised.
			if !strings.Contains(path, "//") || !strings.HasSuffix(text, "**") {
				t.Fatalf("%q matches %q", text, path)
			}
		}
		if !Overlap(p, p) || !p.Covers(p) {
			t.Fatalf("%q does not overlap itself", text)
		}
	})
}

func BenchmarkMatch(b *testing.B) {
	p := parse(b, "orders/*/worker")
	b.ReportAllocs()
	for b.Loop() {
		if !p.Match("/orders/eu/worker") {
			b.Fatal("no match")
		}
	}
}
