package catalog

import (
	"slices"
	"strconv"
	"strings"
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
	if len(selectors) == 0 {
		c.fail("add run: {user: NAME} or run: {uid: N}", "nothing says by what its process is recognised")
	}
	const form = "write unix:uid:N, unix:user:NAME, unix:gid:N, unix:group:N, unix:path:/P, unix:sha256:HEX, unix:cmdline:HEX, systemd:unit:NAME.service or container:id:HEX"
	strong, weak := false, ""
	digest := func(selector, value, how string) {
		if len(value) != 64 || strings.Trim(value, "0123456789abcdef") != "" {
			c.fail(how, "selector %q: not 64 lower-case hexadecimal digits", selector)
		}
	}
	for _, selector := range selectors {
		kind, value := CutSelector(selector)
		if value == "" {
			c.fail(form, "selector %q is not understood", selector)
			continue
		}
		switch kind {
		case "unix:uid", "unix:gid", "unix:group":
			if n, err := strconv.ParseUint(value, 10, 32); err != nil || n == 1<<32-1 || strconv.FormatUint(n, 10) != value {
				c.fail("", "selector %q: not a number from 0 to 4294967294", selector)
			}
			strong = strong || kind == "unix:uid"
		case "unix:user":
			if len(value) > 32 || strings.ContainsAny(value, ": \t\n/") {
				c.fail("", "selector %q: not a user name", selector)
			}
			strong = true
		case "unix:sha256":
			digest(selector, value, "take the first column of: sha256sum FILE")
			strong = true
		case "unix:cmdline":
			digest(selector, value, "take the first column of: sha256sum /proc/PID/cmdline")
			weak = selector
		case "container:id":
			digest(selector, value, "take it from: docker inspect --format {{.Id}} NAME")
			strong = true
		case "systemd:unit":
			if !strings.HasSuffix(value, ".service") && !strings.HasSuffix(value, ".scope") || len(value) > 255 || strings.ContainsAny(value, "/ \t\n") {
				c.fail("write the unit as systemctl status shows it: web.service", "selector %q: not the name of a service or scope unit", selector)
			}
			strong = true
		case "run:id":
			if len(value) < 16 || len(value) > 64 || strings.Trim(value, "abcdefghijklmnopqrstuvwxyz234567") != "" {
				c.fail("", "selector %q: not an id that `entente run` makes", selector)
			}
			weak = selector
		case "unix:path":
			weak = selector
			if value[0] != '/' || strings.Contains(value+"/", "/../") || strings.Contains(value+"/", "/./") || strings.Contains(value, "//") || len(value) > 1 && strings.HasSuffix(value, "/") {
				c.fail("write the program's absolute path", "selector %q: not a clean absolute path", selector)
			}
		default:
			c.fail(form, "selector %q is not understood", selector)
		}
	}
	if weak != "" && !strong {
		c.fail("add systemd, container, user or uid", "%s stands alone: any user may place a program at a path he sees, and say any command line", weak)
	}
}

// CutSelector takes a selector apart: unix:uid:1000 is of kind unix:uid.
func CutSelector(selector string) (kind, value string) {
	family, rest, _ := strings.Cut(selector, ":")
	kind, value, _ = strings.Cut(rest, ":")
	return family + ":" + kind, value
}
