package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/internal/nearest"
)

// objectKey reads KIND or KIND/NAME. The kind's case does not matter, and it may stand in
// the plural: services/accounts is Service/accounts.
func objectKey(word string) (*statev1.ObjectKey, error) {
	kind, name, named := strings.Cut(word, "/")
	if named && name == "" {
		return nil, fmt.Errorf("%q names no object: write %s/NAME", word, kind)
	}
	lower := strings.ToLower(kind)
	var words []string
	for _, known := range catalog.Kinds() {
		single := strings.ToLower(known)
		if lower == single || lower == single+"s" {
			return &statev1.ObjectKey{Kind: known, Name: name}, nil
		}
		words = append(words, single)
	}
	hint := "there are " + strings.Join(words, ", ")
	if near := nearest.Word(lower, words); near != "" {
		hint = fmt.Sprintf("do you mean %q?", near)
	}
	return nil, fmt.Errorf("%q is no kind of objects; %s", kind, hint)
}

// listObjects asks for pages until it has all.
func listObjects(ctx context.Context, client ententev1.AdminClient, request *ententev1.ListObjectsRequest) (*ententev1.ListObjectsResponse, error) {
	all := &ententev1.ListObjectsResponse{}
	for {
		page, err := client.ListObjects(ctx, request, largeAnswer)
		if err != nil {
			return nil, err
		}
		all.Revision = page.GetRevision()
		all.Objects = append(all.Objects, page.GetObjects()...)
		if !page.GetMore() || len(page.GetObjects()) == 0 {
			return all, nil
		}
		last := page.GetObjects()[len(page.GetObjects())-1]
		kind, name := catalog.KindName(last)
		request.After = &statev1.ObjectKey{Kind: kind, Name: name}
	}
}

// completionTimeout is how long a shell that completes a name waits for a CA node.
const completionTimeout = time.Second

// completeObjects offers kinds, and behind KIND/ the names that the CA node shows.
func completeObjects(admin *adminFlags) cobra.CompletionFunc {
	return func(c *cobra.Command, _ []string, begun string) ([]cobra.Completion, cobra.ShellCompDirective) {
		word, _, named := strings.Cut(begun, "/")
		if !named {
			var kinds []cobra.Completion
			for _, kind := range catalog.Kinds() {
				kinds = append(kinds, strings.ToLower(kind)+"/")
			}
			return kinds, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
		}
		key, err := objectKey(word)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		ctx, cancel := context.WithTimeout(c.Context(), completionTimeout)
		defer cancel()
		var names []cobra.Completion
		err = admin.call(ctx, func(client ententev1.AdminClient) error {
			all, err := listObjects(ctx, client, &ententev1.ListObjectsRequest{Kind: key.GetKind()})
			for _, o := range all.GetObjects() {
				_, name := catalog.KindName(o)
				names = append(names, word+"/"+name)
			}
			return err
		})
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return slices.DeleteFunc(names, func(name string) bool { return !strings.HasPrefix(name, begun) }), cobra.ShellCompDirectiveNoFileComp
	}
}
