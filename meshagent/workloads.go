package meshagent

import (
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/entente-mesh/entente/ca/selector"
	"github.com/entente-mesh/entente/meshagent/workloadattest"
)

// workloads tells who is at the other end of a local connection.
type workloads struct {
	store    *store
	attestor *workloadattest.Attestor
}

// AttestCaller attests the process that opened a local connection which was accepted on
// this host: nil when it satisfies the selectors of the entry. On an error the connection
// must be closed unread.
func (w *workloads) AttestCaller(conn net.Conn, entryID string) error {
	process, err := w.caller(conn)
	if err != nil {
		return err
	}
	return w.entitled(process, entryID)
}

func (w *workloads) caller(conn net.Conn) (process *workloadattest.Process, err error) {
	if unixConn, ok := conn.(*net.UnixConn); ok {
		process, err = w.attestor.Unix(unixConn)
	} else {
		process, err = w.attestor.TCP(conn)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot attest the caller: %w", err)
	}
	return process, nil
}

// acceptTime is how long an application whose listener is another process's may take to
// accept a connection: a service manager that listens for it is not the application.
const acceptTime = 200 * time.Millisecond

// AttestApplication does the same for the process at the far end of a local connection that
// the agent opened: it has to be asked before anything is sent.
func (w *workloads) AttestApplication(conn net.Conn, entryID string) error {
	until := time.Now().Add(acceptTime)
	for pause := time.Millisecond; ; pause *= 2 {
		process, accepted, err := w.attestor.Acceptor(conn)
		if err != nil {
			return fmt.Errorf("cannot attest the application: %w", err)
		}
		err = w.entitled(process, entryID)
		if err == nil || accepted || time.Now().Add(pause).After(until) {
			return err
		}
		time.Sleep(pause)
	}
}

// attestListener attests the process that listens on a loopback address, to which no
// connection is made.
func (w *workloads) attestListener(addr netip.AddrPort, entryID string) error {
	process, err := w.attestor.Listener(addr)
	if err != nil {
		return fmt.Errorf("cannot attest the application: %w", err)
	}
	return w.entitled(process, entryID)
}

// IdentifyTCP attests the process at the far end of an accepted loopback connection and
// returns the ids of the entries it satisfies, in order.
func (w *workloads) IdentifyTCP(conn net.Conn) ([]string, error) {
	process, err := w.caller(conn)
	if err != nil {
		return nil, err
	}
	defer process.Close()
	var entries []string
	for _, identity := range w.store.State().IdentitiesOf(process) {
		entries = append(entries, identity.Entry.GetId())
	}
	return entries, nil
}

// AttestationGap says what the host's kernel leaves uncertain about workloads; empty: nothing.
func (w *workloads) AttestationGap() string { return w.attestor.Gap() }

// AttestUnix attests the process that connected a unix socket. The caller closes
// what it returns.
func (w *workloads) AttestUnix(conn *net.UnixConn) (*workloadattest.Process, error) {
	return w.attestor.Unix(conn)
}

// AttestPID attests a process by its number, for people who ask what the agent sees.
// The caller closes what it returns.
func (w *workloads) AttestPID(pid int) (*workloadattest.Process, error) { return w.attestor.PID(pid) }

// RegisterRun makes a process and all that it starts satisfy the selector
// run:id:ID until release is called, which must be before the process is closed.
func (w *workloads) RegisterRun(id string, process *workloadattest.Process) (release func(), err error) {
	if _, err := selector.Parse(selector.Run + ":" + id); err != nil {
		return nil, err
	}
	return w.attestor.Register(id, process)
}

// entitled closes the process.
func (w *workloads) entitled(process *workloadattest.Process, entryID string) error {
	defer process.Close()
	identity, ok := w.store.State().Identity(entryID)
	if !ok {
		return fmt.Errorf("this host has no entry %q", entryID)
	}
	if err := process.Satisfies(identity.Demands); err != nil {
		return fmt.Errorf("the process (pid %d, uid %d) is not %s: %w", process.PID(), process.UID, identity.ID, err)
	}
	return nil
}
