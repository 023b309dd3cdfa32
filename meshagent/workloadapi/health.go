package workloadapi

import (
	"context"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/entente-mesh/entente/meshagent"
)

// health is gRPC's standard health service on the Workload API's socket, as probes of SPIRE
// agents ask it: without the security header, for the server as a whole or for the Workload
// API. Watch is not served.
type health struct {
	healthv1.UnimplementedHealthServer
	agent *meshagent.Agent
}

// Check is SERVING while the agent is ready. Why it is not, its log and admin socket say.
func (h health) Check(_ context.Context, request *healthv1.HealthCheckRequest) (*healthv1.HealthCheckResponse, error) {
	switch request.GetService() {
	case "", workload.SpiffeWorkloadAPI_ServiceDesc.ServiceName:
	default:
		return nil, status.Errorf(codes.NotFound, "no service %.100q is here; ask for %q or for none", request.GetService(), workload.SpiffeWorkloadAPI_ServiceDesc.ServiceName)
	}
	if h.agent.Ready() != nil {
		return &healthv1.HealthCheckResponse{Status: healthv1.HealthCheckResponse_NOT_SERVING}, nil
	}
	return &healthv1.HealthCheckResponse{Status: healthv1.HealthCheckResponse_SERVING}, nil
}
