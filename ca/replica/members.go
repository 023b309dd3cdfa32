package replica

import (
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/entente-mesh/entente/ca/domain"
)

// Server is one member as Raft knows it.
type Server struct {
	ID      string
	Address string
	Voter   bool
	Self    bool

	// Match is the index up to which this server's log is known to equal the leader's;
	// Contact is when it last answered. Only a leader knows them; for the leader itself
	// they are its last index and now.
	Match   uint64
	Contact time.Time

	// Installing: the leader is sending it a snapshot.
	Installing bool
}

// Servers lists Raft's membership as this node knows it, agreed or about to be.
func (r *Replica) Servers() []Server {
	configuration := r.raft.GetConfiguration().Configuration()
	leader, term := r.IsLeader(), r.raft.CurrentTerm()
	servers := make([]Server, 0, len(configuration.Servers))
	for _, s := range configuration.Servers {
		server := Server{
			ID:      string(s.ID),
			Address: string(s.Address),
			Voter:   s.Suffrage == raft.Voter,
			Self:    string(s.ID) == r.cfg.NodeID,
		}
		switch {
		case leader && server.Self:
			server.Match, server.Contact = r.raft.LastIndex(), time.Now()
		case leader:
			server.Match, server.Contact = r.trans.progress(s.ID, term)
			server.Installing = r.trans.isInstalling(s.ID)
		}
		servers = append(servers, server)
	}
	return servers
}

func (r *Replica) voters() int {
	n := 0
	for _, s := range r.Servers() {
		if s.Voter {
			n++
		}
	}
	return n
}

// AddNonvoter begins to replicate to a member; it counts in no majority. Leader only.
// The member must stand in the state already, or its connections are refused.
func (r *Replica) AddNonvoter(ctx context.Context, id, address string) error {
	err := r.change(ctx, func() raft.Future {
		return r.raft.AddNonvoter(raft.ServerID(id), raft.ServerAddress(address), 0, enqueueTimeout)
	})
	if err != nil {
		return fmt.Errorf("cannot replicate to %s at %s: %w", id, address, err)
	}
	return nil
}

// voterLag is how many entries a joiner may lack when it becomes a voter.
const voterLag = 64

// AddVoter makes a member count in majorities. Leader only.
//
// It refuses with ErrBehind while the member lags, since the cluster would stand still
// until it caught up, and while another voter that answers lacks the entries that make
// the member known: such a voter would refuse the new one's connections, and if the
// leader died then, the two could not elect. One that does not answer has the newcomer
// vouched for when it is back; without Config.Vouch it is waited for, too.
func (r *Replica) AddVoter(ctx context.Context, id, address string) error {
	if err := r.leading(); err != nil {
		return err
	}
	last := r.raft.LastIndex()
	admitted := r.disk.newestConfig.Load() // its AddNonvoter is no later than this
	known := false
	for _, s := range r.Servers() {
		switch {
		case s.ID == id && s.Voter && s.Address == address:
			return nil
		case s.ID == id && (s.Match < admitted || s.Match+voterLag < last):
			return fmt.Errorf("cannot make %s a voter: %w: it holds %d of %d log entries", id, ErrBehind, s.Match, last)
		case s.ID == id:
			known = true
		case s.Voter && s.Match < admitted && (r.cfg.Vouch == nil || time.Since(s.Contact) < 2*r.cfg.Timing.heartbeat()):
			return fmt.Errorf("cannot make %s a voter: %w: voter %s does not know of it yet", id, ErrBehind, s.ID)
		}
	}
	if !known {
		return fmt.Errorf("cannot make %s a voter: %w: it has to be a non-voter first", id, ErrBehind)
	}
	err := r.change(ctx, func() raft.Future {
		return r.raft.AddVoter(raft.ServerID(id), raft.ServerAddress(address), 0, enqueueTimeout)
	})
	if err != nil {
		return fmt.Errorf("cannot make %s a voter: %w", id, err)
	}
	return nil
}

// RemoveServer ends replication to a member and its vote. Leader only. Raft refuses to
// remove the last voter. A leader that removes itself leaves; better hand over first.
// A member that answers first gets the log as it is, so that it learns of its removal.
func (r *Replica) RemoveServer(ctx context.Context, id string) error {
	r.tell(ctx, id)
	err := r.change(ctx, func() raft.Future {
		return r.raft.RemoveServer(raft.ServerID(id), 0, enqueueTimeout)
	})
	if err != nil {
		return fmt.Errorf("cannot remove %s: %w", id, err)
	}
	return nil
}

// tell waits until a member holds the present log, as long as it answers, but no longer
// than its connections stay. Raft sends a removed follower its last entries only if it
// does not lag.
func (r *Replica) tell(ctx context.Context, id string) {
	last := r.raft.LastIndex()
	for end := time.Now().Add(r.cfg.farewell); time.Now().Before(end); {
		servers := r.Servers()
		at := slices.IndexFunc(servers, func(s Server) bool { return s.ID == id && !s.Self })
		if at < 0 {
			return
		}
		if s := servers[at]; s.Match >= last || time.Since(s.Contact) > 2*r.cfg.Timing.heartbeat() {
			return
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return
		case <-r.down:
			return
		}
	}
}

// TransferLeadership hands leadership to the most current other voter.
func (r *Replica) TransferLeadership(ctx context.Context) error {
	err := r.change(ctx, func() raft.Future { return r.raft.LeadershipTransfer() })
	if err != nil {
		return fmt.Errorf("cannot hand leadership over: %w", err)
	}
	return nil
}

// TransferLeadershipTo hands leadership to that voter.
func (r *Replica) TransferLeadershipTo(ctx context.Context, id, address string) error {
	err := r.change(ctx, func() raft.Future {
		return r.raft.LeadershipTransferToServer(raft.ServerID(id), raft.ServerAddress(address))
	})
	if err != nil {
		return fmt.Errorf("cannot hand leadership to %s: %w", id, err)
	}
	return nil
}

func (r *Replica) change(ctx context.Context, begin func() raft.Future) error {
	if err := r.leading(); err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- begin().Error() }() // ends with the answer, or with Raft
	select {
	case err := <-done:
		if err != nil {
			return r.explain(err)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", ErrOutcomeUnknown, context.Cause(ctx))
	case <-r.down:
		return fmt.Errorf("%w: %w", ErrOutcomeUnknown, r.stopped())
	}
}

// roster decides who may connect. It asks, in this order of trust:
//
//   - the state's member table;
//   - Raft's newest membership, as long as the state has not applied so far: a voter
//     needs the votes of members that it has learned of but whose joining it cannot know
//     to be agreed;
//   - the list that a joiner was given, until the joiner finds itself in the state;
//   - what a majority of the voters that this node knows say of a node that knocks.
type roster struct {
	self string
	fsm  *fsm
	disk *disk

	running *atomic.Pointer[raft.Raft] // nil before Raft runs

	joining []joinMember // immutable
	vouched *vouched     // nil: nobody is asked
}

// voter says whether id may open connections to this node: only voters do, and those
// who were admitted to become one.
func (l *roster) voter(id string) bool {
	known, voter, _ := l.find(id)
	return known && voter
}

// find looks a member up. address may be empty.
func (l *roster) find(id string) (known, voter bool, address string) {
	if id == l.self {
		return false, false, ""
	}
	joined, applied := false, uint64(0)
	l.fsm.read(func(s *domain.State) {
		applied = l.fsm.applied.Load()
		_, joined = s.Member(l.self)
		if m, ok := s.Member(id); ok {
			known, voter, address = true, m.GetVoter(), m.GetRaftAddress()
		}
	})
	if started := l.running.Load(); started != nil {
		for _, s := range started.GetConfiguration().Configuration().Servers {
			if string(s.ID) != id {
				continue
			}
			if !known && l.disk.newestConfig.Load() > applied {
				known, address = true, string(s.Address)
			}
			voter = voter || s.Suffrage == raft.Voter
		}
	}
	if !known && !joined {
		for _, m := range l.joining {
			if m.ID == id {
				return true, m.Voter, m.Address
			}
		}
	}
	if !known && joined {
		if m := l.vouched.member(id); m != nil {
			return true, true, m.GetRaftAddress()
		}
	}
	return known, known && voter, address
}
