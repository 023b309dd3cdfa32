//go:build linux

package admin

import (
	"context"
	"errors"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/catest"
)

// The agent says by DataPlane what a gateway says, at the socket that speaks HTTP and JSON.
func TestDataPlaneOfAnAgent(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply("apiVersion: entente/v1\nkind: Service\nmetadata: {name: accounts}\nspec:\n  run: {uid: 1000, hosts: [h1]}\n")
	plain, agent := start(t, c)
	eventually(t, agent.Ready)
	conn, err := grpc.NewClient("unix:"+agent.Config().Admin.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := ententev1.NewDataPlaneClient(conn)
	eventually(t, func() error {
		s, err := client.Status(t.Context(), &ententev1.DataPlaneStatusRequest{})
		switch {
		case err != nil:
			return err
		case s.GetKind() != "agent", s.GetName() != "h1", s.GetTrustDomain() != "banking.example", !s.GetReady(), s.GetStarted() == nil,
			len(s.GetSvids()) != 2, s.GetSvids()[0].GetSpiffeId() != "spiffe://banking.example/entente/agent/h1",
			s.GetSvids()[0].GetNotAfter() == nil, s.GetSvids()[1].GetNotAfter() == nil,
			s.GetCa().GetNode() == "", s.GetCa().GetRevision() == 0,
			len(s.GetBundles()) != 1, s.GetBundles()[0].GetX509Authorities() == 0, s.GetBundles()[0].GetSince() != nil,
			len(s.GetListeners()) != 2, s.GetRequests() != 7:
			return errors.New(s.String())
		}
		return nil
	})
	if _, err := client.Drain(t.Context(), &ententev1.DrainRequest{}); status.Code(err) != codes.Unimplemented || !strings.Contains(err.Error(), "entente service drain") {
		t.Errorf("drain: %v", err)
	}
	if _, err := client.Status(t.Context(), &ententev1.DataPlaneStatusRequest{Service: strings.Repeat("x", 64<<10)}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a message of over 64 KiB: %v", err)
	}
	// Calls whose message never comes take no more than their places.
	ctx, cancel := context.WithCancel(t.Context())
	for range 9 {
		if _, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true}, ententev1.DataPlane_Status_FullMethodName); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, func() error {
		if _, err := client.Status(t.Context(), &ententev1.DataPlaneStatusRequest{}); err == nil {
			return errors.New("a call beyond the places is answered")
		}
		return nil
	})
	if is, err := plain.Status(t.Context()); err != nil || is.Agent != "h1" {
		t.Errorf("control: over HTTP/1.1: %v, %v", is, err)
	}
	cancel()
	eventually(t, func() error {
		_, err := client.Status(t.Context(), &ententev1.DataPlaneStatusRequest{})
		return err
	})
}
