package house

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// What a pure room may reach outside this module and the standard library, each with all
// below it.
var pureLibraries = []string{"github.com/spiffe/go-spiffe/v2/spiffeid", "google.golang.org/protobuf"}

// What a pure room may not reach by any number of imports. Of the standard library only
// this little can be asked: crypto/x509 itself imports net and os.
var impureReach = []string{"net/http", "os/exec"}

// TestPure follows the imports of the pure rooms all the way, as the compiler sees them on
// this platform: everything of ours on the way is pure itself, and no library comes in that
// is not one of pureLibraries.
func TestPure(t *testing.T) {
	house := readHouse(t)
	graph := importsBelow(t, house.pure)
	for _, room := range house.pure {
		for _, complaint := range house.impure(graph, room) {
			t.Error(complaint)
		}
	}

	if t.Failed() {
		return
	}

	// A check that cannot fail is none: one import more, deep below ca/domain, is found.
	for _, added := range []struct{ in, imported, chain string }{
		{module + "/internal/secret", "net/http", "ca/domain -> ca -> internal/secret -> net/http"},
		{module + "/internal/secret", module + "/internal/yamlfile", "ca/domain -> ca -> internal/secret -> internal/yamlfile"},
		{"google.golang.org/protobuf/internal/detrand", "go.yaml.in/yaml/v3", "google.golang.org/protobuf/internal/detrand -> go.yaml.in/yaml/v3"},
		{"crypto/x509", "os/exec", "crypto/x509 -> os/exec"},
	} {
		before := graph[added.in]
		if len(before) == 0 {
			t.Errorf("control: ca/domain no longer reaches %s: choose another package", added.in)
		}
		graph[added.in] = append(slices.Clone(before), added.imported)
		if got := house.impure(graph, "ca/domain"); len(got) != 1 || !strings.HasSuffix(got[0], added.chain) {
			t.Errorf("%s imports %s: %q", added.in, added.imported, got)
		}
		graph[added.in] = before
	}
}

// importsBelow returns the imports of every package that rooms reach, by import path.
func importsBelow(t *testing.T, rooms []string) map[string][]string {
	t.Helper()
	args := []string{"list", "-deps", "-f", `{{.ImportPath}}{{range .Imports}} {{.}}{{end}}`}
	for _, room := range rooms {
		if _, err := os.Stat("../../" + room); err == nil { // a room may be on the map before it is built
			args = append(args, module+"/"+room)
		}
	}
	out, err := exec.Command("go", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, out)
	}
	graph := map[string][]string{}
	for line := range strings.Lines(string(out)) {
		words := strings.Fields(line)
		graph[words[0]] = words[1:]
	}
	return graph
}

// impure returns a complaint for everything that a pure room reaches and may not, with the
// imports that lead there.
func (h house) impure(graph map[string][]string, room string) (complaints []string) {
	seen := map[string]bool{}
	var visit func(pkg string, chain []string)
	visit = func(pkg string, chain []string) {
		if seen[pkg] {
			return
		}
		seen[pkg] = true
		dep, ours := strings.CutPrefix(pkg, module+"/")
		chain = append(slices.Clone(chain), dep)
		if ours && !slices.Contains(h.pure, dep) || !ours && foreign(pkg) || slices.Contains(impureReach, pkg) {
			complaints = append(complaints, fmt.Sprintf("%s is pure: it must not reach %s: %s", room, dep, strings.Join(chain, " -> ")))
			return
		}
		for _, next := range graph[pkg] {
			visit(next, chain)
		}
	}
	visit(module+"/"+room, nil)
	return complaints
}

// foreign tells whether a package is neither of the standard library nor of a library that
// pure rooms may use.
func foreign(pkg string) bool {
	domain, _, _ := strings.Cut(pkg, "/")
	return strings.Contains(domain, ".") && !slices.ContainsFunc(pureLibraries, func(library string) bool {
		return pkg == library || strings.HasPrefix(pkg, library+"/")
	})
}
