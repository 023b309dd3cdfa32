package catalog

import (
	"slices"

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
