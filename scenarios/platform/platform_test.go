package platform

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/entente-mesh/entente/internal/daemon/daemontest"
	"github.com/entente-mesh/entente/scenarios/load"
)

// fakeMesh is an outbound listener: it hands a request to the service whose name it
// asks for, as the sidecars on the way would, and says who the caller is.
type fakeMesh struct {
	*httptest.Server
	services map[string]http.Handler
	down     string
}

func newFakeMesh(t *testing.T) *fakeMesh {
	m := &fakeMesh{services: map[string]http.Handler{}}
	m.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Host == m.down {
			w.Header().Set("Entente-Refused", "no-endpoint")
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		handler := m.services[r.Host]
		if handler == nil {
			w.WriteHeader(http.StatusMisdirectedRequest)
			return
		}
		r.Header.Set("X-Forwarded-Client-Cert", "By=spiffe://x/y;Hash=00;URI=spiffe://trading.example/portfolio")
		handler.ServeHTTP(w, r)
	}))
	t.Cleanup(m.Close)
	return m
}

func (m *fakeMesh) serve(name, program, datacenter string) http.Handler {
	s := newService(Service{Name: name, Program: program, Outbound: strings.TrimPrefix(m.URL, "http://")}, datacenter)
	m.services[name] = s.handler()
	return m.services[name]
}

func get(t *testing.T, h http.Handler, method, path, body string) (int, Answer) {
	t.Helper()
	w := httptest.NewRecorder()
	r := httptest.NewRequest(method, path, strings.NewReader(body))
	r.Header.Set("X-Forwarded-Client-Cert", "By=a;Hash=b;URI=spiffe://trading.example/edge")
	h.ServeHTTP(w, r)
	var a Answer
	if err := json.Unmarshal(w.Body.Bytes(), &a); err != nil {
		t.Fatalf("%s %s: %s", method, path, w.Body)
	}
	return w.Code, a
}

func TestBuyingPower(t *testing.T) {
	m := newFakeMesh(t)
	m.serve("accounts.banking.example", "accounts", "dc2")
	m.serve("market-data.trading.example", "market-data", "dc1")
	p := m.serve("portfolio.trading.example", "portfolio", "dc1")

	status, a := get(t, p, "GET", "/v1/buying-power/C-1042", "")
	if status != http.StatusOK {
		t.Fatal(status, a)
	}
	var b buyingPower
	if err := json.Unmarshal(a.Data, &b); err != nil {
		t.Fatal(err)
	}
	if b.Cash != cash["C-1042"] || b.Worth < 40*closing["ACME"]+25*closing["GLOBEX"] || b.Margin != b.Worth/2 || b.BuyingPower != b.Cash+b.Margin {
		t.Errorf("figures: %+v", b)
	}
	if a.Caller != "spiffe://trading.example/edge" || a.PID == 0 || len(a.Sources) != 2 || a.Sources[1].Caller != "spiffe://trading.example/portfolio" {
		t.Errorf("who said it: %+v", a)
	}
	if by := a.ServedBy(); len(by) != 2 || by[0] != "dc1" || by[1] != "dc2" {
		t.Errorf("served by %v", by)
	}

	for path, want := range map[string]int{"/v1/buying-power/nobody": 404, "/v1/nothing": 404, "/healthz/x": 404} {
		if status, a := get(t, p, "GET", path, ""); status != want || a.Error == "" {
			t.Errorf("%s: %d %q", path, status, a.Error)
		}
	}
	m.down = "accounts.banking.example"
	if status, a := get(t, p, "GET", "/v1/buying-power/C-1042", ""); status != http.StatusBadGateway || !strings.Contains(a.Error, "no-endpoint") {
		t.Errorf("with accounts down: %d %q", status, a.Error)
	}
}

func TestOrders(t *testing.T) {
	m := newFakeMesh(t)
	m.serve("ledger.banking.example", "ledger", "dc1")
	o := m.serve("orders.trading.example", "orders", "dc1")
	if status, a := get(t, o, "POST", "/v1/orders", `{"customer":"C-1042","symbol":"ACME","quantity":2}`); status != http.StatusOK || !strings.Contains(string(a.Data), "accepted") {
		t.Errorf("order: %d %s %s", status, a.Data, a.Error)
	}
	if status, _ := get(t, o, "POST", "/v1/orders", `{"customer":"C-1042","quantity":0}`); status != http.StatusBadRequest {
		t.Errorf("an order of nothing: %d", status)
	}
	if status, a := get(t, o, "GET", "/v1/orders/C-1042", ""); status != http.StatusOK || string(a.Data) != `{"placed_here":1}` || len(a.Sources) != 1 {
		t.Errorf("orders: %d %s", status, a.Data)
	}
}

func TestForwardedCaller(t *testing.T) {
	for value, want := range map[string]string{
		"By=spiffe://a/b;Hash=0f;URI=spiffe://trading.example/portfolio": "spiffe://trading.example/portfolio",
		`By=spiffe://a/b;URI="spiffe://trading.example/portfolio"`:       "spiffe://trading.example/portfolio",
		"By=spiffe://a/b;Hash=0f":                                        "",
		"URI=spiffe://a/b;URI=spiffe://a/c":                              "",
		"By=x;URI=spiffe://a/b,By=y;URI=spiffe://a/c":                    "",
		"": "",
	} {
		if got := forwardedCaller(http.Header{"X-Forwarded-Client-Cert": {value}}); got != want {
			t.Errorf("%q: %q, want %q", value, got, want)
		}
	}
	if got := forwardedCaller(http.Header{"X-Forwarded-Client-Cert": {"URI=spiffe://a/b", "URI=spiffe://a/c"}}); got != "" {
		t.Errorf("two headers: %q", got)
	}
}

func TestCents(t *testing.T) {
	for _, c := range []cents{0, 1, 99, 100, 12_480_55, -1, -1_250} {
		text, _ := c.MarshalText()
		var back cents
		if err := back.UnmarshalText(text); err != nil || back != c {
			t.Errorf("%d -> %s -> %d, %v", c, text, back, err)
		}
	}
	for _, bad := range []string{"", "1", "1.2", "1.234", "x.00", "1.-1", "--1.00", "99999999999999999999.00"} {
		var c cents
		if c.UnmarshalText([]byte(bad)) == nil {
			t.Errorf("%q was read as %s", bad, c)
		}
	}
}

func TestJudge(t *testing.T) {
	good := `{"service":"a","datacenter":"dc1","sources":[{"service":"b","datacenter":"dc2"}]}`
	tests := []struct {
		name   string
		status int
		header http.Header
		body   string
		want   load.Sample
	}{
		{"good", 200, http.Header{"X-Request-Id": {"R"}}, good, load.Sample{OK: true, RequestID: "R"}},
		{"refused", 502, http.Header{"Entente-Refused": {"upstream-outcome-unknown"}, "Entente-Outcome": {"unknown"}}, "", load.Sample{Error: "status 502 upstream-outcome-unknown", Unknown: true}},
		{"not sent", 503, http.Header{"Entente-Refused": {"no-endpoint"}, "Entente-Outcome": {"not-sent"}}, "", load.Sample{Error: "status 503 no-endpoint"}},
		{"the application failed", 502, nil, `{"error":"no price"}`, load.Sample{Error: "status 502 no price"}},
		{"not ours", 200, nil, "<html>", load.Sample{Error: "the answer does not say where it was made"}},
	}
	for _, test := range tests {
		got := Judge(test.status, test.header, []byte(test.body))
		if got.OK != test.want.OK || got.Unknown != test.want.Unknown || got.Error != test.want.Error || got.RequestID != test.want.RequestID {
			t.Errorf("%s: %+v", test.name, got)
		}
	}
	if by := Judge(200, nil, []byte(good)).ServedBy; len(by) != 2 {
		t.Errorf("served by %v", by)
	}
}

// A whole process: its listeners, its control socket, and a load that is started and
// ended over it.
func TestRun(t *testing.T) {
	m := newFakeMesh(t)
	dir := t.TempDir()
	address := daemontest.FreeAddress(t)
	config := Config{
		Datacenter: "dc1", Control: filepath.Join(dir, "c.sock"), WorkloadAPI: filepath.Join(dir, "none.sock"),
		Services: []Service{
			{Name: "ledger.banking.example", Program: "ledger", Listen: address, Outbound: strings.TrimPrefix(m.URL, "http://")},
		},
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- run(ctx, config, slog.New(slog.DiscardHandler)) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", config.Control)
	}, DisableKeepAlives: true}}
	for start := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		if answer, err := client.Get("http://x/readyz"); err == nil {
			answer.Body.Close()
			break
		} else if time.Since(start) > 10*time.Second {
			t.Fatal(err)
		}
	}
	m.serve("ledger.banking.example", "ledger", "dc1")

	body, end := io.Pipe()
	request, _ := http.NewRequest("POST", "http://x/load", io.MultiReader(strings.NewReader(
		fmt.Sprintf(`{"as":"ledger.banking.example","method":"GET","url":"http://ledger.banking.example/v1/holds/C-1042","rate":100,"deadline":%d}`, time.Second)), body))
	answer, err := client.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	lines := json.NewDecoder(answer.Body)
	count := 0
	for {
		var s load.Sample
		if err := lines.Decode(&s); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if count++; !s.OK || s.ServedBy[0] != "dc1" {
			t.Fatalf("%+v", s)
		}
		if count == 10 {
			end.Close()
		}
	}
	if count < 10 || count > 30 {
		t.Errorf("%d samples: the load did not end when it was told to", count)
	}
	for path, order := range map[string]string{
		"/call": `{"as":"nobody"}`, "/dial": `{"id":"spiffe://x/y"}`,
	} {
		answer, err := client.Post("http://x"+path, "application/json", strings.NewReader(order))
		if err != nil {
			t.Fatal(err)
		}
		answer.Body.Close()
		if answer.StatusCode != http.StatusConflict {
			t.Errorf("%s %s: %d", path, order, answer.StatusCode)
		}
	}
}

func TestRunRefuses(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	config := Config{Datacenter: "dc1", Control: filepath.Join(t.TempDir(), "c"), WorkloadAPI: "/none", Services: []Service{{Name: "a.b", Listen: taken.Addr().String()}}}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if err := run(ctx, config, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "already in use") {
		t.Errorf("an address in use: %v", err)
	}
}
