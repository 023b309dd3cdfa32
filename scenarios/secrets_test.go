package scenarios

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/keystore"
	"github.com/entente-mesh/entente/internal/daemon/daemontest"
	"github.com/entente-mesh/entente/internal/peer/peertest"
)

// secret is a private key, or what is as good as one.
type secret struct {
	name  string
	forms map[string][]byte // byte strings of which one stands wherever it was written
}

func secretOf(t *testing.T, name string, key any) secret {
	t.Helper()
	switch k := key.(type) {
	case *ecdsa.PrivateKey:
		scalar, err := k.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		return secret{name, forms(scalar)}
	case *rsa.PrivateKey: // one of the three is enough to know it
		return secret{name, forms(k.D.Bytes(), k.Primes[0].Bytes(), k.Primes[1].Bytes())}
	case []byte:
		return secret{name, forms(k)}
	}
	t.Fatalf("%s is a %T", name, key)
	return secret{}
}

// forms of each part: as it is (so also in DER), in either byte order, in hex, in either
// base64 at any place of a longer text (so also in PEM), as a number, as Go prints bytes,
// and as a list of numbers.
func forms(parts ...[]byte) map[string][]byte {
	forms := map[string][]byte{}
	for i, part := range parts {
		name := func(form string) string { return fmt.Sprintf("%s of part %d", form, i) }
		forms[name("raw")] = part
		backwards := slices.Clone(part)
		slices.Reverse(backwards)
		forms[name("little endian")] = backwards
		forms[name("hex")] = []byte(hex.EncodeToString(part))
		forms[name("HEX")] = []byte(strings.ToUpper(hex.EncodeToString(part)))
		forms[name("decimal")] = []byte(new(big.Int).SetBytes(part).String())
		forms[name("Go's %v")] = []byte(strings.Trim(strings.ReplaceAll(fmt.Sprint(part), " ", ""), "[]"))
		syntax := ""
		for _, b := range part {
			syntax += strconv.FormatUint(uint64(b), 16)
		}
		forms[name("Go's %#v")] = []byte(syntax)
		for shift := range 3 {
			for alphabet, encoding := range map[string]*base64.Encoding{"base64": base64.RawStdEncoding, "base64url": base64.RawURLEncoding} {
				// The characters at both ends depend on what stands beside it.
				text := encoding.EncodeToString(append(make([]byte, shift), part...))
				forms[name(fmt.Sprintf("%s at %d", alphabet, shift))] = []byte(text[2*((shift+1)/2)+shift/2 : len(text)-2])
			}
		}
	}
	return forms
}

// leak is a secret in a file.
type leak struct{ file, secret, form string }

func (l leak) String() string { return l.secret + ", " + l.form }

// solid leaves out what may stand between the characters of a secret: blanks, line ends
// and their escapes in PEM and JSON, colons, and the commas of lists.
func solid(data []byte) []byte {
	data = bytes.ReplaceAll(data, []byte(`\n`), nil)
	return bytes.Map(func(r rune) rune {
		if unicode.IsSpace(r) || r == ':' || r == ',' {
			return -1
		}
		return r
	}, data)
}

// leaks are the forms of secrets that data holds.
func leaks(data []byte, secrets []secret) (found []leak) {
	plain := solid(data)
	noPrefix := bytes.ReplaceAll(plain, []byte("0x"), nil) // of each byte in Go's %#v
	for _, s := range secrets {
		for name, form := range s.forms {
			if bytes.Contains(data, form) || bytes.Contains(plain, form) || bytes.Contains(noPrefix, form) {
				found = append(found, leak{secret: s.name, form: name})
			}
		}
	}
	return found
}

// search looks for secrets in each file at or below dir. A core dump is an error by itself.
func search(t *testing.T, dir string, secrets []secret) (found []leak, files, size int) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		files, size = files+1, size+len(data)
		if strings.HasPrefix(d.Name(), "core") {
			t.Errorf("there is a core dump: %s", path)
		}
		for _, l := range leaks(data, secrets) {
			l.file = path
			found = append(found, l)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found, files, size
}

// encodings are the usual ways in which bytes are written.
func encodings(t *testing.T, b []byte) map[string][]byte {
	list, err := json.Marshal(slices.Collect(func(yield func(int) bool) {
		for _, c := range b {
			if !yield(int(c)) {
				return
			}
		}
	}))
	if err != nil {
		t.Fatal(err)
	}
	return map[string][]byte{
		"raw": b, "base64": []byte(base64.StdEncoding.EncodeToString(b)), "base64url": []byte(base64.URLEncoding.EncodeToString(b)),
		"hex": []byte(hex.EncodeToString(b)), "%v": fmt.Appendf(nil, "%v", b), "% x": fmt.Appendf(nil, "% x", b),
		"%X": fmt.Appendf(nil, "%X", b), "%#v": fmt.Appendf(nil, "%#v", b), "JSON list": list,
	}
}

// TestKeysNowhere is I1: nothing that a CA node, or a verb of it, ever wrote holds a
// private key of a node, in any usual form.
func TestKeysNowhere(t *testing.T) {
	program := binary(t)
	dir := shortTemp(t)
	at := func(name ...string) string { return filepath.Join(append([]string{dir}, name...)...) }
	write := func(path string, data []byte) {
		t.Helper()
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(at("out"), 0o700); err != nil {
		t.Fatal(err)
	}
	const phrase = "a passphrase that is long enough"
	write(at("passphrase"), []byte(phrase+"\n"))

	address := func() string { return daemontest.FreeAddress(t) }
	admin, bundleAt := map[string]string{}, map[string]string{}
	configure := func(name, as, upstream string) string {
		admin[name], bundleAt[name] = address(), address()
		file := at(name + ".yaml")
		write(file, []byte(fmt.Sprintf(`trustDomain: banking.example
name: %s
datacenter: dc1
dataDir: %s
listen: {raft: %q, api: %q, bundle: %q, admin: %q}
socket: %s
keys: {passphraseFile: %s, jwt: RS256}
log: {level: debug, format: json}
%s`, as, at(name), address(), address(), bundleAt[name], admin[name], at(name+".sock"), at("passphrase"), upstream)))
		return file
	}
	outputs := 0
	// do runs a verb and keeps all it prints. The exit code must be the one wanted.
	do := func(want int, args ...string) []byte {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		command := exec.CommandContext(ctx, program, args...)
		var stdout, stderr bytes.Buffer
		command.Stdout, command.Stderr = &stdout, &stderr
		err := command.Run()
		outputs++
		write(at("out", fmt.Sprintf("%03d-%s", outputs, args[0])), append(stdout.Bytes(), stderr.Bytes()...))
		if code := command.ProcessState.ExitCode(); code != want {
			t.Fatalf("%v: exit code %d, want %d (%v):\n%s%s", args, code, want, err, stdout.Bytes(), stderr.Bytes())
		}
		return stdout.Bytes()
	}
	start := func(name string) *exec.Cmd {
		t.Helper()
		log, err := os.OpenFile(at("out", name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer log.Close()
		verb := "ca"
		if name == "agent" {
			verb = "agent"
		}
		// A core would be written into its working directory.
		command := exec.Command("sh", "-c", `ulimit -c unlimited; exec "$@"`, "sh", program, verb, "run", "--config", at(name+".yaml"))
		command.Env = append(os.Environ(), "GOTRACEBACK=crash")
		command.Dir, command.Stdout, command.Stderr = at("out"), log, log
		if err := command.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { command.Process.Kill(); command.Wait() })
		return command
	}
	stop := func(command *exec.Cmd) {
		t.Helper()
		command.Process.Signal(syscall.SIGTERM)
		if err := command.Wait(); err != nil {
			t.Errorf("%v: %v", command.Args, err)
		}
	}
	eventually := func(what string, f func() error) {
		t.Helper()
		for begin := time.Now(); ; time.Sleep(50 * time.Millisecond) {
			err := f()
			if err == nil {
				return
			}
			if time.Since(begin) > time.Minute {
				t.Fatalf("%s: %v", what, err)
			}
		}
	}
	web := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	// get keeps an answer of a node's own listeners.
	get := func(url string) error {
		response, err := web.Get(url)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		outputs++
		write(at("out", fmt.Sprintf("%03d-http", outputs)), body)
		if response.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s: %s", url, response.Status, body)
		}
		return err
	}
	ready := func(name string) {
		t.Helper()
		eventually(name+" is ready", func() error { return get("http://" + admin[name] + "/readyz") })
	}

	// All keys there ever were, by file.
	keys := map[string]crypto.Signer{}
	sealer, err := keystore.PassphraseFile(at("passphrase"))
	if err != nil {
		t.Fatal(err)
	}
	collect := func(names ...string) {
		t.Helper()
		for _, name := range names {
			store, err := keystore.Open(at(name, "keys"), sealer)
			if err != nil {
				t.Fatal(err)
			}
			files, err := store.Names()
			if err != nil {
				t.Fatal(err)
			}
			for _, file := range files {
				if keys[name+"/"+file] == nil {
					key, err := store.Load(file)
					if err != nil {
						continue // deleted meanwhile
					}
					keys[name+"/"+file] = key
				}
			}
		}
	}
	authorities := func(phase, node string) (ids []string) {
		var list struct {
			Authorities []struct {
				Authority struct {
					ID    string `json:"id"`
					Use   string `json:"use"`
					Phase string `json:"phase"`
					Ready bool   `json:"ready"`
				} `json:"authority"`
				Node string `json:"node"`
			} `json:"authorities"`
		}
		text := do(0, "authority", "list", "--json", "--socket", at("one.sock"))
		if err := json.Unmarshal(text, &list); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		for _, a := range list.Authorities {
			if a.Authority.Use == "KEY_USE_X509" && a.Authority.Phase == "AUTHORITY_PHASE_"+phase && a.Node == node && (a.Authority.Ready || phase != "PREPARED") {
				ids = append(ids, a.Authority.ID)
			}
		}
		return ids
	}

	// A node whose authorities a root certifies, from a sealed key.
	root := peertest.NewAuthority(spiffeid.RequireTrustDomainFromString("banking.example"))
	pkcs8, err := x509.MarshalPKCS8PrivateKey(root.Key)
	if err != nil {
		t.Fatal(err)
	}
	write(at("root.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Cert.Raw}))
	write(at("plain"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}))
	one := configure("one", "ca-1", "upstream: {certificate: "+at("root.pem")+", key: "+at("root.key")+"}\n")
	do(0, "ca", "seal", "--config", one, "--out", at("root.key"), at("plain"))
	if err := os.Remove(at("plain")); err != nil {
		t.Fatal(err)
	}
	keys["root"] = root.Key

	do(0, "ca", "init", "--config", one, "--recovery-key-file", at("recovery"))
	first := start("one")
	ready("one")
	two := configure("two", "ca-2", "")
	write(at("token"), do(0, "token", "create", "--node", "ca-2", "--datacenter", "dc1", "--socket", at("one.sock")))
	do(0, "ca", "join", "--config", two, "--token-file", at("token"))
	second := start("two")
	ready("two")
	collect("one", "two")

	// X.509-, JWT- and WIT-SVIDs, through an agent.
	tokenText := do(0, "token", "create", "--agent", "h1", "--datacenter", "dc1", "--address", "127.0.0.1", "--socket", at("one.sock"))
	printed := at("out", fmt.Sprintf("%03d-token", outputs))
	write(at("agent-token"), tokenText)
	do(0, "entry", "create", "entry/self", "--path", "/self", "--host", "h1", "--selector", "unix:uid:"+strconv.Itoa(os.Getuid()), "--socket", at("one.sock"))
	api := fieldOf(t, one, "api: ")
	write(at("agent.yaml"), []byte(fmt.Sprintf("trustDomain: banking.example\nname: h1\ndatacenter: dc1\ndataDir: %s\nca: {addresses: [%q], tokenFile: %s}\nworkloadAPI: {socket: %s, wit: true}\nlog: {level: debug}\n",
		at("agent"), api, at("agent-token"), at("api.sock"))))
	// An inline token is not printed by --check.
	write(at("inline.yaml"), []byte(fmt.Sprintf("trustDomain: banking.example\nname: h1\ndatacenter: dc1\ndataDir: %s\nca: {token: %s}\n", at("agent"), bytes.TrimSpace(tokenText))))
	if out := do(0, "agent", "run", "--config", at("inline.yaml"), "--check"); !bytes.Contains(out, []byte("token: '[redacted]'")) {
		t.Errorf("--check prints %s", out)
	}
	agent := start("agent")
	for _, verb := range [][]string{{"x509"}, {"jwt", "--audience", "ledger"}, {"wit"}, {"bundle"}} {
		eventually("fetch "+verb[0], func() error {
			out, err := exec.Command(program, append(append([]string{"fetch"}, verb...), "--socket", "unix://"+at("api.sock"))...).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
	}
	stop(agent)

	// Rotation, taint and revocation.
	eventually("the next authority may sign", func() error {
		if len(authorities("PREPARED", "ca-1")) == 0 {
			return fmt.Errorf("none is ready")
		}
		return nil
	})
	old := authorities("ACTIVE", "ca-1")
	do(0, "authority", "activate", authorities("PREPARED", "ca-1")[0], "--socket", at("one.sock"))
	collect("one", "two")
	do(0, "authority", "taint", old[0], "--socket", at("one.sock"))
	do(4, "authority", "activate", old[0], "--socket", at("one.sock")) // refused
	do(0, "authority", "revoke", old[0], "--now", "--socket", at("one.sock"))
	collect("one", "two")

	// What operators and other programs read.
	do(0, "snapshot", "save", at("out", "backup.snapshot"), "--socket", at("one.sock"))
	do(0, "snapshot", "inspect", at("out", "backup.snapshot"))
	do(0, "ca", "status", "--json", "--socket", at("one.sock"))
	do(0, "ca", "status", "--socket", at("two.sock"))
	do(0, "node", "list", "--json", "--socket", at("one.sock"))
	do(0, "ca", "bundle", "--wit", "--socket", at("one.sock"))
	do(0, "ca", "run", "--config", one, "--check")
	for _, path := range []string{"/metrics", "/healthz"} {
		if err := get("http://" + admin["one"] + path); err != nil {
			t.Error(err)
		}
	}
	if err := get("https://" + bundleAt["one"] + "/"); err != nil {
		t.Error(err)
	}

	// A crash: stacks in the log, no core.
	second.Process.Signal(syscall.SIGABRT)
	second.Wait()
	if status := second.ProcessState.Sys().(syscall.WaitStatus); !status.Signaled() || status.CoreDump() {
		t.Errorf("a node that was aborted ended with %v, core dumped: %v", second.ProcessState, status.CoreDump())
	}
	stop(first)
	collect("one", "two")

	// Recovery, then restoring, each running for a while.
	do(0, "ca", "recover", "--config", one)
	do(0, "ca", "recover", "--config", one, "--recovery-key-file", at("recovery"))
	first = start("one")
	ready("one")
	stop(first)
	collect("one")
	three := configure("three", "ca-1", "")
	do(0, "snapshot", "restore", "--config", three, "--recovery-key-file", at("recovery"), "--epoch", "7", at("out", "backup.snapshot"))
	third := start("three")
	ready("three")
	stop(third)
	collect("three")

	// Errors about keys: a wrong passphrase, a damaged file, a file in another's place.
	write(at("passphrase"), []byte("another passphrase altogether\n"))
	do(1, "ca", "run", "--config", one)
	write(at("passphrase"), []byte(phrase+"\n"))
	sealed, err := os.ReadFile(at("three", "keys", "node.key"))
	if err != nil {
		t.Fatal(err)
	}
	for _, damaged := range [][]byte{sealed[:len(sealed)/2], append(slices.Clone(sealed), 0)} {
		write(at("three", "keys", "node.key"), damaged)
		do(1, "ca", "run", "--config", three)
	}
	write(at("three", "keys", "node.key"), sealed)

	var secrets []secret
	for name, key := range keys {
		secrets = append(secrets, secretOf(t, name, key))
	}
	recovery, err := os.ReadFile(at("recovery"))
	if err != nil {
		t.Fatal(err)
	}
	recoveryKey, err := ca.ParseRecoveryKey(strings.TrimSpace(string(recovery)))
	if err != nil {
		t.Fatal(err)
	}
	secrets = append(secrets, secretOf(t, "recovery key", []byte(recoveryKey.Seed)), secretOf(t, "passphrase", []byte(phrase)))
	joinToken, err := ca.ParseToken(strings.TrimSpace(string(tokenText)))
	if err != nil {
		t.Fatal(err)
	}
	secrets = append(secrets, secretOf(t, "join token", []byte(joinToken.Seed)))
	if len(keys) < 14 { // two nodes' own, three uses each, two of most, and those that came later
		t.Errorf("only %d keys are looked for", len(keys))
	}

	found, searched, size := search(t, dir, secrets)
	for _, leak := range found {
		switch {
		case leak.file == at("passphrase") && leak.secret == "passphrase", leak.file == at("recovery") && leak.secret == "recovery key",
			(leak.file == at("agent-token") || leak.file == at("inline.yaml")) && leak.secret == "join token": // where they belong
		case leak.file == printed && leak.secret == "join token": // by the verb that made it
		default:
			t.Errorf("%s holds %s", leak.file, leak)
		}
	}
	t.Logf("%d secrets in %d files, %d KiB: nowhere", len(secrets), searched, size>>10)

	// Controls. What is written where it belongs is found there, so that the search reads
	// these files and knows these secrets.
	for file, secret := range map[string]string{at("passphrase"): "passphrase", at("recovery"): "recovery key", at("agent-token"): "join token", printed: "join token"} {
		if !slices.ContainsFunc(found, func(l leak) bool { return l.file == file && l.secret == secret }) {
			t.Errorf("control: %s is not found in %s", secret, file)
		}
	}
	// Each secret is planted in each form, among what the nodes wrote: the same search must
	// find it in that file, in that form.
	planted := map[string]leak{}
	plant := func(secret, form string, text []byte) {
		file := at("out", fmt.Sprintf("planted-%04d.log", len(planted)))
		write(file, slices.Concat([]byte("time=2026-01-01T00:00:00Z level=INFO msg=\"before\" value="), text, []byte("\nafter=1\n")))
		planted[file] = leak{file, secret, form}
	}
	for _, s := range secrets {
		for form, text := range s.forms {
			plant(s.name, form, text)
		}
	}
	for name, key := range keys {
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		text := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
		for _, written := range encodings(t, der) {
			plant(name, "", written)
		}
		plant(name, "", text)
		escaped, _ := json.Marshal(string(text))
		plant(name, "", escaped)
		// As a structure that is printed with all its fields.
		plant(name, "", fmt.Appendf(nil, "%+v", key))
		plant(name, "", fmt.Appendf(nil, "%#v", key))
	}
	for name, seed := range map[string][]byte{"recovery key": recoveryKey.Seed, "join token": joinToken.Seed, "passphrase": []byte(phrase)} {
		for _, written := range encodings(t, seed) {
			plant(name, "", written)
		}
	}
	plant("join token", "", bytes.TrimSpace(tokenText))
	plant("recovery key", "", bytes.TrimSpace(recovery))
	plant("passphrase", "", fmt.Appendf(nil, "%q", phrase))
	found, _, _ = search(t, at("out"), secrets)
	for file, want := range planted {
		if !slices.ContainsFunc(found, func(l leak) bool {
			return l.file == file && l.secret == want.secret && (want.form == "" || l.form == want.form)
		}) {
			text, _ := os.ReadFile(file)
			t.Errorf("control: %s was planted and is not found: %.200q", want, text)
		}
		os.Remove(file)
	}
	t.Logf("%d planted forms are found", len(planted))
	plain, err := keystore.Open(at("dev"), keystore.Plain())
	if err != nil {
		t.Fatal(err)
	}
	key, err := plain.Create("node")
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.ReadFile(at("dev", "node.key"))
	if err != nil || len(leaks(file, []secret{secretOf(t, "dev", key)})) == 0 {
		t.Errorf("control: the key of a development node is not found in its file: %v", err)
	}
	noise := make([]byte, 1<<20)
	rand.Read(noise)
	if found := leaks(noise, secrets); len(found) > 0 {
		t.Errorf("control: noise holds %v", found)
	}
}

// fieldOf is a quoted value of a configuration that this test wrote.
func fieldOf(t *testing.T, file, key string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), key+`"`)
	value, _, ok := strings.Cut(rest, `"`)
	if !ok {
		t.Fatalf("%s has no %q", file, key)
	}
	return value
}
