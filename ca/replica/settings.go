package replica

import (
	"time"

	"github.com/hashicorp/raft"
)

const (
	maxEntry = 64 << 10 // bytes of one log entry, as the design says

	// Log and snapshots. A snapshot is taken after so many entries, or when the log since
	// the last one has half its size: applying a byte again at start costs about as much as
	// restoring three. The bounds keep a small state from being written all the time, and
	// the restart of a large one short. After it so much stays that a member that was away
	// a while, or is given a snapshot of a million entries, gets entries next.
	snapshotEntries = 32 << 10
	snapshotBytes   = 8 << 20
	snapshotMost    = 32 << 20
	trailingEntries = 64 << 10
	trailingBytes   = 64 << 20
	trailingLeast   = 1 << 10 // however large the entries are

	cacheBytes = 16 << 20

	keptSnapshots = 2

	// rpcTimeout bounds one exchange between members. It must bear a slow disk of the
	// other side (whose own watchdog gives up after 2 s); a dead process is noticed by
	// its closed connections, not by this.
	rpcTimeout = 10 * time.Second

	// dialTimeout bounds connecting and the TLS handshake, so that an unreachable
	// datacenter does not hold a replication goroutine for rpcTimeout.
	dialTimeout = 3 * time.Second

	// farewell is how long the open connections of a removed member stay: long enough to
	// tell it that its removal is agreed, short enough for I4. New ones are refused at once.
	farewell = 750 * time.Millisecond
)

// raftConfig is every setting of the library, each with its reason.
func raftConfig(cfg *Config) *raft.Config {
	beat := cfg.Timing.heartbeat()
	return &raft.Config{
		ProtocolVersion: raft.ProtocolVersionMax,
		LocalID:         raft.ServerID(cfg.NodeID), // the key's, so an address may change
		Logger:          newLogger(cfg.Log),

		// A killed leader is replaced after about 2 x heartbeat. The lease is half of it:
		// a leader that lost its majority stops before another can be elected.
		HeartbeatTimeout:   beat,
		ElectionTimeout:    beat,
		LeaderLeaseTimeout: beat / 2,
		// Carries the commit index to idle followers; also the pace of the heartbeat-less
		// replication round, so it bounds how long a follower lags on a quiet cluster.
		CommitTimeout: min(50*time.Millisecond, beat/4),

		// Pre-vote: a member that comes back from a partition must not depose a good leader.
		PreVoteDisabled: false,

		// 64 entries of 64 KiB are 4 MiB per exchange: a bound on memory and on how long
		// one exchange blocks a thin line. Group commit gives 16 Ki commands within it.
		MaxAppendEntries: 64,
		// Not buffered: what lies in the buffer when Raft shuts down is never answered. The
		// entries that fly at once (batchesFlying) share a disk write all the same.
		BatchApplyCh: false,

		SnapshotThreshold: snapshotEntries,
		SnapshotInterval:  time.Minute, // the check costs nothing
		TrailingLogs:      trailingEntries,

		// The replica loads snapshot and agreed tail itself before Raft starts (load).
		NoSnapshotRestoreOnStart: true,
		// Version 1.8.0 does not scan configuration entries below the commit index, hangs
		// with a long tail and refuses a log cache.
		RestoreCommittedLogs: false,

		// A removed leader must not go on as a cluster of its own.
		ShutdownOnRemove: true,
		// Metric names with the peer in them are duplicates of labelled ones.
		NoLegacyTelemetry: true,
	}
}
