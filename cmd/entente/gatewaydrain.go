package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
)

// drainLook is how often a gateway that is drained is asked what is left.
const drainLook = 250 * time.Millisecond

func gatewayDrainCommand() *cobra.Command {
	var flags gatewayFlags
	var reason string
	wait, timeout := true, time.Duration(0)
	c := &cobra.Command{
		Use:   "drain",
		Short: "Take a gateway out of traffic",
		Long: `Have a gateway refuse new connections and end the open ones as their requests end: peers go
to other gateways, and no request is lost. Waits until no connection and no request is left.
entente gateway undrain puts it back, and so does a restart. From elsewhere (--server) it
takes the role service-owner without prefixes, or trust-admin.`,
		Example: "  entente gateway drain --reason \"kernel update\"\n  entente gateway drain --timeout 5m --json\n  entente gateway drain --wait=false",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			return flags.call(c.Context(), func(client ententev1.DataPlaneClient) error {
				ctx, cancel := context.WithTimeout(c.Context(), answerTime)
				defer cancel()
				if _, err := client.Drain(ctx, &ententev1.DrainRequest{Reason: reason}); err != nil {
					return err
				}
				s, err := awaitDrained(c.Context(), client, c.ErrOrStderr(), wait, timeout)
				if s != nil && flags.json {
					if err := printJSON(c.OutOrStdout(), s); err != nil {
						return err
					}
				}
				if err == nil && !flags.json {
					fmt.Fprintln(c.OutOrStdout(), drainedLine(s))
				}
				return err
			})
		},
	}
	flags.register(c)
	c.Flags().StringVar(&reason, "reason", "", "why, for people who look at the gateway; at most 200 characters")
	c.Flags().BoolVar(&wait, "wait", true, "wait until no connection and no request is left")
	c.Flags().DurationVar(&timeout, "timeout", 0, "with --wait: give up after that long, and leave it drained; 0: never")
	return c
}

func gatewayUndrainCommand() *cobra.Command {
	var flags gatewayFlags
	c := &cobra.Command{
		Use:     "undrain",
		Short:   "Put a drained gateway back into traffic",
		Long:    "Have a gateway that was drained take connections again. Peers find out within seconds.",
		Example: "  entente gateway undrain",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			return flags.call(c.Context(), func(client ententev1.DataPlaneClient) error {
				ctx, cancel := context.WithTimeout(c.Context(), answerTime)
				defer cancel()
				if _, err := client.Undrain(ctx, &ententev1.UndrainRequest{}); err != nil {
					return err
				}
				s, err := gatewayStatus(c.Context(), client, &ententev1.DataPlaneStatusRequest{WithoutServices: true})
				switch {
				case err != nil:
					return err
				case flags.json:
					return printJSON(c.OutOrStdout(), s)
				}
				fmt.Fprintf(c.OutOrStdout(), "%s takes connections\n", s.GetName())
				return nil
			})
		},
	}
	flags.register(c)
	return c
}

// awaitDrained looks at a drained gateway until nothing is left, and writes what is when it
// changes. Without wait it looks once. It returns the last look with an error as well.
func awaitDrained(ctx context.Context, client ententev1.DataPlaneClient, progress io.Writer, wait bool, timeout time.Duration) (*ententev1.DataPlaneStatusResponse, error) {
	started := time.Now()
	tick := time.NewTicker(drainLook)
	defer tick.Stop()
	said := ""
	for {
		s, err := gatewayStatus(ctx, client, &ententev1.DataPlaneStatusRequest{WithoutServices: true})
		switch {
		case err != nil:
			return nil, err
		case s.GetDrained() == nil:
			return s, status.Errorf(codes.Aborted, "%s takes connections: somebody has undrained it, or it was restarted", s.GetName())
		case !wait || leftOf(s) == 0 && s.GetRequests() == 0:
			return s, nil
		case timeout > 0 && time.Since(started) >= timeout:
			return s, findings{fmt.Errorf("after %s %s; it stays drained", timeout, drainedLine(s))}
		}
		if line := drainedLine(s); line != said {
			fmt.Fprintln(progress, line)
			said = line
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return s, ctx.Err()
		}
	}
}

// leftOf counts the connections at a gateway's listeners.
func leftOf(s *ententev1.DataPlaneStatusResponse) (n uint32) {
	for _, l := range s.GetListeners() {
		n += l.GetConnections()
	}
	return n
}

func drainedLine(s *ententev1.DataPlaneStatusResponse) string {
	return fmt.Sprintf("%s is drained (%s): %d connections and %d requests are left", s.GetName(), cmp.Or(s.GetDrained().GetReason(), "no reason given"), leftOf(s), s.GetRequests())
}
