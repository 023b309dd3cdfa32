package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/entente-mesh/entente/ca/node"
)

func caRecoverCommand() *cobra.Command {
	var (
		flags   configFlags
		keyFile string
		setTime bool
		asJSON  bool
	)
	c := &cobra.Command{
		Use:   "recover",
		Short: "Go on with this node alone when quorum is lost for good",
		Long: `Without --recovery-key-file: show what a recovery from this stopped node would keep and
what may be lost. Run it so on every survivor and recover from the one whose LOG ends
latest. With the key: begin a new epoch with this node as the only member. The others
can never come back as they are: wipe them and join them anew.`,
		Example: `  entente ca recover --config ca.yaml                             # look
  entente ca recover --config ca.yaml --recovery-key-file key     # do it`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			config, err := readConfig(c, flags.file, node.ReadConfig)
			if err != nil {
				return err
			}
			if keyFile == "" {
				survey, err := node.LookBeforeRecover(config)
				if err != nil {
					return err
				}
				return printSurvey(c.OutOrStdout(), survey, asJSON, false, flags.file)
			}
			key, err := readSecret(keyFile)
			if err != nil {
				return usageError{c, fmt.Errorf("--recovery-key-file: %w", err)}
			}
			survey, err := node.Recover(config, key, setTime)
			if err != nil {
				return err
			}
			return printSurvey(c.OutOrStdout(), survey, asJSON, true, flags.file)
		},
	}
	flags.register(c, defaultCAConfig)
	c.Flags().StringVar(&keyFile, "recovery-key-file", "", "file with the recovery key that `entente ca init` printed; - reads standard input")
	c.Flags().BoolVar(&setTime, "set-time", false, "set the agreed time to this host's clock, also backwards")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func printSurvey(w io.Writer, s node.Survey, asJSON, done bool, config string) error {
	if asJSON {
		return writeJSON(w, s)
	}
	table := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintf(table, "SURVIVOR\t%s of %s, epoch %d\n", s.Node, s.TrustDomain, s.Epoch)
	fmt.Fprintf(table, "LOG\tends at %s (term.index), known to be agreed up to %d, revision %s\n", s.Log, s.Agreed, s.Revision)
	ago := ""
	if !s.AgreedTime.IsZero() {
		ago = fmt.Sprintf(", that is in the last %s by this host's clock", time.Since(s.AgreedTime).Round(time.Second))
	}
	fmt.Fprintf(table, "MAY BE LOST\tevery entry after %d: what the others agreed to without this node after %s%s\n", s.Log.Index, clockTime(s.AgreedTime), ago)
	absent := strings.Join(s.Absent, ", ")
	if absent == "" {
		absent = "nobody"
	}
	fmt.Fprintf(table, "LEFT BEHIND\t%s: authorities tainted now, revoked when the longest leaf has ended\n", absent)
	fmt.Fprintf(table, "VOID\tall join tokens; bans stay\n")
	if err := table.Flush(); err != nil {
		return err
	}
	if done {
		_, err := fmt.Fprintf(w, "\nepoch %d begins with %s; start it: entente ca run --config %s\nthen wipe the data directories of the others and join them anew\n", s.NewEpoch, s.Node, config)
		return err
	}
	_, err := fmt.Fprintf(w, "\nnothing was changed. If another survivor's LOG ends later, recover from that one. To do it here:\n  entente ca recover --config %s --recovery-key-file KEY\n", config)
	return err
}
