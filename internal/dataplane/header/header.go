// Package header holds what the mesh says in HTTP headers between its hops, and
// the hygiene that keeps everybody else from saying it.
//
// The order at every hop is: remove what Connection nominates and the other
// hop-by-hop fields ([RemoveHop]), read what this peer may say, remove the
// protected names ([RemoveProtected]), write our own last.
package header

import (
	"net/http"
	"net/textproto"
	"strings"

	"golang.org/x/net/http/httpguts"
)

// Headers of the mesh, in canonical form.
const (
	Caller    = "Entente-Caller"     // SPIFFE ID of the original caller; from gateways only
	Via       = "Entente-Via"        // gateways passed, "td/dc/name" each
	TimeoutMS = "Entente-Timeout-Ms" // what is left of the request's deadline
	Attempt   = "Entente-Attempt"    // 1 for a first attempt of the hop before
	Tried     = "Entente-Tried"      // datacenter whose instances the hop before, an own sidecar, would rather not ask again

	Refused = "Entente-Refused" // response: typed reason; set by internal/problem
	Outcome = "Entente-Outcome" // response: NotSent or Unknown

	RequestID  = "X-Request-Id"
	ClientCert = "X-Forwarded-Client-Cert"
)

// Values of Outcome: may the hop before send the request again elsewhere?
const (
	NotSent = "not-sent" // the application has certainly not seen it
	Unknown = "unknown"  // it may have
)

// TCP is what a connection is upgraded to that carries the bytes of a TCP service.
const TCP = "entente-tcp"

const (
	prefix     = "entente-"
	clientCert = "x-forwarded-client-cert"
	rfc9440    = "client-cert" // and Client-Cert-Chain: the standard's form of the same
)

// Protected reports whether a field name belongs to the mesh. Case does not
// count and "_" is "-": many a server behind CGI conventions sees no difference.
func Protected(name string) bool {
	return hasFold(name, prefix) || len(name) == len(clientCert) && hasFold(name, clientCert) ||
		hasFold(name, rfc9440) && (len(name) == len(rfc9440) || len(name) == len(rfc9440)+len("-chain") && hasFold(name[len(rfc9440):], "-chain"))
}

// hasFold reports whether s begins with the lower-case want, with "_" taken as "-".
func hasFold(s, want string) bool {
	if len(s) < len(want) {
		return false
	}
	for i := range len(want) {
		c := s[i]
		switch {
		case 'A' <= c && c <= 'Z':
			c += 'a' - 'A'
		case c == '_':
			c = '-'
		}
		if c != want[i] {
			return false
		}
	}
	return true
}

// RemoveProtected deletes every protected name but those in keep (canonical form).
// It serves headers and trailers alike.
func RemoveProtected(h http.Header, keep ...string) {
names:
	for name := range h {
		if !Protected(name) {
			continue
		}
		for _, k := range keep {
			if name == k {
				continue names
			}
		}
		delete(h, name)
	}
}

// hopByHop are RFC 9110 section 7.6.1 and its forerunners. Te is handled apart.
var hopByHop = []string{
	"Connection",
	"Keep-Alive",
	"Proxy-Authenticate",
	"Proxy-Authorization",
	"Proxy-Connection",
	"Te",
	"Trailer",
	"Transfer-Encoding",
	"Upgrade",
}

// RemoveHop deletes what Connection nominates, then the hop-by-hop fields.
// "TE: trailers" survives, as gRPC needs it (RFC 9110 section 10.1.4).
func RemoveHop(h http.Header) {
	for _, line := range h["Connection"] {
		for name := range strings.SplitSeq(line, ",") {
			if name = textproto.TrimString(name); name != "" {
				h.Del(name)
				delete(h, name)
			}
		}
	}
	trailers := httpguts.HeaderValuesContainsToken(h["Te"], "trailers")
	for _, name := range hopByHop {
		delete(h, name)
	}
	if trailers {
		h["Te"] = []string{"trailers"}
	}
}

// Upgrade returns the protocol a request or response switches to, lower-case,
// or "" if Connection does not say "upgrade". Ask before RemoveHop.
func Upgrade(h http.Header) string {
	if !httpguts.HeaderValuesContainsToken(h["Connection"], "upgrade") {
		return ""
	}
	return strings.ToLower(h.Get("Upgrade"))
}

// IsGRPC reports whether the content type is gRPC's (not gRPC-Web's).
func IsGRPC(h http.Header) bool {
	rest, ok := strings.CutPrefix(h.Get("Content-Type"), "application/grpc")
	return ok && (rest == "" || rest[0] == '+' || rest[0] == ';')
}

// IsBrowser reports whether a browser sent this: those headers cannot be set by
// a page's script, and no other client of ours sends them.
func IsBrowser(h http.Header) bool {
	for name := range h {
		if strings.HasPrefix(name, "Sec-Fetch-") {
			return true
		}
	}
	return false
}
