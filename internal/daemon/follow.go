package daemon

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/entente-mesh/entente/internal/pemfile"
)

// followEvery is how often the files are looked at.
const followEvery = time.Second

// Files are the files that a process follows: certificates, keys, key sets. What they hold is
// compared, not their times and sizes. Files that went bad, or do not fit together while
// they are being replaced, leave the last good value in use, and that is said: in the log
// once, in [Files.Problems] and a metric for as long as it lasts. Its methods may be called
// concurrently.
type Files struct {
	log     *slog.Logger
	reloads *prometheus.CounterVec

	mu   sync.Mutex
	list []interface{ look() *FileProblem }
	bad  []FileProblem
}

// FileProblem is a file whose newest content is not used.
type FileProblem struct {
	What  string   // by the names of the configuration: oidc.certFile
	Files []string // paths
	Why   string
	Since time.Time
	None  bool // nothing was ever read: what needs it does not work
}

func (p FileProblem) String() string {
	if p.None {
		return fmt.Sprintf("%s cannot be used: %s", p.What, p.Why)
	}
	return fmt.Sprintf("%s cannot be used since %s, what was read before stays in use: %s", p.What, p.Since.UTC().Format(time.RFC3339), p.Why)
}

// NewFiles makes the list of a process, and its metrics.
func NewFiles(metrics *Metrics, log *slog.Logger) *Files {
	f := &Files{log: log, reloads: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: metrics.Name("file_reloads_total"), Help: "Files that changed and were read again, by the setting that names them and whether they could be used.",
	}, []string{"what", "result"})}
	metrics.MustRegister(f.reloads, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: metrics.Name("files_unusable"), Help: "Files whose newest content cannot be used; what was read before stays in use.",
	}, func() float64 { return float64(len(f.Problems())) }))
	return f
}

// Problems are the files whose newest content is not used.
func (f *Files) Problems() []FileProblem {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.bad)
}

// Warnings are the same for people, a line each.
func (f *Files) Warnings() []string {
	var lines []string
	for _, p := range f.Problems() {
		lines = append(lines, p.String())
	}
	return lines
}

// Run looks at the files until ctx is done.
func (f *Files) Run(ctx context.Context) error {
	ticker := time.NewTicker(followEvery)
	defer ticker.Stop()
	for {
		f.look()
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (f *Files) look() {
	f.mu.Lock()
	list := slices.Clone(f.list)
	f.mu.Unlock()
	var bad []FileProblem
	for _, followed := range list {
		if problem := followed.look(); problem != nil {
			bad = append(bad, *problem)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.bad = bad
}

// Followed is a value that is made of files, and made anew when their content changes. Get
// may be called concurrently.
type Followed[T any] struct {
	of    *Files
	what  string
	names []string
	parse func(contents [][]byte) (T, error)

	mu      sync.Mutex // guards what follows
	good    bool       // there is a value
	value   T
	sum     [sha256.Size]byte // of what was read last, good or bad
	problem *FileProblem
}

// Follow follows files that parse makes a value of: it is given the content of each, in their
// order. what names them as the configuration does. They are read now; the error says why
// they cannot be used yet, and they are followed all the same.
func Follow[T any](files *Files, what string, parse func(contents [][]byte) (T, error), names ...string) (*Followed[T], error) {
	f := &Followed[T]{of: files, what: what, names: names, parse: parse}
	problem := f.look()
	files.mu.Lock()
	defer files.mu.Unlock()
	files.list = append(files.list, f)
	if problem == nil {
		return f, nil
	}
	files.bad = append(files.bad, *problem)
	return f, fmt.Errorf("%s: %s", what, problem.Why)
}

// FollowKeyPair follows a certificate and its key, PEM.
func FollowKeyPair(files *Files, what, certFile, keyFile string) (*Followed[*tls.Certificate], error) {
	return Follow(files, what, func(contents [][]byte) (*tls.Certificate, error) {
		return pemfile.KeyPair(contents[0], contents[1])
	}, certFile, keyFile)
}

// Get returns the newest good value; an error only if there never was one.
func (f *Followed[T]) Get() (T, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.good {
		return f.value, fmt.Errorf("%s: %s", f.what, f.problem.Why)
	}
	return f.value, nil
}

// Problem says why the newest content is not used; nil: it is.
func (f *Followed[T]) Problem() *FileProblem {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.problem
}

// look reads the files, and makes the value anew if they hold something else.
func (f *Followed[T]) look() *FileProblem {
	contents, sum, err := f.read()
	defer func() {
		for _, content := range contents {
			clear(content) // it may be a key
		}
	}()
	f.mu.Lock()
	defer f.mu.Unlock()
	again := f.good || f.problem != nil // it was looked at before
	if again && sum == f.sum {
		return f.problem
	}
	var value T
	if err == nil {
		value, err = f.parse(contents)
	}
	f.sum = sum
	if err == nil {
		f.good, f.value, f.problem = true, value, nil
		if again {
			f.of.reloads.WithLabelValues(f.what, "ok").Inc()
			f.of.log.Info("a file has changed and was read again", "what", f.what, "file", strings.Join(f.names, ", "))
		}
		return nil
	}
	since := time.Now()
	if f.problem != nil {
		since = f.problem.Since
	}
	f.problem = &FileProblem{What: f.what, Files: f.names, Why: err.Error(), Since: since, None: !f.good}
	if again {
		f.of.reloads.WithLabelValues(f.what, "failed").Inc()
		f.of.log.Warn("a file has changed and cannot be used; what was read before stays in use", "what", f.what, "file", strings.Join(f.names, ", "), "error", err)
	}
	return f.problem
}

// read reads the files. The sum stands for what was found, an error included.
func (f *Followed[T]) read() (contents [][]byte, sum [sha256.Size]byte, err error) {
	h := sha256.New()
	for _, name := range f.names {
		content, problem := readBounded(name)
		contents = append(contents, content)
		own := sha256.Sum256(content)
		h.Write(own[:])
		if problem != nil {
			fmt.Fprint(h, problem)
			err = errors.Join(err, problem)
		}
	}
	return contents, [sha256.Size]byte(h.Sum(nil)), err
}

func readBounded(name string) ([]byte, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	content, err := io.ReadAll(io.LimitReader(file, pemfile.MaxSize+1))
	if err == nil && len(content) > pemfile.MaxSize {
		return nil, fmt.Errorf("%s has over %d bytes", name, pemfile.MaxSize)
	}
	return content, err
}
