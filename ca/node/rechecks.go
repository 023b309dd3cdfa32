package node

import (
	"context"
	"sync"
	"time"

	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/feed"
	"github.com/entente-mesh/entente/ca/server"
)

// rechecks looks at open connections again when the state has changed, and lets what has
// its time in the feed come and go.
type rechecks struct {
	*core
	feed   *feed.Feed
	server *server.Server
	due    chan struct{}

	mu      sync.Mutex
	all     bool                // guarded by mu; every connection is to be looked at
	changed map[string]struct{} // guarded by mu; those of these agents and entries are
}

// ask has all connections looked at.
func (r *rechecks) ask() {
	r.mu.Lock()
	r.all = true
	r.mu.Unlock()
	signal(r.due)
}

// askOf has those of agents and entries looked at, by name and id.
func (r *rechecks) askOf(names []string) {
	r.mu.Lock()
	for _, name := range names {
		r.changed[name] = struct{}{}
	}
	r.mu.Unlock()
	signal(r.due)
}

// look does what was asked.
func (r *rechecks) look() {
	r.mu.Lock()
	all, changed := r.all, r.changed
	r.all, r.changed = false, map[string]struct{}{}
	r.mu.Unlock()
	if all {
		r.server.Recheck()
	} else {
		r.server.RecheckOf(changed)
	}
}

// beforeCut is how long a change is given to reach those whose connections it ends.
const beforeCut = 100 * time.Millisecond

func (r *rechecks) run(ctx context.Context) error {
	expire := time.NewTicker(5 * time.Second)
	defer expire.Stop()
	damped := time.NewTicker(250 * time.Millisecond)
	defer damped.Stop()
	for {
		select {
		case <-r.due:
			// What is cut here learns first why, if it reads: it comes back with a new SVID,
			// and need not find out that the old one is void.
			if err := sleep(ctx, beforeCut); err != nil {
				return err
			}
			r.look()
			// Changes in a row are looked at together; I4 allows a second.
			if err := sleep(ctx, 50*time.Millisecond); err != nil {
				return err
			}
		case <-expire.C:
			r.Read(func(st *domain.State) { r.feed.Expire(time.Now(), st) })
		case now := <-damped.C:
			if due, waits := r.feed.Due(); waits && !now.Before(due) {
				r.feed.Release(now)
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
