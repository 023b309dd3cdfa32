//go:build linux

package admin

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/internal/dataplane"
	"github.com/entente-mesh/entente/meshagent"
)

// seven is a sidecar with as many requests under way, whose domain has no roles.
type seven struct{}

func (seven) Seen() dataplane.Seen                 { return dataplane.Seen{Requests: 7} }
func (seven) RoleBindings() []*statev1.RoleBinding { return nil }

// start runs an agent with its admin socket.
func start(t *testing.T, c *catest.CA) (*Client, *meshagent.Agent) {
	t.Helper()
	dir, err := os.MkdirTemp("", "adm") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cfg, err := meshagent.ReadConfig("agent.yaml", strings.NewReader(fmt.Sprintf(
		"trustDomain: banking.example\nname: h1\ndatacenter: dc1\ndataDir: %s\nca: {token: %s}\n", filepath.Join(dir, "data"), c.AgentToken("h1", "dc1"))))
	if err != nil {
		t.Fatal(err)
	}
	agent, err := meshagent.New(cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := Listen(cfg.Admin.Socket)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(cfg.Admin.Socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v %v", info.Mode(), err)
	}
	server := New(agent, listener, nil)
	server.Show(seven{})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- agent.Run(ctx, meshagent.Door{Name: "admin socket", Run: server.Run})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return NewClient(cfg.Admin.Socket), agent
}

func eventually(t *testing.T, check func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(15 * time.Second); time.Now().Before(deadline); time.Sleep(3 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	t.Fatal(err)
}

func service(name, run string) string {
	return "apiVersion: entente/v1\nkind: Service\nmetadata: {name: " + name + ", owner: team}\nspec: {run: {" + run + ", hosts: [h1]}}\n---\n"
}

func TestExplain(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c.Apply(service("zz", fmt.Sprintf("uid: %d, path: %s", os.Getuid(), exe)) + service("aa", "uid: 4711"))
	client, agent := start(t, c)
	eventually(t, agent.Ready)

	status, err := client.Status(t.Context())
	if err != nil || !status.Ready || status.Agent != "h1" || len(status.Identities) != 2 || status.Identities[1].SPIFFEID != "spiffe://banking.example/zz" || status.Identities[1].ValidUntil == nil {
		t.Errorf("%+v %v", status, err)
	}
	e, err := client.Explain(t.Context(), os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	has := func(selector string) bool {
		return slices.ContainsFunc(e.Selectors, func(s Selector) bool { return s.Selector == selector })
	}
	if !has("unix:uid:"+strconv.Itoa(os.Getuid())) || !has("unix:path:"+exe) {
		t.Errorf("selectors: %+v", e.Selectors)
	}
	if len(e.Identities) != 2 || !e.Identities[0].Entitled || e.Identities[0].Entry != "service/zz" ||
		e.Identities[1].Entitled || !strings.Contains(e.Identities[1].Why, "unix:uid:4711") {
		t.Errorf("identities: %+v", e.Identities)
	}
	for _, pid := range []int{0, -1, 1 << 22} {
		var refused *RefusedError
		if _, err := client.Explain(t.Context(), pid); !errors.As(err, &refused) {
			t.Errorf("pid %d: %v", pid, err)
		}
	}
	var nobody *UnreachableError
	if _, err := NewClient(filepath.Join(t.TempDir(), "none.sock")).Status(t.Context()); !errors.As(err, &nobody) {
		t.Errorf("no socket: %v", err)
	}
}

// The process that registers, and what it starts, has the identity while it stays
// on the line; a process beside it never.
func TestRegister(t *testing.T) {
	const id = "abcdefghijklmnopqrst"
	c := catest.Start(t, catest.Options{})
	c.Apply(service("mine", fmt.Sprintf("uid: %d, run: %s", os.Getuid(), id)))
	client, agent := start(t, c)
	eventually(t, agent.Ready)
	child := exec.Command("sleep", "60")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { child.Process.Kill(); child.Wait() })
	entitled := func(pid int) bool {
		e, err := client.Explain(t.Context(), pid)
		return err == nil && e.Identities[0].Entitled
	}
	if entitled(child.Process.Pid) {
		t.Error("before it was registered")
	}
	gone, release, err := client.Register(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	if !entitled(child.Process.Pid) || !entitled(os.Getpid()) {
		t.Error("control: it is not entitled")
	}
	if entitled(os.Getppid()) {
		t.Error("the parent is entitled")
	}
	var refused *RefusedError
	if _, _, err := client.Register(t.Context(), id); !errors.As(err, &refused) {
		t.Errorf("the same id again: %v", err)
	}
	if _, _, err := client.Register(t.Context(), "SHORT"); !errors.As(err, &refused) {
		t.Errorf("a bad id: %v", err)
	}
	release()
	<-gone
	eventually(t, func() error {
		if entitled(child.Process.Pid) {
			return errors.New("it is still entitled")
		}
		return nil
	})
}
