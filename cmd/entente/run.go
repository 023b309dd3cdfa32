package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	mathrand "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"os/user"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/selector"
	"github.com/entente-mesh/entente/meshagent/admin"
	"github.com/entente-mesh/entente/scenarios"
)

// runFlags say who a program is to be.
type runFlags struct {
	domain, service      string
	port                 uint16
	health               string
	tcp                  bool
	calls                []string
	agentSocket          string
	caSocket             string
	owner                string
	proxy, replace, json bool
	wait, drain          time.Duration
}

func runCommand() *cobra.Command {
	var f runFlags
	c := &cobra.Command{
		Use:   "run --domain D --service S --port P -- COMMAND",
		Short: "Bring a program of your own into the mesh, for as long as it runs",
		Long: `Declare a service at the domain's CA, register this process with the host's agent, and
start COMMAND below it. What COMMAND and all that it starts do is done as that service:
its calls go out through ENTENTE_OUTBOUND (and http_proxy), and others reach the port it
listens on as S.D. When it ends the service is taken back, and its exit code is this one's.
On SIGTERM nobody is sent to it any more and requests under way end, before it is told.

It needs the admin sockets of a CA node and of this host's agent: those of a demo that
"entente demo --keep" keeps up are found without flags.

The program finds in its environment
  ENTENTE_SPIFFE_ID    who it is
  ENTENTE_LISTEN       host:port it must listen on to be served
  ENTENTE_OUTBOUND     URL of its way out: send requests here, with the service name as Host
  SPIFFE_ENDPOINT_SOCKET  the Workload API
  http_proxy           ENTENTE_OUTBOUND, so that http://accounts.banking.example/ just works`,
		Example: `  entente run --domain trading.example --service cart --port 9000 -- python3 app.py
  entente run --domain trading.example --service probe -- curl -s http://accounts.banking.example/v1/balance/42`,
		RunE: func(c *cobra.Command, args []string) error {
			if c.ArgsLenAtDash() != 0 || len(args) == 0 {
				return usageError{c, errors.New("put the command behind --, as in: -- python3 app.py")}
			}
			if err := ca.CheckLabel(f.service); err != nil {
				return usageError{c, fmt.Errorf("--service: %w", err)}
			}
			if f.drain < 0 || f.drain > time.Hour {
				return usageError{c, errors.New("--drain: 0 to 1h")}
			}
			if _, err := ca.ParseTrustDomain(f.domain); err != nil {
				return usageError{c, fmt.Errorf("--domain: %w", err)}
			}
			program, err := exec.LookPath(args[0])
			if err != nil {
				return usageError{c, fmt.Errorf("cannot run %s: %w", args[0], err)}
			}
			return f.run(c.Context(), c.ErrOrStderr(), program, args)
		},
	}
	c.Flags().SetInterspersed(true)
	f.register(c)
	return c
}

func (f *runFlags) register(c *cobra.Command) {
	flags := c.Flags()
	flags.StringVar(&f.domain, "domain", "", "trust domain to join")
	flags.StringVar(&f.service, "service", "", "name of the service it becomes: one DNS label")
	flags.Uint16Var(&f.port, "port", 0, "port it listens on; 0: it only calls")
	flags.BoolVar(&f.tcp, "tcp", false, "it speaks TCP, not HTTP: others call it by its name, at --port")
	flags.StringVar(&f.health, "health", "", "path of an HTTP health check, as in /healthz; default: a TCP connection")
	flags.StringSliceVar(&f.calls, "calls", nil, "service names it may call; default: its own domain's and every import")
	flags.StringVar(&f.agentSocket, "agent-socket", "", "admin socket of this host's agent; default: the demo's, else "+defaultAgentSocket)
	flags.StringVar(&f.caSocket, "ca-socket", "", "admin socket of a CA node of the domain; default: the demo's, else "+defaultAdminSocket)
	flags.StringVar(&f.owner, "owner", "", "owner of the service; default: you")
	flags.BoolVar(&f.proxy, "proxy", true, "set http_proxy for the command")
	flags.BoolVar(&f.replace, "replace", false, "take the place of a service of that name, as a run that was killed leaves it")
	flags.BoolVar(&f.json, "json", false, "print who it is as JSON")
	flags.DurationVar(&f.drain, "drain", 10*time.Second, "on SIGTERM: how long requests under way may take before the program is told, at most 1h; 0: it is told at once")
	flags.DurationVar(&f.wait, "wait", 15*time.Second, "how long to wait for the identity")
}

// run brings the program in, waits for its end, and takes everything back.
func (f *runFlags) run(ctx context.Context, say io.Writer, program string, args []string) error {
	// From here on a signal must not leave the service behind.
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2)
	defer signal.Stop(signals)

	agent, is, caSockets, err := f.find(ctx)
	if err != nil {
		return err
	}
	id := strings.ToLower(rand.Text())
	gone, release, err := agent.Register(ctx, id)
	if err != nil {
		return agentError(err)
	}
	// The registration is kept: an agent that was restarted is told again.
	lasting, stop := context.WithCancel(context.WithoutCancel(ctx))
	kept := make(chan struct{})
	go func() {
		defer close(kept)
		keepRegistered(lasting, agent, id, gone, release)
	}()
	defer func() { stop(); <-kept }()

	putBack := func() {}
	defer func() { putBack() }() // when it is no longer declared
	service, err := f.declare(ctx, id, is, caSockets)
	if err != nil {
		return err
	}
	defer f.withdraw(context.WithoutCancel(ctx), say, caSockets)

	began := time.Now()
	identity, err := f.identified(ctx, agent, signals)
	if err != nil {
		return err
	}
	took := time.Since(began)
	outbound := net.JoinHostPort(is.AppAddress, strconv.Itoa(int(service.GetOutboundPort())+is.PortOffset))
	listen := ""
	if f.port != 0 {
		listen = net.JoinHostPort(is.AppAddress, strconv.Itoa(int(f.port)+is.PortOffset))
	}
	f.introduce(say, identity, took, listen, outbound)

	cmd := exec.Command(program, args[1:]...)
	cmd.Args[0] = args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = f.environment(is, identity.SPIFFEID, listen, outbound)
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("cannot start %s: %w", args[0], err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	watching, enough := context.WithCancel(lasting)
	defer enough()
	if f.port != 0 && !f.json {
		go f.watch(watching, say, agent, listen)
	}
	terminal := inForeground()
	var drained chan func() // nil: nobody has asked it to end
	for {
		select {
		case s := <-signals:
			// The terminal sends these to the whole foreground group: the program has them.
			if terminal && (s == os.Interrupt || s == syscall.SIGQUIT) {
				continue
			}
			if s == syscall.SIGTERM && f.port != 0 && f.drain > 0 && drained == nil {
				drained = make(chan func(), 1)
				go func() { drained <- f.takeOut(lasting, say, agent) }()
				continue
			}
			cmd.Process.Signal(s) // a second SIGTERM does not wait
		case putBack = <-drained:
			cmd.Process.Signal(syscall.SIGTERM)
		case err := <-ended:
			return exitOf(err)
		}
	}
}

// takeOut has nobody sent to the program any more, and the requests that it has end.
func (f *runFlags) takeOut(ctx context.Context, say io.Writer, agent *admin.Client) (release func()) {
	ctx, cancel := context.WithTimeout(ctx, f.drain+5*time.Second)
	defer cancel()
	release, err := agent.HoldDrained(ctx, f.service, f.drain)
	if err != nil {
		fmt.Fprintf(say, "entente: %s is stopped without having been drained: %s\n", f.service, message(agentError(err)))
		return func() {}
	}
	return release
}

// find looks for an agent of the domain that answers, and for where its CA may be.
func (f *runFlags) find(ctx context.Context) (*admin.Client, *admin.Status, []string, error) {
	agents, nodes := []string{f.agentSocket}, []string{f.caSocket}
	if f.agentSocket == "" || f.caSocket == "" {
		session, err := scenarios.ReadSession()
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, nil, nil, err
		}
		demoAgents, demoNodes := []string{defaultAgentSocket}, []string{defaultAdminSocket}
		if session != nil {
			for _, domain := range session.Domains {
				if domain.Name == f.domain {
					demoAgents, demoNodes = domain.Agents, domain.CA
				}
			}
		}
		if f.agentSocket == "" {
			agents = demoAgents
		}
		if f.caSocket == "" {
			nodes = demoNodes
		}
	}
	var errs []error
	for _, socket := range agents {
		agent := admin.NewClient(socket)
		asked, cancel := context.WithTimeout(ctx, 5*time.Second)
		is, err := agent.Status(asked)
		cancel()
		switch {
		case err != nil:
			errs = append(errs, agentError(err))
		case is.TrustDomain != f.domain:
			errs = append(errs, status.Errorf(codes.FailedPrecondition, "the agent at %s is of trust domain %s, not %s", socket, is.TrustDomain, f.domain))
		case is.Inbound == "":
			errs = append(errs, status.Errorf(codes.FailedPrecondition, "the agent at %s has no sidecar: set sidecar.inbound in its file", socket))
		default:
			return agent, is, nodes, nil
		}
	}
	return nil, nil, nil, errs[0] // the first is the one that was meant
}

func keepRegistered(ctx context.Context, agent *admin.Client, id string, gone <-chan struct{}, release func()) {
	for {
		select {
		case <-ctx.Done():
			release()
			return
		case <-gone:
		}
		for {
			var err error
			if gone, release, err = agent.Register(ctx, id); err == nil {
				break
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(300 * time.Millisecond):
			}
		}
	}
}

// admin calls the first CA node that answers, again when somebody else has changed
// the catalogue in the same moment.
func (f *runFlags) admin(ctx context.Context, sockets []string, do func(context.Context, ententev1.AdminClient) error) error {
	var err error
	for _, socket := range sockets {
		called, cancel := context.WithTimeout(ctx, 10*time.Second)
		node := adminFlags{socket: socket}
		for range 5 {
			err = node.call(called, func(client ententev1.AdminClient) error { return do(called, client) })
			if status.Code(err) != codes.Aborted {
				break
			}
			time.Sleep(time.Duration(10+mathrand.IntN(40)) * time.Millisecond)
		}
		cancel()
		if code := status.Code(err); err == nil || code != codes.Unavailable && code != codes.DeadlineExceeded {
			return err
		}
	}
	return err
}

// declare agrees on the service with the CA.
func (f *runFlags) declare(ctx context.Context, id string, is *admin.Status, nodes []string) (*statev1.Service, error) {
	outbound, err := freePort(is.AppAddress, is.PortOffset)
	if err != nil {
		return nil, err
	}
	owner := f.owner
	if u, err := user.Current(); err == nil && owner == "" {
		owner = u.Username
	}
	service := &statev1.Service{
		Name: f.service, Path: "/" + f.service, Hosts: []string{is.Agent},
		Selectors: []string{selector.UID + ":" + strconv.Itoa(os.Getuid()), selector.Run + ":" + id},
		Port:      uint32(f.port), HealthPath: f.health, OutboundPort: uint32(outbound - is.PortOffset), Calls: f.calls,
	}
	if f.tcp {
		service.Protocol = statev1.Protocol_PROTOCOL_TCP
	}
	object := &statev1.Object{Owner: owner, Source: "entente run:1", Kind: &statev1.Object_Service{Service: service}}
	return service, f.admin(ctx, nodes, func(ctx context.Context, client ententev1.AdminClient) error {
		request := &ententev1.ApplyRequest{Objects: []*statev1.Object{object}, DryRun: true}
		would, err := client.Apply(ctx, request)
		if err != nil {
			return err
		}
		if action := would.GetChanges()[0].GetAction(); action != "created" && !f.replace {
			return status.Errorf(codes.AlreadyExists, "%s has a service %s already: take another name, or --replace if it is what a killed run has left", f.domain, f.service)
		}
		request.DryRun = false
		_, err = client.Apply(ctx, request)
		return err
	})
}

func (f *runFlags) withdraw(ctx context.Context, say io.Writer, nodes []string) {
	err := f.admin(ctx, nodes, func(ctx context.Context, client ententev1.AdminClient) error {
		_, err := client.Apply(ctx, &ententev1.ApplyRequest{Deletes: []*statev1.ObjectKey{{Kind: "Service", Name: f.service}}})
		return err
	})
	if err != nil {
		fmt.Fprintf(say, "entente: the service %s stays declared: %s\n", f.service, message(err))
	}
}

// freePort finds a port for the outbound door, above the offset that the agent adds to
// what the catalogue says.
func freePort(address string, offset int) (int, error) {
	for range 200 {
		l, err := net.Listen("tcp", net.JoinHostPort(address, "0"))
		if err != nil {
			return 0, fmt.Errorf("cannot find a free port at %s, where the agent serves: is it on this host? %w", address, err)
		}
		port := l.Addr().(*net.TCPAddr).Port
		l.Close()
		if port > offset {
			return port, nil
		}
	}
	return 0, fmt.Errorf("no free port at %s is above the agent's sidecar.portOffset of %d", address, offset)
}

// identified waits until the agent holds an SVID for the service and its way out is open.
func (f *runFlags) identified(ctx context.Context, agent *admin.Client, signals <-chan os.Signal) (*admin.Identity, error) {
	ctx, cancel := context.WithTimeout(ctx, f.wait)
	defer cancel()
	for {
		is, err := agent.Status(ctx)
		if err == nil {
			for _, identity := range is.Identities {
				if identity.Entry == ca.ServiceEntry(f.service) && identity.ValidUntil != nil {
					return &identity, nil
				}
			}
		}
		select {
		case <-time.After(2 * time.Millisecond):
		case s := <-signals:
			return nil, exited(128 + int(s.(syscall.Signal)))
		case <-ctx.Done():
			return nil, status.Errorf(codes.Unavailable, "the agent has no SVID for %s within %s: does its CA answer? entente agent healthcheck says more", f.service, f.wait)
		}
	}
}

func (f *runFlags) environment(is *admin.Status, id, listen, outbound string) []string {
	env := append(os.Environ(),
		"ENTENTE_SPIFFE_ID="+id,
		"ENTENTE_OUTBOUND=http://"+outbound,
		"SPIFFE_ENDPOINT_SOCKET=unix://"+is.WorkloadAPI,
	)
	if listen != "" {
		env = append(env, "ENTENTE_LISTEN="+listen, "HOST="+is.AppAddress, "PORT="+strconv.Itoa(int(f.port)+is.PortOffset))
	}
	if f.proxy {
		env = append(env, "http_proxy=http://"+outbound, "HTTP_PROXY=http://"+outbound, "no_proxy=localhost,127.0.0.0/8,::1", "NO_PROXY=localhost,127.0.0.0/8,::1")
	}
	return env
}

// introduce says who the program is, beside the program's own output.
func (f *runFlags) introduce(say io.Writer, identity *admin.Identity, took time.Duration, listen, outbound string) {
	if f.json {
		json.NewEncoder(say).Encode(map[string]any{
			"service": f.service, "spiffe_id": identity.SPIFFEID, "valid_until": identity.ValidUntil, "svid_ms": float64(took.Microseconds()) / 1000,
			"listen": listen, "outbound": "http://" + outbound,
		})
		return
	}
	fmt.Fprintf(say, "%s: %s, SVID in %.0f ms; calls it makes through %s carry its identity\n", f.service, identity.SPIFFEID, float64(took.Microseconds())/1000, outbound)
}

// watch says when others can reach the program, and what to do when they cannot.
func (f *runFlags) watch(ctx context.Context, say io.Writer, agent *admin.Client, listen string) {
	began, told := time.Now(), false
	for {
		is, err := agent.Status(ctx)
		if err == nil {
			for _, identity := range is.Identities {
				if identity.Entry == ca.ServiceEntry(f.service) && identity.Healthy != nil && *identity.Healthy {
					fmt.Fprintf(say, "%s: others reach it as http://%s.%s/\n", f.service, f.service, f.domain)
					return
				}
			}
		}
		if !told && time.Since(began) > 5*time.Second {
			told = true
			fmt.Fprintf(say, "%s: nothing answers at %s yet, so nobody can be sent there: the program must listen on that address ($ENTENTE_LISTEN) or on 0.0.0.0\n", f.service, listen)
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return
		}
	}
}

// inForeground tells whether a terminal sends its signals to this process group.
func inForeground() bool {
	group, err := unix.IoctlGetInt(int(os.Stdin.Fd()), unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

// exitOf makes this process's exit code of a program's end: its own, or 128 and the
// number of the signal that ended it.
func exitOf(err error) error {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return err
	}
	if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return exited(128 + int(ws.Signal()))
	}
	return exited(exit.ExitCode())
}
