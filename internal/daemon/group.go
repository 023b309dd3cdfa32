package daemon

import (
	"context"
	"errors"
	"fmt"
	"sync"
)

// Group runs the tasks of a process. The first task that fails stops all the others.
type Group struct {
	ctx    context.Context
	cancel context.CancelFunc
	tasks  sync.WaitGroup

	mu   sync.Mutex
	errs []error // guarded by mu; in the order in which tasks failed
}

// NewGroup makes a group whose tasks are stopped when ctx is done. Wait must be called.
func NewGroup(ctx context.Context) *Group {
	g := &Group{}
	g.ctx, g.cancel = context.WithCancel(ctx)
	return g
}

// Go starts a task. It must return soon after its ctx is done; what it returns then counts as a failure only if it is
// something else than the end of that context. A task that returns nil has done its duty; the others go on.
// Tasks may start tasks.
func (g *Group) Go(name string, task func(ctx context.Context) error) {
	g.tasks.Go(func() {
		err := task(g.ctx)
		if err == nil || g.ctx.Err() != nil && onlyEnded(err) {
			return
		}
		g.mu.Lock()
		g.errs = append(g.errs, fmt.Errorf("%s: %w", name, err))
		g.mu.Unlock()
		g.cancel()
	})
}

// Wait returns when all tasks have returned: their errors joined, each with the name of its task, the first failure first;
// nil if none failed, also when the group's context ended.
func (g *Group) Wait() error {
	g.tasks.Wait()
	g.cancel()
	g.mu.Lock()
	defer g.mu.Unlock()
	return errors.Join(g.errs...)
}

// onlyEnded reports whether err says that a context ended and nothing else: of joined errors, each must.
func onlyEnded(err error) bool {
	for {
		switch e := err.(type) {
		case interface{ Unwrap() []error }:
			for _, part := range e.Unwrap() {
				if !onlyEnded(part) {
					return false
				}
			}
			return true
		case interface{ Unwrap() error }:
			if inner := e.Unwrap(); inner != nil {
				err = inner
				continue
			}
		}
		return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
	}
}
