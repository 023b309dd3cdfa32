package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/scenarios/killpoint"
)

// killed runs a verb of entente in a process of its own and kills it before its change
// number at to the files below dir.
func killed(t *testing.T, dir string, at int, args ...string) killpoint.Result {
	t.Helper()
	return killedWhere(t, killpoint.Command{Dir: dir, Args: args}, at)
}

func killedWhere(t *testing.T, c killpoint.Command, at int) killpoint.Result {
	t.Helper()
	// Its user may trace it only if it does not seal its memory, which changes no file.
	c.Args = append(c.Args, "--debuggable")
	c.Path, c.Env = os.Args[0], append(os.Environ(), "ENTENTE_TEST_PROGRAM=entente")
	r, err := killpoint.Run(c, at)
	if errors.Is(err, killpoint.ErrUnsupported) {
		t.Skipf("NOT RUN: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// wholeRun skips a test of kills under -short: each point is a process of its own, which the
// race detector does not see into.
func wholeRun(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("each point is a process of its own: they are for the whole run")
	}
}

// each calls f for every point if ENTENTE_SOAK is set, else for every some-th, with
// another one to begin with from day to day. ca/replica meets all points of its own files in
// every run.
func each(t *testing.T, points, some int, f func(at int)) {
	t.Helper()
	if os.Getenv("ENTENTE_SOAK") != "" {
		some = 1
	}
	for at := time.Now().YearDay() % some; at < points && !t.Failed(); at += some {
		f(at)
	}
}

// A node's place, with its configuration beside it.
func place(t *testing.T, o catest.Options) (c *catest.CA, config string) {
	t.Helper()
	c = catest.Prepare(t, o)
	config = filepath.Join(filepath.Dir(c.Config().DataDir), "ca.yaml")
	text := fmt.Sprintf("trustDomain: %s\nname: %s\ndatacenter: %s\ndataDir: %s\nsocket: %s\nlisten: {raft: %q, api: %q}\nkeys: {insecureDev: true}\ntiming: {heartbeat: 250ms}\n",
		c.Config().TrustDomain, c.Config().Name, c.Config().Datacenter, c.Config().DataDir, c.Config().Socket, c.Config().Listen.Raft, c.Config().Listen.API)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return c, config
}

// init, killed before each change to a file, can be repeated, and the node signs.
func TestKillInit(t *testing.T) {
	t.Parallel()
	wholeRun(t)
	_, config := place(t, catest.Options{})
	whole := killed(t, filepath.Dir(config), -1, "ca", "init", "--config", config)
	if whole.ExitCode != 0 || len(whole.Points) < 20 {
		t.Fatalf("%+v", whole)
	}
	t.Logf("%d points", len(whole.Points))
	each(t, len(whole.Points), 5, func(at int) {
		c, config := place(t, catest.Options{})
		if r := killed(t, filepath.Dir(config), at, "ca", "init", "--config", config); !r.Killed {
			t.Fatalf("point %d was not reached", at)
		}
		again := killed(t, "/nowhere", -1, "ca", "init", "--config", config)
		if _, err := os.Stat(filepath.Join(c.Config().DataDir, "raft")); again.ExitCode != 0 && (err != nil || !strings.Contains(again.Output, "already")) {
			t.Fatalf("killed before %d, %s, it cannot be repeated: %s", at, whole.Points[at], again.Output)
		}
		if at%2 == 0 {
			c.Restart()
			c.WaitReady()
			c.Stop()
		}
	})
}

// join, killed before each change to a file, can be repeated with the same token, also
// when the cluster has admitted the node already; the token admits one node once (I9).
func TestKillJoin(t *testing.T) {
	t.Parallel()
	wholeRun(t)
	founder := catest.Start(t, catest.Options{})
	grant := func(name string) string {
		file := filepath.Join(t.TempDir(), "token")
		text := founder.GrantToken(&statev1.NodeGrant{Name: name, Datacenter: "dc2", Signing: true})
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	_, config := place(t, catest.Options{Name: "whole", Datacenter: "dc2"})
	whole := killed(t, filepath.Dir(config), -1, "ca", "join", "--config", config, "--token-file", grant("whole"))
	if whole.ExitCode != 0 || len(whole.Points) < 10 {
		t.Fatalf("%+v", whole)
	}
	t.Logf("%d points: %v", len(whole.Points), whole.Points)
	run([]string{"entente", "node", "remove", "--socket", founder.Socket(), "whole"})
	admitted := func(name string) (n int) {
		for _, m := range founder.Status().GetMembers() {
			if m.GetMember().GetName() == name {
				n++
			}
		}
		return n
	}
	half := 0 // killed when the cluster had admitted it, and it did not know
	each(t, len(whole.Points), 2, func(at int) {
		name := fmt.Sprintf("ca-%d", at+2)
		c, config := place(t, catest.Options{Name: name, Datacenter: "dc2"})
		token := grant(name)
		join := []string{"ca", "join", "--config", config, "--token-file", token}
		if r := killed(t, filepath.Dir(config), at, join...); !r.Killed {
			t.Fatalf("point %d was not reached", at)
		}
		if _, err := os.Stat(filepath.Join(c.Config().DataDir, "raft")); err != nil {
			half += admitted(name)
		}
		if again := killed(t, "/nowhere", -1, join...); again.ExitCode != 0 {
			t.Fatalf("killed before %d, %s, it cannot be repeated: %s", at, whole.Points[at], again.Output)
		}
		if n := admitted(name); n != 1 {
			t.Fatalf("%s is a member %d times", name, n)
		}
		if at%3 == 0 {
			c.Restart()
			c.WaitReady()
			c.Stop()
		}
		// Somebody else with the same token.
		thief, theirs := place(t, catest.Options{Name: name, Datacenter: "dc2"})
		if r := killed(t, "/nowhere", -1, "ca", "join", "--config", theirs, "--token-file", token); r.ExitCode == 0 || fileExists(filepath.Join(thief.Config().DataDir, "raft")) {
			t.Fatal("the token admitted a second node")
		}
		// One that does not run would hold the next one's ready gate.
		if code := run([]string{"entente", "node", "remove", "--socket", founder.Socket(), name}); code != 0 {
			t.Fatalf("remove %s: exit code %d", name, code)
		}
	})
	if half == 0 {
		t.Error("no join was interrupted after the cluster had admitted the node")
	}
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// restore and recover, killed before each change to a file, can be repeated, and the node
// goes on in the new epoch with its entries.
func TestKillRestoreAndRecover(t *testing.T) {
	t.Parallel()
	wholeRun(t)
	old := catest.Start(t, catest.Options{})
	old.Apply("apiVersion: entente/v1\nkind: Service\nmetadata: {name: accounts}\nspec: {run: {uid: 1000, hosts: [h1]}, port: 8080}\n")
	old.AgentToken("h1", "dc1")
	dir := t.TempDir()
	snapshot, key := filepath.Join(dir, "a.snapshot"), filepath.Join(dir, "key")
	if code := run([]string{"entente", "snapshot", "save", "--socket", old.Socket(), snapshot}); code != 0 {
		t.Fatal(code)
	}
	if err := os.WriteFile(key, []byte(old.RecoveryKey()), 0o600); err != nil {
		t.Fatal(err)
	}
	old.Stop()
	verbs := map[string]func(config string) []string{
		"restore": func(config string) []string {
			return []string{"snapshot", "restore", "--config", config, "--recovery-key-file", key, snapshot}
		},
		"recover": func(config string) []string {
			return []string{"ca", "recover", "--config", config, "--recovery-key-file", key}
		},
	}
	for what, verb := range verbs {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			begin := func() (c *catest.CA, config string) {
				c, config = place(t, catest.Options{})
				if what == "recover" {
					if err := os.CopyFS(c.Config().DataDir, os.DirFS(old.Config().DataDir)); err != nil {
						t.Fatal(err)
					}
					os.Chmod(filepath.Join(c.Config().DataDir, "keys"), 0o700)
					files, _ := filepath.Glob(filepath.Join(c.Config().DataDir, "keys", "*"))
					for _, f := range files {
						os.Chmod(f, 0o600)
					}
				}
				return c, config
			}
			_, config := begin()
			whole := killed(t, filepath.Dir(config), -1, verb(config)...)
			if whole.ExitCode != 0 || len(whole.Points) < 20 {
				t.Fatalf("%+v", whole)
			}
			t.Logf("%d points", len(whole.Points))
			each(t, len(whole.Points), 7, func(at int) {
				c, config := begin()
				if r := killed(t, filepath.Dir(config), at, verb(config)...); !r.Killed {
					t.Fatalf("point %d was not reached", at)
				}
				again := killed(t, "/nowhere", -1, verb(config)...)
				if again.ExitCode != 0 && !strings.Contains(again.Output, "already") { // it was complete
					t.Fatalf("killed before %d, %s, it cannot be repeated: %s", at, whole.Points[at], again.Output)
				}
				if at%2 != 0 {
					return
				}
				c.Restart()
				c.WaitReady()
				c.Node().Read(func(st *domain.State) {
					// A recovery that was complete when it was killed makes one more epoch.
					if epoch := st.Cluster().GetEpoch(); epoch < 1 || epoch > 2 || len(st.Members()) != 1 || st.EntryCount() != 1 {
						t.Errorf("killed before %d, %s: epoch %d, %d members, %d entries",
							at, whole.Points[at], epoch, len(st.Members()), st.EntryCount())
					}
				})
				c.Stop()
			})
		})
	}
}

// A running node is killed before changes to its files while its authorities rotate: it
// starts, signs, has one ACTIVE and one PREPARED authority of each use, and no key that
// belongs to none.
func TestKillRotation(t *testing.T) {
	t.Parallel()
	wholeRun(t)
	old := catest.Start(t, catest.Options{})
	old.Stop()
	rotate := func(at int) (c *catest.CA, r killpoint.Result) {
		c, config := place(t, catest.Options{})
		if err := os.CopyFS(c.Config().DataDir, os.DirFS(old.Config().DataDir)); err != nil {
			t.Fatal(err)
		}
		os.Chmod(filepath.Join(c.Config().DataDir, "keys"), 0o700)
		files, _ := filepath.Glob(filepath.Join(c.Config().DataDir, "keys", "*"))
		for _, f := range files {
			os.Chmod(f, 0o600)
		}
		var armed atomic.Bool
		pids := make(chan int, 1)
		ended := make(chan killpoint.Result, 1)
		go func() {
			ended <- killedWhere(t, killpoint.Command{
				Dir: c.Config().DataDir, Args: []string{"ca", "run", "--config", config},
				Counts: func(file string) bool {
					return armed.Load() && (strings.HasPrefix(file, "keys/") || strings.HasPrefix(file, "raft/"))
				},
				Started: func(pid int) { pids <- pid },
			}, at)
		}()
		pid := <-pids
		admin := adminFlags{socket: c.Socket()}
		var result *killpoint.Result
		// until repeats f until it is done or the process is dead.
		until := func(f func(ententev1.AdminClient) (bool, error)) bool {
			deadline := time.Now().Add(time.Minute)
			for {
				select {
				case o := <-ended:
					result = &o
					return false
				case <-time.After(20 * time.Millisecond):
				}
				done := false
				admin.call(t.Context(), func(client ententev1.AdminClient) (err error) {
					done, err = f(client)
					return err
				})
				if done {
					return true
				}
				if time.Now().After(deadline) {
					t.Error("the node does not go on")
					return false
				}
			}
		}
		var next string
		prepared := func(client ententev1.AdminClient) (bool, error) {
			status, err := client.Status(t.Context(), &ententev1.StatusRequest{})
			for _, a := range status.GetAuthorities() {
				if a.GetUse() == statev1.KeyUse_KEY_USE_X509 && a.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED && a.GetReady() && a.GetId() != next {
					next = a.GetId()
					return true, err
				}
			}
			return false, err
		}
		if until(prepared) {
			armed.Store(true)
			if until(func(client ententev1.AdminClient) (bool, error) {
				_, err := client.ActivateAuthority(t.Context(), &ententev1.ChangeAuthorityRequest{Id: next})
				return err == nil, err
			}) {
				until(prepared)
			}
		}
		if result == nil {
			armed.Store(false)
			syscall.Kill(pid, syscall.SIGTERM)
			o := <-ended
			result = &o
		}
		return c, *result
	}
	_, whole := rotate(-1)
	if len(whole.Points) < 20 || !slices.ContainsFunc(whole.Points, func(p string) bool { return strings.Contains(p, "keys/") }) {
		t.Fatalf("%+v", whole)
	}
	t.Logf("%d points: %v", len(whole.Points), whole.Points)
	each(t, len(whole.Points), 9, func(at int) {
		c, r := rotate(at)
		c.Restart()
		c.WaitReady()
		phases := map[string]int{}
		for _, a := range c.Status().GetAuthorities() {
			phases[a.GetUse().String()+a.GetPhase().String()]++
		}
		for _, use := range []statev1.KeyUse{statev1.KeyUse_KEY_USE_X509, statev1.KeyUse_KEY_USE_JWT, statev1.KeyUse_KEY_USE_WIT} {
			active := phases[use.String()+statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE.String()]
			prepared := phases[use.String()+statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED.String()]
			if active != 1 || prepared != 1 {
				t.Errorf("killed before %d: %d ACTIVE and %d PREPARED authorities of %s; %v", at, active, prepared, use, r.Points)
			}
		}
		keys, _ := filepath.Glob(filepath.Join(c.Config().DataDir, "keys", "x509-*"))
		if len(keys) > 3 {
			t.Errorf("killed before %d: %d keys are kept: %v", at, len(keys), keys)
		}
		c.Stop()
	})
}
