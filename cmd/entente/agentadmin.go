package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/meshagent/admin"
)

const defaultAgentSocket = "/var/lib/entente/agent/admin.sock"

// agentFlags are the flags of every verb that talks to the agent of this host.
type agentFlags struct {
	socket string
	json   bool
}

func (f *agentFlags) register(c *cobra.Command) {
	c.Flags().StringVar(&f.socket, "socket", defaultAgentSocket, "admin socket of this host's agent")
	c.Flags().BoolVar(&f.json, "json", false, "print JSON")
}

// agentError gives an answer of the admin socket the exit code of its kind.
func agentError(err error) error {
	var unreachable *admin.UnreachableError
	var refused *admin.RefusedError
	switch {
	case errors.As(err, &unreachable):
		return status.Error(codes.Unavailable, err.Error())
	case errors.As(err, &refused):
		return status.Error(codes.FailedPrecondition, err.Error())
	}
	return err
}

func printValue(w io.Writer, value any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(value)
}

func agentExplainPIDCommand() *cobra.Command {
	var flags agentFlags
	c := &cobra.Command{
		Use:   "explain-pid PID",
		Short: "Show the selectors of a process exactly as the agent sees them",
		Long: `Ask this host's agent what it sees of a process, which identities of the host that
gives it, and why it does not get the others.`,
		Example: `  entente agent explain-pid 4711
  entente agent explain-pid $(pidof accounts) --json`,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError{c, errors.New("name one process by its number")}
			}
			pid, err := strconv.ParseInt(args[0], 10, 32)
			if err != nil || pid <= 0 {
				return usageError{c, fmt.Errorf("%q is not the number of a process", args[0])}
			}
			ctx, cancel := context.WithTimeout(c.Context(), time.Minute)
			defer cancel()
			e, err := admin.NewClient(flags.socket).Explain(ctx, int(pid))
			if err != nil {
				return agentError(err)
			}
			if flags.json {
				return printValue(c.OutOrStdout(), e)
			}
			return printExplanation(c.OutOrStdout(), e)
		},
	}
	flags.register(c)
	return c
}

func agentStatusCommand() *cobra.Command {
	var flags agentFlags
	c := &cobra.Command{
		Use:     "status",
		Short:   "Show the state of this host's agent",
		Example: "  entente agent status\n  entente agent status --json",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(c.Context(), time.Minute)
			defer cancel()
			is, err := admin.NewClient(flags.socket).Status(ctx)
			if err != nil {
				return agentError(err)
			}
			if flags.json {
				return printValue(c.OutOrStdout(), is)
			}
			return printAgentStatus(c.OutOrStdout(), is)
		},
	}
	flags.register(c)
	return c
}

func printAgentStatus(w io.Writer, is *admin.Status) error {
	table := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	ready := "yes"
	if !is.Ready {
		ready = "no: " + is.Why
	}
	fmt.Fprintf(table, "AGENT\t%s of %s in %s\nREADY\t%s\nREVISION\t%s\nWORKLOAD API\t%s\n", is.Agent, is.TrustDomain, is.Datacenter, ready, ca.Revision(is.Revision), is.WorkloadAPI)
	if is.Inbound != "" {
		fmt.Fprintf(table, "INBOUND\t%s\n", is.Inbound)
	}
	fmt.Fprintf(table, "CA NODE\t%s\n", comparedText(is.CA))
	fmt.Fprintln(table, "\nENTRY\tSPIFFE ID\tEXPIRES IN\tHEALTHY")
	for _, identity := range is.Identities {
		expires, healthy := "-", "-"
		if identity.ValidUntil != nil {
			expires = time.Until(*identity.ValidUntil).Round(time.Second).String()
		}
		if identity.Healthy != nil {
			healthy = map[bool]string{true: "yes", false: "no"}[*identity.Healthy]
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", identity.Entry, identity.SPIFFEID, expires, healthy)
	}
	if err := table.Flush(); err != nil {
		return err
	}
	if is.AttestationGap != "" {
		fmt.Fprintf(w, "warning: %s\n", is.AttestationGap)
	}
	for _, a := range is.CA.Avoided {
		fmt.Fprintf(w, "warning: CA node %s is avoided until %s: %s contradict it: %s\n", a.Node, a.Until.UTC().Format(time.RFC3339), strings.Join(a.By, " and "), a.Why)
	}
	if is.CA.Doubt != "" {
		fmt.Fprintf(w, "warning: CA node %s contradicts %s, and no third one is heard: %s; what either denies is denied\n", is.CA.DoubtBy, is.CA.Node, is.CA.Doubt)
	}
	if len(is.TooOld) > 0 {
		fmt.Fprintf(w, "warning: this agent is too old to enforce %s: upgrade it\n", strings.Join(is.TooOld, ", "))
	}
	if len(is.Skipped) > 0 {
		fmt.Fprintf(w, "skipped, being of a later release: %s\n", strings.Join(is.Skipped, ", "))
	}
	for _, b := range is.Broken {
		fmt.Fprintf(w, "warning: %s: %s\n", b.File, b.Why)
	}
	return nil
}

// comparedText names the CA node that the agent follows and those that it is compared with.
func comparedText(is admin.CAStatus) string {
	switch {
	case is.Node == "":
		return "-"
	case len(is.Compared) == 0:
		return is.Node + ", compared with no other: this host has heard one CA node only"
	}
	return is.Node + ", compared with " + strings.Join(is.Compared, ", ")
}

func printExplanation(w io.Writer, e *admin.Explanation) error {
	table := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintf(table, "SELECTORS of process %d\n", e.PID)
	for _, s := range e.Selectors {
		if s.Why != "" {
			fmt.Fprintf(table, "  %s\tnot seen: %s\n", s.Kind, s.Why)
		} else {
			fmt.Fprintf(table, "  %s\n", s.Selector)
		}
	}
	fmt.Fprintln(table, "IDENTITIES")
	if len(e.Identities) == 0 {
		fmt.Fprintln(table, "  none: this host has no entries")
	}
	for _, i := range e.Identities {
		if i.Entitled {
			fmt.Fprintf(table, "  yes\t%s\n", i.SPIFFEID)
		} else {
			fmt.Fprintf(table, "  no\t%s\t%s\n", i.SPIFFEID, i.Why)
		}
	}
	return table.Flush()
}

func agentHealthcheckCommand() *cobra.Command {
	var flags agentFlags
	var timeout time.Duration
	c := &cobra.Command{
		Use:   "healthcheck",
		Short: "Say whether this host's agent serves every workload",
		Long: `Exit 0 when the agent has attested and holds an SVID for every entry of its host, 1
when it answers and something is missing, 3 when it does not answer.`,
		Example: `  entente agent healthcheck
  entente agent healthcheck --json | jq .identities`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(c.Context(), timeout)
			defer cancel()
			s, err := admin.NewClient(flags.socket).Status(ctx)
			if errors.Is(err, context.DeadlineExceeded) {
				return status.Errorf(codes.Unavailable, "the agent at %s did not answer within %s", flags.socket, timeout)
			}
			if err != nil {
				return agentError(err)
			}
			out := c.OutOrStdout()
			if flags.json {
				if err := printValue(out, s); err != nil {
					return err
				}
			} else if s.Ready {
				fmt.Fprintf(out, "%s of %s is ready: %d identities\n", s.Agent, s.TrustDomain, len(s.Identities))
				for _, b := range s.Broken {
					fmt.Fprintf(out, "! registrations not used, the last good ones stay: %s\n", b.Why)
				}
			}
			if !s.Ready {
				return findings{fmt.Errorf("%s of %s is not ready: %s", s.Agent, s.TrustDomain, s.Why)}
			}
			return nil
		},
	}
	flags.register(c)
	c.Flags().DurationVar(&timeout, "timeout", 5*time.Second, "how long to wait for an answer")
	return c
}
