package server

import (
	"fmt"
	"time"

	"github.com/entente-mesh/entente/internal/admission"
)

// Limits are how much one node issues. Zero of a field: its default. Each node counts for
// itself; an agent that is sent away asks another one.
type Limits struct {
	X509PerAgent   float64 // X.509-SVIDs that one agent may have signed a second; default 5000, 10 s of them at once
	TokensPerAgent float64 // JWT- and WIT-SVIDs that one agent may have signed a second; default 5000, 1 s of them at once
	TokensPerEntry float64 // those of them for one entry; default 200, 5 s of them at once
	PerNode        float64 // SVIDs of all kinds for all agents a second, 1 s of them at once; default: as many as it can
	Attests        int     // hosts that attest at once; default 32: each may cost an agreement
	// AttestsPerSource is how often one address (IPv6: one /64) may ask to be admitted, as
	// host or as CA node, a second; default 200, 10 s of them at once.
	AttestsPerSource float64
}

const (
	defaultX509Rate  = 5000
	defaultTokenRate = 5000
	defaultEntryRate = 200
	defaultAttests   = 32
	defaultKnocks    = 200
	// A host that starts anew asks for all its SVIDs at once; tokens it asks for as it goes.
	x509BurstSeconds = 10
	// A workload that starts asks for tokens for all whom it calls.
	entryBurstSeconds = 5
	// attestRetry is when a host comes back that found all slots taken.
	attestRetry = 500 * time.Millisecond
	// One agent's reports of its instances that are looked at a second, and at once.
	reportRate  = 5
	reportBurst = 20
)

// newKnocks bounds how often each source asks to be admitted. Behind one address there
// may be a datacenter that starts at once.
func newKnocks(each float64) *admission.Rate {
	return admission.NewRate(each, max(int(10*each), 1), admission.MaxSources)
}

// rates limits each host, so that none takes the whole node. Of hosts, entries and callers
// with an identity there are no more than the agreed state has.
type rates struct {
	*admission.Rate
	each float64 // events a second
	what string
}

// newRates allows each host (or entry of a host, or caller) so many of what a second, and
// the events of some seconds at once; a batch always fits.
func newRates(each float64, seconds int, what string) *rates {
	return &rates{admission.NewRate(each, max(int(each)*seconds, maxBatch), 0), each, what}
}

// limit lets a host have n SVIDs signed, or says when to come back: first as the host's
// own limit is, then as the node's.
func (s *Server) limit(perAgent *rates, host string, n int) error {
	now := time.Now()
	if wait := perAgent.Take(host, n, now); wait > 0 {
		s.metrics.limited.WithLabelValues("agent").Inc()
		return exhausted(fmt.Sprintf("host %s asks for more than %g %s a second", host, perAgent.each, perAgent.what), wait)
	}
	if s.perNode == nil {
		return nil
	}
	if wait := s.perNode.Take("", n, now); wait > 0 {
		s.metrics.limited.WithLabelValues("node").Inc()
		return exhausted(fmt.Sprintf("this CA node signs at most %g SVIDs a second", s.perNode.each), wait)
	}
	return nil
}
