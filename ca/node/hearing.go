package node

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/feed"
	"github.com/entente-mesh/entente/ca/server"
)

const (
	// lostGrace is how long a member that is not heard is taken to be reconnecting.
	lostGrace = time.Second
)

// hearing is what this node hears of other members' sessions.
type hearing struct {
	*core
	feed   *feed.Feed
	gate   *gate
	server *server.Server
}

// run hears every other member's word on its sessions. All that a member said is
// forgotten when it is none any more.
func (h *hearing) run(ctx context.Context) error {
	type listener struct {
		cancel context.CancelFunc
		ended  chan struct{}
	}
	listening := make(map[string]listener)
	defer func() {
		for _, l := range listening {
			l.cancel()
			<-l.ended
		}
	}()
	for {
		changed := h.applied.wait()
		others := make(map[string]bool)
		h.Read(func(st *domain.State) {
			for _, m := range st.Members() {
				if m.GetId() != h.own.id {
					others[m.GetId()] = true
				}
			}
		})
		for id, l := range listening {
			if others[id] {
				continue
			}
			l.cancel()
			h.peers.Forget(id)
			<-l.ended
			delete(listening, id)
			h.feed.Dismiss(time.Now(), id)
			h.gate.forget(id)
		}
		for id := range others {
			if listening[id].ended != nil {
				continue
			}
			ctx, cancel := context.WithCancel(ctx)
			l := listener{cancel, make(chan struct{})}
			listening[id] = l
			go func() {
				defer close(l.ended)
				h.listenTo(ctx, id)
			}()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// lookAgainEvery is how often what another member said and this node's state did not know
// is looked at again.
const lookAgainEvery = 500 * time.Millisecond

// listenTo hears one member until ctx ends. When it is silent for longer than a
// reconnect takes, what it vouched for is stale.
func (h *hearing) listenTo(ctx context.Context, id string) {
	lost := time.AfterFunc(lostGrace, func() { h.feed.Lost(time.Now(), id) })
	defer lost.Stop()
	wait := 50 * time.Millisecond
	heard := false // since the timer was set
	for ctx.Err() == nil {
		var m *statev1.Member
		h.Read(func(st *domain.State) { m, _ = st.Member(id) })
		if m == nil {
			break
		}
		hearsay := h.server.Hear(id)
		again := time.NewTicker(lookAgainEvery)
		done := make(chan struct{})
		var looking sync.WaitGroup
		looking.Go(func() {
			for {
				select {
				case <-again.C:
					hearsay.Again(time.Now())
				case <-done:
					return
				}
			}
		})
		err := h.peers.Presence(ctx, m, hearsay, func() {
			lost.Stop()
			heard = true
			wait = 50 * time.Millisecond
		})
		again.Stop()
		close(done)
		looking.Wait()
		if ctx.Err() != nil {
			break
		}
		if heard {
			heard = false
			lost.Reset(lostGrace)
		}
		h.log.Debug("another CA node's presence is not heard", "member", m.GetName(), "error", err)
		if sleep(ctx, wait/2+rand.N(wait)) != nil {
			break
		}
		wait = min(2*wait, time.Second)
	}
	h.feed.Lost(time.Now(), id)
}
