package node_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/node"
	"github.com/entente-mesh/entente/internal/peer"
)

const accounts = `
apiVersion: entente/v1
kind: Service
metadata: {name: accounts}
spec: {run: {uid: 1000, hosts: [h1]}, port: 8080}
`

// host is an agent as the CA sees it.
type host struct {
	cfg    client.Config
	client *client.Client
	csr    []byte
}

type svidSource struct{ svid *x509svid.SVID }

func (s svidSource) GetX509SVID() (*x509svid.SVID, error) { return s.svid, nil }

// attest admits a host.
func attest(t *testing.T, c *catest.CA, name string) *host {
	t.Helper()
	token, err := ca.ParseToken(c.AgentToken(name, "dc1"))
	if err != nil {
		t.Fatal(err)
	}
	h, err := attestWith(t, c, token)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func attestWith(t *testing.T, c *catest.CA, token *ca.Token) (*host, error) {
	t.Helper()
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
	cfg := client.Config{TrustDomain: c.TrustDomain(), Addresses: token.Addresses, Pins: token.Pinned, Datacenter: "dc1", BootID: token.ID}
	answer, err := client.Attest(t.Context(), cfg, func(exporter []byte) (*ententev1.AttestRequest, error) {
		statement, signature, err := token.Sign(ca.KeyID(spki), exporter)
		return &ententev1.AttestRequest{TokenId: token.ID, Statement: statement, Signature: signature}, err
	}, csr)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(answer.Certificates[0])
	if err != nil {
		t.Fatal(err)
	}
	id, err := x509svid.IDFromCert(leaf)
	if err != nil {
		t.Fatal(err)
	}
	cfg.SVID = svidSource{&x509svid.SVID{ID: id, Certificates: []*x509.Certificate{leaf}, PrivateKey: key}}
	cfg.Bundles = x509bundle.NewSet(c.Bundle())
	h := &host{cfg: cfg, csr: csr}
	if h.client, err = client.New(cfg); err != nil {
		t.Fatal(err)
	}
	return h, nil
}

// at is a client of one node alone.
func (h *host) at(t *testing.T, c *catest.CA) atNode {
	t.Helper()
	cfg := h.cfg
	cfg.Addresses = []string{c.Config().Advertise.API}
	cfg.Pins = func(keyID string) bool { return keyID == c.Node().ID() }
	one, err := client.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return atNode{one, c}
}

// atNode is a host's client of one node, which knows the entries that the node has.
type atNode struct {
	*client.Client
	ca *catest.CA
}

func (n atNode) record(entry string) (r client.Record) {
	n.ca.Node().Read(func(st *domain.State) {
		if e, ok := st.Entry(entry); ok {
			r = client.RecordOf(e)
		}
	})
	return r
}

func sign(ctx context.Context, at atNode, csr []byte) ([]byte, error) {
	result := at.SignX509(ctx, []client.SignRequest{{EntryID: "service/accounts", Record: at.record("service/accounts"), CSR: csr}})[0]
	if result.Err != nil {
		return nil, result.Err
	}
	return result.Certificates[0], nil
}

// busy is how much longer than on an idle machine anything may take.
const busy = 4

func eventually(t *testing.T, what string, within time.Duration, f func() error) time.Duration {
	t.Helper()
	begin := time.Now()
	for {
		err := f()
		if err == nil {
			return time.Since(begin)
		}
		if time.Since(begin) > busy*within {
			t.Fatalf("%s: not within %v: %v", what, busy*within, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// cluster starts three nodes, the first of which leads.
func cluster(t *testing.T) [3]*catest.CA {
	t.Helper()
	one := catest.Start(t, catest.Options{})
	begin := time.Now()
	two := one.Join("ca-2", "dc2")
	t.Logf("the second node signs and votes %v after it joined", time.Since(begin))
	return [3]*catest.CA{one, two, one.Join("ca-3", "dc3")}
}

// The leader is killed: signing goes on everywhere without a pause, and writes do after
// an election (I5, I10).
func TestLeaderKilled(t *testing.T) {
	t.Parallel()
	nodes := cluster(t)
	nodes[0].Apply(accounts)
	h := attest(t, nodes[0], "h1")
	// On a busy machine another one may lead by now.
	for i, c := range nodes {
		if c.Node().IsLeader() {
			nodes[0], nodes[i] = nodes[i], nodes[0]
			break
		}
	}
	for _, c := range nodes[1:] {
		eventually(t, "the entry is everywhere", 15*time.Second, func() error {
			_, err := sign(t.Context(), h.at(t, c), h.csr)
			return err
		})
	}

	ctx, stop := context.WithCancel(t.Context())
	var signers sync.WaitGroup
	var signed, failed atomic.Int64
	for _, c := range nodes[1:] {
		at := h.at(t, c)
		signers.Go(func() {
			for ctx.Err() == nil {
				if _, err := sign(t.Context(), at, h.csr); err != nil {
					failed.Add(1)
					t.Errorf("signing while the leader was gone: %v", err)
					return
				}
				signed.Add(1)
				time.Sleep(5 * time.Millisecond)
			}
		})
	}
	nodes[0].Kill()
	took := eventually(t, "a write after the leader was killed", 20*time.Second, func() error {
		_, err := nodes[1].TryApply(accounts + "---\napiVersion: entente/v1\nkind: Service\nmetadata: {name: cards}\nspec: {run: {uid: 1001, hosts: [h1]}, port: 8081}\n")
		return err
	})
	t.Logf("next write after %v; %d signatures meanwhile, %d failed", took, signed.Load(), failed.Load())
	stop()
	signers.Wait()
	if signed.Load() == 0 {
		t.Error("nothing was signed")
	}

	// It comes back with its state and catches up.
	nodes[0].Restart()
	nodes[0].WaitReady()
	eventually(t, "the killed node has what was agreed without it", 20*time.Second, func() error {
		if n := nodes[0].Status().GetEntries(); n != 2 {
			return errors.New("not yet")
		}
		return nil
	})
}

// Without quorum: what was agreed goes on, nothing is granted (I5). A lone restart keeps
// the agreed state.
func TestWithoutQuorum(t *testing.T) {
	t.Parallel()
	nodes := cluster(t)
	nodes[0].Apply(accounts)
	h := attest(t, nodes[0], "h1")
	last := nodes[2]
	eventually(t, "the entry is at the last node", 15*time.Second, func() error {
		_, err := sign(t.Context(), h.at(t, last), h.csr)
		return err
	})
	token, err := ca.ParseToken(nodes[0].AgentToken("h2", "dc1"))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the last node knows its agents", 15*time.Second, func() error {
		if last.Status().GetRevision() < nodes[0].Status().GetRevision() {
			return errors.New("not yet")
		}
		return nil
	})
	nodes[0].Kill()
	nodes[1].Kill()

	check := func() {
		t.Helper()
		leaf, err := sign(t.Context(), h.at(t, last), h.csr)
		if err != nil {
			t.Fatalf("signing without quorum: %v", err)
		}
		cert, err := x509.ParseCertificate(leaf)
		if err != nil {
			t.Fatal(err)
		}
		if id, err := peer.Verify([]*x509.Certificate{cert}, last.Bundle(), time.Now()); err != nil || id.Path() != "/accounts" {
			t.Errorf("signed %v, %v", id, err)
		}
		cfg := h.cfg
		cfg.SVID, cfg.Addresses = nil, []string{last.Config().Advertise.API}
		cfg.Pins = func(keyID string) bool { return keyID == last.Node().ID() }
		_, err = client.Attest(t.Context(), cfg, func([]byte) (*ententev1.AttestRequest, error) { return &ententev1.AttestRequest{}, nil }, h.csr)
		if err != nil {
			t.Errorf("re-attestation by the known key without quorum: %v", err)
		}
		if len(last.BundleJSON()) == 0 {
			t.Error("no bundle without quorum")
		}
	}
	check()
	token.Addresses, token.Pins = []string{last.Config().Advertise.API}, []string{last.Node().ID()}
	begin := time.Now()
	if _, err := attestWith(t, last, token); err == nil {
		t.Error("a new agent was admitted without quorum")
	} else if !errors.Is(err, client.ErrUnreachable) {
		t.Errorf("a new agent without quorum: %v", err)
	}
	if took := time.Since(begin); took > 15*time.Second {
		t.Errorf("the refusal took %v", took)
	}

	last.Kill()
	last.Restart()
	last.WaitReady()
	check()
}

// I3: an authority is not used before every subscriber has acknowledged it.
// Requirements: 114.
func TestReadyGateWaitsForSubscribers(t *testing.T) {
	t.Parallel()
	one := catest.Start(t, catest.Options{})
	one.Apply(accounts)
	h := attest(t, one, "h1")
	ctx, cancel := context.WithCancel(t.Context())
	var holds atomic.Bool // whether the subscriber acknowledges
	holds.Store(true)
	synced := make(chan error, 1)
	go func() {
		synced <- h.client.Sync(ctx, func(*client.View) error {
			if !holds.Load() {
				return errors.New("its workloads do not hold it")
			}
			return nil
		})
	}()
	defer func() {
		cancel()
		<-synced
	}()
	eventually(t, "the subscriber is there", 15*time.Second, func() error {
		if one.Status().GetSubscribers() == 0 {
			return errors.New("no subscriber")
		}
		return nil
	})
	settled := func() error {
		for _, a := range one.Status().GetAuthorities() {
			if !a.GetReady() {
				return errors.New("an authority is not ready")
			}
		}
		return nil
	}
	eventually(t, "the second authority is ready", 15*time.Second, settled)

	holds.Store(false)
	token := one.NodeToken("ca-2", "dc2")
	two := catest.Prepare(t, catest.Options{Name: "ca-2", Datacenter: "dc2"})
	if err := node.Join(t.Context(), two.Config(), token); err != nil {
		t.Fatal(err)
	}
	two.Restart()
	authority := func() (found *statev1.Authority) {
		for _, a := range one.Status().GetAuthorities() {
			if a.GetMemberId() == two.Node().ID() {
				found = a
			}
		}
		return found
	}
	eventually(t, "the new node's authority is in the bundle", 15*time.Second, func() error {
		if authority() == nil {
			return errors.New("not yet")
		}
		return nil
	})
	for begin := time.Now(); time.Since(begin) < time.Second; time.Sleep(20 * time.Millisecond) {
		if a := authority(); a.GetReady() || a.GetPhase() != statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED {
			t.Fatalf("the authority is used although a subscriber does not hold it: %v", a)
		}
	}
	if err := two.Node().Ready(); err == nil {
		t.Error("the new node claims to be ready")
	}
	holds.Store(true)
	one.Apply("apiVersion: entente/v1\nkind: Service\nmetadata: {name: cards}\nspec: {run: {uid: 1001, hosts: [h1]}, port: 8081}\n") // the handler is asked again
	took := eventually(t, "the new node signs", 15*time.Second, two.Node().Ready)
	t.Logf("the new node signs %v after the last acknowledgement", took)
}

// An agent's instances are known at every node, whichever node its stream is at.
func TestPresenceBetweenNodes(t *testing.T) {
	t.Parallel()
	nodes := cluster(t)
	nodes[0].Apply(accounts)
	h := attest(t, nodes[0], "h1")
	ctx, cancel := context.WithCancel(t.Context())
	holder := h.at(t, nodes[1])
	holder.Report([]client.Instance{{Service: "accounts", Address: "127.0.0.1:7443", Healthy: true}})
	eventually(t, "the entry is at the second node", 15*time.Second, func() error {
		if nodes[1].Status().GetEntries() == 0 {
			return errors.New("not yet")
		}
		return nil
	})
	synced := make(chan error, 1)
	go func() { synced <- holder.Sync(ctx, func(*client.View) error { return nil }) }()
	defer func() {
		cancel()
		<-synced
	}()
	shown := func(c *catest.CA, stale bool) error {
		for _, i := range c.Status().GetInstances() {
			if i.GetService() == "accounts" && i.GetAgent() == "h1" && i.GetStale() == stale {
				return nil
			}
		}
		return fmt.Errorf("not shown so: %v", c.Status().GetInstances())
	}
	for _, c := range nodes {
		eventually(t, "the instance is known at "+c.Config().Name, 15*time.Second, func() error { return shown(c, false) })
	}
	// Its node is killed: the agent goes to another, and nobody loses its instance.
	nodes[1].Kill()
	eventually(t, "the agent is at another node", 15*time.Second, func() error {
		if nodes[0].Status().GetSubscribers()+nodes[2].Status().GetSubscribers() == 0 {
			return errors.New("at none")
		}
		return nil
	})
	for _, c := range []*catest.CA{nodes[0], nodes[2]} {
		eventually(t, "the instance is vouched for again at "+c.Config().Name, 15*time.Second, func() error { return shown(c, false) })
	}
	// It says goodbye: gone everywhere.
	cancel()
	for _, c := range []*catest.CA{nodes[0], nodes[2]} {
		eventually(t, "the instance is gone at "+c.Config().Name, 15*time.Second, func() error {
			if list := c.Status().GetInstances(); len(list) > 0 {
				return fmt.Errorf("still there: %v", list)
			}
			return nil
		})
	}
}

// Two domains follow each other's bundles.
// Requirements: 117, 118.
func TestBundlesAreFollowed(t *testing.T) {
	t.Parallel()
	banking := catest.Start(t, catest.Options{})
	trading := catest.Start(t, catest.Options{TrustDomain: "trading.example"})
	banking.Relate(trading)
	held := func() error {
		resp, err := banking.Admin().GetBundle(t.Context(), &ententev1.GetBundleRequest{TrustDomain: "trading.example"})
		if err != nil {
			return err
		}
		for _, f := range banking.Status().GetForeign() {
			if f.GetTrustDomain() == "trading.example" && int(f.GetX509Authorities()) == len(trading.Bundle().X509Authorities()) && f.GetAgeSeconds() >= 0 && len(resp.GetJwks()) > 0 {
				return nil
			}
		}
		return errors.New("not the same bundle")
	}
	eventually(t, "banking holds trading's bundle", 15*time.Second, held)
	trading.Join("ca-2", "dc2") // two more authorities
	took := eventually(t, "banking follows", 15*time.Second, held)
	t.Logf("after %v", took)
}
