package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/entente-mesh/entente/internal/daemon"
)

// longRunning is a daemon's verb: it holds keys, and SIGHUP never ends it, not even before it runs.
func longRunning(c *cobra.Command) *cobra.Command {
	run := c.RunE
	c.RunE = func(c *cobra.Command, args []string) error {
		daemon.KeepHangups()
		return run(c, args)
	}
	return holdsKeys(c)
}

// holdsKeys seals the memory of a verb that reads private keys, before it reads any (I1).
func holdsKeys(c *cobra.Command) *cobra.Command {
	var debuggable bool
	c.Flags().BoolVar(&debuggable, "debuggable", false, "let debuggers and core dumps see this process and its keys (development only)")
	run := c.RunE
	c.RunE = func(c *cobra.Command, args []string) error {
		if debuggable {
			fmt.Fprintln(c.ErrOrStderr(), "entente: --debuggable: a core dump or a debugger of this user shows private keys")
		} else if err := daemon.SealMemory(); err != nil {
			return err
		}
		return run(c, args)
	}
	return c
}
