package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"

	"go.yaml.in/yaml/v3"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/federation/manifest"
)

// objectDiff is what would become of one object, in the words of its file.
type objectDiff struct {
	Kind   string      `json:"kind"`
	Name   string      `json:"name"`
	Action string      `json:"action"` // created, updated, deleted, unchanged
	Source string      `json:"source"`
	Fields []fieldDiff `json:"fields"`
	Ends   []string    `json:"ends,omitempty"` // with an object that is deleted
}

// fieldDiff is one field: of a new object without before, of one that goes without after.
type fieldDiff struct {
	Field  string `json:"field"`
	Before string `json:"before,omitempty"`
	After  string `json:"after,omitempty"`
}

// errDiffers gives exit code 1, as diff does.
var errDiffers = findings{errors.New("there are differences")}

// showDiff prints what an apply would change, from the answer to a dry run of it.
func showDiff(w io.Writer, objects []*statev1.Object, r *ententev1.ApplyResponse, asJSON bool) error {
	proposed := make(map[string]*statev1.Object, len(objects))
	for _, o := range objects {
		proposed[catalog.Key(o)] = o
	}
	var diffs []objectDiff
	differs := false
	for _, change := range r.GetChanges() {
		key := change.GetKey()
		after := proposed[key.GetKind()+"/"+key.GetName()]
		d := objectDiff{Kind: key.GetKind(), Name: key.GetName(), Action: change.GetAction(), Source: cmp.Or(after, change.GetBefore()).GetSource(), Fields: []fieldDiff{}, Ends: change.GetEnds()}
		if d.Action != "unchanged" {
			differs = true
			var err error
			if d.Fields, err = diffObject(change.GetBefore(), after); err != nil {
				return err
			}
		}
		diffs = append(diffs, d)
	}
	if asJSON {
		raw, err := json.Marshal(struct {
			Revision string       `json:"revision"`
			Objects  []objectDiff `json:"objects"`
		}{ca.Revision(r.GetRevision()).String(), diffs})
		if err == nil {
			err = indentJSON(w, raw)
		}
		if err != nil {
			return err
		}
	} else if err := printDiff(w, diffs); err != nil {
		return err
	}
	if differs {
		return errDiffers
	}
	return nil
}

func printDiff(w io.Writer, diffs []objectDiff) error {
	table := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	for _, d := range diffs {
		mark := map[string]string{"created": "+", "updated": "~", "deleted": "-", "unchanged": "="}[d.Action]
		fmt.Fprintf(table, "%s %s/%s\t%s\t%s\n", mark, d.Kind, d.Name, d.Action, d.Source)
		for _, end := range d.Ends {
			fmt.Fprintf(table, "    %s\n", end)
		}
		for _, f := range d.Fields {
			switch {
			case d.Action == "deleted":
			case f.Before == "":
				fmt.Fprintf(table, "    + %s\t%s\n", f.Field, f.After)
			case f.After == "":
				fmt.Fprintf(table, "    - %s\t%s\n", f.Field, f.Before)
			default:
				fmt.Fprintf(table, "    ~ %s\t%s -> %s\n", f.Field, f.Before, f.After)
			}
		}
	}
	return table.Flush()
}

// diffObject compares two objects as their files would say them.
func diffObject(before, after *statev1.Object) ([]fieldDiff, error) {
	was, err := fieldsOf(before)
	if err != nil {
		return nil, err
	}
	is, err := fieldsOf(after)
	if err != nil {
		return nil, err
	}
	all := maps.Clone(was)
	maps.Copy(all, is)
	diffs := []fieldDiff{}
	for _, field := range slices.Sorted(maps.Keys(all)) {
		if was[field] != is[field] {
			diffs = append(diffs, fieldDiff{field, was[field], is[field]})
		}
	}
	return diffs, nil
}

// fieldsOf is an object's values by their place in its file: spec.run.hosts. A list of
// words is one value. Kind and name are left out; nil has none.
func fieldsOf(o *statev1.Object) (map[string]string, error) {
	fields := map[string]string{}
	if o == nil {
		return fields, nil
	}
	text, err := manifest.Format(o)
	if err != nil {
		return nil, err
	}
	var document yaml.Node
	if err := yaml.Unmarshal(text, &document); err != nil {
		return nil, fmt.Errorf("%s: %w", catalog.Key(o), err)
	}
	flatten(fields, "", document.Content[0])
	for _, known := range []string{"apiVersion", "kind", "metadata.name"} {
		delete(fields, known)
	}
	return fields, nil
}

func flatten(fields map[string]string, path string, n *yaml.Node) {
	switch n.Kind {
	case yaml.MappingNode:
		for i := 0; i < len(n.Content); i += 2 {
			flatten(fields, strings.TrimPrefix(path+"."+n.Content[i].Value, "."), n.Content[i+1])
		}
	case yaml.SequenceNode:
		words := make([]string, len(n.Content))
		for i, item := range n.Content {
			if item.Kind != yaml.ScalarNode {
				flatten(fields, fmt.Sprintf("%s[%d]", path, i), item)
			}
			words[i] = item.Value
		}
		if len(n.Content) == 0 || n.Content[0].Kind == yaml.ScalarNode {
			fields[path] = "[" + strings.Join(words, ", ") + "]"
		}
	default:
		fields[path] = n.Value
	}
}
