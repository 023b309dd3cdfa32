package replica

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
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

	keyCommitted = []byte("committed")
)

// errAbsent is what Raft expects of a stable store, by its text.
var errAbsent = errors.New("not found")

// deleteChunk is how many entries one transaction of a compaction deletes: a compaction
// of 64 Ki entries must not keep an append waiting.
const deleteChunk = 4096

// boltStore is the store on bbolt.
//
// StoreLogs writes the entries and `committed` in one transaction, so that a crash
// leaves both or neither.
type boltStore struct {
	db      *bbolt.DB
	applied func() uint64 // index up to which the state machine has applied

	mu          sync.RWMutex
	first, last uint64 // 0, 0: the log is empty
}

// openBolt opens or creates the file. applied may be called from any goroutine.
func openBolt(path string, applied func() uint64) (*boltStore, error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{
		Timeout: time.Second, // for the file lock: a second process must be told, not made to wait
		// The freelist is rebuilt at start instead of being written with each append:
		// after a large compaction it would be most of what an append writes.
		NoFreelistSync: true,
		FreelistType:   bbolt.FreelistMapType, // constant time on a fragmented file
	})
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return nil, fmt.Errorf("cannot open the log %s: another process uses it", path)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("cannot open the log %s: it belongs to another user: %w", path, err)
	case err != nil:
		return nil, fmt.Errorf("cannot open the log %s: %w", path, err)
	}
	s := &boltStore{db: db, applied: applied}
	err = db.Update(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{bucketLog, bucketStable, bucketMeta} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		cursor := tx.Bucket(bucketLog).Cursor()
		if key, _ := cursor.First(); key != nil {
			s.first = binary.BigEndian.Uint64(key)
		}
		if key, _ := cursor.Last(); key != nil {
			s.last = binary.BigEndian.Uint64(key)
		}
		return nil
	})
	if err != nil {
		db.Close()
		return nil, fmt.Errorf("cannot read the log %s: %w", path, err)
	}
	return s, nil
}

func (s *boltStore) Close() error { return s.db.Close() }

func (s *boltStore) FirstIndex() (uint64, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.first, nil
}

func (s *boltStore) LastIndex() (uint64, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.last, nil
}

func (s *boltStore) GetLog(index uint64, log *raft.Log) error {
	return s.db.View(func(tx *bbolt.Tx) error {
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
	err := s.db.Update(func(tx *bbolt.Tx) error {
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
		return raise(tx, committed)
	})
	if err != nil {
		return fmt.Errorf("cannot store log entries %d to %d: %w", logs[0].Index, newLast, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.first == 0 {
		s.first = logs[0].Index
	}
	s.last = newLast
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

// raise writes committed unless it would go back.
func raise(tx *bbolt.Tx, committed uint64) error {
	meta := tx.Bucket(bucketMeta)
	if committed <= number(meta.Get(keyCommitted)) {
		return nil
	}
	return meta.Put(keyCommitted, binary.BigEndian.AppendUint64(nil, committed))
}

func (s *boltStore) Committed() (uint64, error) {
	var committed uint64
	err := s.db.View(func(tx *bbolt.Tx) error {
		committed = number(tx.Bucket(bucketMeta).Get(keyCommitted))
		return nil
	})
	return committed, err
}

func (s *boltStore) Mark(index uint64) error {
	_, last := s.bounds()
	err := s.db.Update(func(tx *bbolt.Tx) error { return raise(tx, min(index, last)) })
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
	if maxIndex == last {
		return s.deleteTail(minIndex, last)
	}
	// A crash between two of these leaves a log that begins later: as good a log.
	for from := minIndex; from <= maxIndex; from += deleteChunk {
		to := min(from+deleteChunk-1, maxIndex)
		if err := s.db.Update(func(tx *bbolt.Tx) error { return deleteEntries(tx, from, to) }); err != nil {
			return fmt.Errorf("cannot delete log entries %d to %d: %w", from, to, err)
		}
		s.mu.Lock()
		s.first = to + 1
		s.mu.Unlock()
	}
	s.unmapRead()
	return nil
}

// unmapRead gives back the pages of the file that were read through its mapping and are
// counted as this process's memory: a log is read once, at start, and its end when it is
// cut. What is needed again comes from the page cache.
func (s *boltStore) unmapRead() {
	// A transaction keeps the mapping in its place.
	_ = s.db.View(func(tx *bbolt.Tx) error {
		dropPages(s.db.Info().Data, uintptr(tx.Size()))
		return nil
	})
}

// deleteTail deletes what conflicts with the leader's log, or all of it. What stood in
// `committed` beyond the new end is lowered in the same transaction.
func (s *boltStore) deleteTail(from, last uint64) error {
	err := s.db.Update(func(tx *bbolt.Tx) error {
		if err := deleteEntries(tx, from, last); err != nil {
			return err
		}
		meta := tx.Bucket(bucketMeta)
		if number(meta.Get(keyCommitted)) < from {
			return nil
		}
		return meta.Put(keyCommitted, binary.BigEndian.AppendUint64(nil, from-1))
	})
	if err != nil {
		return fmt.Errorf("cannot delete log entries %d to %d: %w", from, last, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if from == s.first {
		s.first, s.last = 0, 0
	} else {
		s.last = from - 1
	}
	return nil
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
	return s.first, s.last
}

func (s *boltStore) Set(key, value []byte) error {
	err := s.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(bucketStable).Put(key, value) })
	if err != nil {
		return fmt.Errorf("cannot store %s: %w", key, err)
	}
	return nil
}

func (s *boltStore) Get(key []byte) ([]byte, error) {
	var value []byte
	err := s.db.View(func(tx *bbolt.Tx) error {
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

// number reads what AppendUint64 wrote; anything else is 0.
func number(b []byte) uint64 {
	if len(b) != 8 {
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
