package header

import (
	"errors"
	"fmt"
	"strings"
)

// MaxVia is how many gateways a request may pass. Trading's and banking's, in
// two datacenters each, make four.
const MaxVia = 4

// Hop names one gateway: where it stands and what it is called there.
type Hop struct{ TrustDomain, Datacenter, Name string }

// String is the form of the Via header: "banking.example/dc1/gw-dc1".
func (h Hop) String() string { return h.TrustDomain + "/" + h.Datacenter + "/" + h.Name }

var errVia = errors.New("a comma-separated list of trustdomain/datacenter/gateway is expected")

// ParseVia reads the values of an Entente-Via header. It accepts more than
// MaxVia hops (the loop rule refuses those) up to 16.
func ParseVia(values []string) ([]Hop, error) {
	if len(values) == 0 {
		return nil, nil
	}
	hops := make([]Hop, 0, MaxVia)
	for _, value := range values {
		for part := range strings.SplitSeq(value, ",") {
			td, rest, ok := strings.Cut(strings.TrimSpace(part), "/")
			dc, name, ok2 := strings.Cut(rest, "/")
			if !ok || !ok2 || !word(td) || !word(dc) || !word(name) {
				return nil, fmt.Errorf("%s %q: %w", Via, part, errVia)
			}
			if len(hops) == 16 {
				return nil, fmt.Errorf("%s: more than 16 hops", Via)
			}
			hops = append(hops, Hop{td, dc, name})
		}
	}
	return hops, nil
}

// word accepts what trust domains, datacenters and gateways are named with.
func word(s string) bool {
	if s == "" || len(s) > 255 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if !('a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '.' || c == '_') {
			return false
		}
	}
	return true
}

// FormatVia is the inverse of ParseVia.
func FormatVia(hops []Hop) string {
	var b strings.Builder
	for i, h := range hops {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(h.String())
	}
	return b.String()
}

// Loops reports whether a request that came through via must not pass self: self
// or another gateway of its datacenter was passed already, or the way is at its longest.
func Loops(via []Hop, self Hop) bool {
	if len(via) >= MaxVia {
		return true
	}
	for _, h := range via {
		if h.TrustDomain == self.TrustDomain && h.Datacenter == self.Datacenter {
			return true
		}
	}
	return false
}
