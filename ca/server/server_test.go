package server_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/emptypb"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/keystore"
	"github.com/entente-mesh/entente/ca/node"
	"github.com/entente-mesh/entente/internal/peer"
)

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func keyIDOf(t testing.TB, key crypto.Signer) string {
	t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return ca.KeyID(spki)
}

func csrOf(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

// dial opens one connection to a node's API, showing cert if it is not nil.
func dial(t testing.TB, c *catest.CA, cert *tls.Certificate) *grpc.ClientConn {
	t.Helper()
	config := &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true} // the test is the attacker, or trusts
	if cert != nil {
		config.Certificates = []tls.Certificate{*cert}
	}
	conn, err := grpc.NewClient("passthrough:///"+c.Config().Listen.API, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// exporter is that of the connection, which it opens for good.
func exporter(t testing.TB, conn *grpc.ClientConn) []byte {
	t.Helper()
	var remote grpcpeer.Peer
	// Any call will do; this one is answered without being carried out.
	conn.Invoke(t.Context(), "/entente.v1.None/None", &ententev1.StatusRequest{}, &ententev1.StatusResponse{}, grpc.Peer(&remote), grpc.WaitForReady(true))
	info, ok := remote.AuthInfo.(credentials.TLSInfo)
	if !ok {
		t.Fatal("no TLS connection")
	}
	key, err := info.State.ExportKeyingMaterial(ca.ExporterLabel, nil, ca.ExporterSize)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func attestRequest(t testing.TB, token *ca.Token, key crypto.Signer, exporter []byte) *ententev1.AttestRequest {
	t.Helper()
	statement, signature, err := token.Sign(keyIDOf(t, key), exporter)
	if err != nil {
		t.Fatal(err)
	}
	return &ententev1.AttestRequest{TokenId: token.ID, Statement: statement, Signature: signature, Csr: csrOf(t, key)}
}

func parseToken(t testing.TB, text string) *ca.Token {
	t.Helper()
	token, err := ca.ParseToken(text)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// attest makes a host an agent and returns what it shows from then on.
func attest(t testing.TB, c *catest.CA, name string, addresses ...string) tls.Certificate {
	t.Helper()
	key := newKey(t)
	conn := dial(t, c, nil)
	resp, err := ententev1.NewAttestClient(conn).Attest(t.Context(), attestRequest(t, parseToken(t, c.AgentToken(name, "dc1", addresses...)), key, exporter(t, conn)))
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: resp.GetCertificates(), PrivateKey: key}
}

// sign asks for one SVID; entry "" is the agent's own.
func sign(t testing.TB, conn *grpc.ClientConn, entry string, key crypto.Signer) (tls.Certificate, error) {
	t.Helper()
	resp, err := ententev1.NewSignClient(conn).SignX509(t.Context(), &ententev1.SignX509Request{
		Requests: []*ententev1.X509Request{{EntryId: entry, Csr: csrOf(t, key)}},
	})
	if err != nil {
		return tls.Certificate{}, err
	}
	result := resp.GetResults()[0]
	if result.GetCode() != 0 {
		return tls.Certificate{}, status.Error(codes.Code(result.GetCode()), result.GetError())
	}
	return tls.Certificate{Certificate: result.GetCertificates(), PrivateKey: key}, nil
}

func wantCode(t testing.TB, what string, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("%s: %s (%v), want %s", what, got, err, want)
	}
}

const twoHosts = `
apiVersion: entente/v1
kind: Service
metadata: {name: accounts}
spec: {run: {uid: 1000, hosts: [h1]}, port: 8080}
---
apiVersion: entente/v1
kind: Service
metadata: {name: ledger}
spec: {run: {uid: 1001, hosts: [h2]}, port: 8081}
---
apiVersion: entente/v1
kind: Gateway
metadata: {name: gw-1}
spec: {run: {uid: 1002, hosts: [h2]}, datacenter: dc1, address: 127.0.0.1:15443}
`

// Who is admitted by a token, and who is not. Each attempt is refused for its own reason,
// changes nothing that is agreed, and spends nothing: its token admits afterwards.
func TestAttest(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	conn := dial(t, c, nil)
	bound := exporter(t, conn)
	door := ententev1.NewAttestClient(conn)
	call := func(req *ententev1.AttestRequest) (*ententev1.AttestResponse, error) {
		return door.Attest(t.Context(), req)
	}
	admitted := func() (agents, spent int) {
		c.Node().Read(func(st *domain.State) {
			agents = st.AgentCount()
			for _, token := range st.Tokens() {
				if token.GetUsedBy() != "" {
					spent++
				}
			}
		})
		return agents, spent
	}

	token, key := parseToken(t, c.AgentToken("h1", "dc1", "127.0.0.1")), newKey(t)
	first, err := call(attestRequest(t, token, key, bound))
	if err != nil {
		t.Fatal(err)
	}
	if a := first.GetAgent(); a.GetName() != "h1" || a.GetKeyId() != keyIDOf(t, key) || a.GetDatacenter() != "dc1" || !slices.Equal(a.GetAddresses(), []string{"127.0.0.1"}) ||
		len(first.GetMembers()) != 1 || first.GetCluster() == nil || len(first.GetBundle()) == 0 {
		t.Errorf("answer: %v", first)
	}
	leaf, err := x509.ParseCertificate(first.GetCertificates()[0])
	if err != nil {
		t.Fatal(err)
	}
	if id, err := peer.Verify([]*x509.Certificate{leaf}, c.Bundle(), time.Now()); err != nil || id.Path() != "/entente/agent/h1" || !key.PublicKey.Equal(leaf.PublicKey) {
		t.Errorf("the SVID is %s's: %v", id, err)
	}

	// I9: one token, one key. The same key may repeat and gets the same answer; nothing is
	// written then, nor by the known key alone.
	revision := c.Status().GetRevision()
	again, err := call(attestRequest(t, token, key, bound))
	if err != nil || !proto.Equal(again.GetAgent(), first.GetAgent()) {
		t.Errorf("repeated with the same key: %v, %v", again.GetAgent(), err)
	}
	if known, err := call(&ententev1.AttestRequest{Csr: csrOf(t, key)}); err != nil || !proto.Equal(known.GetAgent(), first.GetAgent()) {
		t.Errorf("by the known key: %v, %v", known.GetAgent(), err)
	}
	if now := c.Status().GetRevision(); now != revision {
		t.Errorf("a re-attestation was written: revision %d, then %d", revision, now)
	}

	other := newKey(t)
	for i, attack := range []struct {
		name string
		make func(token *ca.Token) *ententev1.AttestRequest
		code codes.Code
		why  string // part of the answer
	}{
		{"a spent token with another key", func(*ca.Token) *ententev1.AttestRequest { return attestRequest(t, token, newKey(t), bound) }, codes.PermissionDenied, "admitted another key"},
		{"an unknown key without token", func(*ca.Token) *ententev1.AttestRequest { return &ententev1.AttestRequest{Csr: csrOf(t, newKey(t))} }, codes.PermissionDenied, "never admitted"},
		{"a statement from another connection", func(token *ca.Token) *ententev1.AttestRequest {
			return attestRequest(t, token, other, exporter(t, dial(t, c, nil)))
		}, codes.PermissionDenied, "bound to another connection"},
		{"a statement bound to zeros", func(token *ca.Token) *ententev1.AttestRequest {
			return attestRequest(t, token, other, make([]byte, ca.ExporterSize))
		}, codes.PermissionDenied, "bound to another connection"},
		{"a statement bound to nothing", func(token *ca.Token) *ententev1.AttestRequest { return attestRequest(t, token, other, nil) }, codes.PermissionDenied, "not bound to a connection"},
		{"another cluster's token", func(token *ca.Token) *ententev1.AttestRequest {
			strange := *token
			strange.ClusterID = make([]byte, ca.ClusterIDSize)
			return attestRequest(t, &strange, other, bound)
		}, codes.FailedPrecondition, "another cluster"},
		{"another epoch's token", func(token *ca.Token) *ententev1.AttestRequest {
			strange := *token
			strange.Epoch++
			return attestRequest(t, &strange, other, bound)
		}, codes.FailedPrecondition, "epoch"},
		{"a token's id without its seed", func(token *ca.Token) *ententev1.AttestRequest {
			forged := *token
			forged.Seed = make([]byte, 32)
			return attestRequest(t, &forged, other, bound)
		}, codes.PermissionDenied, "not signed with the token"},
		{"no signature", func(token *ca.Token) *ententev1.AttestRequest {
			req := attestRequest(t, token, other, bound)
			req.Signature = nil
			return req
		}, codes.PermissionDenied, "not signed with the token"},
		{"an unknown token", func(token *ca.Token) *ententev1.AttestRequest {
			unknown := *token
			unknown.ID = "nosuchtoken"
			return attestRequest(t, &unknown, other, bound)
		}, codes.PermissionDenied, "for its approval (entente node approve)"},
		{"one token's id on another's statement", func(token *ca.Token) *ententev1.AttestRequest {
			req := attestRequest(t, token, other, bound)
			req.TokenId = parseToken(t, c.AgentToken("h-beside", "dc1")).ID
			return req
		}, codes.PermissionDenied, "another token"},
		{"a node's token", func(*ca.Token) *ententev1.AttestRequest {
			return attestRequest(t, parseToken(t, c.NodeToken("ca-9", "dc1")), other, bound)
		}, codes.PermissionDenied, "role"},
		{"a node's token that says it is an agent's", func(*ca.Token) *ententev1.AttestRequest {
			node := parseToken(t, c.NodeToken("ca-9", "dc1"))
			node.Role = ca.RoleAgent
			return attestRequest(t, node, other, bound)
		}, codes.PermissionDenied, "does not admit agents"},
		{"a request for another key than the statement's", func(token *ca.Token) *ententev1.AttestRequest {
			swapped := attestRequest(t, token, other, bound)
			swapped.Csr = csrOf(t, newKey(t))
			return swapped
		}, codes.PermissionDenied, "another key"},
		{"a request that is not signed with its key", func(token *ca.Token) *ententev1.AttestRequest {
			broken := attestRequest(t, token, other, bound)
			broken.Csr[len(broken.Csr)-1] ^= 1
			return broken
		}, codes.InvalidArgument, "not signed"},
		{"another agent's key", func(token *ca.Token) *ententev1.AttestRequest { return attestRequest(t, token, key, bound) }, codes.AlreadyExists, "agent h1 already"},
	} {
		unspent := parseToken(t, c.AgentToken(fmt.Sprint("a", i), "dc1"))
		req := attack.make(unspent)
		agents, spent := admitted()
		_, err := call(req)
		wantCode(t, attack.name, err, attack.code)
		if err == nil || !strings.Contains(err.Error(), attack.why) {
			t.Errorf("%s: %v, not for %q", attack.name, err, attack.why)
		}
		if a, s := admitted(); a != agents || s != spent {
			t.Errorf("%s: %d agents, then %d; %d spent tokens, then %d", attack.name, agents, a, spent, s)
		}
		// Control: the same token, as it is meant.
		if resp, err := call(attestRequest(t, unspent, newKey(t), bound)); err != nil || resp.GetAgent().GetName() != fmt.Sprint("a", i) {
			t.Errorf("after %s its token admits %v, %v", attack.name, resp.GetAgent(), err)
		}
	}
}

func TestExpiredToken(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	resp, err := c.Admin().CreateToken(t.Context(), &ententev1.CreateTokenRequest{
		Agent: &statev1.AgentGrant{Name: "h1", Datacenter: "dc1"}, TtlSeconds: 1,
	})
	if err != nil {
		t.Fatal(err)
	}
	conn := dial(t, c, nil)
	bound := exporter(t, conn)
	time.Sleep(time.Until(time.Unix(resp.GetNotAfter(), 0)) + 600*time.Millisecond) // the agreed time moves twice a second
	_, err = ententev1.NewAttestClient(conn).Attest(t.Context(), attestRequest(t, parseToken(t, resp.GetToken()), newKey(t), bound))
	wantCode(t, "an expired token", err, codes.PermissionDenied)
	if err == nil || !strings.Contains(err.Error(), "new one") {
		t.Errorf("the error does not say what to do: %v", err)
	}
}

func TestSign(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	c.Apply(twoHosts)
	agent := attest(t, c, "h1")
	conn := dial(t, c, &agent)

	cert, err := sign(t, conn, "service/accounts", newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	if id, err := peer.Verify([]*x509.Certificate{leaf}, c.Bundle(), time.Now()); err != nil || id.Path() != "/accounts" {
		t.Errorf("signed %v, %v", id, err)
	}
	if _, err := sign(t, conn, "", agent.PrivateKey.(*ecdsa.PrivateKey)); err != nil {
		t.Errorf("the agent's own renewal: %v", err)
	}

	_, err = sign(t, conn, "service/ledger", newKey(t))
	wantCode(t, "another host's entry", err, codes.PermissionDenied)
	existing := status.Convert(err).Message()
	_, err = sign(t, conn, "service/nothing", newKey(t))
	wantCode(t, "no entry", err, codes.PermissionDenied)
	if strings.Replace(existing, "ledger", "nothing", 1) != status.Convert(err).Message() {
		t.Error("the answer tells which entries exist")
	}
	_, err = sign(t, conn, "", newKey(t))
	wantCode(t, "the agent's own SVID for another key", err, codes.PermissionDenied)

	door := ententev1.NewSignClient(conn)
	many := &ententev1.SignX509Request{}
	csr := csrOf(t, newKey(t))
	for range 101 {
		many.Requests = append(many.Requests, &ententev1.X509Request{EntryId: "service/accounts", Csr: csr})
	}
	_, err = door.SignX509(t.Context(), many)
	wantCode(t, "101 requests", err, codes.InvalidArgument)
	many.Requests = many.Requests[:100]
	if resp, err := door.SignX509(t.Context(), many); err != nil || len(resp.GetResults()) != 100 || resp.GetResults()[99].GetCode() != 0 {
		t.Errorf("control: 100 requests: %v", err)
	}
	resp, err := door.SignX509(t.Context(), &ententev1.SignX509Request{Requests: []*ententev1.X509Request{
		{EntryId: "service/accounts", Csr: make([]byte, 5000)}, {EntryId: "service/accounts", Csr: csr},
	}})
	if err != nil || codes.Code(resp.GetResults()[0].GetCode()) != codes.InvalidArgument || resp.GetResults()[1].GetCode() != 0 {
		t.Errorf("a large request beside a good one: %v, %v", resp, err)
	}
	_, err = door.SignX509(t.Context(), &ententev1.SignX509Request{Requests: []*ententev1.X509Request{{Csr: make([]byte, 2<<20)}}})
	wantCode(t, "two megabytes", err, codes.ResourceExhausted)
}

// An entry that is deleted, or leaves the host, is not signed any more (I4).
func TestDeletedEntryIsNotSigned(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	c.Apply(twoHosts)
	agent := attest(t, c, "h1")
	conn := dial(t, c, &agent)
	if _, err := sign(t, conn, "service/accounts", newKey(t)); err != nil {
		t.Fatal(err)
	}
	_, err := c.Admin().Apply(t.Context(), &ententev1.ApplyRequest{Deletes: []*statev1.ObjectKey{{Kind: "Service", Name: "accounts"}}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = sign(t, conn, "service/accounts", newKey(t))
	wantCode(t, "a deleted entry", err, codes.PermissionDenied)
}

// selfSigned claims to be id, signed by itself.
func selfSigned(t testing.TB, id string, isCA bool) (tls.Certificate, *x509.Certificate) {
	t.Helper()
	key := newKey(t)
	uri, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "rogue"},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{uri}, BasicConstraintsValid: true, IsCA: isCA,
		KeyUsage: x509.KeyUsageDigitalSignature,
	}
	if isCA {
		template.KeyUsage = x509.KeyUsageCertSign
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, cert
}

// I2: only this domain's SVIDs come through the door, and nothing that merely claims a
// name.
// Requirements: 45.
func TestForeignAndForgedCertificates(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	c.Apply(twoHosts)
	foreign := catest.Start(t, catest.Options{TrustDomain: "trading.example"})
	foreign.Apply(twoHosts)
	c.Relate(foreign) // even one whose bundle is held
	foreign.Relate(c)

	sameName := catest.Start(t, catest.Options{}) // a rogue CA of the same trust domain
	sameName.Apply(twoHosts)

	good := attest(t, c, "h1")
	fromForeign, fromRogue := attest(t, foreign, "h1"), attest(t, sameName, "h1")
	alone, _ := selfSigned(t, "spiffe://banking.example/entente/agent/h1", false)
	asNode, _ := selfSigned(t, "spiffe://banking.example/entente/ca/ca-1", false)
	foreignCA, err := sign(t, dial(t, foreign, &fromForeign), "service/accounts", newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	for name, cert := range map[string]tls.Certificate{
		"foreign agent": fromForeign, "foreign workload": foreignCA, "rogue CA of the same name": fromRogue,
		"self-signed agent": alone, "self-signed CA node": asNode,
	} {
		_, err := sign(t, dial(t, c, &cert), "service/accounts", newKey(t))
		wantCode(t, name, err, codes.Unavailable) // the handshake fails
	}
	if _, err := sign(t, dial(t, c, &good), "service/accounts", newKey(t)); err != nil {
		t.Errorf("control: %v", err)
	}
}

// A host that was attested with a new key: the SVID of the old one opens nothing.
func TestReplacedAgentIsRefused(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	c.Apply(twoHosts)
	old := attest(t, c, "h1")
	conn := dial(t, c, &old)
	if _, err := sign(t, conn, "service/accounts", newKey(t)); err != nil {
		t.Fatal(err)
	}
	stream := openSync(t, conn, "boot", 1, 0)
	stream.until(t, "the full state", func() bool { return stream.revision > 0 })

	renewed := attest(t, c, "h1")
	if _, err := sign(t, conn, "service/accounts", newKey(t)); err == nil {
		t.Error("an open connection of the old key still signs")
	}
	if _, err := sign(t, dial(t, c, &old), "service/accounts", newKey(t)); err == nil {
		t.Error("a new connection of the old key still signs")
	}
	stream.untilEnd(t)
	if _, err := sign(t, dial(t, c, &renewed), "service/accounts", newKey(t)); err != nil {
		t.Errorf("control: %v", err)
	}
}

// memberCertificate is that of the node itself: the test plays another member that has
// its key.
func memberCertificate(t testing.TB, c *catest.CA) tls.Certificate {
	t.Helper()
	keys, err := keystore.Open(filepath.Join(c.Config().DataDir, "keys"), keystore.Plain())
	if err != nil {
		t.Fatal(err)
	}
	key, err := keys.Load("node")
	if err != nil {
		t.Fatal(err)
	}
	cert, err := peer.SelfSigned(key, "ca-1")
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// mayCall says who may call what. It stands here once more, beside the server's own table,
// so that a row that is wrong, missing or too wide there is seen.
var mayCall = map[string]string{
	"Join/Join":                "stranger member",
	"Attest/Attest":            "anonymous agent",
	"Sync/Sync":                "agent gateway edge",
	"Compare/Statement":        "anonymous stranger member agent workload gateway edge undeclared-edge trust-admin",
	"Compare/Denials":          "agent gateway edge",
	"Sign/SignX509":            "agent",
	"Sign/SignJWT":             "agent",
	"Sign/SignWIT":             "agent",
	"Peer/Propose":             "member",
	"Peer/Report":              "member",
	"Peer/Presence":            "member",
	"Peer/Gate":                "member",
	"Peer/Vouch":               "member",
	"Peer/Checksum":            "member",
	"Peer/Nodes":               "member",
	"Peer/MarkReady":           "member",
	"Peer/Followed":            "member",
	"Peer/ShowEpoch":           "anonymous stranger member",
	"Admin/WhoAmI":             "operator trust-admin workload gateway edge undeclared-edge",
	"Admin/Status":             "operator trust-admin",
	"Admin/CreateToken":        "operator trust-admin",
	"Admin/Apply":              "operator trust-admin",
	"Admin/GetBundle":          "operator trust-admin",
	"Admin/SaveSnapshot":       "operator trust-admin",
	"Admin/ListNodes":          "operator trust-admin",
	"Admin/PromoteNode":        "operator trust-admin",
	"Admin/ListChanges":        "operator trust-admin",
	"Admin/ApproveChange":      "operator",
	"Admin/ResetFederation":    "operator trust-admin",
	"Admin/RefreshFederation":  "operator trust-admin",
	"Admin/ReplaceRecoveryKey": "operator",
	"Admin/RemoveNode":         "operator trust-admin",
	"Admin/ListAuthorities":    "operator trust-admin",
	"Admin/PrepareAuthority":   "operator trust-admin",
	"Admin/ActivateAuthority":  "operator trust-admin",
	"Admin/TaintAuthority":     "operator trust-admin",
	"Admin/RevokeAuthority":    "operator trust-admin",
	"Admin/ListAgents":         "operator trust-admin",
	"Admin/GetAgent":           "operator trust-admin",
	"Admin/BanAgent":           "operator trust-admin",
	"Admin/EvictAgent":         "operator trust-admin",
	"Admin/IsolateAgent":       "operator trust-admin",
	"Admin/ListTokens":         "operator trust-admin",
	"Admin/RevokeToken":        "operator trust-admin",
	"Admin/ChangeEntries":      "operator trust-admin",
	"Admin/ListObjects":        "operator trust-admin",
	"Admin/ListEntries":        "operator trust-admin",
	"Admin/GetEntry":           "operator trust-admin",
	"Admin/CountEntries":       "operator trust-admin",
}

const edges = `
---
apiVersion: entente/v1
kind: Service
metadata: {name: edge}
spec: {run: {uid: 1003, hosts: [h2]}, calls: [ledger.banking.example], edge: true}
---
apiVersion: entente/v1
kind: Service
metadata: {name: old-edge}
spec: {run: {uid: 1004, hosts: [h2]}, calls: [ledger.banking.example]}
`

// Who may call what: each method of each service that the API describes, by every kind
// of caller, over the real doors. A method without a row is refused to all; one that is
// new fails here until somebody has said whose it is.
func TestAuthorisationTable(t *testing.T) {
	t.Parallel()
	f := newOffice(t, catest.Options{})
	c := f.ca
	c.Apply(edges)
	agent := attest(t, c, "h1")
	host := attest(t, c, "h2")
	signer, desk := dial(t, c, &host), dial(t, c, &f.host)
	holds := func(conn *grpc.ClientConn, entry string) *grpc.ClientConn {
		cert, err := sign(t, conn, entry, newKey(t))
		if err != nil {
			t.Fatal(err)
		}
		return dial(t, c, &cert)
	}
	stranger, err := peer.SelfSigned(newKey(t), "someone")
	if err != nil {
		t.Fatal(err)
	}
	member := memberCertificate(t, c)
	socket, err := grpc.NewClient("unix:"+c.Config().Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	callers := map[string]*grpc.ClientConn{
		"anonymous": dial(t, c, nil), "stranger": dial(t, c, &stranger), "member": dial(t, c, &member), "agent": dial(t, c, &agent),
		"workload": holds(signer, "service/ledger"), "gateway": holds(signer, "gateway/gw-1"),
		"edge": holds(signer, "service/edge"), "undeclared-edge": holds(signer, "service/old-edge"),
		"trust-admin": holds(desk, "entry/people-tom"), "operator": socket,
	}
	services := ententev1.File_entente_v1_entente_proto.Services()
	methods := 0
	for i := range services.Len() {
		for j := range services.Get(i).Methods().Len() {
			method := services.Get(i).Methods().Get(j)
			methods++
			name := string(services.Get(i).Name()) + "/" + string(method.Name())
			who, ok := mayCall[name]
			if !ok {
				t.Errorf("%s is described and nobody says who may call it", name)
				continue
			}
			for caller, conn := range callers {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				err := firstAnswer(ctx, conn, method)
				cancel()
				var refused bool
				switch code := status.Code(err); code {
				case codes.PermissionDenied:
					refused = strings.Contains(err.Error(), "may not call") || strings.Contains(err.Error(), "forbidden")
				case codes.Unimplemented: // the socket serves Admin alone
					if refused = caller == "operator"; !refused {
						t.Errorf("%s is described and not served: %v", name, err)
					}
				case codes.Unauthenticated, codes.DeadlineExceeded, codes.Canceled:
					t.Errorf("%s by %s was not decided: %v", name, caller, err)
				}
				if may := slices.Contains(strings.Fields(who), caller); may == refused {
					t.Errorf("%s by %s: %v; who may: %s", name, caller, err, who)
				}
			}
		}
	}
	if methods != len(mayCall) || methods < 40 {
		t.Errorf("%d methods are described, %d are expected", methods, len(mayCall))
	}
}

// firstAnswer calls a method of any kind with an empty message.
func firstAnswer(ctx context.Context, conn *grpc.ClientConn, method protoreflect.MethodDescriptor) error {
	name := fmt.Sprintf("/%s/%s", method.Parent().FullName(), method.Name())
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: method.IsStreamingServer(), ClientStreams: method.IsStreamingClient()}, name)
	if err != nil {
		return err
	}
	// A refusal may come before the message is out; RecvMsg says which.
	if err := errors.Join(stream.SendMsg(&emptypb.Empty{}), stream.CloseSend()); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return stream.RecvMsg(&emptypb.Empty{})
}

// What one member may have agreed for others, and what not.
func TestMembersProposals(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	member := memberCertificate(t, c)
	door := ententev1.NewPeerClient(dial(t, c, &member))
	propose := func(command *statev1.Command) error {
		command.Actor = "local user root"
		data, err := proto.Marshal(command)
		if err != nil {
			t.Fatal(err)
		}
		_, err = door.Propose(t.Context(), &ententev1.ProposeRequest{Command: data})
		return err
	}
	other := strings.Repeat("0", 64)
	for name, command := range map[string]*statev1.Command{
		"a tick":                         {Body: &statev1.Command_Tick{Tick: &statev1.Tick{UnixNanos: []int64{1 << 62}}}},
		"ready":                          {Body: &statev1.Command_AuthorityReady{AuthorityReady: &statev1.AuthorityReady{Id: other}}},
		"drained":                        {Body: &statev1.Command_AuthorityDrained{AuthorityDrained: &statev1.AuthorityDrained{Id: other}}},
		"a foreign bundle":               {Body: &statev1.Command_StoreForeignBundle{StoreForeignBundle: &statev1.StoreForeignBundle{TrustDomain: "x.example"}}},
		"another init":                   {Body: &statev1.Command_Init{Init: &statev1.Init{}}},
		"another member's address":       {Body: &statev1.Command_UpdateMember{UpdateMember: &statev1.UpdateMember{Id: other}}},
		"another member's authority":     {Body: &statev1.Command_PrepareAuthority{PrepareAuthority: &statev1.PrepareAuthority{Authority: &statev1.Authority{MemberId: other}}}},
		"an authority without a profile": {Body: &statev1.Command_PrepareAuthority{PrepareAuthority: &statev1.PrepareAuthority{Authority: &statev1.Authority{MemberId: c.Node().ID()}}}},
		"nothing":                        {},
		"something ignorable":            {Ignorable: true},
	} {
		wantCode(t, name, propose(command), codes.PermissionDenied)
	}
	// Control.
	err := propose(&statev1.Command{Body: &statev1.Command_ApplyObjects{ApplyObjects: &statev1.ApplyObjects{}}})
	if err != nil {
		t.Errorf("control: %v", err)
	}
	var authority *statev1.Authority
	for _, a := range c.Status().GetAuthorities() {
		if a.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE {
			authority = a
		}
	}
	if err := propose(&statev1.Command{Body: &statev1.Command_ActivateAuthority{ActivateAuthority: &statev1.ActivateAuthority{Id: authority.GetId()}}}); err != nil {
		t.Errorf("control: its own authority: %v", err)
	}
}

// The doors end what rests on an SVID when the SVID ends.
// Requirements: 46.
func TestConnectionEndsWithItsSVID(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{Lifetimes: node.Lifetimes{AgentSVID: 2 * time.Second}})
	agent := attest(t, c, "h1")
	stream := openSync(t, dial(t, c, &agent), "boot", 1, 0)
	stream.until(t, "the full state", func() bool { return stream.revision > 0 })
	begin := time.Now()
	stream.untilEnd(t)
	if lasted := time.Since(begin); lasted > 4*time.Second {
		t.Errorf("the stream lasted %v", lasted)
	}
	_, err := sign(t, dial(t, c, &agent), "", agent.PrivateKey.(*ecdsa.PrivateKey))
	wantCode(t, "an expired SVID", err, codes.Unavailable)
}

func TestApply(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	object := func(name string, port uint32) *statev1.Object {
		return &statev1.Object{Source: "banking.yaml:7", Kind: &statev1.Object_Service{Service: &statev1.Service{
			Name: name, Path: "/" + name, Hosts: []string{"h1"}, Selectors: []string{"unix:uid:1000"}, Port: port,
		}}}
	}
	apply := func(req *ententev1.ApplyRequest) (string, *ententev1.ApplyResponse, error) {
		resp, err := c.Admin().Apply(t.Context(), req)
		var changes []string
		for _, change := range resp.GetChanges() {
			changes = append(changes, fmt.Sprintf("%s/%s %s", change.GetKey().GetKind(), change.GetKey().GetName(), change.GetAction()))
		}
		return strings.Join(changes, ", "), resp, err
	}
	changes, _, err := apply(&ententev1.ApplyRequest{Objects: []*statev1.Object{object("accounts", 1)}, DryRun: true})
	if err != nil || changes != "Service/accounts created" || c.Status().GetEntries() != 0 {
		t.Errorf("dry run: %s, %v", changes, err)
	}
	changes, resp, err := apply(&ententev1.ApplyRequest{Objects: []*statev1.Object{object("accounts", 1)}})
	if err != nil || changes != "Service/accounts created" {
		t.Errorf("create: %s, %v", changes, err)
	}
	at := resp.GetRevision()
	moved := object("accounts", 1)
	moved.Source = "elsewhere.yaml:1"
	changes, resp, err = apply(&ententev1.ApplyRequest{Objects: []*statev1.Object{moved}})
	if err != nil || changes != "Service/accounts unchanged" || resp.GetRevision() < at {
		t.Errorf("unchanged: %s, %v", changes, err)
	}
	changes, _, err = apply(&ententev1.ApplyRequest{
		Objects: []*statev1.Object{object("ledger", 1)}, Deletes: []*statev1.ObjectKey{{Kind: "Service", Name: "accounts"}},
	})
	if err != nil || changes != "Service/ledger created, Service/accounts deleted" {
		t.Errorf("delete: %s, %v", changes, err)
	}
	_, _, err = apply(&ententev1.ApplyRequest{Deletes: []*statev1.ObjectKey{{Kind: "Service", Name: "accounts"}}})
	wantCode(t, "delete what is not there", err, codes.InvalidArgument)
	reserved := object("accounts", 1)
	reserved.GetService().Path = "/entente/agent/h1"
	for _, dry := range []bool{true, false} {
		_, _, err = apply(&ententev1.ApplyRequest{Objects: []*statev1.Object{reserved}, DryRun: dry})
		wantCode(t, "a reserved path", err, codes.InvalidArgument)
		if err == nil || !strings.Contains(err.Error(), "banking.yaml:7") {
			t.Errorf("the error does not say where: %v", err)
		}
	}
	_, err = c.TryApply("apiVersion: entente/v1\nkind: Agreement\nmetadata: {name: x}\nspec: {peer: nobody.example, expires: 2099-01-01, gateways: [{id: spiffe://nobody.example/entente/gateway/g, datacenter: dc1, address: 10.0.0.1:1}], allow: [{callers: [a], service: nothing}]}\n")
	wantCode(t, "an agreement about nothing", err, codes.InvalidArgument)
	if err == nil || !strings.Contains(err.Error(), "test.yaml:") {
		t.Errorf("the error does not say where: %v", err)
	}
}

func TestGetBundle(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	_, err := c.Admin().GetBundle(t.Context(), &ententev1.GetBundleRequest{TrustDomain: "trading.example"})
	wantCode(t, "an unknown domain", err, codes.NotFound)
	for _, req := range []*ententev1.CreateTokenRequest{
		{}, {Agent: &statev1.AgentGrant{Name: "h1", Datacenter: "dc1"}, TtlSeconds: 1 << 31},
		{Agent: &statev1.AgentGrant{Name: "No Label", Datacenter: "dc1"}},
	} {
		_, err := c.Admin().CreateToken(t.Context(), req)
		wantCode(t, req.String(), err, codes.InvalidArgument)
	}
}
