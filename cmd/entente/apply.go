package main

import (
	"errors"
	"fmt"
	"os"
	"text/tabwriter"

	"github.com/spf13/cobra"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/federation/manifest"
)

func applyCommand() *cobra.Command {
	var (
		admin  adminFlags
		files  []string
		dryRun bool
		diff   bool
	)
	c := &cobra.Command{
		Use:   "apply -f FILE",
		Short: "Declare services, gateways, exports, imports, agreements and roles",
		Long: `Read objects from YAML files and agree on all of them at once, or on none. What is
wrong is refused with its file and line before anything changes. Objects that are not
in the files stay as they are.

--diff changes nothing and shows what would be, field by field: + created, ~ updated,
= left alone. Its exit code is 0 if nothing would change and 1 if something would.`,
		Example: `  entente apply -f banking.yaml
  entente apply -f banking.yaml --diff
  entente apply -f pay.yaml --server ca-1.banking.example:8443     # as an administrator`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			if len(files) == 0 {
				return usageError{c, errors.New("name a file: -f banking.yaml")}
			}
			request := &ententev1.ApplyRequest{DryRun: dryRun || diff}
			for _, file := range files {
				objects, err := parseObjects(file)
				if err != nil {
					return usageError{c, err}
				}
				request.Objects = append(request.Objects, objects...)
			}
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				response, err := client.Apply(c.Context(), request)
				if err != nil {
					return err
				}
				if diff {
					return showDiff(c.OutOrStdout(), request.GetObjects(), response, admin.json)
				}
				if admin.json {
					return printJSON(c.OutOrStdout(), response)
				}
				table := tabwriter.NewWriter(c.OutOrStdout(), 0, 4, 2, ' ', 0)
				for _, change := range response.GetChanges() {
					fmt.Fprintf(table, "%s/%s\t%s\n", change.GetKey().GetKind(), change.GetKey().GetName(), change.GetAction())
				}
				if err := table.Flush(); err != nil {
					return err
				}
				if dryRun {
					fmt.Fprintln(c.OutOrStdout(), "nothing was changed: --dry-run")
				}
				return nil
			})
		},
	}
	admin.register(c)
	c.Flags().StringArrayVarP(&files, "file", "f", nil, "YAML file with objects; repeatable")
	c.Flags().BoolVar(&diff, "diff", false, "show what would change, field by field, and change nothing; exit code 1: something would")
	c.Flags().BoolVar(&dryRun, "dry-run", false, "say what would change, and change nothing")
	return c
}

func parseObjects(file string) ([]*statev1.Object, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return manifest.Parse(file, f, os.ReadFile)
}
