package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
)

func authorityCommand() *cobra.Command {
	return group(&cobra.Command{
		Use:   "authority",
		Short: "The signing keys of a domain's CA nodes: rotate, taint, revoke",
		Long: `Each CA node signs with a key of its own, which goes through phases:

  PREPARED  in the bundle, not used until everybody holds it
  ACTIVE    signs
  RETIRED   signs no more; what it signed is still accepted
  TAINTED   signs no more; what it signed is issued anew at once
  REVOKED   out of the bundle; nothing that it signed is accepted

The first three follow each other by schedule, with nobody's help.`,
		Example: `  entente authority list
  entente authority taint 9f2c41aa     # then, when nobody has SVIDs under it:
  entente authority revoke 9f2c41aa`,
	}, authorityListCommand(), authorityPrepareCommand(),
		authorityChangeCommand("activate", "Have a PREPARED authority sign ahead of schedule",
			"The one that signed until now becomes RETIRED. Refused while not everybody holds the new one.",
			func(ctx context.Context, c ententev1.AdminClient, r *ententev1.ChangeAuthorityRequest) (*ententev1.ChangeAuthorityResponse, error) {
				return c.ActivateAuthority(ctx, r)
			}),
		authorityChangeCommand("taint", "Stop an authority from signing, and have everything that it signed issued anew",
			"It stays in the bundle: nobody is cut off. Follow it with authority list, then revoke it.",
			func(ctx context.Context, c ententev1.AdminClient, r *ententev1.ChangeAuthorityRequest) (*ententev1.ChangeAuthorityResponse, error) {
				return c.TaintAuthority(ctx, r)
			}),
		authorityChangeCommand("revoke", "Take an authority out of the bundle and cut what rests on it",
			"Refused unless it is TAINTED and nobody was seen to hold an SVID under it any more. With --now it is done from any\nphase, and whoever holds an SVID under it loses it until a new one is signed.",
			func(ctx context.Context, c ententev1.AdminClient, r *ententev1.ChangeAuthorityRequest) (*ententev1.ChangeAuthorityResponse, error) {
				return c.RevokeAuthority(ctx, r)
			}))
}

func authorityListCommand() *cobra.Command {
	var admin adminFlags
	c := &cobra.Command{
		Use:   "list",
		Short: "Show every authority, its phase, and for whom it waits",
		Example: `  entente authority list
  entente authority list --json`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				response, err := client.ListAuthorities(c.Context(), &ententev1.ListAuthoritiesRequest{})
				if err != nil {
					return err
				}
				if admin.json {
					return printJSON(c.OutOrStdout(), response)
				}
				return printAuthorities(c.OutOrStdout(), response)
			})
		},
	}
	admin.register(c)
	return c
}

func printAuthorities(w io.Writer, r *ententev1.ListAuthoritiesResponse) error {
	table := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(table, "AUTHORITY\tNODE\tUSE\tPHASE\tUNTIL\tWAITS FOR\tASSUMED")
	for _, s := range r.GetAuthorities() {
		a := s.GetAuthority()
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", a.GetId()[:12], cmp.Or(s.GetNode(), "(removed)"), useName(a.GetUse()),
			ca.PhaseName(a.GetPhase()), date(a.GetNotAfter()), waitsFor(s, r.GetGateError()), strings.Join(assumedOf(s), ", "))
	}
	if err := table.Flush(); err != nil {
		return err
	}
	if r.GetGateError() != "" {
		fmt.Fprintf(w, "who is waited for is not known: %s\n", r.GetGateError())
	}
	return nil
}

func useName(use statev1.KeyUse) string {
	return strings.TrimPrefix(use.String(), "KEY_USE_")
}

func date(unix int64) string { return time.Unix(unix, 0).UTC().Format(time.RFC3339) }

// waitsFor says what stands between an authority and its next phase.
func waitsFor(s *ententev1.AuthorityStatus, unknown string) string {
	a := s.GetAuthority()
	waiting := strings.Join(s.GetWaitingFor(), ", ")
	if unknown != "" {
		waiting = "?"
	}
	switch a.GetPhase() {
	case statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED:
		if a.GetReady() {
			return "nobody: may be activated"
		}
		return "acknowledged not yet by: " + cmp.Or(waiting, "(asking)")
	case statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED:
		if a.GetDrained() {
			return "nobody: may be revoked"
		}
		return "SVIDs under it at: " + cmp.Or(waiting, "(asking)")
	}
	return ""
}

// assumedOf is who was not waited for, when that was agreed, else as it is now.
func assumedOf(s *ententev1.AuthorityStatus) []string {
	a := s.GetAuthority()
	all := slices.Concat(a.GetAssumed(), a.GetAssumedDrained())
	if len(all) == 0 {
		all = s.GetAssumed()
	}
	return all
}

func authorityPrepareCommand() *cobra.Command {
	var admin adminFlags
	c := &cobra.Command{
		Use:     "prepare",
		Short:   "Have the CA node of this socket make its next authority",
		Long:    "A CA node prepares its next authority by itself; there is one already, unless something keeps it from that.",
		Example: "  entente authority prepare",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				response, err := client.PrepareAuthority(c.Context(), &ententev1.PrepareAuthorityRequest{})
				if err != nil {
					return err
				}
				return printAuthorityChange(c, &admin, response)
			})
		},
	}
	admin.register(c)
	return c
}

type changeAuthority func(context.Context, ententev1.AdminClient, *ententev1.ChangeAuthorityRequest) (*ententev1.ChangeAuthorityResponse, error)

func authorityChangeCommand(verb, short, long string, do changeAuthority) *cobra.Command {
	var (
		admin adminFlags
		now   bool
	)
	c := &cobra.Command{
		Use:     verb + " AUTHORITY",
		Short:   short,
		Long:    long,
		Example: "  entente authority " + verb + " 9f2c41aa",
		Args:    oneArgument("the authority's id, or its beginning: see entente authority list"),
		RunE: func(c *cobra.Command, args []string) error {
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				response, err := do(c.Context(), client, &ententev1.ChangeAuthorityRequest{Id: args[0], Now: now})
				if err != nil {
					return err
				}
				return printAuthorityChange(c, &admin, response)
			})
		},
	}
	admin.register(c)
	if verb == "revoke" {
		c.Flags().BoolVar(&now, "now", false, "from any phase, and although SVIDs under it are in use")
		c.Example += "\n  entente authority revoke 9f2c41aa --now     # compromised"
	}
	return c
}

func printAuthorityChange(c *cobra.Command, admin *adminFlags, r *ententev1.ChangeAuthorityResponse) error {
	if admin.json {
		return printJSON(c.OutOrStdout(), r)
	}
	out, a := c.OutOrStdout(), r.GetAuthority()
	fmt.Fprintf(out, "authority %s is %s at revision %s\n", a.GetId()[:12], ca.PhaseName(a.GetPhase()), ca.Revision(r.GetRevision()))
	held := strings.Join(r.GetHeldBy(), ", ")
	switch a.GetPhase() {
	case statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED:
		if held != "" {
			fmt.Fprintf(out, "to be issued anew at: %s\n", held)
		}
		fmt.Fprintf(out, "next: entente authority list, and when it waits for nobody: entente authority revoke %s\n", a.GetId()[:12])
	case statev1.AuthorityPhase_AUTHORITY_PHASE_REVOKED:
		if held != "" {
			fmt.Fprintf(out, "lost their SVIDs, and get new ones: %s\n", held)
		}
	}
	if r.GetNote() != "" {
		fmt.Fprintln(out, "note:", r.GetNote())
	}
	if len(r.GetSigning()) == 0 {
		fmt.Fprintln(out, "NOBODY SIGNS just now: the CA nodes activate what they have prepared")
	}
	return nil
}

// oneArgument wants exactly one word; what says what it is.
func oneArgument(what string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		switch {
		case len(args) == 0:
			return usageError{c, errors.New("missing: " + what)}
		case len(args) > 1:
			return usageError{c, fmt.Errorf("%s takes one argument, not %q", c.CommandPath(), args[1])}
		}
		return nil
	}
}

// largeAnswer lets an answer have a line for each of many entries.
var largeAnswer = grpc.MaxCallRecvMsgSize(64 << 20)
