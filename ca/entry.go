package ca

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/selector"
)

const maxHosts = 4096

// ServiceEntry is the id of the entry that follows from a service.
func ServiceEntry(name string) string { return "service/" + name }

// GatewayEntry is the id of the entry that follows from a gateway.
func GatewayEntry(name string) string { return "gateway/" + name }

// DeclaredPrefix begins the id of every entry that is declared by itself.
const DeclaredPrefix = "entry/"

const (
	maxEntryName = 200
	maxHint      = 1 << 10
	maxDNSNames  = 16
	maxFederates = 64
)

// CheckDeclared refuses an entry, declared by itself, that takes what belongs to
// others: an id outside DeclaredPrefix, a reserved path or role, a service's name. It
// also asks CheckEntry.
func CheckDeclared(td spiffeid.TrustDomain, e *statev1.Entry, longest time.Duration) error {
	if err := CheckEntryID(e.GetId()); err != nil {
		return err
	}
	if Reserved(e.GetPath()) {
		return fmt.Errorf("SPIFFE path %q is reserved: nothing declared may stand at or below %s", e.GetPath(), ReservedPath)
	}
	if e.GetRole() != statev1.Role_ROLE_UNSPECIFIED {
		return errors.New("a role follows from a Gateway, or from a Service with edge: true: declare one")
	}
	if len(e.GetHint()) > maxHint {
		return fmt.Errorf("hint has %d bytes, over %d", len(e.GetHint()), maxHint)
	}
	if n := len(e.GetDnsNames()); n > maxDNSNames {
		return fmt.Errorf("%d DNS names, over %d", n, maxDNSNames)
	}
	for _, name := range e.GetDnsNames() {
		if !dnsName(name) {
			return fmt.Errorf("%.80q is not a DNS name in lower case", name)
		}
		if name == td.Name() || strings.HasSuffix(name, "."+td.Name()) {
			return fmt.Errorf("DNS name %s is reserved: names below %s belong to services", name, td.Name())
		}
	}
	if n := len(e.GetFederatesWith()); n > maxFederates {
		return fmt.Errorf("federates with %d trust domains, over %d", n, maxFederates)
	}
	for _, name := range e.GetFederatesWith() {
		if other, err := ParseTrustDomain(name); err != nil {
			return err
		} else if other == td {
			return errors.New("an entry federates with other trust domains only")
		}
	}
	return CheckEntry(td, e, longest)
}

// CheckEntryID refuses what cannot be the id of an entry declared by itself: entry/
// and then labels with slashes between, as in entry/batch/nightly.
func CheckEntryID(id string) error {
	name, ok := strings.CutPrefix(id, DeclaredPrefix)
	switch {
	case !ok:
		return fmt.Errorf("entry id %.80q does not begin with %s: other ids follow from services and gateways, change those", id, DeclaredPrefix)
	case len(name) > maxEntryName:
		return fmt.Errorf("entry id %.80q... has over %d bytes", id, maxEntryName)
	}
	for part := range strings.SplitSeq(name, "/") {
		if err := CheckLabel(part); err != nil {
			return fmt.Errorf("entry id %.80q: %w", id, err)
		}
	}
	return nil
}

// Canonical puts an entry's sets in order, so that equal entries are equal records.
func Canonical(e *statev1.Entry) {
	for _, list := range []*[]string{&e.Hosts, &e.Selectors, &e.DnsNames, &e.FederatesWith, &e.NodeSelectors} {
		if !isSet(*list) {
			*list = sortedSet(*list)
		}
	}
}

// isSet tells whether a list is in order and has nothing twice.
func isSet(list []string) bool {
	for i := 1; i < len(list); i++ {
		if list[i-1] >= list[i] {
			return false
		}
	}
	return true
}

// EntriesFor derives the registration entries that follow from an object of the
// catalogue: one from a Service, one from a Gateway, none from others. peers are the
// trust domains that the gateways serve; only a gateway's entry federates (I6).
// longest bounds what a service may ask as the life of its SVIDs. The result
// depends on nothing but the arguments; revision is left zero.
func EntriesFor(td spiffeid.TrustDomain, obj *statev1.Object, peers []string, longest time.Duration) ([]*statev1.Entry, error) {
	var e *statev1.Entry
	switch kind := obj.GetKind().(type) {
	case *statev1.Object_Service:
		s := kind.Service
		e = &statev1.Entry{
			Id:              ServiceEntry(s.GetName()),
			Path:            s.GetPath(),
			Hosts:           sortedSet(s.GetHosts()),
			Selectors:       sortedSet(s.GetSelectors()),
			X509SvidSeconds: s.GetX509SvidSeconds(),
			JwtSvidSeconds:  s.GetJwtSvidSeconds(),
			WitSvidSeconds:  s.GetWitSvidSeconds(),
			Hint:            s.GetHint(),
		}
		if s.GetEdge() {
			e.Role = statev1.Role_ROLE_EDGE
		}
		if err := CheckLabel(s.GetName()); err != nil {
			return nil, err
		}
		if Reserved(e.Path) {
			return nil, fmt.Errorf("SPIFFE path %q is reserved: nothing declared may stand at or below %s", e.Path, ReservedPath)
		}
		// Who only calls needs no name that others would dial.
		if name := ServiceName(s.GetName(), td); s.GetPort() != 0 && dnsName(name) {
			e.DnsNames = []string{name}
		}
	case *statev1.Object_Gateway:
		g := kind.Gateway
		e = &statev1.Entry{
			Id:            GatewayEntry(g.GetName()),
			Path:          GatewayPath(g.GetName()),
			Hosts:         sortedSet(g.GetHosts()),
			Selectors:     sortedSet(g.GetSelectors()),
			FederatesWith: slices.DeleteFunc(sortedSet(peers), func(p string) bool { return p == td.Name() }),
			Role:          statev1.Role_ROLE_GATEWAY,
		}
		if err := CheckLabel(g.GetName()); err != nil {
			return nil, err
		}
	default:
		return nil, nil
	}
	if err := CheckEntry(td, e, longest); err != nil {
		return nil, err
	}
	return []*statev1.Entry{e}, nil
}

// CheckEntry refuses an entry that could not be signed for, or that could be held by
// a process nobody meant.
func CheckEntry(td spiffeid.TrustDomain, e *statev1.Entry, longest time.Duration) error {
	if _, err := ID(td, e.GetPath()); err != nil {
		return err
	}
	if len(e.GetHosts()) == 0 {
		return errors.New("no host: name the agents that may hold this identity")
	}
	if len(e.GetHosts()) > maxHosts {
		return fmt.Errorf("%d hosts, over %d", len(e.GetHosts()), maxHosts)
	}
	for _, host := range e.GetHosts() {
		if err := CheckLabel(host); err != nil {
			return fmt.Errorf("host: %w", err)
		}
	}
	if err := selector.Check(e.GetSelectors()); err != nil {
		return err
	}
	if err := selector.CheckNode(e.GetNodeSelectors()); err != nil {
		return err
	}
	if n := e.GetX509SvidSeconds(); n != 0 {
		if life := time.Duration(n) * time.Second; life < MinSVIDLife || life > longest {
			return fmt.Errorf("X.509-SVID life %v is not between %v and the domain's phase %v", life, MinSVIDLife, longest)
		}
	}
	for _, token := range []struct {
		name    string
		seconds uint32
		most    time.Duration
	}{{"JWT-SVID", e.GetJwtSvidSeconds(), min(MaxJWTSVID, longest)}, {"WIT-SVID", e.GetWitSvidSeconds(), min(MaxWITSVID, longest)}} {
		if life := time.Duration(token.seconds) * time.Second; life != 0 && (life < MinSVIDLife || life > token.most) {
			return fmt.Errorf("%s life %v is not between %v and %v", token.name, life, MinSVIDLife, token.most)
		}
	}
	return CheckHint(e.GetHint())
}

// MaxHint is the length of the longest hint, in bytes (Workload API 5.2.1).
const MaxHint = 1024

// CheckHint tells whether a hint can be shown to a workload and in a table. An empty
// one is none.
func CheckHint(hint string) error {
	if len(hint) > MaxHint || !utf8.ValidString(hint) || strings.ContainsFunc(hint, unicode.IsControl) {
		return fmt.Errorf("hint %.40q is not text of at most %d bytes on one line", hint, MaxHint)
	}
	return nil
}

// JWTLife is how long an entry's JWT-SVIDs live.
func JWTLife(e *statev1.Entry, l Lifetimes) time.Duration {
	return tokenLife(e.GetJwtSvidSeconds(), l.JWTSVID, MaxJWTSVID)
}

// WITLife is how long an entry's WIT-SVIDs live.
func WITLife(e *statev1.Entry, l Lifetimes) time.Duration {
	return tokenLife(e.GetWitSvidSeconds(), l.WITSVID, MaxWITSVID)
}

func tokenLife(seconds uint32, domains, most time.Duration) time.Duration {
	if seconds != 0 {
		domains = time.Duration(seconds) * time.Second
	}
	return min(domains, most)
}

// SVIDLife is how long an entry's SVIDs live.
func SVIDLife(e *statev1.Entry, l Lifetimes) time.Duration {
	if n := e.GetX509SvidSeconds(); n != 0 && int64(n) < math.MaxInt64/int64(time.Second) {
		return time.Duration(n) * time.Second
	}
	return l.X509SVID
}

func sortedSet(list []string) []string {
	if len(list) == 0 {
		return nil
	}
	return slices.Compact(slices.Sorted(slices.Values(list)))
}
