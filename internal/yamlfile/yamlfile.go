// Package yamlfile reads YAML that people write by hand, and refuses what it does
// not understand: an unknown key, a key given twice, a wrong type, a value out of
// range, a missing value. Every complaint says where (FILE:LINE:COLUMN) and, where
// there is one, which name was probably meant; all of a file's complaints come at
// once.
//
// Structs say what a mapping may hold:
//
//	type Config struct {
//		yamlfile.Pos                                      // filled in: where the mapping stands
//		Name    string        `yaml:"name,required"`
//		Port    uint16        `yaml:"port,min=1"`
//		Mode    string        `yaml:"mode,oneof=auto|manual"`
//		TTL     time.Duration `yaml:"ttl,min=1s"`         // "12h", "1h30m", "7d"
//		Limit   yamlfile.Rate `yaml:"limit"`              // "500/s"
//		Old     string        `yaml:"old,unsupported"`    // known, but refused
//		Rest    yamlfile.Node `yaml:"rest"`               // to be decoded later
//	}
//
// A field without a tag, or tagged "-", is not part of the file; an embedded struct
// without a tag lends its fields. A type with UnmarshalText is read from any scalar.
// A pointer to a struct or scalar stays nil when the key is absent.
//
// YAML is narrowed to what a reviewer can see at a glance: no anchors and aliases,
// no merge keys, no tags, no duplicate keys, no keys without a value, decimal
// integers only; UTF-8 only. Size, depth and the number of complaints are bounded,
// so that a file from anywhere may be given to it.
package yamlfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// Bounds of what is read.
const (
	MaxSize   = 8 << 20 // bytes of a file
	MaxDepth  = 32      // mappings and sequences inside each other
	MaxErrors = 20      // complaints that are kept of one file
)

// Error is one complaint about a place in a file.
type Error struct {
	File         string
	Line, Column int // from 1; Line 0: the file as a whole; Column 0: the line as a whole
	Msg          string

	more int // the last of a bounded list: how many it stands for
}

func (e *Error) Error() string {
	switch {
	case e.Line == 0:
		return e.File + ": " + e.Msg
	case e.Column == 0:
		return fmt.Sprintf("%s:%d: %s", e.File, e.Line, e.Msg)
	default:
		return fmt.Sprintf("%s:%d:%d: %s", e.File, e.Line, e.Column, e.Msg)
	}
}

// Errors are the complaints about a file, in the order of its lines; at most
// [MaxErrors] and a last one that says there were more. Never empty as an error.
type Errors []*Error

func (es Errors) Error() string {
	lines := make([]string, len(es))
	for i, e := range es {
		lines[i] = e.Error()
	}
	return strings.Join(lines, "\n")
}

// Unwrap lets errors.As find each [Error].
func (es Errors) Unwrap() []error {
	errs := make([]error, len(es))
	for i, e := range es {
		errs[i] = e
	}
	return errs
}

// Pos is a place in a file. A struct that embeds it learns where its mapping
// begins and where each of its keys stands.
type Pos struct {
	File         string
	Line, Column int

	keys map[string]Pos
}

// String is FILE:LINE; empty for the zero Pos.
func (p Pos) String() string {
	if p.File == "" && p.Line == 0 {
		return ""
	}
	return fmt.Sprintf("%s:%d", p.File, p.Line)
}

// At is the place of a key of the mapping; the mapping's own if it was not given.
func (p Pos) At(key string) Pos {
	if at, ok := p.keys[key]; ok {
		return at
	}
	return Pos{File: p.File, Line: p.Line, Column: p.Column}
}

// Given reports whether the mapping holds the key.
func (p Pos) Given(key string) bool {
	_, ok := p.keys[key]
	return ok
}

// Errorf makes a complaint about the place, for checks that come after decoding.
func (p Pos) Errorf(format string, args ...any) *Error {
	return &Error{File: p.File, Line: p.Line, Column: p.Column, Msg: fmt.Sprintf(format, args...)}
}

// Decode reads exactly one document into the struct that into points to. file
// names it in complaints. The error is an [Errors], or what reading r returned.
// Fields whose keys are absent keep the values they had: set defaults before.
func Decode(file string, r io.Reader, into any) error {
	seen := false
	return DecodeAll(file, r, func(doc Node) error {
		if seen {
			return doc.Pos().Errorf("a second document begins here; this file holds exactly one")
		}
		seen = true
		return doc.Decode(into)
	})
}

// DecodeAll calls f for each document of the file that holds something. Complaints
// that f returns ([Error], [Errors]) are collected over all documents; any other
// error ends the reading and is returned as it is.
func DecodeAll(file string, r io.Reader, f func(doc Node) error) error {
	data, err := read(file, r)
	if err != nil {
		return err
	}
	var all complaints
	documents := 0
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	for {
		var document yaml.Node
		if err := decoder.Decode(&document); err == io.EOF {
			break
		} else if err != nil {
			all.add(syntaxError(file, data, err))
			return all.err()
		}
		if len(document.Content) != 1 {
			continue
		}
		root := document.Content[0]
		if root.Kind == yaml.ScalarNode && root.ShortTag() == "!!null" {
			continue // nothing between two "---"
		}
		documents++
		if err := narrow(file, root); err != nil {
			all.add(err)
			continue
		}
		if err := f(Node{file: file, yaml: root}); err != nil && !all.take(err) {
			return err
		}
	}
	if documents == 0 && len(all.list) == 0 {
		all.add(&Error{File: file, Msg: "the file is empty"})
	}
	return all.err()
}

// complaints collects a bounded number.
type complaints struct {
	list []*Error
	more int
}

func (c *complaints) add(e *Error) {
	switch {
	case e.more > 0:
		c.more += e.more
	case len(c.list) < MaxErrors:
		c.list = append(c.list, e)
	default:
		c.more++
	}
}

func (c *complaints) take(err error) bool {
	var many Errors
	var one *Error
	switch {
	case errors.As(err, &many):
		for _, e := range many {
			c.add(e)
		}
	case errors.As(err, &one):
		c.add(one)
	default:
		return false
	}
	return true
}

func (c *complaints) err() error {
	if len(c.list) == 0 {
		return nil
	}
	slices.SortStableFunc(c.list, func(a, b *Error) int {
		if a.Line != b.Line {
			return a.Line - b.Line
		}
		return a.Column - b.Column
	})
	list := Errors(c.list)
	if c.more > 0 {
		list = append(list, &Error{File: list[0].File, Msg: fmt.Sprintf("and %d more", c.more), more: c.more})
	}
	return list
}

// read takes the whole file and refuses what is not plain UTF-8 text, with the
// line: the parser below would say less about it.
func read(file string, r io.Reader) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", file, err)
	}
	whole := func(msg string) error { return Errors{{File: file, Msg: msg}} }
	switch {
	case len(data) > MaxSize:
		return nil, whole(fmt.Sprintf("the file is larger than %d MiB", MaxSize>>20))
	case bytes.HasPrefix(data, []byte{0xFE, 0xFF}), bytes.HasPrefix(data, []byte{0xFF, 0xFE}):
		return nil, whole("the file is UTF-16; save it as UTF-8")
	}
	data = bytes.TrimPrefix(data, []byte{0xEF, 0xBB, 0xBF})
	line, column := 1, 1
	at := func(msg string) error { return Errors{{File: file, Line: line, Column: column, Msg: msg}} }
	for i := 0; i < len(data); {
		c, size := utf8.DecodeRune(data[i:])
		if c == utf8.RuneError && size == 1 {
			return nil, at("this is not UTF-8 text; save the file as UTF-8")
		}
		if c < ' ' && c != '\n' && c != '\r' && c != '\t' || c == 0x7F || c == 0xFEFF {
			return nil, at(fmt.Sprintf("control character %U; remove it", c))
		}
		i += size
		column++
		if c == '\n' {
			line, column = line+1, 1
		}
	}
	return data, nil
}

var atLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?(.*)$`)

// syntaxError says in our words what the parser did not understand.
func syntaxError(file string, data []byte, err error) *Error {
	e := &Error{File: file, Msg: strings.TrimPrefix(err.Error(), "yaml: ")}
	if m := atLine.FindStringSubmatch(err.Error()); m != nil {
		e.Line, _ = strconv.Atoi(m[1])
		e.Msg = m[2]
	}
	// The parser's line may be the one before; a tab in the indentation near it
	// is the most common cause, and its message never says "tab".
	lines := bytes.Split(data, []byte("\n"))
	for n := max(e.Line-1, 1); n <= min(max(e.Line, 1)+1, len(lines)); n++ {
		line := lines[n-1]
		indent := line[:len(line)-len(bytes.TrimLeft(line, " \t"))]
		if tab := bytes.IndexByte(indent, '\t'); tab >= 0 {
			return &Error{File: file, Line: n, Column: tab + 1, Msg: "the line is indented with a tab; YAML wants spaces"}
		}
	}
	switch {
	case strings.Contains(e.Msg, "unknown anchor"):
		e.Msg = "anchors and aliases are not allowed here; write the value out"
	case strings.Contains(e.Msg, "mapping values are not allowed"):
		e.Msg = "this is not valid YAML: a second \": \" on the line; put a value that contains one in quotes, or check the indentation"
	case strings.Contains(e.Msg, "did not find expected key"), strings.Contains(e.Msg, "could not find expected ':'"):
		e.Msg = "this is not valid YAML: expected \"key: value\"; check the indentation of this line and the one before"
	default:
		e.Msg = "this is not valid YAML: " + e.Msg
	}
	return e
}

// narrow refuses the parts of YAML that we do not want, before anything is decoded.
func narrow(file string, root *yaml.Node) *Error {
	at := func(n *yaml.Node, msg string) *Error {
		return &Error{File: file, Line: n.Line, Column: n.Column, Msg: msg}
	}
	var walk func(n *yaml.Node, depth int) *Error
	walk = func(n *yaml.Node, depth int) *Error {
		switch {
		case depth > MaxDepth:
			return at(n, fmt.Sprintf("nested deeper than %d levels", MaxDepth))
		case n.Kind == yaml.AliasNode || n.Anchor != "":
			return at(n, "anchors and aliases are not allowed here; write the value out")
		case n.Style&yaml.TaggedStyle != 0:
			return at(n, fmt.Sprintf("tags such as %s are not allowed here", clip(n.Tag)))
		}
		for i, child := range n.Content {
			if n.Kind == yaml.MappingNode && i%2 == 0 {
				if child.Kind != yaml.ScalarNode || child.Anchor != "" || child.Style&yaml.TaggedStyle != 0 {
					return at(child, "a key must be plain text")
				}
				if child.ShortTag() == "!!merge" {
					return at(child, "merge keys (<<) are not allowed here; write the values out")
				}
				continue
			}
			if err := walk(child, depth+1); err != nil {
				return err
			}
		}
		return nil
	}
	return walk(root, 0)
}

// Node is a part of a document that has not been decoded yet. The zero Node is
// absent.
type Node struct {
	file string
	path string
	yaml *yaml.Node
}

// IsZero reports whether the node is absent.
func (n Node) IsZero() bool { return n.yaml == nil }

// Pos is where the node begins.
func (n Node) Pos() Pos {
	if n.yaml == nil {
		return Pos{File: n.file}
	}
	return Pos{File: n.file, Line: n.yaml.Line, Column: n.yaml.Column}
}

// Named returns the node with a name for people, used in complaints: "Service".
func (n Node) Named(name string) Node {
	n.path = name
	return n
}

// Scalar is the text of a key of the mapping. False: n is no mapping, or the key
// is absent or holds no scalar.
func (n Node) Scalar(key string) (string, Pos, bool) {
	if n.yaml == nil || n.yaml.Kind != yaml.MappingNode {
		return "", Pos{}, false
	}
	for i := 0; i+1 < len(n.yaml.Content); i += 2 {
		if k, v := n.yaml.Content[i], n.yaml.Content[i+1]; k.Value == key && v.Kind == yaml.ScalarNode {
			return v.Value, Pos{File: n.file, Line: v.Line, Column: v.Column}, true
		}
	}
	return "", Pos{}, false
}

// Decode reads the node into the struct that into points to. The error is an
// [Errors]. It panics if into is not a pointer to a struct: that is a mistake of
// the program, not of the file.
func (n Node) Decode(into any) error {
	v := reflect.ValueOf(into)
	if v.Kind() != reflect.Pointer || v.IsNil() || v.Elem().Kind() != reflect.Struct {
		panic(fmt.Sprintf("yamlfile: Decode into %T, want a pointer to a struct", into))
	}
	if n.yaml == nil {
		return Errors{{File: n.file, Msg: "nothing to decode"}}
	}
	d := decoder{file: n.file}
	d.value(n.path, n.yaml, v.Elem(), field{})
	return d.err()
}

func clip(s string) string {
	const most = 40
	if utf8.RuneCountInString(s) <= most {
		return s
	}
	return string([]rune(s)[:most]) + "..."
}
