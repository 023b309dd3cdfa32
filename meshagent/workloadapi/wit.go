package workloadapi

import (
	"crypto/ecdsa"
	"fmt"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/entente-mesh/entente/meshagent"
)

// errNoWIT: both calls or none (Workload API 7).
var errNoWIT = status.Error(codes.Unimplemented, "WIT-SVIDs are not switched on here: workloadAPI.wit in the agent's configuration")

// FetchWITSVID streams the caller's WIT-SVIDs with their keys: of the identity it
// names, or of each one it has (Workload API 7.2.1).
func (s *Server) FetchWITSVID(request *workload.WITSVIDRequest, stream grpc.ServerStreamingServer[workload.WITSVIDResponse]) error {
	if !s.agent.Config().WorkloadAPI.WIT {
		return errNoWIT
	}
	return follow(s, stream, func(_ *meshagent.State, entitled []*meshagent.Identity) (*workload.WITSVIDResponse, error) {
		entitled, err := named(entitled, request.GetSpiffeId())
		if err != nil {
			return nil, err
		}
		return witResponse(entitled)
	})
}

// witResponse leaves out identities that have no WIT-SVID yet.
func witResponse(entitled []*meshagent.Identity) (*workload.WITSVIDResponse, error) {
	response := &workload.WITSVIDResponse{}
	hints := hints{}
	for _, identity := range entitled {
		wit := identity.WIT
		if wit == nil {
			continue
		}
		private, ok := wit.Key.(*ecdsa.PrivateKey)
		if !ok {
			return nil, fmt.Errorf("the WIT-SVID of %s: its key is a %T", identity.ID, wit.Key)
		}
		key, err := jose.JSONWebKey{Key: private, Algorithm: string(jose.ES256)}.MarshalJSON()
		if err != nil {
			return nil, fmt.Errorf("the WIT-SVID of %s: its key cannot be written", identity.ID)
		}
		response.Svids = append(response.Svids, &workload.WITSVID{
			SpiffeId: identity.ID.String(), WitSvid: wit.Token.Reveal(), WitSvidKey: string(key), Hint: hints.of(identity),
		})
	}
	if len(response.Svids) == 0 {
		return nil, nil
	}
	return response, nil
}

// FetchWITBundles streams the keys the caller may verify WIT-SVIDs with (Workload API
// 7.2.2).
func (s *Server) FetchWITBundles(_ *workload.WITBundlesRequest, stream grpc.ServerStreamingServer[workload.WITBundlesResponse]) error {
	if !s.agent.Config().WorkloadAPI.WIT {
		return errNoWIT
	}
	return follow(s, stream, witBundles)
}

func witBundles(state *meshagent.State, entitled []*meshagent.Identity) (*workload.WITBundlesResponse, error) {
	if state.WIT == nil {
		return nil, nil
	}
	response := &workload.WITBundlesResponse{Bundles: map[string]string{state.WIT.TrustDomain.IDString(): string(state.WIT.JWKS)}}
	for _, identity := range entitled {
		for _, foreign := range identity.FederatedWIT {
			if len(foreign.Keys) > 0 {
				response.Bundles[foreign.TrustDomain.IDString()] = string(foreign.JWKS)
			}
		}
	}
	return response, nil
}
