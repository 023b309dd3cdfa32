package server

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
)

// This file holds the changes of the CA nodes that need the operators of a majority of
// the voters (package domain says why).

// changeMembers has a change of the CA nodes agreed, or proposes it with the approval of
// this node's operator where it needs others as well: approval then says how far it is.
func (s *Server) changeMembers(ctx context.Context, command *statev1.Command) (revision uint64, approval *ententev1.Approval, err error) {
	needed := 0
	s.State.Read(func(st *domain.State) { needed = st.ApprovalsNeeded() })
	if needed == 0 || !domain.ChangesMembers(command) {
		outcome, err := s.propose(ctx, command)
		return outcome.Revision, nil, err
	}
	change, err := proto.MarshalOptions{Deterministic: true}.Marshal(command)
	if err != nil {
		return 0, nil, status.Error(codes.Internal, err.Error())
	}
	return s.approve(ctx, change)
}

// approve adds the approval of this node's operator to a change.
func (s *Server) approve(ctx context.Context, change []byte) (revision uint64, approval *ententev1.Approval, err error) {
	needed := 0
	var statement [32]byte
	var self *statev1.Member
	s.State.Read(func(st *domain.State) {
		needed = st.ApprovalsNeeded()
		statement = st.ApprovalStatement(change)
		self, _ = st.Member(s.NodeID)
	})
	switch {
	case callerFrom(ctx).class != local:
		// An SVID proves nothing here: the CA node that it is to outvote can sign one.
		return 0, nil, status.Errorf(codes.FailedPrecondition, "a change of the CA nodes needs the operators of %d voters, each on the host of a CA node: run the command there, on its administrative socket", needed)
	case !self.GetVoter():
		return 0, nil, status.Error(codes.FailedPrecondition, "this CA node does not vote, its operator's approval does not count: run the command on the host of a voter")
	}
	key, signature, err := s.SignStatement(statement)
	if err != nil {
		return 0, nil, status.Errorf(codes.Internal, "cannot sign the approval with the node key: %v", err)
	}
	outcome, err := s.propose(ctx, &statev1.Command{Body: &statev1.Command_ApproveChange{ApproveChange: &statev1.ApproveChange{
		Change: change, NodeKey: key, Signature: signature,
	}}})
	if err != nil {
		return 0, nil, err
	}
	s.State.Read(func(st *domain.State) {
		if p, ok := st.PendingChange(statement); ok {
			approval = approvalOf(st, p)
		}
	})
	return outcome.Revision, approval, nil
}

func (d adminDoor) ReplaceRecoveryKey(ctx context.Context, req *ententev1.ReplaceRecoveryKeyRequest) (*ententev1.ReplaceRecoveryKeyResponse, error) {
	s := d.server
	command := &statev1.Command{Body: &statev1.Command_ReplaceRecoveryKey{ReplaceRecoveryKey: &statev1.ReplaceRecoveryKey{Replacement: req.GetReplacement()}}}
	revision, approval, err := s.changeMembers(ctx, command)
	return &ententev1.ReplaceRecoveryKeyResponse{Revision: revision, Approval: approval}, err
}

func (d adminDoor) ListChanges(context.Context, *ententev1.ListChangesRequest) (*ententev1.ListChangesResponse, error) {
	resp := &ententev1.ListChangesResponse{}
	d.server.State.Read(func(st *domain.State) { resp.Changes = approvals(st) })
	return resp, nil
}

func (d adminDoor) ApproveChange(ctx context.Context, req *ententev1.ApproveChangeRequest) (*ententev1.ApproveChangeResponse, error) {
	s := d.server
	if len(req.GetId()) < 4 {
		return nil, status.Errorf(codes.InvalidArgument, "change %q: at least 4 digits of its id are needed", req.GetId())
	}
	var found []*statev1.PendingChange
	resp := &ententev1.ApproveChangeResponse{}
	s.State.Read(func(st *domain.State) {
		for _, p := range st.PendingChanges() {
			if strings.HasPrefix(p.GetId(), req.GetId()) {
				found = append(found, p)
				resp.Approval = approvalOf(st, p)
			}
		}
	})
	switch len(found) {
	case 0:
		return nil, status.Errorf(codes.NotFound, "no pending change has an id that begins with %.70s: it was carried out, ended, or the CA nodes changed since it was proposed; see entente node approve", req.GetId())
	case 1:
	default:
		return nil, status.Errorf(codes.InvalidArgument, "%d pending changes have ids that begin with %.70s: give more of it", len(found), req.GetId())
	}
	revision, left, err := s.approve(ctx, found[0].GetChange())
	if err != nil {
		return nil, err
	}
	resp.Revision, resp.CarriedOut = revision, left == nil
	if left != nil {
		resp.Approval = left
	}
	return resp, nil
}

func approvals(st *domain.State) (list []*ententev1.Approval) {
	for _, p := range st.PendingChanges() {
		list = append(list, approvalOf(st, p))
	}
	slices.SortStableFunc(list, func(a, b *ententev1.Approval) int { return int(a.GetNotAfter() - b.GetNotAfter()) })
	return list
}

func approvalOf(st *domain.State, p *statev1.PendingChange) *ententev1.Approval {
	a := &ententev1.Approval{Id: p.GetId(), What: whatChanges(st, domain.MembershipChange(p.GetChange())), Needed: uint32(st.ApprovalsNeeded()), NotAfter: p.GetNotAfter(), ProposedBy: p.GetActor()}
	for _, m := range st.Members() {
		switch {
		case slices.Contains(p.GetApprovedBy(), m.GetId()):
			a.ApprovedBy = append(a.ApprovedBy, m.GetName())
		case m.GetVoter():
			a.Missing = append(a.Missing, m.GetName())
		}
	}
	return a
}

// whatChanges says what a change does, for the operator who is to approve it.
func whatChanges(st *domain.State, change *statev1.Command) string {
	named := func(id string) string {
		if m, ok := st.Member(id); ok {
			return m.GetName()
		}
		return id
	}
	switch body := change.GetBody().(type) {
	case *statev1.Command_RemoveMember:
		if body.RemoveMember.GetCompromised() {
			return "remove CA node " + named(body.RemoveMember.GetId()) + " as compromised"
		}
		return "remove CA node " + named(body.RemoveMember.GetId())
	case *statev1.Command_PromoteMember:
		return "promote CA node " + named(body.PromoteMember.GetId()) + " to voter"
	case *statev1.Command_CreateToken:
		grant := body.CreateToken.GetToken().GetNode()
		kind := "non-voter"
		if grant.GetVoter() {
			kind = "voter"
		}
		if !grant.GetSigning() {
			kind += ", not signing"
		}
		return fmt.Sprintf("admit CA node %s in %s by token %s (%s)", grant.GetName(), grant.GetDatacenter(), body.CreateToken.GetToken().GetId(), kind)
	}
	if r := change.GetReplaceRecoveryKey().GetReplacement(); r != nil {
		return "replace the recovery key by " + ca.RecoveryKeyText(r.GetNext())
	}
	return "unknown"
}
