package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/federation/manifest"
)

func getCommand() *cobra.Command {
	var (
		admin  adminFlags
		owner  string
		output string
	)
	c := &cobra.Command{
		Use:   "get [KIND | KIND/NAME]...",
		Short: "Show declared objects as they were applied",
		Long: `Show the services, gateways, imports, agreements, relationships and role bindings that
were applied, all of them or those that are named. An administrator sees what his roles
show him.

-o yaml prints what apply reads: applied again it changes nothing. -o json prints the same
beside each object's revision and the place where it was declared.`,
		Example: `  entente get
  entente get service
  entente get service/accounts -o yaml > accounts.yaml
  entente get agreement relationship --owner sec-banking`,
		RunE: func(c *cobra.Command, args []string) error {
			if admin.json {
				output = "json"
			}
			print, ok := map[string]func(io.Writer, *ententev1.ListObjectsResponse) error{
				"table": printObjectTable, "yaml": printObjectYAML, "json": printObjectJSON,
			}[output]
			if !ok {
				return usageError{c, fmt.Errorf("-o %s: it is table, yaml or json", output)}
			}
			keys := []*statev1.ObjectKey{{}} // everything
			if len(args) > 0 {
				keys = nil
			}
			for _, arg := range args {
				key, err := objectKey(arg)
				if err != nil {
					return usageError{c, err}
				}
				keys = append(keys, key)
			}
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				all := &ententev1.ListObjectsResponse{}
				var missing []error
				for _, key := range keys {
					found, err := listObjects(c.Context(), client, &ententev1.ListObjectsRequest{Kind: key.GetKind(), Name: key.GetName(), Owner: owner})
					if err != nil {
						return err
					}
					if key.GetName() != "" && len(found.GetObjects()) == 0 {
						missing = append(missing, fmt.Errorf("there is no %s/%s, or it is not yours to see: entente get %s lists what there is", key.GetKind(), key.GetName(), key.GetKind()))
					}
					all.Revision = found.GetRevision()
					all.Objects = append(all.Objects, found.GetObjects()...)
				}
				if err := print(c.OutOrStdout(), all); err != nil {
					return err
				}
				if len(missing) > 0 {
					return refusedError{errors.Join(missing...)}
				}
				return nil
			})
		},
	}
	admin.register(c)
	c.Flags().StringVarP(&output, "output", "o", "table", "table, yaml or json")
	c.Flags().StringVar(&owner, "owner", "", "only objects of this owner")
	c.ValidArgsFunction = completeObjects(&admin)
	return c
}

func printObjectTable(w io.Writer, r *ententev1.ListObjectsResponse) error {
	if len(r.GetObjects()) == 0 {
		_, err := fmt.Fprintln(w, "there is none: entente apply -f FILE declares objects")
		return err
	}
	table := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(table, "OBJECT\tOWNER\tREVISION\tDECLARED AT")
	for _, o := range r.GetObjects() {
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", catalog.Key(o), cmp.Or(o.GetOwner(), "-"), ca.Revision(o.GetRevision()), cmp.Or(o.GetSource(), "-"))
	}
	return table.Flush()
}

func printObjectYAML(w io.Writer, r *ententev1.ListObjectsResponse) error {
	text, err := manifest.Format(r.GetObjects()...)
	if err != nil {
		return fmt.Errorf("%w; a release that knows it can", err)
	}
	_, err = w.Write(text)
	return err
}

// shownObject is one object in JSON: what its file would say, and what is known beside it.
type shownObject struct {
	Kind     string `json:"kind"`
	Name     string `json:"name"`
	Owner    string `json:"owner"`
	Revision string `json:"revision"`
	Source   string `json:"source"`
	Manifest any    `json:"manifest"` // the document, as apply reads it
}

func printObjectJSON(w io.Writer, r *ententev1.ListObjectsResponse) error {
	shown := []shownObject{}
	for _, o := range r.GetObjects() {
		kind, name := catalog.KindName(o)
		s := shownObject{Kind: kind, Name: name, Owner: o.GetOwner(), Revision: ca.Revision(o.GetRevision()).String(), Source: o.GetSource()}
		text, err := manifest.Format(o)
		if err == nil {
			err = yaml.Unmarshal(text, &s.Manifest)
		}
		if err != nil {
			return err
		}
		shown = append(shown, s)
	}
	raw, err := json.Marshal(struct {
		Revision string        `json:"revision"`
		Objects  []shownObject `json:"objects"`
	}{ca.Revision(r.GetRevision()).String(), shown})
	if err != nil {
		return err
	}
	return indentJSON(w, raw)
}
