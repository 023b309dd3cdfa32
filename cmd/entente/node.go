package main

import (
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
)

func nodeCommand() *cobra.Command {
	return group(&cobra.Command{
		Use:   "node",
		Short: "The CA nodes of a trust domain",
		Example: `  entente node list
  entente node remove ca-3
  entente node remove ca-3 --compromised`,
	}, nodeListCommand(), nodeRemoveCommand())
}

func nodeListCommand() *cobra.Command {
	var admin adminFlags
	c := &cobra.Command{
		Use:     "list",
		Short:   "Show the CA nodes",
		Example: "  entente node list",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				status, err := client.Status(c.Context(), &ententev1.StatusRequest{})
				if err != nil {
					return err
				}
				if admin.json {
					return printJSON(c.OutOrStdout(), &ententev1.StatusResponse{
						Members: status.GetMembers(), LeaderId: status.GetLeaderId(), NodeId: status.GetNodeId(), Revision: status.GetRevision(),
					})
				}
				table := tabwriter.NewWriter(c.OutOrStdout(), 0, 4, 2, ' ', 0)
				fmt.Fprintln(table, "NODE\tDATACENTER\tROLE\tSIGNS\tAPI\tRAFT\tID")
				for _, m := range status.GetMembers() {
					member, role := m.GetMember(), "non-voter"
					switch {
					case member.GetId() == status.GetLeaderId():
						role = "leader"
					case m.GetVoterNow():
						role = "voter"
					}
					fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", member.GetName(), member.GetDatacenter(), role,
						yesNo(member.GetSigning()), member.GetApiAddress(), member.GetRaftAddress(), member.GetId()[:12])
				}
				return table.Flush()
			})
		},
	}
	admin.register(c)
	return c
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
