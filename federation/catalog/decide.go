package catalog

import (
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/federation"
	"github.com/entente-mesh/entente/internal/refusal"
)

// Query is one request, or one that might be made.
type Query struct {
	Caller spiffeid.ID // who made it, by the strongest evidence at hand
	Target string      // service name; a Host will do
	Method string      // case-sensitive
	Path   string      // as it was sent, escapes and all, without the query

	// Peer is the verified TLS peer that handed the request over; zero at the
	// caller's own sidecar, which attested the calling process itself.
	Peer spiffeid.ID
	Now  time.Time

	TCP bool // a connection whose content nobody looks at; it has neither method nor path

	Content bool // the request has content, or may have
}

// Decision is the answer to a Query. Reason may be told to the caller; Rule,
// Source, Revision and Detail are for the decider's own log (I11).
type Decision struct {
	Allowed  bool
	Reason   refusal.Reason // empty if allowed
	Rule     string         // key of the object that allowed it, or came nearest to: "Agreement/trading-reads-balances"
	Source   string         // where that object was declared
	Revision uint64         // of that object
	Detail   string         // why it was refused
}

// Step is one rule that was considered.
type Step struct {
	Rule     string
	Source   string
	Revision uint64
	Matched  bool
	Why      string // why it did or did not match
}

// Explanation is a decision with everything that was considered on the way.
type Explanation struct {
	Decision
	Steps []Step
}

// Decide is the one place where a request is allowed. What no rule allows is
// refused:
//
//   - A caller of this domain reaches an own service, or an import, that its entry's
//     calls name (everything visible if it has none); an import only if an agreement
//     with its domain lists the caller, the service, the method and the path as well.
//   - A caller of another domain reaches an own service that is exported to its
//     domain and listed by an agreement with it. It never reaches an import.
//   - The TLS peer speaks for itself, or is an own gateway; or it is a gateway of the
//     caller's domain that the allowing agreement names. Gateways, agents and CA
//     nodes are never callers.
//   - Content on GET, HEAD, OPTIONS, DELETE and TRACE reaches only an own service that
//     says that it takes it.
//
// Decide does not allocate when it allows a path without escapes. It is safe for
// concurrent use and depends on nothing but its arguments.
func (t *Tables) Decide(q Query) Decision { return t.decide(&q, nil) }

// Explain decides as Decide does and tells every rule that was considered.
func (t *Tables) Explain(q Query) Explanation {
	var steps trace
	decision := t.decide(&q, &steps)
	return Explanation{decision, steps}
}

// trace collects steps; a nil *trace collects nothing.
type trace []Step

func (tr *trace) add(s Step) {
	if tr != nil {
		*tr = append(*tr, s)
	}
}

// refuse says no before any rule came near, with one step that tells why.
func (tr *trace) refuse(what string, reason refusal.Reason, detail string) Decision {
	tr.add(Step{Rule: what, Why: detail})
	return Decision{Reason: reason, Detail: detail}
}

func (t *Tables) decide(q *Query, tr *trace) Decision {
	var path string
	if !q.TCP {
		if !validMethod(q.Method) {
			return tr.refuse("request", refusal.BadRequest, "the method is not a token")
		}
		var why string
		if path, why = cleanPath(q.Path); why != "" {
			return tr.refuse("request", refusal.BadRequest, why)
		}
	}
	if q.Caller.IsZero() || q.Caller.Path() == "" {
		return tr.refuse("caller", refusal.CallerUnknown, "the request has no caller")
	}
	if reason, detail := t.mayHandOver(q.Peer, q.Caller); reason != "" {
		return tr.refuse("peer", reason, detail)
	}
	target, known := t.Resolve(q.Target)
	var d Decision
	if q.Caller.MemberOf(t.td) {
		d = t.decideOwn(q, target, known, path, tr)
	} else {
		d = t.decideForeign(q, target, known, path, tr)
	}
	if d.Allowed && q.Content && !target.takesContent(q.Method) {
		return tr.refuse("content", refusal.Content, "content on "+q.Method+", which the service does not say that it takes")
	}
	return d
}

// takesContent tells whether a request by this method may have content. An application
// that does not expect any leaves it unread on the connection, where it is taken for the
// next request. What another domain serves, that domain decides.
func (t Target) takesContent(method string) bool {
	if t.Import() || t.Service.AnyContent {
		return true
	}
	// Methods are case-sensitive; some frameworks do not know that.
	for _, without := range [...]string{"GET", "HEAD", "OPTIONS", "DELETE", "TRACE"} {
		if strings.EqualFold(method, without) {
			return false
		}
	}
	return true
}

// mayHandOver says whether the TLS peer may speak for the caller at all. Whether a
// peer gateway is one of the allowing agreement's is looked at with the agreement.
func (t *Tables) mayHandOver(peer, caller spiffeid.ID) (refusal.Reason, string) {
	own := caller.MemberOf(t.td)
	switch {
	case peer.IsZero():
		if !own {
			return refusal.PeerNotAllowed, "a local application cannot be a caller of another domain"
		}
	case peer.MemberOf(t.td):
		if peer != caller && !t.IsOwnGateway(peer) {
			return refusal.PeerNotAllowed, "the TLS peer is neither the caller nor a gateway of this domain"
		}
	case own:
		return refusal.PeerNotAllowed, "a peer of another domain speaks for a caller of this one"
	case peer.TrustDomain() != caller.TrustDomain():
		return refusal.PeerNotAllowed, "a peer of one domain speaks for a caller of another"
	case !t.IsPeerGateway(peer):
		return refusal.GatewayNotAgreed, "no agreement names the TLS peer as a gateway, or no relationship with its domain exists"
	}
	return "", ""
}

func (t *Tables) decideOwn(q *Query, target Target, known bool, path string, tr *trace) Decision {
	caller, ok := t.callers[q.Caller.Path()]
	if !ok {
		return tr.refuse("caller", refusal.CallerUnknown, "no Service of this domain has the caller's identity")
	}
	if !known {
		if name, ok := canonicalHost(q.Target); ok {
			if _, domain, ok := splitServiceName(name); ok && t.related(domain) {
				return tr.refuse("target", refusal.NotImported, "no Import names the service")
			}
		}
		return tr.refuse("target", refusal.UnknownService, "neither a Service nor an Import has this name")
	}
	key := caller.objectKey
	if caller.calls != nil {
		if _, listed := caller.calls[target.Name]; !listed {
			const why = "calls does not list the service"
			tr.add(Step{key, caller.Source, caller.Revision, false, why})
			return Decision{Reason: refusal.CallerCalls, Rule: key, Source: caller.Source, Revision: caller.Revision, Detail: why}
		}
	}
	if tr != nil {
		why := "calls lists the service"
		if caller.calls == nil {
			why = "calls is not restricted"
		}
		tr.add(Step{key, caller.Source, caller.Revision, true, why})
	}
	if target.TCP != q.TCP {
		return tr.refuse("protocol", refusal.Protocol, mismatch(q.TCP))
	}
	if !target.Import() {
		return Decision{Allowed: true, Rule: key, Source: caller.Source, Revision: caller.Revision}
	}
	if !t.related(target.TrustDomain.Name()) {
		return tr.refuse("relationship", refusal.AgreementMissing, "no Relationship with the service's domain exists")
	}
	return decideRules(t.calling[target.Name], q, path, false, tr)
}

func (t *Tables) decideForeign(q *Query, target Target, known bool, path string, tr *trace) Decision {
	domain := q.Caller.TrustDomain().Name()
	// What a foreign caller may not see does not exist for it: one answer for all.
	switch {
	case !known:
		return tr.refuse("target", refusal.UnknownService, "no Service has this name")
	case target.Import():
		return tr.refuse("target", refusal.UnknownService, "the service is an import; what came from another domain is never passed on to a third")
	case !target.Service.exported(domain):
		return tr.refuse("target", refusal.UnknownService, "the service is not exported to the caller's domain")
	case !t.related(domain):
		return tr.refuse("relationship", refusal.AgreementMissing, "no Relationship with the caller's domain exists")
	case target.TCP != q.TCP:
		return tr.refuse("protocol", refusal.Protocol, mismatch(q.TCP))
	}
	atDoor := !q.Peer.MemberOf(t.td)
	return decideRules(t.serving[export{domain, target.Service.Label}], q, path, atDoor, tr)
}

// mismatch is refused before any rule is asked: an HTTP service behind a connection that
// nobody looks into would be free of its rules on methods and paths.
func mismatch(tcp bool) string {
	if tcp {
		return "a TCP connection for a service that speaks HTTP"
	}
	return "an HTTP request for a service that speaks TCP"
}

// How far a rule agreed with a request; the furthest is reported.
const (
	notConsidered = iota
	callerDiffers
	requestDiffers
	gatewayDiffers
	isExpired
	agrees
)

var outcomes = [...]struct {
	reason refusal.Reason
	why    string
}{
	notConsidered:  {refusal.AgreementMissing, "no agreement lists the service"},
	callerDiffers:  {refusal.AgreementCaller, "callers does not list the caller"},
	requestDiffers: {refusal.AgreementMethod, "http does not list the method and path"},
	gatewayDiffers: {refusal.GatewayNotAgreed, "gateways does not list the TLS peer"},
	isExpired:      {refusal.AgreementExpired, "the agreement has expired"},
	agrees:         {"", "it lists caller, service, method and path"},
}

func decideRules(rules []rule, q *Query, path string, atDoor bool, tr *trace) Decision {
	furthest, best := notConsidered, (*agreement)(nil)
	for i := range rules {
		r := &rules[i]
		far := r.compare(q, path, atDoor)
		tr.add(Step{r.agreement.key, r.agreement.source, r.agreement.revision, far == agrees, outcomes[far].why})
		if far > furthest {
			furthest, best = far, r.agreement
		}
		if far == agrees && tr == nil {
			break
		}
	}
	d := Decision{Allowed: furthest == agrees, Reason: outcomes[furthest].reason}
	if best != nil {
		d.Rule, d.Source, d.Revision = best.key, best.source, best.revision
	}
	if !d.Allowed {
		d.Detail = outcomes[furthest].why
		if best == nil {
			tr.add(Step{Rule: "agreement", Why: d.Detail})
		}
	}
	return d
}

// compare says how far the rule agrees. It grows only when the rule lists more.
func (r *rule) compare(q *Query, path string, atDoor bool) int {
	if !r.listsCaller(q.Caller.Path()) {
		return callerDiffers
	}
	if q.TCP && len(r.http) > 0 || !q.TCP && !r.listsRequest(q.Method, path) {
		return requestDiffers
	}
	if atDoor {
		if _, listed := r.agreement.gateways[q.Peer]; !listed {
			return gatewayDiffers
		}
	}
	if federation.Expired(r.agreement.expires, q.Now) {
		return isExpired
	}
	return agrees
}

func (r *rule) listsCaller(path string) bool {
	for i := range r.callers {
		if r.callers[i].Match(path) {
			return true
		}
	}
	return false
}

func (r *rule) listsRequest(method, path string) bool {
	for i := range r.http {
		if r.http[i].matches(method, path) {
			return true
		}
	}
	return len(r.http) == 0
}
