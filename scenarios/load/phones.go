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
}

// Try sends a request to the edges in turn until one answers well, and says how
// often it was sent and whether it may have taken effect without a good answer. What
// is not idempotent is sent again only when it was surely not processed. What is gets
// a second chance beside the first when half of its time is over without an answer.
func (p *Phone) Try(ctx context.Context, method, path string, body []byte) (answer Answer, attempts int, unknown bool, err error) {
	edges := p.inOrder()
	if method == http.MethodGet || method == http.MethodHead {
		answer, attempts, err = p.hedged(ctx, edges, method, path, body)
		return answer, attempts, false, err
	}
	for _, e := range edges {
		if attempts > 0 && ctx.Err() != nil {
			break
		}
		attempts++
		sent := false
		answer, sent, err = p.ask(ctx, e, method, path, body)
		if err != nil && sent {
			return answer, attempts, true, err
		}
		if err == nil && (answer.good() || answer.Header.Get("Entente-Outcome") != "not-sent") {
			return answer, attempts, answer.Header.Get("Entente-Outcome") == "unknown", nil
		}
	}
	return answer, attempts, false, err
}

// good: it is not the mesh's word that it could not get an answer.
func (a Answer) good() bool { return a.Status < 500 || a.Header.Get("Entente-Refused") == "" }

// hedged asks the next edge when one fails, or has not answered in half of the time.
func (p *Phone) hedged(ctx context.Context, edges []*edge, method, path string, body []byte) (answer Answer, attempts int, err error) {
	type result struct {
		Answer
		err error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	results := make(chan result, len(edges))
	next := func() bool {
		if attempts == len(edges) {
			return false
		}
		e := edges[attempts]
		attempts++
		go func() {
			a, _, err := p.ask(ctx, e, method, path, body)
			results <- result{a, err}
		}()
		return true
	}
	half := time.Hour
	if deadline, ok := ctx.Deadline(); ok {
		half = time.Until(deadline) / 2
	}
	patience := time.NewTimer(half)
	defer patience.Stop()
	if !next() {
		return answer, 0, errors.New("no edge is known")
	}
	for open := 1; open > 0; {
		select {
		case <-patience.C:
			if next() {
				open++
			}
		case r := <-results:
			open--
			answer, err = r.Answer, r.err
			if err == nil && answer.good() {
				return answer, attempts, nil
			}
			if ctx.Err() == nil && next() {
				open++
			}
		}
	}
	return answer, attempts, err
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
		if ctx.Err() == nil {
			p.suspect(e)
		}
		return answer, wrote.Load(), err
	}
	defer response.Body.Close()
	data, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		if ctx.Err() == nil {
			p.suspect(e)
		}
		return answer, true, fmt.Errorf("read the answer: %w", err)
	}
	return Answer{response.StatusCode, response.Header, data}, true, nil
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
