package presence

import (
	"fmt"
	"testing"
	"time"
)

// An instance that flaps is told of a few times and then ever more rarely, whether its own
// agent or another replica says so; it counts as unhealthy meanwhile. Another instance of
// the agent is told of at once, and when it has come to rest it is shown as it is.
func TestFlapsAreDamped(t *testing.T) {
	const rate, minutes = 100, 5 // reports a second
	v := Version{"boot-1", 1}
	unhealthy := func(i Instance) Instance { i.Healthy = false; return i }
	for name, tell := range map[string]func(table *Table, now time.Time, list ...Instance) []Change{
		"its agent": func(table *Table, now time.Time, list ...Instance) []Change {
			return table.Report(now, "h1", v, list)
		},
		"another replica": func(table *Table, now time.Time, list ...Instance) []Change {
			all := []Instance{said("", "h1", v)}
			for _, i := range list {
				i.Agent, i.Version = "h1", v
				all = append(all, i)
			}
			return table.Remote(now, "ca-2", all, nil, false)
		},
	} {
		t.Run(name, func(t *testing.T) {
			table := New("ca-1")
			if name == "its agent" {
				table.Attach(start, "h1", v)
			}
			flaps, calm := instance("accounts", ":1"), instance("ledger", ":1")
			told := map[string]int{}
			count := func(changes []Change) {
				for _, c := range changes {
					told[c.Instance.Service]++
				}
			}
			now, good := start, 0
			for i := range rate * 60 * minutes {
				now = now.Add(time.Second / rate)
				if at, waits := table.Due(); waits && !now.Before(at) {
					count(table.Release(now))
				}
				next := flaps
				if i%2 == 1 {
					next = unhealthy(flaps)
				}
				count(tell(table, now, next, calm))
				if shown, _ := table.Get(Key{"h1", Place{Service: "accounts"}}); shown.Healthy {
					good++
				}
			}
			if n := told["accounts"]; n < 2*freeChanges || n > 60 {
				t.Errorf("told %d times", n)
			}
			if told["ledger"] != 1 {
				t.Errorf("the other instance: told %d times", told["ledger"])
			}
			if good > 100 {
				t.Errorf("it counts as healthy in %d of %d moments", good, rate*60*minutes)
			}
			if changes := tell(table, now, unhealthy(flaps), unhealthy(calm)); len(changes) != 1 || changes[0].Instance.Service != "ledger" {
				t.Errorf("what is worse is told at once: %+v", changes)
			}
			tell(table, now, flaps, unhealthy(calm)) // it has come to rest
			at, waits := table.Due()
			if !waits || at.Sub(now) > longestWait {
				t.Fatalf("due in %v: %v", at.Sub(now), waits)
			}
			if changes := table.Release(at.Add(-time.Millisecond)); len(changes) > 0 {
				t.Errorf("too early: %+v", changes)
			}
			table.Release(at)
			if shown, _ := table.Get(Key{"h1", Place{Service: "accounts"}}); !shown.Healthy {
				t.Errorf("%+v", shown)
			}
			// Control: what happens once in a while is told at once.
			for range 10 {
				now = now.Add(10 * time.Minute)
				table.Expire(now)
				if n := len(tell(table, now, unhealthy(flaps), calm)) + len(tell(table, now, flaps, calm)); n < 2 {
					t.Errorf("told of %d changes", n)
				}
			}
		})
	}
}

// Of an agent that names its instances anew in each report two changes a second are told at
// most, a hundredth of what it says. Control: the instances that a service may have are told of at once, also
// when all are replaced now and then, and so is another service's.
func TestInstancesOfEverNewNamesAreDamped(t *testing.T) {
	v := Version{"boot-1", 1}
	table := New("ca-1")
	table.Attach(start, "h1", v)
	report := func(now time.Time, round int, more ...Instance) (told int) {
		if at, waits := table.Due(); waits && !now.Before(at) {
			told += len(table.Release(now))
		}
		for i := range MaxInstancesOfService {
			one := instance("accounts", ":1")
			one.ID = fmt.Sprintf("r%d-%d", round, i)
			more = append(more, one)
		}
		return told + len(table.Report(now, "h1", v, more))
	}
	if told := report(start, 0); told != MaxInstancesOfService {
		t.Fatalf("control: of the first instances %d are told", told)
	}
	now := start
	for round := 1; round <= 20; round++ { // a deployment every five minutes
		now = now.Add(5 * time.Minute)
		if told := report(now, round); told != 2*MaxInstancesOfService {
			t.Errorf("control: of a deployment %d changes are told", told)
		}
	}
	const rate, minutes = 5, 5 // reports a second
	told := 0
	for i := range rate * 60 * minutes {
		now = now.Add(time.Second / rate)
		told += report(now, 100+i)
	}
	if most := 2 * 60 * minutes; told > most {
		t.Errorf("told of %d changes in %d min, at most %d", told, minutes, most)
	}
	other := instance("ledger", ":1")
	other.ID = "a"
	report(now, 9999, other)
	if shown, ok := table.Get(Key{"h1", Place{Service: "ledger", ID: "a"}}); !ok || !shown.Healthy {
		t.Error("control: another service's instance waits")
	}
}

// Addresses, reconnects and withdrawals flap no better, and the accounts are bounded.
func TestFlapsOfEveryKindAreDamped(t *testing.T) {
	table, now := New("ca-1"), start
	v := Version{"boot-1", 1}
	table.Attach(now, "h1", v)
	told := 0
	for i := range 3000 {
		now = now.Add(time.Millisecond)
		told += len(table.Report(now, "h1", v, []Instance{instance("accounts", fmt.Sprint(":", i%2))}))
	}
	if told > freeChanges+4 {
		t.Errorf("addresses: told %d times", told)
	}
	told = 0
	for range 3000 {
		now = now.Add(time.Millisecond)
		told += len(table.Report(now, "h1", v, nil)) + len(table.Report(now, "h1", v, []Instance{instance("ledger", ":1")}))
	}
	if told > 2*(freeChanges+4) {
		t.Errorf("withdrawals: told %d times", told)
	}
	for i := range 20 {
		var many []Instance
		for j := range MaxInstancesPerAgent {
			many = append(many, instance(fmt.Sprint("s", i, "-", j), ":1"))
		}
		table.Report(now, "h1", v, many)
	}
	if n := len(table.agents["h1"].dampers); n > 2*MaxInstancesPerAgent {
		t.Errorf("%d accounts", n)
	}
	table.Report(now, "h1", v, nil)
	table.Expire(now.Add(time.Hour))
	if n := len(table.agents["h1"].dampers); n > 0 {
		t.Errorf("%d accounts of nothing", n)
	}
	table.Forget("h1")
	if len(table.agents)+len(table.waiting) > 0 {
		t.Errorf("%d agents are left, %d wait", len(table.agents), len(table.waiting))
	}
}
