package dataplane

import (
	"context"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// Drained is by whom, why and since when an engine takes no new connections.
type Drained struct {
	Who, Reason string
	Since       time.Time
}

// shifts say when doors serve: from Undrain to Drain.
type shifts struct {
	drained atomic.Pointer[Drained] // nil: connections are taken; set under mu

	mu    sync.Mutex
	open  context.Context    // ends with Drain; nil: nobody has asked since Undrain
	end   context.CancelFunc // ends open
	again chan struct{}      // while drained: closed by Undrain
}

// Drain has gateways' doors take no new connections, and end those that are open when
// their requests have ended: peers are told so, and none is cut. An edge, whose clients
// may know no other, goes on, and ends each connection with its next answer. It returns at
// once, with what is in force: of two, the earlier one.
func (e *Engine) Drain(why Drained) Drained {
	s := &e.shifts
	s.mu.Lock()
	defer s.mu.Unlock()
	if now := s.drained.Load(); now != nil {
		return *now
	}
	s.again = make(chan struct{})
	s.drained.Store(&why) // before shifts end: what is refused does not come after them
	if s.open != nil {
		s.end()
	}
	s.open = nil
	return why
}

// Undrain has the doors take connections again; false: they do.
func (e *Engine) Undrain() bool {
	s := &e.shifts
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.drained.Load() == nil {
		return false
	}
	s.drained.Store(nil)
	close(s.again)
	return true
}

// Drained is why no connections are taken; nil: they are.
func (e *Engine) Drained() *Drained { return e.shifts.drained.Load() }

// shift waits until connections are taken, and returns a context that ends with ctx or
// with Drain. Once ctx is done it returns its error.
func (e *Engine) shift(ctx context.Context) (context.Context, error) {
	s := &e.shifts
	for {
		s.mu.Lock()
		again := s.again
		if s.drained.Load() == nil {
			if s.open == nil {
				s.open, s.end = context.WithCancel(context.Background())
			}
			open := s.open
			s.mu.Unlock()
			shift, end := context.WithCancel(ctx)
			context.AfterFunc(open, end)
			return shift, ctx.Err()
		}
		s.mu.Unlock()
		select {
		case <-again:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// inShifts calls serve for each shift, side by side with those before that have not come to
// their end, until ctx is done and all have, or until one fails. Each has a context that
// ends with its shift.
func (e *Engine) inShifts(ctx context.Context, serve func(shift context.Context) error) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var all sync.WaitGroup
	for {
		shift, err := e.shift(ctx)
		if err != nil {
			break
		}
		all.Go(func() {
			if err := serve(shift); err != nil && shift.Err() == nil {
				stop(err)
			}
		})
		<-shift.Done()
	}
	all.Wait()
	return context.Cause(ctx)
}

// finishing is how long a door whose shift has ended may go on with requests under way: as
// long as they take, but no longer than that after stop is done.
func finishing(stop context.Context, longest time.Duration) (context.Context, context.CancelFunc) {
	limit, cancel := context.WithCancel(context.WithoutCancel(stop))
	forget := context.AfterFunc(stop, func() {
		timer := time.NewTimer(longest)
		defer timer.Stop()
		select {
		case <-timer.C:
			cancel()
		case <-limit.Done():
		}
	})
	return limit, func() {
		forget()
		cancel()
	}
}

// gentle is how long a door that is drained goes on with connections of HTTP/1.1: each
// answer says that it is the connection's last, which one that is closed between two
// requests does not.
const gentle = time.Second

// shift is a gate to one of the servers that take their turns at it.
type shift struct {
	*gate
	over chan struct{} // closed: this server is given no more
	once sync.Once
}

func newShift(g *gate) *shift { return &shift{gate: g, over: make(chan struct{})} }

// Accept is part of net.Listener, as is Close.
func (s *shift) Accept() (net.Conn, error) {
	select {
	case conn := <-s.conns:
		return conn, nil
	case err := <-s.errs:
		return nil, err
	case <-s.done:
	case <-s.over:
	}
	return nil, net.ErrClosed
}

// Close ends the shift and leaves the gate open.
func (s *shift) Close() error {
	s.once.Do(func() { close(s.over) })
	return nil
}

// serveShift serves what comes through a gate until ctx is done, which is a shift's, then
// finishes what is under way; stop is the door's.
func (e *Engine) serveShift(ctx, stop context.Context, g *gate, server *http.Server) error {
	own := newShift(g)
	fresh := watch(server)
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(own) }()
	select {
	case err := <-failed:
		_ = server.Close()
		return err
	case <-ctx.Done():
	}
	limit, cancel := finishing(stop, e.cfg.Timing.Drain)
	defer cancel()
	// A connection that its caller believes to have must not be reset.
	if stop.Err() == nil {
		g.settle(stop)
	}
	if stop.Err() != nil {
		g.drain(limit)
	}
	own.Close()
	<-failed // it has begun with all that it was given
	fresh.wait()
	if server.Shutdown(limit) != nil { // in-flight requests did not end in time
		_ = server.Close()
	}
	return nil
}
