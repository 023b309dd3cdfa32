package daemon

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"
)

// LogFile is a file that is only appended to and that somebody else rotates: after it was moved away, SIGHUP makes the process
// write to a new one of the old name. Methods may be called concurrently.
type LogFile struct {
	path    string
	mode    os.FileMode
	hangups chan os.Signal

	mu sync.Mutex
	f  *os.File // nil: closed, or could not be opened again
}

// OpenLogFile opens or makes the file. From then on SIGHUP no longer ends the process: Run answers it.
func OpenLogFile(path string, mode os.FileMode) (*LogFile, error) {
	l := &LogFile{path: path, mode: mode, hangups: make(chan os.Signal, 1)}
	if err := l.Reopen(); err != nil {
		return nil, err
	}
	signal.Notify(l.hangups, syscall.SIGHUP)
	return l, nil
}

// Reopen closes the file and opens the one that has its name now. When that fails, the old one stays in use.
func (l *LogFile) Reopen() error {
	f, err := os.OpenFile(l.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, l.mode)
	if err != nil {
		return explain(l.path, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f != nil {
		l.f.Close()
	}
	l.f = f
	return nil
}

// Write appends b in one write.
func (l *LogFile) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f == nil {
		return 0, fmt.Errorf("cannot write %s: %w", l.path, os.ErrClosed)
	}
	n, err := l.f.Write(b)
	if err != nil {
		return n, explain(l.path, err)
	}
	return n, nil
}

// Close closes the file.
func (l *LogFile) Close() error {
	signal.Stop(l.hangups)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f == nil {
		return nil
	}
	err := l.f.Close()
	l.f = nil
	return err
}

// Run opens the file again at each SIGHUP, until ctx is done.
func (l *LogFile) Run(ctx context.Context, log *slog.Logger) error {
	for {
		select {
		case <-l.hangups:
			if err := l.Reopen(); err != nil {
				log.Error("a log file cannot be opened again; going on with the one before", "error", err)
			} else {
				log.Info("log file opened again", "file", l.path)
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

var _ io.WriteCloser = (*LogFile)(nil)
