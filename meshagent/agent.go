// Package meshagent is the agent of one host: it attests to its trust domain's
// CA, keeps its own SVID and one SVID for every entry of its host renewed, holds
// the bundles, watches the health of the host's services, and tells who is at the
// other end of a local connection.
//
// It opens no door itself. Doors (workloadapi, sidecar) read State and are
// handed to Run, which starts and stops them.
package meshagent

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"net/netip"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/meshagent/workloadattest"
)

// Agent is the running agent. Its methods may be called concurrently.
type Agent struct {
	cfg *Config
	log *slog.Logger
}

// Options are what a Config cannot say.
type Options struct {
	Log        *slog.Logger          // nil: none
	Registerer prometheus.Registerer // nil: no metrics
}

// New checks cfg and opens the data directory. It makes the agent's key when
// there is none yet.
func New(cfg *Config, opts Options) (*Agent, error) {
	return nil, errors.ErrUnsupported
}

// Door is something that serves from the agent's state until its ctx ends.
type Door struct {
	Name string
	Run  func(ctx context.Context) error
}

// Run attests and serves until ctx ends or a door fails. The doors are started
// first, in order: State says that the agent is not ready yet.
//
// On the way out the host's instances are withdrawn first, so that nobody sends
// new requests here, then the doors are stopped in reverse order, each one
// before the next, and the stream to the CA last.
func (a *Agent) Run(ctx context.Context, doors ...Door) error { return errors.ErrUnsupported }

// State is the newest state. It is never nil.
func (a *Agent) State() *State { return nil }

// Config is what the agent was made with.
func (a *Agent) Config() *Config { return a.cfg }

// SVIDs is the source of one entry's X.509-SVID: always the newest one. It fails
// while the entry is not there or not signed yet.
func (a *Agent) SVIDs(entryID string) x509svid.Source { return nil }

// Bundles is the source of the own trust domain's X.509 bundle, and of no other:
// a foreign root never reaches a sidecar (I6).
func (a *Agent) Bundles() x509bundle.Source { return nil }

// AttestTCP attests the process that owns the far end of a loopback connection
// that was accepted on this host, and returns nil when it satisfies the selectors
// of the entry. The connection must not be read before.
func (a *Agent) AttestTCP(conn net.Conn, entryID string) error { return errors.ErrUnsupported }

// AttestListener does the same for the process that listens on a loopback TCP
// address: an impostor on an application's port gets no traffic.
func (a *Agent) AttestListener(addr netip.AddrPort, entryID string) error {
	return errors.ErrUnsupported
}

// AttestUnix attests the process that connected a unix socket. Close what it returns.
func (a *Agent) AttestUnix(conn *net.UnixConn) (*workloadattest.Process, error) {
	return nil, errors.ErrUnsupported
}

// State is everything the agent holds at one moment. It is immutable.
type State struct {
	// Ready: the agent is attested and has the CA's first complete picture.
	Ready bool
	// View is the CA's picture; never nil.
	View *client.View
	// Bundle is the own trust domain's; nil before attestation.
	Bundle *x509bundle.Bundle
	// Identities are the host's entries, by entry id.
	Identities []*Identity

	changed chan struct{}
}

// Changed is closed when there is a newer state.
func (s *State) Changed() <-chan struct{} { return s.changed }

// Identity finds the identity of an entry by the entry's id.
func (s *State) Identity(entryID string) (*Identity, bool) { return nil, false }

// IdentitiesOf returns the identities whose selectors the process satisfies, all
// of them, by entry id.
func (s *State) IdentitiesOf(p *workloadattest.Process) []*Identity { return nil }

// Identity is one entry of this host with what its workload gets.
type Identity struct {
	Entry *statev1.Entry
	ID    spiffeid.ID
	SVID  *x509svid.SVID // nil until the CA has signed one
	// Federated are the bundles of the foreign trust domains that the entry
	// federates with by name, and of no others (I6).
	Federated []*x509bundle.Bundle
}

var _ = x509.NewCertPool
