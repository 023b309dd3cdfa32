package daemon

import (
	"context"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
)

// SIGHUP means "open and read again" to every daemon: it ends none.

// KeepHangups has SIGHUP never end this process, from now on.
func KeepHangups() { signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP) }

// Reload is what is done when the process gets SIGHUP.
type Reload struct {
	what    string
	do      func() error
	hangups chan os.Signal
}

// OnHangup has do called at each SIGHUP that comes from now on, by Run. what names it in the log.
func OnHangup(what string, do func() error) *Reload {
	r := &Reload{what: what, do: do, hangups: make(chan os.Signal, 1)}
	signal.Notify(r.hangups, syscall.SIGHUP)
	return r
}

// Run answers each SIGHUP until ctx is done. When do fails, what was in use stays in use.
func (r *Reload) Run(ctx context.Context, log *slog.Logger) error {
	defer r.Close()
	for {
		select {
		case <-r.hangups:
			if err := r.do(); err != nil {
				log.Error("SIGHUP: could not be opened or read again; what was in use stays in use", "what", r.what, "error", err)
			} else {
				log.Info("SIGHUP: opened or read again", "what", r.what)
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Close is for a Reload that is never run.
func (r *Reload) Close() { signal.Stop(r.hangups) }
