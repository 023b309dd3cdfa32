package workloadapi

import (
	"context"
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/entente-mesh/entente/meshagent"
)

// FetchJWTSVID gives the caller a JWT-SVID of the identity it names, or of each one it
// has (Workload API 6.2.1).
func (s *Server) FetchJWTSVID(ctx context.Context, request *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	if len(request.GetAudience()) == 0 {
		return nil, status.Error(codes.InvalidArgument, "audience must be specified")
	}
	if err := meshagent.CheckAudience(request.GetAudience()); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	ctx, cancel := context.WithTimeout(ctx, s.patience)
	defer cancel()
	_, entitled, err := s.entitled(ctx)
	if err != nil {
		return nil, err
	}
	if entitled, err = named(entitled, request.GetSpiffeId()); err != nil {
		return nil, err
	}
	type answer struct {
		token string
		err   error
	}
	answers := make([]chan answer, len(entitled))
	fetch := func(i int) {
		token, _, err := s.agent.FetchJWT(ctx, entitled[i], request.GetAudience())
		answers[i] <- answer{token, err}
	}
	for i := range entitled {
		answers[i] = make(chan answer, 1)
		if i+1 < len(entitled) {
			go fetch(i) // ends with ctx at the latest
		} else {
			fetch(i)
		}
	}
	response := &workload.JWTSVIDResponse{}
	hints := hints{}
	for i, identity := range entitled {
		got := <-answers[i]
		if got.err != nil {
			return nil, fetchError(got.err)
		}
		response.Svids = append(response.Svids, &workload.JWTSVID{SpiffeId: identity.ID.String(), Svid: got.token, Hint: hints.of(identity)})
	}
	return response, nil
}

// entitled are the caller's identities, once the agent knows them.
func (s *Server) entitled(ctx context.Context) (*meshagent.State, []*meshagent.Identity, error) {
	process, err := callerOf(ctx)
	if err != nil {
		return nil, nil, err
	}
	for {
		state := s.agent.State()
		if state.Ready {
			entitled := state.IdentitiesOf(process)
			if len(entitled) == 0 {
				s.log.Info("a Workload API client has no identity", "pid", process.PID(), "uid", process.UID, "reason", reason(state, process))
				return nil, nil, errDenied
			}
			return state, entitled, nil
		}
		select {
		case <-state.Changed():
		case <-ctx.Done():
			return nil, nil, fetchError(ctx.Err())
		case <-s.stopping:
			return nil, nil, status.Error(codes.Unavailable, "the agent is stopping")
		}
	}
}

// named leaves the identity that was asked for; an empty id, all.
func named(entitled []*meshagent.Identity, id string) ([]*meshagent.Identity, error) {
	if id == "" {
		return entitled, nil
	}
	var out []*meshagent.Identity
	if wanted, err := spiffeid.FromString(id); err == nil {
		for _, identity := range entitled {
			if identity.ID == wanted {
				out = append(out, identity)
			}
		}
	}
	if len(out) == 0 {
		return nil, errDenied // whether it exists is not said
	}
	return out, nil
}

// fetchError maps what the agent says; the details stand in its log.
func fetchError(err error) error {
	wait, busy := meshagent.RetryAfter(err)
	switch {
	case busy:
		return exhausted(wait, "too many JWT-SVIDs are being signed; try again in %v", wait.Round(time.Millisecond))
	case errors.Is(err, meshagent.ErrDenied):
		return errDenied
	case errors.Is(err, context.Canceled):
		return status.FromContextError(err).Err()
	}
	return status.Error(codes.Unavailable, "the CA has not signed a JWT-SVID; try again")
}

// FetchJWTBundles streams the keys the caller may verify JWT-SVIDs with (Workload API
// 6.2.2).
func (s *Server) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	return follow(s, stream, jwtBundles)
}

func jwtBundles(state *meshagent.State, entitled []*meshagent.Identity) (*workload.JWTBundlesResponse, error) {
	if state.JWT == nil {
		return nil, nil
	}
	response := &workload.JWTBundlesResponse{Bundles: map[string][]byte{state.JWT.TrustDomain.IDString(): state.JWT.JWKS}}
	for _, identity := range entitled {
		for _, foreign := range identity.FederatedJWT {
			if len(foreign.Keys) > 0 { // absent and empty mean the same to a client
				response.Bundles[foreign.TrustDomain.IDString()] = foreign.JWKS
			}
		}
	}
	return response, nil
}

// ValidateJWTSVID tells the caller whether a token is a JWT-SVID for an audience, by
// the bundles that the caller itself may use (Workload API 6.2.3).
func (s *Server) ValidateJWTSVID(ctx context.Context, request *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	switch {
	case request.GetAudience() == "":
		return nil, status.Error(codes.InvalidArgument, "audience must be specified")
	case request.GetSvid() == "":
		return nil, status.Error(codes.InvalidArgument, "svid must be specified")
	}
	ctx, cancel := context.WithTimeout(ctx, s.patience)
	defer cancel()
	state, entitled, err := s.entitled(ctx)
	if err != nil {
		return nil, err
	}
	svid, revoked, err := state.VerifyJWT(entitled, request.GetSvid(), request.GetAudience(), time.Now(), s.agent.Config().WorkloadAPI.Leeway)
	if revoked != nil {
		s.log.Info("a JWT-SVID is rejected", "spiffe_id", svid.ID.String(), "reason", revoked)
	}
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	claims, err := structpb.NewStruct(svid.Claims)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, "the token's claims cannot be handed on")
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: svid.ID.String(), Claims: claims}, nil
}
