package domain

import (
	"encoding/hex"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

// Who the CA nodes are decides whom everybody believes. So where three or more vote, a
// change of that needs the operators of a majority of the voters, each at the socket of
// a node of his own. One compromised CA node can then neither add voters nor take away
// those that outvote it, in whatever name it proposes. A pending change grants nothing;
// it ends after a day, or when the members change.

const (
	pendingLife      = 24 * time.Hour
	maxPendingChange = 4 << 10 // bytes of one
	maxPendingOfOne  = 4       // proposed at one member; its oldest makes room
)

// ApprovalsNeeded is from how many voters a change of the CA nodes needs an approval; 0:
// it needs none.
func (s *State) ApprovalsNeeded() int {
	voters := 0
	for _, m := range s.members.rows {
		if m.GetVoter() {
			voters++
		}
	}
	if !s.hardened() || voters < ca.MinApprovingVoters {
		return 0
	}
	return voters/2 + 1
}

func (a *application) needsApproval(cmd *statev1.Command) *Refusal {
	if needed := a.ApprovalsNeeded(); needed > 0 && ChangesMembers(cmd) {
		return refuse(CodeApproval, "a change of the CA nodes needs the operators of %d voters: each approves it at the socket of a CA node", needed)
	}
	return nil
}

// ApprovalStatement is what an approval of the change signs in this state.
func (s *State) ApprovalStatement(change []byte) [32]byte {
	return ca.ApprovalStatement(s.Cluster(), ca.MembersHash(s.members.rows), change)
}

// PendingChanges are the changes of the CA nodes that lack approvals, by id.
func (s *State) PendingChanges() []*statev1.PendingChange { return s.pending.sorted() }

// PendingChange is the one whose approvals sign that statement.
func (s *State) PendingChange(statement [32]byte) (*statev1.PendingChange, bool) {
	return s.pending.get(hex.EncodeToString(statement[:]))
}

// MembershipChange decodes what is to be changed; nil if it is nothing that needs approvals.
func MembershipChange(encoded []byte) *statev1.Command {
	cmd := &statev1.Command{}
	if len(encoded) > maxPendingChange || proto.Unmarshal(encoded, cmd) != nil || cmd.GetPrincipal() != "" || cmd.GetIfRevision() != 0 || !ChangesMembers(cmd) {
		return nil
	}
	return cmd
}

func (a *application) approveChange(c *statev1.ApproveChange, actor string) *Refusal {
	change := MembershipChange(c.GetChange())
	if change == nil {
		return refuse(CodeInvalid, "what is approved is not a change of the CA nodes, or has over %d bytes", maxPendingChange)
	}
	statement := a.ApprovalStatement(c.GetChange())
	member, err := ca.VerifyApproval(statement, c.GetNodeKey(), c.GetSignature())
	if err != nil {
		return refuse(CodeApproval, "%v", err)
	}
	if m, ok := a.members.get(member); !ok || !m.GetVoter() {
		return refuse(CodeApproval, "%.12s is not a voter: its operator's approval does not count", member)
	}
	pending, known := a.PendingChange(statement)
	if !known {
		pending = &statev1.PendingChange{Id: hex.EncodeToString(statement[:]), Change: c.GetChange(), NotAfter: a.seconds() + int64(pendingLife/time.Second), Actor: actor}
	} else if slices.Contains(pending.GetApprovedBy(), member) {
		return nil // the proposer did not hear the first answer
	}
	pending = proto.CloneOf(pending)
	pending.ApprovedBy = append(pending.ApprovedBy, member)
	if len(pending.GetApprovedBy()) < a.ApprovalsNeeded() {
		if !known {
			a.makeRoomForPending(member)
		}
		put(a, &a.pending, pending.GetId(), pending)
		return nil
	}
	d, _ := describe(change)
	if refusal := d.apply(a, change); refusal != nil {
		return refusal // it stays pending: another approval tries again
	}
	drop(a, &a.pending, pending.GetId())
	return nil
}

// makeRoomForPending drops the oldest change that was proposed at a member when that has
// proposed as many as it may: it can only push out its own.
func (a *application) makeRoomForPending(member string) {
	var own []*statev1.PendingChange
	for _, p := range a.pending.sorted() {
		if p.GetApprovedBy()[0] == member {
			own = append(own, p)
		}
	}
	if len(own) < maxPendingOfOne {
		return
	}
	oldest := slices.MinFunc(own, func(x, y *statev1.PendingChange) int { return int(x.GetNotAfter() - y.GetNotAfter()) })
	drop(a, &a.pending, oldest.GetId())
}

func everyChange(*statev1.PendingChange) bool { return true }

func (a *application) forgetPending(which func(*statev1.PendingChange) bool) {
	for _, p := range slices.Clone(a.pending.rows) {
		if which(p) {
			drop(a, &a.pending, p.GetId())
		}
	}
}
