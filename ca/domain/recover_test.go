package domain

import (
	"bytes"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

var recoveryKey = &ca.RecoveryKey{TrustDomain: banking, ClusterID: clusterID, Seed: bytes.Repeat([]byte{5}, 32)}

// recoverable is a world of two members, whose cluster has a recovery key.
func recoverable(t *testing.T) *world {
	w := &world{t: t, s: New(), seeds: map[string][]byte{}}
	init := w.initCommand()
	init.GetInit().Cluster.RecoveryKey = recoveryKey.PublicKey()
	w.must(init)
	w.must(tick(epochTime))
	w.must(w.nodeToken("t2", "n2", time.Hour))
	w.must(w.join("t2", "n2"))
	for _, name := range []string{"n1", "n2"} {
		w.must(prepare(w.authority(name, "a "+name)))
	}
	w.must(w.agentToken("ta", "h1", time.Hour))
	w.must(w.attest("ta", keyID("h1")))
	w.must(w.agentToken("tb", "h2", time.Hour))
	return w
}

func statement(t *testing.T, key *ca.RecoveryKey, epoch uint32, member string) *statev1.Recovery {
	t.Helper()
	r, err := key.Sign(&statev1.RecoveryStatement{ClusterId: clusterID, Epoch: epoch, RecoveryId: make([]byte, ca.RecoveryIDSize), MemberId: keyID(member)})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// Requirements: 98.
func TestRecover(t *testing.T) {
	w := recoverable(t)
	// A ban stands, whoever put it there.
	banned, _ := w.s.Agent("h1")
	banned = proto.CloneOf(banned)
	banned.Banned = true
	put(&application{State: w.s, rev: w.s.revision}, &w.s.agents, "h1", banned)
	before := w.s.Revision()

	if err := w.s.Recover(w.index+1, member("n1"), statement(t, recoveryKey, 1, "n1")); err != nil {
		t.Fatal(err)
	}
	w.index++
	s := w.s
	if len(s.Members()) != 1 || s.Cluster().GetEpoch() != 1 || s.Revision() <= before || s.BundleRevision() != s.Revision() || ca.Revision(s.Revision()).Epoch() != 1 {
		t.Errorf("members %v, cluster %v, revision %s, bundle %s", s.Members(), s.Cluster(), ca.Revision(s.Revision()), ca.Revision(s.BundleRevision()))
	}
	for _, id := range []string{"t2", "ta", "tb"} {
		if _, ok := s.Token(id); ok {
			t.Errorf("token %s is left", id)
		}
	}
	if a, _ := s.Agent("h1"); !a.GetBanned() {
		t.Error("the ban is gone")
	}
	phases := func() map[string]statev1.AuthorityPhase {
		m := map[string]statev1.AuthorityPhase{}
		for _, a := range s.Authorities() {
			m[a.GetMemberId()] = a.GetPhase()
		}
		return m
	}
	if p := phases(); p[keyID("n1")] != statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED || p[keyID("n2")] != statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED {
		t.Errorf("phases %v", p)
	}
	// The snapshot holds all of it.
	var file bytes.Buffer
	s.Snapshot().WriteTo(&file)
	again, err := Restore(&file)
	if err != nil || !bytes.Equal(again.Checksum(), s.Checksum()) || !proto.Equal(again.Cluster(), s.Cluster()) {
		t.Errorf("restored: %v", err)
	}
	// An absent member's authority is revoked when every leaf under it has ended, counted
	// from the first agreed time of the new epoch, not from that of the old one.
	later := time.Unix(mustAuthority(t, s, "n2").GetNotAfter()-3*3600, 0) // a long outage, and n2 may have signed all the while
	w.must(tick(later))
	if p := phases(); p[keyID("n2")] != statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED {
		t.Errorf("revoked at once: %v", p)
	}
	leaf := s.LongestLeaf()
	w.must(tick(later.Add(leaf)))
	if p := phases(); p[keyID("n2")] != statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED {
		t.Errorf("revoked although a leaf may live: %v", p)
	}
	sequence := s.BundleRevision()
	w.must(tick(later.Add(leaf + maxClockSlack + time.Second)))
	if p := phases(); p[keyID("n2")] != statev1.AuthorityPhase_AUTHORITY_PHASE_REVOKED {
		t.Errorf("not revoked: %v", p)
	}
	if s.BundleRevision() <= sequence || len(s.Cluster().GetRecovery().GetAbsent()) != 0 {
		t.Errorf("bundle %s, recovery %v", ca.Revision(s.BundleRevision()), s.Cluster().GetRecovery())
	}
}

func mustAuthority(t *testing.T, s *State, name string) *statev1.Authority {
	t.Helper()
	for _, a := range s.Authorities() {
		if a.GetMemberId() == keyID(name) {
			return a
		}
	}
	t.Fatalf("%s has no authority", name)
	return nil
}

// What a recovery refuses changes nothing.
func TestRecoverRefuses(t *testing.T) {
	other := &ca.RecoveryKey{TrustDomain: banking, ClusterID: clusterID, Seed: bytes.Repeat([]byte{6}, 32)}
	nonvoter := member("n1")
	nonvoter.Voter = false
	for name, attempt := range map[string]func(*world) error{
		"another key": func(w *world) error {
			return w.s.Recover(w.index+1, member("n1"), statement(t, other, 1, "n1"))
		},
		"the same epoch": func(w *world) error {
			w.s.Recover(w.index+1, member("n1"), statement(t, recoveryKey, 3, "n1"))
			return w.s.Recover(w.index+2, member("n1"), statement(t, recoveryKey, 3, "n1"))
		},
		"another node": func(w *world) error {
			return w.s.Recover(w.index+1, member("n2"), statement(t, recoveryKey, 1, "n1"))
		},
		"a non-voter": func(w *world) error {
			return w.s.Recover(w.index+1, nonvoter, statement(t, recoveryKey, 1, "n1"))
		},
		"an old index": func(w *world) error {
			return w.s.Recover(w.index, member("n1"), statement(t, recoveryKey, 1, "n1"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := recoverable(t)
			if name == "the same epoch" {
				if attempt(w) == nil {
					t.Error("it was carried out")
				}
				return
			}
			before := w.s.Checksum()
			if err := attempt(w); err == nil {
				t.Error("it was carried out")
			}
			if !bytes.Equal(before, w.s.Checksum()) {
				t.Error("it changed something")
			}
		})
	}
	if err := New().Recover(1, member("n1"), statement(t, recoveryKey, 1, "n1")); err == nil {
		t.Error("an empty state was recovered")
	}
}

// A removal never leaves fewer voters than the cluster was made to keep.
func TestMinVoters(t *testing.T) {
	for _, least := range []uint32{0, 1, 2} {
		w := &world{t: t, s: New(), seeds: map[string][]byte{}}
		init := w.initCommand()
		init.GetInit().Cluster.MinVoters = least
		w.must(init)
		w.must(w.nodeToken("t2", "n2", time.Hour))
		w.must(w.join("t2", "n2"))
		w.index++
		outcome := w.s.Apply(w.index, &statev1.Command{Body: &statev1.Command_RemoveMember{RemoveMember: &statev1.RemoveMember{Id: keyID("n2")}}})
		if refused := outcome.Refused != nil; refused != (least == 2) {
			t.Errorf("at least %d: %v", least, outcome.Refused)
		}
	}
}

// A time that ran ahead never goes back, except by a recovery that says so.
func TestRecoverySetsTheTime(t *testing.T) {
	for _, set := range []bool{false, true} {
		w := recoverable(t)
		ahead, now := epochTime.Add(1000*time.Hour), epochTime.Add(time.Hour)
		w.must(tick(ahead))
		w.must(tick(now))
		if !w.s.Now().Equal(ahead) {
			t.Fatalf("control: the time went back to %v", w.s.Now())
		}
		r := statement(t, recoveryKey, 1, "n1")
		st := &statev1.RecoveryStatement{}
		if err := proto.Unmarshal(r.GetStatement(), st); err != nil {
			t.Fatal(err)
		}
		st.UnixSeconds, st.SetTime = now.Unix(), set
		r, err := recoveryKey.Sign(st)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.s.Recover(w.index+1, member("n1"), r); err != nil {
			t.Fatal(err)
		}
		want := ahead
		if set {
			want = now
		}
		if !w.s.Now().Equal(want) {
			t.Errorf("set: %v, the time is %v, not %v", set, w.s.Now(), want)
		}
	}
}

// A recovery key is replaced by who holds it, or by operators; nobody else's word does.
func TestRecoveryKeyIsReplaced(t *testing.T) {
	key := func(fill byte) *ca.RecoveryKey {
		return &ca.RecoveryKey{TrustDomain: banking, ClusterID: clusterID, Seed: bytes.Repeat([]byte{fill}, 32)}
	}
	replace := func(former, next *ca.RecoveryKey, edit ...func(*statev1.RecoveryKeyReplacement)) *statev1.Command {
		r, err := former.Replace(next)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range edit {
			f(r)
		}
		return &statev1.Command{Body: &statev1.Command_ReplaceRecoveryKey{ReplaceRecoveryKey: &statev1.ReplaceRecoveryKey{Replacement: r}}}
	}
	unsigned := func(r *statev1.RecoveryKeyReplacement) { r.Signature = nil }
	w := voters(t, 3)
	cluster := proto.CloneOf(w.s.Cluster())
	cluster.RecoveryKey = recoveryKey.PublicKey()
	put(&application{State: w.s, rev: w.s.revision}, &w.s.cluster, "", cluster)

	w.refused(replace(key(8), key(9)), CodeConflict)
	w.refused(replace(recoveryKey, recoveryKey), CodeInvalid)
	w.refused(replace(recoveryKey, key(9), func(r *statev1.RecoveryKeyReplacement) { r.Signature[5] ^= 1 }), CodeInvalid)
	w.refused(replace(recoveryKey, key(9), func(r *statev1.RecoveryKeyReplacement) { r.Next = key(8).PublicKey() }), CodeInvalid)
	w.refused(replace(recoveryKey, key(9), unsigned), CodeApproval)
	w.must(replace(recoveryKey, key(6)))
	w.unchanged(replace(recoveryKey, key(6))) // the answer was not heard
	approved := replace(key(6), key(7), unsigned)
	w.must(w.approve(approved, "n1"))
	if !bytes.Equal(w.s.Cluster().GetRecoveryKey(), key(6).PublicKey()) {
		t.Fatal("one operator replaced the recovery key")
	}
	w.must(w.approve(approved, "n2"))
	if !bytes.Equal(w.s.Cluster().GetRecoveryKey(), key(7).PublicKey()) {
		t.Error("control: two operators did not")
	}
	// Who pinned a key follows signatures only.
	for pinned, follows := range map[byte]byte{5: 6, 6: 6, 7: 7, 9: 9} {
		if got := ca.FollowRecoveryKey(w.s.Cluster(), key(pinned).PublicKey()); !bytes.Equal(got, key(follows).PublicKey()) {
			t.Errorf("who pinned key %d does not follow to %d", pinned, follows)
		}
	}
	w.must(replace(key(7), key(8)))
	if got := ca.FollowRecoveryKey(w.s.Cluster(), key(7).PublicKey()); !bytes.Equal(got, key(8).PublicKey()) {
		t.Error("control: a signed replacement is not followed")
	}
}
