package sidecar

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/federation/catalog"
	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/internal/dataplane"
)

// Names gives services addresses of their own on loopback. The sidecar listens there,
// and applications that resolve a service's name call it at the port it really has.
type Names struct {
	// Assign gives every service name an address, always the same one.
	Assign func(services []string) map[string]netip.Addr
	// Identify attests the process that opened a loopback connection and returns the
	// entries of this host that it satisfies.
	Identify func(net.Conn) ([]string, error)
	// HTTPPort is a port that every service has besides its own; 0: none.
	HTTPPort uint16
}

const (
	maxNameDoors = 4096            // listeners at most
	namePause    = 2 * time.Second // until one that could not be had is tried again
)

// nameDoor is a listener at the address of a service.
type nameDoor struct {
	service string
	tcp     bool // what comes is for the service as it is; else it is HTTP, whose Host says for whom
	taken   bool // an application of this host has the same port
}

// nameDoors are the addresses to listen at.
func nameDoors(n *Names, tables *catalog.Tables, taken map[uint16]bool) map[netip.AddrPort]nameDoor {
	names := tables.Imports()
	for _, s := range tables.Services() {
		if s.Port != 0 {
			names = append(names, s.Name)
		}
	}
	doors := map[netip.AddrPort]nameDoor{}
	for name, addr := range n.Assign(names) {
		target, ok := tables.Resolve(name)
		if !ok {
			continue
		}
		ports := []uint16{target.Port}
		if !target.TCP {
			ports = append(ports, n.HTTPPort)
		}
		for _, port := range ports {
			if port != 0 && len(doors) < maxNameDoors {
				doors[netip.AddrPortFrom(addr, port)] = nameDoor{name, target.TCP, taken[port]}
			}
		}
	}
	return doors
}

// crowd keeps the listeners of names, and one door for each entry behind them. Its
// methods belong to Run's goroutine, but for pass.
type crowd struct {
	identify func(net.Conn) ([]string, error)                                             // the entries that who connected satisfies
	outbound func(entryID string, id spiffeid.ID) (*dataplane.Outbound, dataplane.Attest) // an entry's way into the mesh
	closed   *closedListeners
	app      netip.Addr // where applications listen
	log      *slog.Logger
	tasks    *sync.WaitGroup
	open     map[netip.AddrPort]openName

	mu      sync.Mutex
	callers map[string]*inbox // by entry id
}

func newCrowd(identify func(net.Conn) ([]string, error), outbound func(string, spiffeid.ID) (*dataplane.Outbound, dataplane.Attest), closed *closedListeners, app netip.Addr, log *slog.Logger, tasks *sync.WaitGroup) *crowd {
	return &crowd{identify: identify, outbound: outbound, closed: closed, app: app, log: log, tasks: tasks, open: map[netip.AddrPort]openName{}, callers: map[string]*inbox{}}
}

type openName struct {
	nameDoor
	stop context.CancelFunc
}

// inbox is a listener that is handed its connections.
type inbox struct {
	id     spiffeid.ID
	door   *dataplane.Outbound
	attest dataplane.Attest
	ctx    context.Context
	conns  chan net.Conn
	stop   context.CancelFunc
}

func (i *inbox) Accept() (net.Conn, error) {
	select {
	case c := <-i.conns:
		return c, nil
	case <-i.ctx.Done():
		return nil, net.ErrClosed
	}
}

func (i *inbox) Close() error   { i.stop(); return nil }
func (i *inbox) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)} }

// follow brings listeners and doors to what is wanted.
func (c *crowd) follow(ctx context.Context, doors map[netip.AddrPort]nameDoor, callers map[string]spiffeid.ID) {
	c.mu.Lock()
	for entry, box := range c.callers {
		if id, ok := callers[entry]; !ok || id != box.id {
			box.stop()
			delete(c.callers, entry)
		}
	}
	for entry, id := range callers {
		if c.callers[entry] != nil {
			continue
		}
		own, stop := context.WithCancel(ctx)
		// Which entry it is was found out at accept; what is attested holds from here on.
		door, attest := c.outbound(entry, id)
		box := &inbox{id: id, door: door, attest: attest, ctx: own, conns: make(chan net.Conn), stop: stop}
		c.callers[entry] = box
		c.tasks.Go(func() {
			door.Serve(own, box, box.attest)
		})
	}
	c.mu.Unlock()

	for at, open := range c.open {
		if want, ok := doors[at]; !ok || want != open.nameDoor {
			open.stop()
			delete(c.open, at)
		}
	}
	for at, door := range doors {
		if _, ok := c.open[at]; ok {
			continue
		}
		own, stop := context.WithCancel(ctx)
		c.open[at] = openName{door, stop}
		c.tasks.Go(func() { c.listen(own, at, door) })
	}
}

// listen keeps one listener open. An address that cannot be had costs the callers of
// that service the name, and nobody else; it is tried again.
func (c *crowd) listen(ctx context.Context, at netip.AddrPort, door nameDoor) {
	defer c.closed.set(at.String(), nil)
	said := false
	for ctx.Err() == nil {
		if !door.taken || c.listens(ctx, at.Port()) {
			ln, err := daemon.Listen(at.String())
			if err == nil {
				said = false
				c.closed.set(at.String(), nil)
				closing := context.AfterFunc(ctx, func() { ln.Close() })
				err = c.accept(ctx, ln, door)
				closing()
				ln.Close()
			}
			if ctx.Err() != nil {
				return
			}
			if errors.Is(err, syscall.EADDRINUSE) { // somebody else is there
				c.closed.set(at.String(), err)
			}
			if !said {
				c.log.Error("a service cannot be called by its name here; trying again",
					"service", door.service, "address", at.String(), "error", err, "fix", whyNot(err, at.Port()))
				said = true
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(namePause):
		}
	}
}

// listens tells whether the application of this host that has the port is there. It may
// want the port on every address, which a listener of ours would keep it from, so it
// comes first; if it is content with its own address, the others are free.
func (c *crowd) listens(ctx context.Context, port uint16) bool {
	dialer := net.Dialer{Timeout: time.Second}
	conn, err := dialer.DialContext(ctx, "tcp", netip.AddrPortFrom(c.app, port).String())
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// whyNot says what can be done about a listener that cannot be had.
func whyNot(err error, port uint16) string {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Sprintf("something on this host listens at port %d of every address, and gets what is meant for the service: have it listen at 127.0.0.1 only (ss -ltnp shows it)", port)
	case errors.Is(err, syscall.EACCES):
		return fmt.Sprintf("port %d needs CAP_NET_BIND_SERVICE (in a unit: AmbientCapabilities= for a user other than root, and CapabilityBoundingSet=)", port)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return "the address is not one of this host's: on Linux all of 127.0.0.0/8 is, elsewhere loopback needs it as an alias"
	}
	return ""
}

func (c *crowd) accept(ctx context.Context, ln net.Listener, door nameDoor) error {
	for {
		conn, err := ln.Accept()
		if err != nil {
			if temporary, ok := err.(interface{ Temporary() bool }); ok && temporary.Temporary() { // out of file descriptors
				select {
				case <-ctx.Done():
				case <-time.After(50 * time.Millisecond):
				}
				continue
			}
			return err
		}
		c.tasks.Go(func() {
			if err := c.pass(conn, door); err != nil {
				conn.Close()
				c.log.Info("connection closed unread: the process that opened it has no identity to call with", "address", ln.Addr().String(), "error", err)
			}
		})
	}
}

// pass hands a connection to the door of the one entry that its process satisfies.
func (c *crowd) pass(conn net.Conn, to nameDoor) error {
	entries, err := c.identify(conn)
	if err != nil {
		return err
	}
	c.mu.Lock()
	entries = slices.DeleteFunc(entries, func(entry string) bool { return c.callers[entry] == nil })
	var box *inbox
	if len(entries) == 1 {
		box = c.callers[entries[0]]
	}
	c.mu.Unlock()
	switch {
	case len(entries) == 0:
		return errors.New("it satisfies no entry of a service of this host")
	case box == nil:
		return fmt.Errorf("it satisfies several entries (%s), and the name does not say which one calls: tell them apart by path or unit, or use their outbound ports", strings.Join(entries, ", "))
	}
	if to.tcp {
		return box.door.Carry(box.ctx, conn, to.service, box.attest)
	}
	select {
	case box.conns <- conn:
		return nil
	case <-box.ctx.Done():
		return errors.New("the entry is gone")
	}
}
