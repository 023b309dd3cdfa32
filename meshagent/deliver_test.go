package meshagent

import (
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// acks is what the agent tells the CA.
type acks struct {
	revision uint64
	waiting  []string
	held     []string
}

// watched is an agent without anything else; said is what it told last.
func watched(settle time.Duration) (a *Agent, said func() acks) {
	a = &Agent{store: &store{}}
	var mu sync.Mutex
	var last acks
	a.deliveries.settle = settle
	a.deliveries.acknowledge = func(revision uint64, waiting []string) {
		mu.Lock()
		defer mu.Unlock()
		last.revision, last.waiting = revision, waiting
	}
	a.deliveries.hold = func(ids []string) {
		mu.Lock()
		defer mu.Unlock()
		last.held = ids
	}
	return a, func() acks {
		mu.Lock()
		defer mu.Unlock()
		return last
	}
}

func picture(content uint64, under ...string) *State {
	return &State{content: content, underIDs: under}
}

// A host on which much changes is acknowledged a settle time after the last change, and
// not one for each: else a rotation waits for minutes.
func TestBurstSettlesTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const settle = 10 * time.Second
		a, said := watched(settle)
		defer a.deliveries.stop()
		a.deliveries.applied(picture(1), 1)
		workload := a.Deliver("workload")
		for n := uint64(2); n <= 2*maxPendingAcks; n++ {
			a.deliveries.applied(picture(n), n)
			workload.Got(picture(n))
			time.Sleep(10 * time.Millisecond)
		}
		time.Sleep(settle - 20*time.Millisecond)
		synctest.Wait()
		if said().revision == 2*maxPendingAcks {
			t.Error("the last change is acknowledged before it has settled")
		}
		time.Sleep(20 * time.Millisecond)
		synctest.Wait()
		if said().revision != 2*maxPendingAcks {
			t.Errorf("%d of %d are acknowledged", said().revision, 2*maxPendingAcks)
		}
	})
}

// The agent acknowledges what its workloads hold, a settle time after they were given
// it, and what nobody has to be told of at once.
func TestAcknowledgesWhatWasDelivered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const settle = 10 * time.Second
		a, said := watched(settle)
		defer a.deliveries.stop()
		one, two, three := picture(1), picture(2), picture(3)

		a.deliveries.applied(one, 10)
		if said().revision != 10 {
			t.Fatalf("control: nobody is there to be told, and %d is acknowledged", said().revision)
		}
		fast, slow := a.Deliver("fast"), a.Deliver("slow")
		fast.Got(one)
		a.deliveries.applied(two, 20) // slow was given nothing yet: it holds nothing old
		if said().revision != 10 || !slices.Equal(said().waiting, []string{"fast"}) {
			t.Errorf("acknowledged %d, waits for %v", said().revision, said().waiting)
		}
		slow.Got(one) // an old one
		fast.Got(two)
		time.Sleep(time.Minute)
		synctest.Wait()
		if said().revision != 10 || !slices.Equal(said().waiting, []string{"slow"}) {
			t.Errorf("acknowledged %d, waits for %v", said().revision, said().waiting)
		}
		slow.Got(two)
		time.Sleep(settle - time.Second)
		synctest.Wait()
		if said().revision != 10 {
			t.Error("acknowledged before the settle time was over")
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if said().revision != 20 || len(said().waiting) != 0 {
			t.Errorf("acknowledged %d, waits for %v", said().revision, said().waiting)
		}

		// A revision that brings this host nothing needs nobody.
		a.deliveries.applied(two, 25)
		if said().revision != 25 {
			t.Errorf("%d", said().revision)
		}
		// While one settles, the next is on its way; none is acknowledged too early.
		a.deliveries.applied(three, 30)
		fast.Got(three)
		slow.Got(three)
		time.Sleep(settle / 2)
		synctest.Wait()
		four := picture(4)
		a.deliveries.applied(four, 40)
		fast.Got(four)
		time.Sleep(settle / 2)
		synctest.Wait()
		if said().revision != 30 {
			t.Errorf("%d", said().revision)
		}
		// Who is gone holds nothing up, who has come since has the newest.
		slow.Close()
		latest := a.Deliver("new")
		latest.Got(four)
		time.Sleep(settle)
		synctest.Wait()
		if said().revision != 40 {
			t.Errorf("%d", said().revision)
		}
		// A consumer that hangs makes the agent remember a bounded number.
		for i := range uint64(1000) {
			a.deliveries.applied(picture(5+i), 50+i)
		}
		if n := len(a.deliveries.pending); n > maxPendingAcks || said().revision != 40 {
			t.Errorf("%d are pending, %d is acknowledged", n, said().revision)
		}
		last := picture(5 + 999)
		fast.Got(last)
		latest.Got(last)
		time.Sleep(time.Duration(maxPendingAcks+1) * settle)
		synctest.Wait()
		if said().revision != 50+999 || len(a.deliveries.pending) != 0 {
			t.Errorf("%d, %d pending", said().revision, len(a.deliveries.pending))
		}
	})
}

// An SVID counts as held as long as a workload may use it.
func TestHoldsWhatWasDelivered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const settle = 10 * time.Second
		a, said := watched(settle)
		defer a.deliveries.stop()
		old, next := picture(1, "old"), picture(2, "new")
		a.deliveries.applied(old, 1)
		w := a.Deliver("w")
		w.Got(old)
		a.deliveries.applied(next, 2)
		time.Sleep(time.Hour)
		synctest.Wait()
		if !slices.Equal(said().held, []string{"new", "old"}) {
			t.Errorf("a workload has not taken the new one: %v", said().held)
		}
		w.Got(next)
		time.Sleep(settle - time.Second)
		synctest.Wait()
		if !slices.Equal(said().held, []string{"new", "old"}) {
			t.Errorf("it has had it for a moment: %v", said().held)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if !slices.Equal(said().held, []string{"new"}) {
			t.Errorf("%v", said().held)
		}
		w.Close()
		if !slices.Equal(said().held, []string{"new"}) {
			t.Errorf("%v", said().held)
		}
	})
}

// Of thousands that hang the CA is told some, and always the same: what it is told goes
// over the network.
func TestThousandsLackSomething(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, said := watched(time.Second)
		defer a.deliveries.stop()
		one, two := picture(1), picture(2)
		a.deliveries.applied(one, 1)
		var all []*Delivery
		for range 5000 {
			d := a.Deliver("w" + strconv.Itoa(len(all)))
			d.Got(one)
			all = append(all, d)
		}
		a.deliveries.applied(two, 2)
		first := said().waiting
		if len(first) != maxBehind || said().revision != 1 {
			t.Fatalf("acknowledged %d, waits for %v", said().revision, first)
		}
		for _, d := range all {
			if !slices.Contains(first, d.name) {
				d.Got(two)
			}
		}
		if now := said().waiting; !slices.Equal(now, first) {
			t.Errorf("waits for %v, before for %v", now, first)
		}
		for _, d := range all {
			d.Got(two)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if said().revision != 2 || len(said().waiting) != 0 || len(a.deliveries.given) != 1 {
			t.Errorf("acknowledged %d, waits for %v", said().revision, said().waiting)
		}
	})
}

// When the CA node that was followed is left, because two others contradict it, its
// revisions are not acknowledged any more, and those of the next node are, though lower.
func TestRevisionsOfALeftNodeAreNotAcknowledged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const settle = 10 * time.Second
		a, said := watched(settle)
		defer a.deliveries.stop()
		workload := a.Deliver("workload")
		a.deliveries.applied(picture(1), 1<<43)
		workload.Got(picture(1))
		time.Sleep(settle)
		synctest.Wait()
		if said().revision != 1<<43 {
			t.Fatalf("control: %d is acknowledged", said().revision)
		}
		a.deliveries.applied(picture(2), 1<<43+1) // it settles, and the node is left
		workload.Got(picture(2))
		time.Sleep(time.Second)
		a.deliveries.applied(picture(3), 50)
		workload.Got(picture(3))
		time.Sleep(settle - time.Second/2)
		synctest.Wait()
		if said().revision > 1<<43 {
			t.Errorf("%d is acknowledged, after its node was left", said().revision)
		}
		time.Sleep(settle)
		synctest.Wait()
		if said().revision != 50 {
			t.Errorf("%d is acknowledged, not 50", said().revision)
		}
	})
}

// What an agent keeps of the CA survives a restart, with whom it compares.
func TestKnownKeepsWhomToCompareWith(t *testing.T) {
	dir := t.TempDir()
	k := &known{cluster: &statev1.Cluster{Id: []byte("id")}, members: []*statev1.Member{{Id: "liar"}},
		confirmed: []*statev1.Member{{Id: "a", ApiAddress: "a:1"}, {Id: "b", ApiAddress: "b:1"}}}
	if err := k.save(dir); err != nil {
		t.Fatal(err)
	}
	back, err := load(dir)
	if err != nil || !back.equal(k) || len(back.confirmed) != 2 || len(back.members) != 1 {
		t.Fatalf("%+v, %v", back, err)
	}
	changed := *back
	changed.confirmed = changed.confirmed[:1]
	if changed.equal(back) {
		t.Error("a change of whom to compare with is not written")
	}
}
