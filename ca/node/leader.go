package node

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
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

// leadership is what one node does for all, while it leads.
type leadership struct {
	*core
	gate        *gate
	following   *following
	comparisons *comparisons
	swapped     *broadcast // another replica took the place of a failed one
}

// run does the leader's duties while this node leads.
func (l *leadership) run(ctx context.Context) error {
	stop := func() {}
	defer func() { stop() }()
	for {
		swapped := l.swapped.wait()
		select {
		case <-swapped:
			// The replica of before said goodbye already, or nobody heard it.
			stop()
			stop = func() {}
		case leads := <-l.replica.Load().LeaderCh():
			stop()
			stop = func() {}
			if leads {
				l.log.Info("this node leads its CA cluster")
				stop = l.lead(ctx)
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// lead starts the duties; stop ends them and waits.
func (l *leadership) lead(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var duties sync.WaitGroup
	duties.Go(func() {
		// What was agreed before this leadership must be applied first.
		term := l.replica.Load().Term()
		for l.replica.Load().Barrier(ctx) != nil {
			if sleep(ctx, 50*time.Millisecond) != nil {
				return
			}
			term = l.replica.Load().Term()
		}
		l.ledTerm.Store(term)
		l.gate.reset()
		duties.Go(func() { l.keepTicking(ctx) })
		duties.Go(func() { l.gate.keep(ctx) })
		duties.Go(func() { l.keepMembers(ctx) })
		duties.Go(func() { l.following.keep(ctx, l.following.store) })
		duties.Go(func() { l.keepShowing(ctx) })
		duties.Go(func() { l.keepWitness(ctx) })
		duties.Go(func() { l.comparisons.keep(ctx) })
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
func (l *leadership) keepTicking(ctx context.Context) {
	for {
		for l.tick(ctx) {
		}
		if sleep(ctx, tickEvery) != nil {
			return
		}
	}
}

// tick sends one Tick. It reports whether the agreed time lacks more than one step, after
// a long time without quorum: then the next one is due at once.
func (l *leadership) tick(ctx context.Context) (again bool) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	now := time.Now()
	voters, rejecting := 0, 0
	var samples []int64
	for _, s := range l.replica.Load().Servers() {
		if !s.Voter {
			continue
		}
		voters++
		if s.Self {
			samples = append(samples, l.wall().UnixNano())
		} else if r, ok := l.gate.last(s.ID, now); ok {
			samples = append(samples, r.Clock.Add(now.Sub(r.at)).UnixNano())
			if r.Rejects == l.own.id {
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
	wall, against := l.wall(), 0
	for _, sample := range samples {
		if wall.Sub(time.Unix(0, sample)).Abs() > maxLeaderOffset {
			against++
		}
	}
	if rejecting > (voters-1)/2 {
		l.log.Error("the other CA nodes reject this leader's time: handing leadership over; check this node's clock", "rejecting", rejecting, "voters", voters)
		l.replica.Load().TransferLeadership(ctx)
		return false
	}
	if against >= voters/2+1 {
		median := time.Unix(0, samples[(len(samples)-1)/2])
		l.log.Error("this node's clock is off the other CA nodes': another one leads; set the clock", "offset", wall.Sub(median).String())
		l.replica.Load().TransferLeadership(ctx)
		return false
	}
	command := &statev1.Tick{UnixNanos: samples}
	outcome, err := l.replica.Load().Propose(ctx, l.byItself(&statev1.Command{Body: &statev1.Command_Tick{Tick: command}}))
	if err == nil && outcome.Refused != nil {
		l.log.Error("a tick was refused", "error", outcome.Refused)
	}
	if err != nil || outcome.Refused != nil {
		return false
	}
	l.Read(func(st *domain.State) {
		again = time.Unix(0, domain.TickTime(command)).Sub(st.Now()) > domain.MaxTickStep/2
	})
	return again
}

// keepMembers makes Raft's membership what was agreed: a newcomer replicates first and
// votes when it has caught up.
func (l *leadership) keepMembers(ctx context.Context) {
	said := ""
	for {
		changed := l.applied.wait()
		err := l.stepMembers(ctx)
		switch {
		case err == nil:
			said = ""
		case ctx.Err() == nil && err.Error() != said:
			said = err.Error()
			l.log.Info("Raft's membership is not what was agreed yet; trying again", "error", err)
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

func (l *leadership) stepMembers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	r := l.replica.Load()
	var members []*statev1.Member
	l.Read(func(st *domain.State) { members = st.Members() })
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
				l.log.Info("a CA node votes from now on", "member", m.GetName())
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
		l.peers.Forget(id)
	}
	return errors.Join(errs...)
}

// keepWitness hands leadership to a node that signs, if this one does not: a witness has
// a small machine.
func (l *leadership) keepWitness(ctx context.Context) {
	for {
		l.stepWitness(ctx)
		if sleep(ctx, time.Second) != nil {
			return
		}
	}
}

func (l *leadership) stepWitness(ctx context.Context) {
	signing := make(map[string]string) // address by id
	own := true
	l.Read(func(st *domain.State) {
		for _, m := range st.Members() {
			if m.GetId() == l.own.id {
				own = m.GetSigning()
			} else if m.GetSigning() {
				signing[m.GetId()] = m.GetRaftAddress()
			}
		}
	})
	if own {
		return
	}
	r := l.replica.Load()
	var best *replica.Server
	for _, s := range r.Servers() {
		if signing[s.ID] == "" || !s.Voter || time.Since(s.Contact) > time.Second {
			continue
		}
		if best == nil || s.Match > best.Match {
			best = &s
		}
	}
	if best == nil {
		return // it leads rather than nobody
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := r.TransferLeadershipTo(ctx, best.ID, best.Address); err != nil {
		l.log.Info("this witness leads and could not hand over yet", "member_id", best.ID, "error", err)
	}
}

// showEvery is how often a leader looks for the nodes that a recovery left behind.
const showEvery = 5 * time.Second

// keepShowing shows everybody whom the recovery left behind how this epoch began, until
// they have stopped or their authorities are revoked.
func (l *leadership) keepShowing(ctx context.Context) {
	shown := make(map[string]bool)
	for {
		var recovery *statev1.Recovery
		l.Read(func(st *domain.State) { recovery = st.Cluster().GetRecovery() })
		for _, m := range recovery.GetAbsent() {
			if shown[m.GetId()] {
				continue
			}
			callCtx, cancel := context.WithTimeout(ctx, 2*time.Second)
			err := server.ShowEpoch(callCtx, m, recovery)
			cancel()
			if err == nil {
				shown[m.GetId()] = true
				l.log.Info("a CA node of the epoch before has stopped: wipe it and join it anew", "member", m.GetName())
			}
		}
		if sleep(ctx, showEvery) != nil {
			return
		}
	}
}
