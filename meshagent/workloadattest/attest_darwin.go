package workloadattest

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

var errDarwin = errors.New("on darwin only the user of a unix socket's peer can be attested: run the agent on Linux, or let the entry have no selector but the user's")

// Attestor attests the users of unix sockets' peers. Its methods may be called
// concurrently.
type Attestor struct{ strict bool }

// New returns an attestor.
func New(options ...Option) *Attestor {
	a := &Attestor{}
	for _, option := range options {
		option(a)
	}
	return a
}

// Gap is empty: nothing but the user counts.
func (a *Attestor) Gap() string { return "" }

// Unix attests the user of the process that connected conn.
func (a *Attestor) Unix(conn *net.UnixConn) (*Process, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("cannot ask for the socket's peer: %w", err)
	}
	var cred *unix.Xucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptXucred(int(fd), unix.SOL_LOCAL, unix.LOCAL_PEERCRED)
	})
	if err = errors.Join(err, credErr); err != nil {
		return nil, fmt.Errorf("cannot ask for the socket's peer: %w", err)
	}
	return &Process{UID: cred.Uid, attestor: a, find: func() (*handle, error) { return nil, errDarwin }}, nil
}

// TCP is refused: see the package comment.
func (a *Attestor) TCP(net.Conn) (*Process, error) { return nil, errDarwin }

// Listener is refused: see the package comment.
func (a *Attestor) Listener(netip.AddrPort) (*Process, error) { return nil, errDarwin }

// Acceptor attests the user who listens on a unix socket; TCP is refused.
func (a *Attestor) Acceptor(conn net.Conn) (*Process, bool, error) {
	if unixConn, ok := conn.(*net.UnixConn); ok {
		p, err := a.Unix(unixConn)
		return p, true, err
	}
	return nil, false, errDarwin
}

// handle would hold a process.
type handle struct {
	pid int
	gid uint32
}

func (h *handle) close()       {}
func (h *handle) alive() error { return nil }

func (e executable) runs(string) error            { return errDarwin }
func (h *handle) executable() (executable, error) { return executable{}, errDarwin }

func (h *handle) groups() ([]uint32, error) { return nil, errDarwin }
func (h *handle) cmdline() (string, error)  { return "", errDarwin }
func (h *handle) place() (place, error)     { return place{}, errDarwin }

// PID is refused: see the package comment.
func (a *Attestor) PID(int) (*Process, error) { return nil, errDarwin }

// Register is refused: see the package comment.
func (a *Attestor) Register(string, *Process) (func(), error) { return nil, errDarwin }

func (a *Attestor) belongs(*handle, string) error { return errDarwin }

func (a *Attestor) digest(*handle) (string, error) { return "", errDarwin }
