package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
)

func federationCommand() *cobra.Command {
	return group(&cobra.Command{
		Use:   "federation",
		Short: "Follow other domains' bundles: refresh, reset",
		Long: `A Relationship says where another domain's bundle is found (entente apply); the CA
follows it. entente ca status shows how that goes.`,
		Example: `  entente federation refresh trading.example
  entente federation reset trading.example --bundle-sha256 HASH`,
	}, federationRefreshCommand(), federationResetCommand())
}

func federationRefreshCommand() *cobra.Command {
	var admin adminFlags
	c := &cobra.Command{
		Use:   "refresh [DOMAIN]",
		Short: "Fetch the bundles of other domains now",
		Long:  "Wait until the bundle endpoint of DOMAIN, or of every federated domain, was asked. Exit\ncode 1: one of them did not answer, or its bundle was refused.",
		Example: `  entente federation refresh
  entente federation refresh trading.example`,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usageError{c, fmt.Errorf("%s takes one domain, not %q", c.CommandPath(), args[1])}
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			request := &ententev1.RefreshFederationRequest{}
			if len(args) == 1 {
				request.TrustDomain = args[0]
			}
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				response, err := client.RefreshFederation(c.Context(), request)
				if err != nil {
					return err
				}
				if admin.json {
					err = printJSON(c.OutOrStdout(), response)
				}
				var failed []error
				for _, b := range response.GetBundles() {
					switch {
					case b.GetError() != "":
						failed = append(failed, fmt.Errorf("%s: %s", b.GetTrustDomain(), b.GetError()))
					case admin.json:
					case b.GetAgeSeconds() < 0:
						fmt.Fprintf(c.OutOrStdout(), "%s: no endpoint to fetch from; sequence %d\n", b.GetTrustDomain(), b.GetSequence())
					default:
						fmt.Fprintf(c.OutOrStdout(), "%s: fetched, sequence %d, sha256 %s\n", b.GetTrustDomain(), b.GetSequence(), b.GetSha256())
					}
				}
				if len(failed) > 0 {
					return findings{errors.Join(failed...)}
				}
				return err
			})
		},
	}
	admin.register(c)
	return c
}

func federationResetCommand() *cobra.Command {
	var admin adminFlags
	request := &ententev1.ResetFederationRequest{}
	c := &cobra.Command{
		Use:   "reset DOMAIN --bundle-sha256 HASH",
		Short: "Let one bundle of a peer have a lower sequence",
		Long: `The sequence of a peer's bundle never goes back, unless the peer was set up again or
restored from a backup. Then compare the hash that the refusal shows with the peer's
administrators (entente ca bundle --sha256 at theirs), and name it here: that one bundle is
accepted when it is fetched, or applied as bundleFile. The permission ends with the next
accepted bundle. It is recorded in the audit log.`,
		Example: "  entente federation reset trading.example --bundle-sha256 1f7a...",
		Args: func(c *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError{c, errors.New("name one domain: entente federation reset DOMAIN --bundle-sha256 HASH")}
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			if request.GetBundleSha256() == "" {
				return usageError{c, errors.New("--bundle-sha256 is missing: the hash of the bundle that the peer's administrators confirmed")}
			}
			request.TrustDomain = args[0]
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				response, err := client.ResetFederation(c.Context(), request)
				if err != nil {
					return err
				}
				if admin.json {
					return printJSON(c.OutOrStdout(), response)
				}
				_, err = fmt.Fprintf(c.OutOrStdout(), "the bundle of %s with that hash is accepted when it is fetched next (entente federation refresh %s), or when a Relationship gives it (entente apply)\n", args[0], args[0])
				return err
			})
		},
	}
	admin.register(c)
	c.Flags().StringVar(&request.BundleSha256, "bundle-sha256", "", "hash of the bundle to accept, 64 hexadecimal digits")
	return c
}
