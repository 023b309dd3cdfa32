// Command entente runs every part of an Entente mesh: the certificate authority
// of a trust domain, the mesh agent of a host, the east-west gateway, and the
// scenarios that rehearse them.
//
// One file per verb: parse, wire, run. Nothing imports it.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"syscall"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/replica"
	"github.com/entente-mesh/entente/internal/daemon"
)

// Exit codes, the same for every verb.
const (
	exitOK          = 0
	exitFindings    = 1 // it ran, and something is wrong: an assertion, a process that failed
	exitUsage       = 2
	exitUnreachable = 3
	exitRefused     = 4
)

func main() { os.Exit(run(os.Args)) }

// run is main without the process around it.
func run(args []string) int {
	root := &cobra.Command{
		Use:   "entente",
		Short: "Trust-domain federation for separate meshes",
		Long: `Entente lets separate meshes, each with its own certificate authority, call each
other across trust domains and datacenters without sharing a root of trust.`,
		Example:       "  entente demo            # two trust domains, two datacenters, and one of them dies",
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetArgs(args[1:])
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error { return usageError{c, err} })
	root.AddCommand(caCommand(), authorityCommand(), nodeCommand(), snapshotCommand(), tokenCommand(), entryCommand(), applyCommand(), getCommand(), deleteCommand(), federationCommand(), whoamiCommand(),
		agentCommand(), sidecarCommand(), serviceCommand(), gatewayCommand(), runCommand(), fetchCommand(), validateCommand(), demoCommand(), demoServiceCommand(), versionCommand())

	err := root.ExecuteContext(context.Background())
	if err == nil {
		return exitOK
	}
	var stopped exited
	if errors.As(err, &stopped) {
		return int(stopped) // it said why in its log
	}
	code := exitCode(err)
	fmt.Fprintln(os.Stderr, "entente:", message(err))
	var usage usageError
	if errors.As(err, &usage) {
		fmt.Fprintf(os.Stderr, "see: %s --help\n", usage.command.CommandPath())
	}
	return code
}

// usageError is a command line that cannot be taken.
type usageError struct {
	command *cobra.Command
	err     error
}

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

// findings is an error of a verb that ran and found something wrong.
type findings struct{ error }

// refusedError is a refusal that is no gRPC status of its own.
type refusedError struct{ error }

// exited is the exit code of a long-running verb, which has already said why.
type exited int

func (e exited) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// runUntilSignal runs a long-running verb until it fails or SIGTERM or SIGINT asks it to stop.
func runUntilSignal(log *slog.Logger, run func(context.Context) error) error {
	if code := daemon.Main(context.Background(), log, run); code != exitOK {
		return exited(code)
	}
	return nil
}

func exitCode(err error) int {
	var usage usageError
	var found findings
	var refused refusedError
	switch {
	case errors.As(err, &refused):
		return exitRefused
	case errors.As(err, &usage):
		return exitUsage
	case errors.As(err, &found):
		return exitFindings
	case errors.Is(err, ca.ErrRecoveryKey), errors.Is(err, replica.ErrStateExists),
		errors.Is(err, replica.ErrSuperseded), errors.Is(err, replica.ErrDiverged):
		return exitRefused
	case errors.Is(err, context.Canceled):
		return 128 + int(syscall.SIGINT)
	}
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded:
		return exitUnreachable
	case codes.PermissionDenied, codes.FailedPrecondition, codes.InvalidArgument, codes.Aborted,
		codes.AlreadyExists, codes.NotFound, codes.Unauthenticated, codes.ResourceExhausted:
		return exitRefused
	}
	return exitFindings
}

// message is err without gRPC's wrapping.
func message(err error) string {
	if s, ok := status.FromError(err); ok && s.Code() != codes.Unknown {
		return s.Message()
	}
	return err.Error()
}

// noArguments refuses stray words with a usage error.
func noArguments(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{c, fmt.Errorf("%s takes no argument %q", c.CommandPath(), args[0])}
	}
	return nil
}

// group is a command that only holds others: an unknown word below it is a usage error.
func group(c *cobra.Command, children ...*cobra.Command) *cobra.Command {
	c.AddCommand(children...)
	c.RunE = func(c *cobra.Command, args []string) error {
		if len(args) > 0 {
			return usageError{c, fmt.Errorf("unknown verb %q of %s", args[0], c.CommandPath())}
		}
		return c.Help()
	}
	return c
}
