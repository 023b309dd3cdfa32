package sidecar

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
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

// maxNameDoors listeners are opened at most.
const maxNameDoors = 4096

// nameDoors are the addresses to listen at. A port that an application of this host
// has is left out: it may want it on every address, which we would keep it from.
func nameDoors(n *Names, td spiffeid.TrustDomain, objects []*statev1.Object, local map[uint16]bool) map[netip.AddrPort]bool {
	ports := map[string][]uint16{}
	var services []string
	for _, object := range objects {
		switch kind := object.GetKind().(type) {
		case *statev1.Object_Service:
			if port := kind.Service.GetPort(); port != 0 && port <= 65535 {
				name := kind.Service.GetName() + "." + td.Name()
				services = append(services, name)
				ports[name] = append(ports[name], uint16(port))
			}
		case *statev1.Object_Import:
			services = append(services, kind.Import.GetService())
		}
	}
	doors := map[netip.AddrPort]bool{}
	for name, addr := range n.Assign(services) {
		for _, port := range append(ports[name], n.HTTPPort) {
			if port != 0 && !local[port] && len(doors) < maxNameDoors {
				doors[netip.AddrPortFrom(addr, port)] = true
			}
		}
	}
	return doors
}

// crowd keeps the listeners of names, and one door for each entry behind them. Its
// methods belong to Run's goroutine, but for pass.
type crowd struct {
	sidecar *Sidecar
	tasks   *sync.WaitGroup
	open    map[netip.AddrPort]context.CancelFunc

	mu      sync.Mutex
	callers map[string]*inbox // by entry id
}

// inbox is a listener that is handed its connections.
type inbox struct {
	id    spiffeid.ID
	conns chan net.Conn
	done  <-chan struct{}
	stop  context.CancelFunc
}

func (i *inbox) Accept() (net.Conn, error) {
	select {
	case c := <-i.conns:
		return c, nil
	case <-i.done:
		return nil, net.ErrClosed
	}
}

func (i *inbox) Close() error   { i.stop(); return nil }
func (i *inbox) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)} }

// follow brings listeners and doors to what is wanted.
func (c *crowd) follow(ctx context.Context, doors map[netip.AddrPort]bool, callers map[string]spiffeid.ID) {
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
		box := &inbox{id: id, conns: make(chan net.Conn), done: own.Done(), stop: stop}
		c.callers[entry] = box
		door := c.sidecar.engine.Outbound(dataplane.Identity{ID: id, SVID: c.sidecar.agent.SVIDs(entry)})
		c.tasks.Go(func() {
			door.Serve(own, box, func(net.Conn) error { return nil }) // attested at accept
		})
	}
	c.mu.Unlock()

	for at, stop := range c.open {
		if !doors[at] {
			stop()
			delete(c.open, at)
		}
	}
	for at := range doors {
		if c.open[at] != nil {
			continue
		}
		own, stop := context.WithCancel(ctx)
		c.open[at] = stop
		c.tasks.Go(func() { c.listen(own, at) })
	}
}

// listen keeps one listener open. An address that cannot be had costs the callers of
// that service the name, and nobody else; it is tried again.
func (c *crowd) listen(ctx context.Context, at netip.AddrPort) {
	said := false
	for ctx.Err() == nil {
		ln, err := daemon.Listen(at.String())
		if err == nil {
			said = false
			closing := context.AfterFunc(ctx, func() { ln.Close() })
			err = c.accept(ctx, ln)
			closing()
			ln.Close()
		}
		if ctx.Err() != nil {
			return
		}
		if !said {
			c.sidecar.log.Error("a service cannot be called by its name here; trying again", "address", at.String(), "error", err)
			said = true
		}
		select {
		case <-ctx.Done():
		case <-time.After(2 * time.Second):
		}
	}
}

func (c *crowd) accept(ctx context.Context, ln net.Listener) error {
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
			if err := c.pass(conn); err != nil {
				conn.Close()
				c.sidecar.log.Info("connection closed unread: the process that opened it has no identity to call with", "listener", ln.Addr().String(), "error", err)
			}
		})
	}
}

// pass hands a connection to the door of the one entry that its process satisfies.
func (c *crowd) pass(conn net.Conn) error {
	entries, err := c.sidecar.cfg.Names.Identify(conn)
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
	select {
	case box.conns <- conn:
		return nil
	case <-box.done:
		return errors.New("the entry is gone")
	}
}
