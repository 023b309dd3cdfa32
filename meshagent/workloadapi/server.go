// Package workloadapi serves the SPIFFE Workload API on a unix socket.
package workloadapi

import (
	"context"
	"errors"
	"log/slog"

	"github.com/entente-mesh/entente/meshagent"
)

// Server is one Workload API endpoint.
type Server struct{}

// New opens the socket.
func New(agent *meshagent.Agent, log *slog.Logger) (*Server, error) {
	return nil, errors.ErrUnsupported
}

// Run serves until ctx ends. Use it as a meshagent.Door.
func (s *Server) Run(ctx context.Context) error { return errors.ErrUnsupported }
