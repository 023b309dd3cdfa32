package node_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/ca/node"
	"github.com/entente-mesh/entente/ca/replica"
)

// The tests named TestRunbook… carry out the runbooks of docs/operations.md, step by
// step.

const cards = accounts + "---\napiVersion: entente/v1\nkind: Service\nmetadata: {name: cards}\nspec: {run: {uid: 1001, hosts: [h1]}, port: 8081}\n"

func saveSnapshot(t *testing.T, c *catest.CA) []byte {
	t.Helper()
	stream, err := c.Admin().SaveSnapshot(t.Context(), &ententev1.SaveSnapshotRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var file bytes.Buffer
	for {
		part, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return file.Bytes()
		}
		if err != nil {
			t.Fatal(err)
		}
		file.Write(part.GetData())
	}
}

func proposeRemoval(t *testing.T, by *catest.CA, id string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, err := by.RemoveNode(ctx, id, false)
	return err
}

// caughtUp waits until the nodes hold the same revision.
func caughtUp(t *testing.T, nodes ...*catest.CA) {
	t.Helper()
	eventually(t, "equal states", 10*time.Second, func() error {
		for _, c := range nodes[1:] {
			if a, b := nodes[0].Status().GetRevision(), c.Status().GetRevision(); a != b {
				return fmt.Errorf("revisions %s and %s", ca.Revision(a), ca.Revision(b))
			}
		}
		return nil
	})
}

// Lost node: one of three is gone for good. Nothing stops; it is removed and replaced.
func TestRunbookLostNode(t *testing.T) {
	t.Parallel()
	nodes := cluster(t)
	lost := nodes[2].Node().ID()
	nodes[2].Kill()
	nodes[0].Apply(accounts) // 1. nothing stops

	// 2. The lost node shows in `node list`.
	eventually(t, "the lost node is seen", 30*time.Second, func() error {
		list, err := nodes[1].Admin().ListNodes(t.Context(), &ententev1.ListNodesRequest{})
		if err != nil {
			return err
		}
		for _, n := range list.GetNodes() {
			if n.GetMember().GetId() == lost && list.GetLeaderId() != "" && (n.GetContactSeconds() > 3 || n.GetContactSeconds() < 0) && n.GetLag() > 0 {
				return nil
			}
		}
		return fmt.Errorf("%v", list)
	})
	// A living voter cannot be removed by mistake: one of two that remain would answer.
	eventually(t, "the removal of a living voter is refused", 10*time.Second, func() error {
		err := proposeRemoval(t, nodes[0], nodes[1].Node().ID())
		if err == nil {
			t.Fatal("a voter was removed although the rest has no quorum")
		}
		if !strings.Contains(err.Error(), "last-voter") {
			return err
		}
		return nil
	})
	// 3. Remove the lost one, admit another.
	if err := proposeRemoval(t, nodes[0], lost); err != nil {
		t.Fatal(err)
	}
	four := nodes[0].Join("ca-4", "dc3")
	nodes[0].Apply(cards)
	caughtUp(t, nodes[0], nodes[1], four)
	for _, a := range nodes[0].Status().GetAuthorities() {
		if a.GetMemberId() == lost && ca.Signs(a.GetPhase()) {
			t.Errorf("the lost node's authority is %s", ca.PhaseName(a.GetPhase()))
		}
	}
}

// Lost quorum: two of three are gone for good. What was agreed goes on; the survivor is
// recovered; who comes back all the same is stopped.
func TestRunbookLostQuorum(t *testing.T) {
	t.Parallel()
	nodes := cluster(t)
	nodes[0].Apply(accounts)
	h := attest(t, nodes[0], "h1")
	caughtUp(t, nodes[0], nodes[1], nodes[2])
	survivor, returning := nodes[2], nodes[1]
	token := nodes[0].AgentToken("h2", "dc1")
	caughtUp(t, nodes[0], survivor)
	sequence := survivor.Status().GetRevision()
	nodes[0].Kill()
	nodes[1].Kill()

	// 1. Say what is going on.
	eventually(t, "the status says that there is no quorum", 10*time.Second, func() error {
		if s := survivor.Status(); s.GetQuorum() || s.GetNoQuorumSince() == 0 {
			return errors.New("it claims quorum")
		}
		return nil
	})
	_, err := survivor.TryApply(cards)
	for _, word := range []string{"no quorum since", "Signing, renewal", "To do"} {
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), word) {
			t.Errorf("a refusal without quorum does not say %q: %v", word, err)
		}
	}
	if _, err := sign(t.Context(), h.at(t, survivor), h.csr); err != nil {
		t.Errorf("signing without quorum: %v", err)
	}
	for _, a := range survivor.Status().GetAutonomy() {
		if a.GetMemberId() == survivor.Node().ID() && (a.GetSignsSeconds() < 3600 || a.GetFullSeconds() >= a.GetSignsSeconds()) {
			t.Errorf("autonomy %v", a)
		}
	}
	// 2. A backup of what the survivor holds, before anything is changed.
	if contents, err := node.Inspect(bytes.NewReader(saveSnapshot(t, survivor))); err != nil || contents.Entries != 1 || contents.Epoch != 0 {
		t.Errorf("the backup: %+v, %v", contents, err)
	}
	// 3. Look, then recover.
	if _, err := node.LookBeforeRecover(survivor.Config()); err == nil {
		t.Error("a running node was looked into")
	}
	survivor.Stop()
	survey, err := node.LookBeforeRecover(survivor.Config())
	if err != nil || len(survey.Absent) != 2 || survey.NewEpoch != 1 || survey.AgreedTime.IsZero() {
		t.Fatalf("%+v, %v", survey, err)
	}
	other := catest.Start(t, catest.Options{})
	if _, err := node.Recover(survivor.Config(), other.RecoveryKey(), false); err == nil {
		t.Fatal("another cluster's recovery key recovered this one")
	}
	if _, err := node.Recover(survivor.Config(), nodes[0].RecoveryKey(), false); err != nil {
		t.Fatal(err)
	}
	survivor.Restart()
	survivor.WaitReady()
	// 4. It signs for the agents it had, grants again, and takes in new nodes.
	eventually(t, "the survivor agrees by itself", 10*time.Second, func() error {
		_, err := survivor.TryApply(cards)
		return err
	})
	if got := survivor.Status().GetRevision(); ca.Revision(got).Epoch() != 1 || got <= sequence {
		t.Errorf("revision %s", ca.Revision(got))
	}
	if _, err := sign(t.Context(), h.at(t, survivor), h.csr); err != nil {
		t.Errorf("an agent of the epoch before: %v", err)
	}
	if parsed, err := ca.ParseToken(token); err != nil {
		t.Fatal(err)
	} else {
		parsed.Addresses, parsed.Pins = []string{survivor.Config().Advertise.API}, []string{survivor.Node().ID()}
		if _, err := attestWith(t, survivor, parsed); err == nil {
			t.Error("a join token of the epoch before admitted an agent")
		}
	}
	attest(t, survivor, "h2") // the positive control: a token of this epoch
	tainted := 0
	for _, a := range survivor.Status().GetAuthorities() {
		switch own := a.GetMemberId() == survivor.Node().ID(); {
		case !own && a.GetPhase() != statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED:
			t.Errorf("an absent member's authority is %s", ca.PhaseName(a.GetPhase()))
		case !own:
			tainted++
		}
	}
	if tainted == 0 {
		t.Error("no absent member's authority is there")
	}
	four := survivor.Join("ca-4", "dc1")
	caughtUp(t, survivor, four)

	// 5. A lost node comes back: it is shown the new epoch, stops, and cannot start again.
	stopped := run(t, returning.Config())
	select {
	case err := <-stopped:
		if !errors.Is(err, replica.ErrSuperseded) {
			t.Errorf("the node of the old epoch ended with %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Error("the node of the old epoch goes on")
	}
	if _, err := node.New(returning.Config(), nil, node.Listeners{}); !errors.Is(err, replica.ErrSuperseded) {
		t.Errorf("the node of the old epoch starts again: %v", err)
	}
	// Wiped, it may join anew.
	if err := os.RemoveAll(returning.Config().DataDir); err != nil {
		t.Fatal(err)
	}
	if err := node.Join(t.Context(), returning.Config(), survivor.NodeToken(returning.Config().Name, returning.Config().Datacenter)); err != nil {
		t.Fatal(err)
	}
	returning.Restart()
	returning.WaitReady()
	caughtUp(t, survivor, returning)
}

// run runs a node until it ends by itself or the test does.
func run(t *testing.T, cfg *node.Config) <-chan error {
	t.Helper()
	n, err := node.New(cfg, nil, node.Listeners{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended, done := make(chan error, 1), make(chan struct{})
	go func() {
		defer close(done)
		ended <- n.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return ended
}

// Lost datacenter: the leader's datacenter is gone. Nothing needs to be done; when it
// comes back, its node catches up by itself.
func TestRunbookLostDatacenter(t *testing.T) {
	t.Parallel()
	nodes := cluster(t)
	nodes[0].Apply(accounts)
	h := attest(t, nodes[0], "h1")
	caughtUp(t, nodes[0], nodes[1], nodes[2])
	var lost *catest.CA
	var rest []*catest.CA
	eventually(t, "somebody leads", 20*time.Second, func() error { // an election may pass by
		if lost, rest = leads(nodes); lost == nil || len(rest) != 2 {
			return errors.New("nobody does")
		}
		return nil
	})
	lost.Kill()
	for _, c := range rest {
		if _, err := sign(t.Context(), h.at(t, c), h.csr); err != nil {
			t.Errorf("signing while a datacenter is lost: %v", err)
		}
	}
	took := eventually(t, "agreement in the other datacenters", 10*time.Second, func() error {
		_, err := rest[0].TryApply(cards)
		return err
	})
	t.Logf("agreed again after %v", took)
	if s := rest[1].Status(); !s.GetQuorum() || s.GetNotAgreeing() != "" {
		t.Errorf("status %v", s)
	}
	lost.Restart()
	lost.WaitReady()
	caughtUp(t, rest[0], rest[1], lost)
}

// Restore from backup: every node is gone. The backup makes a new epoch in an empty
// directory; what the agents knew of the key decides how they come back.
func TestRunbookRestoreFromBackup(t *testing.T) {
	t.Parallel()
	old := catest.Start(t, catest.Options{})
	old.Apply(accounts)
	h := attest(t, old, "h1")
	token := old.AgentToken("h2", "dc1")
	backup := saveSnapshot(t, old)
	old.Apply(cards) // after the backup: lost
	newest := old.Status().GetRevision()
	// An agent holds a newer revision than the backup.
	var view atomic.Pointer[client.View]
	syncing, stopSync := context.WithCancel(t.Context())
	synced := make(chan error, 1)
	holder := h.at(t, old)
	go func() {
		synced <- holder.Sync(syncing, func(v *client.View) error {
			if before := view.Load(); before != nil && v.Revision < before.Revision {
				t.Errorf("the agent's revision went back from %s to %s", ca.Revision(before.Revision), ca.Revision(v.Revision))
			}
			view.Store(v)
			return nil
		})
	}()
	defer func() {
		stopSync()
		<-synced
	}()
	eventually(t, "the agent holds the newest revision", 10*time.Second, func() error {
		if v := view.Load(); v == nil || v.Revision < newest || len(v.Entries) != 2 {
			return errors.New("not yet")
		}
		return nil
	})
	oldID := old.Node().ID()
	keys := filepath.Join(t.TempDir(), "keys")
	old.Stop()
	if err := os.CopyFS(keys, os.DirFS(filepath.Join(old.Config().DataDir, "keys"))); err != nil {
		t.Fatal(err)
	}

	restore := func(t *testing.T, keep bool) *catest.CA {
		c := catest.Prepare(t, catest.Options{Name: "ca-1"})
		if keep {
			c.Config().Listen, c.Config().Advertise = old.Config().Listen, old.Config().Advertise
			if err := os.MkdirAll(c.Config().DataDir, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.CopyFS(filepath.Join(c.Config().DataDir, "keys"), os.DirFS(keys)); err != nil {
				t.Fatal(err)
			}
			os.Chmod(filepath.Join(c.Config().DataDir, "keys"), 0o700)
			files, _ := filepath.Glob(filepath.Join(c.Config().DataDir, "keys", "*"))
			for _, f := range files {
				os.Chmod(f, 0o600)
			}
		}
		// Attacks first: another key, an altered file; neither leaves anything behind.
		foreign := catest.Start(t, catest.Options{})
		if _, err := node.Restore(c.Config(), bytes.NewReader(backup), foreign.RecoveryKey(), 0, false); err == nil {
			t.Fatal("restored with another cluster's recovery key")
		}
		altered := bytes.Clone(backup)
		altered[len(altered)/2] ^= 1
		if _, err := node.Restore(c.Config(), bytes.NewReader(altered), old.RecoveryKey(), 0, false); err == nil {
			t.Fatal("restored an altered backup")
		}
		if replica.Exists(c.Config().DataDir) {
			t.Fatal("a refused restore left a state")
		}
		contents, err := node.Restore(c.Config(), bytes.NewReader(backup), old.RecoveryKey(), 0, false)
		if err != nil || contents.Epoch != 1 {
			t.Fatalf("%+v, %v", contents, err)
		}
		if _, err := node.Restore(c.Config(), bytes.NewReader(backup), old.RecoveryKey(), 0, false); !errors.Is(err, replica.ErrStateExists) {
			t.Errorf("restored over a state: %v", err)
		}
		c.Restart()
		c.WaitReady()
		if s := c.Status(); s.GetRevision() <= newest || s.GetEntries() != 1 || s.GetAgents() != 1 {
			t.Errorf("status %v", s)
		}
		if parsed, err := ca.ParseToken(token); err != nil {
			t.Fatal(err)
		} else {
			parsed.Addresses, parsed.Pins = []string{c.Config().Advertise.API}, []string{c.Node().ID()}
			if _, err := attestWith(t, c, parsed); err == nil {
				t.Error("a join token of the backup admitted an agent")
			}
		}
		return c
	}
	t.Run("with the keys", func(t *testing.T) {
		c := restore(t, true)
		if c.Node().ID() != oldID {
			t.Fatalf("node %s, was %s", c.Node().ID(), oldID)
		}
		if _, err := sign(t.Context(), h.at(t, c), h.csr); err != nil {
			t.Errorf("an agent of before: %v", err)
		}
		// It takes what the backup holds for newer than what it had.
		eventually(t, "the agent follows the restored node", 20*time.Second, func() error {
			if v := view.Load(); ca.Revision(v.Revision).Epoch() != 1 || len(v.Entries) != 1 {
				return fmt.Errorf("revision %s, %d entries", ca.Revision(v.Revision), len(v.Entries))
			}
			return nil
		})
	})
	t.Run("without", func(t *testing.T) {
		c := restore(t, false)
		if c.Node().ID() == oldID {
			t.Fatal("the key is the same")
		}
		for _, a := range c.Status().GetAuthorities() {
			if a.GetMemberId() == oldID && a.GetPhase() != statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED {
				t.Errorf("the lost node's authority is %s", ca.PhaseName(a.GetPhase()))
			}
		}
		h1 := attest(t, c, "h1") // with a new token
		if _, err := sign(t.Context(), h1.at(t, c), h1.csr); err != nil {
			t.Errorf("the agent with a new token: %v", err)
		}
	})
}

// A backup holds no key and no secret (I1).
func TestSnapshotHoldsNoSecret(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{})
	c.Apply(accounts)
	token, err := ca.ParseToken(c.AgentToken("h1", "dc1"))
	if err != nil {
		t.Fatal(err)
	}
	recovery, err := ca.ParseRecoveryKey(c.RecoveryKey())
	if err != nil {
		t.Fatal(err)
	}
	backup := saveSnapshot(t, c)
	if !bytes.Contains(backup, token.PublicKey()) || !bytes.Contains(backup, recovery.PublicKey()) {
		t.Fatal("the public halves are not there, so the test would see nothing")
	}
	secrets := map[string][]byte{"the token's seed": token.Seed, "the recovery key": recovery.Seed}
	files, err := filepath.Glob(filepath.Join(c.Config().DataDir, "keys", "*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("%v, %v", files, err)
	}
	for what, secret := range secrets {
		if bytes.Contains(backup, secret) {
			t.Errorf("the backup holds %s", what)
		}
		filepath.WalkDir(filepath.Join(c.Config().DataDir, "raft"), func(path string, d os.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				if data, err := os.ReadFile(path); err == nil && bytes.Contains(data, secret) {
					t.Errorf("%s holds %s", path, what)
				}
			}
			return nil
		})
	}
}
