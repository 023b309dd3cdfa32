package catalog_test

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	. "github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/federation/manifest"
)

var (
	banking = spiffeid.RequireTrustDomainFromString("banking.example")
	trading = spiffeid.RequireTrustDomainFromString("trading.example")
	now     = time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)
)

// bankingYAML is the domain that most tests are about.
var bankingYAML = func() string {
	text, err := os.ReadFile("../manifest/testdata/banking.yaml")
	if err != nil {
		panic(err)
	}
	return string(text)
}()

func parseYAML(t testing.TB, text string) []*statev1.Object {
	t.Helper()
	objects, err := manifest.Parse("banking.yaml", strings.NewReader(text), nil)
	if err != nil {
		t.Fatal(err)
	}
	for i, object := range objects {
		object.Revision = uint64(i + 1)
	}
	return objects
}

func compileYAML(t testing.TB, text string, options ...Option) *Tables {
	t.Helper()
	tables, err := Compile(banking, parseYAML(t, text), options...)
	if err != nil {
		t.Fatal(err)
	}
	return tables
}

func own(path string) spiffeid.ID   { return spiffeid.RequireFromPath(banking, path) }
func other(path string) spiffeid.ID { return spiffeid.RequireFromPath(trading, path) }

// with replaces a part of the catalogue's text; it must be there.
func with(t testing.TB, text, old, new string) string {
	t.Helper()
	if !strings.Contains(text, old) {
		t.Fatalf("the text to replace is not there: %q", old)
	}
	return strings.Replace(text, old, new, 1)
}

// An endpoint's URL may have a query; CA nodes of releases before would refuse it.
func TestEndpointWithAQuery(t *testing.T) {
	for url, want := range map[string]uint32{"https://peer.example/bundle": 1, "https://peer.example/bundle?format=spiffe": 6} {
		o := &statev1.Object{Kind: &statev1.Object_Relationship{Relationship: &statev1.Relationship{TrustDomain: "peer.example", EndpointUrls: []string{url}}}}
		if _, err := Compile(spiffeid.RequireTrustDomainFromString("own.example"), []*statev1.Object{o}); err != nil {
			t.Error(err)
		}
		if got := Level(o); got != want {
			t.Errorf("%s needs level %d, want %d", url, got, want)
		}
	}
}
