package replica

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/raft"

	"github.com/entente-mesh/entente/ca/domain"
)

// Who votes in Raft follows from the agreed members, and those change only with the
// operators of a majority (ca/domain/membership.go). hashicorp/raft takes a membership
// entry from any leader and counts by it at once, so a lying leader could add voters of
// its own. A follower therefore holds each such entry against its own state first.

// configurationPatience is how long a membership entry may be ahead of this node's state:
// the leader proposes it when it has applied the change itself, and this node applies
// that with the commit index that comes along.
const configurationPatience = 2 * time.Second

// misfit is a membership entry that does not fit the state yet.
type misfit struct {
	index uint64
	since time.Time
}

// fits returns how many of a leader's entries Raft may see now: all of them, or those
// before a membership entry that the state does not bear out yet. After some patience
// that is an error.
func (l *leaderCheck) fits(peer string, entries []*raft.Log) (int, error) {
	applied := l.applied()
	for i, e := range entries {
		if e.Index <= applied {
			continue
		}
		err := l.checkMembership(e)
		if err == nil {
			continue
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		m := l.misfits[peer]
		if m.index != e.Index {
			m = misfit{e.Index, time.Now()}
			if l.misfits == nil {
				l.misfits = map[string]misfit{}
			}
			l.misfits[peer] = m
		}
		if time.Since(m.since) > configurationPatience {
			return 0, err
		}
		return i, nil
	}
	return len(entries), nil
}

// checkMembership says how a membership entry differs from the agreed members; nil for
// other entries, and while this node has no state to go by.
func (l *leaderCheck) checkMembership(e *raft.Log) (err error) {
	switch e.Type {
	case raft.LogCommand, raft.LogNoop, raft.LogBarrier:
		return nil
	case raft.LogConfiguration:
	default:
		return fmt.Errorf("log entry %d is of a kind that no leader of this release writes", e.Index)
	}
	defer func() { // the library panics over what it cannot decode
		if recover() != nil {
			err = fmt.Errorf("the members in log entry %d cannot be read", e.Index)
		}
	}()
	next := raft.DecodeConfiguration(e.Data).Servers
	before := l.configuration()
	l.read(func(st *domain.State) {
		if st.Cluster() != nil {
			err = membershipFits(st, before, next)
		}
	})
	return err
}

// membershipFits says where Raft's next membership is not what the state's members allow.
func membershipFits(st *domain.State, before, next []raft.Server) error {
	var errs []error
	for _, s := range next {
		m, ok := st.Member(string(s.ID))
		switch {
		case !ok:
			errs = append(errs, fmt.Errorf("it adds %.12s, which is not an agreed CA node", s.ID))
		case s.Suffrage == raft.Voter && !m.GetVoter():
			errs = append(errs, fmt.Errorf("it lets CA node %s vote, which is not agreed", m.GetName()))
		}
	}
	for _, s := range before {
		m, ok := st.Member(string(s.ID))
		i := slices.IndexFunc(next, func(n raft.Server) bool { return n.ID == s.ID })
		switch {
		case !ok:
		case i < 0:
			errs = append(errs, fmt.Errorf("it removes CA node %s, which is not agreed", m.GetName()))
		case s.Suffrage == raft.Voter && next[i].Suffrage != raft.Voter:
			errs = append(errs, fmt.Errorf("it takes the vote of CA node %s away, which is not agreed", m.GetName()))
		}
	}
	return errors.Join(errs...)
}
