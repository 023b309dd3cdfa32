package meshagent

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/client"
)

func passphrase(t *testing.T, phrase string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "passphrase")
	if err := os.WriteFile(path, []byte(phrase), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// An agent that is restarted while no CA node can be reached has valid SVIDs at once,
// the same ones, and renews them when there is a CA again. Without the cache it has
// none; what somebody changed, or the passphrase does not open, is not believed.
func TestCache(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply(serviceYAML("accounts", self()))
	dir, phrase := t.TempDir(), passphrase(t, "a passphrase for the cache")
	lines := []string{"dataDir: " + dir, "cache: {passphraseFile: " + phrase + "}", "workloadAPI: {wit: true}"}
	agent := startAgent(t, configure(t, append(lines, "ca: {token: "+c.AgentToken("h1", "dc1")+"}")...))
	witHeld := func(a *Agent) error {
		if identity, ok := a.State().Service("accounts"); !ok || identity.WIT == nil {
			return errors.New("no WIT-SVID")
		}
		return nil
	}
	eventually(t, "ready", agent.Ready)
	eventually(t, "WIT-SVID", func() error { return witHeld(agent.Agent) })
	before, err := agent.SVIDs("service/accounts").GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.stop(); err != nil {
		t.Fatal(err)
	}
	address := c.Addresses()[0]
	lines = append(lines, "ca: {addresses: ['"+address+"']}")
	c.Stop()

	path := filepath.Join(dir, cacheFile)
	sealed, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if info, _ := os.Stat(path); info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}

	t.Run("systemd credential", func(t *testing.T) {
		credentials := filepath.Dir(phrase)
		t.Setenv("CREDENTIALS_DIRECTORY", credentials)
		cfg := configure(t, "dataDir: "+dir, "cache: {systemdCredential: passphrase}", "workloadAPI: {wit: true}")
		if kept, err := mustOpen(t, cfg).read(); err != nil || len(kept.GetPicture()) == 0 { // the same passphrase
			t.Errorf("%v", err)
		}
		cfg.Cache.SystemdCredential = "other"
		if _, err := openCache(cfg, slog.New(slog.DiscardHandler), nil, nil); err == nil || !strings.Contains(err.Error(), "LoadCredentialEncrypted=other:FILE") {
			t.Errorf("not loaded: %v", err)
		}
		if err := os.WriteFile(filepath.Join(credentials, "other"), []byte("not the same passphrase"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := mustOpen(t, cfg).read(); err == nil {
			t.Error("another passphrase opens it")
		}
	})

	t.Run("sealed", func(t *testing.T) {
		key, err := x509.MarshalPKCS8PrivateKey(before.PrivateKey)
		if err != nil {
			t.Fatal(err)
		}
		scalar := key[36:68] // of P-256 in PKCS #8
		if bytes.Contains(sealed, scalar) || bytes.Contains(sealed, before.Certificates[0].Raw) {
			t.Error("it can be read without the passphrase")
		}
		kept, err := (&cache{path: path, sealer: mustOpen(t, configure(t, lines...)).sealer}).read()
		if err != nil {
			t.Fatal(err)
		}
		if plain, _ := proto.Marshal(kept); !bytes.Contains(plain, scalar) || !bytes.Contains(plain, before.Certificates[0].Raw) {
			t.Error("control: nor with it")
		}
	})
	t.Run("without a CA", func(t *testing.T) {
		agent, err := New(configure(t, lines...), nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := agent.Ready(); err != nil {
			t.Fatal(err)
		}
		svid, err := agent.SVIDs("service/accounts").GetX509SVID()
		if err != nil || !svid.Certificates[0].Equal(before.Certificates[0]) {
			t.Errorf("%v %v", svid, err)
		}
		if err := witHeld(agent); err != nil {
			t.Error(err)
		}
	})
	refused := []struct {
		name  string
		file  []byte
		lines []string
	}{
		{"changed", flip(sealed), lines},
		{"cut", sealed[:len(sealed)-1], lines},
		{"no cache", sealed, append(lines[:1:1], lines[2:]...)},
		{"other passphrase", sealed, append([]string{lines[0], "cache: {passphraseFile: " + passphrase(t, "not the same passphrase") + "}"}, lines[2:]...)},
	}
	for _, test := range refused {
		t.Run(test.name, func(t *testing.T) {
			if err := os.WriteFile(path, test.file, 0o600); err != nil {
				t.Fatal(err)
			}
			agent, err := New(configure(t, test.lines...), nil)
			if err != nil {
				t.Fatal(err)
			}
			if agent.State().Ready || len(agent.State().Identities) > 0 {
				t.Error("it was taken up")
			}
		})
	}
	if err := os.WriteFile(path, sealed, 0o600); err != nil {
		t.Fatal(err)
	}

	t.Run("the CA is back", func(t *testing.T) {
		agent := startAgent(t, configure(t, lines...))
		c.Restart()
		c.Apply(serviceYAML("accounts", self()+"\nhint: changed"))
		eventually(t, "the change", func() error {
			identity, ok := agent.State().Service("accounts")
			if !ok || identity.Entry.GetHint() != "changed" || bytes.Equal(identity.SVID.Certificates[0], before.Certificates[0].Raw) {
				return errors.New("not yet")
			}
			return nil
		})
	})
}

func mustOpen(t *testing.T, cfg *Config) *cache {
	t.Helper()
	c, err := openCache(cfg, slog.New(slog.DiscardHandler), nil, nil)
	if err != nil || c == nil {
		t.Fatal(c, err)
	}
	return c
}

func flip(data []byte) []byte {
	other := bytes.Clone(data)
	other[len(other)/2] ^= 1
	return other
}

// What was kept is not renewed at once, and not later than it would have been; what has
// ended meanwhile, or was signed for what the entry is no longer, is signed anew.
func TestCachedSVIDsAreRenewedInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeCA(time.Hour)
		f.paths["accounts"], f.paths["web"] = "/accounts", "/web"
		a := newAgent(t, f)
		hold(a, f, entry("accounts", "/accounts", 1), entry("web", "/web", 1))
		accounts, _ := a.State().Identity("accounts")
		a.entries.renewX509(t.Context(), []*slot{{entryID: "accounts", id: accounts.ID, record: accounts.record}})
		first := serial(a, "accounts")
		stop := background(t, a.entries.keepX509)
		synctest.Wait()
		if f.count("accounts") != 1 || f.count("web") != 1 {
			t.Errorf("signed %d and %d times, want the one that was missing", f.count("accounts"), f.count("web"))
		}
		time.Sleep(36 * time.Minute)
		if serial(a, "accounts") == first {
			t.Error("it was not renewed after half of its life")
		}
		stop()
	})
}

// The disk has what changed last, also when it changed while the agent was stopping;
// nothing is written while nothing changes.
func TestCacheIsWritten(t *testing.T) {
	f := newFakeCA(time.Hour)
	f.paths["accounts"] = "/accounts"
	a := newAgent(t, f)
	a.cache = mustOpen(t, &Config{DataDir: t.TempDir(), Cache: CacheConfig{PassphraseFile: passphrase(t, "a passphrase for the cache")}})
	var err error
	if a.cache.client, err = client.New(client.Config{TrustDomain: bank, Addresses: []string{"127.0.0.1:1"}}); err != nil {
		t.Fatal(err)
	}
	a.cache.store = a.store
	hold(a, f, entry("accounts", "/accounts", 7))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- a.cache.run(ctx) }()
	eventually(t, "written", func() error { _, err := os.Stat(a.cache.path); return err })
	accounts, _ := a.State().Identity("accounts")
	a.entries.renewX509(t.Context(), []*slot{{entryID: "accounts", id: accounts.ID, record: accounts.record}})
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	kept, err := a.cache.read()
	if err != nil || len(kept.GetX509()) != 1 || kept.GetX509()[0].GetEntryRevision() != 7 {
		t.Fatalf("%v %v", kept, err)
	}
	info, _ := os.Stat(a.cache.path)
	if err := a.cache.update(a.State()); err != nil {
		t.Fatal(err)
	}
	if again, _ := os.Stat(a.cache.path); !os.SameFile(info, again) {
		t.Error("it was written again although nothing has changed")
	}
}
