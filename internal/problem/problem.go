// Package problem writes refusals as responses: as an RFC 9457 problem for HTTP, as a
// trailers-only response for gRPC.
//
// A caller learns the reason, a request id and what to do next.
// It never learns the rule, the bundle or the revision behind the answer: those
// go to the refuser's own log (invariant I11).
package problem

import (
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/entente-mesh/entente/internal/refusal"
)

// Header names the reason on every response that Entente made itself, so that
// the hop before can tell a refusal of the mesh from an answer of the application.
const Header = "Entente-Refused"

// TypePrefix stands before the reason in a problem's "type".
const TypePrefix = "urn:entente:refused:"

// Problem is one refusal, as its receiver sees it. All its texts may be read by
// a foreign caller: put no rule, revision or address into them.
type Problem struct {
	Reason    refusal.Reason
	Detail    string // about this occurrence; may be empty
	RequestID string
	Next      string // empty: the table's advice

	// RetryAfter is written as Retry-After, rounded up to whole seconds; for
	// [refusal.Rate] at least 1 s is always written.
	RetryAfter time.Duration
	// Challenge holds parameters for WWW-Authenticate of a 401 after the scheme:
	// `realm="trading"`. Empty: `realm="entente"`.
	Challenge string
}

type body struct {
	Type      string `json:"type"`
	Title     string `json:"title"`
	Status    int    `json:"status"`
	Detail    string `json:"detail,omitempty"`
	RequestID string `json:"request_id,omitempty"`
	Next      string `json:"next,omitempty"`
}

// maxDetail bounds what is echoed to a caller.
const maxDetail = 512

// Error lets a refusal travel as an error through code that has no response at
// hand.
func (p Problem) Error() string {
	if p.Detail == "" {
		return fmt.Sprintf("refused: %s: %s", p.Reason, p.Reason.Title())
	}
	return fmt.Sprintf("refused: %s: %s", p.Reason, p.Detail)
}

// MarshalJSON writes the problem in the form of RFC 9457.
func (p Problem) MarshalJSON() ([]byte, error) {
	return json.Marshal(body{
		Type:      TypePrefix + string(p.Reason),
		Title:     p.Reason.Title(),
		Status:    p.Reason.Status(),
		Detail:    bounded(p.Detail),
		RequestID: p.RequestID,
		Next:      p.next(),
	})
}

func (p Problem) next() string {
	if p.Next != "" {
		return bounded(p.Next)
	}
	return p.Reason.Next()
}

func bounded(s string) string {
	if len(s) > maxDetail {
		return strings.ToValidUTF8(s[:maxDetail], "") + "..."
	}
	return s
}

// Write answers r with the problem. A gRPC request gets a trailers-only response:
// HTTP 200 with grpc-status and grpc-message as headers and no body, which every
// gRPC client understands. Everything else gets application/problem+json with the
// table's status; HEAD gets the same without a body.
//
// Write must come before anything else was written to w. It overwrites the
// headers it needs and leaves others alone.
func (p Problem) Write(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set(Header, string(p.Reason))
	if p.RequestID != "" {
		h.Set("X-Request-Id", p.RequestID)
	}
	h.Set("Cache-Control", "no-store")
	if seconds := p.retryAfter(); seconds > 0 {
		h.Set("Retry-After", strconv.FormatInt(seconds, 10))
	}
	if p.Reason.Status() == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", p.challenge())
	}
	h.Del("Content-Encoding")
	h.Del("Trailer")

	if IsGRPC(r) {
		h.Set("Content-Type", "application/grpc")
		h.Set("Grpc-Status", strconv.FormatUint(uint64(p.Reason.GRPC()), 10))
		h.Set("Grpc-Message", percentEncode(p.message()))
		h.Del("Content-Length")
		w.WriteHeader(http.StatusOK)
		return
	}
	data, err := json.Marshal(p)
	if err != nil { // a struct of strings and numbers always marshals
		data = []byte("{}")
	}
	data = append(data, '\n')
	h.Set("Content-Type", "application/problem+json")
	h.Set("Content-Length", strconv.Itoa(len(data)))
	w.WriteHeader(p.Reason.Status())
	if r.Method != http.MethodHead {
		// The caller may be gone; whoever serves the connection notices.
		_, _ = w.Write(data)
	}
}

// IsGRPC reports whether r is a gRPC call: "application/grpc", alone or with a
// "+subtype" or parameters, but not the unrelated "application/grpc-web".
func IsGRPC(r *http.Request) bool {
	const grpc = "application/grpc"
	ct := r.Header.Get("Content-Type")
	if len(ct) < len(grpc) || !strings.EqualFold(ct[:len(grpc)], grpc) {
		return false
	}
	rest := ct[len(grpc):]
	return rest == "" || rest[0] == '+' || rest[0] == ';' || rest[0] == ' '
}

// FromHeader returns the reason that a response's header carries. False: the
// header is absent, stands there more than once or names no reason of the table,
// so the response is not one of the mesh.
func FromHeader(h http.Header) (refusal.Reason, bool) {
	values := h[Header]
	if len(values) != 1 {
		return "", false
	}
	r := refusal.Reason(values[0])
	return r, r.Known()
}

func (p Problem) message() string {
	s := string(p.Reason) + ": " + p.Reason.Title()
	if p.Detail != "" {
		s += " " + bounded(p.Detail)
	}
	if p.RequestID != "" {
		s += " (request " + p.RequestID + ")"
	}
	return s
}

func (p Problem) retryAfter() int64 {
	if p.RetryAfter <= 0 {
		if p.Reason == refusal.Rate {
			return 1
		}
		return 0
	}
	return int64(math.Ceil(p.RetryAfter.Seconds()))
}

// challenge is the WWW-Authenticate value of RFC 6750, section 3: the error
// attribute only where a token was sent.
func (p Problem) challenge() string {
	params := p.Challenge
	if params == "" {
		params = `realm="entente"`
	}
	switch p.Reason {
	case refusal.TokenInvalid:
		params += `, error="invalid_token"`
	case refusal.TokenExpired:
		params += `, error="invalid_token", error_description="the token has expired"`
	}
	return "Bearer " + params
}

// percentEncode encodes a grpc-message: bytes outside printable ASCII, and "%".
func percentEncode(s string) string {
	const hex = "0123456789ABCDEF"
	plain := true
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' || s[i] == '%' {
			plain = false
			break
		}
	}
	if plain {
		return s
	}
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '%' {
			b.WriteByte('%')
			b.WriteByte(hex[c>>4])
			b.WriteByte(hex[c&15])
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}
