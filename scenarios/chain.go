package scenarios

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

// record is one access record of an agent, gateway or edge.
type record struct {
	Time               time.Time `json:"time"`
	Hop                string    `json:"hop"`
	Process            string    `json:"process"`
	RequestID          string    `json:"request_id"`
	Caller             string    `json:"caller"`
	Peer               string    `json:"peer"`
	Service            string    `json:"service"`
	Status             int       `json:"status"`
	Reason             string    `json:"reason"`
	Rule               string    `json:"rule"`
	Revision           uint64    `json:"revision"`
	Upstream           string    `json:"upstream"`
	UpstreamAddress    string    `json:"upstream_address"`
	UpstreamDatacenter string    `json:"upstream_datacenter"`
	Attempts           int       `json:"attempts"`
	Outcome            string    `json:"outcome"`
	DurationMS         float64   `json:"duration_ms"`

	unit *unit // whose file it stands in
}

func (r record) began() time.Time {
	return r.Time.Add(-time.Duration(r.DurationMS * float64(time.Millisecond)))
}

// records reads the access records of all processes that keep says yes to. A last
// line without its end is being written just now and is left out.
func (w *world) records(keep func(*record) bool) ([]record, error) {
	var all []record
	for _, u := range w.units {
		if u.access == "" {
			continue
		}
		data, err := os.ReadFile(u.access)
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read the access records of %s: %w", u.name, err)
		}
		list, err := parseRecords(data, keep)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", u.access, err)
		}
		for i := range list {
			list[i].unit = u
		}
		all = append(all, list...)
	}
	slices.SortStableFunc(all, func(a, b record) int { return a.began().Compare(b.began()) })
	return all, nil
}

func parseRecords(data []byte, keep func(*record) bool) ([]record, error) {
	var list []record
	whole := data[:bytes.LastIndexByte(data, '\n')+1]
	lines := bufio.NewScanner(bytes.NewReader(whole))
	lines.Buffer(nil, 1<<20)
	for n := 1; lines.Scan(); n++ {
		line := lines.Bytes()
		// A process that was killed in the middle of a write leaves a broken line;
		// the next one appends to it.
		if i := bytes.LastIndex(line, []byte(`{"time":`)); i > 0 {
			line = line[i:]
		}
		var r record
		if err := json.Unmarshal(line, &r); err != nil {
			return nil, fmt.Errorf("line %d is no access record: %w", n, err)
		}
		if keep(&r) {
			list = append(list, r)
		}
	}
	return list, lines.Err()
}

// tlsLeg is one mutually authenticated connection on the way of a request, as its two
// ends recorded it.
type tlsLeg struct {
	Dialler, Server *unit
	From            string // who the server verified that the dialler is
	To              string // who the dialler verified that the server is
	Service         string
}

// legsOf puts the two ends of each TLS leg together: the record of the dialler, which
// names the address that it dialled and the identity it verified there, and the
// record of the process that listens at that address. A leg that only its dialler
// recorded has no From.
func legsOf(records []record, at func(address string) *unit) []tlsLeg {
	var legs []tlsLeg
	used := make([]bool, len(records))
	for _, dialler := range records {
		if !strings.HasPrefix(dialler.Upstream, "spiffe://") {
			continue
		}
		leg := tlsLeg{Dialler: dialler.unit, Server: at(dialler.UpstreamAddress), To: dialler.Upstream, Service: dialler.Service}
		for i, server := range records {
			if !used[i] && leg.Server != nil && server.unit == leg.Server && server.Service == dialler.Service &&
				server.Hop != "outbound" && server.Hop != "edge" {
				used[i], leg.From = true, server.Peer
				break
			}
		}
		legs = append(legs, leg)
	}
	return legs
}

// listener returns the unit whose door is at an address.
func (p *plan) listener(address string) *unit {
	i := slices.IndexFunc(p.units, func(u *unit) bool { return u.door == address })
	if i < 0 {
		return nil
	}
	return p.units[i]
}
