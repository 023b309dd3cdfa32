package replica

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// disk is what Raft gets as its stores: the store behind a log cache, under a watchdog.
//
// Raft 1.8.0 keeps a leader whose write hangs, for ever: its heartbeats go on in other
// goroutines. After a failed write it may remember a wrong end of its log, and it
// panics when a term cannot be stored. So the first error, and a write that takes
// longer than stall, end this node's part in Raft through fail, which closes every
// connection; after that nothing is read or written any more.
type disk struct {
	store store
	cache logCache
	stall time.Duration
	fail  func(error) // must not block; called from any goroutine, possibly more than once

	broken atomic.Bool

	// durable is the last entry that the store confirmed, or was found with.
	durable atomic.Uint64
	before  func() error // of each write; nil: nothing

	// mayCut says why the log must not be cut from an index on; nil: it may.
	mayCut func(minIndex uint64) error

	// newestConfig is the index of the newest membership entry in the log.
	newestConfig atomic.Uint64
}

var (
	_ raft.LogStore          = (*disk)(nil)
	_ raft.StableStore       = (*disk)(nil)
	_ raft.MonotonicLogStore = (*disk)(nil)
)

func newDisk(s store, stall time.Duration, fail func(error)) *disk {
	return &disk{mayCut: func(uint64) error { return nil }, store: s, cache: logCache{limit: cacheBytes}, stall: stall, fail: fail}
}

// IsMonotonic makes Raft drop the whole log when it installs a snapshot. Otherwise
// entries that no leader ever agreed to would stay below the snapshot and be served to
// others, should this node lead one day.
func (d *disk) IsMonotonic() bool { return true }

// write runs one write under the watchdog.
func (d *disk) write(what string, f func() error) error {
	if d.broken.Load() {
		return fmt.Errorf("%w: not tried again", ErrDisk)
	}
	timer := time.AfterFunc(d.stall, func() {
		d.broke(fmt.Errorf("%w: %s takes longer than %v", ErrDisk, what, d.stall))
	})
	defer timer.Stop()
	if d.before != nil {
		if err := d.before(); err != nil {
			err = fmt.Errorf("%w: %s: %w", ErrDisk, what, err)
			d.broke(err)
			return err
		}
	}
	if err := f(); err != nil {
		err = fmt.Errorf("%w: %w", ErrDisk, err)
		d.broke(err)
		return err
	}
	return nil
}

func (d *disk) broke(err error) {
	d.broken.Store(true)
	d.fail(err)
}

// must ends the calling goroutine, which is one of Raft's, where Raft would panic and
// take the process with it. Its deferred calls run; the node has left Raft already.
func must(err error) {
	if err != nil {
		runtime.Goexit()
	}
}

func (d *disk) FirstIndex() (uint64, error) { return d.store.FirstIndex() }
func (d *disk) LastIndex() (uint64, error)  { return d.store.LastIndex() }

func (d *disk) GetLog(index uint64, log *raft.Log) error {
	if d.cache.get(index, log) {
		return nil
	}
	err := d.store.GetLog(index, log)
	if err != nil && !errors.Is(err, raft.ErrLogNotFound) {
		d.broke(fmt.Errorf("%w: %w", ErrDisk, err))
		must(err)
	}
	return err
}

func (d *disk) StoreLog(log *raft.Log) error { return d.StoreLogs([]*raft.Log{log}) }

func (d *disk) StoreLogs(logs []*raft.Log) error {
	err := d.write("writing to the log", func() error { return d.store.StoreLogs(logs) })
	if err != nil {
		return err
	}
	for _, log := range logs {
		if log.Type == raft.LogConfiguration {
			d.newestConfig.Store(log.Index)
		}
	}
	d.durable.Store(logs[len(logs)-1].Index)
	d.cache.add(logs)
	return nil
}

func (d *disk) DeleteRange(minIndex, maxIndex uint64) error {
	if last, err := d.store.LastIndex(); err == nil && maxIndex >= last {
		if err := d.mayCut(minIndex); err != nil {
			d.broke(err)
			return err
		}
		d.cache.remove(minIndex, maxIndex)
		d.durable.Store(min(d.durable.Load(), max(minIndex, 1)-1)) // no longer counted on
		return d.write("cutting the log", func() error { return d.store.DeleteRange(minIndex, maxIndex) })
	}
	d.cache.remove(minIndex, maxIndex)
	// A compaction is many transactions, and nobody waits for it but an append, which
	// has its own watchdog.
	if d.broken.Load() {
		return fmt.Errorf("%w: not tried again", ErrDisk)
	}
	if err := d.store.DeleteRange(minIndex, maxIndex); err != nil {
		err = fmt.Errorf("%w: %w", ErrDisk, err)
		d.broke(err)
		return err
	}
	return nil
}

func (d *disk) Set(key, value []byte) error {
	must(d.write("storing a vote", func() error { return d.store.Set(key, value) }))
	return nil
}

func (d *disk) SetUint64(key []byte, value uint64) error {
	must(d.write("storing the term", func() error { return d.store.SetUint64(key, value) }))
	return nil
}

func (d *disk) Get(key []byte) ([]byte, error)       { return d.store.Get(key) }
func (d *disk) GetUint64(key []byte) (uint64, error) { return d.store.GetUint64(key) }

// close notes how far the log is agreed and closes the store. On a stalled disk it
// does not return.
func (d *disk) close(applied uint64) error {
	if d.broken.Load() {
		return d.store.Close()
	}
	return errors.Join(d.store.Mark(applied), d.store.Close())
}

// snapshots reports the disk's errors under snapshot writing to the same watchdog.
// Slowness is no error here: a snapshot is large.
//
// It also stores a checksum of each snapshot's description: Raft checks only the content,
// and a wrong index in the description would make it skip entries.
type snapshots struct {
	raft.SnapshotStore
	dir  string // of the snapshots
	fail func(error)
}

func (s snapshots) Create(version raft.SnapshotVersion, index, term uint64, configuration raft.Configuration,
	configurationIndex uint64, trans raft.Transport) (raft.SnapshotSink, error) {
	sink, err := s.SnapshotStore.Create(version, index, term, configuration, configurationIndex, trans)
	if err != nil {
		s.fail(fmt.Errorf("%w: cannot create a snapshot: %w", ErrDisk, err))
		return nil, err
	}
	return &snapshotSink{SnapshotSink: sink, store: s}, nil
}

type snapshotSink struct {
	raft.SnapshotSink
	store snapshots
	over  bool // closed or cancelled; Raft closes again
}

func (s *snapshotSink) Write(b []byte) (int, error) {
	n, err := s.SnapshotSink.Write(b)
	if err != nil {
		s.store.fail(fmt.Errorf("%w: cannot write a snapshot: %w", ErrDisk, err))
	}
	return n, err
}

func (s *snapshotSink) Cancel() error {
	s.over = true
	return s.SnapshotSink.Cancel()
}

func (s *snapshotSink) Close() error {
	if s.over {
		return nil
	}
	s.over = true
	err := s.SnapshotSink.Close()
	if err == nil {
		err = sealSnapshot(filepath.Join(s.store.dir, s.ID()))
	}
	if err != nil {
		s.store.fail(fmt.Errorf("%w: cannot finish a snapshot: %w", ErrDisk, err))
	}
	return err
}

const (
	metaFile    = "meta.json" // Raft's name for it
	metaSumFile = "meta.sum"
)

func sealSnapshot(dir string) error {
	meta, err := os.ReadFile(filepath.Join(dir, metaFile))
	if err != nil {
		return err
	}
	sum := sha256.Sum256(meta)
	return errors.Join(writeSynced(filepath.Join(dir, metaSumFile), sum[:]), syncDir(dir))
}

// describes says whether a snapshot's description is what was written. After a crash at
// the end of writing there may be no checksum.
func describes(dir string) error {
	data, err := os.ReadFile(filepath.Join(dir, metaFile))
	if err != nil {
		return err
	}
	sum := sha256.Sum256(data)
	if sealed, err := os.ReadFile(filepath.Join(dir, metaSumFile)); err == nil && len(sealed) > 0 && !bytes.Equal(sealed, sum[:]) {
		return errors.New("the checksum of its description does not match")
	}
	var meta raft.SnapshotMeta
	if err := json.Unmarshal(data, &meta); err != nil {
		return fmt.Errorf("its description cannot be read: %w", err)
	}
	if meta.ID != filepath.Base(dir) {
		return fmt.Errorf("its description is of %.100s", meta.ID)
	}
	return nil
}

// logCache holds the newest entries, at most limit bytes of them: those that the state
// machine and the followers are about to read. The zero value with a limit is empty.
type logCache struct {
	limit int

	mu    sync.Mutex
	logs  []*raft.Log // without gaps, oldest first
	bytes int
}

// entryCost is an entry's share of memory: its data and the record around it.
func entryCost(log *raft.Log) int { return len(log.Data) + len(log.Extensions) + 128 }

func (c *logCache) get(index uint64, log *raft.Log) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.logs) == 0 || index < c.logs[0].Index || index-c.logs[0].Index >= uint64(len(c.logs)) {
		return false
	}
	*log = *c.logs[index-c.logs[0].Index]
	return true
}

func (c *logCache) add(logs []*raft.Log) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := len(c.logs); n > 0 && len(logs) > 0 && logs[0].Index != c.logs[n-1].Index+1 {
		c.drop(n)
	}
	for _, log := range logs {
		held := *log // Raft goes on using the record it passed
		c.logs = append(c.logs, &held)
		c.bytes += entryCost(log)
	}
	oldest := 0
	for bytes := c.bytes; bytes > c.limit; oldest++ {
		bytes -= entryCost(c.logs[oldest])
	}
	c.drop(oldest)
}

// drop forgets the n oldest entries.
func (c *logCache) drop(n int) {
	for i, log := range c.logs[:n] {
		c.bytes -= entryCost(log)
		c.logs[i] = nil // the array lives on below the slice
	}
	c.logs = c.logs[n:]
}

// remove forgets minIndex to maxIndex, and what is older than those.
func (c *logCache) remove(minIndex, maxIndex uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.logs) == 0 || maxIndex < c.logs[0].Index {
		return
	}
	first, last := c.logs[0].Index, c.logs[len(c.logs)-1].Index
	switch {
	case minIndex > last:
	case minIndex > first && maxIndex >= last: // a conflicting tail
		keep := int(minIndex - first)
		for i, log := range c.logs[keep:] {
			c.bytes -= entryCost(log)
			c.logs[keep+i] = nil
		}
		c.logs = c.logs[:keep]
	default:
		c.drop(int(min(maxIndex, last)-first) + 1)
	}
}

func (c *logCache) size() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.bytes
}
