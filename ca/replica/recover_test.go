package replica

import (
	"bytes"
	"errors"
	"net"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
)

func recoveryKey() *ca.RecoveryKey {
	return &ca.RecoveryKey{
		TrustDomain: spiffeid.RequireTrustDomainFromString("banking.example"),
		ClusterID:   clusterID,
		Seed:        bytes.Repeat([]byte{9}, 32),
	}
}

// alone is the decision to go on with n only.
func (n *node) alone(key *ca.RecoveryKey, id byte) func(Survey) (*statev1.Recovery, *statev1.Member, error) {
	return func(s Survey) (*statev1.Recovery, *statev1.Member, error) {
		recovery, err := key.Sign(&statev1.RecoveryStatement{
			ClusterId: clusterID, Epoch: s.Cluster.GetEpoch() + 1, RecoveryId: bytes.Repeat([]byte{id}, ca.RecoveryIDSize),
			MemberId: n.id, UnixSeconds: time.Now().Unix(),
		})
		return recovery, n.member(), err
	}
}

// Two of three are gone for good: the third goes on in a new epoch with everything that
// it held, takes in new members, and a node of the old epoch gets nowhere.
func TestRecover(t *testing.T) {
	nodes := cluster(t, "one", "two", "three")
	carryOut(t, nodes[0], token("agreed"))
	carryOut(t, nodes[0], tickCommand(time.Now()))
	alike(t, nodes...)
	survivor, two, three := nodes[0], nodes[1], nodes[2]
	two.kill()
	three.kill()
	survivor.stop()

	survey, err := Look(survivor.config())
	if err != nil || len(survey.Members) != 3 || survey.Last == 0 || survey.Time.IsZero() {
		t.Fatalf("%+v, %v", survey, err)
	}
	wrong := recoveryKey()
	wrong.Seed = bytes.Repeat([]byte{8}, 32)
	if _, err := Recover(survivor.config(), survivor.alone(wrong, 1)); err == nil {
		t.Fatal("recovered without the recovery key")
	}
	if again, err := Look(survivor.config()); err != nil || again.Last != survey.Last || again.Cluster.GetEpoch() != 0 {
		t.Fatalf("a refused recovery changed the node: %+v, %v", again, err)
	}
	if _, err := Recover(survivor.config(), survivor.alone(recoveryKey(), 1)); err != nil {
		t.Fatal(err)
	}
	survivor.group = &[]*node{survivor}
	survivor.start()
	awaitLeader(t, survivor)
	survivor.Read(func(s *domain.State) {
		if len(s.Members()) != 1 || s.Cluster().GetEpoch() != 1 || len(s.Cluster().GetRecovery().GetAbsent()) != 2 {
			t.Errorf("members %v, cluster %v", s.Members(), s.Cluster())
		}
		if _, ok := s.Token("agreed"); ok {
			t.Error("a join token outlived the recovery")
		}
		if ca.Revision(s.Revision()).Epoch() != 1 || s.BundleRevision() != s.Revision() {
			t.Errorf("revision %s, bundle %s", ca.Revision(s.Revision()), ca.Revision(s.BundleRevision()))
		}
	})
	carryOut(t, survivor, token("later"))
	four := newNode(t, "four")
	join(t, survivor, four)
	alike(t, survivor, four)

	// Old nodes come back: two of three are a quorum of the old epoch, but no part of this one.
	two.group = &[]*node{two, three}
	three.group = two.group
	two.start()
	three.start()
	awaitLeader(t, two, three)
	time.Sleep(4 * beat)
	for _, s := range survivor.Servers() {
		if s.ID == two.id || s.ID == three.id {
			t.Errorf("an absent member is in the new epoch: %v", s)
		}
	}
	if two.has("later") {
		t.Error("a node of the old epoch has an entry of the new one")
	}
	// Shown how the new epoch began, they stop, for good.
	var recovery *statev1.Recovery
	survivor.Read(func(s *domain.State) { recovery = s.Cluster().GetRecovery() })
	if err := two.Supersede(recovery.GetStatement(), append([]byte{1}, recovery.GetSignature()[1:]...)); err == nil || two.Err() != nil {
		t.Fatalf("a forged statement stopped a node: %v", err)
	}
	if err := two.Supersede(recovery.GetStatement(), recovery.GetSignature()); err != nil {
		t.Fatal(err)
	}
	if err := two.stop(); !errors.Is(err, ErrSuperseded) {
		t.Errorf("Run returned %v", err)
	}
	cfg := two.config()
	if cfg.Listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	defer cfg.Listener.Close()
	if _, err := Open(cfg); !errors.Is(err, ErrSuperseded) {
		t.Errorf("Open returned %v", err)
	}
	// The survivor itself knows the statement; it stops nobody of its own epoch.
	if err := survivor.Supersede(recovery.GetStatement(), recovery.GetSignature()); err != nil || survivor.Err() != nil {
		t.Errorf("%v, %v", err, survivor.Err())
	}
}

// What the survivor holds may have been acknowledged by a majority that is gone: it is
// kept although the survivor does not know that it was agreed (I10).
func TestRecoverKeepsTheTail(t *testing.T) {
	nodes := cluster(t, "one", "two", "three")
	leader := leaderOf(t, nodes[0])
	for _, n := range nodes {
		if n != leader {
			n.kill()
		}
	}
	ctx := testContext(t)
	go leader.Propose(ctx, &statev1.Command{Body: &statev1.Command_StoreForeignBundle{StoreForeignBundle: &statev1.StoreForeignBundle{}}, Ignorable: true})
	before := leader.raft.LastIndex()
	await(t, "the entry in the leader's own log", func() bool { return leader.raft.LastIndex() > before || leader.State() != "Leader" })
	last := leader.raft.LastIndex()
	leader.stop()
	survey, err := Recover(leader.config(), leader.alone(recoveryKey(), 1))
	if err != nil {
		t.Fatal(err)
	}
	if survey.Last < last || survey.Agreed > survey.Last {
		t.Errorf("survey %+v, the log ended at %d", survey, last)
	}
	leader.group = &[]*node{leader}
	leader.start()
	awaitLeader(t, leader)
	if got := leader.Applied(); got <= last {
		t.Errorf("applied %d, before %d", got, last)
	}
}

// A second recovery follows the first, and keeps in mind whom the first left behind.
func TestRecoverTwice(t *testing.T) {
	nodes := cluster(t, "one", "two")
	nodes[1].kill()
	nodes[0].stop()
	n := nodes[0]
	for epoch := range uint32(3) {
		if _, err := Recover(n.config(), n.alone(recoveryKey(), byte(epoch))); err != nil {
			t.Fatal(err)
		}
	}
	n.group = &[]*node{n}
	n.start()
	awaitLeader(t, n)
	n.Read(func(s *domain.State) {
		if s.Cluster().GetEpoch() != 3 || len(s.Cluster().GetRecovery().GetAbsent()) != 1 {
			t.Errorf("cluster %v", s.Cluster())
		}
	})
}

func TestRestore(t *testing.T) {
	old := cluster(t, "one")[0]
	carryOut(t, old, token("old"))
	var file bytes.Buffer
	old.Read(func(s *domain.State) { s.Snapshot().WriteTo(&file) })
	old.stop()

	n := newNode(t, "new")
	state, err := domain.Restore(bytes.NewReader(file.Bytes()))
	if err != nil {
		t.Fatal(err)
	}
	recovery, member, err := n.alone(recoveryKey(), 1)(Survey{Cluster: state.Cluster()})
	if err != nil {
		t.Fatal(err)
	}
	if err := Restore(n.config(), state, member, recovery); err != nil {
		t.Fatal(err)
	}
	n.start()
	awaitLeader(t, n)
	carryOut(t, n, tickCommand(time.Now()))
	if n.has("old") {
		t.Error("a token of the backup is valid")
	}
	n.stop()
	if state, err = domain.Restore(bytes.NewReader(file.Bytes())); err != nil {
		t.Fatal(err)
	}
	if err := Restore(n.config(), state, member, recovery); !errors.Is(err, ErrStateExists) {
		t.Errorf("restored over a member's state: %v", err)
	}
}
