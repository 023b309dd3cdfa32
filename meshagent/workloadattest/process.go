// Package workloadattest tells which local process is at the other end of a
// connection, and what can be said of it.
package workloadattest

import (
	"errors"
	"net"
	"net/netip"
)

// Process is an attested process, held against the recycling of its pid: once it
// has ended every method that looks at it fails. Close it.
type Process struct {
	PID int
	UID uint32
	GID uint32
}

// Satisfies returns nil when the process satisfies all selectors, of which there
// must be at least one.
func (p *Process) Satisfies(selectors []string) error { return errors.ErrUnsupported }

// Alive returns an error when the process has ended.
func (p *Process) Alive() error { return errors.ErrUnsupported }

// Close lets go of the process.
func (p *Process) Close() error { return nil }

// Attestor attests processes of this host. Its methods may be called concurrently.
type Attestor struct{}

// New returns an attestor for the host's network and pid namespace.
func New() (*Attestor, error) { return nil, errors.ErrUnsupported }

// Unix attests the process that connected conn.
func (a *Attestor) Unix(conn *net.UnixConn) (*Process, error) { return nil, errors.ErrUnsupported }

// TCP attests the owner of the other end of an accepted loopback connection.
func (a *Attestor) TCP(conn net.Conn) (*Process, error) { return nil, errors.ErrUnsupported }

// Listener attests the process that listens on a loopback address.
func (a *Attestor) Listener(addr netip.AddrPort) (*Process, error) {
	return nil, errors.ErrUnsupported
}
