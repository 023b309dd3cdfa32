package dataplane

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/internal/dataplane/header"
	"github.com/entente-mesh/entente/internal/dataplane/resilience"
	"github.com/entente-mesh/entente/internal/problem"
	"github.com/entente-mesh/entente/internal/refusal"
)

const maxAttempts = 4

// forward sends the request on over mTLS and copies the answer. via is what a gateway
// writes; nil: this process is no gateway.
func (x *exchange) forward(identity Identity, from catalog.Place, via []header.Hop) {
	e := x.engine
	r := e.route(x.view, identity, from, x.target)
	if len(r.groups) == 0 {
		x.refuse(refusal.NoEndpoint, "No place that serves "+x.target.Name+" is known.", "the plan is empty")
		return
	}
	e.budget.Request(x.start)
	s := newSender(x)
	defer s.close()
	h := s.head
	if via != nil {
		h[header.Caller] = []string{x.who.String()}
		h[header.Via] = []string{header.FormatVia(via)}
	}

	var tried []*place
	for {
		hop, more := r.choose(tried, x.skip, e.cfg.Timing.Hold, time.Now())
		if hop == nil { // all were tried: once more from the beginning, after a moment
			if !s.pause() {
				s.giveUp()
				return
			}
			tried = tried[:0]
			continue
		}
		tried = append(tried, hop.place)
		s.tried = r.passedOver(hop)
		done := s.try(r.service, hop, more)
		if done || x.begun || !s.again(more) {
			if !done && !x.begun {
				s.giveUp()
			}
			return
		}
	}
}

// sender holds what the attempts of one exchange share.
type sender struct {
	x      *exchange
	head   http.Header // of the next attempt
	body   *source     // nil: there is none
	ctx    context.Context
	cancel context.CancelCauseFunc
	limit  *time.Timer // the request's deadline; nil: none
	expiry *time.Timer // when what let the user in ends; nil: the caller is a workload
	begun  atomic.Bool // the answer has begun

	idempotent bool
	attempts   int
	pauses     resilience.Backoff
	tried      string // what the next attempt says in Entente-Tried

	// Of the last attempt:
	sent bool  // it may have reached the application
	paid bool  // its retry is already taken from the budget
	err  error // why it failed

	reset func() // breaks the connection to what answered, so that nobody takes it for a clean end

	mayHaveRun bool // of all attempts: one was sent and its outcome is not known
}

func newSender(x *exchange) *sender {
	s := &sender{
		x:          x,
		head:       x.r.Header,
		idempotent: resilience.Idempotent(x.r.Method, x.r.Header) && x.upgrade == "" || x.tcp, // a TCP stream has not begun yet
		pauses:     resilience.Backoff{Base: 20 * time.Millisecond, Max: 200 * time.Millisecond},
	}
	delete(s.head, "Expect") // the 100 (Continue) is ours to give: our server sends it when the body is first read
	s.head[header.RequestID] = []string{x.record.requestID}
	if x.content {
		s.body = newSource(x.r.Body, func() http.Header { return x.trailers() })
	}
	s.ctx, s.cancel = context.WithCancelCause(x.r.Context())
	if x.timeout > 0 {
		s.limit = time.AfterFunc(x.timeout-time.Since(x.start), func() { s.cancel(errDeadline) })
	}
	if x.user != nil {
		s.expiry = time.AfterFunc(time.Hour, s.expire)
		s.expiry.Reset(time.Until(x.user.until))
	}
	x.engine.inflight.add(s)
	return s
}

// expire cuts what a user was let in for until now. A request that waits for its answer
// has its deadline, and is left to it: that it was sent cannot be taken back.
func (s *sender) expire() {
	x := s.x
	if x.timeout > 0 && x.upgrade == "" && !s.begun.Load() {
		if left := x.timeout - time.Since(x.start); left > 0 {
			s.expiry.Reset(left + time.Second)
			return
		}
	}
	s.cancel(&revoked{catalog.Decision{Reason: refusal.TokenExpired, Detail: "the user's token has expired"}})
}

func (s *sender) close() {
	s.x.engine.inflight.remove(s)
	if s.limit != nil {
		s.limit.Stop()
	}
	if s.expiry != nil {
		s.expiry.Stop()
	}
	s.cancel(nil)
}

// answered is to be called when the answer has begun: from then on the deadline is over.
func (s *sender) answered() bool {
	return s.limit == nil || s.limit.Stop()
}

// trailers is what may be passed on of them.
func trailers(all http.Header) http.Header {
	if len(all) == 0 {
		return nil
	}
	kept := maps.Clone(all)
	header.RemoveProtected(kept)
	header.RemoveHop(kept)
	return kept
}

// trailers are the request's, as far as its sender may say them.
func (x *exchange) trailers() http.Header {
	kept := trailers(x.r.Trailer)
	if x.strange() {
		header.RemoveForwarding(kept)
	}
	if x.user != nil {
		header.RemoveCredentials(kept, x.user.token.Reveal())
	}
	return kept
}

// strange tells whether the request's sender is no workload of this domain.
func (x *exchange) strange() bool {
	return x.user != nil || !x.who.MemberOf(x.engine.cfg.TrustDomain)
}

// request makes the request of one attempt.
func (s *sender) request(ctx context.Context, scheme, address string) *http.Request {
	x := s.x
	out := &http.Request{
		Method: x.r.Method,
		URL: &url.URL{
			Scheme:     scheme,
			Host:       address,
			Path:       x.r.URL.Path,
			RawPath:    x.r.URL.RawPath,
			RawQuery:   x.r.URL.RawQuery,
			ForceQuery: x.r.URL.ForceQuery,
			Opaque:     opaque(x.r.URL),
		},
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: s.head,
		Host:   x.target.Name,
	}
	if s.body != nil {
		out.ContentLength = x.r.ContentLength
		out.Trailer = x.trailers()
		out.Body = s.body.next(out.Trailer)
	}
	return out.WithContext(ctx)
}

// opaque keeps "*" of OPTIONS as it is.
func opaque(u *url.URL) string {
	if u.Path == "*" {
		return "*"
	}
	return ""
}

// try makes one attempt over mTLS. done: an answer was passed on, or must not be waited for.
func (s *sender) try(service string, hop *routeHop, more bool) (done bool) {
	x, e, p := s.x, s.x.engine, hop.place
	s.sent, s.paid, s.err = false, false, nil
	s.attempts++
	x.record.attempts = s.attempts
	x.record.upstream, x.record.upstreamAddress, x.record.upstreamDatacenter = "", hop.Address, hop.Datacenter
	p.used.Store(time.Now().UnixNano())
	p.inflight.Add(1)
	defer p.inflight.Add(-1)

	ctx, cancel := context.WithCancelCause(s.ctx)
	defer cancel(nil)
	var state attemptState
	if more && s.idempotent && !x.again && x.timeout != 0 {
		// Somebody else may do better, but only if this place is dead: a slow answer that
		// were asked for again, by each hop, would multiply until everything is slow. For
		// the same reason what another hop is repeating already is left alone.
		timer := time.AfterFunc(e.cfg.Timing.Attempt, func() {
			if s.body.replayable() && !e.upstream.alive(p) && e.budget.Retry(time.Now()) && state.abandon() {
				cancel(errAbandoned)
			}
		})
		defer timer.Stop()
	}

	c, err := e.connectFor(ctx, x.upgrade != "", p, hop.spec)
	if err != nil {
		return s.failed(p, &state, err, false)
	}
	defer c.release()
	s.reset = c.reset
	x.record.upstream = c.peer.String()

	h := s.head
	if s.attempts > 1 {
		h = maps.Clone(h) // an attempt that was given up may still be reading the old one
		s.head = h
	}
	h[header.Attempt] = []string{strconv.Itoa(s.attempts)}
	delete(h, header.Tried)
	if s.tried != "" {
		h[header.Tried] = []string{s.tried}
	}
	if x.timeout > 0 {
		h[header.TimeoutMS] = []string{strconv.FormatInt(max(1, (x.timeout-time.Since(x.start)).Milliseconds()), 10)}
	}
	if x.upgrade != "" {
		h["Connection"], h["Upgrade"] = []string{"Upgrade"}, []string{x.upgrade}
	}
	res, err := c.http.RoundTrip(s.request(ctx, "https", hop.Address))
	if err == nil && !state.answer() {
		_ = res.Body.Close()
		err = errAbandoned
	}
	if err != nil {
		// HTTP/2 reports its headers as written only after they are, so an error that
		// does not say otherwise may have come after the other end began.
		return s.failed(p, &state, err, !neverProcessed(err))
	}
	p.answered.Store(time.Now().UnixNano())
	reason, ours := problem.FromHeader(res.Header)
	outcome := res.Header.Get(header.Outcome)
	if !ours || outcome == "" {
		if err := s.prefetch(res); err != nil {
			_ = res.Body.Close()
			return s.failed(p, &state, err, true)
		}
		if pen := p.penalty(service, false); pen != nil {
			pen.OK()
		}
		e.metrics.attempt("answered")
		s.copy(res, reason)
		return true
	}

	// The next hop could not serve it. Somebody else may; if not, its answer is ours.
	s.sent = outcome != header.NotSent
	s.mayHaveRun = s.mayHaveRun || s.sent
	e.metrics.attempt(attemptResult(s.sent))
	if !s.sent {
		p.penalty(service, true).Fail(time.Now(), rand.Float64())
	}
	s.err = fmt.Errorf("%s: %s", c.peer, reason)
	if more && s.again(more) {
		s.paid = true
		_ = res.Body.Close()
		return false
	}
	if s.mayHaveRun {
		res.Header.Set(header.Outcome, header.Unknown)
	}
	x.record.outcome = attemptResult(s.mayHaveRun)
	s.copy(res, reason)
	return true
}

// prefetch reads a small answer to its end before it is passed on, so that one that
// breaks off can still be asked for again.
func (s *sender) prefetch(res *http.Response) error {
	n := res.ContentLength
	if !s.idempotent || n <= 0 || n > maxReplay || s.x.r.Method == http.MethodHead {
		return nil
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(res.Body, body); err != nil {
		return fmt.Errorf("the answer broke off: %w", err)
	}
	res.Body = &joined{res.Body, bytes.NewReader(body)}
	return nil
}

// joined is a body whose beginning was read before.
type joined struct {
	io.ReadCloser
	head *bytes.Reader
}

func (j *joined) Read(p []byte) (int, error) {
	if j.head.Len() > 0 {
		return j.head.Read(p)
	}
	return j.ReadCloser.Read(p)
}

func attemptResult(sent bool) string {
	if sent {
		return outcomeUnknown
	}
	return outcomeNotSent
}

// attemptState settles who was first: the answer or the end of patience.
type attemptState struct{ v atomic.Int32 }

func (a *attemptState) answer() bool  { return a.v.CompareAndSwap(0, 1) }
func (a *attemptState) abandon() bool { return a.v.CompareAndSwap(0, 2) }
func (a *attemptState) given() bool   { return a.v.Load() == 2 }

// connectFor finds or opens a connection. An Upgrade takes one of its own: HTTP/2
// has none in this Go (RFC 8441 is switched off).
func (e *Engine) connectFor(ctx context.Context, upgrade bool, p *place, spec *dialSpec) (*upstreamConn, error) {
	if !upgrade {
		return e.upstream.connect(ctx, p, spec)
	}
	return e.upstream.dial(ctx, p, spec, "http/1.1")
}

// failed books a failed attempt. done: nobody waits for another.
func (s *sender) failed(p *place, state *attemptState, err error, sent bool) (done bool) {
	x, e := s.x, s.x.engine
	s.err, s.sent = err, sent
	s.mayHaveRun = s.mayHaveRun || sent
	if state.given() {
		s.paid = true
		e.metrics.attempt("given-up")
		return false
	}
	if cause := context.Cause(s.ctx); cause != nil {
		if errors.Is(cause, errDeadline) {
			e.upstream.look(p)
		}
		s.giveUp()
		return true
	}
	if err := s.body.failed(); err != nil {
		x.gone()
		return true
	}
	e.metrics.attempt(attemptResult(sent))
	e.log.LogAttrs(x.r.Context(), slog.LevelDebug, "attempt failed", slog.String("request_id", x.record.requestID),
		slog.String("upstream_address", p.address), slog.Bool("sent", sent), slog.Any("error", err))
	return false
}

// neverProcessed recognises errors of HTTP/2 that say that the other end did not look
// at the stream: a GOAWAY before it, or REFUSED_STREAM (RFC 9113 sections 6.8 and 8.7).
// net/http does not export them; a test holds these texts to the running Go.
func neverProcessed(err error) bool {
	text := err.Error()
	return strings.Contains(text, "server's graceful shutdown GOAWAY") ||
		strings.Contains(text, "Server's graceful shutdown GOAWAY") ||
		strings.Contains(text, "REFUSED_STREAM") ||
		strings.Contains(text, "client conn not usable")
}

// again reports whether the request may be sent another time.
func (s *sender) again(more bool) bool {
	if s.attempts >= maxAttempts || s.ctx.Err() != nil || !s.body.replayable() {
		return false
	}
	if !s.sent || s.paid {
		return true // not-sent is free: it costs the one who is there nothing
	}
	if !s.idempotent || !s.x.engine.budget.Retry(time.Now()) {
		return false
	}
	s.paid = true
	return true
}

// pause waits before the same places are asked once more.
func (s *sender) pause() bool {
	timer := time.NewTimer(s.pauses.Next(rand.Float64()))
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-s.ctx.Done():
		return false
	}
}

// giveUp answers for attempts that all failed.
func (s *sender) giveUp() {
	x := s.x
	var cut *revoked
	switch cause := context.Cause(s.ctx); {
	case errors.As(cause, &cut):
		x.refuseDecision(cut.Decision)
	case errors.Is(cause, errDeadline):
		s.timeout()
	case cause != nil && !errors.Is(cause, errDrained):
		x.gone()
	case s.mayHaveRun:
		x.refuse(refusal.UpstreamOutcomeUnknown, "The request was sent, and the connection was lost before an answer came.", errText(s.err))
	default:
		x.refuse(refusal.UpstreamUnreachable, "Nothing was sent: no place that serves "+x.record.service+" could be reached.", errText(s.err))
	}
}

func (s *sender) timeout() {
	own := errText(s.err)
	if !s.mayHaveRun {
		s.x.refuse(refusal.UpstreamUnreachable, "Nothing was sent within the request's deadline.", own)
		return
	}
	s.x.refuse(refusal.Timeout, "No answer came within the request's deadline of "+s.x.timeout.String()+".", own)
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// give tells the monitor of an application that it is given something, and has that end
// with the instance. end is to be called when status and failure are what they were to be.
func (s *sender) give(b Backend, status *int, failure *error) (end func()) {
	cut := func() bool { return true }
	if b.Open != nil {
		cut = context.AfterFunc(b.Open, func() { s.cancel(errDrained) })
	}
	if b.Monitor != nil {
		b.Monitor.Begin()
	}
	return func() {
		cut()
		if b.Monitor != nil {
			b.Monitor.End(*status, *failure)
		}
	}
}

// toApplication hands the request to the host's own service: once, as its sidecar
// cannot know whether it has begun.
func (x *exchange) toApplication(b Backend, d *downstream) {
	e := x.engine
	s := newSender(x)
	defer s.close()
	if x.strange() { // as a user of ours: proxies of another domain are not ours
		header.RemoveForwarding(s.head)
	}
	s.head[header.ClientCert] = []string{header.ClientCertElement{By: b.ID, Hash: header.Hash(d.cert), URI: x.who}.String()}
	if x.upgrade != "" {
		s.head["Connection"], s.head["Upgrade"] = []string{"Upgrade"}, []string{x.upgrade}
	}
	x.record.attempts, x.record.upstream = 1, "application"
	x.record.upstreamAddress, x.record.upstreamDatacenter = b.Address, e.cfg.Datacenter
	var status int
	var failure error
	defer s.give(b, &status, &failure)()
	apps := e.apps.of(x.who.TrustDomain())
	transport := apps.http1
	if header.IsGRPC(s.head) {
		transport = apps.h2c
	}
	var sent atomic.Bool
	ctx := context.WithValue(s.ctx, backendKey{}, &b)
	request := s.request(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) { sent.Store(true) }, // WroteHeaders may come too late
	}), "http", x.target.Name+"."+hex.EncodeToString([]byte(b.Address))) // one pool for each service and address
	// An application that leaves content unread takes it for the connection's next
	// request, so after content there is none, unless its Service says that it reads it.
	// A 100 (Continue) would prove nothing: Python's http.server sends one to whoever
	// expects it, before its handler decides whether to read.
	request.Close = x.content && transport == apps.http1 && !x.target.Service.ReadsBodies
	res, err := transport.RoundTrip(request)
	if err != nil {
		s.err, s.mayHaveRun = err, sent.Load()
		if s.body.failed() != nil {
			x.gone()
			return
		}
		if s.ctx.Err() == nil {
			failure = err
		}
		s.giveUp()
		return
	}
	// What the mesh says, only the mesh says.
	header.RemoveProtected(res.Header)
	s.copy(res, "")
	if !x.broken { // or it cannot be known whose doing that was
		status = res.StatusCode
	}
}

var buffers = sync.Pool{New: func() any { return new([32 << 10]byte) }}

// copy passes an answer on: header, body with every piece at once, trailers.
func (s *sender) copy(res *http.Response, reason refusal.Reason) {
	x := s.x
	defer res.Body.Close()
	if !s.answered() { // the timer has fired, and may just be about to cancel
		s.cancel(errDeadline)
		s.giveUp()
		return
	}
	s.begun.Store(true)
	x.record.status, x.record.reason = res.StatusCode, reason
	if res.StatusCode == http.StatusSwitchingProtocols {
		s.tunnel(res)
		return
	}
	if reason == "" {
		x.record.outcome = outcomeAnswered
	}
	header.RemoveHop(res.Header)
	header.RemoveProtected(res.Header, header.Refused, header.Outcome)
	x.toUser(res.Header)
	h := x.w.Header()
	maps.Copy(h, res.Header)
	h[header.RequestID] = []string{x.record.requestID}
	announced := make([]string, 0, len(res.Trailer))
	for name := range trailers(res.Trailer) {
		announced = append(announced, name)
	}
	if len(announced) > 0 {
		h["Trailer"] = announced
	}
	x.begun = true
	x.w.WriteHeader(res.StatusCode)

	if err := x.stream(res); err != nil {
		x.broken = true
		x.record.outcome = outcomeTruncated
		var cut *revoked
		switch {
		case errors.As(context.Cause(s.ctx), &cut):
			x.record.outcome, x.record.reason = outcomeCut, cut.Reason
			x.record.rule, x.record.revision = cut.Rule, cut.Revision
		case x.r.Context().Err() != nil:
			x.record.outcome = outcomeGone
		}
		return
	}
	if len(res.Trailer) > 0 {
		_ = http.NewResponseController(x.w).Flush() // or a short body would be sent with a length and no trailers
	}
	for name, values := range trailers(res.Trailer) {
		if !slices.Contains(announced, name) {
			name = http.TrailerPrefix + name
		}
		h[name] = values
	}
}

// stream copies the body. A body of unknown length is flushed piece by piece.
func (x *exchange) stream(res *http.Response) error {
	if res.Body == http.NoBody || x.r.Method == http.MethodHead {
		return nil
	}
	buffer := buffers.Get().(*[32 << 10]byte)
	defer buffers.Put(buffer)
	control := http.NewResponseController(x.w)
	var copied int64
	flush := res.ContentLength < 0
	if flush {
		_ = control.Flush() // the header, should the first piece be long in coming
	}
	for {
		n, err := res.Body.Read(buffer[:])
		if n > 0 {
			if _, werr := x.w.Write(buffer[:n]); werr != nil {
				return werr
			}
			copied += int64(n)
			if flush || copied < res.ContentLength && n < len(buffer) {
				_ = control.Flush()
			}
		}
		switch {
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
	}
}
