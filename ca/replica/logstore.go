package replica

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// store is Raft's log and its few stable values on one disk, and beside them how far
// the log is known to be agreed. Every method that writes returns after the data is
// durable. The log has no gaps.
type store interface {
	raft.LogStore
	raft.StableStore

	// Committed is an index up to which the log was agreed: never above the last index,
	// never above what the state machine had applied when the last entry was stored.
	Committed() (uint64, error)

	// Mark makes index durable as Committed, outside an append. Only for an index that
	// was applied, or whose agreement is certain (a bootstrapped single voter).
	Mark(index uint64) error

	Close() error
}

var (
	bucketLog    = []byte("log")
	bucketStable = []byte("stable")
	bucketMeta   = []byte("meta")

	keyExtent = []byte("extent")
)

// errAbsent is what Raft expects of a stable store, by its text.
var errAbsent = errors.New("not found")

// deleteChunk is how many entries one transaction of a compaction deletes: a compaction
// of 64 Ki entries must not keep an append waiting.
const deleteChunk = 4096

// boltStore is the store on bbolt.
//
// Every transaction also writes the extent: how far the log goes and is agreed, under the
// transaction's own number, with a checksum. So a crash leaves all of it or nothing, and
// a transaction of which the disk kept only some pages is noticed at the next start.
type boltStore struct {
	db      *bbolt.DB
	applied func() uint64 // index up to which the state machine has applied

	writing sync.Mutex // one transaction at a time, with what follows from it

	mu  sync.RWMutex
	now extent
}

type extent struct {
	transaction uint64
	first, last uint64 // 0, 0: the log is empty
	committed   uint64
	values      uint64 // checksum of all stable values: none may be missing
}

func (e extent) encode() (b []byte) {
	for _, n := range []uint64{e.transaction, e.first, e.last, e.committed, e.values} {
		b = binary.BigEndian.AppendUint64(b, n)
	}
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func decodeExtent(b []byte) (extent, error) {
	e := extent{}
	for i, n := range []*uint64{&e.transaction, &e.first, &e.last, &e.committed, &e.values} {
		*n = number(b[min(8*i, len(b)):])
	}
	if !bytes.Equal(e.encode(), b) {
		return extent{}, errors.New("the record of the log's extent is damaged")
	}
	return e, nil
}

func valuesSum(tx *bbolt.Tx) (sum uint64) {
	var all uint32
	tx.Bucket(bucketStable).ForEach(func(key, value []byte) error {
		all = crc32.Update(crc32.Update(all, castagnoli, key), castagnoli, value)
		return nil
	})
	return uint64(all)
}

// guarded runs what reads the file. A damaged page makes bbolt panic, or reach behind
// the end of the file.
func guarded(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("the file is damaged: %v", p)
		}
	}()
	return f()
}

func (s *boltStore) view(f func(*bbolt.Tx) error) error {
	return guarded(func() error { return s.db.View(f) })
}

// update runs one transaction, which may change the extent.
func (s *boltStore) update(f func(*bbolt.Tx, *extent) error) error {
	s.writing.Lock()
	defer s.writing.Unlock()
	next := s.now
	err := guarded(func() error {
		return s.db.Update(func(tx *bbolt.Tx) error {
			if err := f(tx, &next); err != nil {
				return err
			}
			next.transaction = uint64(tx.ID())
			return tx.Bucket(bucketMeta).Put(keyExtent, next.encode())
		})
	})
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now = next
	return nil
}

// openBolt opens or creates the file. applied may be called from any goroutine.
func openBolt(path string, applied func() uint64) (*boltStore, error) {
	var db *bbolt.DB
	err := readable(path)
	if err == nil {
		err = guarded(func() (err error) {
			db, err = bbolt.Open(path, 0o600, &bbolt.Options{
				Timeout: lockTimeout,
				// The freelist is rebuilt at start instead of being written with each append:
				// after a large compaction it would be most of what an append writes.
				NoFreelistSync: true,
				FreelistType:   bbolt.FreelistMapType, // constant time on a fragmented file
			})
			return err
		})
	}
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return nil, fmt.Errorf("cannot open the log %s: another process uses it", path)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("cannot open the log %s: it belongs to another user: %w", path, err)
	case err != nil:
		return nil, fmt.Errorf("cannot open the log %s: %w: %s", path, err, joinAnew)
	}
	s := &boltStore{db: db, applied: applied}
	if err := s.look(); err != nil {
		db.Close()
		return nil, fmt.Errorf("cannot read the log %s: %w: %s", path, err, joinAnew)
	}
	return s, nil
}

// lockTimeout is for the file lock: a second process must be told, not made to wait.
const lockTimeout = time.Second

// readable walks the pages of a file that exists. When bbolt opens it to write, it does so
// too, but in a goroutine of its own, where a damaged page ends the process.
func readable(path string) error {
	if info, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) || err == nil && info.Size() == 0 {
		return nil
	}
	return guarded(func() error {
		db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: lockTimeout, ReadOnly: true})
		if err != nil {
			return err
		}
		defer db.Close()
		return db.View(func(tx *bbolt.Tx) error {
			return tx.ForEach(func(_ []byte, b *bbolt.Bucket) error {
				var before []byte
				return b.ForEach(func(key, _ []byte) error {
					if before != nil && bytes.Compare(before, key) >= 0 {
						return errors.New("the file is damaged: its keys are out of order")
					}
					before = key
					return nil
				})
			})
		})
	})
}

// joinAnew is what remains to be done where a disk lost what others count on.
const joinAnew = "remove this node from the cluster, wipe it and join it anew"

// look reads the extent, and compares it with what is there.
func (s *boltStore) look() error {
	fresh := false
	err := s.view(func(tx *bbolt.Tx) error {
		meta, log := tx.Bucket(bucketMeta), tx.Bucket(bucketLog)
		if fresh = tx.ID() <= 1; fresh { // the first transaction is ours
			return nil
		}
		if meta == nil || log == nil || tx.Bucket(bucketStable) == nil {
			return errors.New("a part of the file is missing")
		}
		var err error
		if s.now, err = decodeExtent(meta.Get(keyExtent)); err != nil {
			return err
		}
		if id := uint64(tx.ID()); s.now.transaction != id {
			return fmt.Errorf("the disk lost a part of write %d: the log is that of write %d", id, s.now.transaction)
		}
		if valuesSum(tx) != s.now.values {
			return errors.New("the disk lost a term or a vote")
		}
		first, _ := log.Cursor().First()
		last, _ := log.Cursor().Last()
		if number(first) != s.now.first || number(last) != s.now.last {
			return fmt.Errorf("the disk lost a part of the log: it goes from %d to %d, and went from %d to %d", number(first), number(last), s.now.first, s.now.last)
		}
		return nil
	})
	if err != nil || !fresh {
		return err
	}
	return s.update(func(tx *bbolt.Tx, _ *extent) error {
		for _, name := range [][]byte{bucketLog, bucketStable, bucketMeta} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		return nil
	})
}

func (s *boltStore) Close() error { return s.db.Close() }

func (s *boltStore) FirstIndex() (uint64, error) {
	first, _ := s.bounds()
	return first, nil
}

func (s *boltStore) LastIndex() (uint64, error) {
	_, last := s.bounds()
	return last, nil
}

func (s *boltStore) GetLog(index uint64, log *raft.Log) error {
	return s.view(func(tx *bbolt.Tx) error {
		data := tx.Bucket(bucketLog).Get(indexKey(index))
		if data == nil {
			return raft.ErrLogNotFound
		}
		return decodeEntry(index, data, log)
	})
}

func (s *boltStore) StoreLog(log *raft.Log) error { return s.StoreLogs([]*raft.Log{log}) }

func (s *boltStore) StoreLogs(logs []*raft.Log) error {
	if len(logs) == 0 {
		return nil
	}
	_, last := s.bounds()
	if err := follows(last, logs); err != nil {
		return err
	}
	newLast := logs[len(logs)-1].Index
	committed := min(s.applied(), newLast)
	err := s.update(func(tx *bbolt.Tx, e *extent) error {
		bucket := tx.Bucket(bucketLog)
		bucket.FillPercent = 0.95 // keys only grow: a split would leave half-empty pages behind
		var buf []byte
		for _, log := range logs {
			// bbolt keeps key and value until the commit: each needs memory of its own.
			start := len(buf)
			buf = appendEntry(buf, log)
			if err := bucket.Put(indexKey(log.Index), buf[start:len(buf):len(buf)]); err != nil {
				return err
			}
		}
		if e.first == 0 {
			e.first = logs[0].Index
		}
		e.last = newLast
		e.committed = max(e.committed, committed)
		return nil
	})
	if err != nil {
		return fmt.Errorf("cannot store log entries %d to %d: %w", logs[0].Index, newLast, err)
	}
	return nil
}

// follows refuses what would leave a gap or overwrite.
func follows(last uint64, logs []*raft.Log) error {
	for i, log := range logs {
		if i == 0 && last == 0 {
			last = log.Index
			continue
		}
		if log.Index != last+1 {
			return fmt.Errorf("log entry %d does not follow entry %d", log.Index, last)
		}
		last = log.Index
	}
	return nil
}

func (s *boltStore) Committed() (uint64, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.now.committed, nil
}

func (s *boltStore) Mark(index uint64) error {
	err := s.update(func(_ *bbolt.Tx, e *extent) error {
		e.committed = max(e.committed, min(index, e.last))
		return nil
	})
	if err != nil {
		return fmt.Errorf("cannot note that the log is agreed up to entry %d: %w", index, err)
	}
	return nil
}

// DeleteRange deletes the entries min to max, which must touch an end of the log.
func (s *boltStore) DeleteRange(minIndex, maxIndex uint64) error {
	first, last := s.bounds()
	minIndex, maxIndex = max(minIndex, first), min(maxIndex, last)
	if first == 0 || minIndex > maxIndex {
		return nil
	}
	if minIndex != first && maxIndex != last {
		return fmt.Errorf("cannot delete log entries %d to %d from the middle of %d to %d", minIndex, maxIndex, first, last)
	}
	if maxIndex == last { // what conflicts with the leader's log, or all of it
		err := s.update(func(tx *bbolt.Tx, e *extent) error {
			if e.last = minIndex - 1; minIndex == first {
				e.first, e.last = 0, 0
			}
			e.committed = min(e.committed, minIndex-1)
			return deleteEntries(tx, minIndex, last)
		})
		if err != nil {
			return fmt.Errorf("cannot delete log entries %d to %d: %w", minIndex, last, err)
		}
		return nil
	}
	// A crash between two of these leaves a log that begins later: as good a log.
	for from := minIndex; from <= maxIndex; from += deleteChunk {
		to := min(from+deleteChunk-1, maxIndex)
		err := s.update(func(tx *bbolt.Tx, e *extent) error {
			e.first = to + 1
			return deleteEntries(tx, from, to)
		})
		if err != nil {
			return fmt.Errorf("cannot delete log entries %d to %d: %w", from, to, err)
		}
	}
	s.unmapRead()
	return nil
}

// unmapRead gives back the pages of the file that were read through its mapping and are
// counted as this process's memory: a log is read once, at start, and its end when it is
// cut. What is needed again comes from the page cache.
func (s *boltStore) unmapRead() {
	// A transaction keeps the mapping in its place.
	_ = s.view(func(tx *bbolt.Tx) error {
		// A damaged file may claim more than it has and was mapped: what lies behind the
		// mapping is somebody else's memory.
		if file, err := os.Stat(s.db.Path()); err == nil && tx.Size() <= file.Size() {
			dropPages(s.db.Info().Data, uintptr(tx.Size()))
		}
		return nil
	})
}

func deleteEntries(tx *bbolt.Tx, from, to uint64) error {
	bucket := tx.Bucket(bucketLog)
	for index := from; index <= to; index++ {
		if err := bucket.Delete(indexKey(index)); err != nil {
			return err
		}
	}
	return nil
}

func (s *boltStore) bounds() (first, last uint64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.now.first, s.now.last
}

func (s *boltStore) Set(key, value []byte) error {
	err := s.update(func(tx *bbolt.Tx, e *extent) error {
		err := tx.Bucket(bucketStable).Put(key, value)
		e.values = valuesSum(tx)
		return err
	})
	if err != nil {
		return fmt.Errorf("cannot store %s: %w", key, err)
	}
	return nil
}

func (s *boltStore) Get(key []byte) ([]byte, error) {
	var value []byte
	err := s.view(func(tx *bbolt.Tx) error {
		stored := tx.Bucket(bucketStable).Get(key)
		if stored == nil {
			return errAbsent
		}
		value = append([]byte{}, stored...)
		return nil
	})
	return value, err
}

func (s *boltStore) SetUint64(key []byte, value uint64) error {
	return s.Set(key, binary.BigEndian.AppendUint64(nil, value))
}

func (s *boltStore) GetUint64(key []byte) (uint64, error) {
	value, err := s.Get(key)
	if err != nil {
		return 0, err
	}
	if len(value) != 8 {
		return 0, fmt.Errorf("the stored %s is damaged: %d bytes, want 8", key, len(value))
	}
	return number(value), nil
}

func indexKey(index uint64) []byte { return binary.BigEndian.AppendUint64(nil, index) }

// number reads what AppendUint64 wrote; less is 0.
func number(b []byte) uint64 {
	if len(b) < 8 {
		return 0
	}
	return binary.BigEndian.Uint64(b)
}

// An entry on disk:
//
//	format 1 | type | uvarint term | varint appended at, Unix ns |
//	uvarint length, data | uvarint length, extensions | CRC-32C, 4 bytes
//
// The checksum also covers the index, so an entry found in another's place is noticed.

const entryFormat = 1

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func appendEntry(b []byte, log *raft.Log) []byte {
	start := len(b)
	b = append(b, entryFormat, byte(log.Type))
	b = binary.AppendUvarint(b, log.Term)
	var at int64
	if !log.AppendedAt.IsZero() {
		at = log.AppendedAt.UnixNano()
	}
	b = binary.AppendVarint(b, at)
	b = binary.AppendUvarint(b, uint64(len(log.Data)))
	b = append(b, log.Data...)
	b = binary.AppendUvarint(b, uint64(len(log.Extensions)))
	b = append(b, log.Extensions...)
	return binary.BigEndian.AppendUint32(b, entrySum(log.Index, b[start:]))
}

func entrySum(index uint64, body []byte) uint32 {
	return crc32.Update(crc32.Checksum(indexKey(index), castagnoli), castagnoli, body)
}

// decodeEntry fills log; it keeps nothing of b.
func decodeEntry(index uint64, b []byte, log *raft.Log) error {
	damaged := func(what string) error {
		return fmt.Errorf("log entry %d is damaged: %s", index, what)
	}
	if len(b) < 2+4 {
		return damaged("it is too short")
	}
	body := b[:len(b)-4]
	if entrySum(index, body) != binary.BigEndian.Uint32(b[len(b)-4:]) {
		return damaged("its checksum does not match")
	}
	if body[0] != entryFormat {
		return fmt.Errorf("log entry %d has format %d, which this release does not know", index, body[0])
	}
	kind, rest := raft.LogType(body[1]), body[2:]
	term, n := binary.Uvarint(rest)
	if n <= 0 {
		return damaged("its term cannot be read")
	}
	rest = rest[n:]
	at, n := binary.Varint(rest)
	if n <= 0 {
		return damaged("its time cannot be read")
	}
	data, rest, ok := cutBytes(rest[n:])
	if !ok {
		return damaged("its data cannot be read")
	}
	extensions, rest, ok := cutBytes(rest)
	if !ok || len(rest) > 0 {
		return damaged("its extensions cannot be read")
	}
	*log = raft.Log{Index: index, Term: term, Type: kind, Data: data, Extensions: extensions}
	if at != 0 {
		log.AppendedAt = time.Unix(0, at)
	}
	return nil
}

// cutBytes reads a length and a copy of that many bytes; nil for none.
func cutBytes(b []byte) (value, rest []byte, ok bool) {
	length, n := binary.Uvarint(b)
	if n <= 0 || length > uint64(len(b)-n) {
		return nil, nil, false
	}
	b = b[n:]
	if length > 0 {
		value = append([]byte{}, b[:length]...)
	}
	return value, b[length:], true
}
