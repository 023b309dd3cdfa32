package scenarios

import (
	"testing"
)

func TestLegs(t *testing.T) {
	edge, agent, far, gateway := &unit{name: "edge"}, &unit{name: "agent"}, &unit{name: "far"}, &unit{name: "gateway"}
	at := map[string]*unit{"a:1": agent, "f:1": far, "g:1": gateway}
	find := func(address string) *unit { return at[address] }
	const portfolio, market, accounts, gw = "spiffe://t/portfolio", "spiffe://t/market", "spiffe://b/accounts", "spiffe://t/gw"
	records := []record{
		{unit: edge, Hop: "edge", Service: "p", Upstream: portfolio, UpstreamAddress: "a:1"},
		{unit: agent, Hop: "inbound", Service: "p", Peer: "spiffe://t/edge", Upstream: "application", UpstreamAddress: "10.0.0.1:80"},
		// The caller's sidecar is the callee's, too.
		{unit: agent, Hop: "outbound", Service: "m", Upstream: market, UpstreamAddress: "a:1"},
		{unit: agent, Hop: "inbound", Service: "m", Peer: portfolio, Upstream: "application"},
		{unit: agent, Hop: "outbound", Service: "x", Upstream: gw, UpstreamAddress: "g:1"},
		{unit: gateway, Hop: "gateway", Service: "x", Peer: portfolio, Upstream: accounts, UpstreamAddress: "f:1"},
		// far wrote nothing down: that leg has one end only.
	}
	legs := legsOf(records, find)
	want := []tlsLeg{
		{edge, agent, "spiffe://t/edge", portfolio, "p"},
		{agent, agent, portfolio, market, "m"},
		{agent, gateway, portfolio, gw, "x"},
		{gateway, far, "", accounts, "x"},
	}
	if len(legs) != len(want) {
		t.Fatalf("%d legs: %+v", len(legs), legs)
	}
	for i := range want {
		if legs[i] != want[i] {
			t.Errorf("leg %d: %+v, want %+v", i, legs[i], want[i])
		}
	}
}

func TestParseRecords(t *testing.T) {
	const log = `{"time":"2026-11-21T12:00:00Z","hop":"gateway","request_id":"R1","attempts":2,"duration_ms":1.5,"new_field":{}}
{"time":"2026-11-21T12:00:01Z","hop":"gateway","request_id":"R2"}
{"time":"2026-11-21T12:00:02Z","hop":"gate{"time":"2026-11-21T12:00:03Z","hop":"gateway","request_id":"R1"}
{"time":"2026-11-21T12:00:04Z","request_id":"R1"`
	list, err := parseRecords([]byte(log), func(r *record) bool { return r.RequestID == "R1" })
	if err != nil || len(list) != 2 || list[0].Attempts != 2 || list[0].began().Nanosecond() != 998_500_000 {
		t.Errorf("%+v, %v", list, err)
	}
	if _, err := parseRecords([]byte("nonsense\n"), func(*record) bool { return true }); err == nil {
		t.Error("nonsense is an access record")
	}
	if list, err := parseRecords(nil, func(*record) bool { return true }); err != nil || len(list) != 0 {
		t.Error(list, err)
	}
}
