package house

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"
)

// The page of conformance is the table of requirements with the tests that say in their comments what they hold.
func TestConformancePage(t *testing.T) {
	const page = "../../docs/conformance.md"
	held, complaints := citations(os.DirFS("../.."))
	text, more := conformance(specifications, held)
	for _, complaint := range append(complaints, more...) {
		t.Error(complaint)
	}
	if *update {
		if err := os.WriteFile(page, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != text {
		t.Errorf("%s is not what the tests and the table say: run this test with -update", page)
	}
}

func TestConformanceNotices(t *testing.T) {
	const head = "package x\n\nimport \"testing\"\n\n"
	table := []specification{{"X", []requirement{
		{"1", "MUST", "asked", ""}, {"2", "SHOULD", "asked", "Not here."}, {"3", "MUST", "asked", ""}, {"T1", "", "trap", ""},
	}}}
	const good = head + "// A does it.\n// Requirements: 1-3, T1.\nfunc TestA(t *testing.T) {}\n"
	tests := []struct {
		name, source string
		want         string // part of the first complaint
	}{
		{"all held", good, ""},
		{"a fuzz target holds too", strings.Replace(good, "TestA(t *testing.T)", "FuzzA(f *testing.F)", 1), ""},
		{"reason instead of a test", strings.Replace(good, "1-3", "1, 3", 1), ""},
		{"neither test nor reason", strings.Replace(good, "1-3", "1-2", 1), "requirement 3 has neither"},
		{"a trap without a test", strings.Replace(good, ", T1", "", 1), "requirement T1 has neither"},
		{"a number that is none", strings.Replace(good, "1-3", "1-4", 1), "x/x_test.go: TestA cites requirement 4, which is not in the table"},
		{"a range backwards", strings.Replace(good, "1-3", "1-3, 3-2", 1), `TestA cites "3-2"`},
		{"no number", strings.Replace(good, "1-3", "1-3, one", 1), `TestA cites "one"`},
		{"twice", strings.Replace(good, "1-3", "1-3, 3", 1), "TestA cites requirement 3 twice"},
		{"no full stop", strings.Replace(good, "T1.", "T1", 1), "does not end"},
		{"not at a test", good + "\n// Requirements: 1.\nfunc helper() {}\n", "x/x_test.go:9: a citation that belongs to no test"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			held, complaints := citations(fstest.MapFS{"x/x_test.go": &fstest.MapFile{Data: []byte(test.source)}})
			_, more := conformance(table, held)
			complaints = append(complaints, more...)
			switch {
			case test.want == "" && len(complaints) > 0:
				t.Errorf("complains: %q", complaints)
			case test.want != "" && (len(complaints) == 0 || !strings.Contains(complaints[0], test.want)):
				t.Errorf("complains: %q, want %q", complaints, test.want)
			}
		})
	}
}

// citation is a test that holds a requirement.
type citation struct{ file, test string }

const citationMark = "// Requirements: "

// citations finds the lines "// Requirements: 1, 3-5, T2." in the doc comments of all tests, by requirement.
func citations(tree fs.FS) (held map[string][]citation, complaints []string) {
	held = map[string][]citation{}
	fset := token.NewFileSet()
	err := fs.WalkDir(tree, ".", func(name string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && name != "." && (strings.HasPrefix(entry.Name(), ".") || entry.Name() == "testdata"):
			return fs.SkipDir
		case entry.IsDir() || !strings.HasSuffix(name, "_test.go"):
			return nil
		}
		source, err := fs.ReadFile(tree, name)
		if err != nil {
			return err
		}
		file, err := parser.ParseFile(fset, name, source, parser.ParseComments)
		if err != nil {
			return err
		}
		tests := map[*ast.CommentGroup]string{}
		for _, decl := range file.Decls {
			f, ok := decl.(*ast.FuncDecl)
			if ok && f.Doc != nil && f.Recv == nil && (strings.HasPrefix(f.Name.Name, "Test") || strings.HasPrefix(f.Name.Name, "Fuzz")) {
				tests[f.Doc] = f.Name.Name
			}
		}
		for _, group := range file.Comments {
			for _, comment := range group.List {
				list, ok := strings.CutPrefix(comment.Text, citationMark)
				if !ok {
					continue
				}
				test := tests[group]
				if test == "" {
					complaints = append(complaints, fmt.Sprintf("%s:%d: a citation that belongs to no test", name, fset.Position(comment.Pos()).Line))
					continue
				}
				numbers, err := cited(list)
				if err != nil {
					complaints = append(complaints, fmt.Sprintf("%s: %s cites %v", name, test, err))
				}
				for _, number := range numbers {
					if slices.Contains(held[number], citation{name, test}) {
						complaints = append(complaints, fmt.Sprintf("%s: %s cites requirement %s twice", name, test, number))
						continue
					}
					held[number] = append(held[number], citation{name, test})
				}
			}
		}
		return nil
	})
	if err != nil {
		complaints = append(complaints, err.Error())
	}
	return held, complaints
}

var citedRange = regexp.MustCompile(`^(T?)([1-9][0-9]{0,2})(?:-(?:T?)([1-9][0-9]{0,2}))?$`)

// cited reads "1, 3-5, T2.".
func cited(list string) (numbers []string, err error) {
	list, ended := strings.CutSuffix(list, ".")
	if !ended {
		return nil, fmt.Errorf("%q, which does not end with a full stop", list)
	}
	for part := range strings.SplitSeq(list, ", ") {
		m := citedRange.FindStringSubmatch(part)
		if m == nil {
			return numbers, fmt.Errorf("%q, which is no number", part)
		}
		first, _ := strconv.Atoi(m[2])
		last := first
		if m[3] != "" {
			if last, _ = strconv.Atoi(m[3]); last <= first {
				return numbers, fmt.Errorf("%q, which is no range", part)
			}
		}
		for n := first; n <= last; n++ {
			numbers = append(numbers, m[1]+strconv.Itoa(n))
		}
	}
	return numbers, nil
}

// conformance writes the page. It complains of a requirement with neither test nor reason, and of a citation of none.
func conformance(specs []specification, held map[string][]citation) (page string, complaints []string) {
	var b strings.Builder
	b.WriteString(`# Conformance

What the SPIFFE specifications ask of us, in our words, and the tests that fail when we do not do it. The specifications are those of spiffe/spiffe, ` + "`standards/`" + `, as of 1 July 2026;
WIT-SVID, the Workload API's WIT calls, the Broker Endpoint and the Broker API are incubating there. *hard* marks what no clause asks and we do nevertheless.
A remark stands where no test holds a requirement, or where we do something else than its words say.

A test says what it holds in its comment: ` + "`// Requirements: 39, 41-43, T9.`" + ` This page is made from these lines and the table in internal/house/requirements_test.go:
` + "`go test ./internal/house -run TestConformancePage -update`" + `.
`)
	known := map[string]bool{}
	for _, spec := range specs {
		fmt.Fprintf(&b, "\n## %s\n\n| # | level | what is asked | tests | remark |\n|---|---|---|---|---|\n", spec.title)
		for _, r := range spec.requirements {
			known[r.number] = true
			var tests []string
			for _, c := range held[r.number] {
				tests = append(tests, fmt.Sprintf("[%s %s](../%s)", path.Dir(c.file), c.test, c.file))
			}
			if len(tests) == 0 && r.remark == "" {
				complaints = append(complaints, fmt.Sprintf("requirement %s has neither a test that cites it nor a reason", r.number))
			}
			fmt.Fprintf(&b, "| %s | %s | %s | %s | %s |\n", r.number, r.level, r.asks, strings.Join(tests, "; "), r.remark)
		}
	}
	for number, by := range held {
		if known[number] {
			continue
		}
		for _, c := range by {
			complaints = append(complaints, fmt.Sprintf("%s: %s cites requirement %s, which is not in the table", c.file, c.test, number))
		}
	}
	return b.String(), complaints
}
