package header

import (
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
)

// What proxies say, in whatever spelling, is told from what clients say.
func TestForwarding(t *testing.T) {
	for _, name := range []string{
		"X-Forwarded-For", "x_forwarded_for", "X-FORWARDED-HOST", "X-Forwarded-Proto", "X-Forwarded-Prefix", "X-Forwarded-User", "Forwarded", "forwarded",
		"X-Real-Ip", "x_real_ip", "True-Client-IP", "Client-Cert", "Client_Cert_Chain", "X-Client-Cert", "X-Ssl-Client-S-Dn", "SSL_CLIENT_VERIFY",
		"X-Http-Method-Override", "X-HTTP-Method", "x_method_override", "X-Original-Url", "X_Original_URL", "X-Rewrite-Url", "X-Original-Host",
		"X-Envoy-Original-Path", "X-Sendfile-Type", "X-Accel-Mapping", "Remote-User", "X_Remote_User", "Via", "Front-End-Https",
		"X.Forwarded.For", "X-Forwarded", "Forwarded-Host", "Proxy", "Grpc-Metadata-X-Forwarded-For", "grpc_metadata_x_real_ip", "Entente.Caller", "X-Forwarded.Client.Cert",
	} {
		if !Forwarding(name) {
			t.Errorf("%q passes", name)
		}
	}
	for _, name := range []string{"", "Accept", "Authorization", "Content-Type", "X-Request-Id", "Traceparent", "X-For", "Client-Hint", "X-Http", "Origin", "Host", "X-Real-Estate"} {
		if Forwarding(name) {
			t.Errorf("control: %q does not pass", name)
		}
	}
}

func TestRemoveCredentials(t *testing.T) {
	const jwt = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJ4In0.AAAA"
	fill := func() http.Header {
		return http.Header{
			"Authorization": {"Bearer x"}, "authorization": {"x"}, "Cookie": {"s=1"}, "X-Api-Key": {"k"}, "x_api_key": {"k"}, "Apikey": {"k"},
			"X-Auth-Token": {"t"}, "X-Access-Token": {"t"}, "Dpop": {"p"}, "Accept": {"*/*"}, "X-Request-Id": {"1"},
			"Sec-Websocket-Protocol": {"chat, bearer, " + jwt, "base64url.bearer.authorization.k8s.io.abc, v2.json"},
		}
	}
	h := fill()
	RemoveCredentials(h, "")
	if len(h) != 3 || h.Get("Accept") == "" || h.Get("X-Request-Id") == "" || h.Get("Sec-Websocket-Protocol") != "chat, v2.json" {
		t.Errorf("%v", h)
	}
	h = fill()
	RemoveCredentials(h, "", "Authorization", "x-api-key", "Sec-WebSocket-Protocol")
	if h.Get("Authorization") == "" || h.Get("X-Api-Key") == "" || map[string][]string(h)["x_api_key"] != nil || h.Get("Cookie") != "" || !strings.Contains(strings.Join(h["Sec-Websocket-Protocol"], ","), jwt) {
		t.Errorf("%v", h)
	}
	for list, want := range map[string]string{
		"chat":                          "chat",
		"graphql-ws, graphql":           "graphql-ws, graphql",
		"access_token, s3cr3t, chat":    "chat",
		"Bearer, s3cr3t":                "",
		"access_token.s3cr3t, chat":     "chat",
		"chat, " + jwt:                  "chat",
		"auth-" + jwt:                   "",
		"BEARER":                        "",
		"eyJ" + strings.Repeat("a", 80): "",
	} {
		h := http.Header{"Sec-Websocket-Protocol": {list}}
		if RemoveCredentials(h, ""); h.Get("Sec-Websocket-Protocol") != want {
			t.Errorf("%q: %q is left", list, h.Get("Sec-Websocket-Protocol"))
		}
	}
}

// The sender's own token is taken out wherever it stands, whatever the name.
func TestRemoveTheTokenItself(t *testing.T) {
	const token = "aaaa.bbbb.cccc"
	fill := func() http.Header {
		return http.Header{
			"Authorization": {"Bearer " + token}, "X-Mine": {"1", "t=" + token}, "Accept": {"*/*"}, "Grpc-Metadata-Authorization": {"x"}, "X.api.key": {"k"},
			"Sec-Websocket-Protocol": {"chat, x-" + token}, "Referer": {"https://a.example/x?a=1&access_token=x&b=" + token},
		}
	}
	h := fill()
	RemoveCredentials(h, token)
	if len(h) != 3 || h.Get("Accept") == "" || h.Get("Sec-Websocket-Protocol") != "chat" || h.Get("Referer") != "https://a.example/x?a=1" {
		t.Errorf("%v", h)
	}
	h = fill()
	RemoveCredentials(h, token, "Authorization")
	if len(h) != 4 || h.Get("Authorization") != "Bearer "+token {
		t.Errorf("%v", h)
	}
	h = http.Header{"Referer": {"https://a.example/" + token}, "X-Mine": {"aaaa"}}
	if RemoveCredentials(h, token); len(h) != 1 {
		t.Errorf("%v", h)
	}
	for referer, want := range map[string]string{"https://a.example/?access_token=x": "https://a.example/", "https://a.example/?": "https://a.example/?", "https://a.example/?a=b": "https://a.example/?a=b"} {
		h := http.Header{"Referer": {referer}}
		if RemoveCredentials(h, token); h.Get("Referer") != want {
			t.Errorf("%q: %q", referer, h.Get("Referer"))
		}
	}
	if got := RemoveQueryCredentials("a=1&x=aaaa%2Ebbbb.cccc&y="+token+"&z="+token, token, "z"); got != "a=1&z="+token {
		t.Errorf("%q", got)
	}
}

func TestRemoveQueryCredentials(t *testing.T) {
	for query, want := range map[string]string{
		"":                                      "",
		"a=1&b=%20x&c":                          "a=1&b=%20x&c",
		"access_token=x":                        "",
		"a=1&access_token=x&b=2":                "a=1&b=2",
		"ACCESS_TOKEN=x&a=1":                    "a=1",
		"access%5Ftoken=x&a=1":                  "a=1",
		"access-token=x;a=1":                    "a=1",
		"a=1;id_token=x;b=2":                    "a=1;b=2",
		"access_token[]=x&a=1":                  "a=1",
		"+access_token=x&a=1":                   "a=1",
		"access.token=x&access+token=y&a=1":     "a=1",
		"access_token&a=1":                      "a=1",
		"a=access_token":                        "a=access_token",
		"api_key=x&apikey=y&q=api_key":          "q=api_key",
		"a=1&&b=2":                              "a=1&&b=2",
		"my_access_token=x":                     "my_access_token=x",
		"access_token=x&access_token=y&%zz=a&b": "%zz=a&b",
	} {
		if got := RemoveQueryCredentials(query, ""); got != want {
			t.Errorf("%q -> %q, want %q", query, got, want)
		}
	}
	if got := RemoveQueryCredentials("a=1&access_token=x&id_token=y", "", "access_token"); got != "a=1&access_token=x" {
		t.Errorf("%q", got)
	}
}

func FuzzRemoveQueryCredentials(f *testing.F) {
	f.Add("a=1&access_token=x;b=2")
	f.Add("access%5ftoken=x&&;=")
	f.Fuzz(func(t *testing.T, query string) {
		got := RemoveQueryCredentials(query, "")
		if len(got) > len(query) || RemoveQueryCredentials(got, "") != got {
			t.Errorf("%q -> %q", query, got)
		}
		values, _ := url.ParseQuery(got)
		for name := range values {
			if QueryCredential(name) {
				t.Errorf("%q -> %q: %q is left", query, got, name)
			}
		}
	})
}

func FuzzSubprotocols(f *testing.F) {
	f.Add("chat, bearer, x")
	f.Fuzz(func(t *testing.T, list string) {
		for _, left := range subprotocols([]string{list}, "") {
			if isToken(left) || strings.EqualFold(left, "bearer") || slices.Contains([]string{"", " "}, left) {
				t.Errorf("%q leaves %q", list, left)
			}
		}
	})
}
