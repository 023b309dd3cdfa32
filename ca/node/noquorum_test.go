package node_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/ca/node"
	"github.com/entente-mesh/entente/federation/bundle"
	"github.com/entente-mesh/entente/internal/peer"
)

const twoServices = twoHosts + `---
apiVersion: entente/v1
kind: Service
metadata: {name: ledger}
spec: {run: {uid: 1001, hosts: [h2]}, port: 8081}
---
apiVersion: entente/v1
kind: Gateway
metadata: {name: gw-1}
spec: {run: {uid: 1002, hosts: [h1]}, datacenter: dc1, address: "127.0.0.1:15443"}
`

// What goes on without quorum and what does not: a row for each line of the table in
// docs/operations.md, "When a part is down", over one world that has lost it. What does
// not says since when, what still works, and what to do.
func TestTableWithoutQuorum(t *testing.T) {
	t.Parallel()
	nodes := cluster(t)
	trading := catest.Start(t, catest.Options{TrustDomain: "trading.example"})
	nodes[0].Apply(twoServices)
	nodes[0].Relate(trading)
	h1, h2 := attest(t, nodes[0], "h1"), attest(t, nodes[0], "h2")
	attest(t, nodes[0], "h9")
	newHost, err := ca.ParseToken(nodes[0].AgentToken("h3", "dc1"))
	if err != nil {
		t.Fatal(err)
	}
	unused := newHost.ID
	nodeToken := nodes[0].NodeToken("ca-4", "dc1")
	caughtUp(t, nodes[0], nodes[1], nodes[2])
	last := nodes[2]
	var own, others, prepared string
	for _, a := range last.Status().GetAuthorities() {
		switch mine := a.GetMemberId() == last.Node().ID(); {
		case a.GetUse() != statev1.KeyUse_KEY_USE_X509:
		case a.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED && mine:
			prepared = a.GetId()
		case a.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE && mine:
			own = a.GetId()
		case a.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE:
			others = a.GetId()
		}
	}
	eventually(t, "the next authority is ready", 15*time.Second, func() error {
		for _, a := range last.Status().GetAutonomy() {
			if a.GetMemberId() == last.Node().ID() && a.GetNextReady() {
				return nil
			}
		}
		return errors.New("not yet")
	})
	signed, err := sign(t.Context(), h1.at(t, last), h1.csr)
	if err != nil {
		t.Fatal(err)
	}
	view := follow(t, h1, last)
	eventually(t, "the other domain's bundle", 15*time.Second, func() error {
		if view.Load().Bundles["trading.example"] == nil {
			return errors.New("not yet")
		}
		return nil
	})
	admin := last.Admin()
	nodes[0].Kill()
	nodes[1].Kill()
	noQuorum(t, last)

	accepted := func(leaf []byte) error {
		cert, err := x509.ParseCertificate(leaf)
		if err != nil {
			return err
		}
		_, err = peer.Verify([]*x509.Certificate{cert}, last.Bundle(), time.Now())
		return err
	}
	atLast := func(c client.Config) client.Config {
		c.Addresses = []string{last.Config().Advertise.API}
		c.Pins = func(keyID string) bool { return keyID == last.Node().ID() }
		return c
	}
	type row struct {
		what string
		do   func(t *testing.T, ctx context.Context) error
	}
	act := func(what string, do func(context.Context) error) row {
		return row{what, func(_ *testing.T, ctx context.Context) error { return do(ctx) }}
	}
	on := []row{
		act("what was signed before is accepted", func(context.Context) error { return accepted(signed) }),
		{"renewal of a workload's X.509-SVID, and a new instance of a known entry", func(t *testing.T, ctx context.Context) error {
			leaf, err := sign(ctx, h1.at(t, last), h1.csr)
			if err != nil {
				return err
			}
			return accepted(leaf)
		}},
		{"JWT-SVIDs", func(t *testing.T, ctx context.Context) error {
			at := h1.at(t, last)
			return at.SignJWT(ctx, []client.JWTRequest{{EntryID: "service/accounts", Record: at.record("service/accounts"), Audience: []string{"x"}}})[0].Err
		}},
		{"renewal of an agent's SVID", func(t *testing.T, ctx context.Context) error {
			return h1.at(t, last).SignX509(ctx, []client.SignRequest{{CSR: h1.csr}})[0].Err
		}},
		act("an agent that attests again by its key", func(ctx context.Context) error {
			cfg := atLast(h1.cfg)
			cfg.SVID = nil
			_, err := client.Attest(ctx, cfg, func([]byte) (*ententev1.AttestRequest, error) { return &ententev1.AttestRequest{}, nil }, h1.csr)
			return err
		}),
		act("rotation: the one step that is prepared", func(ctx context.Context) error {
			for _, a := range last.Status().GetAutonomy() {
				if a.GetMemberId() == last.Node().ID() && a.GetNextReady() && a.GetSignsSeconds() > a.GetFullSeconds() {
					_, err := admin.ActivateAuthority(ctx, &ententev1.ChangeAuthorityRequest{Id: prepared})
					return err
				}
			}
			return fmt.Errorf("autonomy %v", last.Status().GetAutonomy())
		}),
		act("the bundle endpoint", func(ctx context.Context) error {
			c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}} // only whether it answers
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, last.BundleURL(), nil)
			if err != nil {
				return err
			}
			resp, err := c.Do(req)
			if err != nil {
				return err
			}
			resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				return errors.New(resp.Status)
			}
			return nil
		}),
		{"routes, endpoints and health: a service that comes and goes is seen", func(t *testing.T, ctx context.Context) error {
			serving := h2.at(t, last)
			serving.Report([]client.Instance{{Service: "ledger", Address: "127.0.0.1:7443", Healthy: true}})
			syncing, stop := context.WithCancel(ctx)
			ended := make(chan error, 1)
			go func() { ended <- serving.Sync(syncing, func(*client.View) error { return nil }) }()
			defer func() {
				stop()
				<-ended
			}()
			eventually(t, "the instance is seen", 10*time.Second, func() error {
				if v := view.Load(); len(v.Instances) != 1 || v.Instances[0].Agent != "h2" || len(v.Objects) != 4 {
					return errors.New("not yet")
				}
				return nil
			})
			return nil
		}},
		{"refresh of another domain's bundle, a removal in it too", func(t *testing.T, ctx context.Context) error {
			before := string(view.Load().Bundles["trading.example"])
			for _, a := range trading.Status().GetAuthorities() {
				if a.GetUse() == statev1.KeyUse_KEY_USE_X509 && a.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED {
					if _, err := trading.Admin().RevokeAuthority(ctx, &ententev1.ChangeAuthorityRequest{Id: a.GetId(), Now: true}); err != nil {
						return err
					}
				}
			}
			served, _, err := bundle.Parse(trading.TrustDomain(), trading.BundleJSON())
			if err != nil {
				return err
			}
			eventually(t, "a subscriber holds it", 15*time.Second, func() error {
				held, _, err := bundle.Parse(trading.TrustDomain(), view.Load().Bundles["trading.example"])
				if err == nil && (held.Sequence < served.Sequence || string(view.Load().Bundles["trading.example"]) == before) {
					err = fmt.Errorf("it holds sequence %d, %d is served", held.Sequence, served.Sequence)
				}
				return err
			})
			if held := last.Status().GetForeign()[0]; held.GetSequence() < served.Sequence {
				return fmt.Errorf("the node's status: %v", held)
			}
			return nil
		}},
		act("a backup", func(ctx context.Context) error {
			stream, err := admin.SaveSnapshot(ctx, &ententev1.SaveSnapshotRequest{})
			if err == nil {
				_, err = stream.Recv()
			}
			return err
		}),
		act("reading", func(ctx context.Context) error {
			_, err := admin.ListEntries(ctx, &ententev1.ListEntriesRequest{})
			_, more := admin.ListNodes(ctx, &ententev1.ListNodesRequest{})
			_, also := admin.ListAuthorities(ctx, &ententev1.ListAuthoritiesRequest{})
			return errors.Join(err, more, also)
		}),
		act("isolation of a host, at this node", func(context.Context) error {
			_, err := isolate(t, last, "h9")
			return err
		}),
	}
	off := []row{
		act("a new host by token", func(context.Context) error {
			newHost.Addresses, newHost.Pins = []string{last.Config().Advertise.API}, []string{last.Node().ID()}
			_, err := attestWith(t, last, newHost)
			return err
		}),
		{"a new CA node", func(t *testing.T, ctx context.Context) error {
			parsed, err := ca.ParseToken(nodeToken)
			if err != nil {
				return err
			}
			parsed.Addresses, parsed.Pins = []string{last.Config().Advertise.API}, []string{last.Node().ID()}
			text, err := parsed.Text()
			if err != nil {
				return err
			}
			return joinNode(t, ctx, text)
		}},
		act("a changed catalogue: services, agreements, federation", func(context.Context) error {
			_, err := last.TryApply(cards)
			return err
		}),
		act("entries", func(ctx context.Context) error {
			resp, err := admin.ChangeEntries(ctx, &ententev1.ChangeEntriesRequest{Changes: []*statev1.EntryChange{{Action: &statev1.EntryChange_Create{
				Create: &statev1.Entry{Id: "entry/x", Path: "/x", Hosts: []string{"h1"}, Selectors: []string{"unix:uid:7"}},
			}}}})
			if err == nil && resp.GetResults()[0].GetCode() != 0 {
				err = status.Error(codes.Code(resp.GetResults()[0].GetCode()), resp.GetResults()[0].GetError())
			}
			return err
		}),
		act("join tokens", func(ctx context.Context) error {
			_, err := admin.CreateToken(ctx, &ententev1.CreateTokenRequest{Agent: &statev1.AgentGrant{Name: "h5", Datacenter: "dc1"}})
			return err
		}),
		act("revoking a token", func(ctx context.Context) error {
			_, err := admin.RevokeToken(ctx, &ententev1.RevokeTokenRequest{Id: unused})
			return err
		}),
		act("removal of a CA node", func(ctx context.Context) error {
			_, err := admin.RemoveNode(ctx, &ententev1.RemoveNodeRequest{Name: "ca-1"})
			return err
		}),
		act("taint", func(ctx context.Context) error {
			_, err := admin.TaintAuthority(ctx, &ententev1.ChangeAuthorityRequest{Id: others})
			return err
		}),
		act("revocation", func(ctx context.Context) error {
			_, err := admin.RevokeAuthority(ctx, &ententev1.ChangeAuthorityRequest{Id: own, Now: true})
			return err
		}),
		act("a ban", func(ctx context.Context) error {
			_, err := admin.BanAgent(ctx, &ententev1.ChangeAgentRequest{Name: "h2"})
			return err
		}),
		act("an eviction", func(ctx context.Context) error {
			_, err := admin.EvictAgent(ctx, &ententev1.ChangeAgentRequest{Name: "h2"})
			return err
		}),
	}
	before := last.Status().GetRevision()
	t.Run("rows", func(t *testing.T) {
		for _, r := range on {
			t.Run("goes on: "+r.what, func(t *testing.T) {
				t.Parallel()
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				defer cancel()
				if err := r.do(t, ctx); err != nil {
					t.Error(err)
				}
			})
		}
		for _, r := range off {
			t.Run("waits: "+r.what, func(t *testing.T) {
				t.Parallel()
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				defer cancel()
				begin := time.Now()
				err := r.do(t, ctx)
				for _, words := range []string{"no quorum since 20", "Signing, renewal", "nothing was changed", "To do:"} {
					if err == nil || !strings.Contains(err.Error(), words) {
						t.Fatalf("it does not say %q: %v", words, err)
					}
				}
				if took := time.Since(begin); took > 10*time.Second {
					t.Errorf("the answer took %v", took)
				}
			})
		}
	})
	if now := last.Status().GetRevision(); now != before {
		t.Errorf("the revision went from %s to %s without quorum", ca.Revision(before), ca.Revision(now))
	}

	// With quorum again the other domain's bundle is agreed, and no subscriber goes back.
	sequence := func() uint64 {
		b, _, err := bundle.Parse(trading.TrustDomain(), view.Load().Bundles["trading.example"])
		if err != nil {
			t.Fatal(err)
		}
		return b.Sequence
	}
	newest := sequence()
	nodes[0].Restart()
	eventually(t, "the bundle is agreed", 30*time.Second, func() error {
		if now := sequence(); now < newest {
			t.Fatalf("the subscriber went from sequence %d to %d (I8)", newest, now)
		}
		if f := nodes[0].Status().GetForeign(); len(f) != 1 || f[0].GetSequence() < newest {
			return fmt.Errorf("%v", f)
		}
		return nil
	})

	// No CA node at all: everything that is held stays in use.
	nodes[0].Kill()
	held := view.Load()
	last.Kill()
	time.Sleep(100 * time.Millisecond)
	if v := view.Load(); v.Revision < held.Revision || len(v.Entries) != 2 || len(v.Bundles) != 2 {
		t.Errorf("without any node: revision %s, %d entries", ca.Revision(v.Revision), len(v.Entries))
	}
}

// joinNode asks to be admitted as a further CA node.
func joinNode(t *testing.T, ctx context.Context, token string) error {
	c := catest.Prepare(t, catest.Options{Name: "ca-4"})
	return node.Join(ctx, c.Config(), token)
}
