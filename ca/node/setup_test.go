package node_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"flag"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/node"
	"github.com/entente-mesh/entente/internal/peer"
)

func TestMain(m *testing.M) {
	_ = flag.Set("test.parallel", "5") // they wait more than they compute
	// Raft may stop without a word on a transfer of leadership that was under way.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/entente-mesh/entente/ca/replica.(*Replica).handOver.func1"))
}

const minimal = `trustDomain: banking.example
name: ca-1
datacenter: dc1
dataDir: /var/lib/entente
listen:
  raft: 10.0.0.1:7000
  api: 10.0.0.1:7001
keys:
  passphraseFile: /etc/entente/passphrase
`

func TestReadConfig(t *testing.T) {
	cfg, err := node.ReadConfig("ca.yaml", strings.NewReader(minimal))
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Advertise.Raft != "10.0.0.1:7000" || cfg.Advertise.API != "10.0.0.1:7001" || cfg.Socket != "/var/lib/entente/admin.sock" {
		t.Errorf("defaults: %+v", cfg)
	}
	dev := strings.NewReplacer("10.0.0.1", "127.1.1.1", "passphraseFile: /etc/entente/passphrase", "insecureDev: true").Replace(minimal)
	if cfg, err := node.ReadConfig("ca.yaml", strings.NewReader(dev+"lifetimes: {x509SVID: 16s, phase: 1h}\n")); err != nil || cfg.Lifetimes.X509SVID != 16*time.Second {
		t.Errorf("for development: %v", err)
	}
	tests := []struct {
		name, old, new string
		want           []string
	}{
		{"unknown key", "datacenter:", "datacentre:", []string{"ca.yaml:3", `"datacenter"`}},
		{"missing", "name: ca-1\n", "", []string{"ca.yaml", "name"}},
		{"no label", "name: ca-1", "name: CA_1", []string{"ca.yaml:2", "name"}},
		{"no trust domain", "banking.example", "spiffe://banking.example", []string{"ca.yaml:1", "trustDomain"}},
		{"a trust domain that no certificate can hold", "banking.example", "banking..example", []string{"ca.yaml:1", "two in a row"}},
		{"no address", "raft: 10.0.0.1:7000", "raft: 10.0.0.1", []string{"ca.yaml:6", "listen.raft"}},
		{"nobody can dial it", "api: 10.0.0.1:7001", "api: 0.0.0.0:7001", []string{"advertise.api", "set advertise"}},
		{"no keys", "  passphraseFile: /etc/entente/passphrase\n", "  insecureDev: false\n", []string{"ca.yaml:8", "passphraseFile"}},
		{"unsealed beyond loopback", "passphraseFile: /etc/entente/passphrase", "insecureDev: true", []string{"ca.yaml:6", "loopback"}},
		{"lifetimes", "keys:", "lifetimes: {x509SVID: 72h}\nkeys:", []string{"ca.yaml:8", "72h"}},
		{"lifetime under a second", "keys:", "lifetimes: {jwtSVID: 900ms}\nkeys:", []string{"ca.yaml:8", "jwtSVID", "900ms"}},
		{"lifetime of more than 32 bits", "keys:", "lifetimes: {x509SVID: 4294970896s}\nkeys:", []string{"ca.yaml:8", "x509SVID", "4294970896s"}},
		{"voters kept", "keys:", "minVoters: 99\nkeys:", []string{"ca.yaml:8", "minVoters"}},
		{"heartbeat", "keys:", "timing: {heartbeat: 1ms}\nkeys:", []string{"ca.yaml:8", "heartbeat"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			_, err := node.ReadConfig("ca.yaml", strings.NewReader(strings.Replace(minimal, test.old, test.new, 1)))
			if err == nil {
				t.Fatal("accepted")
			}
			for _, want := range test.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error does not say %q: %v", want, err)
				}
			}
		})
	}
}

func TestSetupRefuses(t *testing.T) {
	t.Parallel()
	one := catest.Start(t, catest.Options{})
	if err := node.Init(one.Config(), one.KeepRecoveryKey); err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("init over a running node: %v", err)
	}
	if _, err := node.New(catest.Prepare(t, catest.Options{}).Config(), nil, node.Listeners{}); err == nil || !strings.Contains(err.Error(), "init") {
		t.Errorf("run without init: %v", err)
	}
	join := func(o catest.Options, token string) error {
		return node.Join(t.Context(), catest.Prepare(t, o).Config(), token)
	}
	named := catest.Options{Name: "ca-2", Datacenter: "dc2"}
	for name, err := range map[string]error{
		"agent's token":        join(named, one.AgentToken("h1", "dc1")),
		"no token":             join(named, "entente-join-nonsense"),
		"another trust domain": join(catest.Options{Name: "ca-2", Datacenter: "dc2", TrustDomain: "trading.example"}, one.NodeToken("ca-2", "dc2")),
	} {
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	// The token is spent by then: what to do is said for either mistake.
	mistaken := join(catest.Options{Name: "ca-9", Datacenter: "dc2"}, one.NodeToken("ca-3", "dc2"))
	if mistaken == nil || !strings.Contains(mistaken.Error(), "repeat with the same token") || !strings.Contains(mistaken.Error(), "entente node remove ca-3") || strings.Count(mistaken.Error(), "join the CA") != 1 {
		t.Errorf("another name: %v", mistaken)
	}

	// One token, one node; the same node may repeat (I9).
	token := one.NodeToken("ca-2", "dc2")
	two := catest.Prepare(t, named)
	for range 2 {
		if err := node.Join(t.Context(), two.Config(), token); err != nil {
			t.Fatal(err)
		}
	}
	if err := join(named, token); err == nil || !strings.Contains(err.Error(), "token-spent") {
		t.Errorf("the token admitted another node: %v", err)
	}
}

// A node whose keys are sealed: nothing on its disk holds a key in the clear (I1).
func TestSealedKeys(t *testing.T) {
	t.Parallel()
	if raced {
		t.Skip("deriving keys from a passphrase is slow on purpose, and far too slow with the race detector")
	}
	one := catest.Prepare(t, catest.Options{})
	cfg := one.Config()
	cfg.Keys = node.Keys{PassphraseFile: filepath.Join(t.TempDir(), "passphrase")}
	if err := os.WriteFile(cfg.Keys.PassphraseFile, []byte("correct horse battery staple"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := node.Init(cfg, func(string) error { return nil }); err != nil {
		t.Fatal(err)
	}
	one.Restart()
	one.WaitReady()
	one.Stop()
	files := 0
	err := filepath.WalkDir(cfg.DataDir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		files++
		// The version and algorithm with which a PKCS#8 P-256 key begins.
		if bytes.Contains(data, []byte("\x02\x01\x00\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01")) {
			t.Errorf("%s holds a private key", path)
		}
		return nil
	})
	if err != nil || files < 3 {
		t.Fatalf("%d files, %v", files, err)
	}
	os.WriteFile(cfg.Keys.PassphraseFile, []byte("another passphrase altogether"), 0o600)
	if _, err := node.New(cfg, nil, node.Listeners{}); err == nil || !strings.Contains(err.Error(), "passphrase does not open") {
		t.Errorf("with another passphrase: %v", err)
	}
}

func TestAdminListener(t *testing.T) {
	t.Parallel()
	one := catest.Start(t, catest.Options{})
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(path string) (int, string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		req, _ := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+one.Node().AdminAddr()+path, nil)
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(body)
	}
	for _, path := range []string{"/healthz", "/readyz"} {
		if code, body := get(path); code != http.StatusOK {
			t.Errorf("%s: %d %s", path, code, body)
		}
	}
	if _, body := get("/metrics"); !strings.Contains(body, "entente_ca_leader 1") || !strings.Contains(body, "entente_ca_signing 1") {
		t.Errorf("metrics: %s", body)
	}
	if code, _ := get("/debug/pprof/"); code != http.StatusNotFound {
		t.Errorf("pprof over TCP: %d", code)
	}
	if info, err := os.Stat(one.Socket()); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket for operators: %v, %v", info, err)
	}
}

// However short SVIDs live, what the node shows is valid at every moment.
// Requirements: 29, 123, 141.
func TestOwnSVIDsAreRenewed(t *testing.T) {
	t.Parallel()
	one := catest.Start(t, catest.Options{Lifetimes: node.Lifetimes{X509SVID: 2 * time.Second}})
	seen := make(map[string]int)
	for begin := time.Now(); time.Since(begin) < 5*time.Second; time.Sleep(50 * time.Millisecond) {
		for name, address := range map[string]string{"bundle endpoint": one.Config().Listen.Bundle, "API": one.Config().Listen.API} {
			conn, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13})
			if err != nil {
				t.Fatal(err)
			}
			chain := conn.ConnectionState().PeerCertificates
			conn.Close()
			if _, err := peer.Verify(chain, one.Bundle(), time.Now()); err != nil {
				t.Fatalf("the %s shows: %v", name, err)
			}
			if serial := name + chain[0].SerialNumber.String(); seen[serial] == 0 {
				seen[serial]++
				seen[name]++
			}
		}
	}
	if seen["bundle endpoint"] < 3 || seen["API"] < 3 {
		t.Errorf("SVIDs shown in 5 s: %d and %d", seen["bundle endpoint"], seen["API"])
	}
}
