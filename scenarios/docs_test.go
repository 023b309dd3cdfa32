package scenarios

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/entente-mesh/entente/internal/refusal"
)

var update = flag.Bool("update", false, "rewrite generated pages of the documentation")

// The page of refusals is the table in the code, and nothing else.
func TestRefusalsPage(t *testing.T) {
	const page = "../docs/reference/refusals.md"
	var b strings.Builder
	b.WriteString(`# Refusals

What the mesh answers when it refuses a request or cannot serve it: an RFC 9457 problem (` + "`application/problem+json`" + `) with ` + "`type`, `title`, `status`, `detail`, `request_id` and `next`" + `,
or for gRPC a trailers-only answer with the code below. The header ` + "`Entente-Refused`" + ` names the reason, so that an answer of the mesh is never taken for one of the application.
The rule and revision behind a refusal stand in the log of the process that refused, under the request id; callers do not learn them.

This page is made from the table in internal/refusal: ` + "`go test ./scenarios -run TestRefusalsPage -update`" + `.

| reason | HTTP | gRPC | meaning | what to do |
|---|---|---|---|---|
`)
	for _, row := range refusal.All() {
		fmt.Fprintf(&b, "| `%s` | %d | %d | %s | %s |\n", row.Reason, row.Status, row.GRPC, row.Title, row.Next)
	}
	if *update {
		if err := os.WriteFile(page, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != b.String() {
		t.Errorf("%s is not what the table says: run this test with -update", page)
	}
}
