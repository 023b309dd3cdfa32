package node

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/replica"
	"github.com/entente-mesh/entente/ca/server"
)

const (
	tickEvery = 500 * time.Millisecond
	// reportFresh is how long a member's report counts.
	reportFresh = 3 * time.Second
	// maxLeaderOffset: a leader whose clock is further off the median hands over.
	maxLeaderOffset = 5 * time.Second
)

// runLeadership does the leader's duties while this node leads.
func (n *Node) runLeadership(ctx context.Context) error {
	stop := func() {}
	defer func() { stop() }()
	for {
		swapped := n.swapped.wait()
		select {
		case <-swapped:
			// The replica of before said goodbye already, or nobody heard it.
			stop()
			stop = func() {}
		case leads := <-n.replica.Load().LeaderCh():
			stop()
			stop = func() {}
			if leads {
				n.log.Info("this node leads its CA cluster")
				stop = n.lead(ctx)
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// lead starts the duties; stop ends them and waits.
func (n *Node) lead(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var duties sync.WaitGroup
	duties.Go(func() {
		// What was agreed before this leadership must be applied first.
		for n.replica.Load().Barrier(ctx) != nil {
			if sleep(ctx, 50*time.Millisecond) != nil {
				return
			}
		}
		n.gate.reset()
		duties.Go(func() { n.keepTicking(ctx) })
		duties.Go(func() { n.keepGate(ctx) })
		duties.Go(func() { n.keepMembers(ctx) })
		duties.Go(func() { n.keepFollowing(ctx) })
		duties.Go(func() { n.keepShowing(ctx) })
		duties.Go(func() { n.keepWitness(ctx) })
		duties.Go(func() { n.keepComparing(ctx) })
	})
	return func() {
		cancel()
		duties.Wait()
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// keepTicking moves the agreed time on, with the clocks of a majority of voters.
func (n *Node) keepTicking(ctx context.Context) {
	for {
		n.tick(ctx)
		if sleep(ctx, tickEvery) != nil {
			return
		}
	}
}

func (n *Node) tick(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	now := time.Now()
	voters := 0
	var samples []int64
	for _, s := range n.replica.Load().Servers() {
		if !s.Voter {
			continue
		}
		voters++
		if s.Self {
			samples = append(samples, n.wall().UnixNano())
		} else if r, ok := n.gate.last(s.ID, now); ok {
			samples = append(samples, r.Clock.Add(now.Sub(r.at)).UnixNano())
		}
	}
	if len(samples) < voters/2+1 {
		return // one clock alone, or half of them, sets nobody's time
	}
	// A majority of all voters must say that this clock is wrong: of two samples, nobody
	// knows which is.
	slices.Sort(samples)
	wall, against := n.wall(), 0
	for _, sample := range samples {
		if wall.Sub(time.Unix(0, sample)).Abs() > maxLeaderOffset {
			against++
		}
	}
	if against >= voters/2+1 {
		median := time.Unix(0, samples[(len(samples)-1)/2])
		n.log.Error("this node's clock is off the other CA nodes': another one leads; set the clock", "offset", wall.Sub(median).String())
		n.replica.Load().TransferLeadership(ctx)
		return
	}
	outcome, err := n.replica.Load().Propose(ctx, &statev1.Command{
		Actor: n.cfg.Name,
		Body:  &statev1.Command_Tick{Tick: &statev1.Tick{UnixNanos: samples}},
	})
	if err == nil && outcome.Refused != nil {
		n.log.Error("a tick was refused", "error", outcome.Refused)
	}
}

// keepMembers makes Raft's membership what was agreed: a newcomer replicates first and
// votes when it has caught up.
func (n *Node) keepMembers(ctx context.Context) {
	said := ""
	for {
		changed := n.applied.wait()
		err := n.stepMembers(ctx)
		switch {
		case err == nil:
			said = ""
		case ctx.Err() == nil && err.Error() != said:
			said = err.Error()
			n.log.Info("Raft's membership is not what was agreed yet; trying again", "error", err)
		}
		if err == nil {
			// What applies to all members is agreed; look again when that changes.
			select {
			case <-changed:
			case <-time.After(time.Second):
			case <-ctx.Done():
				return
			}
		} else if sleep(ctx, 100*time.Millisecond) != nil {
			return
		}
	}
}

func (n *Node) stepMembers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	r := n.replica.Load()
	var members []*statev1.Member
	n.Read(func(st *domain.State) { members = st.Members() })
	servers := make(map[string]replica.Server)
	for _, s := range r.Servers() {
		servers[s.ID] = s
	}
	var errs []error
	for _, m := range members {
		s, ok := servers[m.GetId()]
		delete(servers, m.GetId())
		var err error
		switch {
		case !ok, !s.Voter && s.Address != m.GetRaftAddress():
			err = r.AddNonvoter(ctx, m.GetId(), m.GetRaftAddress())
		case s.Voter && s.Address != m.GetRaftAddress(), m.GetVoter() && !s.Voter:
			if err = r.AddVoter(ctx, m.GetId(), m.GetRaftAddress()); err == nil && !s.Voter {
				n.log.Info("a CA node votes from now on", "member", m.GetName())
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("CA node %s: %w", m.GetName(), err))
		}
	}
	for id := range servers {
		if err := r.RemoveServer(ctx, id); err != nil {
			errs = append(errs, fmt.Errorf("remove CA node %.12s: %w", id, err))
		}
		n.peers.Forget(id)
	}
	return errors.Join(errs...)
}

// gate is what the leader knows of all members' subscribers. Reports arrive whether
// this node leads or not; only the leader uses them.
type gate struct {
	mu      sync.Mutex
	reports map[string]reported  // by member id
	seen    map[string]time.Time // authority id -> when this leader first saw it PREPARED
	changed broadcast
}

type reported struct {
	server.Report
	at time.Time
}

func (g *gate) reported(member string, r server.Report) {
	g.mu.Lock()
	if g.reports == nil {
		g.reports = make(map[string]reported)
	}
	g.reports[member] = reported{r, time.Now()}
	g.mu.Unlock()
	g.changed.tell()
}

// last is a member's report if it is fresh.
func (g *gate) last(member string, now time.Time) (reported, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	r, ok := g.reports[member]
	return r, ok && now.Sub(r.at) < reportFresh
}

// reset begins a leadership: what members said to the leader before does not count.
func (g *gate) reset() {
	g.mu.Lock()
	defer g.mu.Unlock()
	clear(g.reports)
	g.seen = make(map[string]time.Time)
}

// since is how long this leader has seen the authority PREPARED.
func (g *gate) since(authority string, now time.Time) time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	first, ok := g.seen[authority]
	if !ok {
		first = now
		g.seen[authority] = now
	}
	return now.Sub(first)
}

// keepGate marks authorities ready when everybody holds them (I3).
func (n *Node) keepGate(ctx context.Context) {
	said := make(map[string]string)
	for {
		progress, applied := n.gate.changed.wait(), n.applied.wait()
		n.stepGate(ctx, said)
		select {
		case <-progress:
		case <-applied:
		case <-time.After(time.Second):
		case <-ctx.Done():
			return
		}
	}
}

// gateView is what the ready gate is decided from.
type gateView struct {
	members []*statev1.Member
	pending []*statev1.Authority // PREPARED and not ready
	tainted []*statev1.Authority // TAINTED and not drained
	active  map[ownedBy]*statev1.Authority
	peers   []string // trust domains
	hint    time.Duration
	longest map[statev1.KeyUse]time.Duration // life of an SVID
}

type ownedBy struct {
	member string
	use    statev1.KeyUse
}

func (n *Node) gateView() (v gateView) {
	n.Read(func(st *domain.State) {
		v.active = make(map[ownedBy]*statev1.Authority)
		for _, a := range st.Authorities() {
			switch {
			case a.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED && !a.GetReady():
				v.pending = append(v.pending, a)
			case a.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED && !a.GetDrained():
				v.tainted = append(v.tainted, a)
			case ca.Signs(a.GetPhase()):
				v.active[ownedBy{a.GetMemberId(), a.GetUse()}] = a
			}
		}
		if len(v.pending)+len(v.tainted) == 0 {
			return
		}
		v.members, v.peers = st.Members(), st.Peers()
		v.hint = st.Lifetimes().RefreshHint
		phase := st.Lifetimes().Phase
		v.longest = map[statev1.KeyUse]time.Duration{
			statev1.KeyUse_KEY_USE_X509: st.LongestLeaf(),
			statev1.KeyUse_KEY_USE_JWT:  min(ca.MaxJWTSVID, phase),
			statev1.KeyUse_KEY_USE_WIT:  min(ca.MaxWITSVID, phase),
		}
	})
	return v
}

func (n *Node) stepGate(ctx context.Context, said map[string]string) {
	v := n.gateView()
	now := time.Now()
	for _, a := range v.pending {
		waiting, assumed := n.waitingFor(v, a, now)
		if len(waiting) > 0 && !leaveBehind(v, a, now) {
			if text := strings.Join(waiting, "; "); said[a.GetId()] != text {
				said[a.GetId()] = text
				n.log.Debug("an authority waits until everybody holds it", "authority", a.GetId(), "waiting_for", text)
			}
			continue
		}
		if len(waiting) > 0 {
			n.log.Error("an authority is used although not everybody holds it: the one before ends", "authority", a.GetId(), "left_behind", waiting)
		}
		assumed = append(assumed, waiting...)
		if n.mark(ctx, a, &statev1.Command{Body: &statev1.Command_AuthorityReady{AuthorityReady: &statev1.AuthorityReady{Id: a.GetId(), Assumed: assumed}}}) {
			delete(said, a.GetId())
			n.log.Info("everybody holds the authority", "authority", a.GetId(), "assumed", assumed)
		}
	}
	for _, a := range v.tainted {
		holding, silent := n.holding(v, a, now)
		// Whoever does not say it has an SVID under it no longer, for those have ended.
		over := n.gate.since("tainted "+a.GetId(), now) > v.longest[a.GetUse()]
		if len(holding)+len(silent) > 0 && !over {
			continue
		}
		assumed := append(holding, silent...)
		if n.mark(ctx, a, &statev1.Command{Body: &statev1.Command_AuthorityDrained{AuthorityDrained: &statev1.AuthorityDrained{Id: a.GetId(), Assumed: assumed}}}) {
			n.log.Info("nobody has an SVID under the tainted authority any more: it can be revoked", "authority", a.GetId(), "assumed", assumed)
		}
	}
}

// mark has the outcome of a gate agreed.
func (n *Node) mark(ctx context.Context, a *statev1.Authority, command *statev1.Command) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	command.Actor = "CA node " + n.cfg.Name
	outcome, err := n.replica.Load().Propose(ctx, command)
	switch {
	case err != nil:
		n.log.Debug("what is known of an authority could not be agreed; trying again", "authority", a.GetId(), "error", err)
		return false
	case outcome.Refused != nil:
		n.log.Warn("what is known of an authority was refused", "authority", a.GetId(), "error", outcome.Refused)
	}
	n.audit.Command(command, outcome, nil)
	return outcome.Refused == nil
}

// holding says who has SVIDs under a TAINTED authority, and which members cannot tell.
// A member's word counts only when it has applied the taint: from then on its own
// authority signs no more, and its subscribers are asked.
func (n *Node) holding(v gateView, a *statev1.Authority, now time.Time) (holding, silent []string) {
	own := n.report()
	for _, m := range v.members {
		report := own
		if m.GetId() != n.own.id {
			r, ok := n.gate.last(m.GetId(), now)
			if !ok {
				silent = append(silent, "CA node "+m.GetName()+" does not report")
				continue
			}
			report = r.Report
		}
		switch {
		case !report.Settled:
			silent = append(silent, "CA node "+m.GetName()+" started a moment ago")
		case report.Applied < a.GetRevision():
			silent = append(silent, "CA node "+m.GetName()+" lags behind")
		default:
			holding = append(holding, report.Held[a.GetId()]...)
		}
	}
	slices.Sort(holding)
	return slices.Compact(holding), silent
}

// localGate says who stands between each authority and its next phase. Only the leader
// hears everybody.
func (n *Node) localGate() (map[string]server.Gate, error) {
	if !n.IsLeader() {
		return nil, server.ErrNotLeader
	}
	v, now := n.gateView(), time.Now()
	gates := make(map[string]server.Gate)
	for _, a := range v.pending {
		waiting, assumed := n.waitingFor(v, a, now)
		gates[a.GetId()] = server.Gate{WaitingFor: waiting, Assumed: assumed}
	}
	for _, a := range v.tainted {
		holding, silent := n.holding(v, a, now)
		gates[a.GetId()] = server.Gate{WaitingFor: append(holding, silent...)}
	}
	return gates, nil
}

// askGate asks the leader, wherever it is.
func (n *Node) askGate(ctx context.Context) (map[string]server.Gate, error) {
	gates, err := n.localGate()
	if err == nil {
		return gates, nil
	}
	leader := n.leader()
	if leader == nil {
		return nil, errors.New("no CA node leads now: nobody knows who has acknowledged what")
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	return n.peers.Gate(ctx, leader)
}

// waitingFor says who may not hold an authority yet. A member that does not report
// counts: nobody knows what its subscribers hold. Other domains are assumed to hold it
// three of our refresh hints after it was published.
func (n *Node) waitingFor(v gateView, a *statev1.Authority, now time.Time) (waiting, assumed []string) {
	for _, m := range v.members {
		var acknowledged uint64
		var who []string
		var settled bool
		if m.GetId() == n.own.id {
			status := n.status()
			acknowledged, who, settled = status.Acknowledged, status.WaitingFor, n.settled()
		} else {
			r, ok := n.gate.last(m.GetId(), now)
			if !ok {
				waiting = append(waiting, "CA node "+m.GetName()+" does not report")
				continue
			}
			acknowledged, who, settled = r.Acknowledged, r.WaitingFor, r.Settled
		}
		switch {
		case !settled:
			waiting = append(waiting, "CA node "+m.GetName()+" started a moment ago")
		case acknowledged < a.GetPreparedRevision():
			waiting = append(waiting, fmt.Sprintf("CA node %s: %s", m.GetName(), strings.Join(who, ", ")))
		}
	}
	since := n.gate.since(a.GetId(), now)
	for _, peer := range v.peers {
		if since < 3*v.hint {
			waiting = append(waiting, "domain "+peer)
		} else {
			assumed = append(assumed, "domain "+peer)
		}
	}
	return waiting, assumed
}

// leaveBehind: one silent agent cannot stop rotation. Stragglers are waited for while
// the member's ACTIVE authority can still sign leaves of full length.
func leaveBehind(v gateView, a *statev1.Authority, now time.Time) bool {
	active, longest := v.active[ownedBy{a.GetMemberId(), a.GetUse()}], v.longest[a.GetUse()]
	return active != nil && time.Unix(active.GetNotAfter(), 0).Sub(now) < longest+longest/4
}
