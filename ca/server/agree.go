package server

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/domain"
)

// agreeTimeout is how long a door waits for an agreement: an election and a write.
const agreeTimeout = 8 * time.Second

// hopeTimeout is how long it waits when there was no quorum already: it may have just
// come back, but nobody should wait to hear what is known.
const hopeTimeout = time.Second

// agree proposes a command and maps what comes of it to a gRPC status.
func (s *Server) agree(ctx context.Context, command *statev1.Command) (domain.Outcome, error) {
	patience := agreeTimeout
	if s.Info().NotAgreeing != "" {
		patience = hopeTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	outcome, err := s.Cluster.Propose(ctx, command)
	if err != nil {
		return outcome, s.proposeError(err)
	}
	if outcome.Refused != nil {
		return outcome, refusalError(outcome.Refused)
	}
	return outcome, nil
}

// ErrInDoubt: a command was on its way when whoever was to agree to it fell silent. It
// may be carried out all the same, also later.
var ErrInDoubt = errors.New("it is not known whether this was agreed: look before you repeat it")

func (s *Server) proposeError(err error) error {
	if errors.Is(err, context.Canceled) {
		return status.FromContextError(err).Err()
	}
	if errors.Is(err, ErrInDoubt) {
		return status.Error(codes.Unavailable, err.Error())
	}
	// Without quorum nothing is granted (I5). Repeating is safe: tokens admit one key,
	// changes of the catalogue name the revision they were made for.
	if text := s.Info().NotAgreeing; text != "" {
		return status.Error(codes.Unavailable, text)
	}
	return status.Errorf(codes.Unavailable, "nothing could be agreed: %v; repeat when a majority of the CA nodes is up", err)
}

var refusalCodes = map[string]codes.Code{
	domain.CodeInvalid:       codes.InvalidArgument,
	domain.CodeNotInit:       codes.FailedPrecondition,
	domain.CodeExists:        codes.AlreadyExists,
	domain.CodeNotFound:      codes.NotFound,
	domain.CodeCAS:           codes.Aborted,
	domain.CodeTokenUnknown:  codes.PermissionDenied,
	domain.CodeTokenInvalid:  codes.PermissionDenied,
	domain.CodeTokenSpent:    codes.PermissionDenied,
	domain.CodeTokenExpired:  codes.PermissionDenied,
	domain.CodeAgentBanned:   codes.PermissionDenied,
	domain.CodeMemberExists:  codes.AlreadyExists,
	domain.CodeMemberRemoved: codes.PermissionDenied,
	domain.CodeLastVoter:     codes.FailedPrecondition,
	domain.CodePhase:         codes.FailedPrecondition,
	domain.CodeInUse:         codes.FailedPrecondition,
	domain.CodeNotReady:      codes.FailedPrecondition,
	domain.CodeSequence:      codes.FailedPrecondition,
	domain.CodeLimit:         codes.ResourceExhausted,
	domain.CodeForbidden:     codes.PermissionDenied,
	domain.CodeFeature:       codes.FailedPrecondition,
	domain.CodeApproval:      codes.FailedPrecondition,
}

func refusalError(r *domain.Refusal) error {
	code, ok := refusalCodes[r.Code]
	if !ok {
		code = codes.FailedPrecondition
	}
	return status.Error(code, r.Error())
}
