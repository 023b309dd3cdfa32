package main

import (
	"errors"
	"strings"
	"time"

	"github.com/spf13/cobra"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
)

func sidecarCommand() *cobra.Command {
	return group(&cobra.Command{
		Use:     "sidecar",
		Short:   "The sidecar of this host's agent",
		Example: "  entente sidecar status accounts.banking.example",
	}, sidecarStatusCommand())
}

func sidecarStatusCommand() *cobra.Command {
	var flags gatewayFlags
	c := &cobra.Command{
		Use:   "status [SERVICE]",
		Short: "Show how this host's sidecar sees its domain",
		Long: `Ask the agent of this host at its admin socket, as root or the agent's user, or with
--server from elsewhere, as an SVID with a role: identities, the
CA node that it follows, bundles, listeners, and where its sidecar would send requests for
each service, or for one. The same as entente gateway status.`,
		Example: "  entente sidecar status\n  entente sidecar status accounts.banking.example --json",
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usageError{c, errors.New("name at most one service")}
			}
			request := &ententev1.DataPlaneStatusRequest{Service: strings.Join(args, "")}
			return flags.call(c.Context(), func(client ententev1.DataPlaneClient) error {
				s, err := gatewayStatus(c.Context(), client, request)
				switch {
				case err != nil:
					return err
				case flags.json:
					return printJSON(c.OutOrStdout(), s)
				}
				return printDataPlaneStatus(c.OutOrStdout(), s, time.Now())
			})
		},
	}
	flags.process("agent", "sidecar.inbound")
	flags.register(c)
	return c
}
