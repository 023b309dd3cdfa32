package dataplane

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/entente-mesh/entente/internal/dataplane/header"
)

// Sidecar to sidecar in one domain and datacenter.
func TestInsideADomain(t *testing.T) {
	w := newWorld(t)
	a := get(t, w.trading.outURL[0], "market.trading.example", "/quote?s=1")
	if a.StatusCode != 200 || a.body != "ok" {
		t.Fatal(a)
	}
	seen := w.trading.apps[0].last()
	if seen == nil {
		t.Fatal("the application of the own datacenter was not asked")
	}
	cert, err := header.ParseClientCert(seen.Header.Get(header.ClientCert))
	if err != nil || cert.URI.String() != "spiffe://trading.example/portfolio" || cert.By.String() != "spiffe://trading.example/market" {
		t.Errorf("%s: %+v, %v", header.ClientCert, cert, err)
	}
	if seen.Host != "market.trading.example" || seen.URL.RawQuery != "s=1" {
		t.Errorf("host %q, query %q", seen.Host, seen.URL.RawQuery)
	}
	if !header.ValidRequestID(a.id()) || seen.Header.Get(header.RequestID) != a.id() {
		t.Errorf("request ids: %q to the caller, %q to the application", a.id(), seen.Header.Get(header.RequestID))
	}
	out, in := w.trading.out[0].access.of(a.id()), w.trading.sidecars[0].access.of(a.id())
	for name, got := range map[string][2]any{
		"out hop":      {out["hop"], "outbound"},
		"out upstream": {out["upstream"], "spiffe://trading.example/market"},
		"out outcome":  {out["outcome"], "answered"},
		"in hop":       {in["hop"], "inbound"},
		"in peer":      {in["peer"], "spiffe://trading.example/portfolio"},
		"in caller":    {in["caller"], "spiffe://trading.example/portfolio"},
		"in upstream":  {in["upstream"], "application"},
		"in status":    {in["status"], 200.0},
	} {
		if got[0] != got[1] {
			t.Errorf("%s is %v, not %v", name, got[0], got[1])
		}
	}
}

// Sidecar, gateway, the other domain's gateway, sidecar.
func TestAcrossDomains(t *testing.T) {
	w := newWorld(t)
	a := get(t, w.trading.outURL[0], "accounts.banking.example", "/v1/balance/42")
	if a.StatusCode != 200 || a.body != "ok" {
		t.Fatal(a)
	}
	cert, err := header.ParseClientCert(w.banking.apps[0].last().Header.Get(header.ClientCert))
	if err != nil || cert.URI.String() != "spiffe://trading.example/portfolio" {
		t.Errorf("%+v, %v", cert, err)
	}
	own := w.trading.gateways[0].access.of(a.id())
	theirs := w.banking.gateways[0].access.of(a.id())
	inbound := w.banking.sidecars[0].access.of(a.id())
	for name, got := range map[string][2]any{
		"own peer":        {own["peer"], "spiffe://trading.example/portfolio"},
		"own upstream":    {own["upstream"], "spiffe://banking.example/entente/gateway/gw-dc1"},
		"own rule":        {own["rule"], "Agreement/reads"},
		"theirs peer":     {theirs["peer"], "spiffe://trading.example/entente/gateway/gw-dc1"},
		"theirs caller":   {theirs["caller"], "spiffe://trading.example/portfolio"},
		"theirs via":      {theirs["via"], "trading.example/dc1/gw-dc1"},
		"theirs rule":     {theirs["rule"], "Agreement/reads"},
		"theirs revision": {theirs["revision"], 7.0},
		"inbound peer":    {inbound["peer"], "spiffe://banking.example/entente/gateway/gw-dc1"},
		"inbound caller":  {inbound["caller"], "spiffe://trading.example/portfolio"},
		"inbound via":     {inbound["via"], "trading.example/dc1/gw-dc1, banking.example/dc1/gw-dc1"},
	} {
		if got[0] != got[1] {
			t.Errorf("%s is %v, not %v", name, got[0], got[1])
		}
	}
	// A body, with trailers, through all of it.
	a = do(t, client, "POST", w.trading.outURL[0]+"/v1/x", "accounts.banking.example", nil, io.MultiReader(strings.NewReader("hello "), strings.NewReader("world ")))
	if a.body != "hello world ok" {
		t.Error(a)
	}
}

// A service without instances here is reached through the gateways.
func TestAcrossDatacentersOfADomain(t *testing.T) {
	w := newWorld(t)
	w.trading.endpoints = w.trading.endpoints[1:] // dc2 only
	w.push()
	a := get(t, w.trading.outURL[0], "market.trading.example", "/quote")
	if a.StatusCode != 200 || w.trading.apps[1].last() == nil {
		t.Fatal(a)
	}
	if in := w.trading.sidecars[1].access.of(a.id()); in["caller"] != "spiffe://trading.example/portfolio" || in["via"] == "" {
		t.Errorf("%v", in)
	}
}

func TestRefusals(t *testing.T) {
	w := newWorld(t)
	out := w.trading.outURL[0]
	tests := []struct {
		name, method, host, path string
		header                   http.Header
		status                   int
		reason                   string
	}{
		{"control", "GET", "accounts.banking.example", "/v1/balance", nil, 200, ""},
		{"control, port and case", "GET", "Accounts.Banking.Example:80", "/v1/balance", nil, 200, ""},
		{"unknown host", "GET", "nobody.trading.example", "/", nil, 421, "unknown-service"},
		{"an address", "GET", "127.0.0.1", "/", nil, 421, "unknown-service"},
		{"not imported", "GET", "ledger.banking.example", "/", nil, 0, "not-imported"},
		{"method", "DELETE", "accounts.banking.example", "/v1/balance", nil, 403, "agreement-method"},
		{"path", "GET", "accounts.banking.example", "/v2", nil, 403, "agreement-method"},
		{"dots", "GET", "accounts.banking.example", "/v1/%2e%2e/v2", nil, 400, "bad-request"},
		{"encoded slash", "GET", "accounts.banking.example", "/v1/a%2fb", nil, 400, "bad-request"},
		{"browser", "GET", "accounts.banking.example", "/v1/balance", http.Header{"Sec-Fetch-Site": {"cross-site"}}, 403, "browser"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			a := do(t, client, test.method, out+test.path, test.host, test.header, nil)
			if test.status != 0 && a.StatusCode != test.status || a.Header.Get(header.Refused) != test.reason {
				t.Fatalf("%d %q, want %d %q: %s", a.StatusCode, a.Header.Get(header.Refused), test.status, test.reason, a.body)
			}
			if test.reason == "" {
				return
			}
			p := a.problem()
			if p.Type != "urn:entente:refused:"+test.reason || p.Next == "" {
				t.Errorf("%+v", p)
			}
			if strings.Contains(a.body, "Agreement/") || strings.Contains(a.body, "agreement.yaml") {
				t.Errorf("the caller was told the rule (I11): %s", a.body)
			}
			record := w.trading.out[0].access.of(a.id())
			if record["reason"] != test.reason || record["outcome"] != "refused" {
				t.Errorf("record: %v", record)
			}
		})
	}
}
