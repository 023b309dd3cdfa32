package dataplaneapi

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/protobuf/types/known/timestamppb"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/internal/dataplane"
)

// What one answer shows at most.
const (
	maxServices  = 1000
	maxEndpoints = 10_000 // of all services together
)

// Build is the software of this process.
func Build() *ententev1.Build {
	version, commit := daemon.Build()
	return &ententev1.Build{Version: version, Commit: commit, SyncLevel: ca.SyncLevel}
}

// HeldSVID is an identity that the process needs; svid is nil while it has none.
func HeldSVID(id spiffeid.ID, svid *x509svid.SVID) *ententev1.HeldSVID {
	held := &ententev1.HeldSVID{SpiffeId: id.String()}
	if svid != nil {
		held.NotAfter = timestamppb.New(svid.Certificates[0].NotAfter)
	}
	return held
}

// HeldBundle is a bundle that the process uses with this content since then; zero: it is
// not known since when.
func HeldBundle(bundle *x509bundle.Bundle, since time.Time) *ententev1.HeldBundle {
	held := &ententev1.HeldBundle{TrustDomain: bundle.TrustDomain().Name()}
	if !since.IsZero() {
		held.Since = timestamppb.New(since)
	}
	var first time.Time
	for _, authority := range bundle.X509Authorities() {
		held.X509Authorities++
		if first.IsZero() || authority.NotAfter.Before(first) {
			first = authority.NotAfter
		}
	}
	if !first.IsZero() {
		held.FirstExpiry = timestamppb.New(first)
	}
	return held
}

// Follower is a client of the CA.
type Follower interface {
	View() *client.View
	Follows() (node, address string)
	Comparison() client.Comparison
}

// FollowedCA is where the process gets its picture of the domain.
func FollowedCA(f Follower) *ententev1.FollowedCA {
	view, is := f.View(), f.Comparison()
	followed := &ententev1.FollowedCA{
		Revision:     view.Revision,
		FeatureLevel: view.Cluster.GetFeatureLevel(),
		Compared:     is.Heard, Doubt: is.Doubt, DoubtBy: is.DoubtBy,
		Skipped: view.Skipped, TooOld: view.TooOld,
	}
	followed.Node, followed.Address = f.Follows()
	for _, a := range is.Avoided {
		followed.Avoided = append(followed.Avoided, &ententev1.AvoidedNode{Node: a.Name, Why: a.Why, By: a.By, Until: timestamppb.New(a.Until)})
	}
	return followed
}

// Drained is why a process takes no new connections; nil: it does.
func Drained(d *dataplane.Drained) *ententev1.Drained {
	if d == nil {
		return nil
	}
	return &ententev1.Drained{Who: d.Who, Reason: d.Reason, Since: timestamppb.New(d.Since)}
}

// Engine adds what the data plane does and sees to an answer, as far as it is asked for.
func Engine(to *ententev1.DataPlaneStatusResponse, seen dataplane.Seen, asked *ententev1.DataPlaneStatusRequest) {
	to.Connections, to.Requests = uint32(seen.Connections), uint32(seen.Requests)
	for _, l := range seen.Listeners {
		to.Listeners = append(to.Listeners, &ententev1.Listener{Name: l.Name, Address: l.Address, SpiffeId: l.ID, Connections: uint32(l.Connections)})
	}
	room := maxEndpoints
	for _, s := range seen.Services {
		switch {
		case asked.GetWithoutServices(), asked.GetService() != "" && s.Name != asked.GetService():
			continue
		case len(to.Services) == maxServices:
			to.ServicesLeftOut++
			continue
		}
		to.Services = append(to.Services, serviceView(s, &room))
	}
}

func serviceView(s dataplane.SeenService, room *int) *ententev1.ServiceView {
	view := &ententev1.ServiceView{Name: s.Name}
	if s.Service != nil {
		view.SpiffeId = s.Service.ID.String()
	}
	for _, e := range s.Endpoints {
		if *room == 0 {
			view.EndpointsLeftOut++
			continue
		}
		*room--
		view.Endpoints = append(view.Endpoints, &ententev1.EndpointView{
			Name: e.Agent, Id: e.ID, Datacenter: e.Datacenter, Address: e.Address, Healthy: e.Healthy, Stale: e.Stale, Ejected: e.Ejected,
		})
	}
	return view
}
