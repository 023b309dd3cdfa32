package admission

import (
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Listener accepts connections as long as their source finds a place; the others are
// closed unread. Unlike a listener that waits for a free place, it leaves none waiting
// behind those who sit on theirs.
type Listener struct {
	net.Listener
	places *Places
	seats  *Places // of those whose peer has proved who it is; nil: they keep their place
	cut    func()
}

// Conn is a connection that holds a place.
type Conn struct {
	net.Conn
	listener *Listener
	source   string
	place    atomic.Pointer[Place]
	seating  sync.Once
	seated   bool // once seating is over
	closing  sync.Once
}

// Listen takes over a listener. cut, which may be nil, is called for each connection that
// finds no place, or loses it; it must not block.
func Listen(ln net.Listener, limits Limits, cut func()) *Listener {
	if cut == nil {
		cut = func() {}
	}
	return &Listener{Listener: ln, places: NewPlaces(limits), cut: cut}
}

// ListenTwice is Listen where connections are taken twice: as strangers', and from Seat
// on as those of peers that are known.
func ListenTwice(ln net.Listener, strangers, known Limits, cut func()) *Listener {
	l := Listen(ln, strangers, cut)
	l.seats = NewPlaces(known)
	return l
}

// Accept returns a *Conn.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		conn := &Conn{Conn: raw, listener: l, source: Source(raw.RemoteAddr())}
		if conn.take(l.places) {
			return conn, nil
		}
		l.cut()
		raw.Close()
	}
}

func (c *Conn) take(from *Places) bool { return c.takeAs(from, c.source) }

func (c *Conn) takeAs(from *Places, source string) bool {
	place := from.Take(source, time.Now(), func() {
		c.listener.cut()
		go c.Conn.Close() // may wait for what is being written
	})
	if place == nil {
		return false
	}
	if before := c.place.Swap(place); before != nil {
		before.Leave()
	}
	return true
}

// Seat gives the connection a place among those whose peer is known, and leaves that
// among the strangers; false: there is none. The caller closes it then. Later calls get
// the same answer.
func (c *Conn) Seat() bool {
	c.seating.Do(func() {
		if c.seated = c.listener.seats == nil || c.take(c.listener.seats); !c.seated {
			c.listener.cut()
		}
	})
	return c.seated
}

// SeatAt is Seat at places of another kind, of a source that is known better than by its
// address.
func (c *Conn) SeatAt(places *Places, source string) bool {
	c.seating.Do(func() {
		if c.seated = c.takeAs(places, source); !c.seated {
			c.listener.cut()
		}
	})
	return c.seated
}

// Busy tells whether more than half of the places are taken, of strangers' or of others'.
func (l *Listener) Busy() bool {
	return l.places.busy() || l.seats != nil && l.seats.busy()
}

func (p *Places) busy() bool { return p.Len() > p.limits.Most/2 }

// SetLinger is that of a TCP connection; of others it does nothing.
func (c *Conn) SetLinger(seconds int) error {
	if tcp, ok := c.Conn.(interface{ SetLinger(int) error }); ok {
		return tcp.SetLinger(seconds)
	}
	return nil
}

// Close closes the connection and leaves its place.
func (c *Conn) Close() error {
	c.closing.Do(func() { c.place.Load().Leave() })
	return c.Conn.Close()
}
