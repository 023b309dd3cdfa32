package server_test

import (
	"context"
	"crypto/tls"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/node"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

// attempts is how often each stranger tries. The log gets two ticks a second by itself.
const attempts = 100

// logged counts what is written while f runs: log entries beyond those of the time, and
// bytes of the audit log.
func logged(t *testing.T, c *catest.CA, f func()) (entries int64, audit int64) {
	t.Helper()
	size := func() int64 {
		info, err := os.Stat(filepath.Join(c.Config().DataDir, "audit.log"))
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	index, bytes, begin := c.Status().GetLastIndex(), size(), time.Now()
	f()
	ticks := 4 * int64(time.Since(begin)/time.Second+1)
	return int64(c.Status().GetLastIndex()-index) - ticks, size() - bytes
}

// forgeries are requests of somebody who knows what is public of the cluster.
func forgeries(t *testing.T, c *catest.CA, role, tokenID string, key string, bound []byte) (statement, signature []byte) {
	t.Helper()
	var cluster *statev1.Cluster
	c.Node().Read(func(st *domain.State) { cluster = st.Cluster() })
	statement, signature, err := ca.SignStatement(make([]byte, 32), &statev1.JoinStatement{
		ClusterId: cluster.GetId(), Epoch: cluster.GetEpoch(), TokenId: tokenID, Role: role, KeyId: key, Exporter: bound,
	})
	if err != nil {
		t.Fatal(err)
	}
	return statement, signature
}

// Whoever has no token writes nothing: not to the log, not to the audit log, whatever he
// calls. He is counted. Who has one writes what he should.
func TestStrangersWriteNothing(t *testing.T) {
	t.Parallel()
	v := newVictim(t)
	known := parseToken(t, v.AgentToken("h7", "dc1"))
	spent := parseToken(t, v.AgentToken("h8", "dc1"))
	anyone := dial(t, v.CA, nil)
	bound := exporter(t, anyone)
	if _, err := ententev1.NewAttestClient(anyone).Attest(t.Context(), attestRequest(t, spent, newKey(t), bound)); err != nil {
		t.Fatal(err)
	}
	nodeKey := newKey(t)
	nodeCert := nodeCertificate(t, nodeKey)
	joiner := dial(t, v.CA, &nodeCert)
	joinerBound := exporter(t, joiner)

	attest := func(tokenID string) func() error {
		key := newKey(t)
		statement, signature := forgeries(t, v.CA, ca.RoleAgent, tokenID, keyIDOf(t, key), bound)
		req := &ententev1.AttestRequest{TokenId: tokenID, Statement: statement, Signature: signature, Csr: csrOf(t, key)}
		return func() error {
			_, err := ententev1.NewAttestClient(anyone).Attest(t.Context(), req)
			return err
		}
	}
	join := func(signature []byte) func() error {
		statement, _ := forgeries(t, v.CA, ca.RoleNode, "nosuch", keyIDOf(t, nodeKey), joinerBound)
		req := &ententev1.JoinRequest{TokenId: "nosuch", Statement: statement, Signature: signature, RaftAddress: "127.0.0.9:7000", ApiAddress: "127.0.0.9:7001"}
		return func() error {
			_, err := ententev1.NewJoinClient(joiner).Join(t.Context(), req)
			return err
		}
	}
	spentBy := attestRequest(t, spent, newKey(t), bound)
	strangers := v.metric(`entente_ca_strangers_refused_total{method="/entente.v1.Attest/Attest"}`)
	for _, stranger := range []struct {
		name    string
		try     func() error
		code    codes.Code
		audited int64 // bytes at most: a token that is known is worth a line
	}{
		{"attests with a token that does not exist", attest("nosuch"), codes.PermissionDenied, 0},
		{"attests with a token's id, without its seed", attest(known.ID), codes.PermissionDenied, 0},
		{"attests with a spent token", func() error {
			_, err := ententev1.NewAttestClient(anyone).Attest(t.Context(), spentBy)
			return err
		}, codes.PermissionDenied, 1000},
		{"joins with a token that does not exist", join(make([]byte, 64)), codes.PermissionDenied, 0},
		{"joins with a long signature", join(make([]byte, 40<<10)), codes.PermissionDenied, 0},
		{"administers", func() error {
			_, err := ententev1.NewAdminClient(anyone).CreateToken(t.Context(), &ententev1.CreateTokenRequest{})
			return err
		}, codes.PermissionDenied, 0},
	} {
		entries, audit := logged(t, v.CA, func() {
			for range attempts {
				wantCode(t, stranger.name, stranger.try(), stranger.code)
			}
		})
		if entries > 0 || audit > stranger.audited {
			t.Errorf("%d times somebody %s: %d log entries, %d bytes of audit log", attempts, stranger.name, entries, audit)
		}
	}
	if n := v.metric(`entente_ca_strangers_refused_total{method="/entente.v1.Attest/Attest"}`) - strangers; n != 3*attempts {
		t.Errorf("%v refusals are counted, not %d", n, 3*attempts)
	}

	// Nor does who was admitted once, however often he asks for the same answer, or for
	// another with a token that he does not have.
	admittedKey := newKey(t)
	again := attestRequest(t, parseToken(t, v.AgentToken("h9", "dc1")), admittedKey, bound)
	if _, err := ententev1.NewAttestClient(anyone).Attest(t.Context(), again); err != nil {
		t.Fatal(err)
	}
	asAgent := dial(t, v.CA, &v.good)
	agentKey := newKey(t)
	statement, signature := forgeries(t, v.CA, ca.RoleAgent, "nosuch", keyIDOf(t, agentKey), exporter(t, asAgent))
	entries, audit := logged(t, v.CA, func() {
		for range attempts {
			if resp, err := ententev1.NewAttestClient(anyone).Attest(t.Context(), again); err != nil || resp.GetAgent().GetName() != "h9" {
				t.Fatalf("a repeat: %v, %v", resp.GetAgent(), err)
			}
			_, err := ententev1.NewAttestClient(asAgent).Attest(t.Context(), &ententev1.AttestRequest{TokenId: "nosuch", Statement: statement, Signature: signature, Csr: csrOf(t, agentKey)})
			wantCode(t, "an agent with a token that does not exist", err, codes.PermissionDenied)
		}
	})
	// Beside a line for each SVID of an agent, which the audit log bounds by itself.
	acts := 0
	lines, _ := auditLines(t, v.CA)
	for _, line := range lines {
		if line["kind"] == "act" && line["what"] == "Attest" {
			acts++
		}
	}
	if entries > 0 || acts > 10 {
		t.Errorf("repeats: %d log entries, %d bytes and %d acts in the audit log", entries, audit, acts)
	}

	// Control: the same connections, with tokens.
	revision := v.Status().GetRevision()
	_, audit = logged(t, v.CA, func() {
		if _, err := ententev1.NewAttestClient(anyone).Attest(t.Context(), attestRequest(t, known, newKey(t), bound)); err != nil {
			t.Errorf("control: %v", err)
		}
	})
	if v.Status().GetRevision() == revision || audit == 0 {
		t.Errorf("control: an admission is not written: %d bytes of audit log", audit)
	}
	token := parseToken(t, v.NodeToken("ca-2", "dc2"))
	statement, signature, err := token.Sign(keyIDOf(t, nodeKey), joinerBound)
	if err != nil {
		t.Fatal(err)
	}
	req := &ententev1.JoinRequest{TokenId: token.ID, Statement: statement, Signature: signature, RaftAddress: "127.0.0.9:7000", ApiAddress: "127.0.0.9:7001", FeatureLevel: domain.FeatureLevel}
	if _, err := ententev1.NewJoinClient(joiner).Join(t.Context(), req); err != nil {
		t.Errorf("control: a node that joins: %v", err)
	}
}

// A certificate that nobody vouches for writes nothing either, and one that was admitted
// with another key is refused without a write.
func TestStrangersCertificatesWriteNothing(t *testing.T) {
	t.Parallel()
	p := newHostPKI(t)
	c := startWithX509PoP(t, p)
	conn := dial(t, c, nil)
	door := ententev1.NewAttestClient(conn)
	bound := exporter(t, conn)
	leaf, signer := p.host("h1")
	strange, strangeKey := newHostPKI(t).host("h1")
	if _, err := door.Attest(t.Context(), possession(t, leaf, signer, newKey(t), bound)); err != nil {
		t.Fatalf("control: %v", err)
	}
	for name, attack := range map[string]struct {
		req  *ententev1.AttestRequest
		code codes.Code
	}{
		"a stranger's certificate": {possession(t, strange, strangeKey, newKey(t), bound), codes.PermissionDenied},
		"a copied host key":        {possession(t, leaf, signer, newKey(t), bound), codes.AlreadyExists},
	} {
		entries, audit := logged(t, c, func() {
			for range attempts {
				_, err := door.Attest(t.Context(), attack.req)
				wantCode(t, name, err, attack.code)
			}
		})
		if entries > 0 || audit > 1000 {
			t.Errorf("%s: %d log entries, %d bytes of audit log", name, entries, audit)
		}
	}
}

// dialFrom is dial from an address of this host.
func dialFrom(t *testing.T, c *catest.CA, address string) *grpc.ClientConn {
	t.Helper()
	dialer := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}
	conn, err := grpc.NewClient("passthrough:///"+c.Config().Listen.API,
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true})),
		grpc.WithContextDialer(func(ctx context.Context, to string) (net.Conn, error) { return dialer.DialContext(ctx, "tcp", to) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// One source of addresses may ask so often; it is told when to come back, and another is
// not kept out.
func TestRateOfASource(t *testing.T) {
	t.Parallel()
	c := startWithLimits(t, node.Limits{AttestsPerSource: yamlfile.Rate{PerSecond: 2}}) // 20 at once
	greedy := dialFrom(t, c, "127.9.0.1")
	var err error
	tries := 0
	for ; tries < 40; tries++ {
		if _, err = ententev1.NewAttestClient(greedy).Attest(t.Context(), &ententev1.AttestRequest{Csr: csrOf(t, newKey(t))}); retryHint(err) > 0 {
			break
		}
	}
	wantCode(t, "a greedy source", err, codes.ResourceExhausted)
	if hint := retryHint(err); tries < 20 || hint <= 0 || hint > time.Second {
		t.Errorf("sent away after %d attempts, for %v", tries, hint)
	}
	other := dialFrom(t, c, "127.9.0.2")
	token := parseToken(t, c.AgentToken("h1", "dc1"))
	if _, err := ententev1.NewAttestClient(other).Attest(t.Context(), attestRequest(t, token, newKey(t), exporter(t, other))); err != nil {
		t.Errorf("control: another source: %v", err)
	}
	if text := metricsOf(t, c); !strings.Contains(text, `entente_ca_limited_total{limit="source"} `) {
		t.Error("it is not counted")
	}
}

// A follower has no last word on a token that it does not know: it may lag. The leader
// has. Neither writes anything for it, nor what a member forwards of a stranger's.
func TestUnknownTokenAtAFollower(t *testing.T) {
	t.Parallel()
	v := newVictim(t)
	two := v.Join("ca-2", "dc2")
	leader, follower := v.CA, two
	if two.Node().IsLeader() {
		leader, follower = two, v.CA
	}
	try := func(c *catest.CA) error {
		conn, key := dial(t, c, nil), newKey(t)
		statement, signature := forgeries(t, c, ca.RoleAgent, "nosuch", keyIDOf(t, key), exporter(t, conn))
		_, err := ententev1.NewAttestClient(conn).Attest(t.Context(), &ententev1.AttestRequest{TokenId: "nosuch", Statement: statement, Signature: signature, Csr: csrOf(t, key)})
		return err
	}
	wantCode(t, "at the follower", try(follower), codes.Unavailable)
	wantCode(t, "at the leader", try(leader), codes.PermissionDenied)

	// Control: a true one, at the follower; twice, for a repeat gets the same answer.
	conn, key := dial(t, follower, nil), newKey(t)
	token := parseToken(t, v.AgentToken("h7", "dc1"))
	bound := exporter(t, conn)
	for range 2 {
		var err error
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			var resp *ententev1.AttestResponse
			if resp, err = ententev1.NewAttestClient(conn).Attest(t.Context(), attestRequest(t, token, key, bound)); err == nil && resp.GetAgent().GetName() == "h7" {
				break
			}
			wantCode(t, "a token that has not arrived yet", err, codes.Unavailable)
			if time.Now().After(deadline) {
				t.Fatal(err)
			}
		}
	}

	// A member that lies: what it says strangers have shown is looked at by the leader.
	member := memberCertificate(t, follower)
	door := ententev1.NewPeerClient(dial(t, leader, &member))
	stranger := keyIDOf(t, newKey(t))
	agentStatement, agentSignature := forgeries(t, leader, ca.RoleAgent, token.ID, stranger, make([]byte, ca.ExporterSize))
	nodeStatement, nodeSignature := forgeries(t, leader, ca.RoleNode, "nosuch", stranger, make([]byte, ca.ExporterSize))
	for name, command := range map[string]*statev1.Command{
		"a host's": {Body: &statev1.Command_AttestAgent{AttestAgent: &statev1.AttestAgent{TokenId: token.ID, KeyId: stranger, Statement: agentStatement, Signature: agentSignature}}},
		"a node's": {Body: &statev1.Command_JoinMember{JoinMember: &statev1.JoinMember{TokenId: "nosuch", Member: &statev1.Member{Id: stranger}, Statement: nodeStatement, Signature: nodeSignature}}},
		"nobody's": {Body: &statev1.Command_AdmitAgent{AdmitAgent: &statev1.AdmitAgent{Agent: &statev1.Agent{Name: "No Label", KeyId: stranger}}}},
	} {
		command.Actor = "attest " + stranger
		data, err := proto.Marshal(command)
		if err != nil {
			t.Fatal(err)
		}
		entries, _ := logged(t, leader, func() {
			for range attempts {
				resp, err := door.Propose(t.Context(), &ententev1.ProposeRequest{Command: data})
				if err != nil || resp.GetRefusal() == "" {
					t.Fatalf("%s: %v, %v", name, resp, err)
				}
			}
		})
		if entries > 0 {
			t.Errorf("%s, forwarded: %d log entries", name, entries)
		}
	}
}
