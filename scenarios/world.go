package scenarios

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/encoding/protojson"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/internal/yamlfile"
	"github.com/entente-mesh/entente/meshagent/admin"
	"github.com/entente-mesh/entente/scenarios/platform"
	"github.com/entente-mesh/entente/scenarios/process"
)

// Longest path of a unix socket that every system takes, less the name of ours and
// of the draft that it is made under.
const maxSocketDir = 60

// Many processes share one machine here, and none holds much: small heaps, and one
// thread of Go code for programs that only answer.
var (
	frugal     = []string{"GOGC=50", "GOMEMLIMIT=64MiB"}
	frugalApps = append([]string{"GOMAXPROCS=1"}, frugal...)
)

// world is a running scenario: its processes and files. Close ends and removes all.
type world struct {
	*plan
	binary     string
	supervisor *process.Supervisor
	guard      net.Listener
	remove     []string // directories
	note       string
	users      *users
	verbose    func(format string, args ...any)

	mu        sync.Mutex
	processes map[*unit]*process.Process
}

// newWorld chooses a place for a scenario, and lays out its directory. It starts
// nothing.
func newWorld(spec *Spec, o Options) (*world, error) {
	w := &world{
		supervisor: process.New(),
		processes:  map[*unit]*process.Process{},
		verbose:    func(string, ...any) {},
	}
	if o.Verbose {
		w.verbose = func(format string, args ...any) { fmt.Fprintf(o.Out, "      "+format+"\n", args...) }
	}
	if err := w.prepare(spec, o); err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return w, nil
}

func (w *world) prepare(spec *Spec, o Options) (err error) {
	if w.binary, err = findBinary(o.Binary); err != nil {
		return err
	}
	dir, err := w.makeDir(o.WorkDir)
	if err != nil {
		return err
	}
	sockets := filepath.Join(dir, "s")
	if len(sockets) > maxSocketDir {
		if sockets, err = os.MkdirTemp("/tmp", "entente-"); err != nil {
			return fmt.Errorf("the path %s is too long for unix sockets, and no shorter one can be made: %w", dir, err)
		}
		w.remove = append(w.remove, sockets)
	}
	plan := func(at place) *plan { return newPlan(spec, dir, sockets, at) }
	if w.plan, w.guard, w.note, err = free(plan, o.OneAddress); err != nil {
		return err
	}
	return w.layOut()
}

func findBinary(given string) (string, error) {
	if given == "" {
		own, err := os.Executable()
		if err != nil {
			return "", fmt.Errorf("find the entente binary: %w", err)
		}
		given = own
	}
	path, err := filepath.Abs(given)
	if err != nil {
		return "", fmt.Errorf("find the entente binary: %w", err)
	}
	switch info, err := os.Stat(path); {
	case errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("the entente binary %s is missing: build it with \"go build -o %s ./cmd/entente\"", path, given)
	case err != nil:
		return "", fmt.Errorf("find the entente binary: %w", err)
	case info.IsDir() || info.Mode()&0o111 == 0:
		return "", fmt.Errorf("%s is no program that can be run", path)
	}
	return path, nil
}

// makeDir makes the work directory: the given one, which stays, or a temporary one.
func (w *world) makeDir(given string) (string, error) {
	if given == "" {
		dir, err := os.MkdirTemp("", "entente-demo-")
		if err != nil {
			return "", plainDisk("make a temporary directory", err)
		}
		w.remove = append(w.remove, dir)
		return dir, nil
	}
	dir, err := filepath.Abs(given)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", plainDisk("make the work directory", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", fmt.Errorf("read the work directory: %w", err)
	}
	if len(entries) > 0 {
		return "", fmt.Errorf("the work directory %s is not empty: name one that is, or that does not exist", dir)
	}
	return dir, nil
}

func plainDisk(what string, err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%s: %w: the disk is full; free some space, or choose another disk with TMPDIR", what, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// Close ends every process and removes the directories. It may be called twice.
func (w *world) Close() error {
	w.supervisor.Close()
	if w.guard != nil {
		w.guard.Close()
	}
	var errs []error
	for _, dir := range w.remove {
		errs = append(errs, os.RemoveAll(dir))
	}
	return errors.Join(errs...)
}

// layOut writes every file that can be known before anything runs.
func (w *world) layOut() error {
	for _, dir := range []string{w.sockets, w.file("bin")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return plainDisk("make a directory", err)
		}
	}
	links := map[string]bool{}
	for _, u := range w.units {
		links[u.link] = true
	}
	for _, link := range slices.Sorted(maps.Keys(links)) {
		if err := w.linkBinary(w.file(filepath.Join("bin", link))); err != nil {
			return err
		}
	}
	if td := w.spec.edge(); td != nil {
		var err error
		if w.users, err = newUsers(w.plan, td); err != nil {
			return err
		}
	}
	for i := range w.spec.TrustDomains {
		if td := &w.spec.TrustDomains[i]; td.Upstream {
			if err := newUpstream(w.plan, td); err != nil {
				return err
			}
		}
	}
	for _, u := range w.units {
		if err := w.layOutUnit(u); err != nil {
			return err
		}
	}
	return nil
}

// linkBinary makes the binary known under another path, by a hard link where the
// file system allows it. After the first copy the others are links to that.
func (w *world) linkBinary(path string) error {
	err := os.Link(w.binary, path)
	if err == nil {
		return nil
	}
	if !errors.Is(err, syscall.EXDEV) && !errors.Is(err, fs.ErrPermission) && !errors.Is(err, syscall.EMLINK) {
		return plainDisk("link the entente binary", err)
	}
	from, err := os.Open(w.binary)
	if err != nil {
		return fmt.Errorf("copy the entente binary: %w", err)
	}
	defer from.Close()
	to, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o700)
	if err != nil {
		return plainDisk("copy the entente binary", err)
	}
	_, err = io.Copy(to, from)
	if err = errors.Join(err, to.Close()); err != nil {
		return plainDisk("copy the entente binary", err)
	}
	w.binary = path
	return nil
}

func (w *world) layOutUnit(u *unit) error {
	if err := os.MkdirAll(u.dir, 0o700); err != nil {
		return plainDisk("make a directory", err)
	}
	text, err := yamlfile.Marshal(u.config)
	if err != nil {
		return fmt.Errorf("write the configuration of %s: %w", u.name, err)
	}
	return w.write(filepath.Join(u.dir, "config.yaml"), text)
}

func (w *world) write(path string, data []byte) error {
	if err := os.WriteFile(path, data, 0o600); err != nil {
		return plainDisk("write a file", err)
	}
	return nil
}

// run runs one verb of the binary to its end.
func (w *world) run(ctx context.Context, args ...string) ([]byte, error) {
	w.verbose("$ entente %s", strings.Join(args, " "))
	return w.supervisor.Run(ctx, process.Spec{
		Name: "entente " + strings.Join(args, " "), Binary: w.file("bin/entente"), Args: args,
	})
}

// start starts a unit with its configuration. It does not wait.
func (w *world) start(u *unit) error {
	args := append(slices.Clone(u.args), "--config", filepath.Join(u.dir, "config.yaml"))
	w.verbose("$ bin/%s %s", u.link, strings.Join(args, " "))
	env := frugal
	if u.kind == kindService {
		env = frugalApps
	}
	p, err := w.supervisor.Start(process.Spec{
		Name: u.name, Binary: w.file(filepath.Join("bin", u.link)), Args: args, Env: env,
		Log: filepath.Join(u.dir, "log"),
	})
	if err != nil {
		return err
	}
	w.mu.Lock()
	w.processes[u] = p
	w.mu.Unlock()
	return nil
}

// process is the newest process of a unit; nil before the first.
func (w *world) process(u *unit) *process.Process {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.processes[u]
}

// up starts units and waits until all are ready.
func (w *world) up(ctx context.Context, units ...*unit) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, u := range units {
		if err := w.start(u); err != nil {
			return errors.Join(err, group.Wait())
		}
		group.Go(func() error { return w.ready(ctx, u) })
	}
	return group.Wait()
}

// ready waits until a unit says that it can serve.
func (w *world) ready(ctx context.Context, u *unit) error {
	began := time.Now()
	probe := func(ctx context.Context) error {
		return probeURL(ctx, http.DefaultTransport, "http://"+u.admin+"/readyz")
	}
	if u.admin == "" {
		probe = func(ctx context.Context) error { return w.control(ctx, u, http.MethodGet, "/readyz", nil, nil) }
	}
	if err := w.process(u).Ready(ctx, probe); err != nil {
		return err
	}
	w.verbose("%s is ready after %s", u.name, time.Since(began).Round(time.Millisecond))
	return nil
}

func probeURL(ctx context.Context, transport http.RoundTripper, url string) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	request.Close = true
	answer, err := transport.RoundTrip(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(io.LimitReader(answer.Body, 4<<10))
	if err != nil {
		return err
	}
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("it says %q", strings.TrimSpace(string(body)))
	}
	return nil
}

// dialControl opens a request to the control socket of a service process.
func dialControl(u *unit) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", u.socket)
		},
		DisableKeepAlives: true,
	}}
}

// control gives a service process an order and reads its answer into into.
func (w *world) control(ctx context.Context, u *unit, method, path string, order, into any) error {
	var body io.Reader
	if order != nil {
		text, err := json.Marshal(order)
		if err != nil {
			return err
		}
		body = bytes.NewReader(text)
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://control"+path, body)
	if err != nil {
		return err
	}
	answer, err := dialControl(u).Do(request)
	if err != nil {
		return fmt.Errorf("%s: %w", u.name, err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(io.LimitReader(answer.Body, 4<<20))
	if err != nil {
		return fmt.Errorf("%s: %w", u.name, err)
	}
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", u.name, strings.TrimSpace(string(text)))
	}
	if into == nil {
		return nil
	}
	return json.Unmarshal(text, into)
}

// bringUp builds every trust domain with the commands that an operator would use,
// and starts everything.
func (w *world) bringUp(ctx context.Context) error {
	var mu sync.Mutex
	bundles := map[string][]byte{}
	err := w.eachDomain(ctx, func(ctx context.Context, td *TrustDomain) error {
		if err := w.foundCA(ctx, td); err != nil {
			return err
		}
		bundle, err := w.run(ctx, "ca", "bundle", "--socket", w.find(kindCA, td.Name, td.CA[0]).socket)
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		bundles[td.Name] = bundle
		return nil
	})
	if err != nil {
		return err
	}
	return w.eachDomain(ctx, func(ctx context.Context, td *TrustDomain) error { return w.buildMesh(ctx, td, bundles) })
}

func (w *world) eachDomain(ctx context.Context, do func(context.Context, *TrustDomain) error) error {
	group, ctx := errgroup.WithContext(ctx)
	for i := range w.spec.TrustDomains {
		group.Go(func() error { return do(ctx, &w.spec.TrustDomains[i]) })
	}
	return group.Wait()
}

// foundCA initialises the first node of a domain's CA and has the others join.
func (w *world) foundCA(ctx context.Context, td *TrustDomain) error {
	founder := w.find(kindCA, td.Name, td.CA[0])
	if _, err := w.run(ctx, "ca", "init", "--config", filepath.Join(founder.dir, "config.yaml")); err != nil {
		return err
	}
	if err := w.up(ctx, founder); err != nil {
		return err
	}
	for _, dc := range td.CA[1:] {
		u := w.find(kindCA, td.Name, dc)
		token, err := w.token(ctx, founder, u, "--node", "ca-"+dc, "--datacenter", dc)
		if err != nil {
			return err
		}
		if _, err := w.run(ctx, "ca", "join", "--config", filepath.Join(u.dir, "config.yaml"), "--token-file", token); err != nil {
			return err
		}
		if err := w.start(u); err != nil {
			return err
		}
	}
	for _, dc := range td.CA[1:] {
		if err := w.ready(ctx, w.find(kindCA, td.Name, dc)); err != nil {
			return err
		}
	}
	return nil
}

// token makes a one-time token for a unit and returns the file that holds it.
func (w *world) token(ctx context.Context, ca, u *unit, grant ...string) (string, error) {
	token, err := w.run(ctx, append([]string{"token", "create", "--socket", ca.socket}, grant...)...)
	if err != nil {
		return "", err
	}
	file := filepath.Join(u.dir, "token")
	return file, w.write(file, token)
}

// buildMesh applies a domain's catalogue and starts its agents, services and gateways.
func (w *world) buildMesh(ctx context.Context, td *TrustDomain, bundles map[string][]byte) error {
	ca := w.find(kindCA, td.Name, td.CA[0])
	catalogue, err := w.catalogue(td, time.Now(), bundles)
	if err != nil {
		return err
	}
	file := w.file(td.Name + ".yaml")
	if err := w.write(file, catalogue); err != nil {
		return err
	}
	if _, err := w.run(ctx, "apply", "-f", file, "--socket", ca.socket); err != nil {
		return err
	}
	for _, dc := range td.Mesh {
		_, err := w.token(ctx, ca, w.find(kindAgent, td.Name, dc),
			"--agent", meshHost(dc), "--datacenter", dc, "--address", w.host(td.Name, dc, hostMesh))
		if err != nil {
			return err
		}
	}
	if err := w.upMesh(ctx, func(u *unit) bool { return u.domain == td.Name && u.kind != kindCA }); err != nil {
		return err
	}
	for _, dc := range td.Mesh {
		if err := w.healthy(ctx, w.find(kindAgent, td.Name, dc)); err != nil {
			return err
		}
	}
	return nil
}

// healthy waits until an agent has found every service of its host healthy: until then
// requests go to another datacenter.
func (w *world) healthy(ctx context.Context, agent *unit) error {
	client := admin.NewClient(agent.adminSocket())
	return w.process(agent).Ready(ctx, func(ctx context.Context) error {
		list, err := client.Services(ctx)
		if err != nil {
			return err
		}
		for _, s := range list.Services {
			if s.State != "healthy" {
				return fmt.Errorf("%s is %s: %s", s.Service, s.State, s.Why)
			}
		}
		return nil
	})
}

// upMesh starts what is chosen: CA nodes, agents and services first, then what takes
// its identity from an agent before it can serve.
func (w *world) upMesh(ctx context.Context, chosen func(*unit) bool) error {
	var first, second []*unit
	for _, u := range w.units {
		switch {
		case !chosen(u):
		case u.kind == kindGateway || u.kind == kindEdge:
			second = append(second, u)
		default:
			first = append(first, u)
		}
	}
	// A service process asks for its identity as soon as it runs: agents go first.
	slices.SortStableFunc(first, func(a, b *unit) int { return rank(a) - rank(b) })
	if err := w.up(ctx, first...); err != nil {
		return err
	}
	return w.up(ctx, second...)
}

func rank(u *unit) int {
	switch u.kind {
	case kindCA:
		return 0
	case kindAgent:
		return 1
	default:
		return 2
	}
}

// status asks a CA node for its status.
func (w *world) status(ctx context.Context, u *unit) (*ententev1.StatusResponse, error) {
	text, err := w.run(ctx, "ca", "status", "--socket", u.socket, "--json")
	if err != nil {
		return nil, err
	}
	status := &ententev1.StatusResponse{}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(text, status); err != nil {
		return nil, fmt.Errorf("read the status of %s: %w", u.name, err)
	}
	return status, nil
}

// identities asks every service process of a datacenter (all, if "") what it holds.
func (w *world) identities(ctx context.Context, datacenter string) (map[*unit][]platform.Identity, error) {
	var mu sync.Mutex
	held := map[*unit][]platform.Identity{}
	group, ctx := errgroup.WithContext(ctx)
	for _, u := range w.units {
		if u.kind != kindService || datacenter != "" && u.datacenter != datacenter {
			continue
		}
		group.Go(func() error {
			var list []platform.Identity
			err := w.control(ctx, u, http.MethodGet, "/identities", nil, &list)
			mu.Lock()
			defer mu.Unlock()
			held[u] = list
			return err
		})
	}
	return held, group.Wait()
}

// kill ends units with SIGKILL, all at once, and returns the moment before the first.
func (w *world) kill(units ...*unit) time.Time {
	var list []*process.Process
	for _, u := range units {
		if p := w.process(u); p != nil {
			list = append(list, p)
		}
	}
	at := time.Now()
	for _, p := range list {
		p.Kill()
	}
	for _, p := range list {
		<-p.Ended()
	}
	return at
}

// memory sums what the processes and the runner hold.
func (w *world) memory() (total process.Memory, processes int, err error) {
	pids := []int{os.Getpid()}
	for _, p := range w.supervisor.Running() {
		pids = append(pids, p.PID())
	}
	for _, pid := range pids {
		m, err := process.MemoryOf(pid)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue // it ended a moment ago
		}
		if err != nil {
			return total, 0, fmt.Errorf("measure memory: %w", err)
		}
		total.RSS += m.RSS
		total.PSS += m.PSS
	}
	return total, len(pids) - 1, nil
}
