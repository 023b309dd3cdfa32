package meshagent

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/meshagent/services"
)

// Service is a service that the catalogue places on this host and that listens here,
// with what the host says of it.
type Service struct {
	Name     string
	Address  string // loopback host:port where the application listens, or services.UnixPrefix and a path
	Source   string // of what the host says: FILE:LINE, services.FromCommand, or FromCatalogue
	Check    services.Check
	Drain    time.Duration // how long requests under way may take when it is drained
	Draining bool          // it is reported no more
	Instance *services.Instance
}

// FromCatalogue is the source of a service of which the host says nothing.
const FromCatalogue = "catalogue"

const defaultDrain = 10 * time.Second

// places puts the services of the catalogue and what the host says of them together. It
// belongs to the store, which calls it one change after the other.
type places struct {
	cfg       *Config
	registry  *services.Registry
	instances map[string]*services.Instance // by service name
}

func newPlaces(cfg *Config, registry *services.Registry) *places {
	return &places{cfg: cfg, registry: registry, instances: map[string]*services.Instance{}}
}

// place sets the services of the next state, where they may be others than those of the old
// one.
func (p *places) place(next, old *State) {
	registered := p.registry.Snapshot()
	if next.registered != registered || next.Ready != old.Ready || next.View.Changed != old.View.Changed {
		next.registered, next.Services = registered, p.all(next, registered)
	}
}

// all finds the services of a state, by name.
func (p *places) all(s *State, registered *services.Snapshot) []Service {
	var list []Service
	for _, object := range s.View.Objects {
		service := object.GetService()
		if _, here := s.Service(service.GetName()); service == nil || !here || !s.Ready {
			continue
		}
		if placed, err := p.one(service, registered); err == nil {
			list = append(list, placed)
		}
	}
	slices.SortFunc(list, func(x, y Service) int { return cmp.Compare(x.Name, y.Name) })
	for name, instance := range p.instances {
		if !slices.ContainsFunc(list, func(s Service) bool { return s.Name == name }) {
			instance.Close()
			delete(p.instances, name)
		}
	}
	return list
}

// one makes a service of what the catalogue and the host say of it.
func (p *places) one(service *statev1.Service, registered *services.Snapshot) (Service, error) {
	name := service.GetName()
	placed := Service{Name: name, Source: FromCatalogue}
	catalogued, err := p.cfg.App(service.GetPort())
	if err != nil {
		return placed, err // it only calls
	}
	var says services.Registration
	if all := registered.Of(name); len(all) > 0 {
		says, placed.Source = *all[0].Registration, all[0].Source
	}
	host, port, err := net.SplitHostPort(catalogued)
	if err != nil {
		return placed, err
	}
	if says.Port != 0 {
		port = strconv.Itoa(int(says.Port))
	}
	if placed.Address = net.JoinHostPort(cmp.Or(says.Address, host), port); says.Socket != "" {
		placed.Address = services.UnixPrefix + says.Socket
	}
	placed.Check = services.FromCatalogue(ca.ServiceName(name, p.cfg.Domain()), placed.Address, service.GetHealthPath(), p.cfg.Health.Thresholds)
	if command := p.cfg.Health.Commands[name]; len(command) > 0 {
		placed.Check = placed.Check.WithCommand(command)
	}
	placed.Check = placed.Check.With(says.Health, p.cfg.Health.Thresholds)

	within, draining := registered.Drained(name)
	placed.Draining, placed.Drain = draining, cmp.Or(within, says.Drain, defaultDrain)
	placed.Instance = p.instances[name]
	switch {
	case placed.Instance == nil:
		placed.Instance = services.NewInstance()
		if draining { // since before the agent was started
			placed.Instance.Close()
		}
	case !draining && placed.Instance.Open().Err() != nil:
		placed.Instance = services.NewInstance()
	}
	p.instances[name] = placed.Instance
	return placed, nil
}

// hostServices checks, reports and drains the services of this host, and takes what the host
// says of them.
type hostServices struct {
	cfg       *Config
	log       *slog.Logger
	store     *store
	registry  *services.Registry
	workloads *workloads
	prober    *services.Prober

	mu      sync.Mutex
	report  func([]client.Instance) // to the CA
	leaving bool                    // the instances are withdrawn for good
}

func newHostServices(cfg *Config, log *slog.Logger, store *store, registry *services.Registry, workloads *workloads, report func([]client.Instance)) *hostServices {
	return &hostServices{cfg: cfg, log: log, store: store, registry: registry, workloads: workloads, prober: services.NewProber(), report: report}
}

// withdrawTime is how long the doors stay open after the host's instances were
// withdrawn: longer than a push takes to reach the callers.
const withdrawTime = 200 * time.Millisecond

// withdraw takes this host's instances back for good and leaves the CA the time to tell.
func (h *hostServices) withdraw() {
	h.mu.Lock()
	h.leaving = true
	h.report([]client.Instance{})
	h.mu.Unlock()
	if h.store.State().Ready && h.cfg.Sidecar.Inbound != "" {
		time.Sleep(withdrawTime)
	}
}

// tell reports what this host serves to the CA, until it is leaving.
func (h *hostServices) tell(instances []client.Instance) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.leaving {
		h.report(instances)
	}
}

// mayRegister says why this host may say nothing of a service: it speaks only of those that
// the catalogue and an entry place here.
func (h *hostServices) mayRegister(s *State, name string) error {
	if !s.Ready {
		return fmt.Errorf("the CA has not told yet which services run on this host: is a CA node reachable? entente agent healthcheck says more")
	}
	if _, here := s.Service(name); !here {
		return fmt.Errorf("no entry places service %s on host %s: somebody whose role allows it must declare a Service %s with %s in run.hosts: entente apply -f FILE", name, h.cfg.Name, name, h.cfg.Name)
	}
	for _, object := range s.View.Objects {
		if service := object.GetService(); service.GetName() == name && service.GetPort() != 0 {
			return nil
		}
	}
	return fmt.Errorf("service %s only calls others: the catalogue gives it no port; somebody whose role allows it must add one: entente apply -f FILE", name)
}

// Services shows every service that runs on this host or is registered here, by name.
func (h *hostServices) Services() []ServiceStatus {
	s, registered := h.store.State(), h.registry.Snapshot()
	list := []ServiceStatus{}
	for i := range s.Services {
		status := statusOf(&s.Services[i], registered)
		if h.cfg.Sidecar.Inbound == "" {
			status.Why = "nobody is sent here: this host has no sidecar; set sidecar.inbound"
		}
		list = append(list, status)
	}
	for _, name := range registered.Services() {
		err := h.mayRegister(s, name)
		if err == nil || slices.ContainsFunc(s.Services, func(s Service) bool { return s.Name == name }) {
			continue
		}
		list = append(list, ServiceStatus{Service: name, State: "refused", Source: registered.Of(name)[0].Source, Why: err.Error()})
	}
	slices.SortFunc(list, func(x, y ServiceStatus) int { return cmp.Compare(x.Service, y.Service) })
	return list
}

// ServiceStatus is a service of this host as people are shown it.
type ServiceStatus struct {
	Service  string     `json:"service"`
	State    string     `json:"state"` // healthy, unhealthy, draining, drained, refused
	Why      string     `json:"why,omitempty"`
	Since    *time.Time `json:"since,omitempty"` // healthy or unhealthy
	Address  string     `json:"address,omitempty"`
	Check    string     `json:"check,omitempty"`
	Requests int        `json:"requests"`         // under way
	Source   string     `json:"source"`           // FILE:LINE, command or catalogue
	Hidden   []string   `json:"hidden,omitempty"` // sources that do not count beside it
}

func statusOf(s *Service, registered *services.Snapshot) ServiceStatus {
	healthy, since, why := s.Instance.Health()
	status := ServiceStatus{Service: s.Name, State: "unhealthy", Since: &since, Address: s.Address, Check: s.Check.String(), Requests: s.Instance.Requests(), Source: s.Source}
	if why != nil {
		status.Why = why.Error()
	} else if !healthy {
		status.Why = "it was not checked yet"
	}
	switch {
	case s.Draining && s.Instance.Open().Err() != nil:
		status.State = "drained"
	case s.Draining:
		status.State = "draining"
	case healthy:
		status.State = "healthy"
	}
	if all := registered.Of(s.Name); len(all) > 1 {
		for _, other := range all[1:] {
			status.Hidden = append(status.Hidden, other.Source)
		}
	}
	return status
}

// Broken are the files of registrations whose newest content is not used.
func (h *hostServices) Broken() []services.Broken { return h.registry.Snapshot().Broken() }

// Reread has the drop-in directory read now.
func (h *hostServices) Reread() { h.registry.Reread() }

// Register takes registrations by command. It takes none or all.
func (h *hostServices) Register(registrations []services.Registration) error {
	for i := range registrations {
		if err := h.mayRegister(h.store.State(), registrations[i].Service); err != nil {
			return err
		}
	}
	return h.registry.Register(registrations)
}

// Deregister takes back what was registered by command.
func (h *hostServices) Deregister(service string) error { return h.registry.Deregister(service) }

// Drain takes a service of this host out: it is reported no more, requests under way may
// end within the given time (0: as it is registered), then the others are cut. It returns
// when that is done, or when ctx ends, which ends the waiting only. It lasts until Restore.
func (h *hostServices) Drain(ctx context.Context, service string, within time.Duration) error {
	if err := h.mayDrain(service); err != nil {
		return err
	}
	if err := h.registry.Drain(service, within); err != nil {
		return err
	}
	return h.drained(ctx, service)
}

// HoldDrained is Drain that lasts until release is called.
func (h *hostServices) HoldDrained(ctx context.Context, service string, within time.Duration) (release func(), err error) {
	if err := h.mayDrain(service); err != nil {
		return nil, err
	}
	release = h.registry.Hold(service, within)
	if err := h.drained(ctx, service); err != nil {
		release()
		return nil, err
	}
	return release, nil
}

// Restore ends every drain of a service.
func (h *hostServices) Restore(service string) error {
	if _, drained := h.registry.Snapshot().Drained(service); !drained {
		return fmt.Errorf("service %s is not drained on this host", service)
	}
	return h.registry.Restore(service)
}

func (h *hostServices) mayDrain(service string) error {
	if h.cfg.Sidecar.Inbound == "" {
		return fmt.Errorf("this host has no sidecar, so nobody is sent to its services: there is nothing to drain")
	}
	return h.mayRegister(h.store.State(), service)
}

// drained waits until a service takes no more requests.
func (h *hostServices) drained(ctx context.Context, service string) error {
	for {
		s := h.store.State()
		i := slices.IndexFunc(s.Services, func(s Service) bool { return s.Name == service })
		if i < 0 {
			return fmt.Errorf("service %s is no longer on this host", service)
		}
		if !s.Services[i].Draining {
			return fmt.Errorf("service %s was restored before it was drained", service)
		}
		select {
		case <-s.Services[i].Instance.Open().Done():
			return nil
		case <-s.Changed():
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// run follows the registrations, and checks, reports and drains the services.
func (h *hostServices) run(ctx context.Context) error {
	group := daemon.NewGroup(ctx)
	group.Go("health", h.watchHealth)
	group.Go("registrations", h.registry.Run)
	return group.Wait()
}

// watchHealth checks every service of this host that listens, reports them as instances,
// and drains those that are to be drained. All it has started has ended when it returns.
func (h *hostServices) watchHealth(ctx context.Context) error {
	type watched struct {
		services.Check
		*services.Instance
	}
	changed := make(chan struct{}, 1)
	var tasks sync.WaitGroup
	checks := map[watched]context.CancelFunc{}
	drains := map[*services.Instance]context.CancelFunc{}
	defer tasks.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	for {
		state := h.store.State()
		check, drain := map[watched]Service{}, map[*services.Instance]Service{}
		instances := []client.Instance{}
		for _, s := range state.Services {
			check[watched{s.Check, s.Instance}] = s
			if s.Draining {
				drain[s.Instance] = s
				continue
			}
			instances = append(instances, client.Instance{
				Service: s.Name, Agent: h.cfg.Name, Datacenter: h.cfg.Datacenter,
				Address: h.cfg.Sidecar.Advertise, Healthy: s.Instance.Healthy(),
			})
		}
		if state.Ready {
			h.tell(instances)
		}
		follow(ctx, &tasks, checks, check, func(ctx context.Context, s Service) {
			s.Check.Watch(ctx, s.Instance, h.probe(s), func(err error) {
				h.log.Info("health", "service", s.Name, "address", s.Address, "healthy", s.Instance.Healthy(), "error", err)
				select {
				case changed <- struct{}{}:
				default:
				}
			})
		})
		follow(ctx, &tasks, drains, drain, h.drain)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-state.Changed():
		case <-changed:
		}
	}
}

// follow has a task run for each that is wanted, and ends the others.
func follow[K comparable, V any](ctx context.Context, tasks *sync.WaitGroup, running map[K]context.CancelFunc, wanted map[K]V, run func(context.Context, V)) {
	for key, stop := range running {
		if _, ok := wanted[key]; !ok {
			stop()
			delete(running, key)
		}
	}
	for key, value := range wanted {
		if running[key] == nil {
			own, stop := context.WithCancel(ctx)
			running[key] = stop
			tasks.Go(func() { run(own, value) })
		}
	}
}

// probe makes the checks of a service. Who listens must be the service: an impostor gets
// no traffic, so he is not healthy either. A check of another port, or by a command, asks
// somebody else, so the service's listener is looked at before.
func (h *hostServices) probe(s Service) func(context.Context, services.Check) error {
	attest := func(conn net.Conn) error { return h.workloads.AttestApplication(conn, ca.ServiceEntry(s.Name)) }
	return func(ctx context.Context, c services.Check) error {
		if c.Kind != services.ByCommand && c.Address == s.Address {
			return h.prober.Probe(ctx, c, attest)
		}
		if at, err := netip.ParseAddrPort(s.Address); err == nil {
			if err := h.workloads.attestListener(at, ca.ServiceEntry(s.Name)); err != nil {
				return err
			}
		} else if err := h.prober.Probe(ctx, services.Check{Kind: services.ByTCP, Address: s.Address}, attest); err != nil {
			return err
		}
		return h.prober.Probe(ctx, c, nil)
	}
}

// drain lets the requests of a service end that is reported no more, and closes it.
func (h *hostServices) drain(ctx context.Context, s Service) {
	h.log.Info("service is drained", "service", s.Name, "requests", s.Instance.Requests(), "within", s.Drain)
	limit, cancel := context.WithTimeout(ctx, withdrawTime+s.Drain)
	defer cancel()
	select {
	case <-time.After(withdrawTime):
	case <-ctx.Done():
		return
	}
	s.Instance.Idle(limit)
	left := s.Instance.Requests()
	// It may have been restored in this moment.
	h.store.change(func(state *State) *State {
		if i := slices.IndexFunc(state.Services, func(o Service) bool { return o.Instance == s.Instance }); i >= 0 && state.Services[i].Draining && ctx.Err() == nil {
			s.Instance.Close()
			h.log.Info("service has been drained", "service", s.Name, "cut", left)
		}
		return nil
	})
}
