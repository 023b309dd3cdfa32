package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
)

func nodeApproveCommand() *cobra.Command {
	var admin adminFlags
	c := &cobra.Command{
		Use:   "approve [CHANGE]",
		Short: "Approve a change of the CA nodes, or list those pending",
		Long: `Where three or more CA nodes vote, admitting, promoting and removing a CA node needs the
operators of a majority of the voters. The first runs the command itself; each other one
approves it here, on the host of another voter. Without CHANGE, list what is pending.
Approve only what you expect: ask the operator who proposed it.`,
		Example: `  entente node approve              # list
  entente node approve 5f0c21ab     # approve`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				if len(args) == 0 {
					return listChanges(c, client, admin.json)
				}
				response, err := client.ApproveChange(c.Context(), &ententev1.ApproveChangeRequest{Id: args[0]})
				if err != nil {
					return err
				}
				switch {
				case admin.json:
					return printJSON(c.OutOrStdout(), response)
				case response.GetCarriedOut():
					_, err = fmt.Fprintf(c.OutOrStdout(), "done at revision %s: %s\n", ca.Revision(response.GetRevision()), response.GetApproval().GetWhat())
					return err
				}
				return printApproval(c.OutOrStdout(), response.GetApproval())
			})
		},
	}
	admin.register(c)
	return c
}

func listChanges(c *cobra.Command, client ententev1.AdminClient, asJSON bool) error {
	response, err := client.ListChanges(c.Context(), &ententev1.ListChangesRequest{})
	if err != nil {
		return err
	}
	out := c.OutOrStdout()
	switch {
	case asJSON:
		return printJSON(out, response)
	case len(response.GetChanges()) == 0:
		_, err := fmt.Fprintln(out, "no change of the CA nodes is pending")
		return err
	}
	table := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintln(table, "CHANGE\tWHAT\tPROPOSED BY\tAPPROVED BY\tNEEDED\tUNTIL")
	for _, a := range response.GetChanges() {
		fmt.Fprintf(table, "%.12s\t%s\t%s\t%s\t%d\t%s\n", a.GetId(), a.GetWhat(), a.GetProposedBy(), strings.Join(a.GetApprovedBy(), ", "), a.GetNeeded(), date(a.GetNotAfter()))
	}
	return table.Flush()
}

// printApproval says what is missing until a change is carried out, and what to do.
func printApproval(w io.Writer, a *ententev1.Approval) error {
	_, err := fmt.Fprintf(w, "pending: %s: approved at %s, %d of the voters needed, until %s\non the host of %s: entente node approve %.12s\n",
		a.GetWhat(), strings.Join(a.GetApprovedBy(), ", "), a.GetNeeded(), time.Unix(a.GetNotAfter(), 0).UTC().Format(time.RFC3339),
		strings.Join(a.GetMissing(), " or "), a.GetId())
	return err
}
