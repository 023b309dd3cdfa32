package main

import (
	"errors"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/entente-mesh/entente/scenarios"
	"github.com/entente-mesh/entente/scenarios/platform"
)

func demoCommand() *cobra.Command {
	var options scenarios.Options
	c := &cobra.Command{
		Use:   "demo",
		Short: "Replay a two-domain financial platform, and let a datacenter die",
		Long: `Start two trust domains in two datacenters with real processes on loopback, make
real calls across them, refuse what must be refused, kill a datacenter under load,
and print what was measured. Needs no root, no container engine and no server.
Ends every process and removes its directory, also on Ctrl-C.`,
		Example: `  entente demo
  entente demo --json report.json
  entente demo --keep        # stay up, with curl lines to try`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			// Further signals change nothing: tidying up takes less than a second and must not be cut short.
			ctx, stop := signal.NotifyContext(c.Context(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
			defer stop()
			options.Out = c.OutOrStdout()
			_, err := scenarios.Demo(ctx, options)
			if errors.Is(err, scenarios.ErrFailed) {
				return findings{err}
			}
			return err
		},
	}
	f := c.Flags()
	f.StringVar(&options.File, "file", "", "scenario to replay instead of the financial platform")
	f.StringVar(&options.JSONFile, "json", "", "write the report to this file as JSON too")
	f.BoolVar(&options.Keep, "keep", false, "stay up after the story until Ctrl-C")
	f.StringVar(&options.WorkDir, "workdir", "", "keep configurations, state and logs in this new directory")
	f.BoolVar(&options.OneAddress, "one-address", false, "put every host at 127.0.0.1, as where the system has no other loopback address")
	f.BoolVar(&options.Verbose, "verbose", false, "say more")
	return c
}

// demoServiceCommand runs one of the demo's service programs. The demo hard-links this
// binary under the service's name, so that its path tells services apart.
func demoServiceCommand() *cobra.Command {
	var config string
	c := &cobra.Command{
		Use:    "demo-service",
		Short:  "Run a service program of a scenario",
		Hidden: true,
		Args:   noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(c.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return platform.Run(ctx, config)
		},
	}
	c.Flags().StringVar(&config, "config", "app.yaml", "its configuration")
	return c
}
