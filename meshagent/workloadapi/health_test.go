package workloadapi

import (
	"testing"

	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/entente-mesh/entente/ca/catest"
)

// The standard health service answers without the security header, by either name.
func TestHealth(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	h := newHost(t, c.AgentToken("h1", "dc1"), true)
	_, conn := raw(t, h.socket)
	for _, service := range []string{"", "SpiffeWorkloadAPI"} {
		got, err := healthv1.NewHealthClient(conn).Check(t.Context(), &healthv1.HealthCheckRequest{Service: service})
		if err != nil || got.GetStatus() != healthv1.HealthCheckResponse_SERVING {
			t.Errorf("%q: %v, %v", service, got, err)
		}
	}
	if _, err := healthv1.NewHealthClient(conn).Check(t.Context(), &healthv1.HealthCheckRequest{Service: "another"}); status.Code(err) != codes.NotFound {
		t.Errorf("another service: %v", err)
	}

	late := c.AgentToken("h2", "dc1")
	c.Stop()
	cold := newHost(t, late, false)
	_, conn = raw(t, cold.socket)
	got, err := healthv1.NewHealthClient(conn).Check(t.Context(), &healthv1.HealthCheckRequest{})
	if err != nil || got.GetStatus() != healthv1.HealthCheckResponse_NOT_SERVING {
		t.Errorf("an agent that was never admitted: %v, %v", got, err)
	}
}
