package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
)

func nodeRemoveCommand() *cobra.Command {
	var (
		admin       adminFlags
		compromised bool
	)
	c := &cobra.Command{
		Use:   "remove NODE",
		Short: "Take a CA node out of its cluster",
		Long: `Its vote and its connections end. What it signed is accepted until it ends by itself; with --compromised its authorities
are revoked at once, every connection that rests on them is cut, and workloads with SVIDs of it get new ones from other
nodes. Where three or more CA nodes vote, the operators of a majority of them must approve it: entente node approve.
Refused when the voters that would be left could not agree on anything. The node's key cannot return: a node that
is to come back joins anew, with an empty data directory and a new token.`,
		Example: `  entente node remove ca-3
  entente node remove ca-3 --compromised     # its host is in somebody else's hands`,
		Args: oneArgument("the CA node's name: see entente node list"),
		RunE: func(c *cobra.Command, args []string) error {
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				response, err := client.RemoveNode(c.Context(), &ententev1.RemoveNodeRequest{Name: args[0], Compromised: compromised})
				if err != nil {
					return err
				}
				if admin.json {
					return printJSON(c.OutOrStdout(), response)
				}
				out := c.OutOrStdout()
				if response.GetApproval() != nil {
					return printApproval(out, response.GetApproval())
				}
				fmt.Fprintf(out, "CA node %s is removed at revision %s\n", response.GetMember().GetName(), ca.Revision(response.GetRevision()))
				for _, a := range response.GetAuthorities() {
					fmt.Fprintf(out, "authority %s is %s\n", a.GetId()[:12], ca.PhaseName(a.GetPhase()))
				}
				if held := response.GetHeldBy(); len(held) > 0 {
					fmt.Fprintf(out, "lost their SVIDs, and get new ones: %s\n", strings.Join(held, ", "))
				}
				if response.GetNote() != "" {
					fmt.Fprintln(out, "note:", response.GetNote())
				}
				return nil
			})
		},
	}
	admin.register(c)
	c.Flags().BoolVar(&compromised, "compromised", false, "somebody else may have its keys: revoke what it signed")
	return c
}
