package replica

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"

	"github.com/hashicorp/go-hclog"
)

// newLogger gives Raft a logger that writes to l. Raft reports each connection and
// each election step; its Info is our Debug.
func newLogger(l *slog.Logger) hclog.Logger {
	return &logger{slog: l.With("part", "raft"), name: "raft"}
}

// logger is hclog's interface over slog. Levels are slog's to decide.
type logger struct {
	slog *slog.Logger
	name string
	args []any
}

func (l *logger) level(level hclog.Level) slog.Level {
	switch {
	case level >= hclog.Error:
		return slog.LevelError
	case level == hclog.Warn:
		return slog.LevelWarn
	}
	return slog.LevelDebug
}

func (l *logger) Log(level hclog.Level, msg string, args ...any) {
	if level == hclog.Trace {
		return
	}
	at := l.level(level)
	for _, arg := range args {
		if err, ok := arg.(error); ok && errors.Is(err, net.ErrClosed) {
			at = slog.LevelDebug // closed by this node, on purpose
		}
	}
	if !l.slog.Enabled(context.Background(), at) {
		return
	}
	// hclog's lazily formatted values would print as slices.
	values := make([]any, len(args))
	for i, arg := range args {
		if f, ok := arg.(hclog.Format); ok && len(f) > 0 {
			arg = fmt.Sprintf(fmt.Sprint(f[0]), f[1:]...)
		}
		values[i] = arg
	}
	l.slog.Log(context.Background(), at, msg, values...)
}

func (l *logger) Trace(string, ...any)          {}
func (l *logger) Debug(msg string, args ...any) { l.Log(hclog.Debug, msg, args...) }
func (l *logger) Info(msg string, args ...any)  { l.Log(hclog.Info, msg, args...) }
func (l *logger) Warn(msg string, args ...any)  { l.Log(hclog.Warn, msg, args...) }
func (l *logger) Error(msg string, args ...any) { l.Log(hclog.Error, msg, args...) }

func (l *logger) enabled(level hclog.Level) bool {
	return l.slog.Enabled(context.Background(), l.level(level))
}

func (l *logger) IsTrace() bool { return false }
func (l *logger) IsDebug() bool { return l.enabled(hclog.Debug) }
func (l *logger) IsInfo() bool  { return l.enabled(hclog.Info) }
func (l *logger) IsWarn() bool  { return l.enabled(hclog.Warn) }
func (l *logger) IsError() bool { return l.enabled(hclog.Error) }

func (l *logger) ImpliedArgs() []any { return l.args }

func (l *logger) With(args ...any) hclog.Logger {
	return &logger{slog: l.slog.With(args...), name: l.name, args: append(l.args[:len(l.args):len(l.args)], args...)}
}

func (l *logger) Name() string                   { return l.name }
func (l *logger) Named(name string) hclog.Logger { return l.ResetNamed(l.name + "." + name) }
func (l *logger) ResetNamed(name string) hclog.Logger {
	return &logger{slog: l.slog, name: name, args: l.args}
}

func (l *logger) SetLevel(hclog.Level)  {}
func (l *logger) GetLevel() hclog.Level { return hclog.NoLevel }

func (l *logger) StandardLogger(*hclog.StandardLoggerOptions) *log.Logger {
	return slog.NewLogLogger(l.slog.Handler(), slog.LevelWarn)
}

func (l *logger) StandardWriter(opts *hclog.StandardLoggerOptions) io.Writer {
	return l.StandardLogger(opts).Writer()
}
