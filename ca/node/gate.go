package node

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/rotation"
	"github.com/entente-mesh/entente/ca/server"
)

// gate is who has acknowledged what: this node's subscribers, and at the leader those of all
// members. Reports arrive whether this node leads or not; only the leader uses them.
type gate struct {
	*proposals
	svids     *svids
	hadAgents bool         // the state knew agents when this process started
	overdue   atomic.Int64 // authorities that the leader waits for longer than a phase

	mu      sync.Mutex
	heard   map[string]reported // by member id
	changed broadcast
}

type reported struct {
	server.Report
	at time.Time
}

func (g *gate) Reported(member string, r server.Report) {
	g.mu.Lock()
	if g.heard == nil {
		g.heard = make(map[string]reported)
	}
	g.heard[member] = reported{r, time.Now()}
	g.mu.Unlock()
	g.changed.tell()
}

// last is a member's report if it is fresh.
func (g *gate) last(member string, now time.Time) (reported, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	r, ok := g.heard[member]
	return r, ok && now.Sub(r.at) < reportFresh
}

// forget drops the report of a member that is none any more.
func (g *gate) forget(member string) {
	g.mu.Lock()
	delete(g.heard, member)
	g.mu.Unlock()
	g.changed.tell()
}

// reset begins a leadership: what members said to the leader before does not count.
func (g *gate) reset() {
	g.mu.Lock()
	defer g.mu.Unlock()
	clear(g.heard)
}

func gateReport(r server.Report) rotation.Report {
	out := rotation.Report{Applied: r.Applied, Acknowledged: r.Acknowledged, Settled: r.Settled, Held: r.Held}
	for _, b := range r.WaitingFor {
		out.WaitingFor = append(out.WaitingFor, rotation.Behind(b))
	}
	return out
}

// keep marks authorities ready when everybody holds them (I3).
func (g *gate) keep(ctx context.Context) {
	said := make(map[string]string)
	for {
		progress, applied := g.changed.wait(), g.applied.wait()
		g.stepGate(ctx, said)
		select {
		case <-progress:
		case <-applied:
		case <-time.After(time.Second):
		case <-ctx.Done():
			return
		}
	}
}

func (g *gate) gateView() (v rotation.View) {
	g.Read(func(st *domain.State) { v = rotation.Look(st) })
	return v
}

// reports are the members' words that count now, this node's own among them.
func (g *gate) reports() rotation.Reports {
	now, own := time.Now(), g.report()
	return func(member string) (rotation.Report, bool) {
		if member == g.own.id {
			return gateReport(own), true
		}
		r, ok := g.last(member, now)
		return gateReport(r.Report), ok
	}
}

func (g *gate) stepGate(ctx context.Context, said map[string]string) {
	v := g.gateView()
	if len(v.Pending)+len(v.Tainted) == 0 {
		g.overdue.Store(0)
		return
	}
	reports := g.reports()
	overdue := 0
	for _, a := range v.Pending {
		waiting, assumed := v.WaitingFor(a, reports)
		if len(waiting) > 0 && !v.LeaveBehind(a) {
			text := strings.Join(waiting, "; ")
			switch {
			case v.Overdue(a):
				overdue++
				if said[a.GetId()] != "overdue" {
					said[a.GetId()] = "overdue"
					g.log.Error("an authority should be in use by now, and not everybody holds it: see who is waited for, and mend or remove it; else it is left behind when the one before cannot sign full-length SVIDs any more",
						"authority", a.GetId(), "waiting_for", text)
				}
			case said[a.GetId()] != text:
				said[a.GetId()] = text
				g.log.Debug("an authority waits until everybody holds it", "authority", a.GetId(), "waiting_for", text)
			}
			continue
		}
		if len(waiting) > 0 {
			g.log.Error("an authority is used although not everybody holds it: the one before ends", "authority", a.GetId(), "left_behind", waiting)
		}
		assumed = append(assumed, waiting...)
		if _, err := g.markReady(ctx, a, assumed, ""); err == nil {
			delete(said, a.GetId())
			g.log.Info("everybody holds the authority", "authority", a.GetId(), "assumed", assumed)
		}
	}
	g.overdue.Store(int64(overdue))
	for _, a := range v.Tainted {
		holding, silent := v.Holding(a, reports)
		if len(holding)+len(silent) > 0 && !v.Ended(a) {
			continue
		}
		assumed := append(holding, silent...)
		if _, err := g.mark(ctx, a, &statev1.Command{Body: &statev1.Command_AuthorityDrained{AuthorityDrained: &statev1.AuthorityDrained{Id: a.GetId(), Assumed: assumed}}}); err == nil {
			g.log.Info("nobody has an SVID under the tainted authority any more: it can be revoked", "authority", a.GetId(), "assumed", assumed)
		}
	}
}

func (g *gate) markReady(ctx context.Context, a *statev1.Authority, assumed []string, who string) (revision uint64, err error) {
	return g.mark(ctx, a, &statev1.Command{Actor: who, ActorKind: statev1.ActorKind_ACTOR_KIND_OPERATOR, Body: &statev1.Command_AuthorityReady{AuthorityReady: &statev1.AuthorityReady{Id: a.GetId(), Assumed: assumed}}})
}

// mark has the outcome of a gate agreed; an operator's, if the command says so.
func (g *gate) mark(ctx context.Context, a *statev1.Authority, command *statev1.Command) (revision uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if command.Actor == "" {
		g.byItself(command)
	}
	outcome, err := g.replica.Load().Propose(ctx, command)
	if err != nil {
		g.log.Debug("what is known of an authority could not be agreed; trying again", "authority", a.GetId(), "error", err)
		return 0, err
	}
	g.audit.Command(command, outcome, nil)
	if outcome.Refused != nil {
		g.log.Warn("what is known of an authority was refused", "authority", a.GetId(), "error", outcome.Refused)
		return 0, outcome.Refused
	}
	return outcome.Revision, nil
}

// MarkReady marks an authority as ready without the word of members that do not
// report, because an operator said so.
func (g *gate) MarkReady(ctx context.Context, id string, exclude []string, who string) (revision uint64, err error) {
	if !g.IsLeader() {
		return 0, server.ErrNotLeader
	}
	v, reports := g.gateView(), g.reports()
	for _, name := range exclude {
		if err := v.MayExclude(name, reports); err != nil {
			return 0, err
		}
	}
	i := slices.IndexFunc(v.Pending, func(a *statev1.Authority) bool { return a.GetId() == id })
	if i < 0 {
		return 0, fmt.Errorf("authority %.12s waits for nobody", id)
	}
	waiting, assumed := v.WaitingFor(v.Pending[i], reports, exclude...)
	if len(waiting) > 0 {
		return 0, fmt.Errorf("authority %.12s is not held by everybody yet, who lacks it would refuse what it signs: it waits for %s", id, strings.Join(waiting, "; "))
	}
	g.log.Warn("an authority is marked ready without the word of CA nodes that an operator excluded", "authority", id, "excluded", exclude, "administrator", who)
	return g.markReady(ctx, v.Pending[i], assumed, who)
}

// Exclude asks the leader, wherever it is, and waits until this node knows.
func (g *gate) Exclude(ctx context.Context, id string, exclude []string, who string) error {
	revision, err := g.MarkReady(ctx, id, exclude, who)
	if errors.Is(err, server.ErrNotLeader) {
		leader := g.leader()
		if leader == nil {
			return errors.New("no CA node leads now: nobody knows who has acknowledged what")
		}
		revision, err = g.peers.MarkReady(ctx, leader, id, exclude, who)
	}
	if err != nil {
		return err
	}
	return g.reach(ctx, revision)
}

// LocalGate says who stands between each authority and its next phase. Only the leader
// hears everybody.
func (g *gate) LocalGate() (map[string]server.Gate, error) {
	if !g.IsLeader() {
		return nil, server.ErrNotLeader
	}
	v, reports := g.gateView(), g.reports()
	gates := make(map[string]server.Gate)
	for _, a := range v.Pending {
		waiting, assumed := v.WaitingFor(a, reports)
		gates[a.GetId()] = server.Gate{WaitingFor: waiting, Assumed: assumed, Overdue: v.Overdue(a)}
	}
	for _, a := range v.Tainted {
		holding, silent := v.Holding(a, reports)
		gates[a.GetId()] = server.Gate{WaitingFor: append(holding, silent...)}
	}
	return gates, nil
}

// Gate asks the leader, wherever it is.
func (g *gate) Gate(ctx context.Context) (map[string]server.Gate, error) {
	gates, err := g.LocalGate()
	if err == nil {
		return gates, nil
	}
	leader := g.leader()
	if leader == nil {
		return nil, errors.New("no CA node leads now: nobody knows who has acknowledged what")
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	return g.peers.Gate(ctx, leader)
}
