package main

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/spf13/cobra"

	gateway "github.com/entente-mesh/entente/eastwest-gateway"
	"github.com/entente-mesh/entente/eastwest-gateway/edge"
	"github.com/entente-mesh/entente/internal/daemon"
)

func gatewayCommand() *cobra.Command {
	return group(&cobra.Command{
		Use:     "gateway",
		Short:   "An east-west gateway, an entrance for users, or both",
		Example: "  entente gateway run --config gateway.yaml\n  entente gateway status\n  entente gateway drain --reason \"kernel update\"",
	}, longRunning(gatewayRunCommand()), gatewayStatusCommand(), gatewayDrainCommand(), gatewayUndrainCommand())
}

func gatewayRunCommand() *cobra.Command {
	var flags configFlags
	c := &cobra.Command{
		Use:     "run",
		Short:   "Run a gateway",
		Example: "  entente gateway run --config gateway.yaml",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			config, err := readConfig(c, flags.file, gateway.ReadConfig)
			if err != nil {
				return err
			}
			log, err := logger(c, config.Log.Format, config.Log.Level)
			if err != nil {
				return err
			}
			var roles []gateway.Role
			if !config.Edge.IsZero() {
				var entrance edge.Config
				if err := config.Edge.Decode(&entrance); err != nil {
					return usageError{c, err}
				}
				roles = append(roles, edgeRole(entrance, log))
			}
			if flags.check {
				return printConfig(c.OutOrStdout(), config)
			}
			g, err := gateway.New(config, log, roles...)
			if err != nil {
				return err
			}
			return runUntilSignal(log, g.Run)
		},
	}
	flags.register(c, "/etc/entente/gateway.yaml")
	flags.registerCheck(c)
	return c
}

// edgeRole is the gateway's listener for clients without SVIDs.
func edgeRole(config edge.Config, log *slog.Logger) gateway.Role {
	return gateway.Role{
		Name:     "edge",
		Identity: config.Identity,
		Listen:   config.Listen,
		Run: func(ctx context.Context, mesh *gateway.Mesh) error {
			listener, err := daemon.Listen(config.Listen)
			if err != nil {
				return fmt.Errorf("edge.listen: %w", err)
			}
			e, err := edge.New(config, listener, mesh, mesh.Files, log)
			if err != nil {
				listener.Close()
				return err
			}
			return e.Run(ctx)
		},
	}
}
