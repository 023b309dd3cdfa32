package main

import (
	"fmt"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/entente-mesh/entente/ca/keystore"
)

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Say which build this is",
		Example: "  entente version",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			version, commit := "(development)", ""
			if info, ok := debug.ReadBuildInfo(); ok {
				if v := info.Main.Version; v != "" && v != "(devel)" {
					version = v
				}
				for _, s := range info.Settings {
					if s.Key == "vcs.revision" {
						commit = " " + s.Value
					}
				}
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
