package ca

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

func service(s *statev1.Service) *statev1.Object {
	return &statev1.Object{Kind: &statev1.Object_Service{Service: s}}
}

// Requirements: 7.
func TestEntriesFor(t *testing.T) {
	accounts := &statev1.Service{
		Name: "accounts", Path: "/accounts", Hosts: []string{"h2", "h1", "h2"},
		Selectors: []string{"unix:uid:1000", "unix:path:/opt/accounts"}, Port: 8080, X509SvidSeconds: 16,
	}
	gateway := &statev1.Object{Kind: &statev1.Object_Gateway{Gateway: &statev1.Gateway{
		Name: "gw-1", Hosts: []string{"h1"}, Selectors: []string{"unix:uid:2"},
	}}}
	caller := proto.CloneOf(accounts)
	caller.Port = 0
	peers := []string{"trading.example", "banking.example", "clearing.example", "trading.example"}
	tests := map[string]struct {
		obj  *statev1.Object
		want []*statev1.Entry
	}{
		"service": {service(accounts), []*statev1.Entry{{
			Id: "service/accounts", Path: "/accounts", Hosts: []string{"h1", "h2"},
			Selectors: []string{"unix:path:/opt/accounts", "unix:uid:1000"}, X509SvidSeconds: 16,
			DnsNames: []string{"accounts.banking.example"}, // and no federation (I6)
		}}},
		"edge": {service(&statev1.Service{Name: "edge", Path: "/edge", Hosts: []string{"h1"}, Selectors: []string{"unix:uid:7"}, Edge: true}), []*statev1.Entry{{
			Id: "service/edge", Path: "/edge", Hosts: []string{"h1"}, Selectors: []string{"unix:uid:7"}, Role: statev1.Role_ROLE_EDGE,
		}}},
		"only calls": {service(caller), []*statev1.Entry{{
			Id: "service/accounts", Path: "/accounts", Hosts: []string{"h1", "h2"},
			Selectors: []string{"unix:path:/opt/accounts", "unix:uid:1000"}, X509SvidSeconds: 16,
		}}},
		"gateway": {gateway, []*statev1.Entry{{
			Id: "gateway/gw-1", Path: "/entente/gateway/gw-1", Hosts: []string{"h1"}, Selectors: []string{"unix:uid:2"},
			FederatesWith: []string{"clearing.example", "trading.example"}, Role: statev1.Role_ROLE_GATEWAY,
		}}},
		"import": {&statev1.Object{Kind: &statev1.Object_Import{Import: &statev1.Import{Service: "x.trading.example"}}}, nil},
		"empty":  {&statev1.Object{}, nil},
	}
	for name, test := range tests {
		before := proto.CloneOf(test.obj)
		got, err := EntriesFor(banking, test.obj, peers, 48*time.Hour)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(test.want, got, protocmp.Transform()); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
		if !proto.Equal(before, test.obj) {
			t.Errorf("%s: the object was changed", name)
		}
	}
	for name, change := range map[string]func(*statev1.Service){
		"a reserved path":       func(s *statev1.Service) { s.Path = "/entente/gateway/gw-1" },
		"the reserved path":     func(s *statev1.Service) { s.Path = "/entente" },
		"no path":               func(s *statev1.Service) { s.Path = "" },
		"a relative path":       func(s *statev1.Service) { s.Path = "accounts" },
		"no host":               func(s *statev1.Service) { s.Hosts = nil },
		"a bad host":            func(s *statev1.Service) { s.Hosts = []string{"H 1"} },
		"no selector":           func(s *statev1.Service) { s.Selectors = nil },
		"path alone":            func(s *statev1.Service) { s.Selectors = []string{"unix:path:/opt/accounts"} },
		"a bad name":            func(s *statev1.Service) { s.Name = "a.b" },
		"life over the phase":   func(s *statev1.Service) { s.X509SvidSeconds = 48*3600 + 1 },
		"life too short":        func(s *statev1.Service) { s.X509SvidSeconds = 1 },
		"life beyond any clock": func(s *statev1.Service) { s.X509SvidSeconds = 1<<32 - 1 },
	} {
		s := proto.CloneOf(accounts)
		change(s)
		if entries, err := EntriesFor(banking, service(s), peers, 48*time.Hour); err == nil {
			t.Errorf("%s: %v", name, entries)
		}
	}
	// A trust domain that is no DNS name gives no DNS SAN.
	odd := spiffeid.RequireTrustDomainFromString("my_bank")
	if entries, err := EntriesFor(odd, service(accounts), nil, 48*time.Hour); err != nil || entries[0].DnsNames != nil {
		t.Errorf("%v, %v", entries, err)
	}
	if life := SVIDLife(&statev1.Entry{X509SvidSeconds: 16}, LifetimesOf(nil)); life != 16*time.Second {
		t.Error(life)
	}
	if life := SVIDLife(&statev1.Entry{}, LifetimesOf(nil)); life != 12*time.Hour {
		t.Error(life)
	}
}
