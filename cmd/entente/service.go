package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/meshagent/admin"
	"github.com/entente-mesh/entente/meshagent/services"
)

func serviceCommand() *cobra.Command {
	return group(&cobra.Command{
		Use:   "service",
		Short: "What this host says of the services that run on it",
		Long: `Register where the services of this host listen and how their health is found out, list
them, and take them out of service without a failed request.

A host speaks only of services that the catalogue places on it ("entente apply"): a
registration gives nobody an identity. The verbs ask the host's agent at its admin socket,
as root or the agent's user.`,
		Example: "  entente service list\n  entente service drain web",
	}, serviceListCommand(), serviceRegisterCommand(), serviceDeregisterCommand(), serviceDrainCommand(), serviceRestoreCommand(), serviceValidateCommand())
}

// ask makes a call that is answered with the host's services, and shows them; only: just
// the one.
func (f *agentFlags) ask(c *cobra.Command, within time.Duration, only string, call func(context.Context, *admin.Client) (*admin.Services, error)) error {
	ctx, cancel := context.WithTimeout(c.Context(), within)
	defer cancel()
	list, err := call(ctx, admin.NewClient(f.socket))
	if err != nil {
		return agentError(err)
	}
	for i := range list.Services {
		if list.Services[i].Service == only {
			list.Services, list.Broken = list.Services[i:i+1], nil
			break
		}
	}
	if f.json {
		return printValue(c.OutOrStdout(), list)
	}
	return printServices(c.OutOrStdout(), list)
}

func printServices(w io.Writer, list *admin.Services) error {
	table := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(table, "SERVICE\tSTATE\tADDRESS\tCHECK\tREQUESTS\tSOURCE\tWHY")
	for _, s := range list.Services {
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%d\t%s\t%s\n", s.Service, s.State, cmp.Or(s.Address, "-"), cmp.Or(s.Check, "-"), s.Requests, s.Source, s.Why)
		for _, hidden := range s.Hidden {
			fmt.Fprintf(table, "\t\t\t\t\t(%s)\tdoes not count beside it\n", hidden)
		}
	}
	if err := table.Flush(); err != nil {
		return err
	}
	for _, b := range list.Broken {
		fmt.Fprintf(w, "! not used, the last good state stays: %s\n", b.Why)
	}
	return nil
}

// oneService takes the only argument, the name of a service.
func oneService(c *cobra.Command, args []string) (string, error) {
	if len(args) != 1 {
		return "", usageError{c, errors.New("name one service")}
	}
	if err := ca.CheckLabel(args[0]); err != nil {
		return "", usageError{c, err}
	}
	return args[0], nil
}

func serviceListCommand() *cobra.Command {
	var flags agentFlags
	c := &cobra.Command{
		Use:   "list",
		Short: "List the services of this host: how they are, and where that is said",
		Long: `SOURCE is where the registration that counts stands: "command", FILE:LINE, or "catalogue"
where the host says nothing. "refused" is a registration of a service that the catalogue
does not place on this host. Exit code 1 when a file of registrations is broken.`,
		Example: `  entente service list
  entente service list --json | jq '.services[] | select(.state != "healthy")'`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			broken := 0
			err := flags.ask(c, time.Minute, "", func(ctx context.Context, a *admin.Client) (*admin.Services, error) {
				list, err := a.Services(ctx)
				if err == nil {
					broken = len(list.Broken)
				}
				return list, err
			})
			if err == nil && broken > 0 {
				err = findings{fmt.Errorf("%d files of registrations are broken: mend them; entente service validate FILE says more", broken)}
			}
			return err
		},
	}
	flags.register(c)
	return c
}

// registration is what the flags of `service register` say.
type registration struct {
	services.Registration
	health  services.Health
	grpc    string
	command bool
	file    string
}

func serviceRegisterCommand() *cobra.Command {
	var flags agentFlags
	var r registration
	c := &cobra.Command{
		Use:   "register NAME [flags] [-- COMMAND]  |  register -f FILE",
		Short: "Say where a service listens on this host and how it is checked",
		Long: `Register a service of this host by command, in the place of what a file or the catalogue
says of it, until "service deregister": also after the agent was restarted.
With -f everything that a file for the drop-in directory may hold.`,
		Example: `  entente service register web --port 8081 --http /healthz --interval 2s
  entente service register ledger --grpc bank.v1.Ledger
  entente service register web --listen-socket /run/web/http.sock
  entente service register queue --command -- /usr/lib/queue/check --depth 100
  entente service register -f web.yaml`,
		RunE: func(c *cobra.Command, args []string) error {
			text, name, err := r.text(c, args)
			if err != nil {
				return err
			}
			return flags.ask(c, time.Minute, name, func(ctx context.Context, a *admin.Client) (*admin.Services, error) {
				return a.RegisterServices(ctx, r.file, text)
			})
		},
	}
	flags.register(c)
	f := c.Flags()
	f.StringVarP(&r.file, "file", "f", "", "file with services:, as in the drop-in directory")
	f.Uint16Var(&r.Port, "port", 0, "port it listens on here; default: the catalogue's")
	f.StringVar(&r.Address, "address", "", "loopback address it listens on; default: the agent's sidecar.appAddress")
	f.StringVar(&r.Socket, "listen-socket", "", "unix socket it listens on, instead of --port and --address")
	f.StringVar(&r.health.HTTP, "http", "", "check by GET of this path; 2xx is good")
	f.BoolVar(&r.health.TCP, "tcp", false, "check by a TCP connection")
	f.StringVar(&r.grpc, "grpc", "", "check by gRPC's health protocol, for this gRPC service; \"\": the whole server")
	f.BoolVar(&r.command, "command", false, "check by the command behind --; it runs as the agent does")
	f.DurationVar(&r.health.Interval, "interval", 0, "between two checks; default: the agent's")
	f.DurationVar(&r.health.Timeout, "timeout", 0, "of one check; default: the agent's")
	f.IntVar(&r.health.HealthyThreshold, "healthy-threshold", 0, "good checks in a row that bring it back; default: the agent's")
	f.IntVar(&r.health.UnhealthyThreshold, "unhealthy-threshold", 0, "bad checks in a row that make it unhealthy; default: the agent's")
	f.DurationVar(&r.Drain, "drain", 0, "how long its requests may take when it is drained; default 10s")
	return c
}

// text is what is to be registered, as a file holds it.
func (r *registration) text(c *cobra.Command, args []string) (text []byte, name string, err error) {
	if r.file != "" {
		if len(args) > 0 {
			return nil, "", usageError{c, errors.New("give a file or a service, not both")}
		}
		text, err := os.ReadFile(r.file)
		if err != nil {
			return nil, "", usageError{c, err}
		}
		return text, "", nil
	}
	if at := c.ArgsLenAtDash(); at >= 0 {
		r.health.Command, args = args[at:], args[:at]
	}
	if name, err = oneService(c, args); err != nil {
		return nil, "", err
	}
	if r.command != (len(r.health.Command) > 0) {
		return nil, "", usageError{c, errors.New("--command belongs together with -- and the command")}
	}
	r.Service = name
	if c.Flags().Changed("grpc") {
		r.health.GRPC = &services.GRPC{Service: r.grpc}
	}
	r.Health = &r.health
	text, err = services.Write([]services.Registration{r.Registration})
	if err != nil {
		return nil, "", err
	}
	if _, err := services.Read("flags", bytes.NewReader(text)); err != nil {
		return nil, "", usageError{c, err}
	}
	r.file = "flags"
	return text, name, nil
}

func serviceDeregisterCommand() *cobra.Command {
	var flags agentFlags
	c := &cobra.Command{
		Use:     "deregister NAME",
		Short:   "Take back what was registered by command",
		Long:    "What a file or the catalogue says of the service counts again. To take a service out, drain it.",
		Example: "  entente service deregister web",
		RunE: func(c *cobra.Command, args []string) error {
			name, err := oneService(c, args)
			if err != nil {
				return err
			}
			return flags.ask(c, time.Minute, name, func(ctx context.Context, a *admin.Client) (*admin.Services, error) {
				return a.DeregisterService(ctx, name)
			})
		},
	}
	flags.register(c)
	return c
}

func serviceDrainCommand() *cobra.Command {
	var flags agentFlags
	var within time.Duration
	c := &cobra.Command{
		Use:   "drain NAME",
		Short: "Take a service of this host out without a failed request",
		Long: `Withdraw the instance first, so that everybody sends new requests elsewhere; let the requests
under way end; then take no more. It is done when the command returns, and lasts until
"service restore", also when the agent is restarted.`,
		Example: `  entente service drain web && systemctl stop web && install web.new /opt/web/bin/web
  systemctl start web && entente service restore web`,
		RunE: func(c *cobra.Command, args []string) error {
			name, err := oneService(c, args)
			if err != nil {
				return err
			}
			if within < 0 || within > time.Hour {
				return usageError{c, errors.New("--within is at most an hour")}
			}
			return flags.ask(c, 2*time.Hour, name, func(ctx context.Context, a *admin.Client) (*admin.Services, error) {
				return a.DrainService(ctx, name, within)
			})
		},
	}
	flags.register(c)
	c.Flags().DurationVar(&within, "within", 0, "how long requests under way may take, then they are cut; default: as registered, else 10s")
	return c
}

func serviceRestoreCommand() *cobra.Command {
	var flags agentFlags
	c := &cobra.Command{
		Use:     "restore NAME",
		Short:   "Put a drained service back; it gets requests when its checks are good",
		Example: "  entente service restore web",
		RunE: func(c *cobra.Command, args []string) error {
			name, err := oneService(c, args)
			if err != nil {
				return err
			}
			return flags.ask(c, time.Minute, name, func(ctx context.Context, a *admin.Client) (*admin.Services, error) {
				return a.RestoreService(ctx, name)
			})
		},
	}
	flags.register(c)
	return c
}

func serviceValidateCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "validate FILE...",
		Short:   "Say whether files for the drop-in directory can be read",
		Example: "  entente service validate web.yaml && install -m 0644 web.yaml /etc/entente/services.d/",
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageError{c, errors.New("name a file")}
			}
			var errs []error
			for _, name := range args {
				f, err := os.Open(name)
				if err != nil {
					return usageError{c, err}
				}
				_, err = services.Read(name, f)
				f.Close()
				errs = append(errs, err)
			}
			if err := errors.Join(errs...); err != nil {
				return findings{err}
			}
			return nil
		},
	}
}
