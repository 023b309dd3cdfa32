package server

import (
	"context"
	"sync"
	"time"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/domain"
)

const (
	// beatEvery is how often a quiet stream says that it lives. Clients give a node up
	// after 10 s without (ca/client).
	beatEvery = 5 * time.Second
	// A round is how long a subscriber waits at most to hear of a revision that changed
	// nothing for it; until then its acknowledgement is behind.
	rounds = 3  // in beatEvery
	slots  = 63 // as many for each round
	// slotEvery is the time from one slot to the next.
	slotEvery = beatEvery / rounds / slots
)

// pulse is the heart of all streams of Sync: one timer, and one message for all that beat
// in the same moment. The streams are spread over the slots of a round, and the slots over
// the rounds of a beat.
type pulse struct {
	server *Server

	mu    sync.Mutex
	slots [slots]map[*beating]struct{}
	round int
}

// beating is a stream in its slot. It hears of each beat on due.
type beating struct {
	due        chan *ententev1.SyncResponse
	statements bool // it compares: releases before levels do not
	slot       int
	round      int
	revision   uint64 // of its last beat
}

// join puts a stream into the emptiest slot. Its first beat is due within a round.
func (p *pulse) join(statements bool) *beating {
	b := &beating{due: make(chan *ententev1.SyncResponse, 1), statements: statements}
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range p.slots {
		if len(p.slots[i]) < len(p.slots[b.slot]) {
			b.slot = i
		}
	}
	if p.slots[b.slot] == nil {
		p.slots[b.slot] = map[*beating]struct{}{}
	}
	b.round = b.slot % rounds // a slot beats as one: few bursts wake the process less often than many
	p.slots[b.slot][b] = struct{}{}
	return b
}

func (p *pulse) leave(b *beating) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.slots[b.slot], b)
}

// run beats until ctx ends.
func (p *pulse) run(ctx context.Context) {
	ticker := time.NewTicker(slotEvery)
	defer ticker.Stop()
	for slot := 0; ; slot = (slot + 1) % slots {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		p.beat(slot)
	}
}

// beat has the streams of a slot beat: those whose round it is, and those that have not
// heard of the revision. One that is still busy with its last beat, or a message, is let be.
func (p *pulse) beat(slot int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if slot == 0 {
		p.round = (p.round + 1) % rounds
	}
	if len(p.slots[slot]) == 0 {
		return
	}
	plain := &ententev1.Heartbeat{}
	p.server.State.Read(func(st *domain.State) {
		plain.Revision = st.Revision()
		if now := st.Now(); !now.IsZero() {
			plain.AsOfUnixNanos = now.UnixNano()
		}
	})
	with := &ententev1.Heartbeat{Revision: plain.Revision, AsOfUnixNanos: plain.AsOfUnixNanos, Statements: p.server.Statements.Others()}
	bare, full := heartbeat(plain), heartbeat(with)
	for b := range p.slots[slot] {
		message := bare
		switch {
		case b.round == p.round || b.revision == 0:
			if b.statements {
				message = full
			}
		case b.revision == plain.Revision:
			continue
		}
		select {
		case b.due <- message:
			b.revision = plain.Revision
		default:
		}
	}
}

func heartbeat(beat *ententev1.Heartbeat) *ententev1.SyncResponse {
	return &ententev1.SyncResponse{Message: &ententev1.SyncResponse_Heartbeat{Heartbeat: beat}}
}
