//go:build linux

package netns

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/scenarios/process"
)

// fabric is a router, in a namespace of its own, between the namespaces of the nodes.
type fabric struct {
	t    *testing.T
	name string
}

func (f *fabric) ip(args ...string) {
	f.t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		f.t.Fatalf("NOT RUN: ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

func (f *fabric) space(i int) string   { return fmt.Sprintf("%s-%d", f.name, i) }
func (f *fabric) address(i int) string { return fmt.Sprintf("10.99.%d.2", i) }

func newFabric(t *testing.T, nodes int) *fabric {
	f := &fabric{t: t, name: fmt.Sprintf("et%d", os.Getpid())}
	f.ip("netns", "add", f.name)
	t.Cleanup(func() { exec.Command("ip", "netns", "del", f.name).Run() })
	f.ip("netns", "exec", f.name, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
	for i := 1; i <= nodes; i++ {
		space, out := f.space(i), fmt.Sprintf("r%d", i)
		f.ip("netns", "add", space)
		t.Cleanup(func() { exec.Command("ip", "netns", "del", space).Run() })
		f.ip("-n", f.name, "link", "add", out, "type", "veth", "peer", "name", "eth0", "netns", space)
		f.ip("-n", f.name, "address", "add", fmt.Sprintf("10.99.%d.1/24", i), "dev", out)
		f.ip("-n", f.name, "link", "set", out, "up")
		f.ip("-n", space, "address", "add", f.address(i)+"/24", "dev", "eth0")
		f.ip("-n", space, "link", "set", "eth0", "up")
		f.ip("-n", space, "link", "set", "lo", "up")
		f.ip("-n", space, "route", "add", "default", "via", fmt.Sprintf("10.99.%d.1", i))
	}
	return f
}

// cut lets nothing of from reach to.
func (f *fabric) cut(from, to int) {
	f.ip("-n", f.name, "rule", "add", "iif", fmt.Sprintf("r%d", from), "to", fmt.Sprintf("10.99.%d.0/24", to), "blackhole")
}

func (f *fabric) mend(from, to int) {
	f.ip("-n", f.name, "rule", "del", "iif", fmt.Sprintf("r%d", from), "to", fmt.Sprintf("10.99.%d.0/24", to), "blackhole")
}

// node is one CA node: a process of the real program.
type node struct {
	index         int
	dir, config   string
	spec          process.Spec
	admin         ententev1.AdminClient
	process       *process.Process
	id            string
	supervisor    *process.Supervisor
	communication *grpc.ClientConn
}

type cluster struct {
	*fabric
	nodes []*node
}

func build(t *testing.T, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "entente")
	if out, err := exec.Command("go", "build", "-o", path, "../../cmd/entente").CombinedOutput(); err != nil {
		t.Fatalf("build the program: %v\n%s", err, out)
	}
	return path
}

func newCluster(t *testing.T, size int) *cluster {
	dir, err := os.MkdirTemp("/tmp", "en-") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	c := &cluster{fabric: newFabric(t, size)}
	binary := build(t, dir)
	supervisor := process.New()
	t.Cleanup(supervisor.Close)
	passphrase := filepath.Join(dir, "passphrase")
	if err := os.WriteFile(passphrase, []byte("correct horse battery staple"), 0o600); err != nil {
		t.Fatal(err)
	}
	for i := 1; i <= size; i++ {
		n := &node{index: i, dir: filepath.Join(dir, fmt.Sprint(i)), supervisor: supervisor}
		n.config = n.dir + ".yaml"
		text := fmt.Sprintf("trustDomain: banking.example\nname: ca-%d\ndatacenter: dc%d\ndataDir: %s\nlisten: {raft: \"%s:7000\", api: \"%s:7001\"}\nkeys: {passphraseFile: %s}\naudit: {file: \"off\"}\ntiming: {heartbeat: 250ms}\n",
			i, i, n.dir, c.address(i), c.address(i), passphrase)
		if err := os.WriteFile(n.config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		verb := func(args ...string) process.Spec {
			return process.Spec{Name: fmt.Sprintf("ca-%d", i), Binary: "ip", Log: n.dir + ".log",
				Args: append([]string{"netns", "exec", c.space(i), binary, "ca"}, args...)}
		}
		prepare := verb("init", "--config", n.config, "--recovery-key-file", filepath.Join(dir, "key"))
		if i > 1 {
			resp, err := c.nodes[0].admin.CreateToken(t.Context(), &ententev1.CreateTokenRequest{Node: &statev1.NodeGrant{
				Name: fmt.Sprintf("ca-%d", i), Datacenter: fmt.Sprintf("dc%d", i), Voter: true, Signing: true,
			}})
			if err != nil {
				t.Fatal(err)
			}
			token := n.dir + ".token"
			if err := os.WriteFile(token, []byte(resp.GetToken()), 0o600); err != nil {
				t.Fatal(err)
			}
			prepare = verb("join", "--config", n.config, "--token-file", token)
		}
		if _, err := supervisor.Run(t.Context(), prepare); err != nil {
			t.Fatal(err)
		}
		n.spec = verb("run", "--config", n.config)
		if n.communication, err = grpc.NewClient("unix:"+filepath.Join(n.dir, "admin.sock"), grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { n.communication.Close() })
		n.admin = ententev1.NewAdminClient(n.communication)
		c.nodes = append(c.nodes, n)
		c.start(n)
		c.eventually("ca-"+fmt.Sprint(i)+" votes", func() error {
			s, err := n.status()
			if err != nil {
				return err
			}
			for _, m := range s.GetMembers() {
				if m.GetMember().GetName() == fmt.Sprintf("ca-%d", i) && m.GetVoterNow() {
					n.id = m.GetMember().GetId()
					return nil
				}
			}
			return errors.New("not yet")
		})
	}
	return c
}

func (c *cluster) start(n *node) {
	c.t.Helper()
	var err error
	if n.process, err = n.supervisor.Start(n.spec); err != nil {
		c.t.Fatal(err)
	}
	if err := n.process.Ready(c.t.Context(), func(context.Context) error {
		_, err := n.status()
		return err
	}); err != nil {
		c.t.Fatal(err)
	}
}

func (n *node) status() (*ententev1.StatusResponse, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	return n.admin.Status(ctx, &ententev1.StatusRequest{})
}

func (c *cluster) eventually(what string, f func() error) {
	c.t.Helper()
	for begin := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Since(begin) > 90*time.Second {
			c.t.Fatalf("%s: %v", what, err)
		}
	}
}

// leader is who leads as a majority says.
func (c *cluster) leader() (leader *node) {
	c.t.Helper()
	c.eventually("somebody leads", func() error {
		votes := map[string]int{}
		for _, n := range c.nodes {
			if s, err := n.status(); err == nil && s.GetQuorum() {
				votes[s.GetLeaderId()]++
			}
		}
		for _, n := range c.nodes {
			if votes[n.id] > len(c.nodes)/2 {
				leader = n
				return nil
			}
		}
		return fmt.Errorf("%v", votes)
	})
	return leader
}

func (c *cluster) others(n *node) (rest []*node) {
	for _, m := range c.nodes {
		if m != n {
			rest = append(rest, m)
		}
	}
	return rest
}

// both cuts or mends a node and all others, both ways.
func (c *cluster) both(n *node, do func(from, to int)) {
	for _, m := range c.others(n) {
		do(n.index, m.index)
		do(m.index, n.index)
	}
}

// write changes one record's value. doubt: nobody knows whether it did; a node that says
// that nothing was changed is taken at its word.
func (n *node) write(ctx context.Context, key, value string, revision uint64) (done, doubt bool) {
	resp, err := n.admin.ChangeEntries(ctx, &ententev1.ChangeEntriesRequest{Changes: []*statev1.EntryChange{{
		Action: &statev1.EntryChange_Update{Update: record(key, value)}, IfRevision: revision,
	}}})
	if err != nil || len(resp.GetResults()) != 1 {
		return false, true
	}
	switch r := resp.GetResults()[0]; codes.Code(r.GetCode()) {
	case codes.OK:
		return true, false
	case codes.Aborted: // it is at another revision
		return false, false
	default:
		return false, !strings.Contains(r.GetError(), "nothing was changed")
	}
}

func record(key, value string) *statev1.Entry {
	return &statev1.Entry{Id: "entry/" + key, Path: "/" + key, Hosts: []string{"h"}, Selectors: []string{"unix:uid:1"}, Hint: value}
}

type call struct{ key, old, value string } // old "": whatever it is; value "": a read, of old

// A write sets the value, or only if it was old; only what was done, or may have been, is
// in a history.
var model = porcupine.Model{
	Partition: func(ops []porcupine.Operation) (parts [][]porcupine.Operation) {
		at := map[string]int{}
		for _, op := range ops {
			key := op.Input.(call).key
			i, ok := at[key]
			if !ok {
				i = len(parts)
				at[key], parts = i, append(parts, nil)
			}
			parts[i] = append(parts[i], op)
		}
		return parts
	},
	Init: func() any { return "first" },
	Step: func(state, input, output any) (bool, any) {
		c, have := input.(call), state.(string)
		fits := c.old == "" || c.old == have
		switch {
		case !fits:
			return output == nil, have // in doubt: it was refused
		case c.value == "":
			return true, have
		}
		return true, c.value
	},
}

const (
	keys    = 10
	keyLife = time.Second
)

// Real processes, real sockets, a router that drops: with a leader that is cut off one way
// or both, flaps, is stopped and goes on, or is killed, no write that was acknowledged is
// lost or done twice, and none is acknowledged on a state that is out of date; who has no
// majority says so and still serves what is agreed.
func TestNamespaces(t *testing.T) {
	if testing.Short() {
		t.Skip("real processes are left out with -short")
	}
	if os.Geteuid() != 0 {
		t.Skip("NOT RUN: network namespaces need root")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("NOT RUN: there is no ip command (iproute2)")
	}
	if out, err := exec.Command("ip", "netns", "add", fmt.Sprintf("et%d-try", os.Getpid())).CombinedOutput(); err != nil {
		t.Skipf("NOT RUN: ip netns add: %v: %s", err, out)
	}
	exec.Command("ip", "netns", "del", fmt.Sprintf("et%d-try", os.Getpid())).Run()

	size, rounds := 3, 1
	if os.Getenv("ENTENTE_SOAK") != "" {
		size, rounds = 5, 10
	}
	c := newCluster(t, size)
	c.leader()
	const most = 60 // slots, used again and again
	for slot := range most {
		var changes []*statev1.EntryChange
		for k := range keys {
			changes = append(changes, &statev1.EntryChange{Action: &statev1.EntryChange_Create{Create: record(fmt.Sprintf("k%dx%d", slot, k), "first")}})
		}
		if _, err := c.nodes[0].admin.ChangeEntries(t.Context(), &ententev1.ChangeEntriesRequest{Changes: changes}); err != nil {
			t.Fatal(err)
		}
	}

	began := time.Now()
	var mu sync.Mutex
	var ops []porcupine.Operation
	done, doubted := 0, 0
	note := func(client int, in call, doubt bool, from time.Time) {
		mu.Lock()
		defer mu.Unlock()
		op := porcupine.Operation{ClientId: client, Input: in, Output: true, Call: int64(from.Sub(began)), Return: int64(time.Since(began))}
		if doubt {
			op.ClientId, op.Output, op.Return = -1-len(ops), nil, int64(1000*time.Hour)
			doubted++
		} else {
			done++
		}
		ops = append(ops, op)
	}
	ctx, stop := context.WithCancel(t.Context())
	var clients sync.WaitGroup
	for id := range 6 {
		clients.Go(func() {
			random := rand.New(rand.NewPCG(uint64(id), 1))
			for i := 0; ctx.Err() == nil; i++ {
				time.Sleep(time.Duration(5+random.IntN(30)) * time.Millisecond)
				slot := int(time.Since(began)/keyLife) % most
				n := c.nodes[random.IntN(len(c.nodes))]
				in := call{key: fmt.Sprintf("k%dx%d", slot, random.IntN(keys)), value: fmt.Sprintf("c%dn%d", id, i)}
				limit, cancel := context.WithTimeout(context.Background(), time.Second)
				revision := uint64(0)
				if random.IntN(2) == 0 {
					have, err := n.admin.GetEntry(limit, &ententev1.GetEntryRequest{Id: "entry/" + in.key})
					if err != nil {
						cancel()
						continue
					}
					in.old, revision = have.GetEntry().GetHint(), have.GetEntry().GetRevision()
				}
				from := time.Now()
				wrote, doubt := n.write(limit, in.key, in.value, revision)
				cancel()
				if wrote || doubt {
					note(id, in, doubt, from)
				}
			}
		})
	}

	faults := []struct {
		name string
		do   func()
	}{
		{"one way, out", func() {
			l := c.leader()
			for _, m := range c.others(l) {
				c.cut(l.index, m.index)
			}
			time.Sleep(3 * time.Second)
			for _, m := range c.others(l) {
				c.mend(l.index, m.index)
			}
		}},
		{"one way, in", func() {
			l := c.leader()
			for _, m := range c.others(l) {
				c.cut(m.index, l.index)
			}
			time.Sleep(3 * time.Second)
			for _, m := range c.others(l) {
				c.mend(m.index, l.index)
			}
		}},
		{"full", func() {
			l := c.leader()
			c.both(l, c.cut)
			c.eventually("who is cut off says so", func() error {
				s, err := l.status()
				if err == nil && (s.GetQuorum() || s.GetNoQuorumSince() == 0) {
					err = errors.New("it claims quorum")
				}
				return err
			})
			from := time.Now()
			resp, err := l.admin.ChangeEntries(ctx, &ententev1.ChangeEntriesRequest{Changes: []*statev1.EntryChange{{
				Action: &statev1.EntryChange_Create{Create: record("cutoff", "x")},
			}}})
			if err == nil {
				err = status.Error(codes.Code(resp.GetResults()[0].GetCode()), resp.GetResults()[0].GetError())
			}
			if took := time.Since(from); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "no quorum since") || took > 2*time.Second {
				t.Errorf("a write at who is cut off: after %v: %v", took, err)
			}
			if s, err := l.status(); err != nil || len(s.GetAutonomy()) == 0 {
				t.Errorf("it does not say how long it signs: %v", err)
			}
			if resp, err := l.admin.GetEntry(ctx, &ententev1.GetEntryRequest{Id: "entry/k0x0"}); err != nil || resp.GetEntry() == nil {
				t.Errorf("what is agreed cannot be read there: %v", err)
			}
			c.both(l, c.mend)
		}},
		{"stopped and continued", func() {
			l := c.leader()
			syscall.Kill(l.process.PID(), syscall.SIGSTOP)
			time.Sleep(3 * time.Second)
			syscall.Kill(l.process.PID(), syscall.SIGCONT)
		}},
		{"flapping", func() {
			l := c.leader()
			for range 5 {
				c.both(l, c.cut)
				time.Sleep(200 * time.Millisecond)
				c.both(l, c.mend)
				time.Sleep(200 * time.Millisecond)
			}
		}},
		{"killed", func() {
			l := c.leader()
			l.process.Kill()
			<-l.process.Ended()
			c.leader()
			c.start(l)
		}},
	}
	for range rounds {
		for _, fault := range faults {
			fault.do()
			from := time.Now()
			c.leader()
			mu.Lock()
			was := done
			mu.Unlock()
			c.eventually("writes after: "+fault.name, func() error {
				mu.Lock()
				defer mu.Unlock()
				if done < was+5 {
					return errors.New("not yet")
				}
				return nil
			})
			t.Logf("%-22s writes again %v after it", fault.name, time.Since(from).Round(time.Millisecond))
		}
	}
	stop()
	clients.Wait()

	// Read all of it at every node, when all are at one revision.
	var revision uint64
	c.eventually("all are alike", func() error {
		revision = 0
		for _, n := range c.nodes {
			s, err := n.status()
			if err != nil {
				return err
			}
			if revision != 0 && s.GetRevision() != revision || !s.GetQuorum() {
				return errors.New("not yet")
			}
			revision = s.GetRevision()
		}
		return nil
	})
	for slot := range most {
		for k := range keys {
			in := call{key: fmt.Sprintf("k%dx%d", slot, k)}
			for _, n := range c.nodes {
				resp, err := n.admin.GetEntry(t.Context(), &ententev1.GetEntryRequest{Id: "entry/" + in.key})
				if err != nil {
					t.Fatal(err)
				}
				if hint := resp.GetEntry().GetHint(); in.old != "" && in.old != hint {
					t.Errorf("%s is %q at one node and %q at another", in.key, in.old, hint)
				} else {
					in.old = hint
				}
			}
			note(-1, in, false, time.Now())
		}
	}
	for _, part := range model.Partition(ops) {
		if result := porcupine.CheckOperationsTimeout(model, part, time.Minute); result != porcupine.Ok {
			t.Errorf("%v", result)
			for _, op := range part {
				t.Logf("%+v %v, %v to %v", op.Input, op.Output, time.Duration(op.Call), time.Duration(op.Return))
			}
		}
	}
	// The control: a write that is made to look lost is found.
	lost := ops[len(ops)-1]
	lost.Input = call{key: lost.Input.(call).key, old: "never written"}
	if result := porcupine.CheckOperationsTimeout(model, append(ops[:len(ops)-1:len(ops)-1], lost), time.Minute); result != porcupine.Illegal {
		t.Errorf("a lost write was not found: %v", result)
	}
	t.Logf("%d calls were acknowledged, %d are in doubt; %v", done, doubted, time.Since(began).Round(time.Second))
	if done < 100 {
		t.Error("hardly anything came through: the test sees nothing")
	}
}
