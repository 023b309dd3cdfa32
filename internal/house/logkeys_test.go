package house

import (
	"fmt"
	"go/ast"
	"go/parser"
	"io/fs"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"
)

// Every process logs with the keys of one table, and the table has no key that nothing uses.
func TestDocumentedLogKeys(t *testing.T) {
	page, err := os.ReadFile("../../docs/reference/log-keys.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, complaint := range strangeKeys(os.DirFS("../.."), string(page)) {
		t.Error(complaint)
	}
}

func TestDocumentedLogKeysNotices(t *testing.T) {
	const page = "| key | what |\n|---|---|\n| `agent` | x |\n| `error` | x |\n"
	const all = `log.Info("m", "agent", "a", "error", err)`
	for _, test := range []struct{ file, body, want string }{
		{"ca/a.go", all, ""}, // control
		{"ca/a.go", all + `; a.b.Log.With("agent", 1).Warn("m", slog.Any("error", err))`, ""},
		{"ca/a.go", all + `; http.Error(w, "host", 1); status.Error(codes.OK, "host")`, ""},
		{"ca/a_test.go", `log.Info("m", "host", 1)`, "no code uses agent"},
		{"scenarios/a.go", all + `; log.Info("m", "host", 1)`, "no code uses agent"},
		{"ca/a.go", all + `; log.Info("m", "host", 1)`, "ca/a.go:3: host is no key"},
		{"ca/a.go", all + `; s.Log.Error("m", "error", err, "host", 1)`, "ca/a.go:3: host is no key"},
		{"ca/a.go", all + `; a.log.With("host", 1)`, "ca/a.go:3: host is no key"},
		{"ca/a.go", all + `; slog.DebugContext(ctx, "m", "host", 1)`, "ca/a.go:3: host is no key"},
		{"ca/a.go", all + `; log.LogAttrs(ctx, slog.LevelInfo, "m", slog.String("host", h))`, "ca/a.go:3: host is no key"},
		{"ca/a.go", all + `; log.Info("m", key, 1)`, "ca/a.go:3: key is no literal"},
		{"ca/a.go", all + `; log.Info("m", args...)`, "ca/a.go:3: args is no literal"},
		{"ca/a.go", `log.Info("m", "agent", 1)`, "no code uses error"},
	} {
		got := strangeKeys(fstest.MapFS{test.file: {Data: []byte("package a\n\nfunc f() { " + test.body + " }\n")}}, page)
		if test.want == "" && len(got) > 0 || test.want != "" && (len(got) == 0 || !strings.Contains(got[0], test.want)) {
			t.Errorf("%s, %s: %q, want %q", test.file, test.body, got, test.want)
		}
	}
}

var (
	keyRow = regexp.MustCompile("(?m)^\\| `([a-z0-9_]+)` \\| [^|]+ \\|$")
	logger = regexp.MustCompile(`(?i)^s?log(ger)?$`)
	// attributes are the functions of package slog that begin with a key.
	attributes = []string{"Any", "Bool", "Duration", "Float64", "Group", "Int", "Int64", "String", "Time", "Uint64"}
	// keysFrom says how many arguments of a logger's method stand before its keys.
	keysFrom = map[string]int{"With": 0, "Debug": 1, "Info": 1, "Warn": 1, "Error": 1,
		"DebugContext": 2, "InfoContext": 2, "WarnContext": 2, "ErrorContext": 2, "Log": 3, "LogAttrs": 3}
)

// foreignKeys is where a library's own keys pass.
const foreignKeys = "ca/replica/log.go"

// strangeKeys says which keys the product's code logs with that are not on the page, and
// which of the page nothing uses.
func strangeKeys(tree fs.FS, page string) (complaints []string) {
	known := map[string]bool{} // used
	for _, row := range keyRow.FindAllStringSubmatch(page, -1) {
		known[row[1]] = false
	}
	for file := range goFiles(tree, &complaints) {
		if strings.HasSuffix(file, "_test.go") || strings.HasPrefix(file, "scenarios/") || file == foreignKeys {
			continue
		}
		f, positions, err := parse(tree, file, parser.SkipObjectResolution)
		if err != nil {
			return append(complaints, err.Error())
		}
		key := func(e ast.Expr) {
			line := positions.Position(e.Pos()).Line
			literal, ok := e.(*ast.BasicLit)
			if !ok {
				complaints = append(complaints, fmt.Sprintf("%s:%d: %s is no literal: a reader of the log looks for keys of docs/reference/log-keys.md", file, line, nameOf(e)))
				return
			}
			name, _ := strconv.Unquote(literal.Value)
			if _, ok := known[name]; !ok {
				complaints = append(complaints, fmt.Sprintf("%s:%d: %s is no key of docs/reference/log-keys.md: use one of those, or add a row", file, line, name))
				return
			}
			known[name] = true
		}
		ast.Inspect(f, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			method, ok := call.Fun.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if isAttribute(call) {
				key(call.Args[0])
				return true
			}
			from, ok := keysFrom[method.Sel.Name]
			if !ok || !logger.MatchString(nameOf(method.X)) {
				return true
			}
			for i := from; i < len(call.Args); i += 2 {
				if attribute, ok := call.Args[i].(*ast.CallExpr); ok && isAttribute(attribute) {
					i-- // a key with its value; it is met by itself
					continue
				}
				key(call.Args[i])
			}
			return true
		})
	}
	for _, name := range slices.Sorted(maps.Keys(known)) {
		if !known[name] {
			complaints = append(complaints, fmt.Sprintf("docs/reference/log-keys.md: no code uses %s", name))
		}
	}
	return complaints
}

func isAttribute(call *ast.CallExpr) bool {
	f, ok := call.Fun.(*ast.SelectorExpr)
	return ok && nameOf(f.X) == "slog" && slices.Contains(attributes, f.Sel.Name)
}

// nameOf is the last name of an expression; of a logger that With made, the first one's.
func nameOf(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.Ident:
		return e.Name
	case *ast.SelectorExpr:
		return e.Sel.Name
	case *ast.CallExpr:
		if with, ok := e.Fun.(*ast.SelectorExpr); ok && with.Sel.Name == "With" {
			return nameOf(with.X)
		}
		return nameOf(e.Fun)
	}
	return fmt.Sprintf("%T", e)
}
