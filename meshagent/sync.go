package meshagent

import (
	"context"
	"errors"
	"log/slog"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/ca/client"
)

// follower takes what the CA tells into the state and the memory. Its methods are not called
// concurrently.
type follower struct {
	domain spiffeid.TrustDomain
	name   string // of the agent
	log    *slog.Logger
	store  *store
	client *client.Client
	memory *memory

	complaint string // the last ones that were logged, so that they are logged once
}

// run follows the CA until ctx ends.
func (f *follower) run(ctx context.Context) error { return f.client.Sync(ctx, f.apply) }

// apply takes in a picture of the CA.
func (f *follower) apply(view *client.View) error {
	var complaints []error
	var refused error
	f.store.change(func(s *State) *State {
		var next *State
		next, complaints, refused = s.withView(view, f.domain, f.name)
		return next
	})
	if all := errors.Join(complaints...); all == nil {
		f.complaint = ""
	} else if text := all.Error(); text != f.complaint {
		f.complaint = text
		f.log.Error("the CA sent what this agent does not take", "revision", view.Revision, "error", all)
	}
	if refused == nil {
		f.store.deliveries.applied(f.store.State(), view.Revision)
	}
	f.memory.keep(func(k *known) {
		if refused == nil {
			k.Bundle = view.Bundles[f.domain.Name()]
		}
		if view.Cluster != nil {
			k.cluster = view.Cluster
		}
		k.RecoveryKey = f.client.RecoveryKey()
		k.members, k.confirmed = view.Members, f.client.Confirmed()
	})
	return refused
}
