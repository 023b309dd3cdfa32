package admin

import (
	"cmp"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/ca/roles"
	"github.com/entente-mesh/entente/internal/dataplane"
	"github.com/entente-mesh/entente/internal/dataplaneapi"
	"github.com/entente-mesh/entente/meshagent"
)

// Sidecar is what DataPlane shows of a host's sidecar, and asks it.
type Sidecar interface {
	Seen() dataplane.Seen
	RoleBindings() []*statev1.RoleBinding
}

// Show has DataPlane's status show what the host's sidecar sees, and roles decide that it knows.
func (s *Server) Show(sidecar Sidecar) { s.sidecar.Store(&sidecar) }

// Roles is part of dataplaneapi.Domain, as is Stands.
func (s *Server) Roles(path string) roles.Roles {
	if sidecar := s.sidecar.Load(); sidecar != nil {
		return roles.Of(path, slices.Values((*sidecar).RoleBindings()))
	}
	return roles.Roles{}
}

// Stands is the path of the agent.
func (s *Server) Stands() []string { return []string{ca.AgentPath(s.agent.Config().Name)} }

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
	if sidecar := s.sidecar.Load(); sidecar != nil {
		dataplaneapi.Engine(status, (*sidecar).Seen(), asked)
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
