package main

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
)

func nodeCommand() *cobra.Command {
	return group(&cobra.Command{
		Use:     "node",
		Short:   "The nodes of a trust domain's CA",
		Example: "  entente node list",
	}, nodeListCommand(), nodePromoteCommand(), nodeRemoveCommand(), nodeApproveCommand())
}

func nodeListCommand() *cobra.Command {
	var admin adminFlags
	c := &cobra.Command{
		Use:   "list",
		Short: "Show the CA nodes and how far each of them is",
		Long: `Show every CA node, whether it votes, and how many log entries it lacks, as the leader
knows it. Without a leader the lag is not known.`,
		Example: "  entente node list",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				nodes, err := client.ListNodes(c.Context(), &ententev1.ListNodesRequest{})
				if err != nil {
					return err
				}
				if admin.json {
					return printJSON(c.OutOrStdout(), nodes)
				}
				return printNodes(c.OutOrStdout(), nodes)
			})
		},
	}
	admin.register(c)
	return c
}

func printNodes(w io.Writer, nodes *ententev1.ListNodesResponse) error {
	table := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(table, "NODE\tDATACENTER\tROLE\tRAFT\tAPI\tLAG\tCONTACT")
	for _, n := range nodes.GetNodes() {
		m := n.GetMember()
		role := "non-voter"
		switch {
		case m.GetId() == nodes.GetLeaderId():
			role = "leader"
		case n.GetVoterNow():
			role = "voter"
		case m.GetVoter():
			role = "voter once it has caught up"
		}
		if !m.GetSigning() {
			role += ", witness"
		}
		lag, contact := "unknown", "never"
		if nodes.GetLeaderId() != "" {
			lag = fmt.Sprintf("%d entries", n.GetLag())
		} else {
			contact = "unknown"
		}
		if n.GetContactSeconds() >= 0 {
			contact = fmt.Sprintf("%.1f s ago", n.GetContactSeconds())
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", m.GetName(), m.GetDatacenter(), role, m.GetRaftAddress(), m.GetApiAddress(), lag, contact)
	}
	return table.Flush()
}

func nodePromoteCommand() *cobra.Command {
	var admin adminFlags
	c := &cobra.Command{
		Use:     "promote NAME",
		Short:   "Make a non-voter one that votes",
		Long:    "Have it agreed that a CA node votes. It does so as soon as it has caught up.",
		Example: "  entente node promote ca-dc3",
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError{c, fmt.Errorf("%s takes one NAME", c.CommandPath())}
			}
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				response, err := client.PromoteNode(c.Context(), &ententev1.PromoteNodeRequest{Name: args[0]})
				if err != nil {
					return err
				}
				if admin.json {
					return printJSON(c.OutOrStdout(), response)
				}
				if response.GetApproval() != nil {
					return printApproval(c.OutOrStdout(), response.GetApproval())
				}
				_, err = fmt.Fprintf(c.OutOrStdout(), "%s votes as soon as it has caught up; watch it: entente node list\n", args[0])
				return err
			})
		},
	}
	admin.register(c)
	return c
}
