// Command bench measures whole processes of the real binary from outside: it builds
// entente, starts CA nodes and agents of it on loopback, uses them through the doors
// that everybody has, and reads what they cost from the system's own accounts.
//
//	go run ./scenarios/bench ca --json ca.json
//	go run ./scenarios/bench agent --json agent.json
//	go run ./scenarios/bench ca --only jwt_cpu_us --binary /usr/local/bin/entente
//
// Clients and the processes under test share one machine. So what counts is processor
// time per item; rates and latencies hold for this machine and this load only.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/entente-mesh/entente/scenarios/evil"
)

func main() {
	evil.Main() // this program is also the CA node that lies
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := command().ExecuteContext(ctx)
	switch {
	case err == nil:
		return
	case ctx.Err() != nil:
		err = errors.New("interrupted; no process and no directory of it is left")
	}
	fmt.Fprintln(os.Stderr, "bench:", err)
	stop()
	os.Exit(1)
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:           "bench",
		Short:         "Measure whole processes of the real binary",
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	for _, s := range suites {
		root.AddCommand(suiteCommand(s))
	}
	return root
}

func suiteCommand(s *suite) *cobra.Command {
	o := &options{suite: s}
	var list bool
	c := &cobra.Command{
		Use:   s.name,
		Short: s.short,
		Long: s.short + `.

A table goes to standard output, line by line as it is measured; progress to standard error.
Nothing else should run on the machine meanwhile. verify_us says how fast the machine is:
limits in microseconds hold where it is 44.5, and grow with it on a slower one.

With --binary, each line is measured of both builds in turn, and the table has the median of
each, the median of the ratios of this build to the other, and the lowest and highest ratio
of a round.`,
		Example: fmt.Sprintf(`  go run ./scenarios/bench %[1]s --json %[1]s.json
  go run ./scenarios/bench %[1]s --json %[1]s.json --markdown docs/benchmarks.md
  go run ./scenarios/bench %[1]s --only %[2]s
  go run ./scenarios/bench %[1]s --only %[2]s --binary /usr/local/bin/entente --rounds 9
  go run ./scenarios/bench %[1]s --quick`, s.name, s.lines[0].name),
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if list {
				for _, l := range s.lines {
					fmt.Fprintf(c.OutOrStdout(), "%-26s %s\n", l.name, l.what)
				}
				return nil
			}
			o.out, o.progress = c.OutOrStdout(), c.ErrOrStderr()
			return run(c.Context(), o)
		},
	}
	f := c.Flags()
	f.StringVar(&o.json, "json", "", "write the results to this file, a list of {name, value, unit, n, note}; value is null where the note says why it failed")
	f.StringVar(&o.markdown, "markdown", "", "put the results in the place of this suite's table in this page")
	f.StringVar(&o.from, "from", "", "take the results from this file of an earlier --json and measure nothing")
	f.StringSliceVar(&o.only, "only", nil, "measure these lines only")
	f.BoolVar(&o.quick, "quick", false, "few items of each kind: shows that everything can be measured, within two minutes; the numbers mean little")
	f.StringVar(&o.binary, "binary", "", "measure this entente binary, of an older release for example, in turn with the source's, and print both values and their ratio")
	f.IntVar(&o.rounds, "rounds", 5, "with --binary: how often each of them is measured")
	f.BoolVar(&list, "list", false, "say what is measured and end")
	return c
}
