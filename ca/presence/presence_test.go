package presence

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/federation/catalog"
)

var start = time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)

func instance(service, address string) Instance {
	return Instance{Endpoint: catalog.Endpoint{Service: service, Datacenter: "dc1", Address: address, Healthy: true}}
}

// said is what a replica tells of a session, without a service, or of an instance in it.
func said(service, agent string, v Version) Instance {
	return Instance{Endpoint: catalog.Endpoint{Service: service, Agent: agent}, Version: v}
}

// picture prints what a table shows.
func picture(t *Table) []string {
	lines := []string{}
	for _, i := range t.All() {
		line := i.Service + "@" + i.Agent + " " + i.Address
		if i.Stale {
			line += " stale"
		}
		lines = append(lines, line)
	}
	return lines
}

func want(t *testing.T, table *Table, lines ...string) {
	t.Helper()
	if lines == nil {
		lines = []string{}
	}
	if diff := cmp.Diff(lines, picture(table)); diff != "" {
		t.Errorf("shown (-want +got):\n%s", diff)
	}
}

// tell sends what one table has to say of its own sessions to another, as agents signed
// them.
func tell(now time.Time, from, to *Table) {
	to.Remote(now, from.self, as(Proven, from.Held()), nil, true)
}

// as is what a replica says, of one worth.
func as(worth Worth, said []Instance) []Instance {
	for i := range said {
		if said[i].Service == "" {
			said[i].Worth = worth
		}
	}
	return said
}

func TestReportReplaces(t *testing.T) {
	table, v := New("ca-1"), Version{"boot-1", 1}
	table.Attach(start, "h1", v)
	table.Report(start, "h1", v, []Instance{instance("accounts", ":1"), instance("ledger", ":2")})
	want(t, table, "accounts@h1 :1", "ledger@h1 :2")

	changes := table.Report(start, "h1", v, []Instance{instance("accounts", ":3")})
	want(t, table, "accounts@h1 :3")
	if len(changes) != 2 || changes[0].Withdrawn || !changes[1].Withdrawn {
		t.Errorf("changes: %+v", changes)
	}
	if again := table.Report(start, "h1", v, []Instance{instance("accounts", ":3")}); len(again) != 0 {
		t.Errorf("the same report changed something: %+v", again)
	}
}

func TestLostStreamLeavesStaleInstances(t *testing.T) {
	table, v := New("ca-1"), Version{"boot-1", 1}
	table.Attach(start, "h1", v)
	table.Report(start, "h1", v, []Instance{instance("accounts", ":1")})

	table.Detach(start, "h1", v, false)
	want(t, table, "accounts@h1 :1 stale")

	table.Expire(start.Add(ForgetAfter - time.Second))
	want(t, table, "accounts@h1 :1 stale")
	table.Expire(start.Add(ForgetAfter))
	want(t, table)
	if len(table.agents) != 0 {
		t.Errorf("%d agents are left in the table", len(table.agents))
	}
}

func TestGoodbyeWithdraws(t *testing.T) {
	table, v := New("ca-1"), Version{"boot-1", 1}
	table.Attach(start, "h1", v)
	table.Report(start, "h1", v, []Instance{instance("accounts", ":1")})
	table.Detach(start, "h1", v, true)
	want(t, table)
}

// A reconnect takes nobody's endpoints away, also before the first report.
func TestReconnectKeepsInstances(t *testing.T) {
	table := New("ca-1")
	table.Attach(start, "h1", Version{"boot-1", 1})
	table.Report(start, "h1", Version{"boot-1", 1}, []Instance{instance("accounts", ":1")})
	table.Detach(start, "h1", Version{"boot-1", 1}, false)
	want(t, table, "accounts@h1 :1 stale")
	table.Attach(start, "h1", Version{"boot-1", 2})
	want(t, table, "accounts@h1 :1")

	// The end of the stream before, noticed late, changes nothing.
	if changes := table.Detach(start, "h1", Version{"boot-1", 1}, true); len(changes) != 0 {
		t.Errorf("a replaced stream changed something: %+v", changes)
	}
	if changes := table.Report(start, "h1", Version{"boot-1", 1}, nil); len(changes) != 0 {
		t.Errorf("a replaced stream reported: %+v", changes)
	}
	want(t, table, "accounts@h1 :1")
}

func TestOlderStreamIsRefused(t *testing.T) {
	table := New("ca-1")
	table.Attach(start, "h1", Version{"boot-1", 2})
	if _, ok := table.Attach(start, "h1", Version{"boot-1", 1}); ok {
		t.Error("connect 1 took the place of connect 2")
	}
	if _, ok := table.Attach(start, "h1", Version{"boot-0", 1}); !ok {
		t.Error("a restarted agent could not attach")
	}
}

// Only the holder of the stream withdraws: a replica that lost the agent, and one
// that never had it, cannot.
func TestOnlyTheHolderWithdraws(t *testing.T) {
	a, b, c := New("ca-1"), New("ca-2"), New("ca-3")
	a.Attach(start, "h1", Version{"boot-1", 1})
	a.Report(start, "h1", Version{"boot-1", 1}, []Instance{instance("accounts", ":1")})
	tell(start, a, c)
	want(t, c, "accounts@h1 :1")

	// The agent moves to ca-2; ca-1 only notices that its stream is gone.
	b.Attach(start, "h1", Version{"boot-1", 2})
	b.Report(start, "h1", Version{"boot-1", 2}, []Instance{instance("accounts", ":1")})
	tell(start, b, c)
	a.Detach(start, "h1", Version{"boot-1", 1}, false)
	tell(start, a, c)
	want(t, c, "accounts@h1 :1")

	a.Expire(start.Add(ForgetAfter))
	tell(start, a, c)
	want(t, c, "accounts@h1 :1")

	// ca-2 holds the stream and does.
	b.Report(start, "h1", Version{"boot-1", 2}, nil)
	tell(start, b, c)
	want(t, c)
}

func TestLostReplicaMakesStale(t *testing.T) {
	a, c := New("ca-1"), New("ca-3")
	a.Attach(start, "h1", Version{"boot-1", 1})
	a.Report(start, "h1", Version{"boot-1", 1}, []Instance{instance("accounts", ":1")})
	tell(start, a, c)
	c.Lost(start, "ca-1")
	want(t, c, "accounts@h1 :1 stale")
	tell(start, a, c)
	want(t, c, "accounts@h1 :1")
}

// The agent is seen at another replica: what the lost one vouched for is replaced,
// not kept beside it.
func TestSeenElsewhere(t *testing.T) {
	a, b, c := New("ca-1"), New("ca-2"), New("ca-3")
	a.Attach(start, "h1", Version{"boot-1", 1})
	a.Report(start, "h1", Version{"boot-1", 1}, []Instance{instance("accounts", ":1"), instance("ledger", ":2")})
	tell(start, a, c)
	c.Lost(start, "ca-1")

	b.Attach(start, "h1", Version{"boot-2", 1})
	b.Report(start, "h1", Version{"boot-2", 1}, []Instance{instance("accounts", ":1")})
	tell(start, b, c)
	want(t, c, "accounts@h1 :1")

	a.Remote(start, "ca-2", as(Proven, b.HeldOf("h1")), nil, false)
	if a.Superseded("h1", Version{"boot-1", 1}, true) {
		t.Error("another boot at another replica ends a live stream")
	}
	want(t, a, "accounts@h1 :1", "ledger@h1 :2")
	a.Detach(start, "h1", Version{"boot-1", 1}, false)
	want(t, a, "accounts@h1 :1")
	if !a.Superseded("h1", Version{"boot-1", 1}, false) {
		t.Error("ca-1 does not know that its lost session was superseded")
	}
	tell(start, a, b)
	if b.Superseded("h1", Version{"boot-2", 1}, true) || b.Superseded("h1", Version{"boot-2", 1}, false) {
		t.Error("the newer session counts as superseded by the older one")
	}
}

// A goodbye counts although another replica, just killed, seems to hold an earlier
// session of the same boot.
func TestGoodbyeBeatsAnEarlierSession(t *testing.T) {
	a, b, c := New("ca-1"), New("ca-2"), New("ca-3")
	a.Attach(start, "h1", Version{"boot-1", 1})
	a.Report(start, "h1", Version{"boot-1", 1}, []Instance{instance("accounts", ":1")})
	tell(start, a, b)
	tell(start, a, c)
	b.Attach(start, "h1", Version{"boot-1", 2})
	want(t, b, "accounts@h1 :1")
	if !a.Superseded("h1", Version{"boot-1", 0}, true) {
		t.Error("an earlier session of the same boot is not superseded")
	}
	b.Detach(start, "h1", Version{"boot-1", 2}, true)
	tell(start, b, c)
	b.Lost(start, "ca-1")
	c.Lost(start, "ca-1")
	want(t, b)
	want(t, c)
}

// A replica can speak only for itself, and only of sessions it announced.
func TestRemoteIsBounded(t *testing.T) {
	table, v := New("ca-1"), Version{"boot-1", 1}
	table.Attach(start, "h1", v)
	table.Report(start, "h1", v, []Instance{instance("accounts", ":1")})
	table.Remote(start, "ca-1", nil, nil, true)
	want(t, table, "accounts@h1 :1")

	table.Remote(start, "ca-2", []Instance{said("x", "h9", v)}, []Instance{said("", "h1", Version{}), said("", "h7", Version{})}, false)
	want(t, table, "accounts@h1 :1")

	many := []Instance{said("", "h2", v)}
	for i := range MaxInstancesPerAgent + 10 {
		many = append(many, said(fmt.Sprint("s", i), "h2", v))
	}
	table.Remote(start, "ca-2", many, nil, true)
	if got := len(table.All()); got != MaxInstancesPerAgent+1 {
		t.Errorf("%d instances", got)
	}

	for i := range 10 * maxBootsPerAgent {
		table.Attach(start, "h1", Version{fmt.Sprint("boot-", i), 1})
	}
	if got := len(table.agents["h1"].boots); got > maxBootsPerAgent+1 {
		t.Errorf("%d boots are remembered", got)
	}
}

// Whatever happens in whatever order: once every replica has heard every other,
// an agent that has a live stream somewhere is shown everywhere as that stream's
// replica knows it, nothing of it is stale, and an agent without one shows nothing
// fresh. And the changes that a table returned add up to what it shows.
func TestReplicasAgree(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const replicas, agents = 3, 2
		// Agents that sign their sessions, and those of the release before.
		worth := rapid.SampledFrom([]Worth{Proven, Unproven}).Draw(t, "worth")
		tables := make([]*Table, replicas)
		folded := make([]map[Key]Instance, replicas)
		for i := range tables {
			tables[i] = New(fmt.Sprint("ca-", i))
			folded[i] = make(map[Key]Instance)
		}
		note := func(i int, changes []Change) {
			for _, c := range changes {
				if c.Withdrawn {
					delete(folded[i], c.Instance.Key())
				} else {
					folded[i][c.Instance.Key()] = c.Instance
				}
			}
		}
		type session struct {
			at      int // replica; -1: none
			version Version
			reports []Instance
		}
		truth := make([]session, agents)
		for i := range truth {
			truth[i].at = -1
		}
		now := start
		connects := uint64(0)
		exchange := func(from, to int) {
			note(to, tables[to].Remote(now, tables[from].self, as(worth, tables[from].Held()), nil, true))
		}
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			now = now.Add(time.Second)
			who := rapid.IntRange(0, agents-1).Draw(t, "agent")
			name := fmt.Sprint("h", who)
			s := &truth[who]
			switch rapid.IntRange(0, 4).Draw(t, "what") {
			case 0: // connects somewhere; the stream before may be noticed as gone or not
				was := *s
				connects++
				boot := s.version.BootID
				if boot == "" || rapid.Bool().Draw(t, "restart") {
					boot = fmt.Sprint("boot-", connects)
				}
				*s = session{at: rapid.IntRange(0, replicas-1).Draw(t, "at"), version: Version{boot, connects}}
				changes, ok := tables[s.at].Attach(now, name, s.version)
				if !ok {
					t.Fatalf("%s could not attach to %d with %v", name, s.at, s.version)
				}
				note(s.at, changes)
				note(s.at, tables[s.at].Report(now, name, s.version, nil))
				if was.at >= 0 {
					note(was.at, tables[was.at].Detach(now, name, was.version, false))
				}
			case 1: // reports
				if s.at >= 0 {
					s.reports = nil
					for i := range rapid.IntRange(0, 3).Draw(t, "instances") {
						s.reports = append(s.reports, instance(fmt.Sprint("s", i), fmt.Sprint(":", rapid.IntRange(1, 3).Draw(t, "port"))))
					}
					note(s.at, tables[s.at].Report(now, name, s.version, s.reports))
				}
			case 2: // ends
				if s.at >= 0 {
					note(s.at, tables[s.at].Detach(now, name, s.version, rapid.Bool().Draw(t, "goodbye")))
					s.at = -1
				}
			case 3:
				exchange(rapid.IntRange(0, replicas-1).Draw(t, "from"), rapid.IntRange(0, replicas-1).Draw(t, "to"))
			case 4:
				i, j := rapid.IntRange(0, replicas-1).Draw(t, "here"), rapid.IntRange(0, replicas-1).Draw(t, "lost")
				if i != j {
					note(i, tables[i].Lost(now, tables[j].self))
				}
			}
		}
		for from := range tables {
			for to := range tables {
				exchange(from, to)
			}
		}
		now = now.Add(longestWait)
		for i, table := range tables { // what was damped is shown in the end
			note(i, table.Release(now))
			if at, waits := table.Due(); waits {
				t.Fatalf("ca-%d has something to show at %v", i, at)
			}
		}
		for i, table := range tables {
			if diff := cmp.Diff(folded[i], shown(table)); diff != "" {
				t.Fatalf("ca-%d: the changes do not add up (-folded +shown):\n%s", i, diff)
			}
			for who, s := range truth {
				name := fmt.Sprint("h", who)
				got := map[string]string{}
				for _, in := range table.All() {
					if in.Agent != name {
						continue
					}
					got[in.Service] = in.Address
					if in.Stale != (s.at < 0) {
						t.Fatalf("ca-%d: %+v, while the agent's stream is at %d", i, in, s.at)
					}
				}
				if s.at < 0 {
					continue
				}
				want := map[string]string{}
				for _, in := range s.reports {
					want[in.Service] = in.Address
				}
				if !maps.Equal(got, want) {
					t.Fatalf("ca-%d shows %v of %s, it reported %v", i, got, name, want)
				}
			}
		}
	})
}

func shown(t *Table) map[Key]Instance {
	m := make(map[Key]Instance)
	for _, i := range slices.Collect(t.Instances()) {
		m[i.Key()] = i
	}
	return m
}

// What another replica says of a session that the agent did not sign takes nothing from a
// live stream here, neither its end nor what it serves, and nothing from what a third one
// says of a session that was signed.
func TestBareWordTakesNothing(t *testing.T) {
	v := Version{"boot-1", 1}
	lie := func(worth Worth, v Version) []Instance {
		session, place := said("", "h1", v), said("accounts", "h1", v)
		session.Worth, place.Address = worth, ":666"
		return []Instance{session, place}
	}
	holder := func() *Table {
		table := New("ca-1")
		table.Attach(start, "h1", v)
		table.Report(start, "h1", v, []Instance{instance("accounts", ":1")})
		return table
	}
	later, another := Version{"boot-1", math.MaxUint64}, Version{"boot-9", math.MaxUint64}
	for name, said := range map[string][]Instance{
		"a later connect, unproven": lie(Unproven, later), "a later connect, claimed": lie(Claimed, later),
		"another boot, unproven": lie(Unproven, another), "another boot, signed": lie(Proven, another),
		"the same connect, signed": lie(Proven, v), "an earlier connect, signed": lie(Proven, Version{"boot-1", 0}),
	} {
		a := holder()
		a.Remote(start, "ca-2", said, nil, false)
		if a.Superseded("h1", v, true) {
			t.Errorf("%s ends a live stream", name)
		}
		want(t, a, "accounts@h1 :1")
	}
	a := holder()
	a.Remote(start, "ca-2", lie(Proven, Version{"boot-1", 2}), nil, false)
	if !a.Superseded("h1", v, true) {
		t.Error("control: a later connect that the agent signed ends nothing")
	}
	want(t, a, "accounts@h1 :666")

	// At a third replica.
	c := New("ca-3")
	tell(start, holder(), c)
	c.Remote(start, "ca-2", lie(Unproven, later), nil, false)
	want(t, c, "accounts@h1 :1")
	c.Remote(start, "ca-2", lie(Unproven, another), nil, false)
	want(t, c, "accounts@h1 :1")
	c.Remote(start, "ca-2", lie(Proven, Version{"boot-1", 2}), nil, false)
	want(t, c, "accounts@h1 :666")

	// A lost session gives way to what was signed only.
	for worth, gives := range map[Worth]bool{Unproven: false, Claimed: true, Proven: true} {
		for _, v2 := range []Version{{"boot-1", 2}, {"boot-2", 1}} {
			a := holder()
			a.Detach(start, "h1", v, false)
			a.Remote(start, "ca-2", lie(worth, v2), nil, false)
			if got := a.Superseded("h1", v, false); got != gives {
				t.Errorf("a lost session, %v of worth %d: superseded %v", v2, worth, got)
			}
		}
	}
	// Nor to an earlier boot, whose Hello a replica has held back; where it is known to be.
	early, late := ca.NewBootID(start, [8]byte{9}), ca.NewBootID(start.Add(time.Second), [8]byte{1})
	for _, test := range []struct {
		held, said string
		gives      bool
	}{{late, early, false}, {early, late, true}, {"boot-1", early, true}, {late, "boot-1", true}} {
		a, v := New("ca-1"), Version{test.held, 7}
		a.Attach(start, "h1", v)
		a.Detach(start, "h1", v, false)
		a.Remote(start, "ca-2", lie(Proven, Version{test.said, math.MaxUint64}), nil, false)
		if got := a.Superseded("h1", v, false); got != test.gives {
			t.Errorf("a lost session of boot %s, one of %s: superseded %v", test.held, test.said, got)
		}
	}
	// Nor do earlier ones, whoever repeats them.
	a = holder()
	a.Detach(start, "h1", v, false)
	a.Remote(start, "ca-2", lie(Proven, Version{"boot-1", 0}), nil, false)
	if a.Superseded("h1", v, false) {
		t.Error("an earlier session, repeated, supersedes a later one")
	}
}

// What another replica said of an agent's boot does not keep the agent itself out.
func TestOthersWordDoesNotRefuseAnAgent(t *testing.T) {
	a := New("ca-1")
	a.Attach(start, "h1", Version{"boot-1", 1})
	a.Remote(start, "ca-2", []Instance{said("", "h1", Version{"boot-2", 1})}, nil, true)
	if _, ok := a.Attach(start, "h1", Version{"boot-2", 2}); !ok {
		t.Error("a restarted agent that another replica told of cannot attach")
	}
	if _, ok := a.Attach(start, "h1", Version{"boot-1", 2}); ok {
		t.Error("control: the boot before took its place")
	}
}

// A replica that is none any more has said nothing.
func TestDismissedSourceIsForgotten(t *testing.T) {
	a, b := New("ca-1"), New("ca-2")
	for i, name := range []string{"h1", "h2"} {
		b.Attach(start, name, Version{"boot", 1})
		b.Report(start, name, Version{"boot", 1}, []Instance{instance("accounts", fmt.Sprint(":", i+1))})
	}
	tell(start, b, a)
	a.Attach(start, "h2", Version{"boot", 2})
	want(t, a, "accounts@h1 :1", "accounts@h2 :2")
	changes := a.Dismiss(start, "ca-2")
	want(t, a, "accounts@h2 :2") // its own, taken over at the reconnect
	if len(changes) != 1 || !changes[0].Withdrawn || len(a.Agents()) != 1 {
		t.Errorf("changes %+v, agents %v", changes, a.Agents())
	}
	if a.Dismiss(start, "ca-1"); len(a.All()) != 1 {
		t.Error("it dismissed itself")
	}
}

// An agent's instances of one service have lives of their own.
func TestInstancesOfOneService(t *testing.T) {
	table := New("r1")
	v := Version{BootID: "boot", Connect: 1}
	table.Attach(start, "h1", v)
	of := func(id, address string, healthy bool) Instance {
		return Instance{Endpoint: catalog.Endpoint{Service: "accounts", ID: id, Datacenter: "dc1", Address: address, Healthy: healthy}}
	}
	shown := func() (text string) {
		for _, i := range table.Of("accounts", "h1") {
			text += fmt.Sprintf("%s:%s:%t ", i.ID, i.Address, i.Healthy)
		}
		return text
	}
	changes := table.Report(start, "h1", v, []Instance{of("b", ":2", true), of("a", ":1", true), of("", ":0", true)})
	if len(changes) != 3 || shown() != "::0:true a::1:true b::2:true " {
		t.Errorf("%d changes, shown %q", len(changes), shown())
	}
	changes = table.Report(start, "h1", v, []Instance{of("b", ":2", false), of("a", ":1", true)})
	if len(changes) != 2 || shown() != "a::1:true b::2:false " {
		t.Errorf("one sick, one gone: %v, shown %q", changes, shown())
	}
	if i, ok := table.Get(Key{"h1", Place{"accounts", "b"}}); !ok || i.Healthy {
		t.Errorf("by key: %v", i)
	}
	// Another replica hears both.
	other := New("r2")
	other.Remote(start, "r1", table.Held(), nil, true)
	if got := other.Of("accounts", "h1"); len(got) != 2 || got[0].ID != "a" || got[1].ID != "b" {
		t.Errorf("elsewhere: %v", got)
	}
	// One that flaps is damped, and its neighbour is not.
	at := start
	for i := range 20 {
		at = at.Add(time.Second)
		table.Report(at, "h1", v, []Instance{of("a", ":1", true), of("b", ":2", i%2 != 0)})
	}
	table.Report(at, "h1", v, []Instance{of("a", ":3", true), of("b", ":2", true)})
	if shown() != "a::3:true b::2:false " {
		t.Errorf("after flaps of one: %q", shown())
	}
}
