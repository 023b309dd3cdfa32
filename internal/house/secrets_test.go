package house

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/printer"
	"go/token"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// plainSecrets are the fields that are named as a secret and have a type that prints.
var plainSecrets = map[string]string{
	"ca/keystore TokenConfig.Token":      "the label of a PKCS#11 token",
	"ca/node PKCS11.Token":               "the label of a PKCS#11 token",
	"cmd/entente tokenRow.Token":         "an SVID that the verb prints to whom it belongs",
	"meshagent/workloadapi answer.token": "an SVID on its way to the workload",
	"scenarios Request.Token":            "a word for what kind of token it is",
	"scenarios/load Phone.token":         "a token that the scenario made up",
}

// secretFields are the fields of structs of a Go file that hold a secret, by their name, in a type that prints it.
func secretFields(t *testing.T, name string, src []byte) (fields []string) {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), name, src, 0)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.TypeSpec)
		if !ok {
			return true
		}
		is, ok := spec.Type.(*ast.StructType)
		if !ok {
			return true
		}
		for _, f := range is.Fields.List {
			var kind bytes.Buffer
			printer.Fprint(&kind, token.NewFileSet(), f.Type)
			if k := kind.String(); k != "string" && k != "[]byte" && k != "*string" && k != "[]string" && k != "[][]byte" {
				continue
			}
			for _, named := range f.Names {
				if secretName.MatchString(named.Name) {
					fields = append(fields, spec.Name.Name+"."+named.Name)
				}
			}
		}
		return true
	})
	return fields
}

var secretName = regexp.MustCompile(`(?i)^(.*(token|passphrase|password|secret|seed)|pin|phrase|privateKey)$`)

// TestSecretsHaveRedactingTypes: what a struct holds of secrets has a type of internal/secret, so that no log line, error or
// --check shows it.
func TestSecretsHaveRedactingTypes(t *testing.T) {
	used := map[string]bool{}
	var complaints []string
	tree := os.DirFS("../..")
	for file := range goFiles(tree, &complaints) {
		if strings.HasSuffix(file, "_test.go") || strings.HasSuffix(file, ".pb.go") {
			continue
		}
		src, err := fs.ReadFile(tree, file)
		if err != nil {
			t.Fatal(err)
		}
		for _, field := range secretFields(t, file, src) {
			name := path.Dir(file) + " " + field
			if used[name] = true; plainSecrets[name] == "" {
				complaints = append(complaints, name+": give it a type of internal/secret, or a row with the reason")
			}
		}
	}
	for _, complaint := range complaints {
		t.Error(complaint)
	}
	for name := range plainSecrets {
		if !used[name] {
			t.Errorf("%s is not there any more", name)
		}
	}
	got := secretFields(t, "x.go", []byte("package x; type C struct { Token string; TokenFile, TokenID string; pin []byte; Safe, Seed secret.Text; joinToken, name string }"))
	if want := []string{"C.Token", "C.pin", "C.joinToken"}; !slices.Equal(got, want) {
		t.Errorf("control: %q, want %q", got, want)
	}
}
