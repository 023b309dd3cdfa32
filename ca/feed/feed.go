// Package feed decides what each subscriber of a CA replica is told: agents,
// gateways and the other replicas.
//
// There are two lanes. The policy lane is the agreed state as far as it concerns
// the subscriber, ordered by revision. A subscriber resumes it at the replica whose words
// it holds; at another one it asks for the full state (ca/client, Store.attach). A ring holds
// the names of the last changes, and an update reads what they name from the state
// as it is now. So a slow subscriber costs nothing: it finds its changes coalesced,
// and when the ring has moved past it, it gets the full state. The presence lane is
// the picture of package presence: on each attach the full set, then what changed.
//
// The feed also knows how far its subscribers are: the minimum over them is this
// replica's half of the ready gate (I3).
//
// Pure: the owner of a stream asks for updates when its Wake channel says so.
// All methods may be called concurrently.
package feed

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/presence"
	"github.com/entente-mesh/entente/ca/wire"
	"github.com/entente-mesh/entente/federation/catalog"
)

const (
	// RingSize is how many changes a subscriber may be behind before it gets the
	// full state.
	RingSize = 65_536
	// maxDirty is how many changed instances are remembered for a slow subscriber
	// before it gets the full set.
	maxDirty = 4096
)

// Errors of Subscribe and Session.Policy: why a subscriber is not told more.
var (
	ErrUnknown    = errors.New("no such agent or entry")
	ErrBanned     = errors.New("the agent is banned")
	ErrSuperseded = errors.New("a later session of this subscriber exists")
	ErrAhead      = errors.New("the subscriber has seen a later revision than this replica")
)

// Subscriber is who subscribes; the door has verified it.
type Subscriber struct {
	Agent   string // the agent; of a workload: the one of its host
	EntryID string // of a workload that listens, a gateway for example; empty for an agent
	Path    string // SPIFFE path, for logs and the ready gate's report
	Version presence.Version
	Level   uint32         // of its Hello: what its software understands
	Proof   presence.Proof `json:"-"` // of this session, for the other replicas; empty: none
}

// key names the subscriber among sessions: one identity may stand on several hosts.
func (s Subscriber) key() string { return ca.Origin{Agent: s.Agent, Entry: s.EntryID}.Subscriber() }

// String names the subscriber and its kind for people: agent h1, gateway gw-1 on h1.
func (s Subscriber) String() string {
	if s.EntryID == "" {
		return "agent " + s.Agent
	}
	if name, ok := strings.CutPrefix(s.EntryID, "gateway/"); ok {
		return "gateway " + name + " on " + s.Agent
	}
	return "workload " + s.EntryID + " on " + s.Agent
}

// Feed is the feed of one replica.
type Feed struct {
	// Progress receives when Status may have changed. Its capacity is one; it has one
	// reader.
	Progress chan struct{}
	// Roster receives when Roll may have changed; as Progress.
	Roster chan struct{}
	// ReissueRate is how many SVIDs the domain's CA nodes are asked to sign in a second
	// when an authority is tainted; 0: the default. Set before the feed is used.
	ReissueRate float64

	levels levels

	mu       sync.Mutex
	ring     []entry // circular; the change with number n is at n % len
	next     uint64  // number of the next change
	floor    uint64  // revision that the oldest change in the ring comes after
	revision uint64  // of the last command published
	sessions map[string]*Session
	watchers map[*Watcher]struct{}
	table    *presence.Table

	overtaken atomic.Uint64

	isolation uint64 // counts the changes of isolated
	isolated  atomic.Pointer[map[string]*statev1.Distrust]

	unagreedNews uint64 // counts the changes of unagreed that bring something
	unagreed     atomic.Pointer[map[string]*statev1.ForeignBundle]
}

type entry struct {
	revision uint64
	change   domain.Change
}

// New returns the feed of the replica with the node id self, whose state stands at
// revision. ringSize 0 means RingSize.
func New(self string, revision uint64, ringSize int) *Feed {
	if ringSize <= 0 {
		ringSize = RingSize
	}
	f := &Feed{
		Progress: make(chan struct{}, 1),
		Roster:   make(chan struct{}, 1),
		ring:     make([]entry, ringSize),
		floor:    revision,
		revision: revision,
		sessions: make(map[string]*Session),
		watchers: make(map[*Watcher]struct{}),
		table:    presence.New(self),
		levels:   sinceLevel,
	}
	f.isolated.Store(&map[string]*statev1.Distrust{})
	f.unagreed.Store(&map[string]*statev1.ForeignBundle{})
	return f
}

// Publish takes the outcome of a log entry, all its commands together, in the order
// of application, when the state holds it.
func (f *Feed) Publish(outcome domain.Outcome) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, change := range outcome.Changes {
		slot := &f.ring[f.next%uint64(len(f.ring))]
		if slot.change.Kind != "" {
			f.floor = max(f.floor, slot.revision)
		}
		*slot = entry{outcome.Revision, change}
		n := f.next
		f.next++
		if change.Kind == domain.ChangeEntry {
			// Of a million entries few are on the host of any one agent.
			for _, host := range change.Hosts {
				for _, who := range []Subscriber{{Agent: host}, {Agent: host, EntryID: change.Key}} {
					if s := f.sessions[who.key()]; s != nil {
						s.concern(n)
					}
				}
			}
			continue
		}
		for _, s := range f.sessions {
			s.concern(n)
		}
	}
	f.revision = max(f.revision, outcome.Revision)
	if len(outcome.Changes) > 0 {
		f.progress()
	}
}

// Reset says that the state was replaced as a whole, by an installed snapshot: all
// subscribers get the full state.
func (f *Feed) Reset(revision uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.ring)
	f.revision = max(f.revision, revision)
	f.floor = f.revision
	for _, s := range f.sessions {
		s.full, s.pending = true, true
		s.wake()
	}
}

func (f *Feed) progress() {
	select {
	case f.Progress <- struct{}{}:
	default:
	}
}

func (f *Feed) roster() {
	select {
	case f.Roster <- struct{}{}:
	default:
	}
}

// Session is the state of one subscriber at this replica: of its stream, and for
// some time after the stream was lost.
type Session struct {
	// Wake receives when there may be something to tell. Its capacity is one.
	Wake chan struct{}

	feed *Feed
	who  Subscriber

	// Guarded by feed.mu from here on.
	live     bool
	lostAt   time.Time
	since    time.Time
	agentKey string // of an agent: its key when the session began

	// Policy lane.
	full    bool
	resumed bool     // the next delta is the first after a resume
	pending bool     // there is something to look at, from cursor on; else all up to now is no news to it
	cursor  uint64   // number of the next change to look at
	at      uint64   // revision that the subscriber would be at if it holds all it was sent
	sent    uint64   // revision of the last update
	acked   uint64   // revision of the last acknowledgement
	tainted []string // as it was told last

	older        bool              // there is something that its software does not know
	tooOld       map[string]string // what restricts and it cannot enforce, by record
	contradicted []string          // CA nodes that it avoids, as it says
	skipped      []string          // what it does not know, as it says

	toldTooOld []string // as it was told last

	// waits are those on its host that do not hold what it was told, as it says.
	waits []string

	// under are the authority key ids of the SVIDs that the subscriber has; nil: it did
	// not say.
	under map[string]struct{}

	// Urgent items, sent ahead of the policy lane.
	ahead   uint64              // number of the next change to look at for them
	alone   uint64              // Feed.isolation as it was told last
	foreign map[string]struct{} // trust domains whose bundles it was sent
	early   uint64              // Feed.unagreedNews as it was told last

	// Presence lane.
	all   bool
	dirty map[presence.Key]struct{}
}

// concern says that the change with number n may be news. What came before it, and was
// none, does not have to stay in the ring for it.
func (s *Session) concern(n uint64) {
	if !s.pending {
		s.pending, s.cursor, s.ahead = true, n, n
		if s.live {
			s.at = s.feed.revision
		}
	}
	s.wake()
}

func (s *Session) wake() {
	select {
	case s.Wake <- struct{}{}:
	default:
	}
}

// Subscribe begins a session; an earlier one of the same subscriber ends. resume is
// the revision up to which the subscriber has everything, 0 for nothing; st is read
// under its owner's lock. Errors: ErrUnknown, ErrBanned, ErrSuperseded; ErrAhead if
// this replica must catch up first, for no subscriber goes back.
func (f *Feed) Subscribe(now time.Time, st *domain.State, who Subscriber, resume uint64) (*Session, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if resume > f.revision {
		return nil, ErrAhead
	}
	s := &Session{
		Wake:    make(chan struct{}, 1),
		feed:    f,
		who:     who,
		live:    true,
		pending: true,
		since:   now,
		all:     true,
		dirty:   make(map[presence.Key]struct{}),
		foreign: make(map[string]struct{}),
		older:   f.levels.below(who.Level),
		tooOld:  make(map[string]string),
	}
	if agent, ok := st.Agent(who.Agent); ok {
		s.agentKey = agent.GetKeyId()
	}
	if err := s.entitled(st); err != nil {
		return nil, err
	}
	changes, ok := f.table.Attach(now, who.key(), who.Version)
	if !ok {
		return nil, ErrSuperseded
	}
	f.table.Prove(who.key(), who.Version, who.Proof)
	if before := f.sessions[who.key()]; before != nil {
		before.live = false
		before.wake()
		s.acked, s.under = before.acked, before.under
	}
	// The state before resume is not in the ring: all of it.
	s.full = resume == 0 || resume < f.floor || ca.Revision(resume).Epoch() != ca.Revision(f.revision).Epoch()
	s.cursor = f.next
	if !s.full {
		s.resumed = true
		s.at = resume
		for s.cursor > 0 && s.cursor+uint64(len(f.ring)) > f.next && f.ring[(s.cursor-1)%uint64(len(f.ring))].revision > resume {
			s.cursor--
		}
	}
	s.ahead = s.cursor
	f.sessions[who.key()] = s
	f.tell(who.key(), changes)
	f.progress()
	f.roster()
	s.wake()
	return s, nil
}

// entitled says why the subscriber is not, or no longer, told anything.
func (s *Session) entitled(st *domain.State) error {
	agent, ok := st.Agent(s.who.Agent)
	switch {
	case !ok || agent.GetKeyId() != s.agentKey:
		return fmt.Errorf("agent %s: %w", s.who.Agent, ErrUnknown)
	case s.feed.Banned(agent):
		return fmt.Errorf("agent %s: %w", s.who.Agent, ErrBanned)
	case s.who.EntryID == "":
		return nil
	}
	if e, ok := st.Entry(s.who.EntryID); !ok || e.GetPath() != s.who.Path || !ca.Entitled(agent, e) || !st.MaySync(e) {
		return fmt.Errorf("entry %s: %w", s.who.EntryID, ErrUnknown)
	}
	return nil
}

// Update is what the policy lane says next; of the own bundle what it is to hold, since how
// it is handed out is another's business.
type Update struct {
	wire.Update
	OwnBundle *OwnBundle // nil: as before

	withheld map[string]bool // keys of objects of a kind that the subscriber does not know
}

// OwnBundle is what the domain's own bundle holds.
type OwnBundle struct {
	X509     [][]byte // certificates, DER
	JWT, WIT []*statev1.Authority
	Sequence uint64
}

// Policy returns what the subscriber has to be told next; false if there is nothing.
// Read under the lock of the state's owner. Errors: ErrSuperseded, ErrUnknown,
// ErrBanned: the stream must end.
func (s *Session) Policy(st *domain.State) (Update, bool, error) {
	f := s.feed
	f.mu.Lock()
	defer f.mu.Unlock()
	if !s.live || f.table.Superseded(s.who.key(), s.who.Version, true) {
		return Update{}, false, ErrSuperseded
	}
	if err := s.entitled(st); err != nil {
		return Update{}, false, err
	}
	if !s.pending {
		return Update{}, false, nil
	}
	slow := !s.full && f.next-s.cursor > uint64(len(f.ring))
	if slow {
		f.overtaken.Add(1)
	}
	if s.full || slow {
		u := s.everything(st)
		s.full, s.resumed, s.pending = false, false, false
		s.at, s.sent = f.revision, f.revision
		return u, true, nil
	}
	u, relevant := s.delta(st)
	s.pending = false
	s.at = f.revision
	f.progress()
	if !relevant && !s.resumed {
		return Update{}, false, nil
	}
	s.resumed = false
	s.sent = f.revision
	return u, true, nil
}

// Overtaken is how often a subscriber was so slow that it was sent everything anew in
// the place of what it missed, in either lane.
func (f *Feed) Overtaken() uint64 { return f.overtaken.Load() }

// Catch returns the revision that the subscriber is at, when it was told nothing for
// it: the update that only moves its resume point. Asked with each heartbeat.
func (s *Session) Catch() (revision uint64, ok bool) {
	s.feed.mu.Lock()
	defer s.feed.mu.Unlock()
	if s.pending || s.sent >= s.feed.revision {
		return 0, false
	}
	s.at, s.sent = s.feed.revision, s.feed.revision
	return s.sent, true
}

func (s *Session) everything(st *domain.State) Update {
	u := Update{
		Update: wire.Update{
			Full:           true,
			Revision:       s.feed.revision,
			Cluster:        st.Cluster(),
			Entries:        s.entries(st),
			Objects:        forSubscribers(st.Objects()),
			Members:        st.Members(),
			MembersChanged: true,
			Distrust:       s.feed.distrust(st),
			Tainted:        st.Tainted(),
			TaintedChanged: true,
			Reissue:        s.feed.reissue(st),
		},
		OwnBundle: ownBundle(st),
	}
	s.tainted, s.alone, s.early = u.Tainted, s.feed.isolation, s.feed.unagreedNews
	clear(s.foreign)
	for td := range federates(u.Entries) {
		if b, ok := s.feed.ForeignBundle(st, td); ok {
			u.Bundles = append(u.Bundles, b)
			s.foreign[td] = struct{}{}
		}
	}
	slices.SortFunc(u.Bundles, compareBundles)
	s.forLevel(st, &u)
	return u
}

// delta looks at the changes from the cursor on.
func (s *Session) delta(st *domain.State) (u Update, relevant bool) {
	f := s.feed
	u.Revision = f.revision
	type name struct {
		kind domain.ChangeKind
		key  string
	}
	changed := make(map[name]struct{})
	entries := make(map[string]struct{})
	foreign := make(map[string]struct{})
	lookAtForeign := s.resumed
	if s.resumed { // nobody knows what it was told
		u.Tainted, u.TaintedChanged, u.Reissue = st.Tainted(), true, f.reissue(st)
		s.tainted = u.Tainted
	}
	for n := s.cursor; n < f.next; n++ {
		change := f.ring[n%uint64(len(f.ring))].change
		switch change.Kind {
		case domain.ChangeEntry:
			if s.concerns(change) {
				entries[change.Key] = struct{}{}
				lookAtForeign = true
			}
		case domain.ChangeForeignBundle:
			foreign[change.Key] = struct{}{}
			lookAtForeign = true
		default:
			changed[name{change.Kind, change.Key}] = struct{}{}
		}
	}
	for _, id := range slices.Sorted(maps.Keys(entries)) {
		if e, ok := st.Entry(id); ok && s.holds(st, e) {
			u.Entries = append(u.Entries, e)
		} else {
			u.DeletedEntries = append(u.DeletedEntries, id)
		}
		relevant = true
	}
	if lookAtForeign {
		relevant = s.deltaForeign(st, foreign, &u) || relevant
	}
	for change := range changed {
		switch change.kind {
		case domain.ChangeCluster:
			u.Cluster = st.Cluster()
		case domain.ChangeMembers:
			u.Members, u.MembersChanged = st.Members(), true
		case domain.ChangeOwnBundle:
			u.OwnBundle = ownBundle(st)
		case domain.ChangeObject:
			if !catalog.HostsSee(change.key) {
				continue
			}
			if o, ok := st.Object(change.key); ok {
				u.Objects = append(u.Objects, catalog.ForHosts(o))
			} else {
				u.DeletedObjects = append(u.DeletedObjects, change.key)
			}
		case domain.ChangeDistrust:
			if d, ok := f.distrustItem(st, change.key); ok {
				u.Distrust = append(u.Distrust, d)
			} else {
				u.DeletedDistrust = append(u.DeletedDistrust, change.key)
			}
		case domain.ChangeAuthority:
			// It is news when it stands in the bundle, which is told by itself, and when it
			// is tainted or that has ended.
			tainted := st.Tainted()
			if slices.Equal(tainted, s.tainted) {
				continue
			}
			u.Tainted, u.TaintedChanged, u.Reissue = tainted, true, f.reissue(st)
			s.tainted = tainted
		default:
			continue // agents are no news to others
		}
		relevant = true
	}
	slices.SortFunc(u.Distrust, func(a, b *statev1.Distrust) int { return compare(a.GetId(), b.GetId()) })
	slices.Sort(u.DeletedDistrust)
	slices.SortFunc(u.Objects, func(a, b *statev1.Object) int {
		return compare(domain.ObjectKey(a), domain.ObjectKey(b))
	})
	slices.Sort(u.DeletedObjects)
	s.forLevel(st, &u)
	return u, relevant
}

// deltaForeign finds which foreign bundles the subscriber should hold now, and takes
// the others from it. Right after a resume nobody knows what it holds: it is told of
// all.
func (s *Session) deltaForeign(st *domain.State, changed map[string]struct{}, u *Update) (relevant bool) {
	entitled := federates(s.entries(st))
	for td := range entitled {
		b, ok := s.feed.ForeignBundle(st, td)
		if !ok {
			continue
		}
		_, has := s.foreign[td]
		_, isNew := changed[td]
		if !has || isNew {
			u.Bundles = append(u.Bundles, b)
			s.foreign[td] = struct{}{}
		}
	}
	gone := maps.Clone(s.foreign)
	if s.resumed {
		maps.Copy(gone, changed)
		for _, b := range st.ForeignBundles() {
			gone[b.GetTrustDomain()] = struct{}{}
		}
	}
	for td := range gone {
		_, ok := s.feed.ForeignBundle(st, td)
		if _, may := entitled[td]; may && ok {
			continue
		}
		delete(s.foreign, td)
		u.DeletedBundles = append(u.DeletedBundles, td)
	}
	slices.SortFunc(u.Bundles, compareBundles)
	slices.Sort(u.DeletedBundles)
	return len(u.Bundles)+len(u.DeletedBundles) > 0
}

// entries are those the subscriber is told of: an agent those of its host, another
// subscriber its own.
func (s *Session) entries(st *domain.State) []*statev1.Entry {
	if s.who.EntryID == "" {
		return st.HeldBy(s.who.Agent)
	}
	if e, ok := st.Entry(s.who.EntryID); ok {
		return []*statev1.Entry{e}
	}
	return nil
}

func (s *Session) holds(st *domain.State, e *statev1.Entry) bool {
	if s.who.EntryID == "" {
		agent, _ := st.Agent(s.who.Agent)
		return ca.Entitled(agent, e)
	}
	return e.GetId() == s.who.EntryID
}

func (s *Session) concerns(change domain.Change) bool {
	if s.who.EntryID == "" {
		return slices.Contains(change.Hosts, s.who.Agent)
	}
	return change.Key == s.who.EntryID
}

// federates is the set of trust domains whose X.509 bundles the entries may hold (I6).
func federates(entries []*statev1.Entry) map[string]struct{} {
	set := make(map[string]struct{})
	for _, e := range entries {
		for _, td := range e.GetFederatesWith() {
			set[td] = struct{}{}
		}
	}
	return set
}

func ownBundle(st *domain.State) *OwnBundle {
	own := OwnBundleOf(st)
	return &own
}

// OwnBundleOf reads the own bundle from the state.
func OwnBundleOf(st *domain.State) OwnBundle {
	x509, sequence := st.OwnBundle()
	return OwnBundle{
		X509: x509, JWT: st.OwnKeys(statev1.KeyUse_KEY_USE_JWT), WIT: st.OwnKeys(statev1.KeyUse_KEY_USE_WIT),
		Sequence: sequence,
	}
}

func forSubscribers(objects []*statev1.Object) []*statev1.Object {
	out := make([]*statev1.Object, 0, len(objects))
	for _, o := range objects {
		if told := catalog.ForHosts(o); told != nil {
			out = append(out, told)
		}
	}
	return out
}
