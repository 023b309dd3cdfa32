package node

import (
	"context"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/server"
)

const (
	reportEvery = time.Second
	reportGap   = 20 * time.Millisecond // between two reports at least
	// lostGrace is how long a member that is not heard is taken to be reconnecting.
	lostGrace = time.Second
)

// runReports tells the leader how far this node's subscribers are: each second, and at
// once when that has changed. At the leader itself it wakes the gate.
func (n *Node) runReports(ctx context.Context) error {
	var last server.Report
	var sent time.Time
	ticker := time.NewTicker(reportEvery)
	defer ticker.Stop()
	for {
		applied := n.applied.wait()
		select {
		case <-n.feed.Progress:
		case <-applied: // an election, perhaps, or news that nobody here waits for
		case <-ticker.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		n.gate.changed.tell()
		leader := n.leader()
		if leader == nil {
			continue
		}
		report := n.report()
		if same(report, last) && time.Since(sent) < reportEvery {
			continue
		}
		callCtx, cancel := context.WithTimeout(ctx, reportEvery)
		err := n.peers.Report(callCtx, leader, report)
		cancel()
		if err != nil {
			n.log.Debug("the leader did not take this node's report", "error", err)
			last = server.Report{}
		} else {
			last, sent = report, time.Now()
		}
		if sleep(ctx, reportGap) != nil {
			return ctx.Err()
		}
	}
}

func (n *Node) report() server.Report {
	status := n.status()
	rejects, _ := n.replica.Load().Rejected()
	return server.Report{
		BootID:       n.bootID,
		Applied:      status.Revision,
		Acknowledged: status.Acknowledged,
		WaitingFor:   status.Behind,
		Clock:        n.wall(),
		Settled:      n.settled(),
		Held:         n.held(),
		Rejects:      rejects,
	}
}

// held is who at this node has SVIDs under TAINTED authorities: its subscribers, and
// the node itself.
func (n *Node) held() map[string][]string {
	var tainted []string
	n.Read(func(st *domain.State) { tainted = st.Tainted() })
	if len(tainted) == 0 {
		return nil
	}
	held := n.feed.Held(tainted)
	if own := n.svids.authority(); slices.Contains(tainted, own) {
		held[own] = append(held[own], "CA node "+n.cfg.Name)
	}
	return held
}

func same(a, b server.Report) bool {
	return a.BootID == b.BootID && a.Rejects == b.Rejects && a.Acknowledged == b.Acknowledged && a.Settled == b.Settled && slices.Equal(a.WaitingFor, b.WaitingFor) &&
		maps.EqualFunc(a.Held, b.Held, slices.Equal) && (a.Held == nil && b.Held == nil || a.Applied == b.Applied) // the leader waits for who has heard of a taint
}

func (n *Node) isMember(id string) (is bool) {
	if n.replica.Load() == nil {
		return false
	}
	n.Read(func(st *domain.State) { _, is = st.Member(id) })
	return is
}

// runPresence hears every other member's word on its sessions. All that a member said is
// forgotten when it is none any more.
func (n *Node) runPresence(ctx context.Context) error {
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
		changed := n.applied.wait()
		others := make(map[string]bool)
		n.Read(func(st *domain.State) {
			for _, m := range st.Members() {
				if m.GetId() != n.own.id {
					others[m.GetId()] = true
				}
			}
		})
		for id, l := range listening {
			if others[id] {
				continue
			}
			l.cancel()
			n.peers.Forget(id)
			<-l.ended
			delete(listening, id)
			n.feed.Dismiss(time.Now(), id)
			n.gate.forget(id)
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
				n.listenTo(ctx, id)
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
func (n *Node) listenTo(ctx context.Context, id string) {
	lost := time.AfterFunc(lostGrace, func() { n.feed.Lost(time.Now(), id) })
	defer lost.Stop()
	wait := 50 * time.Millisecond
	heard := false // since the timer was set
	for ctx.Err() == nil {
		var m *statev1.Member
		n.Read(func(st *domain.State) { m, _ = st.Member(id) })
		if m == nil {
			break
		}
		hearsay := n.server.Hear(id)
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
		err := n.peers.Presence(ctx, m, hearsay, func() {
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
		n.log.Debug("another CA node's presence is not heard", "member", m.GetName(), "error", err)
		if sleep(ctx, wait/2+rand.N(wait)) != nil {
			break
		}
		wait = min(2*wait, time.Second)
	}
	n.feed.Lost(time.Now(), id)
}
