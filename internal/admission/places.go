// Package admission shares what a listener has among those who come to it, by where
// they come from: connections (Places, Listen), attempts (Rate) and what is logged about
// them (Fold). One source cannot keep the others out, whatever it does with what it holds.
package admission

import (
	"math"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Limits bound a set of places.
type Limits struct {
	Most int // all together
	// PerSource is how many one source may hold; 0: as many as there are. A share of Most
	// leaves room for the clients behind one NAT and for everybody else.
	PerSource int
	// Patience is how old a place is at least before another of its own source takes it.
	Patience time.Duration
}

// Never is the Patience of places that are not given to another of the same source.
const Never time.Duration = math.MaxInt64

// Share returns limits of which one source may hold a quarter.
func Share(most int, patience time.Duration) Limits {
	return Limits{Most: most, PerSource: max(most/4, 1), Patience: patience}
}

// Places is a bounded set of connections, or of anything else that ends. When it is full,
// the newest takes the place of the oldest of the source that holds the most: a source
// that was not seen yet always finds a place. A source that holds its share, or as much
// as any other, takes the place of its own oldest, if that is older than Patience.
// Methods may be called concurrently.
type Places struct {
	limits Limits

	mu       sync.Mutex
	held     []*Place // oldest first
	bySource map[string]int
}

// Place is held until it is left, or taken away.
type Place struct {
	set    *Places
	source string
	since  time.Time
	end    func()
}

// NewPlaces returns an empty set.
func NewPlaces(limits Limits) *Places {
	return &Places{limits: limits, bySource: make(map[string]int)}
}

// Take returns a place; nil: there is none for that source now. end is called, with a
// lock held, when the place is given to another: it must not block.
func (p *Places) Take(source string, now time.Time, end func()) *Place {
	p.mu.Lock()
	defer p.mu.Unlock()
	share := p.limits.PerSource > 0 && p.bySource[source] >= p.limits.PerSource
	if share || len(p.held) >= p.limits.Most {
		i := p.victim(source, share, now)
		if i < 0 {
			return nil
		}
		victim := p.held[i]
		p.drop(i)
		victim.end()
	}
	taken := &Place{set: p, source: source, since: now, end: end}
	p.held = append(p.held, taken)
	p.bySource[source]++
	return taken
}

// victim is who has to go for one more of source; -1: nobody. With own, only another of
// the same source may go.
func (p *Places) victim(source string, own bool, now time.Time) int {
	of := func(source string) int {
		return slices.IndexFunc(p.held, func(h *Place) bool { return h.source == source })
	}
	busiest := source
	for other, n := range p.bySource {
		if n > p.bySource[busiest] {
			busiest = other
		}
	}
	if !own && p.bySource[busiest] > p.bySource[source]+1 {
		return of(busiest)
	}
	i := max(of(source), 0)
	if i >= len(p.held) || now.Sub(p.held[i].since) < p.limits.Patience {
		return -1
	}
	return i
}

func (p *Places) drop(i int) {
	h := p.held[i]
	p.held = slices.Delete(p.held, i, i+1)
	if p.bySource[h.source]--; p.bySource[h.source] == 0 {
		delete(p.bySource, h.source)
	}
}

// Leave gives the place up; it may be called more than once.
func (h *Place) Leave() {
	h.set.mu.Lock()
	defer h.set.mu.Unlock()
	if i := slices.Index(h.set.held, h); i >= 0 {
		h.set.drop(i)
	}
}

// Len is how many places are held.
func (p *Places) Len() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.held)
}

// Source is where a connection comes from: an IPv4 address, or the /64 network of an
// IPv6 one, of which a host has as many as it likes.
func Source(address net.Addr) string {
	return SourceOf(address.String())
}

// SourceOf is Source of an address that is written down, as http.Request.RemoteAddr is.
func SourceOf(address string) string {
	port, err := netip.ParseAddrPort(address)
	if err != nil {
		return address
	}
	host := port.Addr().Unmap().WithZone("")
	if host.Is6() {
		network, _ := host.Prefix(64)
		return network.String()
	}
	return host.String()
}
