package server

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
)

// Errors of Config.Isolate.
var (
	ErrNoAgent = errors.New("this node knows no agent of that name")
	ErrBanned  = errors.New("the agent is banned already, everywhere")
	ErrQuorum  = errors.New("there is quorum")
)

// Isolation is an agent that this node shut out by itself.
type Isolation struct {
	Agent      *statev1.Agent
	Who        string
	Reason     string
	At         time.Time
	NotWritten string // why a restart would lose it; empty: it is on disk
}

const maxReason = 200

func (i Isolation) toWire() *ententev1.Isolation {
	return &ententev1.Isolation{Agent: i.Agent, Who: i.Who, Reason: i.Reason, UnixSeconds: i.At.Unix(), NotWritten: i.NotWritten}
}

func (d adminDoor) IsolateAgent(ctx context.Context, req *ententev1.IsolateAgentRequest) (*ententev1.IsolateAgentResponse, error) {
	s := d.server
	if len(req.GetReason()) > maxReason {
		return nil, status.Errorf(codes.InvalidArgument, "the reason has %d characters, over %d", len(req.GetReason()), maxReason)
	}
	isolation, err := s.Isolate(req.GetName(), req.GetReason(), callerFrom(ctx).who())
	switch {
	case errors.Is(err, ErrNoAgent):
		return nil, noAgent(req.GetName())
	case errors.Is(err, ErrBanned):
		return nil, status.Error(codes.AlreadyExists, err.Error())
	case errors.Is(err, ErrQuorum):
		return nil, status.Errorf(codes.FailedPrecondition, "%v, as far as this node knows (it takes some seconds to notice the loss): entente agent ban %s is agreed at once and holds everywhere", err, req.GetName())
	case err != nil:
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &ententev1.IsolateAgentResponse{Isolation: isolation.toWire()}, nil
}

// banned says why an agent is shut out, by agreement or by this node alone; nil if it is
// not.
func (s *Server) banned(agent *statev1.Agent) error {
	switch {
	case agent.GetBanned():
		return status.Errorf(codes.PermissionDenied, "agent %s is banned", agent.GetName())
	case s.Feed.Banned(agent):
		return status.Errorf(codes.PermissionDenied, "agent %s is isolated by this CA node until it can be banned", agent.GetName())
	}
	return nil
}
