// Package refusal holds the one table of reasons for which Entente refuses or
// fails a request. Package internal/problem writes them as responses.
package refusal

import "slices"

// Reason is one row of the table. Reasons are a stable, documented interface:
// one is never renamed and its codes never change.
type Reason string

// The reasons, in the order of [All].
const (
	BadRequest   Reason = "bad-request"
	Browser      Reason = "browser"
	NoRoute      Reason = "no-route"
	TokenMissing Reason = "token-missing"
	TokenInvalid Reason = "token-invalid"
	TokenExpired Reason = "token-expired"
	TierUnknown  Reason = "tier-unknown"
	Rate         Reason = "rate"

	UnknownService Reason = "unknown-service"
	NotImported    Reason = "not-imported"
	CallerUnknown  Reason = "caller-unknown"
	CallerCalls    Reason = "caller-calls"
	PeerNotAllowed Reason = "peer-not-allowed"
	Protocol       Reason = "protocol"
	Content        Reason = "content"

	GatewayNotAgreed Reason = "gateway-not-agreed"
	AgreementMissing Reason = "agreement-missing"
	AgreementCaller  Reason = "agreement-caller"
	AgreementMethod  Reason = "agreement-method"
	AgreementExpired Reason = "agreement-expired"

	NotReady               Reason = "not-ready"
	NoEndpoint             Reason = "no-endpoint"
	UpstreamUnreachable    Reason = "upstream-unreachable"
	UpstreamOutcomeUnknown Reason = "upstream-outcome-unknown"
	Timeout                Reason = "timeout"
	Loop                   Reason = "loop"
)

// Row is what the table says about one reason.
type Row struct {
	Reason Reason
	Status int    // HTTP status
	GRPC   uint32 // gRPC status code
	Title  string // one short sentence, the same for every occurrence (RFC 9457, 3.1.3)
	Next   string // what the caller, or whoever looks after it, does about it
}

// gRPC status codes that the table uses (google.rpc.Code).
const (
	grpcDeadlineExceeded   = 4
	grpcPermissionDenied   = 7
	grpcResourceExhausted  = 8
	grpcFailedPrecondition = 9
	grpcUnimplemented      = 12
	grpcInternal           = 13
	grpcUnavailable        = 14
	grpcUnauthenticated    = 16
)

var table = []Row{
	{BadRequest, 400, grpcInternal, "The request is malformed or ambiguous.", "Send a well-formed request: a method token, and a path without \"..\", \"//\", encoded slashes or control characters."},
	{Browser, 403, grpcPermissionDenied, "Requests made by a browser are not forwarded.", "Call from the application itself; the mesh never acts for a web page."},
	{NoRoute, 404, grpcUnimplemented, "No route leads there.", "Compare the path with the routes of this entrance."},
	{TokenMissing, 401, grpcUnauthenticated, "A bearer token is required.", "Send \"Authorization: Bearer TOKEN\"."},
	{TokenInvalid, 401, grpcUnauthenticated, "The bearer token is not valid here.", "Obtain a token from the issuer and for the audience of this entrance."},
	{TokenExpired, 401, grpcUnauthenticated, "The bearer token has expired.", "Obtain a new token; compare the clocks if it was new."},
	{TierUnknown, 403, grpcPermissionDenied, "The token's tier has no plan here.", "Ask for a tier that this entrance serves."},
	{Rate, 429, grpcResourceExhausted, "The rate of requests is over its limit.", "Wait as long as Retry-After says."},

	{UnknownService, 421, grpcUnimplemented, "No such service is known here.", "Call a service by LABEL.TRUSTDOMAIN, as its domain declares it."},
	{NotImported, 403, grpcPermissionDenied, "The service is not imported into this domain.", "Apply an Import of the service, then an agreement that lists the caller."},
	{CallerUnknown, 403, grpcPermissionDenied, "The caller is not a service of this domain.", "Declare a Service with the caller's identity; gateways and agents are never callers."},
	{CallerCalls, 403, grpcPermissionDenied, "The caller's entry does not list this service.", "Add the service to \"calls\" of the calling Service."},
	{PeerNotAllowed, 403, grpcPermissionDenied, "The connection's peer may not speak for this caller.", "Only a gateway speaks for others; connect with the caller's own SVID."},
	{Protocol, 421, grpcFailedPrecondition, "The service does not speak this protocol.", "Call a TCP service at its own port and the address that its name resolves to, an HTTP service by HTTP."},
	{Content, 400, grpcInternal, "This method takes no content here.", "Send no body with GET, HEAD, OPTIONS, DELETE or TRACE; if the application reads such bodies, its Service says \"http: {content: any}\"."},

	{GatewayNotAgreed, 403, grpcPermissionDenied, "The peer gateway is not listed by the agreement.", "List the gateway's exact SPIFFE ID in the agreement."},
	{AgreementMissing, 403, grpcPermissionDenied, "No agreement is about this service.", "Both domains apply an agreement that lists the service."},
	{AgreementCaller, 403, grpcPermissionDenied, "No agreement lists this caller.", "Both domains add the caller to the agreement."},
	{AgreementMethod, 403, grpcPermissionDenied, "The agreement does not list this method and path.", "Both domains add the method and path to the agreement."},
	{AgreementExpired, 403, grpcPermissionDenied, "The agreement has expired.", "Both domains renew the agreement."},

	{NotReady, 503, grpcUnavailable, "This process is not ready yet.", "Try again in a moment; /readyz of its admin listener says what it waits for."},
	{NoEndpoint, 503, grpcUnavailable, "No instance of the service can be reached now.", "See which instances are known and healthy: entente ca status --json."},
	{UpstreamUnreachable, 502, grpcUnavailable, "No connection could be made; nothing was sent.", "Trying again is safe."},
	{UpstreamOutcomeUnknown, 502, grpcUnavailable, "The connection broke after the request was sent; its outcome is unknown.", "Find out whether it took effect before trying again; an Idempotency-Key lets the mesh try for you."},
	{Timeout, 504, grpcDeadlineExceeded, "The deadline passed before an answer came.", "Find out whether it took effect before trying again."},
	{Loop, 508, grpcFailedPrecondition, "The request came by here before.", "See the path it took in the access records, by its request id."},
}

var rows = func() map[Reason]Row {
	m := make(map[Reason]Row, len(table))
	for _, row := range table {
		m[row.Reason] = row
	}
	return m
}()

// All returns the table in its documented order.
func All() []Row { return slices.Clone(table) }

// Known reports whether r stands in the table.
func (r Reason) Known() bool { _, ok := rows[r]; return ok }

// Status is the HTTP status of r; 500 if r is not in the table.
func (r Reason) Status() int {
	if row, ok := rows[r]; ok {
		return row.Status
	}
	return 500
}

// GRPC is the gRPC status code of r; INTERNAL if r is not in the table.
func (r Reason) GRPC() uint32 {
	if row, ok := rows[r]; ok {
		return row.GRPC
	}
	return grpcInternal
}

// Title is the sentence that every refusal for r has in common.
func (r Reason) Title() string {
	if row, ok := rows[r]; ok {
		return row.Title
	}
	return "The request failed."
}

// Next is the advice that every refusal for r has in common; empty if r is not in the table.
func (r Reason) Next() string { return rows[r].Next }
