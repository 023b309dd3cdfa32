// Package federation holds the rules between two trust domains, each small enough
// to test alone: which state of a relationship may follow which, when a peer's
// bundle replaces the one before, which callers a pattern means, when an agreement
// is over, and which addresses a peer may name.
//
// The package is pure: time arrives as an argument and nothing is kept.
package federation

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// State is where a relationship with another trust domain stands.
type State uint8

// A relationship is Proposed until both administrators have compared and typed
// back the words of the invitation, or the bundle was given by hand. Suspended is
// a pause that both sides survive; Ended is final: trust begins again only with a
// new relationship.
const (
	Proposed State = iota + 1
	Active
	Suspended
	Ended
)

func (s State) String() string {
	switch s {
	case Proposed:
		return "proposed"
	case Active:
		return "active"
	case Suspended:
		return "suspended"
	case Ended:
		return "ended"
	default:
		return fmt.Sprintf("state %d", uint8(s))
	}
}

// Trusts reports whether gateways hold the peer's bundle in this state.
func (s State) Trusts() bool { return s == Active }

// To returns nil if next may follow s. A state may always be followed by itself,
// so that a repeated command succeeds.
func (s State) To(next State) error {
	if s < Proposed || s > Ended || next < Proposed || next > Ended {
		return fmt.Errorf("a relationship cannot go from %s to %s: not a state", s, next)
	}
	switch {
	case s == next,
		s == Proposed && (next == Active || next == Ended),
		s == Active && (next == Suspended || next == Ended),
		s == Suspended && (next == Active || next == Ended):
		return nil
	case s == Ended:
		return errors.New("the relationship has ended; propose a new one")
	default:
		return fmt.Errorf("a relationship cannot go from %s to %s", s, next)
	}
}

// Verdict is the answer to "may this bundle replace that one".
type Verdict uint8

const (
	// Accepted: it is newer, or the first one.
	Accepted Verdict = iota + 1
	// Unchanged: it is the one already held; nothing is to be written.
	Unchanged
	// Older: its sequence is lower, so it is refused and an alarm is due (I8).
	Older
	// Conflicting: it has the same sequence and other contents, so one of the two
	// is not what the peer's administrators believe; refused, and an alarm is due.
	Conflicting
	// Foreign: it is another domain's.
	Foreign
)

// AcceptBundle decides whether next replaces old, the last accepted bundle of the
// same trust domain; old is nil if there is none.
//
// A sequence of 0 means that the endpoint publishes none (it is optional in the
// SPIFFE Trust Domain and Bundle specification, 4.1.2). Between two bundles without
// one, the later fetched replaces the earlier; once a domain has shown a sequence,
// a bundle without one is Older.
//
// A bundle that is given by hand replaces one of the same sequence, and is replaced by what is
// fetched next with the same sequence (Federation 4.2). The one whose hash an operator has
// named in a reset replaces any.
//
// What was kept below feature level 5 is a part of what was fetched; the whole of the same
// sequence replaces it.
func AcceptBundle(old, next *statev1.ForeignBundle) Verdict {
	switch {
	case old == nil:
		return Accepted
	case old.GetTrustDomain() != next.GetTrustDomain():
		return Foreign
	case old.GetResetSha256() != "" && BundleHash(next.GetJwks()) == old.GetResetSha256():
		return Accepted
	case next.GetSequence() < old.GetSequence():
		return Older
	case next.GetSequence() > old.GetSequence():
		return Accepted
	case next.GetAsFetched() && !old.GetAsFetched():
		return Accepted
	case old.GetGiven() && !next.GetGiven():
		return Accepted
	case bytes.Equal(old.GetJwks(), next.GetJwks()):
		return Unchanged
	case next.GetSequence() == 0, next.GetGiven():
		return Accepted
	default:
		return Conflicting
	}
}

// Err is nil for Accepted and Unchanged, and says what is wrong otherwise.
func (v Verdict) Err() error {
	switch v {
	case Accepted, Unchanged:
		return nil
	case Older:
		return errors.New("the bundle's sequence is lower than the accepted one's, and never goes back")
	case Conflicting:
		return errors.New("the bundle differs from the accepted one of the same sequence; ask the peer's administrators which is theirs")
	case Foreign:
		return errors.New("the bundle belongs to another trust domain")
	default:
		return fmt.Errorf("unknown verdict %d", uint8(v))
	}
}

// BundleHash names a bundle to people: the SHA-256, in hex, of what our strict writer makes of
// it without its refresh hint, so that formatting does not count.
func BundleHash(jwks []byte) string { return fmt.Sprintf("%x", sha256.Sum256(jwks)) }

// RefusedBundle says why next cannot replace old, and what an operator can do about it; nil
// if it can. The hash is of next.
func RefusedBundle(old, next *statev1.ForeignBundle) error {
	verdict := AcceptBundle(old, next)
	switch verdict {
	case Older, Conflicting:
		return fmt.Errorf("sequence %d after %d: %w. If the peer was set up again or restored, ask its administrators whether the hash of their bundle is this one "+
			"(entente ca bundle --sha256 there), then: entente federation reset %s --bundle-sha256 %s",
			next.GetSequence(), old.GetSequence(), verdict.Err(), next.GetTrustDomain(), BundleHash(next.GetJwks()))
	default:
		return verdict.Err()
	}
}

// Expired reports whether something that expires at the given Unix second is over
// at now: from that second on, it is. Zero is over: nothing lasts for ever by
// omission.
func Expired(expires int64, now time.Time) bool {
	return expires <= 0 || now.Unix() >= expires
}

// CheckAddr returns nil if a peer domain may name addr as its own. Loopback,
// link-local, unspecified and multicast addresses would lead back into the host,
// its metadata services or to nobody in particular. It is asked when an agreement
// is compiled, also by Apply: it must not change within a feature level. CheckDial,
// which is asked at each dial, may become stricter at any time.
func CheckAddr(addr netip.Addr) error {
	ip := addr.Unmap()
	kind := ""
	switch {
	case !ip.IsValid():
		kind = "not an IP address"
	case ip.IsLoopback():
		kind = "a loopback address"
	case ip.IsLinkLocalUnicast():
		kind = "a link-local address"
	case ip.IsMulticast():
		kind = "a multicast address"
	case ip.IsUnspecified() || ip.Is4() && ip.As4()[0] == 0: // 0.0.0.0/8 is "this host"
		kind = "an unspecified address"
	case ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		kind = "the broadcast address"
	default:
		if v4, hidden := embeddedIPv4(ip); hidden {
			return CheckAddr(v4)
		}
		return nil
	}
	return fmt.Errorf("%s is %s, which a peer domain may not name", addr, kind)
}

// CheckDial returns nil if a connection to address (an IP address and port, after any
// look-up of a name) may be opened because another domain named it: the one rule for
// bundle endpoints and gateways. It asks CheckAddr for the address and for each IPv4
// address that the notations of IPv6 transition techniques hide in it. loopback is the
// exception of development clusters, whose nodes listen on loopback only.
func CheckDial(address string, loopback bool) error {
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("%q is not an IP address and port", address)
	}
	ip := at.Addr().Unmap()
	if loopback && ip.IsLoopback() {
		return nil
	}
	if err := CheckAddr(ip); err != nil {
		return err
	}
	if slices.Contains(metadataAddrs, ip.WithZone("")) {
		return fmt.Errorf("%s is a cloud's metadata service, which a peer domain may not name", ip)
	}
	if v4, hidden := transitionIPv4(ip); hidden {
		if err := CheckAddr(v4); err != nil {
			return fmt.Errorf("%s stands for an IPv4 address: %w", ip, err)
		}
	}
	return nil
}

// metadataAddrs are metadata services of clouds that are not at a link-local address.
var metadataAddrs = []netip.Addr{netip.MustParseAddr("fd00:ec2::254"), netip.MustParseAddr("fd20:ce::254")}

// transitionIPv4 unwraps the notations beyond those of embeddedIPv4: 6to4 (2002::/16, RFC
// 3056), NAT64 with the prefix for local use (64:ff9b:1::/48, RFC 8215, with 32 bits at
// the end), Teredo (2001::/32, RFC 4380), IPv4-translated (::ffff:0:0:0/96, RFC 2765) and
// ISATAP (RFC 5214). A NAT64 prefix of a site's own cannot be known here.
func transitionIPv4(ip netip.Addr) (netip.Addr, bool) {
	if !ip.Is6() {
		return netip.Addr{}, false
	}
	b := ip.As16()
	last := [4]byte(b[12:])
	begins := func(prefix ...byte) bool { return bytes.HasPrefix(b[:], prefix) }
	switch isatap := [4]byte(b[8:12]); {
	case begins(0x20, 0x02):
		return netip.AddrFrom4([4]byte(b[2:6])), true
	case begins(0x20, 0x01, 0, 0):
		return netip.AddrFrom4([4]byte{^last[0], ^last[1], ^last[2], ^last[3]}), true
	case begins(0, 0x64, 0xff, 0x9b, 0, 1), begins(0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0),
		isatap == [4]byte{0, 0, 0x5e, 0xfe}, isatap == [4]byte{2, 0, 0x5e, 0xfe}:
		return netip.AddrFrom4(last), true
	}
	return netip.Addr{}, false
}

// embeddedIPv4 unwraps the notations in which an IPv6 address stands for an IPv4
// one: IPv4-compatible (::/96) and the NAT64 prefix (64:ff9b::/96, RFC 6052).
func embeddedIPv4(ip netip.Addr) (netip.Addr, bool) {
	if !ip.Is6() {
		return netip.Addr{}, false
	}
	b := ip.As16()
	prefix := [12]byte(b[:12])
	nat64 := [12]byte{0, 0x64, 0xff, 0x9b}
	if prefix != ([12]byte{}) && prefix != nat64 {
		return netip.Addr{}, false
	}
	return netip.AddrFrom4([4]byte(b[12:])), true
}
