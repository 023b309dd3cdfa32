package replica

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

var errIO = errors.New("input/output error")

// faulty is a store whose disk can be broken, or made to hang, while it runs.
type faulty struct {
	store
	broken atomic.Bool
	hang   atomic.Pointer[chan struct{}] // writes wait until it is closed
}

func (f *faulty) write() error {
	if c := f.hang.Load(); c != nil {
		<-*c
	}
	if f.broken.Load() {
		return errIO
	}
	return nil
}

func (f *faulty) StoreLog(log *raft.Log) error { return f.StoreLogs([]*raft.Log{log}) }

func (f *faulty) StoreLogs(logs []*raft.Log) error {
	if err := f.write(); err != nil {
		return err
	}
	return f.store.StoreLogs(logs)
}

func (f *faulty) Set(key, value []byte) error {
	if err := f.write(); err != nil {
		return err
	}
	return f.store.Set(key, value)
}

func (f *faulty) SetUint64(key []byte, value uint64) error {
	if err := f.write(); err != nil {
		return err
	}
	return f.store.SetUint64(key, value)
}

func (f *faulty) GetLog(index uint64, log *raft.Log) error {
	if f.broken.Load() {
		return errIO
	}
	return f.store.GetLog(index, log)
}

func onFaultyDisk(f *faulty, stall time.Duration) func(*Config) {
	return func(cfg *Config) {
		cfg.Timing.DiskStall = stall
		under := cfg.wrapStore
		cfg.wrapStore = func(s store) store {
			if under != nil {
				s = under(s)
			}
			f.store = s
			return f
		}
	}
}

// A leader whose disk errs or hangs must give way at once, and stay readable.
func TestDiskFails(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"errors", "hangs"} {
		for _, who := range []string{"leader", "follower"} {
			t.Run(who+"'s disk "+how, func(t *testing.T) {
				t.Parallel()
				disk := &faulty{}
				nodes := cluster(t, "ca1", "ca2")
				victim := newNode(t, "ca3")
				join(t, nodes[0], victim, onFaultyDisk(disk, 300*time.Millisecond))
				if who == "leader" {
					await(t, "the victim to lead", func() bool {
						if !victim.IsLeader() {
							leaderOf(t, victim).TransferLeadership(testContext(t))
						}
						return victim.IsLeader() && victim.Barrier(testContext(t)) == nil
					})
				} else {
					await(t, "another to lead", func() bool {
						if victim.IsLeader() {
							victim.TransferLeadership(testContext(t))
						}
						return !victim.IsLeader() && victim.Leader() != ""
					})
				}
				carryOut(t, victim, token("before"))
				await(t, "the victim", func() bool { return victim.has("before") })

				began := time.Now()
				if how == "errors" {
					disk.broken.Store(true)
				} else {
					hang := make(chan struct{})
					disk.hang.Store(&hang)
					t.Cleanup(func() { close(hang) })
				}
				if who == "leader" {
					if _, err := victim.Propose(testContext(t), token("lost")); err == nil {
						t.Error("a write was acknowledged by a broken disk alone")
					}
				}
				carryOut(t, nodes[0], token("after")) // the others go on
				t.Logf("next write after %v", time.Since(began))
				select {
				case <-victim.Down():
				case <-time.After(10 * time.Second):
					t.Fatal("the victim still takes part in Raft")
				}
				if err := victim.Err(); !errors.Is(err, ErrDisk) {
					t.Errorf("it left for %v", err)
				}
				await(t, "word of lost leadership", func() bool {
					select {
					case lead := <-victim.LeaderCh():
						return !lead
					default:
						return false
					}
				})
				if victim.IsLeader() || victim.Leader() != "" || victim.State() != "Stopped" || victim.net.count() != 0 {
					t.Error("it does not know that it is out")
				}
				if _, err := victim.Propose(testContext(t), token("x")); !errors.Is(err, ErrStopped) {
					t.Errorf("propose gives %v", err)
				}
				if err := victim.Barrier(testContext(t)); !errors.Is(err, ErrStopped) {
					t.Errorf("barrier gives %v", err)
				}
				if !victim.has("before") || victim.Stats().Err == nil {
					t.Error("what was agreed cannot be read")
				}
			})
		}
	}
}

// The only voter elects itself over and over; Raft would panic when its term cannot be
// stored.
func TestDiskOfALoneNodeFails(t *testing.T) {
	t.Parallel()
	n := newNode(t, "ca1")
	if err := Bootstrap(n.config(), initCommand(n)); err != nil {
		t.Fatal(err)
	}
	disk := &faulty{}
	n.start(onFaultyDisk(disk, time.Second), func(c *Config) { c.Timing.Heartbeat = time.Second })
	disk.broken.Store(true)
	select {
	case <-n.Down():
	case <-time.After(10 * time.Second):
		t.Fatal("it goes on")
	}
	if _, err := n.Propose(testContext(t), token("x")); !errors.Is(err, ErrStopped) {
		t.Errorf("propose gives %v", err)
	}
	if err := n.stop(); err != nil && !errors.Is(err, ErrDisk) && !errors.Is(err, errIO) {
		t.Errorf("Run gives %v", err)
	}
}

func TestWatchdog(t *testing.T) {
	begin := func(f *faulty) (*disk, *atomic.Pointer[error]) {
		var cause atomic.Pointer[error]
		f.store = (&memoryShelf{}).open(func() uint64 { return 0 })
		return newDisk(f, 2*time.Second, func(err error) { cause.CompareAndSwap(nil, &err) }), &cause
	}
	t.Run("slow is no failure", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := &faulty{}
			d, cause := begin(f)
			hang := make(chan struct{})
			f.hang.Store(&hang)
			go func() {
				time.Sleep(1900 * time.Millisecond)
				close(hang)
			}()
			if err := d.StoreLogs(entries(1, 2, 1)); err != nil || cause.Load() != nil {
				t.Errorf("%v, %v", err, cause.Load())
			}
			time.Sleep(time.Minute)
			if cause.Load() != nil {
				t.Error("the watchdog of a finished write barked")
			}
		})
	})
	t.Run("a stall is", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := &faulty{}
			d, cause := begin(f)
			hang := make(chan struct{})
			f.hang.Store(&hang)
			go d.StoreLogs(entries(1, 2, 1))
			time.Sleep(2100 * time.Millisecond)
			synctest.Wait()
			if cause.Load() == nil || !errors.Is(*cause.Load(), ErrDisk) {
				t.Error("nobody was told")
			}
			if err := d.StoreLogs(entries(3, 3, 1)); !errors.Is(err, ErrDisk) {
				t.Errorf("the next write gives %v", err)
			}
			close(hang)
		})
	})
	t.Run("an error ends what would panic", func(t *testing.T) {
		f := &faulty{}
		d, cause := begin(f)
		f.broken.Store(true)
		for name, call := range map[string]func(){
			"term": func() { d.SetUint64([]byte("CurrentTerm"), 1) },
			"vote": func() { d.Set([]byte("LastVoteCand"), nil) },
			"read": func() { d.GetLog(1, new(raft.Log)) },
		} {
			returned := false
			done := make(chan struct{})
			go func() {
				defer close(done)
				call()
				returned = true
			}()
			<-done
			if returned {
				t.Errorf("%s: the caller went on", name)
			}
		}
		if cause.Load() == nil {
			t.Error("nobody was told")
		}
	})
	t.Run("an absent entry is no error", func(t *testing.T) {
		d, cause := begin(&faulty{})
		if err := d.GetLog(1, new(raft.Log)); !errors.Is(err, raft.ErrLogNotFound) || cause.Load() != nil {
			t.Error(err)
		}
	})
}

func TestLogCache(t *testing.T) {
	const room = 10
	c := &logCache{limit: room * (entryCost(entry(1, 1, "")) + 1)}
	held := map[uint64]*raft.Log{} // what was stored; the cache may hold any part of it
	last := uint64(0)
	random := rand.New(rand.NewPCG(3, 4))
	for step := range 5000 {
		switch random.IntN(6) {
		case 0:
			from := last - min(last, random.Uint64N(15))
			c.remove(from, last)
			for i := from; i <= last; i++ {
				delete(held, i)
			}
			if from <= last {
				last = from - min(from, 1)
			}
		case 1:
			to := random.Uint64N(last + 2)
			c.remove(0, to)
			for i := range to + 1 {
				delete(held, i)
			}
		case 2: // a snapshot was installed
			c.remove(0, last)
			clear(held)
			last += random.Uint64N(20)
		default:
			n := random.Uint64N(4) + 1
			logs := entries(last+1, last+n, uint64(step))
			for _, log := range logs {
				log.Data = log.Data[:1]
				held[log.Index] = log
			}
			c.add(logs)
			last += n
			var got raft.Log
			if !c.get(last, &got) {
				t.Fatalf("step %d: the newest entry is not in the cache", step)
			}
		}
		found, bytes := 0, 0
		for i := last - min(last, 40); i <= last+5; i++ {
			var got raft.Log
			if !c.get(i, &got) {
				continue
			}
			found++
			bytes += entryCost(&got)
			if held[i] == nil || got.Term != held[i].Term || got.Index != i {
				t.Fatalf("step %d: entry %d is %v, stored was %v", step, i, got, held[i])
			}
		}
		if bytes != c.size() || bytes > c.limit {
			t.Fatalf("step %d: %d bytes counted, %d held, %d allowed", step, c.size(), bytes, c.limit)
		}
	}
	big := &logCache{limit: 100}
	big.add([]*raft.Log{entry(1, 1, "an entry over the limit")})
	if big.size() != 0 {
		t.Error("an entry larger than the cache is kept")
	}
}

// Nothing is left running after Run.
func TestNothingLeaks(t *testing.T) {
	before := runtime.NumGoroutine()
	n := newNode(t, "ca1")
	if err := Bootstrap(n.config(), initCommand(n)); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		n.start()
		awaitLeader(t, n)
		var callers sync.WaitGroup
		for i := range 8 {
			callers.Go(func() { n.Propose(testContext(t), token(fmt.Sprintf("leak%d", i))) })
		}
		callers.Wait()
		if err := n.stop(); err != nil {
			t.Fatal(err)
		}
	}
	await(t, "the goroutines to end", func() bool { return runtime.NumGoroutine() <= before+1 })
}
