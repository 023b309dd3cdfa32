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
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/replica"
	"github.com/entente-mesh/entente/ca/rotation"
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
		term := n.replica.Load().Term()
		for n.replica.Load().Barrier(ctx) != nil {
			if sleep(ctx, 50*time.Millisecond) != nil {
				return
			}
			term = n.replica.Load().Term()
		}
		n.ledTerm.Store(term)
		n.gate.reset()
		duties.Go(func() { n.keepTicking(ctx) })
		duties.Go(func() { n.keepGate(ctx) })
		duties.Go(func() { n.keepMembers(ctx) })
		duties.Go(func() { n.keepFollowing(ctx, n.storeForeign) })
		duties.Go(func() { n.keepShowing(ctx) })
		duties.Go(func() { n.keepWitness(ctx) })
		duties.Go(func() { n.keepComparing(ctx) })
	})
	return func() {
		cancel()
		duties.Wait()
	}
}

// knows tells whether this node leads and has applied what was agreed before it did: its
// state holds every change that anybody was told of.
func (n *Node) knows() bool {
	r := n.replica.Load()
	return r.IsLeader() && r.Term() == n.ledTerm.Load()
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
		for n.tick(ctx) {
		}
		if sleep(ctx, tickEvery) != nil {
			return
		}
	}
}

// tick sends one Tick. It reports whether the agreed time lacks more than one step, after
// a long time without quorum: then the next one is due at once.
func (n *Node) tick(ctx context.Context) (again bool) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	now := time.Now()
	voters, rejecting := 0, 0
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
			if r.Rejects == n.own.id {
				rejecting++
			}
		}
	}
	if len(samples) < voters/2+1 {
		return false // one clock alone, or half of them, sets nobody's time
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
	if rejecting > (voters-1)/2 {
		n.log.Error("the other CA nodes reject this leader's time: handing leadership over; check this node's clock", "rejecting", rejecting, "voters", voters)
		n.replica.Load().TransferLeadership(ctx)
		return false
	}
	if against >= voters/2+1 {
		median := time.Unix(0, samples[(len(samples)-1)/2])
		n.log.Error("this node's clock is off the other CA nodes': another one leads; set the clock", "offset", wall.Sub(median).String())
		n.replica.Load().TransferLeadership(ctx)
		return false
	}
	command := &statev1.Tick{UnixNanos: samples}
	outcome, err := n.replica.Load().Propose(ctx, n.byItself(&statev1.Command{Body: &statev1.Command_Tick{Tick: command}}))
	if err == nil && outcome.Refused != nil {
		n.log.Error("a tick was refused", "error", outcome.Refused)
	}
	if err != nil || outcome.Refused != nil {
		return false
	}
	n.Read(func(st *domain.State) {
		again = time.Unix(0, domain.TickTime(command)).Sub(st.Now()) > domain.MaxTickStep/2
	})
	return again
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
	reports map[string]reported // by member id
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

// forget drops the report of a member that is none any more.
func (g *gate) forget(member string) {
	g.mu.Lock()
	delete(g.reports, member)
	g.mu.Unlock()
	g.changed.tell()
}

// reset begins a leadership: what members said to the leader before does not count.
func (g *gate) reset() {
	g.mu.Lock()
	defer g.mu.Unlock()
	clear(g.reports)
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

func (n *Node) gateView() (v rotation.View) {
	n.Read(func(st *domain.State) { v = rotation.Look(st) })
	return v
}

// reports are the members' words that count now, this node's own among them.
func (n *Node) reports() rotation.Reports {
	now, own := time.Now(), n.report()
	return func(member string) (rotation.Report, bool) {
		if member == n.own.id {
			return gateReport(own), true
		}
		r, ok := n.gate.last(member, now)
		return gateReport(r.Report), ok
	}
}

func gateReport(r server.Report) rotation.Report {
	out := rotation.Report{Applied: r.Applied, Acknowledged: r.Acknowledged, Settled: r.Settled, Held: r.Held}
	for _, b := range r.WaitingFor {
		out.WaitingFor = append(out.WaitingFor, rotation.Behind(b))
	}
	return out
}

func (n *Node) stepGate(ctx context.Context, said map[string]string) {
	v := n.gateView()
	reports := n.reports()
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
					n.log.Error("an authority should be in use by now, and not everybody holds it: see who is waited for, and mend or remove it; else it is left behind when the one before cannot sign full-length SVIDs any more",
						"authority", a.GetId(), "waiting_for", text)
				}
			case said[a.GetId()] != text:
				said[a.GetId()] = text
				n.log.Debug("an authority waits until everybody holds it", "authority", a.GetId(), "waiting_for", text)
			}
			continue
		}
		if len(waiting) > 0 {
			n.log.Error("an authority is used although not everybody holds it: the one before ends", "authority", a.GetId(), "left_behind", waiting)
		}
		assumed = append(assumed, waiting...)
		if _, err := n.markReady(ctx, a, assumed, ""); err == nil {
			delete(said, a.GetId())
			n.log.Info("everybody holds the authority", "authority", a.GetId(), "assumed", assumed)
		}
	}
	n.overdue.Store(int64(overdue))
	for _, a := range v.Tainted {
		holding, silent := v.Holding(a, reports)
		if len(holding)+len(silent) > 0 && !v.Ended(a) {
			continue
		}
		assumed := append(holding, silent...)
		if _, err := n.mark(ctx, a, &statev1.Command{Body: &statev1.Command_AuthorityDrained{AuthorityDrained: &statev1.AuthorityDrained{Id: a.GetId(), Assumed: assumed}}}); err == nil {
			n.log.Info("nobody has an SVID under the tainted authority any more: it can be revoked", "authority", a.GetId(), "assumed", assumed)
		}
	}
}

func (n *Node) markReady(ctx context.Context, a *statev1.Authority, assumed []string, who string) (revision uint64, err error) {
	return n.mark(ctx, a, &statev1.Command{Actor: who, ActorKind: statev1.ActorKind_ACTOR_KIND_OPERATOR, Body: &statev1.Command_AuthorityReady{AuthorityReady: &statev1.AuthorityReady{Id: a.GetId(), Assumed: assumed}}})
}

// mark has the outcome of a gate agreed; an operator's, if the command says so.
func (n *Node) mark(ctx context.Context, a *statev1.Authority, command *statev1.Command) (revision uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if command.Actor == "" {
		n.byItself(command)
	}
	outcome, err := n.replica.Load().Propose(ctx, command)
	if err != nil {
		n.log.Debug("what is known of an authority could not be agreed; trying again", "authority", a.GetId(), "error", err)
		return 0, err
	}
	n.audit.Command(command, outcome, nil)
	if outcome.Refused != nil {
		n.log.Warn("what is known of an authority was refused", "authority", a.GetId(), "error", outcome.Refused)
		return 0, outcome.Refused
	}
	return outcome.Revision, nil
}

// markExcluding marks an authority as ready without the word of members that do not
// report, because an operator said so.
func (n *Node) markExcluding(ctx context.Context, id string, exclude []string, who string) (revision uint64, err error) {
	if !n.IsLeader() {
		return 0, server.ErrNotLeader
	}
	v, reports := n.gateView(), n.reports()
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
	n.log.Warn("an authority is marked ready without the word of CA nodes that an operator excluded", "authority", id, "excluded", exclude, "administrator", who)
	return n.markReady(ctx, v.Pending[i], assumed, who)
}

// askMarkExcluding asks the leader, wherever it is, and waits until this node knows.
func (n *Node) askMarkExcluding(ctx context.Context, id string, exclude []string, who string) error {
	revision, err := n.markExcluding(ctx, id, exclude, who)
	if errors.Is(err, server.ErrNotLeader) {
		leader := n.leader()
		if leader == nil {
			return errors.New("no CA node leads now: nobody knows who has acknowledged what")
		}
		revision, err = n.peers.MarkReady(ctx, leader, id, exclude, who)
	}
	if err != nil {
		return err
	}
	return n.reach(ctx, revision)
}

// localGate says who stands between each authority and its next phase. Only the leader
// hears everybody.
func (n *Node) localGate() (map[string]server.Gate, error) {
	if !n.IsLeader() {
		return nil, server.ErrNotLeader
	}
	v, reports := n.gateView(), n.reports()
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
