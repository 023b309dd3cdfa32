package replica

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
)

// More of a replica's files, beside those of start.go:
//
//	raft.next/            a recovered state, complete; it takes the place of raft/
//	raft.before-N/        what a recovery replaced; nobody reads it, operators may delete it
//	raft/superseded.json  the cluster was recovered from another node: this one stops
const (
	stateNext      = "raft.next"
	stateBefore    = "raft.before-"
	supersededFile = "superseded.json"
)

var keyCurrentTerm = []byte("CurrentTerm") // Raft's name for it in the stable store

// Survey is what a stopped node's disk holds: everything in its log, agreed or not. A
// recovery keeps all of it, since what this node holds may have been acknowledged.
type Survey struct {
	Cluster  *statev1.Cluster
	Members  []*statev1.Member
	Revision uint64
	Agreed   uint64 // log index up to which this node knows that it was agreed
	Last     uint64 // of the log
	Term     uint64 // of the last entry: of two survivors, the one with the higher (Term, Last) has more
	// Time is the agreed time of the last Tick in the log: what was agreed later may
	// be lost. Zero: no Tick.
	Time time.Time
}

// Look reads a stopped node's state. It writes nothing but finishes a recovery that was
// interrupted.
func Look(cfg Config) (Survey, error) {
	if err := cfg.complete(); err != nil {
		return Survey{}, fmt.Errorf("cannot look into the replica: %w", err)
	}
	rest, err := rested(&cfg)
	if err != nil {
		return Survey{}, fmt.Errorf("cannot look into the replica in %s: %w", cfg.Dir, err)
	}
	return rest.survey, nil
}

// remains is what a stopped node's disk came to.
type remains struct {
	survey Survey
	state  *domain.State
	term   uint64 // the highest that the node has voted in or seen
}

// rested loads the whole log, also what is not known to be agreed.
func rested(cfg *Config) (_ *remains, err error) {
	if !Exists(cfg.Dir) {
		return nil, ErrNoState
	}
	if err := settle(cfg); err != nil {
		return nil, err
	}
	dir := filepath.Join(cfg.Dir, stateDir)
	if err := errors.Join(superseded(dir), diverged(dir)); err != nil {
		return nil, err
	}
	f := &fsm{self: cfg.NodeID, state: domain.New()}
	st, err := openBolt(filepath.Join(dir, logFile), f.applied.Load)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	files, err := raft.NewFileSnapshotStoreWithLogger(dir, keptSnapshots, newLogger(cfg.Log))
	if err != nil {
		return nil, err
	}
	if err := load(dir, st, files, f, cfg.Log, 0); err != nil {
		return nil, err
	}
	r := &remains{}
	r.survey.Agreed = f.applied.Load()
	if metas, err := files.List(); err != nil {
		return nil, err
	} else if len(metas) > 0 {
		r.survey.Last, r.survey.Term = metas[0].Index, metas[0].Term
	}
	last, err := st.LastIndex()
	if err != nil {
		return nil, err
	}
	for index := r.survey.Agreed + 1; index <= last; index++ {
		var entry raft.Log
		if err := st.GetLog(index, &entry); err != nil {
			return nil, fmt.Errorf("cannot read log entry %d: %w: recover from another node, or from a backup", index, err)
		}
		if entry.Type != raft.LogCommand {
			continue
		}
		if _, err := f.apply(index, entry.Data, nil); err != nil {
			return nil, err
		}
	}
	if last > 0 {
		var entry raft.Log
		if err := st.GetLog(last, &entry); err != nil {
			return nil, err
		}
		r.survey.Last, r.survey.Term = last, entry.Term
	}
	if r.term, err = st.GetUint64(keyCurrentTerm); err != nil && !errors.Is(err, errAbsent) {
		return nil, err
	}
	err = nil
	r.term = max(r.term, r.survey.Term)
	r.state = f.state
	r.survey.Cluster, r.survey.Members = f.state.Cluster(), f.state.Members()
	r.survey.Revision, r.survey.Time = f.state.Revision(), f.state.Now()
	if r.survey.Cluster == nil {
		return nil, errors.New("this node never received the cluster's state: recover from another node, or from a backup")
	}
	return r, nil
}

// Recover makes a stopped node the only member of its cluster in a new epoch. Everything
// in its log is kept, agreed or not; what other members agreed to without it is lost.
// decide gets what the node holds and returns the statement of the recovery key and this
// node's record. It may be repeated after a crash: either nothing has happened, or the
// next Open, Look or Recover completes it.
func Recover(cfg Config, decide func(Survey) (*statev1.Recovery, *statev1.Member, error)) (Survey, error) {
	fail := func(err error) (Survey, error) {
		return Survey{}, fmt.Errorf("cannot recover the cluster from %s: %w", cfg.Dir, err)
	}
	if err := cfg.complete(); err != nil {
		return fail(err)
	}
	rest, err := rested(&cfg)
	if err != nil {
		return fail(err)
	}
	recovery, member, err := decide(rest.survey)
	if err != nil {
		return fail(err)
	}
	index := max(rest.survey.Last, rest.state.Applied()) + 1
	if err := rest.state.Recover(index, member, recovery); err != nil {
		return fail(err)
	}
	fresh := filepath.Join(cfg.Dir, stateNew)
	if err := os.RemoveAll(fresh); err != nil {
		return fail(err)
	}
	if err := os.Mkdir(fresh, 0o700); err != nil {
		return fail(err)
	}
	if err := found(&cfg, fresh, rest.state, index, rest.term+1); err != nil {
		os.RemoveAll(fresh)
		return fail(err)
	}
	if err := os.Rename(fresh, filepath.Join(cfg.Dir, stateNext)); err != nil {
		return fail(err)
	}
	if err := syncDir(cfg.Dir); err != nil {
		return fail(err)
	}
	if err := settle(&cfg); err != nil {
		return fail(err)
	}
	return rest.survey, nil
}

// Restore makes an empty Dir the only member of a cluster in a new epoch, with the state
// of a snapshot. state is given away. It refuses with ErrStateExists if Dir holds a
// member.
func Restore(cfg Config, state *domain.State, member *statev1.Member, recovery *statev1.Recovery) error {
	fail := func(err error) error {
		return fmt.Errorf("cannot restore the cluster into %s: %w", cfg.Dir, err)
	}
	if err := cfg.complete(); err != nil {
		return fail(err)
	}
	if member.GetId() != cfg.NodeID {
		return fail(fmt.Errorf("the member is %.12s, but this node is %.12s", member.GetId(), cfg.NodeID))
	}
	if Exists(cfg.Dir) {
		return fail(ErrStateExists)
	}
	index := state.Applied() + 1
	if err := state.Recover(index, member, recovery); err != nil {
		return fail(err)
	}
	err := createState(&cfg, func(dir string) error {
		return found(&cfg, dir, state, index, 1)
	})
	if err != nil {
		return fail(err)
	}
	return nil
}

// found writes the files of a cluster of this node alone, whose log begins after index:
// a snapshot, read back before it counts, and an empty log.
func found(cfg *Config, dir string, state *domain.State, index, term uint64) error {
	files, err := raft.NewFileSnapshotStoreWithLogger(dir, keptSnapshots, newLogger(cfg.Log))
	if err != nil {
		return err
	}
	configuration := raft.Configuration{Servers: []raft.Server{{
		Suffrage: raft.Voter, ID: raft.ServerID(cfg.NodeID), Address: raft.ServerAddress(cfg.Advertise),
	}}}
	_, nowhere := raft.NewInmemTransport("") // the store wants one to encode addresses
	sealing := snapshots{files, filepath.Join(dir, snapshotDir), func(error) {}}
	sink, err := sealing.Create(raft.SnapshotVersionMax, index, term, configuration, index, nowhere)
	if err != nil {
		return fmt.Errorf("cannot create the snapshot: %w", err)
	}
	if err := (snapshot{state.Snapshot(), new(atomic.Uint64)}).Persist(sink); err != nil {
		return fmt.Errorf("cannot write the snapshot: %w", err)
	}
	metas, err := files.List()
	if err != nil || len(metas) != 1 {
		return fmt.Errorf("cannot find the snapshot that was written: %w", err)
	}
	read := &fsm{self: cfg.NodeID, state: domain.New()}
	if err := loadSnapshot(files, metas[0], read); err != nil {
		return fmt.Errorf("cannot read the snapshot that was written: %w", err)
	}
	if !bytes.Equal(read.state.Checksum(), state.Checksum()) {
		return errors.New("the snapshot that was written is not what was meant")
	}
	store, err := openBolt(filepath.Join(dir, logFile), func() uint64 { return 0 })
	if err != nil {
		return err
	}
	if err := errors.Join(store.SetUint64(keyCurrentTerm, term), store.Close()); err != nil {
		return err
	}
	return syncDir(dir)
}

// settle completes a recovery: a complete raft.next is the state.
func settle(cfg *Config) error {
	next, now := filepath.Join(cfg.Dir, stateNext), filepath.Join(cfg.Dir, stateDir)
	if _, err := os.Stat(next); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	if _, err := os.Stat(now); err == nil {
		before := ""
		for n := 1; before == ""; n++ {
			path := filepath.Join(cfg.Dir, fmt.Sprintf("%s%d", stateBefore, n))
			if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
				before = path
			}
		}
		if err := os.Rename(now, before); err != nil {
			return err
		}
	}
	if err := os.Rename(next, now); err != nil {
		return err
	}
	return syncDir(cfg.Dir)
}

// supersession is what superseded.json holds.
type supersession struct {
	Epoch      uint32 `json:"epoch"`
	MemberID   string `json:"member_id"`
	RecoveryID []byte `json:"recovery_id"`
}

// Supersede stops this node for good: the statement, which the cluster's recovery key
// signed, says that another one went on alone in a later epoch. What is agreed or
// signed here from now on would be no part of the cluster. Run returns ErrSuperseded,
// and so does every Open.
func (r *Replica) Supersede(statement, signature []byte) error {
	var cluster *statev1.Cluster
	r.Read(func(s *domain.State) { cluster = s.Cluster() })
	st, err := ca.VerifyRecovery(cluster, statement, signature)
	switch {
	case err != nil:
		return err
	case st.GetEpoch() < cluster.GetEpoch():
		return fmt.Errorf("epoch %d is over; this node is in epoch %d", st.GetEpoch(), cluster.GetEpoch())
	case st.GetEpoch() == cluster.GetEpoch() && bytes.Equal(st.GetRecoveryId(), ca.RecoveryID(cluster)):
		return nil
	case st.GetEpoch() == cluster.GetEpoch():
		r.log.Error("the cluster was recovered twice, from different nodes, to the same epoch: stop one of the two clusters, wipe its nodes and join them to the other",
			"epoch", st.GetEpoch(), "member_id", st.GetMemberId())
		return fmt.Errorf("the cluster was recovered twice to epoch %d", st.GetEpoch())
	}
	data, err := json.Marshal(supersession{Epoch: st.GetEpoch(), MemberID: st.GetMemberId(), RecoveryID: st.GetRecoveryId()})
	if err != nil {
		return err
	}
	dir := filepath.Join(r.cfg.Dir, stateDir)
	err = writeSynced(filepath.Join(dir, supersededFile), data)
	if errors.Is(err, fs.ErrExist) {
		err = nil
	}
	if err != nil {
		// It stops all the same; it will be shown the statement again after its restart.
		r.log.Error("cannot note that this node's epoch is over", "error", err)
	}
	r.leave(fmt.Errorf("%w: it goes on in epoch %d", ErrSuperseded, st.GetEpoch()), true)
	return nil
}

func superseded(dir string) error {
	data, err := os.ReadFile(filepath.Join(dir, supersededFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var s supersession
	if err := json.Unmarshal(data, &s); err != nil {
		return fmt.Errorf("%w (%s cannot be read: %w)", ErrSuperseded, supersededFile, err)
	}
	return fmt.Errorf("%w: it goes on in epoch %d, from node %.12s", ErrSuperseded, s.Epoch, s.MemberID)
}
