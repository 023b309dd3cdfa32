// Package simnet is a network in memory for tests: hosts with names, connections with
// delays, and directions that can be cut. What is sent over a cut direction is kept, as
// TCP would send it again, and arrives when the direction is mended. Everything waits
// on channels and timers only, so it runs inside a testing/synctest bubble.
package simnet

import (
	"context"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// Network connects hosts by name. Its methods may be called concurrently.
type Network struct {
	delay func(from, to string) time.Duration

	mu        sync.Mutex
	cut       map[direction]bool
	turned    chan struct{} // closed and replaced when a direction is cut or mended
	listeners map[string]*listener
}

type direction struct{ from, to string }

// New makes a network without cuts. delay is how long bytes are under way; it may be
// called from any goroutine.
func New(delay func(from, to string) time.Duration) *Network {
	return &Network{
		delay:     delay,
		cut:       map[direction]bool{},
		turned:    make(chan struct{}),
		listeners: map[string]*listener{},
	}
}

// Cut lets nothing from one host reach another. The way back is not touched.
func (n *Network) Cut(from, to string) { n.turn(func() { n.cut[direction{from, to}] = true }) }

// Mend undoes a Cut.
func (n *Network) Mend(from, to string) { n.turn(func() { delete(n.cut, direction{from, to}) }) }

// MendAll undoes every Cut.
func (n *Network) MendAll() { n.turn(func() { clear(n.cut) }) }

func (n *Network) turn(change func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	change()
	close(n.turned)
	n.turned = make(chan struct{})
}

// passes says whether a direction is open, and when that may have changed.
func (n *Network) passes(from, to string) (bool, <-chan struct{}) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return !n.cut[direction{from, to}], n.turned
}

// Listen takes an address for a host.
func (n *Network) Listen(host, address string) (net.Listener, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.listeners[address] != nil {
		return nil, &net.OpError{Op: "listen", Net: "sim", Addr: addr(address), Err: syscall.EADDRINUSE}
	}
	l := &listener{network: n, host: host, address: address, arrived: make(chan net.Conn), closed: make(chan struct{})}
	n.listeners[address] = l
	return l, nil
}

// Dial connects a host to an address. Across a cut it waits for ctx, or until it is
// mended; nobody there is ECONNREFUSED.
func (n *Network) Dial(ctx context.Context, host, address string) (net.Conn, error) {
	fail := func(err error) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: "sim", Addr: addr(address), Err: err}
	}
	for {
		n.mu.Lock()
		l, turned := n.listeners[address], n.turned
		open := l == nil || !n.cut[direction{host, l.host}] && !n.cut[direction{l.host, host}]
		n.mu.Unlock()
		if l == nil {
			return fail(syscall.ECONNREFUSED)
		}
		if !open {
			select {
			case <-turned:
				continue
			case <-ctx.Done():
				return fail(ctx.Err())
			}
		}
		select {
		case <-time.After(n.delay(host, l.host) + n.delay(l.host, host)):
		case <-ctx.Done():
			return fail(ctx.Err())
		}
		there, back := newLink(n, host, l.host), newLink(n, l.host, host)
		select {
		case l.arrived <- &conn{in: there, out: back, local: address, remote: host}:
			return &conn{in: back, out: there, local: host, remote: address}, nil
		case <-l.closed:
			return fail(syscall.ECONNREFUSED)
		case <-ctx.Done():
			return fail(ctx.Err())
		}
	}
}

type addr string

func (addr) Network() string  { return "sim" }
func (a addr) String() string { return string(a) }

type listener struct {
	network       *Network
	host, address string
	arrived       chan net.Conn
	closed        chan struct{}
	once          sync.Once
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.arrived:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() {
		l.network.mu.Lock()
		delete(l.network.listeners, l.address)
		l.network.mu.Unlock()
		close(l.closed)
	})
	return nil
}

func (l *listener) Addr() net.Addr { return addr(l.address) }

// link is one direction of one connection.
type link struct {
	network  *Network
	from, to string

	mu       sync.Mutex
	changed  chan struct{} // closed and replaced when anything below changes
	queue    []segment
	gone     bool // the reader has closed
	ended    bool // the writer has closed
	deadline time.Time
}

type segment struct {
	at   time.Time // when it arrives, at the earliest
	data []byte    // nil: the end
}

func newLink(n *Network, from, to string) *link {
	return &link{network: n, from: from, to: to, changed: make(chan struct{})}
}

func (l *link) set(change func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change()
	close(l.changed)
	l.changed = make(chan struct{})
}

func (l *link) send(data []byte) {
	at := time.Now().Add(l.network.delay(l.from, l.to))
	l.set(func() {
		if n := len(l.queue); n > 0 && l.queue[n-1].at.After(at) {
			at = l.queue[n-1].at
		}
		l.queue = append(l.queue, segment{at, data})
	})
}

// read waits for bytes. now is what of the queue may be read at once.
func (l *link) read(b []byte) (int, error) {
	for {
		open, turned := l.network.passes(l.from, l.to)
		l.mu.Lock()
		now := time.Now()
		switch {
		case l.gone:
			l.mu.Unlock()
			return 0, net.ErrClosed
		case !l.deadline.IsZero() && !now.Before(l.deadline):
			l.mu.Unlock()
			return 0, os.ErrDeadlineExceeded
		case open && len(l.queue) > 0 && !l.queue[0].at.After(now):
			first := &l.queue[0]
			n := copy(b, first.data)
			end := first.data == nil
			if first.data = first.data[n:]; len(first.data) == 0 && !end {
				l.queue = l.queue[1:]
			}
			l.mu.Unlock()
			if end {
				return 0, fmt.Errorf("%w by %s", syscall.ECONNRESET, l.from)
			}
			return n, nil
		}
		next := l.deadline
		if open && len(l.queue) > 0 && (next.IsZero() || l.queue[0].at.Before(next)) {
			next = l.queue[0].at
		}
		changed := l.changed
		l.mu.Unlock()
		var due <-chan time.Time
		if !next.IsZero() {
			timer := time.NewTimer(next.Sub(now))
			defer timer.Stop()
			due = timer.C
		}
		select {
		case <-due:
		case <-changed:
		case <-turned:
		}
	}
}

// conn is one end of a connection.
type conn struct {
	in, out       *link
	local, remote string
}

func (c *conn) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	return c.in.read(b)
}

// Write never waits.
func (c *conn) Write(b []byte) (int, error) {
	c.out.mu.Lock()
	ended, gone := c.out.ended, c.out.gone
	c.out.mu.Unlock()
	there, _ := c.out.network.passes(c.out.from, c.out.to)
	switch {
	case ended:
		return 0, net.ErrClosed
	case gone && there:
		return 0, syscall.EPIPE
	case len(b) > 0:
		c.out.send(append([]byte{}, b...))
	}
	return len(b), nil
}

// Close tells the other end, if it can be reached.
func (c *conn) Close() error {
	c.in.set(func() { c.in.gone = true })
	c.out.mu.Lock()
	ended := c.out.ended
	c.out.ended = true
	c.out.mu.Unlock()
	if ended {
		return net.ErrClosed
	}
	c.out.send(nil)
	return nil
}

func (c *conn) LocalAddr() net.Addr  { return addr(c.local) }
func (c *conn) RemoteAddr() net.Addr { return addr(c.remote) }

func (c *conn) SetDeadline(t time.Time) error     { return c.SetReadDeadline(t) }
func (c *conn) SetWriteDeadline(time.Time) error  { return nil }
func (c *conn) SetReadDeadline(t time.Time) error { c.in.set(func() { c.in.deadline = t }); return nil }
