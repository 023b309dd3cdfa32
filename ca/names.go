package ca

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Length limits of SPIFFE-ID section 2.3, in bytes. go-spiffe does not check them.
const (
	MaxID          = 2048
	MaxTrustDomain = 255
)

// Paths below ReservedPath are given only to what the domain itself runs.
const (
	ReservedPath       = "/entente"
	BundleEndpointPath = "/entente/bundle-endpoint"
)

// NodePath is the SPIFFE path of the CA node with that name.
func NodePath(name string) string { return "/entente/ca/" + name }

// AgentPath is the SPIFFE path of the agent with that name.
func AgentPath(name string) string { return "/entente/agent/" + name }

// GatewayPath is the SPIFFE path of the gateway with that name.
func GatewayPath(name string) string { return "/entente/gateway/" + name }

// Reserved tells whether a SPIFFE path is below ReservedPath, which no service
// may claim.
func Reserved(path string) bool { return AtOrBelow(path, ReservedPath) }

// AtOrBelow compares SPIFFE paths by whole segments: /team/payments is not below
// /team/pay.
func AtOrBelow(path, prefix string) bool {
	below, ok := strings.CutPrefix(path, prefix)
	return ok && (below == "" || below[0] == '/')
}

// CheckLabel refuses what is not one DNS label in lower case: letters, digits and
// inner hyphens, at most 63. Services, datacenters, CA nodes, agents and gateways
// are named by one.
func CheckLabel(s string) error {
	switch {
	case s == "":
		return errors.New("name is empty: one DNS label is needed, as in accounts")
	case len(s) > 63:
		return fmt.Errorf("name %.70q is longer than the 63 characters of a DNS label", s)
	case s[0] == '-' || s[len(s)-1] == '-':
		return fmt.Errorf("name %q begins or ends with a hyphen", s)
	}
	for i := range len(s) {
		if c := s[i]; !lowerAlphanumeric(c) && c != '-' {
			return fmt.Errorf("name %q is not one DNS label: %q is not a lower-case letter, digit or hyphen", s, rune(c))
		}
	}
	return nil
}

// ParseTrustDomain reads the name of a trust domain, without a scheme.
func ParseTrustDomain(s string) (spiffeid.TrustDomain, error) {
	if len(s) > MaxTrustDomain {
		return spiffeid.TrustDomain{}, fmt.Errorf("trust domain %.40q... has %d bytes, over the %d that SPIFFE allows", s, len(s), MaxTrustDomain)
	}
	if strings.Contains(s, ":") || strings.Contains(s, "/") {
		return spiffeid.TrustDomain{}, fmt.Errorf("trust domain %q must be a bare name, as in banking.example", s)
	}
	td, err := spiffeid.TrustDomainFromString(s)
	if err != nil {
		return spiffeid.TrustDomain{}, fmt.Errorf("trust domain %q: %w", s, err)
	}
	return td, nil
}

// CheckPath refuses what is not a non-empty SPIFFE path that begins with "/"
// (SPIFFE-ID section 2.2).
func CheckPath(path string) error {
	if path == "" {
		return errors.New("SPIFFE path is empty: it begins with a slash, as in /accounts")
	}
	if len(path) > MaxID {
		return fmt.Errorf("SPIFFE path %.40q... has %d bytes, over %d", path, len(path), MaxID)
	}
	if err := spiffeid.ValidatePath(path); err != nil {
		return fmt.Errorf("SPIFFE path %q: %w", path, err)
	}
	return nil
}

// ID puts a SPIFFE ID together and keeps it within the limits of SPIFFE-ID
// section 2.3. path may not be empty.
func ID(td spiffeid.TrustDomain, path string) (spiffeid.ID, error) {
	if td.IsZero() {
		return spiffeid.ID{}, errors.New("trust domain is missing")
	}
	if err := CheckPath(path); err != nil {
		return spiffeid.ID{}, err
	}
	id, err := spiffeid.FromPath(td, path)
	if err != nil {
		return spiffeid.ID{}, err
	}
	if err := checkIDLength(id); err != nil {
		return spiffeid.ID{}, err
	}
	return id, nil
}

func checkIDLength(id spiffeid.ID) error {
	if n := len(id.TrustDomain().Name()); n > MaxTrustDomain {
		return fmt.Errorf("trust domain %.40q... has %d bytes, over %d", id.TrustDomain().Name(), n, MaxTrustDomain)
	}
	if n := len(id.String()); n > MaxID {
		return fmt.Errorf("SPIFFE ID %.60q... has %d bytes, over %d", id.String(), n, MaxID)
	}
	return nil
}

// ServiceName is the name by which callers know a service: NAME.TRUSTDOMAIN.
func ServiceName(label string, td spiffeid.TrustDomain) string {
	return label + "." + td.Name()
}

// dnsName tells whether s may stand in a certificate as a DNS name. Trust domains
// may hold underscores and be longer than a DNS name.
func dnsName(s string) bool {
	if len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if CheckLabel(label) != nil {
			return false
		}
	}
	return true
}

// CheckAddress refuses what is not HOST:PORT with a host that is an IP address or
// a DNS name and a port from 1 to 65535.
func CheckAddress(address string) error {
	host, port, ok := splitAddress(address)
	if !ok {
		return fmt.Errorf("address %.80q is not of the form HOST:PORT", address)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return fmt.Errorf("address %.80q: port is not between 1 and 65535", address)
	}
	if err := CheckHost(host); err != nil {
		return fmt.Errorf("address %.80q: %w", address, err)
	}
	return nil
}

// splitAddress parts HOST:PORT and [IPV6]:PORT.
func splitAddress(address string) (host, port string, ok bool) {
	i := strings.LastIndexByte(address, ':')
	if i < 0 {
		return "", "", false
	}
	host, port = address[:i], address[i+1:]
	if bare, bracket := strings.CutPrefix(host, "["); bracket {
		return strings.TrimSuffix(bare, "]"), port, strings.HasSuffix(bare, "]") && strings.Contains(bare, ":")
	}
	return host, port, !strings.ContainsAny(host, ":]")
}

// CheckHost refuses what is neither an IP address nor a DNS name in lower case.
func CheckHost(host string) error {
	if ip, err := netip.ParseAddr(host); (err != nil || ip.Zone() != "") && !dnsName(host) {
		return fmt.Errorf("host %.80q is neither an IP address nor a DNS name in lower case", host)
	}
	return nil
}

func lowerAlphanumeric(c byte) bool {
	return 'a' <= c && c <= 'z' || '0' <= c && c <= '9'
}
