package house

import (
	"fmt"
	"go/ast"
	"go/parser"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"
)

const module = "github.com/entente-mesh/entente"

// rooms says who may import whom inside this module: a room may import the rooms
// after its colon and nothing else of ours. A package that is missing here fails
// the test, so a new room is always put on the map.
//
// "x/*" stands for everything below x; a line of its own wins over such a line.
// "..." after the colon: any room but cmd. Every room may import api/entente/state/v1.
// Tests may import anything.
const rooms = `
api/entente/state/v1:
api/entente/v1:

ca/selector:
ca:                      ca/selector internal/secret
ca/roles:                ca
ca/domain:               ca ca/roles ca/selector federation federation/catalog
ca/domain/domaintest:    ca
ca/presence:             ca federation/catalog
ca/wire:                 api/entente/v1 ca/presence federation/catalog
ca/feed:                 ca ca/domain ca/presence ca/wire federation/catalog
ca/signer:               ca
ca/rotation:             ca ca/domain
ca/replica:              ca ca/domain internal/admission
ca/keystore:             internal/pemfile internal/secret
ca/nodeattest:           api/entente/v1 ca ca/selector internal/daemon internal/pemfile internal/yamlfile
ca/compare:              api/entente/v1 ca
ca/server:               api/entente/v1
                         ca ca/domain ca/roles ca/feed ca/presence ca/wire ca/signer ca/nodeattest
                         federation federation/bundle federation/catalog
                         internal/peer internal/localpeer internal/admission
ca/client:               api/entente/v1 ca ca/compare ca/presence ca/wire federation/bundle federation/catalog internal/peer internal/secret
ca/local:                ca ca/domain ca/rotation
ca/node:                 ca ca/domain ca/local ca/rotation ca/replica ca/feed ca/presence ca/signer ca/keystore ca/nodeattest ca/compare ca/server
                         federation federation/exchange
                         internal/peer internal/gossip internal/daemon internal/pemfile internal/yamlfile internal/admission
ca/catest:               ...

federation:
federation/bundle:
federation/exchange:     api/entente/v1 federation federation/bundle internal/peer internal/admission
federation/catalog:      ca/selector federation internal/nearest internal/refusal
federation/manifest:     ca/selector federation federation/catalog internal/nearest internal/yamlfile
federation/origin:       federation

eastwest-gateway:        api/entente/v1 ca/client ca/roles
                         internal/dataplane internal/dataplaneapi internal/peer internal/gossip internal/daemon internal/yamlfile internal/refusal
                         federation/catalog federation/origin
eastwest-gateway/edge:   internal/yamlfile internal/problem internal/refusal internal/admission internal/daemon internal/dataplane/header

meshagent:               ca ca/selector ca/client ca/keystore federation/bundle
                         meshagent/nodeattest meshagent/services meshagent/workloadattest
                         internal/peer internal/jwtsvid internal/daemon internal/secret internal/yamlfile
meshagent/nodeattest:    api/entente/v1 ca ca/selector internal/daemon internal/pemfile internal/yamlfile
meshagent/workloadattest: ca/selector
meshagent/services:      ca internal/daemon internal/safepath internal/yamlfile
meshagent/workloadapi:   meshagent meshagent/workloadattest federation/bundle internal/daemon internal/jwtsvid
meshagent/sds:           meshagent meshagent/workloadattest
meshagent/admin:         api/entente/v1 ca ca/client ca/roles meshagent meshagent/services meshagent/workloadattest internal/daemon internal/dataplane internal/dataplaneapi
meshagent/names:         internal/daemon
meshagent/files:         ca/selector meshagent federation/bundle internal/daemon internal/safepath
meshagent/sidecar:       internal/dataplane internal/daemon internal/safepath federation/catalog federation/origin internal/peer internal/refusal

internal/dataplane:      internal/dataplane/* federation/catalog federation/origin internal/peer internal/problem internal/refusal internal/admission internal/secret
internal/dataplane/*:    internal/refusal
internal/dataplane/header:
internal/dataplaneapi:   api/entente/v1 ca ca/client ca/roles internal/dataplane internal/daemon internal/localpeer internal/peer internal/admission
internal/localpeer:
internal/peer:
internal/peer/peertest:
internal/jwtsvid:
internal/gossip:
internal/admission:
internal/daemon:         internal/admission internal/pemfile internal/yamlfile
internal/daemon/daemontest:
internal/pemfile:
internal/safepath:
internal/secret:
internal/simnet:
internal/nearest:
internal/yamlfile:       internal/nearest
internal/refusal:
internal/problem:        internal/refusal

cmd/*:                   ...
scenarios:               ...
scenarios/*:             ...
scenarios/evil:          ...
`

// outside says which rooms may import a library that must not spread. A library
// is its import path and everything below it.
const outside = `
github.com/hashicorp/raft:        ca/replica
                                  scenarios/evil
go.etcd.io/bbolt:                 ca/replica
github.com/hashicorp/memberlist:  internal/gossip
github.com/envoyproxy:            meshagent/sds
github.com/miekg/dns:             meshagent/names
github.com/miekg/pkcs11:          ca/keystore
google.golang.org/grpc:           api/entente/v1
                                  ca/server ca/client ca/node federation/exchange
                                  meshagent/workloadapi meshagent/sds eastwest-gateway
                                  internal/dataplaneapi internal/localpeer
                                  cmd/*
                                  ca/catest scenarios scenarios/*
`

// pure lists the rooms without sockets, disk, goroutines, clock and randomness:
// time and ids arrive as arguments. They import pure rooms only ([TestPure]).
const pure = `
api/entente/state/v1
ca ca/selector ca/roles ca/domain ca/domain/domaintest ca/local ca/presence ca/rotation
federation federation/catalog federation/origin
internal/jwtsvid internal/nearest internal/refusal internal/secret
`

// What a pure room may not import, and not call of package time.
var (
	impureImports = []string{"net", "net/http", "net/rpc", "os", "os/*", "io/ioutil", "syscall", "crypto/rand", "math/rand", "math/rand/v2"}
	impureTime    = []string{"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTicker", "NewTimer"}
)

func TestDirection(t *testing.T) {
	house := readHouse(t)
	for _, complaint := range house.inspect(os.DirFS("../..")) {
		t.Error(complaint)
	}
}

// The page of the architecture shows the tables above, as they are.
func TestDirectionPage(t *testing.T) {
	const page = "../../docs/architecture.md"
	have, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	want, err := withTables(string(have))
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile(page, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if string(have) != want {
		t.Errorf("%s does not show the tables of this file: run this test with -update", page)
	}

	if changed, err := withTables(strings.Replace(want, "internal/yamlfile", "internal/elsewhere", 1)); err != nil || changed != want {
		t.Errorf("a row that was changed on the page was not noticed: %v", err)
	}
	if _, err := withTables("# Architecture\n"); err == nil {
		t.Error("a page without the tables was not noticed")
	}
}

// withTables returns the page with the tables of this file between its two marks.
func withTables(page string) (string, error) {
	const begin, end = "<!-- tables of internal/house: begin -->\n", "<!-- tables of internal/house: end -->\n"
	before, rest, found := strings.Cut(page, begin)
	_, after, ended := strings.Cut(rest, end)
	if !found || !ended {
		return "", fmt.Errorf("the page lacks %q or %q", begin, end)
	}
	text := "\nWho may import whom inside this module:\n\n```" + rooms + "```\n" +
		"\nLibraries that stay in the packages named here:\n\n```" + outside + "```\n" +
		"\nPure packages:\n\n```" + pure + "```\n\n"
	return before + begin + text + end + after, nil
}

// The map itself must not go round in circles; then no import can.
func TestDirectionIsAcyclic(t *testing.T) {
	house := readHouse(t)
	if cycle := house.cycle(); cycle != nil {
		t.Errorf("the map goes round in a circle: %s", strings.Join(cycle, " -> "))
	}

	house.rooms["federation/catalog"] = append(house.rooms["federation/catalog"], "internal/dataplane")
	if house.cycle() == nil {
		t.Error("federation/catalog -> internal/dataplane -> federation/catalog was not noticed")
	}
}

// A check that cannot fail is none.
func TestDirectionNotices(t *testing.T) {
	const ours = module + "/"
	tests := []struct {
		name string
		file string
		src  string
		want string // part of the only complaint; "" if the tree is good
	}{
		{"allowed import", "ca/domain/apply.go", `import _ "` + ours + `federation/catalog"`, ""},
		{"records are for all", "ca/presence/lease.go", `import _ "` + ours + `api/entente/state/v1"`, ""},
		{"wildcard as target", "internal/dataplane/serve.go", `import _ "` + ours + `internal/dataplane/http1"`, ""},
		{"wildcard as room", "internal/dataplane/http1/read.go", `import _ "` + ours + `internal/refusal"`, ""},
		{"cmd takes any room", "cmd/entente/ca.go", `import _ "` + ours + `ca/node"`, ""},
		{"tests take anything", "ca/domain/apply_test.go", `import _ "github.com/hashicorp/raft"`, ""},
		{"raft at home", "ca/replica/fsm.go", `import _ "github.com/hashicorp/raft"`, ""},
		{"a longer name is another library", "ca/client/dial.go", `import _ "github.com/hashicorp/raft-wal"`, ""},
		{"testdata is not ours", "ca/testdata/x/x.go", `import _ "` + ours + `ca/node"`, ""},
		{"pure room computes with time", "ca/age.go", `import "time"; func f(now, t time.Time) time.Duration { return now.Sub(t) }`, ""},
		{"not a pure room", "ca/signer/sign.go", `import "time"; func f() time.Time { return time.Now() }`, ""},

		{"upwards", "ca/authority.go", `import _ "` + ours + `ca/server"`, "ca must not import ca/server"},
		{"wildcard as room, upwards", "internal/dataplane/http1/read.go", `import _ "` + ours + `internal/peer"`, "internal/dataplane/http1 must not import internal/peer"},
		{"between siblings", "internal/dataplane/http1/read.go", `import _ "` + ours + `internal/dataplane/balance"`, "internal/dataplane/http1 must not import internal/dataplane/balance"},
		{"records import nothing", "api/entente/state/v1/x.go", `import _ "` + ours + `ca"`, "api/entente/state/v1 must not import ca"},
		{"nobody imports cmd", "ca/node/run.go", `import _ "` + ours + `cmd/entente"`, "ca/node must not import cmd/entente"},
		{"new room", "internal/clock/clock.go", ``, "internal/clock is not on the map"},
		{"room below a room", "ca/server/limits/limits.go", ``, "ca/server/limits is not on the map"},
		{"package at the root", "entente.go", ``, "room . is not on the map"},
		{"raft spreads", "ca/node/run.go", `import _ "github.com/hashicorp/raft"`, "ca/node must not import github.com/hashicorp/raft"},
		{"part of a library", "ca/domain/apply.go", `import _ "google.golang.org/grpc/codes"`, "ca/domain must not import google.golang.org/grpc"},
		{"cmd keeps to the libraries", "cmd/entente/ca.go", `import _ "go.etcd.io/bbolt"`, "cmd/entente must not import go.etcd.io/bbolt"},
		{"build tags do not hide", "ca/x_windows.go", `import _ "` + ours + `ca/server"`, "ca must not import ca/server"},
		{"pure room reads a file", "ca/domain/load.go", `import _ "os"`, "ca/domain is pure: it must not import os"},
		{"pure room asks the clock", "ca/age.go", `import "time"; func f() time.Time { return time.Now() }`, "ca is pure: it must not call time.Now"},
		{"pure room waits under another name", "ca/age.go", `import clock "time"; func f() { clock.Sleep(1) }`, "ca is pure: it must not call time.Sleep"},
		{"pure room starts a goroutine", "federation/origin/x.go", `func f() { go f() }`, "federation/origin is pure: it must not start a goroutine"},
		{"unreadable", "ca/broken.go", `import (`, "ca/broken.go"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			src := "package x; " + test.src
			tree := fstest.MapFS{test.file: {Data: []byte(src)}}

			got := readHouse(t).inspect(tree)
			switch {
			case test.want == "" && len(got) > 0:
				t.Errorf("%s: %s\nunexpected: %q", test.file, src, got)
			case test.want != "" && (len(got) != 1 || !strings.Contains(got[0], test.want)):
				t.Errorf("%s: %s\ncomplaints: %q\nwant one with: %s", test.file, src, got, test.want)
			}
		})
	}
}

// house is the three texts above, read.
type house struct {
	rooms   map[string][]string // room or pattern -> rooms it may import
	outside map[string][]string // library -> rooms that may import it
	pure    []string
}

func readHouse(t *testing.T) house {
	t.Helper()
	h := house{rows(t, rooms), rows(t, outside), strings.Fields(pure)}

	// A misspelled room would allow nothing and forbid nothing: say so.
	known := slices.Collect(maps.Keys(h.rooms))
	check := func(name string) {
		if name != "..." && !slices.Contains(known, name) {
			t.Fatalf("the map speaks of %q, which has no line", name)
		}
	}
	for _, list := range h.rooms {
		for _, name := range list {
			check(name)
		}
	}
	for _, list := range h.outside {
		for _, name := range list {
			check(name)
		}
	}
	for _, name := range h.pure {
		check(name)
	}
	return h
}

// rows reads "name: word word", where a line without a colon continues the one before.
func rows(t *testing.T, text string) map[string][]string {
	t.Helper()
	table := map[string][]string{}
	name := ""
	for line := range strings.Lines(text) {
		words := line
		if before, after, found := strings.Cut(line, ":"); found {
			name, words = before, after
			if _, twice := table[name]; twice {
				t.Fatalf("%s has two lines", name)
			}
			table[name] = nil
		}
		if fields := strings.Fields(words); len(fields) > 0 {
			table[name] = append(table[name], fields...)
		}
	}
	return table
}

// inspect reads the imports of every production file in the tree and returns a
// complaint for each that is not on the map.
func (h house) inspect(tree fs.FS) []string {
	var complaints []string
	unknown := map[string]bool{}
	for file := range goFiles(tree, &complaints) {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		room := path.Dir(file)
		may, ok := h.mayImport(room)
		if !ok {
			if !unknown[room] {
				unknown[room] = true
				complaints = append(complaints, fmt.Sprintf("%s: room %s is not on the map: give it a line in internal/house/direction_test.go", file, room))
			}
			continue
		}
		complaints = append(complaints, h.inspectFile(tree, file, room, may)...)
	}
	return complaints
}

func (h house) inspectFile(tree fs.FS, file, room string, may []string) (complaints []string) {
	pure := slices.Contains(h.pure, room)
	mode := parser.ImportsOnly
	if pure {
		mode = parser.SkipObjectResolution
	}
	f, _, err := parse(tree, file, mode)
	if err != nil {
		return []string{err.Error()}
	}

	clock := "" // what this file calls package time
	for _, spec := range f.Imports {
		imported, _ := strconv.Unquote(spec.Path.Value)
		if dep, ours := strings.CutPrefix(imported, module+"/"); ours {
			if dep != "api/entente/state/v1" && !matchesAny(may, dep) {
				complaints = append(complaints, fmt.Sprintf("%s: %s must not import %s", file, room, dep))
			}
			continue
		}
		for library, homes := range h.outside {
			if (imported == library || strings.HasPrefix(imported, library+"/")) && !matchesAny(homes, room) {
				complaints = append(complaints, fmt.Sprintf("%s: %s must not import %s: that is for %s", file, room, imported, strings.Join(homes, ", ")))
			}
		}
		if pure && matchesAny(impureImports, imported) {
			complaints = append(complaints, fmt.Sprintf("%s: %s is pure: it must not import %s", file, room, imported))
		}
		if imported == "time" {
			clock = "time"
			if spec.Name != nil {
				clock = spec.Name.Name
			}
		}
	}
	if pure {
		complaints = append(complaints, impureCode(f, file, room, clock)...)
	}
	return complaints
}

func impureCode(f *ast.File, file, room, clock string) (complaints []string) {
	for node := range ast.Preorder(f) {
		switch node := node.(type) {
		case *ast.GoStmt:
			complaints = append(complaints, fmt.Sprintf("%s: %s is pure: it must not start a goroutine", file, room))
		case *ast.SelectorExpr:
			pkg, ok := node.X.(*ast.Ident)
			if ok && clock != "" && pkg.Name == clock && slices.Contains(impureTime, node.Sel.Name) {
				complaints = append(complaints, fmt.Sprintf("%s: %s is pure: it must not call time.%s", file, room, node.Sel.Name))
			}
		}
	}
	return complaints
}

// mayImport finds the line of a room: its own, else the closest "x/*" above it.
func (h house) mayImport(room string) ([]string, bool) {
	if may, ok := h.rooms[room]; ok {
		return may, true
	}
	for above := path.Dir(room); above != "."; above = path.Dir(above) {
		if may, ok := h.rooms[above+"/*"]; ok {
			return may, true
		}
	}
	return nil, false
}

// matchesAny reports whether name is one of the patterns or stands below an "x/*" of them.
func matchesAny(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(pattern string) bool {
		if below, ok := strings.CutSuffix(pattern, "*"); ok {
			return strings.HasPrefix(name, below)
		}
		return pattern == name || pattern == "..." && !strings.HasPrefix(name, "cmd/")
	})
}

// cycle returns rooms that may import each other in a circle, or nil.
func (h house) cycle() []string {
	done := map[string]bool{}
	var visit func(room string, trail []string) []string
	visit = func(room string, trail []string) []string {
		if i := slices.Index(trail, room); i >= 0 {
			return append(slices.Clone(trail[i:]), room)
		}
		if done[room] {
			return nil
		}
		done[room] = true
		for _, dep := range h.rooms[room] {
			if found := visit(dep, append(slices.Clone(trail), room)); found != nil {
				return found
			}
		}
		return nil
	}
	for _, room := range slices.Sorted(maps.Keys(h.rooms)) {
		if found := visit(room, nil); found != nil {
			return found
		}
	}
	return nil
}
