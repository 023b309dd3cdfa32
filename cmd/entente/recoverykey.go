package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
)

func caRecoveryKeyCommand() *cobra.Command {
	var admin adminFlags
	c := &cobra.Command{
		Use:   "recovery-key",
		Short: "Print the public half of the recovery key, for configurations",
		Long: `Agents and gateways pin the public half of the cluster's recovery key: without its
signature they believe no new epoch. Join tokens carry it. Set it as ca.recoveryKey where
there is no token: gateways, and hosts that attest by certificate.`,
		Example: "  entente ca recovery-key",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				status, err := client.Status(c.Context(), &ententev1.StatusRequest{})
				if err != nil {
					return err
				}
				key := status.GetCluster().GetRecoveryKey()
				if len(key) == 0 {
					return errors.New("this cluster was made without a recovery key")
				}
				if admin.json {
					return writeJSON(c.OutOrStdout(), map[string]string{"recoveryKey": ca.RecoveryKeyText(key)})
				}
				_, err = fmt.Fprintln(c.OutOrStdout(), ca.RecoveryKeyText(key))
				return err
			})
		},
	}
	admin.register(c)
	return c
}
