package node_test

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/node"
	"github.com/entente-mesh/entente/internal/peer"
)

// cable leads to an address as long as it is not cut.
type cable struct {
	listener net.Listener
	to       string

	mu    sync.Mutex
	cut   bool
	conns map[net.Conn]bool
}

func newCable(t *testing.T, to string) *cable {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cable{listener: listener, to: to, conns: map[net.Conn]bool{}}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			in, err := listener.Accept()
			if err != nil {
				return
			}
			running.Go(func() { c.carry(in) })
		}
	})
	t.Cleanup(func() {
		listener.Close()
		c.set(true)
		running.Wait()
	})
	return c
}

func (c *cable) carry(in net.Conn) {
	defer in.Close()
	out, err := net.Dial("tcp", c.to)
	if err != nil {
		return
	}
	defer out.Close()
	c.mu.Lock()
	cut := c.cut
	c.conns[in], c.conns[out] = true, true
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.conns, in)
		delete(c.conns, out)
	}()
	if cut {
		return
	}
	var both sync.WaitGroup
	both.Go(func() { io.Copy(out, in); out.Close() })
	both.Go(func() { io.Copy(in, out); in.Close() })
	both.Wait()
}

func (c *cable) set(cut bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cut = cut
	if cut {
		for conn := range c.conns {
			conn.Close()
		}
	}
}

// A node without quorum takes into use the one authority that was marked ready before.
// When there is quorum again, the cluster learns of it, and what the cluster decided
// meanwhile wins (I3, I5).
func TestOfflineActivation(t *testing.T) {
	t.Parallel()
	one := catest.Start(t, catest.Options{})
	one.Join("ca-2", "dc2")
	three := catest.Prepare(t, catest.Options{Name: "ca-3", Datacenter: "dc3"})
	line := newCable(t, three.Config().Listen.Raft)
	three.Config().Advertise.Raft = line.listener.Addr().String()
	if err := node.Join(t.Context(), three.Config(), one.NodeToken("ca-3", "dc3")); err != nil {
		t.Fatal(err)
	}
	three.Restart()
	three.WaitReady()
	one.Apply(accounts)
	h := attest(t, one, "h1")
	caughtUp(t, one, three)

	status3 := func(c *catest.CA, phase statev1.AuthorityPhase) *ententev1.AuthorityStatus {
		r, err := c.Admin().ListAuthorities(t.Context(), &ententev1.ListAuthoritiesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range r.GetAuthorities() {
			if a.GetNode() == "ca-3" && a.GetAuthority().GetUse() == statev1.KeyUse_KEY_USE_X509 && a.GetAuthority().GetPhase() == phase {
				return a
			}
		}
		return nil
	}
	const (
		prepared = statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED
		active   = statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE
	)
	activate := func(c *catest.CA, id string) (*ententev1.ChangeAuthorityResponse, error) {
		return c.Admin().ActivateAuthority(t.Context(), &ententev1.ChangeAuthorityRequest{Id: id})
	}
	// offline cuts the third node off and has it use its next authority.
	offline := func() (old, next string) {
		t.Helper()
		eventually(t, "the next authority is ready, as the third node knows", 20*time.Second, func() error {
			a := status3(three, prepared)
			if !a.GetAuthority().GetReady() || status3(three, active) == nil {
				return fmt.Errorf("%v", a)
			}
			next = a.GetAuthority().GetId()
			return nil
		})
		old = status3(three, active).GetAuthority().GetId()
		line.set(true)
		eventually(t, "the third node has no quorum", 20*time.Second, func() error {
			if three.Status().GetNotAgreeing() == "" {
				return errors.New("it agrees")
			}
			return nil
		})
		if r, err := activate(three, next); err != nil || !r.GetOffline() {
			t.Fatalf("activate without quorum: %v, %v", r, err)
		}
		return old, next
	}
	signs := func(want string) *x509.Certificate {
		t.Helper()
		var cert *x509.Certificate
		eventually(t, "the third node signs under the authority", 20*time.Second, func() error {
			der, err := sign(t.Context(), h.at(t, three), h.csr)
			if err != nil {
				return err
			}
			if cert, err = x509.ParseCertificate(der); err != nil {
				return err
			}
			if under := ca.SignedUnder(cert); want != "" && under != ca.AuthorityKeyID(want) {
				return fmt.Errorf("signed under %s", under)
			}
			return nil
		})
		return cert
	}
	accepted := func(at *catest.CA, cert *x509.Certificate) bool {
		_, err := peer.Verify([]*x509.Certificate{cert}, at.Bundle(), time.Now())
		return err == nil
	}
	settled := func(id string, phase statev1.AuthorityPhase) {
		t.Helper()
		eventually(t, "the third node knows what was decided", 30*time.Second, func() error {
			for _, a := range three.Status().GetAuthorities() {
				if a.GetId() == id && a.GetPhase() == phase && three.Status().GetNotAgreeing() == "" {
					return nil
				}
			}
			return errors.New("not yet")
		})
		eventually(t, "nothing is used without the state's word", 5*time.Second, func() error {
			r, err := three.Admin().ListAuthorities(t.Context(), &ententev1.ListAuthoritiesRequest{})
			for _, a := range r.GetAuthorities() {
				if a.GetOffline() {
					return fmt.Errorf("%v", a)
				}
			}
			return err
		})
	}

	// What is refused: one of another node, one that is not PREPARED, a new one.
	old, next := offline()
	foreign := ""
	for _, a := range three.Status().GetAuthorities() {
		if a.GetMemberId() == one.Node().ID() && a.GetPhase() == prepared {
			foreign = a.GetId()
		}
	}
	for name, id := range map[string]string{"another node's": foreign, "the former": old} {
		if _, err := activate(three, id); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "no quorum since") {
			t.Errorf("%s without quorum: %v", name, err)
		}
	}
	if _, err := three.Admin().PrepareAuthority(t.Context(), &ententev1.PrepareAuthorityRequest{}); err == nil {
		t.Error("prepared without quorum")
	}
	if _, err := activate(three, next); err != nil {
		t.Errorf("the same again: %v", err)
	}
	if !accepted(one, signs(next)) {
		t.Error("the majority does not accept what it signed (I3)")
	}
	// A restart comes to the same authority, or stays with the one before: no third.
	three.Kill()
	three.Restart()
	three.WaitReady()
	if under := ca.SignedUnder(signs("")); under != ca.AuthorityKeyID(next) && under != ca.AuthorityKeyID(old) {
		t.Errorf("after a restart it signs under %s", under)
	}
	eventually(t, "no quorum after the restart", 20*time.Second, func() error {
		_, err := activate(three, next)
		return err
	})
	// 1. Nobody decided otherwise: the state learns of it.
	line.set(false)
	settled(next, active)
	if !accepted(one, signs(next)) {
		t.Error("not accepted after the return")
	}

	// 2. The majority tainted it meanwhile.
	_, next = offline()
	void := signs(next)
	if _, err := one.Admin().TaintAuthority(t.Context(), &ententev1.ChangeAuthorityRequest{Id: next}); err != nil {
		t.Fatal(err)
	}
	if !accepted(one, void) {
		t.Error("TAINTED, and not accepted: nobody should be cut off")
	}
	line.set(false)
	settled(next, statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED)
	if cert := signs(""); ca.SignedUnder(cert) == ca.AuthorityKeyID(next) || !accepted(one, cert) {
		t.Error("it goes on signing under what was tainted")
	}

	// 3. The majority revoked it meanwhile.
	_, next = offline()
	void = signs(next)
	if _, err := one.Admin().RevokeAuthority(t.Context(), &ententev1.ChangeAuthorityRequest{Id: next, Now: true}); err != nil {
		t.Fatal(err)
	}
	if accepted(one, void) || !accepted(three, void) {
		t.Error("revoked at the majority alone: one refuses, the other cannot know")
	}
	line.set(false)
	settled(next, statev1.AuthorityPhase_AUTHORITY_PHASE_REVOKED)
	if cert := signs(""); !accepted(one, cert) || accepted(three, void) {
		t.Error("after the return both accept the same")
	}
}
