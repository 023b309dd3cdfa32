package dataplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/internal/dataplane/header"
	"github.com/entente-mesh/entente/internal/problem"
	"github.com/entente-mesh/entente/internal/refusal"
)

// exchange is one request on its way through this process.
type exchange struct {
	engine *Engine
	w      http.ResponseWriter
	r      *http.Request
	view   *view // the same from beginning to end; nil: not ready
	start  time.Time
	record record

	who     spiffeid.ID
	via     []header.Hop
	target  catalog.Target
	query   catalog.Query // as decided; not written after that
	timeout time.Duration // until the answer begins; 0: none
	skip    string        // datacenter whose instances are to be asked last
	again   bool          // the hop before is trying for the second time or more
	upgrade string        // protocol of an Upgrade
	tcp     bool          // which is TCP of a service that speaks no HTTP
	content bool          // the request has content, or may have
	user    *user         // whom the edge forwards for; nil: the caller is a workload
	begun   bool          // the answer has begun
	broken  bool          // and could not be finished: the connection must not look clean
}

// begin takes a request in: hop-by-hop fields go, the request id is found or made.
func (e *Engine) begin(hop string, w http.ResponseWriter, r *http.Request, service string) *exchange {
	now := time.Now()
	id := r.Header.Get(header.RequestID)
	if !header.ValidRequestID(id) {
		id = header.NewRequestID(now)
	}
	x := &exchange{
		engine:  e,
		w:       w,
		r:       r,
		view:    e.current.Load(),
		start:   now,
		timeout: e.cfg.Timing.Deadline,
		upgrade: header.Upgrade(r.Header),
		content: r.ContentLength != 0, // unknown is -1: chunked, or HTTP/2 without END_STREAM
		record: record{
			hop:       hop,
			requestID: id,
			service:   service,
			method:    r.Method,
			path:      r.URL.EscapedPath(),
			outcome:   outcomeRefused,
		},
	}
	if x.content || x.upgrade == "h2c" {
		x.upgrade = "" // an offer that may be ignored (RFC 9110 section 7.8), and content may not be lost to it
	}
	if x.tcp = x.upgrade == header.TCP; x.tcp {
		x.record.method, x.record.path = "TCP", ""
	}
	header.RemoveHop(r.Header)
	if header.IsGRPC(r.Header) {
		x.timeout = 0 // a stream may be silent for long; unary calls bring a deadline of their own
	}
	return x
}

// end writes the record. To be deferred: it also ends a response that broke off.
func (x *exchange) end() {
	x.engine.write(&x.record, time.Since(x.start))
	if x.broken {
		panic(http.ErrAbortHandler) // net/http resets the stream or closes the connection, and logs nothing
	}
}

func (x *exchange) caller(id spiffeid.ID) {
	x.who = id
	x.record.caller = id.String()
}

// hopHeaders reads what the hop before says of its deadline and attempt.
func (x *exchange) hopHeaders() bool {
	h := x.r.Header
	if v := h.Get(header.TimeoutMS); v != "" {
		ms, err := strconv.ParseUint(v, 10, 31)
		if err != nil {
			x.refuse(refusal.BadRequest, header.TimeoutMS+" is not a number of milliseconds.", v)
			return false
		}
		if d := time.Duration(ms) * time.Millisecond; x.timeout == 0 || d < x.timeout {
			x.timeout = max(d, time.Millisecond)
		}
	}
	x.again = h.Get(header.Attempt) != "" && h.Get(header.Attempt) != "1"
	x.skip = h.Get(header.Tried)
	delete(h, header.TimeoutMS)
	delete(h, header.Attempt)
	delete(h, header.Tried)
	return true
}

// resolve finds the target by its service name.
func (x *exchange) resolve() bool {
	if x.view == nil {
		x.refuse(refusal.NotReady, "This process does not know its domain yet.", "")
		return false
	}
	if x.r.Method == http.MethodConnect {
		x.refuse(refusal.BadRequest, "CONNECT is not served here.", "")
		return false
	}
	target, ok := x.view.Tables.Resolve(x.record.service)
	if !ok {
		// Decide knows whether it is an unknown name or a missing import, and what to tell.
		if x.decide() {
			x.refuse(refusal.UnknownService, "", "allowed by no target")
		}
		return false
	}
	x.target = target
	x.record.service = target.Name
	return true
}

// decide asks the catalogue.
func (x *exchange) decide() bool {
	x.query = catalog.Query{
		Caller: x.who,
		Target: x.record.service,
		Method: x.r.Method,
		Path:   x.record.path,
		Now:    time.Now(),
		TCP:    x.tcp,

		Content: x.content,
	}
	if d, _ := x.r.Context().Value(downstreamKey{}).(*downstream); d != nil {
		x.query.Peer = d.id
	}
	d := x.view.Tables.Decide(x.query)
	x.record.rule, x.record.revision = d.Rule, d.Revision
	if !d.Allowed {
		x.refuseDecision(d)
	}
	return d.Allowed
}

func (x *exchange) refuseDecision(d catalog.Decision) {
	x.record.rule, x.record.revision = d.Rule, d.Revision
	x.refuse(d.Reason, fmt.Sprintf("%s to %s: %s", x.who, x.record.service, strings.TrimSpace(x.record.method+" "+x.record.path)), d.Detail)
}

// revoked ends a request that was allowed when it came and is not any more (I4).
type revoked struct{ catalog.Decision }

func (r *revoked) Error() string { return "no longer allowed: " + r.Detail }

// inflight are the requests under way, to be decided again.
type inflight struct {
	mu  sync.Mutex
	all map[*sender]struct{}
}

func (f *inflight) add(s *sender) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.all == nil {
		f.all = map[*sender]struct{}{}
	}
	f.all[s] = struct{}{}
}

func (f *inflight) remove(s *sender) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.all, s)
}

// reconsider cuts the requests under way that would be refused now: long streams
// must not outlive what permitted them.
func (e *Engine) reconsider(now time.Time) {
	v := e.current.Load()
	if v == nil {
		return
	}
	e.inflight.mu.Lock()
	senders := make([]*sender, 0, len(e.inflight.all))
	for s := range e.inflight.all {
		senders = append(senders, s)
	}
	e.inflight.mu.Unlock()
	for _, s := range senders {
		q := s.x.query
		q.Now = now
		d := v.Tables.Decide(q)
		if u := s.x.user; d.Allowed && u != nil {
			if err := u.still(); err != nil {
				d = catalog.Decision{Reason: refusal.TokenInvalid, Detail: "the user's token was revoked: " + err.Error()}
			} else if !now.Before(u.until) { // the clock was set, or the host slept: a timer does not see it
				s.expire()
			}
		}
		if !d.Allowed {
			s.cancel(&revoked{d})
		}
	}
}

// refuse answers with a problem. detail is for the caller, own for our log only (I11).
func (x *exchange) refuse(reason refusal.Reason, detail, own string) {
	x.refuseWith(problem.Problem{Reason: reason, Detail: detail}, own)
}

// outcomeOf says what a failure of the mesh means for trying again; "" for a
// decision, which would be the same elsewhere.
func outcomeOf(reason refusal.Reason) string {
	switch reason {
	case refusal.NotReady, refusal.NoEndpoint, refusal.UpstreamUnreachable:
		return header.NotSent
	case refusal.UpstreamOutcomeUnknown, refusal.Timeout:
		return header.Unknown
	}
	return ""
}

func (x *exchange) refuseWith(p problem.Problem, own string) {
	x.begun = true
	if p.RequestID == "" {
		p.RequestID = x.record.requestID
	}
	h := x.w.Header()
	h.Set(header.RequestID, p.RequestID)
	x.record.requestID = p.RequestID
	x.record.reason, x.record.status = p.Reason, p.Reason.Status()
	if outcome := outcomeOf(p.Reason); outcome != "" {
		h.Set(header.Outcome, outcome)
		x.record.outcome = outcome
	}
	p.Write(x.w, x.r)
	x.engine.log.LogAttrs(context.Background(), slog.LevelInfo, "request refused",
		slog.String("request_id", x.record.requestID),
		slog.String("hop", x.record.hop),
		slog.String("reason", string(p.Reason)),
		slog.String("caller", x.record.caller),
		slog.String("peer", x.record.peer),
		slog.String("service", x.record.service),
		slog.String("method", x.record.method),
		slog.String("path", x.record.path),
		slog.String("rule", x.record.rule),
		slog.Uint64("revision", x.record.revision),
		slog.String("detail", own),
	)
}

// gone ends an exchange whose client did not wait.
func (x *exchange) gone() {
	x.record.outcome = outcomeGone
	x.record.status = 499
	x.broken = true
}

var (
	errDeadline  = errors.New("the request's deadline has passed")
	errAbandoned = errors.New("no answer in time; tried elsewhere")
	errDrained   = errors.New("the instance is drained, and the time for requests under way is over")
)
