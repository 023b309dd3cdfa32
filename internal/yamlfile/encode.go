package yamlfile

import (
	"bytes"
	"encoding"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// Marshal writes a struct as one document that Decode reads back. Keys stand in
// the order of the fields; a zero value is left out unless its field is required;
// lists of plain values stand on one line.
func Marshal(v any) ([]byte, error) {
	root, err := encode(reflect.ValueOf(v))
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	if err := e.Encode(root); err != nil {
		return nil, fmt.Errorf("write YAML: %w", err)
	}
	if err := e.Close(); err != nil {
		return nil, fmt.Errorf("write YAML: %w", err)
	}
	return b.Bytes(), nil
}

func encode(v reflect.Value) (*yaml.Node, error) {
	if v.Type() == nodeType {
		return v.Interface().(Node).yaml, nil
	}
	if v.Kind() == reflect.Pointer {
		return encode(v.Elem())
	}
	if m, ok := v.Interface().(encoding.TextMarshaler); ok {
		text, err := m.MarshalText()
		if err != nil {
			return nil, fmt.Errorf("write YAML: %w", err)
		}
		return plain(string(text)), nil
	}
	if v.Type() == durationType {
		return plain(FormatDuration(time.Duration(v.Int()))), nil
	}
	switch v.Kind() {
	case reflect.Struct:
		return encodeStruct(v)
	case reflect.Slice:
		n := &yaml.Node{Kind: yaml.SequenceNode, Style: yaml.FlowStyle}
		for i := range v.Len() {
			item, err := encode(v.Index(i))
			if err != nil {
				return nil, err
			}
			if item.Kind != yaml.ScalarNode {
				n.Style = 0
			}
			n.Content = append(n.Content, item)
		}
		return n, nil
	case reflect.Map:
		n := &yaml.Node{Kind: yaml.MappingNode}
		values := map[string]reflect.Value{}
		for iter := v.MapRange(); iter.Next(); {
			values[iter.Key().String()] = iter.Value()
		}
		for _, key := range slices.Sorted(maps.Keys(values)) {
			item, err := encode(values[key])
			if err != nil {
				return nil, err
			}
			name := plain(key)
			if strings.Contains(key, "\n") {
				name.Style = yaml.DoubleQuotedStyle // a key stands on one line
			}
			n.Content = append(n.Content, name, item)
		}
		return n, nil
	case reflect.String:
		if !utf8.ValidString(v.String()) {
			return nil, fmt.Errorf("write YAML: %q is not UTF-8 text", clip(v.String()))
		}
		return plain(v.String()), nil
	case reflect.Bool:
		return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!bool", Value: strconv.FormatBool(v.Bool())}, nil
	case reflect.Float32, reflect.Float64:
		return &yaml.Node{Kind: yaml.ScalarNode, Value: strconv.FormatFloat(v.Float(), 'g', -1, v.Type().Bits())}, nil
	}
	switch {
	case v.CanInt():
		return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!int", Value: strconv.FormatInt(v.Int(), 10)}, nil
	case v.CanUint():
		return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!int", Value: strconv.FormatUint(v.Uint(), 10)}, nil
	}
	return nil, fmt.Errorf("write YAML: a value of type %s has no form", v.Type())
}

func encodeStruct(v reflect.Value) (*yaml.Node, error) {
	n := &yaml.Node{Kind: yaml.MappingNode}
	fields, _ := fieldsOf(v.Type())
	for _, f := range fields {
		value := v.FieldByIndex(f.index)
		empty := value.IsZero() || value.Kind() == reflect.Slice && value.Len() == 0 || value.Kind() == reflect.Map && value.Len() == 0
		if empty && !f.required {
			continue
		}
		item, err := encode(value)
		if err != nil {
			return nil, err
		}
		n.Content = append(n.Content, plain(f.name), item)
	}
	return n, nil
}

// plain is a string, quoted where it would be read as something else.
func plain(s string) *yaml.Node {
	n := &yaml.Node{}
	n.SetString(s)
	bare := (&yaml.Node{Kind: yaml.ScalarNode, Value: s}).ShortTag()
	switch {
	case bare == "!!timestamp":
		n.Tag = bare // a day needs no quotes: it is read as text all the same
	case s == "<<", n.Style == yaml.LiteralStyle && !block(s):
		n.Style = yaml.DoubleQuotedStyle // the encoder would not think of it
	}
	return n
}

// block reports whether s may be written as it is, as a block of lines: the encoder
// gets indentation wrong where lines begin or end with blanks.
func block(s string) bool {
	s = strings.TrimSuffix(s, "\n")
	if s == "" || s[0] == ' ' || strings.ContainsAny(s, "\t\r\u0085\u2028\u2029\ufeff") {
		return false
	}
	for line := range strings.SplitSeq(s, "\n") {
		if line == "" || line[len(line)-1] == ' ' {
			return false
		}
	}
	return true
}
