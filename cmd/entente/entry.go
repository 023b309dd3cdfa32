package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/selector"
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
	NodeSelectors []string      `yaml:"nodeSelectors"`
	Hint          string        `yaml:"hint"`
	TTL           time.Duration `yaml:"ttl,min=1s,max=87600h"`
	JWTTTL        time.Duration `yaml:"jwtTTL,min=1s,max=87600h"`
	WITTTL        time.Duration `yaml:"witTTL,min=1s,max=87600h"`
	IfRevision    string        `yaml:"ifRevision"`

	source string // FILE:LINE; empty: of the command line
}

func (f *entryFile) entry() *statev1.Entry {
	return &statev1.Entry{
		Id: f.ID, Path: f.Path, Hosts: f.Hosts, Selectors: f.Selectors, DnsNames: f.DNSNames,
		FederatesWith: f.FederatesWith, NodeSelectors: f.NodeSelectors, Hint: f.Hint,
		X509SvidSeconds: uint32(f.TTL / time.Second), JwtSvidSeconds: uint32(f.JWTTTL / time.Second), WitSvidSeconds: uint32(f.WITTTL / time.Second),
	}
}

// readEntries reads a batch file; "-" is standard input. A file is YAML with one document
// for each entry, or, if its name ends in .jsonl, JSON with one line for each.
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
	if strings.HasSuffix(name, ".jsonl") {
		return readEntryLines(name, in)
	}
	return decodeEntries(name, in)
}

func decodeEntries(name string, in io.Reader) (all []*entryFile, err error) {
	err = yamlfile.DecodeAll(name, in, func(doc yamlfile.Node) error {
		f := &entryFile{source: doc.Pos().String()}
		if err := doc.Decode(f); err != nil {
			return err
		}
		all = append(all, f)
		return nil
	})
	return all, err
}

const maxEntryLine = 1 << 20

// readEntryLines reads JSON lines, of which a file may hold any number.
func readEntryLines(name string, in io.Reader) (all []*entryFile, err error) {
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, maxEntryLine)
	for n := 1; lines.Scan(); n++ {
		if len(bytes.TrimSpace(lines.Bytes())) == 0 {
			continue
		}
		text, err := flowOfJSON(lines.Bytes())
		if err != nil {
			return nil, yamlfile.Errors{{File: name, Line: n, Msg: err.Error()}}
		}
		one, err := decodeEntries(name, bytes.NewReader(text))
		if err == nil && len(one) != 1 {
			err = yamlfile.Errors{{File: name, Line: n, Msg: "there is not one entry"}}
		}
		if err != nil {
			var places yamlfile.Errors
			if errors.As(err, &places) {
				for _, place := range places {
					place.Line = n
				}
			}
			return nil, err
		}
		one[0].source = fmt.Sprintf("%s:%d", name, n)
		all = append(all, one[0])
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return all, nil
}

// flowOfJSON writes a JSON text as YAML that means the same: not all JSON is YAML, which knows neither surrogate
// pairs nor DEL in a string, and takes no tab before a value. Fields that come twice stay, for the decoder to refuse.
func flowOfJSON(text []byte) ([]byte, error) {
	text = bytes.TrimPrefix(text, []byte("\ufeff"))
	if !utf8.Valid(text) {
		return nil, errors.New("it is not UTF-8")
	}
	var whole json.RawMessage
	if err := json.Unmarshal(text, &whole); err != nil {
		return nil, fmt.Errorf("it is not one JSON object in one line: %w", err)
	}
	var flow []byte
	for i := 0; i < len(text); i++ {
		switch text[i] {
		case '\t', '\r':
			flow = append(flow, ' ')
		case '"':
			end := i + 1
			for text[end] != '"' {
				if text[end] == '\\' {
					end++
				}
				end++
			}
			var s string
			if err := json.Unmarshal(text[i:end+1], &s); err != nil {
				return nil, err
			}
			flow = strconv.AppendQuoteToASCII(flow, s)
			i = end
		case ':':
			flow = append(flow, ": "...)
		default:
			flow = append(flow, text[i])
		}
	}
	return flow, nil
}

// entryFlags describe one entry on a command line.
type entryFlags struct {
	adminFlags
	files   []string
	dryRun  bool
	entry   entryFile
	sources []string // of the changes, FILE:LINE each; of a command line none
}

func (f *entryFlags) registerEntry(c *cobra.Command) {
	f.register(c)
	flags := c.Flags()
	flags.StringArrayVarP(&f.files, "file", "f", nil, "file with entries: YAML with one document each, or .jsonl with one line each; - reads YAML from standard input; repeatable")
	flags.BoolVar(&f.dryRun, "dry-run", false, "say what would change, and change nothing")
	flags.StringVar(&f.entry.Path, "path", "", "SPIFFE path, as in /batch/nightly")
	flags.StringSliceVar(&f.entry.Hosts, "host", nil, "agent that may hold it; repeatable")
	flags.StringSliceVar(&f.entry.Selectors, "selector", nil, "what the process must be, as in unix:uid:1000; repeatable, all must match")
	flags.StringSliceVar(&f.entry.DNSNames, "dns-name", nil, "DNS name in its X.509-SVIDs; repeatable")
	flags.StringSliceVar(&f.entry.FederatesWith, "federates-with", nil, "trust domain whose bundle it gets; repeatable")
	flags.StringSliceVar(&f.entry.NodeSelectors, "node-selector", nil, "what the host must have beside being named, as in token:pci; repeatable, all must match")
	flags.StringVar(&f.entry.Hint, "hint", "", "tells the workload what the identity is for")
	flags.Var((*lifeFlag)(&f.entry.TTL), "ttl", "life of its X.509-SVIDs; 0: the domain's")
	flags.Var((*lifeFlag)(&f.entry.JWTTTL), "jwt-ttl", "life of its JWT-SVIDs; 0: the domain's")
	flags.Var((*lifeFlag)(&f.entry.WITTTL), "wit-ttl", "life of its WIT-SVIDs; 0: the domain's")
}

// lifeFlag is a lifetime on a command line, in the syntax of files. It goes to a CA node as 32 bits of seconds:
// what does not fit there would become the default or another number.
type lifeFlag time.Duration

const maxLife = 87600 * time.Hour

func (l *lifeFlag) Set(s string) error {
	d, err := yamlfile.ParseDuration(s)
	switch {
	case err != nil:
		return err
	case d != 0 && d < time.Second || d > maxLife:
		return errors.New("it must be from 1s to 87600h")
	}
	*l = lifeFlag(d)
	return nil
}

func (l *lifeFlag) String() string {
	if *l == 0 {
		return "" // help shows no default
	}
	return yamlfile.FormatDuration(time.Duration(*l))
}

func (*lifeFlag) Type() string { return "duration" }

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
  entente entry create -f entries.yaml --dry-run
  entente entry create -f entries.jsonl --server ca-1.banking.example:8443     # as a service-owner`,
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
				flags.sources = append(flags.sources, e.source)
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
				flags.sources = append(flags.sources, e.source)
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
					args, flags.sources = append(args, e.ID), append(flags.sources, e.source)
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

// What one call carries: a CA node takes less over the network than over its socket.
const (
	entryBatch      = 10_000
	entryBatchBytes = 768 << 10
)

// nextBatch is how many of the changes go into the next call.
func nextBatch(changes []*statev1.EntryChange) (n int) {
	for size := 0; n < min(entryBatch, len(changes)); n++ {
		if size += proto.Size(changes[n]) + 8; size > entryBatchBytes && n > 0 {
			break
		}
	}
	return n
}

// changeEntries makes the changes and prints each result. Refused ones make it end with
// exit code 4.
func changeEntries(c *cobra.Command, flags *entryFlags, changes []*statev1.EntryChange) error {
	return flags.call(c.Context(), func(client ententev1.AdminClient) error {
		all := &ententev1.ChangeEntriesResponse{}
		for len(changes) > 0 {
			batch := changes[:nextBatch(changes)]
			changes = changes[len(batch):]
			r, err := client.ChangeEntries(c.Context(), &ententev1.ChangeEntriesRequest{Changes: batch, DryRun: flags.dryRun}, largeAnswer)
			if err != nil {
				return err
			}
			all.Results = append(all.Results, r.GetResults()...)
		}
		refused, first := 0, ""
		for i, r := range all.GetResults() {
			if r.GetCode() != 0 {
				if refused++; first == "" {
					first = strings.TrimPrefix(flags.source(i)+": "+r.GetError(), ": ")
				}
			}
		}
		if flags.json {
			if err := printJSON(c.OutOrStdout(), all); err != nil {
				return err
			}
		} else if err := printEntryResults(c, flags, all.GetResults()); err != nil {
			return err
		}
		if refused > 0 {
			return refusedError{fmt.Errorf("%d of %d changes were refused, the first because: %s", refused, len(all.GetResults()), first)}
		}
		return nil
	})
}

// source is where a change stands in a file; empty: on the command line.
func (f *entryFlags) source(i int) string {
	if i >= len(f.sources) {
		return ""
	}
	return f.sources[i]
}

func printEntryResults(c *cobra.Command, flags *entryFlags, results []*ententev1.EntryResult) error {
	table := tabwriter.NewWriter(c.OutOrStdout(), 0, 4, 2, ' ', 0)
	for i, r := range results {
		if source := flags.source(i); source != "" {
			fmt.Fprintf(table, "%s\t", source)
		}
		if r.GetCode() != 0 {
			fmt.Fprintf(table, "%s\tREFUSED\t%s\n", r.GetId(), r.GetError())
		} else {
			fmt.Fprintf(table, "%s\t%s\t%s\n", r.GetId(), r.GetAction(), ca.Revision(r.GetRevision()))
		}
		for _, warning := range r.GetWarnings() {
			fmt.Fprintf(c.ErrOrStderr(), "warning: %s: %s\n", r.GetId(), warning)
		}
	}
	if err := table.Flush(); err != nil {
		return err
	}
	if flags.dryRun {
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
	var weak bool
	c := &cobra.Command{
		Use:     "list",
		Short:   "Show entries, by id",
		Example: "  entente entry list --path-prefix /batch --page-size 100",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			return flags.call(c.Context(), func(client ententev1.AdminClient) error {
				all, err := listEntries(c.Context(), client, &flags.request, flags.limit, weak)
				if err != nil {
					return err
				}
				unanchored := slices.DeleteFunc(slices.Clone(all.GetEntries()), anchored)
				if n := len(unanchored); n > 0 && !weak {
					fmt.Fprintf(c.ErrOrStderr(), "warning: %d of these entries name no user, unit or container, so that any user of their hosts could get their SVIDs: entente entry list --weak shows them\n", n)
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
					fmt.Fprintf(c.OutOrStdout(), "there are more: --page-token %s\n", last)
				}
				return nil
			})
		},
	}
	flags.registerList(c)
	c.Flags().BoolVar(&weak, "weak", false, "only those that name no user, unit or container")
	c.Flags().IntVar(&flags.limit, "page-size", 10_000, "show at most so many")
	c.Flags().StringVar(&flags.request.After, "page-token", "", "begin after this entry: the last one of the page before")
	return c
}

// anchored tells whether an entry's selectors say whose process it is for.
func anchored(e *statev1.Entry) bool { return selector.CheckAnchored(e.GetSelectors()) == nil }

// listEntries asks for pages until there are so many entries, with weak only those that are not anchored.
func listEntries(ctx context.Context, client ententev1.AdminClient, request *ententev1.ListEntriesRequest, limit int, weak bool) (*ententev1.ListEntriesResponse, error) {
	all := &ententev1.ListEntriesResponse{More: true}
	for all.More && len(all.GetEntries()) < limit {
		request.PageSize = 1000
		if !weak {
			request.PageSize = uint32(min(1000, limit-len(all.GetEntries())))
		}
		page, err := client.ListEntries(ctx, request, largeAnswer)
		if err != nil {
			return nil, err
		}
		entries := page.GetEntries()
		if weak {
			entries = slices.DeleteFunc(slices.Clone(entries), anchored)
		}
		all.Entries = append(all.Entries, entries...)
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
				line("NODE SELECTORS", strings.Join(e.GetNodeSelectors(), ", "))
				line("FEDERATES WITH", strings.Join(e.GetFederatesWith(), ", "))
				line("HINT", e.GetHint())
				for _, ttl := range []struct {
					name    string
					seconds uint32
				}{{"TTL", e.GetX509SvidSeconds()}, {"JWT TTL", e.GetJwtSvidSeconds()}, {"WIT TTL", e.GetWitSvidSeconds()}} {
					if ttl.seconds != 0 {
						line(ttl.name, (time.Duration(ttl.seconds) * time.Second).String())
					}
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
