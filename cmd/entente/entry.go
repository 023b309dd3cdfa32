package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

func entryCommand() *cobra.Command {
	return group(&cobra.Command{
		Use:   "entry",
		Short: "Which workload gets which SPIFFE ID",
		Long: `Services and gateways have their entries by themselves (apply). An entry of its own is for a workload that is neither: a
batch job, a tool. Its id begins with entry/.`,
		Example: `  entente entry create entry/nightly --path /batch/nightly --host h1 --selector unix:uid:1000
  entente entry create -f entries.yaml
  entente entry list --host h1`,
	}, entryCreateCommand(), entryUpdateCommand(), entryDeleteCommand(), entryListCommand(), entryShowCommand(), entryCountCommand())
}

// entryFile is the shape of a batch file; many documents may follow each other.
type entryFile struct {
	yamlfile.Pos

	ID            string        `yaml:"id,required"`
	Path          string        `yaml:"path,required"`
	Hosts         []string      `yaml:"hosts,required"`
	Selectors     []string      `yaml:"selectors,required"`
	DNSNames      []string      `yaml:"dnsNames"`
	FederatesWith []string      `yaml:"federatesWith"`
	Hint          string        `yaml:"hint"`
	TTL           time.Duration `yaml:"ttl"`
	IfRevision    string        `yaml:"ifRevision"`
}

func (f *entryFile) entry() *statev1.Entry {
	return &statev1.Entry{
		Id: f.ID, Path: f.Path, Hosts: f.Hosts, Selectors: f.Selectors, DnsNames: f.DNSNames,
		FederatesWith: f.FederatesWith, Hint: f.Hint, X509SvidSeconds: uint32(f.TTL / time.Second),
	}
}

// readEntries reads a batch file; "-" is standard input.
func readEntries(file string) ([]*entryFile, error) {
	in, name := io.Reader(os.Stdin), "standard input"
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in, name = f, file
	}
	var all []*entryFile
	err := yamlfile.DecodeAll(name, in, func(doc yamlfile.Node) error {
		f := &entryFile{}
		if err := doc.Decode(f); err != nil {
			return err
		}
		all = append(all, f)
		return nil
	})
	return all, err
}

// entryFlags describe one entry on a command line.
type entryFlags struct {
	adminFlags
	files  []string
	dryRun bool
	entry  entryFile
}

func (f *entryFlags) registerEntry(c *cobra.Command) {
	f.register(c)
	flags := c.Flags()
	flags.StringArrayVarP(&f.files, "file", "f", nil, "YAML file with entries, one document each; - reads standard input; repeatable")
	flags.BoolVar(&f.dryRun, "dry-run", false, "say what would change, and change nothing")
	flags.StringVar(&f.entry.Path, "path", "", "SPIFFE path, as in /batch/nightly")
	flags.StringSliceVar(&f.entry.Hosts, "host", nil, "agent that may hold it; repeatable")
	flags.StringSliceVar(&f.entry.Selectors, "selector", nil, "what the process must be, as in unix:uid:1000; repeatable, all must match")
	flags.StringSliceVar(&f.entry.DNSNames, "dns-name", nil, "DNS name in its X.509-SVIDs; repeatable")
	flags.StringSliceVar(&f.entry.FederatesWith, "federates-with", nil, "trust domain whose bundle it gets; repeatable")
	flags.StringVar(&f.entry.Hint, "hint", "", "tells the workload what the identity is for")
	flags.DurationVar(&f.entry.TTL, "ttl", 0, "life of its X.509-SVIDs; 0: the domain's")
}

// entries are those of the files, or the one of the flags.
func (f *entryFlags) entries(c *cobra.Command, args []string) ([]*entryFile, error) {
	if (len(f.files) == 0) == (len(args) == 0) {
		return nil, usageError{c, errors.New("give either one entry id or files with -f")}
	}
	if len(args) == 1 {
		f.entry.ID = args[0]
		if f.entry.Path == "" || len(f.entry.Hosts) == 0 || len(f.entry.Selectors) == 0 {
			return nil, usageError{c, errors.New("an entry needs --path, --host and --selector")}
		}
		return []*entryFile{&f.entry}, nil
	}
	var all []*entryFile
	for _, file := range f.files {
		entries, err := readEntries(file)
		if err != nil {
			return nil, usageError{c, err}
		}
		all = append(all, entries...)
	}
	if len(all) == 0 {
		return nil, usageError{c, errors.New("the files hold no entry")}
	}
	return all, nil
}

func atMostOne(c *cobra.Command, args []string) error {
	if len(args) > 1 {
		return usageError{c, fmt.Errorf("%s takes one entry, not %q; use -f for more", c.CommandPath(), args[1])}
	}
	return nil
}

func entryCreateCommand() *cobra.Command {
	var flags entryFlags
	c := &cobra.Command{
		Use:   "create [ENTRY | -f FILE]",
		Short: "Make entries",
		Long:  "Each entry of a file is answered for itself: what is wrong with one keeps no other from being made.",
		Example: `  entente entry create entry/nightly --path /batch/nightly --host h1 --selector unix:uid:1000 --ttl 1h
  entente entry create -f entries.yaml --dry-run`,
		Args: atMostOne,
		RunE: func(c *cobra.Command, args []string) error {
			entries, err := flags.entries(c, args)
			if err != nil {
				return err
			}
			var changes []*statev1.EntryChange
			for _, e := range entries {
				if e.IfRevision != "" {
					return usageError{c, e.At("ifRevision").Errorf("%s: what is created has no revision yet", e.ID)}
				}
				changes = append(changes, &statev1.EntryChange{Action: &statev1.EntryChange_Create{Create: e.entry()}})
			}
			return changeEntries(c, &flags, changes)
		},
	}
	flags.registerEntry(c)
	return c
}

func entryUpdateCommand() *cobra.Command {
	var flags entryFlags
	var revision string
	c := &cobra.Command{
		Use:   "update [ENTRY | -f FILE]",
		Short: "Replace entries",
		Long:  "An entry is replaced as a whole. With --if-revision it is refused when somebody else changed it since.",
		Example: `  entente entry update entry/nightly --path /batch/nightly --host h1 --host h2 --selector unix:uid:1000 --if-revision 0.8812
  entente entry update -f entries.yaml`,
		Args: atMostOne,
		RunE: func(c *cobra.Command, args []string) error {
			entries, err := flags.entries(c, args)
			if err != nil {
				return err
			}
			if len(args) == 1 {
				entries[0].IfRevision = revision
			} else if revision != "" {
				return usageError{c, errors.New("--if-revision is for one entry; in a file, write ifRevision")}
			}
			var changes []*statev1.EntryChange
			for _, e := range entries {
				at, err := parseRevision(e.IfRevision)
				if err != nil {
					return usageError{c, fmt.Errorf("%s: %w", e.ID, err)}
				}
				changes = append(changes, &statev1.EntryChange{Action: &statev1.EntryChange_Update{Update: e.entry()}, IfRevision: at})
			}
			return changeEntries(c, &flags, changes)
		},
	}
	flags.registerEntry(c)
	c.Flags().StringVar(&revision, "if-revision", "", "only if the entry is still at this revision")
	return c
}

func parseRevision(text string) (uint64, error) {
	if text == "" {
		return 0, nil
	}
	r, err := ca.ParseRevision(text)
	return uint64(r), err
}

func entryDeleteCommand() *cobra.Command {
	var flags entryFlags
	var revision string
	c := &cobra.Command{
		Use:   "delete ENTRY... | -f FILE",
		Short: "Delete entries; what was issued for them is accepted no longer",
		Example: `  entente entry delete entry/nightly
  entente entry delete -f entries.yaml`,
		RunE: func(c *cobra.Command, args []string) error {
			if (len(flags.files) == 0) == (len(args) == 0) {
				return usageError{c, errors.New("give either entry ids or files with -f")}
			}
			at, err := parseRevision(revision)
			if err != nil || at != 0 && len(args) != 1 {
				return usageError{c, errors.Join(errors.New("--if-revision is for one entry"), err)}
			}
			for _, file := range flags.files {
				entries, err := readEntries(file)
				if err != nil {
					return usageError{c, err}
				}
				for _, e := range entries {
					args = append(args, e.ID)
				}
			}
			var changes []*statev1.EntryChange
			for _, id := range args {
				changes = append(changes, &statev1.EntryChange{Action: &statev1.EntryChange_Delete{Delete: id}, IfRevision: at})
			}
			return changeEntries(c, &flags, changes)
		},
	}
	flags.register(c)
	c.Flags().StringArrayVarP(&flags.files, "file", "f", nil, "YAML file with the entries; repeatable")
	c.Flags().BoolVar(&flags.dryRun, "dry-run", false, "say what would change, and change nothing")
	c.Flags().StringVar(&revision, "if-revision", "", "only if the entry is still at this revision")
	return c
}

// entryBatch is how many changes one call carries.
const entryBatch = 10_000

// changeEntries makes the changes and prints each result. Refused ones make it end with
// exit code 4.
func changeEntries(c *cobra.Command, flags *entryFlags, changes []*statev1.EntryChange) error {
	return flags.call(c.Context(), func(client ententev1.AdminClient) error {
		all := &ententev1.ChangeEntriesResponse{}
		for len(changes) > 0 {
			batch := changes[:min(entryBatch, len(changes))]
			changes = changes[len(batch):]
			r, err := client.ChangeEntries(c.Context(), &ententev1.ChangeEntriesRequest{Changes: batch, DryRun: flags.dryRun}, largeAnswer)
			if err != nil {
				return err
			}
			all.Results = append(all.Results, r.GetResults()...)
		}
		refused, first := 0, ""
		for _, r := range all.GetResults() {
			if r.GetCode() != 0 {
				if refused++; first == "" {
					first = r.GetError()
				}
			}
		}
		if flags.json {
			if err := printJSON(c.OutOrStdout(), all); err != nil {
				return err
			}
		} else if err := printEntryResults(c, all.GetResults(), flags.dryRun); err != nil {
			return err
		}
		if refused > 0 {
			return refusedError{fmt.Errorf("%d of %d changes were refused, the first because: %s", refused, len(all.GetResults()), first)}
		}
		return nil
	})
}

func printEntryResults(c *cobra.Command, results []*ententev1.EntryResult, dryRun bool) error {
	table := tabwriter.NewWriter(c.OutOrStdout(), 0, 4, 2, ' ', 0)
	for _, r := range results {
		if r.GetCode() != 0 {
			fmt.Fprintf(table, "%s\tREFUSED\t%s\n", r.GetId(), r.GetError())
		} else {
			fmt.Fprintf(table, "%s\t%s\t%s\n", r.GetId(), r.GetAction(), ca.Revision(r.GetRevision()))
		}
	}
	if err := table.Flush(); err != nil {
		return err
	}
	if dryRun {
		fmt.Fprintln(c.OutOrStdout(), "nothing was changed: --dry-run")
	}
	return nil
}

// listFlags narrow a list of entries.
type listFlags struct {
	adminFlags
	request ententev1.ListEntriesRequest
	limit   int
}

func (f *listFlags) registerList(c *cobra.Command) {
	f.register(c)
	flags := c.Flags()
	flags.StringVar(&f.request.Host, "host", "", "only those that this agent may hold")
	flags.StringVar(&f.request.PathPrefix, "path-prefix", "", "only SPIFFE paths at or below this one")
	flags.BoolVar(&f.request.Declared, "declared", false, "only those of their own, not those of services and gateways")
}

func entryListCommand() *cobra.Command {
	var flags listFlags
	c := &cobra.Command{
		Use:     "list",
		Short:   "Show entries, by id",
		Example: "  entente entry list --path-prefix /batch --limit 100",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			return flags.call(c.Context(), func(client ententev1.AdminClient) error {
				all, err := listEntries(c.Context(), client, &flags.request, flags.limit)
				if err != nil {
					return err
				}
				if flags.json {
					return printJSON(c.OutOrStdout(), all)
				}
				table := tabwriter.NewWriter(c.OutOrStdout(), 0, 4, 2, ' ', 0)
				fmt.Fprintln(table, "ENTRY\tSPIFFE PATH\tHOSTS\tSELECTORS\tREVISION")
				for _, e := range all.GetEntries() {
					fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\n", e.GetId(), e.GetPath(), strings.Join(e.GetHosts(), ","), strings.Join(e.GetSelectors(), " "), ca.Revision(e.GetRevision()))
				}
				if err := table.Flush(); err != nil {
					return err
				}
				if all.GetMore() {
					last := all.GetEntries()[len(all.GetEntries())-1].GetId()
					fmt.Fprintf(c.OutOrStdout(), "there are more: --after %s\n", last)
				}
				return nil
			})
		},
	}
	flags.registerList(c)
	c.Flags().IntVar(&flags.limit, "limit", 10_000, "at most so many")
	c.Flags().StringVar(&flags.request.After, "after", "", "begin after this entry")
	return c
}

func listEntries(ctx context.Context, client ententev1.AdminClient, request *ententev1.ListEntriesRequest, limit int) (*ententev1.ListEntriesResponse, error) {
	all := &ententev1.ListEntriesResponse{More: true}
	for all.More && len(all.GetEntries()) < limit {
		request.PageSize = uint32(min(1000, limit-len(all.GetEntries())))
		page, err := client.ListEntries(ctx, request, largeAnswer)
		if err != nil {
			return nil, err
		}
		all.Entries = append(all.Entries, page.GetEntries()...)
		if all.More = page.GetMore() && len(page.GetEntries()) > 0; all.More {
			request.After = page.GetEntries()[len(page.GetEntries())-1].GetId()
		}
	}
	return all, nil
}

func entryShowCommand() *cobra.Command {
	var admin adminFlags
	c := &cobra.Command{
		Use:     "show ENTRY",
		Short:   "Show one entry",
		Example: "  entente entry show service/accounts",
		Args:    oneArgument("the entry's id: see entente entry list"),
		RunE: func(c *cobra.Command, args []string) error {
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				r, err := client.GetEntry(c.Context(), &ententev1.GetEntryRequest{Id: args[0]})
				if err != nil {
					return err
				}
				if admin.json {
					return printJSON(c.OutOrStdout(), r)
				}
				e := r.GetEntry()
				table := tabwriter.NewWriter(c.OutOrStdout(), 0, 4, 2, ' ', 0)
				line := func(name, value string) {
					if value != "" {
						fmt.Fprintf(table, "%s\t%s\n", name, value)
					}
				}
				line("ENTRY", e.GetId())
				line("SPIFFE PATH", e.GetPath())
				line("HOSTS", strings.Join(e.GetHosts(), ", "))
				line("SELECTORS", strings.Join(e.GetSelectors(), ", "))
				line("DNS NAMES", strings.Join(e.GetDnsNames(), ", "))
				line("FEDERATES WITH", strings.Join(e.GetFederatesWith(), ", "))
				line("HINT", e.GetHint())
				if e.GetX509SvidSeconds() != 0 {
					line("TTL", (time.Duration(e.GetX509SvidSeconds()) * time.Second).String())
				}
				line("REVISION", ca.Revision(e.GetRevision()).String())
				return table.Flush()
			})
		},
	}
	admin.register(c)
	return c
}

func entryCountCommand() *cobra.Command {
	var flags listFlags
	c := &cobra.Command{
		Use:     "count",
		Short:   "Count entries",
		Example: "  entente entry count --host h1",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			return flags.call(c.Context(), func(client ententev1.AdminClient) error {
				r, err := client.CountEntries(c.Context(), &flags.request)
				if err != nil {
					return err
				}
				if flags.json {
					return printJSON(c.OutOrStdout(), r)
				}
				fmt.Fprintln(c.OutOrStdout(), r.GetEntries())
				return nil
			})
		},
	}
	flags.registerList(c)
	return c
}
