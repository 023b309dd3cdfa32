package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/node"
)

func snapshotCommand() *cobra.Command {
	return group(&cobra.Command{
		Use:   "snapshot",
		Short: "Save, inspect and restore the state of a CA",
		Example: `  entente snapshot save banking-$(date +%F).snapshot
  entente snapshot inspect banking-2026-11-20.snapshot
  entente snapshot restore --config ca.yaml --recovery-key-file key banking-2026-11-20.snapshot`,
	}, snapshotSaveCommand(), snapshotInspectCommand(), holdsKeys(snapshotRestoreCommand()))
}

// oneFile takes exactly one argument, a file.
func oneFile(c *cobra.Command, args []string) error {
	if len(args) != 1 {
		return usageError{c, fmt.Errorf("%s takes one FILE", c.CommandPath())}
	}
	return nil
}

func snapshotSaveCommand() *cobra.Command {
	var (
		admin adminFlags
		force bool
	)
	c := &cobra.Command{
		Use:   "save FILE",
		Short: "Save the state that this CA node holds",
		Long: `Stream the state of the CA node behind --socket into FILE, read it back, and only then
give it its name. It works with and without quorum, and holds no private key and no
secret: a restored node makes new keys.`,
		Example: "  entente snapshot save banking.snapshot",
		Args:    oneFile,
		RunE: func(c *cobra.Command, args []string) error {
			if _, err := os.Lstat(args[0]); err == nil && !force {
				return usageError{c, fmt.Errorf("%s is there already; --force replaces it", args[0])}
			}
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				contents, err := saveSnapshot(c.Context(), client, args[0])
				if err != nil {
					return err
				}
				return printContents(c.OutOrStdout(), contents, admin.json)
			})
		},
	}
	admin.register(c)
	c.Flags().BoolVar(&force, "force", false, "replace FILE")
	return c
}

// saveSnapshot gives the file its name when all of it is on the disk and was read back.
func saveSnapshot(ctx context.Context, client ententev1.AdminClient, path string) (_ node.Contents, err error) {
	none := node.Contents{}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // 0600
	if err != nil {
		return none, err
	}
	defer func() {
		f.Close()
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	stream, err := client.SaveSnapshot(ctx, &ententev1.SaveSnapshotRequest{})
	if err != nil {
		return none, err
	}
	for {
		part, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return none, err
		}
		if _, err := f.Write(part.GetData()); err != nil {
			return none, err
		}
	}
	if err := f.Sync(); err != nil {
		return none, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return none, err
	}
	contents, err := node.Inspect(f)
	if err != nil {
		return none, fmt.Errorf("the snapshot that came cannot be read: %w", err)
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return none, err
	}
	return contents, syncDirectory(filepath.Dir(path))
}

func syncDirectory(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func snapshotInspectCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:     "inspect FILE",
		Short:   "Verify a snapshot and show what it holds",
		Long:    "Read all of FILE, verify every checksum, and show what it holds. No CA node is needed.",
		Example: "  entente snapshot inspect banking.snapshot",
		Args:    oneFile,
		RunE: func(c *cobra.Command, args []string) error {
			f, err := os.Open(args[0])
			if err != nil {
				return usageError{c, err}
			}
			defer f.Close()
			contents, err := node.Inspect(f)
			if err != nil {
				return findings{fmt.Errorf("%s: %w", args[0], err)}
			}
			return printContents(c.OutOrStdout(), contents, asJSON)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func snapshotRestoreCommand() *cobra.Command {
	var (
		flags   configFlags
		keyFile string
		epoch   uint32
		setTime bool
		bans    []string
		asJSON  bool
	)
	c := &cobra.Command{
		Use:   "restore FILE",
		Short: "Begin a new epoch with a snapshot, in an empty data directory",
		Long: `Make the node of --config the only member of the cluster that FILE is of, in a new
epoch. For when every CA node is lost. What was agreed after the snapshot is lost; join
tokens are void; bans stay, and those made since that a bans.journal holds are agreed
again; the other members' authorities are tainted. Agents that do not trust this node's
key need a new join token.`,
		Example: "  entente snapshot restore --config ca.yaml --recovery-key-file key banking.snapshot",
		Args:    oneFile,
		RunE: func(c *cobra.Command, args []string) error {
			config, err := readConfig(c, flags.file, node.ReadConfig)
			if err != nil {
				return err
			}
			key, err := readSecret(keyFile)
			if err != nil {
				return usageError{c, fmt.Errorf("--recovery-key-file: %w", err)}
			}
			f, err := os.Open(args[0])
			if err != nil {
				return usageError{c, err}
			}
			defer f.Close()
			contents, err := node.Restore(config, f, key, epoch, setTime, bans...)
			if err != nil {
				return err
			}
			if err := printContents(c.OutOrStdout(), contents, asJSON); err != nil || asJSON {
				return err
			}
			fmt.Fprintf(c.OutOrStdout(), "\n%s is the only CA node of %s now; start it: entente ca run --config %s\n", config.Name, config.TrustDomain, flags.file)
			return nil
		},
	}
	flags.register(c, defaultCAConfig)
	c.Flags().StringVar(&keyFile, "recovery-key-file", "", "file with the recovery key that `entente ca init` printed; - reads standard input")
	c.Flags().StringArrayVar(&bans, "bans", nil, "bans.journal from the data directory of any CA node of this cluster: whom it shut out stays out (repeat for several)")
	c.Flags().BoolVar(&setTime, "set-time", false, "set the agreed time to this host's clock, also backwards")
	c.Flags().Uint32Var(&epoch, "epoch", 0, "begin at least with this epoch: higher than any that agents and peers have seen (default: the snapshot's + 1)")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

// readSecret reads a file of one line.
func readSecret(file string) (string, error) {
	switch file {
	case "":
		return "", errors.New("it is missing")
	case "-":
		raw, err := io.ReadAll(io.LimitReader(os.Stdin, 64<<10))
		return strings.TrimSpace(string(raw)), err
	}
	raw, err := os.ReadFile(file)
	return strings.TrimSpace(string(raw)), err
}

func writeJSON(w io.Writer, value any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(value)
}

func printContents(w io.Writer, c node.Contents, asJSON bool) error {
	if asJSON {
		return writeJSON(w, c)
	}
	table := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintf(table, "DOMAIN\t%s, cluster %s, epoch %d\n", c.TrustDomain, c.ClusterID, c.Epoch)
	fmt.Fprintf(table, "STATE\trevision %s, log index %d, agreed time %s\n", c.Revision, c.Index, clockTime(c.Time))
	fmt.Fprintf(table, "HOLDS\t%d entries, %d agents (%d banned), %d objects, bundles of %d other domains\n",
		c.Entries, c.Agents, len(c.Banned), c.Objects, len(c.Foreign))
	var phases []string
	for phase, n := range c.Authorities {
		phases = append(phases, fmt.Sprintf("%d %s", n, phase))
	}
	slices.Sort(phases)
	fmt.Fprintf(table, "AUTHORITIES\t%s\n", strings.Join(phases, ", "))
	if len(c.Banned) > 0 {
		slices.Sort(c.Banned)
		fmt.Fprintf(table, "BANNED\t%s\n", strings.Join(c.Banned, ", "))
	}
	fmt.Fprintf(table, "CHECKSUM\t%s, verified\n\n", c.Checksum)
	fmt.Fprintln(table, "NODE\tDATACENTER\tAPI\tVOTES\tSIGNS\tID")
	for _, m := range c.Members {
		fmt.Fprintf(table, "%s\t%s\t%s\t%v\t%v\t%.12s\n", m.Name, m.Datacenter, m.API, m.Voter, m.Signing, m.ID)
	}
	return table.Flush()
}

func clockTime(t time.Time) string {
	if t.IsZero() {
		return "unknown"
	}
	return t.UTC().Format(time.RFC3339)
}
