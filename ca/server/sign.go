package server

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

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
	if err := s.Signer.Ready(); err != nil {
		return nil, signError(err)
	}
	resp := &ententev1.SignX509Response{}
	for _, one := range req.GetRequests() {
		chain, err := s.signOne(ctx, c, one)
		if err != nil {
			if ctx.Err() != nil {
				return nil, status.FromContextError(ctx.Err()).Err()
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
	public, err := signer.KeyOf(one.GetCsr())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if one.GetEntryId() == "" {
		// An agent is its key; another key is another attestation.
		if keyID, err := keyIDOf(public); err != nil || keyID != c.agent.GetKeyId() {
			return nil, status.Error(codes.PermissionDenied, "an agent's own SVID is for the key that was attested: attest the new key with a join token")
		}
		chain, err := s.signAgent(ctx, c.agent, public)
		return chain, signError(err)
	}
	var entry *statev1.Entry
	var life time.Duration
	s.State.Read(func(st *domain.State) {
		entry, _ = st.Entry(one.GetEntryId())
		life = ca.SVIDLife(entry, st.Lifetimes())
	})
	// The same words for both: who may not hold it need not know that it exists.
	if entry == nil || !slices.Contains(entry.GetHosts(), c.agent.GetName()) {
		s.Log.Warn("an SVID was refused", "agent", c.agent.GetName(), "entry", one.GetEntryId(), "exists", entry != nil)
		return nil, status.Errorf(codes.PermissionDenied, "no entry %.100q names host %s", one.GetEntryId(), c.agent.GetName())
	}
	id, err := ca.ID(s.TrustDomain, entry.GetPath())
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	chain, err := s.Signer.Sign(ctx, signer.Request{
		ID: id, DNSNames: entry.GetDnsNames(), PublicKey: public, Life: life,
		Origin: ca.Origin{
			Entry: entry.GetId(), EntryGeneration: entry.GetRevision(),
			Agent: c.agent.GetName(), AgentGeneration: c.agent.GetGeneration(),
		},
	})
	return chain, signError(err)
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
func signError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, signer.ErrNoAuthority), errors.Is(err, signer.ErrClock):
		return status.Errorf(codes.Unavailable, "%v; ask another CA node", err)
	case errors.Is(err, signer.ErrBusy):
		return status.Error(codes.ResourceExhausted, err.Error())
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return status.FromContextError(err).Err()
	}
	return status.Error(codes.InvalidArgument, err.Error())
}
