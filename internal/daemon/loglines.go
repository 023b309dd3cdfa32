package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/entente-mesh/entente/internal/admission"
)

// What strangers, callers and workloads do is logged, and they do it as often as they
// like. So that none of it fills the disk of the log (I14), each message has so many lines
// at once and then a rate, for each of those whom it is about and for all of them together.
const (
	linesOfOne, oneEvery = 50, time.Second
	linesOfAll, allEvery = 1000, 50 * time.Millisecond

	// longestValue is how much of a value stands in a line, in bytes: a path or a name may
	// have been chosen by somebody else.
	longestValue = 1 << 10
)

// whose are the keys whose values tell apart whom a line is about; the first one counts.
var whose = []string{"caller", "subscriber", "agent", "member", "peer", "uid", "peer_address", "service"}

// auditLine is the key of a line of the audit log that could not be written there: it is
// always written, and whole.
const auditLine = "line"

// lines is a handler that leaves out what its messages have no line for, and says in the
// next line of the message how many those were. Levels below Info are as they come: who
// asks for them looks for something.
type lines struct {
	slog.Handler
	one, all *admission.Fold
	about    [2]string // key and value of whose that With has given
}

func boundLines(h slog.Handler) slog.Handler {
	return &lines{Handler: h, one: admission.NewFold(oneEvery, linesOfOne), all: admission.NewFold(allEvery, linesOfAll)}
}

func (l *lines) Handle(ctx context.Context, r slog.Record) error {
	if r.Level < slog.LevelInfo {
		return l.Handler.Handle(ctx, r)
	}
	about, always := l.about, false
	r.Attrs(func(a slog.Attr) bool {
		always = always || a.Key == auditLine
		about = nearer(about, a)
		return true
	})
	if always {
		return l.Handler.Handle(ctx, r)
	}
	now := time.Now()
	kind := r.Message + "\x00" + about[1]
	unsaid, say := l.one.Say(kind, now)
	if !say {
		return nil
	}
	others, say := l.all.Say(r.Message, now)
	if !say {
		l.one.Owe(kind, unsaid)
		return nil
	}
	if unsaid += others; unsaid > 0 {
		r = r.Clone()
		r.AddAttrs(slog.Int("more_since_last_line", unsaid))
	}
	return l.Handler.Handle(ctx, r)
}

// nearer is what an attribute says of whom a line is about, if it says it better than about.
func nearer(about [2]string, a slog.Attr) [2]string {
	for _, key := range whose {
		switch key {
		case about[0]:
			return about
		case a.Key:
			value := a.Value.Resolve().String()
			if key == "peer_address" {
				value = admission.SourceOf(value)
			}
			if value == "" {
				return about
			}
			return [2]string{key, short(value)}
		}
	}
	return about
}

func (l *lines) WithAttrs(attrs []slog.Attr) slog.Handler {
	next := *l
	next.Handler = l.Handler.WithAttrs(attrs)
	for _, a := range attrs {
		next.about = nearer(next.about, a)
	}
	return &next
}

func (l *lines) WithGroup(name string) slog.Handler {
	next := *l
	next.Handler = l.Handler.WithGroup(name)
	return &next
}

// shortened is for slog.HandlerOptions.ReplaceAttr: it cuts values that are too long.
func shortened(_ []string, a slog.Attr) slog.Attr {
	if a.Key == auditLine {
		return a
	}
	switch a.Value.Kind() {
	case slog.KindString:
		if s := a.Value.String(); len(s) > longestValue {
			a.Value = slog.StringValue(short(s))
		}
	case slog.KindAny:
		if err, ok := a.Value.Any().(error); ok {
			if s := err.Error(); len(s) > longestValue {
				a.Value = slog.StringValue(short(s))
			}
		}
	}
	return a
}

func short(s string) string {
	if len(s) <= longestValue {
		return s
	}
	return strings.ToValidUTF8(s[:longestValue], "") + fmt.Sprintf("… (%d bytes)", len(s))
}
