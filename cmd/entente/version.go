package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/entente-mesh/entente/ca/keystore"
	"github.com/entente-mesh/entente/internal/daemon"
)

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Say which build this is",
		Example: "  entente version",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			version, commit := daemon.Build()
			if commit != "" {
				commit = " " + commit
			}
			pkcs11 := "without"
			if keystore.PKCS11 {
				pkcs11 = "with"
			}
			_, err := fmt.Fprintf(c.OutOrStdout(), "entente %s%s, %s PKCS#11\n", version, commit, pkcs11)
			return err
		},
	}
}
