// Package client is an agent's, gateway's or tool's side of a trust domain's
// CA: it finds a CA node, attests, keeps one Sync stream open, and asks for
// signatures.
//
// A CA node is accepted when its key is one of the members'. Until the member table is
// known, the pins of a join token stand for it, or an SVID
// spiffe://TRUSTDOMAIN/entente/ca/NAME that verifies under the own bundle.
//
// Nodes of the own datacenter are tried first; each next one starts 200 ms after
// the one before it, or at once when that has failed. When no node can be reached
// everything keeps its last state, which the log says once.
//
// What the connected node says is compared with what the others state (ca/compare). When
// two of them agree with each other against it, the client leaves it.
package client

import (
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

// Errors a caller branches on.
var (
	// ErrUnreachable: no CA node could be reached, or none could answer just now.
	ErrUnreachable = errors.New("no CA node could answer")
	// ErrDenied: a CA node answered that this client may not have it.
	ErrDenied = errors.New("the CA refused")
	// ErrChanged: a CA node holds another record of the entry than the asker. One of the two
	// has not heard of a change yet, or a CA node lies: ask again, soon and then less often.
	ErrChanged = errors.New("the CA node holds another record of the entry")
)

// Config says which CA to speak to, and as whom.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Addresses   []string // API addresses of CA nodes, host:port; more are learned from Sync

	// Pins accepts CA nodes by key id (lower-case hex SHA-256 of the DER
	// SubjectPublicKeyInfo) until the member table is known. May be nil.
	Pins func(keyID string) bool
	// Members is the last known member table, if any: it takes the place of Pins and Bundles.
	Members []*statev1.Member
	// Confirmed is the last member table that two CA nodes agreed on, if any: what a node
	// says is compared with what these hold. Empty: Members.
	Confirmed []*statev1.Member
	// Cluster is the last known cluster, if any: another one is refused.
	Cluster *statev1.Cluster
	// RecoveryKey is the public half of the cluster's recovery key, pinned: without its
	// statement no later epoch is believed. Empty: that of Cluster, else of the first
	// cluster heard of.
	RecoveryKey []byte

	SVID    x509svid.Source   // this client's own; nil: no client certificate
	Bundles x509bundle.Source // holds the own trust domain's, for CA nodes until the member table is known; nil: by key only

	Datacenter string // of this client: nodes in it are tried first
	BootID     string // of this process's start (ca.NewBootID); empty: New makes one
	Log        *slog.Logger

	// AcknowledgeLater: what the handler of Sync has applied is not acknowledged before
	// Acknowledge is called.
	AcknowledgeLater bool
	// Dial opens TCP connections; nil: a net.Dialer.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Client is one subscriber of the CA. Its methods may be called concurrently,
// but Sync runs once at a time.
type Client struct {
	cfg   Config
	log   *slog.Logger
	store *Store

	compare  *comparer
	whole    bool          // the first session asks for the full state, whatever Recall took up
	acked    atomic.Uint64 // newest revision that is acknowledged
	newAck   chan struct{} // holds one token when acked has grown
	newSVID  chan struct{} // holds one token when the client's own SVID may be a newer one
	refused  atomic.Bool   // the last try for a session ended with a node's refusal
	newHosts chan struct{} // holds one token when report has changed

	mu       sync.Mutex
	current  *conn          // of the running Sync; nil while there is none
	report   []Instance     // nil until Report was called
	connects uint64         // counts the sessions of this process
	under    []string       // nil until Hold was called
	waiting  []string       // as Acknowledge was told last
	failures map[string]int // consecutive ones by address, for the order of dialling
}

// New checks cfg. The client dials when it is used.
func New(cfg Config) (*Client, error) {
	if cfg.TrustDomain.IsZero() {
		return nil, errors.New("a CA client needs its trust domain")
	}
	if len(cfg.Addresses) == 0 && len(cfg.Members) == 0 {
		return nil, errors.New("a CA client needs the address of at least one CA node")
	}
	if cfg.BootID == "" {
		var random [8]byte
		rand.Read(random[:])
		cfg.BootID = ca.NewBootID(time.Now(), random)
	}
	if cfg.Dial == nil {
		// A node whose host is gone is noticed after 11 s without traffic.
		dialer := &net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 5e9, Interval: 2e9, Count: 3}}
		cfg.Dial = dialer.DialContext
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	c := &Client{
		cfg:      cfg,
		log:      cfg.Log,
		store:    newStore(cfg.TrustDomain, cfg.Cluster, cfg.Members, cfg.RecoveryKey),
		newAck:   make(chan struct{}, 1),
		newHosts: make(chan struct{}, 1),
		newSVID:  make(chan struct{}, 1),
		failures: map[string]int{},
	}
	c.compare = newComparer(c)
	return c, nil
}

// RecoveryKey is the pinned recovery key of the cluster; nil: none was seen yet.
func (c *Client) RecoveryKey() []byte {
	c.store.mu.Lock()
	defer c.store.mu.Unlock()
	return c.store.recovery
}

// View returns the newest picture. It is never nil; before the first Sync its
// Revision is 0.
func (c *Client) View() *View { return c.store.Snapshot() }

// Follows is the CA node of the present session, by name and API address; both empty: there
// is no session, and everything keeps its last state.
func (c *Client) Follows() (node, address string) {
	c.mu.Lock()
	current := c.current
	c.mu.Unlock()
	if current == nil {
		return "", ""
	}
	return c.compare.name(nodeID(current.state)), current.address
}

// Report says which instances this host serves now: the whole list, in place of
// the former one. It is sent at once, and again at the begin of each session.
// Agent names need not be filled in: the CA takes them from the SVID.
func (c *Client) Report(instances []Instance) {
	c.mu.Lock()
	same := c.report != nil && slices.Equal(c.report, instances)
	c.report = append([]Instance{}, instances...)
	c.mu.Unlock()
	if !same {
		signal(c.newHosts)
	}
}

// Acknowledge tells the CA that everything up to revision is held by whom this client
// speaks for, and who of them does not hold what came since. Only with
// Config.AcknowledgeLater.
func (c *Client) Acknowledge(revision uint64, waiting []string) {
	c.mu.Lock()
	same := slices.Equal(c.waiting, waiting)
	c.waiting = slices.Clone(waiting)
	c.mu.Unlock()
	if !c.holds(revision) {
		return
	}
	if c.acked.Swap(revision) != revision || !same {
		signal(c.newAck)
	}
}

// holds tells whether a revision can be acknowledged: not one of a node that is being left.
func (c *Client) holds(revision uint64) bool {
	c.compare.mu.Lock()
	moving := c.compare.moving
	c.compare.mu.Unlock()
	return !moving && revision <= c.View().Revision
}

// Hold says under which authorities the SVIDs are that this client and its workloads
// have: authority key ids, as ca.SignedUnder gives them. The CA waits for that before
// it lets a tainted authority be revoked. Until Hold is called the client speaks of its
// own SVID only.
func (c *Client) Hold(authorityKeyIDs []string) {
	c.mu.Lock()
	same := c.under != nil && slices.Equal(c.under, authorityKeyIDs)
	c.under = append([]string{}, authorityKeyIDs...)
	c.mu.Unlock()
	if !same {
		signal(c.newAck)
	}
}

// held is what to say of SVIDs.
func (c *Client) held() (under []string, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.under != nil {
		return c.under, true
	}
	if c.cfg.SVID == nil {
		return nil, false
	}
	svid, err := c.cfg.SVID.GetX509SVID()
	if err != nil {
		return nil, false
	}
	return []string{ca.SignedUnder(svid.Certificates[0])}, true
}

// Renewed says that the client's own SVID is another one now: Sync shows it soon, and
// not only when it comes round to look.
func (c *Client) Renewed() { signal(c.newSVID) }

// Refused tells that a CA node was reached and would not have this client's SVID when
// Sync last tried: it is of no more use, and to be asked for anew by other means.
func (c *Client) Refused() bool { return c.refused.Load() }

// signal puts the token into a channel of capacity one.
func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}
