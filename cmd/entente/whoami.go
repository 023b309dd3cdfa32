package main

import (
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/federation/catalog"
)

func whoamiCommand() *cobra.Command {
	var admin adminFlags
	c := &cobra.Command{
		Use:   "whoami",
		Short: "Show as whom a CA node knows you, and your roles",
		Long: `Over the admin socket of a CA node you are an operator of its host and may do everything. With --server you are the
SPIFFE ID of your SVID, and may do what the RoleBindings that name it allow. Exit code 4: you have no role.`,
		Example: `  entente whoami --server ca-1.banking.example:8443
  entente whoami --server ca-1.banking.example:8443 --identity ./alice`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				r, err := client.WhoAmI(c.Context(), &ententev1.WhoAmIRequest{})
				if err != nil {
					return err
				}
				if admin.json {
					if err := printJSON(c.OutOrStdout(), r); err != nil {
						return err
					}
				} else if err := printWho(c, r); err != nil {
					return err
				}
				if !r.GetOperator() && len(r.GetBindings()) == 0 {
					return refusedError{fmt.Errorf("no role is bound to %s: a trust-admin applies a RoleBinding that names it", r.GetWho())}
				}
				return nil
			})
		},
	}
	admin.register(c)
	return c
}

func printWho(c *cobra.Command, r *ententev1.WhoAmIResponse) error {
	fmt.Fprintln(c.OutOrStdout(), r.GetWho())
	if r.GetOperator() {
		_, err := fmt.Fprintln(c.OutOrStdout(), "may do everything, as an operator of the CA node's host")
		return err
	}
	if len(r.GetBindings()) == 0 {
		return nil
	}
	table := tabwriter.NewWriter(c.OutOrStdout(), 0, 4, 2, ' ', 0)
	fmt.Fprintln(table, "ROLE\tAT OR BELOW\tBINDING")
	for _, b := range r.GetBindings() {
		where := strings.Join(b.GetPrefixes(), ", ")
		if where == "" {
			where = "everywhere"
		}
		fmt.Fprintf(table, "%s\t%s\t%s\n", catalog.RoleName(b.GetRole()), where, b.GetName())
	}
	return table.Flush()
}
