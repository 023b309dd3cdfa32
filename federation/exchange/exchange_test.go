package exchange_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	goFederation "github.com/spiffe/go-spiffe/v2/federation"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/entente-mesh/entente/federation/bundle"
	"github.com/entente-mesh/entente/federation/exchange"
	"github.com/entente-mesh/entente/internal/peer/peertest"
)

var (
	trading    = spiffeid.RequireTrustDomainFromString("trading.example")
	banking    = spiffeid.RequireTrustDomainFromString("banking.example")
	endpointID = spiffeid.RequireFromString("spiffe://trading.example/entente/bundle-endpoint")
)

// jwks writes a bundle of trading with these authorities.
func jwks(sequence uint64, authorities ...*peertest.Authority) []byte {
	b := &bundle.Bundle{TrustDomain: trading, Sequence: sequence}
	for _, a := range authorities {
		b.X509 = append(b.X509, a.Cert)
	}
	text, err := b.Marshal()
	if err != nil {
		panic(err)
	}
	return text
}

// published is a bundle that can be replaced.
type published struct {
	mu       sync.Mutex
	jwks     []byte
	sequence uint64
	changed  chan struct{}
}

func publish(sequence uint64, jwks []byte) *published {
	return &published{jwks: jwks, sequence: sequence, changed: make(chan struct{})}
}

func (p *published) set(sequence uint64, jwks []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.jwks, p.sequence = jwks, sequence
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *published) source() ([]byte, uint64, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.jwks, p.sequence, p.changed
}

// serve runs our own endpoint on loopback and returns its URL.
func serve(t *testing.T, svid x509svid.Source, handler http.Handler) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- exchange.Serve(ctx, listener, svid, handler) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return "https://" + listener.Addr().String() + "/bundle.json"
}

// serveTLS runs any handler with any TLS configuration, as a stranger's server may be.
func serveTLS(t *testing.T, config *tls.Config, handler http.Handler) string {
	t.Helper()
	listener, err := tls.Listen("tcp", "127.0.0.1:0", config)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: handler, ErrorLog: log.New(io.Discard, "", 0)}
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
	return "https://" + listener.Addr().String() + "/bundle.json"
}

func static(body []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { w.Write(body) }
}

// Requirements: 132, 133, T18.
func TestHandler(t *testing.T) {
	ca := peertest.NewAuthority(trading)
	p := publish(7, jwks(7, ca))
	handler := exchange.Handler("/bundle.json", p.source)
	ask := func(method, path string, header ...string) *response {
		r, err := http.NewRequest(method, path, nil)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(header); i += 2 {
			r.Header.Add(header[i], header[i+1])
		}
		w := &response{header: http.Header{}, status: 200}
		handler.ServeHTTP(w, r)
		return w
	}
	got := ask("GET", "/bundle.json")
	tag := got.header.Get("ETag")
	if got.status != 200 || string(got.body) != string(p.jwks) || got.header.Get("Content-Type") != "application/json" ||
		got.header.Get("Cache-Control") != "no-cache" || !strings.HasPrefix(tag, `"7-`) {
		t.Errorf("GET: %d %v %s", got.status, got.header, got.body)
	}
	if head := ask("HEAD", "/bundle.json"); head.status != 200 || len(head.body) > 0 || head.header.Get("Content-Length") != fmt.Sprint(len(p.jwks)) || head.header.Get("ETag") != tag {
		t.Errorf("HEAD: %d %v %s", head.status, head.header, head.body)
	}
	for _, test := range []struct {
		method, path string
		header       []string
		status       int
	}{
		{"GET", "/bundle.json", []string{"If-None-Match", tag}, 304},
		{"HEAD", "/bundle.json", []string{"If-None-Match", tag}, 304},
		{"GET", "/bundle.json", []string{"If-None-Match", `"x", W/` + tag}, 304},
		{"GET", "/bundle.json", []string{"If-None-Match", "*"}, 304},
		{"GET", "/bundle.json", []string{"If-None-Match", `"7"`}, 200},
		{"GET", "/bundle.json", []string{"Prefer", "wait=60"}, 200}, // without a condition there is nothing to wait for
		{"GET", "/bundle.json", []string{"Prefer", "wait=60", "If-None-Match", `"6-0"`}, 200},
		{"GET", "/bundle.json", []string{"Prefer", "wait=0", "If-None-Match", tag}, 304},
		{"GET", "/bundle.json", []string{"Prefer", "wait=-5", "If-None-Match", tag}, 304},
		{"GET", "/bundle.json", []string{"Prefer", "respond-async", "If-None-Match", tag}, 304},
		{"GET", "/bundle.json?x", nil, 200},
		{"GET", "/", nil, 404},
		{"GET", "/bundle.json/", nil, 404},
		{"GET", "//bundle.json", nil, 404},
		{"GET", "/BUNDLE.json", nil, 404},
		{"POST", "/bundle.json", nil, 405},
		{"DELETE", "/bundle.json", nil, 405},
	} {
		if got := ask(test.method, test.path, test.header...); got.status != test.status {
			t.Errorf("%s %s %v: %d", test.method, test.path, test.header, got.status)
		}
	}
	// News that is there at once is an answer to a request that would have waited: else a
	// follower takes us for a server that holds nothing back.
	if got := ask("GET", "/bundle.json", "Prefer", "wait=60", "If-None-Match", `"6-0"`); got.header.Get("Preference-Applied") != "wait" {
		t.Error("it does not say that it waits")
	}
	if got := ask("GET", "/bundle.json", "If-None-Match", `"6-0"`); got.header.Get("Preference-Applied") != "" {
		t.Error("it says that it waits, and nobody asked")
	}
	p.set(7, jwks(7))
	if other := ask("GET", "/bundle.json").header.Get("ETag"); other == tag {
		t.Error("another bundle of the same sequence has the same ETag")
	}
	p.set(0, nil)
	if got := ask("GET", "/bundle.json", "If-None-Match", "*", "Prefer", "wait=60"); got.status != 503 || got.header.Get("Retry-After") == "" {
		t.Errorf("without a bundle: %d", got.status)
	}
}

type response struct {
	header http.Header
	status int
	body   []byte
}

func (r *response) Header() http.Header    { return r.header }
func (r *response) WriteHeader(status int) { r.status = status }
func (r *response) Write(p []byte) (int, error) {
	r.body = append(r.body, p...)
	return len(p), nil
}

// The fetcher against servers that do one thing wrong each, over real TLS; the first lines are the control.
// Requirements: 127, 137, 138, 141, 142, T3.
func TestFetchAttacks(t *testing.T) {
	ca, rogue, bank := peertest.NewAuthority(trading), peertest.NewAuthority(trading), peertest.NewAuthority(banking)
	endpoint := ca.Issue(endpointID.Path())
	body := jwks(7, ca)
	good := serveTLS(t, tlsconfig.TLSServerConfig(endpoint), static(body))
	both := x509bundle.NewSet(ca.Bundle(), bank.Bundle())

	plain := &http.Server{Handler: static(body)}
	plainListener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go plain.Serve(plainListener)
	t.Cleanup(func() { plain.Close() })
	plainURL := "http://" + plainListener.Addr().String() + "/bundle.json"

	redirect := func(to string, status int) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, to, status) }
	}
	with := func(svid *x509svid.SVID, handler http.Handler) string {
		return serveTLS(t, tlsconfig.TLSServerConfig(svid), handler)
	}
	loop := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/again", http.StatusFound) })
	status := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code); w.Write(body) }
	}
	endless := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		for block := []byte(strings.Repeat(" ", 1<<16)); ; {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
	})
	userinfo := strings.Replace(good, "https://", "https://user:secret@", 1)
	evil := with(rogue.Issue(endpointID.Path()), static(body))
	gzipped := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		w.Write([]byte{0x1f, 0x8b, 8, 0})
	})
	packed := func(size int) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if got := r.Header.Get("Accept-Encoding"); got != "identity" {
				t.Errorf("Accept-Encoding %q, want identity", got)
			}
			w.Header().Set("Content-Encoding", "gzip")
			pack := gzip.NewWriter(w)
			pack.Write(body)
			pack.Write(bytes.Repeat([]byte(" "), size))
			pack.Close()
		}
	}
	brotli := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "br")
		w.Write(body)
	})
	old := tlsconfig.TLSServerConfig(endpoint)
	old.MaxVersion = tls.VersionTLS12
	older := old.Clone()
	older.MinVersion, older.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
	cbc := old.Clone()
	cbc.CipherSuites = []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA, tls.TLS_RSA_WITH_AES_128_GCM_SHA256}
	rogue12 := tlsconfig.TLSServerConfig(rogue.Issue(endpointID.Path()))
	rogue12.MaxVersion = tls.VersionTLS12

	tests := []struct {
		name        string
		url         string
		noRedirects bool
		want        string // part of the error; "" if fetched
	}{
		{"good", good, false, ""},
		{"good, redirects not allowed", good, true, ""},
		{"TLS 1.2", serveTLS(t, old, static(body)), false, ""},
		{"a query", good + "?domain=trading.example", false, ""},
		{"temporary redirect to a good one", with(endpoint, redirect(good, http.StatusTemporaryRedirect)), false, ""},
		{"permanent redirect to a good one", with(endpoint, redirect(good, http.StatusMovedPermanently)), false, ""},

		{"http", plainURL, false, "does not begin with https"},
		{"user in the URL", userinfo, false, "must not carry a user"},
		{"no host", "https:///bundle.json", false, "names no host"},
		{"no URL", "::", false, "bundle endpoint"},
		{"redirect to http", with(endpoint, redirect(plainURL, http.StatusFound)), false, "does not begin with https"},
		{"redirect to a URL with a user", with(endpoint, redirect(userinfo, http.StatusFound)), false, "must not carry a user"},
		{"redirect to a server of a rogue", with(endpoint, redirect(evil, http.StatusFound)), false, "not signed by its trust domain"},
		{"redirect to another host", with(endpoint, redirect("https://trading.example/bundle.json", http.StatusFound)), false, "only another URL of the same host"},
		{"redirect to a literal of this host", with(endpoint, redirect(strings.Replace(good, "127.0.0.1", "127.0.0.2", 1), http.StatusFound)), false, "only another URL of the same host"},
		{"redirect to a metadata service", with(endpoint, redirect("https://169.254.169.254/latest", http.StatusPermanentRedirect)), false, "only another URL of the same host"},
		{"redirect for ever", with(endpoint, loop), false, "more than 3 redirects"},
		{"redirect where none is allowed", with(endpoint, redirect(good, http.StatusFound)), true, "does not allow"},
		{"500 with a bundle", with(endpoint, status(500)), false, "the answer is 500 "},
		{"404 with a bundle", with(endpoint, status(404)), false, "the answer is 404 "},
		{"203 with a bundle", with(endpoint, status(203)), false, "the answer is 203 "},
		{"204", with(endpoint, status(204)), false, "the answer is 204 "},
		{"304 that was not asked for", with(endpoint, status(304)), false, "the answer is 304 "},
		{"endless body", with(endpoint, endless), false, "larger than"},
		{"gzip", with(endpoint, packed(0)), false, ""},
		{"gzip, cut off", with(endpoint, gzipped), false, "gzip"},
		{"gzip of too much", with(endpoint, packed(16<<20)), false, "larger than"},
		{"brotli", with(endpoint, brotli), false, "turn compression off"},
		{"no bundle", with(endpoint, static([]byte("<html>"))), false, "JSON"},
		{"TLS 1.1", serveTLS(t, older, static(body)), false, "protocol version"},
		{"TLS 1.2 without forward secrecy or authenticated encryption", serveTLS(t, cbc, static(body)), false, "handshake failure"},
		{"TLS 1.2 of a rogue authority", serveTLS(t, rogue12, static(body)), false, "not signed by its trust domain"},
		{"rogue authority", evil, false, "not signed by its trust domain"},
		{"another workload of the domain", with(ca.Issue("/portfolio"), static(body)), false, "is not one of"},
		{"a longer name", with(ca.Issue(endpointID.Path()+"/x"), static(body)), false, "is not one of"},
		{"the name in another domain", with(bank.Issue(endpointID.Path()), static(body)), false, "is not one of"},
		{"the name signed by another domain", with(bank.IssueFor(peertest.NewKey(), trading, endpointID.Path()), static(body)), false, "not signed by its trust domain"},
		{"expired", with(ca.Issue(endpointID.Path(), peertest.Lifetime(time.Now().Add(-time.Hour), time.Now().Add(-time.Minute))), static(body)), false, "expired"},
		{"the authority's own certificate", with(&x509svid.SVID{ID: trading.ID(), Certificates: []*x509.Certificate{ca.Cert}, PrivateKey: ca.Key}, static(body)), false, "no path"},
	}
	// First, since net/http looks at the environment once.
	for _, name := range []string{"HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"} {
		t.Setenv(name, "http://proxy.example:3128")
	}
	for _, name := range []string{"NO_PROXY", "no_proxy", "REQUEST_METHOD"} {
		t.Setenv(name, "")
	}
	t.Run("a proxy in the environment does not count", func(t *testing.T) {
		request, err := http.NewRequest(http.MethodGet, "https://trading.example/bundle.json", nil)
		if err != nil {
			t.Fatal(err)
		}
		if proxy, err := http.ProxyFromEnvironment(request); err != nil || proxy.String() != "http://proxy.example:3128" {
			t.Fatalf("control: net/http takes proxy %v, %v from the environment: it has looked at it before this test", proxy, err)
		}
		address := strings.TrimSuffix(strings.TrimPrefix(good, "https://"), "/bundle.json")
		var dialled []string
		dial := func(ctx context.Context, network, to string) (net.Conn, error) {
			dialled = append(dialled, to)
			return (&net.Dialer{}).DialContext(ctx, network, address)
		}
		got, err := exchange.Fetch(t.Context(), exchange.Endpoint{TrustDomain: trading, URLs: []string{"https://trading.example/bundle.json"}, ID: endpointID, Bundles: both, Dial: dial})
		if expect(t, got, err, ""); len(dialled) != 1 || dialled[0] != "trading.example:443" {
			t.Errorf("dialled %v", dialled)
		}
	})
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, err := exchange.Fetch(t.Context(), exchange.Endpoint{TrustDomain: trading, URLs: []string{test.url}, ID: endpointID, Bundles: both, NoRedirects: test.noRedirects, AllowLoopback: true})
			expect(t, got, err, test.want)
			if err != nil && strings.Contains(err.Error(), "secret") {
				t.Errorf("the error tells the password: %v", err)
			}
		})
	}
	t.Run("next URL", func(t *testing.T) {
		got, err := exchange.Fetch(t.Context(), exchange.Endpoint{TrustDomain: trading, URLs: []string{evil, good}, ID: endpointID, Bundles: both, AllowLoopback: true})
		expect(t, got, err, "")
	})
	t.Run("nothing to verify with", func(t *testing.T) {
		got, err := exchange.Fetch(t.Context(), exchange.Endpoint{TrustDomain: trading, URLs: []string{good}, ID: endpointID})
		expect(t, got, err, "no bundle to verify")
	})
	t.Run("nowhere", func(t *testing.T) {
		_, err := exchange.Fetch(t.Context(), exchange.Endpoint{TrustDomain: trading, ID: endpointID, Bundles: both})
		expect(t, nil, err, "no URL")
	})
	t.Run("given up", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		release := make(chan struct{})
		defer close(release)
		slow := with(endpoint, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-release }))
		if _, err := exchange.Fetch(ctx, exchange.Endpoint{TrustDomain: trading, URLs: []string{slow}, ID: endpointID, Bundles: both, AllowLoopback: true}); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
}

// Whatever a name resolves to, and however an address is written, the fetcher connects to no address that another domain may
// not name: a server that would be believed stands at loopback, and sees nobody. The control is the same server and name where
// loopback is allowed.
func TestFetchConnectsToNoAddressThatAPeerMayNotName(t *testing.T) {
	ca := peertest.NewAuthority(trading)
	var connections atomic.Int64
	config := tlsconfig.TLSServerConfig(ca.Issue(endpointID.Path()))
	config.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { connections.Add(1); return nil, nil }
	good := serveTLS(t, config, static(jwks(7, ca)))
	_, port, err := net.SplitHostPort(strings.TrimSuffix(strings.TrimPrefix(good, "https://"), "/bundle.json"))
	if err != nil {
		t.Fatal(err)
	}
	resolveHere(t, map[string]string{
		"loop.example.": "127.0.0.1", "mapped.example.": "::ffff:127.0.0.1", "six.example.": "::1", "metadata.example.": "169.254.169.254",
		"nat64.example.": "64:ff9b::7f00:1", "sixtofour.example.": "2002:7f00:1::1", "any.example.": "0.0.0.0", "multicast.example.": "224.0.0.1",
	})
	fetch := func(host string, loopback bool) error {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		got, err := exchange.Fetch(ctx, exchange.Endpoint{
			TrustDomain: trading, URLs: []string{"https://" + net.JoinHostPort(host, port) + "/bundle.json"}, ID: endpointID, Bundles: ca.Bundle(), AllowLoopback: loopback,
		})
		if err == nil {
			expect(t, got, err, "")
		}
		return err
	}
	for host, want := range map[string]string{
		"loop.example": "a loopback address", "mapped.example": "a loopback address", "six.example": "a loopback address", "metadata.example": "a link-local address",
		"nat64.example": "a loopback address", "sixtofour.example": "stands for an IPv4 address", "any.example": "an unspecified address", "multicast.example": "a multicast address",
		"127.0.0.1": "a loopback address", "localhost": "a loopback address", "::ffff:169.254.169.254": "a link-local address",
	} {
		if err := fetch(host, false); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", host, err, want)
		}
	}
	if n := connections.Load(); n > 0 {
		t.Errorf("%d connections were made", n)
	}
	if err := fetch("metadata.example", true); err == nil || !strings.Contains(err.Error(), "a link-local address") {
		t.Errorf("where loopback is allowed, a metadata service is: %v", err)
	}
	for _, host := range []string{"loop.example", "127.0.0.1"} {
		if err := fetch(host, true); err != nil {
			t.Errorf("control: %s where loopback is allowed: %v", host, err)
		}
	}
	if n := connections.Load(); n != 2 {
		t.Errorf("control: %d connections", n)
	}
}

// resolveHere makes names resolve to these addresses, by a DNS server of this test.
func resolveHere(t *testing.T, addresses map[string]string) {
	t.Helper()
	packets, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &dns.Server{PacketConn: packets, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, question *dns.Msg) {
		answer := new(dns.Msg).SetReply(question)
		q := question.Question[0]
		header := dns.RR_Header{Name: q.Name, Rrtype: q.Qtype, Class: dns.ClassINET, Ttl: 1}
		switch address := net.ParseIP(addresses[q.Name]); {
		case q.Qtype == dns.TypeA && !strings.Contains(addresses[q.Name], ":") && address != nil:
			answer.Answer = append(answer.Answer, &dns.A{Hdr: header, A: address})
		case q.Qtype == dns.TypeAAAA && strings.Contains(addresses[q.Name], ":"):
			answer.Answer = append(answer.Answer, &dns.AAAA{Hdr: header, AAAA: address})
		}
		w.WriteMsg(answer)
	})}
	go server.ActivateAndServe()
	before := net.DefaultResolver
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "udp", packets.LocalAddr().String())
	}}
	t.Cleanup(func() {
		net.DefaultResolver = before
		server.Shutdown()
	})
}

func expect(t *testing.T, got *exchange.Fetched, err error, want string) {
	t.Helper()
	switch {
	case want == "" && err != nil:
		t.Errorf("refused: %v", err)
	case want == "" && (got.Record.GetSequence() != 7 || len(got.Bundle.X509) != 1 || got.Record.GetTrustDomain() != "trading.example" || got.ServerKey == ""):
		t.Errorf("fetched %+v", got)
	case want != "" && err == nil:
		t.Errorf("fetched from %s", got.URL)
	case want != "" && !strings.Contains(err.Error(), want):
		t.Errorf("refused with %q, want %q in it", err, want)
	}
}

// https_web: the server is recognised by the host in the URL, and an SVID is no substitute.
// Requirements: 122, 128, 135.
func TestFetchWeb(t *testing.T) {
	ca := peertest.NewAuthority(trading)
	web := func(opt peertest.Option) *tls.Config {
		return tlsconfig.TLSServerConfig(ca.Issue("/web", opt))
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.Cert)
	loopback := serveTLS(t, web(func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)} }), static(jwks(7, ca)))
	other := serveTLS(t, web(func(c *x509.Certificate) { c.DNSNames = []string{"trading.example"} }), static(jwks(7, ca)))
	for _, test := range []struct {
		name, url string
		roots     *x509.CertPool
		want      string
	}{
		{"good", loopback, roots, ""},
		{"another host", other, roots, "IP SANs"},
		{"unknown authority", loopback, x509.NewCertPool(), "unknown authority"},
		{"system's roots", loopback, nil, "unknown authority"},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := exchange.Fetch(t.Context(), exchange.Endpoint{TrustDomain: trading, URLs: []string{test.url}, Roots: test.roots, AllowLoopback: true})
			expect(t, got, err, test.want)
		})
	}
}

// Requirements: 122, 123.
func TestGoSPIFFE(t *testing.T) {
	ca := peertest.NewAuthority(trading)
	endpoint := ca.Issue(endpointID.Path())

	t.Run("their fetcher, our endpoint", func(t *testing.T) {
		url := serve(t, endpoint, exchange.Handler("/bundle.json", publish(7, jwks(7, ca)).source))
		got, err := goFederation.FetchBundle(t.Context(), trading, url, goFederation.WithSPIFFEAuth(ca.Bundle(), endpointID))
		if err != nil {
			t.Fatal(err)
		}
		if sequence, _ := got.SequenceNumber(); sequence != 7 || !got.HasX509Authority(ca.Cert) {
			t.Errorf("fetched %v", got)
		}
	})
	t.Run("their endpoint, our fetcher", func(t *testing.T) {
		theirs := spiffebundle.FromX509Authorities(trading, []*x509.Certificate{ca.Cert})
		theirs.SetSequenceNumber(7)
		theirs.SetRefreshHint(time.Minute)
		handler, err := goFederation.NewHandler(trading, theirs)
		if err != nil {
			t.Fatal(err)
		}
		url := serveTLS(t, tlsconfig.TLSServerConfig(endpoint), handler)
		got, err := exchange.Fetch(t.Context(), exchange.Endpoint{TrustDomain: trading, URLs: []string{url}, ID: endpointID, Bundles: ca.Bundle(), AllowLoopback: true})
		expect(t, got, err, "")
		if err == nil && got.Bundle.RefreshHint != time.Minute {
			t.Errorf("hint %s", got.Bundle.RefreshHint)
		}
	})
}

// The endpoint asks nobody for a certificate, speaks HTTP/2 too, prefers TLS 1.3 with the hybrid key exchange, and takes TLS 1.2
// with the suites of Mozilla's intermediate settings only.
// Requirements: 124, 131.
func TestServe(t *testing.T) {
	ca := peertest.NewAuthority(trading)
	url := serve(t, ca.Issue(endpointID.Path()), exchange.Handler("/bundle.json", publish(7, jwks(7, ca)).source))
	for _, protocol := range []string{"h2", "http/1.1"} {
		config := tlsconfig.TLSClientConfig(ca.Bundle(), tlsconfig.AuthorizeID(endpointID))
		config.NextProtos = []string{protocol}
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			t.Error("asked for a certificate")
			return &tls.Certificate{}, nil
		}
		transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: protocol == "h2"}
		got, err := (&http.Client{Transport: transport}).Get(url)
		if err != nil {
			t.Fatal(err)
		}
		got.Body.Close()
		transport.CloseIdleConnections()
		if got.StatusCode != 200 || got.TLS.Version != tls.VersionTLS13 || got.TLS.CurveID != tls.X25519MLKEM768 || got.TLS.NegotiatedProtocol != protocol {
			t.Errorf("%s: %s, TLS %x, %s, %s", protocol, got.Status, got.TLS.Version, got.TLS.CurveID, got.TLS.NegotiatedProtocol)
		}
		// A body is not waited for.
		request, err := http.NewRequest("POST", url, neverEnding{})
		if err != nil {
			t.Fatal(err)
		}
		request.ContentLength = 100_000
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		got, err = (&http.Client{Transport: transport}).Do(request.WithContext(ctx))
		if errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: waited for a body: %v", protocol, err)
		}
		if err == nil {
			got.Body.Close()
		}
		cancel()
		transport.CloseIdleConnections()
	}
}

// TestServeTLS12 has clients that speak nothing newer.
// Requirements: 124.
func TestServeTLS12(t *testing.T) {
	ca := peertest.NewAuthority(trading)
	url := serve(t, ca.Issue(endpointID.Path()), exchange.Handler("/bundle.json", publish(7, jwks(7, ca)).source))
	for _, test := range []struct {
		name     string
		min, max uint16
		suites   []uint16
		accepted bool
	}{
		{"TLS 1.2", tls.VersionTLS12, tls.VersionTLS12, nil, true},
		{"TLS 1.2, ChaCha20", tls.VersionTLS12, tls.VersionTLS12, []uint16{tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256}, true},
		{"TLS 1.2, CBC", tls.VersionTLS12, tls.VersionTLS12, []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA, tls.TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA}, false},
		{"TLS 1.1", tls.VersionTLS10, tls.VersionTLS11, nil, false},
	} {
		config := tlsconfig.TLSClientConfig(ca.Bundle(), tlsconfig.AuthorizeID(endpointID))
		config.MinVersion, config.MaxVersion, config.CipherSuites = test.min, test.max, test.suites
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}}
		got, err := client.Get(url)
		if (err == nil) != test.accepted {
			t.Errorf("%s: %v", test.name, err)
		}
		if err == nil {
			got.Body.Close()
		}
	}
}

type neverEnding struct{}

func (neverEnding) Read(p []byte) (int, error) {
	time.Sleep(100 * time.Millisecond)
	p[0] = 'x'
	return 1, nil
}

// Whatever a stranger asks, he gets the whole bundle, nothing, or an error, and at once when he does not stay.
func FuzzHandler(f *testing.F) {
	text := jwks(7, peertest.NewAuthority(trading))
	handler := exchange.Handler("/bundle.json", publish(7, text).source)
	first := &response{header: http.Header{}, status: 200}
	request, err := http.NewRequest("GET", "/bundle.json", nil)
	if err != nil {
		f.Fatal(err)
	}
	handler.ServeHTTP(first, request)
	gone, cancel := context.WithCancel(context.Background())
	cancel()
	f.Add("GET", "/bundle.json", first.header.Get("ETag"), "wait=60")
	f.Add("HEAD", "/x", `W/"7", *`, `respond-async, wait="99999999999999999999"`)
	f.Fuzz(func(t *testing.T, method, path, tags, prefer string) {
		r, err := http.NewRequestWithContext(gone, method, "http://a/", nil)
		if err != nil {
			return
		}
		r.URL.Path = path
		r.Header.Set("If-None-Match", tags)
		r.Header.Set("Prefer", prefer)
		w := &response{header: http.Header{}, status: 200}
		handler.ServeHTTP(w, r)
		switch w.status {
		case 200:
			if whole := string(w.body) == string(text); whole != (method == "GET" || method == "") || path != "/bundle.json" {
				t.Errorf("%q %q: %s", method, path, w.body)
			}
		case 304:
			if len(w.body) > 0 || !strings.Contains(tags, first.header.Get("ETag")) && !strings.Contains(tags, "*") {
				t.Errorf("not modified since %q: %s", tags, w.body)
			}
		case 404, 405:
		default:
			t.Errorf("%q %q: %d", method, path, w.status)
		}
	})
}
