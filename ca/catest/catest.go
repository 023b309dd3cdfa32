// Package catest is a real CA in the process, for the tests of other rooms: one node,
// or a cluster, on loopback, with real Raft, real doors and unsealed keys in a
// temporary directory.
package catest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/node"
	"github.com/entente-mesh/entente/ca/server"
	"github.com/entente-mesh/entente/federation/bundle"
	"github.com/entente-mesh/entente/federation/manifest"
)

// Options of a CA. The zero value is fine.
type Options struct {
	TrustDomain string         // default "banking.example"
	Name        string         // of the (first) node; default "ca-1"
	Datacenter  string         // default "dc1"
	Lifetimes   node.Lifetimes // zero: the defaults
	Upstream    node.Upstream  // zero: authorities sign themselves
	Verbose     bool           // the node's log goes to the test's
}

// CA is a running node, and the operator's tools for it. Its methods fail the test on
// any error, and are for the goroutine of the test.
type CA struct {
	t       testing.TB
	config  *node.Config
	verbose bool

	recoveryKey string
	between     server.Between
	group       *[]*CA // of its cluster, itself included, as far as Join and Befriend told

	node   *node.Node
	admin  ententev1.AdminClient
	conn   *grpc.ClientConn
	cancel context.CancelFunc
	ended  chan error
}

// Start starts a new CA of one node and returns when it signs. It stops at the end of
// the test.
func Start(t testing.TB, o Options) *CA {
	t.Helper()
	c := Prepare(t, o)
	if err := node.Init(c.config, c.KeepRecoveryKey); err != nil {
		t.Fatal(err)
	}
	c.Restart()
	c.WaitReady()
	return c
}

// KeepRecoveryKey is what Init of package node takes; RecoveryKey returns the key.
func (c *CA) KeepRecoveryKey(key string) error {
	c.recoveryKey = key
	return nil
}

// Between has tests stand between the node's doors and their callers, from the next
// Restart on.
func (c *CA) Between(b server.Between) { c.between = b }

// RecoveryKey is what Init handed out, in its text form.
func (c *CA) RecoveryKey() string { return c.recoveryKey }

// Prepare is the node of Start before anything was done: for tests that call Init or
// Join of package node themselves, with Config, and then Restart.
func Prepare(t testing.TB, o Options) *CA {
	t.Helper()
	if o.TrustDomain == "" {
		o.TrustDomain = "banking.example"
	}
	if o.Name == "" {
		o.Name = "ca-1"
	}
	if o.Datacenter == "" {
		o.Datacenter = "dc1"
	}
	dir := t.TempDir()
	// A unix socket's path has about 100 bytes at most; a test's directory may have more.
	sockets, err := os.MkdirTemp("", "catest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(sockets) })
	c := &CA{t: t, verbose: o.Verbose, config: &node.Config{
		TrustDomain: o.TrustDomain,
		Name:        o.Name,
		Datacenter:  o.Datacenter,
		DataDir:     filepath.Join(dir, "data"),
		Socket:      filepath.Join(sockets, "admin.sock"),
		Listen:      node.Listen{Raft: freeAddress(t), API: freeAddress(t), Bundle: freeAddress(t), Admin: "127.0.0.1:0"},
		Keys:        node.Keys{InsecureDev: true},
		Lifetimes:   o.Lifetimes,
		Upstream:    o.Upstream,
		Timing:      node.Timing{Heartbeat: 250 * time.Millisecond},
	}}
	c.group = &[]*CA{c}
	t.Cleanup(c.Stop)
	return c
}

// host is this test process's own loopback address where the system has more than one:
// no connection of another process can take a port between two uses of it.
var host = sync.OnceValue(func() string {
	own := fmt.Sprintf("127.%d.%d.%d", 64+rand.IntN(128), rand.IntN(256), 1+rand.IntN(254))
	listener, err := net.Listen("tcp", own+":0")
	if err != nil {
		return "127.0.0.1"
	}
	listener.Close()
	return own
})

// lastPort counts up from below what the system hands out, so that a port is given
// once, and stays free while its node is stopped.
var lastPort = func() *atomic.Int32 {
	n := new(atomic.Int32)
	n.Store(20_000 + rand.Int32N(5_000))
	return n
}()

// freeAddress finds an address that nobody listens at and no other caller gets.
func freeAddress(t testing.TB) string {
	t.Helper()
	for range 1000 {
		address := net.JoinHostPort(host(), strconv.Itoa(int(lastPort.Add(1))))
		if listener, err := net.Listen("tcp", address); err == nil {
			listener.Close()
			return address
		}
	}
	t.Fatal("no port is free")
	return ""
}

// Join starts another node of the same cluster and returns when it signs and votes.
func (c *CA) Join(name, datacenter string) *CA {
	c.t.Helper()
	other := Prepare(c.t, Options{TrustDomain: c.config.TrustDomain, Name: name, Datacenter: datacenter, Lifetimes: c.config.Lifetimes, Upstream: c.config.Upstream, Verbose: c.verbose})
	token := c.NodeToken(name, datacenter)
	if err := node.Join(c.t.Context(), other.config, token); err != nil {
		c.t.Fatal(err)
	}
	c.Befriend(other)
	other.Restart()
	other.WaitReady()
	c.waitFor("node "+name+" votes", func() error {
		for _, m := range c.Status().GetMembers() {
			if m.GetMember().GetName() == name && m.GetVoterNow() {
				return nil
			}
		}
		return errors.New("not yet")
	})
	return other
}

// Befriend makes other's operator approve what c's proposes, and the other way round: for
// tests that join a node themselves.
func (c *CA) Befriend(other *CA) {
	*c.group = append(*c.group, other)
	other.group = c.group
}

// RemoveNode removes a CA node as its operators do: c's proposes it, and those of as many
// others as are needed approve it.
func (c *CA) RemoveNode(ctx context.Context, name string, compromised bool) (*ententev1.RemoveNodeResponse, error) {
	req := &ententev1.RemoveNodeRequest{Name: name, Compromised: compromised}
	resp, err := c.admin.RemoveNode(ctx, req)
	if err != nil || resp.GetApproval() == nil {
		return resp, err
	}
	if resp.Revision, err = c.approve(ctx, resp.GetApproval(), name); err != nil {
		return nil, err
	}
	resp.Approval = nil
	now, err := c.admin.Status(ctx, &ententev1.StatusRequest{})
	resp.Authorities = nil
	for _, a := range now.GetAuthorities() {
		if a.GetMemberId() == resp.GetMember().GetId() {
			resp.Authorities = append(resp.Authorities, a)
		}
	}
	return resp, err
}

// approve has the operators of other nodes approve a change until it is carried out.
func (c *CA) approve(ctx context.Context, change *ententev1.Approval, except ...string) (revision uint64, err error) {
	err = fmt.Errorf("nobody is left to approve %s: approved at %v, %d needed", change.GetWhat(), change.GetApprovedBy(), change.GetNeeded())
	for _, other := range *c.group {
		if other.cancel == nil || slices.Contains(except, other.config.Name) || !slices.Contains(change.GetMissing(), other.config.Name) {
			continue
		}
		for range 50 { // it may not have applied the proposal yet
			resp, failed := other.admin.ApproveChange(ctx, &ententev1.ApproveChangeRequest{Id: change.GetId()})
			if failed == nil && resp.GetCarriedOut() {
				return resp.GetRevision(), nil
			}
			err = failed
			if status.Code(failed) != codes.NotFound {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	return 0, err
}

// Restart starts the node, after Stop with the state and at the addresses it had. It
// does not wait until the node is ready.
func (c *CA) Restart() {
	c.t.Helper()
	c.Stop()
	log := slog.New(slog.DiscardHandler)
	if c.verbose {
		log = slog.New(slog.NewTextHandler(testWriter{c.t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	n, err := node.New(c.config, log, node.Listeners{Between: c.between})
	if err != nil {
		c.t.Fatal(err)
	}
	conn, err := grpc.NewClient("unix:"+c.config.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	c.node, c.conn, c.cancel, c.ended = n, conn, cancel, make(chan error, 1)
	c.admin = ententev1.NewAdminClient(conn)
	go func() { c.ended <- n.Run(ctx) }()
}

// Stop stops the node as SIGTERM does. Of one that does not run, it does nothing.
func (c *CA) Stop() {
	if c.cancel == nil {
		return
	}
	c.cancel()
	if err := <-c.ended; err != nil {
		c.t.Errorf("CA node %s: %v", c.config.Name, err)
	}
	c.conn.Close()
	c.cancel = nil
}

// WaitEnd waits until the node has ended by itself, and returns why.
func (c *CA) WaitEnd(within time.Duration) error {
	c.t.Helper()
	select {
	case err := <-c.ended:
		c.cancel()
		c.conn.Close()
		c.cancel = nil
		return err
	case <-time.After(within):
		c.t.Fatalf("CA node %s still runs after %v", c.config.Name, within)
		return nil
	}
}

// Kill ends the node as SIGKILL would, as far as that is possible in one process: its
// listeners and connections are gone at once, nothing is handed over.
func (c *CA) Kill() {
	if c.cancel == nil {
		return
	}
	c.node.Close()
	c.cancel()
	<-c.ended
	c.conn.Close()
	c.cancel = nil
}

// WaitReady waits until the node signs SVIDs of all kinds and has the next key of each
// in the bundle: then it changes the state no more by itself.
func (c *CA) WaitReady() {
	c.t.Helper()
	c.waitFor("CA node "+c.config.Name+" signs", func() error {
		if err := c.node.Ready(); err != nil {
			return err
		}
		status, err := c.admin.Status(c.t.Context(), &ententev1.StatusRequest{})
		if err != nil {
			return err
		}
		for _, m := range status.GetMembers() {
			if m.GetMember().GetId() == c.node.ID() && !m.GetMember().GetSigning() {
				return nil // a witness
			}
		}
		settled := make(map[string]bool)
		for _, a := range status.GetAuthorities() {
			if a.GetMemberId() == c.node.ID() {
				settled[a.GetUse().String()+a.GetPhase().String()+fmt.Sprint(a.GetReady())] = true
			}
		}
		for _, use := range []statev1.KeyUse{statev1.KeyUse_KEY_USE_X509, statev1.KeyUse_KEY_USE_JWT, statev1.KeyUse_KEY_USE_WIT} {
			for _, phase := range []statev1.AuthorityPhase{statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE, statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED} {
				// A PREPARED one may have to wait for others; an ACTIVE one is ready.
				if !settled[use.String()+phase.String()+"true"] && (phase == statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE || !settled[use.String()+phase.String()+"false"]) {
					return fmt.Errorf("no %s authority of %s yet", phase, use)
				}
			}
		}
		return nil
	})
}

func (c *CA) waitFor(what string, ready func() error) {
	c.t.Helper()
	const within = time.Minute // on a machine that does much else
	deadline := time.Now().Add(within)
	for {
		err := ready()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			c.t.Fatalf("%s: not within %v: %v", what, within, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// TrustDomain is the domain whose CA this is.
func (c *CA) TrustDomain() spiffeid.TrustDomain {
	return spiffeid.RequireTrustDomainFromString(c.config.TrustDomain)
}

// Addresses are the API addresses of all nodes of the cluster.
func (c *CA) Addresses() []string {
	c.t.Helper()
	var addresses []string
	for _, m := range c.Status().GetMembers() {
		addresses = append(addresses, m.GetMember().GetApiAddress())
	}
	return addresses
}

// Node is the node itself.
func (c *CA) Node() *node.Node { return c.node }

// Config is the node's; not to be changed while it runs.
func (c *CA) Config() *node.Config { return c.config }

// Socket is the path of the administrative unix socket.
func (c *CA) Socket() string { return c.config.Socket }

// BundleURL is where the node serves the bundle, and BundleID the SPIFFE ID it shows
// there.
func (c *CA) BundleURL() string { return "https://" + c.config.Listen.Bundle + "/" }

// BundleID is the identity of the bundle endpoint.
func (c *CA) BundleID() spiffeid.ID {
	return spiffeid.RequireFromPath(c.TrustDomain(), "/entente/bundle-endpoint")
}

// Admin is the door for operators, over the unix socket.
func (c *CA) Admin() ententev1.AdminClient { return c.admin }

// Status asks the node for its status.
func (c *CA) Status() *ententev1.StatusResponse {
	c.t.Helper()
	status, err := c.admin.Status(c.t.Context(), &ententev1.StatusRequest{})
	if err != nil {
		c.t.Fatal(err)
	}
	return status
}

// AgentToken makes a join token for an agent, in its text form. addresses are the hosts
// at which its sidecar may be reached; none: 127.0.0.1.
func (c *CA) AgentToken(name, datacenter string, addresses ...string) string {
	c.t.Helper()
	if len(addresses) == 0 {
		addresses = []string{"127.0.0.1"}
	}
	return c.token(&ententev1.CreateTokenRequest{Agent: &statev1.AgentGrant{Name: name, Datacenter: datacenter, Addresses: addresses}})
}

// NodeToken makes a join token for a CA node that votes and signs.
func (c *CA) NodeToken(name, datacenter string) string {
	c.t.Helper()
	return c.token(&ententev1.CreateTokenRequest{Node: &statev1.NodeGrant{Name: name, Datacenter: datacenter, Voter: true, Signing: true}})
}

// GrantToken makes a join token for a CA node of any kind.
func (c *CA) GrantToken(grant *statev1.NodeGrant) string {
	c.t.Helper()
	return c.token(&ententev1.CreateTokenRequest{Node: grant})
}

// Promote has a non-voter vote as soon as it has caught up.
func (c *CA) Promote(name string) {
	c.t.Helper()
	resp, err := c.admin.PromoteNode(c.t.Context(), &ententev1.PromoteNodeRequest{Name: name})
	if err == nil && resp.GetApproval() != nil {
		_, err = c.approve(c.t.Context(), resp.GetApproval())
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *CA) token(req *ententev1.CreateTokenRequest) string {
	c.t.Helper()
	resp, err := c.admin.CreateToken(c.t.Context(), req)
	if err == nil && resp.GetApproval() != nil {
		_, err = c.approve(c.t.Context(), resp.GetApproval())
	}
	if err != nil {
		c.t.Fatal(err)
	}
	return resp.GetToken()
}

// Apply applies the documents of a declarative file and returns the revision. On a busy
// machine the leader may just change: it is repeated then, which changes nothing twice.
func (c *CA) Apply(yaml string) uint64 {
	c.t.Helper()
	revision, err := c.TryApply(yaml)
	for begin := time.Now(); status.Code(err) == codes.Unavailable && time.Since(begin) < 10*time.Second; {
		time.Sleep(50 * time.Millisecond)
		revision, err = c.TryApply(yaml)
	}
	if err != nil {
		c.t.Fatal(err)
	}
	return revision
}

// TryApply is Apply for what may be refused.
func (c *CA) TryApply(yaml string) (revision uint64, err error) {
	objects, err := manifest.Parse("test.yaml", strings.NewReader(yaml), os.ReadFile)
	if err != nil {
		return 0, err
	}
	resp, err := c.admin.Apply(c.t.Context(), &ententev1.ApplyRequest{Objects: objects})
	return resp.GetRevision(), err
}

// Relate makes this domain trust the other one: it applies a Relationship with the
// other's bundle and endpoint.
func (c *CA) Relate(other *CA) {
	c.t.Helper()
	_, err := c.admin.Apply(c.t.Context(), &ententev1.ApplyRequest{Objects: []*statev1.Object{{
		Kind: &statev1.Object_Relationship{Relationship: &statev1.Relationship{
			TrustDomain:     other.config.TrustDomain,
			EndpointUrls:    []string{other.BundleURL()},
			EndpointId:      other.BundleID().String(),
			BootstrapBundle: other.BundleJSON(),
		}},
	}}})
	if err != nil {
		c.t.Fatal(err)
	}
}

// BundleJSON is the own SPIFFE bundle as the node hands it out.
func (c *CA) BundleJSON() []byte {
	c.t.Helper()
	resp, err := c.admin.GetBundle(c.t.Context(), &ententev1.GetBundleRequest{})
	if err != nil {
		c.t.Fatal(err)
	}
	return resp.GetJwks()
}

// Bundle is the own bundle, as it is now, for verifying SVIDs of this domain.
func (c *CA) Bundle() *x509bundle.Bundle {
	c.t.Helper()
	b, _, err := bundle.Parse(c.TrustDomain(), c.BundleJSON())
	if err != nil {
		c.t.Fatal(err)
	}
	return b.X509Bundle()
}

// testWriter writes lines to the test's log while the test runs.
type testWriter struct{ t testing.TB }

func (w testWriter) Write(line []byte) (int, error) {
	if w.t.Context().Err() == nil {
		w.t.Log(string(bytes.TrimRight(line, "\n")))
	}
	return len(line), nil
}
