package node_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/node"
)

// twoHosts runs accounts on two hosts.
const twoHosts = `
apiVersion: entente/v1
kind: Service
metadata: {name: accounts}
spec: {run: {uid: 1000, hosts: [h1, h2]}, port: 8080}
`

func isolate(t *testing.T, c *catest.CA, name string) (*ententev1.Isolation, error) {
	t.Helper()
	resp, err := c.Admin().IsolateAgent(t.Context(), &ententev1.IsolateAgentRequest{Name: name, Reason: "INC-881"})
	return resp.GetIsolation(), err
}

// banned says whether the state that a node holds bans an agent.
func banned(c *catest.CA, name string) (is bool) {
	c.Node().Read(func(st *domain.State) {
		a, ok := st.Agent(name)
		is = ok && a.GetBanned()
	})
	return is
}

// follow keeps a stream of h at c and returns its newest picture, and how often a stream
// ended with a refusal.
func follow(t *testing.T, h *host, c *catest.CA) *atomic.Pointer[client.View] {
	t.Helper()
	view := new(atomic.Pointer[client.View])
	ctx, cancel := context.WithCancel(t.Context())
	var synced sync.WaitGroup
	at := h.at(t, c)
	synced.Go(func() {
		at.Sync(ctx, func(v *client.View) error {
			view.Store(v)
			return nil
		})
	})
	t.Cleanup(func() {
		cancel()
		synced.Wait()
	})
	eventually(t, "a picture", 15*time.Second, func() error {
		if view.Load() == nil {
			return errors.New("none yet")
		}
		return nil
	})
	return view
}

func distrusts(view *client.View, leaf []byte) bool {
	cert, err := x509.ParseCertificate(leaf)
	return err == nil && view.Distrust.Check([]*x509.Certificate{cert}) != nil
}

func noQuorum(t *testing.T, c *catest.CA) {
	t.Helper()
	eventually(t, "the loss of quorum is noticed", 15*time.Second, func() error {
		if c.Status().GetQuorum() {
			return errors.New("not yet")
		}
		return nil
	})
}

// Without quorum a host is shut out at the node that is asked, at once and for good: its
// doors, its streams, its subscribers; through a kill at each step; and as a ban
// everywhere when there is quorum again. Whoever is not named goes on.
func TestIsolate(t *testing.T) {
	t.Parallel()
	nodes := cluster(t)
	nodes[0].Apply(twoHosts)
	h1, h2 := attest(t, nodes[0], "h1"), attest(t, nodes[0], "h2")
	caughtUp(t, nodes[0], nodes[1], nodes[2])
	last := nodes[2]
	journal := filepath.Join(last.Config().DataDir, "bans.journal")
	images := map[string][]byte{} // what a kill at a step would leave
	var taking sync.Mutex
	last.Stop()
	last.Config().AtStep(func(step string) {
		taking.Lock()
		defer taking.Unlock()
		if _, taken := images[step]; !taken {
			images[step], _ = os.ReadFile(journal)
		}
	})
	last.Restart()
	last.WaitReady()

	if _, err := isolate(t, last, "h1"); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "entente agent ban h1") {
		t.Errorf("with quorum: %v", err)
	}
	nodes[0].Kill()
	nodes[1].Kill()
	noQuorum(t, last)
	leaf, err := sign(t.Context(), h1.at(t, last), h1.csr)
	if err != nil {
		t.Fatalf("control: %v", err)
	}
	view := follow(t, h2, last)
	follow(t, h1, last)
	if distrusts(view.Load(), leaf) {
		t.Fatal("control: distrusted before")
	}
	if _, err := isolate(t, last, "h9"); status.Code(err) != codes.NotFound {
		t.Errorf("an agent that nobody knows: %v", err)
	}

	before := view.Load().Revision
	done, err := isolate(t, last, "h1")
	if err != nil || done.GetNotWritten() != "" || done.GetReason() != "INC-881" {
		t.Fatalf("%v, %v", done, err)
	}
	shutOut := func() {
		t.Helper()
		if _, err := sign(t.Context(), h1.at(t, last), h1.csr); err == nil {
			t.Error("the isolated host has an SVID signed")
		}
		cfg := h1.cfg
		cfg.SVID, cfg.Addresses = nil, []string{last.Config().Advertise.API}
		if _, err := client.Attest(t.Context(), cfg, func([]byte) (*ententev1.AttestRequest, error) { return &ententev1.AttestRequest{}, nil }, h1.csr); err == nil {
			t.Error("the isolated host attests by its key")
		}
		if _, err := sign(t.Context(), h2.at(t, last), h2.csr); err != nil {
			t.Errorf("control: another host: %v", err)
		}
		s := last.Status()
		if len(s.GetIsolated()) != 1 || s.GetIsolated()[0].GetAgent().GetName() != "h1" || !strings.HasPrefix(s.GetIsolated()[0].GetWho(), "local user") {
			t.Errorf("status: %v", s.GetIsolated())
		}
		list, err := last.Admin().ListAgents(t.Context(), &ententev1.ListAgentsRequest{})
		if err != nil || len(list.GetAgents()) != 2 || !list.GetAgents()[0].GetIsolated() || list.GetAgents()[1].GetIsolated() {
			t.Errorf("agent list: %v, %v", list, err)
		}
	}
	shutOut()
	took := eventually(t, "the other subscribers distrust what it holds", 5*time.Second, func() error {
		if !distrusts(view.Load(), leaf) {
			return errors.New("not yet")
		}
		return nil
	})
	t.Logf("told after %v", took)
	if view.Load().Revision != before {
		t.Error("the revision moved")
	}
	eventually(t, "its stream ends", 5*time.Second, func() error {
		if n := last.Status().GetSubscribers(); n != 1 {
			return fmt.Errorf("%d subscribers", n)
		}
		return nil
	})
	if again, err := isolate(t, last, "h1"); err != nil || again.GetUnixSeconds() != done.GetUnixSeconds() {
		t.Errorf("repeated: %v, %v", again, err)
	}
	audit, err := os.ReadFile(filepath.Join(last.Config().DataDir, "audit.log"))
	if err != nil || !strings.Contains(string(audit), `"what":"IsolateAgent","on":["agent/h1","reason: INC-881"],"result":"done"`) {
		t.Errorf("audit: %v", err)
	}

	// Killed at each step of it, it holds after the restart. Of what was written in part
	// nobody was told that it holds; it is as if it had not been said.
	taking.Lock()
	torn := slices.Clone(images["journalled"])
	images["in the middle of the line"] = torn[:len(torn)-7]
	taking.Unlock()
	for _, step := range []string{"in the middle of the line", "journalled", "applied"} {
		last.Kill()
		if err := os.WriteFile(journal, images[step], 0o600); err != nil {
			t.Fatal(err)
		}
		last.Restart()
		eventually(t, "signing after "+step, 15*time.Second, func() error {
			_, err := sign(t.Context(), h2.at(t, last), h2.csr)
			return err
		})
		if step == "in the middle of the line" {
			if _, err := sign(t.Context(), h1.at(t, last), h1.csr); err != nil || len(last.Status().GetIsolated()) != 0 {
				t.Errorf("after a torn line: %v, %v", err, last.Status().GetIsolated())
			}
			continue
		}
		shutOut()
	}

	// Quorum returns: it is a ban, everywhere.
	nodes[0].Restart()
	nodes[1].Restart()
	everywhere := func() error {
		for _, c := range nodes {
			if !banned(c, "h1") || banned(c, "h2") {
				return fmt.Errorf("not at %s", c.Config().Name)
			}
		}
		if s := last.Status(); len(s.GetIsolated()) != 0 {
			return fmt.Errorf("still isolated: %v", s.GetIsolated())
		}
		return nil
	}
	took = eventually(t, "the ban is agreed", 30*time.Second, everywhere)
	t.Logf("agreed %v after the restart of the others", took)
	if _, err := isolate(t, last, "h1"); status.Code(err) != codes.AlreadyExists {
		t.Errorf("of a banned host: %v", err)
	}
	eventually(t, "the step is taken", 10*time.Second, func() error {
		taking.Lock()
		defer taking.Unlock()
		if images["merged"] == nil {
			return errors.New("not yet")
		}
		return nil
	})
	// Killed before it noted that: merged again, which changes nothing.
	revision := func() (at uint64) {
		nodes[0].Node().Read(func(st *domain.State) {
			d, _ := st.DistrustItem("agent/h1")
			at = d.GetRevision()
		})
		return at
	}
	first := revision()
	last.Kill()
	if err := os.WriteFile(journal, images["merged"], 0o600); err != nil {
		t.Fatal(err)
	}
	last.Restart()
	last.WaitReady()
	eventually(t, "the ban holds", 30*time.Second, everywhere)
	if revision() != first {
		t.Error("merged twice")
	}
	// Lifted by agreement alone, and not made again by the memory.
	eventually(t, "the host is evicted", 30*time.Second, func() error {
		// An election may leave it in doubt whether the first try was agreed.
		if _, err := nodes[0].Admin().EvictAgent(t.Context(), &ententev1.ChangeAgentRequest{Name: "h1"}); status.Code(err) != codes.NotFound {
			return err
		}
		return nil
	})
	attest(t, nodes[0], "h1")
	last.Kill()
	last.Restart()
	last.WaitReady()
	caughtUp(t, nodes[0], last)
	eventually(t, "the memory takes the lifting down", 10*time.Second, func() error {
		if text, err := os.ReadFile(journal); err != nil || !strings.Contains(string(text), `"kind":"lifted"`) {
			return errors.New("not yet")
		}
		return nil
	})
	if banned(last, "h1") {
		t.Error("the lifted ban came back")
	}
}

// A disk that fails does not keep a host from being isolated; the answer says that a
// restart would lose it, until it is written after all.
func TestIsolateWithoutDisk(t *testing.T) {
	t.Parallel()
	one := catest.Start(t, catest.Options{})
	one.Apply(twoHosts)
	h1, h2 := attest(t, one, "h1"), attest(t, one, "h2")
	one.Stop()
	var disk brokenDisk
	one.Config().BeforeWrite(disk.write)
	one.Restart()
	one.WaitReady()
	disk.full.Store(true)
	one.Admin().EvictAgent(t.Context(), &ententev1.ChangeAgentRequest{Name: "h9"}) // a write, so that the disk is noticed
	noQuorum(t, one)
	done, err := isolate(t, one, "h1")
	if err != nil || !strings.Contains(done.GetNotWritten(), "no space") {
		t.Fatalf("%v, %v", done, err)
	}
	if _, err := sign(t.Context(), h1.at(t, one), h1.csr); err == nil {
		t.Error("the isolated host has an SVID signed")
	}
	if _, err := sign(t.Context(), h2.at(t, one), h2.csr); err != nil {
		t.Errorf("control: %v", err)
	}
	disk.full.Store(false)
	eventually(t, "the node is back, and the ban agreed", 40*time.Second, func() error {
		if !banned(one, "h1") || len(one.Status().GetIsolated()) != 0 {
			return errors.New("not yet")
		}
		return nil
	})
}

// Bans made after the backup that a cluster is restored from hold: what any node
// remembers of them is agreed again.
func TestBansSurviveRestore(t *testing.T) {
	t.Parallel()
	old := catest.Start(t, catest.Options{})
	old.Apply(strings.ReplaceAll(twoHosts, "h1, h2", "h1, h2, h3, h4"))
	hosts := map[string]*host{"h1": attest(t, old, "h1"), "h2": attest(t, old, "h2"), "h4": attest(t, old, "h4")}
	backup := saveSnapshot(t, old)
	hosts["h3"] = attest(t, old, "h3") // the backup does not know it
	for _, name := range []string{"h1", "h2", "h3"} {
		if _, err := old.Admin().BanAgent(t.Context(), &ententev1.ChangeAgentRequest{Name: name}); err != nil {
			t.Fatal(err)
		}
	}
	journal := filepath.Join(old.Config().DataDir, "bans.journal")
	remembered := func(kind string, n int) {
		t.Helper()
		eventually(t, "the node remembers", 10*time.Second, func() error {
			if text, err := os.ReadFile(journal); err != nil || strings.Count(string(text), `"kind":"`+kind+`"`) < n {
				return fmt.Errorf("%s, %v", text, err)
			}
			return nil
		})
	}
	remembered("banned", 3)
	if _, err := old.Admin().EvictAgent(t.Context(), &ententev1.ChangeAgentRequest{Name: "h2"}); err != nil {
		t.Fatal(err)
	}
	remembered("lifted", 1)
	old.Stop()

	c := catest.Prepare(t, catest.Options{Name: "ca-1"})
	c.Config().Listen, c.Config().Advertise = old.Config().Listen, old.Config().Advertise
	keys := filepath.Join(c.Config().DataDir, "keys")
	if err := os.CopyFS(keys, os.DirFS(filepath.Join(old.Config().DataDir, "keys"))); err != nil {
		t.Fatal(err)
	}
	filepath.Walk(c.Config().DataDir, func(path string, info os.FileInfo, _ error) error {
		if info.IsDir() {
			return os.Chmod(path, 0o700)
		}
		return os.Chmod(path, 0o600)
	})
	damaged := filepath.Join(t.TempDir(), "damaged")
	text, err := os.ReadFile(journal)
	if err != nil {
		t.Fatal(err)
	}
	os.WriteFile(damaged, []byte(strings.Replace(string(text), "h1", "h7", 1)), 0o600)
	if _, err := node.Restore(c.Config(), strings.NewReader(string(backup)), old.RecoveryKey(), 0, false, damaged); err == nil || !strings.Contains(err.Error(), "line 1") {
		t.Fatalf("with a damaged memory: %v", err)
	}
	if _, err := node.Restore(c.Config(), strings.NewReader(string(backup)), old.RecoveryKey(), 0, false, journal); err != nil {
		t.Fatal(err)
	}
	c.Restart()
	c.WaitReady()
	eventually(t, "what was remembered is agreed", 20*time.Second, func() error {
		there := false
		c.Node().Read(func(st *domain.State) { _, there = st.Agent("h2") })
		if !banned(c, "h1") || !banned(c, "h3") || there {
			return errors.New("not yet")
		}
		return nil
	})
	for _, name := range []string{"h1", "h2", "h3"} {
		if _, err := sign(t.Context(), hosts[name].at(t, c), hosts[name].csr); err == nil {
			t.Errorf("%s, shut out after the backup, has an SVID signed", name)
		}
	}
	if _, err := sign(t.Context(), hosts["h4"].at(t, c), hosts["h4"].csr); err != nil {
		t.Errorf("control: a host of before: %v", err)
	}
	attest(t, c, "h2") // evicted: a new token admits it
	caughtUp(t, c, c)
	if banned(c, "h2") {
		t.Error("the memory reaches the host that was attested anew")
	}
}
