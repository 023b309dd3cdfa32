package catest_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/internal/peer"
)

const accounts = `
apiVersion: entente/v1
kind: Service
metadata: {name: accounts, owner: team-accounts}
spec:
  run: {uid: 1000, path: /opt/accounts, hosts: [h1]}
  port: 8080
  outbound: {port: 19001}
`

// The way of an agent, with the client that agents use: attest, sign, sync.
func TestAgentsWay(t *testing.T) {
	c := catest.Start(t, catest.Options{Verbose: testing.Verbose()})
	revision := c.Apply(accounts)

	token, err := ca.ParseToken(c.AgentToken("h1", "dc1"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	cfg := client.Config{TrustDomain: c.TrustDomain(), Addresses: token.Addresses, Pins: token.Pinned, Datacenter: "dc1", BootID: "boot-1"}
	answer, err := client.Attest(t.Context(), cfg, func(exporter []byte) (*ententev1.AttestRequest, error) {
		statement, signature, err := token.Sign(ca.KeyID(spki), exporter)
		return &ententev1.AttestRequest{TokenId: token.ID, Statement: statement, Signature: signature}, err
	}, csr)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(answer.Certificates[0])
	if err != nil {
		t.Fatal(err)
	}
	id, err := peer.Verify([]*x509.Certificate{leaf}, c.Bundle(), time.Now())
	if err != nil || id.Path() != "/entente/agent/h1" {
		t.Fatalf("the agent is %v, %v", id, err)
	}

	cfg.SVID = source{&x509svid.SVID{ID: id, Certificates: []*x509.Certificate{leaf}, PrivateKey: key}}
	cfg.Bundles = x509bundle.NewSet(c.Bundle())
	agent, err := client.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	results := agent.SignX509(t.Context(), []client.SignRequest{{EntryID: "service/accounts", CSR: csr}, {CSR: csr}})
	for i, want := range []string{"/accounts", "/entente/agent/h1"} {
		if results[i].Err != nil {
			t.Fatal(results[i].Err)
		}
		leaf, err := x509.ParseCertificate(results[i].Certificates[0])
		if err != nil {
			t.Fatal(err)
		}
		if id, err := peer.Verify([]*x509.Certificate{leaf}, c.Bundle(), time.Now()); err != nil || id.Path() != want {
			t.Errorf("signed %v, %v", id, err)
		}
	}

	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	agent.Report([]client.Instance{{Service: "accounts", Agent: "h1", Datacenter: "dc1", Address: "127.0.0.1:7443", Healthy: true}})
	var last *client.View
	agent.Sync(ctx, func(v *client.View) error {
		last = v
		if v.Revision >= revision && len(v.Instances) == 1 {
			cancel()
		}
		return nil
	})
	if last == nil || len(last.Entries) != 1 || len(last.Objects) != 1 || len(last.Bundles) != 1 || len(last.Members) != 1 || len(last.Instances) != 1 {
		t.Fatalf("the agent's picture: %+v", last)
	}
	if i := last.Instances[0]; i.Service != "accounts" || i.Agent != "h1" || !i.Healthy {
		t.Errorf("instance %+v", i)
	}
}

func TestRestart(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply(accounts)
	before := c.Bundle()
	c.Stop()
	c.Restart()
	c.WaitReady()
	if !c.Bundle().Equal(before) {
		t.Error("another bundle after a restart")
	}
	if n := c.Status().GetEntries(); n != 1 {
		t.Errorf("%d entries after a restart", n)
	}
	if _, err := c.TryApply("apiVersion: entente/v1\nkind: Service\nmetadata: {name: nowhere}\nspec: {run: {uid: 1}, port: 1}\n"); err == nil {
		t.Error("a service without hosts was accepted")
	}
}

type source struct{ svid *x509svid.SVID }

func (s source) GetX509SVID() (*x509svid.SVID, error) { return s.svid, nil }
