package replica

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
	"pgregory.net/rapid"
)

// shelf is something a store can be taken from, left in a crash and taken from again.
type shelf interface {
	open(applied func() uint64) store
	crash() // what was durable is left, nothing is closed
}

type boltShelf struct {
	t    testing.TB
	path string
	last *boltStore
}

func (s *boltShelf) open(applied func() uint64) store {
	s.t.Helper()
	b, err := openBolt(s.path, applied)
	if err != nil {
		s.t.Fatal(err)
	}
	s.last = b
	return b
}

// The file is what the kernel holds; the lock of the crashed process is gone.
func (s *boltShelf) crash() {
	s.t.Helper()
	data, err := os.ReadFile(s.path)
	if err != nil {
		s.t.Fatal(err)
	}
	s.last.Close()
	s.path += "x"
	if err := os.WriteFile(s.path, data, 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// memoryShelf holds stores in memory that keep, over a crash, what was synced. A write
// that is under way in a crash has reached the disk, or has not.
type memoryShelf struct {
	latency func() time.Duration // of a sync; nil: none
	reached func() bool          // of a write under way; nil: it has not

	mu      sync.Mutex
	content memoryContent
	now     *memoryStore            // writes of those before it are lost
	writing []*func(*memoryContent) // under way, oldest first
}

type memoryContent struct {
	logs      []raft.Log
	stable    map[string][]byte
	committed uint64
}

func (s *memoryShelf) open(applied func() uint64) store {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.content.stable == nil {
		s.content.stable = map[string][]byte{}
	}
	s.now = &memoryStore{shelf: s, applied: applied}
	return s.now
}

func (s *memoryShelf) crash() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, change := range s.writing {
		if s.reached == nil || !s.reached() {
			break
		}
		(*change)(&s.content)
	}
	s.writing, s.now = nil, nil
}

// memoryStore is a store whose writes reach its shelf before they return, all or nothing.
type memoryStore struct {
	shelf   *memoryShelf
	applied func() uint64
}

var errCrashed = errors.New("the process is dead")

func (m *memoryStore) write(change func(*memoryContent)) error {
	s := m.shelf
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.now != m {
		return errCrashed
	}
	if s.latency != nil {
		s.writing = append(s.writing, &change)
		s.mu.Unlock()
		time.Sleep(s.latency())
		s.mu.Lock()
		at := slices.Index(s.writing, &change)
		if s.now != m || at < 0 {
			return errCrashed
		}
		s.writing = slices.Delete(s.writing, at, at+1)
	}
	change(&s.content)
	return nil
}

func (m *memoryStore) read(look func(c *memoryContent)) {
	m.shelf.mu.Lock()
	defer m.shelf.mu.Unlock()
	look(&m.shelf.content)
}

func (c *memoryContent) bounds() (first, last uint64) {
	if n := len(c.logs); n > 0 {
		return c.logs[0].Index, c.logs[n-1].Index
	}
	return 0, 0
}

func (m *memoryStore) FirstIndex() (first uint64, err error) {
	m.read(func(c *memoryContent) { first, _ = c.bounds() })
	return first, nil
}

func (m *memoryStore) LastIndex() (last uint64, err error) {
	m.read(func(c *memoryContent) { _, last = c.bounds() })
	return last, nil
}

func (m *memoryStore) GetLog(index uint64, log *raft.Log) (err error) {
	m.read(func(c *memoryContent) {
		if first, last := c.bounds(); first == 0 || index < first || index > last {
			err = raft.ErrLogNotFound
		} else {
			*log = c.logs[index-first]
		}
	})
	return err
}

func (m *memoryStore) StoreLog(log *raft.Log) error { return m.StoreLogs([]*raft.Log{log}) }

func (m *memoryStore) StoreLogs(logs []*raft.Log) error {
	if len(logs) == 0 {
		return nil
	}
	last, _ := m.LastIndex()
	if err := follows(last, logs); err != nil {
		return err
	}
	committed := min(m.applied(), logs[len(logs)-1].Index)
	return m.write(func(c *memoryContent) {
		for _, log := range logs {
			c.logs = append(c.logs, *log)
		}
		c.committed = max(c.committed, committed)
	})
}

func (m *memoryStore) DeleteRange(minIndex, maxIndex uint64) error {
	first, _ := m.FirstIndex()
	last, _ := m.LastIndex()
	minIndex, maxIndex = max(minIndex, first), min(maxIndex, last)
	switch {
	case first == 0 || minIndex > maxIndex:
		return nil
	case minIndex != first && maxIndex != last:
		return errors.New("from the middle")
	}
	return m.write(func(c *memoryContent) {
		if maxIndex == last {
			c.logs = c.logs[:minIndex-first]
			c.committed = min(c.committed, minIndex-1)
		} else {
			c.logs = c.logs[maxIndex-first+1:]
		}
	})
}

func (m *memoryStore) Set(key, value []byte) error {
	value = append([]byte{}, value...)
	return m.write(func(c *memoryContent) { c.stable[string(key)] = value })
}

func (m *memoryStore) Get(key []byte) (value []byte, err error) {
	m.read(func(c *memoryContent) {
		if v, ok := c.stable[string(key)]; ok {
			value = append([]byte{}, v...)
		} else {
			err = errAbsent
		}
	})
	return value, err
}

func (m *memoryStore) SetUint64(key []byte, value uint64) error {
	return m.Set(key, binary.BigEndian.AppendUint64(nil, value))
}

func (m *memoryStore) GetUint64(key []byte) (uint64, error) {
	v, err := m.Get(key)
	return number(v), err
}

func (m *memoryStore) Committed() (committed uint64, err error) {
	m.read(func(c *memoryContent) { committed = c.committed })
	return committed, nil
}

func (m *memoryStore) Mark(index uint64) error {
	last, _ := m.LastIndex()
	return m.write(func(c *memoryContent) { c.committed = max(c.committed, min(index, last)) })
}

func (m *memoryStore) Close() error { return nil }

// Every store must pass this.
func TestStores(t *testing.T) {
	shelves := map[string]func(testing.TB) shelf{
		"bbolt":  func(t testing.TB) shelf { return &boltShelf{t: t, path: filepath.Join(tempDir(t), "log.db")} },
		"memory": func(testing.TB) shelf { return &memoryShelf{} },
	}
	for name, make := range shelves {
		t.Run(name, func(t *testing.T) { conformance(t, make) })
	}
}

func entry(index, term uint64, data string) *raft.Log {
	return &raft.Log{Index: index, Term: term, Type: raft.LogCommand, Data: []byte(data), AppendedAt: time.Unix(1, 5)}
}

func entries(from, to, term uint64) []*raft.Log {
	var logs []*raft.Log
	for i := from; i <= to; i++ {
		logs = append(logs, entry(i, term, fmt.Sprintf("entry %d of term %d", i, term)))
	}
	return logs
}

func conformance(t *testing.T, make func(testing.TB) shelf) {
	bounds := func(t *testing.T, s store, first, last uint64) {
		t.Helper()
		f, err1 := s.FirstIndex()
		l, err2 := s.LastIndex()
		if err1 != nil || err2 != nil || f != first || l != last {
			t.Errorf("the log is %d to %d (%v, %v), want %d to %d", f, l, err1, err2, first, last)
		}
	}
	committed := func(t *testing.T, s store, want uint64) {
		t.Helper()
		if got, err := s.Committed(); err != nil || got != want {
			t.Errorf("committed is %d (%v), want %d", got, err, want)
		}
	}
	var applied atomic.Uint64
	begin := func(t *testing.T) (shelf, store) {
		applied.Store(0)
		sh := make(t)
		s := sh.open(applied.Load)
		t.Cleanup(func() { s.Close() })
		return sh, s
	}

	t.Run("empty", func(t *testing.T) {
		_, s := begin(t)
		bounds(t, s, 0, 0)
		committed(t, s, 0)
		if err := s.GetLog(1, new(raft.Log)); !errors.Is(err, raft.ErrLogNotFound) {
			t.Errorf("an absent entry gives %v", err)
		}
		if _, err := s.Get([]byte("x")); err == nil || err.Error() != "not found" {
			t.Errorf("an absent value gives %v; raft compares the text", err)
		}
		if _, err := s.GetUint64([]byte("x")); err == nil || err.Error() != "not found" {
			t.Errorf("an absent number gives %v; raft compares the text", err)
		}
		if err := s.DeleteRange(1, 100); err != nil {
			t.Error(err)
		}
	})
	t.Run("entries come back whole", func(t *testing.T) {
		sh, s := begin(t)
		want := []raft.Log{
			{Index: 7, Term: 3, Type: raft.LogConfiguration, Data: []byte("c"), Extensions: []byte("e"), AppendedAt: time.Unix(99, 7)},
			{Index: 8, Term: 1 << 60, Type: raft.LogNoop},
			{Index: 9, Term: 4, Type: raft.LogBarrier, Data: bytes.Repeat([]byte{0, 255}, maxEntry/2)},
		}
		if err := s.StoreLogs([]*raft.Log{&want[0], &want[1], &want[2]}); err != nil {
			t.Fatal(err)
		}
		check := func(s store) {
			bounds(t, s, 7, 9)
			for _, w := range want {
				var got raft.Log
				if err := s.GetLog(w.Index, &got); err != nil {
					t.Fatal(err)
				}
				if d := cmp.Diff(w, got); d != "" {
					t.Error(d)
				}
			}
		}
		check(s)
		sh.crash()
		check(sh.open(applied.Load))
	})
	t.Run("no gaps, no overwriting", func(t *testing.T) {
		_, s := begin(t)
		if err := s.StoreLogs(entries(1, 3, 1)); err != nil {
			t.Fatal(err)
		}
		for _, bad := range [][]*raft.Log{entries(5, 5, 1), entries(3, 3, 1), {entry(4, 1, ""), entry(6, 1, "")}} {
			if err := s.StoreLogs(bad); err == nil {
				t.Errorf("entry %d was stored after 3", bad[len(bad)-1].Index)
			}
		}
		bounds(t, s, 1, 3)
	})
	t.Run("delete", func(t *testing.T) {
		sh, s := begin(t)
		if err := s.StoreLogs(entries(1, 10, 1)); err != nil {
			t.Fatal(err)
		}
		if err := s.DeleteRange(4, 6); err == nil {
			t.Error("a hole was cut")
		}
		for _, step := range []struct{ min, max, first, last uint64 }{
			{1, 3, 4, 10}, {0, 2, 4, 10}, {9, 10, 4, 8}, {8, 99, 4, 7}, {20, 30, 4, 7}, {0, 4, 5, 7},
		} {
			if err := s.DeleteRange(step.min, step.max); err != nil {
				t.Fatal(err)
			}
			bounds(t, s, step.first, step.last)
		}
		if err := s.GetLog(8, new(raft.Log)); !errors.Is(err, raft.ErrLogNotFound) {
			t.Errorf("a deleted entry gives %v", err)
		}
		if err := s.StoreLogs(entries(8, 9, 2)); err != nil {
			t.Fatal(err)
		}
		sh.crash()
		s = sh.open(applied.Load)
		bounds(t, s, 5, 9)
		if err := s.DeleteRange(5, 9); err != nil {
			t.Fatal(err)
		}
		bounds(t, s, 0, 0)
		if err := s.StoreLogs(entries(100, 101, 3)); err != nil { // after a snapshot
			t.Fatal(err)
		}
		bounds(t, s, 100, 101)
	})
	t.Run("committed", func(t *testing.T) {
		sh, s := begin(t)
		if err := s.StoreLogs(entries(1, 5, 1)); err != nil {
			t.Fatal(err)
		}
		committed(t, s, 0)
		applied.Store(3)
		committed(t, s, 0) // it moves with an append, not before
		if err := s.StoreLogs(entries(6, 6, 1)); err != nil {
			t.Fatal(err)
		}
		committed(t, s, 3)
		applied.Store(50) // a snapshot went past the log
		if err := s.StoreLogs(entries(7, 7, 1)); err != nil {
			t.Fatal(err)
		}
		committed(t, s, 7)
		applied.Store(2) // a process that has just begun
		if err := s.StoreLogs(entries(8, 9, 1)); err != nil {
			t.Fatal(err)
		}
		committed(t, s, 7)
		sh.crash()
		s = sh.open(applied.Load)
		committed(t, s, 7)
		if err := s.DeleteRange(1, 4); err != nil {
			t.Fatal(err)
		}
		committed(t, s, 7)
		if err := s.DeleteRange(6, 9); err != nil {
			t.Fatal(err)
		}
		committed(t, s, 5)
		if err := s.Mark(99); err != nil {
			t.Fatal(err)
		}
		committed(t, s, 5)
	})
	t.Run("values", func(t *testing.T) {
		sh, s := begin(t)
		if err := errors.Join(s.Set([]byte("k"), []byte("v1")), s.Set([]byte("k"), []byte("v2")), s.SetUint64([]byte("n"), 1<<63)); err != nil {
			t.Fatal(err)
		}
		sh.crash()
		s = sh.open(applied.Load)
		if v, err := s.Get([]byte("k")); err != nil || string(v) != "v2" {
			t.Errorf("k is %q, %v", v, err)
		}
		if n, err := s.GetUint64([]byte("n")); err != nil || n != 1<<63 {
			t.Errorf("n is %d, %v", n, err)
		}
	})
	t.Run("like a model", func(t *testing.T) {
		rapid.Check(t, func(rt *rapid.T) {
			applied.Store(0)
			sh := make(t)
			s := sh.open(applied.Load)
			model := (&memoryShelf{}).open(applied.Load)
			term := uint64(1)
			rt.Repeat(map[string]func(*rapid.T){
				"append": func(rt *rapid.T) {
					_, last := limits(model)
					n := rapid.Uint64Range(1, 5).Draw(rt, "n")
					same(rt, "append", s.StoreLogs(entries(last+1, last+n, term)), model.StoreLogs(entries(last+1, last+n, term)))
				},
				"apply": func(rt *rapid.T) {
					_, last := limits(model)
					applied.Store(rapid.Uint64Range(0, last+2).Draw(rt, "applied"))
				},
				"conflict": func(rt *rapid.T) {
					first, last := limits(model)
					from := rapid.Uint64Range(first, last+1).Draw(rt, "from")
					term++
					same(rt, "cut", s.DeleteRange(from, last), model.DeleteRange(from, last))
				},
				"compact": func(rt *rapid.T) {
					first, last := limits(model)
					to := rapid.Uint64Range(first, last+1).Draw(rt, "to")
					same(rt, "compact", s.DeleteRange(first, to), model.DeleteRange(first, to))
				},
				"crash": func(rt *rapid.T) {
					sh.crash()
					s = sh.open(applied.Load)
				},
				"": func(rt *rapid.T) { equal(rt, s, model) },
			})
			s.Close()
		})
	})
}

func limits(s store) (first, last uint64) {
	first, _ = s.FirstIndex()
	last, _ = s.LastIndex()
	return first, last
}

func same(t *rapid.T, what string, a, b error) {
	if (a == nil) != (b == nil) {
		t.Fatalf("%s: %v, the model says %v", what, a, b)
	}
}

func equal(t *rapid.T, s, model store) {
	first, last := limits(model)
	if f, l := limits(s); f != first || l != last {
		t.Fatalf("the log is %d to %d, the model's %d to %d", f, l, first, last)
	}
	a, _ := s.Committed()
	if b, _ := model.Committed(); a != b {
		t.Fatalf("committed is %d, the model's %d", a, b)
	}
	for i := first; i <= last && first > 0; i++ {
		var x, y raft.Log
		if err := errors.Join(s.GetLog(i, &x), model.GetLog(i, &y)); err != nil {
			t.Fatal(err)
		}
		if !cmp.Equal(x, y) {
			t.Fatalf("entry %d: %s", i, cmp.Diff(y, x))
		}
	}
}

// A kill at any moment: what was acknowledged is there, whole and without gaps, and
// `committed` is never beyond what was applied or stored. The writer is this test
// binary, run again.
func TestKillDuringAppend(t *testing.T) {
	if dir := os.Getenv("REPLICA_TEST_APPEND"); dir != "" {
		appendForEver(filepath.Join(dir, "log.db"))
		return
	}
	dir := t.TempDir()
	acked := uint64(0)
	for range 6 {
		writer := exec.Command(os.Args[0], "-test.run=^TestKillDuringAppend$")
		writer.Env = append(os.Environ(), "REPLICA_TEST_APPEND="+dir)
		out, err := writer.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := writer.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		if !lines.Scan() { // it has begun
			t.Fatal("the writer wrote nothing")
		}
		time.AfterFunc(time.Duration(rand.IntN(60))*time.Millisecond, func() { writer.Process.Kill() })
		for line := lines.Text(); ; line = lines.Text() {
			if n, err := strconv.ParseUint(strings.TrimSpace(line), 10, 64); err == nil {
				acked = max(acked, n)
			}
			if !lines.Scan() {
				break
			}
		}
		writer.Wait()

		s, err := openBolt(filepath.Join(dir, "log.db"), func() uint64 { return 0 })
		if err != nil {
			t.Fatal(err)
		}
		checkAppended(t, s, acked)
		s.Close()
	}
	t.Logf("%d entries were acknowledged", acked)
}

func appendForEver(path string) {
	var applied atomic.Uint64
	s, err := openBolt(path, applied.Load)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	_, last := s.bounds()
	for n := uint64(1); ; n = n%7 + 1 {
		if err := s.StoreLogs(entries(last+1, last+n, 1)); err != nil {
			os.Exit(1)
		}
		last += n
		applied.Store(last - 1)
		fmt.Println(last)
		if last%50 < n {
			if err := s.DeleteRange(last-1, last); err != nil { // a conflict
				os.Exit(1)
			}
			if err := s.StoreLogs(entries(last-1, last, 1)); err != nil {
				os.Exit(1)
			}
		}
	}
}

func checkAppended(t *testing.T, s *boltStore, acked uint64) {
	t.Helper()
	first, last := s.bounds()
	if first != 1 || last+2 < acked {
		t.Fatalf("the log is %d to %d, but %d was acknowledged", first, last, acked)
	}
	for i := first; i <= last; i++ {
		var got raft.Log
		if err := s.GetLog(i, &got); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got.Data, entry(i, 1, fmt.Sprintf("entry %d of term 1", i)).Data) {
			t.Fatalf("entry %d holds %q", i, got.Data)
		}
	}
	if c, err := s.Committed(); err != nil || c > last {
		t.Fatalf("committed is %d (%v), the log ends at %d", c, err, last)
	}
}

func TestDamagedEntryIsNoticed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log.db")
	s, err := openBolt(path, func() uint64 { return 0 })
	if err != nil {
		t.Fatal(err)
	}
	if err := s.StoreLogs(entries(1, 5, 1)); err != nil {
		t.Fatal(err)
	}
	s.Close()
	flipEntry(t, path, 3)
	s, err = openBolt(path, func() uint64 { return 0 })
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.GetLog(3, new(raft.Log)); err == nil || errors.Is(err, raft.ErrLogNotFound) {
		t.Errorf("a flipped bit gives %v", err)
	}
	if err := s.GetLog(4, new(raft.Log)); err != nil {
		t.Errorf("its neighbour: %v", err)
	}
}

// flipEntry damages one entry's stored bytes.
func flipEntry(t testing.TB, path string, index uint64) {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	err = db.Update(func(tx *bbolt.Tx) error {
		data := bytes.Clone(tx.Bucket(bucketLog).Get(indexKey(index)))
		data[len(data)/2] ^= 4
		e, err := decodeExtent(tx.Bucket(bucketMeta).Get(keyExtent))
		e.transaction = uint64(tx.ID())
		return errors.Join(err, tx.Bucket(bucketMeta).Put(keyExtent, e.encode()), tx.Bucket(bucketLog).Put(indexKey(index), data))
	})
	if err != nil {
		t.Fatal(err)
	}
}

func FuzzDecodeEntry(f *testing.F) {
	for _, log := range []*raft.Log{entry(1, 1, "a"), {Index: 1, Type: raft.LogNoop}, {Index: 1, Extensions: []byte("x"), AppendedAt: time.Unix(5, 0)}} {
		f.Add(uint64(1), appendEntry(nil, log))
	}
	f.Add(uint64(0), []byte{})
	f.Fuzz(func(t *testing.T, index uint64, data []byte) {
		var log raft.Log
		if decodeEntry(index, data, &log) == nil {
			var again raft.Log
			if err := decodeEntry(index, appendEntry(nil, &log), &again); err != nil || !cmp.Equal(log, again) {
				t.Errorf("%v: %v is not %v", err, again, log)
			}
		}
		// With a right checksum the rest of the parser is reached.
		whole := binary.BigEndian.AppendUint32(bytes.Clone(data), entrySum(index, data))
		_ = decodeEntry(index, whole, &log)
		_, _ = decodeBatch(data)
	})
}

func BenchmarkStoreLogs(b *testing.B) {
	for _, n := range []uint64{1, 64} {
		b.Run(fmt.Sprintf("batch=%d", n), func(b *testing.B) {
			s, err := openBolt(filepath.Join(b.TempDir(), "log.db"), func() uint64 { return 0 })
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			data := strings.Repeat("x", 512)
			last := uint64(0)
			for b.Loop() {
				logs := make([]*raft.Log, n)
				for i := range logs {
					last++
					logs[i] = entry(last, 1, data)
				}
				if err := s.StoreLogs(logs); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(last)/b.Elapsed().Seconds(), "entries/s")
		})
	}
}
