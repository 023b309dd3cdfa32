package domain

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/domain/domaintest"
)

// voters is a world of n voters at the feature level of approvals.
func voters(t *testing.T, n int) *world {
	w := newWorld(t)
	w.must(level("n1", levelHardened))
	for i := 2; i <= n; i++ {
		name, token := fmt.Sprintf("n%d", i), fmt.Sprintf("t%d", i)
		change := w.nodeToken(token, name, time.Hour)
		if w.s.ApprovalsNeeded() == 0 {
			w.must(change)
		} else {
			for j := range w.s.ApprovalsNeeded() {
				w.must(w.approve(change, fmt.Sprintf("n%d", j+1)))
			}
		}
		join := w.join(token, name)
		join.GetJoinMember().GetMember().FeatureLevel = levelHardened
		w.must(join)
	}
	return w
}

// approve is the approval of a change by a node's operator, in the present state.
func (w *world) approve(change *statev1.Command, node string) *statev1.Command {
	w.t.Helper()
	encoded, err := proto.MarshalOptions{Deterministic: true}.Marshal(change)
	if err != nil {
		w.t.Fatal(err)
	}
	return domaintest.Approve(w.s.ApprovalStatement(encoded), encoded, node)
}

// Where three or more vote, a change of the CA nodes takes the operators of a majority of
// the voters: one compromised node changes nothing, in whatever name it proposes.
func TestMembersChangeByAMajorityOfOperators(t *testing.T) {
	for n, needed := range map[int]int{1: 0, 2: 0, 3: 2, 4: 3, 5: 3} {
		w := voters(t, n)
		if got := w.s.ApprovalsNeeded(); got != needed {
			t.Errorf("%d voters: %d approvals are needed, not %d", n, got, needed)
		}
		if needed == 0 {
			continue
		}
		last := fmt.Sprintf("n%d", n)
		w.must(w.token("w", &statev1.Token{Grant: &statev1.Token_Agent{Agent: &statev1.AgentGrant{Name: "h1", Datacenter: "dc1"}}}, time.Hour)) // control: not a CA node's
		for _, change := range []*statev1.Command{w.nodeToken("x", "nx", time.Hour), remove(last, true), remove(last, false)} {
			w.refused(change, CodeApproval)
			members := len(w.s.Members())
			for i := 1; i < needed; i++ {
				w.must(w.approve(change, fmt.Sprintf("n%d", i)))
				w.unchanged(w.approve(change, fmt.Sprintf("n%d", i))) // the same operator again
			}
			if _, ok := w.s.Token("x"); ok && change.GetCreateToken() != nil || len(w.s.Members()) != members {
				t.Errorf("%d voters: carried out with %d approvals", n, needed-1)
			}
			if p := w.s.PendingChanges(); len(p) != 1 || len(p[0].GetApprovedBy()) != needed-1 {
				t.Errorf("%d voters: pending %v", n, p)
			}
			if change.GetCreateToken() == nil && change.GetRemoveMember().GetCompromised() {
				for range 25 { // it ends after a day
					w.must(tick(w.s.Now().Add(MaxTickStep)))
				}
				if p := w.s.PendingChanges(); len(p) != 0 {
					t.Errorf("after a day it is still pending: %v", p)
				}
				continue
			}
			w.must(w.approve(change, fmt.Sprintf("n%d", needed)))
			if p := w.s.PendingChanges(); len(p) != 0 {
				t.Errorf("%d voters: carried out and still pending: %v", n, p)
			}
		}
		if _, ok := w.s.Token("x"); !ok {
			t.Errorf("%d voters: control: the approved token is not there", n)
		}
		if len(w.s.Members()) != n-1 {
			t.Errorf("%d voters: control: %d members after the approved removal", n, len(w.s.Members()))
		}
	}
}

func TestApprovalsThatDoNotCount(t *testing.T) {
	w := voters(t, 3)
	change := remove("n3", false)
	w.must(w.approve(change, "n1"))
	encoded, _ := proto.MarshalOptions{Deterministic: true}.Marshal(change)
	other, _ := proto.MarshalOptions{Deterministic: true}.Marshal(remove("n2", false))
	edit := func(f func(*statev1.ApproveChange)) *statev1.Command {
		c := w.approve(change, "n2")
		f(c.GetApproveChange())
		return c
	}
	w.refused(w.approve(change, "a stranger"), CodeApproval)
	w.refused(edit(func(a *statev1.ApproveChange) { a.Signature[3] ^= 1 }), CodeApproval)
	w.refused(edit(func(a *statev1.ApproveChange) { a.Signature = a.Signature[:63] }), CodeApproval)
	w.refused(edit(func(a *statev1.ApproveChange) { a.NodeKey = a.NodeKey[:40] }), CodeApproval)
	w.refused(edit(func(a *statev1.ApproveChange) { a.Change = other }), CodeApproval)
	w.refused(edit(func(a *statev1.ApproveChange) { a.Change = bytes.Repeat([]byte{1}, maxPendingChange+1) }), CodeInvalid)
	w.refused(w.approve(tick(epochTime), "n2"), CodeInvalid) // not a change of the members
	w.refused(w.approve(ban("h1"), "n2"), CodeInvalid)
	agents := w.token("w", &statev1.Token{Grant: &statev1.Token_Agent{Agent: &statev1.AgentGrant{Name: "h1", Datacenter: "dc1"}}}, time.Hour)
	w.refused(w.approve(agents, "n2"), CodeInvalid)
	// Signed for other members, another epoch or another cluster.
	for name, statement := range map[string]func(s *State) [32]byte{
		"members": func(s *State) [32]byte { s.members.remove(keyID("n3")); return s.ApprovalStatement(encoded) },
		"a vote": func(s *State) [32]byte {
			m, _ := s.Member(keyID("n3"))
			m = proto.CloneOf(m)
			m.Voter = false
			s.members.put(m.GetId(), m)
			return s.ApprovalStatement(encoded)
		},
		"epoch": func(s *State) [32]byte {
			c := proto.CloneOf(s.Cluster())
			c.Epoch++
			s.cluster.put("", c)
			return s.ApprovalStatement(encoded)
		},
		"cluster": func(s *State) [32]byte {
			c := proto.CloneOf(s.Cluster())
			c.Id = bytes.Repeat([]byte{9}, 16)
			s.cluster.put("", c)
			return s.ApprovalStatement(encoded)
		},
	} {
		var file bytes.Buffer
		w.s.Snapshot().WriteTo(&file)
		elsewhere, err := Restore(&file)
		if err != nil {
			t.Fatal(err)
		}
		if refusal := w.apply(domaintest.Approve(statement(elsewhere), encoded, "n2")).Refused; refusal == nil {
			t.Fatalf("an approval for another %s counted", name)
		}
	}
	if len(w.s.Members()) != 3 {
		t.Fatal("the member was removed")
	}
	w.must(w.approve(change, "n2"))
	if len(w.s.Members()) != 2 {
		t.Error("control: the approved removal was not carried out")
	}
}

// When the members change, what was approved for the members before is void.
func TestPendingChangesEndWithTheMembers(t *testing.T) {
	w := voters(t, 5)
	stale, meant := remove("n4", false), remove("n5", false)
	w.must(w.approve(stale, "n1"))
	w.must(w.approve(stale, "n2"))
	late := w.approve(stale, "n3")
	for _, n := range []string{"n1", "n2", "n3"} {
		w.must(w.approve(meant, n))
	}
	if p := w.s.PendingChanges(); len(p) != 0 || len(w.s.Members()) != 4 {
		t.Errorf("%d members, pending %v", len(w.s.Members()), p)
	}
	w.refused(late, CodeApproval)
}

// A member can push out what was proposed at itself, and nothing of another.
func TestPendingChangesAreBounded(t *testing.T) {
	w := voters(t, 3)
	w.must(w.approve(remove("n2", true), "n1"))
	for i := range 20 {
		w.must(w.approve(w.nodeToken(fmt.Sprintf("x%d", i), "nx", time.Hour), "n2"))
	}
	if n := len(w.s.PendingChanges()); n != 1+maxPendingOfOne {
		t.Errorf("%d changes are pending", n)
	}
	w.must(w.approve(remove("n2", true), "n3"))
	if len(w.s.Members()) != 2 {
		t.Error("the removal was pushed out")
	}
}

// Below the feature level, members of the release before decide alone, and so does this one.
func TestApprovalsWaitForTheFeatureLevel(t *testing.T) {
	w := newWorld(t)
	for i := 2; i <= 3; i++ {
		w.must(w.nodeToken(fmt.Sprintf("t%d", i), fmt.Sprintf("n%d", i), time.Hour))
		w.must(w.join(fmt.Sprintf("t%d", i), fmt.Sprintf("n%d", i)))
	}
	w.refused(w.approve(remove("n3", false), "n1"), CodeFeature)
	w.must(remove("n3", false))
}
