package evil_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

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
	"github.com/entente-mesh/entente/federation/bundle"
	"github.com/entente-mesh/entente/internal/peer"
	"github.com/entente-mesh/entente/scenarios/evil"
)

func TestMain(m *testing.M) {
	evil.Main()
	os.Exit(m.Run())
}

func service(name string, uid int) string {
	return fmt.Sprintf("apiVersion: entente/v1\nkind: Service\nmetadata: {name: %s, owner: team}\nspec: {run: {uid: %d, hosts: [h1]}, port: 8080}\n---\n", name, uid)
}

// believer is an agent that believes the one CA node that it asks, whatever it says.
type believer struct {
	t        *testing.T
	identity tls.Certificate
}

func believe(t *testing.T, c *catest.CA, name string) *believer {
	t.Helper()
	token, err := ca.ParseToken(c.AgentToken(name, "dc1"))
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
	return &believer{t, tls.Certificate{Certificate: answer.Certificates, PrivateKey: key}}
}

// picture is what a believer has heard.
type picture struct {
	revision, heartbeat uint64
	epochs              []uint64 // revisions, as they came
	bundle              []byte
	members             []string
	entries             map[string]*statev1.Entry
	distrust            int
	instances           []*ententev1.Instance
}

// hears follows a node until the picture is right, or fails the test with what it was.
func (b *believer) hears(c *catest.CA, what string, right func(*picture) bool) *picture {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), 20*time.Second)
	defer cancel()
	p := &picture{}
	for first := true; ctx.Err() == nil; first = false {
		if !first {
			time.Sleep(50 * time.Millisecond)
		}
		if p = b.follow(ctx, c, right); p != nil {
			return p
		}
	}
	b.t.Fatalf("%s: not heard within 20 s", what)
	return nil
}

func (b *believer) follow(ctx context.Context, c *catest.CA, right func(*picture) bool) *picture {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn, err := grpc.NewClient("passthrough:///"+c.Config().Listen.API, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, Certificates: []tls.Certificate{b.identity}, NextProtos: []string{"h2"},
	})))
	if err != nil {
		b.t.Fatal(err)
	}
	defer conn.Close()
	stream, err := ententev1.NewSyncClient(conn).Sync(ctx)
	if err != nil {
		return nil
	}
	if stream.Send(&ententev1.SyncRequest{Message: &ententev1.SyncRequest_Hello{Hello: &ententev1.Hello{BootId: "boot-1", Connect: uint64(time.Now().UnixNano()), Level: ca.SyncLevel}}}) != nil {
		return nil
	}
	p := &picture{entries: map[string]*statev1.Entry{}}
	for {
		said, err := stream.Recv()
		if err != nil {
			return nil
		}
		switch m := said.GetMessage().(type) {
		case *ententev1.SyncResponse_Policy:
			p.take(c, m.Policy)
		case *ententev1.SyncResponse_Presence:
			p.instances = append(p.instances, m.Presence.GetInstances()...)
		case *ententev1.SyncResponse_Urgent:
			p.distrust += len(m.Urgent.GetDistrust())
		case *ententev1.SyncResponse_Heartbeat:
			p.heartbeat = m.Heartbeat.GetRevision()
		}
		if right(p) {
			return p
		}
	}
}

func (p *picture) take(c *catest.CA, said *ententev1.Policy) {
	if said.GetRevision() != 0 {
		p.revision = said.GetRevision()
		p.epochs = append(p.epochs, p.revision)
	}
	for _, b := range said.GetBundles() {
		if b.GetTrustDomain() == c.TrustDomain().Name() {
			p.bundle = b.GetJwks()
		}
	}
	if said.GetMembersChanged() {
		p.members = nil
		for _, m := range said.GetMembers() {
			p.members = append(p.members, m.GetName())
		}
	}
	for _, e := range said.GetEntries() {
		p.entries[e.GetId()] = e
	}
	for _, id := range said.GetDeletedEntries() {
		delete(p.entries, id)
	}
	p.distrust += len(said.GetDistrust())
}

// verifies tells whether somebody who has this picture accepts an SVID of the attacker's.
func (p *picture) verifies(t *testing.T, m *evil.Member) bool {
	t.Helper()
	own, _, err := bundle.Parse(m.Root.TrustDomain(), p.bundle)
	if err != nil {
		t.Fatal(err)
	}
	_, err = peer.Verify(m.Root.Issue("/anybody").Certificates, own.X509Bundle(), time.Now())
	return err == nil
}

func complete(p *picture) bool { return p.revision != 0 && p.bundle != nil && len(p.members) > 0 }

// Each lie reaches a subscriber that believes it, and is gone when the node tells the
// truth again; an honest node beside it says what is so all the while.
func TestLiesReachASubscriber(t *testing.T) {
	t.Parallel()
	honest := catest.Start(t, catest.Options{})
	honest.Apply(service("accounts", 1000))
	other := honest.Join("ca-2", "dc1")
	agent := believe(t, honest, "h1")
	liar := evil.Take(t, other)
	const entry = "service/accounts"

	truth := func(where *catest.CA) {
		t.Helper()
		p := agent.hears(where, "the truth", complete)
		if p.verifies(t, liar) || len(p.members) != 2 || p.revision >= evil.FarAhead || !slices.Contains(p.entries[entry].GetSelectors(), "unix:uid:1000") {
			t.Errorf("control: %s says %+v", where.Config().Name, p)
		}
	}
	truth(other)

	for _, by := range []uint64{evil.FarAhead, evil.NextEpoch, evil.LastEpoch} {
		liar.Tell(evil.OwnRoot(), evil.Ahead(by), evil.Alone())
		p := agent.hears(other, "the lies", func(p *picture) bool { return complete(p) && p.revision > by && p.heartbeat > by })
		if !p.verifies(t, liar) || !slices.Equal(p.members, []string{"ca-2"}) {
			t.Errorf("%+v", p)
		}
		truth(honest)
	}
	liar.Tell(evil.Selectors(entry, "unix:uid:0"))
	agent.hears(other, "false selectors", func(p *picture) bool {
		return complete(p) && slices.Equal(p.entries[entry].GetSelectors(), []string{"unix:uid:0"})
	})
	truth(honest)

	liar.Tell(evil.Replayed())
	honest.Apply(service("ledger", 1001))
	agent.hears(other, "an old revision behind a newer one", func(p *picture) bool {
		if len(p.epochs) == 1 {
			honest.Apply(service("ledger", 1100+int(time.Now().UnixNano()%1000)))
		}
		return !slices.IsSorted(p.epochs)
	})

	liar.Tell()
	truth(other)
}

// What takes rights away is kept from a subscriber; an honest node tells it.
func TestHiddenRevocationsAreHidden(t *testing.T) {
	t.Parallel()
	honest := catest.Start(t, catest.Options{})
	honest.Apply(service("accounts", 1000) + service("ledger", 1001))
	other := honest.Join("ca-2", "dc1")
	agent := believe(t, honest, "h1")
	liar := evil.Take(t, other)
	has := func(p *picture, id string) bool { return p.entries[id] != nil }

	for i, lie := range []evil.Lie{evil.HiddenRevocations(), evil.OldPicture()} {
		name := fmt.Sprint("late", i)
		id := "service/" + name
		revision := honest.Apply(service(name, 1002+i))
		knows := func() (known uint64) {
			other.Node().Read(func(st *domain.State) { known = st.Revision() })
			return known
		}
		eventually(t, "the liar's node knows what was applied", func() bool { return knows() >= revision })
		distrusted := agent.hears(other, "the truth", complete).distrust
		liar.Tell(lie)
		gone := uint64(0)
		p := agent.hears(other, "the liar's words, before and after the entry went", func(p *picture) bool {
			if complete(p) && gone == 0 {
				if !has(p, id) {
					t.Fatalf("%s: the entry is not there to begin with", lie.Name)
				}
				var resp *ententev1.ApplyResponse
				eventually(t, "the entry is deleted", func() (done bool) { // also while a leader is elected
					var err error
					resp, err = honest.Admin().Apply(t.Context(), &ententev1.ApplyRequest{Deletes: []*statev1.ObjectKey{{Kind: "Service", Name: name}}})
					return err == nil
				})
				gone, p.heartbeat = resp.GetRevision(), 0
			}
			return gone != 0 && p.heartbeat != 0 && knows() >= gone && (lie.Name == "old-picture" || p.revision >= gone)
		})
		if !has(p, id) || p.distrust > distrusted {
			t.Errorf("%s: the revocation is told: %+v", lie.Name, p)
		}
		if lie.Name == "old-picture" {
			if p = agent.hears(other, "the same, at the next connect", complete); !has(p, id) || p.revision >= gone {
				t.Errorf("it is not replayed: %+v", p)
			}
		}
		if p = agent.hears(honest, "control: the honest node", complete); has(p, id) || p.distrust <= distrusted {
			t.Fatalf("control: the honest node does not tell it: %+v", p)
		}
		liar.Tell()
		agent.hears(other, "control: the truth", func(p *picture) bool {
			return complete(p) && !has(p, id) && p.distrust > distrusted && p.revision >= gone
		})
	}
}

// False presence is heard by another member that asks, beside the true one.
func TestFalsePresenceIsHeard(t *testing.T) {
	t.Parallel()
	honest := catest.Start(t, catest.Options{})
	honest.Apply(service("accounts", 1000))
	other := honest.Join("ca-2", "dc1")
	agent := believe(t, honest, "h1")
	ctx, cancel := context.WithCancel(t.Context())
	following := make(chan struct{})
	go func() {
		defer close(following)
		for ctx.Err() == nil {
			agent.follow(ctx, honest, func(*picture) bool { return false })
			time.Sleep(20 * time.Millisecond)
		}
	}()
	defer func() { cancel(); <-following }()
	liar := evil.Take(t, other)
	third, err := evil.Open(honest.Config()) // any member may ask
	if err != nil {
		t.Fatal(err)
	}
	conn, err := third.Dial(other.Config().Listen.API)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	heard := func(what string, right func(*ententev1.Instance) bool) {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
			within, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			stream, err := ententev1.NewPeerClient(conn).Presence(within, &ententev1.PresenceRequest{})
			for err == nil {
				var said *ententev1.PresenceResponse
				if said, err = stream.Recv(); err == nil && slices.ContainsFunc(said.GetInstances(), right) {
					cancel()
					return
				}
			}
			cancel()
		}
		t.Errorf("%s: not heard", what)
	}
	eventually(t, "the liar knows the session at the honest node", func() bool { return liar.Sessions()["h1"] == "boot-1" })
	liar.Tell(evil.LaterConnects())
	heard("a later connect", func(i *ententev1.Instance) bool {
		return i.GetAgent() == "h1" && i.GetBootId() == "boot-1" && i.GetConnect() == math.MaxUint64
	})
	liar.Tell(evil.FalseInstances("accounts", "127.0.0.1:66"))
	heard("a false instance", func(i *ententev1.Instance) bool {
		return i.GetService() == "accounts" && i.GetAddress() == "127.0.0.1:66"
	})
	agent.hears(other, "a false instance, at a subscriber", func(p *picture) bool {
		return slices.ContainsFunc(p.instances, func(i *ententev1.Instance) bool { return i.GetAddress() == "127.0.0.1:66" })
	})
	liar.Tell(evil.Flood(1000))
	heard("a flood", func(i *ententev1.Instance) bool { return strings.HasPrefix(i.GetAgent(), "nobody-") })
}

// What is proposed in an operator's name reaches the agreement under the member's own id.
// What stands in the way of each command is its own test's.
func TestProposedInAnOperatorsName(t *testing.T) {
	t.Parallel()
	honest := catest.Start(t, catest.Options{})
	other := honest.Join("ca-2", "dc1")
	liar, err := evil.Open(other.Config())
	if err != nil {
		t.Fatal(err)
	}
	public, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	grant := &statev1.Command{Body: &statev1.Command_CreateToken{CreateToken: &statev1.CreateToken{Token: &statev1.Token{
		Id: "tokenofnobody", PublicKey: public, NotAfter: time.Now().Add(time.Hour).Unix(),
		Grant: &statev1.Token_Agent{Agent: &statev1.AgentGrant{Name: "h66", Datacenter: "dc1"}},
	}}}}
	if resp, err := liar.Propose(t.Context(), honest.Addresses(), "operator (uid 0)", grant); err != nil || resp.GetRefusal() != "" {
		t.Errorf("a token that no operator made: %v, %v", resp, err)
	}
	tokens, err := honest.Admin().ListTokens(t.Context(), &ententev1.ListTokensRequest{})
	if err != nil || !strings.Contains(tokens.String(), "tokenofnobody") {
		t.Errorf("it did not reach the state: %v, %v", tokens, err)
	}
	tick := &statev1.Command{Body: &statev1.Command_Tick{Tick: &statev1.Tick{UnixNanos: []int64{1}}}}
	if _, err := liar.Propose(t.Context(), honest.Addresses(), "operator (uid 0)", tick); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a Tick of a member that does not lead: %v", err)
	}
}

// Raft, spoken with a member's key: an entry that fits is accepted, one that moves the
// agreed time far ahead is not, and one that replaces what was applied stops the node.
func TestRaftIsSpoken(t *testing.T) {
	t.Parallel()
	one := catest.Start(t, catest.Options{})
	two := one.Join("ca-2", "dc1")
	victim := one.Join("ca-3", "dc1")
	var cluster *statev1.Cluster
	var record *statev1.Member
	victim.Node().Read(func(st *domain.State) {
		cluster = st.Cluster()
		record, _ = st.Member(victim.Node().ID())
	})
	liar, err := evil.Open(two.Config())
	if err != nil {
		t.Fatal(err)
	}
	two.Stop()
	one.Stop() // nobody honest speaks between
	voice := liar.Voice(cluster, record)
	defer voice.Close()

	var accepted error
	eventually(t, "control: the victim follows", func() bool {
		term, prev, prevTerm, err := voice.Lead(0)
		if err != nil {
			accepted = err
			return false
		}
		heard, err := voice.Append(term, prev, prevTerm, evil.Noop(term, prev+1))
		if accepted = err; err != nil || !heard.Accepted {
			return false
		}
		far, err := evil.Tick(term, prev+2, time.Now().Add(24*365*time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		if heard, err := voice.Append(term, prev+1, term, far); err == nil && heard.Accepted {
			t.Errorf("a Tick a year ahead was accepted: %+v", heard)
		}
		_, accepted = voice.Append(term, prev+1, term, evil.Noop(term, prev+2)) // in its place
		return true
	})
	if accepted != nil {
		t.Fatal(accepted)
	}
	rewrite := func() error {
		term, prev, prevTerm, err := voice.Lead(6)
		if err == nil {
			_, err = voice.Append(term+1, prev, prevTerm, evil.Noop(term+1, prev+1))
		}
		return err
	}
	if err := rewrite(); err != nil {
		t.Logf("the victim answers: %v", err)
	}
	if err := victim.WaitEnd(20 * time.Second); err == nil || !strings.Contains(err.Error(), "agreed") {
		t.Errorf("the victim ended with %v", err)
	}
}

// A process of the test's own binary runs the node that was taken over, and lies.
func TestLyingProcess(t *testing.T) {
	t.Parallel()
	honest := catest.Start(t, catest.Options{})
	honest.Apply(service("accounts", 1000))
	other := honest.Join("ca-2", "dc1")
	agent := believe(t, honest, "h1")
	other.Stop()

	dir := t.TempDir()
	cfg := other.Config()
	text := fmt.Sprintf("trustDomain: %s\nname: %s\ndatacenter: %s\ndataDir: %s\nsocket: %s\nlisten: {raft: %q, api: %q, bundle: %q, admin: \"127.0.0.1:0\"}\nkeys: {insecureDev: true}\n",
		cfg.TrustDomain, cfg.Name, cfg.Datacenter, cfg.DataDir, cfg.Socket, cfg.Listen.Raft, cfg.Listen.API, cfg.Listen.Bundle)
	orders := evil.Orders{Config: filepath.Join(dir, "ca.yaml"), Lies: []string{"own-root", "alone", fmt.Sprintf("ahead-%x", evil.FarAhead)}, Forged: filepath.Join(dir, "forged.pem"), Path: "/anybody"}
	if err := os.WriteFile(orders.Config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	process := exec.Command(exe)
	process.Env = append(os.Environ(), orders.Env()...)
	var said strings.Builder
	process.Stderr = &said
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		process.Process.Signal(os.Interrupt)
		if err := process.Wait(); err != nil || t.Failed() {
			t.Errorf("the process ended with %v\n%s", err, said.String())
		}
	}()
	begun := false
	p := agent.hears(other, "the process's lies, over a stream that began with the truth", func(p *picture) bool {
		if complete(p) && !begun {
			if p.revision > evil.FarAhead || len(p.members) != 2 {
				t.Errorf("control: %+v", p)
			}
			begun = true
			process.Process.Signal(syscall.SIGUSR1)
		}
		return p.revision > evil.FarAhead
	})
	forged, err := tls.LoadX509KeyPair(orders.Forged, orders.Forged)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(forged.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	verify := func(jwks []byte) error {
		own, _, err := bundle.Parse(honest.TrustDomain(), jwks)
		if err != nil {
			t.Fatal(err)
		}
		_, err = peer.Verify([]*x509.Certificate{leaf}, own.X509Bundle(), time.Now())
		return err
	}
	if err := verify(p.bundle); err != nil || !slices.Equal(p.members, []string{"ca-2"}) {
		t.Errorf("members %v, the forged SVID: %v", p.members, err)
	}
	if verify(honest.BundleJSON()) == nil {
		t.Error("control: the forged SVID verifies with the honest node's bundle")
	}
}

// Nothing of this package is in the product.
func TestNotInTheProduct(t *testing.T) {
	list, err := exec.Command("go", "list", "-deps", "../../cmd/...").Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, exit.Stderr)
		}
		t.Fatal(err)
	}
	lines := strings.Split(string(list), "\n")
	if slices.Contains(lines, "github.com/entente-mesh/entente/scenarios/evil") {
		t.Error("the product's binaries hold it")
	}
	if !slices.Contains(lines, "github.com/entente-mesh/entente/scenarios") {
		t.Error("control: the list has nothing of ours")
	}
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !is(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 30 s", what)
		}
	}
}
