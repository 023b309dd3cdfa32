package daemon

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

// Main runs a process until it ends or SIGTERM or SIGINT asks it to, and returns its exit code: 0 if run returned nil or
// ended because it was asked to, 1 if it failed, which is logged. A second signal exits at once with 128 plus its number.
func Main(ctx context.Context, log *slog.Logger, run func(context.Context) error) int {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(signals)
	return supervise(ctx, log, run, signals, os.Exit)
}

func supervise(ctx context.Context, log *slog.Logger, run func(context.Context) error, signals <-chan os.Signal, exit func(int)) int {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	go giveUp(ctx, log)

	asked := false
	for {
		select {
		case err := <-done:
			if err == nil || ctx.Err() != nil && onlyEnded(err) {
				return 0
			}
			log.Error("stopped by an error", "error", err.Error())
			return 1
		case s := <-signals:
			if asked {
				log.Warn("stopped at once by a second signal", "signal", s.String())
				code := 128
				if number, ok := s.(syscall.Signal); ok {
					code += int(number)
				}
				exit(code)
				return code
			}
			asked = true
			handover.leaving.Store(true)
			log.Info("stopping; a second signal stops at once", "signal", s.String())
			cancel()
		}
	}
}

// NewLogger makes the log of a process: format is "text" or "json", level "debug", "info", "warn" or "error"; empty means
// text and info. Its messages have a rate and its values a length (loglines.go).
func NewLogger(w io.Writer, format, level string) (*slog.Logger, error) {
	options := &slog.HandlerOptions{ReplaceAttr: shortened}
	switch strings.ToLower(level) {
	case "debug":
		options.Level = slog.LevelDebug
	case "info", "":
		options.Level = slog.LevelInfo
	case "warn":
		options.Level = slog.LevelWarn
	case "error":
		options.Level = slog.LevelError
	default:
		return nil, fmt.Errorf("unknown log level %q: it is one of debug, info, warn, error", level)
	}
	switch format {
	case "text", "":
		return slog.New(boundLines(slog.NewTextHandler(w, options))), nil
	case "json":
		return slog.New(boundLines(slog.NewJSONHandler(w, options))), nil
	default:
		return nil, fmt.Errorf("unknown log format %q: it is text or json", format)
	}
}
