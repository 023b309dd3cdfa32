package dataplane

import (
	"context"
	"net"
	"sync"
	"time"
)

// gate hands out connections of a listener only after check has passed them, to whichever
// shift takes them. Checks run side by side, so a slow or silent client holds up nobody else.
type gate struct {
	net.Listener
	check func(net.Conn) (net.Conn, error) // on error the connection is closed, or somebody else's

	conns chan net.Conn
	errs  chan error
	done  chan struct{} // closed: nothing is handed out any more
	once  sync.Once
	shut  chan struct{} // closed: nothing is taken from the listener any more
	stop  sync.Once
	tasks sync.WaitGroup

	mu     sync.Mutex
	checks *sync.WaitGroup // those that began since the last settle; guarded by mu
}

func newGate(ln net.Listener, check func(net.Conn) (net.Conn, error)) *gate {
	g := &gate{
		Listener: ln,
		check:    check,
		conns:    make(chan net.Conn),
		errs:     make(chan error, 1),
		done:     make(chan struct{}),
		shut:     make(chan struct{}),
		checks:   new(sync.WaitGroup),
	}
	g.tasks.Add(1)
	go g.run()
	return g
}

func (g *gate) run() {
	defer g.tasks.Done()
	var delay time.Duration
	for {
		conn, err := g.Listener.Accept()
		if err != nil {
			select {
			case <-g.shut:
				return
			default:
			}
			if ne, ok := err.(interface{ Temporary() bool }); ok && ne.Temporary() { // out of file descriptors
				delay = min(max(2*delay, 5*time.Millisecond), time.Second)
				time.Sleep(delay)
				continue
			}
			g.errs <- err
			return
		}
		delay = 0
		g.tasks.Add(1)
		g.mu.Lock()
		checks := g.checks
		checks.Add(1)
		g.mu.Unlock()
		go func() {
			defer g.tasks.Done()
			defer checks.Done()
			passed, err := g.check(conn)
			if err != nil {
				return
			}
			select {
			case g.conns <- passed:
			case <-g.done:
				_ = passed.Close()
			}
		}()
	}
}

// drain takes nothing more from the listener and returns when what was taken before is
// handed out or has failed its check, or when ctx ends.
func (g *gate) drain(ctx context.Context) {
	_ = g.shutListener()
	await(ctx, &g.tasks)
}

// settle returns when what was taken until now is handed out or has failed its check, and
// gentle has passed, or when ctx ends. The gate goes on.
func (g *gate) settle(ctx context.Context) {
	g.mu.Lock()
	before := g.checks
	g.checks = new(sync.WaitGroup)
	g.mu.Unlock()
	timer := time.NewTimer(gentle)
	defer timer.Stop()
	await(ctx, before)
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

func await(ctx context.Context, group *sync.WaitGroup) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		group.Wait()
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
}

// Close hands out nothing more, too; checks that are under way end by their own time
// limits.
func (g *gate) Close() error {
	g.once.Do(func() { close(g.done) })
	return g.shutListener()
}

func (g *gate) shutListener() (err error) {
	g.stop.Do(func() {
		close(g.shut)
		err = g.Listener.Close()
	})
	return err
}
