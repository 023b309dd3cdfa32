package refusal

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"net/http"
	"strconv"
	"strings"
	"testing"
)

func TestTable(t *testing.T) {
	seen := map[Reason]bool{}
	for _, row := range All() {
		switch {
		case seen[row.Reason]:
			t.Errorf("%s stands there twice", row.Reason)
		case strings.Trim(string(row.Reason), "abcdefghijklmnopqrstuvwxyz-") != "":
			t.Errorf("%q is no token of lower-case letters", row.Reason)
		case row.Status < 400 || row.Status > 599 || http.StatusText(row.Status) == "":
			t.Errorf("%s has status %d", row.Reason, row.Status)
		case row.GRPC == 0 || row.GRPC > 16:
			t.Errorf("%s has gRPC code %d", row.Reason, row.GRPC)
		case !strings.HasSuffix(row.Title, ".") || !strings.HasSuffix(row.Next, ".") && !strings.Contains(row.Next, "entente "):
			t.Errorf("%s: title and advice are sentences: %q, %q", row.Reason, row.Title, row.Next)
		case (row.Status == 401) != strings.HasPrefix(string(row.Reason), "token-"):
			t.Errorf("%s: 401 is for tokens", row.Reason)
		}
		seen[row.Reason] = true
		if row.Reason.Status() != row.Status || row.Reason.GRPC() != row.GRPC || row.Reason.Title() != row.Title || !row.Reason.Known() {
			t.Errorf("%s: the methods say something else", row.Reason)
		}
	}
	// What others rely on, so that nobody changes it unawares.
	for reason, status := range map[Reason]int{
		UnknownService: 421, NotImported: 403, AgreementMissing: 403, AgreementCaller: 403, AgreementMethod: 403, AgreementExpired: 403, GatewayNotAgreed: 403, CallerCalls: 403,
		Browser: 403, TokenMissing: 401, TokenInvalid: 401, TokenExpired: 401, TierUnknown: 403, Rate: 429, NoRoute: 404, NoEndpoint: 503, UpstreamUnreachable: 502,
		UpstreamOutcomeUnknown: 502, Timeout: 504, Loop: 508, NotReady: 503, BadRequest: 400,
	} {
		if reason.Status() != status {
			t.Errorf("%s is %d, want %d", reason, reason.Status(), status)
		}
	}
	All()[0].Status = 200
	if All()[0].Status == 200 {
		t.Error("the table can be changed from outside")
	}
	unknown := Reason("no-such")
	if unknown.Known() || unknown.Status() != 500 || unknown.GRPC() != 13 || unknown.Title() == "" {
		t.Error("a reason outside the table is not an internal error")
	}
}

// A reason without a row would be answered as an internal error.
func TestEveryReasonHasARow(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "refusal.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	reasons := 0
	for node := range ast.Preorder(file) {
		spec, ok := node.(*ast.ValueSpec)
		if !ok {
			continue
		}
		if kind, ok := spec.Type.(*ast.Ident); !ok || kind.Name != "Reason" {
			continue
		}
		for i, name := range spec.Names {
			reasons++
			text, err := strconv.Unquote(spec.Values[i].(*ast.BasicLit).Value)
			if err != nil || !Reason(text).Known() {
				t.Errorf("%s, %q, has no row in the table: %v", name.Name, text, err)
			}
		}
	}
	if reasons != len(All()) {
		t.Errorf("%d reasons and %d rows", reasons, len(All()))
	}
}

// TestPrintTable shows the table as documentation has it: go test -run PrintTable -v.
func TestPrintTable(t *testing.T) {
	var b strings.Builder
	b.WriteString("\n| reason | HTTP | gRPC | what it says | what to do |\n|---|---|---|---|---|\n")
	for _, row := range All() {
		fmt.Fprintf(&b, "| `%s` | %d | %d | %s | %s |\n", row.Reason, row.Status, row.GRPC, row.Title, row.Next)
	}
	t.Log(b.String())
}
