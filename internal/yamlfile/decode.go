package yamlfile

import (
	"encoding"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/entente-mesh/entente/internal/nearest"
)

// field is one key that a struct takes.
type field struct {
	name        string
	index       []int
	required    bool
	unsupported bool
	oneOf       []string
	min, max    string // as the tag says; parsed for the field's type
}

var (
	posType      = reflect.TypeFor[Pos]()
	nodeType     = reflect.TypeFor[Node]()
	durationType = reflect.TypeFor[time.Duration]()
	textType     = reflect.TypeFor[encoding.TextUnmarshaler]()
)

// fieldsOf reads the tags of a struct type. Tags are a matter of the program: a
// wrong one panics.
func fieldsOf(t reflect.Type) (fields []field, pos []int) {
	for i := range t.NumField() {
		sf := t.Field(i)
		tag, tagged := sf.Tag.Lookup("yaml")
		switch {
		case sf.Type == posType && sf.Anonymous:
			pos = sf.Index
			continue
		case tag == "-" || !sf.IsExported() && !sf.Anonymous:
			continue
		case sf.Anonymous && !tagged && sf.Type.Kind() == reflect.Struct:
			inner, _ := fieldsOf(sf.Type)
			for _, f := range inner {
				f.index = append(slices.Clone(sf.Index), f.index...)
				fields = append(fields, f)
			}
			continue
		case !tagged:
			continue
		}
		options := strings.Split(tag, ",")
		f := field{name: options[0], index: sf.Index}
		for _, option := range options[1:] {
			key, value, _ := strings.Cut(option, "=")
			switch key {
			case "required":
				f.required = true
			case "unsupported":
				f.unsupported = true
			case "oneof":
				f.oneOf = strings.Split(value, "|")
			case "min":
				f.min = value
			case "max":
				f.max = value
			default:
				panic(fmt.Sprintf("yamlfile: %s.%s: unknown tag option %q", t, sf.Name, option))
			}
		}
		fields = append(fields, f)
	}
	return fields, pos
}

type decoder struct {
	complaints
	file string
}

func (d *decoder) errorf(n *yaml.Node, format string, args ...any) {
	d.add(&Error{File: d.file, Line: n.Line, Column: n.Column, Msg: fmt.Sprintf(format, args...)})
}

// value reads n into v. path names it for people, f holds the limits of its field.
func (d *decoder) value(path string, n *yaml.Node, v reflect.Value, f field) {
	if v.Type() == nodeType {
		v.Set(reflect.ValueOf(Node{d.file, path, n}))
		return
	}
	if n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" {
		d.errorf(n, "%s has no value; give it one or leave the key out", orDocument(path))
		return
	}
	if v.Kind() == reflect.Pointer {
		fresh := reflect.New(v.Type().Elem())
		d.value(path, n, fresh.Elem(), f)
		v.Set(fresh)
		return
	}
	if v.CanAddr() && v.Addr().Type().Implements(textType) {
		d.text(path, n, v.Addr().Interface().(encoding.TextUnmarshaler))
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		d.mapping(path, n, v)
	case reflect.Slice:
		d.sequence(path, n, v, f)
	case reflect.Map:
		d.dictionary(path, n, v, f)
	default:
		d.scalar(path, n, v, f)
	}
}

func (d *decoder) text(path string, n *yaml.Node, into encoding.TextUnmarshaler) {
	if n.Kind != yaml.ScalarNode {
		d.errorf(n, "%s must be one value, not %s", orDocument(path), describe(n))
		return
	}
	if err := into.UnmarshalText([]byte(n.Value)); err != nil {
		d.errorf(n, "%s: %v", orDocument(path), err)
	}
}

func (d *decoder) mapping(path string, n *yaml.Node, v reflect.Value) {
	if n.Kind != yaml.MappingNode {
		d.errorf(n, "%s must be a mapping (\"key: value\" lines), not %s", orDocument(path), describe(n))
		return
	}
	fields, pos := fieldsOf(v.Type())
	places := map[string]Pos{}
	names := make([]string, len(fields))
	for i, f := range fields {
		names[i] = f.name
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if first, twice := places[key.Value]; twice {
			d.errorf(key, "key %q is given twice%s, first at line %d", clip(key.Value), in(path), first.Line)
			continue
		}
		places[key.Value] = Pos{File: d.file, Line: key.Line, Column: key.Column}
		at := slices.Index(names, key.Value)
		switch {
		case at < 0:
			d.errorf(key, "unknown key %q%s%s", clip(key.Value), in(path), instead(key.Value, names))
		case fields[at].unsupported:
			d.errorf(key, "key %q%s is not supported in this release; leave it out", key.Value, in(path))
		default:
			d.value(join(path, key.Value), value, v.FieldByIndex(fields[at].index), fields[at])
		}
	}
	for _, f := range fields {
		if _, given := places[f.name]; f.required && !given {
			d.errorf(n, "key %q is missing%s", f.name, in(path))
		}
	}
	if pos != nil {
		v.FieldByIndex(pos).Set(reflect.ValueOf(Pos{d.file, n.Line, n.Column, places}))
	}
}

func (d *decoder) sequence(path string, n *yaml.Node, v reflect.Value, f field) {
	if n.Kind != yaml.SequenceNode {
		d.errorf(n, "%s must be a list, as in [a, b], not %s", orDocument(path), describe(n))
		return
	}
	if f.required && len(n.Content) == 0 {
		d.errorf(n, "%s is empty", orDocument(path))
		return
	}
	element := f
	element.required = false
	list := reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content))
	for i, item := range n.Content {
		d.value(fmt.Sprintf("%s[%d]", path, i), item, list.Index(i), element)
	}
	v.Set(list)
}

// dictionary reads a mapping whose keys are names of the writer's choice.
func (d *decoder) dictionary(path string, n *yaml.Node, v reflect.Value, f field) {
	if n.Kind != yaml.MappingNode {
		d.errorf(n, "%s must be a mapping (\"key: value\" lines), not %s", orDocument(path), describe(n))
		return
	}
	if f.required && len(n.Content) == 0 {
		d.errorf(n, "%s is empty", orDocument(path))
		return
	}
	element := f
	element.required = false
	m := reflect.MakeMap(v.Type())
	lines := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if first, twice := lines[key.Value]; twice {
			d.errorf(key, "key %q is given twice%s, first at line %d", clip(key.Value), in(path), first)
			continue
		}
		lines[key.Value] = key.Line
		k := reflect.New(v.Type().Key()).Elem()
		if k.Kind() != reflect.String {
			panic(fmt.Sprintf("yamlfile: %s: keys of a map must be strings", v.Type()))
		}
		k.SetString(key.Value)
		item := reflect.New(v.Type().Elem()).Elem()
		d.value(join(path, key.Value), value, item, element)
		m.SetMapIndex(k, item)
	}
	v.Set(m)
}

func (d *decoder) scalar(path string, n *yaml.Node, v reflect.Value, f field) {
	if n.Kind != yaml.ScalarNode {
		d.errorf(n, "%s must be %s, not %s", orDocument(path), wanted(v.Type()), describe(n))
		return
	}
	fail := func(why string) {
		d.errorf(n, "%s must be %s, not %q%s", orDocument(path), wanted(v.Type()), clip(n.Value), why)
	}
	tag := n.ShortTag()
	switch {
	case v.Type() == durationType:
		duration, err := ParseDuration(n.Value)
		if err != nil {
			fail(": " + err.Error())
			return
		}
		v.SetInt(int64(duration))
		d.limits(path, n, f, func(limit string) int {
			bound, err := ParseDuration(limit)
			if err != nil {
				panic(fmt.Sprintf("yamlfile: limit %q of %s: %v", limit, path, err))
			}
			return compare(duration, bound)
		})
	case v.Kind() == reflect.String:
		// A day and "<<" mean nothing else here; numbers, booleans and the like
		// would be somebody's surprise later.
		if tag != "!!str" && tag != "!!timestamp" && tag != "!!merge" {
			fail("; put it in quotes")
			return
		}
		if f.required && n.Value == "" {
			d.errorf(n, "%s is empty", orDocument(path))
			return
		}
		if f.oneOf != nil && !slices.Contains(f.oneOf, n.Value) {
			d.errorf(n, "%s: %q is not one of %s%s", orDocument(path), clip(n.Value), strings.Join(f.oneOf, ", "), meant(n.Value, f.oneOf))
			return
		}
		v.SetString(n.Value)
	case v.Kind() == reflect.Bool:
		if tag != "!!bool" || n.Value != "true" && n.Value != "false" {
			fail("")
			return
		}
		v.SetBool(n.Value == "true")
	case v.CanInt():
		i, err := strconv.ParseInt(n.Value, 10, 64)
		if err != nil || tag != "!!int" || v.OverflowInt(i) {
			fail("")
			return
		}
		v.SetInt(i)
		d.limits(path, n, f, func(limit string) int { return compare(i, mustInt(limit)) })
	case v.CanUint():
		u, err := strconv.ParseUint(n.Value, 10, 64)
		if err != nil || tag != "!!int" || v.OverflowUint(u) {
			fail("")
			return
		}
		v.SetUint(u)
		d.limits(path, n, f, func(limit string) int { return compare(u, uint64(mustInt(limit))) })
	case v.CanFloat():
		x, err := strconv.ParseFloat(n.Value, v.Type().Bits())
		if err != nil || tag != "!!int" && tag != "!!float" || math.IsNaN(x) || math.IsInf(x, 0) {
			fail("")
			return
		}
		v.SetFloat(x)
	default:
		panic(fmt.Sprintf("yamlfile: %s: a field of type %s cannot be read from a file", path, v.Type()))
	}
}

func (d *decoder) limits(path string, n *yaml.Node, f field, against func(limit string) int) {
	if f.min != "" && against(f.min) < 0 {
		d.errorf(n, "%s: %s is too small; the least is %s", orDocument(path), clip(n.Value), f.min)
	}
	if f.max != "" && against(f.max) > 0 {
		d.errorf(n, "%s: %s is too large; the most is %s", orDocument(path), clip(n.Value), f.max)
	}
}

func compare[T int64 | uint64 | time.Duration](a, b T) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	default:
		return 0
	}
}

func mustInt(s string) int64 {
	i, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		panic(fmt.Sprintf("yamlfile: limit %q is no integer", s))
	}
	return i
}

func join(path, key string) string {
	key = clip(key)
	switch {
	case path == "":
		return key
	case strings.ContainsAny(path, " .[") || path[0] >= 'a' && path[0] <= 'z':
		return path + "." + key
	default:
		return path + " " + key // "Service spec"
	}
}

func in(path string) string {
	if path == "" {
		return ""
	}
	return " in " + path
}

func orDocument(path string) string {
	if path == "" {
		return "the document"
	}
	return path
}

// describe says what stands there, in the words of somebody who never read the
// YAML specification.
func describe(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	default:
		return strconv.Quote(clip(n.Value))
	}
}

func wanted(t reflect.Type) string {
	switch {
	case t == durationType:
		return `a duration such as "12h" or "1h30m"`
	case t.Kind() == reflect.String:
		return "text"
	case t.Kind() == reflect.Bool:
		return "true or false"
	case t.Kind() == reflect.Float32 || t.Kind() == reflect.Float64:
		return "a number"
	case t.Kind() >= reflect.Uint && t.Kind() <= reflect.Uintptr:
		if bits := t.Bits(); bits < 64 {
			return fmt.Sprintf("a whole number from 0 to %d", uint64(1)<<bits-1)
		}
		return "a whole number, not negative"
	default:
		return "a whole number"
	}
}

func meant(word string, words []string) string {
	if near := nearest.Word(word, words); near != "" {
		return fmt.Sprintf("; did you mean %q?", near)
	}
	return ""
}

// instead proposes the nearest name, else lists the few that exist.
func instead(word string, words []string) string {
	if s := meant(word, words); s != "" {
		return s
	}
	if len(words) == 0 || len(words) > 12 {
		return ""
	}
	sorted := slices.Clone(words)
	slices.Sort(sorted)
	return "; known keys: " + strings.Join(sorted, ", ")
}
