package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func validateCommand() *cobra.Command {
	return group(&cobra.Command{
		Use:     "validate",
		Short:   "Ask the Workload API whether something is valid",
		Example: "  entente validate jwt --audience ledger.banking.example --token-file -",
	}, validateJWTCommand())
}

func validateJWTCommand() *cobra.Command {
	var (
		flags     workloadFlags
		audience  string
		token     string
		tokenFile string
	)
	c := &cobra.Command{
		Use:   "jwt",
		Short: "Tell whether a token is a JWT-SVID for an audience",
		Long: `Ask the agent whether a token is a JWT-SVID, signed by its own trust domain or by one
that this process's identity federates with, for that audience, and not expired.
Exit code 0: it is. 1: it is not, and the reason is printed.`,
		Example: `  entente validate jwt --audience ledger.banking.example --token-file token
  entente fetch jwt --audience a --json | jq -r .svids[0].token | entente validate jwt --audience a --token-file -`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			if audience == "" {
				return usageError{c, errors.New("--audience is missing: who you are to the bearer")}
			}
			if (token == "") == (tokenFile == "") {
				return usageError{c, errors.New("give the token: --token-file FILE, or --token")}
			}
			if tokenFile != "" {
				var err error
				if token, err = readTokenFile(c, tokenFile); err != nil {
					return err
				}
			}
			return flags.call(c, func(ctx context.Context, api workload.SpiffeWorkloadAPIClient) error {
				ctx, cancel := context.WithTimeout(ctx, flags.timeout)
				defer cancel()
				response, err := api.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: audience, Svid: token})
				if status.Code(err) == codes.InvalidArgument {
					return findings{errors.New(status.Convert(err).Message())}
				}
				if err != nil {
					return err
				}
				claims := response.GetClaims().AsMap()
				if flags.json {
					encoder := json.NewEncoder(c.OutOrStdout())
					encoder.SetIndent("", "  ")
					return encoder.Encode(struct {
						ID     string         `json:"spiffe_id"`
						Claims map[string]any `json:"claims"`
					}{response.GetSpiffeId(), claims})
				}
				table := tabwriter.NewWriter(c.OutOrStdout(), 0, 0, 2, ' ', 0)
				fmt.Fprintf(table, "VALID\t%s\n", response.GetSpiffeId())
				for _, name := range slices.Sorted(maps.Keys(claims)) {
					value, err := json.Marshal(claims[name])
					if err != nil {
						return err
					}
					fmt.Fprintf(table, "%s\t%s\n", name, value)
				}
				return table.Flush()
			})
		},
	}
	flags.register(c)
	c.Flags().StringVar(&audience, "audience", "", "the audience that the token must name")
	c.Flags().StringVar(&tokenFile, "token-file", "", "file with the token; - reads standard input")
	c.Flags().StringVar(&token, "token", "", "the token (others on this host may see a command line: prefer --token-file)")
	return c
}

func readTokenFile(c *cobra.Command, name string) (string, error) {
	from := c.InOrStdin()
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return "", usageError{c, err}
		}
		defer f.Close()
		from = f
	}
	text, err := io.ReadAll(io.LimitReader(from, 64<<10))
	return strings.TrimSpace(string(text)), err
}
