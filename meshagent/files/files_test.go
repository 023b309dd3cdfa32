package files

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"

	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/node"
	"github.com/entente-mesh/entente/federation/bundle"
	"github.com/entente-mesh/entente/internal/jwtsvid"
	"github.com/entente-mesh/entente/meshagent"
)

func service(name, spec string) string {
	return "apiVersion: entente/v1\nkind: Service\nmetadata: {name: " + name + ", owner: team}\nspec: {" + spec + "}\n---\n"
}

func mine() string { return fmt.Sprintf("run: {uid: %d, hosts: [h1]}", os.Getuid()) }

// start runs an agent with these files.
func start(t *testing.T, c *catest.CA, files string) *meshagent.Agent {
	t.Helper()
	cfg, err := meshagent.ReadConfig("agent.yaml", strings.NewReader(fmt.Sprintf(
		"trustDomain: banking.example\nname: h1\ndatacenter: dc1\ndataDir: %s\nca: {token: %s}\nfiles:\n%s",
		filepath.Join(t.TempDir(), "data"), c.AgentToken("h1", "dc1"), files)))
	if err != nil {
		t.Fatal(err)
	}
	agent, err := meshagent.New(cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- agent.Run(ctx, meshagent.Door{Name: "files", Run: New(agent, nil).Run}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return agent
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

// serial reads a pair and says which one it is.
func serial(certFile, keyFile string) (string, error) {
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return "", err
	}
	return pair.Leaf.URIs[0].String() + " " + pair.Leaf.SerialNumber.String(), nil
}

func TestFiles(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	other := catest.Start(t, catest.Options{TrustDomain: "trading.example"})
	c.Relate(other)
	c.Apply(service("web", mine()))
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	// What stood there is replaced whole, a link not followed.
	if err := os.WriteFile(at("elsewhere"), []byte("keep"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(at("elsewhere"), at("web.pem")); err != nil {
		t.Fatal(err)
	}
	owner := ""
	if os.Getuid() == 0 {
		owner = ", owner: \"0\", group: \"4712\""
	}
	start(t, c, fmt.Sprintf("- {service: web, certificate: %s, key: %s, combined: %s, bundle: %s, bundleMap: %s, mode: 0640%s, after: {command: [sh, -c, 'echo x >> %s']}}\n",
		at("web.pem"), at("web.key"), at("both.pem"), at("ca.pem"), at("map.json"), owner, at("told")))
	told := func(n int) func() error {
		return func() error {
			text, err := os.ReadFile(at("told"))
			if err != nil {
				return err
			}
			if got := strings.Count(string(text), "x"); got != n {
				return fmt.Errorf("told %d times, not %d", got, n)
			}
			return nil
		}
	}
	eventually(t, told(1))

	first, err := serial(at("web.pem"), at("web.key"))
	if err != nil || !strings.HasPrefix(first, "spiffe://banking.example/web ") {
		t.Fatalf("%s %v", first, err)
	}
	if both, err := serial(at("both.pem"), at("both.pem")); err != nil || both != first {
		t.Errorf("combined: %s %v", both, err)
	}
	pem, _ := os.ReadFile(at("ca.pem"))
	if b, err := x509bundle.Parse(c.TrustDomain(), pem); err != nil || !b.Equal(c.Bundle()) {
		t.Errorf("bundle: %v", err)
	}
	var all struct {
		Domains map[string]json.RawMessage `json:"trust_domains"`
	}
	text, _ := os.ReadFile(at("map.json"))
	if err := json.Unmarshal(text, &all); err != nil || len(all.Domains) != 1 {
		t.Fatalf("bundle map: %s %v", text, err)
	}
	if b, skipped, err := bundle.Parse(c.TrustDomain(), all.Domains["banking.example"]); err != nil || len(skipped) > 0 || !b.X509Bundle().Equal(c.Bundle()) {
		t.Errorf("bundle map: %v %v", skipped, err)
	}
	for name, mode := range map[string]fs.FileMode{"web.pem": 0o644, "web.key": 0o640, "both.pem": 0o640, "ca.pem": 0o644, "map.json": 0o644} {
		info, err := os.Lstat(at(name))
		if err != nil || info.Mode() != mode {
			t.Errorf("%s: %v %v", name, info.Mode(), err)
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok && os.Getuid() == 0 && st.Gid != 4712 {
			t.Errorf("%s: group %d", name, st.Gid)
		}
	}
	if kept, _ := os.ReadFile(at("elsewhere")); string(kept) != "keep" {
		t.Error("a link was followed")
	}
	names, _ := os.ReadDir(dir)
	if i := slices.IndexFunc(names, func(e fs.DirEntry) bool { return strings.HasPrefix(e.Name(), ".") }); i >= 0 {
		t.Errorf("left behind: %s", names[i].Name())
	}

	c.Apply(service("web", mine()+", ttl: {x509: 1h}"))
	eventually(t, told(2))
	if second, err := serial(at("web.pem"), at("web.key")); err != nil || second == first {
		t.Errorf("renewed: %s %v", second, err)
	}
	// The entry goes; what was written stays, and nobody is told.
	c.Apply(service("web", "run: {uid: 4711, hosts: [elsewhere]}"))
	time.Sleep(100 * time.Millisecond)
	if err := told(2)(); err != nil {
		t.Error(err)
	}
	if _, err := serial(at("web.pem"), at("web.key")); err != nil {
		t.Error(err)
	}
}

// The bundle map of an entry that federates has every trust domain by itself.
// Requirements: 109.
func TestBundleMapOfSeveral(t *testing.T) {
	var bundles []*x509bundle.Bundle
	for _, name := range []string{"banking.example", "trading.example"} {
		c := catest.Start(t, catest.Options{TrustDomain: name})
		bundles = append(bundles, c.Bundle())
	}
	text, err := bundleMap(bundles[0], bundles[1:])
	if err != nil {
		t.Fatal(err)
	}
	var all struct {
		Domains map[string]json.RawMessage `json:"trust_domains"`
	}
	if err := json.Unmarshal(text, &all); err != nil || len(all.Domains) != 2 {
		t.Fatalf("%s %v", text, err)
	}
	for _, want := range bundles {
		b, _, err := bundle.Parse(want.TrustDomain(), all.Domains[want.TrustDomain().Name()])
		if err != nil || !b.X509Bundle().Equal(want) {
			t.Errorf("%s: %v", want.TrustDomain(), err)
		}
	}
	if again, _ := bundleMap(bundles[0], bundles[1:]); !bytes.Equal(again, text) {
		t.Error("the same bundles gave other bytes")
	}
	if _, err := bundleMap(bundles[0], bundles[:1]); err == nil {
		t.Error("one trust domain twice was written")
	}
}

// A command that fails is tried again, and so is a directory that is not there.
func TestTriedAgain(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply(service("web", mine()))
	dir := filepath.Join(t.TempDir(), "later")
	start(t, c, fmt.Sprintf("- {service: web, combined: %s, after: {command: [sh, -c, 'test -e %s && touch %s']}}\n",
		dir+"/both.pem", dir+"/ready", dir+"/told"))
	time.Sleep(50 * time.Millisecond)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { _, err := os.Stat(dir + "/both.pem"); return err })
	if err := os.WriteFile(dir+"/ready", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { _, err := os.Stat(dir + "/told"); return err })
}

// The key is not handed to a user whom the entry does not name.
func TestKeyGoesToTheEntrysUser(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to hand files to other users")
	}
	c := catest.Start(t, catest.Options{})
	c.Apply(service("web", "run: {uid: 4711, hosts: [h1]}"))
	dir := t.TempDir()
	agent := start(t, c, fmt.Sprintf("- {service: web, combined: %s/good.pem, owner: \"4711\"}\n- {service: web, combined: %s/bad.pem, owner: \"4713\"}\n- {service: web, bundle: %s/public.pem, owner: \"4713\"}\n", dir, dir, dir))
	for _, name := range []string{"good.pem", "public.pem"} {
		eventually(t, func() error { _, err := os.Stat(filepath.Join(dir, name)); return err })
	}
	if _, err := os.Stat(filepath.Join(dir, "bad.pem")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("another user's file: %v", err)
	}
	identity, _ := agent.State().Service("web")
	bad := &target{config: &agent.Config().Files[1]}
	if _, err := bad.owner(identity); err == nil || !strings.Contains(err.Error(), "4713") || !strings.Contains(err.Error(), "files.owner") {
		t.Errorf("%v", err)
	}
}

func TestSignal(t *testing.T) {
	dir := t.TempDir()
	pid := filepath.Join(dir, "pid")
	if err := signal(pid, syscall.SIGHUP, nil); err != nil {
		t.Errorf("no pid file: %v", err)
	}
	for _, bad := range []string{"", "x", "-1", "0", "1", "99999999999999999999", strings.Repeat("1", 1000)} {
		if err := os.WriteFile(pid, []byte(bad), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := signal(pid, syscall.Signal(0), nil); err == nil {
			t.Errorf("%.20q was taken", bad)
		}
	}
	if err := os.WriteFile(pid, []byte(strconv.Itoa(os.Getpid())+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := signal(pid, syscall.Signal(0), nil); err != nil {
		t.Errorf("own process: %v", err)
	}
	if err := os.WriteFile(pid, []byte("4194000\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := signal(pid, syscall.SIGHUP, nil); err != nil {
		t.Errorf("a process that has ended: %v", err)
	}
}

// All of a set is put in place or none, and readers see whole files only.
func TestWriteIsAllOrNone(t *testing.T) {
	dir := t.TempDir()
	first, second := filepath.Join(dir, "a"), filepath.Join(dir, "gone", "b")
	if err := write([]file{{first, 0o600, []byte("x")}, {second, 0o600, []byte("y")}}, ids{-1, -1}); err == nil {
		t.Fatal("a missing directory was no error")
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("left behind: %v", entries)
	}
	one, two := bytes.Repeat([]byte("1"), 1<<16), bytes.Repeat([]byte("2"), 1<<16)
	if err := write([]file{{first, 0o600, one}}, ids{-1, -1}); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		for i := range 50 {
			if err := write([]file{{first, 0o600, [][]byte{two, one}[i%2]}}, ids{-1, -1}); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	for {
		got, err := os.ReadFile(first)
		if err != nil || !bytes.Equal(got, one) && !bytes.Equal(got, two) {
			t.Fatalf("read %d bytes: %v", len(got), err)
		}
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			return
		default:
		}
	}
}

// A JWT-SVID stands in a file of its own, and is another one before it ends; the software is told.
func TestJWTFiles(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	c.Apply(service("web", mine()+", ttl: {jwt: 5s}"))
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	agent := start(t, c, fmt.Sprintf("- {service: web, jwts: [{path: %s, audience: [vault]}, {path: %s, audience: [a, b]}], after: {command: [sh, -c, 'echo x >> %s']}}\n", at("vault"), at("ab"), at("told")))
	read := func(name string, audience ...string) string {
		text, err := os.ReadFile(at(name))
		if err != nil {
			t.Fatal(err)
		}
		svid, err := jwtsvid.Verify(string(text), agent.State().JWTKeys(nil), audience[0], time.Now(), 0)
		if err != nil || svid.ID.String() != "spiffe://banking.example/web" || !slices.Equal(svid.Audience, audience) {
			t.Fatalf("%s: %v %v", name, svid, err)
		}
		return string(text)
	}
	exists := func() error { _, err := os.Stat(at("told")); return err }
	eventually(t, exists)
	first := read("vault", "vault")
	read("ab", "a", "b")
	if info, err := os.Stat(at("vault")); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v %v", info.Mode(), err)
	}
	eventually(t, func() error {
		if read("vault", "vault") == first {
			return errors.New("not renewed")
		}
		return nil
	})
	eventually(t, func() error {
		if text, _ := os.ReadFile(at("told")); strings.Count(string(text), "x") < 2 {
			return errors.New("not told again")
		}
		return nil
	})
}

// What stands in files when the SVID ends stays there until the CA signs the next one.
func TestEndedFilesStay(t *testing.T) {
	t.Parallel()
	c := catest.Start(t, catest.Options{Lifetimes: node.Lifetimes{X509SVID: 3 * time.Second, AgentSVID: time.Hour}})
	c.Apply(service("web", mine()))
	cert, key := filepath.Join(t.TempDir(), "web.pem"), filepath.Join(t.TempDir(), "web.key")
	agent := start(t, c, fmt.Sprintf("- {service: web, certificate: %s, key: %s}\n", cert, key))
	eventually(t, func() error {
		_, err := serial(cert, key)
		return err
	})
	c.Stop()
	eventually(t, func() error {
		if _, err := agent.SVIDs("service/web").GetX509SVID(); err == nil {
			return errors.New("it has not ended")
		}
		return nil
	})
	ended, err := serial(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	c.Restart()
	c.WaitReady()
	eventually(t, func() error {
		switch now, err := serial(cert, key); {
		case err != nil:
			return err
		case now == ended:
			return errors.New("still what has ended")
		}
		return nil
	})
}
