package dataplane

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/entente-mesh/entente/internal/dataplane/header"
)

// edgeDoor is an edge of trading that has let a user in until a point in time.
func edgeDoor(w *world, pass []string, until time.Time) *process {
	id := w.identity(w.trading, "/portfolio")
	p := w.process(w.trading, "edge", "dc1", w.trading.own, func(ctx context.Context, e *Engine, ln net.Listener) error {
		server := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			e.Edge(id).ForwardUser(rw, r, r.Host, pass, until, func() error {
				if why := w.revoked.Load(); why != nil {
					return *why
				}
				return nil
			})
		})}
		defer context.AfterFunc(ctx, func() { _ = server.Close() })()
		return server.Serve(ln)
	})
	p.SetView(w.trading.view(w.t))
	return p
}

// Users' credentials stay at the edge, but those that a route passes to a service of the
// own domain; what a user says in the place of a proxy stays there as well.
func TestEdgeKeepsCredentials(t *testing.T) {
	w := newWorld(t)
	cookie := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.trading.apps[0].mu.Lock()
		w.trading.apps[0].seen = append(w.trading.apps[0].seen, &http.Request{URL: r.URL, Header: r.Header.Clone(), Trailer: r.Trailer.Clone()})
		w.trading.apps[0].mu.Unlock()
		rw.Header().Set("Set-Cookie", "s=1")
		_, _ = rw.Write(body)
	})
	for _, d := range []*domain{w.trading, w.banking} {
		d.apps[0].handler.Store(&cookie)
	}
	spoofed := []string{"X-Forwarded-For", "x_forwarded_host", "Forwarded", "X-Real-Ip", "client_cert", "Client-Cert-Chain", "X-Http-Method-Override",
		"X-HTTP-Method", "X-Method-Override", "X-Original-Url", "X-Rewrite-Url", "Via", "X-Ssl-Client-S-Dn", "Remote-User"}
	request := "POST /v1/x?a=1&access_token=secret&b=2 HTTP/1.1\r\nHost: %s\r\nConnection: Authorization, close\r\nAccept: mine\r\n" +
		"Authorization: Bearer secret\r\nCookie: id=secret\r\nx_api_key: secret\r\nX-Api-Key: secret\r\nProxy-Authorization: secret\r\nSec-WebSocket-Protocol: chat, bearer, secret\r\n"
	for _, name := range spoofed {
		request += name + ": evil\r\n"
	}
	request += "Transfer-Encoding: chunked\r\nTrailer: X-Sum, Authorization, X-Forwarded-For\r\n\r\n2\r\nhi\r\n0\r\nX-Sum: 7\r\nAuthorization: secret\r\nX-Forwarded-For: evil\r\n\r\n"
	const market, accounts = "market.trading.example", "accounts.banking.example"
	for _, test := range []struct {
		name, host string
		pass       []string
		kept       []string // "field: value", or "?" and the query
	}{
		{"own service", market, nil, nil},
		{"own service, opted in", market, []string{"authorization", "Cookie", "?access_token"}, []string{"Authorization", "Cookie", "?"}},
		{"own service, another header", market, []string{"X-Api-Key"}, []string{"X-Api-Key"}},
		{"another domain", accounts, nil, nil},
		{"another domain, opted in", accounts, []string{"Authorization", "Cookie", "X-Api-Key", "?access_token", "Sec-WebSocket-Protocol"}, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			door := edgeDoor(w, test.pass, time.Now().Add(time.Hour))
			res := speak(t, door, "POST", fmt.Sprintf(request, test.host))
			if res.StatusCode != 200 {
				t.Fatalf("%d %v", res.StatusCode, res.Header)
			}
			got := w.trading.apps[0].last()
			var left []string
			for name, values := range got.Header {
				if strings.Contains(strings.Join(values, " "), "secret") {
					left = append(left, name)
				}
				if strings.Contains(strings.Join(values, " "), "evil") {
					t.Errorf("%s: %v passes", name, values)
				}
			}
			if strings.Contains(got.URL.RawQuery, "secret") {
				left = append(left, "?")
			}
			slices.Sort(left)
			want := slices.Clone(test.kept)
			slices.Sort(want)
			if !slices.Equal(left, want) {
				t.Errorf("the service sees %v, not %v", left, want)
			}
			if !strings.HasPrefix(got.URL.RawQuery, "a=1&") || got.Header.Get("Accept") != "mine" || got.Trailer.Get("X-Sum") != "7" || !strings.HasPrefix(got.Header.Get("Sec-Websocket-Protocol"), "chat") {
				t.Errorf("control: what is the user's to say is lost: %q %v %v", got.URL.RawQuery, got.Header, got.Trailer)
			}
			if got.Trailer.Get("Authorization") != "" || got.Trailer.Get("X-Forwarded-For") != "" {
				t.Errorf("trailers pass: %v", got.Trailer)
			}
			if from := got.Header.Get("X-Forwarded-For"); (from == "127.0.0.1") != (test.host == market) {
				t.Errorf("X-Forwarded-For is %q", from)
			}
			if cookies := slices.Contains(test.kept, "Cookie"); (res.Header.Get("Set-Cookie") != "") != cookies {
				t.Errorf("Set-Cookie is %q", res.Header.Get("Set-Cookie"))
			}
		})
	}
}

// What a caller of another domain says in the place of a proxy does not reach the
// application, whose agreement is about the method and path of the request; within a domain
// workloads may say it.
func TestForeignCallerIsNoProxy(t *testing.T) {
	w := newWorld(t)
	for _, test := range []struct {
		name string
		door string
		host string
		app  *app
		want string
	}{
		{"another domain", w.trading.outURL[0], "accounts.banking.example", w.banking.apps[0], ""},
		{"control: own domain", w.banking.outURL[0], "accounts.banking.example", w.banking.apps[0], "said"},
	} {
		h := http.Header{"Authorization": {"said"}, "Client-Cert": {"said"}, "X-Http-Method-Override": {"said"}, "X_original_url": {"said"}, "X-Forwarded-For": {"said"}}
		if a := do(t, client, "POST", test.door+"/v1/x", test.host, h, strings.NewReader("x")); a.StatusCode != 200 {
			t.Fatal(a)
		}
		got := test.app.last().Header
		for _, name := range []string{"X-Http-Method-Override", "X_original_url", "X-Forwarded-For"} {
			if v := strings.Join(got[http.CanonicalHeaderKey(name)], ""); v != test.want {
				t.Errorf("%s: %s is %q", test.name, name, v)
			}
		}
		if got.Get("Client-Cert") != "" || got.Get("Authorization") != "said" || got.Get(header.ClientCert) == "" {
			t.Errorf("%s: %v", test.name, got)
		}
	}
}

// Streams end with the token that let their user in; a request that waits for its answer
// has its deadline, and what is answered in time is whole.
func TestTokenEndsStreams(t *testing.T) {
	for name, host := range map[string]string{"own service": "market.trading.example", "another domain": "accounts.banking.example"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, inMemory)
				released := make(chan struct{})
				h := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
					switch {
					case header.Upgrade(r.Header) == "websocket":
						c, _, err := http.NewResponseController(rw).Hijack()
						if err != nil {
							t.Error(err)
							return
						}
						defer c.Close()
						_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello\n")
						_, _ = io.Copy(io.Discard, c)
					case r.URL.Path == "/v1/slow":
						time.Sleep(8 * time.Second)
						_, _ = io.WriteString(rw, "late")
					case r.URL.Path == "/v1/events":
						_, _ = io.WriteString(rw, "hello\n")
						_ = http.NewResponseController(rw).Flush()
						select {
						case <-r.Context().Done():
						case <-released:
						}
					default:
						_, _ = io.WriteString(rw, "ok")
					}
				})
				w.trading.apps[0].handler.Store(&h)
				w.banking.apps[0].handler.Store(&h)
				defer close(released)
				const life = 5 * time.Second
				ask := func(door *process, path, upgrade string) (first string, lived time.Duration, err error) {
					start := time.Now()
					c, err := w.memory.dial(t.Context(), "tcp", door.addr)
					if err != nil {
						t.Fatal(err)
					}
					defer c.Close()
					_ = c.SetDeadline(start.Add(time.Minute))
					fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: %s\r\n%s\r\n", path, host, upgrade)
					in := bufio.NewReader(c)
					res, err := http.ReadResponse(in, nil)
					if err != nil {
						return "", time.Since(start), err
					}
					from := io.Reader(res.Body)
					if res.StatusCode == http.StatusSwitchingProtocols {
						from = in
					}
					all, err := io.ReadAll(from)
					return strings.TrimSpace(string(all)), time.Since(start), err
				}
				const websocket = "Connection: Upgrade\r\nUpgrade: websocket\r\n"
				for _, test := range []struct{ path, upgrade string }{{"/v1/ws", websocket}, {"/v1/events", ""}} {
					door := edgeDoor(w, nil, time.Now().Add(life))
					first, lived, err := ask(door, test.path, test.upgrade)
					if first != "hello" || lived < life || lived > life+time.Second {
						t.Errorf("%s: %q, lived for %v, not %v", test.path, first, lived, life)
					}
					if test.upgrade == "" && err == nil {
						t.Errorf("%s: what was cut looks whole", test.path)
					}
					// Control: who has longer stays longer.
					first, lived, err = ask(edgeDoor(w, nil, time.Now().Add(time.Hour)), test.path, test.upgrade)
					if first != "hello" || lived < 59*time.Second || !errors.Is(err, os.ErrDeadlineExceeded) {
						t.Errorf("control: %s: %q, lived for %v, %v", test.path, first, lived, err)
					}
				}
				time.AfterFunc(7*time.Second, func() {
					why := errors.New("its agent was banned")
					w.revoked.Store(&why)
				})
				if first, lived, _ := ask(edgeDoor(w, nil, time.Now().Add(time.Hour)), "/v1/ws", websocket); first != "hello" || lived < 7*time.Second || lived > 9*time.Second {
					t.Errorf("a token that was revoked after 7 s: %q, lived for %v", first, lived)
				}
				w.revoked.Store(nil)
				if body, lived, err := ask(edgeDoor(w, nil, time.Now().Add(life)), "/v1/slow", "Connection: close\r\n"); body != "late" || err != nil {
					t.Errorf("a request under way at the token's end: %q after %v, %v", body, lived, err)
				}
			})
		})
	}
}
