package catalog

import (
	"strings"
	"unicode/utf8"
)

// maxPath bounds the request paths that are looked at.
const maxPath = 8192

// cleanPath returns the decoded form of an escaped request path (no query) that
// rules are matched against. It changes nothing that could make the path mean
// another thing to the application than to the rule; whatever could is refused:
// "." and ".." segments (also with parameters, "..;x"), empty segments before the
// last, encoded slashes, backslashes and control characters, bytes outside ASCII
// that are not escaped UTF-8, and what would mean something else when decoded a
// second time. It allocates only for a path with escapes.
func cleanPath(escaped string) (path, why string) {
	switch {
	case escaped == "" || escaped[0] != '/':
		return "", "the path does not begin with \"/\""
	case len(escaped) > maxPath:
		return "", "the path is too long"
	}
	encoded := false
	for i := range len(escaped) {
		switch c := escaped[i]; {
		case c == '%':
			encoded = true
		case c <= ' ' || c >= 0x7F:
			return "", "the path holds a control character, a space or a byte outside ASCII"
		case c == '\\':
			return "", "the path holds a backslash"
		case c == '?' || c == '#':
			return "", "the path holds a query or a fragment"
		}
	}
	path = escaped
	if encoded {
		if path, why = unescape(escaped); why != "" {
			return "", why
		}
	}
	for rest := path[1:]; ; {
		segment, after, more := strings.Cut(rest, "/")
		if segment == "" && more {
			return "", "the path holds an empty segment (\"//\")"
		}
		name, _, _ := strings.Cut(segment, ";")
		if name == "." || name == ".." {
			return "", "the path holds a \".\" or \"..\" segment"
		}
		if !more {
			return path, ""
		}
		rest = after
	}
}

func unescape(escaped string) (path, why string) {
	var b strings.Builder
	b.Grow(len(escaped))
	for i := 0; i < len(escaped); i++ {
		c := escaped[i]
		if c == '%' {
			if i+2 >= len(escaped) {
				return "", "the path holds a broken escape"
			}
			high, ok1 := unhex(escaped[i+1])
			low, ok2 := unhex(escaped[i+2])
			if !ok1 || !ok2 {
				return "", "the path holds a broken escape"
			}
			c = high<<4 | low
			i += 2
			switch {
			case c == '/' || c == '\\':
				return "", "the path holds an encoded slash or backslash"
			case c < ' ' || c == 0x7F:
				return "", "the path holds an encoded control character"
			}
		}
		b.WriteByte(c)
	}
	path = b.String()
	if !utf8.ValidString(path) {
		return "", "the path's escapes are not UTF-8"
	}
	if twice(path) {
		return "", "the path is encoded twice"
	}
	return path, ""
}

// twice reports whether decoding once more would change the path.
func twice(path string) bool {
	for i := 0; i+2 < len(path); i++ {
		if path[i] != '%' {
			continue
		}
		_, ok1 := unhex(path[i+1])
		_, ok2 := unhex(path[i+2])
		if ok1 && ok2 {
			return true
		}
	}
	return false
}

func unhex(c byte) (byte, bool) {
	switch {
	case '0' <= c && c <= '9':
		return c - '0', true
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10, true
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10, true
	default:
		return 0, false
	}
}

// validMethod reports whether s is a token (RFC 9110, 5.6.2) of bearable length.
func validMethod(s string) bool {
	if s == "" || len(s) > 32 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0:
		default:
			return false
		}
	}
	return true
}

// matches compares by whole segments: the prefix /v1/balance means itself and what
// is below it, not /v1/balances.
func (m *httpMatch) matches(method, path string) bool {
	if len(m.methods) > 0 {
		listed := false
		for _, each := range m.methods {
			if each == method {
				listed = true
				break
			}
		}
		if !listed {
			return false
		}
	}
	switch {
	case m.path == "":
		return true
	case m.exact:
		return path == m.path
	case m.path == "/":
		return true
	default:
		return strings.HasPrefix(path, m.path) && (len(path) == len(m.path) || path[len(m.path)] == '/')
	}
}
