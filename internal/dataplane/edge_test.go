package dataplane

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/entente-mesh/entente/eastwest-gateway/edge"
	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

// wire is an application that keeps what reaches it as it came: the bytes of HTTP/1.1, the
// fields and contents of HTTP/2.
type wire struct {
	ln net.Listener
	wg sync.WaitGroup

	mu    sync.Mutex
	got   bytes.Buffer
	conns []net.Conn
}

// tap puts a wire in the place of an application of the world.
func tap(t *testing.T, a *app) *wire {
	t.Helper()
	addr := a.addr()
	_ = a.server.Close()
	x := &wire{}
	var err error
	for range 100 {
		if x.ln, err = net.Listen("tcp", addr); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		t.Fatal(err)
	}
	x.wg.Go(func() {
		for {
			c, err := x.ln.Accept()
			if err != nil {
				return
			}
			x.mu.Lock()
			x.conns = append(x.conns, c)
			x.mu.Unlock()
			x.wg.Go(func() { x.serve(c) })
		}
	})
	t.Cleanup(func() {
		_ = x.ln.Close()
		x.mu.Lock()
		for _, c := range x.conns {
			_ = c.Close()
		}
		x.mu.Unlock()
		x.wg.Wait()
	})
	return x
}

// Write keeps what was received.
func (x *wire) Write(b []byte) (int, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.got.Write(b)
}

// take returns what was received since it was asked last.
func (x *wire) take() string {
	x.mu.Lock()
	defer x.mu.Unlock()
	s := x.got.String()
	x.got.Reset()
	return s
}

func (x *wire) serve(c net.Conn) {
	defer c.Close()
	in := bufio.NewReader(c)
	if start, _ := in.Peek(len(http2.ClientPreface)); string(start) == http2.ClientPreface {
		_, _ = in.Discard(len(http2.ClientPreface))
		x.serve2(c, in)
		return
	}
	in = bufio.NewReader(io.TeeReader(in, x))
	for {
		r, err := http.ReadRequest(in)
		if err != nil {
			return
		}
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			return
		}
		if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"); err != nil || r.Close {
			return
		}
	}
}

// serve2 answers gRPC calls with OK.
func (x *wire) serve2(c net.Conn, in io.Reader) {
	framer := http2.NewFramer(c, in)
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if framer.WriteSettings() != nil {
		return
	}
	for {
		frame, err := framer.ReadFrame()
		if err != nil {
			return
		}
		switch f := frame.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				_ = framer.WriteSettingsAck()
			}
		case *http2.PingFrame:
			_ = framer.WritePing(true, f.Data)
		case *http2.MetaHeadersFrame:
			for _, field := range f.Fields {
				fmt.Fprintf(x, "%s: %s\r\n", field.Name, field.Value)
			}
		case *http2.DataFrame:
			_, _ = x.Write(f.Data())
		}
		if head := frame.Header(); head.Flags.Has(http2.FlagDataEndStream) && (head.Type == http2.FrameHeaders || head.Type == http2.FrameData) {
			_ = framer.WriteHeaders(http2.HeadersFrameParam{StreamID: head.StreamID, EndHeaders: true, EndStream: true,
				BlockFragment: block([]string{":status: 200", "content-type: application/grpc", "grpc-status: 0"})})
		}
	}
}

// block is a header block of lines "name: value".
func block(lines []string) []byte {
	var b bytes.Buffer
	encoder := hpack.NewEncoder(&b)
	for _, line := range lines {
		i := strings.Index(line[1:], ":") + 1 // a pseudo-header begins with one
		_ = encoder.WriteField(hpack.HeaderField{Name: line[:i], Value: strings.TrimSpace(line[i+1:])})
	}
	return b.Bytes()
}

// entrance is a real edge of trading with its routes into the world.
type entrance struct {
	addr  string
	roots *x509.CertPool
	token string                     // of an hour
	sign  func(exp time.Time) string // another one
}

// anEdge is the mesh of an edge whose tokens are not revoked.
type anEdge struct{ *Outbound }

func (anEdge) Revoked(string, string, map[string]any) error { return nil }

func newEntrance(t *testing.T, w *world) *entrance {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"edge.test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(err)
	cert, err := x509.ParseCertificate(der)
	must(err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	must(err)
	jwks, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k1", Algorithm: "ES256", Use: "sig"}}})
	must(err)
	file := func(name string, content []byte) string {
		must(os.WriteFile(filepath.Join(dir, name), content, 0o600))
		return filepath.Join(dir, name)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, &jose.SignerOptions{ExtraHeaders: map[jose.HeaderKey]any{"kid": "k1"}})
	must(err)
	sign := func(exp time.Time) string {
		token, err := jwt.Signed(signer).Claims(map[string]any{"iss": "https://id.example", "aud": "app", "sub": "anna", "tier": "gold", "exp": exp.Unix()}).Serialize()
		must(err)
		return token
	}
	var rate yamlfile.Rate
	must(rate.UnmarshalText([]byte("1000/s")))
	config := edge.Config{
		Listen: "127.0.0.1:0", Identity: "/portfolio",
		TLS: edge.TLS{CertFile: file("tls.crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
			KeyFile: file("tls.key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}))},
		JWT:   edge.JWT{JWKSFile: file("jwks.json", jwks), Issuer: "https://id.example", Audience: "app", Algorithms: []string{"ES256"}},
		Tiers: map[string]edge.Tier{"gold": {Rate: rate}},
	}
	pass := []string{"Authorization", "Cookie", "?access_token"}
	for prefix, service := range map[string]string{"own": "market.trading.example", "import": "accounts.banking.example"} {
		config.Routes = append(config.Routes,
			edge.Route{PathPrefix: "/" + prefix, Service: service, StripPrefix: true},
			edge.Route{PathPrefix: "/" + prefix + "-opted", Service: service, StripPrefix: true, Pass: pass})
	}
	x := &entrance{roots: x509.NewCertPool(), token: sign(time.Now().Add(time.Hour)), sign: sign}
	x.roots.AddCert(cert)
	p := w.process(w.trading, "edge", "dc1", w.trading.own, func(ctx context.Context, e *Engine, ln net.Listener) error {
		entry, err := edge.New(config, ln, anEdge{e.Edge(w.identity(w.trading, "/portfolio"))}, daemon.NewFiles(daemon.NewMetrics("gateway"), slog.New(slog.DiscardHandler)), slog.New(slog.DiscardHandler))
		if err != nil {
			t.Error(err)
			return err
		}
		return entry.Run(ctx)
	})
	p.SetView(w.trading.view(t))
	x.addr = p.addr
	return x
}

// send writes a request as it stands, as its user would, and returns the status.
func (x *entrance) send(t *testing.T, protocol, path string, lines, trailers []string) string {
	t.Helper()
	c, err := tls.Dial("tcp", x.addr, &tls.Config{RootCAs: x.roots, ServerName: "edge.test", NextProtos: []string{protocol}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	if protocol != "h2" {
		fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: edge.test\r\n%s\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n%s\r\n\r\n",
			path, strings.Join(lines, "\r\n"), strings.Join(trailers, "\r\n"))
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(res.StatusCode)
	}
	_, _ = io.WriteString(c, http2.ClientPreface)
	framer := http2.NewFramer(c, c)
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	_ = framer.WriteSettings()
	head := []string{":method: POST", ":scheme: https", ":authority: edge.test", ":path: " + path}
	for _, line := range lines {
		name, value, _ := strings.Cut(line, ":")
		if name != "Connection" { // HTTP/2 has none
			head = append(head, strings.ToLower(name)+":"+value)
		}
	}
	var tail []string
	for _, line := range trailers {
		name, value, _ := strings.Cut(line, ":")
		tail = append(tail, strings.ToLower(name)+":"+value)
	}
	_ = framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: block(head)})
	_ = framer.WriteData(1, false, []byte("hi"))
	_ = framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, EndStream: true, BlockFragment: block(tail)})
	for {
		frame, err := framer.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		switch f := frame.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				_ = framer.WriteSettingsAck()
			}
		case *http2.MetaHeadersFrame:
			if f.StreamID == 1 {
				return f.PseudoValue("status")
			}
		case *http2.RSTStreamFrame, *http2.GoAwayFrame:
			t.Fatal(f)
		}
	}
}

// What an edge holds back is in no byte that the application receives, in HTTP/1.1 or
// HTTP/2 at either end, in headers or trailers; what a user may say arrives.
func TestEdgeOnTheWire(t *testing.T) {
	w := newWorld(t)
	own, foreign := tap(t, w.trading.apps[0]), tap(t, w.banking.apps[0])
	x := newEntrance(t, w)

	spoofed := []string{"X-Forwarded-For", "x_forwarded_host", "X.Forwarded.Proto", "X-Forwarded", "FORWARDED", "Forwarded-Host", "X-Real-Ip", "x_real_ip", "Client-Cert", "client_cert", "Client-Cert-Chain",
		"X-Client-Cert", "X-HTTP-Method-Override", "x_http_method_override", "X-HTTP-Method", "X-Method-Override", "X-Original-URL", "X_Original-URL", "X-Rewrite-URL",
		"X-Ssl-Client-S-Dn", "Remote-User", "Proxy", "Grpc-Metadata-X-Forwarded-For", "X-Forwarded-Client-Cert", "Entente-Caller"}
	secrets := []string{"Cookie", "X-Api-Key", "x_api_key", "Proxy-Authorization", "X-Auth-Token", "DPoP", "Grpc-Metadata-Authorization"}
	lines := []string{"Authorization: Bearer " + x.token, "Connection: authorization, close", "Accept: control-accept", "X-Mine: control-mine", "My-Token: " + x.token,
		"Referer: https://app.example/?page=control-page&access_token=secret", "Sec-WebSocket-Protocol: control-chat, bearer, secret"}
	for _, name := range spoofed {
		lines = append(lines, name+": evil")
	}
	for _, name := range secrets {
		lines = append(lines, name+": secret")
	}
	trailers := []string{"X-Sum: control-sum", "X-Api-Key: secret", "X-Token-Of-Mine: " + x.token, "X-Forwarded-For: evil", "x_http_method_override: evil", "Client-Cert: evil"}
	announced := []string{"Authorization"}
	for _, line := range trailers {
		name, _, _ := strings.Cut(line, ":")
		announced = append(announced, name)
	}
	lines = append(lines, "Trailer: "+strings.Join(announced, ", "))
	query := "?a=control-query&access_token=secret&access.token=secret&mine=" + x.token

	for _, protocol := range []string{"http/1.1", "h2"} {
		for _, application := range []string{"http/1.1", "h2"} {
			for prefix, receiver := range map[string]*wire{"own": own, "own-opted": own, "import": foreign, "import-opted": foreign} {
				t.Run(protocol+" to "+application+" of "+prefix, func(t *testing.T) {
					lines, trailers := lines, trailers
					if protocol == "http/1.1" { // net/http's HTTP/2 refuses it
						trailers = append(slices.Clone(trailers), "Authorization: secret")
					}
					if application == "h2" {
						lines = append(slices.Clone(lines), "Content-Type: application/grpc", "TE: trailers")
					}
					if status := x.send(t, protocol, "/"+prefix+"/v1/x"+query, lines, trailers); status != "200" {
						t.Fatalf("status %s", status)
					}
					got := receiver.take()
					opted := prefix == "own-opted"
					want := map[string]int{x.token: 0, "secret": 0, "evil": 0}
					if opted { // Authorization; Cookie and access_token
						want[x.token], want["secret"] = 1, 2
					}
					for text, n := range want {
						if found := strings.Count(got, text); found != n {
							t.Errorf("%.12q stands %d times in what the application receives, not %d", text, found, n)
						}
					}
					for _, text := range []string{"control-accept", "control-mine", "control-page", "control-chat", "control-sum", "control-query", "hi"} {
						if !strings.Contains(got, text) {
							t.Errorf("control: %q is lost", text)
						}
					}
					lower := strings.ToLower(got)
					for _, line := range []string{"x-forwarded-for: 127.0.0.1\r\n", "x-forwarded-proto: https\r\n"} {
						if strings.Contains(lower, line) == strings.HasPrefix(prefix, "import") {
							t.Errorf("%q: the edge's own word, to services of its own domain only", line)
						}
					}
					if t.Failed() {
						t.Log(got)
					}
				})
			}
		}
	}
}

// At a real edge a user's streams end when its token does, in HTTP/1.1 and HTTP/2; those of
// a token that lives longer go on.
func TestEdgeEndsStreamsWithTheToken(t *testing.T) {
	w := newWorld(t)
	h := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "" {
			c, _, err := http.NewResponseController(rw).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello\n")
			_, _ = io.Copy(io.Discard, c)
			return
		}
		rw.Header().Set("Content-Type", r.Header.Get("Content-Type"))
		_, _ = io.WriteString(rw, "hello\n")
		_ = http.NewResponseController(rw).Flush()
		<-r.Context().Done()
	})
	w.trading.apps[0].handler.Store(&h)
	x := newEntrance(t, w)
	exp := time.Unix(time.Now().Unix()+2, 0)
	short, long := x.sign(exp), x.token
	closing := exp.Add(2500 * time.Millisecond) // controls are ended by their user then

	var all sync.WaitGroup
	defer all.Wait()
	for _, test := range []struct{ name, protocol, fields string }{
		{"WebSocket", "http/1.1", "Connection: Upgrade\r\nUpgrade: websocket\r\n"},
		{"events", "http/1.1", "Accept: text/event-stream\r\n"},
		{"events", "h2", "Accept: text/event-stream\r\n"},
		{"gRPC", "h2", "Content-Type: application/grpc\r\nTe: trailers\r\n"},
	} {
		for token, control := range map[string]bool{short: false, long: true} {
			all.Go(func() {
				name := fmt.Sprintf("%s, %s, control %v", test.name, test.protocol, control)
				r, err := http.ReadRequest(bufio.NewReader(strings.NewReader("GET /own/v1/x HTTP/1.1\r\nHost: edge.test\r\nAuthorization: Bearer " + token + "\r\n" + test.fields + "\r\n")))
				if err != nil {
					t.Error(name, err)
					return
				}
				ctx, cancel := context.WithDeadline(t.Context(), closing)
				defer cancel()
				r = r.WithContext(ctx)
				r.RequestURI, r.URL.Scheme, r.URL.Host = "", "https", x.addr
				if test.name == "gRPC" {
					r.Method = "POST"
				}
				transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: x.roots, ServerName: "edge.test"}, Protocols: new(http.Protocols)}
				transport.Protocols.SetHTTP1(test.protocol == "http/1.1")
				transport.Protocols.SetHTTP2(test.protocol == "h2")
				defer transport.CloseIdleConnections()
				res, err := transport.RoundTrip(r)
				if err != nil {
					t.Error(name, err)
					return
				}
				defer res.Body.Close()
				defer context.AfterFunc(ctx, func() { _ = res.Body.Close() })()
				if proto := map[string]int{"http/1.1": 1, "h2": 2}[test.protocol]; res.ProtoMajor != proto {
					t.Errorf("%s: it is HTTP/%d", name, res.ProtoMajor)
				}
				in := bufio.NewReader(res.Body)
				if line, err := in.ReadString('\n'); line != "hello\n" {
					t.Errorf("%s: %q, %v", name, line, err)
				}
				_, err = io.Copy(io.Discard, in)
				end := time.Now()
				switch {
				case control && end.Before(closing):
					t.Errorf("%s: ended %v early: %v", name, closing.Sub(end), err)
				case !control && (end.Before(exp) || end.After(exp.Add(2*time.Second))):
					t.Errorf("%s: ended %v after its token", name, end.Sub(exp))
				case !control && err == nil && test.name != "WebSocket":
					t.Errorf("%s: what was cut looks whole", name)
				}
			})
		}
	}
}

// A clock that is set, or a host that slept, does not lengthen a token's life: the calendar
// counts beside the timer.
func TestTokenEndsByTheCalendar(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, inMemory)
		h := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			_, _ = io.WriteString(rw, "hello\n")
			_ = http.NewResponseController(rw).Flush()
			<-r.Context().Done()
		})
		w.trading.apps[0].handler.Store(&h)
		until := time.Now().Add(time.Hour)
		door := edgeDoor(w, nil, until)
		c, err := w.memory.dial(t.Context(), "tcp", door.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		fmt.Fprint(c, "GET /v1/events HTTP/1.1\r\nHost: market.trading.example\r\n\r\n")
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		in := bufio.NewReader(res.Body)
		if line, err := in.ReadString('\n'); line != "hello\n" {
			t.Fatalf("%q, %v", line, err)
		}
		door.reconsider(until.Add(-time.Second))
		_ = c.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := in.ReadByte(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("control: cut before the token ended: %v", err)
		}
		_ = c.SetReadDeadline(time.Now().Add(time.Minute))
		door.reconsider(until)
		if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("the stream goes on after the token's end")
		}
	})
}
