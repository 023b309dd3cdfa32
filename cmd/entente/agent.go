package main

import (
	"context"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/meshagent"
	"github.com/entente-mesh/entente/meshagent/admin"
	"github.com/entente-mesh/entente/meshagent/files"
	"github.com/entente-mesh/entente/meshagent/names"
	"github.com/entente-mesh/entente/meshagent/sds"
	"github.com/entente-mesh/entente/meshagent/services"
	"github.com/entente-mesh/entente/meshagent/sidecar"
	"github.com/entente-mesh/entente/meshagent/workloadapi"
)

func agentCommand() *cobra.Command {
	return group(&cobra.Command{
		Use:     "agent",
		Short:   "The mesh agent of a host: identities and sidecars for its workloads",
		Long:    "run, status, explain-pid and healthcheck are for the host itself; list, show, ban, isolate and evict ask a CA node for the agents of its domain.",
		Example: "  entente agent run --config agent.yaml\n  entente agent list",
	}, longRunning(agentRunCommand()), agentStatusCommand(), agentExplainPIDCommand(), agentHealthcheckCommand(),
		agentListCommand(), agentShowCommand(), agentBanCommand(), agentIsolateCommand(), agentEvictCommand())
}

func agentRunCommand() *cobra.Command {
	var flags configFlags
	c := &cobra.Command{
		Use:     "run",
		Short:   "Run the agent of this host",
		Long:    "SIGHUP has the drop-in directory of services read at once and the access log opened again; everything else of the file needs a restart.",
		Example: "  entente agent run --config agent.yaml",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			config, err := readConfig(c, flags.file, meshagent.ReadConfig)
			if err != nil {
				return err
			}
			if flags.check {
				return printConfig(c.OutOrStdout(), config)
			}
			log, err := logger(c, config.Log.Format, config.Log.Level)
			if err != nil {
				return err
			}
			return runAgent(config, log)
		},
	}
	flags.register(c, "/etc/entente/agent.yaml")
	flags.registerCheck(c)
	return c
}

// runAgent wires the agent to its doors: the Workload API always, the sidecar where
// this host serves.
func runAgent(config *meshagent.Config, log *slog.Logger) error {
	agent, err := meshagent.New(config, log)
	if err != nil {
		return err
	}
	metrics := agent.Metrics()
	socket, err := workloadapi.Listen(config.WorkloadAPI.Socket)
	if err != nil {
		return err
	}
	api := workloadapi.New(agent, socket, log)
	api.Beside(sds.New(agent, config.SDS, workloadapi.Caller, log).Register)
	local, err := admin.Listen(config.Admin.Socket)
	if err != nil {
		return err
	}
	administration := admin.New(agent, local, log)
	doors := []meshagent.Door{
		{Name: "admin socket", Run: administration.Run},
		{Name: "workload API", Run: api.Run},
	}
	if len(config.Files) > 0 {
		doors = append(doors, meshagent.Door{Name: "files", Run: files.New(agent, log).Run})
	}
	if config.Sidecar.Inbound != "" {
		var access *slog.Logger
		records, err := config.AccessLog.Open(metrics)
		if err != nil {
			return err
		}
		if records != nil {
			defer records.Close()
			access = records.Logger
			doors = append(doors, meshagent.Door{Name: "access log", Run: func(ctx context.Context) error { return records.Run(ctx, log) }})
		}
		called, resolver, err := openNames(config, agent, log)
		if err != nil {
			return err
		}
		if resolver != nil {
			doors = append(doors, meshagent.Door{Name: "DNS", Run: resolver.Run})
		}
		car, err := sidecar.New(sidecar.Config{
			Names:       called,
			TrustDomain: config.Domain(),
			Datacenter:  config.Datacenter,
			Agent:       config.Name,
			Inbound:     config.Sidecar.Inbound,
			AppAddress:  config.Sidecar.AppAddress,
			PortOffset:  config.Sidecar.PortOffset,
			Sockets:     config.Sidecar.Sockets,
			Log:         log,
			AccessLog:   access,
			Metrics:     metrics,

			Administration: administration.Remote(),
			Own:            agent.OwnSVID(),
		}, agent)
		if err != nil {
			return err
		}
		administration.Show(car)
		doors = append(doors,
			meshagent.Door{Name: "sidecar", Run: car.Run, Ready: car.Ready},
			meshagent.Door{Name: "administrators", Run: administration.Remote().Serve},
			meshagent.Door{Name: "sidecar's view", Run: func(ctx context.Context) error { return follow(ctx, agent, car, log) }})
	}
	reread := daemon.OnHangup("services of "+config.ServicesDir, func() error { agent.Reread(); return nil })
	doors = append(doors, meshagent.Door{Name: "services directory", Run: func(ctx context.Context) error { return reread.Run(ctx, log) }})
	return runUntilSignal(log, func(ctx context.Context) error { return agent.Run(ctx, doors...) })
}

// openNames opens the agent's DNS, if it has one.
func openNames(config *meshagent.Config, agent *meshagent.Agent, log *slog.Logger) (*sidecar.Names, *names.Server, error) {
	if config.DNS.Listen == "" {
		return nil, nil, nil
	}
	network, err := netip.ParsePrefix(config.DNS.Network)
	if err != nil {
		return nil, nil, err
	}
	table, err := names.Open(network, filepath.Join(config.DataDir, "names.json"), config.TrustDomain, log)
	if err != nil {
		return nil, nil, err
	}
	resolver, err := names.Listen(table, config.DNS.Listen, log)
	if err != nil {
		return nil, nil, err
	}
	return &sidecar.Names{Assign: table.Assign, Identify: agent.IdentifyTCP, HTTPPort: uint16(max(config.DNS.HTTPPort, 0))}, resolver, nil
}

// follow hands the sidecar every new state of the agent.
func follow(ctx context.Context, agent *meshagent.Agent, car *sidecar.Sidecar, log *slog.Logger) error {
	for {
		state := agent.State()
		if state.Ready {
			world := sidecar.World{Revision: state.View.Changed, Urgent: state.View.Urgent, Dev: state.View.Cluster.GetDev(),
				Objects: state.View.Objects, Entries: state.Entries(), Endpoints: state.View.Instances, Local: map[string]sidecar.Local{}}
			for _, s := range state.Services {
				// Above the last port there is nobody: the agent reports such a service as unhealthy.
				_, err := netip.ParseAddrPort(s.Address)
				if err == nil || strings.HasPrefix(s.Address, services.UnixPrefix) {
					world.Local[s.Name] = sidecar.Local{Address: s.Address, Monitor: s.Instance, Open: s.Instance.Open()}
				}
			}
			if err := car.Update(world); err != nil {
				log.Error("objects of the catalogue cannot be used and are left out; upgrade this agent if it is older than the CA", "error", err.Error())
			}
		}
		select {
		case <-state.Changed():
		case <-ctx.Done():
			return nil
		}
	}
}
