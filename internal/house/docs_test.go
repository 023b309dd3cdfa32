package house

import (
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/entente-mesh/entente/ca/selector"
	"github.com/entente-mesh/entente/internal/refusal"
)

var update = flag.Bool("update", false, "rewrite generated pages of the documentation")

// The page of refusals is the table in the code, and nothing else.
func TestRefusalsPage(t *testing.T) {
	const page = "../../docs/reference/refusals.md"
	var b strings.Builder
	b.WriteString(`# Refusals

What the mesh answers when it refuses a request or cannot serve it: an RFC 9457 problem (` + "`application/problem+json`" + `) with ` + "`type`, `title`, `status`, `detail`, `request_id` and `next`" + `,
or for gRPC a trailers-only answer with the code below. The header ` + "`Entente-Refused`" + ` names the reason, so that an answer of the mesh is never taken for one of the application.
The rule and revision behind a refusal stand in the log of the process that refused, under the request id; callers do not learn them.

This page is made from the table in internal/refusal: ` + "`go test ./internal/house -run TestRefusalsPage -update`" + `.

| reason | HTTP | gRPC | meaning | what to do |
|---|---|---|---|---|
`)
	for _, row := range refusal.All() {
		fmt.Fprintf(&b, "| `%s` | %d | %d | %s | %s |\n", row.Reason, row.Status, row.GRPC, row.Title, row.Next)
	}
	checkPage(t, page, b.String())
}

// checkPage compares a page with what its table says, and writes it with -update.
func checkPage(t *testing.T, page, want string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(page, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != want {
		t.Errorf("%s is not what the table says: run this test with -update", page)
	}
}

// The page of selectors is the table in the code, and nothing else.
func TestSelectorsPage(t *testing.T) {
	const page = "../../docs/reference/selectors.md"
	var b strings.Builder
	fmt.Fprintf(&b, `# Selectors

A selector is one statement about a process, written `+"`KIND:VALUE`"+`. The selectors of an entry say which processes hold its identity: all of them must hold. A Service or a Gateway says them under `+"`run`"+`.
`+"`entente agent explain-pid`"+` shows those of a process. [Attest a systemd service](../how-to/attest-a-systemd-service.md) is the way there.

This page is made from the table in ca/selector: `+"`go test ./internal/house -run TestSelectorsPage -update`"+`.

| selector | in `+"`run`"+` | the value is | the agent compares it with | stands alone |
|---|---|---|---|---|
`)
	for _, kind := range selector.Kinds() {
		example, alone := kind.Example, "yes"
		if kind.Many {
			example = "[" + example + "]"
		}
		if !kind.Anchor {
			alone = "no: " + kind.Weak
		}
		fmt.Fprintf(&b, "| `%s:VALUE` | `%s: %s` | %s | %s | %s |\n", kind.Name, kind.Key, example, kind.Value, kind.Match, alone)
	}
	fmt.Fprintf(&b, `
The rules are the same for the catalogue, for entries and at the agent:

* A set has 1 to %d selectors. A value has 1 to %d bytes and no control characters. Each kind stands once; `+"`unix:group`"+` may stand several times.
* One of a set must be able to stand alone: %s. Nobody but root, or the user in question, can make another process that has it.
  Entries that were stored with `+"`unix:sha256`"+` alone, before that was a rule (feature level 5), keep working.
* There is one way to write a selector: no leading zeros, no upper-case digits, no path that is not clean. So selectors are compared as text.
* Two entries exclude each other if they have two values of %s. Two names of `+"`unix:user`"+` do not: one user may have several, as a directory gives them (`+"`web`, `web@corp.example`"+`).

**User names have up to 256 bytes**, as on Linux (LOGIN_NAME_MAX): names of a directory, as `+"`web@corp.example`"+`, are longer than 32 bytes at times. In a Service or a Gateway a name of over 32 bytes needs feature level 5 of every CA node.
Agents and gateways of the release before do without an object that has one: upgrade them first.

A selector of a kind that an agent does not know is one of a later release: no process satisfies it.

## Node selectors

An entry can demand something of the hosts that it names, with `+"`nodeSelectors`"+`. A host has node selectors by the word of somebody else, never by its own. What follows the kind is free text on one line.

| selector | a host has it by the word of |
|---|---|
`, selector.MaxCount, selector.MaxValue, selector.Anchors(), selector.Separators())
	for _, kind := range selector.NodeKinds() {
		fmt.Fprintf(&b, "| `%s:…` | %s |\n", kind.Name, kind.Word)
	}
	fmt.Fprintf(&b, `
A host has, and an entry demands, up to %d; one has up to %d bytes. [Attest hosts by certificate](../how-to/attest-hosts-by-certificate.md) lists those of a certificate.
`, selector.MaxNodeCount, selector.MaxNodeLength)
	checkPage(t, page, b.String())
}

// What the pages say that a test shows, a test shows: each test that a page names is
// there, in the room that the page names beside it, and each runbook has its own.
func TestDocumentsNameTests(t *testing.T) {
	for _, complaint := range namedTests(os.DirFS("../..")) {
		t.Error(complaint)
	}
}

func TestDocumentsNameTestsNotices(t *testing.T) {
	tree := func(page string) fstest.MapFS {
		return fstest.MapFS{
			"docs/operations.md": {Data: []byte(page)},
			"ca/node/a_test.go":  {Data: []byte("package node\n\nfunc TestRunbookLostNode(t *testing.T) {}\n\nfunc FuzzA(f *testing.F) {}\n")},
			"ca/node/a.go":       {Data: []byte("package node\n\nfunc TestHelper() {}\n")},
		}
	}
	for page, want := range map[string]string{
		"## Runbook: lost node\n\n`TestRunbookLostNode`, `FuzzA` (ca/node); `ca/node/a_test.go`; `go test -run TestRunbook`": "", // control
		"`TestGone`":              "docs/operations.md names TestGone",
		"`TestHelper`":            "names TestHelper",
		"`FuzzA` (ca/replica)":    "names FuzzA of ca/replica",
		"`TestRunbook`":           "names TestRunbook",
		"`ca/node/b_test.go`":     "names ca/node/b_test.go",
		"## Runbook: lost quorum": "names TestRunbookLostQuorum",
	} {
		switch got := namedTests(tree(page)); {
		case want == "" && len(got) > 0, want != "" && (len(got) != 1 || !strings.Contains(got[0], want)):
			t.Errorf("%s: %q", page, got)
		}
	}
}

var (
	testFunction = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Benchmark)\w+)\(`)
	runbook      = regexp.MustCompile(`(?m)^## Runbook: (.+)$`)
	testFile     = regexp.MustCompile("`([\\w/-]+_test\\.go)`")
	// A test with the room it is in; behind -run, what tests begin with.
	testName = regexp.MustCompile("(-run '?)?\\b((?:Test|Fuzz|Benchmark)[A-Z]\\w*)(?:/…)?(?:` \\(([\\w/-]+)\\))?")
)

// namedTests says which tests the pages of a tree name that are not there.
func namedTests(tree fs.FS) (complaints []string) {
	rooms := map[string][]string{} // of a test
	pages := map[string]string{}
	err := fs.WalkDir(tree, ".", func(name string, entry fs.DirEntry, err error) error {
		isTest, isPage := strings.HasSuffix(name, "_test.go"), strings.HasSuffix(name, ".md")
		if err != nil || entry.IsDir() || !isTest && !isPage {
			return err
		}
		text, err := fs.ReadFile(tree, name)
		if isPage {
			pages[name] = string(text)
			return err
		}
		for _, match := range testFunction.FindAllStringSubmatch(string(text), -1) {
			rooms[match[1]] = append(rooms[match[1]], path.Dir(name))
		}
		return err
	})
	if err != nil {
		return []string{err.Error()}
	}
	for _, page := range slices.Sorted(maps.Keys(pages)) {
		names := func(what string, there bool) {
			if !there {
				complaints = append(complaints, fmt.Sprintf("%s names %s, which is not there", page, what))
			}
		}
		for _, match := range testName.FindAllStringSubmatch(pages[page], -1) {
			pattern, test, room := match[1] != "", match[2], match[3]
			in, ok := rooms[test]
			switch {
			case pattern:
				names("tests "+test, slices.ContainsFunc(slices.Collect(maps.Keys(rooms)), func(name string) bool { return strings.HasPrefix(name, test) }))
			case ok && room != "":
				names(test+" of "+room, slices.ContainsFunc(in, func(have string) bool { return have == room || path.Base(have) == room }))
			default:
				names(test, ok)
			}
		}
		for _, match := range testFile.FindAllStringSubmatch(pages[page], -1) {
			_, here := fs.Stat(tree, path.Join(path.Dir(page), match[1]))
			_, there := fs.Stat(tree, match[1])
			names(match[1], here == nil || there == nil)
		}
		for _, match := range runbook.FindAllStringSubmatch(pages[page], -1) {
			test := "TestRunbook"
			for word := range strings.FieldsSeq(match[1]) {
				test += strings.ToUpper(word[:1]) + word[1:]
			}
			names(test, rooms[test] != nil)
		}
	}
	return complaints
}
