package evil_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/scenarios/evil"
)

// svid is the believer's, as its agent would hold it.
func (b *believer) svid() *x509svid.SVID {
	b.t.Helper()
	s := &x509svid.SVID{PrivateKey: b.identity.PrivateKey.(crypto.Signer)}
	for _, der := range b.identity.Certificate {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			b.t.Fatal(err)
		}
		s.Certificates = append(s.Certificates, cert)
	}
	return s
}

// shown are the instances that a node shows, as SERVICE@AGENT ADDRESS.
func shown(c *catest.CA) (list []string) {
	for _, i := range c.Status().GetInstances() {
		line := i.GetService() + "@" + i.GetAgent() + " " + i.GetAddress()
		if i.GetStale() {
			line += " stale"
		}
		list = append(list, line)
	}
	return list
}

// A member that says that every agent has connected there, later than ever (and serves
// elsewhere), changes nothing at the node that holds the agent's stream: the stream goes
// on, what the agent serves is shown, and it is waited for. A session that the agent has
// signed ends the stream before within a second.
func TestMembersClaimsOfSessionsChangeNothing(t *testing.T) {
	t.Parallel()
	honest := catest.Start(t, catest.Options{})
	honest.Apply(strings.ReplaceAll(service("accounts", 1000), "[h1]", "[h1, h3]"))
	other := honest.Join("ca-2", "dc1")
	liar := evil.Take(t, other)
	host := believe(t, honest, "h1")
	only := honest.Config().Listen.API
	var dials atomic.Int32
	agent, err := client.New(client.Config{
		TrustDomain: honest.TrustDomain(), Addresses: []string{only}, SVID: host.svid(), Bundles: honest.Bundle(), BootID: "boot-1", Datacenter: "dc1",
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			if address != only {
				return nil, errors.New("not reached in this test")
			}
			dials.Add(1)
			return (&net.Dialer{}).DialContext(ctx, network, address)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	synced := make(chan struct{})
	go func() {
		defer close(synced)
		agent.Sync(ctx, func(*client.View) error { return nil })
	}()
	defer func() { cancel(); <-synced }()
	agent.Report([]client.Instance{{Service: "accounts", Address: "127.0.0.1:7443", Healthy: true}})
	want := []string{"accounts@h1 127.0.0.1:7443"}
	for _, c := range []*catest.CA{honest, other} {
		eventually(t, "the instance is shown", func() bool { return slices.Equal(shown(c), want) })
	}
	eventually(t, "the liar knows the session", func() bool { return liar.Sessions()["h1"] == "boot-1" })
	believe(t, honest, "h3") // nobody has a stream of it
	eventually(t, "the liar's node knows it", func() (known bool) {
		other.Node().Read(func(st *domain.State) { _, known = st.Agent("h3") })
		return known
	})
	stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	said := func(m *evil.Member, name, boot string, connect uint64, key crypto.Signer) []*ententev1.Instance {
		return []*ententev1.Instance{
			{Agent: name, BootId: boot, Connect: connect, Proof: proof(t, honest, name, boot, connect, m.ID, key)},
			{Agent: name, BootId: boot, Connect: connect, Service: "accounts", Datacenter: "dc1", Address: "127.0.0.1:66", Health: ententev1.Health_HEALTH_HEALTHY},
			{Agent: name, BootId: boot, Connect: connect, Service: "nothing", Datacenter: "dc1", Address: "127.0.0.1:66", Health: ententev1.Health_HEALTH_HEALTHY},
		}
	}
	before := dials.Load()
	for name, lie := range map[string]struct {
		boot string
		key  crypto.Signer
		more []evil.Lie
	}{
		"unsigned": {"boot-1", nil, []evil.Lie{evil.LaterConnects()}}, "unsigned, another boot": {"boot-9", nil, nil},
		"signed by a stranger": {"boot-1", stranger, nil},
	} {
		liar.Tell(append(lie.more, evil.Lie{Presence: func(m *evil.Member) *ententev1.PresenceResponse {
			claim := &ententev1.PresenceResponse{Instances: said(m, "h3", "boot-3", 1, nil)} // the control: nobody knows better
			claim.Instances = append(claim.Instances, said(m, "h1", lie.boot, math.MaxUint64, lie.key)...)
			for i := range 1000 {
				claim.Instances = append(claim.Instances, said(m, fmt.Sprint("nobody-", i), "boot", 1, nil)...)
			}
			return claim
		}})...)
		eventually(t, "control: the lie is heard", func() bool { return slices.Contains(shown(honest), "accounts@h3 127.0.0.1:66") })
		for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			if got := shown(honest); !slices.Equal(got, append(slices.Clone(want), "accounts@h3 127.0.0.1:66")) {
				t.Fatalf("%s: shown %v", name, got)
			}
			if n := honest.Status().GetSubscribers(); n != 1 {
				t.Fatalf("%s: %d subscribers", name, n)
			}
		}
		if now := dials.Load(); now != before {
			t.Errorf("%s: the agent's stream ended %d times", name, now-before)
		}
		liar.Tell(evil.Lie{Presence: func(*evil.Member) *ententev1.PresenceResponse {
			return &ententev1.PresenceResponse{Withdrawn: []*ententev1.Instance{{Agent: "h1"}, {Agent: "h3"}}}
		}})
		eventually(t, "the lie is taken back", func() bool { return slices.Equal(shown(honest), want) })
		liar.Tell()
	}

	// The agent itself, at the other node.
	session := func(connect uint64, key crypto.Signer) func() {
		return open(t, other, host, &ententev1.Hello{BootId: "boot-1", Connect: connect, Proof: proof(t, honest, "h1", "boot-1", connect, other.Node().ID(), key)})
	}
	leave := session(1000, nil)
	time.Sleep(time.Second)
	if now := dials.Load(); now != before {
		t.Error("a session that the agent did not sign ended its stream")
	}
	leave()
	begin := time.Now()
	leave = session(2000, host.svid().PrivateKey)
	defer leave()
	eventually(t, "the stream before ends", func() bool { return dials.Load() > before })
	if took := time.Since(begin); took > 2*time.Second {
		t.Errorf("a move that the agent signed ended the stream before after %v", took)
	}
}

// proof is a key's over a session; nil without one.
func proof(t *testing.T, c *catest.CA, subscriber, boot string, connect uint64, node string, key crypto.Signer) *ententev1.SessionProof {
	if key == nil {
		return nil
	}
	s := ca.Session{Subscriber: subscriber, BootID: boot, Connect: connect, NodeID: node}
	c.Node().Read(func(st *domain.State) { s.Cluster = st.Cluster().GetId() })
	public, signature, err := s.Sign(rand.Reader, key)
	if err != nil {
		t.Error(err)
	}
	return &ententev1.SessionProof{PublicKey: public, Signature: signature}
}

// open opens a stream as the believer and returns when it is answered.
func open(t *testing.T, c *catest.CA, b *believer, hello *ententev1.Hello) (closes func()) {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+c.Config().Listen.API, grpc.WithNoProxy(), grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, Certificates: []tls.Certificate{b.identity}, NextProtos: []string{"h2"},
	})))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	stream, err := ententev1.NewSyncClient(conn).Sync(t.Context())
	if err == nil {
		err = stream.Send(&ententev1.SyncRequest{Message: &ententev1.SyncRequest_Hello{Hello: hello}})
	}
	if err == nil {
		_, err = stream.Recv()
	}
	if err != nil {
		t.Fatal(err)
	}
	return func() { conn.Close() }
}
