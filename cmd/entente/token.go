package main

import (
	"errors"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
)

func tokenCommand() *cobra.Command {
	return group(&cobra.Command{
		Use:     "token",
		Short:   "One-time tokens that admit CA nodes and agents",
		Example: "  entente token create --agent host-7 --datacenter dc1 --address 10.0.0.7",
	}, tokenCreateCommand(), tokenListCommand(), tokenRevokeCommand())
}

func tokenListCommand() *cobra.Command {
	var admin adminFlags
	c := &cobra.Command{
		Use:     "list",
		Short:   "Show the tokens that were made, and whom they admitted",
		Example: "  entente token list",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				r, err := client.ListTokens(c.Context(), &ententev1.ListTokensRequest{}, largeAnswer)
				if err != nil {
					return err
				}
				if admin.json {
					return printJSON(c.OutOrStdout(), r)
				}
				table := tabwriter.NewWriter(c.OutOrStdout(), 0, 4, 2, ' ', 0)
				fmt.Fprintln(table, "TOKEN\tADMITS\tDATACENTER\tUNTIL\tSTATE")
				for _, t := range r.GetTokens() {
					admits, datacenter := "agent "+t.GetAgent().GetName(), t.GetAgent().GetDatacenter()
					if t.GetNode() != nil {
						admits, datacenter = "CA node "+t.GetNode().GetName(), t.GetNode().GetDatacenter()
					}
					state := "unused"
					switch {
					case t.GetUsedBy() != "":
						state = "used by key " + t.GetUsedBy()[:12]
					case r.GetNowUnix() >= t.GetNotAfter():
						state = "ended"
					}
					fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\n", t.GetId(), admits, datacenter, date(t.GetNotAfter()), state)
				}
				return table.Flush()
			})
		},
	}
	admin.register(c)
	return c
}

func tokenRevokeCommand() *cobra.Command {
	var admin adminFlags
	c := &cobra.Command{
		Use:     "revoke TOKEN",
		Short:   "Make a token that was not used worthless",
		Example: "  entente token revoke 4x2kq6...",
		Args:    oneArgument("the token's id, not the token: see entente token list"),
		RunE: func(c *cobra.Command, args []string) error {
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				r, err := client.RevokeToken(c.Context(), &ententev1.RevokeTokenRequest{Id: args[0]})
				if err != nil {
					return err
				}
				if admin.json {
					return printJSON(c.OutOrStdout(), r)
				}
				fmt.Fprintf(c.OutOrStdout(), "token %s admits nobody any more\n", args[0])
				return nil
			})
		},
	}
	admin.register(c)
	return c
}

func tokenCreateCommand() *cobra.Command {
	var (
		admin         adminFlags
		node, agent   string
		datacenter    string
		addresses     []string
		selectors     []string
		prefixes      []string
		voter, signer bool
		ttl           time.Duration
		format        uint32
	)
	c := &cobra.Command{
		Use:   "create",
		Short: "Make a token that admits one key, once",
		Long: `Make a join token. It is shown once: the log holds only its public key. It admits
the first key that shows it; the same key may show it again and gets the same answer.
Where three or more CA nodes vote, a token for a CA node admits nobody until the
operators of a majority of them have approved it: entente node approve.`,
		Example: `  entente token create --agent host-7 --datacenter dc1 --address 10.0.0.7
  entente token create --agent pay-7 --datacenter dc1 --address 10.0.1.7 --selector token:pci --path-prefix /team/pay
  entente token create --node ca-dc2 --datacenter dc2`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			request := &ententev1.CreateTokenRequest{TtlSeconds: uint32(ttl / time.Second), Format: format}
			switch {
			case format > 2:
				return usageError{c, fmt.Errorf("--format %d: this release writes formats 1 and 2", format)}
			case (node == "") == (agent == ""):
				return usageError{c, errors.New("name what the token admits: --node NAME or --agent NAME")}
			case datacenter == "":
				return usageError{c, errors.New("--datacenter is missing")}
			case ttl < time.Second:
				return usageError{c, fmt.Errorf("--ttl %s is shorter than a second", ttl)}
			case node != "":
				request.Node = &statev1.NodeGrant{Name: node, Datacenter: datacenter, Voter: voter, Signing: signer}
			case len(addresses) == 0:
				return usageError{c, errors.New("--address is missing: the hosts at which the agent's sidecar is reached")}
			default:
				request.Agent = &statev1.AgentGrant{
					Name: agent, Datacenter: datacenter, Addresses: addresses, Selectors: selectors, PathPrefixes: prefixes,
				}
			}
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				response, err := client.CreateToken(c.Context(), request)
				if err != nil {
					return err
				}
				if admin.json {
					return printJSON(c.OutOrStdout(), response)
				}
				fmt.Fprintln(c.OutOrStdout(), response.GetToken())
				if response.GetApproval() != nil {
					return printApproval(c.ErrOrStderr(), response.GetApproval())
				}
				fmt.Fprintf(c.ErrOrStderr(), "admits one key until %s\n", time.Unix(response.GetNotAfter(), 0).UTC().Format(time.RFC3339))
				return nil
			})
		},
	}
	admin.register(c)
	f := c.Flags()
	f.StringVar(&node, "node", "", "name of the CA node to admit")
	f.StringVar(&agent, "agent", "", "name of the agent to admit")
	f.StringVar(&datacenter, "datacenter", "", "datacenter it stands in")
	f.StringSliceVar(&addresses, "address", nil, "host (no port) at which the agent's sidecar is reached; repeatable")
	f.StringSliceVar(&selectors, "selector", nil, "what entries may demand of the agent's host, as in token:pci; repeatable")
	f.StringSliceVar(&prefixes, "path-prefix", nil, "SPIFFE path at or below which the agent may hold entries; repeatable; default: all")
	f.BoolVar(&voter, "voter", true, "the CA node becomes a voter when it has caught up")
	f.BoolVar(&signer, "signing", true, "the CA node signs; false makes it a witness")
	f.Uint32Var(&format, "format", 2, "format of the token; 1 for hosts with the release before")
	ttl = 15 * time.Minute
	f.Var((*lifeFlag)(&ttl), "ttl", "how long the token may be used")
	return c
}
