// Package names gives every service that a host may call an address of its own on
// loopback, the same one after every restart, and answers DNS questions for them.
//
// An address follows from the service's name alone, and from what was given before
// when two names want the same one; so two agents that know the same services mostly
// agree, and one agent agrees with itself always.
package names

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/entente-mesh/entente/internal/daemon"
)

// DefaultNetwork is where services stand unless the agent's file says otherwise.
var DefaultNetwork = netip.MustParsePrefix("127.80.0.0/16")

// maxNames are given addresses; more are not, and say so.
const maxNames = 16384

// Table is which service has which address. Its methods may be called concurrently.
type Table struct {
	network netip.Prefix
	file    string
	domains []string // beside those of services: of which unknown names are denied
	log     *slog.Logger

	mu    sync.RWMutex
	given map[string]netip.Addr // by service name, also of services that are gone
	taken map[netip.Addr]string
	known map[string]netip.Addr // of services there are
	zones map[string]bool       // trust domains that are answered for
}

// CheckNetwork refuses what is not a /16 of loopback.
func CheckNetwork(p netip.Prefix) error {
	if !p.IsValid() || p.Bits() != 16 || !p.Addr().Is4() || !p.Addr().IsLoopback() || p.Masked() != p {
		return fmt.Errorf("%v is not a /16 of loopback, as %v is", p, DefaultNetwork)
	}
	return nil
}

// Open takes up the addresses that were given before, which stand in file. domain is
// the own trust domain; log may be nil.
func Open(network netip.Prefix, file, domain string, log *slog.Logger) (*Table, error) {
	if err := CheckNetwork(network); err != nil {
		return nil, err
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	t := &Table{network: network, file: file, domains: []string{domain}, log: log, given: map[string]netip.Addr{}, taken: map[netip.Addr]string{}}
	t.publish(nil)
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return t, nil
	}
	if err != nil {
		return nil, err
	}
	stored := map[string]netip.Addr{}
	if err := json.Unmarshal(text, &stored); err != nil {
		return nil, fmt.Errorf("%s cannot be read; without it services may get other addresses: mend or remove it: %w", file, err)
	}
	for _, name := range slices.Sorted(maps.Keys(stored)) {
		if addr := stored[name]; t.free(addr) {
			t.given[name], t.taken[addr] = addr, name
		}
	}
	return t, nil
}

// free tells whether an address may be given. The first 256 are the agent's own, and
// no address ends in 0 or 255.
func (t *Table) free(addr netip.Addr) bool {
	if !t.network.Contains(addr) || t.taken[addr] != "" {
		return false
	}
	b := addr.As4()
	return b[2] != 0 && b[3] != 0 && b[3] != 255
}

// Assign says which services there are now, by service name, and returns their
// addresses. What was given before stays, also to services that come back later.
func (t *Table) Assign(services []string) map[string]netip.Addr {
	t.mu.Lock()
	defer t.mu.Unlock()
	known := map[string]netip.Addr{}
	news := false
	for _, name := range slices.Sorted(slices.Values(services)) {
		addr, ok := t.given[name]
		if !ok {
			if addr, ok = t.pick(name, services); !ok {
				t.log.Error("there are more services than addresses; this one has none", "service", name)
				continue
			}
			t.given[name], t.taken[addr] = addr, name
			news = true
		}
		known[name] = addr
	}
	t.publish(known)
	if news {
		text, err := json.Marshal(t.given)
		if err == nil {
			err = daemon.WriteFileAtomic(t.file, text, 0o600)
		}
		if err != nil {
			t.log.Error("after a restart services may have other addresses", "error", err)
		}
	}
	return maps.Clone(known)
}

// pick chooses an address. When very many names have come and gone, those that are
// gone give theirs up.
func (t *Table) pick(name string, services []string) (netip.Addr, bool) {
	if len(t.given) >= maxNames {
		for old, addr := range t.given {
			if !slices.Contains(services, old) {
				delete(t.given, old)
				delete(t.taken, addr)
			}
		}
		if len(t.given) >= maxNames {
			return netip.Addr{}, false
		}
	}
	sum := sha256.Sum256([]byte(name))
	start := binary.BigEndian.Uint16(sum[:])
	b := t.network.Addr().As4()
	for i := range 1 << 16 {
		binary.BigEndian.PutUint16(b[2:], start+uint16(i))
		if addr := netip.AddrFrom4(b); t.free(addr) {
			return addr, true
		}
	}
	return netip.Addr{}, false
}

// publish makes known what is answered.
func (t *Table) publish(known map[string]netip.Addr) {
	t.known = known
	t.zones = map[string]bool{}
	for _, domain := range t.domains {
		t.zones[domain] = true
	}
	for name := range known {
		if _, domain, ok := strings.Cut(name, "."); ok {
			t.zones[domain] = true
		}
	}
}

// lookup finds a name in lower case. zone is the trust domain it is of, empty if
// nothing is known of that one here.
func (t *Table) lookup(name string) (addr netip.Addr, zone string) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if addr, ok := t.known[name]; ok {
		_, zone, _ = strings.Cut(name, ".")
		return addr, zone
	}
	for rest := name; rest != ""; {
		if t.zones[rest] {
			return netip.Addr{}, rest
		}
		_, rest, _ = strings.Cut(rest, ".")
	}
	return netip.Addr{}, ""
}

// reverse finds the service at an address; ok tells whether the address is of the network.
func (t *Table) reverse(addr netip.Addr) (name string, ok bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	name = t.taken[addr]
	if t.known[name] != addr {
		name = ""
	}
	return name, t.network.Contains(addr)
}
