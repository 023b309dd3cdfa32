package admin

import (
	"cmp"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/internal/dataplane"
	"github.com/entente-mesh/entente/internal/dataplaneapi"
	"github.com/entente-mesh/entente/meshagent"
)

// Show has DataPlane's status show what the host's sidecar sees.
func (s *Server) Show(sidecar func() dataplane.Seen) { s.sidecar.Store(&sidecar) }

// following is a dataplaneapi.Follower.
type following struct{ *meshagent.Agent }

func (f following) View() *client.View { return f.State().View }

// Status is part of dataplaneapi.Process: the same as a gateway says.
func (s *Server) Status(asked *ententev1.DataPlaneStatusRequest) *ententev1.DataPlaneStatusResponse {
	cfg, state := s.agent.Config(), s.agent.State()
	status := &ententev1.DataPlaneStatusResponse{
		Kind: "agent", Name: cfg.Name, TrustDomain: cfg.TrustDomain, Datacenter: cfg.Datacenter,
		Build: dataplaneapi.Build(), Started: timestamppb.New(s.started), Ready: true,
		Ca: dataplaneapi.FollowedCA(following{s.agent}),
	}
	if err := s.agent.Ready(); err != nil {
		status.Ready, status.NotReady = false, err.Error()
	}
	if id, err := spiffeid.FromPath(cfg.Domain(), ca.AgentPath(cfg.Name)); err == nil {
		status.Svids = append(status.Svids, dataplaneapi.HeldSVID(id, state.Own()))
	}
	for _, identity := range state.Identities {
		held := dataplaneapi.HeldSVID(identity.ID, nil)
		if identity.SVID != nil {
			held.NotAfter = timestamppb.New(identity.SVID.NotAfter)
		}
		status.Svids = append(status.Svids, held)
	}
	status.Bundles = bundlesOf(state)
	if seen := s.sidecar.Load(); seen != nil {
		dataplaneapi.Engine(status, (*seen)(), asked)
	}
	status.Listeners = append(status.Listeners, &ententev1.Listener{Name: "admin.socket", Address: cfg.Admin.Socket},
		&ententev1.Listener{Name: "workloadAPI.socket", Address: cfg.WorkloadAPI.Socket})
	return status
}

// bundlesOf are the own bundle and those of other domains, by trust domain. Since when they
// are as they are, the agent does not keep.
func bundlesOf(state *meshagent.State) (list []*ententev1.HeldBundle) {
	if state.Bundle != nil {
		list = append(list, dataplaneapi.HeldBundle(state.Bundle, time.Time{}))
	}
	for _, bundle := range state.Foreign {
		list = append(list, dataplaneapi.HeldBundle(bundle, time.Time{}))
	}
	slices.SortFunc(list, func(a, b *ententev1.HeldBundle) int { return cmp.Compare(a.GetTrustDomain(), b.GetTrustDomain()) })
	return list
}
