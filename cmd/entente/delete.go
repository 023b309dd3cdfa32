package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/federation/catalog"
)

func deleteCommand() *cobra.Command {
	var (
		admin       adminFlags
		files       []string
		dryRun, yes bool
	)
	c := &cobra.Command{
		Use:   "delete KIND/NAME...",
		Short: "Remove declared objects, and say what ends with them",
		Long: `Remove objects, all that are named or none. What ends with them is said first, and asked
about on a terminal. A service that an agreement names goes together with the agreement or
after it. Declared again, an object counts again.`,
		Example: `  entente delete service/accounts --dry-run
  entente delete agreement/trading-reads-balances relationship/trading.example --yes
  entente delete -f pay.yaml --server ca-1.banking.example:8443     # as an administrator`,
		RunE: func(c *cobra.Command, args []string) error {
			keys, err := keysToDelete(args, files)
			if err != nil {
				return usageError{c, err}
			}
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				would, err := client.Apply(c.Context(), &ententev1.ApplyRequest{Deletes: keys, DryRun: true}, largeAnswer)
				if status.Code(err) == codes.InvalidArgument {
					return refusedError{fmt.Errorf("%s\nnothing was deleted: name what refers to it in the same command, or change that first", message(err))}
				}
				if err != nil {
					return err
				}
				if dryRun {
					return showDeleted(c.OutOrStdout(), would, true, admin.json)
				}
				if !yes {
					if err := printEnds(c.ErrOrStderr(), would); err != nil {
						return err
					}
				}
				if err := confirm(c, yes, fmt.Sprintf("delete %s?", count(len(keys), "object"))); err != nil {
					return err
				}
				done, err := client.Apply(c.Context(), &ententev1.ApplyRequest{Deletes: keys}, largeAnswer)
				if err != nil {
					return err
				}
				return showDeleted(c.OutOrStdout(), &ententev1.ApplyResponse{Revision: done.GetRevision(), Changes: would.GetChanges()}, false, admin.json)
			})
		},
	}
	admin.register(c)
	c.Flags().StringArrayVarP(&files, "file", "f", nil, "remove the objects of a YAML file, of the files of a folder, or of standard input (-); repeatable")
	c.Flags().BoolVar(&dryRun, "dry-run", false, "say what would end, and change nothing")
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	c.ValidArgsFunction = completeObjects(&admin)
	return c
}

// keysToDelete are the objects that the command line and the files name.
func keysToDelete(args, files []string) (keys []*statev1.ObjectKey, err error) {
	for _, arg := range args {
		key, err := objectKey(arg)
		if err != nil {
			return nil, err
		}
		if key.GetName() == "" {
			return nil, fmt.Errorf("%q names no object: write %s/NAME; entente get %[1]s lists what there is", arg, arg)
		}
		keys = append(keys, key)
	}
	objects, err := readObjects(files)
	if err != nil {
		return nil, err
	}
	for _, o := range objects {
		kind, name := catalog.KindName(o)
		keys = append(keys, &statev1.ObjectKey{Kind: kind, Name: name})
	}
	if len(keys) == 0 {
		return nil, errors.New("name what to delete: KIND/NAME, or -f FILE")
	}
	return keys, nil
}

// printEnds says what would be deleted, and what ends with it.
func printEnds(w io.Writer, r *ententev1.ApplyResponse) error {
	for _, change := range r.GetChanges() {
		if change.GetAction() != "deleted" {
			continue
		}
		if _, err := fmt.Fprintf(w, "- %s/%s\n", change.GetKey().GetKind(), change.GetKey().GetName()); err != nil {
			return err
		}
		for _, end := range change.GetEnds() {
			if _, err := fmt.Fprintf(w, "    %s\n", end); err != nil {
				return err
			}
		}
	}
	return nil
}

// deletedObject is one object in JSON.
type deletedObject struct {
	Kind string   `json:"kind"`
	Name string   `json:"name"`
	Ends []string `json:"ends"`
}

func showDeleted(w io.Writer, r *ententev1.ApplyResponse, dryRun, asJSON bool) error {
	if !asJSON {
		if dryRun {
			if err := printEnds(w, r); err != nil {
				return err
			}
			_, err := fmt.Fprintln(w, "nothing was changed: --dry-run")
			return err
		}
		for _, change := range r.GetChanges() {
			if _, err := fmt.Fprintf(w, "%s/%s  deleted\n", change.GetKey().GetKind(), change.GetKey().GetName()); err != nil {
				return err
			}
		}
		return nil
	}
	objects := []deletedObject{}
	for _, change := range r.GetChanges() {
		objects = append(objects, deletedObject{change.GetKey().GetKind(), change.GetKey().GetName(), append([]string{}, change.GetEnds()...)})
	}
	raw, err := json.Marshal(struct {
		Revision string          `json:"revision"`
		DryRun   bool            `json:"dry_run"`
		Objects  []deletedObject `json:"objects"`
	}{ca.Revision(r.GetRevision()).String(), dryRun, objects})
	if err != nil {
		return err
	}
	return indentJSON(w, raw)
}

func count(n int, what string) string {
	if n == 1 {
		return "one " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
