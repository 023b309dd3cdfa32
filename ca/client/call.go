package client

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/internal/secret"
)

const (
	callTimeout = 5 * time.Second // of one call to one node
	signBatch   = 100             // the most a SignX509Request may hold

	exporterLabel = "EXPORTER-entente-join" // as in statev1.JoinStatement
	exporterSize  = 32
)

// Attestation is the CA's answer: who the host is now, and whom to believe.
type Attestation struct {
	Certificates [][]byte // DER, leaf first
	Bundle       []byte   // SPIFFE bundle of the own domain, JSON
	Members      []*statev1.Member
	Cluster      *statev1.Cluster
	Agent        *statev1.Agent
}

// Attest asks CA nodes one after the other to admit the key of csr (PKCS#10,
// DER). prove makes what the host shows, a request without csr. It is called once per
// connection with its 32-byte TLS exporter, so that a proof is worth nothing on another
// connection. An empty request asks by the key, which was admitted before. The error is
// ErrDenied when a node refused and none admitted, else ErrUnreachable.
func Attest(ctx context.Context, cfg Config, prove func(exporter []byte) (*ententev1.AttestRequest, error), csr []byte) (*Attestation, error) {
	c, err := New(cfg)
	if err != nil {
		return nil, err
	}
	var answer *ententev1.AttestResponse
	err = c.anyNode(ctx, func(ctx context.Context, conn *conn) error {
		exporter, err := conn.state.ExportKeyingMaterial(exporterLabel, nil, exporterSize)
		if err != nil {
			return fmt.Errorf("cannot bind the proof to the connection: %w", err)
		}
		request, err := prove(exporter)
		if err != nil {
			return err
		}
		request.Csr = csr
		answer, err = ententev1.NewAttestClient(conn.rpc).Attest(ctx, request)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("cannot attest to the CA of %s: %w", cfg.TrustDomain.Name(), err)
	}
	if got := answer.GetCluster().GetTrustDomain(); got != cfg.TrustDomain.Name() {
		return nil, fmt.Errorf("cannot attest to the CA of %s: %w: it answers for trust domain %q", cfg.TrustDomain.Name(), errRefused, got)
	}
	return &Attestation{
		Certificates: answer.GetCertificates(),
		Bundle:       answer.GetBundle(),
		Members:      answer.GetMembers(),
		Cluster:      answer.GetCluster(),
		Agent:        answer.GetAgent(),
	}, nil
}

// Record names an entry as the asker holds it: a CA node that holds another one refuses
// with ErrChanged.
type Record struct {
	Hash     [32]byte // ca.RecordHash
	Revision uint64
}

// RecordOf is the record of an entry.
func RecordOf(e *statev1.Entry) Record { return Record{ca.RecordHash(e), e.GetRevision()} }

// bytes is the hash as it is sent; the zero value names nothing.
func (r Record) bytes() []byte {
	if r == (Record{}) {
		return nil
	}
	return r.Hash[:]
}

// SignRequest asks for one X.509-SVID.
type SignRequest struct {
	EntryID string // empty: the agent's own SVID
	Record  Record
	CSR     []byte // PKCS#10, DER; only its key is used
}

// SignResult is the answer to one SignRequest.
type SignResult struct {
	Certificates [][]byte // DER, leaf first
	Err          error    // ErrDenied when the CA has no such entry for this host; ErrChanged
}

// SignX509 has SVIDs signed, in batches of at most 100. The results stand in the
// order of the requests; one that no node answered has ErrUnreachable.
func (c *Client) SignX509(ctx context.Context, requests []SignRequest) []SignResult {
	results := make([]SignResult, 0, len(requests))
	for len(results) < len(requests) {
		batch := requests[len(results):min(len(results)+signBatch, len(requests))]
		results = append(results, c.signBatch(ctx, batch)...)
	}
	return results
}

func (c *Client) signBatch(ctx context.Context, batch []SignRequest) []SignResult {
	request := &ententev1.SignX509Request{}
	for _, r := range batch {
		request.Requests = append(request.Requests, &ententev1.X509Request{EntryId: r.EntryID, Csr: r.CSR, Record: r.Record.bytes(), EntryRevision: r.Record.Revision})
	}
	results := make([]SignResult, len(batch))
	err := c.anyNode(ctx, func(ctx context.Context, conn *conn) error {
		answer, err := ententev1.NewSignClient(conn.rpc).SignX509(ctx, request)
		if err != nil {
			return err
		}
		if len(answer.GetResults()) != len(batch) {
			return fmt.Errorf("%d results for %d requests", len(answer.GetResults()), len(batch))
		}
		for i, r := range answer.GetResults() {
			results[i] = SignResult{Certificates: r.GetCertificates(), Err: itemError(r)}
		}
		return nil
	})
	if err != nil {
		for i := range results {
			results[i] = SignResult{Err: err}
		}
	}
	return results
}

// JWTRequest asks for one JWT-SVID.
type JWTRequest struct {
	EntryID  string
	Record   Record
	Audience []string // at least one
}

// WITRequest asks for one WIT-SVID.
type WITRequest struct {
	EntryID string
	Record  Record
	CSR     []byte // PKCS#10, DER; its key becomes the token's
}

// TokenResult is the answer to one JWTRequest or WITRequest.
type TokenResult struct {
	Token secret.Text // JWS, compact; not verified
	Err   error       // ErrDenied when the CA has no such entry for this host; ErrChanged; see RetryAfter
}

// SignJWT has JWT-SVIDs signed, in batches of at most 100, as SignX509 does.
func (c *Client) SignJWT(ctx context.Context, requests []JWTRequest) []TokenResult {
	return signTokens(ctx, c, requests, func(ctx context.Context, sign ententev1.SignClient, batch []JWTRequest) ([]*ententev1.TokenResult, error) {
		request := &ententev1.SignJWTRequest{}
		for _, r := range batch {
			request.Requests = append(request.Requests, &ententev1.JWTRequest{EntryId: r.EntryID, Audience: r.Audience, Record: r.Record.bytes(), EntryRevision: r.Record.Revision})
		}
		answer, err := sign.SignJWT(ctx, request)
		return answer.GetResults(), err
	})
}

// SignWIT has WIT-SVIDs signed, in batches of at most 100, as SignX509 does.
func (c *Client) SignWIT(ctx context.Context, requests []WITRequest) []TokenResult {
	return signTokens(ctx, c, requests, func(ctx context.Context, sign ententev1.SignClient, batch []WITRequest) ([]*ententev1.TokenResult, error) {
		request := &ententev1.SignWITRequest{}
		for _, r := range batch {
			request.Requests = append(request.Requests, &ententev1.WITRequest{EntryId: r.EntryID, Csr: r.CSR, Record: r.Record.bytes(), EntryRevision: r.Record.Revision})
		}
		answer, err := sign.SignWIT(ctx, request)
		return answer.GetResults(), err
	})
}

func signTokens[R any](ctx context.Context, c *Client, requests []R, sign func(context.Context, ententev1.SignClient, []R) ([]*ententev1.TokenResult, error)) []TokenResult {
	results := make([]TokenResult, 0, len(requests))
	for len(results) < len(requests) {
		batch := requests[len(results):min(len(results)+signBatch, len(requests))]
		var answer []*ententev1.TokenResult
		err := c.anyNode(ctx, func(ctx context.Context, conn *conn) error {
			got, err := sign(ctx, ententev1.NewSignClient(conn.rpc), batch)
			if err == nil && len(got) != len(batch) {
				err = fmt.Errorf("%d results for %d requests", len(got), len(batch))
			}
			answer = got
			return err
		})
		for i := range batch {
			if err != nil {
				results = append(results, TokenResult{Err: err})
			} else {
				results = append(results, TokenResult{Token: secret.Of(answer[i].GetToken()), Err: tokenError(answer[i])})
			}
		}
	}
	return results
}

// busyError is an error of CA nodes that were asked too much.
type busyError struct {
	error
	retry time.Duration
}

func (e *busyError) Unwrap() error { return e.error }

// RetryAfter is when the CA wants to be asked again, if err says that it is busy.
func RetryAfter(err error) (wait time.Duration, busy bool) {
	var b *busyError
	if errors.As(err, &b) {
		return b.retry, true
	}
	return 0, false
}

// retryHint is the google.rpc.RetryInfo of a RESOURCE_EXHAUSTED, bounded.
func retryHint(err error) time.Duration {
	s, ok := status.FromError(err)
	if !ok || s.Code() != codes.ResourceExhausted {
		return 0
	}
	for _, detail := range s.Details() {
		if info, ok := detail.(*errdetails.RetryInfo); ok {
			return boundedRetry(info.GetRetryDelay().AsDuration())
		}
	}
	return time.Second
}

func boundedRetry(wait time.Duration) time.Duration {
	return min(max(wait, 10*time.Millisecond), 30*time.Second)
}

// result is one item of a batch's answer.
type result interface {
	GetCode() uint32
	GetError() string
}

// tokenError is itemError, with when to ask again if the CA says so.
func tokenError(r *ententev1.TokenResult) error {
	err := itemError(r)
	if s := r.GetRetryAfterSeconds(); codes.Code(r.GetCode()) == codes.ResourceExhausted && s > 0 {
		return &busyError{err, boundedRetry(time.Duration(min(s, 3600) * float64(time.Second)))}
	}
	return err
}

func itemError(r result) error {
	switch code := codes.Code(r.GetCode()); code {
	case codes.OK:
		return nil
	case codes.PermissionDenied, codes.NotFound, codes.InvalidArgument:
		return fmt.Errorf("%w: %s", ErrDenied, r.GetError())
	case codes.FailedPrecondition:
		return fmt.Errorf("%w: %s", ErrChanged, r.GetError())
	default:
		return fmt.Errorf("%w: %s: %s", ErrUnreachable, code, r.GetError())
	}
}

// anyNode calls one node after the other until one has answered: first the one
// that Sync is connected to, then others in the order of dialling. A refusal is
// asked of the others too, since a node may lag behind what was just agreed. Where nobody
// refused and somebody was busy, RetryAfter tells when to come back.
func (c *Client) anyNode(ctx context.Context, call func(context.Context, *conn) error) error {
	var tried []string
	var failures []error
	kind := ErrUnreachable
	var busy time.Duration
	try := func(conn *conn) (done bool) {
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		err := call(ctx, conn)
		if err == nil {
			return true
		}
		if isDenial(err) {
			kind = ErrDenied
		}
		busy = max(busy, retryHint(err))
		tried = append(tried, conn.address)
		failures = append(failures, fmt.Errorf("CA node at %s: %w", conn.address, plain(err)))
		return false
	}

	c.mu.Lock()
	current := c.current
	c.mu.Unlock()
	if current != nil && try(current) {
		return nil
	}
	for ctx.Err() == nil {
		conn, err := c.connect(ctx, tried...)
		if err != nil {
			if len(failures) == 0 {
				return err
			}
			break
		}
		done := try(conn)
		conn.close()
		if done {
			return nil
		}
	}
	if ctx.Err() != nil {
		kind = ctx.Err()
	}
	err := fmt.Errorf("%w: %w", kind, errors.Join(failures...))
	if kind == ErrUnreachable && busy > 0 {
		return &busyError{err, busy}
	}
	return err
}

func isDenial(err error) bool {
	switch status.Code(err) {
	case codes.PermissionDenied, codes.Unauthenticated, codes.FailedPrecondition, codes.InvalidArgument, codes.NotFound, codes.AlreadyExists:
		return true
	default:
		return false
	}
}

// plain takes gRPC's frame off an error that people will read.
func plain(err error) error {
	s, ok := status.FromError(err)
	if !ok || s.Code() == codes.OK {
		return err
	}
	return answered{err, fmt.Sprintf("%s (%s)", s.Message(), s.Code())}
}

// answered is an error of gRPC in words for people.
type answered struct {
	error
	text string
}

func (a answered) Error() string { return a.text }
func (a answered) Unwrap() error { return a.error }
