package daemon

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/entente-mesh/entente/internal/yamlfile"
)

// AccessLog says where access records go, one JSON object per line, and how much of them is kept.
type AccessLog struct {
	// File is appended to. Empty: there are no records.
	File string `yaml:"file"`
	// MaxSize bounds File together with what was rotated of it; default 1GiB.
	MaxSize yamlfile.Size `yaml:"maxSize"`
	// MaxFiles is how many files that are, File included; default 8.
	MaxFiles int `yaml:"maxFiles"`
}

// leastFile is the least size of one file: a record fits.
const leastFile = 1 << 20

// Complete fills in what was not said, and says what cannot be.
func (a *AccessLog) Complete() error {
	a.MaxSize.Bytes, a.MaxFiles = cmp.Or(a.MaxSize.Bytes, 1<<30), cmp.Or(a.MaxFiles, 8)
	if a.MaxFiles < 2 || a.MaxFiles > 1000 {
		return fmt.Errorf("accessLog.maxFiles is %d: set 2 to 1000", a.MaxFiles)
	}
	if a.MaxSize.Bytes/int64(a.MaxFiles) < leastFile {
		return fmt.Errorf("accessLog.maxSize leaves each of %d files less than 1MiB: set more, or a smaller accessLog.maxFiles", a.MaxFiles)
	}
	return nil
}

// Records is an open access log.
type Records struct {
	*slog.Logger
	file *LogFile
	lost atomic.Uint64
}

// Open opens the log, after Complete; nil if there is none. What could not be written is counted in metrics.
func (a AccessLog) Open(metrics *Metrics) (*Records, error) {
	if a.File == "" {
		return nil, nil
	}
	file, err := OpenLogFile(a.File, 0o640, LogBound{Bytes: a.MaxSize.Bytes, Keep: a.MaxFiles})
	if err != nil {
		return nil, fmt.Errorf("accessLog.file: %w", err)
	}
	r := &Records{file: file}
	r.Logger = slog.New(slog.NewJSONHandler(r, &slog.HandlerOptions{ReplaceAttr: shortened}))
	metrics.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: metrics.Name("access_records_lost_total"), Help: "Access records that could not be written: the disk is full, or the file has its whole bound and cannot be rotated.",
	}, func() float64 { return float64(r.lost.Load()) }))
	return r, nil
}

// Write appends a record.
func (r *Records) Write(b []byte) (int, error) {
	n, err := r.file.Write(b)
	if err != nil {
		r.lost.Add(1)
	}
	return n, err
}

// Run opens the file again at each SIGHUP, until ctx is done.
func (r *Records) Run(ctx context.Context, log *slog.Logger) error { return r.file.Run(ctx, log) }

// Close closes the file.
func (r *Records) Close() error { return r.file.Close() }
