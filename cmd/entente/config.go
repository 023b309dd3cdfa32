package main

import (
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

// configFlags are the flags of every verb that reads a configuration file.
type configFlags struct {
	file  string
	check bool
}

func (f *configFlags) register(c *cobra.Command, file string) {
	c.Flags().StringVar(&f.file, "config", file, "configuration file")
}

func (f *configFlags) registerCheck(c *cobra.Command) {
	c.Flags().BoolVar(&f.check, "check", false, "print the effective configuration and exit")
}

// readConfig opens the file and has it read strictly.
func readConfig[C any](c *cobra.Command, file string, read func(file string, r io.Reader) (C, error)) (C, error) {
	var zero C
	f, err := os.Open(file)
	if err != nil {
		return zero, usageError{c, fmt.Errorf("no configuration: %w", err)}
	}
	defer f.Close()
	config, err := read(file, f)
	if err != nil {
		return zero, usageError{c, err}
	}
	return config, nil
}

// printConfig writes the effective configuration as YAML.
func printConfig(w io.Writer, config any) error {
	text, err := yamlfile.Marshal(config)
	if err != nil {
		return err
	}
	_, err = w.Write(text)
	return err
}

// logger is the log of a long-running verb, on standard error.
func logger(c *cobra.Command, format, level string) (*slog.Logger, error) {
	log, err := daemon.NewLogger(c.ErrOrStderr(), format, level)
	if err != nil {
		return nil, usageError{c, err}
	}
	return log, nil
}
