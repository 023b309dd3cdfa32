package evil_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/meshagent"
	"github.com/entente-mesh/entente/scenarios/evil"
)

// An agent that was stopped while it believed one CA node, which told it that there is no
// other, and that is started when this node is gone, finds the others again by the last
// member table that two agreed on: with the SVID that it had, and when that has ended.
func TestRestartedBelieverHeals(t *testing.T) {
	t.Parallel()
	nothing := func(*testing.T, string) {}
	for name, is := range map[string]struct {
		cached bool
		before func(t *testing.T, dir string) // its start
	}{
		"SVID":              {false, nothing},
		"no SVID":           {false, forgetSVID},
		"cache and no SVID": {true, forgetSVID}, // with the picture of the node that lied
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			restartBeliever(t, is.cached, is.before)
		})
	}
}

// forgetSVID does to what an agent kept what the end of its SVID would do.
func forgetSVID(t *testing.T, dir string) {
	path := filepath.Join(dir, "agent.json")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	kept := map[string]any{}
	if err := json.Unmarshal(text, &kept); err != nil {
		t.Fatal(err)
	}
	if list, _ := kept["certificates"].([]any); len(list) == 0 {
		t.Fatal("control: it kept no SVID")
	}
	kept["certificates"] = nil
	if text, err = json.Marshal(kept); err == nil {
		err = os.WriteFile(path, text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func restartBeliever(t *testing.T, cached bool, before func(t *testing.T, dir string)) {
	one := catest.Start(t, catest.Options{})
	liar := one.Join("ca-2", "dc2")
	one.Join("ca-3", "dc1")
	m := evil.Take(t, liar)
	f, dir := &follower{t: t}, t.TempDir()
	text := fmt.Sprintf("trustDomain: banking.example\nname: h1\ndatacenter: dc2\ndataDir: %s\nca: {addresses: [%q], token: %q}\n", dir, one.Addresses()[0], one.AgentToken("h1", "dc2"))
	if cached {
		passphrase := filepath.Join(t.TempDir(), "passphrase")
		if err := os.WriteFile(passphrase, []byte("a passphrase of a test\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		text += fmt.Sprintf("cache: {passphraseFile: %s}\n", passphrase)
	}
	a, stop := startAgent(t, text)
	f.await("it is admitted", 20*time.Second, a.Ready)
	f.await("the node has heard of it", 10*time.Second, func() (err error) {
		liar.Node().Read(func(st *domain.State) {
			if _, ok := st.Agent("h1"); !ok {
				err = errors.New("not yet")
			}
		})
		return err
	})
	stop()
	a, stop = startAgent(t, text) // at the node of its datacenter, whatever was before
	f.await("it compares", 20*time.Second, func() error {
		if is := a.Comparison(); is.Node != "ca-2" || len(is.Heard) != 2 || len(a.State().View.Members) != 3 {
			return fmt.Errorf("%+v", is)
		}
		return nil
	})
	m.Tell(evil.OwnRoot(), evil.Ahead(evil.FarAhead), evil.Alone())
	f.await("control: the lie is believed", 10*time.Second, func() error {
		if len(a.State().View.Members) != 1 {
			return errors.New("not yet")
		}
		return nil
	})
	stop()
	liar.Kill()
	before(t, dir)

	a, stop = startAgent(t, text)
	defer stop()
	took := f.await("it is free", withinPromise, func() error {
		if err := a.Ready(); err != nil {
			return err
		}
		if n := len(a.State().View.Members); n != 3 {
			return fmt.Errorf("it knows %d CA nodes", n)
		}
		for _, root := range a.State().Bundle.X509Authorities() {
			if root.Equal(m.Root.Cert) {
				return errors.New("the attacker's root is in its bundle")
			}
		}
		return nil
	})
	t.Logf("free %v after its start", took.Round(time.Millisecond))
}

func startAgent(t *testing.T, text string) (a *meshagent.Agent, stop func()) {
	t.Helper()
	cfg, err := meshagent.ReadConfig("agent.yaml", strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	if a, err = meshagent.New(cfg, slog.New(slog.NewTextHandler(t.Output(), nil))); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	return a, func() { cancel(); <-ended }
}
