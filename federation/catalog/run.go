package catalog

import (
	"slices"
	"strings"

	"github.com/entente-mesh/entente/ca/selector"
)

// run checks where something runs and by what it is recognised.
func (c *compiler) run(hosts, selectors []string) {
	if len(hosts) == 0 {
		c.fail("list the agents, as in run: {hosts: [h1]}", "no host is listed")
	}
	for i, host := range hosts {
		c.label("host", host)
		if slices.Contains(hosts[:i], host) {
			c.fail("", "host %q is listed twice", host)
		}
	}
	for _, problem := range selector.Problems(selectors) {
		c.fail(problem.Fix, "%s", problem.What)
	}
}

// runLevel is the feature level that what is listed under run needs.
func runLevel(selectors []string) uint32 {
	level := max(selector.Level(selectors), 1)
	if slices.ContainsFunc(selectors, longUser) {
		level = max(level, 5)
	}
	return level
}

// longUser tells whether the release before refuses a selector in an object of the catalogue,
// though not in an entry: its catalogue took user names of at most 32 bytes.
func longUser(text string) bool {
	name, ok := strings.CutPrefix(text, selector.User+":")
	return ok && len(name) > 32
}
