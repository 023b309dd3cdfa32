package main

import (
	"errors"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/federation/catalog"
)

func applyCommand() *cobra.Command {
	var (
		admin  adminFlags
		files  []string
		dryRun bool
		diff   bool
		prune  bool
		owner  string
		yes    bool
	)
	c := &cobra.Command{
		Use:   "apply -f FILE",
		Short: "Declare services, gateways, exports, imports, agreements and roles",
		Long: `Read objects from YAML files and agree on all of them at once, or on none. What is
wrong is refused with its file and line before anything changes. Objects that are not
in the files stay as they are, unless --prune removes those of one owner.

--diff changes nothing and shows what would be, field by field: + created, ~ updated,
- deleted, = left alone. Its exit code is 0 if nothing would change and 1 if something would.`,
		Example: `  entente apply -f banking.yaml
  entente apply -f banking.yaml --diff
  entente apply -f manifests/ --prune --owner team-accounts      # all that the team has stands there
  entente get -o yaml --socket a.sock | entente apply -f - --socket b.sock
  entente apply -f pay.yaml --server ca-1.banking.example:8443     # as an administrator`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			switch {
			case len(files) == 0:
				return usageError{c, errors.New("name a file: -f banking.yaml")}
			case prune && owner == "":
				return usageError{c, errors.New("--prune removes what one owner has and the files do not: name him with --owner")}
			case owner != "" && !prune:
				return usageError{c, errors.New("--owner goes with --prune: the files say whose each object is")}
			}
			objects, err := readObjects(files)
			if err != nil {
				return usageError{c, err}
			}
			if len(objects) == 0 && !prune {
				return usageError{c, errors.New("the files hold no object")}
			}
			request := &ententev1.ApplyRequest{Objects: objects, DryRun: dryRun || diff}
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				if prune {
					if request.Deletes, err = pruned(c, client, objects, owner); err != nil {
						return err
					}
					if len(request.GetDeletes()) > 0 && !request.GetDryRun() && !yes {
						if err := confirmPruning(c, client, request); err != nil {
							return err
						}
					}
				}
				response, err := client.Apply(c.Context(), request, largeAnswer)
				if err != nil {
					return err
				}
				for _, warning := range response.GetWarnings() {
					fmt.Fprintln(c.ErrOrStderr(), "warning:", warning)
				}
				return showApplied(c.OutOrStdout(), request, response, admin.json, diff, dryRun)
			})
		},
	}
	admin.register(c)
	c.Flags().StringArrayVarP(&files, "file", "f", nil, "YAML file with objects, folder with such files, or - for standard input; repeatable")
	c.Flags().BoolVar(&diff, "diff", false, "show what would change, field by field, and change nothing; exit code 1: something would")
	c.Flags().BoolVar(&dryRun, "dry-run", false, "say what would change, and change nothing")
	c.Flags().BoolVar(&prune, "prune", false, "also delete what --owner has and the files do not, and say what ends with it")
	c.Flags().StringVar(&owner, "owner", "", "with --prune: whose objects")
	c.Flags().BoolVarP(&yes, "yes", "y", false, "with --prune: do not ask")
	return c
}

func showApplied(w io.Writer, request *ententev1.ApplyRequest, response *ententev1.ApplyResponse, asJSON, diff, dryRun bool) error {
	if diff {
		return showDiff(w, request.GetObjects(), response, asJSON)
	}
	if asJSON {
		return printJSON(w, response)
	}
	table := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	for _, change := range response.GetChanges() {
		fmt.Fprintf(table, "%s/%s\t%s\n", change.GetKey().GetKind(), change.GetKey().GetName(), change.GetAction())
	}
	if err := table.Flush(); err != nil {
		return err
	}
	if dryRun {
		fmt.Fprintln(w, "nothing was changed: --dry-run")
	}
	return nil
}

// pruned are the objects of an owner that the files do not hold. A file with another owner's
// object is refused: it would say that everything of this one stands there.
func pruned(c *cobra.Command, client ententev1.AdminClient, objects []*statev1.Object, owner string) (gone []*statev1.ObjectKey, err error) {
	kept := map[string]bool{}
	for _, o := range objects {
		if o.GetOwner() != owner {
			return nil, usageError{c, fmt.Errorf("%s: %s has the owner %q, and --prune is for the objects of %q: apply it by itself", o.GetSource(), catalog.Key(o), o.GetOwner(), owner)}
		}
		kept[catalog.Key(o)] = true
	}
	have, err := listObjects(c.Context(), client, &ententev1.ListObjectsRequest{Owner: owner})
	if err != nil {
		return nil, err
	}
	if len(have.GetObjects()) == 0 && len(objects) == 0 {
		return nil, refusedError{fmt.Errorf("the files hold no object, and %q has none: is the name right?", owner)}
	}
	for _, o := range have.GetObjects() {
		if !kept[catalog.Key(o)] {
			kind, name := catalog.KindName(o)
			gone = append(gone, &statev1.ObjectKey{Kind: kind, Name: name})
		}
	}
	return gone, nil
}

func confirmPruning(c *cobra.Command, client ententev1.AdminClient, request *ententev1.ApplyRequest) error {
	would, err := client.Apply(c.Context(), &ententev1.ApplyRequest{Objects: request.GetObjects(), Deletes: request.GetDeletes(), DryRun: true}, largeAnswer)
	if err != nil {
		return err
	}
	if err := printEnds(c.ErrOrStderr(), would); err != nil {
		return err
	}
	return confirm(c, false, fmt.Sprintf("apply, and delete %s?", count(len(request.GetDeletes()), "object")))
}
