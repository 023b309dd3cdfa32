package replica

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
)

// Files of a replica, in Config.Dir:
//
//	raft/log.db       log, vote, term, `committed`
//	raft/snapshots/   as hashicorp/raft lays them out, checksummed
//	raft/damaged/     snapshots that could not be read, moved away
//	raft/join.json    a joiner's list of members, until it finds itself in the state
//
// The directory is made under another name and renamed when it is complete, so an
// init or join that was interrupted leaves nothing that looks like a member.
const (
	stateDir   = "raft"
	stateNew   = "raft.new"
	logFile    = "log.db"
	damagedDir = "damaged"

	snapshotDir = "snapshots" // Raft's name for it
	joinFile    = "join.json"
)

// joinList is what a joiner knows before it has any state.
type joinList struct {
	ClusterID  []byte       `json:"cluster_id"`
	Epoch      uint32       `json:"epoch"`
	RecoveryID []byte       `json:"recovery_id,omitempty"`
	Members    []joinMember `json:"members"`
}

type joinMember struct {
	ID      string `json:"id"`
	Address string `json:"raft_address"`
	Voter   bool   `json:"voter"`
}

// Bootstrap makes Dir the first and only voter of a new cluster, whose first entry is
// init. It refuses with ErrStateExists if Dir holds a member already, and if the rules
// refuse init. Listener is not used.
func Bootstrap(cfg Config, init *statev1.Command) error {
	if err := cfg.complete(); err != nil {
		return fmt.Errorf("cannot initialise the cluster: %w", err)
	}
	if err := bootstrap(&cfg, init); err != nil {
		return fmt.Errorf("cannot initialise the cluster in %s: %w", cfg.Dir, err)
	}
	return nil
}

func bootstrap(cfg *Config, init *statev1.Command) error {
	outcome := domain.New().Apply(2, init)
	switch {
	case outcome.Fatal != nil:
		return outcome.Fatal
	case outcome.Refused != nil:
		return outcome.Refused
	case init.GetInit().GetMember().GetId() != cfg.NodeID:
		return fmt.Errorf("the first member is %s, but this node is %s", init.GetInit().GetMember().GetId(), cfg.NodeID)
	}
	encoded, err := proto.MarshalOptions{Deterministic: true}.Marshal(init)
	if err != nil {
		return err
	}
	data, err := proto.Marshal(&statev1.Batch{Commands: [][]byte{encoded}})
	if err != nil {
		return err
	}
	return createState(cfg, func(dir string) error {
		store, err := openBolt(filepath.Join(dir, logFile), func() uint64 { return 0 })
		if err != nil {
			return err
		}
		configuration := raft.Configuration{Servers: []raft.Server{{
			Suffrage: raft.Voter,
			ID:       raft.ServerID(cfg.NodeID),
			Address:  raft.ServerAddress(cfg.Advertise),
		}}}
		err = raft.BootstrapCluster(raftConfig(cfg), store, store, raft.NewDiscardSnapshotStore(), nil, configuration)
		if err == nil {
			err = store.StoreLog(&raft.Log{Index: 2, Term: 1, Type: raft.LogCommand, Data: data, AppendedAt: time.Now()})
		}
		if err == nil {
			err = store.Mark(2) // the only voter holds it: it is agreed
		}
		return errors.Join(err, store.Close())
	})
}

// PrepareJoin makes Dir a member that was admitted to cluster and has no state yet. Of
// members, the voters are those who may connect until the state has arrived. It may be
// repeated until the first Open; after that ErrStateExists.
func PrepareJoin(cfg Config, cluster *statev1.Cluster, members []*statev1.Member) error {
	if err := cfg.complete(); err != nil {
		return fmt.Errorf("cannot join the cluster: %w", err)
	}
	list := joinList{ClusterID: cluster.GetId(), Epoch: cluster.GetEpoch(), RecoveryID: ca.RecoveryID(cluster)}
	for _, m := range members {
		list.Members = append(list.Members, joinMember{ID: m.GetId(), Address: m.GetRaftAddress(), Voter: m.GetVoter()})
	}
	data, err := json.MarshalIndent(list, "", "  ")
	if err != nil {
		return fmt.Errorf("cannot join the cluster: %w", err)
	}
	dir := filepath.Join(cfg.Dir, stateDir)
	_, noLog := os.Stat(filepath.Join(dir, logFile))
	if _, err := os.Stat(filepath.Join(dir, joinFile)); err == nil && errors.Is(noLog, fs.ErrNotExist) {
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("cannot join the cluster: %w", err)
		}
	}
	err = createState(&cfg, func(dir string) error {
		return writeSynced(filepath.Join(dir, joinFile), data)
	})
	if err != nil {
		return fmt.Errorf("cannot prepare %s to join the cluster: %w", cfg.Dir, err)
	}
	return nil
}

// Exists says whether dir holds a member's state: one that was bootstrapped, joined,
// restored or recovered.
func Exists(dir string) bool {
	for _, name := range []string{stateDir, stateNext} {
		if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
			return true
		}
	}
	return false
}

// createState makes the state directory with what build puts in it: all or nothing.
func createState(cfg *Config, build func(dir string) error) error {
	dir := cfg.Dir
	if Exists(dir) {
		return ErrStateExists
	}
	fresh := filepath.Join(dir, stateNew)
	if err := os.RemoveAll(fresh); err != nil { // of an interrupted attempt
		return err
	}
	if err := os.MkdirAll(fresh, 0o700); err != nil {
		return err
	}
	if err := build(fresh); err != nil {
		os.RemoveAll(fresh)
		return err
	}
	if err := syncDir(fresh); err != nil {
		return err
	}
	if err := os.Rename(fresh, filepath.Join(dir, stateDir)); err != nil {
		return err
	}
	return syncDir(dir)
}

func writeSynced(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Open loads what this node is known to have agreed to, so that it can be read before
// and without any other member, and then starts Raft. ErrNoState if Dir holds no
// member. On success the replica owns cfg.Listener; Run or Close must be called.
func Open(cfg Config) (*Replica, error) {
	if err := cfg.complete(); err != nil {
		return nil, fmt.Errorf("cannot start the replica: %w", err)
	}
	r, err := open(cfg)
	if err != nil {
		return nil, fmt.Errorf("cannot start the replica in %s: %w", cfg.Dir, err)
	}
	return r, nil
}

func open(cfg Config) (*Replica, error) {
	if cfg.Listener == nil {
		return nil, errors.New("no listener given")
	}
	if !Exists(cfg.Dir) {
		return nil, ErrNoState
	}
	if err := settle(&cfg); err != nil {
		return nil, err
	}
	if err := errors.Join(superseded(filepath.Join(cfg.Dir, stateDir)), diverged(filepath.Join(cfg.Dir, stateDir))); err != nil {
		return nil, err
	}
	r := &Replica{
		cfg:       cfg,
		log:       cfg.Log,
		proposals: make(chan *proposal),
		leaderCh:  make(chan bool, 1),
		down:      make(chan struct{}),
		ended:     make(chan struct{}),
		halted:    make(chan struct{}),
		released:  make(chan struct{}),
	}
	dir := filepath.Join(cfg.Dir, stateDir)
	r.fsm = &fsm{self: cfg.NodeID, state: domain.New()}

	bolt, err := openBolt(filepath.Join(dir, logFile), r.fsm.applied.Load)
	if err != nil {
		return nil, err
	}
	var st store = bolt
	if cfg.wrapStore != nil {
		st = cfg.wrapStore(st)
	}
	r.disk = newDisk(st, cfg.Timing.diskStall(), func(err error) { r.leave(err, errors.Is(err, ErrRewrites)) })
	r.disk.mayCut = r.mayCut

	r.disk.before = cfg.BeforeWrite
	if last, _ := st.LastIndex(); last > 0 || cfg.Durable == 0 {
		r.disk.durable.Store(last)
		if last < cfg.Durable {
			return nil, errors.Join(fmt.Errorf("%w: it ends at entry %d, but entry %d was confirmed", ErrForgetful, last, cfg.Durable), st.Close())
		}
	}

	files, err := raft.NewFileSnapshotStoreWithLogger(dir, keptSnapshots, newLogger(cfg.Log))
	if err != nil {
		return nil, errors.Join(err, st.Close())
	}
	if err := load(dir, st, files, r.fsm, cfg.Log, cfg.Agreed); err != nil {
		return nil, errors.Join(err, st.Close())
	}
	if err := scan(st, files, r.disk); err != nil {
		return nil, errors.Join(err, st.Close())
	}
	list, err := r.joinList(dir)
	if err != nil {
		return nil, errors.Join(err, st.Close())
	}
	if err := r.start(files, list); err != nil {
		return nil, errors.Join(err, st.Close())
	}
	bolt.unmapRead()
	return r, nil
}

// load brings the state machine to what is known to be agreed: the newest snapshot that
// can be read, then the log up to `committed`. This is what lets a lone node restart.
// agreed is what the caller knows beyond that.
func load(dir string, st store, files *raft.FileSnapshotStore, f *fsm, log *slog.Logger, agreed uint64) error {
	damaged := 0
	// Raft takes the newest listed snapshot on trust and would skip the entries it stands
	// for. So it must not see one that cannot be read.
	aside := func(id string, err error) error {
		damaged++
		log.Error("a snapshot cannot be read and is put aside", "snapshot", id, "error", err)
		if err := putAside(dir, id); err != nil {
			return fmt.Errorf("cannot put the damaged snapshot %s aside: %w", id, err)
		}
		return nil
	}
	present, err := os.ReadDir(filepath.Join(dir, snapshotDir))
	if err != nil {
		return fmt.Errorf("cannot list the snapshots: %w", err)
	}
	for _, entry := range present {
		if strings.HasSuffix(entry.Name(), ".tmp") { // Raft's name for one that was not finished
			continue
		}
		if err := describes(filepath.Join(dir, snapshotDir, entry.Name())); err != nil {
			if err := aside(entry.Name(), err); err != nil {
				return err
			}
		}
	}
	metas, err := files.List()
	if err != nil {
		return fmt.Errorf("cannot list the snapshots: %w", err)
	}
	var newest *raft.SnapshotMeta
	for _, meta := range metas { // newest first
		err := loadSnapshot(files, meta, f)
		if err == nil {
			newest = meta
			break
		}
		if err := aside(meta.ID, err); err != nil {
			return err
		}
	}
	if newest != nil {
		if err := cutStale(st, newest); err != nil {
			return err
		}
	}
	first, err := st.FirstIndex()
	if err != nil {
		return err
	}
	last, err := st.LastIndex()
	if err != nil {
		return err
	}
	f.live = max(last, f.applied.Load())
	if first > f.applied.Load()+1 {
		return fmt.Errorf("the log begins at entry %d, but the newest readable snapshot ends at %d: "+
			"this node cannot be repaired from its own disk: remove it from the cluster and join anew", first, f.applied.Load())
	}
	if first == 0 && newest == nil && damaged > 0 {
		return errors.New("no snapshot can be read and the log is empty: remove this node from the cluster and join anew")
	}
	committed, err := st.Committed()
	if err != nil {
		return err
	}
	committed = max(committed, min(agreed, last))
	for index := f.applied.Load() + 1; index <= committed; index++ {
		var entry raft.Log
		if err := st.GetLog(index, &entry); err != nil {
			return fmt.Errorf("cannot read log entry %d, which is known to be agreed: %w: remove this node from the cluster and join anew", index, err)
		}
		if entry.Type != raft.LogCommand {
			continue
		}
		if _, err := f.apply(index, entry.Data, nil); err != nil {
			return err
		}
	}
	return nil
}

func loadSnapshot(files *raft.FileSnapshotStore, meta *raft.SnapshotMeta, f *fsm) error {
	_, content, err := files.Open(meta.ID) // compares the checksum
	if err != nil {
		return err
	}
	defer content.Close()
	state, err := domain.Restore(content)
	if err != nil {
		return err
	}
	if state.Applied() > meta.Index {
		return fmt.Errorf("it holds the state of entry %d, but is named for entry %d", state.Applied(), meta.Index)
	}
	// Between the two are entries that are no commands.
	f.adopt(state, meta.Index)
	f.snapshotSize.Store(uint64(meta.Size))
	return nil
}

func putAside(dir, id string) error {
	aside := filepath.Join(dir, damagedDir)
	if err := os.MkdirAll(aside, 0o700); err != nil {
		return err
	}
	target := filepath.Join(aside, id)
	if err := os.RemoveAll(target); err != nil {
		return err
	}
	return os.Rename(filepath.Join(dir, snapshotDir, id), target)
}

// cutStale deletes a log that ends before the snapshot, or that has another entry where
// the snapshot ends: the node crashed after it installed the leader's snapshot and
// before it deleted what that replaced.
func cutStale(st store, newest *raft.SnapshotMeta) error {
	first, err := st.FirstIndex()
	if err != nil {
		return err
	}
	last, err := st.LastIndex()
	if err != nil {
		return err
	}
	stale := last < newest.Index
	if !stale && first <= newest.Index {
		var entry raft.Log
		if err := st.GetLog(newest.Index, &entry); err != nil {
			return fmt.Errorf("cannot read log entry %d: %w", newest.Index, err)
		}
		stale = entry.Term != newest.Term
	}
	if first == 0 || !stale {
		return nil
	}
	return st.DeleteRange(first, last)
}

// scan reads the rest of the log: Raft would panic at an entry that cannot be read, and
// the roster must know where the newest membership stands.
func scan(st store, files *raft.FileSnapshotStore, d *disk) error {
	from, err := st.FirstIndex()
	if err != nil {
		return err
	}
	if metas, err := files.List(); err != nil {
		return err
	} else if len(metas) > 0 {
		d.newestConfig.Store(metas[0].ConfigurationIndex)
		from = max(from, metas[0].Index+1)
	}
	last, err := st.LastIndex()
	if err != nil {
		return err
	}
	for index := max(from, 1); index <= last; index++ {
		var entry raft.Log
		if err := st.GetLog(index, &entry); err != nil {
			return fmt.Errorf("cannot read the log: %w: remove this node from the cluster and join anew", err)
		}
		if entry.Type == raft.LogConfiguration {
			d.newestConfig.Store(index)
		}
	}
	return nil
}

// joinList finds out which cluster this node belongs to. A joiner's list serves until
// the state names this node.
func (r *Replica) joinList(dir string) (joinList, error) {
	var list joinList
	var self bool
	r.Read(func(s *domain.State) {
		_, self = s.Member(r.cfg.NodeID)
		if c := s.Cluster(); c != nil {
			list = joinList{ClusterID: c.GetId(), Epoch: c.GetEpoch(), RecoveryID: ca.RecoveryID(c)}
		}
	})
	path := filepath.Join(dir, joinFile)
	if self {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return list, fmt.Errorf("cannot remove the list of a join that is complete: %w", err)
		}
		return list, nil
	}
	data, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && list.ClusterID != nil:
		return list, nil
	case errors.Is(err, fs.ErrNotExist):
		return list, fmt.Errorf("%w (it is empty)", ErrNoState)
	case err != nil:
		return list, err
	}
	if err := json.Unmarshal(data, &list); err != nil {
		return list, fmt.Errorf("cannot read %s: %w: remove the directory and join anew", path, err)
	}
	return list, nil
}

// start connects the parts and starts Raft.
func (r *Replica) start(files *raft.FileSnapshotStore, list joinList) error {
	members := &roster{self: r.cfg.NodeID, fsm: r.fsm, disk: r.disk, running: &r.running, joining: list.Members}
	ctx, stop := context.WithCancel(context.Background())
	r.stop = stop
	if r.cfg.Vouch != nil {
		r.vouched = &vouched{
			self: r.cfg.NodeID, ask: r.cfg.Vouch, voters: r.knownVoters, ctx: ctx, nodes: map[string]*vouching{},
			log: func(m *statev1.Member, by int) {
				r.log.Info("a member that is not known here yet is vouched for", "member", m.GetName(), "vouchers", by)
			},
		}
		members.vouched = r.vouched
	}
	r.net = newStreams(&r.cfg, members, protocol(list.ClusterID, list.Epoch, list.RecoveryID))
	r.trans = newTransport(r.net, &r.cfg, &leaderCheck{wall: r.cfg.Wall, applied: r.fsm.applied.Load, log: r.log, read: r.fsm.read, configuration: r.configuration})

	full := make(chan struct{}, 1)
	r.fsm.onApply = r.cfg.OnApply
	r.fsm.onRestore = r.cfg.OnRestore
	r.fsm.onEnd = func(err error) { r.leave(err, true) }
	r.fsm.onMembers = func() { time.AfterFunc(r.cfg.farewell, r.net.recheck) }
	r.fsm.onFull = func() {
		select {
		case full <- struct{}{}:
		default:
		}
	}

	started, err := newRaft(&r.cfg, r.fsm, r.disk, snapshots{files, filepath.Join(r.cfg.Dir, stateDir, snapshotDir), r.disk.fail}, r.trans)
	if err != nil {
		stop()
		return errors.Join(err, r.trans.Close())
	}
	r.raft = started
	r.running.Store(started)
	select {
	case <-r.down: // its disk failed in the first moment
		r.halt(started)
	default:
	}

	// Raft stops by itself when a leader removed itself.
	stopped := make(chan raft.Observation, 1)
	started.RegisterObserver(raft.NewObserver(stopped, false, func(o *raft.Observation) bool {
		return o.Data == raft.Shutdown
	}))

	r.tasks.Go(func() { r.batch(ctx) })
	r.tasks.Go(func() { r.compact(ctx, full) })
	r.tasks.Go(r.relay) // ends with down
	r.tasks.Go(func() {
		select {
		case <-stopped:
			r.leave(ErrRemoved, true)
		case <-ctx.Done():
		}
	})
	return nil
}

// newRaft runs raft.NewRaft where a failing disk can end its goroutine (see must).
func newRaft(cfg *Config, f *fsm, d *disk, files raft.SnapshotStore, trans raft.Transport) (started *raft.Raft, err error) {
	err = fmt.Errorf("%w while Raft started", ErrDisk)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			if p := recover(); p != nil {
				err = fmt.Errorf("what is on the disk is refused by Raft: %v", p)
			}
		}()
		started, err = raft.NewRaft(raftConfig(cfg), f, d, d, files, trans)
	}()
	<-done
	return started, err
}

// compact takes a snapshot when the log has grown by many bytes; Raft itself only
// counts entries. The number of entries that stay is set so that they are not many
// bytes either.
func (r *Replica) compact(ctx context.Context, full <-chan struct{}) {
	for {
		select {
		case <-full:
		case <-ctx.Done():
			return
		}
		mean := max(r.fsm.sinceSnapshot.Load()/max(r.fsm.entries.Load(), 1), 1)
		reload := r.raft.ReloadableConfig()
		reload.TrailingLogs = min(max(trailingBytes/mean, trailingLeast), trailingEntries)
		if err := r.raft.ReloadConfig(reload); err != nil {
			r.log.Warn("cannot change how many log entries stay", "error", err)
		}
		done := make(chan error, 1)
		go func() { done <- r.raft.Snapshot().Error() }()
		select {
		case err := <-done:
			if err != nil && !errors.Is(err, raft.ErrNothingNewToSnapshot) {
				r.log.Warn("no snapshot was taken; the next one is tried when the log has grown again", "error", err)
			}
		case <-ctx.Done():
			return
		}
	}
}
