package gateway

import (
	"cmp"
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/internal/dataplaneapi"
)

// identities are the newest SVIDs and bundles of the Workload API. What was received
// stays when the API goes away (I12), and goes when the API says that there is nothing
// for this process any more; an SVID ends by itself.
type identities struct {
	log     *slog.Logger
	changed func() // called after each update

	distrust  atomic.Pointer[func([]*x509.Certificate) error] // nil: nothing
	tokens    atomic.Pointer[func(id spiffeid.ID, keyID string, claims map[string]any) error]
	announced atomic.Pointer[func([]*x509.Certificate) error] // nil: nothing

	mu      sync.RWMutex
	svids   map[spiffeid.ID]*x509svid.SVID
	bundles *x509bundle.Set
	since   map[spiffeid.TrustDomain]time.Time // when the content of a bundle became what it is
	waiting map[spiffeid.ID]chan struct{}      // closed when the first SVID of an ID is there
	broken  bool
}

func newIdentities(log *slog.Logger, changed func()) *identities {
	return &identities{
		log:     log,
		changed: changed,
		svids:   map[spiffeid.ID]*x509svid.SVID{},
		bundles: x509bundle.NewSet(),
		waiting: map[spiffeid.ID]chan struct{}{},
	}
}

// run watches the Workload API until ctx is done.
func (i *identities) run(ctx context.Context, socket string) error {
	if !strings.Contains(socket, "://") {
		path, err := filepath.Abs(socket)
		if err != nil {
			return fmt.Errorf("workloadAPI.socket: %w", err)
		}
		socket = "unix://" + path
	}
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(socket))
	if err != nil {
		return fmt.Errorf("opening the Workload API at %s (workloadAPI.socket): %w", socket, err)
	}
	defer client.Close()
	err = client.WatchX509Context(ctx, i) // returns when ctx ends, or when the API says that asking again is useless
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return fmt.Errorf("watching the Workload API at %s: %w", socket, err)
}

// OnX509ContextUpdate takes a new picture. Part of workloadapi.X509ContextWatcher.
func (i *identities) OnX509ContextUpdate(c *workloadapi.X509Context) {
	svids := make(map[spiffeid.ID]*x509svid.SVID, len(c.SVIDs))
	for _, svid := range c.SVIDs {
		if _, ok := svids[svid.ID]; !ok { // the first one is the default (Workload API section 5.3)
			svids[svid.ID] = svid
		}
	}
	i.mu.Lock()
	i.since = i.date(c.Bundles)
	i.svids, i.bundles = svids, c.Bundles
	if i.broken {
		i.log.Info("Workload API is back")
		i.broken = false
	}
	for id, ready := range i.waiting {
		if svids[id] != nil {
			close(ready)
			delete(i.waiting, id)
		}
	}
	i.mu.Unlock()
	i.changed()
}

// date is since when the bundles of the next set have their content. i.mu is held.
func (i *identities) date(next *x509bundle.Set) map[spiffeid.TrustDomain]time.Time {
	since, now := map[spiffeid.TrustDomain]time.Time{}, time.Now()
	for _, bundle := range next.Bundles() {
		td := bundle.TrustDomain()
		since[td] = now
		if before, ok := i.bundles.Get(td); ok && before.Equal(bundle) {
			since[td] = i.since[td]
		}
	}
	return since
}

// OnX509ContextWatchError is told of each failed try. Part of workloadapi.X509ContextWatcher.
func (i *identities) OnX509ContextWatchError(err error) {
	if status.Code(err) == codes.PermissionDenied {
		i.drop()
		return
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if !i.broken {
		i.log.Warn("Workload API does not answer: going on with what it gave before", "error", err)
		i.broken = true
	}
}

// drop lets go of everything: this process is entitled to nothing any more (Workload
// API 5.2.1).
func (i *identities) drop() {
	i.mu.Lock()
	had := len(i.svids) > 0
	if had {
		i.log.Warn("the Workload API has no identity for this process any more: it stops to speak for one")
		i.svids, i.bundles = map[spiffeid.ID]*x509svid.SVID{}, x509bundle.NewSet()
	}
	i.mu.Unlock()
	if had {
		i.changed()
	}
}

// GetX509BundleForTrustDomain makes identities an x509bundle.Source.
func (i *identities) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return i.bundles.GetX509BundleForTrustDomain(td)
}

// Distrusted makes identities a peer.Distruster. What the CA names is of the own
// domain only.
func (i *identities) Distrusted(path []*x509.Certificate) error {
	if d := i.distrust.Load(); d != nil {
		return (*d)(path)
	}
	return nil
}

// Announced makes identities a peer.Announcer.
func (i *identities) Announced() func([]*x509.Certificate) error {
	if a := i.announced.Load(); a != nil {
		return *a
	}
	return nil
}

// of is the source of one ID's SVID.
func (i *identities) of(id spiffeid.ID) x509svid.Source { return source{i, id} }

type source struct {
	all *identities
	id  spiffeid.ID
}

func (s source) GetX509SVID() (*x509svid.SVID, error) {
	s.all.mu.RLock()
	defer s.all.mu.RUnlock()
	if svid := s.all.svids[s.id]; svid != nil {
		return svid, nil
	}
	return nil, fmt.Errorf("the Workload API gave no SVID for %s", s.id)
}

// waitSilently is how long an SVID may take before the log says that it is missing.
const waitSilently = 3 * time.Second

// wait returns when an SVID for id is there.
func (i *identities) wait(ctx context.Context, id spiffeid.ID) error {
	i.mu.Lock()
	if i.svids[id] != nil {
		i.mu.Unlock()
		return nil
	}
	ready := i.waiting[id]
	if ready == nil {
		ready = make(chan struct{})
		i.waiting[id] = ready
	}
	i.mu.Unlock()
	late := time.NewTimer(waitSilently)
	defer late.Stop()
	for {
		select {
		case <-ready:
			return nil
		case <-late.C:
			i.log.Warn("waiting for an SVID from the Workload API: entente agent explain-pid shows why this process has none", "spiffe_id", id, "pid", os.Getpid())
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// held are the bundles for people, by trust domain.
func (i *identities) held() (list []*ententev1.HeldBundle) {
	i.mu.RLock()
	defer i.mu.RUnlock()
	for _, bundle := range i.bundles.Bundles() {
		list = append(list, dataplaneapi.HeldBundle(bundle, i.since[bundle.TrustDomain()]))
	}
	slices.SortFunc(list, func(a, b *ententev1.HeldBundle) int { return cmp.Compare(a.GetTrustDomain(), b.GetTrustDomain()) })
	return list
}
