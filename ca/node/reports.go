package node

import (
	"context"
	"maps"
	"slices"
	"time"

	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/feed"
	"github.com/entente-mesh/entente/ca/server"
)

const (
	reportEvery = time.Second
	reportGap   = 20 * time.Millisecond // between two reports at least
)

// settleTime is how long the subscribers of a node that restarted are given to come
// back before its word counts for the ready gate. They reconnect within a second.
const settleTime = 5 * time.Second

// runReports tells the leader how far this node's subscribers are: each second, and at
// once when that has changed. At the leader itself it wakes the gate.
func (g *gate) runReports(ctx context.Context) error {
	var last server.Report
	var sent time.Time
	ticker := time.NewTicker(reportEvery)
	defer ticker.Stop()
	for {
		applied := g.applied.wait()
		select {
		case <-g.feed.Progress:
		case <-applied: // an election, perhaps, or news that nobody here waits for
		case <-ticker.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		g.changed.tell()
		leader := g.leader()
		if leader == nil {
			continue
		}
		report := g.report()
		if same(report, last) && time.Since(sent) < reportEvery {
			continue
		}
		callCtx, cancel := context.WithTimeout(ctx, reportEvery)
		err := g.peers.Report(callCtx, leader, report)
		cancel()
		if err != nil {
			g.log.Debug("the leader did not take this node's report", "error", err)
			last = server.Report{}
		} else {
			last, sent = report, time.Now()
		}
		if sleep(ctx, reportGap) != nil {
			return ctx.Err()
		}
	}
}

func (g *gate) report() server.Report {
	status := g.Subscribers()
	rejects, _ := g.replica.Load().Rejected()
	return server.Report{
		BootID:       g.bootID,
		Applied:      status.Revision,
		Acknowledged: status.Acknowledged,
		WaitingFor:   status.Behind,
		Clock:        g.wall(),
		Settled:      g.settled(),
		Held:         g.held(),
		Rejects:      rejects,
	}
}

// held is who at this node has SVIDs under TAINTED authorities: its subscribers, and
// the node itself.
func (g *gate) held() map[string][]string {
	var tainted []string
	g.Read(func(st *domain.State) { tainted = st.Tainted() })
	if len(tainted) == 0 {
		return nil
	}
	held := g.feed.Held(tainted)
	if own := g.svids.authority(); slices.Contains(tainted, own) {
		held[own] = append(held[own], "CA node "+g.cfg.Name)
	}
	return held
}

// Subscribers is how far this replica's subscribers are.
func (g *gate) Subscribers() feed.Status {
	var longest time.Duration
	g.Read(func(st *domain.State) { longest = st.LongestLeaf() })
	return g.feed.Status(time.Now(), longest)
}

// settled: what this node says of its subscribers is the whole truth.
func (g *gate) settled() bool {
	return !g.hadAgents || time.Since(g.started) >= settleTime
}

func same(a, b server.Report) bool {
	return a.BootID == b.BootID && a.Rejects == b.Rejects && a.Acknowledged == b.Acknowledged && a.Settled == b.Settled && slices.Equal(a.WaitingFor, b.WaitingFor) &&
		maps.EqualFunc(a.Held, b.Held, slices.Equal) && (a.Held == nil && b.Held == nil || a.Applied == b.Applied) // the leader waits for who has heard of a taint
}
