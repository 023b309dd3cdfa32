package gateway

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	entca "github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/internal/dataplane"
	"github.com/entente-mesh/entente/internal/peer/peertest"
)

// Distrust and removals are in force at a gateway although an object of the catalogue
// cannot be used there, which costs that object only and is said once.
func TestObjectThatCannotBeUsedFreezesNothing(t *testing.T) {
	var log bytes.Buffer
	g := &Gateway{td: td, log: slog.New(slog.NewTextHandler(&log, nil)), known: make(chan struct{})}
	g.identities = newIdentities(g.log, func() {})
	var err error
	if g.engine, err = dataplane.New(dataplane.Config{TrustDomain: td, Datacenter: "dc1", Process: "gw-1", Bundles: g.identities, Log: g.log}); err != nil {
		t.Fatal(err)
	}
	service := &statev1.Object{Kind: &statev1.Object_Service{Service: &statev1.Service{
		Name: "market", Path: "/market", Hosts: []string{"a1"}, Selectors: []string{"unix:uid:1000"}, Port: 8080,
	}}}
	authority := peertest.NewAuthority(td)
	follow := g.follow()
	view := &client.View{Revision: 1, Changed: 1, Objects: []*statev1.Object{service}}
	path := append(authority.Issue("/market").Certificates, authority.Cert)
	if err := follow(view); err != nil {
		t.Fatal(err)
	}
	if err := g.identities.Distrusted(path); err != nil {
		t.Fatalf("control: nothing is distrusted, and %v", err)
	}
	mesh := &Mesh{identities: g.identities}
	claims := func(agent string) map[string]any {
		return map[string]any{entca.OriginClaim: map[string]any{"agent": agent, "agent_generation": 5.0}}
	}
	if err := mesh.Revoked("spiffe://trading.example/ledger", "k", claims("h2")); err != nil {
		t.Fatalf("control: %v", err)
	}
	bad := *view
	bad.Revision, bad.Changed = 2, 2
	bad.Objects = append(bad.Objects, &statev1.Object{})
	bad.Distrust = entca.NewDistrusted(td, []*statev1.Distrust{{Id: "authority/x", Authority: entca.KeyID(authority.Cert.RawSubjectPublicKeyInfo)}, {Id: "agent/h2", Agent: "h2", AgentGeneration: 5}})
	for range 3 {
		bad.Changed++
		if err := follow(&bad); err != nil {
			t.Errorf("the picture is refused: %v", err)
		}
	}
	if err := g.identities.Distrusted(path); err == nil {
		t.Error("what is distrusted is accepted")
	}
	for _, test := range []struct {
		subject, key, agent string
		revoked             bool
	}{
		{"spiffe://trading.example/ledger", "k", "h2", true},
		{"spiffe://trading.example/ledger", "k", "h1", false},
		{"spiffe://banking.example/ledger", "k", "h2", false},
		{"user-42", "k", "h2", false},
		{"spiffe://trading.example/ledger", entca.KeyID(authority.Cert.RawSubjectPublicKeyInfo), "h1", true},
		{"spiffe://banking.example/ledger", entca.KeyID(authority.Cert.RawSubjectPublicKeyInfo), "h1", false},
	} {
		if err := mesh.Revoked(test.subject, test.key, claims(test.agent)); (err != nil) != test.revoked {
			t.Errorf("a token of %s through %s under %s: %v", test.subject, test.agent, test.key, err)
		}
	}
	if n := strings.Count(log.String(), "no known kind"); n != 1 {
		t.Errorf("said %d times:\n%s", n, log.String())
	}
}
