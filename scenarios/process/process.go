// Package process starts the processes of a scenario and makes sure that none of
// them outlives it: not when it ends, not when it panics, not when it is killed.
//
// Each child is a process group of its own, so that an interrupt at the terminal
// reaches only the runner, which then ends its children itself. On Linux the
// kernel kills a child when the thread that forked it ends (PR_SET_PDEATHSIG), so
// all forks are made by one locked thread that lives as long as the Supervisor.
package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Spec says what to start.
type Spec struct {
	Name   string // for people
	Binary string
	Args   []string
	Env    []string // added to the runner's
	Log    string   // file that gets standard output and error, appended
}

// Supervisor owns processes. It is safe for concurrent use.
type Supervisor struct {
	forks chan func()

	mu      sync.Mutex
	closed  bool
	running map[*Process]bool
	died    []*Process // ended without being told to
}

// ErrClosed: the supervisor has been closed; nothing more is started.
var ErrClosed = errors.New("the runner is ending; no process is started any more")

// New returns a supervisor, to be closed by the caller.
func New() *Supervisor {
	s := &Supervisor{forks: make(chan func()), running: map[*Process]bool{}}
	go s.forkAll()
	return s
}

// forkAll is the one thread that forks. It ends, and the thread with it, after Close.
func (s *Supervisor) forkAll() {
	runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
	for fork := range s.forks {
		fork()
	}
}

// Process is one started process.
type Process struct {
	Spec
	supervisor *Supervisor
	command    *exec.Cmd
	ended      chan struct{}

	mu     sync.Mutex
	killed bool
	err    error // after ended
}

// Start starts a process. Its output goes to the log file of its spec.
func (s *Supervisor) Start(spec Spec) (*Process, error) {
	log, err := os.OpenFile(spec.Log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, plain(fmt.Errorf("start %s: %w", spec.Name, err))
	}
	defer log.Close()
	return s.start(spec, log, log)
}

func (s *Supervisor) start(spec Spec, stdout, stderr io.Writer) (*Process, error) {
	command := exec.Command(spec.Binary, spec.Args...)
	command.Env = append(os.Environ(), spec.Env...)
	command.Stdout, command.Stderr = stdout, stderr
	command.SysProcAttr = attributes()
	// A grandchild that holds the pipe must not keep Wait from returning.
	command.WaitDelay = time.Second
	p := &Process{Spec: spec, supervisor: s, command: command, ended: make(chan struct{})}

	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	result := make(chan error, 1)
	s.forks <- func() { result <- command.Start() }
	if err := <-result; err != nil {
		return nil, plain(fmt.Errorf("start %s: %w", spec.Name, err))
	}
	s.running[p] = true
	go p.wait()
	return p, nil
}

func (p *Process) wait() {
	err := p.command.Wait()
	p.mu.Lock()
	p.err = err
	killed := p.killed
	p.mu.Unlock()

	s := p.supervisor
	s.mu.Lock()
	delete(s.running, p)
	if !killed {
		s.died = append(s.died, p)
	}
	s.mu.Unlock()
	close(p.ended)
}

// Run runs a command to its end and returns its standard output. The error quotes
// what it wrote to standard error. When ctx ends the command is killed.
func (s *Supervisor) Run(ctx context.Context, spec Spec) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var stdout, stderr bytes.Buffer
	p, err := s.start(spec, &stdout, &stderr)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.ended:
	case <-ctx.Done():
		p.Kill()
		<-p.ended
		return nil, ctx.Err()
	}
	s.mu.Lock()
	s.died = slices.DeleteFunc(s.died, func(d *Process) bool { return d == p })
	s.mu.Unlock()
	if p.err != nil {
		return nil, fmt.Errorf("%s: %w: %s", spec.Name, p.err, lastLines(stderr.Bytes(), 5))
	}
	return stdout.Bytes(), nil
}

// Died returns the processes that have ended although nobody killed them.
func (s *Supervisor) Died() []*Process {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.died)
}

// Running returns the living processes.
func (s *Supervisor) Running() []*Process {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]*Process, 0, len(s.running))
	for p := range s.running {
		list = append(list, p)
	}
	slices.SortFunc(list, func(a, b *Process) int { return strings.Compare(a.Name, b.Name) })
	return list
}

// Close kills every process, waits until all are gone, and lets nothing more start.
// It may be called twice.
func (s *Supervisor) Close() {
	s.mu.Lock()
	already := s.closed
	s.closed = true
	var left []*Process
	for p := range s.running {
		left = append(left, p)
	}
	s.mu.Unlock()
	for _, p := range left {
		p.Kill()
	}
	for _, p := range left {
		<-p.ended
	}
	if !already {
		close(s.forks) // nothing sends any more: start looks at closed under the lock
	}
}

// Kill sends SIGKILL to the process. It does not wait.
func (p *Process) Kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.killed = true
	p.command.Process.Kill() // by pidfd where the system has them: never another process of the same id
}

// PID is the process id.
func (p *Process) PID() int { return p.command.Process.Pid }

// Ended is closed when the process is gone and has been waited for.
func (p *Process) Ended() <-chan struct{} { return p.ended }

// Ready waits until probe returns nil. The error quotes the log if the process ends
// before, and what probe said last if ctx ends before.
func (p *Process) Ready(ctx context.Context, probe func(context.Context) error) error {
	last := errors.New("nothing yet")
	for wait := 10 * time.Millisecond; ; wait = min(wait*3/2, 100*time.Millisecond) {
		bounded, cancel := context.WithTimeout(ctx, 2*time.Second)
		err := probe(bounded)
		cancel()
		if err == nil {
			return nil
		}
		if ctx.Err() == nil {
			last = err
		}
		select {
		case <-p.ended:
			return p.Obituary()
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.Canceled) {
				return ctx.Err()
			}
			return fmt.Errorf("%s did not become ready in time: %w; its log ends:\n%s", p.Name, last, p.Tail(8))
		case <-time.After(wait):
		}
	}
}

// Obituary says how a process ended, with the end of its log.
func (p *Process) Obituary() error {
	<-p.ended
	how := "exit status 0"
	if p.err != nil {
		how = p.err.Error()
	}
	return fmt.Errorf("%s (pid %d) ended by itself: %s; its log ends:\n%s", p.Name, p.PID(), how, p.Tail(8))
}

// Tail returns the last lines of the log, indented.
func (p *Process) Tail(lines int) string {
	f, err := os.Open(p.Log)
	if err != nil {
		return "  (no log: " + err.Error() + ")"
	}
	defer f.Close()
	const most = 16 << 10
	if info, err := f.Stat(); err == nil && info.Size() > most {
		f.Seek(-most, io.SeekEnd)
	}
	data, err := io.ReadAll(io.LimitReader(f, most))
	if err != nil {
		return "  (no log: " + err.Error() + ")"
	}
	return "  " + strings.ReplaceAll(lastLines(data, lines), "\n", "\n  ")
}

func lastLines(data []byte, n int) string {
	lines := strings.Split(strings.TrimRight(string(data), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// plain says the usual reasons why nothing can be started in plain words.
func plain(err error) error {
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("%w: the disk is full; free some space, or choose another disk with TMPDIR", err)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: it is missing", err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: it may not be run; is its file system mounted noexec?", err)
	case errors.Is(err, syscall.EAGAIN):
		return fmt.Errorf("%w: the limit of processes is reached; see ulimit -u", err)
	case errors.Is(err, syscall.EMFILE):
		return fmt.Errorf("%w: the limit of open files is reached; see ulimit -n", err)
	}
	return err
}
