package compare

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"
)

const (
	// Patience is how long two nodes must contradict the subscriber's own.
	Patience = 15 * time.Second
	// Fresh is how old a statement may be to count.
	Fresh = 12 * time.Second
	// mostPause bounds what one look adds to the time of a contradiction: after a pause of
	// the process nothing has been heard for long.
	mostPause = 3 * time.Second
)

// Judge compares a subscriber's view with what other CA nodes state. It hears what was
// verified only.
type Judge struct {
	node   string // where the view comes from
	epoch  uint32
	view   History
	others map[string]*other
	looked time.Time
}

type other struct {
	statement *Statement
	made      time.Time // by the subscriber's clock

	differs [parts]time.Duration // for how long, less half of how long not
	behind  mark                 // the view lacks this revision, which the other has
	ahead   mark                 // the other lacks this revision, which the view claims
}

// mark is a revision that one side had when the other did not.
type mark struct {
	revision uint64
	since    time.Time
}

// watch moves the mark: one has a revision, the other has come so far.
func (m *mark) watch(now time.Time, one, other uint64) {
	switch {
	case one <= other:
		*m = mark{}
	case m.since.IsZero() || other >= m.revision:
		*m = mark{one, now}
	}
}

func (m *mark) lasts(now time.Time) bool {
	return !m.since.IsZero() && now.Sub(m.since) >= Patience
}

// Node says from which CA node the view comes from now on. What was held against the one
// before does not count against it.
func (j *Judge) Node(id string) {
	if j.node == id {
		return
	}
	j.node, j.view = id, History{}
	for _, o := range j.others {
		o.differs, o.behind, o.ahead = [parts]time.Duration{}, mark{}, mark{}
	}
}

// View says what the subscriber holds.
func (j *Judge) View(epoch uint32, revision uint64, c Content) {
	if epoch != j.epoch {
		j.epoch, j.view = epoch, History{}
	}
	j.view.Add(revision, c)
}

// Heard takes a statement that was made at a time by the subscriber's clock. One that is
// older than the last one of that node is passed over.
func (j *Judge) Heard(s *Statement, made time.Time) {
	if j.others == nil {
		j.others = map[string]*other{}
	}
	o := j.others[s.Member]
	if o == nil {
		o = &other{}
		j.others[s.Member] = o
	}
	if o.statement == nil || s.Epoch > o.statement.Epoch || s.Epoch == o.statement.Epoch && s.Time.After(o.statement.Time) {
		o.statement, o.made = s, made
	}
}

// now is what the view holds at last, alone: what it held before excuses nothing.
func (j *Judge) now() *History {
	var last History
	for p, spans := range j.view {
		last[p] = spans[max(0, len(spans)-1):]
	}
	return &last
}

// Forget drops the nodes that are not to be kept.
func (j *Judge) Forget(keep func(id string) bool) {
	maps.DeleteFunc(j.others, func(id string, _ *other) bool { return !keep(id) })
}

// Age is how old the newest statement of a node is; false if there is none.
func (j *Judge) Age(id string, now time.Time) (time.Duration, bool) {
	o := j.others[id]
	if o == nil {
		return 0, false
	}
	return now.Sub(o.made), true
}

// Verdict is what comparing came to.
type Verdict int

// The verdicts.
const (
	Unknown      Verdict = iota // nobody else is heard, or nothing can be compared
	Agrees                      // at least one other holds the same
	Doubted                     // the only other one that is heard contradicts
	Contradicted                // two others, who agree with each other, contradict
)

// Decision is a verdict, with who says so and why.
type Decision struct {
	Verdict Verdict
	By      []string // ids of who says so
	Why     string
	// OnlyDistrust: nothing but the distrust items differ. Items that the view has and the
	// others lack are no reason to leave: one node may deny. Differing identifies both sides.
	OnlyDistrust bool
	Differing    string
	Late         bool // the view lacks what the others have, and contradicts nothing else
	Confirmed    bool // one other has the same member table
}

// Decide compares. counts says whose statements count; follows, whether the node that the
// view comes from still sends: else it is no fault of that node that the view lacks what the
// others have.
func (j *Judge) Decide(now time.Time, follows bool, counts func(id string) bool) Decision {
	var pause time.Duration
	if !j.looked.IsZero() {
		pause = min(max(now.Sub(j.looked), 0), mostPause)
	}
	j.looked = now
	revision := j.view.Revision()
	if revision == 0 {
		return Decision{}
	}
	var d Decision
	var heard, against, agree []string
	view := j.now()
	for _, id := range slices.Sorted(maps.Keys(j.others)) {
		o := j.others[id]
		if id == j.node || !counts(id) || o.statement.Epoch != j.epoch || now.Sub(o.made) > Fresh {
			o.behind, o.ahead = mark{}, mark{}
			continue
		}
		heard = append(heard, id)
		theirs := o.statement.History.Revision()
		if o.behind.watch(now, theirs, revision); !follows {
			o.behind = mark{}
		}
		if o.statement.Behind { // it says itself that it may lack something
			o.ahead = mark{}
		} else {
			o.ahead.watch(now, revision, theirs)
		}
		differs, same := false, 0
		for p := range parts {
			equal, known := compare(view, &o.statement.History, p)
			if known && !equal {
				differs = true
				o.differs[p] = min(o.differs[p]+pause, 2*Patience)
				continue
			}
			o.differs[p] = max(0, o.differs[p]-pause/2)
			if known {
				same++
				d.Confirmed = d.Confirmed || p == Members
			}
		}
		switch {
		case o.reason(now) != "":
			against = append(against, id)
		case !differs && same == int(parts):
			agree = append(agree, id)
		}
	}
	for i, a := range against {
		for _, b := range against[:i] {
			one, two := j.others[b], j.others[a]
			if alike(&one.statement.History, &two.statement.History) {
				d.Verdict, d.By, d.Why = Contradicted, []string{b, a}, cmp.Or(one.reason(now), two.reason(now))
				d.OnlyDistrust = one.onlyDistrust(now) && two.onlyDistrust(now)
				d.Late = one.onlyLate(now) && two.onlyLate(now)
				d.Differing = j.differing(one)
				return d
			}
		}
	}
	switch {
	case len(agree) > 0:
		d.Verdict, d.By = Agrees, agree
	case len(heard) == 1 && len(against) == 1:
		o := j.others[against[0]]
		d.Verdict, d.By, d.Why = Doubted, against, o.reason(now)
		d.OnlyDistrust, d.Differing = o.onlyDistrust(now), j.differing(o)
	}
	return d
}

// differing names both sides' distrust items.
func (j *Judge) differing(o *other) string {
	last := func(h *History) (hash Hash) {
		if n := len(h[Distrust]); n > 0 {
			hash = h[Distrust][n-1].Hash
		}
		return hash
	}
	return fmt.Sprintf("%x %x", last(&j.view), last(&o.statement.History))
}

// alike tells whether two nodes agree with each other.
func alike(a, b *History) bool {
	for p := range parts {
		if same, known := compare(a, b, p); known && !same {
			return false
		} else if !known && p != Distrust { // which may change faster than statements are made
			return false
		}
	}
	return true
}

// reason is what a node holds against the view; empty: nothing, or not for long enough.
func (o *other) reason(now time.Time) string {
	switch {
	case o.ahead.lasts(now):
		return fmt.Sprintf("it claims revision %d, which the others do not reach", o.ahead.revision)
	case o.behind.lasts(now):
		return fmt.Sprintf("it lacks revision %d, which the others have", o.behind.revision)
	}
	for p := range parts {
		if o.differs[p] >= Patience {
			return fmt.Sprintf("its %s are not those of the others", p)
		}
	}
	return ""
}

func (o *other) onlyDistrust(now time.Time) bool {
	return !o.ahead.lasts(now) && !o.behind.lasts(now) && o.differs[Members] < Patience && o.differs[Bundle] < Patience
}

func (o *other) onlyLate(now time.Time) bool {
	return !o.ahead.lasts(now) && o.behind.lasts(now) && o.differs == [parts]time.Duration{}
}
