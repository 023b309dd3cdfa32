package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/node"
	"github.com/entente-mesh/entente/internal/yamlfile"
	"github.com/entente-mesh/entente/scenarios/process"
)

const trustDomain = "bench.example"

// Who measures is not root, and the memory of a process that holds keys is shown to its
// own user only with this. It costs the process nothing and saves it nothing.
const debuggable = "--debuggable"

// domain is a trust domain of real processes, with the defaults of an installation but
// for the keys, which are not sealed (a passphrase costs a start what it was chosen to), and
// the rates of one entry's tokens and of one source's attestations, since few ask for all here.
type domain struct {
	*bench
	trustDomain string
	dir         string
	number      int // of the domains of this run
	nodes       []*caNode
	agents      []*agent
}

// caNode is one CA node. Its methods are for one goroutine, the admin client for all.
type caNode struct {
	domain  *domain
	name    string
	dir     string
	config  *node.Config
	process *process.Process
	conn    *grpc.ClientConn
	admin   ententev1.AdminClient
}

// domain starts a trust domain with so many CA nodes, all voters. The caller closes it.
func (b *bench) domain(ctx context.Context, voters int) (*domain, error) {
	return b.domainOf(ctx, trustDomain, voters)
}

// domainOf starts a trust domain of this name.
func (b *bench) domainOf(ctx context.Context, name string, voters int) (d *domain, err error) {
	b.domains++
	d = &domain{bench: b, trustDomain: name, number: b.domains, dir: filepath.Join(b.dir, fmt.Sprint(b.domains))}
	defer func() {
		if err != nil {
			d.close()
		}
	}()
	for range voters {
		n, err := d.newNode(ctx)
		if err != nil {
			return d, err
		}
		if len(d.nodes) == 1 {
			_, err = b.entente(ctx, "ca", "init", "--config", n.file(), "--recovery-key-file", filepath.Join(n.dir, "recovery-key"))
		} else {
			err = d.join(ctx, n)
		}
		if err == nil {
			err = n.start(ctx)
		}
		if err != nil {
			return d, err
		}
	}
	return d, d.until(ctx, "all are voters", func(ctx context.Context) error {
		status, err := d.nodes[0].admin.Status(ctx, &ententev1.StatusRequest{})
		if err != nil {
			return err
		}
		for _, m := range status.GetMembers() {
			if !m.GetVoterNow() {
				return fmt.Errorf("%s is no voter yet", m.GetMember().GetName())
			}
		}
		return nil
	})
}

// close ends the processes of the domain.
func (d *domain) close() {
	for _, a := range d.agents {
		a.kill()
	}
	for _, n := range d.nodes {
		n.kill()
	}
	os.RemoveAll(d.dir)
}

func (d *domain) newNode(ctx context.Context) (*caNode, error) {
	n := &caNode{domain: d, name: fmt.Sprintf("ca-%d", len(d.nodes)+1)}
	n.dir = filepath.Join(d.dir, n.name)
	at := func(port int) string {
		return net.JoinHostPort(d.host, fmt.Sprint(10_000+d.number*100+len(d.nodes)*10+port))
	}
	n.config = &node.Config{
		TrustDomain: d.trustDomain, Name: n.name, Datacenter: "dc1",
		DataDir: filepath.Join(n.dir, "data"), Socket: filepath.Join(n.dir, "admin.sock"),
		Listen: node.Listen{Raft: at(0), API: at(1), Bundle: at(2), Admin: at(3)},
		Keys:   node.Keys{InsecureDev: true},
		Limits: node.Limits{TokensPerEntry: yamlfile.Rate{PerSecond: 100_000}, AttestsPerSource: yamlfile.Rate{PerSecond: 100_000}},
	}
	if err := os.MkdirAll(n.dir, 0o700); err != nil {
		return nil, err
	}
	d.nodes = append(d.nodes, n)
	return n, n.configure(ctx)
}

// configure writes the node's file, with what its binary knows.
func (n *caNode) configure(ctx context.Context) error {
	text, err := yamlfile.Marshal(n.config)
	if err == nil {
		err = os.WriteFile(n.file(), text, 0o600)
	}
	if err != nil {
		return err
	}
	_, err = n.domain.entente(ctx, "ca", "run", "--check", "--config", n.file())
	if err == nil {
		return nil
	}
	unknown := false // an older release has no such bound
	for key, rate := range map[string]*yamlfile.Rate{"tokensPerEntry": &n.config.Limits.TokensPerEntry, "attestsPerSource": &n.config.Limits.AttestsPerSource} {
		if strings.Contains(err.Error(), fmt.Sprintf("unknown key %q in limits", key)) {
			*rate, unknown = yamlfile.Rate{}, true
		}
	}
	if !unknown {
		return err
	}
	return n.configure(ctx)
}

func (n *caNode) file() string { return filepath.Join(n.dir, "ca.yaml") }

func (d *domain) join(ctx context.Context, n *caNode) error {
	text, err := d.nodeToken(ctx, n.name)
	if err != nil {
		return err
	}
	token := filepath.Join(n.dir, "token")
	if err := os.WriteFile(token, []byte(text), 0o600); err != nil {
		return err
	}
	_, err = d.entente(ctx, "ca", "join", "--config", n.file(), "--token-file", token)
	return err
}

// entente runs one verb to its end.
func (b *bench) entente(ctx context.Context, args ...string) ([]byte, error) {
	return b.processes.Run(ctx, process.Spec{Name: "entente " + strings.Join(args, " "), Binary: b.exe, Args: args})
}

// start starts the node and waits until it is ready.
func (n *caNode) start(ctx context.Context) (err error) {
	n.process, err = n.domain.processes.Start(process.Spec{
		Name: n.name, Binary: n.domain.exe, Args: []string{"ca", "run", debuggable, "--config", n.file()}, Log: filepath.Join(n.dir, "log"),
	})
	if err != nil {
		return err
	}
	return n.attach(ctx)
}

// attach waits until the process serves, and opens the admin client.
func (n *caNode) attach(ctx context.Context) (err error) {
	if err := ready(ctx, n.process, n.config.Listen.Admin); err != nil {
		return err
	}
	n.conn, err = grpc.NewClient("unix:"+n.config.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64*mib), grpc.MaxCallSendMsgSize(64*mib)))
	if err != nil {
		return err
	}
	n.admin = ententev1.NewAdminClient(n.conn)
	return nil
}

// kill ends the node as a power cut would, and waits until it is gone.
func (n *caNode) kill() {
	if n.conn != nil {
		n.conn.Close()
		n.conn = nil
	}
	end(n.process)
}

func end(p *process.Process) {
	if p != nil {
		p.Kill()
		<-p.Ended()
	}
}

// ready waits until a process says at its admin listener that it serves. It asks every
// few milliseconds, for the time that this takes is measured.
func ready(ctx context.Context, p *process.Process, admin string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	pause := time.NewTicker(3 * time.Millisecond)
	defer pause.Stop()
	var last error
	for {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+admin+"/readyz", nil)
		if err != nil {
			return err
		}
		answer, err := http.DefaultClient.Do(request)
		if err == nil {
			answer.Body.Close()
			if answer.StatusCode == http.StatusOK {
				return nil
			}
			err = fmt.Errorf("/readyz answers %s", answer.Status)
		}
		if ctx.Err() == nil {
			last = err
		}
		select {
		case <-pause.C:
		case <-p.Ended():
			return p.Obituary()
		case <-ctx.Done():
			return fmt.Errorf("%s did not become ready: %w; its log ends:\n%s", p.Name, errors.Join(ctx.Err(), last), p.Tail(8))
		}
	}
}

// until asks every 20 ms until something is so, for two minutes.
func (d *domain) until(ctx context.Context, what string, is func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	pause := time.NewTicker(20 * time.Millisecond)
	defer pause.Stop()
	var why error
	for {
		err := is(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil || why == nil { // else it is only that time is up
			why = err
		}
		select {
		case <-pause.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting until %s: %w", what, why)
		}
		if died := d.processes.Died(); len(died) > 0 {
			return died[0].Obituary()
		}
	}
}

// cpu is the processor time of the node's process.
func (n *caNode) cpu() (time.Duration, error) { return process.CPUOf(n.process.PID()) }

// cpu is the processor time of all processes of the domain.
func (d *domain) cpu() (all time.Duration, err error) {
	var processes []*process.Process
	for _, n := range d.nodes {
		processes = append(processes, n.process)
	}
	for _, a := range d.agents {
		processes = append(processes, a.process)
	}
	for _, p := range processes {
		used, err := process.CPUOf(p.PID())
		if err != nil {
			return 0, err
		}
		all += used
	}
	return all, nil
}

// rss is the resident memory of a process, in bytes.
func rss(p *process.Process) (float64, error) {
	m, err := process.MemoryOf(p.PID())
	return float64(m.RSS), err
}

// change makes changes of entries in one call. One that is refused is an error.
func (n *caNode) change(ctx context.Context, changes ...*statev1.EntryChange) error {
	answer, err := n.admin.ChangeEntries(ctx, &ententev1.ChangeEntriesRequest{Changes: changes})
	if err != nil {
		return err
	}
	for _, r := range answer.GetResults() {
		if r.GetCode() != 0 {
			return fmt.Errorf("entry %s: %s", r.GetId(), r.GetError())
		}
	}
	return nil
}

func create(e *statev1.Entry) *statev1.EntryChange {
	return &statev1.EntryChange{Action: &statev1.EntryChange_Create{Create: e}}
}

func remove(id string) *statev1.EntryChange {
	return &statev1.EntryChange{Action: &statev1.EntryChange_Delete{Delete: id}}
}

// entry is an entry of a usual size on one host, for processes of this user.
func entry(name, host string) *statev1.Entry {
	return &statev1.Entry{
		Id: "entry/" + name, Path: "/ns/payments/sa/" + name, Hosts: []string{host},
		Selectors: []string{fmt.Sprintf("unix:uid:%d", os.Getuid())},
		DnsNames:  []string{name + ".payments.internal"},
	}
}

// createEntries makes many entries, 10,000 to a call as `entente entry create -f` does.
func (n *caNode) createEntries(ctx context.Context, entries []*statev1.Entry) error {
	for part := range slices.Chunk(entries, 10_000) {
		changes := make([]*statev1.EntryChange, len(part))
		for i, e := range part {
			changes[i] = create(e)
		}
		if err := n.change(ctx, changes...); err != nil {
			return err
		}
	}
	return nil
}

// agent is a real agent of a host.
type agent struct {
	domain      *domain
	name        string
	socket      string // Workload API
	adminSocket string
	listen      string // admin listener
	process     *process.Process
}

// agent admits a host and starts its agent, without a sidecar.
func (d *domain) agent(ctx context.Context, name string) (*agent, error) {
	return d.agentWith(ctx, name, "")
}

// agentWith starts one with these lines in its configuration, too.
func (d *domain) agentWith(ctx context.Context, name, lines string) (*agent, error) {
	token, err := d.token(ctx, name)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(d.dir, name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	a := &agent{
		domain: d, name: name, socket: filepath.Join(dir, "api.sock"), adminSocket: filepath.Join(dir, "admin.sock"),
		listen: net.JoinHostPort(d.host, fmt.Sprint(10_000+d.number*100+50+len(d.agents))),
	}
	config := filepath.Join(dir, "agent.yaml")
	text := fmt.Sprintf("trustDomain: %s\nname: %s\ndatacenter: dc1\ndataDir: %s\nca: {token: %s}\nworkloadAPI: {socket: %s}\nadmin: {listen: %q, socket: %s}\n%s",
		d.trustDomain, name, filepath.Join(dir, "data"), token, a.socket, a.listen, a.adminSocket, lines)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	d.agents = append(d.agents, a)
	return a, a.start(ctx)
}

// start starts the agent's process, also again after kill.
func (a *agent) start(ctx context.Context) (err error) {
	dir := filepath.Join(a.domain.dir, a.name)
	a.process, err = a.domain.processes.Start(process.Spec{
		Name: "agent " + a.name, Binary: a.domain.exe, Args: []string{"agent", "run", debuggable, "--config", filepath.Join(dir, "agent.yaml")}, Log: filepath.Join(dir, "log"),
	})
	if err != nil {
		return err
	}
	return ready(ctx, a.process, a.listen)
}

func (a *agent) kill() { end(a.process) }

// token makes a join token for a host.
func (d *domain) token(ctx context.Context, host string) (string, error) {
	made, err := d.nodes[0].admin.CreateToken(ctx, &ententev1.CreateTokenRequest{
		Agent:      &statev1.AgentGrant{Name: host, Datacenter: "dc1", Addresses: []string{d.host}},
		TtlSeconds: 3600,
	})
	return made.GetToken(), err
}

// nodeToken makes a join token for a CA node.
func (d *domain) nodeToken(ctx context.Context, name string) (string, error) {
	made, err := d.nodes[0].admin.CreateToken(ctx, &ententev1.CreateTokenRequest{
		Node: &statev1.NodeGrant{Name: name, Datacenter: "dc1", Voter: true, Signing: true},
	})
	return made.GetToken(), err
}
