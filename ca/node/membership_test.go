package node_test

import (
	"crypto/x509"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/node"
)

// One operator of three proposes, a second approves; only then a token admits, and a
// node is removed. What one node proposes by itself, in an operator's name, is refused.
func TestOperatorsApproveChangesOfTheNodes(t *testing.T) {
	t.Parallel()
	nodes := cluster(t)
	ctx := t.Context()
	grant := &statev1.NodeGrant{Name: "ca-4", Datacenter: "dc1", Voter: true, Signing: true}

	made, err := nodes[0].Admin().CreateToken(ctx, &ententev1.CreateTokenRequest{Node: grant})
	if err != nil {
		t.Fatal(err)
	}
	change := made.GetApproval()
	if change.GetNeeded() != 2 || len(change.GetApprovedBy()) != 1 || len(change.GetMissing()) != 2 || !strings.Contains(change.GetWhat(), "ca-4") {
		t.Fatalf("approval %v", change)
	}
	// The token admits nobody yet: nor does any node's word make it.
	four := catest.Prepare(t, catest.Options{Name: "ca-4"})
	if err := node.Join(ctx, four.Config(), made.GetToken()); err == nil {
		t.Fatal("a token that one operator alone approved admits a CA node")
	}
	for i, c := range nodes {
		outcome, err := c.Node().Propose(ctx, &statev1.Command{Actor: "somebody", Body: &statev1.Command_CreateToken{CreateToken: &statev1.CreateToken{Token: &statev1.Token{
			Id: "forged", PublicKey: make([]byte, 32), NotAfter: time.Now().Add(time.Hour).Unix(), Grant: &statev1.Token_Node{Node: grant},
		}}}})
		if err != nil || outcome.Refused == nil {
			t.Errorf("node %d alone made a token for a CA node: %v, %v", i, outcome, err)
		}
		outcome, err = c.Node().Propose(ctx, &statev1.Command{Actor: "somebody", Body: &statev1.Command_RemoveMember{RemoveMember: &statev1.RemoveMember{Id: nodes[(i+1)%3].Node().ID()}}})
		if err != nil || outcome.Refused == nil {
			t.Errorf("node %d alone removed another: %v, %v", i, outcome, err)
		}
	}
	// The same operator again does not count; that of another node does.
	if again, err := nodes[0].Admin().ApproveChange(ctx, &ententev1.ApproveChangeRequest{Id: change.GetId()[:12]}); err != nil || again.GetCarriedOut() {
		t.Errorf("the first operator approved twice: %v, %v", again, err)
	}
	caughtUp(t, nodes[0], nodes[1], nodes[2])
	list, err := nodes[2].Admin().ListChanges(ctx, &ententev1.ListChangesRequest{})
	if err != nil || len(list.GetChanges()) != 1 || len(nodes[2].Status().GetChanges()) != 1 {
		t.Errorf("pending at another node: %v, %v", list, err)
	}
	done, err := nodes[2].Admin().ApproveChange(ctx, &ententev1.ApproveChangeRequest{Id: change.GetId()[:12]})
	if err != nil || !done.GetCarriedOut() {
		t.Fatalf("approved by two of three: %v, %v", done, err)
	}
	if err := node.Join(ctx, four.Config(), made.GetToken()); err != nil {
		t.Fatalf("control: an approved token does not admit: %v", err)
	}
	nodes[0].Befriend(four)
	four.Restart()
	four.WaitReady()

	// A removal waits in the same way, now for three of four.
	caughtUp(t, nodes[0], nodes[1], nodes[2], four)
	removal, err := nodes[1].Admin().RemoveNode(ctx, &ententev1.RemoveNodeRequest{Name: "ca-4"})
	if err != nil || removal.GetApproval().GetNeeded() != 3 {
		t.Fatalf("removal: %v, %v", removal, err)
	}
	for i, c := range []*catest.CA{nodes[0], nodes[2]} {
		answerLost := false // by an election: the approval may have been agreed all the same
		eventually(t, "the proposal reaches the node", 10*time.Second, func() error {
			done, err := c.Admin().ApproveChange(ctx, &ententev1.ApproveChangeRequest{Id: removal.GetApproval().GetId()})
			switch {
			case err == nil && done.GetCarriedOut() != (i == 1):
				t.Fatalf("approval %d: %v", i+2, done)
			case status.Code(err) != codes.NotFound:
				answerLost = answerLost || err != nil
			case answerLost && i == 1:
				return nil // carried out: what follows shows it
			}
			return err
		})
	}
	if err := four.WaitEnd(20 * time.Second); err == nil {
		t.Error("the removed node runs on")
	}
	eventually(t, "what was carried out is no change that can be approved", 10*time.Second, func() error { // this node may not know yet
		if _, err := nodes[0].Admin().ApproveChange(ctx, &ententev1.ApproveChangeRequest{Id: removal.GetApproval().GetId()}); status.Code(err) != codes.NotFound {
			return fmt.Errorf("it was approved again: %w", err)
		}
		return nil
	})
}

// Approvals are given on the hosts of CA nodes: an SVID with every role does not count,
// since the CA node that is to be outvoted can sign one.
func TestAdministratorsDoNotApprove(t *testing.T) {
	t.Parallel()
	nodes := cluster(t)
	admin := administrator(t, nodes[0])
	_, err := admin.RemoveNode(t.Context(), &ententev1.RemoveNodeRequest{Name: "ca-2"})
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "on the host of a CA node") {
		t.Errorf("an administrator proposed a removal: %v", err)
	}
	if _, err := admin.CreateToken(t.Context(), &ententev1.CreateTokenRequest{Agent: &statev1.AgentGrant{Name: "h7", Datacenter: "dc1", Addresses: []string{"127.0.0.7"}}}); err != nil {
		t.Errorf("control: an administrator makes a token for a host: %v", err)
	}
	proposed, err := nodes[0].Admin().RemoveNode(t.Context(), &ententev1.RemoveNodeRequest{Name: "ca-2"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := admin.ApproveChange(t.Context(), &ententev1.ApproveChangeRequest{Id: proposed.GetApproval().GetId()}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("an administrator approved: %v", err)
	}
	for _, a := range nodes[0].Status().GetMembers() {
		if a.GetMember().GetName() == "ca-2" {
			return
		}
	}
	t.Error("the node was removed")
}

// administrator is a client whose SVID is bound to the role trust-admin.
func administrator(t *testing.T, c *catest.CA) ententev1.AdminClient {
	t.Helper()
	c.Apply(accounts)
	c.Apply("apiVersion: entente/v1\nkind: RoleBinding\nmetadata: {name: trust}\nspec: {role: trust-admin, subjects: [/accounts]}\n")
	h := attest(t, c, "h1")
	var own *x509svid.SVID
	eventually(t, "an SVID", 10*time.Second, func() error {
		der, err := sign(t.Context(), h.at(t, c), h.csr)
		if err != nil {
			return err
		}
		leaf, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		id, err := x509svid.IDFromCert(leaf)
		own = &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{leaf}, PrivateKey: h.cfg.SVID.(svidSource).svid.PrivateKey}
		return err
	})
	h.cfg.SVID = svidSource{own}
	admin, end, err := h.at(t, c).Admin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(end)
	return admin
}
