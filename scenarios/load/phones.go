package load

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	probeEvery   = 200 * time.Millisecond
	probeTimeout = 500 * time.Millisecond
	maxAnswer    = 1 << 20
)

// Phone is a client outside every datacenter: it has the edges of all of them in
// its list and asks the most preferred one that it does not believe dead. It is
// safe for concurrent use.
type Phone struct {
	edges   []*edge
	token   string
	ctx     context.Context // of the probes; ended by Close
	stop    context.CancelFunc
	probing sync.WaitGroup
}

type edge struct {
	base   string // https://host:port
	client *http.Client
	down   atomic.Bool
}

// NewPhone returns a phone that trusts roots and shows token ("" for none) to the
// edges at host:port, the most preferred first.
func NewPhone(edges []string, roots *x509.CertPool, token string) *Phone {
	p := &Phone{token: token}
	p.ctx, p.stop = context.WithCancel(context.Background())
	for _, address := range edges {
		p.edges = append(p.edges, &edge{
			base: "https://" + address,
			client: &http.Client{
				Transport: &http.Transport{
					TLSClientConfig:     &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13},
					DialContext:         (&net.Dialer{Timeout: probeTimeout}).DialContext,
					TLSHandshakeTimeout: time.Second,
					MaxIdleConnsPerHost: 16,
				},
				CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
			},
		})
	}
	return p
}

// Close ends the probes and gives the phone's connections back. No request may be
// out or come after it.
func (p *Phone) Close() {
	p.stop()
	p.probing.Wait()
	for _, e := range p.edges {
		e.client.CloseIdleConnections()
	}
}

// Answer is what came back.
type Answer struct {
	Status int
	Header http.Header
	Body   []byte
	Edge   string // host:port of the edge that answered
}

// Try sends a request to the edges in turn until one answers well, and says how
// often it was sent and whether it may have taken effect without a good answer. What
// is not idempotent is sent again only when it was surely not processed.
func (p *Phone) Try(ctx context.Context, method, path string, body []byte) (answer Answer, attempts int, unknown bool, err error) {
	idempotent := method == http.MethodGet || method == http.MethodHead
	err = errors.New("no edge is known")
	for _, e := range p.inOrder() {
		if attempts > 0 && ctx.Err() != nil {
			break
		}
		attempts++
		sent := false
		answer, sent, err = p.ask(ctx, e, method, path, body)
		switch {
		case err != nil:
			if ctx.Err() == nil {
				p.suspect(e)
			}
			if sent && !idempotent {
				return answer, attempts, true, err
			}
		case answer.Status < 500 || answer.Header.Get("Entente-Refused") == "":
			return answer, attempts, false, nil
		case !idempotent && answer.Header.Get("Entente-Outcome") != "not-sent":
			return answer, attempts, answer.Header.Get("Entente-Outcome") == "unknown", nil
		}
	}
	return answer, attempts, false, err
}

// inOrder lists the edges that are not believed dead in the order of preference,
// then the others.
func (p *Phone) inOrder() []*edge {
	list := slices.Clone(p.edges)
	slices.SortStableFunc(list, func(a, b *edge) int {
		switch da, db := a.down.Load(), b.down.Load(); {
		case da == db:
			return 0
		case da:
			return 1
		default:
			return -1
		}
	})
	return list
}

func (p *Phone) ask(ctx context.Context, e *edge, method, path string, body []byte) (answer Answer, sent bool, err error) {
	var wrote atomic.Bool
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{WroteHeaders: func() { wrote.Store(true) }})
	request, err := http.NewRequestWithContext(ctx, method, e.base+path, bytes.NewReader(body))
	if err != nil {
		return answer, false, err
	}
	// The transport would send a request with GetBody again by itself: then nobody counts it.
	request.GetBody = nil
	if len(body) == 0 {
		request.Body = http.NoBody
	} else {
		request.Header.Set("Content-Type", "application/json")
	}
	if p.token != "" {
		request.Header.Set("Authorization", "Bearer "+p.token)
	}
	response, err := e.client.Do(request)
	if err != nil {
		return answer, wrote.Load(), err
	}
	defer response.Body.Close()
	data, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		return answer, true, fmt.Errorf("read the answer: %w", err)
	}
	return Answer{response.StatusCode, response.Header, data, request.URL.Host}, true, nil
}

// suspect marks an edge dead and probes it until it answers again.
func (p *Phone) suspect(e *edge) {
	e.client.CloseIdleConnections()
	if !e.down.CompareAndSwap(false, true) {
		return
	}
	p.probing.Go(func() {
		for {
			select {
			case <-p.ctx.Done():
				return
			case <-time.After(probeEvery):
			}
			if e.alive(p.ctx) {
				e.down.Store(false)
				return
			}
		}
	})
}

// alive asks without a token: a refusal is an answer.
func (e *edge) alive(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, e.base+"/", nil)
	if err != nil {
		return false
	}
	response, err := e.client.Do(request)
	if err != nil {
		return false
	}
	response.Body.Close()
	return response.StatusCode < 500
}
