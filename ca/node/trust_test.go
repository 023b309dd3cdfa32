package node_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
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
)

func removeNode(ctx context.Context, c *catest.CA, name string, compromised bool) error {
	_, err := c.RemoveNode(ctx, name, compromised)
	return err
}

// A removal that would leave too few voters that answer is refused; the one of a voter
// that is gone is what one wants then. A leader hands over before it goes.
func TestRemovalKeepsQuorum(t *testing.T) {
	t.Parallel()
	nodes := cluster(t)
	leader, follower, dead := nodes[0], nodes[1], nodes[2]
	dead.Kill()
	time.Sleep(2500 * time.Millisecond) // until the leader takes it for silent
	for _, name := range []string{"ca-2", "ca-1"} {
		eventually(t, "the removal of "+name+", one of two that live, is refused", 20*time.Second, func() error {
			err := removeNode(t.Context(), follower, name, false)
			switch code := status.Code(err); {
			case err == nil:
				t.Fatal("it was removed")
			case code == codes.FailedPrecondition && strings.Contains(err.Error(), "answer now"):
				return nil
			case code != codes.Unavailable: // an election
				t.Fatal(err)
			}
			return err
		})
	}
	eventually(t, "control: the dead one is removed", 30*time.Second, func() error {
		err := removeNode(t.Context(), follower, "ca-3", false)
		if status.Code(err) == codes.NotFound {
			return nil // by the try before, whose answer did not come
		}
		return err
	})
	again := leader.Join("ca-4", "dc3")
	// The leader is asked to remove itself. Who leads may change on a busy machine.
	var gone *catest.CA
	eventually(t, "somebody leads", 10*time.Second, func() error {
		for _, c := range []*catest.CA{leader, follower, again} {
			if c.Node().IsLeader() {
				gone = c
				return nil
			}
		}
		return errors.New("nobody does")
	})
	eventually(t, "the leader is removed", 30*time.Second, func() error {
		err := removeNode(t.Context(), gone, gone.Config().Name, false)
		if code := status.Code(err); code == codes.NotFound || code == codes.Unavailable && !member(left(gone, follower, again), gone) {
			return nil
		}
		return err
	})
	if err := gone.WaitEnd(time.Minute); err == nil {
		t.Error("the removed node ended without a reason")
	}
	rest := left(gone, follower, again)
	eventually(t, "the two that are left agree", 20*time.Second, func() error {
		_, err := rest.TryApply(accounts)
		return err
	})
	for _, a := range rest.Status().GetAuthorities() {
		if m := a.GetMemberId(); a.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_REVOKED {
			t.Errorf("a planned removal revoked the authority %s of %s", a.GetId(), m)
		}
	}
}

// left is a node that is not the one that goes.
func left(gone *catest.CA, others ...*catest.CA) *catest.CA {
	for _, c := range others {
		if c != gone {
			return c
		}
	}
	return nil
}

// member tells whether a node knows another one as a member.
func member(at, other *catest.CA) bool {
	for _, m := range at.Status().GetMembers() {
		if m.GetMember().GetId() == other.Node().ID() {
			return true
		}
	}
	return false
}

// I3 as an operator sees it: at any node, the list says who has not acknowledged, and
// activation is refused with that. What was assumed stays in the state.
func TestAuthorityListSaysForWhom(t *testing.T) {
	t.Parallel()
	one := catest.Start(t, catest.Options{})
	two := one.Join("ca-2", "dc2")
	one.Apply(accounts)
	h := attest(t, one, "h1")
	ctx, cancel := context.WithCancel(t.Context())
	holds := make(chan struct{})
	synced := make(chan error, 1)
	subscriber := h.at(t, one)
	go func() {
		synced <- subscriber.Sync(ctx, func(v *client.View) error {
			select {
			case <-holds:
				return nil
			default:
				return errors.New("its workloads do not hold it")
			}
		})
	}()
	defer func() { cancel(); <-synced }()
	eventually(t, "the subscriber is there", 5*time.Second, func() error {
		if one.Status().GetSubscribers() == 0 {
			return errors.New("no subscriber")
		}
		return nil
	})
	// A taint at the second node makes it use its prepared authority, if ready, and make another.
	var active string
	eventually(t, "all is ready before", 5*time.Second, func() error {
		for _, a := range one.Status().GetAuthorities() {
			if a.GetMemberId() == two.Node().ID() && ca.Signs(a.GetPhase()) {
				active = a.GetId()
			}
		}
		if active == "" {
			return errors.New("not yet")
		}
		return nil
	})
	if _, err := two.Admin().TaintAuthority(t.Context(), &ententev1.ChangeAuthorityRequest{Id: active}); err != nil {
		t.Fatal(err)
	}
	var waiting *ententev1.AuthorityStatus
	for _, c := range []*catest.CA{one, two} { // the leader and a follower say the same
		eventually(t, "the list says for whom it waits", 5*time.Second, func() error {
			r, err := c.Admin().ListAuthorities(t.Context(), &ententev1.ListAuthoritiesRequest{})
			if err != nil {
				return err
			}
			for _, a := range r.GetAuthorities() {
				if a.GetAuthority().GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED && !a.GetAuthority().GetReady() &&
					strings.Contains(strings.Join(a.GetWaitingFor(), " "), "agent h1") {
					waiting = a
					return nil
				}
			}
			return fmt.Errorf("%v", r)
		})
	}
	_, err := two.Admin().ActivateAuthority(t.Context(), &ententev1.ChangeAuthorityRequest{Id: waiting.GetAuthority().GetId()})
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "agent h1") {
		t.Errorf("activated although a subscriber does not hold it: %v", err)
	}
	close(holds)
	one.Apply("apiVersion: entente/v1\nkind: Service\nmetadata: {name: cards}\nspec: {run: {uid: 1001, hosts: [h1]}, port: 8081}\n") // the handler is asked again
	eventually(t, "control: it may be used", 5*time.Second, func() error {
		_, err := two.Admin().ActivateAuthority(t.Context(), &ententev1.ChangeAuthorityRequest{Id: waiting.GetAuthority().GetId()})
		return err
	})
}

// A member that does not report holds the gate. An operator may exclude it, and only
// such a one, and that is recorded.
func TestExclude(t *testing.T) {
	t.Parallel()
	nodes := cluster(t)
	lost := nodes[2]
	var leader, follower *catest.CA
	// pending waits until a node's next authority waits for the lost node alone.
	pending := func(at *catest.CA) (next string) {
		t.Helper()
		eventually(t, at.Config().Name+" misses the third node", 30*time.Second, func() error {
			r, err := at.Admin().ListAuthorities(t.Context(), &ententev1.ListAuthoritiesRequest{})
			if err != nil {
				return err
			}
			for _, a := range r.GetAuthorities() {
				if a.GetNode() != at.Config().Name || a.GetAuthority().GetUse() != statev1.KeyUse_KEY_USE_WIT || a.GetAuthority().GetPhase() != statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED {
					continue
				}
				if next = a.GetAuthority().GetId(); slices.Equal(a.GetWaitingFor(), []string{"CA node ca-3 does not report"}) {
					return nil
				}
				if a.GetAuthority().GetReady() { // giving it up makes the node prepare another one
					_, err = at.Admin().TaintAuthority(t.Context(), &ententev1.ChangeAuthorityRequest{Id: next})
					return cmp.Or(err, errors.New("tainted"))
				}
			}
			return fmt.Errorf("%v", r)
		})
		return next
	}
	lost.Kill()
	eventually(t, "one of the two that are left leads", 20*time.Second, func() error {
		leader, follower = nodes[0], nodes[1]
		if follower.Node().IsLeader() {
			leader, follower = follower, leader
		}
		if !leader.Node().IsLeader() {
			return errors.New("nobody leads")
		}
		return nil
	})
	// Through the follower it goes over the door between CA nodes, which asks who calls.
	for where, at := range map[string]*catest.CA{"at the leader": leader, "through a follower": follower} {
		next := pending(at)
		activate := func(exclude ...string) error {
			var err error
			eventually(t, "an answer of the leader", 10*time.Second, func() error { // an election may pass by
				_, err = at.Admin().ActivateAuthority(t.Context(), &ententev1.ChangeAuthorityRequest{Id: next, Exclude: exclude})
				if err != nil && (strings.Contains(err.Error(), "no CA node leads") || strings.Contains(err.Error(), "the leader cannot be asked")) {
					return err
				}
				return nil
			})
			return err
		}
		for name, refused := range map[string]struct {
			exclude []string
			why     string
		}{
			"nobody": {nil, "ca-3"}, "who reports": {[]string{follower.Config().Name}, follower.Config().Name}, "both": {[]string{"ca-3", leader.Config().Name}, leader.Config().Name}, "a stranger": {[]string{"ca-9", "ca-3"}, "ca-9"},
		} {
			err := activate(refused.exclude...)
			if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), refused.why) || strings.Contains(err.Error(), "may not call") {
				t.Errorf("%s, %s excluded: %v", where, name, err)
			}
		}
		if err := activate("ca-3"); err != nil {
			t.Errorf("%s: %v", where, err)
			continue
		}
		for _, a := range at.Status().GetAuthorities() {
			if a.GetId() == next && (!ca.Signs(a.GetPhase()) || !slices.Equal(a.GetAssumed(), []string{"CA node ca-3 (excluded)"})) {
				t.Errorf("%s: %v", where, a)
			}
		}
		recorded, err := os.ReadFile(filepath.Join(at.Config().DataDir, "audit.log"))
		if err != nil || !bytes.Contains(recorded, []byte("without the word of node/ca-3")) {
			t.Errorf("%s: not in the audit log: %v", where, err)
		}
		if leader.Node().IsLeader() == follower.Node().IsLeader() {
			t.Errorf("%s: the leader changed meanwhile, nothing is shown", where)
		}
	}
}

// Taint at one node: the others go on signing, and nobody signs with the tainted one.
func TestTaintStopsIssuing(t *testing.T) {
	t.Parallel()
	one := catest.Start(t, catest.Options{})
	one.Apply(accounts)
	h := attest(t, one, "h1")
	var old string
	eventually(t, "the next one is ready", 5*time.Second, func() error {
		ready := 0
		for _, a := range one.Status().GetAuthorities() {
			if a.GetUse() != statev1.KeyUse_KEY_USE_X509 {
				continue
			}
			if a.GetReady() {
				ready++
			}
			if ca.Signs(a.GetPhase()) {
				old = a.GetId()
			}
		}
		if ready < 2 {
			return errors.New("not yet")
		}
		return nil
	})
	under := func() string {
		var leaf []byte
		eventually(t, "an SVID is signed", 5*time.Second, func() (err error) {
			leaf, err = sign(t.Context(), h.at(t, one), h.csr)
			return err
		})
		return signedUnder(t, leaf)
	}
	if under() != ca.AuthorityKeyID(old) {
		t.Fatal("control: not signed under the active authority")
	}
	if _, err := one.Admin().TaintAuthority(t.Context(), &ententev1.ChangeAuthorityRequest{Id: old}); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if under() == ca.AuthorityKeyID(old) {
			t.Fatal("signed under a tainted authority")
		}
	}
	// Its key is gone from the disk, too.
	eventually(t, "another one is prepared", 5*time.Second, func() error {
		for _, a := range one.Status().GetAuthorities() {
			if a.GetUse() == statev1.KeyUse_KEY_USE_X509 && a.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED {
				return nil
			}
		}
		return errors.New("not yet")
	})
}

func signedUnder(t *testing.T, der []byte) string {
	t.Helper()
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return ca.SignedUnder(leaf)
}
