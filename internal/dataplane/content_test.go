package dataplane

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/internal/dataplane/header"
)

// deaf is an application as many are: it keeps connections alive, answers at once and
// never reads a body, so that what it left takes part in the connection's next request. Like Python's
// http.server it answers every Expect: 100-continue, and that before it has looked at the
// method.
type deaf struct {
	ln net.Listener
	wg sync.WaitGroup

	mu    sync.Mutex
	conns map[net.Conn]int
	seen  []deafRequest
}

type deafRequest struct {
	conn         int
	line, caller string
}

// deafen puts such an application in the place of an application of the world.
func deafen(t *testing.T, a *app) *deaf {
	t.Helper()
	addr := a.addr()
	_ = a.server.Close()
	d := &deaf{conns: map[net.Conn]int{}}
	var err error
	for range 100 {
		if d.ln, err = net.Listen("tcp", addr); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		t.Fatal(err)
	}
	d.wg.Go(func() {
		for {
			c, err := d.ln.Accept()
			if err != nil {
				return
			}
			d.mu.Lock()
			n := len(d.conns)
			d.conns[c] = n
			d.mu.Unlock()
			d.wg.Go(func() { d.serve(c, n) })
		}
	})
	t.Cleanup(func() {
		_ = d.ln.Close()
		d.mu.Lock()
		for c := range d.conns {
			_ = c.Close()
		}
		d.mu.Unlock()
		d.wg.Wait()
	})
	return d
}

func (d *deaf) serve(c net.Conn, n int) {
	defer c.Close()
	for in := bufio.NewReader(c); ; {
		r, err := http.ReadRequest(in)
		if err != nil {
			return
		}
		_, caller, _ := strings.Cut(r.Header.Get(header.ClientCert), "URI=")
		d.mu.Lock()
		d.seen = append(d.seen, deafRequest{n, r.Method + " " + r.URL.Path, caller})
		d.mu.Unlock()
		if r.Header.Get("Expect") != "" {
			_, _ = io.WriteString(c, "HTTP/1.1 100 Continue\r\n\r\n")
		}
		body := "ok"
		if r.Method == "HEAD" {
			body = ""
		}
		if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"+body); err != nil || r.Close {
			return
		}
	}
}

func (d *deaf) requests() []deafRequest {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.seen)
}

// speak writes a request as it is to a loopback door and reads the answer.
func speak(t *testing.T, door *process, method, request string) *http.Response {
	t.Helper()
	c, err := net.Dial("tcp", door.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.WriteString(c, request); err != nil {
		t.Fatal(err)
	}
	in := bufio.NewReader(c)
	for {
		res, err := http.ReadResponse(in, &http.Request{Method: method})
		if err != nil {
			t.Fatalf("%.40q: %v", request, err)
		}
		if res.StatusCode >= 200 {
			_, _ = io.Copy(io.Discard, res.Body)
			_ = res.Body.Close()
			return res
		}
	}
}

// No request reaches an application inside the content of another, however it is sent
// and whatever the application does with content.
func TestContentCarriesNoRequest(t *testing.T) {
	w := newWorld(t)
	app := deafen(t, w.banking.apps[0])
	smuggled := "DELETE /admin HTTP/1.1\r\nHost: accounts\r\nX-Forwarded-Client-Cert: By=spiffe://banking.example/accounts;Hash=" +
		strings.Repeat("0", 64) + ";URI=spiffe://banking.example/root\r\nContent-Length: 0\r\n\r\n"
	length := fmt.Sprintf("Content-Length: %d\r\n", len(smuggled))
	chunks := fmt.Sprintf("%x\r\n%s\r\n0\r\n", len(smuggled), smuggled)
	const host = "Host: accounts.banking.example\r\n"
	refused := func(res *http.Response) bool {
		return res.StatusCode == 400 && res.Header.Get(header.Refused) == "content"
	}
	answered := func(res *http.Response) bool { return res.StatusCode == 200 && res.Header.Get(header.Refused) == "" }

	type attempt struct {
		name, method, fields, body string
		want                       func(*http.Response) bool
	}
	attempts := []attempt{
		{"control: nothing", "GET", "", "", answered},
		{"control: length 0", "GET", "Content-Length: 0\r\n", "", answered},
		{"length", "GET", length, smuggled, refused},
		{"chunked", "GET", "Transfer-Encoding: chunked\r\n", chunks + "\r\n", refused},
		{"chunked and empty", "GET", "Transfer-Encoding: chunked\r\n", "0\r\n\r\n", refused},
		{"trailers", "GET", "Transfer-Encoding: chunked\r\nTrailer: X-Sum\r\n", chunks + "X-Sum: 1\r\n\r\n", refused},
		{"an Upgrade offer", "GET", "Connection: Upgrade\r\nUpgrade: websocket\r\n" + length, smuggled, refused},
		{"an offer of TCP", "GET", "Connection: Upgrade\r\nUpgrade: entente-tcp\r\n" + length, smuggled, refused},
		{"Expect", "GET", "Expect: 100-continue\r\n" + length, smuggled, refused},
		{"POST", "POST", length, smuggled, answered},
		{"POST, chunked", "POST", "Transfer-Encoding: chunked\r\n", chunks + "\r\n", answered},
		{"POST, trailers", "POST", "Transfer-Encoding: chunked\r\nTrailer: X-Sum\r\n", chunks + "X-Sum: 1\r\n\r\n", answered},
		{"POST, Expect", "POST", "Expect: 100-continue\r\n" + length, smuggled, answered},
		{"POST, an Upgrade offer", "POST", "Connection: Upgrade\r\nUpgrade: websocket\r\n" + length, smuggled, answered},
		{"POST, keep-alive", "POST", "Connection: keep-alive\r\nKeep-Alive: timeout=99\r\n" + length, smuggled, answered},
	}
	for _, method := range []string{"HEAD", "OPTIONS", "DELETE", "TRACE", "delete"} {
		attempts = append(attempts, attempt{method, method, length, smuggled, refused})
	}
	check := func(t *testing.T, name string, before int, sent, passed bool, method string) {
		t.Helper()
		want := 0
		if passed {
			want = 1
		}
		get(t, w.banking.outURL[0], "accounts.banking.example", "/v1/next") // brings what was left on a connection to light
		get(t, w.trading.outURL[0], "accounts.banking.example", "/v1/next")
		got := app.requests()[before:]
		if len(got) != want+2 || passed && got[0].line != method+" /v1/x" {
			t.Errorf("%s: the application saw %v", name, got)
		}
		for _, r := range got {
			if strings.Contains(r.line, "admin") || strings.Contains(r.caller, "root") {
				t.Errorf("%s: smuggled: %v", name, r)
			}
		}
	}
	for _, a := range attempts {
		for from, door := range map[string]*process{"own domain": w.banking.out[0], "another domain": w.trading.out[0]} {
			if from == "another domain" && a.method != "GET" && a.method != "POST" {
				continue // its agreement does not list them
			}
			before := len(app.requests())
			res := speak(t, door, a.method, a.method+" /v1/x HTTP/1.1\r\n"+host+a.fields+"\r\n"+a.body)
			if !a.want(res) {
				t.Errorf("%s, %s: %d %v", a.name, from, res.StatusCode, res.Header)
			}
			check(t, a.name+", "+from, before, true, res.StatusCode == 200, a.method)
		}
	}

	// HTTP/2, at the loopback door and straight at the callee's doors.
	gateway := http.Header{header.Caller: {"spiffe://trading.example/portfolio"}}
	for _, door := range []struct {
		name   string
		client *http.Client
		url    string
		header http.Header
	}{
		{"HTTP/2 at the loopback door", h2c(t), w.trading.outURL[0], nil},
		{"HTTP/2 at the callee's gateway", direct(w.svid(w.trading, "/entente/gateway/gw-dc1"), w.trading.both, "banking.example"), "https://" + w.banking.gateways[0].addr, gateway},
		{"HTTP/2 at the callee's sidecar", direct(w.svid(w.banking, "/entente/gateway/gw-dc1"), w.banking.own, "accounts.banking.example"), "https://" + w.banking.sidecars[0].addr, gateway},
		{"HTTP/1.1 at the callee's sidecar", direct(w.svid(w.banking, "/entente/gateway/gw-dc1"), w.banking.own, "accounts.banking.example", "http/1.1"), "https://" + w.banking.sidecars[0].addr, gateway},
	} {
		for name, body := range map[string]io.Reader{"none": nil, "length": strings.NewReader(smuggled), "no length": io.MultiReader(strings.NewReader(smuggled))} {
			for _, method := range []string{"GET", "POST"} {
				before := len(app.requests())
				if s, ok := body.(*strings.Reader); ok {
					s.Reset(smuggled)
				} else if body != nil {
					body = io.MultiReader(strings.NewReader(smuggled))
				}
				a := do(t, door.client, method, door.url+"/v1/x", "accounts.banking.example", door.header.Clone(), body)
				want := answered
				if method == "GET" && body != nil {
					want = refused
				}
				if !want(a.Response) {
					t.Errorf("%s, %s, content %s: %v", door.name, method, name, a)
				}
				check(t, door.name+", "+method+", "+name, before, true, a.StatusCode == 200, method)
			}
		}
		door.client.CloseIdleConnections()
	}

	// Whatever is confused on a connection stays within a domain.
	domains := map[int]string{}
	for _, r := range app.requests() {
		domain, _, _ := strings.Cut(strings.TrimPrefix(r.caller, "spiffe://"), "/")
		if other := domains[r.conn]; other != "" && other != domain {
			t.Errorf("connection %d carried requests of %s and %s", r.conn, other, domain)
		}
		domains[r.conn] = domain
	}
	if len(domains) == len(app.requests()) {
		t.Error("no connection was used twice, so nothing was shown")
	}
}

// A service says that it takes content, and that it reads what it is given.
func TestServiceTakesContent(t *testing.T) {
	w := newWorld(t)
	conns := map[string]bool{}
	var mu sync.Mutex
	h := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		mu.Lock()
		conns[r.RemoteAddr] = true
		mu.Unlock()
		if r.ContentLength == 0 && r.Method == "POST" && r.TransferEncoding != nil {
			t.Error("chunked, and the caller's was not")
		}
		body, _ := io.ReadAll(r.Body)
		_, _ = fmt.Fprintf(rw, "%s %s", r.Method, body)
	})
	w.banking.apps[0].handler.Store(&h)
	// used returns how many connections the application got for that many requests.
	used := func(method string, body string) int {
		mu.Lock()
		clear(conns)
		mu.Unlock()
		for range 5 {
			a := do(t, client, method, w.banking.outURL[0]+"/v1/x", "accounts.banking.example", nil, strings.NewReader(body))
			if a.StatusCode != 200 || a.body != method+" "+body {
				t.Errorf("%s: %v", method, a)
			}
		}
		mu.Lock()
		defer mu.Unlock()
		return len(conns)
	}
	say := func(http *statev1.ServiceHTTP) {
		for _, o := range w.banking.objects {
			if o.GetService().GetName() == "accounts" {
				o.GetService().Http = http
			}
		}
		w.push()
	}
	if n := used("POST", "x"); n != 5 {
		t.Errorf("5 requests with content on %d connections", n)
	}
	if n := used("POST", ""); n > 2 {
		t.Errorf("control: 5 requests without content on %d connections", n)
	}
	say(&statev1.ServiceHTTP{AnyContent: true})
	if n := used("GET", "x"); n != 5 {
		t.Errorf("5 requests with content on %d connections", n)
	}
	say(&statev1.ServiceHTTP{AnyContent: true, ReadsBodies: true})
	if n := used("GET", "x"); n != 1 {
		t.Errorf("an application that reads bodies got 5 requests on %d connections", n)
	}
	say(&statev1.ServiceHTTP{ReadsBodies: true})
	if a := do(t, client, "GET", w.banking.outURL[0]+"/v1/x", "accounts.banking.example", nil, strings.NewReader("x")); a.Header.Get(header.Refused) != "content" {
		t.Errorf("it takes no content on GET: %v", a)
	}
	// A POST without content arrives as one, also from HTTP/2, which has no body to speak of.
	if a := do(t, h2c(t), "POST", w.banking.outURL[0]+"/v1/x", "accounts.banking.example", nil, nil); a.body != "POST " {
		t.Error(a)
	}
}
