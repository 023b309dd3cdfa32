package exchange

import (
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/federation"
	"github.com/entente-mesh/entente/federation/bundle"
	"github.com/entente-mesh/entente/internal/peer"
)

const (
	dialTimeout     = 5 * time.Second
	exchangeTimeout = 20 * time.Second // beyond what the server was asked to wait
	maxRedirects    = 3
)

// Endpoint says where another domain's bundle is found and how its server is recognised. Nothing of it is ever inferred from
// the rest (Federation 5.1).
type Endpoint struct {
	TrustDomain spiffeid.TrustDomain
	URLs        []string // https; equal replicas of one endpoint, tried in order

	// ID is the SPIFFE ID that the server must show: the https_spiffe profile. Zero: https_web, where the server is recognised
	// by the host name in its URL.
	ID spiffeid.ID
	// Bundles verifies the server of an https_spiffe endpoint. It is asked at each handshake, so that the newest bundle
	// counts. [Follow] needs it only for an endpoint of a third domain: its own domain's bundle it has itself.
	Bundles x509bundle.Source
	// Roots verifies the server of an https_web endpoint; nil: the system's.
	Roots *x509.CertPool
	// NoRedirects refuses redirects, which otherwise may lead to another URL of the same host that passes the same checks.
	NoRedirects bool
	// AllowLoopback lets the host be at a loopback address: for development clusters, whose nodes listen on loopback only.
	// No other address that federation.CheckDial refuses is ever connected to, whatever a name resolves to.
	AllowLoopback bool

	// Dial makes the connections, for networks in memory; nil: TCP.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Fetched is a bundle as an endpoint served it.
type Fetched struct {
	Bundle  *bundle.Bundle
	Skipped []bundle.Skipped // what in it does not count
	// Record is the bundle for the domain's state: re-written by our writer, without the refresh hint, which says how to
	// fetch and not whom to trust, and which some servers change without a new sequence.
	Record    *statev1.ForeignBundle
	URL       string // where it was found, after redirects
	ServerKey string // key id of the server's certificate
}

// Fetch fetches the bundle from the first URL that serves a good one.
func Fetch(ctx context.Context, e Endpoint) (*Fetched, error) {
	if err := e.check(); err != nil {
		return nil, err
	}
	if !e.ID.IsZero() && e.Bundles == nil {
		return nil, fmt.Errorf("bundle endpoint of %s: no bundle to verify %s with", e.TrustDomain, e.ID)
	}
	var errs []error
	for _, u := range e.URLs {
		answer, err := e.client().get(ctx, u, "", 0)
		if err == nil {
			return answer.Fetched, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

func (e Endpoint) check() error {
	if e.TrustDomain.IsZero() {
		return errors.New("bundle endpoint: the trust domain it serves is not given")
	}
	if len(e.URLs) == 0 {
		return fmt.Errorf("bundle endpoint of %s: no URL is given", e.TrustDomain)
	}
	for _, raw := range e.URLs {
		u, err := url.Parse(raw)
		if err == nil {
			err = checkURL(u)
		}
		if err != nil {
			return fmt.Errorf("bundle endpoint of %s: %w", e.TrustDomain, err)
		}
	}
	return nil
}

// checkURL: Federation 5.2.1.1 and 5.2.2.1, also for each redirect.
func checkURL(u *url.URL) error {
	switch {
	case u.Scheme != "https":
		return fmt.Errorf("URL %s does not begin with https://", u.Redacted())
	case u.User != nil:
		return fmt.Errorf("URL %s must not carry a user", u.Redacted())
	case u.Hostname() == "":
		return fmt.Errorf("URL %s names no host", u.Redacted())
	}
	return nil
}

// client talks to one endpoint. Each request has a connection of its own, so that each is verified anew.
type client struct {
	endpoint Endpoint
	check    peer.Check // nil: https_web, where crypto/tls checks
	http     http.Client
}

func (e Endpoint) client() *client {
	c := &client{endpoint: e}
	var config *tls.Config
	if e.ID.IsZero() {
		config = peer.Intermediate(&tls.Config{RootCAs: e.Roots, NextProtos: []string{"http/1.1"}})
	} else {
		c.check = peer.SVID(e.Bundles, peer.AnyOf(e.ID))
		config = peer.Intermediate(peer.Client(nil, c.check, "http/1.1"))
	}
	dial := e.Dial
	if dial == nil {
		dialer := &net.Dialer{Timeout: dialTimeout, ControlContext: func(_ context.Context, _, address string, _ syscall.RawConn) error {
			return federation.CheckDial(address, e.AllowLoopback)
		}}
		dial = dialer.DialContext
	}
	c.http.Transport = &http.Transport{
		Proxy:                  nil, // not even from the environment
		DialContext:            dial,
		TLSClientConfig:        config,
		TLSHandshakeTimeout:    dialTimeout,
		DisableKeepAlives:      true,
		DisableCompression:     true,
		MaxResponseHeaderBytes: 64 << 10,
	}
	c.http.CheckRedirect = func(r *http.Request, via []*http.Request) error {
		if e.NoRedirects {
			return errors.New("a redirect, which this relationship does not allow")
		}
		if len(via) > maxRedirects {
			return fmt.Errorf("more than %d redirects", maxRedirects)
		}
		if asked := via[0].URL; !strings.EqualFold(r.URL.Hostname(), asked.Hostname()) {
			return fmt.Errorf("a redirect from host %s to host %s: only another URL of the same host is followed", asked.Hostname(), r.URL.Hostname())
		}
		return checkURL(r.URL)
	}
	return c
}

// answer is what one request brought.
type answer struct {
	*Fetched               // nil: not modified
	tag      string        // to ask with next time; may be empty
	waits    bool          // the server holds requests back when asked to
	life     time.Duration // what is left of the server's certificate's
}

// get asks for the bundle, unless it is the one of the tag; then, the server may wait for a newer one for so long.
func (c *client) get(ctx context.Context, u, tag string, wait time.Duration) (*answer, error) {
	ctx, cancel := context.WithTimeout(ctx, wait+exchangeTimeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, u, http.NoBody)
	if err != nil {
		return nil, fmt.Errorf("fetching the bundle of %s: %w", c.endpoint.TrustDomain, err)
	}
	request.Header.Set("Accept", "application/json")
	request.Header.Set("Accept-Encoding", "identity")
	request.Header.Set("User-Agent", "entente")
	if tag != "" {
		request.Header.Set("If-None-Match", tag)
		if wait > 0 {
			request.Header.Set("Prefer", "wait="+strconv.Itoa(int(wait/time.Second)))
		}
	}
	response, err := c.http.Do(request)
	if err != nil {
		// net/http names the URL with its password, which a redirect may have brought.
		if at, ok := errors.AsType[*url.Error](err); ok {
			err = at.Err
		}
		return nil, fmt.Errorf("fetching the bundle of %s from %s: %w", c.endpoint.TrustDomain, request.URL.Redacted(), err)
	}
	defer response.Body.Close()
	got, err := c.read(response, tag)
	if err != nil {
		return nil, fmt.Errorf("fetching the bundle of %s from %s: %w", c.endpoint.TrustDomain, response.Request.URL.Redacted(), err)
	}
	return got, nil
}

func (c *client) read(response *http.Response, tag string) (*answer, error) {
	got := &answer{
		tag:   response.Header.Get("ETag"),
		waits: strings.Contains(strings.ToLower(response.Header.Get("Preference-Applied")), "wait"),
	}
	if response.TLS == nil || len(response.TLS.PeerCertificates) == 0 {
		return nil, errors.New("the answer did not come over TLS")
	}
	leaf := response.TLS.PeerCertificates[0]
	got.life = time.Until(leaf.NotAfter)
	if c.check != nil {
		// The answer may have been waited for: is the server still who it was at the handshake?
		if err := c.check(*response.TLS); err != nil {
			return nil, err
		}
	}
	switch {
	case response.StatusCode == http.StatusNotModified && tag != "":
		got.tag = tag
		return got, nil
	case response.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("the answer is %s, not 200 OK", response.Status)
	}
	body, err := readBody(response)
	if err != nil {
		return nil, err
	}
	b, skipped, err := bundle.Parse(c.endpoint.TrustDomain, body)
	if err != nil {
		return nil, err
	}
	record, err := recordOf(b)
	if err != nil {
		return nil, err
	}
	got.Fetched = &Fetched{Bundle: b, Skipped: skipped, Record: record, URL: response.Request.URL.String(), ServerKey: peer.KeyID(leaf)}
	return got, nil
}

// readBody reads at most one byte more than a bundle may have, compressed as well as not. Some servers
// compress although they are asked not to.
func readBody(response *http.Response) ([]byte, error) {
	in := io.LimitReader(response.Body, bundle.MaxSize+1)
	switch encoding := strings.ToLower(strings.Join(response.Header.Values("Content-Encoding"), ", ")); encoding {
	case "", "identity":
	case "gzip", "x-gzip":
		unpacked, err := gzip.NewReader(in)
		if err != nil {
			return nil, fmt.Errorf("unpacking the answer, which says that it is gzip: %w", err)
		}
		in = io.LimitReader(unpacked, bundle.MaxSize+1)
	default:
		return nil, fmt.Errorf("the answer has Content-Encoding %.40q; only gzip and none are read: turn compression off at that endpoint", encoding)
	}
	body, err := io.ReadAll(in)
	if err != nil {
		return nil, fmt.Errorf("reading the answer: %w", err)
	}
	return body, nil
}

func recordOf(b *bundle.Bundle) (*statev1.ForeignBundle, error) {
	bare := *b
	bare.RefreshHint = 0
	jwks, err := bare.Marshal()
	if err != nil {
		return nil, err
	}
	return &statev1.ForeignBundle{TrustDomain: b.TrustDomain.Name(), Jwks: jwks, Sequence: b.Sequence}, nil
}
