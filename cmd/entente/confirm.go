package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"
)

// confirm asks on a terminal whether to go on. Where nobody can be asked, --yes has to say
// so before.
func confirm(c *cobra.Command, yes bool, question string) error {
	if yes {
		return nil
	}
	in, terminal := c.InOrStdin().(*os.File)
	if !terminal || !isatty.IsTerminal(in.Fd()) {
		return usageError{c, errors.New("nobody can be asked, for standard input is no terminal: give --yes if it is meant, or --dry-run to see what ends")}
	}
	return ask(c.ErrOrStderr(), in, question)
}

// ask fails unless the answer is yes.
func ask(w io.Writer, in io.Reader, question string) error {
	fmt.Fprintf(w, "%s [y/N] ", question)
	line, err := bufio.NewReader(in).ReadString('\n')
	switch answer := strings.ToLower(strings.TrimSpace(line)); {
	case answer == "y" || answer == "yes":
		return nil
	case err != nil && !errors.Is(err, io.EOF):
		return err
	}
	return refusedError{errors.New("nothing was changed: the answer was not yes")}
}
