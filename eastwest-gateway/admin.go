package gateway

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"google.golang.org/protobuf/types/known/timestamppb"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/roles"
	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/internal/dataplane"
	"github.com/entente-mesh/entente/internal/dataplaneapi"
)

// openSocket opens the admin socket, if there is one.
func (g *Gateway) openSocket() error {
	path := g.cfg.Admin.Socket
	if path == "" {
		return nil
	}
	if g.cfg.DataDir != "" && filepath.Dir(path) == filepath.Clean(g.cfg.DataDir) {
		if err := os.MkdirAll(g.cfg.DataDir, 0o700); err != nil {
			return fmt.Errorf("gateway: dataDir: %w", err)
		}
	}
	var err error
	if g.socket, err = daemon.ListenUnix(path, 0o600); err != nil {
		return fmt.Errorf("gateway: opening the admin socket (admin.socket, by default in dataDir): %w", err)
	}
	return nil
}

// Drain is part of dataplaneapi.Drainer, as is Undrain.
func (g *Gateway) Drain(why dataplane.Drained) dataplane.Drained { return g.engine.Drain(why) }

// Undrain has the gateway take connections again; false: it does.
func (g *Gateway) Undrain() bool { return g.engine.Undrain() }

// Roles is part of dataplaneapi.Domain, as is Stands.
func (g *Gateway) Roles(path string) roles.Roles {
	bindings := g.bindings.Load()
	if bindings == nil {
		return roles.Roles{}
	}
	return roles.Of(path, slices.Values(*bindings))
}

// Stands are the paths of the identities that the gateway needs.
func (g *Gateway) Stands() (paths []string) {
	for _, id := range g.needed() {
		paths = append(paths, id.Path())
	}
	return paths
}

// Status is part of dataplaneapi.Process.
func (g *Gateway) Status(asked *ententev1.DataPlaneStatusRequest) *ententev1.DataPlaneStatusResponse {
	s := &ententev1.DataPlaneStatusResponse{
		Kind: "gateway", Name: g.cfg.Name, TrustDomain: g.td.Name(), Datacenter: g.cfg.Datacenter,
		Build: dataplaneapi.Build(), Started: timestamppb.New(g.started), Ready: true,
		Bundles: g.identities.held(), Drained: dataplaneapi.Drained(g.engine.Drained()), Warnings: g.files.Warnings(),
	}
	if err := g.Ready(); err != nil {
		s.Ready, s.NotReady = false, err.Error()
	}
	for _, id := range g.needed() {
		svid, _ := g.identities.of(id).GetX509SVID()
		s.Svids = append(s.Svids, dataplaneapi.HeldSVID(id, svid))
	}
	if ca := g.ca.Load(); ca != nil {
		s.Ca = dataplaneapi.FollowedCA(ca)
	}
	role := catalog.Gateway
	if g.cfg.EastWest == nil {
		role = catalog.Edge
	}
	dataplaneapi.Engine(s, g.engine.Seen(role), asked)
	if g.admin != nil {
		s.Listeners = append(s.Listeners, &ententev1.Listener{Name: "admin.listen", Address: g.admin.Addr()})
	}
	if g.socket != nil {
		s.Listeners = append(s.Listeners, &ententev1.Listener{Name: "admin.socket", Address: g.cfg.Admin.Socket})
	}
	for _, r := range g.roles {
		s.Listeners = append(s.Listeners, &ententev1.Listener{Name: r.Name, Address: r.Listen})
	}
	slices.SortStableFunc(s.Listeners, func(a, b *ententev1.Listener) int { return cmp.Compare(a.GetName(), b.GetName()) })
	return s
}
