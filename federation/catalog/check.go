package catalog

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/federation"
)

// label checks a DNS label (RFC 1123, lower case).
func (c *compiler) label(what, s string) bool {
	if why := badLabel(s); why != "" {
		c.fail("", "%s %q %s", what, s, why)
		return false
	}
	return true
}

func badLabel(s string) string {
	switch {
	case s == "":
		return "is missing"
	case len(s) > 63:
		return "is longer than 63 letters"
	case s[0] == '-' || s[len(s)-1] == '-':
		return "begins or ends with \"-\""
	}
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return "may hold only a-z, 0-9 and \"-\""
		}
	}
	return ""
}

func (c *compiler) datacenter(what, name string) bool {
	if !c.label(what, name) {
		return false
	}
	if c.datacenters != nil && !slices.Contains(c.datacenters, name) {
		fix := "known: " + strings.Join(c.datacenters, ", ")
		if near := didYouMean(name, c.datacenters); near != "" {
			fix = near
		}
		c.fail(fix, "%s: there is no datacenter %q", what, name)
		return false
	}
	return true
}

// domain checks the name of another trust domain.
func (c *compiler) domain(what, name string) (spiffeid.TrustDomain, bool) {
	td, err := spiffeid.TrustDomainFromString(name)
	switch {
	case name == "":
		c.fail("", "%s names no trust domain", what)
	case err != nil || strings.Contains(name, "/"):
		c.fail("write it as in banking.example", "%s %q is not a trust domain name", what, name)
	case len(name) > 255-64:
		c.fail("", "%s: the trust domain name is too long for service names below it", what)
	case td == c.tables.td:
		c.fail("", "%s names this domain itself", what)
	default:
		return td, true
	}
	return spiffeid.TrustDomain{}, false
}

func (c *compiler) port(what string, port uint32) {
	if port > 65535 {
		c.fail("", "%s %d is outside 1 to 65535", what, port)
	}
}

// protocol checks what is spoken at a port.
func (c *compiler) protocol(p statev1.Protocol, port uint32) {
	switch {
	case p != statev1.Protocol_PROTOCOL_UNSPECIFIED && p != statev1.Protocol_PROTOCOL_TCP:
		c.fail("upgrade what reads this", "protocol %d is not one that this release knows", p)
	case p == statev1.Protocol_PROTOCOL_TCP && port == 0:
		c.fail("give it a port", "it speaks TCP and has no port: nothing else says which service a connection is for")
	}
}

// address checks host:port; a foreign one may not lead back into our own hosts.
func (c *compiler) address(what, address string, foreign bool) bool {
	colon := strings.LastIndexByte(address, ':')
	if address == "" || colon < 0 {
		c.fail("write host:port", "%s %q is not host:port", what, address)
		return false
	}
	host, port := address[:colon], address[colon+1:]
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || strconv.FormatUint(n, 10) != port {
		c.fail("", "%s %q: the port is outside 1 to 65535", what, address)
		return false
	}
	bare, bracketed := strings.CutPrefix(host, "[")
	if bracketed {
		bare, bracketed = strings.CutSuffix(bare, "]")
	}
	ip, err := netip.ParseAddr(bare)
	switch {
	case bracketed != strings.Contains(host, ":"), bracketed && err != nil:
		c.fail("an IPv6 address stands in brackets, as in [2001:db8::1]:7443", "%s %q is not host:port", what, address)
		return false
	case err == nil && ip.Zone() != "":
		c.fail("", "%s %q has a zone, which means something else on every host", what, address)
		return false
	case err == nil && (ip.IsUnspecified() || ip.IsMulticast()):
		c.fail("write the address that others dial", "%s %q cannot be dialled", what, address)
		return false
	case err != nil && !hostName(bare):
		c.fail("", "%s %q: the host is neither an IP address nor a DNS name", what, address)
		return false
	}
	return !foreign || c.foreignHost(what, bare)
}

// foreignHost checks a host that another domain named: an IP address now, a name's
// addresses again at each dial.
func (c *compiler) foreignHost(what, host string) bool {
	ip, err := netip.ParseAddr(host)
	if err != nil {
		name := strings.TrimSuffix(strings.ToLower(host), ".")
		if (name == "localhost" || strings.HasSuffix(name, ".localhost")) && !c.tables.allowLoopback {
			c.fail("", "%s %q is this host itself, which a peer domain may not name", what, host)
			return false
		}
		return true
	}
	if err := checkForeignAddr(ip, c.tables.allowLoopback); err != nil {
		c.fail("only a cluster made with dev may do that, for loopback", "%s: %v", what, err)
		return false
	}
	return true
}

// checkForeignAddr is CheckAddr with the same exception, for what an agreement names.
func checkForeignAddr(addr netip.Addr, allowLoopback bool) error {
	if allowLoopback && addr.Unmap().IsLoopback() {
		return nil
	}
	return federation.CheckAddr(addr)
}

// hostName accepts DNS names. One whose last label is a number is refused: some
// resolvers read 127.1 or 2130706433 as an IPv4 address.
func hostName(s string) bool {
	s = strings.TrimSuffix(s, ".")
	if s == "" || len(s) > 253 {
		return false
	}
	last := ""
	for label := range strings.SplitSeq(strings.ToLower(s), ".") {
		if badLabel(label) != "" {
			return false
		}
		last = label
	}
	return strings.Trim(last, "0123456789") != "" && !strings.HasPrefix(last, "0x")
}

// splitServiceName parts LABEL.TRUSTDOMAIN; both parts are non-empty.
func splitServiceName(name string) (label, domain string, ok bool) {
	label, domain, ok = strings.Cut(name, ".")
	return label, domain, ok && label != "" && domain != ""
}
