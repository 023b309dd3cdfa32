package server

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/signer"
)

const maxBatch = 100

// signDoor issues SVIDs to agents, for themselves and for the entries on their host.
type signDoor struct {
	ententev1.UnimplementedSignServer
	server *Server
}

func (d signDoor) SignX509(ctx context.Context, req *ententev1.SignX509Request) (*ententev1.SignX509Response, error) {
	s, c := d.server, callerFrom(ctx)
	if n := len(req.GetRequests()); n == 0 || n > maxBatch {
		return nil, status.Errorf(codes.InvalidArgument, "%d requests in a batch, not 1 to %d", n, maxBatch)
	}
	if err := s.Signer.Await(ctx, statev1.KeyUse_KEY_USE_X509); err != nil {
		return nil, s.signError(err)
	}
	if err := s.limit(s.x509Rates, c.agent.GetName(), len(req.GetRequests())); err != nil {
		return nil, err
	}
	catchUp(ctx, s, req.GetRequests())
	resp := &ententev1.SignX509Response{}
	for _, one := range req.GetRequests() {
		chain, err := s.signOne(ctx, c, one)
		if err != nil {
			if ctx.Err() != nil {
				return nil, status.FromContextError(ctx.Err()).Err()
			}
			if status.Code(err) == codes.ResourceExhausted && len(resp.Results) == 0 {
				return nil, err // with a hint when to come back
			}
			st := status.Convert(err)
			s.metrics.svids.WithLabelValues(st.Code().String()).Inc()
			resp.Results = append(resp.Results, &ententev1.X509Result{Code: uint32(st.Code()), Error: st.Message()})
			continue
		}
		s.metrics.svids.WithLabelValues(codes.OK.String()).Inc()
		resp.Results = append(resp.Results, &ententev1.X509Result{Certificates: chain})
	}
	return resp, nil
}

func (s *Server) signOne(ctx context.Context, c caller, one *ententev1.X509Request) ([][]byte, error) {
	public, err := ca.KeyOf(one.GetCsr())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if one.GetEntryId() == "" {
		// An agent is its key; another key is another attestation.
		if keyID, err := keyIDOf(public); err != nil || keyID != c.agent.GetKeyId() {
			return nil, status.Error(codes.PermissionDenied, "an agent's own SVID is for the key that was attested: attest the new key with a join token")
		}
		chain, err := s.signAgent(ctx, c.agent, public)
		return chain, s.signError(err)
	}
	g, err := s.grant(c, one)
	if err != nil {
		return nil, err
	}
	chain, err := s.Signer.Sign(ctx, signer.Request{
		ID: g.id, DNSNames: g.entry.GetDnsNames(), PublicKey: public, Life: ca.SVIDLife(g.entry, g.lifetimes), Origin: g.origin,
	})
	return chain, s.signError(err)
}

// granted is what an SVID for an entry is made from.
type granted struct {
	entry     *statev1.Entry
	id        spiffeid.ID
	lifetimes ca.Lifetimes
	origin    ca.Origin
}

// forEntry is a request for an SVID of an entry as the requester holds it.
type forEntry interface {
	GetEntryId() string
	GetRecord() []byte
	GetEntryRevision() uint64
}

// catchUp waits, for a bounded time, until this replica has applied what the requester of
// a batch has seen of its entries.
func catchUp[R forEntry](ctx context.Context, s *Server, batch []R) {
	var seen, applied uint64
	for _, one := range batch {
		seen = max(seen, one.GetEntryRevision())
	}
	for deadline := time.Now().Add(catchUpTimeout); ; {
		s.State.Read(func(st *domain.State) { applied = st.Revision() })
		if applied >= seen || time.Now().After(deadline) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// sameRecord refuses a request for another record of an entry than this node has: an agent
// shows an SVID to whom the record that it holds names, and the CA node that told it of
// that may be behind, or lie.
func (s *Server) sameRecord(c caller, e *statev1.Entry, one forEntry) error {
	record := one.GetRecord()
	if len(record) == 0 {
		if level, live := s.Feed.LevelOf(c.agent.GetName()); live && level >= levelRecord {
			return status.Errorf(codes.FailedPrecondition, "the request for entry %q names no record of it, and this agent's software does: ask again with its hash", e.GetId())
		}
		return nil
	}
	hash := ca.RecordHash(e)
	if bytes.Equal(record, hash[:]) {
		return nil
	}
	if one.GetEntryRevision() == e.GetRevision() {
		s.Log.Warn("an SVID was refused: the agent was told another record of the entry at the same revision; a CA node is damaged or lies",
			"agent", c.agent.GetName(), "entry", e.GetId(), "revision", ca.Revision(e.GetRevision()).String())
	}
	return status.Errorf(codes.FailedPrecondition, "this CA node holds another record of entry %q, of revision %s, than the agent, of revision %s: ask again when Sync has brought the newer one",
		e.GetId(), ca.Revision(e.GetRevision()), ca.Revision(one.GetEntryRevision()))
}

// levelRecord is the first level of Sync whose agents name records.
const levelRecord = 1

// grant looks up, in the agreed state as it is now, whether the calling agent may hold
// an entry's SVIDs.
func (s *Server) grant(c caller, one forEntry) (g granted, err error) {
	entryID := one.GetEntryId()
	s.State.Read(func(st *domain.State) {
		g.entry, _ = st.Entry(entryID)
		g.lifetimes = st.Lifetimes()
	})
	// The same words for both: who may not hold it need not know that it exists.
	if g.entry == nil || !ca.Entitled(c.agent, g.entry) {
		s.Log.Warn("an SVID was refused", "agent", c.agent.GetName(), "entry", entryID, "exists", g.entry != nil)
		return g, status.Errorf(codes.PermissionDenied, "no entry %.100q is for host %s", entryID, c.agent.GetName())
	}
	if err := s.sameRecord(c, g.entry, one); err != nil {
		return g, err
	}
	if g.id, err = ca.ID(s.TrustDomain, g.entry.GetPath()); err != nil {
		return g, status.Error(codes.Internal, err.Error())
	}
	g.origin = ca.Origin{
		Entry: g.entry.GetId(), EntryGeneration: g.entry.GetRevision(),
		Agent: c.agent.GetName(), AgentGeneration: c.agent.GetGeneration(),
	}
	return g, nil
}

// grantToken is grant for a token, of which an entry may have so many a second: workloads
// ask for tokens as they like, and each costs a signature and a line of the audit log. An
// entry has this rate on each of its hosts, so that a workload takes nothing from the
// instances elsewhere.
func (s *Server) grantToken(c caller, one forEntry) (granted, error) {
	g, err := s.grant(c, one)
	entryID := one.GetEntryId()
	if err != nil {
		return g, err
	}
	if wait := s.entryRates.Take(c.agent.GetName()+"/"+entryID, 1, time.Now()); wait > 0 {
		s.metrics.limited.WithLabelValues("entry").Inc()
		return g, exhausted(fmt.Sprintf("entry %s asks on host %s for more than %g tokens a second", entryID, c.agent.GetName(), s.entryRates.each), wait)
	}
	return g, nil
}

func (d signDoor) SignJWT(ctx context.Context, req *ententev1.SignJWTRequest) (*ententev1.SignJWTResponse, error) {
	s, c := d.server, callerFrom(ctx)
	results, err := signTokens(ctx, s, c, statev1.KeyUse_KEY_USE_JWT, req.GetRequests(), func(one *ententev1.JWTRequest) (string, error) {
		if err := ca.CheckAudience(one.GetAudience()); err != nil {
			return "", status.Error(codes.InvalidArgument, err.Error())
		}
		g, err := s.grantToken(c, one)
		if err != nil {
			return "", err
		}
		return s.Signer.SignJWT(ctx, signer.JWTRequest{
			ID: g.id, Audience: one.GetAudience(), Life: ca.JWTLife(g.entry, g.lifetimes), Origin: g.origin,
		})
	})
	return &ententev1.SignJWTResponse{Results: results}, err
}

func (d signDoor) SignWIT(ctx context.Context, req *ententev1.SignWITRequest) (*ententev1.SignWITResponse, error) {
	s, c := d.server, callerFrom(ctx)
	results, err := signTokens(ctx, s, c, statev1.KeyUse_KEY_USE_WIT, req.GetRequests(), func(one *ententev1.WITRequest) (string, error) {
		public, err := ca.KeyOf(one.GetCsr())
		if err != nil {
			return "", status.Error(codes.InvalidArgument, err.Error())
		}
		g, err := s.grantToken(c, one)
		if err != nil {
			return "", err
		}
		return s.Signer.SignWIT(ctx, signer.WITRequest{
			ID: g.id, PublicKey: public, Life: ca.WITLife(g.entry, g.lifetimes), Origin: g.origin,
		})
	})
	return &ententev1.SignWITResponse{Results: results}, err
}

// signTokens answers a batch. What is refused stands in the results; an error speaks of
// the whole batch, of which then nothing was signed.
func signTokens[R forEntry](ctx context.Context, s *Server, c caller, use statev1.KeyUse, requests []R, sign func(R) (string, error)) ([]*ententev1.TokenResult, error) {
	if n := len(requests); n == 0 || n > maxBatch {
		return nil, status.Errorf(codes.InvalidArgument, "%d requests in a batch, not 1 to %d", n, maxBatch)
	}
	if err := s.Signer.Await(ctx, use); err != nil {
		return nil, s.signError(err)
	}
	if err := s.limit(s.tokenRates, c.agent.GetName(), len(requests)); err != nil {
		return nil, err
	}
	catchUp(ctx, s, requests)
	kind := map[statev1.KeyUse]string{statev1.KeyUse_KEY_USE_JWT: "jwt", statev1.KeyUse_KEY_USE_WIT: "wit"}[use]
	results := make([]*ententev1.TokenResult, 0, len(requests))
	signed, exhaustedResults, limited := false, 0, error(nil)
	for _, one := range requests {
		token, err := sign(one)
		if err != nil {
			if ctx.Err() != nil {
				return nil, status.FromContextError(ctx.Err()).Err()
			}
			if errors.Is(err, signer.ErrBusy) && !signed {
				return nil, s.signError(err) // with a hint when to come back
			}
			st := status.Convert(s.signError(err))
			s.metrics.tokens.WithLabelValues(kind, st.Code().String()).Inc()
			result := &ententev1.TokenResult{Code: uint32(st.Code()), Error: st.Message()}
			if st.Code() == codes.ResourceExhausted {
				result.RetryAfterSeconds, exhaustedResults, limited = retryDelay(st).Seconds(), exhaustedResults+1, err
			}
			results = append(results, result)
			continue
		}
		signed = true
		s.metrics.tokens.WithLabelValues(kind, codes.OK.String()).Inc()
		results = append(results, &ententev1.TokenResult{Token: token})
	}
	if exhaustedResults == len(requests) {
		return nil, limited // which older agents heed
	}
	return results, nil
}

// retryDelay is when to come back, as exhausted has said; 0: it has not.
func retryDelay(st *status.Status) time.Duration {
	for _, detail := range st.Details() {
		if info, ok := detail.(*errdetails.RetryInfo); ok {
			return info.GetRetryDelay().AsDuration()
		}
	}
	return 0
}

// exhausted says when to come back.
func exhausted(why string, wait time.Duration) error {
	st := status.New(codes.ResourceExhausted, fmt.Sprintf("%s; try again in %v", why, wait.Round(time.Millisecond)))
	if with, err := st.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(wait)}); err == nil {
		st = with
	}
	return st.Err()
}

func (s *Server) signAgent(ctx context.Context, host *statev1.Agent, public crypto.PublicKey) ([][]byte, error) {
	var life time.Duration
	s.State.Read(func(st *domain.State) { life = st.Lifetimes().AgentSVID })
	id, err := spiffeid.FromPath(s.TrustDomain, ca.AgentPath(host.GetName()))
	if err != nil {
		return nil, fmt.Errorf("agent %q: %w", host.GetName(), err)
	}
	return s.Signer.Sign(ctx, signer.Request{
		ID: id, PublicKey: public, Life: life,
		Origin: ca.Origin{Agent: host.GetName(), AgentGeneration: host.GetGeneration()},
	})
}

// signError maps what the signer says. The client goes to another node after
// UNAVAILABLE, and comes back later after RESOURCE_EXHAUSTED.
func (s *Server) signError(err error) error {
	if _, done := status.FromError(err); done {
		return err // nil, or a door's own word
	}
	switch {
	case errors.Is(err, signer.ErrNoAuthority), errors.Is(err, signer.ErrClock):
		return status.Errorf(codes.Unavailable, "%v; ask another CA node", err)
	case errors.Is(err, signer.ErrBusy):
		s.metrics.limited.WithLabelValues("queue").Inc()
		return exhausted(err.Error(), signer.RetryAfter)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return status.FromContextError(err).Err()
	}
	return status.Error(codes.InvalidArgument, err.Error())
}
