package wire

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/meshagent"
)

var update = flag.String("update", "", "record what this release says into testdata/`LEVEL`: to be done when a release is made")

const (
	messagesFile   = "messages"         // a line for each: NAME, base64 of the encoding
	descriptorFile = "descriptor.binpb" // google.protobuf.FileDescriptorSet of the same release
	perKind        = 4                  // different messages of a kind that are kept
)

func service(name, spec string) string {
	return "apiVersion: entente/v1\nkind: Service\nmetadata: {name: " + name + "}\nspec: {run: {uid: 1000, hosts: [h1]}" + spec + "}\n---\n"
}

// start runs an agent in the process. It returns when it is ready.
func start(t *testing.T, c *catest.CA, dataDir string) *meshagent.Agent {
	t.Helper()
	cfg, err := meshagent.ReadConfig("agent.yaml", strings.NewReader(fmt.Sprintf(
		"trustDomain: banking.example\nname: h1\ndatacenter: dc1\ndataDir: %s\nca: {token: %s}\nsidecar: {inbound: 127.0.0.1:15008}\n%s",
		dataDir, c.AgentToken("h1", "dc1"), newer)))
	if err != nil {
		t.Fatal(err)
	}
	agent, err := meshagent.New(cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- agent.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	eventually(t, "ready", agent.Ready)
	return agent
}

func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}

// day is what an agent and its CA say to one another: a host is admitted, gets SVIDs, is
// told of changes, reports what it serves, and has its SVIDs issued anew. meanwhile is done in between.
func day(t *testing.T, meanwhile func(*catest.CA)) {
	c := catest.Start(t, catest.Options{})
	c.Apply(service("accounts", ", port: 18080"))
	agent := start(t, c, t.TempDir())
	has := func(entry string) func() error {
		return func() error {
			_, err := agent.SVIDs(entry).GetX509SVID()
			return err
		}
	}
	eventually(t, "accounts", has("service/accounts"))
	tokens(t, agent)
	c.Apply(service("accounts", ", port: 18081") + service("ledger", ""))
	eventually(t, "ledger", has("service/ledger"))
	meanwhile(c)
	eventually(t, "acknowledged", func() error {
		list, err := c.Admin().ListAuthorities(t.Context(), &ententev1.ListAuthoritiesRequest{})
		for _, a := range list.GetAuthorities() {
			if len(a.GetWaitingFor()) > 0 {
				err = errors.Join(err, fmt.Errorf("waits for %v", a.GetWaitingFor()))
			}
		}
		return err
	})
	list, err := c.Admin().ListAuthorities(t.Context(), &ententev1.ListAuthoritiesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	before, err := agent.SVIDs("service/accounts").GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range list.GetAuthorities() { // the one that signed is tainted: all is issued anew
		if id := a.GetAuthority().GetId(); strings.Contains(id, fmt.Sprintf("%x", before.Certificates[0].AuthorityKeyId)) {
			_, err := c.Admin().TaintAuthority(t.Context(), &ententev1.ChangeAuthorityRequest{Id: id})
			if code := status.Code(err); code != codes.OK && code != codes.FailedPrecondition {
				t.Fatal(err)
			}
		}
	}
	c.Apply(service("ledger", ", calls: [accounts]"))
}

// TestRecord writes what the day's messages were. It is no test unless asked.
func TestRecord(t *testing.T) {
	if *update == "" {
		t.Skip("with -update LEVEL")
	}
	var mu sync.Mutex
	kept := map[string][][]byte{}
	record := func(m proto.Message) proto.Message {
		name := string(m.ProtoReflect().Descriptor().FullName())
		if !processes.requests[name] && !processes.responses[name] {
			return m
		}
		encoded, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
		if err != nil {
			t.Error(err)
		}
		mu.Lock()
		defer mu.Unlock()
		if len(kept[name]) < perKind || bytes.Contains(encoded, []byte("ledger")) && len(kept[name]) < 2*perKind {
			if !slices.ContainsFunc(kept[name], func(b []byte) bool { return bytes.Equal(b, encoded) }) {
				kept[name] = append(kept[name], encoded)
			}
		}
		return m
	}
	tap.Store(&record)
	day(t, func(c *catest.CA) { c.Join("ca-2", "dc2") })
	tap.Store(nil)
	mu.Lock()
	defer mu.Unlock()
	var lines []string
	for name, list := range kept {
		for _, encoded := range list {
			lines = append(lines, name+" "+base64.StdEncoding.EncodeToString(encoded))
		}
	}
	slices.SortStableFunc(lines, func(a, b string) int {
		return strings.Compare(strings.Fields(a)[0], strings.Fields(b)[0])
	})
	dir := filepath.Join("testdata", *update)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, messagesFile), []byte(strings.Join(lines, "\n")+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "tool", "-modfile=tools/buf.mod", "buf", "build", "--as-file-descriptor-set", "--exclude-source-info",
		"-o", filepath.Join("scenarios", "wire", dir, descriptorFile))
	build.Dir = "../.."
	build.Env = append(os.Environ(), "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}
