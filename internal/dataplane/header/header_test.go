package header

import (
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func TestProtected(t *testing.T) {
	for name, want := range map[string]bool{
		"Entente-Caller":            true,
		"entente_caller":            true,
		"ENTENTE-anything":          true,
		"X-Forwarded-Client-Cert":   true,
		"x_forwarded_client_cert":   true,
		"X-Forwarded_Client-cert":   true,
		"Client-Cert":               true,
		"client_cert_chain":         true,
		"Client-Certificate":        false,
		"Entente":                   false,
		"X-Entente-Caller":          false,
		"X-Forwarded-Client-Cert-2": false,
		"X-Forwarded-For":           false,
		"":                          false,
	} {
		if Protected(name) != want {
			t.Errorf("Protected(%q) is not %v", name, want)
		}
	}
}

func TestRemoveHop(t *testing.T) {
	h := http.Header{
		"Connection":        {"X-Mine, close", "keep-alive , entente_caller"},
		"X-Mine":            {"1"},
		"entente_caller":    {"1"},
		"Keep-Alive":        {"1"},
		"Te":                {"gzip, trailers"},
		"Transfer-Encoding": {"chunked"},
		"Upgrade":           {"x"},
		"X-Kept":            {"1"},
	}
	RemoveHop(h)
	if len(h) != 2 || h.Get("X-Kept") != "1" || h.Get("Te") != "trailers" {
		t.Errorf("%v", h)
	}
}

func TestVia(t *testing.T) {
	dc1, dc2 := Hop{"banking.example", "dc1", "gw"}, Hop{"banking.example", "dc2", "gw"}
	tests := []struct {
		values []string
		want   []Hop
		ok     bool
		loops  bool // at dc1
	}{
		{nil, nil, true, false},
		{[]string{"banking.example/dc1/gw"}, []Hop{dc1}, true, true},
		{[]string{"banking.example/dc2/gw"}, []Hop{dc2}, true, false},
		{[]string{"banking.example/dc2/gw, banking.example/dc1/gw"}, []Hop{dc2, dc1}, true, true},
		{[]string{"banking.example/dc2/gw", "banking.example/dc1/gw"}, []Hop{dc2, dc1}, true, true},
		{[]string{"a/1/x,b/1/x,c/1/x,d/1/x"}, nil, true, true},
		{[]string{""}, nil, false, false},
		{[]string{"banking.example/dc1"}, nil, false, false},
		{[]string{"banking.example/dc1/gw/more"}, nil, false, false},
		{[]string{"Banking.example/dc1/gw"}, nil, false, false},
		{[]string{"a//x"}, nil, false, false},
		{[]string{strings.Repeat("a/b/c,", 16) + "a/b/c"}, nil, false, false},
	}
	for _, test := range tests {
		got, err := ParseVia(test.values)
		if (err == nil) != test.ok || test.want != nil && !slices.Equal(got, test.want) {
			t.Errorf("%q: %v, %v", test.values, got, err)
		}
		if err == nil && Loops(got, dc1) != test.loops {
			t.Errorf("%q loops: %v", test.values, !test.loops)
		}
	}
}

func TestRequestID(t *testing.T) {
	now := time.UnixMilli(1469918176385) // the example of the ULID specification
	id := NewRequestID(now)
	if !ValidRequestID(id) || !strings.HasPrefix(id, "01ARYZ6S41") {
		t.Errorf("%q", id)
	}
	if NewRequestID(now) == id {
		t.Error("not random")
	}
	for _, bad := range []string{"", "81ARYZ6S410000000000000000", "01ARYZ6S41000000000000000", "01ARYZ6S41000000000000000I", "01aryz6s410000000000000000", "01ARYZ6S41000000000000000\n"} {
		if ValidRequestID(bad) {
			t.Errorf("%q is accepted", bad)
		}
	}
}

func TestUpgradeGRPCBrowser(t *testing.T) {
	h := http.Header{"Connection": {"keep-alive, Upgrade"}, "Upgrade": {"WebSocket"}, "Content-Type": {"application/grpc+proto"}, "Sec-Fetch-Mode": {"cors"}}
	if Upgrade(h) != "websocket" || !IsGRPC(h) || !IsBrowser(h) {
		t.Error(Upgrade(h), IsGRPC(h), IsBrowser(h))
	}
	h = http.Header{"Upgrade": {"websocket"}, "Content-Type": {"application/grpc-web"}, "Sec-Websocket-Key": {"x"}}
	if Upgrade(h) != "" || IsGRPC(h) || IsBrowser(h) {
		t.Error("not so")
	}
}

func FuzzHygiene(f *testing.F) {
	f.Add("Entente-Caller", "x", "close, X-A")
	f.Add("x_forwarded_client_cert", "x", "x_forwarded_client_cert")
	f.Add("Te", "trailers", "te")
	f.Fuzz(func(t *testing.T, name, value, connection string) {
		h := http.Header{name: {value}, "Connection": {connection}}
		RemoveHop(h)
		RemoveProtected(h)
		for left := range h {
			plain := strings.ReplaceAll(strings.ToLower(left), "_", "-")
			if strings.HasPrefix(plain, "entente-") || plain == "x-forwarded-client-cert" || plain == "connection" && left == "Connection" {
				t.Errorf("%q survives", left)
			}
		}
	})
}

func FuzzParseVia(f *testing.F) {
	f.Add("banking.example/dc1/gw, trading.example/dc1/gw")
	f.Add(",,/")
	f.Fuzz(func(t *testing.T, value string) {
		hops, err := ParseVia([]string{value})
		if err != nil {
			return
		}
		again, err := ParseVia([]string{FormatVia(hops)})
		if err != nil || !slices.Equal(hops, again) {
			t.Errorf("%q: %v, then %v, %v", value, hops, again, err)
		}
	})
}

func FuzzParseClientCert(f *testing.F) {
	e := ClientCertElement{spiffeid.RequireFromString("spiffe://a.example/b"), strings.Repeat("0a", 32), spiffeid.RequireFromString("spiffe://c.example/d")}
	f.Add(e.String())
	f.Add("By=;Hash=;URI=")
	f.Fuzz(func(t *testing.T, value string) {
		e, err := ParseClientCert(value)
		if err == nil && e.String() != value {
			t.Errorf("%q is read as %q", value, e)
		}
	})
}
