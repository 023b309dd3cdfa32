// Package client is an agent's, gateway's or tool's side of a trust domain's
// CA: it finds a CA node, attests, keeps one Sync stream open, and asks for
// signatures.
//
// A CA node is accepted when its key is one of the members' (the pins of a join
// token until the member table is known, the member table from then on), or
// when it shows spiffe://TRUSTDOMAIN/entente/ca/NAME under the own bundle.
//
// Nodes of the own datacenter are tried first; each next one starts 200 ms after
// the one before it, or at once when that has failed. When no node can be reached
// everything keeps its last state, which is said once in the log and not again
// until it has changed.
package client

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"log/slog"
	"slices"
	"sync"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// Errors a caller branches on.
var (
	// ErrUnreachable: no CA node could be reached, or none could answer just now.
	ErrUnreachable = errors.New("no CA node could answer")
	// ErrDenied: a CA node answered that this client, token or key may not have it.
	ErrDenied = errors.New("the CA refused")
)

// Config says which CA to speak to, and as whom.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Addresses   []string // API addresses of CA nodes, host:port; more are learned from Sync

	// Pins accepts CA nodes by key id (lower-case hex SHA-256 of the DER
	// SubjectPublicKeyInfo) until the member table is known. May be nil.
	Pins func(keyID string) bool
	// Members is the last known member table, if any: it takes the place of Pins.
	Members []*statev1.Member
	// Cluster is the last known cluster, if any: another one is then refused.
	Cluster *statev1.Cluster

	SVID    x509svid.Source   // this client's own; nil: no client certificate (Attest)
	Bundles x509bundle.Source // must hold the own trust domain's; nil: CA nodes are accepted by key only

	Datacenter string // of this client; nodes in it are tried first
	BootID     string // random per process start; empty: New makes one
	Log        *slog.Logger
}

// Client is one subscriber of the CA. Its methods may be called concurrently;
// Sync runs once at a time.
type Client struct {
	cfg   Config
	store *Store

	mu       sync.Mutex
	current  *conn          // of the running Sync; nil while there is none
	report   []Instance     // the host's instances; nil until Report was called
	reported chan struct{}  // closed, and replaced, when report changes
	connects uint64         // counts the Sync sessions of this process
	failed   map[string]int // consecutive failures by address, for the dialling order
	silent   bool           // the log already says that no node can be reached
}

// New checks cfg and returns a client that has not dialled yet.
func New(cfg Config) (*Client, error) {
	if cfg.TrustDomain.IsZero() {
		return nil, errors.New("a CA client needs its trust domain")
	}
	if len(cfg.Addresses) == 0 && len(cfg.Members) == 0 {
		return nil, errors.New("a CA client needs at least one address of a CA node")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.BootID == "" {
		var id [16]byte
		rand.Read(id[:])
		cfg.BootID = hex.EncodeToString(id[:])
	}
	return &Client{
		cfg:      cfg,
		store:    newStore(cfg.TrustDomain, cfg.Cluster, cfg.Members),
		reported: make(chan struct{}),
		failed:   map[string]int{},
	}, nil
}

// View returns the newest picture. It is never nil; before the first Sync its
// Revision is 0.
func (c *Client) View() *View { return c.store.Snapshot() }

// Report says which instances this host serves now: the whole list, which
// replaces the former one. It is sent at once, and again on each new session.
func (c *Client) Report(instances []Instance) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.report != nil && slices.Equal(c.report, instances) {
		return
	}
	c.report = append([]Instance{}, instances...)
	close(c.reported)
	c.reported = make(chan struct{})
}

// Sync keeps one stream to a CA node until ctx ends, and returns ctx's error.
// handle is called with the first complete picture and then with each newer one
// (a slow handler misses the ones between), never concurrently with itself. When
// it returns nil the revision is acknowledged to the CA: what it hands on must be
// in use by then. When it returns an error the error is logged, the revision is
// not acknowledged, and handle is called again with the next picture.
func (c *Client) Sync(ctx context.Context, handle func(*View) error) error {
	return c.sync(ctx, handle)
}
