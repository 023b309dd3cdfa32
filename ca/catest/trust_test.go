package catest_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/keystore"
	"github.com/entente-mesh/entente/ca/node"
	"github.com/entente-mesh/entente/internal/jwtsvid"
	"github.com/entente-mesh/entente/internal/peer"
	"github.com/entente-mesh/entente/internal/peer/peertest"
	"github.com/entente-mesh/entente/meshagent"
	"github.com/entente-mesh/entente/meshagent/nodeattest"
)

// workloads are a service on each of two hosts.
const workloads = `
apiVersion: entente/v1
kind: Service
metadata: {name: accounts}
spec: {run: {uid: 1000, hosts: [h1]}, port: 8080}
---
apiVersion: entente/v1
kind: Service
metadata: {name: cards}
spec: {run: {uid: 1001, hosts: [h2]}, port: 8081}
---
apiVersion: entente/v1
kind: Service
metadata: {name: reports}
spec: {run: {uid: 1002, hosts: [h3]}, port: 8083}
`

func eventually(t *testing.T, what string, within time.Duration, f func() error) time.Duration {
	t.Helper()
	begin := time.Now()
	for {
		err := f()
		if err == nil {
			return time.Since(begin)
		}
		if time.Since(begin) > within {
			t.Fatalf("%s: not within %v: %v", what, within, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// agent is a real agent of a host, with one service.
type agent struct {
	*meshagent.Agent
	dir   string
	entry string
	stop  func()
}

func startAgent(t *testing.T, c *catest.CA, name, entry, token, dir string) *agent {
	t.Helper()
	text := fmt.Sprintf("trustDomain: banking.example\nname: %s\ndatacenter: dc1\ndataDir: %s\nca: {addresses: [%q], token: %q}\nworkloadAPI: {wit: true}\n", name, dir, c.Addresses()[0], token)
	cfg, err := meshagent.ReadConfig("agent.yaml", strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	var log *slog.Logger
	if testing.Verbose() {
		log = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})).With("agent", name)
	}
	a, err := meshagent.New(cfg, log)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	stop := sync.OnceFunc(func() { cancel(); <-ended })
	t.Cleanup(stop)
	running := &agent{a, dir, entry, stop}
	eventually(t, "agent "+name+" is ready", 10*time.Second, a.Ready)
	return running
}

func newAgent(t *testing.T, c *catest.CA, name, entry string) *agent {
	t.Helper()
	return startAgent(t, c, name, entry, c.AgentToken(name, "dc1"), t.TempDir())
}

// svid is the workload's SVID. One that was revoked is dropped at once, so that there may be
// none until the next is signed.
func (a *agent) svid(t *testing.T) (svid *x509svid.SVID) {
	t.Helper()
	eventually(t, a.entry+" has an SVID", 10*time.Second, func() (err error) {
		svid, err = a.SVIDs(a.entry).GetX509SVID()
		return err
	})
	return svid
}

// under is whether the agent's workload has an SVID under that authority.
func (a *agent) under(t *testing.T, authority string) bool {
	return ca.SignedUnder(a.svid(t).Certificates[0]) == ca.AuthorityKeyID(authority)
}

// door is a TLS endpoint of one agent's workload, with open connections rechecked
// whenever the agent's picture changes, as the sidecar does.
type door struct {
	address  string
	registry *peer.Registry
}

func openDoor(t *testing.T, a *agent) *door {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d := &door{address: listener.Addr().String(), registry: &peer.Registry{}}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	t.Cleanup(func() { cancel(); listener.Close(); running.Wait() })
	running.Go(func() {
		for {
			state := a.State()
			d.registry.Recheck()
			select {
			case <-state.Changed():
			case <-ctx.Done():
				return
			}
		}
	})
	config := peer.ServerTLS(a.SVIDs(a.entry), a.Bundles(), peer.AnyVerified())
	running.Go(func() {
		for {
			raw, err := listener.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer raw.Close()
				conn := tls.Server(raw, config)
				if conn.HandshakeContext(ctx) != nil {
					return
				}
				untrack := d.registry.Track(conn, conn.ConnectionState(), peer.Recheck(conn.ConnectionState(), a.Bundles(), peer.AnyVerified()))
				defer untrack()
				defer context.AfterFunc(ctx, func() { raw.Close() })()
				io.Copy(conn, conn)
			})
		}
	})
	return d
}

// connect opens a connection of a workload to the door, and proves that it works.
func connect(t *testing.T, d *door, svid *x509svid.SVID) (*tls.Conn, error) {
	t.Helper()
	cert := tls.Certificate{PrivateKey: svid.PrivateKey}
	for _, c := range svid.Certificates {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	// The client is not under test.
	conn, err := tls.Dial("tcp", d.address, &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, Certificates: []tls.Certificate{cert}})
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { conn.Close() })
	return conn, echo(conn)
}

func echo(conn *tls.Conn) error {
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := conn.Write([]byte{1}); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, make([]byte, 1))
	return err
}

// cut waits until the other end has closed the connection.
func cut(t *testing.T, what string, conn *tls.Conn) {
	t.Helper()
	begin := time.Now()
	conn.SetDeadline(begin.Add(5 * time.Second))
	_, err := conn.Read(make([]byte, 1))
	took := time.Since(begin)
	if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("%s: the connection is open after %v", what, took)
	}
	if took > time.Second {
		t.Errorf("%s: cut after %v, I4 allows a second", what, took)
	}
	t.Logf("%s: cut after %v", what, took)
}

func authorities(t *testing.T, c *catest.CA) []*ententev1.AuthorityStatus {
	t.Helper()
	r, err := c.Admin().ListAuthorities(t.Context(), &ententev1.ListAuthoritiesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return r.GetAuthorities()
}

// inPhase finds the one authority of a node and use in that phase.
func inPhase(t *testing.T, c *catest.CA, node string, use statev1.KeyUse, phase statev1.AuthorityPhase) *ententev1.AuthorityStatus {
	t.Helper()
	for _, a := range authorities(t, c) {
		if a.GetNode() == node && a.GetAuthority().GetUse() == use && a.GetAuthority().GetPhase() == phase {
			return a
		}
	}
	return nil
}

func waitReady(t *testing.T, c *catest.CA, node string, use statev1.KeyUse) *statev1.Authority {
	t.Helper()
	var found *statev1.Authority
	eventually(t, "a prepared authority is ready", 10*time.Second, func() error {
		a := inPhase(t, c, node, use, prepared)
		if !a.GetAuthority().GetReady() {
			return fmt.Errorf("not yet: %v", a)
		}
		found = a.GetAuthority()
		return nil
	})
	return found
}

const (
	prepared = statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED
	active   = statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE
	retired  = statev1.AuthorityPhase_AUTHORITY_PHASE_RETIRED
	revoked  = statev1.AuthorityPhase_AUTHORITY_PHASE_REVOKED

	x509Use = statev1.KeyUse_KEY_USE_X509
	jwtUse  = statev1.KeyUse_KEY_USE_JWT
	witUse  = statev1.KeyUse_KEY_USE_WIT
)

// The runbook "rotation by hand" of docs/operations.md, step by step and in the wrong
// order, for each kind of authority, with workloads that never are without an SVID that
// everybody accepts (I3).
func TestRunbookRotationByHand(t *testing.T) {
	t.Parallel()
	for _, use := range []statev1.KeyUse{x509Use, jwtUse, witUse} {
		t.Run(use.String(), func(t *testing.T) {
			t.Parallel()
			rotateByHand(t, use)
		})
	}
}

func rotateByHand(t *testing.T, use statev1.KeyUse) {
	options := catest.Options{}
	if use == jwtUse { // what is shown to others is waited for, for an hour or a phase if that is less
		const phase = 10 * time.Second
		options.Lifetimes = node.Lifetimes{Phase: phase, X509SVID: phase, AgentSVID: phase, JWTSVID: phase, WITSVID: phase}
	}
	c := catest.Start(t, options)
	c.Apply(workloads)
	h1, h2 := newAgent(t, c, "h1", "service/accounts"), newAgent(t, c, "h2", "service/cards")
	var deaf atomic.Bool
	h3 := subscribe(t, c, "h3", func(*client.View) error {
		if deaf.Load() {
			return errors.New("its workloads do not hold it")
		}
		return nil
	})
	h3.Hold(nil)
	d := openDoor(t, h1)
	eventually(t, "the workload has its SVIDs", 10*time.Second, func() error { return cmp.Or(rested(t, use, h2, h1, d, ""), rested(t, use, h1, h2, d, "")) })

	ctx, stop := context.WithCancel(t.Context())
	var watching sync.WaitGroup
	defer watching.Wait()
	defer stop()
	watching.Go(func() { // I3, all the time: the newest SVID is accepted
		for ctx.Err() == nil {
			if err := rested(t, use, h2, h1, d, ""); err != nil && ctx.Err() == nil {
				t.Errorf("during the rotation: %v", err)
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
	})
	admin := c.Admin()
	type verb func(context.Context, *ententev1.ChangeAuthorityRequest, ...grpc.CallOption) (*ententev1.ChangeAuthorityResponse, error)
	done := func(change verb, id string) *ententev1.ChangeAuthorityResponse {
		t.Helper()
		r, err := change(t.Context(), &ententev1.ChangeAuthorityRequest{Id: id[:12]})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	refused := func(change verb, id, because string) {
		t.Helper()
		if _, err := change(t.Context(), &ententev1.ChangeAuthorityRequest{Id: id[:12]}); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), because) {
			t.Errorf("not refused for %q: %v", because, err)
		}
	}
	waitsFor := func(id string) string {
		for _, a := range authorities(t, c) {
			if a.GetAuthority().GetId() == id {
				return strings.Join(a.GetWaitingFor(), ", ")
			}
		}
		return ""
	}

	// 1. authority list: the next one is ready.
	next := waitReady(t, c, "ca-1", use).GetId()
	old := inPhase(t, c, "ca-1", use, active).GetAuthority().GetId()
	if err := rested(t, use, h1, h2, d, old); err != nil {
		t.Fatalf("control: %v", err)
	}
	refused(admin.RevokeAuthority, old, "taint it first")
	if _, err := admin.PrepareAuthority(t.Context(), &ententev1.PrepareAuthorityRequest{Use: use}); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "already") {
		t.Errorf("preparing a second one: %v", err)
	}
	deaf.Store(true)
	// 2. authority activate.
	if r := done(admin.ActivateAuthority, next); r.GetAuthority().GetPhase() != active || inPhase(t, c, "ca-1", use, retired).GetAuthority().GetId() != old {
		t.Errorf("after activate: %v", r)
	}
	refused(admin.ActivateAuthority, old, "RETIRED")
	// The node prepares the one after it, which one host does not hold yet.
	var third string
	eventually(t, "the list says for whom the third one waits", 10*time.Second, func() error {
		third = inPhase(t, c, "ca-1", use, prepared).GetAuthority().GetId()
		if waits := waitsFor(third); !strings.Contains(waits, "agent h3") {
			return fmt.Errorf("%s waits for %q", third, waits)
		}
		return nil
	})
	refused(admin.ActivateAuthority, third, "agent h3")
	deaf.Store(false)
	c.Apply("apiVersion: entente/v1\nkind: Service\nmetadata: {name: ledger}\nspec: {run: {uid: 1003, hosts: [h3]}, port: 8084}\n") // it is asked again
	waitReady(t, c, "ca-1", use)
	// 3. authority taint: what it signed is issued anew, at once.
	h3.Hold([]string{ca.AuthorityKeyID(old)})
	if r := done(admin.TaintAuthority, old); len(r.GetSigning()) != 1 || r.GetSigning()[0].GetId() != next {
		t.Errorf("who signs now: %v", r.GetSigning())
	}
	took := eventually(t, "the workloads have SVIDs under the new authority", 5*time.Second, func() error {
		return cmp.Or(rested(t, use, h1, h2, d, next), rested(t, use, h2, h1, d, next))
	})
	t.Logf("taint to re-issue: %v", took)
	// 4. authority list, until it waits for nobody.
	holder := "agent h3"
	if use == jwtUse {
		holder = "JWT-SVIDs until "
	}
	eventually(t, "only that one is waited for", 10*time.Second, func() error {
		if waits := waitsFor(old); !strings.HasPrefix(waits, holder) {
			return fmt.Errorf("it waits for %q", waits)
		}
		return nil
	})
	refused(admin.RevokeAuthority, old, holder)
	h3.Hold(nil)
	took = eventually(t, "nobody has SVIDs under the tainted authority", 30*time.Second, func() error {
		for _, a := range authorities(t, c) {
			if a.GetAuthority().GetId() == old && !a.GetAuthority().GetDrained() {
				return fmt.Errorf("waits for %v", a.GetWaitingFor())
			}
		}
		return nil
	})
	t.Logf("drained after %v more", took)
	// 5. authority revoke.
	if r := done(admin.RevokeAuthority, old); r.GetAuthority().GetPhase() != revoked || len(r.GetHeldBy()) != 0 {
		t.Errorf("after revoke: %v", r)
	}
	eventually(t, "the hosts know of it", 5*time.Second, func() error {
		if accepts(h1.State(), use, old) || accepts(h2.State(), use, old) {
			return errors.New("it stands in the bundle")
		}
		return nil
	})
	time.Sleep(300 * time.Millisecond) // the watcher looks at the time after it, too
}

// rested tells why an agent's workload has no SVID of that kind that another one's
// accepts, or not under that authority, if one is named.
func rested(t *testing.T, use statev1.KeyUse, of, at *agent, d *door, authority string) error {
	var under string
	identity, ok := of.State().Identity(of.entry)
	switch {
	case !ok || identity.SVID == nil || identity.WIT == nil:
		return errors.New("the workload has no SVIDs")
	case use == x509Use:
		svid, err := of.SVIDs(of.entry).GetX509SVID()
		if err != nil {
			return err
		}
		under = ca.SignedUnder(svid.Certificates[0])
		if _, err := connect(t, d, svid); err != nil {
			return err
		}
	case use == jwtUse:
		token, _, err := of.FetchJWT(t.Context(), identity, []string{"them"})
		if err != nil {
			return err
		}
		svid, err := jwtsvid.Verify(token, at.State().JWTKeys(nil), "them", time.Now(), time.Second)
		if err != nil {
			return err
		}
		under = svid.KeyID
	default:
		keys := func(spiffeid.TrustDomain) (jwtsvid.Keys, bool) { return at.State().WIT.Keys, true }
		svid, err := jwtsvid.VerifyWIT(identity.WIT.Token.Reveal(), keys, time.Now(), time.Second)
		if err != nil {
			return err
		}
		under = svid.KeyID
	}
	if authority != "" && ca.AuthorityKeyID(under) != ca.AuthorityKeyID(authority) {
		return fmt.Errorf("its SVID is under %.12s, not %.12s", under, authority)
	}
	return nil
}

// accepts tells whether an authority stands in an agent's bundle.
func accepts(s *meshagent.State, use statev1.KeyUse, authority string) bool {
	switch use {
	case jwtUse:
		return s.JWT.Keys[authority] != nil
	case witUse:
		return s.WIT.Keys[authority] != nil
	}
	return slices.ContainsFunc(s.Bundle.X509Authorities(), func(a *x509.Certificate) bool { return peer.KeyID(a) == authority })
}

// While somebody still holds an SVID under it, a tainted authority is not revoked, and
// the list says who that is.
func TestRevokeWaitsForHolders(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	c.Apply(workloads)
	h1 := newAgent(t, c, "h1", "service/accounts")
	waitReady(t, c, "ca-1", x509Use)
	old := inPhase(t, c, "ca-1", x509Use, active).GetAuthority().GetId()
	h1.stop() // it says goodbye, and counts no more; but this one does not:
	silent := newSubscriber(t, c, "h2")
	if _, err := c.Admin().TaintAuthority(t.Context(), &ententev1.ChangeAuthorityRequest{Id: old}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the list names the holder", 5*time.Second, func() error {
		for _, a := range authorities(t, c) {
			if a.GetAuthority().GetId() == old && slices.Equal(a.GetWaitingFor(), []string{"agent h2"}) {
				return nil
			}
		}
		return fmt.Errorf("%v", authorities(t, c))
	})
	_, err := c.Admin().RevokeAuthority(t.Context(), &ententev1.ChangeAuthorityRequest{Id: old})
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "agent h2") {
		t.Errorf("revoked although it is held: %v", err)
	}
	silent.Hold([]string{}) // it has nothing any more
	eventually(t, "it may be revoked", 5*time.Second, func() error {
		_, err := c.Admin().RevokeAuthority(t.Context(), &ententev1.ChangeAuthorityRequest{Id: old})
		return err
	})
}

// The runbook "compromised node" of docs/operations.md: nothing that its key signed is
// accepted after a second, at connections that are open neither (I4).
func TestRunbookCompromisedNode(t *testing.T) {
	t.Parallel()
	one := catest.Start(t, catest.Options{})
	two := one.Join("ca-2", "dc1")
	three := one.Join("ca-3", "dc1")
	nodes := map[string]*catest.CA{"ca-1": one, "ca-2": two, "ca-3": three}
	one.Apply(workloads)
	h1, h2 := newAgent(t, one, "h1", "service/accounts"), newAgent(t, one, "h2", "service/cards")
	d := openDoor(t, h1)
	stolen := h2.svid(t) // what the thief has, or could sign himself
	victim := ""
	for _, a := range authorities(t, one) {
		if a.GetAuthority().GetPhase() == active && h2.under(t, a.GetAuthority().GetId()) {
			victim = a.GetNode()
		}
	}
	if victim == "" {
		t.Fatal("no node signed the SVID")
	}
	operator := one
	if victim == "ca-1" {
		operator = two
	}
	for name := range nodes { // everybody can sign
		waitReady(t, operator, name, x509Use)
	}
	conn, err := connect(t, d, stolen)
	if err != nil {
		t.Fatalf("control: %v", err)
	}
	own := one.Bundle()
	// What the node says before: of a session that it holds, and of what is served there. It
	// hears the others, as any member may.
	speaker := nodes[victim]
	at := subscribeAt(t, speaker, "h3")
	at.Report([]client.Instance{{Service: "reports", Address: "127.0.0.1:7443", Healthy: true}})
	for name, c := range nodes {
		eventually(t, "node "+name+" has heard of the instance", 5*time.Second, func() error {
			if s := c.Status().GetInstances(); !slices.ContainsFunc(s, func(i *ententev1.Instance) bool { return i.GetAgent() == "h3" }) {
				return fmt.Errorf("%v", s)
			}
			return nil
		})
	}
	thief, staying := nodeKey(t, speaker), nodeKey(t, operator)
	stream, vouch := hears(t, operator, thief)
	if err := vouch(); err != nil {
		t.Fatalf("control: %v", err)
	}
	var before []*statev1.Member
	operator.Node().Read(func(st *domain.State) { before = st.Members() })
	forger := activeAuthority(t, operator)
	forged := forger.IssueFor(thief, one.TrustDomain(), ca.NodePath(victim))
	if err := takenForANode(t, operator, before, forged); err != nil {
		t.Fatalf("control: a member's SVID under another member's authority: %v", err)
	}

	// 1. Its host is cut off (here: the process stops for good); 2. node remove --compromised.
	began := time.Now()
	r, err := operator.RemoveNode(t.Context(), victim, true)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range r.GetAuthorities() {
		if a.GetPhase() != revoked {
			t.Errorf("an authority of the compromised node is %s", a.GetPhase())
		}
	}
	cut(t, "a connection of an SVID of the compromised node", conn)
	if _, err := connect(t, d, stolen); err == nil {
		t.Error("an SVID of the compromised node is accepted")
	}
	if _, err := peer.Verify(stolen.Certificates, own, time.Now()); err != nil {
		t.Errorf("control: under the bundle before it verifies: %v", err)
	}
	// 3. The workloads have SVIDs of other nodes.
	eventually(t, "the workload has another SVID, and is accepted with it", 5*time.Second, func() error {
		if h2.svid(t).Certificates[0].Equal(stolen.Certificates[0]) {
			return errors.New("still the old one")
		}
		_, err := connect(t, d, h2.svid(t))
		return err
	})
	t.Logf("from the removal to an accepted SVID of another node: %v", time.Since(began))
	// 4. The node is no member, at any node; nor does it run on, or come back.
	for name, c := range nodes {
		if name == victim {
			continue
		}
		eventually(t, "node "+name+" knows two members", 5*time.Second, func() error {
			for _, m := range c.Status().GetMembers() {
				if m.GetMember().GetName() == victim {
					return errors.New("it is a member")
				}
			}
			return nil
		})
	}
	if err := nodes[victim].WaitEnd(5 * time.Second); err == nil {
		t.Error("the removed node ended without a reason")
	}
	// Its words are forgotten, its connections have ended, and no SVID makes its key a CA
	// node's again, whoever signed it and under what name.
	for name, c := range nodes {
		if name == victim {
			continue
		}
		eventually(t, "node "+name+" has forgotten what the removed one said", 3*time.Second, func() error {
			if s := c.Status().GetInstances(); slices.ContainsFunc(s, func(i *ententev1.Instance) bool { return i.GetAgent() == "h3" }) {
				return fmt.Errorf("%v", s)
			}
			return nil
		})
	}
	select {
	case <-stream:
	case <-time.After(3 * time.Second):
		t.Error("the removed node still hears another one")
	}
	if err := vouch(); err == nil {
		t.Error("a removed node is answered")
	}
	var after []*statev1.Member
	operator.Node().Read(func(st *domain.State) { after = st.Members() })
	for _, name := range []string{victim, operator.Config().Name} {
		if takenForANode(t, operator, after, forger.IssueFor(thief, one.TrustDomain(), ca.NodePath(name))) == nil {
			t.Errorf("the removed node's key is a CA node's by an SVID under the name %s", name)
		}
	}
	if err := takenForANode(t, operator, after, forger.IssueFor(staying, one.TrustDomain(), ca.NodePath(operator.Config().Name))); err != nil {
		t.Errorf("control: a member's SVID: %v", err)
	}
	// 5. Quorum is kept: something can be agreed.
	operator.Apply("apiVersion: entente/v1\nkind: Service\nmetadata: {name: later}\nspec: {run: {uid: 1002, hosts: [h1]}, port: 8082}\n")
}

// subscribeAt is an agent that reaches one CA node only.
func subscribeAt(t *testing.T, c *catest.CA, name string) *client.Client {
	t.Helper()
	only := c.Config().Listen.API
	return subscribeWith(t, c, name, func(cfg *client.Config) {
		cfg.Addresses = []string{only}
		cfg.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			if address != only {
				return nil, errors.New("not reached in this test")
			}
			return (&net.Dialer{}).DialContext(ctx, network, address)
		}
	}, func(*client.View) error { return nil })
}

// keysOf are all keys of a CA node, by their names.
func keysOf(t *testing.T, c *catest.CA) map[string]crypto.Signer {
	t.Helper()
	store, err := keystore.Open(filepath.Join(c.Config().DataDir, "keys"), keystore.Plain())
	if err != nil {
		t.Fatal(err)
	}
	names, err := store.Names()
	if err != nil {
		t.Fatal(err)
	}
	keys := make(map[string]crypto.Signer)
	for _, name := range names {
		if keys[name], err = store.Load(name); err != nil {
			t.Fatal(err)
		}
	}
	return keys
}

func nodeKey(t *testing.T, c *catest.CA) crypto.Signer { return keysOf(t, c)["node"] }

// activeAuthority is the authority that a node signs with, as a thief of its host has it.
func activeAuthority(t *testing.T, c *catest.CA) *peertest.Authority {
	t.Helper()
	id := inPhase(t, c, c.Config().Name, x509Use, active).GetAuthority().GetId()
	for name, key := range keysOf(t, c) {
		if !strings.HasPrefix(name, "x509-") {
			continue
		}
		for _, cert := range c.Bundle().X509Authorities() {
			if public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); ok && public.Equal(cert.PublicKey) && peer.KeyID(cert) == id {
				return &peertest.Authority{Cert: cert, Key: key}
			}
		}
	}
	t.Fatalf("the key of authority %.12s is not there", id)
	return nil
}

// hears opens a stream of a member's at another CA node, with its node key; ended is closed
// when it has ended. vouch is a call on the same connection.
func hears(t *testing.T, c *catest.CA, key crypto.Signer) (ended chan struct{}, vouch func() error) {
	t.Helper()
	cert, err := peer.SelfSigned(key, "thief")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient("passthrough:///"+c.Config().Listen.API, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2"},
	})))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	door := ententev1.NewPeerClient(conn)
	stream, err := door.Presence(t.Context(), &ententev1.PresenceRequest{})
	if err == nil {
		_, err = stream.Recv()
	}
	if err != nil {
		t.Fatalf("control: a member hears another one: %v", err)
	}
	ended = make(chan struct{})
	go func() {
		defer close(ended)
		for err == nil {
			_, err = stream.Recv()
		}
	}()
	return ended, func() error {
		_, err := door.Vouch(t.Context(), &ententev1.VouchRequest{MemberId: c.Node().ID()})
		return err
	}
}

// takenForANode says why a client that has a member table does not take the holder of an
// SVID for a CA node.
func takenForANode(t *testing.T, c *catest.CA, members []*statev1.Member, svid *x509svid.SVID) error {
	t.Helper()
	if _, err := peer.Verify(svid.Certificates, c.Bundle(), time.Now()); err != nil {
		t.Fatalf("control: the SVID verifies: %v", err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(peer.NoClient(peer.FromSVID(svid), "h2"))))
	go server.Serve(listener)
	defer server.Stop()
	one, err := client.New(client.Config{
		TrustDomain: c.TrustDomain(), Addresses: []string{listener.Addr().String()}, Bundles: c.Bundle(), Members: members, Datacenter: "dc1",
		Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, listener.Addr().String())
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	err = one.SignX509(ctx, []client.SignRequest{{EntryID: "service/accounts"}})[0].Err
	if err != nil && !strings.Contains(err.Error(), "it is no CA node of") {
		return nil // it was asked, and knows no such call
	}
	return err
}

// I4, I9: a ban takes effect at once on what the host can do and on what it has; an
// evicted one must attest anew.
func TestBanAndEvict(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	c.Apply(workloads)
	h1 := newAgent(t, c, "h1", "service/accounts")
	token, dir := c.AgentToken("h2", "dc1"), t.TempDir()
	h2 := startAgent(t, c, "h2", "service/cards", token, dir)
	spare := c.AgentToken("h2", "dc1")
	d := openDoor(t, h1)
	banned, good := h2.svid(t), h1.svid(t)
	conn, err := connect(t, d, banned)
	if err != nil {
		t.Fatalf("control: %v", err)
	}
	control, err := connect(t, d, good)
	if err != nil {
		t.Fatalf("control: %v", err)
	}
	signs := newSubscriber(t, c, "h3")
	if _, err := signAt(t, c, signs); err != nil {
		t.Fatalf("control: %v", err)
	}

	if _, err := c.Admin().BanAgent(t.Context(), &ententev1.ChangeAgentRequest{Name: "h2"}); err != nil {
		t.Fatal(err)
	}
	cut(t, "a connection of a banned agent's workload", conn)
	if _, err := connect(t, d, banned); err == nil {
		t.Error("a new connection of a banned agent's workload is accepted")
	}
	if _, err := peer.Verify(banned.Certificates, c.Bundle(), time.Now()); err != nil {
		t.Errorf("control: the SVID itself is still valid: %v", err)
	}
	if err := echo(control); err != nil {
		t.Errorf("control: another agent's connection: %v", err)
	}
	eventually(t, "its stream has ended", 2*time.Second, func() error {
		r, err := c.Admin().GetAgent(t.Context(), &ententev1.GetAgentRequest{Name: "h2"})
		if err != nil || r.GetStatus().GetHere() || !r.GetStatus().GetAgent().GetBanned() {
			return fmt.Errorf("%v, %v", r, err)
		}
		return nil
	})
	if _, err := c.Admin().BanAgent(t.Context(), &ententev1.ChangeAgentRequest{Name: "h3"}); err != nil {
		t.Fatal(err)
	}
	if _, err := signAt(t, c, signs); err == nil {
		t.Error("a banned agent gets SVIDs signed")
	}
	h2.stop()
	refusedToStart(t, c, "h2", spare, dir, "banned")

	// Evicted: neither its key nor its old token admits it, a new one does.
	if _, err := c.Admin().EvictAgent(t.Context(), &ententev1.ChangeAgentRequest{Name: "h2"}); err != nil {
		t.Fatal(err)
	}
	refusedToStart(t, c, "h2", token, dir, "never admitted")
	if _, err := connect(t, d, banned); err == nil {
		t.Error("an SVID of an evicted agent is accepted")
	}
	again := startAgent(t, c, "h2", "service/cards", spare, dir)
	eventually(t, "the host that attested anew is accepted", 5*time.Second, func() error {
		_, err := connect(t, d, again.svid(t))
		return err
	})
	if _, err := connect(t, d, banned); err == nil {
		t.Error("an SVID of before the eviction is accepted after it")
	}
}

// An entry of its own gives a workload an identity; deleted, its SVIDs count for nothing
// at once (I4).
func TestDeclaredEntryLives(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	c.Apply(workloads)
	h1, h2 := newAgent(t, c, "h1", "service/accounts"), newAgent(t, c, "h2", "entry/nightly")
	d := openDoor(t, h1)
	change := func(changes ...*statev1.EntryChange) []*ententev1.EntryResult {
		t.Helper()
		r, err := c.Admin().ChangeEntries(t.Context(), &ententev1.ChangeEntriesRequest{Changes: changes})
		if err != nil {
			t.Fatal(err)
		}
		return r.GetResults()
	}
	nightly := &statev1.Entry{Id: "entry/nightly", Path: "/batch/nightly", Hosts: []string{"h2"}, Selectors: []string{"unix:uid:1000"}, X509SvidSeconds: 600}
	results := change(&statev1.EntryChange{Action: &statev1.EntryChange_Create{Create: nightly}},
		&statev1.EntryChange{Action: &statev1.EntryChange_Create{Create: &statev1.Entry{Id: "entry/bad", Path: "/entente/ca/x"}}})
	if results[0].GetAction() != "created" || codes.Code(results[1].GetCode()) != codes.InvalidArgument {
		t.Fatalf("%v", results)
	}
	took := eventually(t, "the workload has its SVID", 2*time.Second, func() error {
		_, err := h2.SVIDs("entry/nightly").GetX509SVID()
		return err
	})
	t.Logf("entry to SVID: %v", took)
	svid := h2.svid(t)
	if svid.ID.Path() != "/batch/nightly" {
		t.Errorf("it is %s", svid.ID)
	}
	conn, err := connect(t, d, svid)
	if err != nil {
		t.Fatalf("control: %v", err)
	}
	if results = change(&statev1.EntryChange{Action: &statev1.EntryChange_Delete{Delete: "entry/nightly"}}); results[0].GetAction() != "deleted" {
		t.Fatalf("%v", results)
	}
	cut(t, "a connection of a deleted entry", conn)
	if _, err := connect(t, d, svid); err == nil {
		t.Error("an SVID of a deleted entry is accepted")
	}
	eventually(t, "its own agent hands it out no more", 2*time.Second, func() error {
		if _, err := h2.SVIDs("entry/nightly").GetX509SVID(); err == nil {
			return errors.New("it still does")
		}
		return nil
	})
	// Made anew, it is another generation, and accepted.
	nightly.Revision = 0
	change(&statev1.EntryChange{Action: &statev1.EntryChange_Create{Create: nightly}})
	eventually(t, "the new one is accepted", 5*time.Second, func() error {
		fresh, err := h2.SVIDs("entry/nightly").GetX509SVID()
		if err != nil {
			return err
		}
		_, err = connect(t, d, fresh)
		return err
	})
}

// revoke --now of the only authority: everybody loses identity, and gets it back from
// the next one with nobody's help.
func TestRevokeNowOfTheOnlyOne(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	c.Apply(workloads)
	h1, h2 := newAgent(t, c, "h1", "service/accounts"), newAgent(t, c, "h2", "service/cards")
	d := openDoor(t, h1)
	waitReady(t, c, "ca-1", x509Use)
	old := inPhase(t, c, "ca-1", x509Use, active).GetAuthority().GetId()
	before := h2.svid(t)
	conn, err := connect(t, d, before)
	if err != nil {
		t.Fatalf("control: %v", err)
	}
	r, err := c.Admin().RevokeAuthority(t.Context(), &ententev1.ChangeAuthorityRequest{Id: old, Now: true})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(r.GetHeldBy(), []string{"agent h1", "agent h2"}) {
		t.Errorf("who lost identity: %v", r.GetHeldBy())
	}
	cut(t, "a connection under a revoked authority", conn)
	took := eventually(t, "the workloads are back", 10*time.Second, func() error {
		if h2.svid(t).Certificates[0].Equal(before.Certificates[0]) {
			return errors.New("still the old SVID")
		}
		_, err := connect(t, d, h2.svid(t))
		return err
	})
	t.Logf("back after %v", took)
}

// newSubscriber is an attested host that syncs and says nothing of its SVIDs by itself.
func newSubscriber(t *testing.T, c *catest.CA, name string) *client.Client {
	t.Helper()
	return subscribe(t, c, name, func(*client.View) error { return nil })
}

// subscribe is an agent that takes pictures as handle does.
func subscribe(t *testing.T, c *catest.CA, name string, handle func(*client.View) error) *client.Client {
	t.Helper()
	return subscribeWith(t, c, name, func(*client.Config) {}, handle)
}

func subscribeWith(t *testing.T, c *catest.CA, name string, change func(*client.Config), handle func(*client.View) error) *client.Client {
	t.Helper()
	token, err := ca.ParseToken(c.AgentToken(name, "dc1"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cfg := client.Config{TrustDomain: c.TrustDomain(), Addresses: c.Addresses(), Pins: token.Pinned, Datacenter: "dc1", BootID: token.ID}
	change(&cfg)
	answer, err := client.Attest(t.Context(), cfg, nodeattest.ByToken(token, key), csrOf(t, key))
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(answer.Certificates[0])
	if err != nil {
		t.Fatal(err)
	}
	cfg.SVID = source{&x509svid.SVID{ID: spiffeid.RequireFromPath(c.TrustDomain(), ca.AgentPath(name)), Certificates: []*x509.Certificate{leaf}, PrivateKey: key}}
	one, err := client.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- one.Sync(ctx, handle) }()
	t.Cleanup(func() { cancel(); <-ended })
	eventually(t, "the subscriber has its picture", 5*time.Second, func() error {
		if one.View().Revision == 0 {
			return errors.New("not yet")
		}
		return nil
	})
	return one
}

func csrOf(t *testing.T, key crypto.Signer) []byte {
	t.Helper()
	csr, err := nodeattest.CSR(key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

// signAt asks for an SVID of the service on host h3.
func signAt(t *testing.T, at *catest.CA, c *client.Client) ([]byte, error) {
	t.Helper()
	request := client.SignRequest{EntryID: "service/reports"}
	at.Node().Read(func(st *domain.State) {
		if e, ok := st.Entry(request.EntryID); ok {
			request.Record = client.RecordOf(e)
		}
	})
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	request.CSR = csrOf(t, key)
	result := c.SignX509(t.Context(), []client.SignRequest{request})[0]
	if result.Err != nil {
		return nil, result.Err
	}
	return result.Certificates[0], nil
}

// refusedToStart starts an agent that the CA must not admit, and finds the reason in
// what it logs.
func refusedToStart(t *testing.T, c *catest.CA, name, token, dir, reason string) {
	t.Helper()
	text := fmt.Sprintf("trustDomain: banking.example\nname: %s\ndatacenter: dc1\ndataDir: %s\nca: {addresses: [%q], token: %q}\nworkloadAPI: {wit: true}\n", name, dir, c.Addresses()[0], token)
	cfg, err := meshagent.ReadConfig("agent.yaml", strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	var log lockedBuffer
	a, err := meshagent.New(cfg, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	defer func() { cancel(); <-ended }()
	eventually(t, "the agent is told why", 10*time.Second, func() error {
		if a.State().Ready {
			t.Fatalf("agent %s was admitted", name)
		}
		if !strings.Contains(log.String(), reason) {
			return fmt.Errorf("no %q in %s", reason, log.String())
		}
		return nil
	})
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
