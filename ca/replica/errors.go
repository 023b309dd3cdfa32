package replica

import (
	"errors"
	"fmt"
)

// Errors that callers branch on. Each says whether the proposal can have been
// committed: after ErrNotLeader, ErrNoQuorum and ErrTooLarge it was not; after
// ErrOutcomeUnknown and ErrStopped it may have been.
var (
	// ErrNoQuorum: nobody leads, as far as this node knows. Nothing was proposed.
	ErrNoQuorum = errors.New("no CA node leads at the moment, so nothing can be agreed; what was agreed goes on working")

	// ErrOutcomeUnknown: the proposal was handed to Raft, and leadership, the node or
	// the caller's patience ended before its answer came. It may still be committed.
	// Repeat it: commands are built to be repeatable (tokens) or guarded (if_revision).
	ErrOutcomeUnknown = errors.New("it is not known whether the command was agreed")

	// ErrStopped: this replica no longer takes part in Raft (closed, removed from the
	// cluster, or its disk failed; Err tells which). Read goes on from memory.
	ErrStopped = errors.New("this node no longer takes part in agreement")

	// ErrRemoved: the cluster removed this node. Run returns it.
	ErrRemoved = errors.New("this node was removed from its CA cluster")

	// ErrSuperseded: the cluster was recovered from another node while this one was away.
	// Open and Run return it.
	ErrSuperseded = errors.New("this node's epoch is over, its cluster was recovered without it: wipe its data directory and join it anew")

	// ErrRewrites: the leader would have this node replace entries that it has applied.
	// Run returns it: what this node has said since may differ from what the leader now
	// has others agree to.
	ErrRewrites = errors.New("the leader replaces log entries that this node has applied: look for who controls the leader, remove it as compromised, then start this node again")

	// ErrDisk: the log or a snapshot could not be written in time. Err returns it.
	ErrDisk = errors.New("the disk under the log failed or stalled")

	// ErrStuck: this node hears its leader and gets no entries. Reenter's cause.
	ErrStuck = errors.New("this node was not replicated to any more")

	// ErrForgetful: the log on the disk ends before what this node confirmed to others.
	ErrForgetful = errors.New("the disk lost a part of the log that was confirmed to the others: remove this node from the cluster, wipe it and join it anew")

	// ErrDiverged: this node's state is not what a majority holds. Open and Run return it.
	ErrDiverged = errors.New("this node's state differs from that of a majority of the voters: remove this node from the cluster, keep its directory for whoever looks for the cause, and join it anew with an empty one")

	// ErrTooLarge: one command is larger than a log entry may be. Propose it in parts.
	ErrTooLarge = fmt.Errorf("the command is larger than a log entry may be (%d bytes): split it", maxEntry)

	// ErrStateExists: the directory already holds a member's state.
	ErrStateExists = errors.New("this directory already holds the state of a CA node")

	// ErrNoState: the directory holds no member's state.
	ErrNoState = errors.New("this directory holds no CA node: initialise a cluster or join one first")

	// ErrBehind: a server must first catch up; see AddVoter.
	ErrBehind = errors.New("not caught up yet")
)

// ErrNotLeader is returned for what only the leader can do. Nothing was proposed.
type ErrNotLeader struct {
	LeaderID string // node id of the leader as far as known; never empty from Propose
}

func (e ErrNotLeader) Error() string {
	if e.LeaderID == "" {
		return "this node does not lead"
	}
	return "this node does not lead: ask " + e.LeaderID
}
