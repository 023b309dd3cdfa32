package feed

import (
	"cmp"
	"slices"
	"strings"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/presence"
	"github.com/entente-mesh/entente/federation/catalog"
)

// Ack takes the subscriber's word that it and its workloads hold everything up to
// revision.
func (s *Session) Ack(revision uint64) {
	s.feed.mu.Lock()
	defer s.feed.mu.Unlock()
	if !s.live {
		return
	}
	// It cannot hold the future. What it got in a session before, here or at another
	// replica, it may.
	s.acked = max(s.acked, min(revision, s.feed.revision))
	s.feed.progress()
}

// Waits takes the subscriber's word on who on its host does not hold what came since its
// acknowledgement.
func (s *Session) Waits(names []string) {
	s.feed.mu.Lock()
	defer s.feed.mu.Unlock()
	if s.live && !slices.Equal(s.waits, names) {
		s.waits = names
		s.feed.progress()
	}
}

// name is the subscriber with whom it waits for.
func (s *Session) name() string {
	if len(s.waits) == 0 {
		return s.who.String()
	}
	return s.who.String() + " (" + strings.Join(s.waits, ", ") + ")"
}

// held is the revision up to which the subscriber holds everything that concerns it.
func (s *Session) held() uint64 {
	if s.acked < s.sent || s.full || s.resumed {
		return s.acked
	}
	if s.live && !s.pending {
		return s.feed.revision
	}
	return s.at
}

// Report takes the full list of instances that the subscriber serves.
func (s *Session) Report(now time.Time, instances []presence.Instance) {
	f := s.feed
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tell(s.who.key(), f.table.Report(now, s.who.key(), s.who.Version, instances))
}

// Close ends the session. After a goodbye the subscriber and its instances are
// forgotten; else the instances are stale, and the subscriber counts for the ready
// gate until it appears elsewhere or its SVIDs have ended.
func (s *Session) Close(now time.Time, goodbye bool) {
	f := s.feed
	f.mu.Lock()
	defer f.mu.Unlock()
	if !s.live {
		return
	}
	s.live, s.lostAt = false, now
	if goodbye {
		delete(f.sessions, s.who.key())
		f.progress()
	}
	f.roster()
	f.tell(s.who.key(), f.table.Detach(now, s.who.key(), s.who.Version, goodbye))
	if f.sessions[s.who.key()] == s {
		f.supersedeOne(s.who.key(), s) // it may have moved while its stream here hung
	}
}

// Prove takes the subscriber's signature over its session, if it came after the Hello.
func (s *Session) Prove(proof presence.Proof) {
	f := s.feed
	f.mu.Lock()
	defer f.mu.Unlock()
	if s.live {
		f.table.Prove(s.who.key(), s.who.Version, proof)
		f.tell(s.who.key(), nil)
	}
}

// Instances is what the presence lane says next.
type Instances struct {
	Upserts   []presence.Instance
	Withdrawn []presence.Instance
	Complete  bool // Upserts is the full set and replaces the one before
}

// Presence returns what the subscriber has to be told of instances; false if nothing.
func (s *Session) Presence() (Instances, bool) {
	f := s.feed
	f.mu.Lock()
	defer f.mu.Unlock()
	if s.all {
		s.all = false
		clear(s.dirty)
		return Instances{Upserts: s.known(f.table.All()), Complete: true}, true
	}
	if len(s.dirty) == 0 {
		return Instances{}, false
	}
	var out Instances
	told := map[presence.Key]bool{}
	for key := range s.dirty {
		instance, ok := f.table.Get(key)
		if s.who.Level < ca.LevelInstanceIDs {
			key.ID = ""
			if told[key] {
				continue
			}
			told[key] = true
			of := s.known(f.table.Of(key.Service, key.Agent))
			if ok = len(of) > 0; ok {
				instance = of[0]
			}
		}
		if ok {
			out.Upserts = append(out.Upserts, instance)
		} else {
			out.Withdrawn = append(out.Withdrawn, presence.Instance{Endpoint: catalog.Endpoint{Service: key.Service, Agent: key.Agent, ID: key.ID}})
		}
	}
	clear(s.dirty)
	slices.SortFunc(out.Upserts, compareInstances)
	slices.SortFunc(out.Withdrawn, compareInstances)
	return out, true
}

// known are instances as the subscriber knows them. One of before ids takes two of one
// service and agent for the same: it is told of the best. They are sorted.
func (s *Session) known(list []presence.Instance) []presence.Instance {
	if s.who.Level >= ca.LevelInstanceIDs {
		return list
	}
	var one []presence.Instance
	for _, i := range list {
		i.ID = ""
		last := len(one) - 1
		switch {
		case last < 0 || one[last].Service != i.Service || one[last].Agent != i.Agent:
			one = append(one, i)
		case i.Healthy && !one[last].Healthy:
			one[last] = i
		}
	}
	return one
}

// tell marks changes for all subscribers, and the reporter's own word for the other
// replicas. Called with mu held.
func (f *Feed) tell(reporter string, changes []presence.Change) {
	for w := range f.watchers {
		w.dirty[reporter] = struct{}{}
		w.wake()
	}
	f.tellSubscribers(changes)
}

func (f *Feed) tellSubscribers(changes []presence.Change) {
	if len(changes) == 0 {
		return
	}
	for _, s := range f.sessions {
		if !s.live {
			continue
		}
		if !s.all {
			for _, change := range changes {
				s.dirty[change.Instance.Key()] = struct{}{}
			}
			if len(s.dirty) > maxDirty {
				s.all = true
				f.overtaken.Add(1)
				clear(s.dirty)
			}
		}
		s.wake()
	}
}

// Watcher follows this replica's own sessions for another replica.
type Watcher struct {
	// Wake receives when there may be something to tell. Its capacity is one.
	Wake chan struct{}

	feed  *Feed
	all   bool
	dirty map[string]struct{} // agents; guarded by feed.mu
}

func (w *Watcher) wake() {
	select {
	case w.Wake <- struct{}{}:
	default:
	}
}

// Watch begins to follow; Close ends it.
func (f *Feed) Watch() *Watcher {
	w := &Watcher{Wake: make(chan struct{}, 1), feed: f, all: true, dirty: make(map[string]struct{})}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.watchers[w] = struct{}{}
	w.wake()
	return w
}

// Close ends the watch.
func (w *Watcher) Close() {
	w.feed.mu.Lock()
	defer w.feed.mu.Unlock()
	delete(w.feed.watchers, w)
}

// Next returns what there is to tell, in the form of presence.Table.Remote: an
// agent's whole list at a time.
func (w *Watcher) Next() (Instances, bool) {
	f := w.feed
	f.mu.Lock()
	defer f.mu.Unlock()
	defer clear(w.dirty)
	if w.all {
		w.all = false
		return Instances{Upserts: f.table.Held(), Complete: true}, true
	}
	var out Instances
	for name := range w.dirty {
		if held := f.table.HeldOf(name); len(held) > 0 {
			out.Upserts = append(out.Upserts, held...)
		} else {
			out.Withdrawn = append(out.Withdrawn, presence.Instance{Endpoint: catalog.Endpoint{Agent: name}})
		}
	}
	return out, len(out.Upserts)+len(out.Withdrawn) > 0
}

// Remote takes what another replica says of its sessions.
func (f *Feed) Remote(now time.Time, replica string, in Instances) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tellSubscribers(f.table.Remote(now, replica, in.Upserts, in.Withdrawn, in.Complete))
	f.supersede()
}

// Lost says that another replica is not heard any more.
func (f *Feed) Lost(now time.Time, replica string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tellSubscribers(f.table.Lost(now, replica))
}

// Dismiss forgets all that another replica said: it is none any more.
func (f *Feed) Dismiss(now time.Time, replica string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tellSubscribers(f.table.Dismiss(now, replica))
}

// supersede ends the sessions of subscribers that have moved to another replica.
func (f *Feed) supersede() {
	for key, s := range f.sessions {
		f.supersedeOne(key, s)
	}
}

func (f *Feed) supersedeOne(key string, s *Session) {
	if !f.table.Superseded(key, s.who.Version, s.live) {
		return
	}
	if s.live {
		s.wake() // its stream learns it from Policy and closes the session
		return
	}
	delete(f.sessions, key)
	f.progress()
	f.roster()
	for w := range f.watchers {
		w.dirty[key] = struct{}{}
		w.wake()
	}
}

// Expire forgets instances that nobody vouched for during a day, and everything of
// agents that are banned or gone. Asked every few seconds, under the lock of the
// state's owner.
func (f *Feed) Expire(now time.Time, st *domain.State) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tellSubscribers(f.table.Expire(now))
	for key, s := range f.sessions {
		if s.entitled(st) == nil {
			continue
		}
		if s.live {
			s.wake()
			continue
		}
		delete(f.sessions, key)
		f.roster()
		f.tell(key, f.table.Forget(key))
	}
	for _, key := range f.table.Agents() {
		_, host, isWorkload := strings.Cut(key, "@")
		if !isWorkload {
			host = key
		}
		if _, ok := st.Agent(host); !ok && f.sessions[key] == nil {
			f.tellSubscribers(f.table.Forget(key)) // another replica told of it while it was known
		}
	}
}

// Due is when Release has something to do; false: never, unless an agent reports.
func (f *Feed) Due() (time.Time, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.table.Due()
}

// Release tells of what agents reported that was damped until now.
func (f *Feed) Release(now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tellSubscribers(f.table.Release(now))
}

// Status is how far this replica's subscribers are.
type Status struct {
	Acknowledged uint64   // minimum over the subscribers; the replica's own revision without any
	Behind       []Behind // those that are not at the replica's revision, the furthest first, at most 64
	Subscribers  int      // with a stream
	Revision     uint64   // of the replica
}

// Behind is a subscriber that does not hold everything.
type Behind struct {
	Name string
	Held uint64 // revision
}

const maxBehind = 64

// Status computes the minimum. A subscriber whose stream was lost counts until it
// appears elsewhere, or longest, the longest life of a leaf, has passed: then it holds
// no SVID any more.
func (f *Feed) Status(now time.Time, longest time.Duration) Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	status := Status{Acknowledged: f.revision, Revision: f.revision}
	for key, s := range f.sessions {
		if s.live {
			status.Subscribers++
		} else if now.Sub(s.lostAt) > longest {
			delete(f.sessions, key)
			f.roster()
			continue
		}
		if held := s.held(); held < f.revision {
			status.Behind = append(status.Behind, Behind{s.name(), held})
			status.Acknowledged = min(status.Acknowledged, held)
		}
	}
	slices.SortFunc(status.Behind, func(a, b Behind) int { return cmp.Or(cmp.Compare(a.Held, b.Held), compare(a.Name, b.Name)) })
	status.Behind = status.Behind[:min(len(status.Behind), maxBehind)]
	return status
}

// Subscribers is how many have a stream.
func (f *Feed) Subscribers() (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.sessions {
		if s.live {
			n++
		}
	}
	return n
}

// Known is a subscriber that counts for the ready gate.
type Known struct {
	Subscriber
	AgentKey string    // key id of its agent when its session began
	LostAt   time.Time // zero: it has a stream
}

// Roll is every subscriber that counts, for a replica that is to know them after a
// restart (Recall).
func (f *Feed) Roll() []Known {
	f.mu.Lock()
	defer f.mu.Unlock()
	roll := make([]Known, 0, len(f.sessions))
	for _, s := range f.sessions {
		k := Known{Subscriber: s.who, AgentKey: s.agentKey}
		if !s.live {
			k.LostAt = s.lostAt
		}
		roll = append(roll, k)
	}
	slices.SortFunc(roll, func(a, b Known) int { return compare(a.key(), b.key()) })
	return roll
}

// Recall takes up a roll of before a restart: these subscribers count until they come
// back, here or elsewhere, for nobody knows what they hold. Those that had a stream are
// lost since now. Called before the feed is used.
func (f *Feed) Recall(now time.Time, roll []Known) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, k := range roll {
		s := &Session{Wake: make(chan struct{}, 1), feed: f, who: k.Subscriber, agentKey: k.AgentKey, lostAt: k.LostAt, full: true}
		if s.lostAt.IsZero() || s.lostAt.After(now) {
			s.lostAt = now
		}
		f.sessions[k.key()] = s
		f.table.Recall(k.key(), k.Version, s.lostAt)
	}
}

// Instances returns every instance that is known.
func (f *Feed) Instances() []presence.Instance {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.table.All()
}

// Revision is that of the last change published.
func (f *Feed) Revision() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.revision
}

func compare(a, b string) int { return cmp.Compare(a, b) }

func compareBundles(a, b *statev1.ForeignBundle) int {
	return cmp.Compare(a.GetTrustDomain(), b.GetTrustDomain())
}

func compareInstances(a, b presence.Instance) int {
	return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.Agent, b.Agent), cmp.Compare(a.ID, b.ID))
}
