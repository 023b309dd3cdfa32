package main

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/roles"
	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/internal/dataplane"
	"github.com/entente-mesh/entente/internal/dataplaneapi"
	"github.com/entente-mesh/entente/internal/peer/peertest"
)

// administered is a drainable gateway that knows two administrators.
type administered struct{ drainable }

func (*administered) Roles(path string) roles.Roles {
	return roles.Of(path, slices.Values([]*statev1.RoleBinding{
		{Name: "a", Role: statev1.AdminRole_ADMIN_ROLE_SERVICE_OWNER, Subjects: []string{"/people/olaf"}},
		{Name: "b", Role: statev1.AdminRole_ADMIN_ROLE_VIEWER, Subjects: []string{"/people/eva"}},
	}))
}

func (*administered) Stands() []string { return []string{"/entente/gateway/gw-1"} }

// A gateway is looked at and drained from elsewhere, by whom a role lets.
func TestGatewayFromElsewhere(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("banking.example")
	authority, g := peertest.NewAuthority(td), &administered{}
	remote := dataplaneapi.NewRemote(dataplaneapi.New(g, nil, nil), g)
	engine, err := dataplane.New(dataplane.Config{TrustDomain: td, Datacenter: "dc1", Process: "gw-1", Bundles: authority.Bundle(), Administration: remote})
	if err != nil {
		t.Fatal(err)
	}
	tables, err := catalog.Compile(td, nil)
	if err != nil {
		t.Fatal(err)
	}
	engine.SetView(dataplane.View{Tables: tables})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	all.Go(func() { _ = engine.Run(ctx) })
	all.Go(func() { _ = remote.Serve(ctx) })
	svid := authority.Issue("/entente/gateway/gw-1")
	all.Go(func() { _ = engine.ServeGateway(ctx, listener, dataplane.Identity{ID: svid.ID, SVID: svid}) })
	defer all.Wait()
	defer cancel()

	identity := func(path string) string {
		dir, svid := t.TempDir(), authority.Issue(path)
		chain, key, err := svid.Marshal()
		bundle, bundleErr := authority.Bundle().Marshal()
		if err != nil || bundleErr != nil {
			t.Fatal(err, bundleErr)
		}
		for name, content := range map[string][]byte{"svid.0.pem": chain, "svid.0.key": key, "bundle.0.pem": bundle} {
			if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	as := func(path string, verb ...string) (string, int) {
		return entente(t, append(append([]string{"gateway"}, verb...), "--server", listener.Addr().String(), "--identity", identity(path))...)
	}
	for _, test := range []struct {
		path string
		verb []string
		code int
		says string
	}{
		{"/people/eva", []string{"status"}, exitOK, "gw-1"},
		{"/people/eva", []string{"drain"}, exitRefused, "that takes the role service-owner for /entente/gateway/gw-1"},
		{"/people/olaf", []string{"drain", "--reason", "kernel update"}, exitOK, "gw-1 is drained (kernel update)"},
		{"/people/eva", []string{"status"}, exitOK, "by spiffe://banking.example/people/olaf: kernel update"},
		{"/people/olaf", []string{"undrain"}, exitOK, "gw-1 takes connections"},
		{"/people/none", []string{"status"}, exitRefused, "no role is bound to it"},
	} {
		if out, code := as(test.path, test.verb...); code != test.code || !strings.Contains(out, test.says) {
			t.Errorf("%s %v: exit code %d: %s", test.path, test.verb, code, out)
		}
	}
	if out, code := entente(t, "sidecar", "status", "--server", listener.Addr().String(), "--identity", identity("/people/eva")); code != exitOK || !strings.Contains(out, "gw-1") {
		t.Errorf("sidecar status: exit code %d: %s", code, out)
	}
	if out, code := entente(t, "sidecar", "status", "--server", "127.0.0.1:1", "--identity", identity("/people/eva")); code != exitUnreachable || !strings.Contains(out, "is --server its sidecar.inbound") {
		t.Errorf("no agent: exit code %d: %s", code, out)
	}
	if out, code := entente(t, "gateway", "status", "--server", "127.0.0.1:1", "--identity", identity("/people/eva")); code != exitUnreachable || !strings.Contains(out, "is --server its eastWest.listen") {
		t.Errorf("no gateway: exit code %d: %s", code, out)
	}
}
