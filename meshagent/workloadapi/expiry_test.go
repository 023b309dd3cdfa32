package workloadapi

import (
	"context"
	"crypto/x509"
	"errors"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/node"
)

// While no CA can be reached SVIDs are handed out until they end, and not after: who asks
// then is told to come back. An open stream stays, and brings the next one.
// Requirements: 157, 173.
func TestEndedSVIDsAreNotHandedOut(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{Lifetimes: node.Lifetimes{X509SVID: 4 * time.Second, AgentSVID: time.Hour, JWTSVID: 2 * time.Second, WITSVID: 2 * time.Second}})
	c.Apply(serviceYAML("accounts", run(myself(t))))
	h := newHostOf(t, "banking.example", c.AgentToken("h1", "dc1"), ", wit: true", true, func(s *Server) { s.patience = 100 * time.Millisecond })
	api, _ := raw(t, h.socket)
	within, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	ctx := withHeader(within, "true")
	jwt := func() error {
		_, err := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"ledger"}})
		return err
	}
	wit := func() error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stream, err := api.FetchWITSVID(ctx, &workload.WITSVIDRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		return err
	}
	eventually(t, "control: tokens", func() error { return errors.Join(jwt(), wit()) })
	stream, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	brought := make(chan error, 100)
	go func() { // ends with the stream
		for {
			_, err := stream.Recv()
			brought <- err
			if err != nil {
				return
			}
		}
	}()
	if err := <-brought; err != nil {
		t.Fatal(err)
	}

	c.Stop()
	fetch := func() error { // an SVID that is handed out is good at that moment
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stream, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		if err != nil {
			return err
		}
		response, err := stream.Recv()
		if err != nil {
			return err
		}
		leaf, err := x509.ParseCertificates(response.GetSvids()[0].GetX509Svid())
		if err != nil {
			return err
		}
		if now, end := time.Now(), leaf[0].NotAfter; now.After(end.Add(time.Second)) {
			t.Errorf("handed out %v after its end", now.Sub(end))
		}
		return nil
	}
	for name, ask := range map[string]func() error{"X.509": fetch, "JWT": jwt, "WIT": wit} {
		eventually(t, name+" is refused after its end", func() error {
			switch err := ask(); status.Code(err) {
			case codes.OK:
				return errors.New("handed out")
			case codes.Unavailable:
				return nil
			default:
				t.Fatalf("%s: %v", name, err)
				return nil
			}
		})
	}
	for len(brought) > 0 { // renewals just before the CA was gone
		if err := <-brought; err != nil {
			t.Fatalf("the open stream has ended: %v", err)
		}
	}
	c.Restart()
	c.WaitReady()
	if err := <-brought; err != nil {
		t.Errorf("the open stream brings no new SVID: %v", err)
	}
	eventually(t, "fresh ones", func() error { return errors.Join(fetch(), jwt(), wit()) })
}
