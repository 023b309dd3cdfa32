package domain

import (
	"bytes"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

// Recover makes this state the first of a new epoch, at a log index after its last:
// survivor is its only member and votes; everybody else's authorities are TAINTED, and
// REVOKED when the longest leaf has ended; every join token is void. Agents, and their
// bans, entries, objects and foreign bundles stay. The agreed time stays too, unless the
// statement sets it: that is the one way back from a time that ran ahead. recovery is a statement that the
// cluster's recovery key signed for that node and epoch.
//
// It is no command: whoever applied it from a log would go on with the members of the
// epoch before. The state that it leaves is the new epoch's first snapshot. On an error
// nothing has changed.
func (s *State) Recover(index uint64, survivor *statev1.Member, recovery *statev1.Recovery) error {
	before := s.Cluster()
	if before == nil {
		return fmt.Errorf("recover: there is no cluster in this state")
	}
	st, err := ca.VerifyRecovery(before, recovery.GetStatement(), recovery.GetSignature())
	if err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	switch {
	case st.GetEpoch() <= before.GetEpoch():
		return fmt.Errorf("recover: epoch %d does not follow epoch %d", st.GetEpoch(), before.GetEpoch())
	case st.GetMemberId() != survivor.GetId():
		return fmt.Errorf("recover: the statement is for node %.12s, this is %.12s", st.GetMemberId(), survivor.GetId())
	case !survivor.GetVoter():
		return fmt.Errorf("recover: the only member must vote")
	case index <= s.applied:
		return fmt.Errorf("recover: log index %d after %d", index, s.applied)
	}
	if err := checkMember(survivor); err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	rev, err := ca.NewRevision(st.GetEpoch(), index)
	if err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	a := &application{State: s, rev: uint64(rev)}
	s.applied = index
	if st.GetSetTime() {
		s.now = time.Unix(st.GetUnixSeconds(), 0).UnixNano()
	}

	cluster := proto.CloneOf(before)
	cluster.Epoch = st.GetEpoch()
	cluster.Recovery = &statev1.Recovery{Statement: recovery.GetStatement(), Signature: recovery.GetSignature()}
	// Who was left behind by an earlier recovery may still be out there.
	cluster.Recovery.Absent = slices.Clone(before.GetRecovery().GetAbsent())
	for _, m := range s.Members() {
		if m.GetId() != survivor.GetId() {
			cluster.Recovery.Absent = append(cluster.Recovery.Absent, m)
			drop(a, &a.members, m.GetId())
		}
	}
	cluster.Recovery.Absent = slices.DeleteFunc(cluster.Recovery.Absent, func(m *statev1.Member) bool { return m.GetId() == survivor.GetId() })
	put(a, &a.cluster, "", cluster)
	put(a, &a.members, survivor.GetId(), proto.CloneOf(survivor))
	for _, authority := range s.Authorities() {
		if authority.GetMemberId() != survivor.GetId() && ca.MayMove(authority.GetPhase(), statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED) {
			a.move(authority, statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED)
		}
	}
	for _, t := range slices.Clone(s.tokens.rows) {
		drop(a, &a.tokens, t.GetId())
	}
	a.forgetPending(everyChange)
	// Consumers compare sequences: the bundle of this epoch is later than any before,
	// also than those that this state never saw.
	s.bundle = a.rev
	if s.catalogue != 0 {
		s.catalogue = a.rev // an if_revision of before does not fit any more
	}
	s.history = history{}
	return nil
}

// revokeAbsent revokes the authorities of those whom a recovery left behind, when every
// leaf that they can have signed has ended. It tells whether the bundle changed.
func (a *application) revokeAbsent() {
	recovery := a.Cluster().GetRecovery()
	if len(recovery.GetAbsent()) == 0 {
		return
	}
	if recovery.GetRevokeAt() == 0 {
		cluster := proto.CloneOf(a.Cluster())
		cluster.Recovery.RevokeAt = a.Now().Add(a.LongestLeaf() + maxClockSlack).Unix()
		put(a, &a.cluster, "", cluster)
		a.changed(ChangeCluster, "")
		return
	}
	if a.Now().Unix() < recovery.GetRevokeAt() {
		return
	}
	for _, m := range recovery.GetAbsent() {
		for _, authority := range a.Authorities() {
			if authority.GetMemberId() == m.GetId() && authority.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED {
				a.move(authority, statev1.AuthorityPhase_AUTHORITY_PHASE_REVOKED)
			}
		}
	}
	cluster := proto.CloneOf(a.Cluster())
	cluster.Recovery.Absent = nil
	put(a, &a.cluster, "", cluster)
	a.changed(ChangeCluster, "")
}

// promoteMember lets a non-voter vote, as far as the rules go.
func (a *application) promoteMember(c *statev1.PromoteMember) *Refusal {
	have, ok := a.members.get(c.GetId())
	switch {
	case !ok:
		return refuse(CodeNotFound, "no member has the id %.64s", c.GetId())
	case have.GetVoter():
		return nil
	}
	m := proto.CloneOf(have)
	m.Voter = true
	put(a, &a.members, m.GetId(), m)
	a.changed(ChangeMembers, m.GetId())
	a.forgetPending(everyChange)
	return nil
}

// replaceRecoveryKey has another recovery key count from now on: signed by the present
// one, or approved by operators.
func (a *application) replaceRecoveryKey(c *statev1.ReplaceRecoveryKey) *Refusal {
	r, have := c.GetReplacement(), a.Cluster().GetRecoveryKey()
	if last := a.Cluster().GetReplaced(); len(last) > 0 && proto.Equal(last[len(last)-1], r) {
		return nil // the proposer did not hear the first answer
	}
	if err := ca.CheckReplacement(r); err != nil {
		return invalid(err)
	}
	if !bytes.Equal(r.GetFormer(), have) {
		return refuse(CodeConflict, "the recovery key that is to be replaced is not the present one")
	}
	if len(r.GetSignature()) > 0 && !ca.SignedReplacement(a.Cluster().GetId(), r) {
		return refuse(CodeInvalid, "the replacement is not signed with the present recovery key")
	}
	cluster := proto.CloneOf(a.Cluster())
	cluster.RecoveryKey = r.GetNext()
	cluster.Replaced = append(cluster.Replaced, proto.CloneOf(r))
	cluster.Replaced = cluster.Replaced[max(0, len(cluster.Replaced)-ca.MaxReplacements):]
	put(a, &a.cluster, "", cluster)
	a.changed(ChangeCluster, "")
	return nil
}
