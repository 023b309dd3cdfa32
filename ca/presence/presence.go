// Package presence holds what nobody agrees on and everybody needs: which
// instances of which services stand where, as the agents that run them say.
//
// Each CA replica keeps a Table. An agent reports over the one Sync stream it
// holds; the replica at the other end of that stream vouches for the report and
// tells the other replicas. A Table keeps what each source (this replica or
// another) says of each agent, and shows for each agent what the best of its
// sources says:
//
//   - A live stream at this replica beats what other replicas say. Only a session that
//     the agent signed, a later one of the same boot, ends it (Worth).
//   - Within one boot of the agent the session with the higher connect counter wins; a
//     replica's bare word on a session counts only among such words.
//   - Then a source that holds the agent's stream beats one that does not, a session that
//     the agent signed one that it did not, and the boot that this table heard of later
//     the earlier. (A boot that is first heard of in another's full set is old news: it
//     counts as earlier.)
//   - The winner's report is the whole truth about its agent: what it does not
//     list is gone. So only the holder of the stream withdraws.
//   - Without a holder the last report stays, marked stale, until a later session
//     appears anywhere or a day has passed (I12).
//   - What a source said that is no replica any more is forgotten (Dismiss).
//
// A table verifies no signature: who calls Remote has, and says in Worth what came out.
// The package is pure: time is an argument, and nothing is safe for concurrent use.
package presence

import (
	"cmp"
	"iter"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/federation/catalog"
)

// Version tells the sessions of one agent apart.
type Version struct {
	BootID  string // names a start of the agent's process (ca.NewBootID)
	Connect uint64 // counts the connects of that process
}

// Proof is the agent's signature over a session (ca.Session).
type Proof struct {
	PublicKey, Signature string // bytes
}

// Worth is what a replica's word on a session is worth to another one.
type Worth uint8

const (
	// Unproven: it is that replica's word and nobody else's.
	Unproven Worth = iota
	// Claimed: signed by a key that replicas have no record of, as a gateway's.
	Claimed
	// Proven: signed by the agent's own key.
	Proven
)

// Instance is one place where a service is served, and the session that says so. An
// instance without a service, only in Held, is the session itself.
type Instance struct {
	catalog.Endpoint
	Version Version

	// Of the session itself only, and not shown.
	Proof Proof
	Worth Worth
}

// Key names an instance.
type Key struct {
	Agent string
	Place
}

// Place names an instance among those of its agent.
type Place struct {
	Service, ID string
}

// Key returns the instance's key.
func (i Instance) Key() Key { return Key{i.Agent, i.place()} }

func (i Instance) place() Place { return Place{i.Service, i.ID} }

// Change is one instance that is new or different, or (Withdrawn) gone.
type Change struct {
	Instance  Instance
	Withdrawn bool
}

// ForgetAfter is how long an instance that nobody vouches for is remembered.
const ForgetAfter = 24 * time.Hour

// Bounds on what one agent may report and one table holds.
const (
	MaxInstancesPerAgent = 1000
	// MaxInstancesOfService is how many of one service an agent may have.
	MaxInstancesOfService = 16
	maxBootsPerAgent      = 16
)

// Table is one replica's picture.
type Table struct {
	self   string
	agents map[string]*agent
	// serving are those of whom something is shown: most hosts may serve nothing.
	serving map[string]*agent
	// waiting are agents with something to show that is damped.
	waiting map[string]*agent
	// Boots are numbered in the order they were heard of: news upwards, old news
	// downwards.
	latest, earliest int64
}

type agent struct {
	sources  map[string]*holding
	boots    map[string]int64 // boot id -> when heard of
	shown    map[Place]Instance
	dampers  map[Place]*damper
	arrivals map[string]*damper // by service
	until    time.Time          // what waits to be shown is due; zero: nothing waits
}

// holding is what one source says of one agent.
type holding struct {
	version   Version
	proof     Proof // of this replica's own
	worth     Worth // Proven: of this replica's own, or signed by the agent
	live      bool  // the source holds the agent's stream, and we hear the source
	instances map[Place]Instance
	staleAt   time.Time // since when it is not live
}

// New returns an empty table of the replica with the id self.
func New(self string) *Table {
	return &Table{self: self, agents: make(map[string]*agent), serving: make(map[string]*agent), waiting: make(map[string]*agent)}
}

// Attach says that this replica now holds a stream of the agent. It reports
// false when the agent has a later session at this replica already: the stream
// that asks is the older one and should end. What the agent served before stays
// visible until it reports.
func (t *Table) Attach(now time.Time, name string, v Version) (changes []Change, ok bool) {
	a := t.agent(name)
	if a.boots[v.BootID] <= 0 {
		delete(a.boots, v.BootID) // it speaks here itself: that is news, whatever others said of it
	}
	t.hear(a, v.BootID, true)
	held := a.sources[t.self]
	if held != nil && held.live && t.compare(a, held.version, v) > 0 {
		return nil, false
	}
	// The best picture there is goes over to the new session, so that a mere
	// reconnect takes nobody's endpoints away.
	fresh := &holding{version: v, worth: Proven, live: true, instances: make(map[Place]Instance)}
	for place, instance := range a.shown {
		instance.Version, instance.Stale = v, false
		fresh.instances[place] = instance
	}
	a.sources[t.self] = fresh
	return t.show(now, name, a), true
}

// Prove keeps the agent's signature over its session at this replica, for the others.
func (t *Table) Prove(name string, v Version, proof Proof) {
	if a := t.agents[name]; a != nil && a.sources[t.self] != nil && a.sources[t.self].version == v {
		a.sources[t.self].proof = proof
	}
}

// Report takes the full list of what the agent serves, from the stream with that
// version at this replica. A report of a stream that was replaced changes nothing.
func (t *Table) Report(now time.Time, name string, v Version, instances []Instance) []Change {
	a := t.agents[name]
	if a == nil {
		return nil
	}
	held := a.sources[t.self]
	if held == nil || !held.live || held.version != v {
		return nil
	}
	clear(held.instances)
	for _, instance := range instances[:min(len(instances), MaxInstancesPerAgent)] {
		if instance.Service == "" {
			continue
		}
		instance.Agent, instance.Version, instance.Stale = name, v, false
		held.instances[instance.place()] = instance
	}
	return t.show(now, name, a)
}

// Detach says that this replica's stream of the agent with that version ended.
// After a goodbye the agent's instances are withdrawn, else they are stale.
func (t *Table) Detach(now time.Time, name string, v Version, goodbye bool) []Change {
	a := t.agents[name]
	if a == nil {
		return nil
	}
	held := a.sources[t.self]
	if held == nil || !held.live || held.version != v {
		return nil
	}
	if goodbye {
		clear(held.instances)
	}
	held.live, held.staleAt = false, now
	return t.show(now, name, a)
}

// Recall takes up that this replica had a session of the agent before it restarted, and
// lost it then. Any other boot that is heard of is a later one. What the agent served is
// not known.
func (t *Table) Recall(name string, v Version, lostAt time.Time) {
	a := t.agent(name)
	a.boots[v.BootID] = math.MinInt64
	a.sources[t.self] = &holding{version: v, worth: Proven, staleAt: lostAt, instances: make(map[Place]Instance)}
}

// Remote takes what another replica says of its own sessions, as its HeldOf lists
// it: an instance without a service is the session itself and begins the agent's
// list, which replaces what the source listed of that agent before. An agent in
// withdrawn is one that the source has no word on any more. With complete the
// list is all that the source has to say, as on each attach to it.
func (t *Table) Remote(now time.Time, source string, instances, withdrawn []Instance, complete bool) []Change {
	if source == t.self {
		return nil
	}
	touched := make(map[string]*agent)
	listed := make(map[string]*holding)
	for _, instance := range instances {
		name := instance.Agent
		if name == "" {
			continue
		}
		held := listed[name]
		if instance.Service == "" {
			a := t.agent(name)
			t.hear(a, instance.Version.BootID, !complete)
			held = &holding{version: instance.Version, worth: instance.Worth, live: !instance.Stale, instances: make(map[Place]Instance)}
			if before := a.sources[source]; !held.live {
				held.staleAt = now
				if before != nil && !before.live {
					held.staleAt = before.staleAt
				}
			}
			a.sources[source] = held
			listed[name], touched[name] = held, a
			continue
		}
		// An instance of a session that was not announced is nobody's.
		if held != nil && held.version == instance.Version && len(held.instances) < MaxInstancesPerAgent {
			held.instances[instance.place()] = instance
		}
	}
	drop := func(name string) {
		if a := t.agents[name]; a != nil && a.sources[source] != nil && listed[name] == nil {
			delete(a.sources, source)
			touched[name] = a
		}
	}
	for _, gone := range withdrawn {
		drop(gone.Agent)
	}
	if complete {
		for name := range t.agents {
			drop(name)
		}
	}
	var changes []Change
	for name, a := range touched {
		changes = append(changes, t.show(now, name, a)...)
	}
	t.sweep()
	return sorted(changes)
}

// Lost says that the source is not heard any more: what it vouched for is stale.
func (t *Table) Lost(now time.Time, source string) []Change {
	var changes []Change
	for name, a := range t.agents {
		if held := a.sources[source]; held != nil && held.live {
			held.live, held.staleAt = false, now
			changes = append(changes, t.show(now, name, a)...)
		}
	}
	return sorted(changes)
}

// Dismiss forgets all that a source said: it is no replica any more.
func (t *Table) Dismiss(now time.Time, source string) []Change {
	if source == t.self {
		return nil
	}
	var changes []Change
	for name, a := range t.agents {
		if a.sources[source] != nil {
			delete(a.sources, source)
			changes = append(changes, t.show(now, name, a)...)
		}
	}
	t.sweep()
	return sorted(changes)
}

// Agents are those of whom anything is known, in no order.
func (t *Table) Agents() []string { return slices.Collect(maps.Keys(t.agents)) }

// Forget drops an agent altogether: it was banned or removed.
func (t *Table) Forget(name string) []Change {
	a := t.agents[name]
	if a == nil {
		return nil
	}
	clear(a.sources)
	changes := t.show(time.Time{}, name, a) // nothing is left to show
	delete(t.agents, name)
	return changes
}

// Expire forgets what nobody vouched for during ForgetAfter.
func (t *Table) Expire(now time.Time) []Change {
	var changes []Change
	for name, a := range t.agents {
		a.forgive(now)
		for source, held := range a.sources {
			if !held.live && now.Sub(held.staleAt) >= ForgetAfter {
				delete(a.sources, source)
			}
		}
		changes = append(changes, t.show(now, name, a)...)
	}
	t.sweep()
	return sorted(changes)
}

// All returns every instance that is known, by service, agent and id.
func (t *Table) All() []Instance {
	var all []Instance
	for _, a := range t.serving {
		all = slices.AppendSeq(all, maps.Values(a.shown))
	}
	slices.SortFunc(all, compareInstances)
	return all
}

// Get returns one instance.
func (t *Table) Get(k Key) (Instance, bool) {
	a := t.agents[k.Agent]
	if a == nil {
		return Instance{}, false
	}
	instance, ok := a.shown[k.Place]
	return instance, ok
}

// Of returns an agent's instances of one service, by id.
func (t *Table) Of(service, name string) (list []Instance) {
	if a := t.agents[name]; a != nil {
		for place, instance := range a.shown {
			if place.Service == service {
				list = append(list, instance)
			}
		}
	}
	slices.SortFunc(list, compareInstances)
	return list
}

// Held returns what this replica says of its own sessions, live and lost, for
// the other replicas: agent by agent, first the session itself (without a service),
// then its instances.
func (t *Table) Held() []Instance {
	var held []Instance
	for _, name := range slices.Sorted(maps.Keys(t.agents)) {
		held = append(held, t.HeldOf(name)...)
	}
	return held
}

// HeldOf is Held of one agent; empty when this replica has no word on it.
func (t *Table) HeldOf(name string) []Instance {
	a := t.agents[name]
	if a == nil || a.sources[t.self] == nil {
		return nil
	}
	own := a.sources[t.self]
	held := []Instance{{Endpoint: catalog.Endpoint{Agent: name, Stale: !own.live}, Version: own.version, Proof: own.proof}}
	for _, instance := range own.instances {
		instance.Version, instance.Stale = own.version, !own.live
		held = append(held, instance)
	}
	slices.SortFunc(held, compareInstances)
	return held
}

// Superseded reports whether the agent has a later session than v, at any replica. A live
// stream ends by one of the same boot that the agent signed, and by nothing else that
// another replica says. One that was lost gives way also to one of another boot that a
// replica vouches for, and to what is Claimed; not to an earlier boot, which a replica may
// have held back.
func (t *Table) Superseded(name string, v Version, live bool) bool {
	a := t.agents[name]
	if a == nil {
		return false
	}
	for source, held := range a.sources {
		if t.compare(a, held.version, v) <= 0 {
			continue
		}
		sameBoot := held.version.BootID == v.BootID
		switch {
		case source == t.self, !live && held.worth >= Claimed:
			if sameBoot || held.live && !ca.EarlierBoot(held.version.BootID, v.BootID) {
				return true
			}
		case held.worth == Proven && sameBoot:
			return true
		}
	}
	return false
}

func (t *Table) agent(name string) *agent {
	a := t.agents[name]
	if a == nil {
		a = &agent{
			sources:  make(map[string]*holding),
			boots:    make(map[string]int64),
			shown:    make(map[Place]Instance),
			dampers:  make(map[Place]*damper),
			arrivals: make(map[string]*damper),
		}
		t.agents[name] = a
	}
	return a
}

// hear notes when a boot of the agent was first heard of.
func (t *Table) hear(a *agent, boot string, news bool) {
	if _, known := a.boots[boot]; known {
		return
	}
	if news {
		t.latest++
		a.boots[boot] = t.latest
	} else {
		t.earliest--
		a.boots[boot] = t.earliest
	}
	if len(a.boots) <= maxBootsPerAgent {
		return
	}
	oldest := boot
	for id, at := range a.boots {
		if at < a.boots[oldest] && !a.speaks(id) {
			oldest = id
		}
	}
	delete(a.boots, oldest)
}

// speaks reports whether a source's word on the agent is of that boot.
func (a *agent) speaks(boot string) bool {
	for _, held := range a.sources {
		if held.version.BootID == boot {
			return true
		}
	}
	return false
}

// compare says which session is the later one.
func (t *Table) compare(a *agent, x, y Version) int {
	if x.BootID == y.BootID {
		return cmp.Compare(x.Connect, y.Connect)
	}
	return cmp.Compare(a.boots[x.BootID], a.boots[y.BootID])
}

// winner is the source whose word on the agent counts; nil without any. Of one boot
// only the last session can be alive, whatever the source of an earlier one believes.
func (t *Table) winner(a *agent) *holding {
	last, lastProven := make(map[string]uint64, 1), make(map[string]uint64, 1) // boot id -> its highest connect
	for _, held := range a.sources {
		v := held.version
		last[v.BootID] = max(last[v.BootID], v.Connect)
		if held.worth == Proven {
			lastProven[v.BootID] = max(lastProven[v.BootID], v.Connect)
		}
	}
	over := func(held *holding) bool {
		v := held.version
		return v.Connect < lastProven[v.BootID] || held.worth != Proven && v.Connect < last[v.BootID]
	}
	if own := a.sources[t.self]; own != nil && own.live && !over(own) {
		return own
	}
	var best *holding
	var from string
	for source, held := range a.sources {
		if over(held) {
			continue
		}
		if best == nil || cmp.Or(first(held.live, best.live), first(held.worth == Proven, best.worth == Proven),
			t.compare(a, held.version, best.version), cmp.Compare(source, from)) > 0 {
			best, from = held, source
		}
	}
	return best
}

// first compares by something that only one of the two may have.
func first(x, y bool) int {
	switch {
	case x == y:
		return 0
	case x:
		return 1
	}
	return -1
}

// show makes what is shown of the agent agree with its winner, as far as that is not damped.
func (t *Table) show(now time.Time, name string, a *agent) []Change {
	var changes []Change
	a.until = time.Time{}
	delete(t.waiting, name)
	won := t.winner(a)
	if own := a.sources[t.self]; own != nil && own != won && !own.live {
		delete(a.sources, t.self) // not the last word any more
	}
	if won != nil {
		for place, instance := range won.instances {
			instance.Version, instance.Stale = won.version, !won.live
			var shown *Instance
			if before, ok := a.shown[place]; ok {
				if before == instance {
					continue
				}
				shown = &before
			}
			if !t.admits(now, name, a, shown, instance) {
				continue
			}
			a.shown[place] = instance
			changes = append(changes, Change{Instance: instance})
		}
	}
	for place, instance := range a.shown {
		if won != nil {
			if _, ok := won.instances[place]; ok {
				continue
			}
		}
		delete(a.shown, place)
		changes = append(changes, Change{Instance: instance, Withdrawn: true})
	}
	if len(a.shown) > 0 {
		t.serving[name] = a
	} else {
		delete(t.serving, name)
	}
	return sorted(changes)
}

// sweep drops agents of whom nobody speaks.
func (t *Table) sweep() {
	maps.DeleteFunc(t.agents, func(_ string, a *agent) bool {
		return len(a.sources) == 0 && len(a.shown) == 0
	})
}

// Instances walks over everything that is shown, in no order.
func (t *Table) Instances() iter.Seq[Instance] {
	return func(yield func(Instance) bool) {
		for _, a := range t.serving {
			for _, instance := range a.shown {
				if !yield(instance) {
					return
				}
			}
		}
	}
}

func compareInstances(a, b Instance) int {
	return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.Agent, b.Agent), cmp.Compare(a.ID, b.ID))
}

func sorted(changes []Change) []Change {
	slices.SortFunc(changes, func(a, b Change) int { return compareInstances(a.Instance, b.Instance) })
	return changes
}
