package catalog

import (
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

var (
	banking = spiffeid.RequireTrustDomainFromString("banking.example")
	trading = spiffeid.RequireTrustDomainFromString("trading.example")
	now     = time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)
)

// bankingYAML is the side that serves: accounts is exported, fx is not, ledger
// never leaves dc1 by itself, and notices may call only two services.
const bankingYAML = `
apiVersion: entente/v1
kind: Relationship
metadata: {name: trading.example}
spec: {endpoint: {urls: ["https://10.1.0.9:8444/bundle"]}}
---
apiVersion: entente/v1
kind: Gateway
metadata: {name: gw-dc1}
spec: {run: {uid: 1000, hosts: [h1]}, datacenter: dc1, address: "10.1.0.1:7443"}
---
apiVersion: entente/v1
kind: Gateway
metadata: {name: gw-dc2}
spec: {run: {uid: 1000, hosts: [h2]}, datacenter: dc2, address: "10.2.0.1:7443"}
---
apiVersion: entente/v1
kind: Service
metadata: {name: accounts, owner: team-accounts}
spec:
  run: {uid: 1000, path: /opt/accounts, hosts: [h1, h2]}
  port: 8080
  health: {http: /healthz}
  export: {to: [trading.example]}
---
apiVersion: entente/v1
kind: Service
metadata: {name: fx}
spec: {run: {uid: 1000, hosts: [h1, h2]}, port: 8081}
---
apiVersion: entente/v1
kind: Service
metadata: {name: ledger}
spec: {run: {uid: 1000, hosts: [h1, h2]}, port: 8082, failover: {mode: manual, order: [dc1, dc2]}}
---
apiVersion: entente/v1
kind: Service
metadata: {name: statements}
spec: {run: {uid: 1000, hosts: [h1, h2]}, port: 8083, failover: {order: [dc1, dc2], hold: 10s}}
---
apiVersion: entente/v1
kind: Service
metadata: {name: notices}
spec: {run: {uid: 1000, hosts: [h1]}, outbound: {port: 19001}, calls: [accounts, prices.trading.example]}
---
apiVersion: entente/v1
kind: Import
spec: {service: prices.trading.example}
---
apiVersion: entente/v1
kind: Agreement
metadata: {name: trading-reads-balances, owner: sec-banking}
spec:
  peer: trading.example
  expires: 2027-11-20
  gateways:
  - {id: "spiffe://trading.example/entente/gateway/gw-dc1", datacenter: dc1, address: "10.1.0.2:7443"}
  - {id: "spiffe://trading.example/entente/gateway/gw-dc2", datacenter: dc2, address: "10.2.0.2:7443"}
  allow:
  - callers: [portfolio, "orders/*"]
    service: accounts
    http:
    - {methods: [GET, HEAD], path: {type: PathPrefix, value: /v1/balance}}
    - {methods: [POST], path: {type: Exact, value: /v1/holds}}
  - callers: [notices, fx]
    service: prices.trading.example
`

func parseYAML(t testing.TB, text string) []*statev1.Object {
	t.Helper()
	objects, err := ParseObjects("banking.yaml", strings.NewReader(text), nil)
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
