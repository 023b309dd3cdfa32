package dataplane

import (
	"context"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/entente-mesh/entente/internal/refusal"
)

// Outcomes of an access record.
const (
	outcomeAnswered  = "answered"    // an answer was passed on, whatever its status
	outcomeRefused   = "refused"     // by a rule: nothing was sent on
	outcomeNotSent   = "not-sent"    // failed; the application has certainly not seen it
	outcomeUnknown   = "unknown"     // failed; the application may have seen it
	outcomeTruncated = "truncated"   // the answer broke off after it had begun
	outcomeCut       = "cut"         // no longer allowed after the answer had begun
	outcomeGone      = "client-gone" // who asked did not wait
)

// record is the access record of one request.
type record struct {
	hop                string
	requestID          string
	caller, peer       string
	via                string
	service            string
	method, path       string
	status             int
	reason             refusal.Reason
	rule               string
	revision           uint64
	upstream           string // SPIFFE ID of the TLS peer that answered, or "application"
	upstreamAddress    string
	upstreamDatacenter string
	attempts           int
	outcome            string
}

func (e *Engine) write(r *record, took time.Duration) {
	e.metrics.request(r.hop, r.reason, r.outcome, took)
	if e.cfg.AccessLog == nil {
		return
	}
	e.cfg.AccessLog.LogAttrs(context.Background(), slog.LevelInfo, "request",
		slog.String("hop", r.hop),
		slog.String("process", e.cfg.Process),
		slog.String("request_id", r.requestID),
		slog.String("caller", r.caller),
		slog.String("peer", r.peer),
		slog.String("via", r.via),
		slog.String("service", r.service),
		slog.String("method", r.method),
		slog.String("path", r.path),
		slog.Int("status", r.status),
		slog.String("reason", string(r.reason)),
		slog.String("rule", r.rule),
		slog.Uint64("revision", r.revision),
		slog.String("upstream", r.upstream),
		slog.String("upstream_address", r.upstreamAddress),
		slog.String("upstream_datacenter", r.upstreamDatacenter),
		slog.Int("attempts", r.attempts),
		slog.String("outcome", r.outcome),
		slog.Float64("duration_ms", float64(took.Microseconds())/1000),
	)
}

// metrics is nil-safe: without a registerer nothing is counted.
type metrics struct {
	requests   *prometheus.CounterVec
	duration   *prometheus.HistogramVec
	attempts   *prometheus.CounterVec
	ejections  *prometheus.CounterVec
	handshakes *prometheus.HistogramVec
	cuts       prometheus.Counter
	noPlaces   prometheus.Counter
}

func newMetrics(kind string, reg prometheus.Registerer, open func() int) (*metrics, error) {
	if reg == nil {
		return nil, nil
	}
	name := func(s string) string { return "entente_" + kind + "_" + s }
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: name("requests_total"),
			Help: "Requests by hop, reason of refusal (empty: none) and outcome.",
		}, []string{"hop", "reason", "outcome"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    name("request_duration_seconds"),
			Help:    "Time from a request's arrival to the end of its answer.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 15},
		}, []string{"hop"}),
		attempts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: name("upstream_attempts_total"),
			Help: "Attempts to send a request on, by result: answered, not-sent, unknown, given-up.",
		}, []string{"result"}),
		ejections: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: name("upstream_ejections_total"),
			Help: "Times an upstream address was left out, by cause.",
		}, []string{"cause"}),
		handshakes: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    name("tls_handshake_duration_seconds"),
			Help:    "TLS handshakes (upstream: with the TCP connect) by side and result.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 5},
		}, []string{"side", "result"}),
		cuts: prometheus.NewCounter(prometheus.CounterOpts{
			Name: name("connections_cut_total"),
			Help: "Open connections closed because their peer is no longer admitted.",
		}),
	}
	m.noPlaces = prometheus.NewCounter(prometheus.CounterOpts{
		Name: name("connections_without_place_total"),
		Help: "Connections to an mTLS listener that were closed because too many are open, or come from one address.",
	})
	connections := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: name("open_connections"),
		Help: "Open verified connections, both sides.",
	}, func() float64 { return float64(open()) })
	for _, c := range []prometheus.Collector{m.requests, m.duration, m.attempts, m.ejections, m.handshakes, m.cuts, m.noPlaces, connections} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *metrics) request(hop string, reason refusal.Reason, outcome string, took time.Duration) {
	if m != nil {
		m.requests.WithLabelValues(hop, string(reason), outcome).Inc()
		m.duration.WithLabelValues(hop).Observe(took.Seconds())
	}
}

func (m *metrics) attempt(result string) {
	if m != nil {
		m.attempts.WithLabelValues(result).Inc()
	}
}

func (m *metrics) ejection(cause string) {
	if m != nil {
		m.ejections.WithLabelValues(cause).Inc()
	}
}

func (m *metrics) handshake(side, result string, started time.Time) {
	if m != nil {
		m.handshakes.WithLabelValues(side, result).Observe(time.Since(started).Seconds())
	}
}

func (m *metrics) noPlace() {
	if m != nil {
		m.noPlaces.Inc()
	}
}

func (m *metrics) cut(n int) {
	if m != nil {
		m.cuts.Add(float64(n))
	}
}
