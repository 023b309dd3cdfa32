package sds

import (
	"context"
	"fmt"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/node"
)

// A certificate that has ended is not handed out: who asks waits, and an open stream
// stays, quiet, until there is another one. What else there is goes on.
func TestEndedCertificatesAreNotHandedOut(t *testing.T) {
	t.Parallel()
	ca := catest.Start(t, catest.Options{Lifetimes: node.Lifetimes{X509SVID: 3 * time.Second, AgentSVID: time.Hour}})
	ca.Apply(serviceYAML("accounts", mine(t)))
	c := start(t, ca)
	fetch := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		_, err := c.FetchSecrets(ctx, &discovery.DiscoveryRequest{ResourceNames: []string{"default"}, TypeUrl: typeURL})
		return err
	}
	if err := fetch(); err != nil {
		t.Fatalf("control: %v", err)
	}
	ca.Stop()
	eventually(t, func() error {
		if err := fetch(); status.Code(err) != codes.DeadlineExceeded {
			return fmt.Errorf("after its end: %v", err)
		}
		return nil
	})
	s := c.stream()
	s.ask("", "", nil, "spiffe://banking.example/accounts")
	s.silent()
	ca.Restart()
	ca.WaitReady()
	if r := s.next(); len(r.GetResources()) != 1 {
		t.Errorf("the stream brings %d secrets", len(r.GetResources()))
	}
	eventually(t, fetch)
}
