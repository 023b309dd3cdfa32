package dataplane

import (
	"context"
	"net"
	"sync"
	"time"
)

// gate is a listener that hands out a connection only after check has passed it.
// Checks run side by side, so a slow or silent client holds up nobody else.
type gate struct {
	net.Listener
	check func(net.Conn) (net.Conn, error) // on error it must have closed the connection

	conns chan net.Conn
	errs  chan error
	done  chan struct{} // closed: nothing is handed out any more
	once  sync.Once
	shut  chan struct{} // closed: nothing is taken from the listener any more
	stop  sync.Once
	tasks sync.WaitGroup
}

func newGate(ln net.Listener, check func(net.Conn) (net.Conn, error)) *gate {
	g := &gate{
		Listener: ln,
		check:    check,
		conns:    make(chan net.Conn),
		errs:     make(chan error, 1),
		done:     make(chan struct{}),
		shut:     make(chan struct{}),
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
		go func() {
			defer g.tasks.Done()
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

func (g *gate) Accept() (net.Conn, error) {
	for {
		select {
		case conn := <-g.conns:
			if conn != nil {
				return conn, nil
			}
		case err := <-g.errs:
			return nil, err
		case <-g.done:
			return nil, net.ErrClosed
		}
	}
}

// Drain takes nothing more from the listener and returns when what was taken before is
// handed out or has failed its check, or when ctx ends: a connection that a caller
// believes to have must not be reset.
func (g *gate) Drain(ctx context.Context) {
	_ = g.shutListener()
	handed := make(chan struct{})
	go func() {
		defer close(handed)
		g.tasks.Wait()
		// Nobody is handed nothing: whoever takes it has come back for more, and so has
		// begun with all that it was given before.
		select {
		case g.conns <- nil:
		case <-g.done:
		case <-ctx.Done():
		}
	}()
	select {
	case <-handed:
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
