package server_test

import (
	"crypto"
	"crypto/x509"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/ca/node"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

func startWithLimits(t *testing.T, limits node.Limits) *catest.CA {
	t.Helper()
	c := catest.Prepare(t, catest.Options{})
	c.Config().Limits = limits
	if err := node.Init(c.Config(), c.KeepRecoveryKey); err != nil {
		t.Fatal(err)
	}
	c.Restart()
	c.WaitReady()
	c.Apply(twoHosts)
	return c
}

// batchOf asks for n X.509-SVIDs that would be refused: the limit comes first.
func batchOf(t *testing.T, n int) *ententev1.SignX509Request {
	csr := csrOf(t, newKey(t))
	req := &ententev1.SignX509Request{}
	for range n {
		req.Requests = append(req.Requests, &ententev1.X509Request{EntryId: "service/nothing", Csr: csr})
	}
	return req
}

func retryHint(err error) time.Duration {
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.RetryInfo); ok {
			return info.GetRetryDelay().AsDuration()
		}
	}
	return 0
}

// A host that asks for X.509-SVIDs without end is told when to come back; another one is
// served.
func TestX509Rate(t *testing.T) {
	t.Parallel()
	c := startWithLimits(t, node.Limits{X509PerAgent: yamlfile.Rate{PerSecond: 20}})
	one, two := attest(t, c, "h1"), attest(t, c, "h2")
	greedy := ententev1.NewSignClient(dial(t, c, &one))
	var err error
	calls := 0
	for ; err == nil && calls < 20; calls++ {
		_, err = greedy.SignX509(t.Context(), batchOf(t, 50))
	}
	wantCode(t, "a greedy host", err, codes.ResourceExhausted)
	if calls < 4 { // 200 at once are its right
		t.Errorf("sent away after %d calls", calls)
	}
	if hint := retryHint(err); hint <= 0 || hint > 3*time.Second {
		t.Errorf("retry hint %v", hint)
	}
	if _, err := sign(t, dial(t, c, &two), "service/ledger", newKey(t)); err != nil {
		t.Errorf("control: another host: %v", err)
	}
	if text := metricsOf(t, c); !strings.Contains(text, `entente_ca_limited_total{limit="agent"} `) {
		t.Errorf("metrics: %s", text)
	}

	// The client carries the hint to its caller.
	leaf, err := x509.ParseCertificate(one.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	id, err := x509svid.IDFromCert(leaf)
	if err != nil {
		t.Fatal(err)
	}
	svid := &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{leaf}, PrivateKey: one.PrivateKey.(crypto.Signer)}
	agent, err := client.New(client.Config{TrustDomain: c.TrustDomain(), Addresses: c.Addresses(), SVID: svid, Bundles: c.Bundle()})
	if err != nil {
		t.Fatal(err)
	}
	var requests []client.SignRequest
	for range 100 {
		requests = append(requests, client.SignRequest{EntryID: "service/accounts", CSR: csrOf(t, newKey(t))})
	}
	for _, result := range agent.SignX509(t.Context(), requests) {
		if wait, busy := client.RetryAfter(result.Err); !busy || wait <= 0 {
			t.Fatalf("the client: %v, %v", wait, result.Err)
		}
	}
}

// The node's own limit is for all hosts together.
func TestRateOfTheNode(t *testing.T) {
	t.Parallel()
	c := startWithLimits(t, node.Limits{PerNode: yamlfile.Rate{PerSecond: 100}})
	one, two := attest(t, c, "h1"), attest(t, c, "h2")
	if _, err := ententev1.NewSignClient(dial(t, c, &one)).SignX509(t.Context(), batchOf(t, 100)); err != nil {
		t.Fatalf("control: %v", err)
	}
	_, err := ententev1.NewSignClient(dial(t, c, &two)).SignX509(t.Context(), batchOf(t, 90))
	wantCode(t, "the second host", err, codes.ResourceExhausted)
	if hint := retryHint(err); hint <= 0 || hint > time.Second {
		t.Errorf("retry hint %v", hint)
	}
}

// metricsOf is what the node shows on its admin listener.
func metricsOf(t *testing.T, c *catest.CA) string {
	t.Helper()
	resp, err := http.Get("http://" + c.Node().AdminAddr() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// Who begins more calls at once than he may is counted; a report of too much, too.
func TestRefusalsAreCounted(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	c.Apply(twoHosts)
	counted := func(limit string) bool {
		return strings.Contains(metricsOf(t, c), `entente_ca_limited_total{limit="`+limit+`"} `)
	}
	within := func(limit string) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); !counted(limit); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s is not counted", limit)
			}
		}
	}
	if counted("calls") || counted("report") {
		t.Fatal("control: counted before it happens")
	}
	stranger := dial(t, c, nil)
	for range 3 { // begun, and nothing said: two may
		if _, err := stranger.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true}, ententev1.Attest_Attest_FullMethodName); err != nil {
			t.Fatal(err)
		}
	}
	within("calls")

	agent := attest(t, c, "h1")
	s := openSync(t, dial(t, c, &agent), "boot", 1, 0)
	if err := s.Send(&ententev1.SyncRequest{Message: &ententev1.SyncRequest_Ack{Ack: &ententev1.Ack{AuthoritiesKnown: true, Authorities: make([]string, 300)}}}); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "300 authorities", s.untilEnd(t), codes.InvalidArgument)
	within("report")
}
