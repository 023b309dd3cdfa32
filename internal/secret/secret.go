// Package secret holds what must not be printed: passphrases, PINs, tokens, private keys.
//
// A Text or a Bytes shows as [redacted] in every verb of fmt, in slog, and in JSON, YAML
// and text. It is a matter of types, so that a log line or a dump of a configuration
// cannot forget it. Whoever needs the secret itself asks with Reveal.
package secret

import (
	"fmt"
	"io"
	"log/slog"
)

// Redacted is what a secret shows as.
const Redacted = "[redacted]"

// Text is a secret text. The zero value is none. It holds a pointer, since fmt cannot ask
// an unexported field how it is to be printed, and prints an address then.
type Text struct{ text *string }

// Of makes a secret of a text.
func Of(text string) Text {
	if text == "" {
		return Text{}
	}
	return Text{&text}
}

// Reveal is the text.
func (t Text) Reveal() string {
	if t.text == nil {
		return ""
	}
	return *t.text
}

// IsZero tells whether there is none.
func (t Text) IsZero() bool { return t.text == nil }

func (t Text) String() string {
	if t.IsZero() {
		return ""
	}
	return Redacted
}

// GoString is String.
func (t Text) GoString() string { return t.String() }

// Format is String, whatever the verb.
func (t Text) Format(f fmt.State, _ rune) { io.WriteString(f, t.String()) }

// LogValue is String.
func (t Text) LogValue() slog.Value { return slog.StringValue(t.String()) }

// MarshalText is String: a configuration that is printed does not hold it.
func (t Text) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// MarshalYAML is String.
func (t Text) MarshalYAML() (any, error) { return t.String(), nil }

// UnmarshalText reads the secret of a configuration.
func (t *Text) UnmarshalText(text []byte) error {
	*t = Of(string(text))
	return nil
}

// Bytes are secret bytes, as of a private key. They may be used as []byte; an unexported
// field of this type needs a struct that formats itself.
type Bytes []byte

func (b Bytes) String() string {
	if len(b) == 0 {
		return ""
	}
	return Redacted
}

// GoString is String.
func (b Bytes) GoString() string { return b.String() }

// Format is String, whatever the verb.
func (b Bytes) Format(f fmt.State, _ rune) { io.WriteString(f, b.String()) }

// LogValue is String.
func (b Bytes) LogValue() slog.Value { return slog.StringValue(b.String()) }

// MarshalText is String.
func (b Bytes) MarshalText() ([]byte, error) { return []byte(b.String()), nil }

// MarshalYAML is String.
func (b Bytes) MarshalYAML() (any, error) { return b.String(), nil }
