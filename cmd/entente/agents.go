package main

import (
	"context"
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
)

func agentListCommand() *cobra.Command {
	var admin adminFlags
	c := &cobra.Command{
		Use:     "list",
		Short:   "Show the hosts that were admitted",
		Example: "  entente agent list",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				all := &ententev1.ListAgentsResponse{}
				for after, more := "", true; more; {
					page, err := client.ListAgents(c.Context(), &ententev1.ListAgentsRequest{After: after})
					if err != nil {
						return err
					}
					all.Agents = append(all.Agents, page.GetAgents()...)
					if more = page.GetMore(); more {
						after = page.GetAgents()[len(page.GetAgents())-1].GetAgent().GetName()
					}
				}
				if admin.json {
					return printJSON(c.OutOrStdout(), all)
				}
				table := tabwriter.NewWriter(c.OutOrStdout(), 0, 4, 2, ' ', 0)
				fmt.Fprintln(table, "AGENT\tDATACENTER\tADDRESSES\tENTRIES\tCONNECTED HERE\tADMITTED AT\tSTATE")
				for _, s := range all.GetAgents() {
					a := s.GetAgent()
					fmt.Fprintf(table, "%s\t%s\t%s\t%d\t%s\t%s\t%s\n", a.GetName(), a.GetDatacenter(), strings.Join(a.GetAddresses(), ","),
						s.GetEntries(), yesNo(s.GetHere()), ca.Revision(a.GetGeneration()), agentState(s))
				}
				return table.Flush()
			})
		},
	}
	admin.register(c)
	return c
}

func agentState(s *ententev1.AgentStatus) string {
	switch {
	case s.GetAgent().GetBanned():
		return "BANNED"
	case s.GetIsolated():
		return "ISOLATED by this node, not agreed yet"
	}
	return "admitted"
}

func agentShowCommand() *cobra.Command {
	var admin adminFlags
	c := &cobra.Command{
		Use:     "show AGENT",
		Short:   "Show one host: its key, its entries, what it serves",
		Example: "  entente agent show h1",
		Args:    oneArgument("the agent's name: see entente agent list"),
		RunE: func(c *cobra.Command, args []string) error {
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				r, err := client.GetAgent(c.Context(), &ententev1.GetAgentRequest{Name: args[0]})
				if err != nil {
					return err
				}
				if admin.json {
					return printJSON(c.OutOrStdout(), r)
				}
				a := r.GetStatus().GetAgent()
				table := tabwriter.NewWriter(c.OutOrStdout(), 0, 4, 2, ' ', 0)
				fmt.Fprintf(table, "AGENT\t%s\nSTATE\t%s\nDATACENTER\t%s\nADDRESSES\t%s\nKEY\t%s\nADMITTED AT\t%s\nCONNECTED HERE\t%s\n",
					a.GetName(), agentState(r.GetStatus()), a.GetDatacenter(), strings.Join(a.GetAddresses(), ","), a.GetKeyId(), ca.Revision(a.GetGeneration()), yesNo(r.GetStatus().GetHere()))
				for _, line := range []struct{ name, value string }{
					{"CERTIFICATE", a.GetCertificate()}, {"SELECTORS", strings.Join(a.GetSelectors(), " ")}, {"MAY HOLD", strings.Join(a.GetPathPrefixes(), " ")},
				} {
					if line.value != "" {
						fmt.Fprintf(table, "%s\t%s\n", line.name, line.value)
					}
				}
				if len(r.GetEntries()) > 0 {
					fmt.Fprintln(table, "\nENTRY\tSPIFFE PATH\tSELECTORS")
				}
				for _, e := range r.GetEntries() {
					fmt.Fprintf(table, "%s\t%s\t%s\n", e.GetId(), e.GetPath(), strings.Join(e.GetSelectors(), " "))
				}
				if len(r.GetInstances()) > 0 {
					fmt.Fprintln(table, "\nSERVES\tADDRESS\tHEALTH")
				}
				for _, i := range r.GetInstances() {
					health := strings.ToLower(strings.TrimPrefix(i.GetHealth().String(), "HEALTH_"))
					if i.GetStale() {
						health += ", stale"
					}
					fmt.Fprintf(table, "%s\t%s\t%s\n", i.GetService(), i.GetAddress(), health)
				}
				return table.Flush()
			})
		},
	}
	admin.register(c)
	return c
}

type changeAgent func(context.Context, ententev1.AdminClient, *ententev1.ChangeAgentRequest) (*ententev1.ChangeAgentResponse, error)

func agentBanCommand() *cobra.Command {
	return agentChangeCommand("ban", "Shut a host out until it is evicted",
		"Its streams end, nothing that was issued through it is accepted within the mesh any more, and no token admits it again.",
		"is banned at revision %s; to let the host come back with a new token: entente agent evict %s\n",
		func(ctx context.Context, c ententev1.AdminClient, r *ententev1.ChangeAgentRequest) (*ententev1.ChangeAgentResponse, error) {
			return c.BanAgent(ctx, r)
		})
}

func agentEvictCommand() *cobra.Command {
	return agentChangeCommand("evict", "Forget a host, banned or not: it must attest anew with a new token",
		"Its streams end, nothing that was issued through it is accepted within the mesh any more, and its key means nothing.",
		"is evicted at revision %s; to admit the host again: entente token create --agent %s --datacenter ... --address ...\n",
		func(ctx context.Context, c ententev1.AdminClient, r *ententev1.ChangeAgentRequest) (*ententev1.ChangeAgentResponse, error) {
			return c.EvictAgent(ctx, r)
		})
}

func agentIsolateCommand() *cobra.Command {
	var admin adminFlags
	var reason string
	c := &cobra.Command{
		Use:   "isolate AGENT",
		Short: "Without quorum: shut a host out at the CA node that is asked",
		Long: `For when a host must go and nothing can be agreed; with quorum, ban is the way. The CA
node that is asked writes it down, ends the host's streams, gives it nothing any more and
tells its own subscribers to accept nothing that was issued through it. Ask every node
that can be reached. When there is quorum again, the node has it agreed by itself: a ban.
Only an agreement lifts it: entente agent evict, then a new token.`,
		Example: "  entente agent isolate h1 --reason INC-881",
		Args:    oneArgument("the agent's name: see entente agent list"),
		RunE: func(c *cobra.Command, args []string) error {
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				r, err := client.IsolateAgent(c.Context(), &ententev1.IsolateAgentRequest{Name: args[0], Reason: reason})
				if err != nil {
					return err
				}
				if admin.json {
					return printJSON(c.OutOrStdout(), r)
				}
				fmt.Fprintf(c.OutOrStdout(), "agent %s is isolated by this CA node; ask the others, too: it holds at each node that was asked, until quorum is back and makes it a ban\n", args[0])
				if why := r.GetIsolation().GetNotWritten(); why != "" {
					fmt.Fprintf(c.ErrOrStderr(), "NOT ON DISK: a restart of this node would lose it (%s)\n", why)
				}
				return nil
			})
		},
	}
	admin.register(c)
	c.Flags().StringVar(&reason, "reason", "", "why, for the audit log and the list of isolated agents")
	return c
}

func agentChangeCommand(verb, short, long, done string, do changeAgent) *cobra.Command {
	var admin adminFlags
	c := &cobra.Command{
		Use:     verb + " AGENT",
		Short:   short,
		Long:    long,
		Example: "  entente agent " + verb + " h1",
		Args:    oneArgument("the agent's name: see entente agent list"),
		RunE: func(c *cobra.Command, args []string) error {
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				r, err := do(c.Context(), client, &ententev1.ChangeAgentRequest{Name: args[0]})
				if err != nil {
					return err
				}
				if admin.json {
					return printJSON(c.OutOrStdout(), r)
				}
				fmt.Fprintf(c.OutOrStdout(), "agent %s "+done, args[0], ca.Revision(r.GetRevision()), args[0])
				return nil
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
